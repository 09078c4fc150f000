"""Find q, k and v of an attention: in which layers they are made, and how many heads they have.

One forward with gradients shows it, whatever the layers are: a channel of a layer belongs to q if q depends on it.

Shapes: B batch, H heads, N tokens, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.base.author import adapter_that_raised, line_of
from petune.base.errors import AttachError, PetuneError
from petune.injector.hooks.torch_attention import Projections
from petune.injector.qkv import qkv_called
from petune.sites.forward import device_of, dtype_of, tensors_in
from petune.sites.operations import MULTI_HEAD, PRODUCTS, SDPA
from petune.sites.site import Block, Site
from petune.sites.sites import Sites
from petune.sites.undisturbed import undisturbed
from petune.sites.unsuitable import why_method_fails


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of one block, as `Edit.attention` returns it.

    Attributes:
        site: The attention.
        q, k, v: Sites of a layer's output, or of a part of it, which `after` and `parallel` can change. In torch's
            `nn.MultiheadAttention`, which calls no such layer, it computes in steps while they are edited: the same up
            to rounding. None where a module calls torch's function with weights of its own.
        num_heads: Heads of the queries.
        num_kv_heads: Heads of keys and values; fewer than `num_heads` where several heads share them.
        head_dim: Width of a head of queries and keys; in XCiT, whose channels attend to each other, as many of them.
        v_head_dim: Width of a head of values.
        scale: Factor of q · k before the softmax.
    """

    site: Site
    q: Site | None
    k: Site | None
    v: Site | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float


@dataclass
class _Recorded:
    """Operations of one attention in a forward.

    Attributes:
        operands: q, k and v as (B, H, N, D), from fused attention or from two products.
        scale: Factor of q · k, if the operation was given one.
        outputs: What each linear layer inside returned.
        is_multi_head: True if torch's own attention computed it, from weights.
        num_heads: Of torch's own attention.
        caller: The module of torch's own class that computed it.
    """

    operands: list[Tensor] = field(default_factory=list)
    scale: float | None = None
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    is_multi_head: bool = False
    num_heads: int = 0
    caller: nn.Module | None = None


def find_attention(
    model: nn.Module, sites: Sites, block: Block, layers: Sequence[Site], known: dict[nn.Module, Projections]
) -> Attention:
    """Return q, k and v of a block's attention.

    Args:
        model: Modes, flags and random state are as before afterwards.
        sites: Its sites.
        block: The block.
        layers: The linear layers that the forward calls inside the attention.
        known: By attention of torch's own class, the layers that make q, k and v where they are edited. May grow.

    Raises:
        SiteNotFound: The block has no attention, or several.
        AttachError: No softmax of q · k was found there; or a layer's channels of q, k or v are not in one row.
    """
    site = block.attn
    if device_of(model).type == "meta":
        raise AttachError(
            f"the attention {site.where} of {sites.model} cannot be looked into on the meta device, which has no "
            "values. Build the model on a real device"
        )
    recorded = _record(model, sites, site, layers)
    if recorded.is_multi_head:
        return _of_torch(model, site, recorded, known)
    if len(recorded.operands) != 3:
        raise AttachError(
            f"the attention {site.where} of {sites.model} computes no softmax of q · k over (B, heads, N, D) that "
            "petune can follow. Use a method that edits whole layers"
        )
    q, k, v = recorded.operands
    own = getattr(site.enter, "scale", None)
    scale = recorded.scale if recorded.scale is not None else own if isinstance(own, float) else q.shape[-1] ** -0.5
    parts = [_part(name, x, recorded, layers, site) for name, x in (("q", q), ("k", k), ("v", v))]
    if parts[0].dim == q.shape[1] * q.shape[-2] != q.shape[1] * q.shape[-1]:
        q, k, v = q.mT, k.mT, v.mT  # channels attend to channels (XCiT): tokens are the last axis
    return Attention(
        site=site,
        q=parts[0],
        k=parts[1],
        v=parts[2],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        scale=scale,
    )


def _of_torch(model: nn.Module, site: Site, recorded: _Recorded, known: dict[nn.Module, Projections]) -> Attention:
    """Return torch's own attention, with layers for q, k and v that it calls once a verb has edited one of them."""
    dim, caller = recorded.operands[0].shape[-1], recorded.caller
    width = dim // recorded.num_heads
    parts: list[Site | None] = [None] * 3
    if caller is not None:
        layers = known.setdefault(caller, Projections(caller))
        path = next(name for name, m in model.named_modules() if m is caller).replace(".base_layer", "")
        made = {"q": layers.q, "k": layers.k, "v": layers.v}
        ends: list[dict[str, Any]] = [
            {"role": name, "path": f"{path}.{name}", "enter": m, "exit_path": f"{path}.{name}", "exit": m}
            for name, m in made.items()
        ]
        parts = [Site(dim=dim, layout="BNC", model=site.model, **end) for end in ends]
    q, k, v = parts
    sizes = {"num_heads": recorded.num_heads, "num_kv_heads": recorded.num_heads, "head_dim": width}
    return Attention(site=site, q=q, k=k, v=v, v_head_dim=width, scale=width**-0.5, **sizes)


def _part(name: str, operand: Tensor, recorded: _Recorded, layers: Sequence[Site], site: Site) -> Site:
    """Return the part of a layer's output that q, k or v is made of."""
    outputs = [recorded.outputs[layer.module] for layer in layers if layer.module in recorded.outputs]
    called = [layer for layer in layers if layer.module in recorded.outputs]
    grads: Sequence[Tensor | None] = ()
    with torch.inference_mode(False), torch.enable_grad():
        weights = torch.linspace(1, 2, operand.numel()).view_as(operand)  # a plain sum is constant behind a norm
        total = (operand * weights.to(operand)).sum()
        if outputs and total.requires_grad:
            grads = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    found = [(layer, g) for layer, g in zip(called, grads, strict=False) if g is not None and bool(g.any())]
    if not found:
        raise AttachError(
            f"{name} of {site.where} comes from no linear layer that the forward calls (it may read the weights "
            "without calling the layer). Use a method that edits whole attentions, such as adaptformer"
        )
    layer, gradient = found[-1]  # the last layer before it
    is_image = isinstance(layer.module, nn.modules.conv._ConvNd)
    channels_last = gradient.movedim(1, -1) if is_image else gradient
    channels = channels_last.flatten(0, -2).ne(0).any(0).nonzero().flatten().tolist()
    start, stop, width = channels[0], channels[-1] + 1, channels_last.shape[-1]
    if channels != list(range(start, stop)):
        raise AttachError(
            f"{name} of {site.where} is no slice of what {layer.path} returns: its channels are not in one row. Use a "
            "method that edits whole layers"
        )
    layout = "BCHW" if is_image else layer.layout
    part = None if (start, stop) == (0, width) else (start, stop)
    return replace(layer, role=name, dim=stop - start, layout=layout, part=part)


def _record(model: nn.Module, sites: Sites, site: Site, layers: Sequence[Site]) -> _Recorded:
    recorded = _Recorded()
    recorder = _Recorder(recorded)

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.__enter__()  # type: ignore[no-untyped-call]

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        recorded.outputs[module] = output.detach().requires_grad_()
        return recorded.outputs[module].clone()  # the model may change it in place

    def call(module: nn.Module, args: Any) -> None:
        recorded.caller = recorded.caller if recorded.operands else module

    hooks = [
        *(m.register_forward_pre_hook(call) for m in site.enter.modules() if isinstance(m, nn.MultiheadAttention)),
        site.enter.register_forward_pre_hook(start, with_kwargs=True),
        site.exit.register_forward_hook(stop, always_call=True),
        *(layer.module.register_forward_hook(keep) for layer in layers),
    ]
    try:
        kept = undisturbed(model), qkv_called(model), _no_fast_path()
        with kept[0], kept[1], kept[2], torch.inference_mode(False), torch.enable_grad():
            sites.input_spec.noise(1).to(device_of(model), dtype_of(model)).call(model)
    except PetuneError:
        raise
    except Exception as error:  # whatever a model's own code raises
        cause = f"its forward fails with gradients ({type(error).__name__}: {error}{line_of(error)})"
        if adapter_that_raised(error) is not None:
            cause = why_method_fails(model, error)
        raise AttachError(f"the attention {site.where} of {sites.model} cannot be looked into: {cause}") from error
    finally:  # not before `undisturbed` has put back the hooks that it found
        for hook in hooks:
            hook.remove()
    return recorded


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Recorder(TorchFunctionMode):
    """Keeps q, k and v of the first attention that is computed."""

    def __init__(self, recorded: _Recorded) -> None:
        super().__init__()
        self.recorded = recorded
        self.product: list[Tensor] = []
        self.weights: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, recorded = getattr(func, "__name__", ""), self.recorded
        if recorded.operands:
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if name == MULTI_HEAD:
            recorded.operands, recorded.is_multi_head = tensors[:3], True
            recorded.num_heads = args[4] if len(args) > 4 else kwargs["num_heads"]
        elif name == SDPA:
            recorded.operands, recorded.scale = tensors[:3], kwargs.get("scale")
        result = func(*args, **kwargs)
        if name in PRODUCTS and len(tensors) == 2 and all(x.ndim == 4 for x in tensors):
            if self.weights == tensors[0].shape[-1] == tensors[1].shape[-2] and self.product:
                recorded.operands = [*self.product, tensors[1]]
            elif tensors[0].shape[-1] == tensors[1].shape[-2]:
                self.product = [tensors[0], tensors[1].mT]
        if name == "softmax" and isinstance(result, Tensor) and self.product:
            self.weights = result.shape[-1]
        return result

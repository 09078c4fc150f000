"""Name layers that compute only tokens that nothing reads, such as the queries of patches if one token is pooled.

The output's graph does not tell: it holds the whole tensor, of which a later operation takes a part. Gradients do.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.injector.attachment import Attachment
from petune.injector.hooks.base import Holder
from petune.injector.unreached import outermost_dead
from petune.sites.forward import device_of, dtype_of, inference, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.returned import tensors_returned
from petune.sites.site import Block, is_within
from petune.sites.undisturbed import undisturbed

LOG = logging.getLogger(__name__)

NOISE = 0.1
"""Standard deviation of random numbers in place of zeros."""
Rows = dict[nn.Module, int]
"""How many tokens of each image have entered each layer."""


@contextlib.contextmanager
def rows_entering(model: nn.Module, blocks: Iterable[Block], num_images: int) -> Iterator[Rows]:
    """Collect how many tokens of each image enter each linear layer and convolution of some blocks."""
    rows: Rows = {}

    def enter(module: nn.Module, args: Any) -> None:
        x = next(tensors_in(args), None)
        width = getattr(module, "in_features", 0) or getattr(module, "in_channels", 0)
        if x is not None and isinstance(width, int) and width:
            rows[module] = rows.get(module, 0) + x.numel() // width // num_images

    modules = {m for block in blocks for m in _inside(model, block).values()}
    with removed_after([module.register_forward_pre_hook(enter) for module in modules]):
        yield rows


def last_blocks(attachment: Attachment) -> list[Block]:
    """Return the last block of each tower: tokens that leave an earlier one are read by the attention of the next."""
    return [tower.blocks[-1] for tower in attachment.sites.towers if tower.blocks]


def layers_of_unread_tokens(attachment: Attachment, leaves: Set[int], rows: Rows) -> list[str]:
    """Return layers of last blocks in which a method trains, and gets zero gradients: nothing reads their tokens.

    Where a layer of such a block gets fewer tokens than another one, one more forward of noise tells, with a backward
    in these blocks alone. Weights that are zero, such as those of a new head, count as random ones.

    Args:
        attachment: The attachment.
        leaves: Identities of the parameters that the output depends on. Others are not named.
        rows: What `rows_entering` has collected in the last blocks.
    """
    model = attachment.model
    every = [(block, _inside(model, block)) for block in last_blocks(attachment)]
    chosen = [(block, inside) for block, inside in every if len({rows[m] for m in inside.values() if m in rows}) > 1]
    modules = {path: m for _, inside in chosen for path, m in inside.items()}
    within = {id(p) for m in modules.values() for p in m.parameters(recurse=False)}
    judged = dead = {id(p) for p in attachment.tuned.values()} & within & leaves
    for training in (False, True):  # in train mode the output may hold more, such as a class for each patch
        blocks = [block for block, _ in chosen]
        dead = _without_gradient(attachment, dead, blocks, rows, training=training) if dead else dead
    dead = _without_dead_units(modules.values(), judged, dead)
    return [path for path in outermost_dead(attachment, dead, {*modules}) if not _is_one_of_many(path, modules)]


def _without_dead_units(modules: Iterable[nn.Module], judged: Set[int], dead: set[int]) -> set[int]:
    """Return the dead parameters of adapters and layers of which none is alive.

    In others something hides a part, such as a ReLU whose few units are all off; the tokens are read.
    """
    for module in modules:
        every = module.modules() if isinstance(module, Holder) else [module]
        own = {id(p) for m in every for p in m.parameters(recurse=False)} & judged
        dead = dead if own <= dead else dead - own
    return dead


def _inside(model: nn.Module, block: Block) -> dict[str, nn.Module]:
    """Return the modules of a block by path, with what a method has put around or into them."""
    own = {id(m) for m in block.own_modules}
    modules = dict(model.named_modules())
    roots = [path.removesuffix(".base_layer") for path, m in modules.items() if id(m) in own]
    return {path: m for path, m in modules.items() if any(is_within(path, root) for root in roots)}


def _without_gradient(
    attachment: Attachment, judged: set[int], blocks: list[Block], rows: Rows, *, training: bool
) -> set[int]:
    """Return those of the parameters `judged` whose gradients are zero for an image of noise.

    A layer that does not get as many tokens as of the black image chooses them by their values, as experts do: noise
    tells nothing about it, and none of its parameters is returned.
    """
    model, spec = attachment.model, attachment.sites.input_spec
    kept = undisturbed(model, math.inf) if training else contextlib.nullcontext()
    try:
        with kept, inference(model), torch.enable_grad(), rows_entering(model, blocks, 1) as entered:
            if training:
                model.train()
            tensors, sought = _as_leaves(model, judged)
            images = spec.noise(2 if training else 1).to(device_of(model), dtype_of(model))
            outputs = functional_call(model, tensors, images.args, dict(images.kwargs), tie_weights=False)
            gradients = _gradients(outputs, [tensors[key] for key in sought])
    except Exception:  # a value that is read, quantized weights, a train mode that wants targets
        LOG.debug("no forward with gradients of noise, training=%s", training, exc_info=True)
        return judged if training else set()
    alive = {id_ for id_, g in zip(sought.values(), gradients, strict=True) if g is not None and bool(g.any())}
    chosen = [m for m in rows if not training and entered.get(m) != rows[m]]
    return judged - alive - {id(p) for m in chosen for p in m.parameters()}


def _as_leaves(model: nn.Module, judged: Set[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return tensors to run a model with, and which of them are leaves for the parameters `judged`, by key.

    No other one gets a gradient, and zeros become random numbers.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    sought: dict[str, int] = {}
    for path, module in model.named_modules():  # once, even if it is shared: see `meta_tensors`
        for name, p in module.named_parameters(recurse=False):
            key = f"{path}.{name}" if path else name
            values = p.detach()
            if type(p) is nn.Parameter and p.is_floating_point() and not values.any():
                values = (NOISE * torch.randn(p.shape, generator=generator)).to(values)
            if id(p) in judged:
                values, sought[key] = values.clone().requires_grad_(), id(p)
            if p.requires_grad or values.data_ptr() != p.data_ptr():
                tensors[key] = values
    return tensors, sought


def _gradients(outputs: Any, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a sum of all outputs with random factors; no sum of softmaxes, which is constant."""
    generator = torch.Generator().manual_seed(1)
    returned = [y for y in tensors_returned(outputs) if y.requires_grad and y.is_floating_point()]
    factors = [torch.randn(y.shape, generator=generator).to(y) for y in returned]
    return torch.autograd.grad(returned, leaves, factors, allow_unused=True)


def _is_one_of_many(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a module is inside a list of modules of one class in a block: experts, each for some tokens."""
    parts = path.split(".")
    around = [modules.get(".".join(parts[:i])) for i in range(1, len(parts))]
    lists = [m for m in around if isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m) > 1]
    return any(len({type(child) for child in m.children()}) == 1 for m in lists)

"""Examine one pair of model and method: it works, it is refused with a reason, or it is wrong.

`petune.check_tuner` verifies the contract. This file computes the same things a second time, with hooks of its own, so
that a mistake of petune cannot hide behind petune's own machinery.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune.base.errors import ContractViolation
from petune.injector.hooks.hidden_prompts import HiddenPrompts, KeyCounts
from petune.injector.hooks.prompts import Prompts
from petune.injector.hooks.reading import Parallel
from petune.injector.registry import build_tuner, parse_method
from petune.plugin_dev.finding import Property, examine_all, names_of
from petune.plugin_dev.properties import PROPERTIES
from petune.plugin_dev.trial import Trial, logits
from petune.sites.forward import tensors_in
from petune.sites.input_spec import Inputs
from survey.snapshot import differences, snapshot


@dataclass(frozen=True)
class Outcome:
    """The result for a pair.

    Attributes:
        state: `ok`, `refused` (by petune, with a message) or `wrong`.
        detail: The reason of a refusal, the property that does not hold, or the number of verified properties.
    """

    state: str
    detail: str


class Wrong(AssertionError):
    """A property does not hold."""


METHODS = (
    "linear",
    "full",
    "partial",
    "adaptformer",
    "houlsby",
    "vpt",
    "vpt:deep=false",
    "lora",
    "ssf",
    "bitfit",
    "norm",
)
"""The columns of the table; any other registered method can be surveyed with --methods."""


def examine(model: nn.Module, method: str, example: Any = None, sites: petune.Sites | None = None) -> Outcome:
    """Run all checks of one method on one model; the model is not changed.

    Args:
        model: Any model; its weights should matter (see `enliven`). One without a classifier is tuned without.
        method: A name, with options if any: `vpt:deep=false`.
        example: What the model takes, if that is not one image.
        sites: The model's, if they are known.
    """
    name, options = parse_method(method)
    sites = sites or petune.find_sites(model, example=example)
    arguments = {"example": example, "train_head": "head" in sites.parts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Outcome("ok", f"{_verify(model, sites, name, options, arguments)} properties")
        except petune.PetuneError as error:
            # a property that does not hold is a PetuneError, too
            return Outcome("wrong" if isinstance(error, ContractViolation) else "refused", str(error))
        except Exception as error:  # a survey lists every outcome
            return Outcome("wrong", f"{type(error).__name__}: {error}")


def enliven(model: nn.Module, seed: int = 0, example: Any = None) -> nn.Module:
    """Give every tensor a value that matters: zero heads, small LayerScale and unused statistics hide mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * std

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise(parameter, 0.1 if parameter.ndim < 2 else 0.02)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:  # real statistics, or the numbers of a deep model overflow
            petune.find_sites(model, example=example).input_spec.noise(4, seed).call(model.train())
    return model.eval()


def _verify(
    model: nn.Module, sites: petune.Sites, name: str, options: dict[str, Any], arguments: dict[str, Any]
) -> int:
    copied = copy.deepcopy(model).eval()
    x = sites.input_spec.noise(2, seed=1)
    logits(copied, x)  # a first forward may install hooks (towers of transformers) or store something (Swin's shift)
    copied.train().eval()  # drops what eval mode computes once from weights, as petune does (LeViT's biases)
    for index, parameter in enumerate(copied.parameters()):  # detach must restore flags, and not set them all alike
        parameter.requires_grad_(index % 8 == 0)  # most are frozen, as by a user; a few among others stay so
    before = snapshot(copied)
    torch.manual_seed(0)
    try:
        att = petune.attach(copied, build_tuner(name, **options), name=name, **arguments)
    except petune.PetuneError:
        _compare(before, snapshot(copied), "a refused model is as before")
        raise
    verified = sum(check(att, model, x) for check in (_check_count, _check_parallel, _check_prompts))
    properties = _properties(model, att)
    att.detach()
    _compare(before, snapshot(copied), "detach restores keys, flags, hooks, modes and values")
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    trial = Trial(build_tuner(name, **options), copied, name, **arguments)
    return verified + 1 + len(names_of(examine_all(properties, trial), name))


def _properties(model: nn.Module, att: petune.Attachment) -> list[Property[Trial]]:
    """Return the properties of the contract that say something about petune, and not about the model.

    A model may compare or pack the images of a batch, or return its frames by time. It may use some layers for other
    images only, such as experts.
    """
    spec = att.sites.input_spec
    two = logits(model, spec.noise(2))
    alone = logits(model, spec.select(spec.noise(2), [0]))
    related = len(two) != 2 * len(alone) or not torch.allclose(two[: len(alone)], alone, atol=1e-3)
    skipped = {"independent images"} if related else set()
    frozen = logits(copy.deepcopy(model).requires_grad_(False), spec.noise(2))
    if not torch.equal(frozen, two):  # torch multiplies frozen matrices in another way where tokens are not contiguous
        skipped.add("disabled output")
    properties = [prop for prop in PROPERTIES if prop.name not in skipped]
    if _has_idle_layers(copy.deepcopy(model), spec.noise(2)):
        trained = Property[Trial]("gradients", "the model trains", lambda trial: trial.train() and "")
        properties = [trained if prop.name == "gradients" else prop for prop in properties]
    return properties


def _has_idle_layers(model: nn.Module, x: Inputs) -> bool:
    """Tell if the gradient of a linear layer that the forward calls is zero in the model itself."""
    x.call(model.requires_grad_(True))  # a first forward may install hooks
    with torch.enable_grad():
        sum(t.float().square().mean() for t in tensors_in(x.call(model)) if t.requires_grad).backward()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return any(m.weight.grad is not None and not m.weight.grad.any() for m in layers)


def _compare(before: dict[str, Any], after: dict[str, Any], property_name: str) -> None:
    # caches of weights (LeViT's) are dropped on purpose, because weights may have been trained
    allowed = ("torch random state", "_cache")
    lines = differences(before, after)
    changed = [line for line in lines if not any(part in line.partition(": ")[0] for part in allowed)]
    if changed:
        raise Wrong(f"{property_name}: {changed[0]}")


def _check_count(att: petune.Attachment, model: nn.Module, x: Inputs) -> int:
    """Compare the tuned count with the method's formula, with widths measured by hooks of this file."""
    formula = FORMULAS.get(att.name)
    if formula is None:
        return 0
    expected = formula(att, _widths(att, x))
    if att.counts.tuned != expected:
        raise Wrong(f"the tuned count is {att.counts.tuned}, by the formula it is {expected}")
    return 1


def _widths(att: petune.Attachment, x: Inputs) -> list[int]:
    """Return the width of the tokens that leave each block."""
    widths: dict[int, int] = {}
    handles = []
    for i, block in enumerate(att.sites.blocks):

        def hook(module: nn.Module, args: Any, output: Any, i: int = i, layout: str = block.layout) -> None:
            y = next(tensors_in(output))
            widths[i] = y.shape[1] if layout == "BCHW" else y.shape[-1]

        handles.append(block.exit.register_forward_hook(hook))
    logits(att.model, x)
    for handle in handles:
        handle.remove()
    return [widths[i] for i in sorted(widths)]


def _adaptformer(att: petune.Attachment, widths: list[int]) -> int:
    m = att.tuner.config.bottleneck
    return sum(2 * d * m + m + d for d in widths)


def _vpt(att: petune.Attachment, widths: list[int]) -> int:
    config = att.tuner.config
    if config.deep:
        return sum(widths) * (config.num_prompts or 10)
    firsts = {tower.blocks[0].index for tower in att.sites.towers}
    return sum(widths[i] for i in firsts) * (config.num_prompts or 50)


def _full(att: petune.Attachment, widths: list[int]) -> int:
    classifier = att.sites.parts.get("head")
    head = {id(p) for m in classifier.modules for p in m.parameters()} if classifier else set()
    return sum(p.numel() for p in att.model.parameters() if id(p) not in head)


def _norm(att: petune.Attachment, widths: list[int]) -> int:
    norms = [m for m in att.model.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    return sum({id(p): p.numel() for m in norms for p in m.parameters(recurse=False)}.values())


Formula = Callable[[petune.Attachment, list[int]], int]
FORMULAS: dict[str, Formula] = {
    "adaptformer": _adaptformer,
    "vpt": _vpt,
    "full": _full,
    "linear": lambda att, widths: 0,
}


def _check_parallel(att: petune.Attachment, model: nn.Module, x: Inputs) -> int:
    """Check some adapters, each alone: the change at EXIT is `adapter(what enters ENTER)`, by hooks of this file."""
    holders = [h for h in att.model.modules() if isinstance(h, Parallel)]
    for holder in holders:
        for parameter in holder.adapter.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        holder.enabled = False
    for holder in holders[:: max(1, len(holders) // 3)]:
        enter, exit = _modules_of(att.model, holder)
        entered, plain = _run(att.model, x, enter, exit)
        holder.enabled = True
        _, changed = _run(att.model, x, enter, exit)
        holder.enabled = False
        before = _channels_last(plain, holder.exit_layout)
        after = _channels_last(changed, holder.exit_layout)
        with torch.no_grad():
            expected = holder.adapter(_channels_last(entered, holder.enter_layouts[0])).reshape(before.shape)
        if not torch.allclose(after - before, expected, atol=1e-4, rtol=1e-3):
            raise Wrong(f"the change of {type(exit).__name__} is not adapter(what enters {type(enter).__name__})")
    for holder in holders:
        holder.enabled = True
    return int(bool(holders))


def _modules_of(model: nn.Module, holder: Parallel) -> tuple[nn.Module, nn.Module]:
    """Return the modules that have the holder's two hooks."""

    def has_hook(hooks: Any) -> bool:
        return any(getattr(hook, "__self__", None) is holder for hook in hooks.values())

    enter = next(m for m in model.modules() if has_hook(m._forward_pre_hooks))
    return enter, next(m for m in model.modules() if has_hook(m._forward_hooks))


def _channels_last(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1) if layout == "BCHW" else x


def _run(model: nn.Module, x: Inputs, enter: nn.Module, exit: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what enters ENTER and leaves EXIT in one forward, at their first call."""
    tensors: dict[str, Tensor] = {}

    def pre(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors.setdefault("enter", next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).clone())

    def post(module: nn.Module, args: Any, output: Any) -> None:
        tensors.setdefault("exit", (output if isinstance(output, Tensor) else output[0]).clone())

    handles = [
        enter.register_forward_pre_hook(pre, with_kwargs=True, prepend=True),
        exit.register_forward_hook(post),
    ]
    logits(model, x)
    for handle in handles:
        handle.remove()
    return tensors["enter"], tensors["exit"]


def _check_prompts(att: petune.Attachment, model: nn.Module, x: Inputs) -> int:
    """Check that hidden prompts leave the whole model's output as it was, and that visible ones change it."""
    holders = [h for h in att.model.modules() if isinstance(h, Prompts)]
    if not holders:
        return 0
    with KeyCounts() as counts:
        plain = logits(model, x)
    prompted = logits(att.model, x)
    with contextlib.ExitStack() as stack:
        modes = [stack.enter_context(HiddenPrompts(slot, counts.values)) for slot in {h.slot for h in holders}]
        hidden = logits(att.model, x)
    if not any(mode.num_attentions for mode in modes):
        raise Wrong("no attention had prompts")
    if not torch.allclose(plain, hidden, atol=1e-4 * max(1.0, float(plain.abs().max())), rtol=1e-3):
        raise Wrong(f"hidden prompts change the output by {(plain - hidden).abs().max():.2g}: a position is falsified")
    if torch.allclose(plain, prompted, atol=1e-6):
        raise Wrong("prompts change nothing")
    return 2

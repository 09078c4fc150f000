"""The properties of a forward that leaves nothing behind, and computes each image alone, the same in each mode.

Each is a function from a Trial to the problem in words; the text is empty if the property holds.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from petune.base.author import forward_of
from petune.injector.hooks.around import Around
from petune.injector.hooks.base import Holder, version_of
from petune.plugin_dev.trial import NUM_IMAGES, Trial, logits
from petune.sites.forward import forget_caches
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.logits import logits_of, max_difference, max_value
from petune.sites.undisturbed import undisturbed

ROUNDING = 1e-5
"""Largest difference of equal results, relative to the largest logit above one."""
MANY = 4
"""A large batch has as many times the images."""


def repeatable_evaluation(t: Trial) -> str:
    """Return the problem with a second evaluation, and with one that records gradients."""
    problem = difference(logits(t.model, t.x), t.training.logits, "is there dropout that ignores self.training?")
    if problem:
        return problem
    change = _in_float64_if_it_differs(t, lambda model, x, _: _relative(_with_gradients(model, x), logits(model, x)))
    if not change:
        return ""
    return f"with gradients the output differs by {change:.2g} from that under torch.no_grad()"


def _with_gradients(model: nn.Module, x: Inputs) -> Tensor:
    with torch.enable_grad():
        return logits_of(x.call(model)).detach()


def no_state_between_forwards(t: Trial) -> str:
    """Return what a forward has left behind: another output, a value of a buffer, or a tensor."""
    spec = t.att.sites.input_spec
    own = dict(t.base.named_buffers())
    buffers = {key: b.detach().clone() for key, b in t.model.named_buffers() if key not in own}
    known = [*tensors_kept(t)]
    logits(t.model, spec.select(spec.noise(NUM_IMAGES, seed=1), [0, 1, 2]))
    logits(t.model, spec.noise(NUM_IMAGES, seed=1))
    again = logits(t.model, t.x)
    change = difference(again, t.training.logits, "the output depends on the images of an earlier forward")
    if change:
        return change
    for key, b in t.model.named_buffers():
        if key in buffers and not torch.equal(b, buffers[key]):
            return f"{key} changes in a forward in eval mode, so that the file depends on how often one predicts"
    return tensor_left_behind(t, known)


def tensor_left_behind(t: Trial, known: list[tuple[str, Tensor]]) -> str:
    """Return a message about a tensor that a forward has left in an attribute, or in a container or object there."""
    own = {f"{path}.{name}" for path, module in t.base.named_modules() for name in vars(module)}
    for path, module in t.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and f"{path}.{name}" not in own:
                return f"{path}.{name} keeps a tensor after the forward"
    before = {id(tensor) for _, tensor in known}
    place = next((place for place, tensor in tensors_kept(t) if id(tensor) not in before), "")
    return f"{place} keeps a tensor after the forward" if place else ""


def tensors_kept(t: Trial) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in lists, dicts and objects on the tuner and on adapters, with the attribute there."""
    adapters = {m for holder, _ in t.att.edit_log.placed for m in holder.adapter.modules()}
    adapters |= {m for added in t.att.edit_log.added_modules for m in added.modules()}
    named = [(path, module) for path, module in t.model.named_modules() if module in adapters]
    seen: set[int] = set()
    for path, owner in [*named, (type(t.att.tuner).__name__, t.att.tuner)]:
        for name, value in vars(owner).items():
            if name not in nn.Module().__dict__:
                yield from ((f"{path}.{name}", tensor) for tensor in _tensors_in(value, seen))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in [*value.values()]:
            yield from _tensors_in(item, seen)
    elif isinstance(value, list | tuple | set | deque):
        for item in [*value]:
            yield from _tensors_in(item, seen)
    elif _package_of(value) not in ("petune", "torch", "pydantic", "builtins"):
        yield from _tensors_in(getattr(value, "__dict__", None), seen)


def _package_of(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def unchanged_inputs(t: Trial) -> str:
    """Return the problem with an adapter that writes to what it reads; one around modules passes its input on."""
    found: list[str] = []
    adapters = {h.adapter for h, _ in t.att.edit_log.placed if not isinstance(h, Around)}
    handles = [handle for adapter in adapters for handle in _watch_inputs(adapter, found)]
    with removed_after(handles):
        logits(t.model, t.x)
    return f"{found[0]} changes its input in place. Compute a new tensor: x = x + y, not x += y" if found else ""


def _watch_inputs(adapter: nn.Module, found: list[str]) -> list[RemovableHandle]:
    """Add the adapter's class to a list if a call writes to one of its arguments, also what was there."""
    kept: list[list[tuple[Tensor, Tensor, int]]] = []

    def enter(module: nn.Module, args: Any) -> None:
        kept.append([(x, x.clone(), version_of(x)) for x in _tensors_in(args, set()) if not x.is_nested])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        for x, before, version in kept.pop():
            if version_of(x) != version or not torch.equal(x.nan_to_num(), before.nan_to_num()):
                found.append(f"{type(module).__name__}{forward_of(type(module))}")

    return [adapter.register_forward_pre_hook(enter), adapter.register_forward_hook(leave)]


def independent_images(t: Trial) -> str:
    """Return the problem with images of one batch, a large one, and one in train mode."""
    if change := _in_float64_if_it_differs(t, _change_in_batch):
        return f"an image alone differs by {change:.2g} from the same image in a batch"
    if change := _in_float64_if_it_differs(t, _change_in_large_batch):
        return f"an image in a batch of {MANY * NUM_IMAGES} differs by {change:.2g} from the same one in a batch of 4"
    if change := _in_float64_if_it_differs(t, _change_in_train_mode):
        return (
            f"in train mode, without dropout and BatchNorm, an image alone differs by {change:.2g} from one in a batch"
        )
    return ""


def _in_float64_if_it_differs(t: Trial, change: Any) -> float:
    """Return a change that is more than rounding, which a deep model may amplify and float64 all but removes; or 0."""
    spec = t.att.sites.input_spec
    found = change(t.model, t.x, spec)
    if found >= ROUNDING:
        exact = copy.deepcopy(t.model).double()
        forget_caches(exact)
        found = change(exact, t.x.to("cpu", torch.float64), spec)
    return float(found) if found >= ROUNDING else 0.0


def _change_in_batch(model: nn.Module, x: Inputs, spec: InputSpec) -> float:
    """Return how much logits of single images differ from those in a batch."""
    alone = torch.cat([logits(model, spec.select(x, [i])) for i in range(NUM_IMAGES)])
    return _relative(alone, _own_logits(model, x, spec, [*range(NUM_IMAGES)]))


def _change_in_large_batch(model: nn.Module, x: Inputs, spec: InputSpec) -> float:
    """Return how much logits in a batch of copies of the images differ."""
    few = [*range(NUM_IMAGES)]
    together = _own_logits(model, x, spec, few)
    many = _own_logits(model, x, spec, few * MANY)
    return _relative(many, together.repeat(MANY, *[1] * (together.ndim - 1)))


def _own_logits(model: nn.Module, x: Inputs, spec: InputSpec, samples: list[int]) -> Tensor:
    """Return the logits of some samples; of a model that compares each image with each text, those of its own text."""
    y = logits(model, spec.select(x, samples))
    is_square = y.shape == (len(samples), len(samples))
    if is_square and logits(model, spec.select(x, samples[:1])).shape == (1, 1):
        return y.diagonal()[:, None]
    return y


def _change_in_train_mode(model: nn.Module, x: Inputs, spec: InputSpec) -> float:
    """Return how much logits of single images differ while adapters are in train mode; 0 where they are random."""
    adapters = [
        module for holder in model.modules() if isinstance(holder, Holder) for module in holder.adapter.modules()
    ]
    with undisturbed(model):
        for module in adapters:
            module.training = not isinstance(module, _DropoutNd | _BatchNorm)
        is_random = not torch.equal(logits(model, x), logits(model, x))
        return 0.0 if is_random else _change_in_batch(model, x, spec)


def _relative(y: Tensor, expected: Tensor) -> float:
    return max_difference(y, expected) / max(max_value(expected), 1.0)


def difference(now: Tensor, before: Tensor, problem: str) -> str:
    """Return a problem with the size of the difference; empty if there is none."""
    if torch.equal(now, before):
        return ""
    change = f"differs by {max_difference(now, before):.2g}" if now.shape == before.shape else "another shape"
    return f"{problem} ({change})"

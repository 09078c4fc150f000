"""The properties of a tuner in other number formats, of its random numbers, of its flags and of `calibrate`."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petune.base.author import line_of
from petune.injector.attach import attach
from petune.injector.edit import Edit
from petune.injector.tuner import Tuner
from petune.plugin_dev.trial import Trial, logits, three_steps

FORMATS = (torch.bfloat16, torch.float16)
LEAVE_FLAGS = "Leave train(), eval() and requires_grad to petune: edit.train(…) unfreezes"
SEED = 27182818
"""Of torch; one that nobody sets."""


def number_formats(t: Trial) -> str:
    """Return the problem with the model in half precision, if its backbone computes in it."""
    for dtype in FORMATS:
        x, base = t.x.to("cpu", dtype), copy.deepcopy(t.base).to(dtype)
        try:
            expected = logits(base, x)
        except Exception:  # whatever the backbone's own code, or its inputs, raise
            continue
        try:
            output = logits(attach(base, t.att.tuner, name=t.att.name, **t.options).model, x)
        except Exception as error:
            return f"in {dtype} it raises {type(error).__name__}: {error}{line_of(error)}"
        if output.dtype != expected.dtype:
            return f"in {dtype} the output is {output.dtype}"
    return ""


def random_numbers(t: Trial) -> str:
    """Return the problem with repeating three steps: from the same tensors, and the same seed of torch."""
    torch.manual_seed(SEED)
    fresh = Trial(t.att.tuner, t.base, t.att.name, **t.options)
    fresh.calibrate()
    start = {key: value.clone() for key, value in fresh.model.state_dict().items()}
    results, states = [], []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.set_state(torch.Generator().manual_seed(SEED).get_state())
        three_steps(fresh)
        results.append({key: value.clone() for key, value in fresh.model.state_dict().items()})
        states.append((random.getstate(), np.random.get_state()[1].tolist()))  # type: ignore[index]
        fresh.model.load_state_dict(start)
    if different := _first_difference(*results):
        return (
            f"three steps from the same tensors and the same seed of torch give another {different}. Draw from torch's "
            "generator, not from random, numpy or a generator of your own, and keep what must survive in buffers: a "
            "resumed run has nothing else"
        )
    seeded = [name for name, a, b in zip(("random", "numpy"), *states, strict=True) if a == b]
    seeded += [] if torch.initial_seed() == SEED else ["torch"]
    return f"it sets the seed of {seeded[0]}, which everything else draws from, too" if seeded else ""


def calibration(t: Trial) -> str:
    """Return the problem with calibrating two fresh attachments on the same batches."""
    if type(t.att.tuner).calibrate is Tuner.calibrate:
        return ""
    chosen: list[dict[str, Tensor]] = []
    for seed in range(2):
        torch.manual_seed(0)  # of what adapters start with
        fresh = Trial(t.att.tuner, t.base, t.att.name, **t.options)
        before = {key: p.detach().clone() for key, p in fresh.att.tuned.items()}
        torch.manual_seed(seed)
        fresh.calibrate()
        logits(fresh.model, fresh.x)
        problem = _changed_by_calibrate(fresh, before)
        if problem:
            return problem
        chosen.append(fresh.att.state())
    different = _first_difference(*chosen)
    return f"{different} differs" if different else ""


def _changed_by_calibrate(t: Trial, before: dict[str, Tensor]) -> str:
    now = t.model.state_dict()
    keys = [k for k, old in t.base.state_dict().items() if k in now and not torch.equal(now[k], old)]
    if keys:
        return f"{keys[0]} of the backbone differs after calibrate. Write what was chosen into buffers of adapters"
    chosen = {id(entries.values) for entries in t.att.edit_log.sparse}
    keys = [k for k, p in t.att.tuned.items() if id(p) not in chosen and not torch.equal(p, before[k])]
    if keys:
        return f"{keys[0]} differs after calibrate, which chooses what trains. Write that into a buffer, not a weight"
    values = [*vars(t.att.tuner).values(), *(p for holder, _ in t.att.edit_log.placed for p in holder.parameters())]
    return _gradient_left([*values, *t.model.parameters()])


def _gradient_left(values: list[Any]) -> str:
    left = [v for v in values if isinstance(v, Tensor) and v.is_leaf and v.grad is not None]
    return f"calibrate leaves a gradient at a tensor of shape {tuple(left[0].shape)}" if left else ""


def flags(t: Trial) -> str:
    """Return the problem with modes and requires_grad of the backbone's own modules; attaching resets both."""
    if what := t.training.changed_flags:
        return f"{what} changes in training. {LEAVE_FLAGS}"
    if what := _unfrozen_in_attach(t):
        return f"attach sets requires_grad of {what}, which stays frozen all the same. {LEAVE_FLAGS}"
    return ""


def _unfrozen_in_attach(t: Trial) -> str:
    """Return a parameter of the backbone that `attach` unfreezes by hand; empty if there is none."""
    base, tuner = copy.deepcopy(t.base).requires_grad_(False), copy.copy(t.att.tuner)
    keys, original, found = dict(base.named_parameters()), tuner.attach, set[str]()

    def attached(edit: Edit) -> None:
        original(edit)
        found.update(key for key, p in keys.items() if p.requires_grad)

    tuner.attach = attached  # type: ignore[method-assign]
    try:
        trained = {id(p) for p in attach(base, tuner, name=t.att.name, **t.options).parameters()}
    except Exception:  # attach may need gradients of the backbone
        return ""
    return next((key for key in keys if key in found and id(keys[key]) not in trained), "")


def foreign_tensors(t: Trial) -> str:
    """Return the problem with what an adapter has registered of the backbone."""
    keys = dict(t.base.named_parameters()).keys()
    own = {p for key, p in t.model.named_parameters(remove_duplicate=False) if key in keys}
    for holder, _ in t.att.edit_log.placed:
        for name, p in holder.adapter.named_parameters():
            if p in own:
                kind = type(holder.adapter).__name__
                return f"{name} of the adapter {kind} belongs to the backbone. Keep its module in a tuple: (module,)"
    return ""


def _first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    return next((key for key, value in a.items() if not torch.equal(value, b[key])), "")

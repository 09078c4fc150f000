"""The properties of a tuner's contract, in the order in which they are checked: attached, trained, in use, detached.

Each is a function from a Trial to the problem in words; the text is empty if the property holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from petune.base.block_choice import ALL
from petune.base.errors import AttachError, BackboneMismatch, ConfigError, NotMergeable
from petune.base.text import plural
from petune.injector.attach import attach
from petune.injector.registry import build_tuner
from petune.plugin_dev.author import closures_over
from petune.plugin_dev.finding import Property
from petune.plugin_dev.forward_properties import auxiliary_loss, inner_gradients
from petune.plugin_dev.left_behind import left_behind
from petune.plugin_dev.state_properties import (
    difference,
    independent_images,
    no_state_between_forwards,
    repeatable_evaluation,
    tensor_left_behind,
    tensors_kept,
    unchanged_inputs,
)
from petune.plugin_dev.training_properties import calibration, flags, foreign_tensors, number_formats, random_numbers
from petune.plugin_dev.trial import Trial, logits
from petune.sites.logits import max_difference, max_value


def _backbone_keys(t: Trial) -> str:
    gone = sorted(set(t.base.state_dict()) - set(t.model.state_dict()))
    return f"{gone[0]} is gone" if gone else ""


def _backbone_values(t: Trial) -> str:
    now = t.model.state_dict()
    return _first(key for key, old in t.base.state_dict().items() if key in now and not torch.equal(now[key], old))


def _identity_at_init(t: Trial) -> str:
    if not t.att.tuner.identity_at_init:
        return ""
    change = max_difference(logits(t.model, t.x), t.base_logits)
    if change < 1e-5 * max(max_value(t.base_logits), 1.0):  # attaching freezes, and frozen layers round differently
        return ""
    return f"the output changes by {change:.2g}. If that is intended, set identity_at_init = False"


def _parameter_count(t: Trial) -> str:
    formula, count = t.att.tuner.num_parameters(t.att.sites), t.att.counts.tuned
    return "" if formula in (None, count) else f"{plural(count, 'parameter')}, but num_parameters() returns {formula:,}"


def _gradients(t: Trial) -> str:
    known = [*tensors_kept(t)]
    try:
        silent = t.train().silent
    except RuntimeError:
        if cause := unchanged_inputs(t) or tensor_left_behind(t, known):
            return cause
        raise
    if not silent:
        return ""
    return f"{len(silent)} of {len(t.att.tuned)} tensors never had a gradient other than zero, such as {silent[0]}"


def _frozen_tensors(t: Trial) -> str:
    return f"{t.training.changed} differs" if t.training.changed else ""


def _masked_entries(t: Trial) -> str:
    key = t.training.changed_outside_masks
    return f"{key} differs in entries that edit.train(…, mask=…) leaves frozen" if key else ""


def _effect_in_eval_mode(t: Trial) -> str:
    return "" if t.training.has_effect else "other values of the tuned tensors give the same output"


def _deep_copy(t: Trial) -> str:
    """Copy the model, change the values of the original, and let the copy compute."""
    copied, original = copy.deepcopy(t.model), t.model.state_dict()
    problem = difference(logits(copied, t.x), t.training.logits, "the copy computes something else")
    if problem:
        return problem
    before = {key: value.clone() for key, value in original.items()}
    with torch.no_grad():
        for value in original.values():
            value.add_(1)
        changed = logits(copied, t.x)
        for key, value in original.items():
            value.copy_(before[key])
    adapters = [holder.adapter for holder, _ in t.att.edit_log.placed]
    place = next((found for adapter in adapters for found in closures_over(adapter, t.model)), "")
    where = f"{place} holds" if place else "something holds, such as a function or an object with a __deepcopy__,"
    return difference(changed, t.training.logits, f"{where} a part of the original model, which the copy uses")


def _disabled_output(t: Trial) -> str:
    backbone, now = copy.deepcopy(t.base), t.model.state_dict(keep_vars=True)  # PEFT renames modules, not keys
    for name, p in backbone.named_parameters():  # torch multiplies a frozen weight by another kernel: other last bits
        p.requires_grad_(now[name].requires_grad if name in now else p.requires_grad)
    with t.att.disabled():
        return difference(logits(t.model, t.x), logits(backbone, t.x), "the output is not the backbone's")


def _save_and_load(t: Trial) -> str:
    problem = "something that the output depends on is not saved"
    try:
        loaded = t.loaded_again().model.eval()
    except BackboneMismatch as error:  # mostly because it computes something else where it is loaded
        return f"{problem} ({error})"
    return difference(logits(loaded, t.x), t.training.logits, problem)


def _merge(t: Trial) -> str:
    try:
        t.loaded_again().merge()
    except NotMergeable as error:
        return str(error) if error.changes_output else ""
    return ""


def _chosen_blocks(t: Trial) -> str:
    """Attach to the last block alone. A tuner for which that makes no sense is refused by `attach`, which is right."""
    if len(t.att.sites.blocks) < 2 or t.att.tuner.config.blocks != ALL:
        return ""
    try:
        tuner = build_tuner(t.att.tuner, blocks="last:1")
        att = attach(copy.deepcopy(t.base), tuner, name=t.att.name, **t.options)
    except (AttachError, ConfigError):
        return ""
    formula, count = att.tuner.num_parameters(att.sites), att.counts.tuned
    if formula not in (None, count):
        return f"{plural(count, 'parameter')} with blocks=last:1, but num_parameters() returns {formula:,}"
    return ""


def _detach(t: Trial) -> str:
    t.att.detach()
    after, before = t.model.state_dict(), t.base.state_dict()
    if list(after) != list(before):
        return f"other keys: {sorted(set(after) ^ set(before))[:1] or 'the order changed'}"
    if [name for name, _ in t.model.named_modules()] != [name for name, _ in t.base.named_modules()]:
        return "a module was left behind"
    left = left_behind(t.model, t.base)
    if left:
        return left
    flags = zip(t.model.parameters(), t.base.parameters(), strict=True)
    if any(a.requires_grad != b.requires_grad for a, b in flags):
        return "requires_grad was not restored"
    different = _first(key for key, old in before.items() if not torch.equal(after[key], old))
    return different or t.before.restored()


PROPERTIES: tuple[Property[Trial], ...] = (
    Property("surroundings", "attaching changes nothing outside of the model", lambda t: t.before.restored()),
    Property("backbone keys", "attaching keeps every key of the backbone", _backbone_keys),
    Property("backbone values", "attaching changes no value of the backbone", _backbone_values),
    Property("identity at init", "the output is unchanged, if identity_at_init says so", _identity_at_init),
    Property("foreign tensors", "an adapter registers nothing of the backbone", foreign_tensors),
    Property("parameter count", "num_parameters() returns the true count, if it returns one", _parameter_count),
    Property("calibration", "calibrated twice, it chooses the same, and changes no weight", calibration),
    Property("gradients", "every tuned tensor gets a gradient", _gradients),
    Property("flags", "modes and requires_grad of the backbone are as petune sets them", flags),
    Property("inner gradients", "an adapter that calls inner does so once with gradients", inner_gradients),
    Property("auxiliary loss", "what adapters set as aux_loss is a finite scalar with a gradient", auxiliary_loss),
    Property("frozen tensors", "training changes no frozen tensor or buffer by a bit", _frozen_tensors),
    Property("masked entries", "training changes no entry outside a mask by a bit", _masked_entries),
    Property("effect in eval mode", "what trains changes the output in eval mode", _effect_in_eval_mode),
    Property("repeatable evaluation", "two evaluations are equal", repeatable_evaluation),
    Property("no state between forwards", "a forward leaves nothing behind", no_state_between_forwards),
    Property("unchanged inputs", "an adapter leaves what it reads as it is", unchanged_inputs),
    Property("independent images", "images of a batch do not mix", independent_images),
    Property("deep copy", "a deep copy of the model computes the same", _deep_copy),
    Property("disabled output", "disabled, the model is the backbone to the bit", _disabled_output),
    Property("re-enabled output", "enabled again, the model computes the same as before", repeatable_evaluation),
    Property("save and load", "saved and loaded, the model computes the same to the bit", _save_and_load),
    Property("merge", "merged, the model computes the same, if it can be merged", _merge),
    Property("random numbers", "the tensors and torch's seed decide the next steps", random_numbers),
    Property("number formats", "it computes in half precision where the backbone does", number_formats),
    Property("chosen blocks", "the option blocks is followed, or refused", _chosen_blocks),
    Property("detach", "detached, the model is as it was to the bit", _detach),
)


def _first(keys: Iterator[str]) -> str:
    key = next(keys, None)
    return "" if key is None else f"{key} differs"

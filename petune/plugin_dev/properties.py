"""The properties of a tuner's contract, in the order in which they are checked: attached, trained, in use, detached.

Each is a function from a Trial to the problem in words; the text is empty if the property holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from petune.base.block_choice import ALL
from petune.base.errors import AttachError, BackboneMismatch, ConfigError, NotMergeable
from petune.base.text import plural
from petune.injector.attach import attach
from petune.injector.registry import build_tuner
from petune.plugin_dev.author import closures_over
from petune.plugin_dev.finding import Property
from petune.plugin_dev.forward_properties import auxiliary_loss, inner_gradients
from petune.plugin_dev.left_behind import left_behind
from petune.plugin_dev.training_properties import calibration, flags, foreign_tensors, number_formats, random_numbers
from petune.plugin_dev.trial import NUM_IMAGES, Trial, logits
from petune.sites.forward import forget_caches
from petune.sites.input_spec import Inputs, InputSpec
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
    silent = t.train().silent
    if not silent:
        return ""
    return f"{len(silent)} of {len(t.att.tuned)} tensors never had a gradient other than zero, such as {silent[0]}"


def _frozen_tensors(t: Trial) -> str:
    return f"{t.training.changed} differs" if t.training.changed else ""


def _masked_entries(t: Trial) -> str:
    key = t.training.changed_outside_masks
    return f"{key} differs in entries that edit.train(…, mask=…) leaves frozen" if key else ""


def _effect_in_eval_mode(t: Trial) -> str:
    return "" if t.training.has_effect else "other values of the tuned tensors give the same logits"


def _repeatable_evaluation(t: Trial) -> str:
    return _difference(logits(t.model, t.x), t.training.logits, "is there dropout that ignores self.training?")


def _no_state_between_forwards(t: Trial) -> str:
    logits(t.model, t.att.sites.input_spec.noise(NUM_IMAGES, seed=1))
    change = _difference(
        logits(t.model, t.x), t.training.logits, "the output depends on the images of an earlier forward"
    )
    return change or _tensor_left_behind(t)


def _tensor_left_behind(t: Trial) -> str:
    """Return a message about a tensor that a forward has left in a module's attributes."""
    known = {f"{path}.{name}" for path, module in t.base.named_modules() for name in vars(module)}
    for path, module in t.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and f"{path}.{name}" not in known:
                return f"{path}.{name} keeps a tensor after the forward"
    return ""


def _independent_images(t: Trial) -> str:
    spec = t.att.sites.input_spec
    change = _change_in_batch(t.model, t.x, spec)
    if change >= 1e-5:  # rounding, which a deep model may amplify, all but vanishes in float64; mixing does not
        exact = copy.deepcopy(t.model).double()
        forget_caches(exact)
        change = _change_in_batch(exact, t.x.to("cpu", torch.float64), spec)
    return "" if change < 1e-5 else f"an image alone differs by {change:.2g} from the same image in a batch"


def _change_in_batch(model: nn.Module, x: Inputs, spec: InputSpec) -> float:
    """Return how much logits of single images differ from those in a batch, relative to the largest above one."""
    together = logits(model, x)
    alone = torch.cat([logits(model, spec.select(x, [i])) for i in range(NUM_IMAGES)])
    return max_difference(alone, together) / max(max_value(together), 1.0)


def _deep_copy(t: Trial) -> str:
    """Copy the model, change the values of the original, and let the copy compute."""
    copied, original = copy.deepcopy(t.model), t.model.state_dict()
    problem = _difference(logits(copied, t.x), t.training.logits, "the copy computes something else")
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
    return _difference(changed, t.training.logits, f"{where} a part of the original model, which the copy uses")


def _disabled_output(t: Trial) -> str:
    backbone, now = copy.deepcopy(t.base), dict(t.model.named_parameters())
    for name, p in backbone.named_parameters():  # torch multiplies a frozen weight by another kernel: other last bits
        p.requires_grad_(now[name].requires_grad if name in now else p.requires_grad)
    with t.att.disabled():
        return _difference(logits(t.model, t.x), logits(backbone, t.x), "the output is not the backbone's")


def _save_and_load(t: Trial) -> str:
    problem = "something that the output depends on is not saved"
    try:
        loaded = t.loaded_again().model.eval()
    except BackboneMismatch as error:  # mostly because it computes something else where it is loaded
        return f"{problem} ({error})"
    return _difference(logits(loaded, t.x), t.training.logits, problem)


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
    Property("repeatable evaluation", "two evaluations are equal", _repeatable_evaluation),
    Property("no state between forwards", "a forward leaves nothing behind", _no_state_between_forwards),
    Property("independent images", "images of a batch do not mix", _independent_images),
    Property("deep copy", "a deep copy of the model computes the same", _deep_copy),
    Property("disabled output", "disabled, the model is the backbone to the bit", _disabled_output),
    Property("re-enabled output", "enabled again, the model computes the same as before", _repeatable_evaluation),
    Property("save and load", "saved and loaded, the model computes the same to the bit", _save_and_load),
    Property("merge", "merged, the model computes the same, if it can be merged", _merge),
    Property("random numbers", "the tensors and torch's seed decide the next steps", random_numbers),
    Property("number formats", "it computes in half precision where the backbone does", number_formats),
    Property("chosen blocks", "the option blocks is followed, or refused", _chosen_blocks),
    Property("detach", "detached, the model is as it was to the bit", _detach),
)


def _difference(now: Tensor, before: Tensor, problem: str) -> str:
    if torch.equal(now, before):
        return ""
    change = f"differs by {max_difference(now, before):.2g}" if now.shape == before.shape else "another shape"
    return f"{problem} ({change})"


def _first(keys: Iterator[str]) -> str:
    key = next(keys, None)
    return "" if key is None else f"{key} differs"

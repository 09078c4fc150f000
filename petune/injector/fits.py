"""Check that a saved adapter belongs to a backbone: geometry, tensors, fingerprint and reference logits."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from petune.adapters.format import CONFIG_FILE, SavedAdapter
from petune.adapters.reference_logits import Difference, largest_difference
from petune.adapters.trained_on import check_precision, describe_weights
from petune.base.errors import BackboneMismatch, CheckpointError
from petune.injector.attachment import Attachment
from petune.injector.keys import named_parameters
from petune.injector.registry import list_tuners
from petune.injector.renamed import unfound_layers
from petune.injector.saved_sites import sites_differences
from petune.injector.trainable import trainable_state_of
from petune.sites.input_spec import InputSpec
from petune.sites.sites import Sites


def check_fits(attachment: Attachment, saved: SavedAdapter, *, with_head: bool = True) -> None:
    """Check that a saved adapter belongs to the attachment's backbone.

    Args:
        attachment: The attachment.
        saved: The adapter.
        with_head: Require the classifier's tensors in the file, too.

    Raises:
        BackboneMismatch: See `load`.
    """
    _check_geometry(attachment, saved)
    was_frozen = _frozen_when_saved(attachment, saved)
    unused = _unused_in_file(attachment, saved)
    not_in_file = was_frozen if with_head else was_frozen | head_keys_in_file(attachment)
    needed = {key: t for key, t in saved.tensors.items() if key not in unused}
    _check_tensors(attachment, replace(saved, tensors=needed), not_in_file)
    if not _has_same_backbone(attachment, saved, was_frozen, unused):
        check_precision(attachment.model, saved)
        state = trainable_state_of(attachment.model)
        is_stacked = state is not None and len(state.attachments) > 1
        hint = ". Load stacked adapters in the order in which they were attached" if is_stacked else ""
        raise BackboneMismatch(
            f"{saved.path} belongs to a backbone of the same shape with other weights, or with the same ones in layers "
            f"that are fused or split (qkv): {describe_weights(saved)}{hint}"
        )
    if not _has_same_head(attachment, saved):
        raise BackboneMismatch(
            f"{saved.path} was trained with another classifier that did not train (train_head=False), of other "
            f"weights: {describe_weights(saved)}"
        )


def _check_geometry(attachment: Attachment, saved: SavedAdapter) -> None:
    different = sites_differences(saved, attachment.sites)
    if different:
        raise BackboneMismatch(f"{saved.path} belongs to another backbone: {different}")


def _check_tensors(attachment: Attachment, saved: SavedAdapter, not_in_file: Collection[str]) -> None:
    """Check that the file has exactly the attachment's tensors but those `not_in_file`, in their shapes.

    Buffers of adapters may be missing: a development version did not save them.
    """
    buffers = attachment.tensors.shape_buffers(saved.tensors)
    state = {key: tensor for key, tensor in attachment.file_state().items() if key not in not_in_file}
    reshaped = [key for key in state if key in saved.tensors and saved.tensors[key].shape != state[key].shape]
    if reshaped:
        of_head = all(key.endswith(tuple(attachment.head) or "-") for key in reshaped)
        key = reshaped[0]
        raise BackboneMismatch(
            f"{saved.path} was trained with another {'number of classes' if of_head else 'shape'}: {key} is "
            f"{tuple(saved.tensors[key].shape)} there and {tuple(state[key].shape)} in this model"
        )
    not_saved = buffers & (state.keys() - saved.tensors.keys())
    if state.keys() - not_saved != saved.tensors.keys():
        key = min((state.keys() - not_saved) ^ saved.tensors.keys())
        where = "is missing in the file" if key in state else "is in the file, but not in this model"
        advice = _missing_module(attachment, key) or unfound_layers(attachment, saved)
        raise BackboneMismatch(f"{saved.path} does not hold the tensors of {attachment.name}: {key} {where}{advice}")
    if not_saved:
        warnings.warn(
            f"{saved.path} was saved without the buffers of its adapters, such as {min(not_saved)}. They keep the "
            "values that they start with",
            stacklevel=5,
        )


def _missing_module(attachment: Attachment, key: str) -> str:
    """Return the advice for a tensor of a part that the model lacks, such as a head for every pixel."""
    name = key.removeprefix("base_model.model.").partition(".")[0]
    if name in dict(attachment.model.named_children()) or "." not in key:
        return ""
    return f". The model has no {name}: its README.md says how to build it, such as by petune.add_dense_head"


def _frozen_when_saved(attachment: Attachment, saved: SavedAdapter) -> set[str]:
    """Return the keys of the final norm that the file lacks, because a development version did not find that norm.

    The fingerprint proves it: it covers tensors that were frozen, so a file that lost some is refused.
    """
    norms = [norm for tower in attachment.sites.towers for norm in tower.norms]
    if not norms or not (saved.config["fingerprint"] or saved.config.get("named_fingerprint")):
        return set()
    in_norm = {id(p) for norm in norms for module in norm.modules for p in module.parameters()}
    in_place = attachment.tensors.in_place()
    return {key for key, t in in_place.items() if id(t) in in_norm and key not in saved.tensors}


def _unused_in_file(attachment: Attachment, saved: SavedAdapter) -> set[str]:
    """Return the file's keys of tables that the library makes, and of frozen parameters with the model's values.

    A development version saved buffers that are no part of `state_dict`. It also unfroze, and saved, biases and norms
    that the output does not depend on.
    """
    state, named = attachment.file_state(), named_parameters(attachment.model)
    frozen = {key: t for key, t in saved.tensors.items() if key in named and key not in state}
    tables = dict(attachment.model.named_buffers()).keys() - attachment.model.state_dict().keys() - state.keys()
    unchanged = {key for key, t in frozen.items() if torch.equal(t, named[key].detach().to("cpu", t.dtype))}
    return unchanged | (tables & saved.tensors.keys())


def head_keys_in_file(attachment: Attachment) -> set[str]:
    """Return the classifier's keys in an adapter file: parameters and buffers."""
    modules = attachment.tensors.head_modules
    head = {_memory(t) for module in modules for t in (*module.parameters(), *module.buffers())}
    return {key for key, tensor in attachment.file_state().items() if _memory(tensor) in head}


def _memory(tensor: Tensor) -> int:
    """Return what identifies a tensor, also behind the views of it that PEFT returns."""
    return tensor.untyped_storage().data_ptr()


def _has_same_backbone(
    attachment: Attachment, saved: SavedAdapter, was_frozen: Collection[str], unused: Collection[str]
) -> bool:
    """Return False if the frozen backbone is another one than in the file; see `AdapterTensors.fingerprint`."""
    in_file, named = saved.config["fingerprint"], saved.config.get("named_fingerprint")
    if in_file is not None and attachment.tensors.fingerprint(was_frozen, unused) != in_file:
        return False
    wrapper = saved.config.get("wrapper")
    return named is None or attachment.tensors.named_fingerprint(wrapper, was_frozen, unused) == named


def _has_same_head(attachment: Attachment, saved: SavedAdapter) -> bool:
    """Return False if a classifier that does not train is another one than in the file."""
    in_file, named = saved.config.get("head_fingerprint"), saved.config.get("named_head_fingerprint")
    if in_file is not None and attachment.tensors.head_fingerprint() != in_file:
        return False
    return named is None or attachment.tensors.named_head_fingerprint(saved.config.get("wrapper")) == named


def check_reference_logits(attachment: Attachment, saved: SavedAdapter) -> None:
    """Check that the model computes what it did when an adapter was saved, with the adapter's values in place.

    Raises:
        BackboneMismatch: The model computes something else.
        CheckpointError: The saved reference logits cannot be read.
    """
    reference = saved.config.get("reference_logits")
    if reference is None:
        return
    try:
        difference = largest_difference(attachment.model, _with_inputs_of(saved, attachment.sites), reference)
    except CheckpointError as error:
        raise CheckpointError(f"{saved.path / CONFIG_FILE}: {error}") from None
    if difference.max_abs > difference.rounding:
        _refuse_or_warn(attachment, saved, difference)


def _with_inputs_of(saved: SavedAdapter, sites: Sites) -> Sites:
    """Return the sites with the inputs that the reference logits were computed for: integers may have other values."""
    geometry_in_file = saved.config["geometry"]
    if geometry_in_file is None:
        return sites
    return replace(sites, input_spec=InputSpec.from_json(geometry_in_file["input"]))


def _refuse_or_warn(attachment: Attachment, saved: SavedAdapter, difference: Difference) -> None:
    what = "logits of a test image" if difference.kind == "logits" else "features of a test image before the head"
    numbers = f"the {what}, up to {difference.largest:.3g} when it was saved, differ by {difference.max_abs:.3g} here"
    if difference.max_abs <= difference.tolerance:
        warnings.warn(
            f"the backbone computes slightly something else than the one that {saved.path} was saved with: {numbers}, "
            f"and rounding explains {difference.rounding:.2g}. If that is not wanted, build it as for training (eps of "
            f"the norms, tanh or exact GELU, scale of the attention){_other_version(attachment, saved)}",
            stacklevel=5,
        )
        return
    heads = attachment.sites.parts.get("head")
    names = f", names of the heads: {heads.where}" if heads is not None and not heads.is_module else ""
    raise BackboneMismatch(
        f"{saved.path} belongs to a backbone with the same tensors that computes something else: {numbers}. Build the "
        f"backbone as for training (number of heads, activation, normalization, pooling{names})"
        f"{_other_version(attachment, saved)}"
    )


def _other_version(attachment: Attachment, saved: SavedAdapter) -> str:
    current = next((record for record in list_tuners() if record.name == attachment.tuner.method), None)
    in_file = f"{saved.config.get('distribution')} {saved.config.get('version')}"
    if current is None or f"{current.distribution} {current.version}" == in_file:
        return ""
    return f"; or the method changed: it was saved with {in_file}, here is {current.distribution} {current.version}"

"""Load weights into transformers' models, and refuse weights that leave a part random."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petune.backbones.from_file import has_values, read_mapped
from petune.backbones.repository_files import damage_named, parts_of
from petune.backbones.timm_models import set_statistics
from petune.backbones.transformers_videos import Tubes, check_frames, frames_key, set_video_statistics
from petune.base.errors import WeightsUnavailable
from petune.base.text import plural
from petune.sites.file_values import MappedFile, can_map
from petune.sites.heads_by_library import classifiers_of

Layout = Callable[[int, int], tuple[int, int] | None]


def load_pretrained(auto_class: Any, name: str, config: Any, offline: bool, *, stay_in_file: bool = False) -> nn.Module:
    """Load a pretrained model; position embeddings are resampled for another image size.

    Args:
        auto_class: AutoModel, or AutoModelForImageClassification.
        name: Repository or directory.
        config: The config of the model to build.
        offline: Use cached files only.
        stay_in_file: See `petune.backbones.from_file.build_from_file`.

    Raises:
        WeightsUnavailable: The weights leave parts other than the classifier random.
        CheckpointError: A file is damaged.
        OSError: A file is missing.
    """
    arguments = {"ignore_mismatched_sizes": True, "local_files_only": offline}
    loaded = _load_mapped(auto_class, name, config, arguments) if stay_in_file else None
    if loaded is None:
        with damage_named(name):
            loaded = auto_class.from_pretrained(name, config=config, output_loading_info=True, **arguments)
    model, info = loaded
    unfilled = _unfilled_keys(model, info)
    embeddings = {
        key: shape for key, shape, _ in info["mismatched_keys"] if key in unfilled and "position_embedding" in key
    }
    own_config: Any = type(config).from_pretrained(name, local_files_only=offline) if embeddings else None
    if hasattr(own_config, "image_size"):
        old_config = type(config).from_dict({**config.to_dict(), "image_size": own_config.image_size})
        original = auto_class.from_pretrained(name, config=old_config, **arguments)
        layout = _num_prefix_tokens if frames_key(config) is None else _layout_of_clips(config, old_config)
        unfilled -= _resample(model.state_dict(), original.state_dict(), embeddings, layout)
    if unfilled:
        check_frames(name, config, offline)
        shown = ", ".join(sorted(unfilled)[:3]) + (", …" if len(unfilled) > 3 else "")
        raise WeightsUnavailable(
            f"the weights of hf:{name} leave {plural(len(unfilled), 'tensor')} besides the classifier unfilled "
            f"(missing, or with another shape): {shown}. Drop the options that change the model, or use weights='none'",
            cli_hint="To start from random weights, use --weights none",
        )
    (_set_statistics if frames_key(config) is None else set_video_statistics)(model, name, offline)
    return model  # type: ignore[no-any-return]


def _load_mapped(auto_class: Any, name: str, config: Any, arguments: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Load a model from the mapped tensors of its safetensors files, in which its matrices stay.

    Returns:
        The model and what transformers tells of loading; None if there are no such files, or more than these files.
    """
    with contextlib.suppress(Exception):  # the usual way says what is wrong
        files = [MappedFile(path) for path in _safetensors_files(name, config, arguments["local_files_only"])]
        if not files:
            return None
        tensors = {key: tensor for file in files for key, tensor in file.tensors.items()}
        load = auto_class._model_mapping[type(config)].from_pretrained
        own_config = copy.deepcopy(config)
        model, info = load(None, config=own_config, state_dict=tensors, output_loading_info=True, **arguments)
        model.config.name_or_path = name
        for file in files:
            read_mapped(model, file, stay_in_file=True)
        return (model, info) if has_values(model) else None
    return None


def _safetensors_files(name: str, config: Any, offline: bool) -> list[Path]:
    """Return the safetensors files of a repository or directory, if the weights are in them alone."""
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        found: str | None = cached_file(
            name, file, local_files_only=offline, _raise_exceptions_for_missing_entries=False
        )
        return found

    is_special = any(getattr(config, key, None) for key in ("quantization_config", "transformers_weights"))
    if not can_map() or is_special or getattr(type(config), "extra_files", None) or find("adapter_config.json"):
        return []
    if whole := find("model.safetensors"):
        return [Path(whole)]
    index = find("model.safetensors.index.json")
    parts = parts_of(Path(index)) if index else []
    paths = [find(part) for part in parts]
    return [Path(path) for path in paths if path] if all(paths) else []


def _set_statistics(model: nn.Module, name: str, offline: bool) -> None:
    """Record how transformers would normalize images, after scaling them to 0…1."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=offline)
    except OSError:  # without a preprocessing config the dataset's own statistics are used
        return
    if getattr(processor, "do_flip_channel_order", False):
        warnings.warn(
            f"the weights of hf:{name} were trained on images in BGR channel order, but petune gives RGB: expect lower "
            "accuracy",
            stacklevel=2,
        )
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is not None and std is not None:
        set_statistics(model, _per_channel(mean), _per_channel(std))


def _per_channel(value: Any) -> tuple[float, ...]:
    return (value,) * 3 if isinstance(value, int | float) else tuple(value)


def _unfilled_keys(model: Any, info: Any) -> set[str]:
    """Return the tensors that no weights filled, without the classifier and the mask token of pretraining."""
    unfilled = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model:
        unfilled = {key for key in unfilled if key.startswith(prefix)}
    elif type(model).__name__.endswith("Classification"):
        unfilled = {key for key in unfilled if "classifier" not in key.partition(".")[0]}
    unfilled -= _timm_classifier_keys(model)
    return {key for key in unfilled if not key.endswith("mask_token")}


def _timm_classifier_keys(model: Any) -> set[str]:
    """Return the keys of the classifier that a model of timm in transformers' wrapper has inside; else none."""
    inner = getattr(model, "timm_model", None)
    classifiers = (classifiers_of(inner) or ()) if inner is not None else ()
    tensors = {id(t) for part in classifiers for t in part.state_dict(keep_vars=True).values()}
    return {key for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in tensors}


def renamed_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a file's tensors by the keys of a model of transformers, which may be others than those in its files.

    transformers itself renames them: from older versions, and between a model and the same with a classifier.

    Args:
        model: Any model; the tensors are returned as they are unless it is one of transformers with other keys.
        tensors: As stored. If a shape differs, the result has an empty tensor of the file's shape.
    """
    from_transformers = type(model).__module__.startswith("transformers.")
    if not from_transformers or model.state_dict().keys() <= tensors.keys():
        return tensors
    load: Any = type(model).from_pretrained  # type: ignore[attr-defined]
    arguments = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        loaded, info = load(None, config=model.config, state_dict=dict(tensors), **arguments)
    shapes = {key: torch.empty(shape, device="meta") for key, shape, _ in info["mismatched_keys"]}
    unfilled = {*info["missing_keys"], *shapes}
    return {key: tensor for key, tensor in loaded.state_dict().items() if key not in unfilled} | shapes


def _layout_of_clips(config: Any, old_config: Any) -> Layout:
    sizes = (config.image_size, old_config.image_size)
    return lambda new_length, old_length: Tubes.of(config).prefix_and_slices((new_length, old_length), sizes)


def _resample(
    target: Mapping[str, Tensor], source: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], layout: Layout
) -> set[str]:
    """Fill position embeddings with those of the same model for its own image size, and return the filled keys.

    Legend: N tokens, the first ones are not patches; D width.

    Args:
        target: State of the model, filled in place.
        source: State of the model at its own image size.
        shapes: Keys of the position embeddings, and their shapes in the file.
        layout: Returns the number of tokens that are not patches and of the frames that the others are of.
    """
    from timm.layers import resample_abs_pos_embed

    filled = set()
    for key, shape in shapes.items():
        new, old = target[key], source[key]
        prefix_and_slices = layout(new.shape[-2], old.shape[-2])
        if old.shape != shape or new.shape[-1] != old.shape[-1] or prefix_and_slices is None:
            continue
        num_prefix, slices = prefix_and_slices
        side = math.isqrt((new.shape[-2] - num_prefix) // slices)
        old_1ND = old.reshape(1, *old.shape[-2:])
        patches = old_1ND[:, num_prefix:].chunk(slices, dim=1)
        frames = [resample_abs_pos_embed(frame, [side, side], num_prefix_tokens=0) for frame in patches]
        new.copy_(torch.cat([old_1ND[:, :num_prefix], *frames], dim=1).reshape(new.shape))
        filled.add(key)
    return filled


def _num_prefix_tokens(new_length: int, old_length: int) -> tuple[int, int] | None:
    """Return the smallest number of prefix tokens that leaves one square grid in both, and 1; or None."""
    for count in range(min(4, new_length, old_length)):
        if all(math.isqrt(length - count) ** 2 == length - count for length in (new_length, old_length)):
            return count, 1
    return None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars inside the context."""
    from transformers.utils import logging

    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()

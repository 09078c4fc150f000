"""The images of a run: its dataset with all three splits, none of which an earlier run that it continues trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from petune.backbones.create import Backbone, input_frames, input_side
from petune.backbones.input_channels import RGB_CHANNELS
from petune.base.errors import CheckpointError, ConfigError, DataError
from petune.base.text import plural
from petune.data import Dataset, load_dataset
from petune.data.dataset import Split
from petune.data.folds import fold_of
from petune.data.lookup import dataset_frames, dataset_target, manifest_of
from petune.data.manifest import file_digest
from petune.data.merge import merge_val
from petune.data.registry import build_reader, parse_dataset
from petune.data.video.clips import Clips
from petune.runner.continued import DATA_KEYS, earlier_runs
from petune.runner.kept_splits import keep_splits
from petune.runner.run_config import RunConfig
from petune.runner.run_preprocess import are_convertible

CHUNK = 256


def prepare_data(config: RunConfig, run_dir: Path | None = None) -> Dataset:
    """Load the dataset and cut its val split, which is the same for every seed; draw few-shot images by the seed.

    Args:
        config: The run.
        run_dir: Its directory, which may record the splits that it started with; None if it is not known.
    """
    side = input_side(config.backbone, config.image_size, config.backbone_options)
    frames = input_frames(config.backbone, config.backbone_options)
    dataset = load_dataset(
        config.dataset,
        config.data_dir,
        side,
        config.on_broken,
        channels=config.channels,
        cache_gb=config.cache_gb,
        **({} if frames is None else {"frames": frames}),
    )
    check_channels_option(config, dataset)
    if config.folds is not None and config.fold is not None:
        dataset = fold_of(dataset, config.folds, config.fold)
    val_is_cut = not len(dataset.val)
    dataset = dataset.with_val(config.val_fraction, seed=0)
    dataset = keep_splits(config, dataset, run_dir, val_is_cut=val_is_cut)
    if config.shots is not None:
        dataset = dataset.with_shots(config.shots, config.seed)
    return dataset


def check_clips(config: RunConfig) -> None:
    """Check that a backbone of videos gets clips, before anything is read.

    Raises:
        ConfigError: The dataset has images.
        DataError: It is at a path that has none, such as a folder of videos, or does not exist.
    """
    frames = input_frames(config.backbone, config.backbone_options)
    if frames is not None and dataset_frames(config.dataset, config.data_dir, frames) is None:
        if build_reader(config.dataset).path is not None:  # it may be wrong, or hold videos only
            dataset_target(config.dataset, config.data_dir)
            manifest_of(config.dataset, config.data_dir)
        raise ConfigError(
            f"{config.backbone} takes clips of {plural(frames, 'frame')}, but {config.dataset} has images. Use a "
            "dataset of videos, such as video:PATH, or a backbone that takes images"
        )


def note_of_clips(backbone: Backbone) -> str:
    """Describe how a model of images takes clips; return an empty string for any other."""
    if backbone.clip_form != "frame by frame":
        return ""
    return (
        f"{backbone.name} takes images: it sees the {backbone.num_frames} frames of a clip one by one, and their "
        "logits are averaged, so that the order of frames has no effect"
    )


def backbone_channels(config: RunConfig, dataset: Dataset) -> int | None:
    """Return the input channels to build the backbone with; None if it takes RGB, or what its own options say."""
    stored, wanted = dataset.train.images.shape[-1], config.channels
    if stored == RGB_CHANNELS:
        return None if wanted == RGB_CHANNELS else wanted
    return stored


def check_channels_option(config: RunConfig, dataset: Dataset) -> None:
    """Check that images as the dataset has them can be given to a backbone of `channels`.

    Raises:
        ConfigError: `channels` is neither what the images have nor 1 for RGB images.
    """
    stored, wanted = dataset.train.images.shape[-1], config.channels
    if wanted is not None and not are_convertible(stored, wanted):
        raise ConfigError(
            f"channels is {wanted}, but the images of {dataset.name} have {stored}. Leave channels out, or choose the "
            "bands when you write the files"
        )


def has_final_fit(config: RunConfig, dataset: Dataset) -> bool:
    """Return True if a run trains again on train and val: it is configured, or the dataset's protocol.

    Args:
        config: The run.
        dataset: With its val split.
    """
    wanted = config.final_fit in {"train+val", "only"} or (config.final_fit == "auto" and dataset.refit)
    return wanted and config.shots is None


def check_unseen(config: RunConfig, dataset: Dataset) -> None:
    """Check that a run that continues others neither chooses the epoch nor tests on images that one of them trained on.

    They can only be the same if both runs read the same dataset, with other options, folds or splits.

    Args:
        config: The run, with `from_run`.
        dataset: Its splits.

    Raises:
        ConfigError: An image of val or test was trained on.
    """
    if dataset.kept_splits:
        return
    for path, before in earlier_runs(config):
        if _place(before) != _place(config):
            continue
        trained = _trained_on(before, config, dataset)
        for part, split in (("val", dataset.val), ("test", dataset.test)):
            seen = sum(digest in trained for digest in _digests(split)) if trained else 0
            if seen:
                raise ConfigError(
                    f"{path} trained on {seen} of {plural(len(split), 'image')} of {part}, because these runs "
                    "divide the dataset in different ways. Leave out what differs (folds, group, split, val_fraction, "
                    "final_fit), or use another dataset"
                )


def _trained_on(before: RunConfig, config: RunConfig, dataset: Dataset) -> set[bytes]:
    """Return digests of the images that an earlier run on the same dataset trained on, and this run will not."""
    same = all(getattr(before, key) == getattr(config, key) for key in DATA_KEYS)
    if same and not has_final_fit(before, dataset):
        return set()
    sizes = {key: getattr(config, key) for key in ("backbone", "image_size", "backbone_options", "channels")}
    try:
        earlier = prepare_data(before.model_copy(update=sizes))
    except (DataError, CheckpointError):  # it has changed, so that these are other images as far as anybody can tell
        return set()
    if has_final_fit(before, earlier):
        earlier = merge_val(earlier)
    return {*_digests(earlier.train)} - {*_digests(dataset.train)}  # copies within the dataset are told elsewhere


def _digests(split: Split) -> Iterator[bytes]:
    """Yield a digest of the pixels of each image, or of the file of each video, which may be read as other clips."""
    if isinstance(split.images, Clips) and split.names is not None:
        yield from (file_digest(Path(name)).encode() for name in split.names.tolist())
        return
    for start in range(0, len(split), CHUNK):
        for pixels in split.images_at(slice(start, start + CHUNK)):
            yield hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()


def _place(config: RunConfig) -> tuple[str, str]:
    parsed = parse_dataset(config.dataset)
    return parsed.name, parsed.argument

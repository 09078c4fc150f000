"""Compute the frozen prefix of a model once per image and train the rest from the cached features.

The run gives the same result as without the cache, to the bit where an image's row does not depend on its neighbors in
the batch (on CPU): same order, same batches, same numbers into the first layer that trains.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petune.base.errors import AttachError, ConfigError
from petune.data.dataset import Split
from petune.sites.file_values import read_layer_by_layer
from petune.training.dry_run import dry_run
from petune.training.evaluate import eval_mode
from petune.training.speed.context import Logits, StepContext
from petune.training.speed.feature_store import FeatureStore
from petune.training.speed.frozen_prefix import FrozenPrefix, find_prefix
from petune.training.speed.verify import same_step

DIRECTORY = "features"
NOTE_EVERY_S = 30.0
MARK_EVERY_S = 10.0
MAX_SHARE_OF_DISK = 0.9
PROOF_IMAGES = 4


@dataclass(frozen=True)
class CachePlan:
    """Plan of what to cache.

    Attributes:
        prefix: The part of the model that need not run again.
        key: Identifies everything that the features depend on, except the images.
    """

    prefix: FrozenPrefix
    key: str


def plan_cache(context: StepContext) -> CachePlan | None:
    """Decide whether features are cached; the user is told why not if the model has a frozen prefix.

    Called while the frozen weights have their original values, which are part of the key.

    Raises:
        ConfigError: cache_features=always is not possible.
    """
    wanted = context.job.config.cache_features
    started = (context.job.directory / DIRECTORY).exists()
    if wanted == "never" or not context.epochs_left:
        return None
    if wanted == "auto" and context.epochs_left == 1 and not started:
        return None
    attachment = context.job.attachment
    with dry_run(context.model, context.job.device), read_layer_by_layer(context.model), context.autocast():
        attachment.train()
        prefix = find_prefix(attachment, context.images(2))
    if prefix is None:  # not worth a note: that is how most methods are
        _refuse(context, f"{attachment.name} trains so far down that no large part of the model is frozen below it")
        return None
    reason = _why_not(context, prefix)
    with read_layer_by_layer(context.model):
        proven = None if reason else _proven(context, prefix)
    if proven is None:
        _give_up(context, reason or f"{attachment.sites.model} cannot be split: its logits or gradients would differ")
        return None
    where = f"{context.precision} {context.job.device.type} torch {torch.__version__}"
    return CachePlan(proven, f"{attachment.fingerprint()} {where}")


def fill_cache(context: StepContext, plan: CachePlan, micro_batch: int) -> Mapping[str, Logits]:
    """Compute the features of train and val.

    Args:
        context: The training.
        plan: What to cache.
        micro_batch: Images per forward. Features are computed in batches of the size that training uses.

    Returns:
        By the name of a split: from positions in the split to logits. Empty if the disk is full or not writable.

    Raises:
        Stopped: A signal came; what is computed stays for the resume.
        ConfigError: cache_features=always is not possible.
    """
    job = context.job
    splits = {"train": job.dataset.train} | ({"val": job.dataset.val} if len(job.dataset.val) else {})
    directory = job.directory / DIRECTORY
    try:
        stores = {name: _open(context, plan, name, split) for name, split in splits.items()}
    except OSError as error:
        delete_features(job.directory)
        _give_up(context, f"{directory} is not writable ({error.strerror})")
        return {}
    size = sum(map(len, splits.values())) * plan.prefix.bytes_per_image
    context.note(
        f"the frozen layers run once: {size / 1e6:,.1f} MB of features in {directory}, deleted when training ends "
        "(train.cache_features=never disables this)"
    )
    batch_sizes = {"train": micro_batch, "val": job.config.eval_batch_size}
    for name, split in splits.items():
        _fill(context, plan.prefix, stores[name], split, name, batch_sizes[name])
    return {name: functools.partial(_logits, plan.prefix, store, job.device) for name, store in stores.items()}


def delete_features(directory: Path) -> None:
    """Delete what is cached in a run directory."""
    shutil.rmtree(directory / DIRECTORY, ignore_errors=True)


def _give_up(context: StepContext, reason: str) -> None:
    _refuse(context, reason)
    context.note(f"the frozen layers run in every epoch: {reason}")


def _refuse(context: StepContext, reason: str) -> None:
    if context.job.config.cache_features == "always":
        raise ConfigError(f"cache_features=always is not possible: {reason}. Use cache_features=auto")


def _why_not(context: StepContext, prefix: FrozenPrefix) -> str:
    """Return why features cannot be cached in this training, or an empty string."""
    config = context.job.config
    changing = {} if config.augment == "none" else {f"augment={config.augment}": "augment=none"}
    mixing = {"mixup": config.mixup, "cutmix": config.cutmix}
    changing |= {f"{name}={value:g}": f"{name}=0" for name, value in mixing.items() if value}
    if changing:
        constant = " and ".join(changing.values())
        return f"{', '.join(changing)} changes the images each time. {constant} would let them run once"
    if prefix.is_random:
        return "dropout or drop path of the backbone changes the features each time"
    if config.grad_checkpointing:
        return "grad_checkpointing computes blocks again"
    if context.num_processes > 1:
        return "several processes train"
    num_images = len(context.job.dataset.train) + len(context.job.dataset.val)
    return why_too_large(prefix.bytes_per_image, num_images, config.feature_cache_gb, context.job.directory / DIRECTORY)


def why_too_large(bytes_per_image: int, num_images: int, limit_gb: float, directory: Path) -> str:
    """Return why the features cannot be stored in `directory`, with all sizes, or an empty string.

    Args:
        bytes_per_image: Size of the features of one image.
        num_images: Images of all splits.
        limit_gb: The configured limit in 10⁹ bytes.
        directory: What it holds already counts as free: it was written before an interruption.
    """
    already_used = sum(512 * file.stat().st_blocks for file in directory.glob("*/*"))
    need, free = bytes_per_image * num_images, shutil.disk_usage(directory.parent).free + already_used
    if need <= min(limit_gb * 1e9, MAX_SHARE_OF_DISK * free):
        return ""
    advice = "Raise train.feature_cache_gb" if need > limit_gb * 1e9 else "Free some disk space"
    return (
        f"{num_images:,} images of {bytes_per_image / 1e3:,.1f} kB need {need / 1e9:,.2f} GB in {directory}, but "
        f"train.feature_cache_gb is {limit_gb:g} and {free / 1e9:,.1f} GB are free. {advice}"
    )


def _proven(context: StepContext, prefix: FrozenPrefix) -> FrozenPrefix | None:
    """Return the prefix, with one blank image if possible, if it gives the whole model's logits and gradients."""
    candidates = (prefix, replace(prefix, one_blank=False))
    return next((candidate for candidate in candidates if _computes_the_same(context, candidate)), None)


def _computes_the_same(context: StepContext, prefix: FrozenPrefix) -> bool:
    attachment, x = context.job.attachment, context.images(PROOF_IMAGES)
    with dry_run(context.model, context.job.device), context.autocast():
        attachment.train()
        try:
            values = prefix.compute(x)
            parameters = {**attachment.tuned, **attachment.head}
            return same_step(lambda: context.model(x), lambda: prefix.forward(values), parameters)
        except (RuntimeError, ValueError, AttachError):  # a model's own code may not cope with blank images
            return False


def _open(context: StepContext, plan: CachePlan, name: str, split: Split) -> FeatureStore:
    key = f"{plan.key} {context.job.preprocess} {_digest(split)}"
    return FeatureStore(context.job.directory / DIRECTORY / name, key, len(split), plan.prefix.kinds)


def _digest(split: Split) -> str:
    """Hash the rows of a split and about a thousand of its images."""
    digest: Any = hashlib.sha256(split.rows.tobytes())
    digest.update(f"{split.images.shape} {split.crop}".encode())
    for row in split.rows[:: max(1, len(split) // 1000)]:
        digest.update(split.images[row].tobytes())
    return str(digest.hexdigest())


def _fill(
    context: StepContext, prefix: FrozenPrefix, store: FeatureStore, split: Split, name: str, batch_size: int
) -> None:
    """Compute what is missing. Every batch is full, so that each row is computed as in training."""
    preprocess, device = context.job.preprocess, context.job.device
    first = store.done
    started = marked = noted = time.perf_counter()
    with eval_mode(context.model):
        for start in range(first, len(split), batch_size):
            if context.stop.signal_name is not None:
                store.mark(start)
                context.stop.check()
            positions = np.arange(start, start + batch_size) % len(split)
            with context.autocast():
                values = prefix.compute(preprocess.normalize(preprocess.pixels(split, positions, device)))
            store.write(start, [value[: len(split) - start] for value in values])
            done, now = min(start + batch_size, len(split)), time.perf_counter()
            if now - marked > MARK_EVERY_S:
                store.mark(done)
                marked = now
            if now - noted > NOTE_EVERY_S:
                minutes = (now - started) / (done - first) * (len(split) - done) / 60
                context.note(f"features of {name}: {done:,} of {len(split):,} images, {minutes:.0f} min left")
                noted = now
    store.mark(len(split))


def _logits(prefix: FrozenPrefix, store: FeatureStore, device: torch.device, positions: Tensor) -> Tensor:
    return prefix.forward(store.read(positions.numpy(), device))

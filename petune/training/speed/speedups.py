"""What makes training cheaper and leaves what it yields as it is; everything is put back afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from petune.base.errors import ConfigError, Diverged
from petune.sites.forward import undisturbed
from petune.training.events import Note
from petune.training.fit_batch import statistics_need_two
from petune.training.precision import why_slow
from petune.training.speed.bf16_weights import store_in_bf16
from petune.training.speed.feature_cache import Features, stays_equal, why_too_large
from petune.training.speed.frozen_prefix import Prefix, find_prefix, worth_it
from petune.training.speed.malloc import keep_heap
from petune.training.speed.onednn_linear import IMAGES, use_onednn_linear
from petune.training.speed.recompute import recomputed

if TYPE_CHECKING:
    from petune.training.loop import Trainer

FEATURES = "features"


@contextmanager
def apply_speedups(trainer: Trainer) -> Iterator[None]:
    """Inside, the trainer trains with cached features, stored bfloat16, recomputed blocks, compiled, as configured.

    Raises:
        ConfigError: What was asked for cannot be had.
        Stopped: A signal came while features were computed.
    """
    with ExitStack() as stack:
        stack.enter_context(statistics_need_two())
        if slow := why_slow(trainer.precision, trainer.device):
            trainer.on_event(Note(slow))
        plan = _planned(trainer)  # with the backbone's own weights, which the features are then known by
        if trainer.precision == "bf16" and trainer.sharded is None:
            stack.enter_context(store_in_bf16(trainer.model, lambda: _logits(trainer), trainer.directory))
        if trainer.train.grad_checkpointing:
            stack.enter_context(recomputed(trainer.att))
        trainer.choose_micro_batch()
        if trainer.device.type == "cpu":
            stack.enter_context(keep_heap(lean=trainer.train.grad_checkpointing))
        if plan is not None:
            _fill(trainer, *plan)
            stack.callback(_without_features, trainer)
            if trainer.train.compile:
                trainer.on_event(Note("nothing is compiled: with the frozen layers computed once, little is left"))
        elif trainer.train.compile:
            trainer.logits = _compiled(trainer.model)
            stack.callback(setattr, trainer, "logits", trainer.model)
        elif trainer.device.type == "cpu" and not trainer.train.grad_checkpointing:  # which is for memory
            size = trainer.progress.micro_batch
            stack.enter_context(use_onednn_linear(trainer.model, lambda: _logits(trainer), size))
        try:
            yield
        except Diverged:  # another exception leaves them there, for the resume
            shutil.rmtree(trainer.directory / FEATURES, ignore_errors=True)
            raise
        shutil.rmtree(trainer.directory / FEATURES, ignore_errors=True)


def images_of(trainer: Trainer) -> Callable[[int], Tensor]:
    """Gives the first so many training images, as the model sees them without augmentation."""

    def give(count: int) -> Tensor:
        rows = np.arange(count) % len(trainer.dataset.train)
        return trainer.preprocess.normalize(trainer.preprocess.pixels(trainer.dataset.train, rows, trainer.device))

    return give


def _logits(trainer: Trainer) -> Tensor:
    with undisturbed(trainer.model), torch.no_grad(), trainer.autocast():
        logits: Tensor = trainer.model(images_of(trainer)(IMAGES))
    return logits


def _planned(trainer: Trainer) -> tuple[Prefix, str] | None:
    """What to leave out of the forward, and the key of what is kept; None where all of it is computed each time."""
    wanted = trainer.train.cache_features
    epochs_left = trainer.train.epochs - trainer.progress.epoch
    begun = (trainer.directory / FEATURES).exists()
    if wanted == "never" or not epochs_left or (wanted == "auto" and epochs_left == 1 and not begun):
        return None
    prefix, proven = _prefix(trainer), None
    if prefix is None:
        reason = f"{getattr(trainer.att, 'name', 'the method')} trains too far down: no large part of the model stays"
    else:
        reason = _why_not(trainer, prefix)
        proven = None if reason else _proven(trainer, prefix)
        if not (reason or proven):
            reason = f"{trainer.att.sites.model} cannot be cut there: its logits or gradients would differ"
    if reason and wanted == "always":
        raise ConfigError(f"cache_features=always cannot be done: {reason}; leave it at auto")
    if prefix is None:
        return None
    if proven is None:
        trainer.on_event(Note(f"the frozen layers are computed anew in every epoch: {reason}"))
        return None
    return proven, f"{trainer.att.fingerprint()} {trainer.precision} {trainer.device.type} torch {torch.__version__}"


def _prefix(trainer: Trainer) -> Prefix | None:
    blocks = trainer.att.sites.blocks
    if blocks and any(p.requires_grad for p in blocks[0].enter.parameters()):
        return None  # known without a forward: most methods begin there
    if not worth_it(trainer.model, [p for p in trainer.model.parameters() if not p.requires_grad]):
        return None
    with trainer.untouched(), trainer.autocast():
        trainer.att.train()
        return find_prefix(trainer.model, images_of(trainer))


def _why_not(trainer: Trainer, prefix: Prefix) -> str:
    """Why the features must not be kept, in words; empty where they may."""
    train, data = trainer.train, trainer.dataset
    changing = [] if train.augment == "none" else [f"augment={train.augment}"]
    changing += [f"{name}={value:g}" for name, value in (("mixup", train.mixup), ("cutmix", train.cutmix)) if value]
    if changing:
        return f"{', '.join(changing)} shows other images each time; with --augment none they would be computed once"
    if train.grad_checkpointing:
        return "grad_checkpointing computes blocks again"
    if trainer.group.size > 1:
        return "several processes train"
    place = trainer.directory / FEATURES
    return why_too_large(prefix, len(data.train) + len(data.val), train.feature_cache_gb, place)


def _proven(trainer: Trainer, prefix: Prefix) -> Prefix | None:
    """The prefix, lean where the model makes do with that, once its logits and gradients are those of the whole."""
    return next((one for one in (replace(prefix, lean=True), prefix) if _same(trainer, one)), None)


def _same(trainer: Trainer, prefix: Prefix) -> bool:
    with trainer.untouched():
        try:
            trainer.att.train()
            return stays_equal(prefix, images_of(trainer)(4), trainer.params, trainer.autocast)
        except RuntimeError:  # whatever a model's code makes of blanks in place of what it does not use
            return False


def _fill(trainer: Trainer, prefix: Prefix, key: str) -> None:
    features = Features(prefix, trainer.preprocess, trainer.directory / FEATURES, key, trainer.device, trainer.autocast)
    data, train = trainer.dataset, trainer.train
    splits: dict[str, Any] = {"train": data.train} | ({"val": data.val} if len(data.val) else {})
    try:
        features.open(splits)
    except OSError as error:
        features.close()
        reason = f"{features.directory} cannot be written ({error.strerror})"
        if train.cache_features == "always":
            raise ConfigError(f"cache_features=always cannot be done: {reason}") from None
        trainer.on_event(Note(f"the frozen layers are computed anew in every epoch: {reason}"))
        return
    size = sum(len(s) for s in splits.values()) * prefix.bytes_per_image()
    trainer.on_event(
        Note(
            f"the frozen layers are computed once: {size / 1e6:,.1f} MB in {features.directory}, removed at the end "
            "(--set train.cache_features=never for none)"
        )
    )
    sizes = {"train": trainer.progress.micro_batch, "val": train.eval_batch_size}
    for part, split in splits.items():
        features.fill(part, split, sizes[part], trainer.stop, lambda text: trainer.on_event(Note(text)))
    trainer.features, trainer.batches.positions_only = features, True
    trainer.logits = lambda positions: features.logits("train", positions)


def _without_features(trainer: Trainer) -> None:
    trainer.features, trainer.batches.positions_only, trainer.logits = None, False, trainer.model


def _compiled(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    compiled = torch.compile(model, dynamic=False)
    # between two hooks a tensor lies on a holder, within one block: nothing that a recompute must repeat
    allowed = {"skip_fwd_side_effects_in_bwd_under_checkpoint": True}

    def forward(x: Tensor) -> Tensor:
        try:
            with torch._dynamo.config.patch(allowed):
                out: Tensor = compiled(x)
        except (BackendCompilerFailed, InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"compile needs a model and a compiler that work together, but: {reason}") from None
        return out

    return forward

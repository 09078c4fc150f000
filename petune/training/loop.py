"""The training loop, from top to bottom: batches, loss, step, evaluation, checkpoint.

Everything random in a step comes from (seed, step): a resumed run equals the uninterrupted one to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.base.distributed import SINGLE_PROCESS, Group
from petune.base.errors import CheckpointError, ConfigError, Diverged, Stopped
from petune.data.batches import Batch, TrainBatches
from petune.injector.param_groups import undecayed_keys
from petune.training.checkpoint import Checkpoint, check_optimizer, newest_checkpoint, save_checkpoint
from petune.training.evaluate import Accuracy, evaluate
from petune.training.events import METRICS_FILE, EpochEnded, Event, Log, Note, StepDone
from petune.training.fit_batch import can_run_out, largest_that_fits
from petune.training.job import TrainJob
from petune.training.mixing import Mixing, seed_step
from petune.training.optim import create_optimizer, create_schedule
from petune.training.precision import choose_attention, choose_precision
from petune.training.progress import FitResult, Progress
from petune.training.shard import Sharded
from petune.training.speed.feature_cache import Features
from petune.training.speed.speedups import apply_speedups
from petune.training.step_sync import Asked, share_step
from petune.training.stop import StopFlag

SAVE_EVERY_S = 600.0
UNDER_WAY = 5  # by then heads and adapters that start at zero have left it


class Trainer:
    """One training run of one attachment.

    Args:
        job: What trains, on what, how, and where its files go.
        stop: Asked after every step.
        on_event: Called with every step, epoch and note.
        group: The processes that train together; each takes its part of every batch, and one writes.
        peak_bytes: Returns how much memory was needed so far, for the checkpoint.

    Raises:
        ConfigError: A batch is smaller than the group.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        stop: StopFlag,
        on_event: Callable[[Event], None] = lambda event: None,
        group: Group = SINGLE_PROCESS,
        peak_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.job = job
        self.att = attachment = job.attachment
        self.model = attachment.model
        self.dataset = dataset = job.dataset
        self.preprocess = preprocess = job.preprocess
        self.train = train = job.config
        self.device = device = job.device
        self.directory = directory = job.directory
        self.seed = seed = job.seed
        self.stop = stop
        self.group = group
        self.peak_bytes = peak_bytes
        self.on_event = on_event if group.is_main else lambda event: None
        self.batches = TrainBatches(dataset.train, preprocess, train.augment, train.batch_size, seed, device)
        self.total_steps = len(self.batches) * train.epochs
        attachment.on_train_start(self.total_steps)
        self.params = {**attachment.tuned, **attachment.head}
        check_optimizer(train)
        self.optimizer = create_optimizer(self.params, undecayed_keys(self.model), train)
        self.schedule = create_schedule(self.optimizer, train, self.total_steps)
        wanted = group.broadcast(lambda: choose_precision(train.precision, device))
        self.plain_attention: list[nn.Module] = []
        self.compute_in(choose_precision(wanted, device))
        classes, size = dataset.num_classes, self.batches.batch_size
        self.mixing = Mixing(train, classes, size, seed)
        if size < group.size:
            raise ConfigError(f"a batch must have an image for each of {group.size} processes, but has {size}")
        self.part = group.shard(size)
        self.sharded = Sharded(attachment, group, device) if train.shard and group.size > 1 else None
        self.progress, self.saved = Progress(precision=self.precision), time.perf_counter()
        self.best: dict[str, Tensor] = {}
        self.log = Log(directory / METRICS_FILE)
        self.logits: Callable[[Tensor], Tensor] = self.model  # of what `batches` give
        self.features: Features | None = None

    def fit(self) -> FitResult:
        """Train to the end, from the newest valid checkpoint where there is one.

        Raises:
            Diverged: Loss or gradient is not finite; nothing non-finite is on disk.
            Stopped: A signal came; a checkpoint of this very step is on disk.
            ProcessLost: Of several processes, one is gone.
        """
        started = time.perf_counter()
        self._resume()
        with apply_speedups(self):
            self._train(started - self.progress.time_s)
        return self._fitted()

    def compute_in(self, precision: Literal["fp32", "tf32", "bf16"]) -> None:
        """Train in this number format, with the attention kernel that belongs to it."""
        for module in self.plain_attention:
            module.fused_attn = True  # type: ignore[assignment]
        self.precision = precision
        self.plain_attention = choose_attention(self.model, self.device, precision)

    def _train(self, started: float) -> None:
        self.saved = time.perf_counter()
        part = slice(None) if self.mixing.needs_whole_batch else self.part
        while self.progress.epoch < self.train.epochs:
            self.att.train()
            mark = time.perf_counter()
            for batch in self.batches.epoch(self.progress.epoch, self.progress.batch, part):
                asked = self._step(batch)
                now = time.perf_counter()
                self.progress.train_time_s += now - mark
                self.progress.time_s = now - started
                self.on_event(self._step_done())
                if self.group.size == 1:
                    asked = self._asked()
                if asked.save or asked.stop:
                    self._save()
                    if asked.stop:
                        self.stop.leave()
                mark = time.perf_counter()
            self._end_epoch()
            self.progress.time_s = time.perf_counter() - started
            self._save()
            self.stop.check(self.group)

    def _asked(self) -> Asked:
        """What this process would do after the step; in a group the sum of all decides, so that all do the same."""
        late = self.group.is_main and time.perf_counter() - self.saved > SAVE_EVERY_S
        return Asked(self.stop.signal_name is not None, late)

    def choose_micro_batch(self) -> None:
        """What config or checkpoint says; else, on a device whose memory can run out, what fits, found out now."""
        p, whole = self.progress, self.part.stop - self.part.start
        if not p.micro_batch or not can_run_out(self.device):
            fits = self.train.micro_batch_size or self.batches.batch_size
            # sharded, one that runs out leaves the others waiting
            if can_run_out(self.device) and self.sharded is None and not self.train.micro_batch_size:
                fits = self.group.all_reduce_min(self._probe())
            p.micro_batch = fits
            if p.micro_batch < whole:
                self.on_event(Note(f"a step of {whole} images goes through the model {p.micro_batch} at a time"))

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Buffers, gradients and random state are afterwards as they were."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            _copy_into(dict(self.model.named_buffers()), buffers)

    def _probe(self) -> int:
        batch = next(iter(self.batches.epoch(0)))
        self.att.train()

        def step(size: int) -> None:
            x, target = self.mixing(batch, 0)
            self._backward(x[:size], target[:size])

        with self.untouched():
            return largest_that_fits(step, self.part.stop - self.part.start, list(self.params.values()))

    def autocast(self) -> torch.autocast:
        """The number format of forward passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _step(self, batch: Batch) -> Asked:
        p = self.progress
        seed_step(self.device, self.seed, p.step, self.group.rank)
        self.schedule.step_update(p.step)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        loss, asked = self._gradients(batch)
        if p.step in {0, max(2, min(UNDER_WAY, self.total_steps - 1))}:  # a warm-up's first step may move nothing
            self.att.check_gradients(under_way=p.step > 0)
        norm = nn.utils.clip_grad_norm_(self.params.values(), self.train.grad_clip or math.inf)
        value = self._finite(loss, norm, lr, batch)
        self.optimizer.step()
        self.att.on_step_end(p.step)
        p.step, p.batch, p.loss_sum = p.step + 1, p.batch + 1, p.loss_sum + value
        if p.step % self.train.log_every == 0:
            p.log_bytes = self._write_log(step=p.step, epoch=p.epoch + 1, loss=value, lr=lr, grad_norm=float(norm))
        return asked

    def _gradients(self, batch: Batch) -> tuple[Tensor, Asked]:
        """The gradients of the whole batch's mean loss, that loss, and what all processes ask for."""
        failed: list[Exception] = []
        loss, asked = torch.zeros((), device=self.device), self._asked()
        with nullcontext() if self.sharded else self.group.collect_errors(failed):  # the others wait within its forward
            x_BCHW, target = self.mixing(batch, self.progress.step)
            if self.mixing.needs_whole_batch:
                x_BCHW, target = x_BCHW[self.part], target[self.part]
            loss = self._backward(x_BCHW, target)
        if self.group.size > 1:
            share = (self.part.stop - self.part.start) / self.batches.batch_size
            trained = list(self.params.values())
            asked = share_step(self.group, trained, self.model, loss, share, asked, failed)
        return loss, asked

    def _backward(self, x_BCHW: Tensor, target: Tensor) -> Tensor:
        """Add these images' share of the gradients of the batch's mean loss, and return that share of the loss.

        A micro-batch at a time. All shares are the whole batch, which is one share where one process trains.
        """
        total, whole = torch.zeros((), device=self.device), self.batches.batch_size
        count = math.ceil(len(x_BCHW) / (self.progress.micro_batch or len(x_BCHW)))
        # of nearly one size: a last piece of a single image would be none for BatchNorm
        pieces = zip(torch.tensor_split(x_BCHW, count), torch.tensor_split(target, count), strict=True)
        for number, (x, y) in enumerate(pieces):
            with self.autocast():
                logits_BC = self.logits(x)
            loss = F.cross_entropy(logits_BC.float(), y, label_smoothing=self.mixing.smoothing)
            loss = loss * (len(x) / whole)
            if number == 0:  # once a step
                loss = loss + self.att.loss(self.progress.step) * (len(x_BCHW) / whole)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _finite(self, loss: Tensor, norm: Tensor, lr: float, batch: Batch) -> float:
        value = float(loss.detach())
        if math.isfinite(value) and math.isfinite(float(norm)):
            return value
        raise self._diverged(
            f"the loss is {value} and the gradient norm {float(norm)} (lr {lr:.3g}, images {_shown(batch.positions)})"
        )

    def _diverged(self, what: str) -> Diverged:
        last, _ = newest_checkpoint(self.directory / "checkpoints")
        return Diverged(
            f"loss and gradient must stay finite, but at step {self.progress.step} {what}. Lower its "
            "learning rate (--lr, in a comparison --set lrs.METHOD=…); "
            + (f"the last good checkpoint is of step {last.progress['step']}" if last else "there is no checkpoint yet")
        )

    def _end_epoch(self) -> None:
        p = self.progress
        row = {"epoch": p.epoch + 1, "train_loss": p.loss_sum / max(1, p.batch)}
        last, every = self.train.epochs, self.train.val_every
        if len(self.dataset.val) and ((p.epoch + 1) % every == 0 or p.epoch + 1 == last):
            val = self._validate()
            row |= {"val_loss": val.loss, "val_top1": val.top1, "val_top5": val.top5}
            if val.top1 > p.best_top1 or self.job.keep == "last":
                p.best_epoch, p.best_top1, p.best_top5 = p.epoch + 1, val.top1, val.top5
                if self.job.keep == "best":
                    self.best = {key: t.detach().clone() for key, t in self._tensors().items()}
        p.log_bytes = self._write_log(**row)
        p.epochs.append(row)
        p.epoch, p.batch, p.loss_sum = p.epoch + 1, 0, 0.0
        self.on_event(EpochEnded(p.epoch, self.train.epochs, row))

    def _validate(self) -> Accuracy:
        try:
            val = self.evaluate("val")
        except (Stopped, torch.OutOfMemoryError):
            self._save()  # with the epoch's last step done, so that a resume goes on with this evaluation
            raise
        if not math.isfinite(val.loss):
            raise self._diverged(f"the loss on val is {val.loss}")
        return val

    def evaluate(self, part: Literal["val", "test"]) -> Accuracy:
        """Accuracy of the model as it is on a split."""
        return evaluate(
            self.model,
            getattr(self.dataset, part),
            self.preprocess,
            num_classes=self.dataset.num_classes,
            batch_size=self.train.eval_batch_size,
            device=self.device,
            autocast=self.autocast,
            stop=self.stop,
            by_position=self.features.of(part) if self.features else None,
            group=self.group,
            sharded=self.sharded is not None,
        )

    def _write_log(self, **values: Any) -> int:
        """Append to the metrics and return their size; of several processes, the leader."""
        written = self.progress.log_bytes
        with self.group.raise_together():
            if self.group.is_main:
                written = self.log.write(**values)
        return written

    def _save(self) -> None:
        self.progress.peak_bytes = max(self.progress.peak_bytes, self.peak_bytes())
        with self.group.raise_together():
            if self.group.is_main:
                save_checkpoint(
                    self.directory / "checkpoints",
                    Checkpoint(self._tensors(), self.best, self.optimizer.state_dict(), asdict(self.progress)),
                )
        self.saved = time.perf_counter()

    def _newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, and the log as long as it was then."""
        checkpoint, problems = newest_checkpoint(self.directory / "checkpoints")
        instead = "going on from the one before" if checkpoint else "none is left: starting from the beginning"
        for problem in problems:
            self.log.note(problem)
            self.on_event(Note(f"{problem}; {instead}"))
        self.log.cut(checkpoint.progress["log_bytes"] if checkpoint else 0)
        return checkpoint

    def _resume(self) -> None:
        checkpoint = self.group.broadcast(self._newest)
        here = self._tensors()
        if checkpoint is None:
            if self.group.size > 1:  # the processes' own may differ in the last bit
                _copy_into(here, self.group.broadcast(lambda: {key: t.detach().cpu() for key, t in here.items()}))
            return
        if {k: t.shape for k, t in here.items()} != {k: t.shape for k, t in checkpoint.tensors.items()}:
            raise CheckpointError(
                f"{self.directory} must hold checkpoints of this model, method and dataset, but has others; "
                "name another --output"
            )
        _copy_into(here, checkpoint.tensors)
        self.best = {key: t.to(self.device) for key, t in checkpoint.best.items()}
        self.optimizer.load_state_dict(checkpoint.optimizer)
        measured, self.progress = self.precision, Progress(**checkpoint.progress)
        self.progress.precision = self.progress.precision or measured
        if self.progress.precision != measured:  # `auto` may measure otherwise on a busy machine
            self.compute_in(choose_precision(self.progress.precision, self.device))

    def _fitted(self) -> FitResult:
        p = self.progress
        if self.best:
            _copy_into(self._tensors(), self.best)
        val = Accuracy(p.best_top1, p.best_top5, math.nan, len(self.dataset.val)) if p.best_epoch > 0 else None
        step_time_s = p.train_time_s / max(1, p.step)
        epoch, speed = p.best_epoch if val else p.epoch, self._images_per_s()
        return FitResult(
            epoch,
            val,
            speed,
            step_time_s,
            p.time_s,
            p.epochs,
            self.precision,
            p.micro_batch,
            self.train.lr or 0.0,
            self.group.size,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.params, **{f"buffer:{name}": buffer for name, buffer in self.model.named_buffers()}}

    def _step_done(self) -> StepDone:
        p = self.progress
        lr = self.optimizer.param_groups[0]["lr"]
        return StepDone(p.step, self.total_steps, p.epoch, p.loss_sum / p.batch, lr, self._images_per_s())

    def _images_per_s(self) -> float:
        p = self.progress
        return p.step * self.batches.batch_size / p.train_time_s if p.train_time_s else 0.0


def _copy_into(targets: dict[str, Tensor], sources: Any) -> None:
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(sources[key])


def _shown(positions: Iterable[int]) -> str:
    shown = [int(i) for i in positions]
    return f"{shown[:8]}{' …' if len(shown) > 8 else ''}"

"""The training loop, from top to bottom: batches, loss, step, evaluation, checkpoint.

Everything random in a step comes from (seed, step): a resumed run equals the uninterrupted one to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from petune.base.distributed import SINGLE_PROCESS, Group
from petune.base.errors import ConfigError, Stopped
from petune.base.metric import SplitMetrics
from petune.base.text import plural
from petune.data.batches import Batch, TrainBatches
from petune.injector.param_groups import undecayed_keys
from petune.sites.file_values import rounded_values
from petune.training.batch_loss import BatchLoss
from petune.training.calibrate import calibrate, calibrate_method
from petune.training.checkpoint import check_optimizer
from petune.training.config import NumberFormat
from petune.training.diverged import check_finite, diverged
from petune.training.dry_run import dry_run
from petune.training.evaluate import evaluate
from petune.training.events import EpochEnded, Note, StepDone, Watch, ignore
from petune.training.fit_batch import can_run_out, explain_single_image, largest_that_fits
from petune.training.gradient_check import check_step_gradients
from petune.training.job import TrainJob
from petune.training.layer_decay import lr_scales
from petune.training.meter import Meter
from petune.training.mixup import BatchMixer
from petune.training.optim import create_optimizer, create_schedule, peak_rate
from petune.training.precision import autocast, choose_attention, choose_precision, set_float32_products
from petune.training.progress import FitResult, Progress
from petune.training.randomness import seed_generators
from petune.training.run_files import RunFiles
from petune.training.save_schedule import SaveSchedule
from petune.training.shard import shard_frozen_blocks
from petune.training.speed.context import Forward, StepContext
from petune.training.speed.speedups import apply_speedups
from petune.training.state import ResumableState
from petune.training.step_sync import StepRequest, StepSync
from petune.training.stop import StopFlag
from petune.training.task import choose_metrics

CHECK_GRADIENTS_AT = 5
"""The step of the second gradient check (the first is step 0). What starts at zero has moved by then."""


class Trainer:
    """One training of one attachment.

    Args:
        job: What trains, on which images, with which options, and where its files go.
        stop: Checked after every step.
        on_event: Called with every step, epoch and note.
        group: The processes that train together; each takes its part of every batch, and one writes.
        peak_bytes: Returns how much memory was needed so far, for the checkpoint.

    Attributes:
        batches: The training batches.
        state: What training changes, and how far it is.
        params: Everything that trains, by state_dict key.
        metrics: The task's metrics, the one that chooses the epoch first.

    Raises:
        ConfigError: An option is not possible, such as a batch with fewer images than processes.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        stop: StopFlag,
        on_event: Watch = ignore,
        group: Group = SINGLE_PROCESS,
        peak_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.job = job
        self.config = job.config
        self.att = job.attachment
        self.model = job.attachment.model
        self.device = job.device
        self.stop = stop
        self.on_event = on_event if group.is_main else ignore
        self.group = group
        self.peak_bytes = peak_bytes
        self.files = RunFiles(job.directory, group)

        self.batches = TrainBatches(
            job.dataset.train,
            job.preprocess,
            self.config.augment,
            self.config.batch_size,
            job.seed,
            self.device,
            even=self.config.mixes,
            ignore_index=job.dataset.target.ignore_index,
            balanced=self.config.sampling == "balanced",
        )
        self.batch_size = self.batches.batch_size
        self.total_steps = len(self.batches) * self.config.epochs
        smallest = int(self.batches.sizes.min())
        if smallest < group.size:
            raise ConfigError(f"a batch of {plural(smallest, 'image')} is too small for {group.size} processes")
        self.att.on_train_start(self.total_steps)

        self.params = {**self.att.tuned, **self.att.head}
        check_optimizer(self.config)
        scales = lr_scales(self.att, self.params, self.config.layer_decay)
        self.optimizer = create_optimizer(self.params, undecayed_keys(self.model), self.config, scales)
        self.schedule = create_schedule(self.optimizer, self.config, self.total_steps)

        self.metrics = choose_metrics(job.task, self.config.choose)
        self.state = ResumableState(self.model, self.params, self.optimizer, job.keep, self.metrics[0], self.config.ema)
        self.progress.precision = group.broadcast(lambda: choose_precision(self.config.precision, self.device))
        self.unfused_attention: list[nn.Module] = []
        self._apply_precision()

        self.sharded = self.config.shard and group.size > 1
        self.sync = StepSync(group, self.model, list(self.params.values()), self.sharded)
        self.mixer = BatchMixer(self.config, job.task, self.batch_size, job.seed, group.shard)
        self.loss = BatchLoss(job.task, job.dataset.train, self.mixer.label_smoothing, self.device)
        if self.sharded:
            shard_frozen_blocks(self.att, group, self.device)
        self.forward = Forward(self.model)
        self.saves = SaveSchedule()

    def fit(self) -> FitResult:
        """Train to the end, from the newest valid checkpoint if there is one.

        Raises:
            Diverged: Loss or gradient is not finite; no file contains a non-finite number.
            Stopped: A signal came; there is a checkpoint of this very step.
            ProcessLost: One of several processes is gone.
        """
        start = time.perf_counter()
        self._resume()
        start -= self.progress.time_s
        with self.speedups():
            self.saves.restart()
            while not self.progress.is_done(self.job.epochs, self.config.patience):
                self._train_epoch(start)
                self._end_epoch()
                self.progress.time_s = time.perf_counter() - start
                self._save_if_due()
        return self._result()

    def _train_epoch(self, start: float) -> None:
        p, positions_only = self.progress, self.forward.trains_on_positions
        batches = self.batches.epoch(p.epoch, p.batch, self.mixer.reads, positions_only=positions_only)
        self.att.train()
        mark = time.perf_counter()
        for batch in batches:
            self.step(batch)
            now = time.perf_counter()
            p.train_time_s += now - mark
            p.time_s = now - start
            self.on_event(self._step_done())
            request = self.sync.agreed(self._request())
            if request.save or request.stop:
                self._save()
            if request.stop:
                self.stop.raise_stopped()
            mark = time.perf_counter()

    def step(self, batch: Batch) -> None:
        """Take one optimizer step on a batch of this process's images (or positions where features are cached)."""
        p = self.progress
        seed_generators(self.device, self.job.seed, p.step, self.group.rank)
        self.schedule.step_update(p.step)
        lr = peak_rate(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        backward = partial(self._backward_batch, batch)
        loss_tensor = self.sync.backward(backward, self._request, batch.num_images)
        # a warm-up's first step has a rate of zero and moves nothing, so the second check comes later
        if p.step in {0, max(2, min(CHECK_GRADIENTS_AT, self.total_steps - 1))}:
            check_step_gradients(self.att, self.params, backward, under_way=p.step > 0)
        norm_tensor = nn.utils.clip_grad_norm_(self.params.values(), self.config.grad_clip or math.inf)
        loss, norm = float(loss_tensor), float(norm_tensor)  # only now, since a GPU is waited for
        check_finite(loss, norm, lr, batch, p.step, self.files)
        self.optimizer.step()
        self.att.on_step_end(p.step)
        p.step += 1
        self.state.average.update(p.step)
        p.batch += 1
        p.loss_sum += loss
        if p.step % self.config.log_every == 0:
            self.files.write_metrics(step=p.step, epoch=p.epoch + 1, loss=loss, lr=lr, grad_norm=norm)

    def _backward_batch(self, batch: Batch) -> Tensor:
        return self._backward(*self.mixer(batch, self.progress.step), self.loss.weights(batch), batch.num_images)

    def _backward(self, x: Tensor, target: Tensor, weights_B: Tensor | None, num_images: int) -> Tensor:
        """Compute gradients of this process's share of the batch's mean loss, a micro-batch at a time.

        Args:
            x: This process's images.
            target: Their targets, which may be mixed.
            weights_B: Their weights.
            num_images: Images of the whole batch, of all processes together.

        Returns:
            That share of the loss. With one process it is the whole loss.
        """
        total = torch.zeros((), device=self.device)
        # nearly equal pieces: a small rest of a single image would be too small for BatchNorm
        num_pieces = math.ceil(len(x) / (self.progress.micro_batch or len(x)))
        for number, rows in enumerate(torch.tensor_split(torch.arange(len(x)), num_pieces)):
            piece = slice(int(rows[0]), int(rows[-1]) + 1)
            weights = None if weights_B is None else weights_B[piece]
            loss = self.loss(self._outputs(x[piece]), target[piece], weights, num_images)
            loss = loss + self.att.aux_loss() * (len(rows) / num_images)
            if number == 0:  # the method's own term counts once per step
                loss = loss + self.att.loss(self.progress.step) * (len(x) / num_images)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _outputs(self, x: Tensor) -> Tensor:
        try:
            with autocast(self.device, self.precision):
                return self.forward.train(x)
        except ValueError as error:
            explained = explain_single_image(error, x, self.model)
            if explained is None:
                raise
            raise explained from error

    def _end_epoch(self) -> None:
        p, config = self.progress, self.config
        row = {"epoch": p.epoch + 1, "train_loss": p.loss_sum / max(1, p.batch)}
        is_due = (p.epoch + 1) % config.val_every == 0 or p.epoch + 1 == self.job.epochs
        if len(self.job.dataset.val) and is_due:
            val = self._validate()
            row |= {"val_loss": val.loss, **{f"val_{name}": value for name, value in val.values.items()}}
            self.state.record(val)
        self.files.write_metrics(**row)
        p.epochs.append(row)
        p.epoch += 1
        p.batch = 0
        p.loss_sum = 0.0
        self.on_event(EpochEnded(p.epoch, self.job.epochs, row, self.state.metric))

    def _validate(self) -> SplitMetrics:
        try:
            with self.state.average.applied():
                val = self.evaluate("val")
        except (Stopped, torch.OutOfMemoryError):
            self._save()  # the epoch's steps are done, so a resume continues with this evaluation
            raise
        if not math.isfinite(val.loss):
            raise diverged(f"the loss on val is {val.loss}", self.progress.step, self.files)
        return val

    def evaluate(self, split: Literal["val", "test"], meter: Meter | None = None) -> SplitMetrics:
        """Return the metrics of the model as it is now on a split; `meter` is a new one of the task."""
        with rounded_values(self.model) if self.precision == "bf16" else nullcontext():
            return evaluate(
                self.job,
                getattr(self.job.dataset, split),
                self.precision,
                stop=self.stop,
                by_position=self.forward.cached.get(split),
                group=self.group,
                sharded=self.sharded,
                meter=meter,
                image_values=split == "test",
            )

    @contextmanager
    def speedups(self) -> Iterator[None]:
        """Let steps and evaluations inside use the speed-ups that the configuration allows."""
        context = StepContext(
            job=self.job,
            precision=self.precision,
            epochs_left=self.job.epochs - self.progress.epoch,
            num_processes=self.group.size,
            sharded=self.sharded,
            stop=self.stop,
            on_event=self.on_event,
            choose_micro_batch=self._choose_micro_batch,
        )
        try:
            with apply_speedups(context) as forward:
                self.forward = forward
                yield
        finally:
            self.forward = Forward(self.model)

    def _choose_micro_batch(self) -> int:
        """Measure once what fits a GPU, and keep it in the checkpoint; elsewhere the configuration decides."""
        p, config = self.progress, self.config
        if p.micro_batch and can_run_out(self.device):
            return p.micro_batch
        p.micro_batch = config.micro_batch_size or self.batch_size
        if self.job.task.needs_whole_batch:
            return p.micro_batch
        # a sharded process that runs out of memory would leave the others waiting
        if can_run_out(self.device) and not config.micro_batch_size and not self.sharded:
            p.micro_batch = self.group.all_reduce_min(self.largest_micro_batch())
        part = self.group.shard(self.batch_size)
        num_images = part.stop - part.start
        if p.micro_batch < num_images:
            self.on_event(
                Note(f"each step runs {plural(num_images, 'image')} through the model {p.micro_batch} at a time")
            )
        return p.micro_batch

    def largest_micro_batch(self) -> int:
        """Return the largest micro-batch that fits the device's memory."""
        largest = int(self.batches.sizes.argmax())
        batch = next(self.batches.epoch(0, largest, self.mixer.reads))
        x, target = self.mixer(batch, step=0)
        weights = self.loss.weights(batch)
        self.att.train()

        def step(size: int) -> None:
            self._backward(x[:size], target[:size], None if weights is None else weights[:size], batch.num_images)

        with dry_run(self.model, self.device):
            return largest_that_fits(step, len(x), list(self.params.values()))

    def _apply_precision(self) -> None:
        """Tell PyTorch and the attention layers about the number format."""
        set_float32_products(self.precision, self.device)
        for module in self.unfused_attention:
            module.fused_attn = True  # type: ignore[assignment]
        self.unfused_attention = choose_attention(self.model, self.device, self.precision)

    @property
    def progress(self) -> Progress:
        """Progress of the training."""
        return self.state.progress

    @property
    def precision(self) -> NumberFormat:
        """Number format of the forward passes."""
        return self.state.progress.precision

    def _request(self) -> StepRequest:
        return StepRequest(stop=self.stop.signal_name is not None, save=self.saves.is_overdue())

    def _resume(self) -> None:
        checkpoint, problems = self.files.load()
        instead = "resuming from the one before" if checkpoint else "no other is left, so training starts again"
        for problem in problems:
            self.on_event(Note(f"{problem}; {instead}"))
        if checkpoint is None:
            calibrate_method(self.job, self.batches, self.loss, self.precision, sharded=self.sharded)
            self.progress.record_batches(self.batches)
            self.sync.share_initial_values(self.state.tensors())
            return
        self.state.load(checkpoint)
        self.progress.check_batches(self.batches, self.job.directory)
        self.progress.record_batches(self.batches)
        self._apply_precision()  # that of the checkpoint: `auto` may choose another on this machine

    def _save(self) -> None:
        p = self.progress
        p.peak_bytes = max(p.peak_bytes, self.peak_bytes())
        p.log_bytes = self.files.metrics_bytes
        with self.saves.saving():
            self.files.save(self.state.checkpoint())

    def _save_if_due(self) -> None:
        """Save at the end of an epoch, unless the last save was long and not long ago; stop if a signal came."""
        is_last = self.progress.is_done(self.job.epochs, self.config.patience)
        stop = self.group.any_rank(self.stop.signal_name is not None)
        if self.group.any_rank(stop or is_last or self.saves.is_due()):
            self._save()
        if stop:
            self.stop.raise_stopped()

    def _result(self) -> FitResult:
        self.state.restore_best()
        calibrate(self.job.task, partial(self.evaluate, "val") if len(self.job.dataset.val) else None)
        if self.progress.epoch < self.job.epochs:
            self.on_event(Note(self.progress.early_stop(self.job.epochs)))
        return self.progress.result(
            epochs=self.job.epochs,
            num_val=len(self.job.dataset.val),
            num_images=self.batches.num_images(self.progress.step),
            lr=self.config.lr or 0.0,
            num_processes=self.group.size,
        )

    def _step_done(self) -> StepDone:
        p, lr = self.progress, peak_rate(self.optimizer)
        speed = p.images_per_s(self.batches.num_images(p.step))
        unit = "images" if self.job.dataset.train.num_frames is None else "clips"
        return StepDone(p.step, self.total_steps, p.epoch, p.loss_sum / p.batch, lr, speed, unit)

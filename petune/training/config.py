"""How to train: one set of values for every method; what is None comes from the method's own recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from petune.base.config import Config

Precision = Literal["auto", "fp32", "tf32", "bf16"]
Schedule = Literal["cosine", "constant"]
CacheFeatures = Literal["auto", "always", "never"]
Augment = Literal["auto", "none", "shift", "light", "paddle_study", "crop"]


class TrainConfig(Config):
    """Training options.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Images a step; the ragged last batch is dropped.
        micro_batch_size: Images that go through the model at once; a step adds up their gradients, so the step is
            the same (but for BatchNorm). None finds out on a GPU what fits, once before training; checkpoints
            and result.json hold it.
        eval_batch_size: Images at once where val and test are read; a resume may have another.
        lr: Peak learning rate; None takes the method's recipe. Not scaled by the batch size.
        weight_decay: Applied to matrices only; None takes the recipe.
        decay_vectors: Apply it to biases, norms, position embedding and class token too, as plain torch does.
        optimizer: Any name of timm's optimizer factory; None takes the recipe.
        schedule: `cosine` to zero over all steps, or `constant`.
        warmup: Steps from 0 to the peak: a share of all steps below 1, else a number of steps.
        label_smoothing: Share of the target spread over all classes.
        mixup, cutmix: Alpha of timm's Mixup; 0 switches it off.
        augment: A preset of petune.data.augment; `auto` is the dataset's own.
        grad_clip: Largest gradient norm; None does not clip.
        precision: `auto` measures whether bfloat16 is faster on this device; with `bf16` what trains stays in float32.
            `tf32` is float32 whose products an NVIDIA GPU may round.
        grad_checkpointing: Keep only what enters each block, and compute the block again in backward: less memory,
            a forward more.
        compile: Compile the training step's forward by torch.compile; it takes a minute, and pays on a GPU or for many
            steps. Rounding differs from that of a run without.
        cache_features: What the frozen layers below the first trained one make of each image is computed once and
            kept in the run directory till the run ends. `auto` does so where the images stay the same from epoch to
            epoch (augment none, no mixup or cutmix) and there is room; `always` is an error where it cannot be done.
        feature_cache_gb: The most that may take, in 10⁹ bytes.
        val_every: Epochs between two evaluations on val; the last epoch always has one. Where training images are
            few, most of the time would go there.
        shard: Of several processes each holds a part of the frozen blocks (FSDP2) and gathers a block when it runs.
        log_every: Steps between lines of metrics.jsonl.
    """

    epochs: int = Field(10, ge=1, le=100_000)
    batch_size: int = Field(128, ge=1, le=1_000_000)
    micro_batch_size: int | None = Field(None, ge=1)
    eval_batch_size: int = Field(256, ge=1, le=1_000_000)
    lr: float | None = Field(None, gt=0, le=1e4)
    weight_decay: float | None = Field(None, ge=0, le=10)
    decay_vectors: bool = False
    optimizer: str | None = None
    schedule: Schedule = "cosine"
    warmup: float = Field(0.1, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, le=10)
    cutmix: float = Field(0.0, ge=0, le=10)
    augment: Augment = "auto"
    grad_clip: float | None = Field(1.0, gt=0)
    precision: Precision = "auto"
    grad_checkpointing: bool = False
    compile: bool = False
    cache_features: CacheFeatures = "auto"
    feature_cache_gb: float = Field(10.0, ge=0, le=1e6)
    val_every: int = Field(1, ge=1)
    shard: bool = False
    log_every: int = Field(50, ge=1)

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str | None) -> str | None:
        if value is not None:
            import timm.optim

            known = timm.optim.list_optimizers()
            if value not in known:
                from petune.base.errors import did_you_mean

                raise ValueError(f"timm has no such optimizer{did_you_mean(value, known)}")
        return value

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of linear warm-up, always fewer than `total_steps`."""
        steps = round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)
        return min(steps, total_steps - 1)

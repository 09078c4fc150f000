"""Training options: one set for every method; what is None comes from the method's own recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from petune.base.config import Config
from petune.base.errors import ConfigError, did_you_mean
from petune.data.policy import check_augment
from petune.data.steps import StepConfig

NumberFormat = Literal["fp32", "tf32", "bf16"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
Schedule = Literal["cosine", "constant"]
CacheFeatures = Literal["auto", "always", "never"]
AUTO = "auto"
EpochSampling = Literal["all", "balanced"]


class TrainConfig(Config):
    """Training options.

    Attributes:
        epochs: Passes over the training split. 10, because most methods are close to their best there on CIFAR.
        batch_size: Images per optimizer step. Images that fill no batch are left out of an epoch, at random, if they
            are fewer than 5 % of the training split; otherwise the epoch has one more batch, and all are nearly equal.
            128 is the batch that the learning rates of the methods' recipes are for.
        micro_batch_size: Images that go through the model at once. The gradients of a step are summed over its
            micro-batches, so the step is the same except for BatchNorm. None takes the whole batch on a CPU, and on a
            GPU finds what fits, once before training; checkpoints and result.json record it.
        eval_batch_size: Images per batch of an evaluation. It does not change results, so a resume may use another.
        lr: Peak learning rate, not scaled by the batch size. None takes the method's recipe, which is fair to it.
        weight_decay: Weight decay of matrices. None takes the method's recipe.
        decay_vectors: Decay biases, norms, position embedding and class token as well, as plain PyTorch does. Off,
            because decay pulls their values to zero and transformers are usually trained without.
        optimizer: Any name that timm's optimizer factory knows. None takes the method's recipe.
        schedule: `cosine` decays to zero over all steps, `constant` does not decay.
        warmup: Steps of linear warm-up from zero: below 1 a fraction of all steps, else a number of steps. A tenth,
            as in most papers on ViTs.
        label_smoothing: Probability that is spread over all classes.
        mixup, cutmix: Alpha of timm's Mixup; 0 turns it off. With few epochs they help little, so they are off.
        sampling: `all` shows every training image once in an epoch. `balanced` draws as many images, but every class
            equally often: images of small classes come several times, each time augmented in another way. It replaces
            class weights; with both, small classes count twice as much.
        choose: The metric on val that chooses the epoch, or `loss`; None takes the task's first metric. `NAME:min` or
            `NAME:max`, or `{metric: NAME, mode: min}`, also says which value is the best; else the metric does. Of
            epochs with the same value, the one with the lowest loss is chosen, then the later one.
        patience: Stop at an evaluation on val after this many epochs without a better one; None trains all epochs. The
            schedule of the learning rate is that of all epochs, so a constant one suits it.
        ema: Evaluate and save an exponential moving average of what trains, of this decay (0.99 to 0.9999); None uses
            the values of the last step. At step t the decay is at most 1 - t^(-2/3).
        layer_decay: Factor of the learning rate from one block to the one below it (0.65 to 0.9 for `full`); None uses
            one rate. Adapters inside blocks follow it as well.
        augment: A preset (`none`, `shift`, `light`, `paddle_study`, `crop`, `randaug`, `trivial`, `augmix`, `color`) or
            a list of torchvision's augmentations: `[random_resized_crop: {scale: [0.5, 1.0]}, horizontal_flip]`.
            `auto` takes the dataset's own preset.
        grad_clip: Largest gradient norm; None does not clip. 1 keeps rare large steps from ending a run.
        precision: Number format of forward and backward; trainable parameters stay in float32. `auto` takes
            bfloat16 where the device has instructions for it, the same on one machine in every run. `tf32` lets an
            NVIDIA GPU round float32 products.
        grad_checkpointing: Keep only the input of each block and compute the block again in the backward pass: less
            memory for about a third more time.
        compile: Compile the training forward with torch.compile. Off, because compiling takes a minute or more, pays
            only on a GPU or for many steps, and rounds in another way than a run without.
        cache_features: Compute the frozen layers below the first trained one once per image, and keep the features in
            the run directory until training ends. `auto` does so if images are the same in every epoch (augment none,
            no mixup or cutmix) and there is room; `always` raises an error if it is not possible.
        feature_cache_gb: Limit for cached features in 10⁹ bytes. 10 fits most disks.
        val_every: Epochs between evaluations on val; the last epoch always has one. Raise it for few training images,
            where evaluation takes most of the time.
        shard: With several processes, spread the frozen blocks over them (FSDP2) and gather each block when it runs.
            Off, because a frozen backbone usually fits on every GPU.
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
    augment: str | list[StepConfig] = AUTO
    sampling: EpochSampling = "all"
    choose: str | None = None
    patience: int | None = Field(None, ge=1)
    ema: float | None = Field(None, gt=0, lt=1)
    layer_decay: float | None = Field(None, gt=0, le=1)
    grad_clip: float | None = Field(1.0, gt=0)
    precision: Precision = "auto"
    grad_checkpointing: bool = False
    compile: bool = False
    cache_features: CacheFeatures = "auto"
    feature_cache_gb: float = Field(10.0, ge=0, le=1e6)
    val_every: int = Field(1, ge=1)
    shard: bool = False
    log_every: int = Field(50, ge=1)

    @field_validator("augment")
    @classmethod
    def _known_augment(cls, value: str | list[StepConfig]) -> str | list[StepConfig]:
        try:
            check_augment(value, also=[AUTO])
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str | None) -> str | None:
        if value is None:
            return None
        import timm.optim

        known = timm.optim.list_optimizers()
        if value not in known:
            raise ValueError(f"timm has no such optimizer{did_you_mean(value, known)}")
        return value

    @field_validator("choose", mode="before")
    @classmethod
    def _metric_and_mode(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "metric" in value and set(value) <= {"metric", "mode"}:
            value = ":".join(str(part) for part in (value["metric"], value.get("mode")) if part is not None)
        if isinstance(value, str) and ":" in value and value.partition(":")[2] not in {"min", "max"}:
            raise ValueError(f"{value!r} has an unknown mode. Write NAME, NAME:min or NAME:max")
        return value

    @field_validator("val_every")
    @classmethod
    def _patience_covers_an_evaluation(cls, value: int, info: ValidationInfo) -> int:
        patience = info.data.get("patience")
        if patience is not None and patience < value:
            raise ValueError(
                f"with evaluations every {value} epochs, patience must be at least {value}, not {patience}"
            )
        return value

    @property
    def mixes(self) -> bool:
        """True if images are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    def warmup_steps(self, total_steps: int) -> int:
        """Return the number of warm-up steps, which is always less than `total_steps`."""
        steps = round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)
        return min(steps, total_steps - 1)

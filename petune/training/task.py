"""The contract of a task: loss, metrics, and the head that a model gets. This file is its manual.

A task says what is trained for. petune reads the dataset, builds the backbone with a head of `num_outputs` outputs,
attaches the method and trains it; the task gives the loss of each image and the metrics. A whole plugin:

    class CountConfig(petune.TaskConfig):
        "Count things: one number an image."
        power: float = 1.0

    class Count(petune.Task[CountConfig]):
        target_kind = "number"
        metrics = (petune.Metric(name="mae", label="MAE", higher_is_better=False),)

        def loss(self, outputs, targets, label_smoothing=0.0):
            return (outputs - targets.float()).abs().pow(self.config.power).mean(1)     # (B, K) -> (B,)

        def new_meter(self):
            return petune.TorchMeter({"mae": torchmetrics.MeanAbsoluteError()})

        def predict(self, outputs):
            return [dict(zip(self.target.names, row)) for row in outputs.tolist()]      # for people, one per image

    # pyproject.toml of the plugin; the name on the left is the task's name everywhere:
    [project.entry-points."petune.tasks"]
    count = "petune_count:Count"

Then `petune run --task count:power=2 --dataset …` trains it. The first metric chooses the epoch on val and sorts
tables.

What the targets are depends on `target_kind`; a dataset of another kind is refused (see `petune.data.target.Target`):

- `class`: int64 (B,), a class.
- `multi_hot`: uint8 (B, C), 0 or 1 for each class.
- `number`: float64 (B, K), numbers.
- `mask`: uint8 (B, S, S), a class for each pixel, or `target.ignore_index`.

Outputs are what the head returns, (B, `num_outputs()`), in float32. A task that needs another head than a classifier
defines `add_head`; with `petune.add_dense_head` the outputs are (B, `num_outputs()`, S, S), for each pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from petune.base.config import Config
from petune.base.errors import ConfigError, did_you_mean
from petune.base.metric import LOSS, Metric
from petune.base.plugins import set_config_class
from petune.data.dataset import Split
from petune.data.target import Target, TargetKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from petune.training.meter import Meter

    Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TaskConfig(Config):
    """Options of a task: pydantic fields with a type and a default. Unknown keys and wrong types are refused."""


ConfigT = TypeVar("ConfigT", bound=TaskConfig)


class Task(Generic[ConfigT]):
    """Base of every task. Subclass it with the class of its options: `class Count(petune.Task[CountConfig])`.

    Attributes:
        Config: The class of the options, taken from the type parameter of `Task[...]`.
        target_kind: The kind of targets that it trains on.
        metrics: The metrics that `new_meter` computes. The first one chooses the epoch on val and sorts tables, unless
            `train.choose` names another.
        always_defined: Names of metrics that have a value whatever the targets are. Others are tried on val before a
            training that they would choose the epoch of.
        needs_whole_batch: The loss of an image depends on the other images of its batch, so batches are not divided
            into micro-batches or among processes.
        smooths_labels: `loss` applies label smoothing; without it, `train.label_smoothing` is refused.
        head_state: Keys of `state` that the head's outputs depend on, such as the mean of the numbers. A run that
            continues from another one with its head keeps these, too; the others are fitted to its own images.
        name: The name under which the task was built; empty for one that was made by hand.
        config: The options of this instance.
        target: Kind and names of the targets; set by `bind`.
        state: What `fit` returned, and after training what `calibrate` did; set by `bind`.
    """

    Config: ClassVar[type[TaskConfig]]
    target_kind: ClassVar[TargetKind]
    metrics: tuple[Metric, ...] = ()
    always_defined: tuple[str, ...] = ()
    needs_whole_batch: bool = False
    smooths_labels: bool = False
    head_state: tuple[str, ...] = ()
    name: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take `Config` from the type parameter of the base class.

        Raises:
            TypeError: The class names no config class.
        """
        super().__init_subclass__(**kwargs)
        set_config_class(cls, Task, TaskConfig)

    def __init__(self, config: ConfigT | None = None, **options: Any) -> None:
        """Configure the task with a config, or with options.

        Raises:
            ConfigError: An option is unknown or has a wrong value; the message lists all problems.
        """
        if config is None or options:
            given = config.model_dump() if config is not None else {}
            config = self.Config.build({**given, **options}, type(self).__name__)  # type: ignore[assignment]
        self.config: ConfigT = config  # type: ignore[assignment]
        self.target = Target(self.target_kind, ())
        self.state: dict[str, Any] = {}

    def bind(self, target: Target, state: dict[str, Any]) -> None:
        """Set the targets and the state: by the trainer after `fit`, or as an adapter recorded them.

        Args:
            target: Kind and names of the targets.
            state: What `fit` and `calibrate` returned.
        """
        self.target = target
        self.state = state

    def fit(self, train: Split, target: Target) -> dict[str, Any]:
        """Return JSON data from the training targets, such as class weights, or mean and deviation of numbers.

        It becomes `state`, is saved with the adapter and is there again when the adapter predicts.

        Args:
            train: The training split.
            target: Kind and names of its targets.
        """
        return {}

    def calibrate(self, meter: Meter | None) -> dict[str, Any]:
        """Return JSON data that is added to `state` when training ends, such as thresholds. Override it if needed.

        Args:
            meter: The meter of an evaluation on val with the kept epoch; None without a val split.
        """
        return {}

    @property
    def calibrates(self) -> bool:
        """True for a task that defines `calibrate`, which needs one more evaluation on val."""
        return type(self).calibrate is not Task.calibrate

    def num_outputs(self) -> int:
        """Return the outputs of the head; by default one per name of the targets."""
        return len(self.target.names)

    def add_head(self, model: nn.Module, seed: int) -> nn.Module:
        """Return a model with the task's head; by default it is the classifier, so the model is returned as it is.

        A method is attached to what this returns, and `find_sites` must find the new head in it as `sites.head`; a
        `get_classifier()` of the model names it. The backbone's own tensors must keep their names. It is called with
        weights loaded, and with the model on the meta device for a preview.

        Args:
            model: With a new classifier of `num_outputs()` outputs, and nothing attached.
            seed: Of the head's initial values.
        """
        return model

    @property
    def has_own_head(self) -> bool:
        """True for a task that defines `add_head`."""
        return type(self).add_head is not Task.add_head

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return one loss per image, float32 (B,). Training minimizes their mean.

        Args:
            outputs: Of the head, float32 (B, `num_outputs()`).
            targets: As in the dataset, or mixed by what `mix` returned.
            label_smoothing: `train.label_smoothing`; 0 in evaluations and for mixed targets.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, outputs, targets, label_smoothing)")

    def new_meter(self) -> Meter:
        """Return a meter that computes `metrics`, with no images yet; see `petune.TorchMeter`."""
        raise NotImplementedError(f"{type(self).__name__} must define new_meter(self)")

    def image_values(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return values of each image, (B,), by the name of the metric that their mean over images is; default {}.

        With them a comparison of two methods can tell a difference of a metric from the chance of which images the
        test split has. Metrics that are no mean over images, such as macro-F1, are left out.

        Args:
            outputs: Of the head, float32 (B, `num_outputs()`).
            targets: As in the dataset.
        """
        return {}

    def mix(self, mixup: float, cutmix: float, label_smoothing: float) -> Mix:
        """Return a function that mixes a batch by mixup or CutMix: images and targets to mixed images and targets.

        It may draw from numpy's global generator, which is seeded for every step. The default refuses.

        Args:
            mixup, cutmix: Alpha of each; 0 turns it off.
            label_smoothing: To be applied to the mixed targets.

        Raises:
            ConfigError: The task's targets cannot be mixed.
        """
        raise ConfigError(
            f"mixup and cutmix do not go with the task {self.name or type(self).__name__}. Set both to 0",
            cli_hint="Drop --mixup and --cutmix",
        )

    def predict(self, outputs: Tensor) -> Sequence[Any]:
        """Return one prediction per image for people.

        Args:
            outputs: Of the head, float32 (B, `num_outputs()`).

        Returns:
            Text, a number, a list or a dict: what JSON has. petune shows probabilities by class, numbers by the name of
            the target, and names of classes as such, and compares them with the targets in `petune eval`; everything
            else is shown as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define predict(self, outputs)")


def choose_metrics(task: Task[Any], choose: str | None) -> tuple[Metric, ...]:
    """Return the metrics of a task, the one that chooses the epoch first.

    Args:
        task: The task.
        choose: The name of a metric, or `loss`, with `:min` or `:max` if that is not the metric's own direction; None
            takes the task's first metric.

    Raises:
        ConfigError: The task has no such metric.
    """
    if choose is None:
        return task.metrics
    every = {metric.name: metric for metric in (*type(task).metrics, *task.metrics, LOSS)}
    name, _, mode = choose.partition(":")
    if name not in every:
        raise ConfigError(
            f"the task {task.name or type(task).__name__} has no metric {name!r}, which train.choose names"
            f"{did_you_mean(name, every)}",
            cli_hint=f"Write --set train.choose={task.metrics[0].name}",
        )
    chosen = every[name].model_copy(update={"higher_is_better": mode == "max"}) if mode else every[name]
    return (chosen, *(metric for metric in task.metrics if metric.name != name))

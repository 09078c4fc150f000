"""The plugin contract: one class with one required method. This file is its manual.

A tuner is a configured method. petune finds the sites of a model (`edit.sites`), the tuner changes something there,
and petune does the rest: it registers, freezes, checks, saves and undoes. A whole plugin:

    class SSFConfig(petune.TunerConfig):
        "Scale and shift the output of every attention."
        init_std: float = 0.02

    class ScaleShift(nn.Module):
        def __init__(self, dim, std): ...
        def forward(self, x): return x * self.scale + self.shift      # (..., dim) -> (..., dim)

    class SSF(petune.Tuner[SSFConfig]):
        identity_at_init = False  # scales start at random values near 1
        def attach(self, edit: petune.Edit) -> None:
            for block in edit.sites.require_blocks():
                edit.after(block.attn, ScaleShift(block.dim, self.config.init_std))

    # pyproject.toml of the plugin; the name on the left is the method's name everywhere:
    [project.entry-points."petune.tuners"]
    ssf = "petune_ssf:SSF"

Every tuner has the option `blocks` (`ssf:blocks=last:3`). `edit.sites.blocks` and `edit.backbone()` hold the blocks
that the user has chosen and no others, so a tuner that edits what they return needs no line for it.

`petune.check_tuner("ssf")` then checks the contract on a small model; `petune plugin check ssf` tries one per library.

An adapter is a plain nn.Module. It receives (..., D) tensors, channels last whatever the model's layout, and must treat
every image independently. Optional attributes on it:

- `merge(module)`: fold the change into the weights of `module`, the site that the adapter is attached to. It is called
  by `Attachment.merge`.
- `why_not_mergeable`: the reason, for the error message, if there is no `merge`.
- `aux_loss`: a scalar that its forward sets, such as a mean rate of a gate; None on the class. See `Tuner.aux_loss`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch

from petune.base.block_choice import ALL, BlockChoice
from petune.base.config import Config
from petune.base.plugins import set_config_class

if TYPE_CHECKING:
    from petune.injector.calibration import CalibrationBatch
    from petune.injector.edit import Edit
    from petune.sites.sites import Sites


class TunerConfig(Config):
    """Options of a tuner: pydantic fields with a type and a default. Unknown keys and wrong types are refused.

    Attributes:
        blocks: The blocks that the method edits: `all`, `last:K`, `first:K`, `every:K` (the first block and every K-th
            after it), `in:PATH` (those inside a tower or an encoder), or a list of numbers, from 0, or negative from
            the end. The others stay frozen, and no gradient is computed below the lowest one.
    """

    blocks: BlockChoice = ALL

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the option `blocks` as it is.

        Raises:
            TypeError: The class has an option of that name.
        """
        super().__pydantic_init_subclass__(**kwargs)
        if "blocks" in cls.__annotations__:
            raise TypeError(f"{cls.__name__}.blocks: every tuner has this option, from petune. Use another name")


@dataclass(frozen=True)
class Recipe:
    """The training defaults of a method, so that a comparison is fair to it.

    Attributes:
        lr: Peak learning rate at a batch size of 128, from the paper or from a search on validation data.
        weight_decay: Decoupled weight decay of the tuned weights and the classifier's.
        optimizer: timm's name of the optimizer.
        scales_lr: Scale `lr` in proportion to the batch size.
        epochs, warmup, head: Options of a run that a recipe of `Tuner.recipes` may set, too; None leaves them alone.
        options: Options of the method itself that such a recipe sets, where the user leaves them open.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    scales_lr: bool = False
    epochs: int | None = None
    warmup: float | None = None
    head: Literal["linear", "bn_linear"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def peak_lr(self, batch_size: int) -> float:
        """Return the peak learning rate for a batch size."""
        return self.lr * batch_size / 128 if self.scales_lr else self.lr


ConfigT = TypeVar("ConfigT", bound=TunerConfig)


class Tuner(Generic[ConfigT]):
    """Base of every tuner. Subclass it with the class of its options: `class SSF(petune.Tuner[SSFConfig])`.

    Attributes:
        Config: The class of the options, taken from the type parameter of `Tuner[...]`. `petune.attach(model, "name",
            option=value)` builds one.
        recipe: The training defaults.
        recipes: Further recipes by name, such as `official` for that of the authors' code; a run names one.
        identity_at_init: True if the model computes the same as before right after attaching.
        may_lack_gradients: True if parameters may go without a gradient in a step: a supernet trains one path at a
            time. Some must have one in every step.
        method: The name under which the tuner was built; `attach` sets it for one that was made by hand, if registered.
        config: The options of this instance.
    """

    Config: ClassVar[type[TunerConfig]]
    recipe: Recipe = Recipe()
    recipes: ClassVar[Mapping[str, Recipe]] = MappingProxyType({})
    identity_at_init: bool = True
    may_lack_gradients: bool = False
    method: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take `Config` from the type parameter of the base class.

        Raises:
            TypeError: The class names no config class.
        """
        super().__init_subclass__(**kwargs)
        set_config_class(cls, Tuner, TunerConfig)

    def __init__(self, config: ConfigT | None = None, **options: Any) -> None:
        """Configure the method with a config, or with options; it is not bound to any model yet.

        Raises:
            ConfigError: An option is unknown or has a wrong value; the message lists all problems.
        """
        if config is None or options:
            given = config.model_dump() if config is not None else {}
            config = self.Config.build({**given, **options}, type(self).__name__)  # type: ignore[assignment]
        self.config: ConfigT = config  # type: ignore[assignment]

    def attach(self, edit: Edit) -> None:
        """Change the model with the verbs of `edit`. Called once for each model.

        `detach` undoes what the verbs changed. Undo anything else in a function given to `edit.on_detach`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attach(self, edit)")

    def num_parameters(self, sites: Sites) -> int | None:
        """Return the number of parameters that the method adds to such a model, by the paper's formula.

        `check_tuner` compares it with what was attached.

        Returns:
            The number; 0 if the method trains the classifier alone (any other method that finds nothing to train is
            refused); None, the default, if there is no formula in terms of sites.
        """
        return None

    def to_external(self, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Return config and tensors in another library's format, for an adapter directory that this library reads.

        Args:
            state: What petune would save: tuned and head tensors by state_dict key.

        Returns:
            None, the default, to save petune's own format. Otherwise the other library's config, and tensors by its
            keys; they share memory with the model's tensors, so that loading copies into them.
        """
        return None

    @property
    def training_calls(self) -> frozenset[str]:
        """The methods that a training loop must call: calibrate, on_train_start, on_step_end, loss, where overridden.

        `Attachment` raises an error in a loop without them. Override this in a class that needs them for some options
        only.
        """
        names = ("calibrate", "on_train_start", "on_step_end", "loss")
        return frozenset(name for name in names if getattr(type(self), name) is not getattr(Tuner, name))

    def calibrate(self, batches: Iterable[CalibrationBatch]) -> None:
        """Choose what trains, with gradients or features of training batches, before the first step.

        The model is in eval mode; random numbers are fixed. After `batch.loss().backward()`, parameters that train, and
        those given to `edit.train` with a mask, have gradients of all their entries; petune clears them. Write what was
        chosen into buffers of adapters, or with `SparseParameters.choose`: a resumed run, and a loaded adapter, have it
        and are not calibrated again.
        """

    def on_train_start(self, total_steps: int) -> None:
        """Prepare for training, and again before it is resumed, with the number of steps. Most methods ignore it."""

    def on_step_end(self, step: int) -> None:
        """Follow an optimizer step (from 0), while its gradients still exist.

        Keep what must survive from step to step in buffers of the model, so that a resumed run is bit-exact.
        """

    def aux_loss(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss of what the adapters have set as their `aux_loss` in one forward; by default the sum.

        Args:
            values: Scalars, in the order in which the adapters were declared.
        """
        return torch.stack(values).sum()

    def loss(self, step: int) -> torch.Tensor | None:
        """Return a term to add to the loss at this step (from 0), or None, the default."""
        return None

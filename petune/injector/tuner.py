"""The plugin contract: one class and one required method. This file is its manual.

A tuner is a configured method. petune finds the places of a model (`edit.sites`), the tuner says what happens
there, and petune does the rest: registers, freezes, checks, saves, undoes. A whole plugin:

    class SSFConfig(petune.TunerConfig):
        "Scale and shift every attention and MLP output."
        init_std: float = 0.02

    class ScaleShift(nn.Module):
        def __init__(self, dim, std): ...
        def forward(self, x): return x * self.scale + self.shift      # (..., dim) -> (..., dim)

    class SSF(petune.Tuner[SSFConfig]):
        Config = SSFConfig
        def attach(self, edit: petune.Edit) -> None:
            for block in edit.sites.need_blocks():
                edit.after(block.need("attn"), ScaleShift(block.dim, self.config.init_std))

    # pyproject.toml of the plugin; the name on the left is the method's name everywhere:
    [project.entry-points."petune.tuners"]
    ssf = "petune_ssf:SSF"

`petune.check_tuner("ssf")` then proves the contract on a small model.

An adapter is a plain nn.Module. It is given (..., D) tensors, channels last whatever the model's layout, and must
treat every image on its own. Two optional attributes on it:

- `merge(module)`: fold the change into the weights of `module`, the site it is attached to (`Attachment.merge`).
- `why_not_mergeable`: the reason, as words for the message, where there is no `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic_core import to_jsonable_python

from petune.base.config import Config

if TYPE_CHECKING:
    import torch

    from petune.injector.edit import Edit
    from petune.sites.site import Sites


class TunerConfig(Config):
    """Options of a tuner: pydantic fields with a type and a default. Unknown keys and wrong types are refused."""

    def plain(self) -> dict[str, Any]:
        """All options as JSON has them; sets in an order of their own, the same in every process."""
        values = self.model_dump()
        ordered = {k: sorted(v, key=str) if isinstance(v, set | frozenset) else v for k, v in values.items()}
        return dict(to_jsonable_python(ordered))


@dataclass(frozen=True)
class Recipe:
    """How a method wants to be trained, so that a comparison is fair to it.

    Attributes:
        lr: Peak learning rate at a batch of 128, as the paper or a search on validation data gives it.
        weight_decay: Decoupled weight decay of the tuned and head weights.
        optimizer: timm's name of the optimizer.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"


ConfigT = TypeVar("ConfigT", bound=TunerConfig)


class Tuner(Generic[ConfigT]):
    """Base of every tuner.

    Attributes:
        Config: The class of its options; `petune.attach(model, "name", option=value)` builds it.
        recipe: Its training defaults.
        identity_at_init: Whether the model computes the same as before right after attaching.
        method: The name it was built by; empty for one that was made by hand.
        config: The options of this instance.
    """

    Config: ClassVar[type[TunerConfig]] = TunerConfig
    recipe: Recipe = Recipe()
    identity_at_init: bool = True
    method: str = ""

    def __init__(self, config: ConfigT | None = None, **options: Any) -> None:
        """Configure the method, with a config or with options; not yet bound to any model.

        Raises:
            ConfigError: An option is unknown or has a wrong value; the message lists all problems.
        """
        if config is None or options:
            given = config.model_dump() if config is not None else {}
            config = self.Config.build({**given, **options}, type(self).__name__)  # type: ignore[assignment]
        self.config: ConfigT = config  # type: ignore[assignment]

    def attach(self, edit: Edit) -> None:
        """Say what changes where, with the verbs of `edit`; called once for each model.

        Nothing else may be changed here: what is not done by a verb is not undone by `detach`, except through
        `edit.on_detach`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attach(self, edit)")

    def num_parameters(self, sites: Sites) -> int | None:
        """How many parameters the method adds to such a model, by the paper's formula; `check_tuner` counts them.

        None, the default, says that there is no formula in terms of sites. 0 says that the method trains the
        classifier alone: any other that finds nothing to train on a model is refused there.
        """
        return None

    def to_external(self, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Config and tensors in another library's format, if what is saved is to be read by it; see `petune.state`.

        Args:
            state: What petune would save, tuned and head, by state_dict key.

        Returns:
            Tensors by the other format's keys; they share memory with the model's, so that loading is copying.
        """
        return None

    def on_train_start(self, total_steps: int) -> None:
        """Told before a training, and again before it is resumed, how many steps it has; most methods do not care."""

    def on_step_end(self, step: int) -> None:
        """Told after every step (from 0) of the optimizer, while its gradients are still there.

        What is remembered from step to step must be buffers of the model, so that a resumed run goes on to the bit.
        """

    def loss(self, step: int) -> torch.Tensor | None:
        """A term to add to the loss at this step (from 0), or None: most methods have none."""
        return None

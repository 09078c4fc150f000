"""Pretraining from scratch: everything trains, the last epoch is kept, the result is a `--weights` for `run`."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

from pydantic import Field, PositiveFloat, model_validator

from petune.base.arguments import check_watch
from petune.data.registry import DatasetText
from petune.injector.registry import build_tuner
from petune.injector.tuner import Recipe
from petune.runner.backbone_file import Dtype, save_backbone
from petune.runner.result import RunResult
from petune.runner.run import Procedure, train_and_test
from petune.runner.run_config import DEFAULT_RECIPE, RunConfig
from petune.runner.run_name import directory_name
from petune.training.config import TrainConfig
from petune.training.events import Watch, ignore

# Muon orthogonalises the momentum of every matrix (Jordan et al., 2024). After one epoch of CIFAR-100 at equal
# cost vit_nano reached 25.5 % with it; the first trial with AdamW needed 28 epochs for 45.6 %.
RECIPE = Recipe(lr=2e-3, weight_decay=0.05, optimizer="nmuon")


class PretrainTraining(TrainConfig):
    """TrainConfig with the defaults of pretraining, which apply to every option that is not given."""

    epochs: int = Field(30, ge=1, le=100_000)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class PretrainConfig(RunConfig):
    """The complete configuration of a pretraining: a RunConfig with other defaults.

    Attributes:
        weights: `none` starts from random weights. A path continues from a pretraining, with its classifier if the
            classes are the same.
        method: Must train everything: `full`, or adapters that are part of the model from the start
            (`adaptformer:train_backbone=true`). Such weights are for runs with the same adapters.
        mean, std: Statistics that images are normalized by, also in runs with these weights; None measures the
            training split.
        dtype: Number format of `backbone.safetensors`.
    """

    method: str = "full"
    backbone: str = "vit_nano"
    weights: str = "none"
    dataset: DatasetText = "cifar100"
    val_fraction: float = Field(0.02, gt=0, lt=1)
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    dtype: Dtype = "fp32"
    train: PretrainTraining = PretrainTraining.model_construct()

    @model_validator(mode="after")
    def _starts_from_weights(self) -> Self:
        if self.from_run is not None:
            raise ValueError("a pretraining does not continue from an adapter. Use weights=PATH of a pretraining")
        return self

    @model_validator(mode="after")
    def _has_one_recipe(self) -> Self:
        if self.recipe != DEFAULT_RECIPE:
            raise ValueError(f"a pretraining has a recipe of its own. Leave recipe at {DEFAULT_RECIPE}")
        return self

    @model_validator(mode="after")
    def _keeps_the_last_epoch(self) -> Self:
        if self.train.patience is not None:
            raise ValueError("train.patience has no effect: a pretraining keeps its last epoch. Leave it out")
        return self

    @model_validator(mode="after")
    def _trains_once(self) -> Self:
        if self.final_fit == "train+val":
            raise ValueError(
                "a pretraining keeps its last epoch, so val chooses none to train again up to. Use final_fit=only to "
                "train on train and val, or leave final_fit out"
            )
        return self

    @model_validator(mode="after")
    def _mean_with_std(self) -> Self:
        if (self.mean is None) != (self.std is None):
            given, missing = ("std", "mean") if self.mean is None else ("mean", "std")
            raise ValueError(f"{given} is given without {missing}. Give both, or neither")
        return self


def pretrain(config: PretrainConfig | None = None, *, watch: Watch = ignore, **fields: Any) -> RunResult:
    """Train a backbone from scratch; `output` then holds `backbone.safetensors`.

    Args:
        config: The pretraining; without it, `fields` are those of a PretrainConfig.
        watch: Called with every step, epoch and note.

    Raises:
        PetuneError: See `petune.base.errors` for its kinds.
    """
    check_watch("petune.pretrain", watch)
    config = PretrainConfig.from_call(config, fields, "petune.pretrain(...)")
    return train_and_test(config, pretraining(config), watch)


def pretraining(config: PretrainConfig) -> Procedure:
    """Return the procedure of `pretrain`: everything trains, the last epoch is kept, the whole model is saved."""
    return Procedure(
        command="pretrain",
        name=pretrain_name(config),
        tuner=build_tuner(config.method),
        recipe=RECIPE,
        save=partial(save_backbone, dtype=config.dtype),
        keep="last",
        keep_head=True,
        statistics=(config.mean, config.std) if config.mean and config.std else None,
        trains_all=True,
    )


def pretrain_name(config: PretrainConfig) -> str:
    """Return the name of the directory of a pretraining that has no `output`."""
    return directory_name("pretrain", config.backbone, config.dataset, f"seed{config.seed}")

"""The configuration of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticSerializationError, to_jsonable_python

from petune.backbones.drop_rates import drop_path_key, drop_rates
from petune.backbones.head import HeadKind
from petune.backbones.names import image_size_key
from petune.backbones.quantize import BasePrecision
from petune.base.config import Config, UserPath
from petune.base.errors import ConfigError
from petune.data import OnBroken
from petune.data.cache import CACHE_GB
from petune.data.registry import DatasetText
from petune.training.config import TrainConfig

DEFAULT_RECIPE = "default"


class RunConfig(Config):
    """The complete configuration of a run; saved as `config.yaml`, which repeats the run.

    Attributes:
        method: A registered method, with options if needed: `vpt:deep=false,num_prompts=10`.
        from_run: A finished run, or its adapter directory, to continue from: its values are the start, and what is not
            given of method, backbone and dataset is the run's.
        backbone, weights, image_size, patch_size, backbone_options, head: See `petune.backbones`.
        drop_path: Rate of drop path (stochastic depth) in the backbone's last block while training; it rises from 0 in
            the first. Papers train adapters with 0 to 0.1. Drop path and dropout of the backbone act in frozen blocks,
            too, for every method alike, if this or a drop rate in `backbone_options` is set, and else for none.
        base_precision: Number format in which the weights of the backbone's linear layers are stored: `int8` (torchao)
            and `nf4` (bitsandbytes) quantize them, for models that would not fit otherwise. The adapter belongs to the
            quantized backbone. `auto` keeps the values of the weights.
        recipe: Fills in learning rate, weight decay and optimizer where `train` leaves them open. `default` is the
            method's own; another one that the method has, such as AdaptFormer's `official`, may set epochs, warm-up and
            head, too.
        dataset: A name that `petune.list_datasets` lists, with its argument and options: `folder:pets`,
            `table:pets.csv,label=breed`; or the path of a folder or table.
        data_dir: Directory of downloaded datasets; None takes `PETUNE_DATA`, then the cache.
        on_broken: `skip` leaves out images of a folder that cannot be decoded (at most 1 %); `error` stops at the
            first one.
        task: What to train for, with options if needed: `classification`, `count:power=2`. `auto` is the built-in task
            of the dataset's kind of targets.
        cache_gb: Images are decoded once into the cache. A split whose decoded images are larger, in 10⁹ bytes, or that
            does not fit the disk, is decoded in every epoch; the images are the same.
        channels: Channels of the images that the backbone is to take; None takes those of the dataset, except that one
            with an option for gray keeps it. 1 converts RGB images to gray.
        val_fraction: Share of the training split used to choose the epoch, where the dataset has no val split.
        folds, fold: Test on fold `fold` (from 1) of `folds`, and train on the others; see `petune.cross_validate`.
        final_fit: `train+val` trains again on train and val, up to the epoch that val chose, and tests that model; see
            `petune.runner.final_fit`. `only` trains once, on train and val, for all epochs: val chooses nothing. `auto`
            trains again where it is the dataset's protocol (`vtab:NAME`), `none` never.
        shots: Training images per class (few-shot); None keeps all.
        seed: Random seed of head, adapters, data order, augmentation and dropout. The val split does not depend on it.
        device: `auto` takes a GPU if there is one; otherwise a name of torch's: `cpu`, `cuda:1`, `mps`.
        output: The run directory; None creates one under `runs/`.
        resume: Continue in `output` if it exists, or without `output` in the latest run of the same name under `runs/`.
        train: Options of the training loop.
    """

    method: str = "adaptformer"
    from_run: UserPath | None = None
    backbone: str = "vit_base"
    weights: str = "default"
    recipe: str = DEFAULT_RECIPE
    dataset: DatasetText = "cifar10"
    data_dir: UserPath | None = None
    image_size: int | None = Field(None, ge=1, le=4096)
    patch_size: int | None = Field(None, ge=1, le=512)
    backbone_options: dict[str, Any] = {}
    head: HeadKind = "linear"
    drop_path: float = Field(0.0, ge=0, lt=1)
    base_precision: BasePrecision = "auto"
    on_broken: OnBroken = "error"
    task: str = "auto"
    cache_gb: float = Field(CACHE_GB, ge=0, le=1e6)
    channels: int | None = Field(None, ge=1, le=512)
    val_fraction: float = Field(0.1, gt=0, lt=1)
    folds: int | None = Field(None, ge=2, le=1000)
    fold: int | None = Field(None, ge=1)
    final_fit: Literal["auto", "none", "train+val", "only"] = "auto"
    shots: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "auto"
    output: UserPath | None = None
    resume: bool = False
    train: TrainConfig = TrainConfig.model_construct()

    @field_validator("patch_size")
    @classmethod
    def _patch_fits_the_image(cls, value: int | None, info: ValidationInfo) -> int | None:
        side = info.data.get("image_size")
        if value is not None and side is not None and value > side:
            raise ValueError(f"patch_size {value} is larger than image_size {side}")
        return value

    @field_validator("backbone_options")
    @classmethod
    def _one_value_of_a_size(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        keys = {"image_size": image_size_key(info.data.get("backbone", "")), "patch_size": "patch_size"}
        for field, key in keys.items():
            size = info.data.get(field)
            if size is not None and options.get(key, size) != size:
                raise ValueError(f"{field} is {size}, but backbone_options.{key} is {options[key]}. Give one of them")
        return options

    @field_validator("backbone_options")
    @classmethod
    def _options_can_be_stored(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            try:
                to_jsonable_python(value)
            except PydanticSerializationError:
                raise ValueError(
                    f"{key} is of the type {type(value).__name__}, which config.yaml cannot store. Give a name, a "
                    "number or a list"
                ) from None
        return options

    @field_validator("fold")
    @classmethod
    def _fold_of_folds(cls, value: int | None, info: ValidationInfo) -> int | None:
        folds = info.data.get("folds")
        if value is not None and (folds is None or value > folds):
            raise ValueError(f"fold is {value}, but folds is {folds}. Use a fold from 1 to folds")
        return value

    @field_validator("drop_path")
    @classmethod
    def _one_drop_path(cls, value: float, info: ValidationInfo) -> float:
        name = info.data.get("backbone", "")
        if value and (key := drop_path_key(name)) in info.data.get("backbone_options", {}):
            raise ValueError(f"drop_path and backbone_options.{key} are the same option of {name}. Give one of them")
        return value

    def check_final_fit(self) -> None:
        """Check that a run whose val trains too neither waits for val nor is few-shot, which val would end.

        Raises:
            ConfigError: It does, or is.
        """
        if self.final_fit in {"train+val", "only"} and self.shots is not None:
            raise ConfigError(
                f"final_fit={self.final_fit} adds all of val to the few images of shots. Leave one of them out"
            )
        if self.final_fit == "only" and self.train.patience is not None:
            raise ConfigError(
                "final_fit=only trains on val too, so train.patience has nothing to watch. Leave one of them out"
            )

    def check_one_fold(self) -> None:
        """Check that a run of several folds names its own.

        Raises:
            ConfigError: It does not.
        """
        if self.folds is not None and self.fold is None:
            raise ConfigError(
                f"folds is {self.folds}, and fold is not set: one run tests on one fold. Set fold, or do all with "
                "petune.cross_validate",
                cli_hint="Use petune run --folds, or --set fold=1",
            )

    @property
    def options_to_build(self) -> dict[str, Any]:
        """Return the arguments of the backbone for training: `backbone_options`, and drop path if there is any."""
        drop_path = {drop_path_key(self.backbone): self.drop_path} if self.drop_path else {}
        return self.backbone_options | drop_path

    @property
    def drop_rates(self) -> dict[str, float]:
        """Return the rates of dropout and drop path that the run asks for, by the backbone's option."""
        return drop_rates(self.options_to_build)

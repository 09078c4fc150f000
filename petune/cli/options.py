"""The flags that `run`, `compare`, `pretrain` and `inspect` share, each written once, and the mapping they make.

A flag that is not given says nothing: defaults < --config < flags < --set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from petune.errors import UsageError


@dataclass(frozen=True)
class Flag:
    """One shared flag.

    Attributes:
        name: As on the command line, without dashes; its parameter has underscores.
        type: What typer reads it as.
        key: Where the value goes in RunConfig, dotted.
        help: What it does, in a few words.
        default: What happens without it, in words; a test holds it against RunConfig.
        metavar: How the value is shown; None shows the type.
    """

    name: str
    type: type
    key: str
    help: str
    default: str = ""
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        return self.name.replace("-", "_")

    def option(self, default: str | None) -> inspect.Parameter:
        """The flag as a parameter that typer understands."""
        shown = self.default if default is None else default
        text = f"{self.help}  [default: {shown}]" if shown else self.help
        names = (f"--{self.name}",)
        info = typer.Option(*names, help=text, metavar=self.metavar, show_default=False)
        annotation = Annotated[bool if self.type is bool else self.type | None, info]  # type: ignore[valid-type]
        value = False if self.type is bool else None
        return inspect.Parameter(self.parameter, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


FLAGS = (
    Flag("method", str, "method", "A registered method, options in place: vpt:deep=false.", "adaptformer", "NAME"),
    Flag("backbone", str, "backbone", "An alias or a timm name; see `petune backbones`.", "vit_base", "NAME"),
    Flag("weights", str, "weights", "default, none, cifar100, a file, or a pretraining directory.", "default", "NAME|PATH"),
    Flag("dataset", str, "dataset", "cifar10, cifar100, digits or folder:PATH.", "cifar10", "NAME"),
    Flag("data-dir", Path, "data_dir", "Where CIFAR lies.", "$PETUNE_DATA, then the cache", "DIR"),
    Flag("image-size", int, "image_size", "Side of the input, pixels.", "the backbone's", "INT"),
    Flag("patch-size", int, "patch_size", "Side of a patch, pixels.", "the backbone's", "INT"),
    Flag("epochs", int, "train.epochs", "Passes over the training split.", "10", "INT"),
    Flag("batch-size", int, "train.batch_size", "Pictures a step.", "128", "INT"),
    Flag("lr", float, "train.lr", "Peak learning rate, not scaled by the batch.", "the method's recipe", "FLOAT"),
    Flag("weight-decay", float, "train.weight_decay", "On matrices only.", "the method's recipe", "FLOAT"),
    Flag("optimizer", str, "train.optimizer", "A name of timm's factory.", "the method's recipe", "NAME"),
    Flag("augment", str, "train.augment", "auto is the dataset's own.", "auto", "auto|none|shift|light|seed|crop"),
    Flag("label-smoothing", float, "train.label_smoothing", "Share spread over all classes.", "0.0", "FLOAT"),
    Flag("mixup", float, "train.mixup", "Alpha of Mixup; 0 is off.", "0.0", "FLOAT"),
    Flag("cutmix", float, "train.cutmix", "Alpha of CutMix; 0 is off.", "0.0", "FLOAT"),
    Flag("val-fraction", float, "val_fraction", "Share of train cut off to choose the epoch.", "0.1", "FLOAT"),
    Flag("train-per-class", int, "train_per_class", "Keep so many training pictures a class.", "all", "INT"),
    Flag("head", str, "head", "bn_linear puts a BatchNorm before the classifier.", "linear", "linear|bn_linear"),
    Flag("seed", int, "seed", "Of head, adapters, order, augmentation, dropout.", "0", "INT"),
    Flag("device", str, "device", "auto, cpu, cuda, cuda:N or mps.", "auto", "NAME"),
    Flag("precision", str, "train.precision", "auto measures which is faster here.", "auto", "auto|fp32|bf16"),
    Flag("output", Path, "output", "The run directory.", "a new one under runs/", "DIR"),
    Flag("resume", bool, "resume", "Go on in an existing --output."),
)  # fmt: skip

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML to begin with; flags override it.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key, dotted, as train.grad_clip=5; repeatable, last word."),
]
Seeds = Annotated[
    str | None, typer.Option("--seeds", metavar="INT,INT,…", help="One run a seed; mean and standard deviation.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and only that.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the complete config and what would train; write nothing.")
]
Track = Annotated[
    str | None, typer.Option("--track", metavar="tensorboard", help="Log steps and epochs under the run directory.")
]


@dataclass(frozen=True)
class Settings:
    """What the command line says of the configuration, before it is one.

    Attributes:
        config: A YAML file to begin with.
        flags: The flags that were given: dotted key to value.
        assignments: `key=value`, the last word.
    """

    config: Path | None
    flags: Mapping[str, Any]
    assignments: tuple[str, ...]

    def values(self, place: Callable[[str], str] = lambda key: key) -> dict[str, Any]:
        """The mapping that a configuration is built from.

        Args:
            place: From a RunConfig key to where it stands in the configuration to build.
        """
        from petune.config import override, read_yaml

        values: dict[str, Any] = {}
        for key, value in (read_yaml(self.config) if self.config else {}).items():
            _put(values, place(key), value)
        for key, value in self.flags.items():
            _put(values, place(key), value)
        return override(values, [place(a) for a in self.assignments])

    @property
    def source(self) -> str:
        """Where the values come from, for messages."""
        return f"{self.config} and the command line" if self.config else "the command line"


def configured(
    *, without: tuple[str, ...] = (), only: tuple[str, ...] = (), defaults: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the shared flags in place of its parameter `settings`.

    Args:
        without: Flags that make no sense for the command.
        only: The only flags that do; empty means all.
        defaults: The command's own defaults, in words, by flag.
    """
    flags = [f for f in FLAGS if f.name not in without and (not only or f.name in only)]
    shown = defaults or {}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [p for p in own.values() if p.name != "settings" and p.kind is not p.KEYWORD_ONLY]
        parameters += [flag.option(shown.get(flag.name)) for flag in flags]
        parameters += [_keyword("config", ConfigFile), _keyword("set", Assignments)]
        parameters += [p for p in own.values() if p.kind is p.KEYWORD_ONLY]

        @wraps(command)
        def typed(**given: Any) -> None:
            values = {flag.key: given.pop(flag.parameter) for flag in flags}
            said = {key: value for key, value in values.items() if value is not None and value is not False}
            settings = Settings(given.pop("config"), said, tuple(given.pop("set") or ()))
            command(settings=settings, **given)

        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typed.__annotations__ = {p.name: p.annotation for p in parameters}
        del typed.__wrapped__  # type: ignore[attr-defined]  # typer would look through it, at the command without flags
        return typed

    return decorate


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` → `(0, 1, 2)`.

    Raises:
        UsageError: It is not a list of whole numbers.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--seeds takes whole numbers with commas, as 0,1,2; got {text!r}") from None


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        inner = values.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise UsageError(f"{key!r} must hold keys, {path} among them, but holds {inner!r}")
        values[key] = dict(inner or {})
        values = values[key]
    values[last] = value

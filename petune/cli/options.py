"""The flags that commands share, each written once, and the mapping they make for a configuration.

A flag that is not given says nothing: defaults < --config < flags < --set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from petune.base.errors import UsageError

METAVARS = {str: "NAME", int: "INT", float: "FLOAT", Path: "DIR", bool: None}


@dataclass(frozen=True)
class Flag:
    """One shared flag.

    Attributes:
        name: As on the command line, without dashes; with underscores it is the key in RunConfig.
        type: What typer reads it as.
        help: What it does, in a few words.
        default: What happens without it, in words; a test holds it against RunConfig.
        metavar: How the value is shown, where not by its type.
        group: The key above, in RunConfig.
    """

    name: str
    type: type
    help: str
    default: str = ""
    metavar: str | None = None
    group: str = ""

    @property
    def parameter(self) -> str:
        """Its name in Python."""
        return self.name.replace("-", "_")

    @property
    def key(self) -> str:
        """Where the value goes in RunConfig, dotted."""
        return f"{self.group}.{self.parameter}" if self.group else self.parameter

    def option(self, default: str | None) -> inspect.Parameter:
        """The flag as a parameter that typer understands; `default` replaces the words."""
        shown = self.default if default is None else default
        text = f"{self.help}  [default: {shown}]" if shown else self.help
        metavar = self.metavar or METAVARS[self.type]
        info = typer.Option(f"--{self.name}", help=text, metavar=metavar, show_default=False)
        kind, absent = (bool, False) if self.type is bool else (self.type | None, None)
        return _keyword(self.parameter, Annotated[kind, info], absent)


_train = partial(Flag, group="train")
RECIPE = "the method's recipe"
FLAGS = (
    Flag("method", str, "A registered method, options in place: vpt:deep=false.", "adaptformer"),
    Flag(
        "backbone",
        str,
        "A short or timm name (petune backbones), torchvision:NAME, hf:NAME, or package.module:factory.",
        "vit_base",
    ),
    Flag("weights", str, "default, none, cifar100, a file, a pretraining directory.", "default", "NAME|PATH"),
    Flag("dataset", str, "cifar10, cifar100, digits or folder:PATH.", "cifar10"),
    Flag("data-dir", Path, "Where CIFAR lies.", "$PETUNE_DATA, then the cache"),
    Flag("image-size", int, "Side of the input, pixels.", "the backbone's"),
    Flag("patch-size", int, "Side of a patch, pixels.", "the backbone's"),
    Flag("head", str, "bn_linear: a BatchNorm before the classifier.", "linear", "linear|bn_linear"),
    _train("epochs", int, "Passes over the training split.", "10"),
    _train("batch-size", int, "Images a step.", "128"),
    _train("lr", float, "Peak learning rate; not scaled by the batch size.", RECIPE),
    _train("weight-decay", float, "Of matrices only.", RECIPE),
    _train("optimizer", str, "A name of timm's optimizer factory.", RECIPE),
    _train("augment", str, "auto: the dataset's own.", "auto", "auto|none|shift|light|paddle_study|crop"),
    _train("label-smoothing", float, "Share of the target spread over all classes.", "0.0"),
    _train("mixup", float, "Alpha of Mixup; 0 is off.", "0.0"),
    _train("cutmix", float, "Alpha of CutMix; 0 is off.", "0.0"),
    _train("precision", str, "auto: the one measured to be faster here.", "auto", "auto|fp32|tf32|bf16"),
    _train("grad-checkpointing", bool, "Compute blocks again in backward: less memory."),
    _train("compile", bool, "Compile the forward by torch.compile."),
    _train("cache-features", str, "Compute frozen layers once.", "auto", "auto|always|never"),
    Flag("val-fraction", float, "Share of train that chooses the epoch.", "0.1"),
    Flag("shots", int, "Training images per class (few-shot).", "all"),
    Flag("seed", int, "Of head, adapters, order, augmentation, dropout.", "0"),
    Flag("device", str, "auto, cpu, cuda, cuda:N or mps.", "auto"),
    Flag("output", Path, "The run directory.", "a new one under runs/"),
    Flag("resume", bool, "Go on in --output, or in the latest run of that name."),
)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML to begin with; flags override it.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key, as train.grad_clip=5; repeatable."),
]
Seeds = Annotated[str | None, typer.Option("--seeds", metavar="INT,INT,…", help="One run a seed; mean ± std.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and only that.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the complete config and what would train; write nothing.")
]
Track = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="Log training curves: tensorboard, wandb (offline) or mlflow, in --output/NAME; trackio, in its database.",
    ),
]

TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the backbone be built by a function of the adapter's author.")
]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="NAME",
        help="Where the runs are done, options in place: serial, ray, ray:cpus=2,gpus=0.5, ray://HOST:PORT, slurm.",
    ),
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
        from petune.base.yaml_values import override, read_yaml

        values: dict[str, Any] = {}
        if self.config is not None:
            file = user_path(self.config)
            _refuse_shared(file)
            for key, value in read_yaml(file).items():
                _put(values, place(key), value)
        for key, value in self.flags.items():
            _put(values, place(key), value)
        return override(values, [place(a) for a in self.assignments])

    def own_directory(self, name: str, beside: str) -> Path | None:
        """The directory whose own configuration was given, which is gone on in wherever it lies; else None.

        Args:
            name: What the configuration is called there.
            beside: A file that such a directory has, too.
        """
        if self.config is None or "output" in self.flags or "output" in self.assigned:
            return None
        file = user_path(self.config)
        return file.parent if file.name == name and (file.parent / beside).is_file() else None

    def seeds(self, text: str | None) -> tuple[int, ...] | None:
        """What `--seeds` says; None without it.

        Raises:
            UsageError: It is not a list of whole numbers, or one seed is given too.
        """
        if text is not None and ("seed" in self.flags or "seed" in self.assigned):
            raise UsageError("give --seed for one run, or --seeds for several, not both")
        return None if text is None else parse_seeds(text)

    @property
    def assigned(self) -> set[str]:
        """The dotted keys that `--set` gives."""
        return {assignment.partition("=")[0].strip() for assignment in self.assignments}

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
            paths = {key: user_path(value) for key, value in values.items() if isinstance(value, Path)}
            said = {key: value for key, value in values.items() if value is not None and value is not False} | paths
            settings = Settings(given.pop("config"), said, tuple(given.pop("set") or ()))
            command(settings=settings, **given)

        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typed.__annotations__ = {p.name: p.annotation for p in parameters}
        del typed.__wrapped__  # typer would look through it, at the command without flags
        return typed

    return decorate


def user_path(path: Path) -> Path:
    """`path` with `~` as the home directory.

    Raises:
        UsageError: It is no UTF-8.
    """
    from petune.base.config import user_path as expanded

    try:
        return expanded(path)
    except ValueError as error:
        raise UsageError(f"{error} (got {str(path)!r})") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` → `(0, 1, 2)`.

    Raises:
        UsageError: It is not a list of whole numbers.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--seeds takes whole numbers with commas, as 0,1,2; got {text!r}") from None


def _refuse_shared(file: Path) -> None:
    """What the runs of a comparison have in common would pass for a run of the default method."""
    from petune.runner.run_dir import COMPARE_FILE, CONFIG_FILE

    own = file.parent / COMPARE_FILE
    if file.name == CONFIG_FILE and own.is_file():
        raise UsageError(
            f"{file} is what the runs of a comparison have in common; the comparison itself is {own}, and each of its "
            "runs has a configuration of its own"
        )


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        inner = values.get(key)
        if inner is not None and not isinstance(inner, Mapping):
            raise UsageError(f"{key!r} must hold keys, {path} among them, but holds {inner!r}")
        values[key] = dict(inner or {})
        values = values[key]
    values[last] = value

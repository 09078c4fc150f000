"""The flags that set a key of RunConfig, each defined once. A flag that is not given leaves its key alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

METAVARS = {str: "NAME", int: "NUMBER", float: "NUMBER", Path: "DIR", bool: None}


@dataclass(frozen=True)
class Flag:
    """A flag that sets one key of RunConfig.

    Attributes:
        name: As on the command line, without dashes; with underscores it is the key in RunConfig.
        type: The type of the value.
        help: What it sets, in a few words.
        default: The default, in words; a test compares it with RunConfig.
        metavar: How help shows the value; None takes the type's.
        group: The section of RunConfig that holds the key, if any.
        own_key: The key, where it is not the name: Python has no parameter `from`.
    """

    name: str
    type: type
    help: str
    default: str = ""
    metavar: str | None = None
    group: str = ""
    own_key: str = ""

    @property
    def parameter(self) -> str:
        """Return the name of the Python parameter."""
        return self.own_key or self.name.replace("-", "_")

    @property
    def key(self) -> str:
        """Return the dotted key in RunConfig."""
        return f"{self.group}.{self.parameter}" if self.group else self.parameter

    def option(self, default: str | None = None) -> inspect.Parameter:
        """Return the flag as a parameter for typer.

        Args:
            default: The default in words, where a command has its own.
        """
        shown = self.default if default is None else default
        text = f"{self.help}  [default: {shown}]" if shown else self.help
        metavar = self.metavar or METAVARS[self.type]
        info = typer.Option(f"--{self.name}", help=text, metavar=metavar, show_default=False)
        kind, absent = (bool, False) if self.type is bool else (self.type | None, None)
        return keyword(self.parameter, Annotated[kind, info], absent)


def keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """Return a keyword-only parameter."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_train = partial(Flag, group="train")
RECIPE = "the method's recipe"
FLAGS = (
    Flag("method", str, "Method, with options after a colon: vpt:deep=false.", "adaptformer"),
    Flag(
        "backbone",
        str,
        "Short name (petune backbones), timm name, torchvision:NAME, hf:NAME, or package.module:factory.",
        "vit_base",
    ),
    Flag("weights", str, "default, none, cifar100, a file, or a petune pretrain directory.", "default", "NAME|PATH"),
    Flag("recipe", str, "Recipe of the method; adaptformer has official and video, those of its authors.", "default"),
    Flag("dataset", str, "A name that `petune datasets` lists, such as digits or folder:PATH.", "cifar10"),
    Flag("task", str, "Task, with options after a colon; auto is that of the dataset's targets.", "auto"),
    Flag("data-dir", Path, "Directory of downloaded datasets.", "$PETUNE_DATA, then the cache"),
    Flag("image-size", int, "Input size in pixels.", "the backbone's"),
    Flag("patch-size", int, "Patch size in pixels.", "the backbone's"),
    Flag("head", str, "Classifier; bn_linear puts a BatchNorm before the linear layer.", "linear", "linear|bn_linear"),
    Flag("drop-path", float, "Drop path rate of the backbone, for every method alike.", "0.0"),
    Flag("base-precision", str, "Store frozen weights in fewer bits, for very large models.", "auto", "auto|int8|nf4"),
    _train("epochs", int, "Number of epochs.", "10"),
    _train("batch-size", int, "Batch size.", "128"),
    _train("lr", float, "Peak learning rate; not scaled with the batch size.", RECIPE),
    _train("weight-decay", float, "Weight decay; applies to matrices only.", RECIPE),
    _train("optimizer", str, "Optimizer, by timm's name.", RECIPE),
    _train(
        "augment",
        str,
        "Augmentation; auto uses the dataset's own. --set train.augment=[...] takes a list.",
        "auto",
        "auto|none|shift|light|paddle_study|crop|crop_only|randaug|trivial|augmix|color",
    ),
    _train("label-smoothing", float, "Label smoothing.", "0.0"),
    _train("mixup", float, "Mixup alpha; 0 turns it off.", "0.0"),
    _train("cutmix", float, "CutMix alpha; 0 turns it off.", "0.0"),
    _train("precision", str, "Number format; auto is bf16 if the device has it.", "auto", "auto|fp32|tf32|bf16"),
    _train("grad-checkpointing", bool, "Recompute activations in the backward pass to save memory."),
    _train("compile", bool, "Compile the forward pass with torch.compile."),
    _train("cache-features", str, "Compute the output of frozen layers only once.", "auto", "auto|always|never"),
    Flag("val-fraction", float, "Fraction of train that is held out for validation.", "0.1"),
    Flag("shots", int, "Training images per class (few-shot).", "all"),
    Flag("seed", int, "Random seed.", "0"),
    Flag("device", str, "Device: auto, cpu, cuda, cuda:N or mps.", "auto"),
    Flag(
        "from",
        Path,
        "Finished run or adapter to continue from; method, backbone and dataset are its own unless given.",
        own_key="from_run",
    ),
    Flag("output", Path, "Run directory.", "a new one under runs/"),
    Flag("resume", bool, "Resume the run in --output, or the latest one of the same name in runs/."),
)

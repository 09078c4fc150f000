"""The record of an average in its metadata, and the summary that is returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from petune.adapters.format import OLD_SPLIT_OPTIONS, SPLIT_OPTIONS
from petune.adapters.lora_products import RANK_OPTIONS, with_rank
from petune.base.metric import Metric
from petune.injector.registry import parse_method
from petune.runner.split_options import shared_options
from petune.serving.average.ingredients import Ingredient
from petune.serving.average.soup import Mixture

OF_ONE_RUN = (
    "training", "test", "continued_from", "images", "averaged_from", "converted_from", SPLIT_OPTIONS, OLD_SPLIT_OPTIONS
)  # fmt: skip
"""Entries of the metadata of a run that are not true of an average."""


@dataclass(frozen=True)
class AveragedFrom:
    """An adapter that was averaged.

    Attributes:
        path: Its directory, as given.
        sha256: Of its file of tensors.
        coefficient: As the algorithm used it; 0 for what a greedy soup has left out.
        val: Its own value of the metric on val; None where val was not read.
    """

    path: str
    sha256: str
    coefficient: float
    val: float | None = None


@dataclass(frozen=True)
class Averaged:
    """Summary of an average.

    Attributes:
        output: The adapter directory.
        algorithm: How it was averaged.
        method: What was trained.
        adapters: What it was made of.
        metric: The metric on val, where it was read.
        val: Its value for the average.
        rank: Of a LoRA whose products were averaged; None for others.
        errors: For each of its layers what the rank leaves out, relative to the Frobenius norm of the exact change.
        notes: What to know about the result.
        bytes: Size of the tensors.
    """

    output: str
    algorithm: str
    method: str
    adapters: tuple[AveragedFrom, ...]
    metric: Metric | None = None
    val: float | None = None
    rank: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bytes: int = 0

    @property
    def largest_error(self) -> float | None:
        """The largest of the errors; None if there are none."""
        return max(self.errors.values(), default=None)


def averaged_from(
    ingredients: Sequence[Ingredient], coefficients: Sequence[float], vals: Sequence[float | None] | None = None
) -> tuple[AveragedFrom, ...]:
    """Return what an average was made of."""
    return tuple(
        AveragedFrom(str(i.path), i.sha256, coefficient, None if vals is None else vals[number])
        for number, (i, coefficient) in enumerate(zip(ingredients, coefficients, strict=True))
    )


def shown_coefficients(mixture: Mixture, count: int) -> tuple[float, ...]:
    """Return a number for each adapter, as an average records it."""
    if mixture.algorithm in {"uniform", "greedy"}:
        return mixture.shares
    if mixture.algorithm == "wise_ft":
        return tuple(mixture.coefficients[0] * share for share in mixture.shares)
    return mixture.coefficients * (count // len(mixture.coefficients))


def average_metadata(
    base: Ingredient,
    ingredients: Sequence[Ingredient],
    averaged: Averaged,
    mixture: Mixture,
    *,
    with_head: bool,
    layers: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the metadata of an average: that of a run, without its results and its training.

    Args:
        base: The adapter whose classes and preprocessing it has.
        ingredients: All of them.
        averaged: The summary.
        mixture: How they were combined.
        with_head: It has a classifier.
        layers: Of a LoRA that names its layers where those that it averages name parts of attentions.
    """
    kept = {key: value for key, value in base.metadata.items() if key not in OF_ONE_RUN}
    if not with_head:
        kept = {key: value for key, value in kept.items() if key not in {"classes", "task", "num_outputs"}}
    digests = [i.metadata.get("images") for i in ingredients]
    same_images = all(digest == digests[0] for digest in digests)
    if digests[0] and same_images:
        kept["images"] = digests[0]
    if any(i.metadata.get("kept_splits") for i in ingredients):
        kept["kept_splits"] = True
    if any("final_fit" in i.training for i in ingredients):
        kept["training"] = {"val_metrics": None, "final_fit": "train+val"}
    if (options := shared_options([i.split_options for i in ingredients])) is not None:
        kept[SPLIT_OPTIONS] = {key: v for key, v in options.items() if same_images or key != "dataset"}
    if averaged.rank is not None:
        kept["method"] = method_with(str(kept.get("method", base.saved.config["tuner"])), averaged.rank, layers)
    details = {"density": mixture.density, "seed": mixture.seed} if mixture.algorithm in {"ties", "dare"} else {}
    chosen_on = {"metric": averaged.metric.model_dump(), "val": averaged.val} if averaged.metric is not None else {}
    kept["averaged_from"] = {
        "algorithm": averaged.algorithm,
        **details,
        **chosen_on,
        **({"rank": averaged.rank, "largest_error": averaged.largest_error} if averaged.rank is not None else {}),
        "adapters": [
            {"path": a.path, "sha256": a.sha256, "coefficient": a.coefficient, "val": a.val} for a in averaged.adapters
        ],
    }
    return kept


def method_with(method: str, rank: int, layers: Sequence[str] = ()) -> str:
    """Return a LoRA method as text with another rank and a scale of 1, as `petune run --from` compares it.

    Args:
        method, rank: The text, and the rank.
        layers: See `petune.adapters.lora_products.with_rank`.
    """
    name, options = parse_method(method)
    if layers:
        return method_text(name, with_rank(options, rank, layers))
    parts = [text for text in method[len(name) + 1 :].split(",") if text] if options else []
    if any(text.partition("=")[0].strip() in {"rank_pattern", "alpha_pattern"} for text in parts):
        return f"{name}{',' if ':' in name else ':'}r={rank},lora_alpha={rank}"
    kept = [text for text in parts if text.partition("=")[0].strip() not in RANK_OPTIONS]
    return f"{name}{',' if ':' in name else ':'}" + ",".join([*kept, f"r={rank}", f"lora_alpha={rank}"])


def method_text(name: str, options: Mapping[str, Any]) -> str:
    """Return a method with its options as text: `lora:target_modules=[a,b],r=4`."""
    texts = {key: f"[{','.join(v)}]" if isinstance(v, list) else str(v).lower() for key, v in options.items()}
    return f"{name}{',' if ':' in name else ':'}" + ",".join(f"{key}={text}" for key, text in texts.items())

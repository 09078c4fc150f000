"""Adapters to average: read them, and check that they are of one kind and belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.adapters.format import SavedAdapter, geometry_differences, read_adapter
from petune.adapters.lora_products import LAYER_OPTIONS, RANK_OPTIONS, A, B, has_lora_options
from petune.base.errors import BackboneMismatch, CheckpointError, UsageError
from petune.runner.continued import tensors_digest
from petune.runner.run_adapter import find_adapter, run_dir_of
from petune.runner.split_options import read_split_options

WITHOUT_EFFECT = ("dropout", "init")
"""Words in the names of options that act while an adapter trains, or before, and not on what its tensors compute."""


@dataclass(frozen=True)
class Ingredient:
    """An adapter to average.

    Attributes:
        path: The run or adapter directory, as given.
        saved: Its content.
        sha256: Of its file of tensors.
    """

    path: Path
    saved: SavedAdapter
    sha256: str

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the run; empty for adapters of one's own loop."""
        recorded: Mapping[str, Any] = self.saved.config["metadata"]
        return recorded

    @property
    def training(self) -> Mapping[str, Any]:
        """Entries that a run has recorded about its training."""
        return self.recorded("training")

    def recorded(self, key: str) -> Mapping[str, Any]:
        """Return the entries below a key of the metadata; none if users saved something else there."""
        entries = self.metadata.get(key)
        return entries if isinstance(entries, Mapping) else {}

    @property
    def seed(self) -> int | None:
        """The seed of its run; None if that is not known."""
        seed = self.training.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def split_options(self) -> dict[str, Any] | None:
        """The options that chose the val and test images of its run; None if they are not known."""
        return read_split_options(self.metadata, run_dir_of(self.saved.path, self.metadata))

    @property
    def earlier(self) -> Mapping[str, Any] | None:
        """The adapter that its run has continued; None if it has not, or that is not known."""
        earlier = self.metadata.get("continued_from")
        return earlier[-1] if isinstance(earlier, list) and earlier and isinstance(earlier[-1], Mapping) else None

    @property
    def outputs(self) -> Any:
        """Task and classes of its classifier; None if that is not recorded."""
        task = self.metadata.get("task")
        target = task.get("target") if isinstance(task, Mapping) else None
        names = target.get("names") if isinstance(target, Mapping) else self.metadata.get("classes")
        return [task.get("name") if isinstance(task, Mapping) else None, list(names)] if names else None


def read_ingredient(path: Path) -> Ingredient:
    """Read the adapter of a run or adapter directory.

    Raises:
        CheckpointError: There is none, it is damaged, or it holds NaN or infinite values.
    """
    saved = check_finite(read_adapter(find_adapter(path)))
    return Ingredient(path, saved, tensors_digest(saved))


def check_finite(saved: SavedAdapter) -> SavedAdapter:
    """Return an adapter that holds finite numbers.

    Raises:
        CheckpointError: It holds NaN or infinite values.
    """
    if broken := [key for key, t in saved.tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise CheckpointError(
            f"{saved.path} holds NaN or infinite values in {broken[0]}: its training diverged. Use another run"
        )
    return saved


def read_ingredients(paths: Sequence[Path], at_least: int) -> list[Ingredient]:
    """Read adapters.

    Args:
        paths: Run or adapter directories.
        at_least: How many there must be.

    Raises:
        UsageError: There are fewer, or one is named twice or a copy of another.
        CheckpointError: See `read_ingredient`.
    """
    if len(paths) < at_least:
        given = "one adapter is" if paths else "no adapter is"
        raise UsageError(f"{given} given, and this averages {at_least} or more. Name the directories of several runs")
    ingredients = [read_ingredient(path) for path in paths]
    places = [ingredient.saved.path.resolve() for ingredient in ingredients]
    twice = next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice. To weigh it more, use coefficients", cli_hint="See --coefficients")
    for number, ingredient in enumerate(ingredients):
        copy = next((other.path for other in ingredients[:number] if other.sha256 == ingredient.sha256), None)
        if copy is not None:
            raise UsageError(
                f"{ingredient.path} holds the same tensors as {copy}. Name one of them; to weigh it more, use "
                "coefficients",
                cli_hint="See --coefficients",
            )
    return ingredients


def check_alike(ingredients: Sequence[Ingredient], *, heads_alike: bool, by_products: bool) -> None:
    """Check, without a model, that adapters have one method, one form and one backbone.

    Args:
        ingredients: The adapters.
        heads_alike: Their classifiers are averaged too.
        by_products: LoRA is combined as changes of weights, so ranks and scales may differ.

    Raises:
        UsageError: They have other methods, options, shapes or classes.
        BackboneMismatch: They belong to other backbones.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        is_product = by_products and has_lora_options(first.saved.config)
        same_layers = first.saved.tensors.keys() == other.saved.tensors.keys()  # a converted LoRA names each of them
        may_differ = RANK_OPTIONS | LAYER_OPTIONS if same_layers else RANK_OPTIONS
        _check_method(first, other, may_differ if is_product else frozenset())
        _check_backbone(first, other)
        if heads_alike:
            _check_outputs(first, other)
        _check_shapes(first, other, heads_alike=heads_alike, ends=(A, B) if is_product else ())


def _check_method(first: Ingredient, other: Ingredient, may_differ: Collection[str]) -> None:
    methods = [ingredient.saved.config["tuner"] for ingredient in (first, other)]
    if methods[0] != methods[1]:
        raise UsageError(
            f"{first.path} was trained with {methods[0]}, and {other.path} with {methods[1]}. Average adapters of one "
            "method"
        )
    configs = [{**i.saved.config["config"], "train_head": i.saved.config["train_head"]} for i in (first, other)]
    different = [
        f"{key} is {configs[0].get(key)!r} there and {configs[1].get(key)!r} here"
        for key in {**configs[0], **configs[1]}
        if configs[0].get(key) != configs[1].get(key)
        and key not in may_differ
        and not any(word in key for word in WITHOUT_EFFECT)
    ]
    if different:
        by_factors = not may_differ and has_lora_options(first.saved.config)
        advice = ". LoRA of other ranks is averaged without by_factors, by its products B·A" if by_factors else ""
        raise UsageError(
            f"{other.path} has other options than {first.path}, so that their tensors do not stand for the same: "
            f"{', '.join(different)}. Average adapters of equal options{advice}"
        )


def _check_backbone(first: Ingredient, other: Ingredient) -> None:
    configs = first.saved.config, other.saved.config
    both = f"{first.path} and {other.path} belong to different backbones"
    geometries = [config["geometry"] for config in configs]
    if None not in geometries and (different := geometry_differences(*geometries)):
        raise BackboneMismatch(f"{both}: they differ in {', '.join(different)}. Average adapters of one backbone")
    if configs[0].get("chosen_sites") != configs[1].get("chosen_sites"):
        raise BackboneMismatch(f"{first.path} and {other.path} were attached to other blocks or heads of the model")
    for key, noun in (("fingerprint", "backbones"), ("head_fingerprint", "frozen classifiers")):
        digests = [config.get(key) for config in configs]
        if None not in digests and digests[0] != digests[1]:
            names = [str(i.recorded("backbone").get("weights")) for i in (first, other)]
            weights = f" ({names[0]} and {names[1]})" if names[0] != names[1] else ""
            raise BackboneMismatch(
                f"{first.path} and {other.path} were trained on {noun} of other weights{weights}. Average adapters of "
                "one backbone"
            )
    if _random_weights(first) != _random_weights(other):
        raise BackboneMismatch(f"{both}: their random weights (weights=none) were drawn by other seeds")


def _random_weights(ingredient: Ingredient) -> int | None:
    """Return the seed of a backbone without pretrained weights: where all of it trains, no fingerprint tells."""
    recorded = ingredient.recorded("backbone")
    return recorded.get("seed") if recorded.get("weights") == "none" else None


def _check_outputs(first: Ingredient, other: Ingredient) -> None:
    if first.outputs != other.outputs:
        raise UsageError(
            f"{first.path} and {other.path} were trained for other classes ({_shown(first)}; {_shown(other)}), so "
            "their classifiers have no average. Keep one of them, head='DIR', or leave them out, head='none'",
            cli_hint="The flag is --head",
        )
    for key in ("mean", "std", "image_size"):
        values = [i.recorded("preprocess").get(key) for i in (first, other)]
        if None not in values and values[0] != values[1]:
            raise UsageError(
                f"{first.path} and {other.path} see images with another {key}: {values[0]} and {values[1]}. Average "
                "runs of one preprocessing"
            )


def _shown(ingredient: Ingredient) -> str:
    if ingredient.outputs is None:
        return "not recorded"
    names = ingredient.outputs[1]
    return ", ".join(map(str, names[:3])) + (", …" if len(names) > 3 else "")


def _check_shapes(first: Ingredient, other: Ingredient, *, heads_alike: bool, ends: tuple[str, ...]) -> None:
    """Check tensors of equal names; those that only one file names are found by their addresses when it is loaded.

    Args:
        first, other: The adapters.
        heads_alike: Their classifiers are averaged too.
        ends: Ends of names whose shapes may differ.
    """
    tensors = first.saved.tensors, other.saved.tensors
    if not heads_alike:
        return
    for key in tensors[0].keys() & tensors[1].keys():
        if not key.endswith(ends) and tensors[0][key].shape != tensors[1][key].shape:
            shapes = " and ".join(str(tuple(t[key].shape)) for t in tensors)
            raise UsageError(
                f"{first.path} and {other.path} have other shapes: {key} is {shapes}. Use adapters of one shape"
            )

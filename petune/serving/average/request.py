"""The arguments of an average, checked as far as that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from petune.adapters.lora_products import check_rank
from petune.base.config import expand_home
from petune.base.errors import UsageError
from petune.base.files import file_in_path
from petune.serving.average.ingredients import Ingredient, check_alike, read_ingredients
from petune.serving.average.soup import SEVERAL, Mixture, mixture_of
from petune.serving.average.val_scores import check_val

AVERAGE, NO_HEAD = "average", "none"


@dataclass(frozen=True)
class AverageRequest:
    """The arguments of `average_adapters`, checked as far as that needs no model.

    Attributes:
        ingredients: The adapters.
        output: The directory to create.
        mixture: How they are combined.
        base: The adapter that the result has classes, preprocessing and options of.
        head: `average`, `none`, or `keep`, the classifier of `base`.
        rank, by_factors, start: See `average_adapters`.
    """

    ingredients: tuple[Ingredient, ...]
    output: Path
    mixture: Mixture
    base: Ingredient
    head: str
    rank: int | None
    by_factors: bool
    start: Path | None

    @classmethod
    def of(
        cls,
        paths: Sequence[Path],
        output: Path,
        *,
        algorithm: str = "uniform",
        coefficients: Sequence[float] | None = None,
        density: float | None = None,
        seed: int = 0,
        head: str | Path = AVERAGE,
        rank: int | None = None,
        by_factors: bool = False,
        start: Path | None = None,
    ) -> AverageRequest:
        """Read the adapters and check everything that needs no model; see `average_adapters`."""
        check_new(output)
        check_rank(rank)
        mixture = mixture_of(algorithm, max(1, len(paths)), coefficients, density, seed)
        ingredients = tuple(read_ingredients(paths, 2 if algorithm in SEVERAL else 1))
        base = _base_of(ingredients, head)
        others = [i for i in ingredients if i is not base]
        check_alike([base, *others], heads_alike=head == AVERAGE, by_products=not by_factors)
        if algorithm == "greedy":
            if head != AVERAGE:
                raise UsageError("greedy evaluates averages with their classifier. Leave head out")
            check_val(ingredients)
        if start is not None and not mixture.needs_start:
            raise UsageError(f"{algorithm} needs no start. Leave it out")
        kind = head if head in (AVERAGE, NO_HEAD) else "keep"
        return cls(ingredients, output, mixture, base, str(kind), rank, by_factors, start)


def check_new(output: Path) -> None:
    """Check that a directory can be created.

    Raises:
        UsageError: It exists, and is not an empty directory; or one of its parents is a file.
    """
    if file := file_in_path(output):
        raise UsageError(f"{output} cannot be created, as {file} is not a directory. Name another one")
    is_empty = output.is_dir() and not output.is_symlink() and not any(output.iterdir())
    if (output.exists() or output.is_symlink()) and not is_empty:
        raise UsageError(f"{output} exists. Name a new directory")


def _base_of(ingredients: Sequence[Ingredient], head: str | Path) -> Ingredient:
    if head in (AVERAGE, NO_HEAD):
        return ingredients[0]
    place = expand_home(head).resolve()
    chosen = [i for i in ingredients if place in (i.path.resolve(), i.saved.path.resolve())]
    if not chosen:
        raise UsageError(
            f"head is {str(head)!r}, which is none of the averaged directories. Name one, 'average' or 'none'"
        )
    return chosen[0]

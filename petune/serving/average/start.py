"""The values that trainings started from: task vectors and WiSE-FT need one start that all adapters have in common.

Files hold trained values only. The start is known in three cases: the runs continue one adapter; or the method starts
with values that no seed changes (those of the backbone, ones, zeros); or all runs have one seed, from which the values
are drawn again. For others, such as AdaptFormer's down-projections of several seeds, there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from petune.base.errors import UsageError
from petune.base.text import plural
from petune.serving.average.ingredients import Ingredient, check_alike, read_ingredient
from petune.serving.average.slot import AdapterSlot

RESEMBLANCE = 6.0
"""Standard deviations of the cosine of independent random vectors; trained values are nearer to their start."""


def continued_start(ingredients: Sequence[Ingredient], given: Path | None, *, by_products: bool) -> Ingredient | None:
    """Return the adapter that all runs continue; None if none of them continues one, and none is given.

    Args:
        ingredients: The adapters.
        given: Where it is now; None takes the path that the runs have recorded.
        by_products: See `check_alike`.

    Raises:
        UsageError: Only some runs continue one, or another one than the others or than the given one; or it is gone.
    """
    recorded = {None if i.earlier is None else str(i.earlier.get("sha256")) for i in ingredients}
    first = ingredients[0]
    if len(recorded) > 1:
        raise UsageError(
            f"{first.path} and the others do not continue one adapter, so they have no start in common for task "
            "vectors. Use the algorithm uniform or greedy, or runs of one --from"
        )
    if recorded == {None}:
        if given is None:
            return None
        if any(i.training for i in ingredients):
            raise UsageError(f"{first.path} does not continue {given}: its run started anew. Leave start out")
        return _read_start(first, given, by_products)
    assert first.earlier is not None
    path = Path(str(first.earlier.get("path"))) if given is None else given
    if given is None and not path.is_dir():
        raise UsageError(
            f"the adapter that {first.path} continues is no longer at {path}. Say where it is: start='DIR'",
            cli_hint="The flag is --start",
        )
    start = _read_start(first, path, by_products)
    if start.sha256 not in recorded:
        raise UsageError(f"{path} is not the adapter that {first.path} continues: its tensors have another SHA-256")
    return start


def _read_start(first: Ingredient, path: Path, by_products: bool) -> Ingredient:
    start = read_ingredient(path)
    check_alike([first, start], heads_alike=False, by_products=by_products)
    return start


def start_of(
    slot: AdapterSlot, ingredients: Sequence[Ingredient], tuned: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tuned values that runs which continue no adapter started with.

    Args:
        slot: With the model; it has another adapter on it afterwards.
        ingredients: The adapters.
        tuned: Their tuned tensors.

    Raises:
        UsageError: They did not start with the same values, or it is not known with which.
    """
    options = ingredients[0].saved.config["config"]
    drawn = [slot.start_values(options, seed) for seed in (0, 1)]
    is_random = {key for key in drawn[0] if not torch.equal(drawn[0][key], drawn[1][key])}
    if not is_random:
        _check_one_backbone(ingredients)
        return drawn[0]
    seeds = {i.seed for i in ingredients}
    method = ingredients[0].saved.config["tuner"]
    if seeds == {None}:
        raise UsageError(
            f"{method} starts with random values, such as {min(is_random)}, and {ingredients[0].path} does not record "
            "the seed of its run. Save the adapter before its training and name it: start='DIR'",
            cli_hint="The flag is --start",
        )
    if len(seeds) > 1:
        shown = ", ".join(str(seed) for seed in sorted(seeds, key=str))
        raise UsageError(
            f"{method} starts with random values, such as {min(is_random)}, and these runs have other seeds ({shown}): "
            "there is no start in common to compute task vectors from. Use runs that continue one adapter (petune run "
            "--from), or the algorithm uniform or greedy"
        )
    seed = seeds.pop()
    assert seed is not None
    start = slot.start_values(options, seed)
    _check_resembles(ingredients, tuned, start, is_random)
    return start


def _check_one_backbone(ingredients: Sequence[Ingredient]) -> None:
    """Check the names of the weights: of what trains in place, no fingerprint tells the start."""
    names = {str(i.recorded("backbone").get("weights")) for i in ingredients}
    if len(names) > 1:
        raise UsageError(
            f"the runs started from backbones of {plural(len(names), 'name')} ({', '.join(sorted(names))}), so they "
            "may have no start in common. Use the algorithm uniform or greedy"
        )


def _check_resembles(
    ingredients: Sequence[Ingredient],
    tuned: Sequence[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    keys: set[str],
) -> None:
    """Check that trained values resemble the start that was drawn again: another device draws other numbers."""
    drawn = torch.cat([start[key].double().flatten() for key in sorted(keys)])
    for ingredient, values in zip(ingredients, tuned, strict=True):
        trained = torch.cat([values[key].double().flatten() for key in sorted(keys)])
        cosine = float(torch.nn.functional.cosine_similarity(trained, drawn, dim=0))
        if not cosine > RESEMBLANCE / len(drawn) ** 0.5:
            raise UsageError(
                f"the values of {ingredient.path} do not resemble those that its seed draws here (cosine {cosine:.3f})"
                ": its start is not known. It was drawn on another device, or by another version of the method. Use "
                "the algorithm uniform or greedy"
            )


def have_random_starts(slot: AdapterSlot, ingredients: Sequence[Ingredient]) -> bool:
    """Return True if adapters are averaged value by value that have started from different random values."""
    earlier = {None if i.earlier is None else i.earlier.get("sha256") for i in ingredients}
    if len(earlier) == 1 and None not in earlier:
        return False
    seeds = {i.seed for i in ingredients}
    if len(seeds) == 1 and None not in seeds:
        return False
    options = ingredients[0].saved.config["config"]
    first, second = (slot.start_values(options, seed) for seed in (0, 1))
    return any(not torch.equal(first[key], second[key]) for key in first)

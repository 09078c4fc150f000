"""A choice of transformer blocks: `all`, `last:K`, `first:K`, `every:K`, `in:PATH`, or a list of numbers.

The same words choose the blocks that a method edits and those whose tokens a head reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from petune.base.errors import ConfigError
from petune.base.text import plural

ALL = "all"
FORM = re.compile(r"(last|first|every):([1-9]\d*)")
INSIDE = "in:"
ADVICE = "use all, last:K, first:K, every:K, in:PATH (a tower), or a list of numbers from 0, such as [0, 5]"


def check_form(blocks: Any) -> Any:
    """Return a choice that has one of the forms; whether a model has such blocks is not known yet.

    Raises:
        ValueError: It has none of them.
    """
    if isinstance(blocks, str):
        valid = blocks == ALL or FORM.fullmatch(blocks) is not None or bool(path_of_tower(blocks))
    else:
        numbers = list(blocks) if isinstance(blocks, list | tuple) else []
        valid = bool(numbers) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not valid:
        raise ValueError(ADVICE)
    return blocks if isinstance(blocks, str) else list(blocks)


def path_of_tower(blocks: str | Sequence[int]) -> str:
    """Return the path in `in:PATH`; empty for a choice of another form."""
    return blocks.removeprefix(INSIDE).strip() if isinstance(blocks, str) and blocks.startswith(INSIDE) else ""


BlockChoice = Annotated[str | list[int], BeforeValidator(check_form)]
"""The type of a choice of blocks in a configuration."""


def chosen_indices(blocks: str | Sequence[int], indices: Sequence[int], model: str) -> list[int]:
    """Return the blocks that a choice names, in the order of the model, each once.

    Args:
        blocks: `all`; `last:K` or `first:K`; `every:K`, the first block and every K-th after it; or numbers of blocks,
            negative from the end.
        indices: The numbers of the blocks that there are, ascending.
        model: The model's class name, for messages.

    Raises:
        ConfigError: The choice has none of these forms, or there are no such blocks.
    """
    try:
        blocks = check_form(blocks)
    except ValueError as error:
        raise ConfigError(f"blocks is {blocks!r}; {error}") from None
    depth = len(indices)
    if blocks == ALL:
        return list(indices)
    if isinstance(blocks, str):
        kind, _, number = blocks.partition(":")
        count = int(number)
        if count > depth:
            raise _no_such_block(blocks, indices, model)
        return list({"last": indices[depth - count :], "first": indices[:count], "every": indices[::count]}[kind])
    if any(n not in indices if n >= 0 else n < -depth for n in blocks):
        raise _no_such_block(blocks, indices, model)
    return sorted({n if n >= 0 else indices[n] for n in blocks})


def chosen_in_rows(blocks: str | Sequence[int], rows: Sequence[Sequence[int]], model: str) -> list[int]:
    """Return the blocks that a choice names in a model of several towers: numbers count all, other forms each tower.

    Args:
        blocks: See `chosen_indices`.
        rows: The numbers of the blocks of each tower. A tower with fewer than K blocks has all of them chosen.
        model: See `chosen_indices`.

    Raises:
        ConfigError: See `chosen_indices`.
    """
    every = sorted({index for row in rows for index in row})
    if len(rows) < 2 or not isinstance(blocks, str) or FORM.fullmatch(blocks) is None:
        return chosen_indices(blocks, every, model)
    kind, _, number = blocks.partition(":")
    deepest = max(len(row) for row in rows)
    if int(number) > deepest:
        raise ConfigError(f"blocks is {blocks}, but the deepest tower of {model} has {plural(deepest, 'block')}")
    clipped = [chosen_indices(f"{kind}:{min(int(number), len(row))}", row, model) for row in rows]
    return sorted({index for row in clipped for index in row})


def _no_such_block(blocks: str | Sequence[int], indices: Sequence[int], model: str) -> ConfigError:
    depth = len(indices)
    if not depth:
        return ConfigError(f"blocks is {blocks}, but {model} has no attention block that petune can find. Leave it out")
    is_range = list(indices) == list(range(indices[0], indices[0] + depth))
    numbers = f"{indices[0]} to {indices[-1]}" if is_range else ", ".join(map(str, indices))
    return ConfigError(
        f"blocks is {blocks}, but {model} has {plural(depth, 'block')}. Use last:1 to last:{depth}, first:K or every:K "
        f"with such a K, or numbers: {numbers}, or from the end -1 to -{depth}"
    )

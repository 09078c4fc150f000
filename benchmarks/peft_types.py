"""The table of PEFT's types in docs/peft.md, from what each does on a small ViT: `python benchmarks/peft_types.py`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import petune
from petune.base.errors import NotMergeable
from petune.plugin_dev.tiny_models import tiny_timm
from petune.tuners.peft import REFUSED, peft_types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "peft.md"
BEGIN, END = "<!-- types:begin -->\n", "<!-- types:end -->\n"


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Type, whether it works, identity at the start, whether it folds: for all that the installed PEFT knows."""
    import peft

    for kind in sorted(member.value.lower() for member in peft.PeftType if member.value != "PETUNE"):
        if kind in REFUSED:
            yield kind, f"refused: {REFUSED[kind]}", "", ""
        else:
            att = petune.attach(tiny_timm(embed_dim=32), f"peft:{kind}")
            start = "yes" if att.tuner.identity_at_init else "no"
            yield kind, f"works: {_layers(att)}", start, _folds(att)
    assert peft_types().keys() <= {member.value.lower() for member in peft.PeftType}


def _layers(att: petune.Attachment) -> str:
    held = {type(layer.get_base_layer()).__name__ for layer in att.tuner.wrapped.layers.values()}
    return "linear layers" if held == {"Linear"} else "norms" if held == {"LayerNorm"} else ", ".join(sorted(held))


def _folds(att: petune.Attachment) -> str:
    try:
        att.merge()
    except NotMergeable:
        return "no"
    return "yes"


def table() -> str:
    """The table, between its marks."""
    import peft

    words = (
        f"PEFT {peft.__version__} has {len(peft.PeftType) - 1} types of its own:\n\n"
        "| type | on a ViT | identity at the start | folds |\n| --- | --- | --- | --- |\n"
    )
    lines = "".join(f"| `{kind}` | {state} | {start} | {folds} |\n" for kind, state, start, folds in rows())
    return f"{BEGIN}{words}{lines}{END}"


def updated(page: str) -> str:
    """The page with the table of today."""
    assert page.count(BEGIN) == page.count(END) == 1
    return re.sub(f"{BEGIN}.*?{END}", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

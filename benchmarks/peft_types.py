"""Write the table of PEFT's types in docs/peft.md, from what each does on a small ViT.

Run it with `python benchmarks/peft_types.py` after an upgrade of PEFT.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import petune
from petune.base.errors import AttachError, NotMergeable
from petune.base.files import replace_file
from petune.plugin_dev.tiny_models import tiny_timm
from petune.tuners.peft_bridge.options import REFUSED, peft_types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "peft.md"
BEGIN, END = "<!-- types:begin -->\n", "<!-- types:end -->\n"


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (type, state, identity at the start, can be merged, two on a model) for every type of PEFT."""
    for kind in sorted(_types()):
        if kind in REFUSED:
            yield kind, f"refused: {REFUSED[kind]}", "", "", ""
        else:
            att = petune.attach(tiny_timm(embed_dim=32), f"peft:{kind}")
            identity = "yes" if att.tuner.identity_at_init else "no"
            two = _two_on_a_model(kind)
            yield kind, f"works: {_wrapped_layers(att)}", identity, _can_be_merged(att), two


def _types() -> set[str]:
    """Return PEFT's own types in lower case; petune may have registered one more."""
    import peft

    types = {member.value.lower() for member in peft.PeftType} - {"petune"}
    assert peft_types().keys() <= types
    return types


def _wrapped_layers(att: petune.Attachment) -> str:
    names = {type(layer.get_base_layer()).__name__ for layer in att.tuner.wrapped.layers.values()}
    words = {"Linear": "linear layers", "LayerNorm": "norms"}
    return ", ".join(sorted(words.get(name, name) for name in names))


def _two_on_a_model(kind: str) -> str:
    model = tiny_timm(embed_dim=32)
    first = petune.attach(model, f"peft:{kind}", name="first", train_head=False)
    try:
        petune.attach(model, f"peft:{kind}", name="second", train_head=False)
    except AttachError:
        first.disable()
        petune.attach(model, f"peft:{kind}", name="second", train_head=False)
        return "one enabled"
    return "both enabled"


def _can_be_merged(att: petune.Attachment) -> str:
    try:
        att.merge()
    except NotMergeable:
        return "no"
    return "yes"


def table() -> str:
    """Return the table, between its marks."""
    import peft

    intro = (
        f"PEFT {peft.__version__} has {len(_types())} types of its own:\n\n"
        "| type | on a ViT | identity at the start | can be merged | two on a model |\n"
        "| --- | --- | --- | --- | --- |\n"
    )
    lines = "".join(f"| `{kind}` | {' | '.join(cells)} |\n" for kind, *cells in rows())
    return f"{BEGIN}{intro}{lines}{END}"


def updated(page: str) -> str:
    """Return the page with the table of the installed PEFT."""
    assert page.count(BEGIN) == page.count(END) == 1
    return re.sub(f"{BEGIN}.*?{END}", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    replace_file(PAGE, updated(PAGE.read_text(encoding="utf-8")).encode())

"""docs/backbones.md from the results: a row a family, a column a method, a footnote a reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

HEAD = """\
# Backbones

`--backbone`, and `petune.RunConfig(backbone=…)`, take

| name | is |
| --- | --- |
| `vit_nano`, `vit_base`, … | petune's short names: `petune backbones` lists them |
| `vit_small_patch14_reg4_dinov2` | any model of timm's; with a tag, as `….lvd142m`, those weights |
| `torchvision:vit_b_16` | a model of torchvision's |
| `hf:facebook/dinov2-small`, `hf:DIR` | a repository of the Hugging Face Hub, or a directory |
| `my_package.models:make` | a function of your own that returns a model |

A repository may have transformers' layout or timm's, what `timm.create_model("hf-hub:…")` reads, as many foundation
models for pathology have; both need `pip install "petune[transformers]"`. A function of your own is given `num_classes`
and `image_size` where it takes them. `--image-size` and `--set backbone_options.KEY=VALUE` go to whatever builds the
model. Weights of a library or the Hub fill everything but the classifier, or it is an error.

## Which method works on which

Made by `make backbones`, which builds a small model of every family with random weights, attaches every method, and
checks each pair:

- the model computes the same at the start, where the method claims it; the tuned count is the method's formula;
- every adapter is called in a forward, every tuned tensor gets a gradient and moves, nothing else changes by a bit;
- images of a batch do not mix; disabled and detached, the model is as it was; saved and loaded, it is the same;
- AdaptFormer's change of a block is the adapter's output for what hooks of the survey's own saw enter, and the place
  it reads is the residual stream: with the MLP silenced, it leaves the block as it is;
- prompts that are hidden from every attention leave the model as it was: no position was falsified.

`ok`: all of that holds. A number: refused, with the reason below; the model is then left as it was. Not in a table but
true for each model, yours too: petune finds blocks by structure, not by this list.

"""


def page(results: dict[str, Any], families: Iterable[str], variants: dict[str, Any]) -> str:
    """The whole page; `families` are all that there should be, and those without results are named."""
    methods = list(next(iter(results.values()))["methods"])
    notes: dict[str, int] = {}
    rows = [_row(family, result, methods, notes) for family, result in results.items()]
    states = [p["state"] for r in results.values() for p in r["methods"].values()]
    total = ", ".join(f"{states.count(s)} {s}" for s in ("ok", "refused", "wrong"))
    head = ["family", "surveyed as", "blocks", *methods]
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    reasons = [f"{number}. {text}" for text, number in notes.items()]
    missing = ", ".join(f for f in families if f not in results)
    left = [f"Not surveyed yet: {missing}.", ""] if missing else []
    body = [f"{len(results)} models, {total}.", "", *left, *table, "", "## Reasons", "", *reasons, ""]
    return HEAD + "\n".join([*body, *_every_variant(variants)])


def _every_variant(variants: dict[str, Any]) -> list[str]:
    """The walk over all of timm in a paragraph."""
    lacking = ", ".join(f"`{name}` ({count})" for name, count in variants["without_mid"].items())
    failed = ", ".join(f"`{name}` ({why})" for name, why in variants["failed"].items()) or "none"
    return [
        "## Every variant of timm",
        "",
        f"`python benchmarks/backbones.py --all` builds each of the {variants['variants']} models of timm "
        f"{variants['timm']} on the meta device at its full size and finds its places: "
        f"{variants['with_attention']} have attention blocks; it took {variants['time_s'] / 60:.0f} minutes on one "
        "busy core. Finding the places of ViT-B takes 0.13 s of processor time and no second copy of its weights "
        "(0.6 MB beside 346 MB: `python benchmarks/sites.py`).",
        "",
        f"- Failed: {failed}.",
        f"- Blocks without a residual stream between attention and MLP, where AdaptFormer is refused: {lacking}.",
        "",
    ]


def _row(family: str, result: dict[str, Any], methods: list[str], notes: dict[str, int]) -> list[str]:
    cells = []
    for method in methods:
        pair = result["methods"][method]
        if pair["state"] == "refused":
            cells.append(f"({notes.setdefault(general(pair['detail']), len(notes) + 1)})")
        else:
            cells.append(pair["state"] if pair["state"] == "ok" else f"**wrong**: {pair['detail']}")
    return [family, f"`{result['model']}`", str(result["blocks"]), *cells]


def general(reason: str) -> str:
    """A reason without the names of one model, so that models share footnotes."""
    reason = re.sub(r"but [\w.]+ of \w+ ", "but a block ", reason)
    reason = re.sub(r"^block \d+ \([\w.]+\) of \w+ ", "a block ", reason)
    reason = re.sub(r"but \w+ calls", "but the model calls", reason)
    reason = re.sub(r"^\w+ has no attention", "the model has no attention", reason)
    reason = re.sub(r" \((\w+(\.\w+)*)\)(?=\.)", "", reason)
    reason = re.sub(r"it has: block, ", "it has ", reason)
    reason = re.sub(r" \((\w+Error): .*?\)(?=\. )", "", reason)
    return re.sub(r"tokens than [\w.]+,", "tokens than the first,", reason)

"""Write docs/backbones.md from the results: a row per family, a column per method, a footnote per reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

HEAD = """\
# Backbones

`--backbone`, and `petune.RunConfig(backbone=…)`, take

| name | what it is |
| --- | --- |
| `vit_nano`, `vit_base`, … | petune's short names; `petune backbones` lists them |
| `vit_small_patch14_reg4_dinov2` | any timm model; with a tag, such as `….lvd142m`, with those weights |
| `torchvision:vit_b_16` | a torchvision model |
| `hf:facebook/dinov2-small`, `hf:DIR` | a repository of the Hugging Face Hub, or a local directory |
| `my_package.models:make` | your own function that returns a model |

A repository may have transformers' layout or timm's (the one that `timm.create_model("hf-hub:…")` reads), as many
foundation models for pathology do. Both need `pip install "petune[transformers]"`. Your own function gets `num_classes`
and `image_size` if it has such arguments. `--image-size` and `--set backbone_options.KEY=VALUE` are passed to whatever
builds the model. Pretrained weights must fill everything but the classifier; anything else is an error.

An `hf:` backbone is transformers' own model, so the keys of its adapters and exports are transformers', and
`petune.load(AutoModelForImageClassification.from_pretrained(…), "RUN/adapter")` works. The exceptions are encoders
that petune loads alone (CLIP's and SigLIP's vision models, DINOv3): petune adds a linear `model.classifier` to them.

## Which method works on which backbone

`make backbones` builds a small model of every family with random weights, attaches every method, and checks each pair:

- The model computes the same right after attaching, if the method claims so. The tuned count equals the formula.
- Every adapter is called in a forward, every tuned tensor gets a gradient and changes, nothing else changes by a bit.
- Images of a batch do not mix. Disabled or detached, the model is as before. Saved and loaded, it is the same.
- AdaptFormer changes a block's output by what its adapter returns for the input that the survey's own hooks record, and
  the site it reads is the residual stream: with the MLP silenced, the stream leaves the block unchanged.
- Prompts that are hidden from every attention leave the model's output as it was: they falsify no position.

`ok`: all of that holds. A number: petune refuses the pair, for the reason below, and leaves the model as it was. The
list is not a limit: petune finds blocks by structure, in your own models as well.

"""


def page(results: dict[str, Any], families: Iterable[str], variants: dict[str, Any]) -> str:
    """Return the whole page.

    Args:
        results: A row per surveyed family, as in results/backbones.json.
        families: All families that there should be; those without results are listed.
        variants: What `variants.walk` returned.
    """
    methods = list(next(iter(results.values()))["methods"])
    notes: dict[str, int] = {}
    rows = [_row(family, result, methods, notes) for family, result in results.items()]
    states = [pair["state"] for result in results.values() for pair in result["methods"].values()]
    total = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "refused", "wrong"))
    head = ["family", "surveyed as", "blocks", *methods]
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    reasons = [f"{number}. {text}" for text, number in notes.items()]
    missing = ", ".join(f for f in families if f not in results)
    not_surveyed = [f"Not surveyed yet: {missing}.", ""] if missing else []
    body = [f"{len(results)} models: {total}.", "", *not_surveyed, *table, "", "## Reasons", "", *reasons, ""]
    return HEAD + "\n".join([*body, *_every_variant(variants)])


def _every_variant(variants: dict[str, Any]) -> list[str]:
    """Return a section about the walk over all of timm."""
    without_mid = ", ".join(f"`{name}` ({count})" for name, count in variants["without_mid"].items())
    failed = ", ".join(f"`{name}` ({reason})" for name, reason in variants["failed"].items()) or "none"
    return [
        "## Every variant of timm",
        "",
        f"`python benchmarks/backbones.py --all` builds each of the {variants['variants']} models of timm "
        f"{variants['timm']} on the meta device at full size and finds its sites. {variants['with_attention']} have "
        f"attention blocks. It took {variants['time_s'] / 60:.0f} minutes on one busy core. Finding the sites of ViT-B "
        "takes 0.13 s of processor time and no second copy of its weights (0.6 MB on top of 346 MB: `python "
        "benchmarks/sites.py`).",
        "",
        f"- Failed: {failed}.",
        f"- Blocks without a residual stream between attention and MLP, where AdaptFormer is refused: {without_mid}.",
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
    """Return a reason without the names of one model, so that models share footnotes."""
    replacements = (
        (r"^[\w.]+ of \w+ cannot take prompts", "the block cannot take prompts"),
        (r"^block \d+ \([\w.]+\) of \w+ has no site", "a block has no site"),
        (r"^\w+ has no attention", "the model has no attention"),
        (r"the forward of \w+ fails", "the forward fails"),
        (r"it has: block, ", "it has: "),
        (r"other tokens than [\w.]+,", "other tokens than the first,"),
        (r" \((\w+(\.\w+)*)\)(?=\.)", ""),  # a layout, or a path
        (r" \((\w+Error): .*?\)(?=\. )", ""),
    )
    for pattern, replacement in replacements:
        reason = re.sub(pattern, replacement, reason)
    return reason

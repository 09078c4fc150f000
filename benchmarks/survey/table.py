"""Write docs/backbones.md from the results: a table per library, a row per family, a footnote per reason."""

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
| `torchvision:vit_b_16` | a torchvision model; video models are `torchvision:swin3d_t`, … |
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

The list is not a limit: petune finds blocks by structure, in your own models as well.

**How to read the tables.** A table per library: [timm](#timm), [torchvision](#torchvision),
[transformers](#transformers). Families are in alphabetical order; a line that begins with … is a variant of the family
above it. `blocks` are those that petune found in the small model.

| in a cell | meaning |
| --- | --- |
| ok | All of the above holds. |
| (1) | petune refuses the pair, for [reason](#reasons) 1, and leaves the model as it was. |
| (empty) | Not tried. |

"""
LIBRARIES = {"timm": "", "torchvision": "torchvision ", "transformers": "transformers "}
"""Libraries, with what the names of their families begin with."""
TAKES = """\
`takes`: what the forward takes. Where that is not an image, petune is given `example=`, see
[Videos, volumes and other inputs](any-input.md). A tower or an encoder without a classifier is tuned with
`train_head=False`; those surveyed by the class of their config are built by `--backbone hf:…`, which adds a classifier.
"""


def page(results: dict[str, Any], families: Iterable[str], variants: dict[str, Any], coverage: dict[str, Any]) -> str:
    """Return the whole page.

    Args:
        results: A row per surveyed family, as in results/backbones.json.
        families: All families that there should be; those without results are listed.
        variants: What `variants.walk` returned.
        coverage: What `coverage.sort_models` returned, and the version of transformers.
    """
    methods = max((list(result["methods"]) for result in results.values()), key=len)
    notes: dict[str, list[str]] = {}
    tables: list[str] = []
    for library in LIBRARIES:
        of_library = {f: results[f] for f in in_order(results) if library_of(f) == library}
        if of_library:
            tables += ["", f"### {library}", "", *_table(library, of_library, methods, notes)]
    states = [pair["state"] for result in results.values() for pair in result["methods"].values()]
    total = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "refused", "wrong"))
    reasons = [f"{number}. {_example(texts)}" for number, texts in enumerate(notes.values(), 1)]
    missing = "; ".join(f for f in in_order(families) if f not in results).replace(LIBRARIES["transformers"], "")
    not_surveyed = [f"Not surveyed yet, or not settled, all of transformers: {missing}.", ""] if missing else []
    body = [f"{len(results)} models: {total}.", "", *not_surveyed, *tables, "", "### Reasons", "", *reasons, ""]
    return HEAD + "\n".join([*body, *_every_variant(variants), *_every_model(coverage)])


def _every_model(coverage: dict[str, Any]) -> list[str]:
    """Return a section about all models of transformers that take pixels."""
    kinds = coverage["kinds"]
    reasons: dict[str, list[str]] = {}
    for name, reason in kinds["other"].items():
        reasons.setdefault(reason or "not surveyed yet", []).append(f"`{name}`")
    same = ", ".join(f"`{name}` ({twins})" for name, twins in kinds["same"].items())
    return [
        "## Every model of transformers that takes pixels",
        "",
        f"{sum(map(len, kinds.values()))} packages of transformers {coverage['transformers']} take pixels. "
        "`python benchmarks/backbones.py --coverage` reads their code and sorts them:",
        "",
        f"- {len(kinds['surveyed'])} have rows above: {_names(kinds['surveyed'])}.",
        f"- {len(kinds['same'])} have attention with the code of models that have a row: {same}.",
        f"- {len(kinds['composed'])} have no attention for pixels of their own. They build their towers from a "
        f"config, whose rows hold for them, or give patches to a language model: {_names(kinds['composed'])}.",
        f"- {len(kinds['none'])} have no attention: {_names(kinds['none'])}.",
        *(f"- {reason}: {', '.join(names)}." for reason, names in reasons.items()),
        "",
    ]


def _names(packages: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in packages)


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


def library_of(family: str) -> str:
    """Return the library that a family belongs to."""
    return next(name for name, start in reversed(LIBRARIES.items()) if family.startswith(start))


def in_order(families: Iterable[str]) -> list[str]:
    """Return families alphabetically; variants, whose names begin with …, stay below their family."""
    groups: list[list[str]] = []
    for family in families:
        if family.startswith("…") and groups:
            groups[-1].append(family)
        else:
            groups.append([family])
    return [family for group in sorted(groups, key=lambda group: group[0].lower()) for family in group]


def _table(library: str, results: dict[str, Any], methods: list[str], notes: dict[str, list[str]]) -> list[str]:
    columns = ["takes"] if library == "transformers" else []
    head = ["family", "surveyed as", *columns, "blocks", *methods]
    rows = [_row(family, result, columns, methods, notes) for family, result in results.items()]
    text = [TAKES] if columns else []
    return [*text, *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))]


def _row(
    family: str, result: dict[str, Any], columns: list[str], methods: list[str], notes: dict[str, list[str]]
) -> list[str]:
    cells = [result.get(column, "image") for column in columns]
    cells.append("" if result["blocks"] is None else str(result["blocks"]))
    for method in methods:
        pair = result["methods"].get(method)
        if pair is None:
            cells.append("")
        elif pair["state"] == "refused":
            cells.append(f"({_number(notes, general(pair['detail']))})")
        else:
            cells.append(pair["state"] if pair["state"] == "ok" else f"**wrong**: {pair['detail']}")
    name = family.removeprefix(LIBRARIES[library_of(family)])
    return [name, f"`{result['model']}`", *cells]


def _number(notes: dict[str, list[str]], reason: str) -> int:
    """Return the number of a reason, which it shares with those that differ in numbers, paths and classes only."""
    kind = re.sub(r"\w+(\.\w+)+|\b[A-Z]+[a-z]\w*[A-Z]\w*", "NAME", reason)
    kind = re.sub(r"\b\d+(, \d+)*\b", "NUMBER", kind)
    texts = notes.setdefault(kind, [])
    if reason not in texts:
        texts.append(reason)
    return list(notes).index(kind) + 1


def _example(texts: list[str]) -> str:
    """Return the first of some texts of one reason, called an example if there are others."""
    return texts[0] if len(texts) == 1 else f"such as, with other numbers or names for other models: {texts[0]}"


def general(reason: str) -> str:
    """Return a reason without the names of one model, so that models share footnotes."""
    replacements = (
        (r"^[\w.]+ of \w+ cannot take prompts", "the block cannot take prompts"),
        (r"^block \d+ \([\w.]+\) of \w+ has no site", "a block has no site"),
        (r"^train needs a block that is one module, .*?\): ", "a block is a span of the forward, not one module: "),
        (r"^\d+ of \d+ blocks of \w+ \([\d, ]+\) lack", "some blocks lack"),
        (r"blocks=\[[\d, ]+\]", "blocks=[…]"),
        (r"^\w+ draws random numbers(.*?) differ by \S+\.", r"the model draws random numbers\1 differ."),
        (r"^\w+ has no attention", "the model has no attention"),
        (
            r"^(PEFT cannot put lora on) \w+: .* not auto.handled for \w+;.*$",
            r"\1 models whose `get_input_embeddings` fails",
        ),
        (r"^\w+ (would learn nothing at) [\w., …]+ of \w+", r"the method \1 blocks of the model"),
        (r"the forward of \w+ fails", "the forward fails"),
        (r"it has: block, ", "it has: "),
        (r"other tokens than [\w.]+,", "other tokens than the first,"),
        (r" \((\w+(\.\w+)*)\)(?=\.)", ""),  # a layout, or a path
        (r" \((\w+Error): .*?\)(?=\. )", ""),
        (r"(fails with the method attached): \w+: .*?(?=\. Use)", r"\1"),
        (
            r"^cannot build hf:\S+ with no options: (\w+) requires the (\w+) library.*$",
            r"transformers needs the package \2",
        ),
    )
    for pattern, replacement in replacements:
        reason = re.sub(pattern, replacement, reason)
    return reason

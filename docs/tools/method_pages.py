"""The pages of docs/methods/, from the tuners' own docstrings, configs and formulas."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import petune
from petune.injector.describe import describe_tuner
from petune.injector.registry import load_tuner
from petune.runner.preview import describe_recipe

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "Adapters": ("adaptformer", "houlsby", "pfeiffer", "repadapter", "lst"),
    "Prompts": ("vpt",),
    "Changes of weights": ("lora", "dora", "fact"),
    "The backbone's own parameters": ("linear", "bitfit", "norm", "partial", "full"),
    "Plugins in this repository": ("ssf", "convpass", "l2sp", "mona", "dyt", "dtl", "l2p", "prefix", "gps", "sct"),
}
WITHOUT_BLOCKS = {"linear", "full", "l2sp", "l2p"}
"""Methods that refuse the option `blocks`: they edit no block, or train the whole model."""
NAMES = [name for names in GROUPS.values() for name in names]

CONTRACT = "tests/tuners/test_contract.py"
FORMULAS = "tests/tuners/test_formulas.py"
FORWARD = "tests/tuners/test_forward_plugins.py"
MERGING = "tests/tuners/test_merging.py"
PARITY = "tests/tuners/test_parity.py"
CHOOSERS = "tests/tuners/test_formulas_of_choosers.py"
PEFT = "tests/tuners/test_peft.py"
TESTS = {
    "adaptformer": (f"{PARITY}::test_equal_to_the_formula", f"{PARITY}::test_parameter_counts_of_vit_base"),
    "vpt": (f"{PARITY}::test_equal_to_the_formula",),
    "houlsby": (f"{FORMULAS}::test_houlsby",),
    "pfeiffer": (f"{FORMULAS}::test_pfeiffer", f"{FORMULAS}::test_adapter_plus"),
    "lora": (f"{PEFT}::test_saved_adapters_load_with_peft",),
    "prefix": (f"{CHOOSERS}::test_prefix",),
    "gps": (f"{CHOOSERS}::test_gps", f"{CHOOSERS}::test_gps_needs_classes"),
    "sct": (f"{CHOOSERS}::test_sct",),
    "dora": (f"{PEFT}::test_saved_adapters_load_with_peft",),
}
"""Tests in addition to the contract; for other methods they are found by the method's name."""


def method_page(name: str) -> str:
    """Return the page of one method: paper, equation, differences, options, counts and tests."""
    tuner = load_tuner(name)
    summary, _, rest = (inspect.getdoc(tuner) or "").partition("\n\n")
    recipe = tuner.recipe
    identity = "" if tuner.identity_at_init else " The output changes right after attaching."
    parts = [
        f"# {name}",
        summary,
        docstring_as_markdown(rest),
        "## Numbers",
        f"On ViT-B/16 at 224 it trains {count_on_vit_base(name):,} parameters, not counting the classifier's. Default "
        f"recipe: {recipe.optimizer}, peak learning rate {recipe.lr:g} at a batch size of 128, weight decay "
        f"{recipe.weight_decay:g}.{identity}",
        *(f"Recipe `{key}`: {describe_recipe(recipe)}." for key, recipe in tuner.recipes.items()),
        "## Options",
        _options(tuner.Config, hidden={"blocks"} if name in WITHOUT_BLOCKS else set()),
        "## Tests",
        _tests(name),
    ]
    return "\n\n".join(parts)


def index_page() -> str:
    """Return the page that lists all methods, by what they change."""
    records = {record.name: record for record in petune.list_tuners()}
    lines = [
        "# Methods",
        "",
        "`petune methods` lists what is installed; PEFT's other types are on [their own page](../peft.md), and "
        "[Write a tuner](../write-a-tuner.md) adds yours. Trained parameters are those of ViT-B/16, not counting the "
        "classifier's.",
        "",
        "Frozen parts are in eval mode, so a backbone's drop path and dropout are off, where papers often train with a "
        "drop path of 0.1. `--drop-path 0.1` turns it on, for every method alike: "
        "[Compare fairly](../tutorials/compare-fairly.md).",
        "",
        "Which of them compute what their authors' code computes, and to how many digits: [Fidelity](../fidelity.md).",
    ]
    for group, names in GROUPS.items():
        lines += ["", f"## {group}", "", "| method | what it does | trained | paper |", "| --- | --- | ---: | --- |"]
        for name in names:
            about = describe_tuner(records[name])
            paper = f"{about.paper}, {_arxiv_link(about.arxiv)}" if about.arxiv else ""
            lines.append(f"| [{name}]({name}.md) | {_cell(about.summary)} | {count_on_vit_base(name):,} | {paper} |")
    return "\n".join(lines)


@functools.cache
def count_on_vit_base(name: str) -> int:
    """Return the parameters of a method on ViT-B/16: by its formula, or by attaching it if it has none."""
    import torch

    model, sites = _vit_base()
    count = load_tuner(name)().num_parameters(sites)
    if count is not None:
        return count
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attachment = petune.attach(model, name, sites=sites)
        count = attachment.counts.tuned
        attachment.detach()
    return count


def docstring_as_markdown(docstring: str) -> str:
    """Return a docstring's paragraphs as Markdown: indented ones as code, `Word:` at the start of a line in bold."""
    paragraphs = re.split(r"\n{2,}", docstring.strip("\n"))
    return "\n\n".join(_paragraph_as_markdown(paragraph) for paragraph in paragraphs)


def _paragraph_as_markdown(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if all(line.startswith("    ") for line in lines):
        code = "\n".join(line.removeprefix("    ") for line in lines)
        return f"```text\n{code}\n```"
    text = re.sub(r"arXiv\s+(\d{4}\.\d{4,5})", lambda found: _arxiv_link(found[1]), paragraph)
    text = re.sub(r"(?<!`)<", "&lt;", text)
    items = re.split(r"^(?=(?:Trains|Parameters): )", text, flags=re.MULTILINE)
    text = "\n".join(f"- {' '.join(item.split())}" for item in items if item) if len(items) > 1 else text
    return re.sub(r"^(- )?((?:Trains|Parameters|Differs from [^:\n]+|Recipe):)", r"\1**\2**", text, flags=re.MULTILINE)


def _arxiv_link(arxiv: str) -> str:
    return f"[arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})"


@functools.cache
def _vit_base() -> tuple[Any, petune.Sites]:
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
        return model, petune.find_sites(model)


def _options(config: type[Any], hidden: set[str]) -> str:
    docstrings = [inspect.cleandoc(cls.__doc__ or "") for cls in reversed(config.__mro__)]
    option = re.compile(r"^    (\w+): (.*(?:\n {6,}.*)*)", flags=re.MULTILINE)
    texts = {name: text for docstring in docstrings for name, text in option.findall(docstring)}
    rows = [
        f"| `{name}` | {_default(field.default)} | {_cell(' '.join(texts.get(name, '').split()))} |"
        for name, field in sorted(config.model_fields.items(), key=lambda item: item[0] == "blocks")
        if name not in hidden
    ]
    table = ["| option | default | |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([docstrings[-1].partition("\n\n")[0], "", *table]).strip()


def _default(value: object) -> str:
    """Return a default as `--set` takes it."""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in (None, "") else ""


def _tests(name: str) -> str:
    lines = [
        f"- `{CONTRACT}`: the contract (frozen weights stay frozen, every trained tensor gets a gradient and moves, "
        "disabled or detached the model is as it was, saved and loaded it is the same, the count is the formula's)"
    ]
    tests = TESTS.get(name) or tuple(_tests_of_formula(name))
    for test in tests:
        file, _, function = test.partition("::")
        known = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        if function not in known:
            raise SystemExit(f"TESTS[{name!r}] names {test}, which does not exist")
        lines.append(f"- `{test}`")
    return "\n".join(lines) + "\n\nWhich families of backbones it was tried on is in [Backbones](../backbones.md)."


def _tests_of_formula(name: str) -> Iterator[str]:
    """Yield the tests against written-out formulas and of merging that mention the method."""
    for file in (FORMULAS, FORWARD, MERGING):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if is_test and any(isinstance(n, ast.Constant) and n.value == name for n in ast.walk(node)):
                yield f"{file}::{node.name}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

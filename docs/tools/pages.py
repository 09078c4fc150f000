"""Write the generated pages of the site from the code, or check that they are fresh.

python docs/tools/pages.py           # docs/methods/, docs/cli.md, docs/api.md
python docs/tools/pages.py --check   # exit code 1 where one is stale; `make test` runs this
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import petune  # noqa: E402
from petune.injector.registry import load_tuner  # noqa: E402

MADE = "<!-- written by docs/tools/pages.py -->\n"
KINDS = {
    "Adapters beside or behind the blocks": ("adaptformer", "houlsby", "pfeiffer", "repadapter", "lst"),
    "Tokens": ("vpt",),
    "Changes of weights": ("lora", "dora", "fact"),
    "The backbone's own parameters": ("linear", "bitfit", "norm", "partial", "full"),
    "Plugins in this repository": ("ssf", "convpass", "l2sp"),
}
FORMULAS, PARITY = "tests/tuners/test_formulas.py", "tests/tuners/test_parity.py"
PEFT = "tests/tuners/test_peft.py"
PROOFS = {
    "adaptformer": (f"{PARITY}::test_equal_to_the_formula", f"{PARITY}::test_counts_of_vit_base"),
    "vpt": (f"{PARITY}::test_equal_to_the_formula",),
    "houlsby": (f"{FORMULAS}::test_houlsby",),
    "pfeiffer": (f"{FORMULAS}::test_pfeiffer",),
    "lora": (f"{PEFT}::test_what_is_saved_loads_with_peft",),
    "dora": (f"{PEFT}::test_what_is_saved_loads_with_peft",),
}
CONTRACT = "tests/tuners/test_contract.py"
WIDTH = 100


def pages() -> dict[Path, str]:
    """Every generated page by its path below docs/."""
    methods = {Path("methods") / f"{name}.md": method_page(name) for names in KINDS.values() for name in names}
    made = {**methods, Path("methods/index.md"): methods_page(), Path("cli.md"): cli_page(), Path("api.md"): api_page()}
    return {path: f"{MADE}\n{text.strip()}\n" for path, text in made.items()}


def method_page(name: str) -> str:
    """Paper, equation, what differs, options, counts and proof of one method."""
    tuner = load_tuner(name)
    module = inspect.getmodule(tuner)
    head, _, rest = (inspect.getdoc(module) or "").partition("\n")
    parts = [f"# {name}", _markdown(_of_several(name, head, rest)), _markdown(inspect.getdoc(tuner) or "")]
    recipe = tuner.recipe
    parts += [
        "## Numbers",
        f"On ViT-B/16 at 224 it trains {count_on_vit_base(name):,} parameters, without the classifier's. Its recipe, "
        f"where nothing else is given: {recipe.optimizer}, peak learning rate {recipe.lr:g} at a batch of 128, weight "
        f"decay {recipe.weight_decay:g}." + ("" if tuner.identity_at_init else " It is not the identity at the start."),
        "## Options",
        _options(tuner.Config),
        "## Proof",
        _proof(name),
    ]
    return "\n\n".join(parts)


def _of_several(name: str, head: str, rest: str) -> str:
    """The head of a module; of one with several methods, what is said of this one."""
    if not re.search(r"^    \w+ \(", rest, flags=re.M):
        return f"{head}\n{rest}"
    (line,) = (row for row in rest.splitlines() if row.strip().lower().startswith(f"{name} ("))
    said, _, equation = line.strip().partition("):")
    return f"{said}).\n\n    {equation.strip()}"


def _options(config: type[Any]) -> str:
    told = dict(re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", inspect.getdoc(config) or "", flags=re.M))
    rows = [
        f"| `{name}` | {_cell(repr(field.default))} | {_cell(' '.join(told.get(name, '').split()))} |"
        for name, field in config.model_fields.items()
    ]
    first = (inspect.getdoc(config) or "").partition("\n\n")[0]
    table = ["| option | default | |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([first, "", *table]).strip()


def _proof(name: str) -> str:
    proofs = PROOFS.get(name) or tuple(f"{file}::{test}" for file, test in _tests_of(name))
    lines = [
        f"- `{CONTRACT}`: the contract (frozen parts stay frozen, every tuned tensor gets a gradient and moves, "
        "disabled and detached the model is as it was, saved and loaded it is the same, the count is the formula's)."
    ]
    for proof in proofs:
        file, _, test = proof.partition("::")
        known = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        if test not in known:
            raise SystemExit(f"PROOFS of {name} names {proof}, which is not there")
        lines.append(f"- `{proof}`")
    return "\n".join(lines) + "\n\nWhat holds on which family of backbones is in [Backbones](../backbones.md)."


def _tests_of(name: str) -> Iterator[tuple[str, str]]:
    """Tests against written-out formulas that call the method by its name."""
    for node in ast.walk(ast.parse((ROOT / FORMULAS).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            if name in texts:
                yield FORMULAS, node.name


@functools.cache
def _model_and_sites() -> tuple[Any, Any]:
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
        return model, petune.find_sites(model)


@functools.cache
def count_on_vit_base(name: str) -> int:
    """By the method's formula, which the contract holds against what is attached; where it has none, attached."""
    import torch

    model, sites = _model_and_sites()
    counted = load_tuner(name)().num_parameters(sites)
    if counted is not None:
        return counted
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attachment = petune.attach(model, name, sites=sites)
        tuned = attachment.counts.tuned
        attachment.detach()
    return tuned


def methods_page() -> str:
    """All methods, by what they change."""
    lines = [
        "# Methods",
        "",
        "`petune methods` lists what is installed; PEFT's further types are on [their own page](../peft.md), and "
        "[Write a tuner](../write-a-tuner.md) adds yours. Counts are of ViT-B/16, without the classifier.",
    ]
    for kind, names in KINDS.items():
        lines += ["", f"## {kind}", "", "| method | what | tuned |", "| --- | --- | ---: |"]
        for name in names:
            head = (inspect.getdoc(inspect.getmodule(load_tuner(name))) or "").partition("\n")[0]
            text = head.partition("): ")[2] or inspect.getdoc(load_tuner(name)) or ""
            first = re.split(r"(?<=\.)\s", " ".join(text.split()))[0]
            lines.append(f"| [{name}]({name}.md) | {_cell(first)} | {count_on_vit_base(name):,} |")
    return "\n".join(lines)


def cli_page() -> str:
    """What `petune COMMAND --help` says, of every command."""
    import typer

    from petune.cli.main import app

    parts = ["# Command line", _help(typer.main.get_command(app), "petune")]
    for name, command in _commands(typer.main.get_command(app), "petune"):
        parts += [f"## {name}", _help(command, name)]
    return "\n\n".join(parts)


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def _help(command: Any, name: str) -> str:
    from petune.cli.main import app

    names = app.info.context_settings["help_option_names"]
    context = command.context_class(
        command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=names
    )
    return f"```text\n{command.get_help(context).strip()}\n```"


def api_page() -> str:
    """Every public name, for mkdocstrings to fill in."""
    lines = ["# Python", "", "What `import petune` offers. Everything else may change without notice."]
    for name in sorted(petune.__all__, key=str.lower):
        lines += ["", f"::: petune.{_home(name)}.{name}"]
    return "\n".join(lines)


def _home(name: str) -> str:
    return str(petune._HOMES[name])


def _markdown(docstring: str) -> str:
    """A docstring with its indented blocks as code, which they are."""
    out: list[str] = []
    for block in re.split(r"\n{2,}", docstring.strip("\n")):
        lines = block.splitlines()
        formula = all(line.startswith("    ") for line in lines) or re.match(r"^\S.*( = |:  ).*\S {4,}\S", lines[0])
        if formula:
            body = "\n".join(line.removeprefix("    ") for line in lines)
            if out and out[-1].endswith("```"):
                out[-1] = f"{out[-1][:-4]}\n{body}\n```"
            else:
                out.append(f"```text\n{body}\n```")
        else:
            out.append(block.replace("<", "&lt;") if "`" not in block else block)
    return "\n\n".join(out)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("PydanticUndefined", "")


def stale(made: Mapping[Path, str]) -> list[Path]:
    """Pages that are not on disk as they should be, and pages that should not be there."""
    old = [p for p in made if not (DOCS / p).exists() or (DOCS / p).read_text(encoding="utf-8") != made[p]]
    extra = [Path("methods") / f.name for f in (DOCS / "methods").glob("*.md") if Path("methods") / f.name not in made]
    return [*old, *extra]


def main(check: bool) -> int:
    """Write, or check, every page."""
    made = pages()
    for path in stale(made):
        if check:
            print(f"docs/{path} is stale; run: python docs/tools/pages.py", file=sys.stderr)
        elif path in made:
            (DOCS / path).parent.mkdir(exist_ok=True)
            (DOCS / path).write_text(made[path], encoding="utf-8")
        else:
            (DOCS / path).unlink()
    return 1 if check and stale(made) else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))

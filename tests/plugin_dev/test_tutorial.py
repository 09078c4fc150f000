"""docs/write-a-tuner.md and write-a-task.md: their code is that of the real plugins, and the example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune
from petune.plugin_dev.properties import PROPERTIES
from tests.tiny import X, tiny

ROOT = Path(__file__).resolve().parents[2]
TASK_TEXT = (ROOT / "docs" / "write-a-task.md").read_text(encoding="utf-8")
TEXT = (ROOT / "docs" / "write-a-tuner.md").read_text(encoding="utf-8")
FROM_FILES = re.findall(r"<!-- (plugins/\S+) -->\n```\w+\n(.*?)\n```\n", TEXT, re.DOTALL)
EXAMPLES = re.findall(r"(?<!-->\n)```python\n(.*?)\n```\n", TEXT, re.DOTALL)


def without_blank_lines(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", text).strip()


def test_all_code_blocks_are_found() -> None:
    assert len(FROM_FILES) >= 8
    assert len(EXAMPLES) == 5
    assert TEXT.count("```python") + TEXT.count("```toml") == len(FROM_FILES) + len(EXAMPLES)


@pytest.mark.parametrize("file", sorted({name for name, _ in FROM_FILES}))
def test_code_blocks_add_up_to_the_file(file: str) -> None:
    blocks = [block for name, block in FROM_FILES if name == file]
    assert without_blank_lines("\n".join(blocks)) == without_blank_lines((ROOT / file).read_text(encoding="utf-8"))


def test_the_code_on_the_page_of_tasks_is_in_the_plugin() -> None:
    blocks = re.findall(r"<!-- (plugins/\S+) -->\n```\w+\n(.*?)\n```\n", TASK_TEXT, re.DOTALL)
    assert len(blocks) == 6
    for file, block in blocks:
        assert block in (ROOT / file).read_text(encoding="utf-8")


def test_the_plugin_stays_short() -> None:
    code = (ROOT / "plugins/petune-ssf/petune_ssf.py").read_text(encoding="utf-8")
    without_docs = re.sub(r'"""(.*?)"""', "", code, flags=re.DOTALL)
    assert sum(bool(line.strip()) for line in without_docs.splitlines()) <= 45


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "write-a-tuner.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == len(PROPERTIES)


def test_the_tuner_that_chooses_its_sites_follows_the_formula_and_is_saved(tmp_path: Path) -> None:
    code = next(example for example in EXAMPLES if "class ChosenSites" in example).partition("\nfor name in")[0]
    scope: dict[str, Any] = {"__name__": "chosen"}
    exec(compile(code, "write-a-tuner.md", "exec"), scope)
    model, base = tiny(depth=3), tiny(depth=3)
    att = petune.attach(model, scope["ChosenSites"](num_adapters=2), train_head=False)
    x, y = X, torch.tensor([0, 1])
    att.calibrate([(x, y)])
    assert att.counts.tuned == 2 * 2 * 4 * 24
    pool, slots = att.tuner.pool, [int(place.slot) for place in att.tuner.places]
    assert sorted(slots) == [-1, 0, 1]
    nn.init.normal_(pool[0].up.weight)
    nn.init.normal_(pool[1].up.weight)
    for block, slot in zip(base.blocks, slots, strict=True):
        if slot >= 0:
            block.mlp.register_forward_hook(lambda m, args, out, adapter=pool[slot]: out + adapter(args[0]))
    torch.testing.assert_close(model(x), base(x))
    att.save(tmp_path / "adapter")
    loaded = petune.load(tiny(depth=3), tmp_path / "adapter", tuner=scope["ChosenSites"](num_adapters=2))
    assert torch.equal(loaded.model(x), model(x))


def test_every_property_is_explained() -> None:
    table = TEXT.partition("| property |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([a-z].*?) \| (.*?) \|", table, re.MULTILINE)
    assert rows == [(prop.name, prop.requirement) for prop in PROPERTIES]


def test_every_verb_is_explained() -> None:
    verbs = [name for name in dir(petune.Edit) if not name.startswith("_")]
    assert [verb for verb in verbs if f"edit.{verb}(" not in TEXT] == []

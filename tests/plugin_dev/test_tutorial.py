"""docs/write-a-tuner.md and write-a-task.md: their code is that of the real plugins, and the example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import petune
from petune.plugin_dev.properties import PROPERTIES

ROOT = Path(__file__).resolve().parents[2]
TASK_TEXT = (ROOT / "docs" / "write-a-task.md").read_text(encoding="utf-8")
TEXT = (ROOT / "docs" / "write-a-tuner.md").read_text(encoding="utf-8")
FROM_FILES = re.findall(r"<!-- (plugins/\S+) -->\n```\w+\n(.*?)\n```\n", TEXT, re.DOTALL)
EXAMPLES = re.findall(r"(?<!-->\n)```python\n(.*?)\n```\n", TEXT, re.DOTALL)


def without_blank_lines(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", text).strip()


def test_all_code_blocks_are_found() -> None:
    assert len(FROM_FILES) >= 8
    assert len(EXAMPLES) == 1
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


def test_every_property_is_explained() -> None:
    table = TEXT.partition("| property |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([a-z].*?) \| (.*?) \|", table, re.MULTILINE)
    assert rows == [(prop.name, prop.requirement) for prop in PROPERTIES]


def test_every_verb_is_explained() -> None:
    verbs = [name for name in dir(petune.Edit) if not name.startswith("_")]
    assert [verb for verb in verbs if f"edit.{verb}(" not in TEXT] == []

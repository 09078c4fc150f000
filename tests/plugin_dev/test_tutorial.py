"""docs/write-a-tuner.md shows the real plugin: its blocks are equal to the files, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petune.plugin_dev.contract import PROPERTIES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "write-a-tuner.md").read_text(encoding="utf-8")
CUT = re.findall(r"<!-- (plugins/\S+) -->\n```\w+\n(.*?)\n```\n", TEXT, re.DOTALL)
RUN = re.findall(r"(?<!-->\n)```python\n(.*?)\n```\n", TEXT, re.DOTALL)


def squeezed(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", text).strip()


def test_blocks_are_found() -> None:
    assert len(CUT) >= 8
    assert len(RUN) == 1
    assert TEXT.count("```python") + TEXT.count("```toml") == len(CUT) + len(RUN)


@pytest.mark.parametrize("file", sorted({name for name, _ in CUT}))
def test_blocks_are_the_file(file: str) -> None:
    blocks = [block for name, block in CUT if name == file]
    assert squeezed("\n".join(blocks)) == squeezed((ROOT / file).read_text(encoding="utf-8"))


def test_the_plugin_is_as_short_as_it_says() -> None:
    code = (ROOT / "plugins/petune-ssf/petune_ssf.py").read_text(encoding="utf-8")
    without_docs = re.sub(r'"""(.*?)"""', "", code, flags=re.DOTALL)
    assert sum(bool(line.strip()) for line in without_docs.splitlines()) <= 45


@pytest.mark.parametrize("code", RUN)
def test_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "write-a-tuner.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == len(PROPERTIES)


def test_every_property_is_explained() -> None:
    table = TEXT.partition("| property |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([a-z].*?) \|", table, re.MULTILINE) == [name for name, _ in PROPERTIES]

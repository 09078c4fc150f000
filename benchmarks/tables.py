"""Write the tables of README.md and benchmarks/README.md from the committed results, or check that they are fresh.

python benchmarks/tables.py           # rewrites what stands between <!-- results:begin --> and <!-- results:end -->
python benchmarks/tables.py --check   # exit code 1 where a page is stale; `make test` runs this
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from petune.report import COLUMNS, cells

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN_IN_README = ("method", "tuned", "% of backbone", "adapter", "top-1", "top-5")


def comparisons() -> dict[str, dict[str, Any]]:
    """Every committed comparison by the name of its directory."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/compare.json"))}


def table(comparison: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    """The comparison as a Markdown table of some of its columns."""
    places = [COLUMNS.index(column) for column in columns]
    rows = [[cells(row)[place] for place in places] for row in comparison["rows"]]
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def readme(found: dict[str, dict[str, Any]]) -> str:
    """The first comparison, short, with a link to all of it."""
    if not found:
        return ""
    name, comparison = next(iter(found.items()))
    shared = comparison["config"]["run"]
    seeds = len(comparison["config"]["seeds"])
    lines = [
        f"Measured: {shared['backbone']} on all of {shared['dataset']}, {shared['train']['epochs']} epochs, "
        f"{seeds} seed{'s' if seeds > 1 else ''} "
        f"([command, machine and all columns](benchmarks/README.md#{name.lower()})):",
        "",
        *table(comparison, SHOWN_IN_README),
    ]
    return "\n".join(lines)


def overview(found: dict[str, dict[str, Any]]) -> str:
    """Every comparison with the command that made it, and what NOTE.md beside it says."""
    parts = []
    for name, comparison in found.items():
        words = " ".join(comparison["provenance"]["argv"])
        note = RESULTS / name / "NOTE.md"
        parts += [f"## {name}", "", f"    {words}", "", *table(comparison, COLUMNS), ""]
        parts += [note.read_text(encoding="utf-8").strip(), ""] if note.exists() else []
        parts += [f"Machine and versions: [compare.md](results/{name}/compare.md).", ""]
    return "\n".join(parts).rstrip()


def filled(page: Path, content: str) -> str:
    """The page with `content` between its two markers."""
    text = page.read_text(encoding="utf-8")
    inside = f"<!-- results:begin -->\n{content}\n<!-- results:end -->" if content else (
        "<!-- results:begin -->\n<!-- results:end -->"
    )  # fmt: skip
    new, count = re.subn(r"<!-- results:begin -->.*?<!-- results:end -->", lambda _: inside, text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{page} must have the markers <!-- results:begin --> and <!-- results:end --> once")
    return new


def main(check: bool) -> int:
    """Rewrite, or check, both pages."""
    found = comparisons()
    pages = {ROOT / "README.md": readme(found), ROOT / "benchmarks" / "README.md": overview(found)}
    stale = [page for page, content in pages.items() if filled(page, content) != page.read_text(encoding="utf-8")]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is stale; run: python benchmarks/tables.py", file=sys.stderr)
        else:
            page.write_text(filled(page, pages[page]), encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))

"""Write the tables of README.md and docs/ from the committed results, or check that they are fresh.

python benchmarks/tables.py           # rewrites what stands between <!-- results:begin --> and <!-- results:end -->
python benchmarks/tables.py --check   # exit code 1 where a page is stale; `make test` runs this
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from suite import SUITES, Check, Suite, checks_of, difference, read_suite

from petune.runner.report.tables import COMPARE_COLUMNS, cells, ranked

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOWN_IN_README = ("method", "top-1", "top-5", "tuned", "% of backbone", "adapter")
Found = dict[str, dict[str, Any]]


def comparisons() -> Found:
    """Every committed comparison by the name of its directory."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/compare.json"))}


def suites() -> dict[str, Suite]:
    """Every suite by its name."""
    return {file.stem: read_suite(file.stem) for file in sorted(SUITES.glob("*.yaml"))}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; all but the first column are numbers."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def table(comparison: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    """The comparison as a Markdown table of some of its columns."""
    return markdown_table(columns, [cells(row, columns) for row in ranked(comparison["rows"])])


def readme(found: Found) -> str:
    """The first comparison, short, with a link to all of it."""
    if not found:
        return ""
    name, comparison = next(iter(found.items()))
    shared = comparison["config"]["run"]
    lines = [
        f"Measured: {shared['backbone']} on all of {shared['dataset']}, {shared['train']['epochs']} epochs, "
        f"{seeds(comparison)} "
        f"([command, machine and all columns](docs/results.md#{name.lower()})):",
        "",
        *table(comparison, SHOWN_IN_README),
    ]
    return "\n".join(lines)


def seeds(comparison: dict[str, Any]) -> str:
    """How many seeds, in words; not all of a suite need be run with as many."""
    counts = {len(row["seeds"]) for row in comparison["rows"] if row["status"] == "done"}
    if not counts:
        return "no seed"
    if counts == {1}:
        return "1 seed"
    if len(counts) == 1:
        return f"{counts.pop()} seeds, mean ± standard deviation"
    return f"{min(counts)} to {max(counts)} seeds, mean ± standard deviation" + " (no ±: one seed)" * (1 in counts)


def overview(found: Found, all_suites: dict[str, Suite]) -> str:
    """What each suite expects beside what was measured, then every comparison with all that belongs to it."""
    parts = []
    for name, suite in all_suites.items():
        parts += [f"## Suite {name}", "", suite.about.strip(), "", f"    {suite.command}", ""]
        parts += [*expectations(suite, found), ""]
        pieces = [piece for piece in suite.pieces if piece in found]
        parts += [*side_by_side(pieces, found), ""] if len(pieces) > 1 else []
    for name, comparison in found.items():
        parts += _comparison(name, comparison)
    return "\n".join(parts).rstrip()


def expectations(suite: Suite, found: Found) -> list[str]:
    """Expected, range and measured, a line each; what was not run yet says so."""
    rows = []
    for piece, expected in suite.expected.items():
        checks = checks_of(expected, found.get(piece, {"rows": []}))
        for check, one in zip(checks, expected.values(), strict=True):
            rows.append(
                [piece, f"`{check.what}`", f"{check.expected:g}", f"{check.low:g} to {check.high:g}", *_verdict(check),
                 one.source]
            )  # fmt: skip
    return markdown_table(("piece", "top-1 of", "expected", "range", "measured", "", "expected from"), rows)


def side_by_side(pieces: Sequence[str], found: Found) -> list[str]:
    """Top-1 of each method in several comparisons."""
    by_piece = {piece: {row["method"]: cells(row, ["top-1"])[0] for row in found[piece]["rows"]} for piece in pieces}
    methods = dict.fromkeys(method for rows in by_piece.values() for method in rows)
    rows = [[f"`{m}`", *(by_piece[piece].get(m, "–") for piece in pieces)] for m in methods]
    return markdown_table(("top-1", *pieces), rows)


def speed() -> str:
    """What is to be said of speed, and what benchmarks/speed.py wrote on each machine."""
    texts = [(RESULTS / "speed" / "NOTE.md").read_text(encoding="utf-8").strip(), ""]
    for place in sorted(RESULTS.glob("speed*")):
        device = json.loads((place / "speed.json").read_text(encoding="utf-8"))["provenance"]["device"]
        _, text = (place / "speed.md").read_text(encoding="utf-8").split("# Speed\n\n")
        texts += [f"### {device}", "", text]
    return "\n".join(texts)


def near_full(comparison: dict[str, Any]) -> str:
    """Which method comes within a point of full fine-tuning with the fewest trained parameters; empty without full."""
    rows = [row for row in comparison["rows"] if row["status"] == "done"]
    full = next((row for row in rows if row["method"] == "full"), None)
    others = [(difference(full, row), row) for row in rows if row is not full] if full else []
    gaps = [(gap, row) for gap, row in others if gap is not None]
    if full is None or not gaps:
        return ""
    near = [(gap, row) for gap, row in gaps if gap <= 1]
    if not near:
        gap, best = min(gaps, key=lambda one: one[0])
        return (
            f"No method comes within a point of full fine-tuning ({full['top1_mean']:.2f}); the nearest, "
            f"`{best['method']}`, lacks {gap:.2f} on the seeds of both."
        )
    gap, least = min(near, key=lambda one: one[1]["percent_of_backbone"])
    return (
        f"Not more than a point below full fine-tuning ({full['top1_mean']:.2f}) on the seeds of both, with the fewest "
        f"trained parameters: `{least['method']}`, {abs(gap):.2f} {'below' if gap > 0 else 'above'} with "
        f"{least['percent_of_backbone']:.2f} %."
    )


def rates(record: dict[str, Any]) -> list[str]:
    """Which rates were tried for each method, with top-1 on val; the chosen one in bold."""
    lines = []
    for method, rate in record.get("rates", {}).items():
        tried = [
            f"**{lr} {val:.2f}**" if float(lr) == rate["lr"] else f"{lr} {'failed' if val is None else f'{val:.2f}'}"
            for lr, val in rate["tried"].items()
        ]
        lines.append(f"- `{method}`: {', '.join(tried)}{'; at the edge of what was tried' if rate['edge'] else ''}")
    return ["Rates tried, with top-1 on val:", "", *lines, ""] if lines else []


def _verdict(check: Check) -> tuple[str, str]:
    if check.value is None:
        return "–", "not run"
    return f"{check.value:.2f}", "in range" if check.good else "**out of range**"


def _comparison(name: str, comparison: dict[str, Any]) -> list[str]:
    note, record, where = RESULTS / name / "NOTE.md", RESULTS / name / "suite.json", f"../benchmarks/results/{name}"
    shared, origin = comparison["config"]["run"], comparison["provenance"]
    suite = json.loads(record.read_text()) if record.exists() else {}
    lines = [
        f"## {name}",
        "",
        f"    {suite.get('command') or ' '.join(origin['argv'])}",
        "",
        f"`{shared['backbone']}`, weights `{comparison['weights']}`, on `{shared['dataset']}`; "
        f"{shared['train']['epochs']} epochs; {seeds(comparison)}.",
        "",
        *table(comparison, COMPARE_COLUMNS),
        "",
        f"![top-1 over trained parameters]({where}/compare.svg)",
        "",
    ]
    lines += [near_full(comparison), ""] if near_full(comparison) else []
    lines += rates(suite)
    lines += [note.read_text(encoding="utf-8").strip(), ""] if note.exists() else []
    return [
        *lines,
        f"Measured at {commits(comparison)}; machine and versions: [compare.md]({where}/compare.md).",
        "",
    ]


def commits(comparison: dict[str, Any]) -> str:
    """The commits that the runs were done at, in words."""
    origins = [one["provenance"] for one in (comparison.get("origins") or [comparison])]
    names = list(dict.fromkeys(one["git"]["commit"][:7] + "+" * one["git"]["dirty"] for one in origins))
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


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
    """Rewrite, or check, the pages."""
    found, docs = comparisons(), ROOT / "docs"
    pages = {
        ROOT / "README.md": readme(found),
        docs / "results.md": overview(found, suites()),
        docs / "speed.md": speed(),
    }
    stale = [page for page, content in pages.items() if filled(page, content) != page.read_text(encoding="utf-8")]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is stale; run: python benchmarks/tables.py", file=sys.stderr)
        else:
            page.write_text(filled(page, pages[page]), encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))

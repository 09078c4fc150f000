"""Write the tables and figures of the committed results, or check that they are up to date.

python benchmarks/tables.py           # results/*/compare.md and compare.svg, and the tables of README.md and docs/
python benchmarks/tables.py --check   # exit code 1 if a page is out of date; `make test` runs this
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import any_task_page
import averaging_page
import fidelity_page
import gpu_page
import mini_vtab_page
import seed_on_gpu_page
from page_section import with_section
from result_files import read_measured
from suite import SUITES, Check, Suite, checks_of, difference, read_suite

from petune.base.files import replace_file
from petune.runner.comparison import Comparison
from petune.runner.report.tables import (
    UNKNOWN,
    cells,
    compare_columns,
    comparison_page,
    method_columns,
    metrics_of,
    ranked,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README_COMPARISON = "cifar-small"
README_COLUMNS = ("method", "top-1", "top-5", "tuned", "% of backbone", "adapter")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
Results = Mapping[str, dict[str, Any]]
"""Comparisons as plain data, by the name of their directory."""


def read_results() -> dict[str, dict[str, Any]]:
    """Read every committed comparison."""
    directories = sorted(file.parent for file in RESULTS.glob("*/compare.json"))
    return {directory.name: Comparison.read(directory).model_dump(mode="json") for directory in directories}


def read_suites() -> dict[str, Suite]:
    """Read every suite, by its name."""
    return {file.stem: read_suite(file.stem) for file in sorted(SUITES.glob("*.yaml"))}


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first one are numbers."""
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def methods_table(comparison: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return some columns of a comparison as a Markdown table, the best method first."""
    metrics = metrics_of(comparison)
    chosen = {name: text for name, text in method_columns(metrics).items() if name in columns}
    return markdown_table(list(chosen), [cells(row, chosen) for row in ranked(comparison["rows"], metrics)])


def readme(results: Results) -> str:
    """Return the comparison of the README in a few columns, with a link to the rest."""
    comparison = results.get(README_COMPARISON)
    if comparison is None:
        return ""
    run = comparison["config"]["run"]
    lines = [
        f"Measured: {run['backbone']} on all of {run['dataset']}, {run['train']['epochs']} epochs, "
        f"{describe_seeds(comparison)} "
        f"([command, machine and all columns](docs/results.md#{README_COMPARISON})):",
        "",
        *methods_table(comparison, README_COLUMNS),
    ]
    return "\n".join(lines)


def describe_seeds(comparison: Mapping[str, Any]) -> str:
    """Say how many seeds there are; methods can have different numbers of them."""
    counts = {len(row["seeds"]) for row in comparison["rows"] if row["status"] == "done"}
    if not counts:
        return "no seed"
    if counts == {1}:
        return "1 seed"
    if len(counts) == 1:
        return f"{counts.pop()} seeds, mean ± standard deviation"
    return f"{min(counts)} to {max(counts)} seeds, mean ± standard deviation" + " (no ±: one seed)" * (1 in counts)


def overview(results: Results, suites: Mapping[str, Suite]) -> str:
    """Return expected and measured numbers of each suite, then every comparison."""
    parts = []
    for name, suite in suites.items():
        parts += [f"## Suite {name}", "", suite.about.strip(), "", f"    {suite.command}", ""]
        parts += [*expectations(suite, results), ""]
        parts += seed_on_gpu_page.section() if name == seed_on_gpu_page.SUITE else []
        pieces = [piece for piece in suite.pieces if piece in results]
        if name == mini_vtab_page.SUITE:
            parts += mini_vtab_page.section(list(suite.pieces), results)
        else:
            parts += [*side_by_side(pieces, results), ""] if len(pieces) > 1 else []
    parts += averaging_page.section()
    for name, comparison in results.items():
        parts += _comparison_section(name, comparison)
    return "\n".join(parts).rstrip()


def expectations(suite: Suite, results: Results) -> list[str]:
    """Return a table of expected value, range and measured value."""
    rows = []
    for piece, expected in suite.expected.items():
        checks = checks_of(expected, results.get(piece, {"rows": []}))
        for check, expectation in zip(checks, expected.values(), strict=True):
            measured, verdict = _verdict(check)
            value_range = f"{check.low:g} to {check.high:g}"
            rows.append(
                [piece, f"`{check.what}`", f"{check.expected:g}", value_range, measured, verdict, expectation.source]
            )
    return markdown_table(("piece", "top-1 of", "expected", "range", "measured", "", "expected from"), rows)


def side_by_side(pieces: Sequence[str], results: Results) -> list[str]:
    """Return top-1 of each method in several comparisons; in the order of the first one, the best method first."""
    by_piece = {}
    for piece in pieces:
        metrics = metrics_of(results[piece])
        top1 = {metrics[0].label: method_columns(metrics)[metrics[0].label]}
        by_piece[piece] = {row["method"]: cells(row, top1)[0] for row in ranked(results[piece]["rows"], metrics)}
    methods = dict.fromkeys(method for rows in by_piece.values() for method in rows)
    rows = [[f"`{m}`", *(by_piece[piece].get(m, UNKNOWN) for piece in pieces)] for m in methods]
    return markdown_table(("top-1", *pieces), rows)


def speed() -> str:
    """Return the note on speed, and what benchmarks/speed.py wrote on each machine."""
    texts = [(RESULTS / "speed" / "NOTE.md").read_text(encoding="utf-8").strip(), ""]
    for directory in sorted(RESULTS.glob("speed*")):
        device = read_measured(directory / "speed.json")["provenance"]["device"]
        _, text = (directory / "speed.md").read_text(encoding="utf-8").split("# Speed\n\n")
        texts += [f"### {device}", "", text]
    texts += [gpu_page.section()]
    return "\n".join(texts)


def near_full(comparison: Mapping[str, Any]) -> str:
    """Name the method within a point of full fine-tuning that trains fewest parameters; empty without `full`."""
    rows = [row for row in comparison["rows"] if row["status"] == "done"]
    full = next((row for row in rows if row["method"] == "full"), None)
    others = [(difference(full, row), row) for row in rows if row is not full] if full else []
    gaps = [(gap, row) for gap, row in others if gap is not None]
    if full is None or not gaps:
        return ""
    near = [(gap, row) for gap, row in gaps if gap <= 1]
    if not near:
        gap, best = min(gaps, key=lambda pair: pair[0])
        return (
            f"No method comes within a point of full fine-tuning ({full['mean']['top1']:.2f}). The nearest is "
            f"`{best['method']}`, {gap:.2f} below it on the seeds that both have."
        )
    gap, smallest = min(near, key=lambda pair: pair[1]["percent_of_backbone"])
    return (
        f"Within a point of full fine-tuning ({full['mean']['top1']:.2f}) with the fewest trained parameters: "
        f"`{smallest['method']}`, {abs(gap):.2f} {'below' if gap > 0 else 'above'} it on the seeds that both have, "
        f"with {smallest['percent_of_backbone']:.2f} % trained."
    )


def rates(record: Mapping[str, Any]) -> list[str]:
    """Return the learning rates tried for each method with their top-1 on val, the chosen one in bold."""
    lines = []
    for method, rate in record.get("rates", {}).items():
        tried = [_rate(lr, val, float(lr) == rate["lr"]) for lr, val in rate["tried"].items()]
        edge = " (the edge of the grid)" if rate["edge"] else ""
        lines.append(f"- `{method}`: {', '.join(tried)}{edge}")
    return ["Learning rates tried, with top-1 on val; the chosen one is bold:", "", *lines, ""] if lines else []


def _rate(lr: str, val: float | None, chosen: bool) -> str:
    text = f"{lr} failed" if val is None else f"{lr} {val:.2f}"
    return f"**{text}**" if chosen else text


def _verdict(check: Check) -> tuple[str, str]:
    if check.value is None:
        return UNKNOWN, "not run"
    return f"{check.value:.2f}", "in range" if check.good else "**out of range**"


def _comparison_section(name: str, comparison: Mapping[str, Any]) -> list[str]:
    directory, link = RESULTS / name, f"../benchmarks/results/{name}"
    note_file, record_file = directory / "NOTE.md", directory / "suite.json"
    run = comparison["config"]["run"]
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    lines = [
        f"## {name}",
        "",
        f"    {record.get('command') or ' '.join(comparison['provenance']['argv'])}",
        "",
        f"`{run['backbone']}`, weights `{comparison['weights']}`, on `{run['dataset']}`; "
        f"{run['train']['epochs']} epochs; {describe_seeds(comparison)}.",
        "",
        *methods_table(comparison, list(compare_columns(metrics_of(comparison)))),
        "",
        f"![top-1 over trained parameters]({link}/compare.svg)",
        "",
    ]
    if nearest := near_full(comparison):
        lines += [nearest, ""]
    lines += rates(record)
    if note_file.exists():
        lines += [note_file.read_text(encoding="utf-8").strip(), ""]
    lines += [f"Measured at {commits(comparison)}. Machine and versions: [compare.md]({link}/compare.md).", ""]
    return lines


def commits(comparison: Mapping[str, Any]) -> str:
    """List the commits at which the runs were done."""
    git = [origin["provenance"]["git"] for origin in (comparison.get("origins") or [comparison])]
    names = list(dict.fromkeys(state["commit"][:7] + "+" * state["dirty"] for state in git))
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


def filled(page: Path, content: str) -> str:
    """Return the text of a page with `content` between its two markers."""
    return with_section(page, BEGIN, END, f"\n{content}\n" if content else "\n")


def pages() -> dict[Path, str]:
    """Return the text that each page should have."""
    results, docs = read_results(), ROOT / "docs"
    texts = {RESULTS / name / "compare.md": comparison_page(comparison) for name, comparison in results.items()}
    texts[ROOT / "README.md"] = filled(ROOT / "README.md", readme(results))
    texts[docs / "results.md"] = filled(docs / "results.md", overview(results, read_suites()))
    texts[docs / "tasks.md"] = filled(docs / "tasks.md", any_task_page.section())
    texts[fidelity_page.PAGE] = fidelity_page.page()
    texts[docs / "speed.md"] = filled(docs / "speed.md", speed())
    return texts


def main(check: bool) -> int:
    """Write the pages and figures, or check the pages."""
    outdated = {page: text for page, text in pages().items() if page.read_text(encoding="utf-8") != text}
    if check:
        for page in outdated:
            print(f"{page.relative_to(ROOT)} is out of date. Run: python benchmarks/tables.py", file=sys.stderr)
        return 1 if outdated else 0
    for name in read_results():
        Comparison.read(RESULTS / name).write_pages(RESULTS / name)
    mini_vtab_page.write_figure(list(read_suite(mini_vtab_page.SUITE).pieces), read_results())
    for page, text in outdated.items():
        replace_file(page, text.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))

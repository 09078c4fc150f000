"""The notebook in docs/ runs in a real kernel; results are shown as tables, with escaped names."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from petune.base.metric import Metric
from petune.base.text import html_table
from petune.runner.compare_config import CompareConfig
from petune.runner.comparison import Comparison, Row
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.serving.evaluation import compute_metrics

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
EVIL = "<img src=x onerror=alert(1)>\u202e"


TOP1 = Metric(name="top1", label="top-1", percent=True)


class Tags(HTMLParser):
    """Collect the HTML tags of a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)


TABLE = {"table", "thead", "tbody", "tr", "th", "td", "caption"}


@pytest.mark.exhaustive
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Jupyter's packages
        import nbformat
        from nbclient import NotebookClient

        monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [out["data"] for cell in code for out in cell.outputs if "data" in out]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert len(tables) == 3
    assert "top-1 on test" in tables[0]
    assert "adaptformer" in tables[1]
    assert "ClassProbability(name=" in shown[-1]["text/plain"]
    assert (tmp_path / "runs" / "two" / "compare.json").is_file()


def test_a_result_is_a_table_with_escaped_names(digits_result: RunResult) -> None:
    html = digits_result.model_copy(update={"method": EVIL, "output": "a & b"})._repr_html_()
    assert Tags(html).seen <= TABLE
    assert "&lt;img" in html
    assert "a &amp; b" in html
    assert "\u202e" not in html
    assert html.count("<tr>") == len(digits_result.facts())


def test_a_comparison_is_a_table_with_escaped_names() -> None:
    rows = (Row(method=EVIL, status="failed", reason=f"because {EVIL}"),)
    config = CompareConfig(methods=("linear",), run=RunConfig(dataset=f"folder:{EVIL}"))
    html = Comparison(
        task="classification",
        metric_info=(TOP1,),
        config=config,
        rows=rows,
        backbone="b",
        weights=EVIL,
        provenance={},
        output="o",
    )._repr_html_()
    assert Tags(html).seen <= TABLE
    assert html.count("&lt;img") == 4


def test_an_evaluation_is_a_table_with_escaped_names() -> None:
    import torch

    about = {"method": "m", "dataset": EVIL, "split": "test", "source": "s", "precision": "fp32"}
    found = compute_metrics(torch.eye(2), torch.tensor([0, 1]), (EVIL, "b"), **about)
    assert Tags(found._repr_html_()).seen <= TABLE
    assert found._repr_html_().count("&lt;img") == 2


def test_html_table() -> None:
    assert html_table([("a", "1")], ("x", "y"), "c") == (
        "<table>\n<caption>c</caption>\n"
        '<thead><tr><th style="text-align: left">x</th><th style="text-align: right">y</th></tr></thead>\n'
        '<tbody><tr><th style="text-align: left">a</th><td style="text-align: right">1</td></tr></tbody>\n</table>'
    )


@pytest.fixture
def digits_result() -> RunResult:
    """Return a result as a run writes it."""
    numbers = dict.fromkeys(("percent_of_total", "percent_of_backbone", "images_per_s"), 1.0)
    counts = dict.fromkeys(("epoch", "epochs", "tuned", "head", "total", "forward_flops", "adapter_bytes"), 1)
    words = dict.fromkeys(("method", "backbone", "backbone_full_name", "weights", "dataset", "output"), "w")
    more = {"seed": 0, "lr": 0.1, "step_time_s": 1.0, "peak_memory_bytes": 1, "time_s": 1.0}
    metrics = {"task": "classification", "metrics": {"top1": 1.0}, "val_metrics": None}
    info = [{"name": "top1", "label": "top-1", "percent": True}]
    return RunResult.build({**numbers, **counts, **words, **more, **metrics, "metric_info": info, "provenance": {}})

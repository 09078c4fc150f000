"""The model card: the hub reads its head, its examples run, and names from outside are only text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import petune
from petune.adapters.card import public_metadata
from petune.base.text import escape_markdown, hide_folders
from petune.runner.run_adapter import read_run_adapter
from petune.serving.restore import rebuild_backbone
from tests.tiny import X, randomised, tiny

TOP1, TOP5 = ({"name": f"top{k}", "label": f"top-{k}", "percent": True} for k in (1, 5))
MEASURED = {
    "test": {"metrics": {"top1": 81.25, "top5": 99.5}, "num_images": 360},
    "metric_info": [TOP1, TOP5],
    "dataset": "digits",
    "method": "vpt:deep=false",
}


def card(path: Path, tuner: str = "adaptformer", /, **metadata: Any) -> str:
    petune.attach(tiny(), tuner).save(path, metadata=metadata)
    return (path / "README.md").read_text(encoding="utf-8")


def head(text: str) -> dict[str, Any]:
    """The front matter, which the hub's own parser accepts."""
    from huggingface_hub import ModelCard

    block = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    assert block
    parsed: dict[str, Any] = yaml.safe_load(block[1])
    assert ModelCard(text).data.to_dict()["library_name"] == parsed["library_name"]
    return parsed


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def test_the_head_has_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    assert set(head(card(tmp_path / "a"))) == {"library_name", "pipeline_tag", "tags"}
    known = {"backbone": {"hub_id": "timm/vit", "full_name": "vit"}, "license": "mit", **MEASURED, "dataset": "cifar10"}
    front = head(card(tmp_path / "b", **known))
    assert (front["base_model"], front["license"], front["datasets"]) == ("timm/vit", "mit", ["uoft-cs/cifar10"])
    result = front["model-index"][0]["results"][0]
    assert [metric["value"] for metric in result["metrics"]] == [0.8125, 0.995]


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [("apache-2.0", ("apache-2.0", None)), ("dinov3-license", ("other", "dinov3-license")), (None, (None, None))],
)
def test_the_license_of_the_backbone_is_shown(
    recorded: str | None, expected: tuple[str | None, ...], tmp_path: Path
) -> None:
    text = card(tmp_path / "a", backbone={"hub_id": "timm/vit", "full_name": "vit", "license": recorded})
    front = head(text)
    assert (front.get("license"), front.get("license_name")) == expected
    assert ("license of the backbone" in text) == (recorded is not None)


def test_the_metrics_of_metric_info_are_shown(tmp_path: Path) -> None:
    text = card(tmp_path / "a", **{**MEASURED, "metric_info": [TOP1]})
    assert "81.25 %" in text
    assert "top-5" not in text
    mae = {"test": {"metrics": {"mae": 2.5}, "num_images": 3}, "metric_info": [{"name": "mae", "label": "MAE"}]}
    text = card(tmp_path / "b", **mae, dataset="ages", training={"val_metrics": {"mae": 2.25}})
    assert "| MAE on test | 2.5 |" in text
    assert "| MAE on validation, which chose the epoch | 2.25 |" in text
    assert head(text)["model-index"][0]["results"][0]["metrics"] == [{"type": "mae", "name": "MAE", "value": 2.5}]


def test_the_hub_reads_the_results(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    results = ModelCard(card(tmp_path / "a", **MEASURED)).data.eval_results
    assert [(result.dataset_name, result.metric_value) for result in results] == [("digits", 0.8125), ("digits", 0.995)]


@pytest.mark.parametrize(("method", "library"), [("lora", "peft"), ("adaptformer", "petune")])
def test_the_examples_of_a_card_run(method: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny()
    randomised(petune.attach(model, method)).save("adapter")
    tuned = model(X)
    text = Path("adapter/README.md").read_text(encoding="utf-8")
    assert head(text)["library_name"] == library
    own, by_peft = examples(text)
    assert ("register_with_peft" in by_peft) == (library == "petune")
    for code, expected in ((own, "attachment.model"), (by_peft, "tuned")):
        names: dict[str, Any] = {"model": tiny()}
        exec(code, names)
        assert torch.equal(eval(expected, names).eval()(X), tuned)


def test_the_examples_of_a_runs_card_run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("adapter").symlink_to(digits / "adapter")
    Image.new("L", (8, 8), 90).save("image.png")
    text = Path("adapter/README.md").read_text(encoding="utf-8")
    result = json.loads((digits / "result.json").read_text())
    assert f"| top-1 on test | {result['metrics']['top1']:.2f} % |" in text
    assert f"| top-1 on validation, which chose the epoch | {result['val_metrics']['top1']:.2f} % |" in text
    assert f"| trained parameters | {result['tuned']:,} of the method and {result['head']:,} of the classifier:" in text
    whole, own, _ = examples(text)
    names: dict[str, Any] = {}
    exec(whole, names)
    assert capsys.readouterr().out.startswith("image.png (ClassProbability(name='")
    plain = names["predictor"].model
    again = rebuild_backbone(read_run_adapter(digits)).model
    inner: dict[str, Any] = {"model": again}
    exec(own, inner)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(x), plain.cpu()(x))


NASTY = "<script>alert(1)</script> | **x** [y](http://evil.example) `z`\n---\nlicense: evil\u202e\x1b[31m"


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    text = card(tmp_path / "a", classes=[NASTY, "cat"], method=NASTY, license=NASTY, dataset=NASTY,
                backbone={"full_name": NASTY, "weights": NASTY, "hub_id": NASTY}, training={"seed": NASTY},
                test=MEASURED["test"],
                metric_info=[{"name": "top1", "label": NASTY}])  # fmt: skip
    front = head(text)
    assert front["license"].startswith("<script>")
    assert "\n" not in front["license"]
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body
    assert "http://" not in body
    assert not re.search(r"(?<!\\)[*`\[|](?=\*x|y\]|z)", body)
    assert not any(c in text for c in "\u202e\x1b")
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


@pytest.mark.parametrize(
    "odd",
    [
        {"test": "good"},
        {"test": {"metrics": {"top1": None}}},
        {"test": MEASURED["test"], "metric_info": [7]},
        {"classes": 7},
        {"backbone": "vit"},
    ],
)
def test_metadata_of_another_form_is_no_error(odd: dict[str, Any], tmp_path: Path) -> None:
    assert "Results" not in card(tmp_path / "a", **odd)


def test_an_edited_card_is_no_damage(tmp_path: Path) -> None:
    card(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    edited = petune.load(tiny(), tmp_path / "a")
    (tmp_path / "a" / "README.md").unlink()
    model: nn.Module = tiny()
    assert petune.load(model, tmp_path / "a").tuned.keys() == edited.tuned.keys()


def test_markdown_shows_it_as_it_is() -> None:
    assert escape_markdown("a_b\n# <c>") == "a\\_b \\# &lt;c&gt;"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("folder:../clients/acme/pets", "folder:pets"),
        ("folder:clients/pets/", "folder:pets"),
        ("folder:/home/me/pets", "folder:pets"),
        ("hf:../clients/acme", "hf:acme"),
        ("hf:clients/acme/model", "hf:model"),
        ("hf:facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("cifar10", "cifar10"),
        ("table:/home/me/pets.csv,label=breed,root=/home/me/x", "table:pets.csv,label=breed,root=x"),
        ("torchvision:FashionMNIST", "torchvision:FashionMNIST"),
    ],
)
def test_folders_are_taken_out_of_names(name: str, shown: str) -> None:
    assert hide_folders(name) == shown


def test_weights_are_called_by_their_file() -> None:
    weights = {"name": "hf:me/model", "weights": "secret/w.safetensors", "weights_option": "secret/w.safetensors"}
    assert public_metadata({"backbone": weights, "dataset": "folder:secret/pets"}) == {
        "backbone": {"name": "hf:me/model", "weights": "w.safetensors", "weights_option": "w.safetensors"},
        "dataset": "folder:pets",
    }
    assert public_metadata({"backbone": {"weights": "hf:me/model"}}) == {"backbone": {"weights": "hf:me/model"}}


def test_tasks_have_the_hubs_names_and_a_fitting_example(tmp_path: Path) -> None:
    mae = {"test": {"metrics": {"mae": 2.5, "r2": 0.5}, "num_images": 3}, "dataset": "ages"}
    info = [{"name": "mae", "label": "MAE", "higher_is_better": False}, {"name": "r2", "label": "R²"}]
    built = {"backbone": {"name": "x"}, "classes": [], "preprocess": {}}
    number = {"name": "regression", "target": {"kind": "number", "names": ["age", NASTY]}}
    text = card(tmp_path / "a", **mae, **built, metric_info=info, task=number)
    result = head(text)["model-index"][0]["results"][0]
    assert "pipeline_tag" not in head(text)
    assert result["task"] == {"type": "image-regression"}
    assert [metric["type"] for metric in result["metrics"]] == ["mae", "r_squared"]
    assert "| numbers | age, " in text
    assert "<script>" not in text.partition("\n---\n")[2]
    assert "prediction.numbers" in examples(text)[0]
    assert "top_k" not in text
    assert "Trained for regression on ages, 2 numbers." in text
    assert "a classifier of 2 outputs" in text
    labels = {"name": "multi_label", "target": {"kind": "multi_hot", "names": ["a", "b"]}}
    text = card(tmp_path / "b", **built, task=labels)
    assert head(text)["pipeline_tag"] == "image-classification"
    assert "top_k" not in text
    for damaged in ({}, {"target": 3}, {"target": {"kind": "x", "names": 3}}):
        assert head(card(tmp_path / f"c{len(str(damaged))}", **built, task=damaged))["pipeline_tag"]


def test_license_and_citation_of_the_dataset(tmp_path: Path) -> None:
    citation = "@article{x,\n  title = {A *b*}\n}\n```\n<script>"
    text = card(tmp_path / "a", **MEASURED, dataset_license="CC BY 4.0 | *x*", dataset_citation=citation)
    assert "| license of the dataset | CC BY 4.0 \\| \\*x\\* |" in text
    assert text.endswith("```\n@article{x,\n  title = {A *b*}\n}\n'''\n<script>\n```\n")
    assert "itation" not in card(tmp_path / "b", **MEASURED, dataset_citation=3)

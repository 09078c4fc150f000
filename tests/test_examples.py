"""The scripts in examples/ run, offline and without a warning."""

from __future__ import annotations

import base64
import io
import runpy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import petune

FOLDER = Path(__file__).parents[1] / "examples"
SLOW = {"class_incremental", "compare_methods"}
EXAMPLES = sorted(file for file in FOLDER.glob("*.py") if file.stem != "serve")
PRINTED = {
    "class_incremental": "average accuracy ",
    "compare_methods": "adaptformer:bottleneck=16: ",
    "many_adapters": "birds: class ",
    "own_loop": "the same logits",
    "own_tuner": "tuned 384 ",
}


def test_all_examples_are_found() -> None:
    assert [file.stem for file in EXAMPLES] == sorted(PRINTED)


CASES = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.exhaustive] if file.stem in SLOW else []) for file in EXAMPLES
]


@pytest.mark.parametrize("file", CASES)
def test_an_example_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(file), run_name="__main__")
    assert PRINTED[file.stem] in capsys.readouterr().out
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60


def test_the_server_answers_requests(tmp_path: Path) -> None:
    """The server itself runs in benchmarks/serve_load.py."""
    pytest.importorskip("litserve")
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for name in ("served/pets", "cars"):
        attachment = petune.attach(model, "adaptformer")
        attachment.save(tmp_path / name)
        attachment.detach()
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    api = runpy.run_path(str(FOLDER / "serve.py"))["AdapterAPI"](tmp_path / "served", "test_vit", pretrained=False)
    api.setup("cpu")
    asked = [{"adapter": "pets", "image": image}, {"load": str(tmp_path / "cars")}, {"adapter": "x", "image": image}]
    pets, loaded, unknown = api.predict(asked)
    assert len(pets["logits"]) == model.num_classes
    assert loaded == {"adapters": ["pets", "cars"]}
    assert "error" in unknown
    good = {"adapter": "cars", "image": image}
    assert api.predict([good])[0].keys() == {"class", "logits"}
    text = base64.b64encode(b"no image").decode()
    bad = [{"image": "@"}, {"image": text}, {"image": None}, {"load": 5}, {"remove": ["cars"]}, [1], 1, {"adapter": []}]
    first, *errors, last = api.predict([good, *bad, {"image": image}])
    assert first.keys() == last.keys() == {"class", "logits"}
    assert [error.keys() for error in errors] == [{"error"}] * len(bad)
    removed, gone, other = api.predict([{"remove": "cars"}, good, {**good, "adapter": "pets"}])
    assert removed == {"adapters": ["pets"]}
    assert "error" in gone
    assert "logits" in other

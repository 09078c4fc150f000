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
NEEDS = {"hf_trainer": "accelerate"}
"""Packages that examples need and petune does not."""
EXAMPLES = sorted(file for file in FOLDER.glob("*.py") if file.stem != "serve")
PRINTED = {
    "class_incremental": "average accuracy ",
    "compare_methods": "adaptformer:bottleneck=16: ",
    "hf_trainer": "saved 440 tuned parameters",
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
    pytest.importorskip(NEEDS.get(file.stem, "petune"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(file), run_name="__main__")
    assert PRINTED[file.stem] in capsys.readouterr().out
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("method", ["l2sp", "peft:type=adalora,total_step=3,tinit=0,tfinal=1"])
def test_trainer_trains_as_a_loop_does(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(FOLDER / "hf_trainer.py"))
    images = names["Squares"]()
    attachments = []
    for _ in range(2):
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=2))
        attachments.append(petune.attach(model, method))
    one, other = attachments
    options = {"max_steps": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    arguments = TrainingArguments(
        "t", save_strategy="no", use_cpu=True, report_to="none", per_device_train_batch_size=32, **options
    )
    names["AdapterTrainer"](one, args=arguments, train_dataset=images).train()
    x = torch.stack([images[i]["pixel_values"] for i in range(32)])
    optimizer = torch.optim.AdamW(other.param_groups(), lr=0.01)
    other.on_train_start(3)
    other.model.train()
    for step in range(3):
        loss = other.model(x, labels=torch.arange(32) // 16).loss + other.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        other.on_step_end(step)
    with torch.no_grad():
        logits, expected = (att.model.eval()(x).logits for att in attachments)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


def test_the_trainer_of_the_page_is_that_of_the_example() -> None:
    page = (FOLDER.parent / "docs" / "training-loop.md").read_text(encoding="utf-8")
    excerpt = page.partition("<!-- examples/hf_trainer.py -->\n```python\n")[2].partition("\n```")[0]
    assert excerpt
    assert excerpt in (FOLDER / "hf_trainer.py").read_text(encoding="utf-8")


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

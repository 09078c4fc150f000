"""A run on encoded videos, from training to evaluation and prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import petune
from petune.base.errors import DataError
from petune.base.files import write_manifest

pytest.importorskip("av")
from moving_digits import Form, make_clips

VIDEOMAE = {
    "architectures": ["VideoMAEForVideoClassification"], "model_type": "videomae", "image_size": 16, "patch_size": 8,
    "num_frames": 4, "tubelet_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


@pytest.mark.exhaustive
def test_a_run_on_videos_is_evaluated_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    make_clips(tmp_path / "digits", {"train": 32, "test": 8}, Form(side=16, scale=1, step=(1, 2)))
    (tmp_path / "videomae").mkdir()
    (tmp_path / "videomae" / "config.json").write_text(json.dumps(VIDEOMAE))
    dataset, run_dir = f"video:{tmp_path}/digits", tmp_path / "run"
    result = petune.run(
        petune.RunConfig(
            backbone=f"hf:{tmp_path}/videomae", weights="none", dataset=dataset, output=run_dir, val_fraction=0.25,
            train={"epochs": 1, "batch_size": 8, "lr": 0.01},
        )
    )  # fmt: skip
    evaluation = petune.evaluate(run_dir, batch_size=3)
    assert evaluation.metrics["top1"] == pytest.approx(result.top1)
    assert evaluation.num_images == 8
    files = sorted((tmp_path / "digits" / "test").rglob("*.mp4"))
    predictions = petune.predict(run_dir, [str(file) for file in files], top_k=8)
    correct = sum(
        prediction.top[0].name == file.parent.name for prediction, file in zip(predictions, files, strict=True)
    )
    assert evaluation.metrics["top1"] == pytest.approx(100 * correct / 8)
    (tmp_path / "other").mkdir()
    (tmp_path / "digits" / "test").rename(tmp_path / "other" / "test")
    elsewhere = petune.evaluate(run_dir, dataset=f"video:{tmp_path}/other", batch_size=3)
    assert elsewhere.loss == pytest.approx(evaluation.loss, rel=1e-5)
    views = petune.evaluate(run_dir, dataset=f"video:{tmp_path}/other,test_clips=2,test_crops=3", batch_size=8)
    assert views.num_images == 8
    assert views.loss != evaluation.loss
    moved = next((tmp_path / "other").rglob("*.mp4"))
    of_one_clip = petune.predict(run_dir, moved)[0].top[0].probability
    metadata = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    metadata["metadata"]["preprocess"]["views"] = {"clips": 2, "crops": 3}
    (run_dir / "adapter" / "adapter_config.json").write_text(json.dumps(metadata))
    write_manifest(run_dir / "adapter", ["adapter_config.json", "adapter_model.safetensors"])
    assert petune.evaluate(run_dir, dataset=f"video:{tmp_path}/other").loss == pytest.approx(views.loss)
    one = petune.evaluate(run_dir, dataset=f"video:{tmp_path}/other,test_clips=1")
    assert one.loss == pytest.approx(evaluation.loss, rel=1e-5)
    assert petune.predict(run_dir, moved)[0].top[0].probability != of_one_clip
    for wrong in ("frames=8", "sampling=dense"):
        with pytest.raises(DataError, match="Leave"):
            petune.evaluate(run_dir, dataset=f"video:{tmp_path}/other,{wrong}")

"""Several runs that continue one, or share a recipe: what they leave open is filled in before anything is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import petune
from petune.base.errors import ConfigError
from petune.runner.executors import RUN
from petune.runner.executors.worker import WorkerJob, read_answer

TINY: dict[str, Any] = {
    "backbone": "vit_nano", "weights": "none", "image_size": 8, "dataset": "digits", "shots": 4, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 8, "precision": "fp32"}
METHOD = "adaptformer:bottleneck=2"
SEARCH = {"train.lr": (1e-3, 1e-2)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("start") / "run"
    petune.run(method=METHOD, **TINY, train=TRAIN, output=output)
    return output


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two classes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for number in range(12):
            pixels = generator.integers(level - 30, level + 30, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return f"folder:{folder}"


def _continued(start: Path, images: str) -> dict[str, Any]:
    return {"from_run": start, "dataset": images, "device": "cpu", "train": TRAIN}


def test_a_cross_validation_with_a_recipe_or_a_start_resumes(start: Path, images: str, tmp_path: Path) -> None:
    recipe = {**TINY, "shots": None, "dataset": images, "method": METHOD, "recipe": "official", "train": TRAIN}
    for name, options in (("recipe", recipe), ("start", _continued(start, images))):
        first = petune.cross_validate(**options, folds=2, output=tmp_path / name)
        assert petune.cross_validate(**options, folds=2, output=tmp_path / name) == first


@pytest.mark.parametrize("kind", ["recipe", "start"])
def test_a_worker_does_the_run_that_would_be_done_here(kind: str, start: Path, images: str, tmp_path: Path) -> None:
    recipe = {**TINY, "method": METHOD, "recipe": "official", "train": TRAIN}
    options = recipe if kind == "recipe" else _continued(start, images)
    here, there = (petune.RunConfig(**options, output=tmp_path / name, resume=True) for name in ("here", "there"))
    (done,) = petune.run_all([here])
    worked = read_answer(WorkerJob.create(there, 1)(), there)
    assert isinstance(done, petune.RunResult)
    assert isinstance(worked, petune.RunResult)
    assert (worked.method, worked.head, worked.metrics) == (done.method, done.head, done.metrics)
    configs = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("here", "there")]
    assert configs[0] == configs[1]
    assert RUN.read_result(here) == done


def test_a_sweep_and_a_comparison_continue_a_run(start: Path, images: str, tmp_path: Path) -> None:
    options = _continued(start, images)
    swept = petune.sweep(search=SEARCH, run=options, output=tmp_path / "sweep")
    assert [row.state for row in swept.rows] == ["done", "done"]
    assert swept.result is not None
    assert (swept.result.method, swept.result.backbone, swept.result.from_run) == (METHOD, "vit_nano", str(start))
    compared = petune.compare(methods=(METHOD,), run=options, seeds=(0, 1), output=tmp_path / "compare")
    assert (compared.rows[0].status, compared.rows[0].seeds) == ("done", (0, 1))
    assert petune.compare(methods=(METHOD,), run=options, seeds=(0, 1), output=tmp_path / "compare") == compared


def test_each_dataset_of_a_grid_continues_a_run(start: Path, images: str, tmp_path: Path) -> None:
    options = {key: value for key, value in _continued(start, images).items() if key != "dataset"}
    grid = petune.CompareConfig(methods=(METHOD,), datasets=("digits", images), run=options).completed()
    assert grid.completed() == grid
    assert grid.directory.name.startswith("compare-vit_nano-digits")
    assert [grid.on(dataset).run.shots for dataset in grid.datasets] == [4, None]


def test_a_method_other_than_that_of_the_start_is_refused(start: Path, images: str) -> None:
    options = _continued(start, images)
    with pytest.raises(ConfigError, match="adaptformer' there, 'vpt' here"):
        petune.compare(methods=(METHOD, "vpt"), run=options)
    with pytest.raises(ConfigError, match="bottleneck cannot be searched"):
        petune.sweep(search={**SEARCH, "bottleneck": (2, 4)}, run=options)


def test_a_recipe_leaves_the_options_of_a_continued_method(start: Path, images: str, tmp_path: Path) -> None:
    options = _continued(start, images)
    done = petune.run(**options, recipe="video", output=tmp_path / "run")
    assert done.method == METHOD


def test_options_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    run = {**TINY, "train": TRAIN}
    with pytest.raises(ConfigError, match="compare_datasets"):
        petune.compare(methods=("linear",), datasets=("digits",), run=run, output=tmp_path / "compare")
    with pytest.raises(ConfigError, match="final_fit=only"):
        petune.PretrainConfig(**TINY, final_fit="train+val")
    assert [*tmp_path.iterdir()] == []


def test_resume_without_output_continues_the_latest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {**TINY, "method": "linear", "train": {**TRAIN, "epochs": 2}}
    steps: list[int] = []

    class Interrupted(Exception):
        pass

    def watch(event: Any) -> None:
        steps.extend([event.step] if isinstance(event, petune.StepDone) else [])
        if isinstance(event, petune.StepDone) and event.epoch == 1 and len(steps) == event.step:
            raise Interrupted

    with pytest.raises(Interrupted):
        petune.run(**options, watch=watch)
    per_epoch = len(steps) - 1
    steps.append(0)
    resumed = petune.run(**options, resume=True, watch=watch)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(resumed.output).name]
    assert steps[per_epoch + 2] == per_epoch + 1
    assert petune.run(**options, resume=True) == resumed


def test_a_run_on_gray_images_is_continued_on_gray_images(images: str, tmp_path: Path) -> None:
    petune.run(method="linear", **TINY, channels=1, train=TRAIN, output=tmp_path / "gray")
    for dataset in ({}, {"dataset": images}):
        config = petune.RunConfig(from_run=tmp_path / "gray", device="cpu", train=TRAIN, **dataset)
        done = petune.run(config.model_copy(update={"output": tmp_path / f"next{len(dataset)}"}))
        assert done.from_run == str(tmp_path / "gray")

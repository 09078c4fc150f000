"""Clips in training and tests: all frames are mixed alike, and the outputs for several views are averaged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from petune.data.batches import Batch, whole_batch
from petune.data.dataset import Dataset, Split, Target
from petune.data.preprocess import Preprocess
from petune.data.video.clips import Clips, Views
from petune.data.video.sampling import Sampling
from petune.training.config import TrainConfig
from petune.training.evaluate import evaluate, mean_of_views
from petune.training.job import TrainJob
from petune.training.mixup import BatchMixer
from petune.training.stop import StopFlag
from petune.training.task_registry import task_for
from petune.training.tasks.classification import Classification


@pytest.mark.parametrize("options", [{"cutmix": 1.0}, {"mixup": 0.8}])
def test_frames_of_a_clip_are_mixed_as_an_image_is(options: dict[str, float]) -> None:
    task = Classification()
    task.target = Target("class", ("a", "b", "c"))
    images_BCHW = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mixer = BatchMixer(TrainConfig(batch_size=4, **options), task, 4, 0, whole_batch)  # type: ignore[arg-type]
    y_B, positions = torch.tensor([0, 1, 2, 0]), np.arange(4)
    for step in range(3):
        clips = images_BCHW[:, None].repeat(1, 5, 1, 1, 1)
        mixed_BTCHW, target_BC = mixer(Batch(clips, y_B, positions, 4), step)
        mixed_BCHW, expected_BC = mixer(Batch(images_BCHW.clone(), y_B, positions, 4), step)
        assert not torch.equal(mixed_BCHW, images_BCHW)
        assert torch.equal(mixed_BTCHW, mixed_BCHW[:, None].expand_as(clips))
        assert torch.equal(target_BC, expected_BC)


def test_outputs_of_views_are_averaged() -> None:
    outputs = torch.tensor([[1.0, 0], [3, 2], [5, 5], [5, 7]])
    assert mean_of_views(outputs, 2).tolist() == [[2, 1], [5, 6]]
    assert mean_of_views(outputs, 1) is outputs


class Brightness(nn.Module):
    """Returns the mean of a clip as the logit of class b, and counts clips."""

    seen = 0

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        self.seen += len(x_BTCHW)
        mean_B = x_BTCHW.mean((1, 2, 3, 4))
        return torch.stack([torch.zeros_like(mean_B), mean_B], 1)


def test_every_video_is_evaluated_once_in_all_its_views(tmp_path: Path) -> None:
    levels = np.array([[10, 20, 30], [40, 50, 60], [1, 2, 3], [0, 0, 6], [9, 9, 9]], np.uint8)

    def read(row: int, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return levels[row][:, None, None, None, None] + np.zeros((3, len(numbers), 1, 1, 3), np.uint8)

    clips = Clips(np.full(5, 9), Sampling("uniform", 2), 1, read, None, False, Views(2, 3))
    split = Split.of(clips, np.array([1, 1, 1, 0, 0]))
    model, target = Brightness(), Target("class", ("a", "b"))
    job = TrainJob(
        attachment=SimpleNamespace(model=model),  # type: ignore[arg-type]
        task=task_for("classification", target, "toy"),
        dataset=Dataset("toy", target, "made", "none", split, split, split),
        preprocess=Preprocess(1, (0.0,) * 3, (1 / 255,) * 3, 2),
        config=TrainConfig(eval_batch_size=13),  # two videos a batch
        device=torch.device("cpu"),
        directory=tmp_path,
        seed=0,
    )
    metrics = evaluate(job, split, "fp32", stop=StopFlag(), image_values=True)
    assert metrics.num_images == 5
    assert model.seen == 5 * 6
    logits = torch.tensor([[0, mean] for mean in levels.mean(1)], dtype=torch.float32)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 1, 1, 0, 0]))
    assert metrics.loss == pytest.approx(float(expected), rel=1e-6)

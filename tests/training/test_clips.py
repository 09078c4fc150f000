"""Clips in training and tests: all frames are mixed alike, and the outputs for several views are averaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from petune.data.batches import Batch, whole_batch
from petune.data.target import Target
from petune.training.config import TrainConfig
from petune.training.evaluate import mean_of_views
from petune.training.mixup import BatchMixer
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

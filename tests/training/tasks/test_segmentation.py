"""Segmentation: losses of the pixels that count, mIoU of pooled pixels, a head that finds the tokens of any ViT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_canvases import NAMES as ALL_NAMES, write_canvases
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

import petune
from petune.base.errors import AttachError, ConfigError, DataError
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.task_registry import build_task

NAMES = ALL_NAMES[:3]
TARGET = Target("mask", ("a", "b", "c"))


def task_with(options: str = "") -> Any:
    task = build_task(f"segmentation{options}")
    task.bind(TARGET, {})
    return task


def some_pixels() -> tuple[Tensor, Tensor]:
    """Return logits and masks of three images; of the last all pixels are ignored."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (3, 8, 8), generator=generator, dtype=torch.uint8)
    masks[0, :5] = 255
    masks[2] = 255
    return torch.randn(3, 3, 8, 8, generator=generator), masks


def test_the_loss_of_an_image_is_a_mean_over_its_pixels_that_count() -> None:
    outputs, masks = some_pixels()
    loss_B = task_with().loss(outputs, masks)
    expected = [F.cross_entropy(outputs[i : i + 1], masks[i : i + 1].long(), ignore_index=255) for i in (0, 1)]
    torch.testing.assert_close(loss_B, torch.stack([*expected, torch.tensor(0.0)]))
    counted = masks[0] != 255
    probabilities = outputs[0].softmax(0)[:, counted]
    one_hot = F.one_hot(masks[0][counted].long(), 3).T
    dice = 2 * (probabilities * one_hot).sum(1) / (probabilities + one_hot).sum(1)
    torch.testing.assert_close(task_with(":loss=dice").loss(outputs, masks)[0], 1 - dice.mean())
    both = task_with(":loss=ce_dice").loss(outputs, masks)
    torch.testing.assert_close(both, loss_B + task_with(":loss=dice").loss(outputs, masks))
    with pytest.raises(ConfigError, match="add_dense_head"):
        task_with().loss(outputs[:, :, 0, 0], masks)


def test_miou_is_that_of_pooled_pixels() -> None:
    """torchmetrics' segmentation.MeanIoU is a mean over images, and has no ignored value."""
    outputs, masks = some_pixels()
    meter = task_with().new_meter()
    for i in range(3):
        meter.update(outputs[i : i + 1], masks[i : i + 1])
    values = meter.compute()
    jaccard = MulticlassJaccardIndex(3, ignore_index=255)
    assert values["miou"] == pytest.approx(100 * float(jaccard(outputs, masks.long())), rel=1e-5)
    counted = masks != 255
    accuracy = (outputs.argmax(1) == masks)[counted].float().mean()
    assert values["pixel_accuracy"] == pytest.approx(100 * float(accuracy), rel=1e-5)
    assert values["miou"] == pytest.approx(np.mean([values[f"iou/{name}"] for name in TARGET.names]))


def test_a_class_that_is_nowhere_does_not_count() -> None:
    meter = task_with().new_meter()
    outputs = torch.tensor([3.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    meter.update(outputs, torch.tensor([0, 0, 0, 1]).repeat(4, 1)[None])
    values = meter.compute()
    assert values["miou"] == pytest.approx((75 + 0) / 2)
    assert np.isnan(values["iou/c"])


@pytest.mark.parametrize("options", ["", ":loss=dice", ":loss=ce_dice,blocks=[0,2]"])
def test_the_contract_holds(options: str) -> None:
    assert petune.check_task(f"segmentation{options}")


def test_options_and_masks_that_make_no_sense() -> None:
    for options in (":blocks=first", ":blocks=[]", ":blocks=last:0", ":loss=focal"):
        with pytest.raises(ConfigError):
            build_task(f"segmentation{options}")
    ignored = Split.of(np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4), 255, np.uint8))
    with pytest.raises(DataError, match="255"):
        task_with().fit(ignored, TARGET)


def vit(**options: Any) -> Any:
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **{**sizes, **options}).eval()


def swin() -> Any:
    import timm

    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes).eval()


@pytest.mark.parametrize(
    ("make", "blocks", "dim"),
    [(vit, "last:1", 24), (vit, "last:3", 72), (lambda: vit(global_pool="avg"), "last:2", 48), (swin, "last:2", 24)],
)
def test_the_head_reads_the_tokens_of_blocks(make: Any, blocks: str, dim: int) -> None:
    model = make()
    before, keys = petune.find_sites(model), set(model.state_dict())
    petune.add_dense_head(model, 5, blocks=blocks)
    after, (channels, height, width) = petune.find_sites(model), before.input_size
    assert [block.path for block in after.blocks] == [block.path for block in before.blocks]
    assert (after.grid_size, after.num_prefix_tokens) == (before.grid_size, before.num_prefix_tokens)
    assert (after.head.path, after.head.dim) == ("dense_head", dim)
    classifier = {key for key in keys if key.startswith("head.")}
    assert {key for key in model.state_dict() if "dense_head" not in key} == keys - classifier
    x = torch.randn(2, channels, height, width)
    assert model(x).shape == (2, 5, height, width)
    twin = copy.deepcopy(model)
    torch.nn.init.normal_(twin.dense_head.linear.weight)
    assert not torch.equal(twin(x), model(x))


def test_a_pixel_follows_its_patch() -> None:
    """Prefix tokens are dropped, and rows are not mistaken for columns."""
    model = petune.add_dense_head(vit(depth=1), 2)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    x = torch.zeros(1, 3, 16, 16)
    changed = x.clone()
    changed[:, :, 4:8, 12:16] = 3
    difference = (model(changed) - model(x)).abs().sum((0, 1))
    row, column = divmod(int(difference.argmax()), 16)
    assert (row // 4, column // 4) == (1, 3)


def test_adapters_act_before_the_tokens_are_read() -> None:
    """Also those that are attached after the head was added, and prompts are not among the tokens."""
    x = torch.randn(2, 3, 16, 16)
    for method in ("adaptformer", "lora", "vpt"):
        model = petune.add_dense_head(vit(), 2, blocks="last:2")
        torch.nn.init.normal_(model.get_submodule("dense_head.linear").weight)
        before = model(x)
        attachment = petune.attach(model, method)
        for parameter in attachment.tuned.values():
            torch.nn.init.normal_(parameter)
        model.eval()
        assert not torch.allclose(model(x), before, atol=1e-3), method
        model.train()
        model(x).square().sum().backward()
        attachment.check_gradients(under_way=True)
        attachment.detach()
        assert torch.equal(model.eval()(x), before), method


def test_models_that_have_no_grid() -> None:
    import timm

    hiera = timm.create_model("hiera_tiny_224", embed_dim=8, stages=(1, 1, 1, 1), num_heads=1)
    with pytest.raises(ConfigError, match="order of the image"):
        petune.add_dense_head(hiera, 2)
    with pytest.raises(ConfigError, match="grid of patches"):
        petune.add_dense_head(timm.create_model("resnet10t"), 2)
    with pytest.raises(ConfigError, match="last:1 to last:3"):
        petune.add_dense_head(vit(), 2, blocks="last:4")
    model = petune.add_dense_head(vit(), 2)
    with pytest.raises(AttachError, match="head for pixels"):
        petune.add_dense_head(model, 2)


def test_a_run_is_far_better_than_a_constant(tmp_path: Path) -> None:
    dataset = write_canvases(tmp_path / "data", 40)
    train = {"epochs": 5, "batch_size": 8, "augment": "none", "lr": 3e-3}
    result = petune.run(
        method="adaptformer", backbone="vit_nano", dataset=dataset, output=tmp_path / "run", train=train
    )
    assert result.task == "segmentation"
    assert result.metric_info[0].name == "miou"
    masks = petune.load_dataset(dataset, image_size=32).test.targets_at(np.arange(8))
    constant = 100 * float((masks == 0).mean()) / len(NAMES)
    assert result.metrics["miou"] > constant + 20
    assert result.metrics["iou/zero"] > 15


@pytest.mark.parametrize(
    ("side", "options"), [(62, {}), (60, {}), (50, {"dynamic_img_size": True, "dynamic_img_pad": True})]
)
def test_patches_that_are_no_equal_parts_of_the_image_are_refused(side: int, options: dict[str, bool]) -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=side, depth=1, embed_dim=24, num_heads=2, num_classes=3, **options
    )
    with pytest.raises(ConfigError, match="multiple of the patch size"):
        petune.add_dense_head(model, 2)

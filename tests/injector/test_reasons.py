"""A model that a verb cannot edit is refused with what was seen in it, for whoever uses the method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from tests.tiny import tiny


class Custom(petune.Tuner[petune.TunerConfig]):
    """Calls a function with the edit."""

    def __init__(self, change: Callable[[petune.Edit], object]) -> None:
        super().__init__()
        self.change = change

    def attach(self, edit: petune.Edit) -> None:
        self.change(edit)


class Again(nn.Module):
    """What the site computes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.scale * inner(x)


class Pair(nn.Module):
    """Keys and values of two heads of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(1, 2, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys, self.keys


class Refuses(nn.Module):
    """An adapter that says what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        raise petune.AttachError("this adapter needs a grid. Use adaptformer")


def around_norm_and_mlp(edit: petune.Edit) -> None:
    for block in edit.sites.blocks:
        edit.around([block.norm2, block.mlp], Again())


def swin_of_torchvision() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {"patch_size": [4, 4], "embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": [2, 2]}
    return SwinTransformer(**sizes, num_classes=3)


def swin_of_timm() -> nn.Module:
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2,), "num_heads": (2,)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=3)


def pyramid() -> nn.Module:
    sizes = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (1, 1)}
    return timm.models.pvt_v2.PyramidVisionTransformerV2(**sizes, num_classes=3)


def keys_everywhere(edit: petune.Edit) -> None:
    for block in edit.sites.blocks:
        edit.keys_values(block, Pair())


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (pyramid, around_norm_and_mlp, "because it takes feat_size"),
        (swin_of_torchvision, keys_everywhere, "without calling the layer"),
        (swin_of_timm, keys_everywhere, "takes no further keys and values"),
    ],
)
def test_the_reason_is_named(
    make: Callable[[], nn.Module], change: Callable[[petune.Edit], object], message: str
) -> None:
    model = make()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(x)
    with pytest.raises(petune.AttachError, match=message) as caught:
        petune.attach(model, Custom(change), name="custom", input_size=(3, 32, 32))
    assert "input_size" not in str(caught.value)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_what_an_adapter_refuses_is_passed_on() -> None:
    def change(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            edit.stream(block.mid, Refuses())

    with pytest.raises(petune.AttachError, match=r"^this adapter needs a grid. Use adaptformer$"):
        petune.attach(tiny(), Custom(change), name="custom")


class Rows(petune.Tuner[petune.TunerConfig]):
    """Reads what enters a block whose rows are parts of images."""

    def attach(self, edit: petune.Edit) -> None:
        self.block = edit.sites.blocks[0]
        edit.train(self.block.mlp)

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        (batch,) = batches
        (self.mid,), (self.out,) = batch.entering([self.block.mid]), batch.leaving([self.block])


def test_rows_of_an_image_are_read_together() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("mobilevit_xxs", num_classes=3).eval()
    att = petune.attach(copy.deepcopy(plain), Rows(), input_size=(3, 64, 64))
    x = torch.randn(3, 3, 64, 64)
    att.calibrate([(x, torch.tensor([0, 1, 2]))])
    together = att.tuner
    assert (together.mid.ndim, len(together.mid), len(together.out)) == (4, 3, 3)
    other = petune.attach(copy.deepcopy(plain), Rows(), input_size=(3, 64, 64))
    other.calibrate([(x[1:2], torch.tensor([0]))])
    torch.testing.assert_close(other.tuner.mid[0], together.mid[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(other.tuner.out[0], together.out[1], atol=1e-4, rtol=1e-3)

"""Whole models of other libraries: a method acts, is exact when off, saves and loads, or is refused with a reason.

These libraries are not in the development environment; without them the tests are skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.sites.forward import tensors_in

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore"),  # those of the libraries
]
VIT_3D: dict[str, Any] = {"img_size": (32, 32, 32), "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}


def monai(name: str, **options: Any) -> nn.Module:
    pytest.importorskip("einops")
    model: nn.Module = getattr(pytest.importorskip("monai.networks.nets"), name)(in_channels=1, **options)
    return model


def smp(name: str, encoder: str, **options: Any) -> nn.Module:
    library = pytest.importorskip("segmentation_models_pytorch")
    model: nn.Module = getattr(library, name)(encoder_name=encoder, encoder_weights=None, classes=3, **options)
    return model


def open_clip() -> nn.Module:
    library = pytest.importorskip("open_clip.model")
    vision = {"layers": 2, "width": 48, "head_width": 12, "patch_size": 16, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model: nn.Module = library.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    return model


def quantized() -> nn.Module:
    import timm

    torchao = pytest.importorskip("torchao.quantization")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **shape)
    torchao.quantize_(model.blocks, torchao.Int8WeightOnlyConfig())
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


DPT = {"encoder_depth": 4, "encoder_output_indices": [2, 5, 8, 11], "dynamic_img_size": True}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, set[str]]] = {
    "MONAI ViT": (
        lambda: monai("ViT", patch_size=(16,) * 3, classification=True, **VIT_3D), noise(1, 32, 32, 32), set(),
    ),
    "MONAI UNETR": (lambda: monai("UNETR", out_channels=3, feature_size=4, **VIT_3D), noise(1, 32, 32, 32), set()),
    "MONAI SwinUNETR": (
        lambda: monai("SwinUNETR", out_channels=3, feature_size=12, spatial_dims=2), noise(1, 64, 64), {"vpt"},
    ),
    "smp DPT": (lambda: smp("DPT", "tu-vit_tiny_patch16_224", **DPT), noise(3, 64, 64), set()),
    "smp Segformer": (lambda: smp("Segformer", "mit_b0"), noise(3, 64, 64), {"vpt"}),
    "open_clip": (open_clip, (noise(3, 32, 32), torch.arange(1, 17).view(2, 8)), {"vpt"}),
    "open_clip visual": (lambda: open_clip().visual, noise(3, 32, 32), set()),
    "torchao int8": (quantized, noise(3, 32, 32), set()),
}  # fmt: skip
"""By name: how the model is built, what it takes, and the methods that are refused."""


@pytest.mark.parametrize("method", ["adaptformer", "vpt", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_a_method_is_right_or_refused(name: str, method: str, tmp_path: Path) -> None:
    build, example, refused = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    inputs = example if isinstance(example, tuple) else (example,)
    untouched = copy.deepcopy(model)

    @torch.no_grad()
    def outputs_of(model: nn.Module) -> list[Tensor]:
        return list(tensors_in([model(*inputs)]))

    expected = outputs_of(untouched)
    options = {"example": example, "train_head": "open_clip" not in name}
    if method in refused:
        with pytest.raises(petune.AttachError, match="cannot take prompts"):
            petune.attach(model, method, **options)
        return
    att = petune.attach(model, method, **options)
    sum(output.float().square().mean() for output in tensors_in([model(*inputs)])).backward()  # type: ignore[union-attr]
    att.check_gradients()
    with torch.no_grad():
        for parameter in att.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    outputs = outputs_of(model)
    assert not torch.equal(outputs[0], expected[0])
    with att.disabled():
        assert all(map(torch.equal, outputs_of(model), expected))
    att.save(tmp_path)
    loaded = copy.deepcopy(untouched)
    petune.load(loaded, tmp_path)
    assert all(map(torch.equal, outputs_of(loaded), outputs))

"""AdaptFormer and VPT against the written-out formula, and the papers' parameter counts."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.backbones.create import create_backbone
from petune.base.errors import AlreadyCompiled
from tests.tiny import randomised, tiny


def by_hand(model: nn.Module, x: Tensor, method: str, t: dict[str, Tensor]) -> Tensor:
    """Run a forward over timm's blocks, written out from the papers."""
    x = model._pos_embed(model.patch_embed(x))
    for i, b in enumerate(model.blocks):
        key = f"blocks.{i}.petune_{method}.adapter"
        if method == "vpt" and (i == 0 or f"{key}.tokens" in t):
            x = torch.cat([x[:, :1], t[f"{key}.tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
        x = x + b.ls1(b.attn(b.norm1(x)))
        a: Tensor | float = 0.0
        if method == "adaptformer":
            hidden = torch.relu(x @ t[f"{key}.down.weight"].T + t[f"{key}.down.bias"])
            a = 0.1 * (hidden @ t[f"{key}.up.weight"].T + t[f"{key}.up.bias"])
        x = x + b.ls2(b.mlp(b.norm2(x))) + a
        last = i + 1 == len(model.blocks)
        if method == "vpt" and (last or f"blocks.{i + 1}.petune_vpt.adapter.tokens" in t):
            count = t["blocks.0.petune_vpt.adapter.tokens"].shape[1]
            x = torch.cat([x[:, :1], x[:, 1 + count :]], 1)
    return model.head(model.norm(x)[:, 0])


CASES = [("adaptformer", {}), ("vpt", {"num_prompts": 3}), ("vpt", {"num_prompts": 3, "deep": False})]


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_equal_to_the_formula(method: str, options: dict[str, object], layer_scale: float | None) -> None:
    model = tiny(depth=3, init_values=layer_scale, drop_path_rate=0.1)
    att = randomised(petune.attach(model, method, **options))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model, x, method, att.tuned), atol=1e-6, rtol=1e-5)
        with att.disabled():
            assert not torch.allclose(model(x), by_hand(model, x, method, att.tuned), atol=1e-3)


@pytest.mark.exhaustive
def test_parameter_counts_of_vit_base() -> None:
    model = timm.create_model("vit_base_patch16_224", num_classes=10)
    counts = petune.attach(model, "adaptformer", keep_original=False).counts
    assert (counts.tuned, counts.trainable, counts.backbone) == (1_189_632, 1_197_322, 85_798_656)
    assert (round(counts.percent_of_backbone, 3), round(counts.percent_of_total, 3)) == (1.395, 1.376)


@pytest.mark.exhaustive
def test_parameter_counts_of_the_paddle_study() -> None:
    pretrained = create_backbone("vit_paddle_study", weights="none", num_classes=100).model
    left_out = pretrained.pos_embed.numel() + pretrained.cls_token.numel()  # not in the size that the study prints
    assert left_out == 77_568 + 768
    # the adapters exist from pretraining on
    adapted = petune.attach(pretrained, "adaptformer", variant="paddle_study", keep_original=False)
    assert adapted.counts.total == 86_316_400 + left_out
    model = create_backbone("vit_paddle_study", weights="none", num_classes=10).model
    counts = petune.attach(model, "adaptformer", variant="paddle_study", keep_original=False).counts
    assert (counts.tuned, counts.trainable) == (1_189_644, 1_197_334)


def test_a_compiled_model_is_refused() -> None:
    model = torch.compile(tiny(depth=3), backend="eager")
    with pytest.raises(AlreadyCompiled):
        petune.attach(model, "linear")

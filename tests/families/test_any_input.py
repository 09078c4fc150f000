"""Video models, towers and NaFlex of other libraries, tiny and of random weights: tuned, saved, loaded, given back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import nn
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

import petune
from petune.sites.input_spec import Inputs
from petune.sites.logits import logits_of

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VIDEO = {**SMALL, "image_size": 32, "num_labels": 5}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 6}
NAFLEX = {**SMALL, "num_patches": 64, "patch_size": 4}
CLIP = torch.zeros(1, 3, 4, 32, 32)

Model = tuple[nn.Module, Any]


def timesformer(attention: str) -> Model:
    config = transformers.TimesformerConfig(**VIDEO, num_frames=3, patch_size=8, attention_type=attention)
    return transformers.TimesformerForVideoClassification(config), None


def videomae() -> Model:
    config = transformers.VideoMAEConfig(**VIDEO, num_frames=4, patch_size=8)
    return transformers.VideoMAEForVideoClassification(config), None


def vivit() -> Model:
    config = transformers.VivitConfig(**VIDEO, num_frames=4, tubelet_size=[2, 8, 8])
    return transformers.VivitForVideoClassification(config), None


def vjepa2() -> Model:
    sizes = {"crop_size": 32, "frames_per_clip": 4, "patch_size": 8, "num_pooler_layers": 1, "num_labels": 5}
    predictor = {"pred_hidden_size": 36, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    config = transformers.VJEPA2Config(**{**SMALL, "hidden_size": 36}, **sizes, **predictor)
    return transformers.VJEPA2ForVideoClassification(config), None


def patches() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1] * 20, [1] * 16 + [0] * 4])
    sizes = torch.tensor([[4, 5], [4, 4]])
    return {"pixel_values": torch.randn(2, 20, 48), "pixel_attention_mask": mask, "spatial_shapes": sizes}


def siglip2() -> Model:
    return transformers.Siglip2ForImageClassification(
        transformers.Siglip2Config(vision_config=NAFLEX, text_config=TEXT, num_labels=5)
    ), patches()


def siglip2_whole() -> Model:
    config = transformers.Siglip2Config(vision_config=NAFLEX, text_config={**TEXT, "projection_size": 32})
    return transformers.Siglip2Model(config), {"input_ids": torch.randint(0, 50, (2, 6)), **patches()}


def clip() -> Model:
    config = transformers.CLIPConfig(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        text_config={**TEXT, "eos_token_id": 49},
        projection_dim=16,
    )
    ids = torch.tensor([[1, 5, 7, 49, 0, 0], [1, 2, 2, 2, 49, 0]])
    return transformers.CLIPModel(config), {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 32, 32)}


def naflexvit() -> Model:
    config = NaFlexVitCfg(patch_size=8, embed_dim=32, depth=2, num_heads=2, reg_tokens=1)
    coord = torch.cartesian_prod(torch.arange(3), torch.arange(4)).expand(2, -1, -1)
    valid = torch.arange(12) < torch.tensor([[12], [8]])
    example = {"patches": torch.randn(2, 12, 192), "patch_coord": coord, "patch_valid": valid}
    return NaFlexVit(config, num_classes=5, img_size=32), example


def mvit() -> Model:
    one = MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2])
    two = MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1])
    settings: dict[str, Any] = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    return MViT((32, 32), 4, [one, two], **settings, proj_after_attn=True, num_classes=5), CLIP


def swin3d() -> Model:
    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 2], [2, 4, 4], num_classes=5), CLIP


MODELS: dict[str, Callable[[], Model]] = {
    "timesformer divided": lambda: timesformer("divided_space_time"),
    "timesformer joint": lambda: timesformer("joint_space_time"),
    "timesformer space": lambda: timesformer("space_only"),
    **{build.__name__: build for build in (videomae, vivit, vjepa2, siglip2, siglip2_whole, clip)},
    **{build.__name__: build for build in (naflexvit, mvit, swin3d)},
}
NO_PROMPTS = {"timesformer divided", "vjepa2", "mvit", "swin3d"}
"""Models that VPT is refused on, with a reason."""


def outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(inputs.call(model.eval()))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:SwinTransformer3d reads the weights of .* linear layers without calling them")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_inputs_are_tuned_saved_and_given_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh, example = MODELS[name]()
    with torch.no_grad():
        for p in fresh.parameters():  # some start at zero, such as TimeSformer's embedding of time
            p.add_(0.02 * torch.randn_like(p))
    has_head = "head" in petune.find_sites(fresh, example=example).parts
    assert has_head == (name not in {"clip", "siglip2_whole"})
    for method in ("adaptformer", "lora", "vpt", *(["linear"] if has_head else [])):
        model = copy.deepcopy(fresh)
        if method == "vpt" and name in NO_PROMPTS:
            with pytest.raises(petune.AttachError, match=r"cannot take prompts.*Use a method without prompts"):
                petune.attach(model, method, example=example)
            continue
        att = petune.attach(model, method, example=example, train_head=has_head)
        assert len(att.sites.blocks) == 2 + 2 * (not has_head) + 2 * (name == "swin3d")
        inputs = att.sites.input_spec.noise(2)
        before = outputs(fresh, inputs)
        optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
        att.train()
        for step in range(3):
            y = logits_of(inputs.call(model))
            optimizer.zero_grad()
            (y.square().sum() + y.sum() + att.loss(step)).backward()
            nn.utils.clip_grad_norm_(att.parameters(), 1.0)
            optimizer.step()
        att.check_gradients()
        assert not torch.equal(outputs(model, inputs), before), method
        att.save(tmp_path / method)
        loaded = petune.load(copy.deepcopy(fresh), tmp_path / method)
        assert torch.equal(outputs(loaded.model, inputs), outputs(model, inputs)), method
        att.detach()
        assert torch.equal(outputs(model, inputs), before), method

"""Backbones that take clips: video models, and image models that see the frames one by one."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import petune
from petune.backbones.create import Backbone, create_backbone, input_frames, input_side
from petune.backbones.transformers_videos import frames_key
from petune.base.errors import AttachError, ConfigError, UsageError, WeightsUnavailable
from tests.sampling import sampled

SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
PATCHES = {"image_size": 16, "patch_size": 8}
LAYERS = {"num_hidden_layers": 1}
CONFIGS: dict[str, Any] = {
    "videomae": lambda: transformers.VideoMAEConfig(num_frames=4, **SHAPE, **PATCHES, **LAYERS),
    "vivit": lambda: transformers.VivitConfig(num_frames=4, tubelet_size=[2, 8, 8], **SHAPE, **PATCHES, **LAYERS),
    "space": lambda: transformers.TimesformerConfig(
        num_frames=4, attention_type="space_only", **SHAPE, **PATCHES, **LAYERS
    ),
    "vjepa2": lambda: transformers.VJEPA2Config(
        crop_size=16,
        patch_size=8,
        frames_per_clip=4,
        hidden_size=24,
        num_attention_heads=2,
        mlp_ratio=1,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
        **LAYERS,
    ),
    "videoprism": lambda: transformers.VideoPrismVisionConfig(
        num_frames=4, num_spatial_layers=1, num_temporal_layers=1, image_size=16, tubelet_size=[1, 8, 8], **SHAPE
    ),
}


class Conv3dModel(nn.Module):
    """Takes videos with the channels first."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.image_size = 8
        self.patches = nn.Conv3d(3, 16, (1, 4, 4), (1, 4, 4))
        self.block = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        tokens_BND = self.patches(x_BCTHW).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.block(tokens_BND).mean(1))
        return logits


def make_conv3d(num_classes: int) -> nn.Module:
    return Conv3dModel(num_classes)


def saved(kind: str, folder: Path) -> str:
    """Save a model with random weights, and return its name for petune."""
    model = transformers.AutoModelForVideoClassification.from_config(CONFIGS[kind]())
    model.save_pretrained(folder / kind)
    return f"hf:{folder / kind}"


def logits(backbone: Backbone) -> Tensor:
    torch.manual_seed(0)
    assert backbone.num_frames is not None
    with torch.no_grad():
        y: Tensor = backbone.model(torch.randn(2, backbone.num_frames, 3, *[backbone.image_size] * 2))
    return y


@pytest.mark.parametrize("kind", sampled(CONFIGS, {"vjepa2", "space"}.__contains__))
def test_video_models_of_transformers_get_a_head_for_the_classes(kind: str, tmp_path: Path) -> None:
    name = saved(kind, tmp_path)
    assert (input_frames(name, {}), input_side(name, None, {})) == (4, 16)
    backbone = create_backbone(name, num_classes=7, image_size=16, num_frames=4)
    assert backbone.num_frames == 4
    assert logits(backbone).shape == (2, 7)
    raw = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / kind).eval()
    tensors = raw.state_dict()
    same = [torch.equal(t, tensors[key]) for key, t in backbone.model.state_dict().items() if "classifier" not in key]
    assert all(same)
    attachment = petune.attach(backbone.model, "adaptformer:bottleneck=2")
    assert attachment.sites.input_size == (4, 3, 16, 16)
    nn.init.normal_(next(p for key, p in attachment.tuned.items() if key.endswith("up.weight")))
    before = logits(backbone)
    attachment.save(tmp_path / "adapter")
    attachment.detach()
    other = create_backbone(name, num_classes=7)
    petune.load(other.model, tmp_path / "adapter")
    assert torch.equal(logits(other), before)


def test_another_number_of_frames_or_size(tmp_path: Path) -> None:
    videomae, vivit = saved("videomae", tmp_path), saved("vivit", tmp_path)
    assert logits(create_backbone(videomae, num_classes=3, num_frames=6)).shape == (2, 3)  # computed, not learned
    with pytest.raises(ConfigError, match="multiple of 2"):
        create_backbone(videomae, weights="none", num_classes=3, num_frames=5)
    with pytest.raises(WeightsUnavailable, match=r"clips of 4 frames.*resized to 6"):
        create_backbone(vivit, num_classes=3, num_frames=6)
    larger = create_backbone(vivit, num_classes=3, image_size=32).model.get_parameter(
        "vivit.embeddings.position_embeddings"
    )
    own = create_backbone(vivit, num_classes=3).model.get_parameter("vivit.embeddings.position_embeddings")
    assert larger.shape == (1, 1 + 2 * 16, 16)
    torch.testing.assert_close(larger[:, :1], own[:, :1])
    for time in range(2):  # each frame is resized by itself, so that its mean stays near
        slices = larger[0, 1 + 16 * time : 17 + 16 * time], own[0, 1 + 4 * time : 5 + 4 * time]
        torch.testing.assert_close(slices[0].mean(0), slices[1].mean(0), atol=2e-3, rtol=0.1)


def test_statistics_are_those_that_the_processor_computes(tmp_path: Path) -> None:
    name = saved("vivit", tmp_path)
    assert create_backbone(name, num_classes=3).mean is None
    transformers.VivitImageProcessor().save_pretrained(tmp_path / "vivit")  # it scales to -1…1 before it normalizes
    backbone = create_backbone(name, num_classes=3)
    assert (backbone.mean, backbone.std) == (pytest.approx([0.75] * 3), pytest.approx([0.25] * 3))


def test_an_image_model_returns_the_mean_logits_of_the_frames(tmp_path: Path) -> None:
    options = {"depth": 1}
    backbone = create_backbone("vit_nano", weights="none", num_classes=3, num_frames=2, options=options)
    image_model = create_backbone("vit_nano", weights="none", num_classes=3, options=options).model
    clips_BTCHW = torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        mean_BK = torch.stack([image_model(clips_BTCHW[:, time]) for time in range(2)]).mean(0)
        torch.testing.assert_close(backbone.model(clips_BTCHW), mean_BK)
        torch.testing.assert_close(
            backbone.model(x=clips_BTCHW), mean_BK
        )  # by name, as transformers' users call models
        with pytest.raises(ValueError, match=r"\(batch, 2, channels"):
            backbone.model(clips_BTCHW[:, 0])
    petune.attach(backbone.model, "adaptformer").save(tmp_path)
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1, num_classes=3)
    own.load_state_dict(image_model.state_dict())
    petune.load(petune.take_clips(own, 2), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(clips_BTCHW), mean_BK)


def test_channels_are_put_first_where_the_model_wants_them() -> None:
    name = f"{__name__}:make_conv3d"
    backbone = create_backbone(name, weights="none", num_classes=3, num_frames=2)
    clips_BTCHW = torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad():
        expected = backbone.model.forward(clips_BTCHW.transpose(1, 2))
        assert torch.equal(backbone.model(clips_BTCHW), expected)
        named = dict.fromkeys(inspect.signature(backbone.model.forward).parameters, clips_BTCHW)
        assert torch.equal(backbone.model(**named), expected)
    model = Conv3dModel()
    petune.take_clips(model, 3)  # as many frames as channels
    assert len(petune.attach(model, "adaptformer", train_head=False).sites.blocks) == 1
    with torch.no_grad():
        assert not torch.equal(model(torch.eye(3)[None, ..., None, None].repeat(1, 1, 1, 8, 8)), torch.zeros(1, 3))


def test_frames_that_a_model_would_drop_are_refused() -> None:
    config = transformers.VideoMAEConfig(**{**CONFIGS["videomae"]().to_dict(), "num_frames": 5})
    model = transformers.VideoMAEForVideoClassification(config)
    with pytest.raises(AttachError, match="last of 5 frames"):
        petune.take_clips(model, 5)
    assert not any(m._forward_pre_hooks for m in model.modules())
    swin = torchvision.models.video.swin3d_t  # pads clips of any length itself
    with torch.device("meta"):
        assert petune.take_clips(swin(num_classes=2), 3, image_size=32)


def test_a_number_of_frames_alone_makes_no_video_model() -> None:
    """Perceiver's config has one for its model of videos with sound, and builds a classifier of images."""
    assert frames_key(transformers.PerceiverConfig()) is None
    assert all(frames_key(config()) for config in CONFIGS.values())


def test_models_that_take_no_clips_are_refused() -> None:
    with pytest.raises(AttachError, match="takes no clips of 2 frames"):
        petune.take_clips(nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), 2, image_size=8)
    with pytest.raises(UsageError, match="at least 1"):
        petune.take_clips(Conv3dModel(), 0)
    with pytest.raises(ConfigError, match="16 frames of 224×224 only"):
        create_backbone("torchvision:mvit_v2_s", weights="none", num_classes=3, num_frames=8)


def test_batchnorm_goes_before_a_classifier_of_pooled_features_only(tmp_path: Path) -> None:
    backbone = create_backbone(saved("videomae", tmp_path), num_classes=3, head="bn_linear")
    assert logits(backbone).shape == (2, 3)
    assert petune.attach(backbone.model, "linear").counts.head == 16 * 3 + 3
    with pytest.raises(ConfigError, match="a vector for each sample"):
        create_backbone(saved("videoprism", tmp_path), num_classes=3, head="bn_linear")


def test_video_models_of_torchvision_are_found() -> None:
    with torch.device("meta"):
        backbone = create_backbone("torchvision:swin3d_t", weights="none", num_classes=3, image_size=32, num_frames=4)
    assert (backbone.clip_form, backbone.image_size) == ("channels first", 32)
    assert len(petune.find_sites(backbone.model).blocks) == 12


def test_take_clips_again_and_logits_of_one_query() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2)
    clips = torch.randn(2, 8, 3, 16, 16)
    petune.take_clips(model, 4)
    petune.take_clips(copy.deepcopy(model), 8)(clips)
    with pytest.raises(AttachError):
        petune.take_clips(model, 4, image_size=15)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1, "as before the call that failed"
    assert petune.take_clips(model, 8)(clips).shape == (2, 1000)
    prism = transformers.VideoPrismForVideoClassification(CONFIGS["videoprism"]()).eval()
    assert petune.take_clips(prism, 4)(clips[:, :4]).shape == (2, 2)

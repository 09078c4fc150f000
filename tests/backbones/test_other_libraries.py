"""Backbones that are not timm's: torchvision's, transformers' and a user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune
from petune.backbones.create import create_backbone, input_side
from petune.base.errors import ConfigError, MissingExtra, UnknownName, WeightsUnavailable
from tests.fake_hub import running

OWN = """
import timm
from torch import nn

def make(num_classes=7):
    body = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    return nn.Sequential(body, nn.Linear(192, num_classes))

def fixed():
    return make()

def nothing():
    return 3

def in_a_dict(num_classes):
    return {"model": make()}

def in_a_tuple(num_classes):
    return make(), 224

class Wrapper(nn.Module):
    def __init__(self, keys, num_classes):
        super().__init__()
        self.body, self.head = make(num_classes)
        self.keys = keys

    def forward(self, x):
        features = self.body(x)
        values = {"features": features, "logits": self.head(features)}
        return {new: values[old] for old, new in self.keys.items()}

def with_logits(num_classes):
    return Wrapper({"features": "features", "logits": "logits"}, num_classes)

def with_one_tensor(num_classes):
    return Wrapper({"logits": "predictions"}, num_classes)

def with_features_first(num_classes):
    return Wrapper({"features": "features", "logits": "predictions"}, num_classes)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("my_models", None)
    return "my_models"


@pytest.fixture
def dinov2(tmp_path: Path) -> str:
    import transformers

    transformers.logging.set_verbosity_error()
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    transformers.Dinov2Config(**shape).save_pretrained(tmp_path / "dinov2")
    return f"hf:{tmp_path / 'dinov2'}"


@pytest.mark.parametrize("factory", ["make", "fixed"])
def test_a_user_factory(factory: str, own: str) -> None:
    backbone = create_backbone(f"{own}:{factory}", num_classes=5)
    assert (backbone.image_size, backbone.weights) == (32, "none")
    att = petune.attach(backbone.model, "adaptformer", bottleneck=4)
    assert att.counts.head == 192 * 5 + 5
    assert att.counts.tuned == 2 * (2 * 192 * 4 + 4 + 192)
    assert backbone.model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert input_side(f"{own}:{factory}", None, {}) == 32
    assert str(Path.cwd()) not in sys.path


@pytest.mark.parametrize("factory", ["with_logits", "with_one_tensor"])
def test_a_model_that_returns_a_dict_of_logits_works(factory: str, own: str) -> None:
    backbone = create_backbone(f"{own}:{factory}", num_classes=5)
    assert petune.attach(backbone.model, "linear").counts.head == 192 * 5 + 5
    assert backbone.model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("in_a_dict", "returned dict, not an nn.Module"),
        ("in_a_tuple", "returned tuple, not an nn.Module"),
        ("with_features_first", r"instead of logits of shape \(2, 5\)"),
    ],
)
def test_a_factory_without_logits_is_refused(factory: str, message: str, own: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"{own}:{factory}", num_classes=5)


def test_an_invalid_factory(own: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module:factory"):
        create_backbone(f"{own}:missing", num_classes=5)
    with pytest.raises(ConfigError, match="returned int, not"):
        create_backbone(f"{own}:nothing", num_classes=5)
    with pytest.raises(ConfigError, match="No module named 'not_there'"):
        create_backbone("not_there:make", num_classes=5)


def test_transformers_from_a_directory(dinov2: str) -> None:
    import transformers

    transformers.logging.set_verbosity_warning()
    backbone = create_backbone(dinov2, weights="none", num_classes=5)
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    assert transformers.utils.logging.is_progress_bar_enabled()
    att = petune.attach(backbone.model, "vpt", num_prompts=3)
    assert (att.sites.num_prefix_tokens, att.sites.grid_size, len(att.sites.blocks)) == (1, (4, 4), 2)
    assert att.counts.tuned == 2 * 3 * 48
    assert backbone.model(torch.randn(2, 3, 56, 56)).shape == (2, 5)


def test_transformers_weights_are_loaded_or_reported_missing(dinov2: str) -> None:
    with pytest.raises(WeightsUnavailable, match="cannot load hf:"):
        create_backbone(dinov2, num_classes=5)
    saved = create_backbone(dinov2, weights="none", num_classes=5, seed=3).model
    saved.save_pretrained(dinov2.removeprefix("hf:"))
    again = create_backbone(dinov2, num_classes=5, seed=4)
    key = "dinov2.embeddings.cls_token"
    assert torch.equal(again.model.state_dict()[key], saved.state_dict()[key])
    assert again.weights == dinov2


def test_a_model_without_a_classifier_gets_one(tmp_path: Path) -> None:
    import transformers

    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    transformers.DINOv3ViTConfig(**shape, image_size=32, patch_size=8).save_pretrained(tmp_path)
    model = create_backbone(f"hf:{tmp_path}", weights="none", num_classes=5).model
    assert petune.attach(model, "linear").counts.head == 48 * 5 + 5


def test_an_encoder_that_returns_a_map_is_pooled_over_its_positions(tmp_path: Path) -> None:
    """Of a map (B, D, H, W) the mean of a token is over H and W; the width may be the last of several."""
    import transformers

    stages: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 32], "num_attention_heads": [1, 1, 1, 2], "depths": [1] * 4}
    columns = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    configs = {
        "stages": transformers.GLPNConfig(**stages, image_size=64),
        "columns": transformers.VitDetConfig(**columns, image_size=64, pretrain_image_size=64),  # as many rows as D
    }
    x = torch.randn(2, 3, 64, 64)
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
        model = create_backbone(f"hf:{tmp_path / name}", weights="none", num_classes=5).model.eval()
        maps: list[Any] = []
        model.register_forward_hook(lambda m, args, y, maps=maps: maps.append(y), prepend=True)
        logits = model(x)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(logits, model.classifier(maps[0].last_hidden_state.mean((2, 3))))


def test_a_tower_that_has_a_classifier_only_with_its_text_tower_is_built_with_it(tmp_path: Path) -> None:
    import transformers

    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    transformers.MetaClip2Config(vision_config=vision, text_config=tower).save_pretrained(tmp_path / "both")
    backbone = create_backbone(f"hf:{tmp_path / 'both'}", weights="none", num_classes=5, image_size=32)
    assert backbone.model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    transformers.MetaClip2VisionConfig(**vision).save_pretrained(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"MetaClip2VisionConfig.*neither.*my_package\.models:make"):
        create_backbone(f"hf:{tmp_path / 'one'}", weights="none", num_classes=5)


def test_a_model_that_needs_another_package_names_it(tmp_path: Path) -> None:
    import transformers

    if transformers.utils.is_natten_available():
        pytest.skip("natten is installed")
    transformers.DinatConfig(depths=[1], num_heads=[2], embed_dim=8, dilations=[[1]]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="natten"):
        create_backbone(f"hf:{tmp_path}", weights="none", num_classes=5)


def test_the_encoder_of_a_masked_autoencoder_sees_all_patches(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    decoder = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**shape, **decoder, image_size=32, patch_size=8)
    saved = transformers.ViTMAEForPreTraining(config)
    saved.save_pretrained(tmp_path)
    model = create_backbone(f"hf:{tmp_path}", num_classes=5).model.eval()
    x = torch.randn(2, 3, 32, 32)
    saved.config.mask_ratio = 0.0
    tokens = saved.vit.eval()(x)
    seen = tokens.last_hidden_state[:, 1:].gather(1, tokens.ids_restore[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(model.vit(x).last_hidden_state[:, 1:], seen, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), model(x))


def test_torchvision() -> None:
    backbone = create_backbone("torchvision:resnet18", weights="none", num_classes=5)
    assert backbone.image_size == 224
    assert petune.attach(backbone.model, "linear").counts.head == 512 * 5 + 5
    with pytest.raises(UnknownName, match="Did you mean vit_b_16"):
        create_backbone("torchvision:vit_b_17", weights="none", num_classes=5)
    model: Any = create_backbone("torchvision:resnet18", weights="none", num_classes=5, head="bn_linear").model
    assert isinstance(model.fc[0], nn.BatchNorm1d)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r'pip install "petune\[transformers\]"'):
        create_backbone("hf:facebook/dinov2-small", weights="none", num_classes=5)


def test_a_classifier_is_replaced_in_place() -> None:
    from petune.backbones.head import set_head

    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model.image_size = 8
    set_head(model, 6)
    assert model[3].out_features == 6
    assert not model[3].bias.any()


@pytest.fixture
def saved_vit(tmp_path: Path) -> str:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.ViTForImageClassification(
        transformers.ViTConfig(**shape, image_size=16, patch_size=8)
    ).save_pretrained(tmp_path / "vit")
    return f"hf:{tmp_path / 'vit'}"


def test_position_embeddings_of_another_size_are_resampled(saved_vit: str) -> None:
    from timm.layers import resample_abs_pos_embed

    key = "vit.embeddings.position_embeddings"
    own = create_backbone(saved_vit, num_classes=3).model.state_dict()
    large = [create_backbone(saved_vit, num_classes=3, image_size=32, seed=seed).model for seed in (0, 1)]
    for model in large:
        state = model.state_dict()
        torch.testing.assert_close(state[key], resample_abs_pos_embed(own[key], [4, 4], num_prefix_tokens=1))
        assert all(torch.equal(state[k], own[k]) for k in own if k != key and "classifier" not in k)
    assert large[0](torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_weights_that_leave_parts_unfilled_are_refused(saved_vit: str) -> None:
    with pytest.raises(WeightsUnavailable, match="leave 32 tensors besides the classifier"):
        create_backbone(saved_vit, num_classes=3, options={"num_hidden_layers": 4})
    with pytest.raises(WeightsUnavailable, match=r"another shape\): vit\.embeddings\.patch_embeddings"):
        create_backbone(saved_vit, num_classes=3, patch_size=4)
    create_backbone(saved_vit, num_classes=3, weights="none", options={"num_hidden_layers": 4})


@pytest.mark.parametrize("options", [{"num_attention_heads": 0}, {"hidden_size": "abc"}, {"hidden_act": "abc"}])
def test_config_options_with_which_transformers_fails_are_named(saved_vit: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"cannot build .* with {next(iter(options))}="):
        create_backbone(saved_vit, weights="none", num_classes=5, options=options)


def test_unknown_config_options_are_refused(saved_vit: str) -> None:
    with pytest.raises(ConfigError, match=r"no option num_hidden_layer\..*num_hidden_layers"):
        create_backbone(saved_vit, num_classes=3, options={"num_hidden_layer": 1})


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_become_float32(saved_vit: str, stored: torch.dtype) -> None:
    import transformers

    directory = saved_vit.removeprefix("hf:")
    transformers.ViTForImageClassification.from_pretrained(directory).to(stored).save_pretrained(directory)
    for weights in ("default", "none"):
        model = create_backbone(saved_vit, weights=weights, num_classes=3).model
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({}, (0.5, 0.5, 0.5)),
        ({"do_normalize": False}, (0.0, 0.0, 0.0)),
        ({"image_mean": 0.25, "image_std": 0.5}, (0.25, 0.25, 0.25)),
        ({"image_mean": None}, None),
    ],
)
def test_images_are_normalized_as_the_processor_does(
    saved_vit: str, settings: dict[str, Any], mean: tuple[float, ...] | None
) -> None:
    import transformers

    directory = Path(saved_vit.removeprefix("hf:"))
    transformers.ViTImageProcessor().save_pretrained(directory)
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    assert create_backbone(saved_vit, num_classes=3).mean == mean


def test_bgr_weights_give_a_warning(saved_vit: str) -> None:
    import transformers

    transformers.MobileViTImageProcessor().save_pretrained(saved_vit.removeprefix("hf:"))
    with pytest.warns(UserWarning, match="BGR"):
        assert create_backbone(saved_vit, num_classes=3).std == (1.0, 1.0, 1.0)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def _timms(directory: Path, num_classes: int) -> nn.Module:
    import timm
    from timm.models._hub import save_for_hf

    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **SMALL).eval()
    save_for_hf(model, str(directory), model_args=SMALL, safe_serialization=True)
    return model


@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_directory_in_timms_layout(num_classes: int, tmp_path: Path) -> None:
    """As foundation models are published for `timm.create_model("hf-hub:…")`, many of them without a classifier."""
    saved = _timms(tmp_path, num_classes)
    backbone = create_backbone(f"hf:{tmp_path}", num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.model.forward_features(x), saved.forward_features(x))
    assert petune.attach(backbone.model, "adaptformer", bottleneck=4).counts.head == 24 * 5 + 5
    assert (backbone.image_size, backbone.mean, backbone.weights) == (32, (0.5,) * 3, f"hf:{tmp_path}")
    assert create_backbone(f"hf:{tmp_path}", num_classes=5, image_size=64).image_size == 64
    assert input_side(f"hf:{tmp_path}", None, {}) == 32


def test_weights_in_timms_layout_must_fill_the_whole_model(tmp_path: Path) -> None:
    _timms(tmp_path, 7)
    with pytest.raises(WeightsUnavailable, match=r"do not fit timm's vit_tiny_patch16_224 with depth=3: .*s\.2"):
        create_backbone(f"hf:{tmp_path}", num_classes=5, options={"depth": 3})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'depht'"):
        create_backbone(f"hf:{tmp_path}", num_classes=5, options={"depht": 3})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsUnavailable, match="No suitable checkpoints"):
        create_backbone(f"hf:{tmp_path}", num_classes=5)
    assert create_backbone(f"hf:{tmp_path}", num_classes=5, weights="none").weights == "none"
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "architecture": "vit_tiny_patch16_225"}))
    with pytest.raises(UnknownName, match="Did you mean vit_tiny_patch16_224"):
        create_backbone(f"hf:{tmp_path}", num_classes=5, weights="none")


BUILD = """
from petune.backbones.create import create_backbone
backbone = create_backbone("hf:lab/foundation", num_classes=5)
print(backbone.hub_id, backbone.model.pos_embed.sum().item())
"""


@pytest.mark.exhaustive
def test_a_repository_in_timms_layout_comes_from_the_hub_and_then_from_the_cache(tmp_path: Path) -> None:
    saved = _timms(tmp_path / "model", 0)
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "HF_HUB_OFFLINE"}

    def built(**more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", BUILD]
        environment = {**env, "HF_HOME": str(tmp_path / "cache"), **more}
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    with running() as hub:
        hub.repos["lab/foundation"] = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
        first = built(HF_ENDPOINT=hub.url)
        assert first.returncode == 0, first.stderr
    again = built(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert first.stdout == again.stdout == f"lab/foundation {saved.pos_embed.sum().item()}\n"

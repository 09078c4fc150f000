"""Every head of a model trains, and what lies between backbone and heads is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import petune
from tests.sampling import sampled

VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
DETR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}


def column(**options: Any) -> dict[str, Any]:
    return {**VIT, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "num_labels": 3, **options}


def swin() -> Any:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )


def yolos() -> nn.Module:
    config = transformers.YolosConfig(**column(image_size=[32, 32], num_detection_tokens=5))
    return transformers.YolosForObjectDetection(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(image_size=64, **STAGES, num_attention_heads=[1, 1, 2, 2], num_labels=3)
    return transformers.SegformerForSemanticSegmentation(config)


def eomt() -> nn.Module:
    config = transformers.EomtConfig(**column(num_hidden_layers=3, num_blocks=1, num_queries=5, num_upscale_blocks=1))
    return transformers.EomtForUniversalSegmentation(config)


def mask_former() -> nn.Module:
    config = transformers.MaskFormerConfig(
        backbone_config=swin(),
        decoder_config=transformers.DetrConfig(d_model=32, **DETR),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def mask2former() -> nn.Module:
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(),
        **sizes,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=5,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr() -> nn.Module:
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet,
        d_model=16,
        num_labels=3,
        **DETR,
    )
    return transformers.DetrForObjectDetection(config)


def upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=swin(), hidden_size=16, auxiliary_in_channels=32, num_labels=3, pool_scales=[1, 2]
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mobilevit() -> nn.Module:
    """Its encoder calls convolutions after its last block; they are backbone."""
    config = transformers.MobileViTConfig(
        image_size=64, num_labels=3, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 32],
        aspp_out_channels=8, atrous_rates=[1, 2, 3],
    )  # fmt: skip
    return transformers.MobileViTForSemanticSegmentation(config)


def swin2sr(upsampler: str, resi_connection: str = "1conv") -> Any:
    return transformers.Swin2SRConfig(
        image_size=32, patch_size=1, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=8,
        upscale=4 if upsampler == "nearest+conv" else 2, upsampler=upsampler, resi_connection=resi_connection,
    )  # fmt: skip


def super_resolution(upsampler: str, resi_connection: str = "1conv") -> nn.Module:
    return transformers.Swin2SRForImageSuperResolution(swin2sr(upsampler, resi_connection))


def distilled() -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**column()))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**column()))


WHOLE = [
    (yolos, 32, {"class_labels_classifier", "bbox_predictor"}),
    (segformer, 64, {"decode_head"}),
    (mobilevit, 64, {"segmentation_head"}),
    (lambda: super_resolution("pixelshuffle"), 32, {"upsample"}),
    (lambda: super_resolution("pixelshuffle_aux", "3conv"), 32, {"upsample"}),
    (lambda: super_resolution("nearest+conv"), 32, {"upsample"}),
    (lambda: super_resolution(""), 32, {"final_convolution"}),
    (upernet, 64, {"decode_head", "auxiliary_head"}),
    (distilled, 32, {"cls_classifier", "distillation_classifier"}),
    (vit, 32, {"classifier"}),
]
WITH_DECODER = [
    (eomt, 32, {"class_predictor", "mask_head", "upscale_block"}, {"query"}),
    (
        mask_former,
        64,
        {"class_predictor", "mask_embedder"},
        {"model.pixel_level_module.decoder", "model.transformer_module"},
    ),
    (
        mask2former,
        64,
        {"class_predictor", "model.transformer_module.decoder.mask_predictor"},
        {"model.pixel_level_module.decoder", "model.transformer_module.decoder.layers"},
    ),
    (detr, 64, {"class_labels_classifier", "bbox_predictor"}, {"model.encoder", "model.decoder"}),
]


def keys(model: nn.Module, paths: set[str]) -> set[str]:
    return {key for key, _ in model.named_parameters() if key.startswith(tuple(f"{path}." for path in paths))}


@pytest.mark.parametrize(("build", "size", "heads"), WHOLE)
def test_every_head_trains(build: Any, size: int, heads: set[str]) -> None:
    model = build().eval()
    wanted = keys(model, heads)
    att = petune.attach(model, "adaptformer", bottleneck=2, input_size=(3, size, size))
    assert set(att.head) == wanted
    assert {key for key, p in model.named_parameters() if p.requires_grad} == wanted | set(att.tuned)
    assert not att.sites.beside_head


@pytest.mark.parametrize("resi_connection", ["1conv", "3conv"])
def test_features_of_a_residual_around_all_blocks_are_no_prediction(resi_connection: str) -> None:
    model = transformers.Swin2SRModel(swin2sr("pixelshuffle", resi_connection))
    assert "head" not in petune.find_sites(model, (3, 32, 32)).parts


class ResidualStage(nn.Module):
    """Two blocks and a convolution inside a residual connection, as in SwinIR."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = {"d_model": width, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(2))
        self.conv = nn.Sequential(nn.Conv2d(width, 4, 3, 1, 1), nn.LeakyReLU(), nn.Conv2d(4, width, 3, 1, 1))

    def forward(self, x_BNC: Tensor) -> Tensor:
        y_BNC = x_BNC
        for block in self.blocks:
            y_BNC = block(y_BNC)
        y_BCHW = self.conv(y_BNC.mT.unflatten(2, (8, 8)))
        return y_BCHW.flatten(2).mT + x_BNC


class Restoration(nn.Module):
    """Residual stages inside a residual connection, called by the model itself, and an image that is added last."""

    image_size = 8

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.stages = nn.ModuleList(ResidualStage(width) for _ in range(2))
        self.body = nn.Conv2d(width, width, 3, 1, 1)
        self.before_last, self.last = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first_BCHW = self.first(x_BCHW)
        y_BNC = first_BCHW.flatten(2).mT
        for stage in self.stages:
            y_BNC = stage(y_BNC)
        y_BCHW = self.body(y_BNC.mT.unflatten(2, (8, 8))) + first_BCHW
        return x_BCHW + self.last(self.before_last(y_BCHW))


class Upsampling(nn.Module):
    """A decoder that enlarges the features of the blocks and adds those of the stem."""

    image_size = 16

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layer = {"d_model": width, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.stem, self.down = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, width, 2, 2)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(**layer) for _ in range(2)))
        self.up, self.out = nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 3, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        stem_BCHW = self.stem(x_BCHW)
        y_BNC = self.blocks(self.down(stem_BCHW).flatten(2).mT)
        return self.out(self.up(y_BNC.mT.unflatten(2, (8, 8))) + stem_BCHW)


@pytest.mark.parametrize(("build", "heads"), [(Restoration, {"before_last", "last"}), (Upsampling, {"up", "out"})])
def test_only_what_follows_the_residual_around_all_blocks_is_a_head(build: Any, heads: set[str]) -> None:
    model = build().eval()
    att = petune.attach(model, "linear")
    assert set(att.head) == keys(model, heads)
    assert not att.sites.beside_head


@pytest.mark.parametrize(("build", "size", "heads", "frozen"), sampled(WITH_DECODER, WITH_DECODER[:1].__contains__))
def test_a_decoder_that_stays_frozen_is_named(build: Any, size: int, heads: set[str], frozen: set[str]) -> None:
    model = build().eval()
    wanted = keys(model, heads)
    with pytest.warns(UserWarning, match="stay frozen") as warned:
        att = petune.attach(model, "linear", input_size=(3, size, size))
    assert set(att.head) == wanted
    assert all(path in str(warned[0].message) and path in str(att) for path in frozen)


def test_the_decoder_trains_as_a_head_if_it_is_named(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return detr().eval()

    model = fresh()
    heads = ["model.decoder", "class_labels_classifier", "bbox_predictor"]
    sites = petune.find_sites(model, (3, 64, 64), head=heads)
    assert [block.path for block in sites.blocks] == ["model.encoder.layers.0"]
    wanted = keys(model, set(heads))
    with pytest.warns(UserWarning, match="stay frozen"):
        att = petune.attach(model, "adaptformer", bottleneck=2, sites=sites)
    assert set(att.head) == wanted
    att.save(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="stay frozen"):
        loaded = petune.load(fresh(), tmp_path / "adapter")
    assert set(loaded.head) == wanted


def test_three_heads_are_saved_and_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Answering(nn.ModuleList([nn.Linear(24, 4) for _ in range(3)]))

    model = build()
    att = petune.attach(model, "linear")
    for p in att.head.values():
        nn.init.normal_(p)
    att.save(tmp_path / "adapter")
    other = build()
    petune.load(other, tmp_path / "adapter")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))


class Answering(nn.Module):
    """A ViT whose `get_classifier` returns `answer`."""

    img_size = 32

    def __init__(self, heads: nn.Module, answer: Any = None) -> None:
        super().__init__()
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        self.body = timm.models.vision_transformer.VisionTransformer(**size, num_classes=0)
        self.heads = heads
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return sum((head(features) for head in self.heads.children()), torch.zeros(()))

    def get_classifier(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"list": self.heads, "tuple": tuple(self.heads.children())}.get(self.answer, self.heads)


@pytest.mark.parametrize("answer", ["list", "tuple"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_get_classifier_of_three_heads_trains_three(answer: str, as_dict: bool) -> None:
    layers = [nn.Linear(24, 4) for _ in range(3)]
    heads = nn.ModuleDict(dict(zip("abc", layers, strict=True))) if as_dict else nn.ModuleList(layers)
    att = petune.attach(Answering(heads, answer), "linear")
    assert len(att.head) == 6


def test_a_get_classifier_that_raises_names_nothing() -> None:
    model = Answering(nn.ModuleList([nn.Linear(24, 4)]), NotImplementedError("override this"))
    assert petune.find_sites(model).head.path == "heads.0"


def test_features_of_tokens_are_not_logits() -> None:
    """Qwen2-VL's vision tower returns (tokens, width) for all images together."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    class Tower(nn.Module):
        image_size = 32

        def __init__(self) -> None:
            super().__init__()
            config = Qwen2VLVisionConfig(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=8, mlp_ratio=2)
            self.tower = Qwen2VisionTransformerPretrainedModel(config)

        def forward(self, x: Tensor) -> Any:
            patches = x.reshape(len(x), 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 1, 8, 8)
            flat = patches.expand(-1, -1, 2, -1, -1).reshape(len(patches), -1)
            return self.tower(flat, torch.tensor([[1, 4, 4]] * len(x)))

    assert "head" not in petune.find_sites(Tower().eval()).parts


def loaded_without(model: nn.Module, part: str, path: Path) -> Any:
    """Return the model as `from_pretrained` loads it from a checkpoint that lacks a part."""
    state = {key: t for key, t in model.state_dict().items() if part not in key}
    model.save_pretrained(path, state_dict=state)  # type: ignore[operator]
    return type(model).from_pretrained(path)  # type: ignore[attr-defined]


def test_a_module_that_the_checkpoint_lacks_trains_as_a_head(tmp_path: Path) -> None:
    """The queries of an EoMT model that starts from a ViT are random; they are in a module of their own."""
    model = loaded_without(eomt(), "query", tmp_path / "model")
    att = petune.attach(model, "linear", input_size=(3, 32, 32))
    assert "query.weight" in att.head
    with torch.no_grad():
        att.head["query.weight"].fill_(0.5)
    att.save(tmp_path / "adapter")
    fresh = loaded_without(eomt(), "query", tmp_path / "other")
    fresh.load_state_dict({key: t for key, t in model.state_dict().items() if "query" not in key}, strict=False)
    assert petune.load(fresh, tmp_path / "adapter").head["query.weight"].eq(0.5).all()


def test_new_weights_inside_a_trained_module_are_refused_or_named(tmp_path: Path) -> None:
    """The detection tokens of a YOLOS model that starts from a ViT are in its base model, and random."""
    loaded = loaded_without(yolos(), "detection_tokens", tmp_path)
    with pytest.raises(petune.AttachError, match=r"detection_tokens.*vit\.embeddings"):
        petune.attach(loaded, "linear", input_size=(3, 32, 32))
    heads = ["class_labels_classifier", "bbox_predictor"]
    with pytest.warns(UserWarning, match="detection_tokens"):
        petune.attach(loaded, "linear", input_size=(3, 32, 32), head=heads).detach()
    att = petune.attach(loaded, "linear", input_size=(3, 32, 32), head=[*heads, "vit.embeddings"])
    assert "vit.embeddings.detection_tokens" in att.head


class Frozen(nn.Module):
    """Features of a small ViT, and after them, next to a classifier `h`, what a kind of model has there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.stem, self.blocks = (
            nn.Conv2d(3, 8, 8, 8),
            nn.Sequential(*(nn.TransformerEncoderLayer(**layer) for _ in "ab")),
        )
        self.norm, self.h, self.kind = nn.LayerNorm(8), nn.Linear(8, 3), kind
        if kind == "pool":
            self.q, self.attn = nn.Parameter(torch.ones(1, 1, 8)), nn.MultiheadAttention(8, 2, batch_first=True)
        elif kind == "scale":
            self.t = nn.Parameter(torch.ones(1))
        elif kind != "plain":
            self.layer = {"rnn": nn.GRU(8, 8, batch_first=True), "bn": nn.BatchNorm1d(8), "exit": nn.Linear(8, 3)}[kind]

    def forward(self, x_BCHW: Tensor) -> Any:
        x_BND = self.stem(x_BCHW).flatten(2).mT
        y_BND = self.norm(self.blocks(x_BND))
        if self.kind == "pool":
            return self.h(self.attn(self.q.expand(len(y_BND), -1, -1), y_BND, y_BND)[0][:, 0])
        if self.kind == "rnn":
            return self.h(self.layer(y_BND)[0][:, -1])
        if self.kind == "scale":
            return self.t * self.h(y_BND.mean(1))
        if self.kind == "bn":
            return self.h(self.layer(y_BND.mean(1)))
        logits = self.h(y_BND.mean(1))
        return [logits, self.layer(self.blocks[0](x_BND).mean(1))] if self.kind == "exit" and self.training else logits


def test_what_acts_after_the_blocks_in_no_head_is_named() -> None:
    size = (3, 32, 32)
    named = {"pool": "q, attn", "rnn": "layer", "bn": "layer", "scale": "t", "exit": "layer"}
    for kind, names in named.items():
        with pytest.warns(UserWarning, match=f"stay frozen unless the method trains them: {names}. If") as warned:
            petune.attach(Frozen(kind), "bitfit", input_size=size)
        assert len(warned) == 1
    petune.attach(Frozen("plain"), "bitfit", input_size=size)
    with pytest.raises(petune.AttachError, match="parameter"):
        petune.find_sites(Frozen("scale"), size, head="t")
    with pytest.raises(petune.UsageError):
        petune.find_sites(Frozen("plain"), size).only(3)  # type: ignore[arg-type]


def test_a_predictor_that_get_classifier_forgets_is_named() -> None:
    class Boxes(Frozen):
        def get_classifier(self) -> tuple[nn.Module, ...]:
            return self.h, self.more

        def forward(self, x_BCHW: Tensor) -> Any:
            y_BND = self.norm(self.blocks(self.stem(x_BCHW).flatten(2).mT))
            return self.h(y_BND[:, 0]), self.more(y_BND[:, 1]), self.box(y_BND[:, 2])

    model = Boxes("plain")
    model.more, model.box = nn.Linear(8, 3), nn.Linear(8, 4)
    with pytest.warns(UserWarning, match="stay frozen .* box"):
        petune.attach(model, "bitfit", input_size=(3, 32, 32))

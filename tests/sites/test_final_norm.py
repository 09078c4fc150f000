"""The final norm: found where it shares a module with the blocks, and covered by the methods that train or scale it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import petune

WIDTH = 192
COLUMN = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 4 * WIDTH}
IMAGE = {"image_size": 64, "patch_size": 16}
SWIN = {"image_size": 64, "embed_dim": 96, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4, "patch_size": 4}
BODY = {"img_size": 64, "depth": 2}


class Wrapper(nn.Module):
    """A backbone and a classifier, as every second project has it."""

    image_size = 64

    def __init__(self, *head: nn.Module) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **BODY)
        self.head = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def torchvision_vit() -> nn.Module:
    shape = {"num_layers": 2, "num_heads": 3, "hidden_dim": WIDTH, "mlp_dim": 4 * WIDTH}
    return torchvision.models.VisionTransformer(64, 16, **shape, num_classes=3)


def projector() -> nn.Module:
    return Wrapper(nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def timm_wrapper() -> nn.Module:
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=BODY, num_labels=3)
    return transformers.TimmWrapperForImageClassification(config)


def from_config(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torchvision ViT": (torchvision_vit, "encoder.ln"),
    "Wrapper": (lambda: Wrapper(nn.Linear(WIDTH, 3)), "backbone.norm"),
    "Wrapper, MLP with BatchNorm": (projector, "backbone.norm"),
    "TimmWrapper": (timm_wrapper, "timm_model.norm"),
    "ViT": (from_config("ViTForImageClassification", "ViTConfig", **COLUMN, **IMAGE), "vit.layernorm"),
    "DeiT": (from_config("DeiTForImageClassification", "DeiTConfig", **COLUMN, **IMAGE), "deit.layernorm"),
    "DINOv2": (from_config("Dinov2ForImageClassification", "Dinov2Config", **COLUMN, **IMAGE), "dinov2.layernorm"),
    "Swin": (from_config("SwinForImageClassification", "SwinConfig", **SWIN), "swin.layernorm"),
}
PLAIN = ("torchvision ViT", "Wrapper", "TimmWrapper", "ViT", "DeiT")
"""Models with plain blocks: 12·D² + 13·D parameters each."""


@pytest.mark.parametrize("name", MODELS)
def test_the_final_norm_is_found(name: str) -> None:
    build, path = MODELS[name]
    assert petune.find_sites(build(), (3, 64, 64)).norm.path == path


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, about the norms that it tunes itself
@pytest.mark.parametrize("name", PLAIN)
def test_methods_that_reach_the_final_norm_do_so_here(name: str) -> None:
    model = MODELS[name][0]()
    norm = petune.find_sites(model).norm
    expected = {
        "partial": 12 * WIDTH**2 + 13 * WIDTH + 2 * WIDTH,
        "norm": 2 * 4 * WIDTH + 2 * WIDTH,
        "peft:ln_tuning": 2 * 4 * WIDTH + 2 * WIDTH,
    }
    for method, tuned in expected.items():
        att = petune.attach(model, method)
        assert att.counts.tuned == tuned, method
        parameters = {id(p) for p in att.parameters()}
        assert all(id(p) in parameters for p in norm.module.parameters() if method != "peft:ln_tuning")
        att.detach()
    assert expected["partial"] == 445_248


def test_a_model_without_a_final_norm_has_none() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **BODY)
    model.norm = nn.Identity()
    assert "norm" not in petune.find_sites(model).parts


def test_norms_of_attention_pooling_are_not_the_final_norm() -> None:
    shape = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4}
    model = Wrapper(nn.Linear(48, 3))
    model.backbone = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **shape)
    assert petune.find_sites(model).norm.path == "backbone.norm"


class Clip(nn.Module):
    """Two readings of CLIP's vision model: the pooled token, after the final norm, or the last block's tokens."""

    image_size = 64

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.backbone = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**COLUMN, **IMAGE))
        self.head = nn.Linear(WIDTH, 3)
        self.pooled = pooled

    def forward(self, x_BCHW: Tensor) -> Tensor:
        output = self.backbone(x_BCHW)
        return self.head(output.pooler_output if self.pooled else output.last_hidden_state.mean(1))


UNUSED = {
    "CLIP's tokens": lambda: Clip(pooled=False),
    "CLIP's own classifier": from_config(
        "CLIPForImageClassification", "CLIPConfig", vision_config={**COLUMN, **IMAGE}, num_labels=3
    ),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_norm_that_the_logits_do_not_depend_on_is_not_found(name: str) -> None:
    model = UNUSED[name]()
    assert "norm" not in petune.find_sites(model).parts
    att = petune.attach(model, "partial")
    assert att.counts.tuned == 12 * WIDTH**2 + 13 * WIDTH


def test_clips_norm_is_found_where_the_pooled_token_is_read() -> None:
    assert petune.find_sites(Clip(pooled=True)).norm.path.endswith("post_layernorm")


class TwoNorms(nn.Module):
    """A norm for the first token, another for the patches; and a head for either."""

    image_size = 16

    def __init__(self, for_patches: bool, last_norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.first, self.patches = nn.LayerNorm(8), nn.LayerNorm(8) if last_norm else nn.Identity()
        self.head, self.dense = nn.Linear(8, 3), nn.Linear(8, 2) if for_patches else None

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x_BND = self.block(self.stem(x_BCHW).flatten(2).mT)
        dense = None if self.dense is None or isinstance(self.patches, nn.LayerNorm) else self.dense(x_BND)
        x_BND = torch.cat([self.first(x_BND[:, :1]), self.patches(x_BND[:, 1:])], 1)
        if self.dense is None:
            return self.head(x_BND[:, 0])
        return self.head(x_BND[:, 0]), self.dense(x_BND[:, 1:]) if dense is None else dense


def test_of_two_norms_the_one_that_the_logits_read_is_the_final_norm() -> None:
    model = TwoNorms(for_patches=False).eval()
    nn.init.zeros_(model.head.weight)  # no gradient tells
    sites = petune.find_sites(model)
    assert (sites.norm.path, sites.further_norms) == ("first", ())


@pytest.mark.parametrize("last_norm", [True, False])
def test_a_norm_before_one_of_several_heads_is_covered(last_norm: bool) -> None:
    model = TwoNorms(for_patches=True, last_norm=last_norm).eval()
    att = petune.attach(model, "partial")
    assert att.sites.parts.keys() & {"norm"} == ({"norm"} if last_norm else set())
    norms = {"first", *(["patches"] if last_norm else [])}
    assert {key.partition(".")[0] for key in att.tuned} == {"block", *norms}


class Ends(nn.Module):
    """Blocks of width 8, and norms between them and the head: so many in a row, or one after each block."""

    image_size = 16

    def __init__(self, in_a_row: int, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.in_a_row = in_a_row
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(in_a_row or depth))
        self.head = nn.Linear(8 if in_a_row else 8 * depth, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.stem(x_BCHW).flatten(2).mT
        rows = []
        for index, block in enumerate(self.blocks):
            x_BND = block(x_BND)
            rows += [] if self.in_a_row else [self.norms[index](x_BND)[:, 0]]
        for norm in self.norms if self.in_a_row else ():
            x_BND = norm(nn.functional.dropout(x_BND, 0.1, self.training))
        return self.head(x_BND[:, 0] if self.in_a_row else torch.cat(rows, 1))


@pytest.mark.filterwarnings("ignore:ssf leaves")  # torch's fused attention
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("in_a_row", [0, 2, 3])
def test_all_norms_between_blocks_and_head_are_covered(in_a_row: int, depth: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Ends(in_a_row, depth).eval()
    fresh, norms = copy.deepcopy(model), [f"norms.{i}" for i in range(in_a_row or depth)]
    assert [norm.path for norm in petune.find_sites(model).towers[0].norms] == norms
    for method in ("partial", "norm", "ssf", "peft:ln_tuning"):
        att = petune.attach(model, method)
        holders = {key.partition(".petune")[0] for key in att.tuned if key.startswith("norms")}
        is_in_place = method in {"partial", "norm"}
        assert len(holders) == len(norms) * (2 if is_in_place else 1), method
        att.save(tmp_path / att.name)
        loaded = petune.load(fresh, tmp_path / att.name)
        assert torch.equal(fresh(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
        loaded.detach()
        att.detach()


class Pooled(nn.Module):
    """A norm of pooled features, behind a norm of tokens or alone."""

    image_size = 16

    def __init__(self, of_tokens: nn.Module) -> None:
        super().__init__()
        self.ends, self.of_tokens, self.pooled = Ends(in_a_row=0, depth=1), of_tokens, nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.ends.blocks[0](self.ends.stem(x_BCHW).flatten(2).mT)
        return self.head(self.pooled(self.of_tokens(x_BND).mean(1)))


def test_a_norm_of_pooled_features_is_the_final_norm_only_without_one_of_tokens() -> None:
    alone = petune.attach(Pooled(nn.Identity()).eval(), "partial")
    assert [norm.path for norm in alone.sites.towers[0].norms] == ["pooled"]
    assert {"pooled.weight", "pooled.bias"} <= alone.tuned.keys()
    with pytest.warns(UserWarning, match="stay frozen unless the method trains them: pooled"):
        behind = petune.attach(Pooled(nn.LayerNorm(8)).eval(), "partial")
    assert [norm.path for norm in behind.sites.towers[0].norms] == ["of_tokens"]


class FinalNormOnly(petune.Tuner[petune.TunerConfig]):
    """Trains the norms of blocks, and of those after them the last."""

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        for norm in (*(norm for block in edit.sites.blocks for norm in block.norms), edit.sites.norm):
            edit.train(norm)


def test_norms_that_a_method_leaves_are_named() -> None:
    with pytest.warns(UserWarning, match=r"leaves norms after the last block of Ends as they are: norms\.0\."):
        petune.attach(Ends(in_a_row=2).eval(), FinalNormOnly(petune.TunerConfig()))
    petune.attach(Ends(in_a_row=2, depth=1).eval(), "adaptformer", bottleneck=2)  # edits no norm, so it names none


class Parts(nn.Module):
    """Two parts of two blocks: the first ends with a norm, and the second begins with one that is a function."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=3
        )
        self.embed, self.first, self.second = vit.patch_embed, vit.blocks[:2], vit.blocks[2:]
        self.between, self.gain, self.norm, self.head = (
            nn.LayerNorm(24),
            nn.Parameter(torch.ones(24)),
            vit.norm,
            vit.head,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BND = self.between(self.first(self.embed(x)))
        x_BND = nn.functional.rms_norm(x_BND, (24,), self.gain)
        return self.head(self.norm(self.second(x_BND)).mean(1))


def test_norms_between_blocks_train_or_are_named() -> None:
    between = {"between": 1, "gain": 1}
    assert petune.find_sites(Parts()).layers.norms_between == between
    assert {"between.weight", "between.bias", "gain"} <= petune.attach(Parts(), "norm").tuned.keys()
    for method, options in (("ssf", {}), ("partial", {"num_blocks": 3})):
        with pytest.warns(UserWarning, match=rf"^{method} leaves .* as they are: between, gain\b"):
            petune.attach(Parts(), method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.attach(Parts(), "partial", num_blocks=2)  # leaves the block before these norms, too
        petune.attach(Parts(), "bitfit")
        petune.attach(Parts(), "adaptformer", bottleneck=2)
        petune.attach(Parts(), "ssf", blocks="last:2")


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ln_tuning_reaches_norms_between_blocks() -> None:
    tuned = petune.attach(Parts(), "peft:ln_tuning").tuned
    assert any(key.startswith("between.") for key in tuned)

"""Hand-written ViTs: every block is found, and every method works or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from survey.pairs import examine
from survey.residual_stream import unproven_mids
from torch import nn

import petune
from tests.sampling import sampled
from tests.tiny import module_beside

models = module_beside(__file__, "handwritten_models")


@pytest.mark.parametrize("name", models.HANDWRITTEN)
def test_all_sites_are_found(name: str) -> None:
    model = models.build(name)
    sites = petune.find_sites(model)
    assert len(sites.blocks) == (1 if name == "shared weights" else models.DEPTH)
    assert (sites.embed_dim, sites.grid_size) == (models.D, (4, 4))
    assert (sites.head.path, sites.norm.path) == ("to_classes", "last")
    assert all({"mid", "mlp"} <= block.parts.keys() for block in sites.blocks)
    assert unproven_mids(model, sites) == []


METHODS = ["linear", "full", "adaptformer:bottleneck=4", "vpt", "vpt:deep=false"]
LIKE_OTHERS = {
    "nn.TransformerEncoderLayer, post-norm", "ModuleList of pairs", "class token at the end", "mean pooling",
    "nested Sequentials", "split q, k, v", "einops, pre-norm inside",
}  # fmt: skip
"""Models whose blocks take the same paths as another model's, once their sites are found."""


@pytest.mark.parametrize("name", sampled(models.HANDWRITTEN, lambda name: name not in LIKE_OTHERS))
@pytest.mark.parametrize("method", sampled(METHODS, "adaptformer:bottleneck=4".__eq__))
def test_every_method_works_or_is_refused(name: str, method: str) -> None:
    outcome = examine(models.build(name), method)
    no_way_on = ("ModuleList of pairs", "shared weights")  # no module passes prompts on; they would leave in between
    refused = name in no_way_on and method == "vpt:deep=false"
    assert outcome.state == ("refused" if refused else "ok"), outcome.detail


@pytest.mark.filterwarnings("ignore:Vit reads the weights of 3 of 3 linear layers")
@pytest.mark.parametrize("name", ["nn.TransformerEncoderLayer", "nn.TransformerEncoderLayer, post-norm"])
def test_lora_takes_effect_in_the_fused_kernel(name: str) -> None:
    """torch's layer reads the weights of q, k and v itself in its fast path, which must include what LoRA trained."""
    model = models.build(name)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(x)
        att = petune.attach(model, "lora", targets="attn")
        for p in att.tuned.values():
            torch.nn.init.normal_(p)
        slow_path, fast_path = model.train()(x), model.eval()(x)
        assert torch.allclose(slow_path, fast_path, atol=1e-5)
        assert not torch.allclose(plain, fast_path, atol=1e-2)
        with att.disabled():
            assert torch.equal(model(x), plain)
        att.detach()
        assert torch.equal(model(x), plain)


class OwnPositions(nn.Module):
    """Attention that adds positions itself, in a way that petune cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.SplitAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] / 10)


def test_unknown_positions_are_detected() -> None:
    """No shape forbids prompts here; only the check with hidden prompts sees that later tokens are moved."""
    torch.manual_seed(0)
    model = models.Vit(nn.Sequential(*(models.Layer(OwnPositions()) for _ in range(2)))).eval()
    assert examine(model, "adaptformer").state == "ok"
    with pytest.raises(petune.PetuneError, match="cannot take prompts: it knows the positions of its tokens"):
        petune.attach(model, "vpt")


def test_positions_are_detected_where_small_weights_hide_them() -> None:
    """Rotations by position change the output of a block of V-JEPA 2 by 7e-5 with these random weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_labels": 5}
    predictor = {"pred_hidden_size": 32, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    config = transformers.VJEPA2Config(
        crop_size=32, patch_size=8, frames_per_clip=4, num_pooler_layers=1, **sizes, **predictor
    )
    for method in ("vpt", "vpt:deep=false"):
        torch.manual_seed(2)
        model = transformers.VJEPA2ForVideoClassification(config).eval()
        with pytest.raises(petune.PetuneError, match="cannot take prompts: it knows the positions of its tokens"):
            petune.attach(model, method)
    with pytest.warns(UserWarning, match=r"layer\.0 .* numbers its tokens"):  # without numbers it cannot be seen
        petune.attach(model.to("meta"), "vpt")


@pytest.mark.parametrize("verb", ["before", "after"])
def test_a_block_that_is_not_a_module_cannot_be_changed_as_a_whole(verb: str) -> None:
    class Verb(petune.Tuner[petune.TunerConfig]):
        def attach(self, edit: petune.Edit) -> None:
            getattr(edit, verb)(edit.sites.blocks[0], nn.Identity())

    model = models.build("ModuleList of pairs")
    assert not petune.find_sites(model).blocks[0].is_module
    with pytest.raises(petune.AttachError, match=f"{verb} needs a block that is one module, but block 0"):
        petune.attach(model, Verb())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_final_norm_in_the_module_of_the_blocks_is_not_a_part_of_them(depth: int) -> None:
    model = models.Vit(models.Transformer(depth))
    model.last = nn.Identity()
    sites = petune.find_sites(model)
    spans = [f"trunk.layers.{i}.0 … trunk.layers.{i}.1" for i in range(depth)]
    assert [block.where for block in sites.blocks] == spans
    assert sites.norm.path == "trunk.final"
    assert unproven_mids(model, sites) == []


def norm() -> nn.Module:
    return nn.LayerNorm(models.D)


def proj(*, bias: bool = True, width: int = models.D) -> nn.Module:
    return nn.Linear(models.D, width, bias=bias)


AFTER = {
    "projection": (lambda: [proj()], None),
    "projection without bias": (lambda: [proj(bias=False)], None),
    "wider projection": (lambda: [proj(width=2 * models.D)], None),
    "norm, projection": (lambda: [norm(), proj()], 0),
    "projection, norm": (lambda: [proj(), norm()], 1),
    "norm, dropout": (lambda: [norm(), nn.Dropout(0.1)], 0),
    "norm, GELU": (lambda: [norm(), nn.GELU()], 0),
    "two norms": (lambda: [norm(), norm()], 1),
    "norm, MLP": (lambda: [norm(), proj(), nn.GELU(), proj()], 0),
    "norm, residual MLP": (lambda: [norm(), models.Plus(models.mlp())], 0),
    "residual projection": (lambda: [models.Plus(proj())], None),
    "class token kept, norm, projection": (lambda: [models.Select(lambda x: x[:, :1]), norm(), proj()], 1),
    "norm, class token kept": (lambda: [norm(), models.Select(lambda x: x[:, :1])], 0),
    "norm, mean, projection": (lambda: [norm(), models.Select(lambda x: x.mean(1)), proj()], 0),
    "class token, norm, projection": (lambda: [models.Select(lambda x: x[:, 0]), norm(), proj()], 1),
}
"""What a module calls after its blocks, and which of it is the final norm."""


class Pooled(nn.Module):
    """A trunk that may pool its tokens, and a classifier."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.image_size = 16
        self.stem, self.trunk, self.to_classes = models.Stem(), trunk, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(self.stem(x))
        return self.to_classes(x if x.ndim == 2 else x.mean(1))


def wheres(model: nn.Module) -> list[str]:
    return [block.where for block in petune.find_sites(model).blocks]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", AFTER)
def test_what_follows_the_blocks_in_their_module_is_not_a_part_of_them(name: str, depth: int) -> None:
    after, final = AFTER[name]
    model = Pooled(models.Around(depth, after()), 2 * models.D if "wider" in name else models.D)
    sites = petune.find_sites(model)
    assert [block.where for block in sites.blocks] == [f"trunk.layers.{i}.0 … trunk.layers.{i}.1" for i in range(depth)]
    assert (sites.norm.path if "norm" in sites.parts else None) == (None if final is None else f"trunk.after.{final}")
    assert all(block.mid.dim == models.D for block in sites.blocks)
    assert sites.head.path == "to_classes"
    assert unproven_mids(model, sites) == []


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("before", [norm, proj, lambda: models.Select(lambda x: x + 1)])
@pytest.mark.parametrize("after", [lambda: [], lambda: [norm()], lambda: [proj()]])
def test_what_precedes_the_blocks_in_their_module_is_not_a_part_of_them(before: Any, after: Any, depth: int) -> None:
    model = Pooled(models.Around(depth, after(), before()), models.D)
    assert wheres(model) == [f"trunk.layers.{i}.0 … trunk.layers.{i}.1" for i in range(depth)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("after", "final"), [([norm], 0), ([proj], None), ([norm, proj], 0), ([proj, norm], 1)])
def test_what_follows_post_norm_blocks_is_not_a_part_of_them(after: Any, final: int | None, depth: int) -> None:
    model = Pooled(models.PostNorm(depth, [build() for build in after]), models.D)
    assert wheres(model) == [f"trunk.looks.{i} … trunk.thinks.{i}" for i in range(depth)]
    path = f"trunk.norms.{2 * depth - 1}" if final is None else f"trunk.after.{final}"
    assert petune.find_sites(model).norm.path == path


def test_a_module_that_is_only_its_block_is_one() -> None:
    """Its first and last layers are those of the block, so that `partial` can train it as a whole."""
    assert wheres(Pooled(models.Around(1, []), models.D)) == ["trunk"]
    assert wheres(Pooled(models.PostNorm(1, []), models.D)) == ["trunk"]
    assert wheres(Pooled(models.Around(1, [nn.Dropout(0.1), nn.Identity()]), models.D)) == ["trunk"]


class ThreeBranches(models.Layer):
    """A block with one more branch after its MLP."""

    def __init__(self) -> None:
        super().__init__(models.SplitAttention())
        self.third = models.Plus(nn.Sequential(norm(), proj()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(super().forward(x))


def test_a_third_branch_belongs_to_its_block() -> None:
    model = models.Vit(nn.Sequential(*(ThreeBranches() for _ in range(2))))
    assert wheres(model) == ["trunk.0", "trunk.1"]


def test_a_branch_that_reads_the_tokens_as_an_image_belongs_to_its_block() -> None:
    config = transformers.VitDetConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64,
        patch_size=16, residual_block_indices=[0, 1], window_size=2, window_block_indices=[0],
    )  # fmt: skip
    sites = petune.find_sites(transformers.VitDetModel(config), (3, 64, 64))
    assert [block.where for block in sites.blocks] == ["encoder.layer.0", "encoder.layer.1"]
    assert "head" not in sites.parts


@pytest.mark.parametrize("name", ["projection", "norm, projection", "two norms", "residual projection"])
def test_adaptformer_adds_before_what_follows_the_only_block(name: str) -> None:
    torch.manual_seed(0)
    model = Pooled(models.Around(1, AFTER[name][0](), norm()), models.D).eval()
    att = petune.attach(model, "adaptformer", bottleneck=4)
    adapter = next(m.adapter for m in model.modules() if hasattr(m, "is_petune_module") and hasattr(m, "adapter"))
    for p in adapter.parameters():
        nn.init.normal_(p)
    (attention, feed), x = model.trunk.layers[0], torch.randn(2, 17, models.D)
    with torch.no_grad():
        output = model.trunk(x)
        with att.disabled():
            y = model.trunk.before(x)
            mid = attention(y) + y
            expected = model.trunk.after(feed(mid) + mid + adapter(mid))
    torch.testing.assert_close(output, expected)


def test_adaptformer_adds_before_the_final_norm_of_a_transformer_of_depth_1() -> None:
    torch.manual_seed(0)
    model = models.Vit(models.Transformer(1)).eval()
    att = petune.attach(model, "adaptformer", bottleneck=4)
    adapter = next(m.adapter for m in model.modules() if hasattr(m, "is_petune_module") and hasattr(m, "adapter"))
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    (attention, feed), x = model.trunk.layers[0], torch.randn(2, 17, models.D)
    with torch.no_grad():
        output = model.trunk(x)
        with att.disabled():
            mid = attention(x) + x
            expected = model.trunk.final(feed(mid) + mid + adapter(mid))
    torch.testing.assert_close(output, expected)


def test_a_post_norm_block_keeps_its_norm() -> None:
    layer = nn.TransformerEncoderLayer(models.D, models.HEADS, 48, 0.0, batch_first=True)
    model = models.Vit(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    assert [block.where for block in petune.find_sites(model).blocks] == ["trunk.layers.0"]


def test_a_transformer_of_transformers_has_all_its_blocks() -> None:
    model = models.Vit(models.Nested(3))
    wheres = [block.where for block in petune.find_sites(model).blocks]
    assert wheres == ["trunk.look … trunk.think", "trunk.rest.look … trunk.rest.think", "trunk.rest.rest"]
    stages = models.Vit(nn.Sequential(*(models.Transformer(depth) for depth in (1, 2, 1))))
    assert len(petune.find_sites(stages).blocks) == 4
    att = petune.attach(model, "adaptformer", bottleneck=4)
    assert att.counts.tuned == 3 * (2 * models.D * 4 + 4 + models.D)

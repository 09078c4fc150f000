"""The site of an attention ends right before the residual sum, whatever modules hold its projection, sum and norm."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import petune
from tests.sites import branching_blocks as models

TEXT = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16,
}  # fmt: skip
WORDS = torch.tensor([[1, 5, 9, 7, 2]])


def bert() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    example = {"input_ids": WORDS, "encoder_hidden_states": torch.randn(1, 3, 32), "use_cache": False}
    return transformers.BertModel(config, add_pooling_layer=False), example


def blip() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BlipTextConfig(**TEXT, encoder_hidden_size=32, is_decoder=True)
    example = {"input_ids": WORDS, "encoder_hidden_states": torch.randn(1, 3, 32), "use_cache": False}
    return transformers.BlipTextModel(config, add_pooling_layer=False), {**example, "is_decoder": True}


def albert() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.AlbertModel(transformers.AlbertConfig(**TEXT, embedding_size=16), False), {"input_ids": WORDS}


def layoutlm() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LayoutLMv3Config(
        **TEXT, visual_embed=False, coordinate_size=6, shape_size=4, max_2d_position_embeddings=32
    )
    return transformers.LayoutLMv3Model(config), {"input_ids": WORDS, "bbox": torch.zeros(1, 5, 4, dtype=torch.long)}


class WithNorm(nn.Module):
    """An attention whose module holds its residual sum and the norm after it, as OneFormer's and DAB-DETR's do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = models.Attention(), nn.LayerNorm(models.D)

    def forward(self, x: Tensor, others: Tensor | None = None, positions: Tensor | float = 0.5) -> Tensor:
        return self.norm(x + self.attention(x + positions, others))


class MlpWithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = models.mlp(), nn.LayerNorm(models.D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(x))


class PostNormDecoder(models.Block):
    def __init__(self) -> None:
        super().__init__(attentions=0, mlps=0, norms=0)
        self.own, self.cross, self.mlp = WithNorm(), WithNorm(), MlpWithNorm()

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        return self.mlp(self.cross(self.own(x), others))


def toy() -> tuple[nn.Module, None]:
    model = models.Queries()
    model.blocks = nn.ModuleList(PostNormDecoder() for _ in range(2))
    return model, None


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "BERT with cross-attention": (bert, 3),
    "BLIP's text decoder": (blip, 3),
    "ALBERT": (albert, 2),
    "LayoutLMv3": (layoutlm, 2),
    "toy": (toy, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_branches_of_a_post_norm_block_end_before_their_sums_and_have_the_norms_after_these(name: str) -> None:
    """Without what the branches return, each norm takes what the norm before it has returned."""
    torch.manual_seed(0)
    build, num_branches = MODELS[name]
    model, example = build()
    sites = petune.find_sites(model.eval(), example=example)
    block = sites.blocks[0]
    assert all(len(b.branches) == len(b.norms) == num_branches and not b.norm_first for b in sites.blocks)
    streams: list[Tensor] = []
    hooks = [block.enter.register_forward_pre_hook(lambda m, args: streams.append(args[0]))]
    hooks += [site.exit.register_forward_hook(lambda m, args, y: torch.zeros_like(y)) for site in block.branches]
    hooks += [norm.enter.register_forward_hook(lambda m, args, y: streams.extend((args[0], y))) for norm in block.norms]
    with torch.no_grad():
        model(**example) if example else model(torch.randn(2, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    streams = streams[: 2 * num_branches + 1]  # ALBERT calls one block several times
    assert len(streams) == 2 * num_branches + 1
    assert all(torch.equal(before, entered) for before, entered in zip(streams[::2], streams[1::2], strict=False))


def test_an_adapter_in_a_post_norm_block_comes_before_the_sum_and_can_be_merged() -> None:
    """RepAdapter is linear: within one attention it folds into its layers, across the sum it would not."""
    model, example = layoutlm()
    before = copy.deepcopy(model.eval())
    att = petune.attach(model, "repadapter", example=example, train_head=False)
    for parameter in att.parameters():
        nn.init.normal_(parameter, std=0.1)
    tuned = model(**example)[0]
    att.merge()
    torch.testing.assert_close(model(**example)[0], tuned)
    assert not torch.allclose(tuned, before(**example)[0], atol=1e-3)


def test_keys_and_values_enter_an_attention_whose_projection_is_another_module() -> None:
    model = transformers.BertModel(transformers.BertConfig(**TEXT), add_pooling_layer=False).eval()
    plain = model(WORDS)[0]
    att = petune.attach(model, "prefix", example={"input_ids": WORDS}, train_head=False)
    assert len(att.sites.blocks) == 2
    assert not torch.allclose(model(WORDS)[0], plain, atol=1e-4)


def test_a_norm_before_the_mlp_is_not_that_of_the_attention_before() -> None:
    """Nothing normalizes the tokens of these attentions: the first norm after them is the MLP's."""

    class Bare(models.Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a[0](x)
            return x + self.m[0](self.n[0](x))

    sites = petune.find_sites(models.Vit(Bare).eval())
    assert all("norm1" not in block.parts and block.norm_first for block in sites.blocks)
    assert [block.norm2.path for block in sites.blocks] == ["blocks.0.n.0", "blocks.1.n.0"]


def test_a_tensor_that_a_model_scales_in_place_does_not_stop_the_search() -> None:
    class Masked(models.Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a[0](self.n[0](x))
            x *= torch.ones(models.D)
            return x + self.m[0](self.n[1](x))

    sites = petune.find_sites(models.Vit(Masked).eval())
    assert all(block.parts.keys() == {"attn", "mlp", "norm1", "norm2", "mid"} for block in sites.blocks)


@pytest.mark.parametrize("method", ["houlsby", "repadapter"])
def test_the_counted_adapters_are_those_of_all_branches(method: str) -> None:
    model, example = bert()
    att = petune.attach(model, method, example=example, train_head=False)
    assert att.counts.tuned == att.tuner.num_parameters(att.sites)
    assert len({name.rpartition(".petune_")[0] for name in att.tuned}) == 2 * 3

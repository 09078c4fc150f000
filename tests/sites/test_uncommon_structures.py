"""ViTs whose structure differs from the usual: every site is right or missing, and adapters add where they say."""

from __future__ import annotations

import pytest
import torch
import transformers
from survey.pairs import examine
from survey.residual_stream import unproven_mids
from torch import nn

import petune
from tests.sampling import sampled
from tests.tiny import module_beside

models = module_beside(__file__, "uncommon_structures")

FIRST_BLOCK = {
    "summed branches": {"attn": "0", "mlp": "1", "mid": "input of 1"},
    "several lanes": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0"},
    "normalized weights": {"attn": "0", "mlp": "1"},
    "scaled stream": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "trunk.norms.0", "mid": "input of 1"},
    "triple": {"attn": "trunk.2.fn", "mlp": "trunk.3.fn", "norm1": "trunk.2.fn.norm", "norm2": "trunk.3.fn.0",
               "mid": "input of trunk.3.fn"},
    "maps": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0", "mid": "input of 1"},
    "gated attention": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0", "mid": "input of 1"},
    "experts": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.norm", "mid": "input of 1"},
    "wide class token": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0", "mid": "input of 1"},
    "two norms": {"attn": "0", "mlp": "1", "mid": "input of 1"},
}  # fmt: skip
"""The sites of the first block, without the path of its list."""


def test_the_sites_are_those_of_the_formula() -> None:
    for name, expected in FIRST_BLOCK.items():
        model = models.build(name)
        sites = petune.find_sites(model)
        parts = {role: site.where.replace("trunk.layers.0.", "") for role, site in sites.blocks[0].parts.items()}
        assert parts == expected, name
        assert (len(sites.blocks), sites.head.path) == (2, "head"), name
        assert sites.parts.keys() >= {"norm"} or name == "normalized weights"
        assert unproven_mids(model, sites) == [], name


METHODS = ["adaptformer:bottleneck=4", "lora", "houlsby", "bitfit", "norm", "vpt"]
REFUSED = {
    ("several lanes", "adaptformer"): "has no site 'mid'",
    ("normalized weights", "adaptformer"): "has no site 'mid'",
    ("normalized weights", "norm"): "found nothing to train",
    ("triple", "vpt"): "cannot take prompts",
    ("maps", "vpt"): "lays its tokens out as an image",
}


@pytest.mark.parametrize("name", sampled(models.STRUCTURES, "triple".__eq__))
@pytest.mark.parametrize("method", sampled(METHODS, "adaptformer:bottleneck=4".__eq__))
def test_every_method_works_or_is_refused(name: str, method: str) -> None:
    outcome = examine(models.build(name), method)
    reason = REFUSED.get((name, method.partition(":")[0]))
    assert outcome.state == ("refused" if reason else "ok"), outcome.detail
    assert reason is None or reason in outcome.detail


def test_class_tokens_with_an_mlp_of_their_own_are_not_the_stream() -> None:
    sites = petune.find_sites(models.Vit(models.SplitClass()).eval())
    assert [block.mlp.path for block in sites.blocks] == ["trunk.layers.0.1", "trunk.layers.1.1"]
    assert (sites.norm.path, list(sites.outside_blocks)) == ("last", ["trunk.wide"])


def test_all_summed_branches_get_lora() -> None:
    att = petune.attach(models.build("summed branches"), "lora")
    assert len(att.tuned) == 2 * 2 * (2 + 2) * 2  # A and B, blocks, layers of two attentions and of two MLPs


def test_norms_of_maps_and_of_functions_train() -> None:
    model = models.build("maps")
    att = petune.attach(model, "norm")
    norms = [m for m in model.modules() if isinstance(m, models.ChannelNorm | models.PlainNorm)]
    assert att.counts.tuned == sum(p.numel() for m in norms for p in m.parameters()) == 4 * 2 * 24 + 24


def test_an_adapter_beside_a_scaled_stream_adds_to_the_mlp() -> None:
    model = models.build("scaled stream")
    att = petune.attach(model, "adaptformer", bottleneck=4, blocks=[1])
    adapter = next(m.adapter for m in model.modules() if hasattr(m, "is_petune_module") and hasattr(m, "adapter"))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    trunk, x = model.trunk, torch.randn(2, 16, 24)
    with torch.no_grad():
        output = trunk(x)
        with att.disabled():
            for branch, norm in zip([*trunk.layers[0], trunk.layers[1][0]], trunk.norms, strict=False):
                x = norm(branch(x) + x * 2)
            expected = trunk.norms[3](trunk.layers[1][1](x) + adapter(x) + x * 2)
    torch.testing.assert_close(output, expected)


def decoded(
    layer: nn.TransformerDecoderLayer, x: torch.Tensor, memory: torch.Tensor, adapter: nn.Module, norm_first: bool
) -> torch.Tensor:
    """Compute torch's decoder layer by hand, with an adapter next to its MLP: in the sum that the last norm gets."""
    norms = [layer.norm1, layer.norm2, layer.norm3]
    branches = [
        lambda y, _: layer.self_attn(y, y, y)[0],
        lambda y, _: layer.multihead_attn(y, memory, memory)[0],
        lambda y, stream: layer.linear2(layer.linear1(y).relu()) + adapter(stream),
    ]
    for norm, branch in zip(norms, branches, strict=True):
        x = x + branch(norm(x), x) if norm_first else norm(x + branch(x, x))
    return x


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoders_adapter_is_parallel_to_the_mlp_after_its_attentions(norm_first: bool) -> None:
    model = models.Vit(models.Decoder(norm_first)).eval()
    att = petune.attach(model, "adaptformer", bottleneck=4)
    block = att.sites.blocks[1]
    assert block.where == "trunk.decoder"
    assert block.mid.path == ("trunk.decoder.norm3" if norm_first else "trunk.decoder.linear1")
    adapter = next(module for name, module in block.enter.named_modules() if name.endswith(".adapter"))
    nn.init.normal_(adapter.up.weight)
    x, memory = torch.randn(2, 5, 24), torch.randn(2, 16, 24)
    with torch.no_grad():
        output = block.enter(x, memory)
        with att.disabled():
            expected = decoded(block.enter, x, memory, adapter, norm_first)
    torch.testing.assert_close(output, expected)
    att.detach()
    assert examine(model, "fact").state == "ok"
    assert petune.attach(model, "fact").counts.tuned == 2 * 24 * 16 + 16 * 16 * (2 + 2) * 2  # layers of two MLPs


def test_partial_trains_what_a_block_that_is_no_module_consists_of() -> None:
    expected = {
        "several lanes": ["trunk.layers.1"],
        "scaled stream": ["trunk.layers.1", "trunk.norms.1", "trunk.norms.2"],  # the norms are in another list
        "triple": ["trunk.6", "trunk.7.fn"],
    }
    for name, paths in expected.items():
        model = models.build(name)
        own = {p for path in paths for p in model.get_submodule(path).parameters()}
        att = petune.attach(model, "partial")
        # the last norm of the scaled stream, after the MLP, is in a row with the final one
        ends = {p for norm in att.sites.towers[0].norms for p in norm.enter.parameters()}
        assert len(ends) == (4 if name == "scaled stream" else 2)
        assert {id(p) for p in att.tuned.values()} == {id(p) for p in own | ends}, name
    assert examine(models.build("scaled stream"), "partial").state == "ok"


def test_a_stream_that_is_read_once_more_in_the_block_is_no_mid() -> None:
    sites = petune.find_sites(models.Vit(models.Decoder(False, models.FurtherBranch)).eval())
    assert [set(block.parts) for block in sites.blocks] == [{"attn", "mlp", "norm1", "norm2", "mid"}, {"mlp", "norm2"}]


def test_a_tower_whose_tokens_have_no_batch_dimension_has_blocks() -> None:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    model = Qwen2VisionTransformerPretrainedModel._from_config(Qwen2VLVisionConfig(**sizes, mlp_ratio=2)).eval()
    example = {"hidden_states": torch.randn(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}
    sites = petune.find_sites(model, example=example)
    assert [block.path for block in sites.blocks] == ["blocks.0", "blocks.1"]
    assert all(block.parts.keys() == {"attn", "mlp", "norm1", "norm2", "mid"} for block in sites.blocks)
    assert sites.norm.path == "merger.ln_q"
    assert petune.attach(model, "lora", sites=sites, train_head=False).counts.tuned == 2 * 8 * 32 * (4 + 2 + 3 + 3)
    with pytest.raises(petune.AttachError, match="all images of a batch into one row of tokens"):
        petune.attach(model, "vpt", sites=sites, train_head=False)


def test_an_attention_ends_where_its_heads_are_mapped_to_the_width_of_the_stream() -> None:
    config = transformers.PerceiverConfig(
        num_latents=8, d_latents=32, d_model=16, num_self_attends_per_block=1, image_size=16,
        num_self_attention_heads=4, num_cross_attention_heads=1,
    )  # fmt: skip
    sites = petune.find_sites(transformers.PerceiverForImageClassificationLearned(config).eval())
    for block in sites.blocks:  # also of blocks whose heads are as wide as the stream
        assert (block.attn.path, block.attn.dim) == (f"{block.path}.attention.self", 32)
        assert block.attn.exit_path == f"{block.path}.attention.output"
        assert block.norm_first


def test_norms_of_linear_layers_and_of_the_next_block_are_not_those_of_a_block() -> None:
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 4, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
    )  # fmt: skip
    sites = petune.find_sites(transformers.LevitForImageClassification(config).eval())
    assert all(block.parts.keys() == {"attn", "mlp", "mid"} for block in sites.blocks)


def test_a_block_that_puts_the_channels_second_again_is_one_module() -> None:
    config = transformers.VitDetConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64, patch_size=16
    )
    model = transformers.VitDetModel(config).eval()
    att = petune.attach(model, "adaptformer", sites=petune.find_sites(model, (3, 64, 64)), train_head=False)
    block = att.sites.blocks[0]
    assert (block.path, block.layout, block.mid.layout) == ("encoder.layer.0", "BCHW", "BHWC")
    adapter = block.enter.petune_adaptformer.adapter
    nn.init.normal_(adapter.up.weight)
    entered: list[torch.Tensor] = []
    x = torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(1))
    block.enter.norm2.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        output = block.enter(x)[0]
        with att.disabled():
            plain = block.enter(x)[0]
        torch.testing.assert_close(output - plain, adapter(entered[0]).movedim(-1, 1))

"""Blocks with several attentions or MLPs have sites for all of them; attention that only pools is no block."""

import pytest
import timm
import torch
from torch import nn

import petune
from tests.sites import branching_blocks as models

IMAGES = torch.randn(2, 3, 16, 16)
BRANCHES = {
    "decoder": (["a.0", "a.1", "m.0"], ["n.0", "n.1", "n.2"], {"mlp": "m.0", "norm2": "n.2", "mid": "input of n.2"}),
    "macaron": (
        ["m.0", "a.0", "m.1"],
        ["n.0", "n.1", "n.2"],
        {"attn": "a.0", "mlp": "m.1", "norm1": "n.1", "norm2": "n.2", "mid": "input of n.2"},
    ),
    "two MLPs": (
        ["a.0", "m.0", "m.1"],
        ["n.0", "n.1", "n.2"],
        {"attn": "a.0", "mlp": "m.0", "norm1": "n.0", "norm2": "n.1", "mid": "input of n.1"},
    ),
    "post-norm MLPs": (
        ["a.0", "m.0", "m.1"],
        ["n.0", "n.1", "n.2"],
        {"attn": "a.0", "mlp": "m.0", "norm1": "n.0", "norm2": "n.1", "mid": "input of m.0"},
    ),
    "MLP first": (["a.0", "m.0"], ["n.1", "n.0"], {"attn": "a.0", "mlp": "m.0", "norm1": "n.1", "norm2": "n.0"}),
    "bare matrices": (
        ["a.0", "m.0 … m.1", "m.2 … m.3"],
        ["n.0", "n.1", "n.2"],
        {"attn": "a.0", "mlp": "m.2 … m.3", "norm1": "n.0", "norm2": "n.2", "mid": "input of n.2"},
    ),
    "twofold": (["a.0", "a.1", "m.0", "m.1"], ["n.0", "n.1", "n.2", "n.3"], {"mid": "input of n.2"}),
    "axial": (["a.0", "m.0"], ["n.0", "n.1", "n.2"], {"mlp": "m.0", "norm2": "n.2", "mid": "input of n.2"}),
    "post-norm axial": (
        ["a.0", "m.0"],
        ["n.0", "n.1", "n.2"],
        {"mlp": "m.0", "norm2": "n.2", "mid": "input of m.0"},
    ),
    "parallel": (["a.0", "m.0"], ["n.0"], {"attn": "a.0", "mlp": "m.0", "norm1": "n.0", "mid": "input of n.0"}),
    "parallel norms": (
        ["a.0", "m.0"],
        ["n.0", "n.1"],
        {"attn": "a.0", "mlp": "m.0", "norm1": "n.0", "norm2": "n.1", "mid": "input of n.0"},
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_all_branches_are_found(name: str) -> None:
    block = petune.find_sites(models.build(name)).blocks[1]
    short = [site.where.replace("blocks.1.", "") for site in block.branches]
    norms = [site.where.removeprefix("blocks.1.") for site in block.norms]
    parts = {role: site.where.replace("blocks.1.", "") for role, site in block.parts.items()}
    assert (short, norms, parts) == BRANCHES[name]


def test_an_adapter_beside_the_mlp_of_a_block_that_begins_with_it_is_refused() -> None:
    with pytest.raises(petune.SiteNotFound, match="input=norm"):
        petune.attach(models.build("MLP first"), "adaptformer")


def test_prompts_are_told_from_as_many_tokens_of_an_encoder() -> None:
    model = models.build("decoder")
    num_prompts = 16 - model.queries.shape[1]  # cross-attention has 16 keys with and without prompts
    for method in ("vpt", "vpt:deep=false"):
        att = petune.attach(model, method, num_prompts=num_prompts)
        with torch.no_grad():
            assert not torch.allclose(model(IMAGES), _without(att, IMAGES))
        att.detach()


class LinearBranch(models.Block):
    def __init__(self) -> None:
        super().__init__(norms=3)
        self.further = nn.Linear(models.D, models.D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a[0](self.n[0](x))
        x = x + self.m[0](self.n[1](x))
        return x + self.further(self.n[2](x))


def test_linear_layers_outside_attention_and_mlp_are_named() -> None:
    model = models.Vit(LinearBranch)
    with pytest.warns(UserWarning, match=r"2 linear layers .* blocks\.0\.further, blocks\.1\.further\."):
        petune.attach(model, "lora:r=1")


class LanesInWidth(models.Block):
    """Two lanes side by side in the width, each as wide as attention and MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lanes = x.unflatten(-1, (2, models.D))
        for norm, branch in zip(self.n, (self.a[0], self.m[0]), strict=True):
            lanes = lanes.flip(-2) * 0.5 + branch(norm(lanes.mean(-2)))[..., None, :]
        return lanes.flatten(-2)


class LanesVit(models.Vit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).mT.repeat(1, 1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[..., : models.D]).mean(1))


def test_an_adapter_at_the_mlp_is_as_wide_as_that_where_the_stream_is_wider() -> None:
    model = LanesVit(LanesInWidth)
    with pytest.raises(petune.SiteNotFound, match="input=norm"):
        petune.attach(model, "adaptformer")
    att = petune.attach(model, "adaptformer:input=norm,bottleneck=2")
    num_one = 2 * models.D * 2 + 2 + models.D
    assert att.counts.tuned == 2 * num_one == att.tuner.num_parameters(petune.find_sites(LanesVit(LanesInWidth)))


def _without(att: petune.Attachment, images: torch.Tensor) -> torch.Tensor:
    with att.disabled():
        return att.model(images)


def test_every_branch_gets_its_adapters() -> None:
    layers = {
        "decoder": 8,
        "macaron": 7,
        "twofold": 10,
        "two MLPs": 7,
        "post-norm MLPs": 7,
        "bare matrices": 7,
    }  # q, kv and out of an attention, two of an MLP
    for name, count in layers.items():
        model = models.build(name)
        num_branches = len(BRANCHES[name][0])
        lora = petune.attach(model, "lora:r=1")
        assert len(lora.tuned) == 2 * 2 * count, name
        lora.detach()
        houlsby = petune.attach(model, "houlsby:bottleneck=2")
        assert houlsby.counts.tuned == 2 * num_branches * (2 * models.D * 2 + 2 + models.D), name


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", models.BLOCKS)
@pytest.mark.parametrize("method", ["houlsby:bottleneck=2", "lora:r=1", "adaptformer:bottleneck=2", "fact", "ssf"])
@pytest.mark.filterwarnings("ignore:the head of Pooled is head")  # its pooling may be new, too
def test_methods_keep_their_contract(name: str, method: str) -> None:
    if (name, method.partition(":")[0]) == ("MLP first", "adaptformer"):
        pytest.skip("refused: no stream between attention and MLP")
    petune.check_tuner(method, models.build(name))


@pytest.mark.parametrize("name", ["parallel", "parallel norms", "twofold"])
def test_an_adapter_reads_what_parallel_branches_read(name: str) -> None:
    model = models.build(name)
    block = model.blocks[1]
    entered: list[torch.Tensor] = []
    before: list[torch.Tensor] = []
    norm = block.n[2] if name == "twofold" else block.n[0]
    norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    handle = block.register_forward_hook(lambda module, args, y: before.append(y))
    model(IMAGES)
    handle.remove()
    attachment = petune.attach(model, "adaptformer:bottleneck=2,blocks=[1]")
    adapter = next(holder.adapter for holder in attachment.model.modules() if hasattr(holder, "adapter"))
    nn.init.normal_(adapter.up.weight)
    after: list[torch.Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, args: after.append(args[0]))
    model(IMAGES)
    torch.testing.assert_close(after[0] - before[0], adapter(entered[0]))


@pytest.mark.parametrize("name", ["axial", "post-norm axial"])
def test_an_adapter_reads_and_joins_the_stream_of_a_block_that_reshapes_its_last_sum(name: str) -> None:
    model = models.build(name)
    attachment = petune.attach(model, "adaptformer:bottleneck=2,blocks=[1]")
    adapter = next(holder.adapter for holder in attachment.model.modules() if hasattr(holder, "adapter"))
    nn.init.normal_(adapter.up.weight)
    block, seen = model.blocks[1], list[torch.Tensor]()
    block.register_forward_hook(lambda module, args, y: seen.extend([args[0], y]))
    model(IMAGES)
    with attachment.disabled():
        mid = list[torch.Tensor]()
        site = block.n[2] if name == "axial" else block.m[0]
        site.register_forward_pre_hook(lambda module, args: mid.append(args[0]))
        block(seen[0])
        total = mid[0] + block.m[0](block.n[2](mid[0]) if name == "axial" else mid[0]) + adapter(mid[0])
        expected = total if name == "axial" else block.n[2](total)
    torch.testing.assert_close(seen[1], expected.view(seen[1].shape))


def test_a_scaled_mlp_is_told_in_a_post_norm_block_with_two_attentions() -> None:
    with pytest.raises(petune.AttachError, match="multiplies its MLP's output"):
        petune.attach(models.Vit(models.AxialScaled).eval(), "adaptformer")


def test_a_block_that_returns_its_tokens_in_another_order_has_no_stream_to_read() -> None:
    model = models.Square(models.AxialColumns, -1)
    model.stem = nn.Conv2d(3, models.D, 4, 4)
    with pytest.raises(petune.SiteNotFound, match="with its tokens in the same order"):
        petune.attach(model.eval(), "adaptformer")


def test_an_attention_that_a_block_calls_twice_is_named() -> None:
    with pytest.raises(petune.SiteNotFound, match=r"calls blocks\.0\.a\.0 several times"):
        _ = petune.find_sites(models.build("axial")).blocks[0].attn


def test_a_role_that_a_block_has_twice_is_named() -> None:
    block = petune.find_sites(models.build("decoder")).blocks[0]
    with pytest.raises(petune.SiteNotFound, match=r"2 sites 'attn' .*a\.0, .*a\.1"):
        _ = block.attn


def test_attention_that_pools_into_queries_is_no_block() -> None:
    sites = petune.find_sites(models.build("pooled"))
    assert [block.path for block in sites.blocks] == ["blocks.0", "blocks.1"]


def test_channels_are_told_from_as_many_rows_and_columns() -> None:
    layouts = {name: petune.find_sites(models.build(name)).blocks[0].layout for name in models.BLOCKS if "," in name}
    assert layouts == {"square, channels second": "BCHW", "square, channels last": "BHWC"}


@pytest.mark.exhaustive
def test_channels_are_second_behind_a_pooling() -> None:
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=3)
    blocks = petune.find_sites(model, (3, 64, 64)).blocks
    assert [(block.layout, block.dim) for block in blocks] == [("BCHW", 256), ("BCHW", 512), ("BCHW", 1024)]
    assert [(block.attn.dim, block.mlp.dim) for block in blocks] == [(192, 256), (384, 512), (768, 1024)]
    for method in ("adaptformer", "houlsby", "lora"):
        with pytest.warns(UserWarning, match=r"stay as they are: stages\.2\.blocks\.0"):  # their MLPs
            petune.attach(model, method, input_size=(3, 64, 64)).detach()


def test_a_norm_has_its_own_width_where_the_block_changes_it() -> None:
    sizes = {"img_size": (64, 64), "embed_dim": 24, "stages": (1, 1, 1, 1)}
    model = timm.create_model("hiera_tiny_224", num_classes=3, **sizes)
    assert [norm.dim for norm in petune.find_sites(model, (3, 64, 64)).blocks[1].norms] == [24, 48]


@pytest.mark.exhaustive
def test_convolutions_after_an_attention_are_not_its_mlp() -> None:
    model = timm.create_model("halo2botnet50ts_256", num_classes=3)
    assert [block.path for block in petune.find_sites(model).blocks][-1] == "stages.3.1"

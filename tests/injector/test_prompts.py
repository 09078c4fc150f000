"""Prompts stay inside the blocks: nothing outside sees them, and masks and images of any size work with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import petune
from petune.plugin_dev.tiny_models import tiny_transformers
from tests.tiny import X, randomised, tiny

METHODS = ["vpt:num_prompts=10", "vpt:num_prompts=10,deep=false"]


def prompted(model: nn.Module, method: str) -> nn.Module:
    randomised(petune.attach(model, method))
    return model


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_hidden_states_of_transformers(method: str, asked_before: bool) -> None:
    """transformers records them by hooks on the layers, which it installs when they are first asked for."""
    model: Any = tiny_transformers()
    if asked_before:
        model(X, output_hidden_states=True)
    prompted(model, method)
    out = model(X, output_hidden_states=True)
    assert [tuple(state.shape) for state in out.hidden_states] == 3 * [(2, 17, 24)]
    last = model.vit.layernorm(out.hidden_states[-1])[:, 0]
    assert torch.equal(model.classifier(last), out.logits)


@pytest.mark.parametrize("method", METHODS)
def test_intermediate_features_of_timm(method: str) -> None:
    model: Any = prompted(tiny(), method)
    last, features = model.forward_intermediates(X)
    assert [tuple(x.shape) for x in features] == 2 * [(2, 24, 4, 4)]
    assert torch.equal(model.forward_head(last), model(X))
    assert [tuple(x.shape) for x in model.get_intermediate_layers(X, 2)] == 2 * [(2, 16, 24)]


@torch.no_grad()
def test_blocks_of_one_window_take_prompts_as_those_of_several() -> None:
    """The last stage of Swin: its tokens are the image's, but the block reshapes them by the image's size."""
    stages = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(image_size=32, **stages)).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x).logits
    att = petune.attach(model, METHODS[0])
    assert [block.num_windows for block in att.sites.blocks] == [4, 1]
    assert not torch.equal(model(x).logits, before)
    with att.disabled():
        assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_features_only(method: str) -> None:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **shape).eval()
    before = model(X)
    petune.attach(model, method, input_size=(3, 16, 16), train_head=False)
    after = model(X)
    assert [x.shape for x in after] == [x.shape for x in before]
    assert not torch.equal(after[-1], before[-1])


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_others_see_no_prompts(method: str) -> None:
    model: Any = tiny()
    seen: list[Tensor] = []

    def watch() -> None:
        block = model.blocks[1]
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))

    watch()
    prompted(model, method)
    petune.attach(model, "adaptformer")
    watch()
    seen.clear()  # attaching runs forwards, too
    model(X)
    assert [x.shape[1] for x in seen] == 6 * [17]


@pytest.mark.parametrize("order", [("vpt:deep=false", "adaptformer"), ("adaptformer", "vpt:deep=false")])
def test_other_adapters_see_prompts_as_tokens(order: tuple[str, str]) -> None:
    model: Any = tiny()
    for method in order:
        randomised(petune.attach(model, method))
    adapters = [m for m in model.modules() if type(m).__name__ == "BottleneckAdapter"]
    seen: list[int] = []
    for adapter in adapters:
        adapter.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    model(X)
    assert seen == [67, 67]


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_others_can_change_the_input(method: str) -> None:
    """The prompts then enter with the changed tokens."""
    model: Any = prompted(tiny(), method)
    expected = model(2 * X)
    embed = model.patch_embed
    doubled = embed.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert torch.equal(model(X), expected)
    doubled.remove()
    tokens: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    model(2 * X)
    model.blocks[1].register_forward_pre_hook(lambda module, args: (tokens[0].clone(),))
    if "deep=false" not in method:  # shallow prompts are not the same in another image
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_has_its_own_prompts(method: str) -> None:
    model = prompted(tiny(), method)
    expected = model(X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), expected)
    for p in other.parameters():
        nn.init.zeros_(p)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_with_two_forwards_before_a_backward(method: str) -> None:
    """A repeated block must get the prompts of its own forward, not of the latest one."""
    model: Any = tiny()
    att = randomised(petune.attach(model, method))
    values = list(att.tuned.values())

    def gradients() -> tuple[Tensor, ...]:
        first, _ = model(X).sum(), model(2 * X).sum()
        return torch.autograd.grad(first, values)

    model.train()
    expected = gradients()
    model.set_grad_checkpointing(True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_prompts_that_get_lost_are_an_error() -> None:
    model: Any = prompted(tiny(), METHODS[1])
    with pytest.raises(petune.AttachError, match="vpt:deep=true"):
        model.blocks[1](torch.zeros(1, 17, 24))


def test_detached_the_blocks_are_as_they_were() -> None:
    model: Any = tiny()
    before = [dict(block.__dict__) for block in model.blocks]
    petune.attach(model, METHODS[0]).detach()
    assert [dict(block.__dict__) for block in model.blocks] == before


# Masks and sizes other than those of attaching


def naflex(sizes: list[tuple[int, int]], length: int) -> dict[str, Tensor]:
    """Images of (rows, columns) patches as NaFlexVit gets them, padded to one length."""

    def image(number: int, rows: int, columns: int) -> Iterator[Tensor]:
        count = rows * columns
        patches = torch.randn(count, 48, generator=torch.Generator().manual_seed(rows * columns))
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        yield torch.cat([patches, torch.full((length - count, 48), 7.0)])
        yield torch.cat([grid, grid.new_zeros(length - count, 2)])
        yield torch.arange(length) < count

    columns = zip(*(image(i, *size) for i, size in enumerate(sizes)), strict=True)
    return dict(zip(("patches", "patch_coord", "patch_valid"), map(torch.stack, columns), strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_naflex_images_of_several_sizes(method: str) -> None:
    """An image has the same logits alone as padded beside a larger one: not even prompts see the padding."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("naflexvit_base_patch16_gap", num_classes=5, **shape).eval()
    nn.init.normal_(model.head.weight)
    prompted(model, method)
    together = model(naflex([(3, 4), (4, 5)], 33))
    alone = [model(naflex([size], size[0] * size[1])) for size in ((3, 4), (4, 5))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_at_another_image_size(method: str) -> None:
    """The last four tokens are hidden, so an image that differs only there has the same class token."""
    model: Any = prompted(tiny(dynamic_img_size=True), method)
    wide = torch.randn(1, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    other = wide.clone()
    other[:, :, -4:] = 5.0
    mask = torch.ones(1, 1, 25, 25, dtype=torch.bool)
    assert torch.equal(model(wide, attn_mask=mask), model(wide))
    mask[..., -4:] = False
    assert torch.equal(model(wide, attn_mask=mask), model(other, attn_mask=mask))
    assert not torch.equal(model(wide), model(other))


class Masked(nn.Module):
    """A ViT of torch's own layers, which take a mask of pairs and one of padding; true hides in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image_size = 16
        self.embed = nn.Conv2d(3, 24, 4, 4)
        layers = [nn.TransformerEncoderLayer(24, 2, 48, batch_first=True, norm_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=padding)
        logits: Tensor = self.head(x[:, 0])
        return logits


@dataclass
class Answer:
    logits: Tensor
    more: list[Tensor]


class Repeated(Masked):
    """Calls its layers twice: with what they returned, or with another image; returns a dataclass."""

    def __init__(self, *, recurrent: bool) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x_BCHW: Tensor) -> Answer:  # type: ignore[override]
        first, other = (self.embed(x).flatten(2).transpose(1, 2) for x in (x_BCHW, x_BCHW.flip(-1)))
        for layer in self.layers:
            first = layer(first)
        for layer in self.layers:
            other = layer(first if self.recurrent and layer is self.layers[0] else other)
        return Answer(self.head(other[:, 0]), [self.head(first[:, 1])])


class Looked(nn.Module):
    """The attention of Swin's authors: the forward itself looks up a bias for each pair of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.window_size = 2, (4, 4)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.relative_position_bias_table = nn.Parameter(torch.randn(49, 2))
        tokens = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        offsets = tokens[:, None] - tokens[None] + 3
        self.register_buffer("relative_position_index", offsets[..., 0] * 7 + offsets[..., 1])

    def forward(self, x: Tensor, **mask: Any) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 12).permute(2, 0, 3, 1, 4)
        area = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(area, area, -1)
        weights = (q @ k.mT / 12**0.5 + bias.permute(2, 0, 1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", ["vpt:num_prompts=3", "vpt:num_prompts=3,deep=false"])
def test_prompts_have_no_bias_in_a_table_that_the_forward_looks_up(method: str) -> None:
    model = tiny(class_token=False, global_pool="avg")
    for block in model.blocks:
        block.attn = Looked()
    before, plain = copy.deepcopy(model.state_dict()), model(X)
    att = petune.attach(model, method)
    assert model.blocks[0].attn.state_dict().keys() == Looked().state_dict().keys()
    assert (copy.deepcopy(model)(X) - model(X)).abs().max() == 0
    model(X).square().sum().backward()
    att.check_gradients()
    att.detach()
    assert torch.equal(model(X), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.blocks[0].attn.window_size == (4, 4)
    assert "relative_position_index" not in vars(model.blocks[0].attn)


def test_shallow_prompts_do_not_pass_from_call_to_call() -> None:
    recurrent, siamese = (Repeated(recurrent=value).eval() for value in (True, False))
    with pytest.raises(petune.AttachError, match="of Repeated cannot take prompts"):
        petune.attach(recurrent, METHODS[1])
    before = siamese(X).logits
    prompted(siamese, METHODS[1])
    assert not torch.equal(siamese(X).logits, before)
    prompted(recurrent, METHODS[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mask", "padding"])
def test_masks_of_torch(method: str, kind: str) -> None:
    model = prompted(Masked().eval(), method)
    other = X.clone()
    other[:, :, -4:, -4:] = 5.0
    hidden = torch.zeros(2, 16, dtype=torch.bool) if kind == "padding" else torch.zeros(16, 16, dtype=torch.bool)
    torch.testing.assert_close(model(X, **{kind: hidden}), model(X))
    hidden[:, -1] = True
    torch.testing.assert_close(model(X, **{kind: hidden}), model(other, **{kind: hidden}))
    assert not torch.allclose(model(X), model(other))
    assert not torch.allclose(model(X, **{kind: hidden}), model(X))


def test_attention_maps_have_rows_and_columns_for_prompts() -> None:
    """A map whose rows and columns of prompts were cut would not sum to 1; vpt's page says so."""
    model: Any = tiny_transformers()
    model.set_attn_implementation("eager")
    output = prompted(model, METHODS[0])(X, output_attentions=True, output_hidden_states=True)
    num_tokens = output.hidden_states[0].shape[1]
    for attention in output.attentions:
        assert attention.shape[-2:] == (num_tokens + 10, num_tokens + 10)
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


class Visible(nn.Module):
    """A block whose attention multiplies by zeros and ones what each token sees of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = (q @ k.mT).masked_fill(~visible.bool(), -1e9).softmax(-1)
        x = x + self.proj(weights @ v)
        return x + self.mlp(self.norm2(x))


class VisibleByMask(Visible):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask)


class Seen(Masked):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor, hidden: int = 0) -> Tensor:  # type: ignore[override]
        x = self.embed(x).flatten(2).transpose(1, 2)
        seen = torch.ones(1, 16, device=x.device)
        seen[:, 16 - hidden :] = 0
        for layer in self.layers:
            x = layer(x, seen[:, None] * seen[:, :, None])
        logits: Tensor = self.head(x[:, 0])
        return logits


def test_prompts_that_a_mask_hides_are_refused() -> None:
    for method in METHODS:
        with pytest.raises(petune.AttachError, match=r"of Seen cannot take prompts.* do nothing"):
            petune.attach(Seen(Visible), method)


def test_a_mask_of_zeros_and_ones_shows_prompts() -> None:
    other = X.clone()
    other[:, :, -4:, -4:] = 5.0
    for method in METHODS:
        model = Seen(VisibleByMask)
        plain = model(X)
        prompted(model, method)
        assert not torch.allclose(model(X), plain)
        assert not torch.allclose(model(X), model(other))
        torch.testing.assert_close(model(X, hidden=1), model(other, hidden=1))
        assert not torch.allclose(model(X, hidden=1), model(X))

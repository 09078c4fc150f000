"""Residual sums in every operation that adds, and layers that see flattened tokens: an adapter adds where it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.tiny import X, randomised, tiny

Add = Callable[[Tensor, Tensor, Tensor], Tensor]
SUMS: dict[str, Add] = {
    "addcmul": lambda x, y, g: torch.addcmul(x, g, y, value=0.5),
    "lerp": lambda x, y, g: x.lerp(y, g),
    "lerp by a number": lambda x, y, g: torch.lerp(x, y, weight=0.3),
    "stack and sum": lambda x, y, g: torch.stack([x, y], -1).sum(-1),
    "stack and mean": lambda x, y, g: torch.stack((y, x)).mean(dim=0),
    "minus a negative": lambda x, y, g: x - (-y),
    "sub": lambda x, y, g: torch.sub(x, y, alpha=0.5),
    "rsub": lambda x, y, g: torch.rsub(y, x),
    "add with alpha": lambda x, y, g: y.add(x, alpha=0.7),
    "in float64": lambda x, y, g: (x.double() + y.to(torch.float64)).to(x.dtype),
    "Python's sum": lambda x, y, g: sum([x, y]),
    "aten": lambda x, y, g: torch.ops.aten.add.Tensor(x, y),
}


class Block(nn.Module):
    """A block that adds by `add`, and gives its MLP the tokens by `feed`."""

    def __init__(self, inner: nn.Module, add: Add, flattens: str = "") -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = inner.norm1, inner.attn, inner.norm2, inner.mlp
        self.add, self.flattens, self.g = add, flattens, nn.Parameter(torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = self.add(x, self.attn(self.norm1(x)), self.g)
        return self.second(x.flatten(0, 1)).view(shape) if self.flattens == "stream" else self.second(x)

    def second(self, x: Tensor) -> Tensor:
        """Return the tokens after the MLP."""
        y = self.norm2(x)
        return self.add(x, self.mlp(y.reshape(-1, 24)).view(x.shape) if self.flattens == "mlp" else self.mlp(y), self.g)


def model_of(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = tiny()
    model.blocks = nn.Sequential(*(make(block) for block in model.blocks))
    return model.eval()


def check_adaptformer(model: nn.Module) -> None:
    """Check the whole output of a block against x + mlp(x) + adapter(x)."""
    att = randomised(petune.attach(model, "adaptformer", bottleneck=4, blocks=[0]))
    block, x = model.blocks[0], torch.randn(2, 17, 24)
    adapter = block.petune_adaptformer.adapter
    with torch.no_grad():
        output = block(x)
        with att.disabled():
            mid = block.add(x, block.attn(block.norm1(x)), block.g)
            torch.testing.assert_close(output, block(x) + adapter(mid))


@pytest.mark.parametrize("name", SUMS)
def test_a_residual_sum_is_recognized_in_any_operation(name: str) -> None:
    check_adaptformer(model_of(lambda block: Block(block, SUMS[name])))


@pytest.mark.parametrize("flattens", ["mlp", "stream"])
def test_layers_that_see_flattened_tokens_are_sites(flattens: str) -> None:
    model = model_of(lambda block: Block(block, lambda x, y, g: x + y, flattens))
    block = petune.find_sites(model).blocks[1]
    parts = {role: site.where for role, site in block.parts.items()}
    assert parts == {
        "attn": "blocks.1.attn", "mlp": "blocks.1.mlp", "norm1": "blocks.1.norm1", "norm2": "blocks.1.norm2",
        "mid": "input of blocks.1.norm2",
    }  # fmt: skip
    check_adaptformer(model)
    assert petune.attach(model, "lora").counts.tuned == petune.attach(tiny(), "lora").counts.tuned


class Scaled(nn.Module):
    """Blocks that are no modules, and scale what they add."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([b.norm1, b.attn, b.norm2, b.mlp]) for b in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attention, norm2, mlp in self.layers:
            x = x.add(attention(norm1(x)), alpha=0.7)
            x = x.add(mlp(norm2(x)), alpha=0.7)
        return x


def test_an_adapter_does_not_add_where_its_output_would_be_scaled() -> None:
    model = tiny()
    model.blocks = Scaled(model.blocks)
    with pytest.raises(petune.SiteNotFound, match=r"saw no module after .*:variant=paddle_study"):
        petune.attach(model, "adaptformer")
    petune.attach(model, "adaptformer", variant="paddle_study")


@pytest.mark.parametrize(
    "add",
    [lambda x, y, g: x.addcmul_(y, g), lambda x, y, g: x.lerp_(y, 0.3), lambda x, y, g: torch.Tensor.subtract_(x, -y)],
)
def test_a_residual_sum_in_place_is_recognized(add: Add) -> None:
    blocks = petune.find_sites(model_of(lambda block: Block(block, add))).blocks
    assert [block.mid.where for block in blocks] == ["input of blocks.0.norm2", "input of blocks.1.norm2"]


class InPlace(Block):
    """`x += y`, as many write it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


def test_tokens_that_change_in_place_are_not_read_too_late() -> None:
    model = model_of(lambda block: InPlace(block, SUMS["lerp"]))
    assert [block.mid.where for block in petune.find_sites(model).blocks] == [
        "input of blocks.0.norm2", "input of blocks.1.norm2"
    ]  # fmt: skip
    with pytest.raises(
        petune.AttachError, match=r"changes tokens in place after an adapter has read them .*x = x \+ y"
    ):
        petune.attach(model, "adaptformer")
    plain = model(X)
    randomised(petune.attach(model, "lora"))
    assert not torch.allclose(model(X), plain)


class Modulated(Block):
    """A block that scales and shifts what enters its MLP, as DiT's adaLN, and casts it."""

    def second(self, x: Tensor) -> Tensor:
        y = (self.norm2(x) * (1 + x[:, :1]) + x.mean(1, keepdim=True)).to(torch.float64)
        return self.add(x, self.mlp(y.float()), self.g)


def test_a_norm_is_seen_through_modulation_and_casts() -> None:
    model = model_of(lambda block: Modulated(block, lambda x, y, g: x + y))
    assert [block.mid.path for block in petune.find_sites(model).blocks] == ["blocks.0.norm2", "blocks.1.norm2"]
    check_adaptformer(model)


class Keeping(Block):
    """A block that returns nothing: it changes the state that it is called with."""

    def forward(self, state: dict[str, Tensor]) -> None:  # type: ignore[override]
        state["x"] = super().forward(state["x"])


class Keeper(nn.Sequential):
    """Blocks that share a state."""

    def forward(self, x: Tensor) -> Tensor:
        state = {"x": x}
        for block in self:
            block(state)
        return state["x"]


def test_blocks_that_change_a_state_are_found() -> None:
    model = model_of(lambda block: Keeping(block, lambda x, y, g: x + y))
    model.blocks = Keeper(*model.blocks)
    with torch.no_grad():
        before = model(X)
        att = randomised(petune.attach(model, "adaptformer", bottleneck=4))
        assert [block.where for block in att.sites.blocks] == [
            "blocks.0.attn … blocks.0.mlp",
            "blocks.1.attn … blocks.1.mlp",
        ]
        assert not torch.allclose(model(X), before)


class OverDepth(nn.Module):
    """An attention or an MLP that reads what each token was in all earlier layers, by an attention over these."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.over_depth = inner, nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, history: list[Tensor]) -> Tensor:
        stack = torch.stack(history, 2).flatten(0, 1)
        x = self.over_depth(stack[:, -1:], stack, stack, need_weights=False)[0]
        return self.inner(x.view_as(history[0]))


class OverDepths(nn.Module):
    """Attention residuals: nothing is added to a stream."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([OverDepth(b.attn), OverDepth(b.mlp)]) for b in blocks)

    def forward(self, x: Tensor) -> Tensor:
        history = [x]
        for attention, mlp in self.layers:
            history.append(attention(history))
            history.append(mlp(history))
        return history[-1]


def test_blocks_with_attention_residuals_are_whole() -> None:
    model = tiny()
    model.blocks = OverDepths(model.blocks)
    blocks = petune.find_sites(model.eval()).blocks
    assert [block.where for block in blocks] == [f"blocks.layers.{i}.0 … blocks.layers.{i}.1" for i in range(2)]
    assert all({"attn", "mlp"} <= block.parts.keys() for block in blocks)

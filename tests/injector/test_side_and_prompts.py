"""A side network where prompts enter the blocks that it reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.injector.test_edit import Custom
from tests.tiny import X, tiny


class Tokens(nn.Module):
    """The same prompts for all images."""

    num_prompts = 3

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(1, 3, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.prompts


class PerToken(nn.Module):
    """A state for each token, which is added at every site."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, state: Tensor | None, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        state = self.layer(x) if state is None else state + self.layer(x)
        return state, state


class Pooled(PerToken):
    """A state for each image."""

    def forward(self, state: Tensor | None, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        mean = self.layer(x).mean(1, keepdim=True)
        state = mean if state is None else state + mean
        return state, state.expand_as(x)


def both(edit: petune.Edit, cell: nn.Module, index: int | None, *, side_first: bool) -> None:
    blocks = edit.sites.blocks
    verbs = [
        lambda: edit.prompt(blocks if index is None else blocks[index], Tokens()),
        lambda: edit.side(blocks, cell),
    ]
    for verb in reversed(verbs) if side_first else verbs:
        verb()


@pytest.mark.parametrize("side_first", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_prompts_in_some_of_the_sites_of_a_state_per_token_are_refused_with_advice(
    index: int, side_first: bool
) -> None:
    model = tiny()
    before = copy.deepcopy(model)
    with pytest.raises(petune.AttachError, match=r"PerToken .*number 1.*let them pass through all, edit\.prompt"):
        petune.attach(model, Custom(lambda e: both(e, PerToken(), index, side_first=side_first)))
    assert torch.equal(model(X), before(X))
    assert [*model.state_dict()] == [*before.state_dict()]


@pytest.mark.parametrize(("cell", "index"), [(PerToken, None), (Pooled, 0), (Pooled, 1)])
def test_a_cell_reads_prompts_as_tokens(cell: type[PerToken], index: int | None) -> None:
    model = tiny()
    made = cell()
    att = petune.attach(model, Custom(lambda e: both(e, made, index, side_first=False)), train_head=False)
    prompts = next(p for key, p in att.tuned.items() if key.endswith("prompts"))
    state: Tensor | None = None
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(X))))
    base = tiny()
    for number, block in enumerate(base.blocks):
        if number == (index or 0):
            x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], 1)
        state, change = made(state, x, number)
        x = block(x) + change
        if number == index or (index is None and number == 1):
            x = torch.cat([x[:, :1], x[:, 4:]], 1)
    torch.testing.assert_close(model(X), base.forward_head(base.norm(x)))

"""Adapters compute the same gradients under gradient checkpointing, also where a repetition ends inside of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import petune
from tests.injector.test_edit import Custom
from tests.tiny import X, tiny

WIDTH = 24


class Tokens(nn.Module):
    num_prompts = 3

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.prompts


class Pooled(nn.Module):
    """A state for each image, which is added at the head only."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, state: Tensor | None, x: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        mean = self.layer(x if x.ndim == 2 else x.mean(1)).tanh()
        state = mean if state is None else state * mean
        return state, self.out(state) if x.ndim == 2 else None


class Scaled(nn.Module):
    """Changes what enters and what leaves the modules inside."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return inner(x * self.before) * self.after


class Inner(nn.Module):
    """Calls what it surrounds, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return inner(x) + inner(x) * self.scale


class Checkpointed(nn.Module):
    """An adapter that checkpoints a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda y: self.layer(self.layer(y).tanh()).tanh(), x, use_reentrant=False)
        return out


def side(edit: petune.Edit) -> None:
    head = edit.sites.head
    edit.side([*edit.sites.blocks, head], Pooled(head.module.out_features))


def around(adapter: type[nn.Module], *, prompts_first: bool) -> Callable[[petune.Edit], None]:
    def attach(edit: petune.Edit) -> None:
        verbs = [
            lambda: edit.prompt(edit.sites.blocks, Tokens()),
            lambda: [edit.around(block, adapter()) for block in edit.sites.blocks],
        ]
        for verb in verbs if prompts_first else reversed(verbs):
            verb()

    return attach


def around_two(edit: petune.Edit) -> None:
    edit.prompt(edit.sites.blocks, Tokens())
    edit.around(edit.sites.blocks[1:], Inner())


def nested(edit: petune.Edit) -> None:
    for block in edit.sites.blocks:
        edit.parallel(block, block, Checkpointed())


CASES = {
    "side": side,
    "prompts_then_around": around(Scaled, prompts_first=True),
    "around_then_prompts": around(Scaled, prompts_first=False),
    "around_that_calls_twice": around(Inner, prompts_first=True),
    "around_two_blocks": around_two,
    "nested": nested,
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_with_checkpointing(case: str) -> None:
    torch.manual_seed(0)
    att = petune.attach(tiny(depth=3), Custom(CASES[case]), name="m")
    expected = gradients(att)
    att.model.set_grad_checkpointing()  # type: ignore[operator]
    for wanted, found in zip(expected, gradients(att), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def gradients(att: petune.Attachment) -> list[Tensor]:
    att.train()
    att.model.zero_grad()
    att.model(X).square().sum().backward()
    return [p.grad.clone() for p in att.parameters() if p.grad is not None]


class Greedy(Pooled):
    def forward(self, state: Tensor | None, x: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        if x.ndim == 2:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(state, x, index)


def test_lack_of_memory_in_a_side_network_is_no_fault_of_its_shapes() -> None:
    """Training handles it, such as by a smaller batch."""
    cells: list[nn.Module] = []

    def attach(edit: petune.Edit) -> None:
        cells.append(Pooled(edit.sites.head.module.out_features))
        edit.side([*edit.sites.blocks, edit.sites.head], cells[0])

    att = petune.attach(tiny(), Custom(attach), name="m")
    cells[0].__class__ = Greedy
    with pytest.raises(torch.OutOfMemoryError):
        att.model(X)

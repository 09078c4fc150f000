"""check_tuner catches tuners that are broken in one way each, by the property that is meant for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

import petune
from petune.base.errors import ContractViolation
from petune.plugin_dev.contract import examine
from petune.plugin_dev.properties import PROPERTIES
from tests.tuners import disturbing, quiet
from tests.tuners.disturbing import Low, Sound, broken


class ZeroZero(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up.bias = None


class DeadFactor(Low):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).detach())


class KeepsState(Low):
    seen: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = self.up(self.down(x)) + 0.1 * self.up(self.down(torch.zeros_like(x) + self.seen))
        self.seen = x.detach().mean()
        return out


class KeepsActivation(Low):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return super().forward(x)


class DropsInEval(Low):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class OnlyInTraining(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else torch.zeros_like(x)


class Scales(nn.Module):
    """The MLP's output, scaled; `merge` forgets the bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def merge(self, module: nn.Module) -> None:
        with torch.no_grad():
            module.fc2.weight.mul_(self.scale[:, None])


class MergesWrongly(Sound):
    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.require_blocks():
            edit.after(block.mlp, Scales(block.dim))


class Mixes(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0, keepdim=True))


class NotIdentity(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        nn.init.normal_(self.up.weight)


class InPlace(Low):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.down.weight[0, 0] += 1e-3
        return super().forward(x)


class TouchesBackbone(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        with torch.no_grad():
            next(edit.model.parameters()).mul_(1.5)


class TrainsByHand(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        self.weight = edit.sites.blocks[0].attn.enter.proj.weight

    def loss(self, step: int) -> Tensor | None:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return None


class WrongCount(Sound):
    def num_parameters(self, sites: petune.Sites) -> int:
        return 2 * 2 * sites.embed_dim * len(sites.blocks)  # forgot the biases


class NotDetachable(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.blocks[0].register_buffer("left_behind", torch.zeros(1))


class LeavesHook(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.blocks[0].register_forward_hook(lambda *_: None)


class Renames(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        block = edit.model.blocks[0]
        block.mlp = nn.Sequential(block.mlp)


class NotSaved(Sound):
    """Keep what is learned outside of the adapters' parameters."""

    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        shift = torch.zeros(edit.sites.embed_dim)
        handle = edit.model.norm.register_forward_hook(lambda m, a, y: y + shift)
        edit.on_detach(handle.remove)
        edit.on_toggle(lambda on: shift.zero_() if not on else shift.fill_(1.0))
        self.shift = shift

    def loss(self, step: int) -> Tensor | None:
        self.shift.fill_(1.0)
        return None


class Uncopied(Low):
    """Hold something that cannot be copied; in a list, so that it does not look like a tensor that a forward left."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.kept = [self.up.weight @ self.down.weight]


class ByHand(Sound):
    """A change made by hand: sound, unless a subclass toggles it wrongly."""

    def attach(self, edit: petune.Edit) -> None:
        block = edit.model.blocks[0]
        block.shift, on = nn.Parameter(torch.zeros_like(block.norm1.weight)), [True]
        handle = block.register_forward_hook(lambda m, _, y: y + m.shift if on[0] else y)
        edit.add_parameters([block.shift])
        edit.on_detach(handle.remove)
        edit.on_detach(lambda: delattr(block, "shift"))
        self.register_toggle(edit, on)

    def register_toggle(self, edit: petune.Edit, on: list[bool]) -> None:
        edit.on_toggle(lambda wanted: on.__setitem__(0, wanted))


class NeverOff(ByHand):
    def register_toggle(self, edit: petune.Edit, on: list[bool]) -> None: ...


class NeverOnAgain(ByHand):
    def register_toggle(self, edit: petune.Edit, on: list[bool]) -> None:
        edit.on_toggle(lambda wanted: on.__setitem__(0, False))


class CountsAllBlocks(Sound):
    def num_parameters(self, sites: petune.Sites) -> int:
        return sum(2 * 2 * block.dim + 2 + block.dim for block in sites.all_blocks)


class InnerCut(nn.Module):
    """Runs the MLP, but lets no gradient into it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, inner: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = inner(x)
        return y * self.scale


class InnerMixes(InnerCut):
    """Adds the mean over the images before it runs the MLP."""

    def forward(self, inner: Any, x: Tensor) -> Tensor:
        return inner(x) + (self.scale - 1) * inner(x + x.mean(0, keepdim=True))


class Surrounds(Sound):
    adapter: type[nn.Module] = InnerCut

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.require_blocks():
            edit.around(block.mlp, self.adapter(block.dim))


class SurroundsMixing(Surrounds):
    adapter: type[nn.Module] = InnerMixes


class DetachedLoss(Low):
    aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux_loss = y.detach().mean()
        return y


class ColumnLoss(Low):
    aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux_loss = y.mean(0)
        return y


class Sparse(petune.Tuner[petune.TunerConfig]):
    """Train one entry of each norm's weight."""

    def attach(self, edit: petune.Edit) -> None:
        weights = [block.norm1.module.weight for block in edit.sites.require_blocks()]
        self.weights = weights
        self.entries = edit.train(weights, mask=[torch.arange(len(weight)) == 0 for weight in weights])


class WritesOutsideMask(Sparse):
    def on_step_end(self, step: int) -> None:
        with torch.no_grad():
            self.weights[0][1] += 0.1


class ChoosesByChance(Sparse):
    generator = torch.Generator().manual_seed(1)

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        for _ in batches:
            break
        chosen = [int(torch.randint(len(weight), (), generator=self.generator)) for weight in self.weights]
        pairs = zip(self.weights, chosen, strict=True)
        self.entries.choose([torch.arange(len(weight)) == number for weight, number in pairs])


CASES: list[tuple[Any, str]] = [
    (WritesOutsideMask(), "masked entries"),
    (ChoosesByChance(), "calibration"),
    (Surrounds(), "inner gradients"),
    (SurroundsMixing(), "independent images"),
    (broken(DetachedLoss), "auxiliary loss"),
    (broken(ZeroZero), "gradients"),
    (broken(DeadFactor), "gradients"),
    (broken(KeepsState), "repeatable evaluation"),
    (broken(KeepsActivation), "no state between forwards"),
    (broken(DropsInEval), "repeatable evaluation"),
    (broken(OnlyInTraining), "effect in eval mode"),
    (MergesWrongly(), "merge"),
    (broken(Mixes), "independent images"),
    (broken(NotIdentity), "identity at init"),
    (broken(InPlace), "repeatable evaluation"),
    (TouchesBackbone(), "backbone values"),
    (TrainsByHand(), "frozen tensors"),
    (WrongCount(), "parameter count"),
    (NotDetachable(), "detach"),
    (LeavesHook(), "detach"),
    (Renames(), "backbone keys"),
    (broken(Uncopied), "deep copy"),
    (NeverOff(), "disabled output"),
    (NeverOnAgain(), "re-enabled output"),
    (NotSaved(), "save and load"),
    (CountsAllBlocks(), "chosen blocks"),
]


def name_of(case: tuple[Any, ...]) -> str:
    tuner = case[0]
    return tuner.adapter.__name__ if type(tuner).__name__ == "Broken" else type(tuner).__name__


@pytest.mark.parametrize("tuner", [Sound(), ByHand(), *quiet.SOUND], ids=["Sound", "ByHand", "Normalizes"])
def test_sound_tuners_pass(tuner: Sound) -> None:
    assert petune.check_tuner(tuner) == [prop.name for prop in PROPERTIES]


def test_every_property_has_a_case() -> None:
    """A property without a case could be left out without a failing test."""
    cases = {name for _, name, *_ in (*CASES, *disturbing.CASES, *quiet.CASES)}
    assert cases == {prop.name for prop in PROPERTIES}


def test_a_loss_that_is_no_scalar_is_one_line() -> None:
    with pytest.raises(petune.AttachError, match=r"aux_loss of the adapter ColumnLoss is of shape \(17, 24\)"):
        petune.check_tuner(broken(ColumnLoss))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_broken_tuner_is_caught(case: tuple[Any, str]) -> None:
    tuner, name = case
    with pytest.raises(ContractViolation) as caught:
        petune.check_tuner(tuner)
    assert str(caught.value).startswith(f"{type(tuner).__name__}: {name}: "), str(caught.value)


@pytest.mark.parametrize("case", [*disturbing.CASES, *quiet.CASES], ids=name_of)
def test_a_tuner_that_disturbs_what_is_not_its_own_is_caught(case: tuple[Any, str, str]) -> None:
    tuner, name, message = case
    classes, dtype = vars(Attention).copy(), torch.get_default_dtype()
    with pytest.raises(ContractViolation) as caught:
        petune.check_tuner(tuner)
    text = str(caught.value)
    assert text.startswith(f"{type(tuner).__name__}: {name}: "), text
    assert message in text
    assert (vars(Attention).copy(), torch.get_default_dtype()) == (classes, dtype)
    assert not torch.nn.modules.module._has_any_global_hook()


def test_a_line_of_the_backbones_own_code_is_not_named_as_the_authors() -> None:
    findings = {finding.name: finding.problem for finding in examine(disturbing.NoDtype())}
    assert "mixed dtype" in findings["number formats"]
    assert ".py:" not in findings["number formats"]

"""`calibrate`: a method chooses what trains on training batches, once, before the first step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import petune
from petune.base.errors import AttachError, PluginError, UsageError
from tests.tiny import X, tiny

Y = torch.tensor([0, 1])
BATCHES = [(X, Y), (X.flip(0), Y)]


class Rows(petune.Tuner[petune.TunerConfig]):
    """Train the entry with the largest gradient of each row of each MLP's first layer."""

    fails = False

    def attach(self, edit: petune.Edit) -> None:
        weights = [block.mlp.enter.fc1.weight for block in edit.sites.blocks]
        self.entries = edit.train(weights, mask=[first_of_rows(w) for w in weights])

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        for batch in batches:
            batch.loss().backward()
        self.gradients = [w.grad.clone() for w in self.entries.targets if w.grad is not None]
        rows = [nn.functional.one_hot(g.abs().argmax(1), g.shape[1]).bool() for g in self.gradients]
        self.entries.choose(rows)
        if self.fails:
            raise ValueError("too bad")


def first_of_rows(weight: Tensor) -> Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 0] = True
    return mask


def attached(model: nn.Module | None = None, tuner: petune.Tuner[Any] | None = None) -> petune.Attachment:
    return petune.attach(tiny() if model is None else model, tuner or Rows(), name="rows")


def steps(att: petune.Attachment, number: int = 3) -> None:
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    att.train()
    for _ in range(number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(att.model(X), Y).backward()
        optimizer.step()


def test_it_sees_the_gradients_of_all_entries_and_leaves_nothing_behind() -> None:
    model = tiny()
    base = copy.deepcopy(model)
    att = attached(model)
    att.train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    att.calibrate(BATCHES)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    for x, y in BATCHES:
        nn.functional.cross_entropy(base(x), y).backward()
    for gradient, block in zip(att.tuner.gradients, base.blocks, strict=True):
        torch.testing.assert_close(gradient, block.mlp.fc1.weight.grad)
    steps(att)
    model.eval()(X)
    weight, original = model.blocks[0].mlp.fc1.weight, base.blocks[0].mlp.fc1.weight
    rows, columns = (weight != original).nonzero(as_tuple=True)
    assert torch.equal(columns, original.grad.abs().argmax(1)[rows])


def test_it_is_done_once_and_is_saved(tmp_path: Path) -> None:
    att = attached()
    assert not att.is_calibrated
    att.calibrate(BATCHES)
    indices = att.state()[_key(att)].clone()
    att.calibrate([(X + 1, Y)])
    assert torch.equal(att.state()[_key(att)], indices)
    steps(att)
    att.model.eval()
    att.save(tmp_path)
    loaded = petune.load(tiny(), tmp_path, tuner=Rows())
    assert loaded.is_calibrated
    assert torch.equal(loaded.model(X), att.model(X))
    steps(loaded)


def _key(att: petune.Attachment) -> str:
    return next(key for key in att.state() if key.endswith("indices"))


def test_a_loop_that_does_not_call_it_is_an_error() -> None:
    with pytest.raises(AttachError, match=r"Call att.calibrate\(batches\) with training batches before the first step"):
        steps(attached())


def test_methods_that_need_none_are_left_alone() -> None:
    att = petune.attach(tiny(), "adaptformer")
    assert att.is_calibrated
    att.calibrate([(X, Y)])


class OfSplit(TensorDataset):
    def __init__(self, **marks: object) -> None:
        super().__init__(X, Y)
        self.__dict__.update(marks)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "was given no batch"),
        (5, "not int"),
        ([X], "was given Tensor"),
        (DataLoader(OfSplit(split="test")), "the split 'test' of OfSplit"),
        (DataLoader(OfSplit(split="val")), "the split 'val' of OfSplit"),
        (DataLoader(Subset(OfSplit(train=False), [0])), "the split 'test' of OfSplit"),
    ],
)
def test_batches_that_make_no_sense_are_one_clear_error(batches: Any, message: str) -> None:
    att = attached()
    before = {key: t.clone() for key, t in att.model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        att.calibrate(batches)
    assert all(torch.equal(t, before[key]) for key, t in att.model.state_dict().items())
    assert not att.is_calibrated


def test_training_data_of_a_known_split_is_taken() -> None:
    att = attached()
    att.calibrate(DataLoader(OfSplit(split="train", train=True)))
    assert att.is_calibrated


def test_a_failure_undoes_what_was_chosen() -> None:
    class Fails(Rows):
        fails = True

    model = tiny()
    base = copy.deepcopy(model)
    att = attached(model, Fails())
    before = att.state()[_key(att)].clone()
    with pytest.raises((PluginError, ValueError), match="too bad"):
        att.calibrate(BATCHES)
    assert torch.equal(att.state()[_key(att)], before)
    assert torch.equal(model(X), base(X))
    with att.disabled(), pytest.raises(AttachError, match="is disabled"):
        att.calibrate(BATCHES)


def test_features_of_sites_are_read() -> None:
    class Reads(petune.Tuner[petune.TunerConfig]):
        def attach(self, edit: petune.Edit) -> None:
            self.block = edit.sites.blocks[0]
            edit.train(self.block.mlp)

        def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
            (batch,) = batches
            self.mid, self.normed = (batch.entering([site])[0] for site in (self.block.mid, self.block.mlp))
            (self.out,) = batch.leaving([self.block.norm2])

    att = attached(tuner=Reads())
    att.calibrate([(X, Y)])
    torch.testing.assert_close(att.tuner.normed, att.model.blocks[0].norm2(att.tuner.mid))
    assert torch.equal(att.tuner.out, att.tuner.normed)


class OnePath(nn.Module):
    """One of two layers, by a number that the step chooses."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.paths[self.number](x)


class Supernet(petune.Tuner[petune.TunerConfig]):
    """Train one of two paths in a step."""

    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            edit.parallel(block.mlp, block.mlp, OnePath(block.dim))


@pytest.mark.parametrize("allowed", [True, False])
def test_parameters_may_lack_a_gradient_where_the_tuner_says_so(allowed: bool) -> None:
    tuner = Supernet()
    tuner.may_lack_gradients = allowed
    att = petune.attach(tiny(), tuner, name="supernet")
    nn.functional.cross_entropy(att.model(X), Y).backward()
    if allowed:
        att.check_gradients(under_way=True)
        att.model.zero_grad()
        with pytest.raises(petune.DeadSite):
            att.check_gradients()
    else:
        with pytest.raises(petune.DeadSite, match="got no gradient"):
            att.check_gradients()


def test_batches_are_read_lazily() -> None:
    read: list[int] = []

    class First(Rows):
        def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
            next(iter(batches)).loss()

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            read.append(1)
            yield X, Y

    attached(tuner=First()).calibrate(endless())
    assert len(read) == 1


def test_gradients_from_before_attaching_choose_nothing() -> None:
    model, fresh = tiny(), attached()
    (100 * nn.functional.cross_entropy(model(X + 3), torch.tensor([2, 3]))).backward()
    before = {p: p.grad for p in model.parameters()}
    att = attached(model)
    for one in (att, fresh):
        one.calibrate(BATCHES)
    assert torch.equal(att.tuner.entries.indices, fresh.tuner.entries.indices)
    for one in (att, fresh):
        steps(one, number=1)
    assert torch.equal(att.tuner.entries.values, fresh.tuner.entries.values)
    att.detach()
    assert all(p.grad is before[p] for p in model.blocks.parameters())

"""`edit.train(…, mask=…)`: entries of the backbone's parameters train, and the others never move."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, NotMergeable
from tests.injector.test_edit import Custom
from tests.tiny import X, tiny

Y = torch.tensor([0, 1])


def masks_of(parameters: Sequence[nn.Parameter], share: float = 0.1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(p.shape, generator=generator) < share for p in parameters]


def train_blocks(edit: petune.Edit) -> None:
    for block in edit.sites.blocks:
        parameters = list(block.module.parameters())
        edit.train(parameters, mask=masks_of(parameters))


def attached(model: nn.Module, name: str = "entries") -> petune.Attachment:
    return petune.attach(model, Custom(train_blocks), name=name)


def train(att: petune.Attachment, optimizer: torch.optim.Optimizer, steps: int = 3, pieces: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(pieces):
            (nn.functional.cross_entropy(att.model(X), Y) / pieces).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
    ids=["adamw", "sgd"],
)
def test_only_masked_entries_move_and_a_masked_dense_step_gives_the_same(optimizer: object) -> None:
    model = tiny()
    base, dense = copy.deepcopy(model), copy.deepcopy(model)
    att = attached(model)
    assert att.counts.tuned == sum(int(m.sum()) for b in base.blocks for m in masks_of(list(b.parameters())))
    assert att.counts.total == sum(p.numel() for p in base.parameters())
    train(att, optimizer(att.parameters()))  # type: ignore[operator]
    model(X)
    masks = {id(p): m for b in dense.blocks for p, m in zip(b.parameters(), masks_of([*b.parameters()]), strict=True)}
    kept = {p: p.detach().clone() for p in dense.parameters()}
    trained = [p for p in dense.parameters() if id(p) in masks or any(p is q for q in dense.head.parameters())]
    step = optimizer(trained)  # type: ignore[operator]
    for _ in range(3):
        step.zero_grad()
        nn.functional.cross_entropy(dense(X), Y).backward()
        step.step()
        with torch.no_grad():
            for p in dense.parameters():
                mask = masks.get(id(p), torch.full_like(p, any(p is q for q in dense.head.parameters()), dtype=bool))
                p.copy_(torch.where(mask, p, kept[p]))
    now = dict(model.named_parameters())
    for key, p in dense.named_parameters():
        torch.testing.assert_close(now[key], p, atol=1e-6, rtol=1e-6)
    assert not torch.equal(now["blocks.0.mlp.fc1.weight"], base.blocks[0].mlp.fc1.weight)


def test_micro_batches_add_up() -> None:
    one, two = attached(tiny()), attached(tiny())
    train(one, torch.optim.SGD(one.parameters(), lr=0.1))
    train(two, torch.optim.SGD(two.parameters(), lr=0.1), pieces=2)
    for key, p in one.tuned.items():
        torch.testing.assert_close(two.tuned[key], p)


def test_disabled_saved_loaded_merged_and_detached(tmp_path: Path) -> None:
    model = tiny()
    base = copy.deepcopy(model)
    att = attached(model)
    train(att, torch.optim.AdamW(att.parameters(), lr=0.05))
    trained = model(X)
    assert torch.equal(copy.deepcopy(model)(X), trained)
    with att.disabled():
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), trained)
    att.save(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    entries = {key: t for key, t in file.items() if not key.startswith("head.")}
    assert sum(t.numel() for t in entries.values()) == 2 * att.counts.tuned  # values, and where they belong
    with pytest.raises(petune.BackboneMismatch, match="other weights"):
        petune.load(tiny(seed=1), tmp_path, tuner=att.tuner)
    again = petune.load(copy.deepcopy(base), tmp_path, tuner=att.tuner)
    assert torch.equal(again.model(X), trained)
    again.merge()
    assert torch.equal(again.model(X), trained)
    assert list(again.model.state_dict()) == list(base.state_dict())
    att.detach()
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), base.state_dict().values(), strict=True))


def test_loaded_entries_are_others_than_those_attached_and_leave_nothing(tmp_path: Path) -> None:
    """As GPS does: which entries train is in the file, not in the options. Loading runs a forward of its own."""
    model = tiny()
    att = attached(model)
    train(att, torch.optim.AdamW(att.parameters(), lr=0.05))
    trained = model(X)
    att.save(tmp_path)

    def others(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            parameters = list(block.module.parameters())
            edit.train(parameters, mask=[mask.flip(0) for mask in masks_of(parameters)])

    base = tiny()
    again = petune.load(copy.deepcopy(base), tmp_path, tuner=Custom(others))
    assert torch.equal(again.model(X), trained)
    with again.disabled():
        assert torch.equal(again.model(X), base(X))
    again.detach()
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), base.parameters(), strict=True))


def trained_with_other_entries() -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model that trained other entries than `attached` chooses, its output and its state_dict."""
    model = tiny()
    att = attached(model)
    for entries in att.edit_log.sparse:
        entries.choose([mask.flip(0) for mask in entries.masks()])
    train(att, torch.optim.AdamW(att.parameters(), lr=0.05))
    return model, model(X), copy.deepcopy(model.state_dict())


def test_a_state_dict_brings_other_entries_and_detach_still_gives_the_backbone_back() -> None:
    base, (_, trained, state) = tiny(), trained_with_other_entries()
    other = tiny()
    again = attached(other)
    other.load_state_dict(state)
    assert torch.equal(other(X), trained)
    with again.disabled():
        assert all(torch.equal(other.get_parameter(key), p) for key, p in base.named_parameters() if "blocks" in key)
    assert torch.equal(copy.deepcopy(other)(X), trained)
    again.detach()
    assert all(torch.equal(other.get_parameter(key), p) for key, p in base.named_parameters() if "blocks" in key)
    assert not other._load_state_dict_pre_hooks


def test_a_forward_of_petunes_own_leaves_no_hook_behind(tmp_path: Path) -> None:
    model = tiny()
    att = attached(model)
    att.save(tmp_path)  # computes reference logits
    model(X)
    att.detach()
    model.requires_grad_()(X).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())  # type: ignore[union-attr]


def test_other_entries_are_chosen_and_start_at_the_backbones_values() -> None:
    found: list[petune.SparseParameters] = []

    def change(edit: petune.Edit) -> None:
        weight = edit.model.blocks[0].mlp.fc1.weight
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[0] = True
        found.append(edit.train([weight], mask=[mask]))

    model = tiny()
    base = copy.deepcopy(model)
    att = petune.attach(model, Custom(change), name="entries")
    train(att, torch.optim.SGD(att.parameters(), lr=0.5))
    other = torch.zeros_like(base.blocks[0].mlp.fc1.weight, dtype=torch.bool)
    other[3] = True
    found[0].choose([other])
    model(X)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, base.blocks[0].mlp.fc1.weight)
    assert torch.equal(found[0].masks()[0], other)
    train(att, torch.optim.SGD(att.parameters(), lr=0.5))
    model(X)
    assert torch.equal(
        (model.blocks[0].mlp.fc1.weight != base.blocks[0].mlp.fc1.weight).any(1).nonzero()[:, 0], torch.tensor([3])
    )
    with pytest.raises(AttachError, match="48 true entries, but 24 were declared"):
        found[0].choose([other | other.roll(1, 0)])


def bad(make: object) -> Custom:
    def change(edit: petune.Edit) -> None:
        weight = edit.model.blocks[0].mlp.fc1.weight
        make(edit, weight, torch.ones_like(weight, dtype=torch.bool))  # type: ignore[operator]

    return Custom(change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e, w, m: e.train([w], mask=[m[:1]]), r"mask 0 .* \(1, 24\), but its parameter has shape \(96, 24\)"),
        (lambda e, w, m: e.train([w], mask=[m.float()]), "torch.float32"),
        (lambda e, w, m: e.train([w], mask=[~m]), "no mask of edit.train has a true entry"),
        (lambda e, w, m: e.train([w], mask=m), "one tensor for 1 parameter"),
        (lambda e, w, m: e.train([w], mask=[m, m]), "2 masks for 1 parameter"),
        (lambda e, w, m: e.train([w, w], mask=[m, m]), "number 1 is .* given before"),
        (lambda e, w, m: e.train([nn.Parameter(w.clone())], mask=[m]), "takes floating-point parameters of the back"),
        (lambda e, w, m: (e.train([w]), e.train([w], mask=[m])), "Train it once"),
        (lambda e, w, m: (e.train([w], mask=[m]), e.train([w])), "Train it once"),
    ],
)
def test_bad_masks_are_one_clear_error_and_leave_the_model_as_it_was(make: object, message: str) -> None:
    model = tiny()
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(AttachError, match=message):
        petune.attach(model, bad(make), name="bad")
    assert list(model.state_dict()) == list(before)
    assert not any(hasattr(m, "is_petune_module") for m in model.modules())


def test_two_methods_do_not_train_one_parameter() -> None:
    model = tiny()
    att = attached(model)
    with pytest.raises(AttachError, match=r"bitfit and entries would both train blocks\.\d.* single entries"):
        petune.attach(model, "bitfit")
    lora = petune.attach(model, "lora")
    nn.init.normal_(next(p for key, p in lora.tuned.items() if "lora_B" in key))
    with pytest.raises(NotMergeable, match="entries"):
        lora.merge()
    att.detach()
    lora.detach()
    petune.attach(model, "bitfit")
    with pytest.raises(AttachError, match="bitfit"):
        attached(model)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_the_same_entries() -> None:
    plain, compiled = attached(tiny()), attached(tiny())
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    forward = torch.compile(compiled.model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(X), Y).backward()
        optimizer.step()
    for key, p in plain.tuned.items():
        torch.testing.assert_close(compiled.tuned[key], p)


def test_a_part_of_the_model_computes_with_the_trained_values() -> None:
    att = attached(tiny())
    before = att.model.forward_features(X)
    with torch.no_grad():
        next(iter(att.tuned.values())).add_(1.0)
    assert not torch.allclose(att.model.forward_features(X), before)


def test_each_of_some_parameters_needs_a_mask_also_where_one_is_fixed() -> None:
    model = tiny()
    fixed, free = model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc2.weight
    fixed.requires_grad_(False)
    masks = [torch.ones_like(p, dtype=torch.bool) for p in (fixed, free, free)]
    with pytest.raises(AttachError, match="3 masks"):
        petune.attach(model, Custom(lambda edit: edit.train([fixed, free], mask=masks)))
    with pytest.raises(AttachError, match=r"fc1\.weight and no other parameter, but its author fixed it"):
        petune.attach(model, Custom(lambda edit: edit.train([fixed], mask=masks[:1])))
    with pytest.warns(UserWarning, match="frozen"):
        att = petune.attach(model, Custom(lambda edit: edit.train([fixed, free], mask=masks[:2])))
    assert att.counts.tuned == free.numel()


@pytest.mark.parametrize("disabled", [False, True])
def test_a_state_dict_that_is_loaded_is_known_to_hold_trained_values(disabled: bool) -> None:
    base, (model, trained, state) = tiny(), trained_with_other_entries()
    other = tiny()
    again = attached(other)
    with again.disabled() if disabled else contextlib.nullcontext():
        other.load_state_dict(state)
        weights = dict(other.blocks.named_parameters())
        if disabled:
            assert all(torch.equal(weights[key], p) for key, p in base.blocks.named_parameters())
    assert torch.equal(other.blocks(X.new_ones(1, 17, 24)), model.blocks(X.new_ones(1, 17, 24)))
    other.load_state_dict({key: t for key, t in base.state_dict().items() if "head" not in key}, strict=False)
    other.head.load_state_dict(model.head.state_dict())
    assert torch.equal(other(X), trained)
    again.detach()
    assert all(torch.equal(other.get_parameter(key), p) for key, p in base.named_parameters() if "blocks" in key)
    assert not other._load_state_dict_post_hooks


def test_other_weights_that_are_loaded_are_the_backbones() -> None:
    model, other = tiny(), tiny(seed=1)
    att = attached(model)
    train(att, torch.optim.AdamW(att.parameters(), lr=0.05))
    model.load_state_dict(other.state_dict(), strict=False)
    att.disable()
    assert all(torch.equal(model.get_parameter(key), p) for key, p in other.named_parameters() if "head" not in key)


class Shift(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias

    def merge(self, module: nn.Linear) -> None:
        module.bias.data += self.bias.data


def test_after_a_merge_that_is_refused_entries_still_train() -> None:
    def attach(edit: petune.Edit) -> None:
        train_blocks(edit)
        edit.after(edit.site(edit.model.head, 5), Shift(5))

    model = tiny()
    petune.attach(model, "linear")
    att = petune.attach(model, Custom(attach), name="entries", train_head=False)
    nn.init.ones_(next(p for key, p in att.tuned.items() if key.endswith("adapter.bias")))
    before = model(X)
    with pytest.raises(NotMergeable, match="linear trains in place"):
        att.merge()
    assert torch.equal(model(X), before)
    train(att, torch.optim.SGD(att.parameters(), lr=0.1), steps=1)
    model(X)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, tiny().blocks[0].mlp.fc1.weight)
    att.detach()
    assert torch.equal(model.blocks[0].mlp.fc1.weight, tiny().blocks[0].mlp.fc1.weight)

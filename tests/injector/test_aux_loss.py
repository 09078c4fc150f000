"""A loss that adapters set in their forward: part of `att.loss`, once for each forward that trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.tiny import X, tiny

LABELS = torch.tensor([0, 1])


class Gate(nn.Module):
    """Scales tokens by a rate that each decides for itself; the loss is the mean rate."""

    aux_loss: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate(x).sigmoid()
        self.aux_loss = rate.mean()
        return x * rate


class Column(Gate):
    """Forgets to take the mean."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux_loss = self.rate(x).mean(1)
        return y


class Gates(petune.Tuner[petune.TunerConfig]):
    identity_at_init = False

    def __init__(self, gate: type[nn.Module] = Gate) -> None:
        super().__init__()
        self.gate = gate

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            edit.after(block.mlp, self.gate())

    def aux_loss(self, values: list[Tensor]) -> Tensor:
        return (torch.stack(values).mean() - 0.25) ** 2


def attached(gate: type[nn.Module] = Gate) -> petune.Attachment:
    torch.manual_seed(0)
    att = petune.attach(tiny(), Gates(gate), name="gates")
    att.train()
    return att


def written_out(att: petune.Attachment, x: Tensor) -> Tensor:
    """The square of the mean rate of all blocks less 0.25."""
    rates: list[Tensor] = []
    holders = [holder for holder, _ in att.edit_log.placed]
    handles = [h.adapter.rate.register_forward_hook(lambda m, a, y: rates.append(y.sigmoid().mean())) for h in holders]
    att.model(x)
    for handle in handles:
        handle.remove()
    att.aux_loss()
    return (torch.stack(rates).mean() - 0.25) ** 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_forward_is_what_the_tuner_makes_of_the_adapters_losses(checkpointing: bool) -> None:
    att = attached()
    expected = written_out(att, X)
    slopes = torch.autograd.grad(expected, [*att.tuned.values()], retain_graph=True)
    att.model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    att.model(X)
    loss = att.loss(0)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [*att.tuned.values()]), slopes)
    with pytest.raises(petune.AttachError, match="Compute the loss after the forward"):
        att.loss(1)


def test_each_micro_batch_has_its_own_and_the_step_has_none_left() -> None:
    att = attached()
    expected = [written_out(att, X[i : i + 1]).item() for i in range(2)]
    found = []
    for i in range(2):
        att.model(X[i : i + 1])
        term = att.aux_loss()
        assert isinstance(term, Tensor)
        found.append(term.item())
    assert found == pytest.approx(expected)
    assert att.loss(0) == 0.0


def test_a_forward_without_gradients_has_none_after_others_either() -> None:
    """As in reentrant checkpointing, which runs the forward without gradients."""
    att = attached()
    att.model(X)
    att.aux_loss()
    with torch.no_grad():
        att.model(X)
    with pytest.raises(petune.AttachError, match="use_reentrant=False"):
        att.aux_loss()


def test_evaluation_and_a_disabled_attachment_have_none() -> None:
    att = attached()
    att.model.eval()
    att.model(X)
    with torch.no_grad():
        att.model(X)
        assert att.loss(0) == 0.0
    assert all(holder.adapter.aux_loss is None for holder, _ in att.edit_log.placed)
    att.train()
    with att.disabled():
        att.model(X)
        assert att.loss(0) == 0.0


@pytest.mark.parametrize("call", [None, "loss", "aux_loss"])
def test_a_loop_that_leaves_it_out_gets_an_error(call: str | None) -> None:
    att = attached()
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)

    def loop() -> None:
        for step in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(att.model(X), LABELS)
            if call == "aux_loss":
                loss = loss + att.aux_loss() + att.loss(step)
            elif call == "loss":
                loss = loss + att.loss(step)
            loss.backward()
            optimizer.step()

    if call is not None:
        loop()
        return
    with pytest.raises(petune.AttachError, match=r"loss = loss \+ att\.loss\(step\)"):
        loop()


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(petune.AttachError, match=r"aux_loss of the adapter Column is of shape \(\d, 1\)"):
        attached(Column)


def number(term: Tensor | float) -> float:
    return term.item() if isinstance(term, Tensor) else term


def of_train_mode(att: petune.Attachment) -> None:
    att.model(X[:1])


def of_no_grad(att: petune.Attachment) -> None:
    with torch.no_grad():
        att.model(X[:1])


def of_eval_mode(att: petune.Attachment) -> None:
    att.model.eval()
    att.model(X[:1])
    att.train()


def of_an_aborted_step(att: petune.Attachment) -> None:
    last = att.model.blocks[-1]

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        att.model(X[:1])
    handle.remove()


def of_a_skipped_step(att: petune.Attachment) -> None:
    loss = nn.functional.cross_entropy(att.model(X[:1]), LABELS[:1])
    assert loss.isfinite()


@pytest.mark.parametrize("abandoned", [of_train_mode, of_no_grad, of_eval_mode, of_an_aborted_step, of_a_skipped_step])
def test_a_forward_whose_loss_was_never_taken_leaves_nothing(abandoned: Callable[[petune.Attachment], None]) -> None:
    att = attached()
    expected = written_out(att, X).item()
    abandoned(att)
    att.model(X)
    assert number(att.loss(0)) == pytest.approx(expected)
    att.model(X)
    assert number(att.aux_loss()) == pytest.approx(expected)


def test_both_views_of_a_step_count_and_a_forward_without_gradients_in_between_takes_nothing_away() -> None:
    class Sums(Gates):
        def aux_loss(self, values: list[Tensor]) -> Tensor:
            return torch.stack(values).sum()

    torch.manual_seed(0)
    att = petune.attach(tiny(), Sums(), name="gates")
    att.train()
    alone = []
    for x in (X, X.flip(1)):
        att.model(x)
        alone.append(number(att.loss(0)))
    loss = att.model(X).square().mean()
    loss = loss + att.model(X.flip(1)).square().mean()
    of_no_grad(att)
    term = att.loss(0)
    assert number(term) == pytest.approx(sum(alone))
    (loss + term).backward()


def test_a_copy_of_the_model_has_its_own_losses_and_none_of_the_originals() -> None:
    att = attached()
    logits = att.model(X)
    copied = copy.deepcopy(att.model)
    copied(X)
    assert logits.requires_grad
    assert number(att.loss(0)) == pytest.approx(number(written_out(att, X)))
    att.detach()
    assert not att.model._forward_pre_hooks
    assert not att.model._forward_hooks


class Penalized(nn.Module):
    """Any adapter with a loss: it returns its vectors, the first tensor that it gets, or what `inner` makes of it."""

    aux_loss: Tensor | None = None
    num_prompts = 2

    def __init__(self, returns: Callable[[Tensor, tuple[Any, ...]], Any]) -> None:
        super().__init__()
        self.returns = returns
        self.vectors = nn.Parameter(torch.randn(1, 2, 24))

    def forward(self, *args: Any) -> Any:
        self.aux_loss = self.vectors.square().mean()
        return self.returns(self.vectors, args)


VERBS: dict[str, Callable[[petune.Edit, petune.Block], None]] = {
    "before": lambda edit, b: edit.before(b.mlp, Penalized(lambda v, args: args[0] + v.mean())),
    "after": lambda edit, b: edit.after(b.mlp, Penalized(lambda v, args: args[0] + v.mean())),
    "parallel": lambda edit, b: edit.parallel(b.mlp, b.mlp, Penalized(lambda v, args: args[0] * v.mean())),
    "gather": lambda edit, b: edit.parallel([b.attn, b.mlp], b.mlp, Penalized(lambda v, args: args[0][0] * v.mean())),
    "stream": lambda edit, b: edit.stream(b.mid, Penalized(lambda v, args: args[0] + v.mean())),
    "around": lambda edit, b: edit.around(b, Penalized(lambda v, args: args[0](args[1]) + v.mean())),
    "side": lambda edit, b: edit.side([b], Penalized(lambda v, args: (args[1] * v.mean(), args[1] * v.mean()))),
    "prompt": lambda edit, b: edit.prompt(b, Penalized(lambda v, args: v)),
    "keys_values": lambda edit, b: edit.keys_values(b, Penalized(lambda v, args: (v, v))),
}


@pytest.mark.parametrize("verb", VERBS)
def test_after_a_forward_a_model_can_be_copied_whatever_its_adapters_keep(verb: str) -> None:
    class Penalty(petune.Tuner[petune.TunerConfig]):
        identity_at_init = False

        def attach(self, edit: petune.Edit) -> None:
            VERBS[verb](edit, edit.sites.blocks[0])

    att = petune.attach(tiny(), Penalty(), name="penalty")
    att.train()
    att.model(X)
    copied = copy.deepcopy(att.model).eval()
    torch.testing.assert_close(copied(X), att.model.eval()(X))
    att.train()
    att.model(X)
    with att.disabled():
        assert att.loss(0) == 0.0


def test_both_views_count_with_a_second_attachment_too() -> None:
    class Sums(Gates):
        def aux_loss(self, values: list[Tensor]) -> Tensor:
            return torch.stack(values).sum()

    model = tiny()
    first = petune.attach(model, Sums(), name="first")
    petune.attach(model, Sums(), name="second")
    first.train()
    alone = []
    for x in (X, X.flip(1)):
        model(x)
        alone.append(number(first.loss(0)))
    views = [model(X), model(X.flip(1))]
    assert number(first.loss(0)) == pytest.approx(sum(alone))
    assert len(views) == 2

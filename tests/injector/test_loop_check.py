"""A training loop without a call that the method needs is an error; a complete loop, of whatever kind, is not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.sampling import sampled
from tests.tiny import X, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
Y = torch.tensor([0, 1])
CALLS = ("on_train_start", "loss", "on_step_end")
ADALORA: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}


def attached(method: str) -> petune.Attachment:
    torch.manual_seed(0)
    att = petune.attach(tiny(), method, **(ADALORA if method == "peft:adalora" else {}))
    att.train()
    return att


def train(
    att: petune.Attachment,
    calls: Iterable[str] = CALLS,
    *,
    steps: int = 3,
    micro_batches: int = 1,
    forward: Callable[[Tensor], Tensor] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.01),
) -> None:
    """The README's loop, with the calls that are asked for."""
    optim = optimizer(att.parameters())
    model = att.model if forward is None else forward
    if "on_train_start" in calls:
        att.on_train_start(8)
    for step in range(steps):
        optim.zero_grad()
        for number in range(micro_batches):
            loss = nn.functional.cross_entropy(model(X), Y)
            if "loss" in calls and number == micro_batches - 1:
                loss = loss + att.loss(step)
            loss.backward()
        optim.step()
        if "on_step_end" in calls:
            att.on_step_end(step)


NEEDED = [("l2sp", "loss"), *(("peft:adalora", call) for call in CALLS)]


@pytest.mark.parametrize(("method", "call"), NEEDED)
def test_a_loop_without_a_needed_call_is_an_error(method: str, call: str) -> None:
    att = attached(method)
    with pytest.raises(petune.AttachError, match=rf"att\.{call}\("):
        train(att, set(CALLS) - {call})


@pytest.mark.parametrize("method", ["l2sp", "peft:adalora"])
def test_a_loop_that_stops_calling_is_an_error(method: str) -> None:
    att = attached(method)
    train(att)
    with pytest.raises(petune.AttachError, match=r"att\.loss\("):
        train(att, ["on_train_start", "on_step_end"])


@pytest.mark.parametrize("method", ["adaptformer", "vpt", "bitfit", "full", "lora", "linear"])
def test_methods_without_terms_of_their_own_need_nothing(method: str) -> None:
    train(attached(method), [])


def compiled(att: petune.Attachment) -> Callable[[Tensor], Tensor]:
    return torch.compile(att.model, backend="aot_eager")


def checkpointed(att: petune.Attachment) -> Callable[[Tensor], Tensor]:
    att.model.set_grad_checkpointing()
    return att.model


class ThroughData(torch.optim.Optimizer):
    """An optimizer whose writes PyTorch does not count."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.01)


KINDS: dict[str, Callable[[petune.Attachment], dict[str, Any]]] = {
    "plain": lambda att: {},
    "micro-batches": lambda att: {"micro_batches": 3},
    "compiled": lambda att: {"forward": compiled(att)},
    "gradient checkpointing": lambda att: {"forward": checkpointed(att)},
    "an optimizer that writes to .data": lambda att: {"optimizer": ThroughData},
    "foreach": lambda att: {"optimizer": lambda p: torch.optim.AdamW(p, foreach=True)},
    "fused": lambda att: {"optimizer": lambda p: torch.optim.AdamW(p, fused=True)},
}


@pytest.mark.parametrize("kind", sampled(KINDS, lambda kind: kind != "compiled"))
@pytest.mark.parametrize("method", ["l2sp", "peft:adalora"])
def test_every_kind_of_training_is_checked(method: str, kind: str) -> None:
    att = attached(method)
    options = KINDS[kind](att)
    train(att, **options)
    with pytest.raises(petune.AttachError, match=r"att\.loss\("):
        train(att, set(CALLS) - {"loss"}, **options)


def test_the_term_may_have_a_backward_of_its_own() -> None:
    att = attached("l2sp")
    optimizer = torch.optim.SGD(att.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(att.model(X), Y).backward()
        term = att.loss(step)
        assert isinstance(term, Tensor)
        term.backward()
        optimizer.step()


def test_gradients_without_steps_are_not_training() -> None:
    att = attached("peft:adalora")
    for _ in range(3):  # as for saliency
        att.model(X).sum().backward()
    train(att)


def test_an_attachment_that_another_one_is_trained_with_needs_nothing() -> None:
    first = attached("peft:adalora")
    other = petune.attach(first.model, "adaptformer", train_head=False)
    train(other, [])


def test_evaluation_and_disabling_between_steps_change_nothing() -> None:
    att = attached("l2sp")
    optimizer = torch.optim.SGD(att.parameters(), lr=0.01)

    def step(number: int, *, term: bool) -> None:
        for _ in range(2):
            loss = nn.functional.cross_entropy(att.train()(X), Y)
            (loss + att.loss(number) if term else loss).backward()
            with torch.no_grad():
                att.model.eval()(X)
            with att.disabled():
                att.model(X)
        optimizer.step()
        with att.disabled():
            att.model(X)

    for number in range(3):
        step(number, term=True)
    step(3, term=False)
    step(4, term=False)
    with pytest.raises(petune.AttachError, match=r"att\.loss\("):
        step(5, term=False)


def test_what_is_disabled_is_not_checked() -> None:
    att = attached("l2sp")
    other = petune.attach(att.model, "adaptformer")
    att.disable()
    train(other, [])


def test_detached_and_copied_models_are_not_checked() -> None:
    att = attached("l2sp")
    for model in (copy.deepcopy(att.model), pickle.loads(pickle.dumps(att.model))):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    att.detach()
    optimizer = torch.optim.SGD(att.model.parameters(), lr=0.01)
    for _ in range(3):
        nn.functional.cross_entropy(att.model(X), Y).backward()
        optimizer.step()


def test_a_loss_term_in_validation_only_is_not_enough() -> None:
    att = petune.attach(tiny(), "l2sp")
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)

    def step_then_validate(step: int) -> None:
        optimizer.zero_grad()
        att.model(X).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            att.loss(step)

    step_then_validate(0)
    step_then_validate(1)
    with pytest.raises(petune.AttachError, match=r"att\.loss"):
        step_then_validate(2)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_an_optimizer_may_change_parameters_once_in_a_step() -> None:
    def steps(max_iter: int) -> None:
        att = attached("peft:adalora")
        optimizer = torch.optim.LBFGS(att.parameters(), lr=0.01, max_iter=max_iter)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(att.model(X), Y) + att.loss(step)
            loss.backward()
            return loss

        att.on_train_start(8)
        for step in range(4):
            optimizer.step(closure)
            att.on_step_end(step)

    steps(1)
    with pytest.raises(petune.AttachError, match="LBFGS: max_iter=1"):
        steps(5)

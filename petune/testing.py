"""`check_tuner`: the contract in executable form, for authors of tuners."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from petune.attach import Attachment, attach
from petune.registry import build_tuner
from petune.state import load
from petune.tuner import Tuner


class ContractViolation(AssertionError):
    """A property of the contract does not hold; the message names it."""


def check_tuner(tuner: str | Tuner[Any], model: nn.Module | None = None, **options: Any) -> list[str]:
    """Prove the contract of a tuner on a small model.

    Args:
        tuner: A registered name with `options`, or a Tuner.
        model: A classifier with a head; a tiny timm ViT by default. It is copied.

    Returns:
        The properties that hold, a line each.

    Raises:
        ContractViolation: The first one that does not.
    """
    built = build_tuner(tuner, **options)
    name = tuner if isinstance(tuner, str) else type(tuner).__name__.lower()
    base = copy.deepcopy(model) if model is not None else _tiny()
    base.eval()
    att = attach(copy.deepcopy(base), built, name=name)
    x = torch.randn(4, *att.sites.input_size, generator=torch.Generator().manual_seed(0))
    passed: list[str] = []

    def holds(what: str, good: bool) -> None:
        if not good:
            raise ContractViolation(f"{name}: {what} — does not hold")
        passed.append(what)

    with torch.no_grad():
        plain = base(x)
        holds("backbone keys are unchanged", set(base.state_dict()) <= set(att.model.state_dict()))
        if built.identity_at_start:
            holds("identity at the start", torch.allclose(att.model(x), plain, atol=1e-6))
    trains = {id(t) for t in att.state().values()}  # by identity: a shared module has several keys
    frozen = {k: t.detach().clone() for k, t in att.model.state_dict(keep_vars=True).items() if id(t) not in trains}
    before = {k: t.detach().clone() for k, t in att.tuned.items()}
    _three_steps(att, x)
    state = att.model.state_dict()
    holds("frozen tensors and buffers stay to the bit", all(torch.equal(state[k], t) for k, t in frozen.items()))
    holds("every tuned tensor moves", all(_pushed(att.tuned[k], t) for k, t in before.items()))
    att.model.eval()
    with torch.no_grad():
        tuned = att.model(x)
        holds("two evaluations are equal", torch.equal(att.model(x), tuned))
        alone = torch.cat([att.model(x[i : i + 1]) for i in range(len(x))])
        holds("pictures of a batch do not mix", torch.allclose(alone, tuned, atol=1e-4))
        holds("a deep copy computes the same", torch.equal(copy.deepcopy(att.model)(x), tuned))
        with att.disabled():
            holds("disabled is the backbone to the bit", torch.equal(att.model(x), plain))
        holds("enabled again is as before", torch.equal(att.model(x), tuned))
        holds("saved and loaded is the same to the bit", torch.equal(_reloaded(att, base, x), tuned))
    att.detach()
    after = att.model.state_dict()
    same = list(after) == list(base.state_dict()) and all(
        torch.equal(after[k], t) for k, t in base.state_dict().items()
    )
    holds("detach gives the model back to the bit", same)
    return passed


def _pushed(tensor: Tensor, before: Tensor) -> bool:
    """Whether it moved, or had a gradient too small to move it: a bias that softmax cancels gets rounding alone."""
    return not torch.equal(tensor, before) or (tensor.grad is not None and bool(tensor.grad.any()))


def _three_steps(att: Attachment, x: Tensor) -> None:
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    target = torch.arange(len(x)) % 2
    att.train()
    for step in range(3):
        loss = nn.functional.cross_entropy(att.model(x), target) + att.extra_loss(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            att.check_gradients()
        optimizer.step()


def _reloaded(att: Attachment, base: nn.Module, x: Tensor) -> Tensor:
    fresh = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as place:
        att.save(f"{place}/adapter")
        load(fresh, f"{place}/adapter")
    out: Tensor = fresh.eval()(x)
    return out


def _tiny() -> nn.Module:
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3
    )
    for p in model.parameters():  # timm starts the head at zero, which would hide a dead tuner
        nn.init.normal_(p, std=0.1)
    return model

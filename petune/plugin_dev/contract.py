"""`check_tuner`: the contract in executable form, for authors of tuners.

Every property is a function from a Trial to what is wrong, in words; nothing is wrong where that is empty. They
run in their order: as attached, after three steps of training, in use, detached.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.arguments import check_arguments
from petune.base.errors import BackboneMismatch, NotMergeable
from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.injector.load import load
from petune.injector.registry import build_tuner
from petune.injector.tuner import Tuner
from petune.plugin_dev.tiny_models import tiny_timm
from petune.sites.forward import forget_caches
from petune.sites.logits import logits_of

DRAWS = 5  # how often a tuned tensor may have no gradient before it is said to have none


class ContractViolation(AssertionError):
    """A property of the contract does not hold; the message names it."""


@dataclass(frozen=True)
class Finding:
    """One property and what is wrong with it; empty where it holds."""

    name: str
    problem: str


class Trial:
    """A tuner on a small model.

    Attributes:
        base: The model without the tuner.
        att: The tuner on a copy of it.
        x: Four images.
        plain: What `base` makes of them.
        tuned: What the trained model makes of them.
        moved: What is wrong with the frozen tensors after training.
        effective: Whether the logits depend on what trains.
    """

    def __init__(self, tuner: Tuner[Any], model: nn.Module, name: str) -> None:
        self.base = copy.deepcopy(model).eval()
        self.att = attach(copy.deepcopy(self.base), tuner, name=name)
        self.x = torch.randn(4, *self.att.sites.input_size, generator=torch.Generator().manual_seed(0))
        self.plain = logits(self.base, self.x)
        self.tuned, self.moved, self.effective = torch.empty(0), "it could not be trained", False

    @property
    def model(self) -> nn.Module:
        """The model with the tuner."""
        return self.att.model


def check_tuner(tuner: str | Tuner[Any], model: nn.Module | None = None, **options: Any) -> list[str]:
    """Prove the contract of a tuner on a small model.

    Args:
        tuner: A registered name with `options`, or a Tuner.
        model: A classifier with a head; a tiny timm ViT by default. It is copied.

    Returns:
        The properties that hold, a line each.

    Raises:
        ContractViolation: The first one that does not.
        AttachError: The tuner refuses this model.
    """
    check_arguments("petune.check_tuner", tuner=(tuner, str | Tuner), model=(model, nn.Module | None))
    passed = []
    for finding in examine(tuner, model, **options):
        if finding.problem:
            name = tuner if isinstance(tuner, str) else type(tuner).__name__
            raise ContractViolation(f"{name}: {finding.name} — does not hold: {finding.problem}")
        passed.append(finding.name)
    return passed


def examine(tuner: str | Tuner[Any], model: nn.Module | None = None, **options: Any) -> Iterator[Finding]:
    """Every property of the contract in turn, as `check_tuner`, without stopping at the first that does not hold."""
    built = build_tuner(tuner, **options)
    name = tuner if isinstance(tuner, str) else type(tuner).__name__.lower()
    trial = Trial(built, model if model is not None else tiny_timm(), name)
    for what, wrong in PROPERTIES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                problem = wrong(trial)
            except Exception as error:  # whatever an author's code raises is a finding
                problem = f"{type(error).__name__}: {error}"
        yield Finding(what, problem)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a batch, also from a model that returns an object that holds them."""
    return logits_of(model(x))


def _keys(t: Trial) -> str:
    gone = sorted(set(t.base.state_dict()) - set(t.model.state_dict()))
    return f"{gone[0]} is gone" if gone else ""


def _untouched(t: Trial) -> str:
    now = t.model.state_dict()
    return _first(key for key, old in t.base.state_dict().items() if key in now and not torch.equal(now[key], old))


def _identity(t: Trial) -> str:
    if not t.att.tuner.identity_at_init:
        return ""
    change = float((logits(t.model, t.x) - t.plain).abs().max())
    return "" if change < 1e-5 else f"the output moves by {change:.2g}; if that is meant, set identity_at_init = False"


def _count(t: Trial) -> str:
    formula, counted = t.att.tuner.num_parameters(t.att.sites), t.att.counts.tuned
    return "" if formula in (None, counted) else f"{counted:,} parameters, by the formula of count() {formula:,}"


def _trains(t: Trial) -> str:
    """Three steps; meant for what follows too.

    What learns nothing is drawn anew: a ReLU of a narrow adapter may be silent for all tokens by chance, a factor whose
    partner starts at zero too is so in every draw.
    """
    ids = {id(v) for v in t.att.state().values()}
    frozen = {k: v for k, v in t.model.state_dict(keep_vars=True).items() if id(v) not in ids}
    kept = {key: v.detach().clone() for key, v in frozen.items()}
    dead = _dead(t)
    trained = [(p, p.detach().clone()) for p in t.att.tuned.values()]
    before = logits(t.model, t.x)
    for strength in (0.1, 0.01, 0.001):  # as after a long training, so that what it does is seen
        with torch.no_grad():
            for p, value in trained:
                p.copy_(value + strength * torch.randn_like(p))
        forget_caches(t.model)
        t.tuned = logits(t.model, t.x)
        if t.tuned.isfinite().all():  # a deep model of random weights may leave all bounds
            break
    t.effective = not trained or not torch.equal(t.tuned, before)
    t.moved = _first(key for key, old in kept.items() if not torch.equal(frozen[key], old))
    for seed in range(1, DRAWS):
        if dead:
            torch.manual_seed(seed)
            dead = sorted({*dead} & {*_dead(Trial(t.att.tuner, t.base, t.att.name))})
    return f"{len(dead)} of {len(trained)} never had a gradient other than zero, as {dead[0]}" if dead else ""


def _dead(t: Trial) -> list[str]:
    """Do three steps; the tuned tensors that never had a gradient other than zero."""
    optimizer = torch.optim.SGD(t.att.parameters(), lr=0.1)
    target = torch.arange(len(t.x)) % 2
    t.att.train()
    t.att.on_train_start(3)
    live: set[str] = set()
    for step in range(3):
        loss = nn.functional.cross_entropy(logits_of(t.model(t.x)), target) + t.att.loss(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(t.att.parameters(), 1.0)  # a deep model of random weights would leave all bounds
        live |= {key for key, p in t.att.tuned.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        t.att.on_step_end(step)
    t.model.eval()
    return list(t.att.missing_gradients({*t.att.tuned} - live))


def _frozen(t: Trial) -> str:
    return t.moved


def _effective(t: Trial) -> str:
    return "" if t.effective else "with other values of the tuned tensors the logits in eval mode are the same"


def _repeatable(t: Trial) -> str:
    return _same(logits(t.model, t.x), t.tuned, "is there dropout that ignores self.training?")


def _stateless(t: Trial) -> str:
    logits(t.model, t.x.flip(-1) + 1)
    changed = _same(logits(t.model, t.x), t.tuned, "the output depends on the images of the forward before")
    own = {f"{path}.{k}" for path, m in t.base.named_modules() for k in vars(m)}
    for path, module in t.model.named_modules():
        kept = [k for k, v in vars(module).items() if isinstance(v, Tensor) and f"{path}.{k}" not in own]
        changed = changed or (f"{path}.{kept[0]} keeps a tensor after the forward" if kept else "")
    return changed


def _unmixed(t: Trial) -> str:
    change = _mixing(t.model, t.x)
    if change >= 1e-5:  # rounding, which a deep model may amplify, all but vanishes in float64; mixing does not
        exact = copy.deepcopy(t.model).double()
        forget_caches(exact)
        change = _mixing(exact, t.x.double())
    return "" if change < 1e-5 else f"an image alone differs by {change:.2g} from the same one in a batch"


def _mixing(model: nn.Module, x: Tensor) -> float:
    """How much the logits of images alone differ from those in a batch, relative to the largest above one."""
    together, alone = logits(model, x), torch.cat([logits(model, x[i : i + 1]) for i in range(len(x))])
    return float((alone - together).abs().max() / together.abs().max().clamp(min=1))


def _copied(t: Trial) -> str:
    return _same(logits(copy.deepcopy(t.model), t.x), t.tuned, "the copy computes something else")


def _disabled(t: Trial) -> str:
    plain, now = copy.deepcopy(t.base), dict(t.model.named_parameters())
    for name, p in plain.named_parameters():  # at::matmul takes another product for a frozen weight: other last bits
        p.requires_grad_(now[name].requires_grad if name in now else p.requires_grad)
    with t.att.disabled():
        return _same(logits(t.model, t.x), logits(plain, t.x), "the output is not the backbone's")


def _again(t: Trial) -> Attachment:
    with tempfile.TemporaryDirectory() as place:
        t.att.save(f"{place}/adapter")
        return load(copy.deepcopy(t.base), f"{place}/adapter", tuner=t.att.tuner)


def _reloaded(t: Trial) -> str:
    try:
        fresh = _again(t).model.eval()
    except BackboneMismatch as error:  # mostly since it computes something else where it is loaded
        return f"something that the output depends on is not saved ({error})"
    return _same(logits(fresh, t.x), t.tuned, "something that the output depends on is not saved")


def _folded(t: Trial) -> str:
    try:
        _again(t).merge()
    except NotMergeable as error:
        return str(error) if error.changes_output else ""
    return ""


def _detached(t: Trial) -> str:
    t.att.detach()
    after, before = t.model.state_dict(), t.base.state_dict()
    if list(after) != list(before):
        return f"other keys: {sorted(set(after) ^ set(before))[:1] or 'the order changed'}"
    if [name for name, _ in t.model.named_modules()] != [name for name, _ in t.base.named_modules()]:
        return "a module was left behind"
    if _hooks(t.model) != _hooks(t.base):
        return "a hook was left behind"
    flags = zip(t.model.parameters(), t.base.parameters(), strict=True)
    if any(a.requires_grad != b.requires_grad for a, b in flags):
        return "requires_grad is not as it was"
    return _first(key for key, old in before.items() if not torch.equal(after[key], old))


PROPERTIES: tuple[tuple[str, Callable[[Trial], str]], ...] = (
    ("backbone keys are unchanged", _keys),
    ("attaching changes no value of the backbone", _untouched),
    ("identity at the start, where that is open_run_dir", _identity),
    ("the count is the formula's, where there is one", _count),
    ("every tuned tensor learns", _trains),
    ("frozen tensors and buffers stay to the bit", _frozen),
    ("what trains takes effect in eval mode", _effective),
    ("two evaluations are equal", _repeatable),
    ("nothing is kept between forwards", _stateless),
    ("images of a batch do not mix", _unmixed),
    ("a deep copy computes the same", _copied),
    ("disabled is the backbone to the bit", _disabled),
    ("enabled again is as before", _repeatable),
    ("saved and loaded is the same to the bit", _reloaded),
    ("folded it computes the same, where it folds", _folded),
    ("detach gives the model back to the bit", _detached),
)


def _same(now: Tensor, before: Tensor, else_: str) -> str:
    if torch.equal(now, before):
        return ""
    change = f"{float((now - before).abs().max()):.2g}" if now.shape == before.shape else "another shape"
    return f"{else_} (differs by {change})"


def _first(keys: Iterator[str]) -> str:
    key = next(keys, None)
    return "" if key is None else f"{key} differs"


def _hooks(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)

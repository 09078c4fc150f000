"""A tuner on a small model, as the properties of the contract look at it: attached, trained for three steps."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.injector.gradients import missing_gradients
from petune.injector.load import load
from petune.injector.tuner import Tuner
from petune.plugin_dev.surroundings import Surroundings
from petune.sites.forward import forget_caches
from petune.sites.input_spec import Inputs
from petune.sites.logits import logits_of
from petune.sites.returned import tensors_returned
from petune.sites.routed import routed_parameters

NUM_IMAGES = 4
DRAWS = 5
"""Tries, each with another seed, before a tuned tensor without a gradient counts as a finding.

All units of a ReLU in a narrow adapter may be silent by chance; two factors that both start at zero are always silent.
"""


@dataclass(frozen=True)
class Training:
    """Effects of three training steps.

    Attributes:
        silent: Tuned tensors that never had a gradient other than zero, in any draw.
        changed: A frozen tensor that changed; empty if none did.
        changed_outside_masks: A tensor of which an entry changed that no mask lets train; empty if none did.
        changed_flags: A mode or requires_grad of the backbone that training changed; empty if none did.
        terms: What the tuner's `loss` returned in each step, but None.
        logits: The logits in eval mode, with tuned tensors as far from their start as after a long training.
        has_effect: True if what the model returns depends on the tuned tensors.
    """

    silent: list[str]
    changed: str
    changed_outside_masks: str
    changed_flags: str
    terms: list[Any]
    logits: Tensor
    has_effect: bool


class Trial:
    """A tuner on a copy of a model.

    Attributes:
        base: The model without the tuner.
        att: The tuner on another copy.
        options: Arguments of `attach` besides model, tuner and name.
        x: Four images, or samples of whatever the model takes.
        base_logits: What `base` returns for them.
        before: What was outside of the model before the tuner was attached.
    """

    def __init__(self, tuner: Tuner[Any], model: nn.Module, name: str, **options: Any) -> None:
        self.base = copy.deepcopy(model).eval()
        self.options = options
        self.before = Surroundings.of(self.base)
        self.att = attach(copy.deepcopy(self.base), tuner, name=name, **options)
        self.x = self.att.sites.input_spec.noise(NUM_IMAGES)
        self.base_logits = logits(self.base, self.x)
        self._training: Training | None = None
        self._loaded: Attachment | None = None

    @property
    def model(self) -> nn.Module:
        """The model with the tuner."""
        return self.att.model

    @property
    def training(self) -> Training:
        """The outcome of `train`, which must have been called."""
        if self._training is None:
            raise RuntimeError("not checked, because training failed")
        return self._training

    def calibrate(self) -> None:
        """Calibrate the attachment on two batches of samples, with a class for each."""
        spec, target = self.att.sites.input_spec, torch.arange(NUM_IMAGES) % 2
        batches = [(self.x, target), (spec.noise(NUM_IMAGES, seed=2), target)]
        self.att.calibrate(batches, loss=lambda output, _: _loss(output))

    def loaded_again(self) -> Attachment:
        """Save the attachment and load it on a fresh copy of `base`, at the first call: training must be over."""
        if self._loaded is None:
            with tempfile.TemporaryDirectory() as folder:
                self.att.save(f"{folder}/adapter")
                self._loaded = load(copy.deepcopy(self.base), f"{folder}/adapter", tuner=self.att.tuner)
        return self._loaded

    def train(self) -> Training:
        """Train three steps, then move the tuned tensors by noise, so that their effect is clearly visible."""
        trained = {id(v) for v in self.att.state().values()}
        own = dict(self.base.named_buffers())  # a state_dict leaves out those that are not persistent
        tensors = {k: b for k, b in self.model.named_buffers() if k in own} | self.model.state_dict(keep_vars=True)
        frozen = {k: v for k, v in tensors.items() if id(v) not in trained}
        before = {key: v.detach().clone() for key, v in frozen.items()}
        modes: dict[str, bool] = {}
        with _terms_of(self.att.tuner) as terms:
            silent = _silent_after_three_steps(self, modes)
        changed_flags = next((what for what, on in self.flags().items() if what in modes and modes[what] != on), "")
        self.model.eval()
        outputs_after = self._outputs()
        perturbed = self._perturb()
        masks = {id(p): mask for e in self.att.edit_log.sparse for p, mask in zip(e.targets, e.masks(), strict=True)}
        different = {key: frozen[key] != value for key, value in before.items() if not torch.equal(frozen[key], value)}
        changed = next((key for key in different if id(frozen[key]) not in masks), "")
        partly = {key: mask & ~masks[id(frozen[key])] for key, mask in different.items() if id(frozen[key]) in masks}
        outside = next((key for key, mask in partly.items() if mask.any()), "")
        for seed in range(1, DRAWS):
            if silent:
                torch.manual_seed(seed)
                again = Trial(self.att.tuner, self.base, self.att.name, **self.options)
                silent = sorted({*silent} & {*_silent_after_three_steps(again)})
        pairs = zip(self._outputs(), outputs_after, strict=True)
        has_effect = not self.att.tuned or any(not torch.equal(x, y) for x, y in pairs)
        self._training = Training(silent, changed, outside, changed_flags, terms, perturbed, has_effect)
        return self._training

    def flags(self) -> dict[str, bool]:
        """Return modes and requires_grad of the backbone's modules and parameters, by what they are."""
        modules, parameters = dict(self.model.named_modules()), dict(self.model.named_parameters())
        modes = {f"the mode of {k}": modules[k].training for k, _ in self.base.named_modules() if k in modules}
        frozen = {k: parameters[k].requires_grad for k, _ in self.base.named_parameters() if k in parameters}
        return {**modes, **{f"requires_grad of {k}": on for k, on in frozen.items()}}

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        """Return all tensors that the model returns for the images, such as one map for each stage."""
        return [*tensors_returned(self.x.call(self.model))]

    @torch.no_grad()
    def _perturb(self) -> Tensor:
        """Add noise to the tuned tensors, as much as keeps the logits finite; return these logits."""
        values = [(p, p.detach().clone()) for p in self.att.tuned.values()]
        for strength in (0.1, 0.01, 0.001):
            for p, value in values:
                p.copy_(value + strength * torch.randn_like(p))
            forget_caches(self.model)
            perturbed = logits(self.model, self.x)
            # a deep model of random weights may overflow; logits of masked words are infinite from the start
            if (perturbed.isfinite() | (perturbed == self.base_logits)).all():
                break
        return perturbed


@torch.no_grad()
def logits(model: nn.Module, x: Inputs) -> Tensor:
    """Return the logits of a batch, also from a model that returns an object that holds them."""
    return logits_of(x.call(model))


@contextlib.contextmanager
def _terms_of(tuner: Tuner[Any]) -> Iterator[list[Any]]:
    """Yield a list that fills with what the tuner's own `loss` returns, but None."""
    terms: list[Any] = []
    original = tuner.loss

    def recorded(step: int) -> Any:
        term = original(step)
        if term is not None:
            terms.append(term)
        return term

    tuner.loss = recorded  # type: ignore[method-assign]
    try:
        yield terms
    finally:
        del tuner.loss


def _silent_after_three_steps(trial: Trial, flags: dict[str, bool] | None = None) -> list[str]:
    """Calibrate and train three steps; return the tuned tensors that never had a gradient other than zero."""
    att = trial.att
    trial.calibrate()
    live = three_steps(trial, flags)
    missing = missing_gradients(att.tuned, att.edit_log.unfrozen, {*att.tuned} - live)
    routed = routed_parameters(att.model, att.sites.input_spec, att.sites.block_modules()) if missing else set()
    if not any(id(att.tuned[key]) in routed for key in live):
        return missing
    return [key for key in missing if id(att.tuned[key]) not in routed]  # an expert may get no token that is read


def three_steps(trial: Trial, flags: dict[str, bool] | None = None) -> set[str]:
    """Train three steps; return the tuned tensors that had a gradient other than zero.

    Args:
        trial: What is trained. It is in train mode afterwards.
        flags: Filled with `trial.flags()` as petune has set them for training.
    """
    att, x = trial.att, trial.x
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    att.train()
    if flags is not None:
        flags.update(trial.flags())
    att.on_train_start(3)
    live: set[str] = set()
    for step in range(3):
        loss = _loss(x.call(att.model)) + att.loss(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(att.parameters(), 1.0)  # a deep model of random weights would diverge
        live |= {key for key, p in att.tuned.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        att.on_step_end(step)
    return live


def _loss(output: Any) -> Tensor:
    """Return the cross-entropy of logits (B, C); of another output the mean square of all its tensors."""
    y = logits_of(output)
    if y.ndim == 2 and len(y) == NUM_IMAGES and y.shape[1] > 1:
        return nn.functional.cross_entropy(y, torch.arange(NUM_IMAGES) % 2)
    losses = [x.square().mean() + x.mean() for x in tensors_returned(output) if x.requires_grad]
    return torch.stack(losses).sum()

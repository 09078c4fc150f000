"""An `AdapterBank` computes with every adapter what `load` computes, also where a verb puts it at the classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import petune
from tests.fake_plugin import Fake, fake
from tests.serving.bank_adapters import Trained
from tests.several import X, logits, model

__all__ = ["fake"]

CODE = """
import torch
import petune
from torch import nn

class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
    def forward(self, x):
        return x * self.weight

class Scaled(Scale):
    def forward(self, inner, x):
        return inner(x * self.weight)

class Map(nn.Module):
    def __init__(self, enters, leaves):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(enters, leaves))
    def forward(self, x):
        return (x[0] if isinstance(x, list) else x).flatten(1)[:, :len(self.weight)] @ self.weight

class Cell(Map):
    def forward(self, state, x, index):
        pooled = x.reshape(len(x), -1, x.shape[-1]).mean(1)
        state = pooled if state is None else state + pooled
        return state, state @ self.weight if index == 2 else None

class ReadsHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = (head,)
        self.scale = nn.Parameter(torch.zeros(()))
    def forward(self, x):
        return x + self.scale * (self.head[0](x) @ self.head[0].weight)

class Tokens(nn.Module):
    num_prompts = 2
    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 2, width))
    def forward(self, x):
        return self.tokens

class KeysValues(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(1, 2, width)) for _ in range(2))
    def forward(self, x):
        return self.keys, self.values

class Config(petune.TunerConfig):
    verb: str

class AtHead(petune.Tuner[Config]):
    identity_at_init = False

    def attach(self, edit):
        head, blocks, top = edit.sites.head, edit.sites.require_blocks(), edit.model
        enters, leaves, width = head.module.in_features, head.module.out_features, blocks[0].dim
        match self.config.verb:
            case "before": edit.before(head, Scale(enters))
            case "after": edit.after(head, Scale(leaves))
            case "around": edit.around(head, Scaled(enters))
            case "parallel": edit.parallel(head, head, Map(enters, leaves))
            case "parallel_from_block": edit.parallel(blocks[0], head, Map(width, leaves))
            case "gather": edit.parallel([*blocks], head, Map(width, leaves))
            case "side": edit.side([*blocks, head], Cell(width, leaves))
            case "train":
                edit.train(head)
                edit.before(blocks[0], Scale(width))
            case "train_entries": edit.train([head.module.weight], mask=[torch.ones(leaves, enters) > 0])
            case "after_model": edit.after(edit.site(top, leaves), Scale(leaves))
            case "reads_head": edit.after(blocks[-1], ReadsHead(head.module))
            case "stream": edit.stream(blocks[0].mid, Scale(width))
            case "prompt": edit.prompt(blocks, Tokens(width))
            case "keys_values": edit.keys_values(blocks[0], KeysValues(width))
            case "by_hand": self.hook(edit, head.module, Scale(leaves))

    def hook(self, edit, head, scale):
        head.scale, handles = scale, []
        edit.add_parameters(scale.parameters(), [scale])

        def switch(on):
            if on and not handles:
                handles.append(head.register_forward_hook(lambda m, a, y: scale(y)))
            elif not on and handles:
                handles.pop().remove()

        switch(True)
        edit.on_toggle(switch, layers={head: switch})
        edit.on_detach(lambda: (switch(False), delattr(head, "scale")))
"""
VERBS = [
    "before", "after", "around", "parallel", "parallel_from_block", "gather", "side", "after_model", "stream", "prompt",
    "keys_values", "train", "train_entries", "by_hand",
]  # fmt: skip
PLUGINS = ["convpass", "dtl", "dyt", "gps", "l2p", "mona", "prefix", "sct", "ssf"]
METHODS = [
    *(f"athead:verb={verb}" for verb in VERBS),
    *(pytest.param(plugin, marks=pytest.mark.exhaustive) for plugin in PLUGINS),
]


@pytest.fixture
def at_head(fake: Fake) -> None:
    fake("petune-fake-at-head", entry={"athead": "petune_fake_at_head:AtHead"}, code=CODE)


def save_tuned(method: str, path: Path, classes: int, seed: int, *, train_head: bool = True) -> Tensor:
    """Save an adapter with random values; return the logits of the model with it."""
    att = petune.attach(model(classes), method, train_head=train_head)
    if not att.is_calibrated:
        att.calibrate([(X, torch.arange(len(X)) % classes)])
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in att.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    att.save(path)
    return logits(att.model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("at_head")
def test_adapters_of_any_verb(method: str, saved: Trained, tmp_path: Path) -> None:
    train_head = "verb=train" not in method
    classes = {"a": 3, "b": 3, "c": 5 if train_head else 3}
    expected: dict[str | None, Tensor] = {None: logits(model()), "pets": logits(saved.alone("pets"))}
    for seed, (name, number) in enumerate(classes.items()):
        expected[name] = save_tuned(method, tmp_path / name, number, seed, train_head=train_head)
    with petune.AdapterBank(model(), max_memory=0) as bank:
        for name in ("a", "pets", "b", "c"):
            bank.load(name, saved[name] if name == "pets" else tmp_path / name)
        check_bank(bank, expected)
    assert torch.equal(logits(bank.model), expected[None])
    petune.attach(bank.model, "linear").detach()


def check_bank(bank: petune.AdapterBank, expected: dict[str | None, Tensor]) -> None:
    for name, wanted in expected.items():
        torch.testing.assert_close(logits(bank.use(name)), wanted, atol=1e-5, rtol=1e-5)
    names = ["a", "pets", "b", None, "c", "a"]
    bank.use("b")
    with torch.no_grad():
        for row, out in enumerate(bank(X, names)):
            torch.testing.assert_close(out, expected[names[row]][row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(bank.model), expected["b"], atol=1e-5, rtol=1e-5)
    bank.use(None)


@pytest.mark.usefixtures("at_head")
def test_a_classifier_with_an_adapter_follows_the_model_to_another_format(tmp_path: Path) -> None:
    expected = save_tuned("athead:verb=after", tmp_path / "a", 3, 0)
    bank = petune.AdapterBank(model())
    bank.load("a", tmp_path / "a")
    bank.model.double()
    torch.testing.assert_close(logits(bank.use("a"), X.double()).float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("at_head")
def test_what_a_bank_does_not_take_over_is_refused(saved: Trained, tmp_path: Path) -> None:
    save_tuned("athead:verb=reads_head", tmp_path / "a", 3, 0)
    bank = petune.AdapterBank(model())
    with pytest.raises(petune.AttachError, match=r"petune\.load"):
        bank.load("a", tmp_path / "a")
    assert torch.equal(logits(bank.model), logits(model()))
    bank.load("pets", saved["pets"])
    torch.testing.assert_close(logits(bank.use("pets")), logits(saved.alone("pets")), atol=1e-5, rtol=1e-5)

"""`AdapterBank`: tasks by name, and one batch for many tasks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, UsageError
from tests.serving.bank_adapters import METHODS, Trained
from tests.several import X, logits, model


@pytest.fixture(scope="module")
def shared() -> petune.AdapterBank:
    """A bank that tests load adapters into, and change nothing else of."""
    return petune.AdapterBank(model())


def test_tasks_by_name(saved: Trained, shared: petune.AdapterBank) -> None:
    names = ["pets", "vpt", "lora", "bitfit", "lora2"]
    saved.load(shared, *names)
    for name in (*names, None, *reversed(names), None):
        assert torch.equal(logits(shared.use(name)), logits(saved.alone(name))), name


@pytest.mark.parametrize("active", ["pets", pytest.param(None, marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_classifiers_follow_a_model_that_moved(saved: Trained, active: str | None) -> None:
    names = ("pets", "vpt", "bitfit")
    bank = saved.load(petune.AdapterBank(model()), *names)
    bank.use(active)
    bank.model.double()
    bank.use(None)
    for name, out in zip((*names, None), bank(X[:1].expand(4, -1, -1, -1).double(), [*names, None]), strict=True):
        torch.testing.assert_close(out.float(), logits(saved.alone(name), X[:1])[0], atol=1e-5, rtol=1e-5)
    for name in ("bitfit", "pets", "vpt"):
        expected = logits(saved.alone(name))
        torch.testing.assert_close(logits(bank.use(name), X.double()).float(), expected, atol=1e-5, rtol=1e-5)
        bank.remove(name)
    torch.testing.assert_close(logits(bank.model, X.double()).float(), logits(model()), atol=1e-5, rtol=1e-5)


MIXES = [
    ("pets", "cars", None),
    ("lora", "lora2", None),
    ("vpt", "vpt2", "vpt"),
    ("vpt", "vpt3", "shallow", None),
    ("ssf", "ssf2", "pets", "ssf", "bitfit", None),
    ("pets", "lora", "houlsby", "probe", None),
    ("pets", "vpt", "lora", "bitfit", "lst", "ia3"),
    ("norm", "ia3", "ia3b", "bitfit", "partial", "norm", "lora", None),
    tuple(METHODS),
]


@pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=() if len(mix) in {4, 5} else pytest.mark.exhaustive) for mix in MIXES], ids=str
)
@torch.no_grad()
def test_one_batch_for_many_tasks(saved: Trained, shared: petune.AdapterBank, mix: tuple[str | None, ...]) -> None:
    bank = saved.load(shared, *filter(None, mix))
    names = list(itertools.islice(itertools.cycle(mix), max(6, len(mix))))
    x = torch.randn(len(names), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bank.use(None)
    out = bank(x, names)
    for row, name in enumerate(names):
        expected = logits(saved.alone(name), x[row : row + 1])[0]
        assert out[row].shape == expected.shape
        torch.testing.assert_close(out[row], expected, atol=5e-6, rtol=1e-5)
    assert bank.active is None
    assert torch.equal(logits(bank.model), logits(model()))


EXHAUSTIVE_PASSES = ("vpt", "vpt3", "shallow", "bitfit", "lst", "ia3", "partial")


@pytest.mark.parametrize(
    ("mix", "passes"),
    [(("pets", "lora", "lora2", "probe", "houlsby", "bitfit", None), 1), (("vpt", "shallow", "pets"), 3),
     pytest.param(EXHAUSTIVE_PASSES, 4, marks=pytest.mark.exhaustive)],
)  # fmt: skip
def test_tasks_share_a_forward_where_they_can(
    saved: Trained, shared: petune.AdapterBank, mix: tuple[str | None, ...], passes: int
) -> None:
    bank = saved.load(shared, *filter(None, mix))
    seen: list[int] = []
    handle = bank.model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    bank(torch.randn(len(mix), 3, 16, 16), list(mix))
    handle.remove()
    assert len(seen) == passes
    assert sum(seen) == len(mix)


def test_refused_calls_of_a_bank(saved: Trained, shared: petune.AdapterBank) -> None:
    bank = saved.load(shared, "pets")
    with pytest.raises(UsageError, match="already loaded"):
        bank.load("pets", saved["pets"])
    with pytest.raises(UsageError, match="no adapter 'dogs'"):
        bank.use("dogs")
    with pytest.raises(UsageError, match="one name per row"):
        bank(X, ["pets"])
    for names in (None, "pets", [["pets"]], iter(["pets"]), [0]):
        with pytest.raises(UsageError, match="names"):
            bank(X[:1], names)
    for x in (X.numpy(), None, "x"):
        with pytest.raises(UsageError, match="x must be a tensor"):
            bank(x, ["pets"])


def test_what_attaches_to_a_model_in_a_bank_is_told_so(saved: Trained, shared: petune.AdapterBank) -> None:
    bank = saved.load(shared, "pets")
    for attach in (
        lambda: petune.attach(bank.model, "lora"),
        lambda: petune.attach(bank.model, "lora", sites=petune.find_sites(bank.model)),
        lambda: petune.load(bank.model, saved["pets"]),
        lambda: petune.AdapterBank(bank.model),
    ):
        with pytest.raises(AttachError, match="AdapterBank holds"):
            attach()
    with pytest.raises(AttachError, match="copy"):
        petune.attach(copy.deepcopy(bank.model), "lora")
    with pytest.raises(AttachError, match="detach"):
        petune.AdapterBank(saved.alone("pets"))


def test_a_model_that_does_not_state_its_input_size(saved: Trained) -> None:
    bank = petune.AdapterBank(model(), input_size=(3, 16, 16))
    bank.load("pets", saved["pets"])
    assert torch.equal(logits(bank.use("pets")), logits(saved.alone("pets")))


def _with_a_layer_named_as_the_classifier(num_classes: int) -> nn.Module:
    built = model(num_classes)
    for block in built.blocks:
        block.attn.head = block.attn._modules.pop("proj")
        block.attn.__class__ = type("Attn", (type(block.attn),), {"proj": property(lambda attn: attn.head)})
    return built


def test_a_layer_of_a_block_with_the_name_of_the_classifier(tmp_path: Path) -> None:
    bank = petune.AdapterBank(_with_a_layer_named_as_the_classifier(3))
    wrapped = petune.AdapterBank(nn.DataParallel(_with_a_layer_named_as_the_classifier(3)))
    width = bank.model.head.in_features
    for method, classes in (("partial", width), ("bitfit", 5)):
        att = petune.attach(_with_a_layer_named_as_the_classifier(classes), method)
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
        att.save(tmp_path / method)
        for holder in (bank, wrapped):
            holder.load(method, tmp_path / method)
            rows = torch.stack(holder(X[:2], [method, method]))
            torch.testing.assert_close(rows, logits(att.model, X[:2]), atol=1e-5, rtol=1e-5)


def test_a_model_made_in_inference_mode_is_refused(saved: Trained) -> None:
    with torch.inference_mode():
        bank = petune.AdapterBank(model())
        with pytest.raises(AttachError, match="inference_mode"):
            bank.load("pets", saved["pets"])


def test_a_task_that_does_not_fit_leaves_the_others_alone(
    saved: Trained, shared: petune.AdapterBank, tmp_path: Path
) -> None:
    other = model()
    nn.init.normal_(other.blocks[0].attn.qkv.weight)
    petune.attach(other, "adaptformer").save(tmp_path / "foreign")
    bank = saved.load(shared, "pets")
    with pytest.raises(petune.PetuneError, match="other weights"):
        bank.load("foreign", tmp_path / "foreign")
    assert torch.equal(logits(bank.use("pets")), logits(saved.alone("pets")))


WINDOWS = {"lora": {"r": 2}, "lora:": {"targets": "attn"}, "adaptformer": {}, "ssf": {}, "houlsby": {}}


def windowed(num_classes: int) -> nn.Module:
    """A Swin of two stages, 4 windows an image in the first; the trunk is the same whatever the classifier."""
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 2, "window_size": 7, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
    built = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape)
    for p in built.parameters():
        nn.init.normal_(p, std=0.1)
    built.reset_classifier(num_classes)
    nn.init.normal_(built.get_classifier().weight)
    return built.eval()


@torch.no_grad()
@pytest.mark.exhaustive
def test_one_batch_on_a_model_with_windows(tmp_path: Path) -> None:
    """A layer inside the attention has a row for each window, so its task cannot share a forward."""
    bank = petune.AdapterBank(windowed(3))
    single = {}
    for number, (name, options) in enumerate(WINDOWS.items(), 2):
        att = petune.attach(windowed(number), name.strip(":"), **options)
        for p in att.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        att.save(tmp_path / str(number))
        bank.load(name, tmp_path / str(number))
        single[name] = att.model
    names = [*WINDOWS, None, *WINDOWS]
    x = torch.randn(len(names), 3, 28, 28)
    for _ in range(2):
        for row, (name, out) in enumerate(zip(names, bank(x, names), strict=True)):
            expected = logits(single[name] if name else windowed(3), x[row : row + 1])[0]
            assert out.shape == expected.shape
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(bank.model, x), logits(windowed(3), x))


class Logarithms(nn.Module):
    """A model that changes the output of its classifier."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(-1)


class TokensFirst(nn.Module):
    """A model whose blocks see (tokens, images, width): as many tokens as there are images in a batch of 17."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        inner = model()
        self.patch_embed, self.cls_token, self.head = inner.patch_embed, inner.cls_token, inner.head
        torch.manual_seed(0)
        layer = {"d_model": inner.embed_dim, "nhead": 2, "dim_feedforward": 32, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1).transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[0])


@pytest.mark.parametrize("kind", [Logarithms, TokensFirst])
def test_a_mixed_batch_is_right_where_tasks_cannot_share_a_forward(kind: type[nn.Module], tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    built, bank = make(), petune.AdapterBank(make())
    att = petune.attach(built, "houlsby")
    tokens = 1 + next(m.num_patches for m in bank.model.modules() if hasattr(m, "num_patches"))
    x = torch.randn(tokens, 3, 16, 16)
    expected = {}
    for name in "ab":
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
        att.save(tmp_path / name)
        bank.load(name, tmp_path / name)
        expected[name] = torch.cat([logits(built, x[row : row + 1]) for row in range(tokens)])
    names = ["ab"[row % 2] for row in range(tokens)]
    with torch.no_grad():
        mixed = bank(x, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row])


def test_a_bank_prints_its_adapters(saved: Trained) -> None:
    bank = saved.load(petune.AdapterBank(model()), "lora", "vpt")
    with bank:
        bank.use("vpt")
        assert repr(bank) == f"<AdapterBank on {type(bank.model).__name__}, adapters: 'lora', 'vpt'; active: 'vpt'>"

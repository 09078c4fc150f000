"""`AdapterBank`: tasks by name, and one batch for many tasks."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, CheckpointError, UsageError
from tests.several import X, logits, model

METHODS = {
    "pets": ("adaptformer", 4, {}),
    "cars": ("adaptformer", 3, {"bottleneck": 5}),
    "vpt": ("vpt", 7, {"num_prompts": 2}),
    "vpt2": ("vpt", 2, {"num_prompts": 2}),
    "vpt3": ("vpt", 3, {"num_prompts": 4}),
    "shallow": ("vpt", 3, {"deep": False, "num_prompts": 2}),
    "lora": ("lora", 5, {}),
    "lora2": ("lora", 3, {"r": 2}),
    "probe": ("linear", 6, {}),
    "bitfit": ("bitfit", 3, {}),
    "houlsby": ("houlsby", 4, {}),
    "lst": ("lst", 3, {}),
    "ia3": ("peft:ia3", 4, {}),
    "ia3b": ("peft:ia3", 2, {}),
    "norm": ("norm", 2, {}),
    "partial": ("partial", 3, {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every task trained alone, on the same backbone."""
    root = tmp_path_factory.mktemp("tasks")
    for name, (method, classes, options) in METHODS.items():
        torch.manual_seed(len(name))
        att = petune.attach(model(classes), method, **options)
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
        att.save(root / name)
    return {name: root / name for name in METHODS}


def single_task(path: Path, name: str) -> nn.Module:
    built = model(METHODS[name][1])
    petune.load(built, path)
    return built


def test_tasks_by_name(saved: dict[str, Path]) -> None:
    built = model()
    plain, keys = logits(built), list(built.state_dict())
    bank = petune.AdapterBank(built)
    names = ["pets", "vpt", "lora", "bitfit", "lora2"]
    for name in names:
        bank.load(name, saved[name])
    for name in (*names, None, *reversed(names), None):
        expected = plain if name is None else logits(single_task(saved[name], name))
        assert torch.equal(logits(bank.use(name)), expected), name
    for name in names:
        bank.remove(name)
    assert torch.equal(logits(built), plain)
    assert list(built.state_dict()) == keys


@pytest.mark.parametrize("active", ["pets", pytest.param(None, marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_classifiers_follow_a_model_that_moved(saved: dict[str, Path], active: str | None) -> None:
    bank = petune.AdapterBank(model())
    for name in ("pets", "vpt", "bitfit"):
        bank.load(name, saved[name])
    bank.use(active)
    bank.model.double()
    bank.use(None)
    mix = ["pets", None, "vpt", "bitfit", "pets"]
    for row, out in zip(mix, bank(X[:5].double(), mix), strict=True):
        expected = logits(model() if row is None else single_task(saved[row], row).eval(), X[:5])[mix.index(row)]
        if mix.count(row) == 1:
            torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=1e-5)
    for name in ("bitfit", "pets", "vpt"):
        torch.testing.assert_close(
            logits(bank.use(name), X.double()).float(), logits(single_task(saved[name], name)), atol=1e-5, rtol=1e-5
        )
        bank.remove(name)
    torch.testing.assert_close(logits(bank.model, X.double()).float(), logits(model()), atol=1e-5, rtol=1e-5)


MIXES = [
    ("pets", "cars", None),
    ("lora", "lora2", None),
    ("vpt", "vpt2", "vpt"),
    ("vpt", "vpt3", "shallow", None),
    ("pets", "lora", "houlsby", "probe", None),
    ("pets", "vpt", "lora", "bitfit", "lst", "ia3"),
    ("norm", "ia3", "ia3b", "bitfit", "partial", "norm", "lora", None),
    tuple(METHODS),
]


@pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=() if len(mix) in {4, 5} else pytest.mark.exhaustive) for mix in MIXES], ids=str
)
@torch.no_grad()
def test_one_batch_for_many_tasks(saved: dict[str, Path], mix: tuple[str | None, ...]) -> None:
    bank = petune.AdapterBank(model())
    for name in filter(None, mix):
        if name not in bank.adapters:
            bank.load(name, saved[name])
    names = list(itertools.islice(itertools.cycle(mix), max(6, len(mix))))
    x = torch.randn(len(names), 3, 16, 16)
    out = bank(x, names)
    for row, name in enumerate(names):
        expected = logits(model() if name is None else single_task(saved[name], name), x[row : row + 1])[0]
        assert out[row].shape == expected.shape
        torch.testing.assert_close(out[row], expected, atol=1e-6, rtol=1e-5)
    assert bank.active is None
    assert torch.equal(logits(bank.model), logits(model()))


@pytest.mark.parametrize(
    ("mix", "passes"),
    [(("pets", "cars", "lora", "lora2", "probe", "houlsby", None), 1), (("vpt", "vpt2", "pets"), 2),
     (("vpt", "vpt3", "shallow", "bitfit", "lst", "ia3", "partial"), 4)],
)  # fmt: skip
def test_tasks_share_a_forward_where_they_can(saved: dict[str, Path], mix: tuple[str | None, ...], passes: int) -> None:
    bank = petune.AdapterBank(model())
    for name in filter(None, mix):
        bank.load(name, saved[name])
    seen: list[int] = []
    bank.model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    bank(torch.randn(len(mix), 3, 16, 16), list(mix))
    assert len(seen) == passes
    assert sum(seen) == len(mix)


def test_refused_calls_of_a_bank(saved: dict[str, Path]) -> None:
    bank = petune.AdapterBank(model())
    bank.load("pets", saved["pets"])
    with pytest.raises(UsageError, match="already loaded"):
        bank.load("pets", saved["cars"])
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


def test_what_attaches_to_a_model_in_a_bank_is_told_so(saved: dict[str, Path]) -> None:
    bank = petune.AdapterBank(model())
    bank.load("pets", saved["pets"])
    bank.load("lora", saved["lora"])
    for attach in (
        lambda: petune.attach(bank.model, "lora"),
        lambda: petune.attach(bank.model, "lora", sites=petune.find_sites(bank.model)),
        lambda: petune.load(bank.model, saved["pets"]),
        lambda: petune.AdapterBank(bank.model),
    ):
        with pytest.raises(AttachError, match="AdapterBank holds"):
            attach()
    bank.use("pets")
    bank.close()
    assert not bank.adapters
    assert torch.equal(logits(bank.model), logits(model()))
    petune.load(bank.model, saved["cars"]).detach()
    attached = model()
    petune.attach(attached, "lora")
    with pytest.raises(AttachError, match="detach"):
        petune.AdapterBank(attached)


@pytest.mark.parametrize("active", ["pets", None])
def test_a_classifier_that_was_replaced_is_reported_and_kept(saved: dict[str, Path], active: str | None) -> None:
    bank = petune.AdapterBank(model())
    bank.load("pets", saved["pets"])
    bank.use(active)
    bank.model.reset_classifier(9)
    for call in (lambda: bank(X[:1], ["pets"]), lambda: bank.use("pets"), lambda: bank.load("lora", saved["lora"])):
        with pytest.raises(AttachError, match="was replaced"):
            call()
    bank.close()
    assert logits(bank.model).shape == (len(X), 9)


def test_a_model_that_does_not_state_its_input_size(saved: dict[str, Path]) -> None:
    bank = petune.AdapterBank(model(), input_size=(3, 16, 16))
    bank.load("pets", saved["pets"])
    assert torch.equal(logits(bank.use("pets")), logits(single_task(saved["pets"], "pets")))


def test_a_model_made_in_inference_mode_is_refused(saved: dict[str, Path]) -> None:
    with torch.inference_mode():
        bank = petune.AdapterBank(model())
        with pytest.raises(AttachError, match="inference_mode"):
            bank.load("pets", saved["pets"])


def test_a_task_that_does_not_fit_leaves_the_others_alone(saved: dict[str, Path], tmp_path: Path) -> None:
    other = model()
    nn.init.normal_(other.blocks[0].attn.qkv.weight)
    petune.attach(other, "adaptformer").save(tmp_path / "foreign")
    bank = petune.AdapterBank(model())
    bank.load("pets", saved["pets"])
    with pytest.raises(petune.PetuneError, match="other weights"):
        bank.load("foreign", tmp_path / "foreign")
    assert torch.equal(logits(bank.use("pets")), logits(single_task(saved["pets"], "pets")))


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
@pytest.mark.filterwarnings("ignore:ssf leaves")
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


def test_adapters_leave_memory_and_come_back(saved: dict[str, Path], tmp_path: Path) -> None:
    for name in ("pets", "cars", "bitfit"):
        shutil.copytree(saved[name], tmp_path / name)
    kept = petune.AdapterBank(model())
    everything = sum(kept.load(name, tmp_path / name).num_bytes for name in ("pets", "cars", "bitfit"))
    assert kept.num_bytes == everything
    bank = petune.AdapterBank(model(), max_memory=everything // 2)
    for name in ("pets", "cars", "bitfit"):
        bank.load(name, tmp_path / name)
    names = ["pets", "bitfit", None, "cars", "pets", "pets"]
    for mix in (names, names[::-1], ["cars"] * 6):
        assert bank.num_bytes < everything
        with torch.no_grad():
            torch.testing.assert_close(bank(X[:6], mix), kept(X[:6], mix), atol=1e-6, rtol=1e-5)
    bank.use("cars")
    shutil.copytree(saved["lora"], tmp_path / "pets", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="has changed since"):
        bank(X[:1], ["pets"])
    assert torch.equal(logits(bank.model), logits(kept.use("cars")))


def test_a_second_adapter_of_a_kind_runs_no_forward(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["pets"], tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged/adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged/adapter_model.safetensors").write_bytes(content)
    bank = petune.AdapterBank(model())
    bank.load("a", saved["pets"])
    calls: list[int] = []
    bank.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    bank.load("b", saved["pets"])
    with pytest.raises(CheckpointError):
        bank.load("c", tmp_path / "damaged")
    assert not calls
    assert [*bank.adapters] == ["a", "b"]
    nn.init.normal_(bank.model.blocks[0].attn.qkv.weight)
    with pytest.raises(petune.PetuneError, match="other weights"):
        bank.load("c", saved["pets"])


def test_many_threads_use_one_bank(saved: dict[str, Path]) -> None:
    bank = petune.AdapterBank(model(), max_memory=30_000)
    names = ["pets", "cars", "bitfit", "lora"]
    for name in names:
        bank.load(name, saved[name])
    rows = [*names, None]
    with torch.no_grad():
        expected = dict(zip(rows, bank(X[:1].expand(5, -1, -1, -1), rows), strict=True))

    def ask(worker: int) -> None:
        for step in range(4):
            mix = [rows[(worker + step + i) % 5] for i in range(3)]
            with torch.no_grad():
                for name, row in zip(mix, bank(X[:1].expand(3, -1, -1, -1), mix), strict=True):
                    torch.testing.assert_close(row, expected[name], atol=1e-6, rtol=1e-5)
            bank.load(f"{worker} {step}", saved["pets" if step % 2 else "norm"])
            bank.remove(f"{worker} {step}")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, range(3)))
    assert [*bank.adapters] == names


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

    bank, singles = petune.AdapterBank(make()), []
    for name in "ab":
        built = make()
        att = petune.attach(built, "houlsby")
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
        att.save(tmp_path / name)
        singles.append(built)
        bank.load(name, tmp_path / name)
    tokens = 1 + next(m.num_patches for m in bank.model.modules() if hasattr(m, "num_patches"))
    x = torch.randn(tokens, 3, 16, 16)
    with torch.no_grad():
        mixed = bank(x, ["ab"[row % 2] for row in range(tokens)])
    for row, got in enumerate(mixed):
        torch.testing.assert_close(got, logits(singles[row % 2], x[row : row + 1])[0])

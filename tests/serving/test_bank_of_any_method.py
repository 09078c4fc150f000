"""An `AdapterBank` holds adapters of any two methods, which train, wrap or read the same layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.plugin_dev.tiny_models import tiny_torchvision
from tests.several import X, logits, model


def save_tuned(method: str, *paths: Path, built: nn.Module | None = None) -> list[Tensor]:
    """Save adapters with random values; return the logits of the model with each."""
    att = petune.attach(built or model(), method)
    outputs = []
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        att.save(path)
        outputs.append(logits(att.model))
    return outputs


@pytest.mark.parametrize("method", ["lora", pytest.param("peft:ia3", marks=pytest.mark.exhaustive)])
def test_an_adapter_is_read_again_while_one_of_its_kind_is_in_use(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dict(zip("abc", save_tuned(method, *(tmp_path / name for name in "abc")), strict=True))
    monkeypatch.chdir(tmp_path)
    bank = petune.AdapterBank(model(), max_memory=0)
    for name in "abc":
        bank.load(name, name)
    monkeypatch.chdir("/")
    bank.use("a")
    with torch.no_grad():
        for out, name in zip(bank(X[:2], ["b", "c"]), "bc", strict=True):
            torch.testing.assert_close(out, expected[name]["bc".index(name)], atol=1e-6, rtol=1e-5)
    assert torch.equal(logits(bank.model), expected["a"])
    assert torch.equal(logits(bank.use("b")), expected["b"])
    assert torch.equal(logits(bank.use(None)), logits(model()))


@pytest.mark.parametrize(
    "order", [("peft:vera", "partial"), pytest.param(("partial", "peft:randlora"), marks=pytest.mark.exhaustive)]
)
def test_a_block_that_trains_as_a_whole_does_not_own_what_others_put_in(order: tuple[str, str], tmp_path: Path) -> None:
    bank = petune.AdapterBank(model())
    for method in order:
        (expected,) = save_tuned(method, tmp_path / method)
        bank.load(method, tmp_path / method)
        torch.testing.assert_close(logits(bank.use(method)), expected, atol=1e-6, rtol=1e-5)


class OneAttention(nn.Module):
    """A ViT of one block whose attention is `nn.MultiheadAttention`."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = model()
        self.patch_embed, self.head = inner.patch_embed, inner.head
        layer = {"d_model": inner.embed_dim, "nhead": 2, "dim_feedforward": 32, "norm_first": True}
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(**layer, batch_first=True)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.patch_embed(x)).mean(1))


@pytest.mark.parametrize(
    ("method", "kind", "orders"),
    [("lora", OneAttention, [("partial", "lora")]), ("peft:hra", model, [("peft:hra", "partial")]),
     pytest.param("lora", OneAttention, [("lora", "partial")], marks=pytest.mark.exhaustive),
     pytest.param("peft:hra", model, [("partial", "peft:hra")], marks=pytest.mark.exhaustive),
     pytest.param("peft:boft", model, [("partial", "peft:boft")], marks=pytest.mark.exhaustive)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_layers_that_read_the_weights_of_another_adapter_get_a_forward_of_their_own(
    method: str, kind: Callable[[], nn.Module], orders: list[tuple[str, str]], tmp_path: Path
) -> None:
    expected = {name: save_tuned(name, tmp_path / name, built=kind().eval())[0] for name in ("partial", method)}
    for order in orders:
        bank = petune.AdapterBank(kind().eval())
        for name in order:
            bank.load(name, tmp_path / name)
        names = ["partial", method, "partial"]
        for row, out in enumerate(bank(X[:3], names)):
            torch.testing.assert_close(out, expected[names[row]][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "order", [("gps", "bitfit"), ("full", "gps:per_output=2"), ("gps", "gps:per_output=2"),
              pytest.param(("bitfit", "gps"), marks=pytest.mark.exhaustive)]
)  # fmt: skip
@torch.no_grad()
def test_adapters_that_train_single_entries_share_a_bank_with_those_that_train_the_same_tensors(
    order: tuple[str, str], tmp_path: Path
) -> None:
    expected = {m: save_tuned(m, tmp_path / m / "0", tmp_path / m / "1") for m in order}
    backbone, bank = logits(model()), petune.AdapterBank(model())
    for method in order:
        for number in "01":
            bank.load(method + number, tmp_path / method / number)
    names = [order[0] + "0", order[1] + "0", None, order[1] + "1", order[0] + "1"]
    want = [backbone if name is None else expected[name[:-1]][int(name[-1])] for name in names]
    for out, rows in zip(bank(X[:1].expand(5, -1, -1, -1), names), want, strict=True):
        torch.testing.assert_close(out, rows[0], atol=1e-6, rtol=1e-5)
    for name, rows in zip(names, want, strict=True):
        torch.testing.assert_close(logits(bank.use(name)), rows, atol=1e-6, rtol=1e-5)
    bank.close()
    assert torch.equal(logits(bank.model), backbone)
    petune.attach(bank.model, order[0], name="first")
    with pytest.raises(petune.AttachError, match="would both train"):
        petune.attach(bank.model, order[1], name="second")


@pytest.mark.filterwarnings("ignore:.*reads the weights")
@torch.no_grad()
def test_rows_with_adapters_of_q_k_and_v_of_torchs_attention_equal_single_adapters(tmp_path: Path) -> None:
    methods = ["lora:targets=[q,v]", "lora:targets=[k],r=2", "lora", "bitfit"]
    expected = {}
    for method in methods:
        build, number = tiny_torchvision(), str(methods.index(method))
        for seed, out in enumerate(save_tuned(method, tmp_path / f"{number}0", tmp_path / f"{number}1", built=build)):
            expected[f"{number}{seed}"] = out
    bank = petune.AdapterBank(tiny_torchvision())
    for name in expected:
        bank.load(name, tmp_path / name)
    for names in (["00", "01", "10", "20", "30"], ["11", "00", "31", "00", "21"]):
        for name, out in zip(names, bank(X[:1].expand(5, -1, -1, -1), names), strict=True):
            torch.testing.assert_close(out, expected[name][0], atol=1e-6, rtol=1e-5)
    for name, out in expected.items():
        torch.testing.assert_close(logits(bank.use(name)), out, atol=1e-6, rtol=1e-5)
    bank.close()
    assert torch.equal(logits(bank.model), logits(tiny_torchvision()))

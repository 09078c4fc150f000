"""What a bank does to its model, from the first load until it is closed or deleted; memory, and threads."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import petune
from petune.base.errors import AttachError, CheckpointError
from tests.serving.bank_adapters import Trained
from tests.several import X, logits, model


def test_a_model_is_as_it_was_without_its_adapters(saved: Trained) -> None:
    built = model()
    plain, keys = logits(built), list(built.state_dict())
    with saved.load(petune.AdapterBank(built), "pets", "bitfit") as bank:
        bank.use("pets")
        bank.remove("pets")
        assert torch.equal(logits(built), plain)
        bank.use("bitfit")
    assert torch.equal(logits(built), plain)
    assert list(built.state_dict()) == keys
    petune.attach(built, "bitfit")


def test_a_model_in_another_number_format(saved: Trained) -> None:
    with pytest.raises(petune.PetuneError, match="float32") as caught:
        petune.AdapterBank(model().bfloat16()).load("pets", saved["pets"])
    assert "bfloat16" in str(caught.value)
    bank = saved.load(petune.AdapterBank(model()), "bitfit")
    bank.model.bfloat16()
    bank.load("again", saved["bitfit"])  # the first of its kind has proven the backbone
    with torch.no_grad():
        rows = bank(X[:3].bfloat16(), ["again", "bitfit", None])
    for row, name in enumerate(("bitfit", "bitfit", None)):
        torch.testing.assert_close(
            rows[row].float(), logits(saved.alone(name), X[row : row + 1])[0], atol=0.2, rtol=0.1
        )
    nn.init.normal_(bank.model.blocks[0].attn.qkv.weight)
    with pytest.raises(petune.PetuneError):
        bank.load("changed", saved["bitfit"])


def test_a_model_that_is_converted_and_called_in_inference_mode_trains(saved: Trained) -> None:
    bank = saved.load(petune.AdapterBank(model()), "pets", "bitfit")
    bank.use("bitfit").double()
    x = X[:2].double()
    with torch.inference_mode():
        bank(x, ["pets", None])
        bank.use(None)
    torch.stack(bank(x.requires_grad_(), ["pets", "pets"])).sum().backward()
    bank.close()
    petune.attach(bank.model, "bitfit").train()(x).sum().backward()


def test_a_bank_that_was_deleted_gives_the_model_back(saved: Trained) -> None:
    built = model()
    keys = list(built.state_dict())
    bank = saved.load(petune.AdapterBank(built), "pets")
    del bank
    petune.load(built, saved["bitfit"]).detach()
    bank = saved.load(petune.AdapterBank(built), "pets")
    bank.use("pets")
    del bank
    assert torch.equal(logits(built), logits(saved.alone("pets")))
    with pytest.warns(UserWarning, match="was in use"):
        petune.AdapterBank(built)
    assert torch.equal(logits(built), logits(model()))
    assert list(built.state_dict()) == keys


def test_a_classifier_that_was_replaced_is_reported_and_kept(saved: Trained) -> None:
    bank = saved.load(petune.AdapterBank(model()), "pets")
    own = bank.model.head
    for active in ("pets", None):
        bank.use(active)
        bank.model.reset_classifier(9)
        for call in (lambda: bank(X[:1], ["pets"]), lambda: bank.use("pets"), lambda: bank.load("a", saved["pets"])):
            with pytest.raises(AttachError, match="was replaced"):
                call()
        replaced, bank.model.head = bank.model.head, own
    bank.model.head = replaced
    bank.close()
    assert logits(bank.model).shape == (len(X), 9)


def test_adapters_leave_memory_and_come_back(saved: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ("pets", "cars", "bitfit")
    for name in tasks:
        shutil.copytree(saved[name], tmp_path / name)
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(str(path)) or read_bytes(path))
    bank = petune.AdapterBank(model())
    everything = sum(bank.load(name, tmp_path / name).num_bytes for name in tasks)
    assert bank.num_bytes == everything
    bank.close()
    bank = petune.AdapterBank(bank.model, max_memory=everything // 2)
    for name in tasks:
        bank.load(name, tmp_path / name)
    names = ["pets", "bitfit", None, "cars", "pets", "pets"]
    expected = {name: logits(saved.alone(name)) for name in {*names}}
    for mix, misses in ((names, {*tasks}), (names[::-1], {*tasks}), (["cars"] * 6, {"cars"}), (["cars"] * 6, set())):
        opened.clear()
        with torch.no_grad():
            rows = bank(X[:6], mix)
        assert {Path(path).parent.name for path in opened} <= misses
        assert len(opened) == len({*opened}) <= len(misses)  # a hit reads nothing, a miss one file once
        assert bank.num_bytes < everything
        for row, name in enumerate(mix):
            torch.testing.assert_close(rows[row], expected[name][row], atol=1e-5, rtol=1e-5)
    bank.use("cars")
    shutil.copytree(tmp_path / "bitfit", tmp_path / "pets", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="has changed since"):
        bank(X[:1], ["pets"])
    assert torch.equal(logits(bank.model), expected["cars"])


def test_weights_that_are_loaded_while_an_adapter_is_in_use(saved: Trained) -> None:
    bank = saved.load(petune.AdapterBank(model()), "bitfit", "pets")
    expected = logits(saved.alone("bitfit"))
    new = {key: t + 1 if key.endswith("bias") else t for key, t in model().state_dict().items()}
    for switch in (lambda: bank.use("bitfit"), lambda: bank.use("pets"), lambda: bank(X[:1], ["pets"])):
        torch.testing.assert_close(logits(bank.use("bitfit")), expected)
        bank.model.load_state_dict(new, strict=False)
        with pytest.warns(UserWarning, match="while the adapter 'bitfit' was in use"):
            switch()
        torch.testing.assert_close(logits(bank.use("bitfit")), expected)


def test_a_second_adapter_of_a_kind_runs_no_forward(saved: Trained, tmp_path: Path) -> None:
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


def test_an_adapter_that_is_exchanged_while_it_is_read_again(
    saved: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes
    bank = petune.AdapterBank(model(), max_memory=0)

    def exchange(path: Path) -> bytes:
        """Read a file; meanwhile its adapter is removed, and another one loaded under its name."""
        content = read_bytes(path)
        if path.is_relative_to(saved["pets"]):
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            bank.remove("task")
            bank.load("task", saved[other])
        return content

    for other in ("cars", "bitfit"):
        bank.load("task", saved["pets"])
        bank.load("norm", saved["norm"])  # "task" leaves memory
        monkeypatch.setattr(Path, "read_bytes", exchange)
        for row in (bank(X[:1], ["task"])[0], bank(X[:1], ["task"])[0], bank.use("task")(X[:1])[0]):
            torch.testing.assert_close(row, logits(saved.alone(other), X[:1])[0], atol=1e-6, rtol=1e-5)
        bank.close()


@pytest.mark.parametrize(("threads", "steps"), [(3, 4), pytest.param(12, 40, marks=pytest.mark.exhaustive)])
def test_many_threads_use_one_bank(saved: Trained, threads: int, steps: int) -> None:
    names = ["pets", "cars", "bitfit", "lora"][: 2 if steps < 10 else 4]
    bank = saved.load(petune.AdapterBank(model(), max_memory=15_000), *names)
    rows = [*names, None]
    expected = {name: logits(saved.alone(name), X[:1])[0] for name in rows}

    def ask(worker: int) -> None:
        for step in range(steps):
            own = f"{worker} {step}"
            task = "norm" if step % 10 == worker % 10 else "pets"
            bank.load(own, saved[task])
            mix = [*(rows[(worker + step + i) % len(rows)] for i in range(3)), own]
            with torch.no_grad():
                for name, row in zip(mix, bank(X[:1].expand(4, -1, -1, -1), mix), strict=True):
                    alone = expected_of_task[task] if name == own else expected[name]
                    torch.testing.assert_close(row, alone, atol=1e-6, rtol=1e-5)
            bank.remove(own)

    expected_of_task = {task: logits(saved.alone(task), X[:1])[0] for task in ("norm", "pets")}
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    assert [*bank.adapters] == names

"""Bits flipped, files cut, swapped or missing, in checkpoints and adapters: none is loaded without a word."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import petune
from petune.base.errors import CheckpointError
from petune.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from tests.faults.conftest import TINY, WAIT_S, Program, tally, tries
from tests.injector.test_load import trained
from tests.tiny import X, tiny


def damage(place: Path, chance: random.Random) -> str:
    """Harm one file in one of four ways; not the model card, which is there to be edited."""
    files = sorted(p for p in place.iterdir() if p.stat().st_size and p.name != "README.md")
    file, way = chance.choice(files), chance.choice(["bit", "cut", "swapped", "gone"])
    content = bytearray(file.read_bytes())
    if way == "bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(bytes(content))
    elif way == "cut":
        file.write_bytes(bytes(content[: chance.randrange(len(content))]))
    elif way == "gone":
        file.unlink()
    else:
        other = chance.choice([f for f in files if f != file])
        content, rest = file.read_bytes(), other.read_bytes()
        file.write_bytes(rest)
        other.write_bytes(content)
    return f"{way} {file.name}"


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    trained().save(tmp_path / "good")
    chance, wanted, held = random.Random(1), tries(40, 500), 0
    for number in range(wanted):
        place = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", place)
        what = damage(place, chance)
        model = tiny()
        try:
            petune.load(model, place)
        except CheckpointError:
            held += 1
        else:
            # a changed bit within the manifest's own spaces harms nothing: the adapter must then be the very same
            whole = tiny()
            petune.load(whole, tmp_path / "good")
            same = torch.equal(model(X), whole(X))
            assert same, (number, what)
            held += "manifest" in what
        shutil.rmtree(place)
    tally(
        "an adapter with a flipped bit, or a truncated, swapped or missing file",
        "refused; model unchanged",
        wanted,
        held,
    )


def checkpoint(step: int) -> Checkpoint:
    torch.manual_seed(step)
    layer = nn.Linear(30, 10)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 30)).sum().backward()
    optimizer.step()
    tensors = {key: p.detach() for key, p in layer.named_parameters()}
    best = {key: t + 1 for key, t in tensors.items()}  # swapped files must differ for that to be a fault
    return Checkpoint(tensors, best, optimizer.state_dict(), {"step": step})


def test_damaged_checkpoints_give_way_to_the_one_before(tmp_path: Path) -> None:
    chance, wanted, held = random.Random(2), tries(40, 500), 0
    for step in (1, 2):
        save_checkpoint(tmp_path / "good", checkpoint(step))
    for number in range(wanted):
        place = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", place)
        what = damage(place / "step-000000002", chance)
        found, problems = newest_checkpoint(place)
        assert found is not None
        if found.progress["step"] == 2:
            assert "manifest" in what, (number, what)
        held += (found.progress["step"] == 1 and len(problems) == 1) or "manifest" in what
        shutil.rmtree(place)
    tally(
        "a checkpoint with a flipped bit, or a truncated, swapped or missing file",
        "detected; the previous one is used",
        wanted,
        held,
    )


@pytest.mark.exhaustive
def test_killed_while_saving(program: Program, tmp_path: Path) -> None:
    context, chance, wanted, held = program.context, random.Random(3), tries(15, 200), 0
    for number in range(wanted):
        place = tmp_path / f"c{number % 5}"
        process = context.Process(target=save_for_ever, args=(str(place),))
        process.start()
        deadline = time.monotonic() + WAIT_S
        while not any(place.glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        assert process.pid is not None
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found, problems = newest_checkpoint(place)
        held += found is not None and not problems
    tally("SIGKILL at a random moment of saving", "a valid checkpoint exists", wanted, held)


def save_for_ever(place: str) -> None:
    """One checkpoint after the other, the same two steps again and again, so that directories are replaced too."""
    step = 0
    while True:
        step += 1
        save_checkpoint(Path(place), checkpoint(step % 3))


def test_nothing_that_is_written_is_a_pickle(program: Program, tmp_path: Path) -> None:
    assert program.finish("compare", "adaptformer", "full", *TINY, "--epochs=1", "--output", tmp_path / "c") == 0
    files = [p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) > 20
    known = {".yaml", ".json", ".jsonl", ".safetensors", ".md", ".svg", ".npz"}
    assert {p.suffix for p in files} <= known
    for file in files:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                assert [arrays[name] for name in arrays.files]
            continue
        assert file.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), file
        if file.suffix == ".safetensors":
            load_file(file)

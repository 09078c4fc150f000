"""`--dry-run` refuses what the real command would refuse before it trains, and writes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.sampling import sampled

Run = Callable[..., Any]
Words = tuple[str, ...]

COMMANDS = {
    "run": ("run", "--method=linear"),
    "compare": ("compare", "linear"),
    "sweep": ("sweep", "adaptformer", "--search=bottleneck=2,4"),
    "pretrain": ("pretrain",),
}
GOLDEN = Path(__file__).parents[1] / "golden" / "v0"


@pytest.mark.parametrize("command", sampled(COMMANDS, {"run", "compare"}.__contains__))
@pytest.mark.parametrize(
    ("words", "code", "key"),
    [
        (("--weights=missing",), 4, "missing"),
        (("--weights=foreign.safetensors",), 4, "foreign.safetensors"),
        (("--weights=damaged.safetensors",), 4, "damaged.safetensors"),
        (("--backbone=torchvision:vit_b_16", "--weights=missing"), 4, "missing"),
        (("--backbone=vit_tiny_patch16_224", "--weights=missing"), 4, "missing"),
        (("--backbone=vit_bsae",), 2, "vit_bsae"),
        (("--dataset=cifr10",), 2, "cifr10"),
        (("--set=final_fit=train+val", "--shots=5"), 2, "final_fit"),
        (("--dataset=folder:nowhere",), 4, "nowhere"),
        (("--device=cuda:77",), 2, "cuda:77"),
        (("--optimizer=adamm",), 2, "adamm"),
        (("--set=train.nothing=1",), 2, "nothing"),
    ],
)
def test_what_the_real_command_refuses_is_refused(
    command: str, words: Words, code: int, key: str, petune: Run, tiny: Words, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    files = {*tmp_path.iterdir()}
    done = petune(*COMMANDS[command], *tiny, *words, "--dry-run")
    assert (done.code, done.out) == (code, "")
    assert key in done.err
    assert {*tmp_path.iterdir()} == files
    if command == "run":
        real = petune(*COMMANDS[command], *tiny, *words)
        assert (real.code, real.err) == (code, done.err)


@pytest.mark.parametrize("words", [("run", "--method=vpt:nothing=1"), ("compare", "linear", "vpt:num_prompts=0")])
def test_options_of_a_method_are_checked(words: Words, petune: Run, tiny: Words) -> None:
    assert petune(*words, *tiny, "--dry-run").code == 2


def test_weights_that_only_need_a_network_are_a_warning(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = petune("run", "--method=linear", "--backbone=vit_tiny", "--dataset=digits", "--device=cpu", "--dry-run")
    assert done.code == 0
    assert "warning: no pretrained weights for vit_tiny" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory_that_cannot_be_used_is_refused(command: str, petune: Run, tiny: Words, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    shutil.copytree(GOLDEN / "bitfit", tmp_path / "here")
    for output in ("here", "file"):
        done = petune(*COMMANDS[command], *tiny, "--output", output, "--dry-run")
        assert (done.code, done.out) == (2, "")
        assert output in done.err


def test_a_run_that_could_be_resumed_is_accepted(petune: Run, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "bitfit", tmp_path / "here")
    words = ("run", "--config", "here/config.yaml", "--output", "here")
    assert petune(*words, "--dry-run").code == 2
    done = petune(*words, "--resume", "--dry-run")
    assert done.code == 0, done.err
    assert petune("run", "--method=linear", "--output=nowhere", "--resume", "--dry-run").code == 2

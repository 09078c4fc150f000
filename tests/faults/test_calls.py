"""Every command and every public function is fed nonsense once, also those that are added later."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from torch import nn

import petune
from petune.base.errors import PetuneError
from petune.cli.main import app, main
from petune.tuners.adaptformer import AdaptFormer
from tests.faults.conftest import tally
from tests.injector.test_load import trained
from tests.tiny import tiny


def every_command() -> dict[str, tuple[str, ...]]:
    """The words of every command of the program."""

    def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if hasattr(command, "commands"):
            for name, part in command.commands.items():
                yield from below(part, (*words, name))
        else:
            yield words

    found = {" ".join(words): words for words in below(typer.main.get_command(app), ())}
    assert {"run", "compare", "data check", "plugin new"} <= found.keys()
    return found


RUBBISH = (
    ("--wat",),
    ("\x1b]0;x\x07", "", "/nowhere/\u202e", "--json=maybe"),
    ("--config", "/dev/null/x", "--set", "="),
)


@pytest.mark.parametrize("name", every_command())
def test_every_command_refuses_rubbish(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    for rubbish in RUBBISH:
        with pytest.raises(SystemExit) as stopped:
            main([*every_command()[name], *rubbish])
        out, err = capfd.readouterr()
        assert stopped.value.code in (2, 4), (rubbish, err)
        assert err.strip(), rubbish
        assert "Traceback" not in err
        assert "a bug in petune" not in err
        assert not any(c in out + err for c in "\x1b\x07\u202e"), rubbish
    assert not list(tmp_path.iterdir())
    tally(f"invalid input for `petune {name}`", "one error, exit 2 or 4, nothing written", len(RUBBISH), len(RUBBISH))


@cache
def an_attachment() -> petune.Attachment:
    """One for all calls that only read it."""
    return trained()


PUBLIC: dict[str, tuple[Callable[..., object], dict[str, object]]] = {
    "attach": (petune.attach, {"model": ..., "method": "linear", "sites": None, "name": None, "train_head": True,
                                   "keep_original": True, "input_size": None, "example": None, "head": None}),
    "add_dense_head": (petune.add_dense_head, {"model": ..., "num_outputs": 2, "blocks": "last:1", "seed": 0}),
    "find_sites": (petune.find_sites, {"model": ..., "input_size": None, "example": None, "head": None}),
    "take_clips": (petune.take_clips, {"model": ..., "num_frames": 2, "image_size": None}),
    "load": (petune.load, {"model": ..., "path": "good", "name": None, "tuner": None, "sites": None}),
    "check_tuner": (petune.check_tuner, {"tuner": "linear", "model": ...}),
    "run": (petune.run, {"config": None, "watch": print, "method": "none"}),
    "pretrain": (petune.pretrain, {"config": None, "watch": print, "method": "none"}),
    "compare": (petune.compare, {"config": None, "watch": print, "methods": ()}),
    "sweep": (petune.sweep, {"config": None, "watch": print, "search": {}}),
    "predict": (petune.predict, {"path": "good", "images": "x.png", "top_k": 1, "batch_size": 1, "weights": None,
                                     "device": "cpu", "precision": "fp32", "trust_remote_code": False}),
    "evaluate": (petune.evaluate, {"path": "good", "split": "test", "dataset": None, "data_dir": None,
                                       "weights": None, "device": "cpu", "precision": "fp32", "batch_size": 1,
                                   "trust_remote_code": False}),
    "export": (petune.export, {"path": "good", "out": "x.onnx", "format": None, "weights": None,
                               "trust_remote_code": False}),
    "average_adapters": (petune.average_adapters, {"paths": ["good"], "output": "out", "algorithm": "uniform",
                                                   "coefficients": None, "density": None, "seed": 0, "head": "average",
                                                   "rank": None, "by_factors": False, "start": None, "model": None,
                                                   "weights": None, "data_dir": None, "device": "cpu", "batch_size": 1,
                                                   "trust_remote_code": False}),
    "convert": (petune.convert, {"path": "good", "output": "out", "to": "peft-lora", "rank": None, "model": None,
                                 "weights": None, "trust_remote_code": False}),
    "push": (petune.push, {"path": "good", "repo": "me/x", "private": False, "update": False}),
    "pull": (petune.pull, {"repo": "me/x", "output": None, "revision": None, "trust_remote_code": False}),
    "check_dataset": (petune.check_dataset, {"dataset": "digits", "data_dir": None}),
    "check_task": (petune.check_task, {"task": "classification"}),
    "compare_datasets": (petune.compare_datasets, {"config": None, "watch": print, "datasets": ()}),
    "cross_validate": (petune.cross_validate, {"config": None, "watch": print}),
    "load_dataset": (petune.load_dataset, {"name": "digits", "data_dir": None, "image_size": 8, "on_broken": "error",
                                           "channels": None, "cache_gb": 1.0}),
    "run_all": (petune.run_all, {"configs": (), "watch": print}),
    "list_tasks": (petune.list_tasks, {}),
    "list_tuners": (petune.list_tuners, {}),
    "list_datasets": (petune.list_datasets, {}),
    "list_backbones": (petune.list_backbones, {"pattern": "vit_tiny*"}),
    "register_with_peft": (petune.register_with_peft, {}),
    "Attachment.save": (lambda **w: an_attachment().save(**w), {"path": "out", "metadata": None}),
    "AdapterBank": (petune.AdapterBank, {"model": ...}),
    "AdapterBank.load": (lambda **w: petune.AdapterBank(tiny()).load(**w), {"name": "a", "path": "good"}),
    "AdapterBank.use": (lambda **w: petune.AdapterBank(tiny()).use(**w), {"name": None}),
    "AdapterBank.remove": (lambda **w: petune.AdapterBank(tiny()).remove(**w), {"name": "a"}),
    "Tuner": (AdaptFormer, {"config": None}),
}  # fmt: skip
THINGS = (5, -1, "wat", "", b"x", object(), [], {}, float("nan"), nn.Identity(), (3, 0, 0), "\x1b[2J\0", int)


def test_every_public_function_is_here() -> None:
    functions = {name for name in petune.__all__ if inspect.isfunction(getattr(petune, name))}
    assert functions <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument in turn is a thing that makes no sense there: it is taken, or refused by one error of ours."""
    monkeypatch.chdir(tmp_path)
    an_attachment().save("good")
    call, words = PUBLIC[name]
    tried, model = 0, tiny()
    for key in words:
        for thing in THINGS:
            given = {k: model if value is ... else value for k, value in words.items()} | {key: thing}
            tried += 1
            try:
                call(**given)
            except PetuneError:
                continue
            except Exception as error:
                pytest.fail(f"{name}({key}={thing!r}) raises {type(error).__name__}: {error}")
            model = tiny() if ... in words.values() else model  # it was taken, so the model is another one
    if not words:
        call()
        return
    tally(f"invalid values for each argument of {name}", "accepted, or one PetuneError", tried, tried)

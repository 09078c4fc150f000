"""`petune run`, from the command line to the files: digits on a ViT of two narrow blocks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from petune.base.errors import Stopped
from petune.cli.running import resume_hint
from petune.runner.result import RunResult

Run = Callable[..., Any]
Words = tuple[str, ...]

BACKBONE = "vit_tiny_patch16_224,depth=2,embed_dim=48,img_size=32,patch_size=4"
RESULT = f"""\
method linear
backbone {re.sub(r"[0-9]+", "#", BACKBONE)}, weights none
dataset digits, seed #; images: train #, val #, test #
top-# on test # %
top-# on test # %
macro accuracy on test # %
macro-F# on test # %
top-# on val # % (epoch # of #)
tuned # (with the head # % of all parameters, # % of backbone and head)
head #
saved # kB
training # images/s, # s, fp#
peak memory # MB
output runs/linear-vit_nano-digits-seed#
"""


def test_a_run_prints_its_result_on_stdout_and_progress_on_stderr(
    petune: Run, tiny: Words, plain: Callable[[str], str], tmp_path: Path
) -> None:
    done = petune("run", "--method", "linear", *tiny)
    assert done.code == 0, done.err
    assert plain(done.out).replace("GB", "MB") == RESULT
    first, second, note, last = done.err.splitlines()
    assert first == f"{BACKBONE}, weights none; digits from scikit-learn"
    assert second == "0 tuned and 490 head parameters train (0.782 % of backbone and head, 0.782 % of all)"
    assert re.fullmatch(r"epoch 1/1  loss \d\.\d+  val top-1 \d+\.\d\d %", last)
    assert note == "each epoch has 2 batches of 100 images, because full ones of 128 would leave out 72 of 200"
    place = tmp_path / "runs" / "linear-vit_nano-digits-seed0"
    assert {"config.yaml", "metrics.jsonl", "result.json", "adapter", "checkpoints"} <= set(os.listdir(place))


def test_json_is_the_result_and_nothing_else_on_stdout(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("run", "--method", "linear", *tiny, "--json", "--output", "here", "--seed", 3)
    assert done.code == 0, done.err
    assert RunResult.model_validate(json.loads(done.out)) == RunResult.read(tmp_path / "here")
    assert json.loads(done.out)["seed"] == 3
    assert "epoch 1/1" in done.err


def test_config_yaml_repeats_the_run(petune: Run, tiny: Words, tmp_path: Path) -> None:
    first = json.loads(petune("run", "--method", "linear", *tiny, "--json").out)
    again = json.loads(petune("run", "--config", f"{first['output']}/config.yaml", "--json").out)
    assert again["output"] == f"{first['output']}-2"
    assert (again["metrics"], again["val_metrics"]) == (first["metrics"], first["val_metrics"])


def test_an_existing_output_is_refused_and_resume_returns_a_finished_result(
    petune: Run, tiny: Words, tmp_path: Path
) -> None:
    words = ("run", "--method", "linear", *tiny, "--output", "here", "--json")
    first = petune(*words)
    refused = petune(*words)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: here already exists")
    assert "--resume" in refused.err
    again = petune(*words, "--resume")
    assert (again.code, again.out, again.err) == (0, first.out, "")


def test_resume_without_output_takes_the_latest_of_the_name(petune: Run, tiny: Words) -> None:
    words = ("run", "--method", "linear", *tiny, "--json")
    refused = petune(*words, "--resume")
    assert refused.code == 2
    assert "nothing to resume: there is no runs/linear-vit_nano-digits-seed0" in refused.err
    first = petune(*words, "--set=resume=true")  # a job that may be requeued starts so
    assert first.code == 0, first.err
    assert petune(*words, "--set=resume=true").out == first.out
    other = petune(*words, "--set=resume=true", "--epochs=2", "--dry-run")
    assert (other.code, "train.epochs: 1 before, 2 now" in other.err) == (2, True)
    second = petune(*words)
    assert json.loads(second.out)["output"].endswith("-2")
    assert petune(*words, "--resume").out == second.out


def test_resume_of_nothing_is_refused(petune: Run, tiny: Words, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("run", "pretrain"):
        for output in ("nowhere", "empty"):
            done = petune(command, *tiny, "--output", output, "--resume")
            assert (done.code, done.out) == (2, "")
            assert f"nothing to resume in {output}" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    first = petune("run", "--method=linear", *tiny, "--output=nowhere", "--set=resume=true", "--json")
    assert first.code == 0, first.err
    assert petune("run", "--method=linear", *tiny, "--output=nowhere", "--resume", "--json").out == first.out


@pytest.mark.exhaustive
def test_seeds_give_mean_and_deviation(petune: Run, tiny: Words, plain: Callable[[str], str], tmp_path: Path) -> None:
    done = petune("run", "--method", "linear", *tiny, "--seeds", "0,1")
    assert done.code == 0, done.err
    heading, _, row = done.out.strip().splitlines()
    assert "top-1" in heading
    assert row.startswith("| linear |")
    assert "±" in row
    assert (tmp_path / "runs" / "linear-vit_nano-digits-seeds" / "compare.json").exists()
    assert "[2/2] linear, seed 1" in done.err
    assert petune("run", "--method", "linear", *tiny, "--seeds", "0,1", "--resume").out == done.out


def test_jobs_are_for_several_seeds(petune: Run, tiny: Words) -> None:
    done = petune("run", "--method", "linear", *tiny, "--jobs", 1)
    assert done.code == 2
    assert "--seeds" in done.err


@pytest.mark.exhaustive
def test_seeds_at_a_time(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("run", "--method", "linear", *tiny, "--seeds", "0,1", "--jobs", 1)
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "linear-vit_nano-digits-seeds" / "compare.json").exists()


def test_dry_run_prints_a_complete_config_and_writes_nothing(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("run", "--method", "linear", *tiny, "--dry-run")
    assert done.code == 0, done.err
    shown = yaml.safe_load(done.out)
    assert shown["method"] == "linear"
    assert shown["backbone_options"] == {"depth": 2, "embed_dim": 48}
    assert shown["train"]["epochs"] == 1
    assert done.err.splitlines()[1:6] == [
        f"{BACKBONE}; dry run: nothing was trained or written",
        "",
        "method              linear",
        "tuned               0  (with the head 0.782 % of all parameters, 0.782 % of backbone and head)",
        "head                490",
    ]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.yaml").write_text(done.out)
    assert petune("run", "--config", "a.yaml", "--dry-run").out == done.out


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--method", "pip install petune-NAME"),
        ("--backbone", "once the package is installed"),
        ("--dataset", "folder:PATH"),
    ],
)
def test_an_unknown_name_says_what_may_have_to_be_installed(flag: str, advice: str, petune: Run, tiny: Words) -> None:
    for name in ("nothing_like_it", "vit_bsae"):
        assert advice in petune("run", *tiny, flag, name).err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ("--method", "adaptfromer"),
            2,
            "error: no such method: adaptfromer. Did you mean adaptformer or",
        ),
        (("--method", "LoRA"), 2, "error: no such method: LoRA. Did you mean lora"),
        (("--method", "vpt:deep"), 2, "error: options are written vpt:deep=VALUE, but the method is 'vpt:deep'"),
        (("--method", "vpt:depp"), 2, "written vpt:OPTION=VALUE, but the method is 'vpt:depp'. Did you mean deep?"),
        (("--set", "lr=3"), 2, "  - no such key: lr. Did you mean train.lr?"),
        (("--set", "epocs=3"), 2, "  - no such key: epocs. Did you mean train.epochs?"),
        (("--backbone", "vit_bsae"), 2, "error: no such backbone: vit_bsae. Did you mean vit_base"),
        (("--dataset", "cifr10"), 2, "error: no such dataset: cifr10. Did you mean cifar10"),
        (
            ("--optimizer", "adamm"),
            2,
            "error: 1 problem in the command line:\n  - train.optimizer: timm has no",
        ),
        (("--dataset", "folder:/no/where"), 4, "/no/where"),
        (("--weights", "/no/where"), 4, "/no/where"),
        (("--device", "gpu"), 2, "error: no such device: 'gpu' (PyTorch has no such type). Use auto"),
        (
            ("--backbone", "vit_base", "--weights", "default", "--dataset", "cifr10"),
            2,
            "error: no such dataset: cifr10",
        ),
        (("--device", "cuda:7"), 2, "error: no such device: 'cuda:7'"),
        (
            ("--tracker", "tensorbord"),
            2,
            "error: no such tracker: tensorbord. Did you mean tensorboard",
        ),
    ],
)
def test_wrong_names_are_one_message(words: Words, code: int, message: str, petune: Run, tiny: Words) -> None:
    done = petune("run", *tiny, *words)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_tracker_logs_in_the_run_directory(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("run", "--method", "linear", *tiny, "--tracker", "tensorboard", "--output", "here")
    assert done.code == 0, done.err
    assert list((tmp_path / "here" / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.exhaustive
def test_ctrl_c_exits_with_75_and_prints_the_command_to_resume(tiny: Words, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "petune", "run", "--method", "linear", *tiny, "--epochs", "200", "--json"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "runs" / "linear-vit_nano-digits-seed0" / "metrics.jsonl"
        end = time.monotonic() + 180
        while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert "error: stopped by SIGINT" in err
    assert "resume=true" not in err  # one way to continue, the command below
    place = "runs/linear-vit_nano-digits-seed0"
    assert err.endswith(f"\n  petune run --config {place}/config.yaml --output {place} --resume\n")


def test_a_run_that_has_saved_nothing_is_not_to_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as caught, resume_hint("run", tmp_path / "run" / "config.yaml", "--resume"):
        raise Stopped("stopped by SIGTERM before training started")
    assert caught.value.cli_hint is not None
    assert "without --resume" in caught.value.cli_hint


def test_the_tracker_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.touch()
    with pytest.raises(Stopped) as caught, resume_hint("run", config, "--resume", tracker="tensorboard"):
        raise Stopped("stopped by SIGTERM")
    assert str(caught.value.cli_hint).endswith("--resume --tracker tensorboard")


def test_an_unreachable_hub_is_reported_before_timm_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom petune.cli.main import main\ntry:\n"
        " main(['run', '--method', 'adaptformer', '--backbone', 'vit_base', '--dataset', 'digits'])\n"
        "except SystemExit as end:\n print(end.code, 'timm' in sys.modules)"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.stdout.split() == ["4", "False"], done.stderr
    for words in (
        "timm/vit_base_patch16_224.augreg_in21k/model.safetensors is not in",
        "http://127.0.0.1:9 cannot be reached. Download it",
        "--weights PATH",
        "--weights none",
    ):
        assert words in done.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_from_continues_a_finished_run(petune: Run, tiny: Words, tmp_path: Path) -> None:
    assert petune("run", "--method=lora:r=2", *tiny, "--output", "first").code == 0
    shown = petune("run", "--from", "first", "--epochs", 2, "--dry-run")
    assert (shown.code, list(tmp_path.glob("runs/*"))) == (0, [])
    assert yaml.safe_load(shown.out)["method"] == "lora:r=2"
    assert "continues from first/adapter (digits, 1 epoch)" in shown.err.replace(str(tmp_path) + "/", "")
    done = petune("run", "--from", "first", "--epochs", 2, "--device=cpu", "--output", "second")
    assert done.code == 0, done.err
    assert "with its classifier" in done.err
    assert re.search(r"continued from +\S*first", done.out)
    again = petune("run", "--config", "second/config.yaml", "--output", "second", "--resume")
    assert (again.code, again.out) == (0, done.out)
    refused = petune("run", "--from", "first", "--backbone", "vit_tiny", "--epochs", 1)
    assert refused.code == 2
    assert "backbone: 'vit_nano' there, 'vit_tiny' here" in refused.err

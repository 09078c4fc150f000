"""A run directory belongs to one process at a time and to one configuration."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from petune.base.config import Config
from petune.base.errors import CheckpointError, UsageError
from petune.base.yaml_values import read_yaml
from petune.runner.result import RunResult
from petune.runner.run_dir import (
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    check_config,
    latest_path,
    open_run_dir,
    unique_path,
)
from petune.serving.restore import restore

COMMAND = "petune run --config config.yaml"


class Settings(Config):
    seed: int = 0
    lr: float = 0.1
    output: Path | None = None
    resume: bool = False


def _start(path: Path, resume: bool, barrier: Barrier, results: Any) -> None:
    barrier.wait(20)
    try:
        with open_run_dir(path, Settings(), resume=resume, command=COMMAND):
            results.put("open_run_dir")
            barrier.wait(20)  # hold it until all have tried
    except UsageError as error:
        results.put(str(error))
        barrier.wait(20)


@pytest.mark.parametrize("resume", [False, True])
def test_of_eight_starts_in_one_directory_exactly_one_claims_it(resume: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    arguments = (tmp_path / "run", resume, barrier, results)
    processes = [context.Process(target=_start, args=arguments, daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    said = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join(timeout=20)
    assert said.count("open_run_dir") == 1
    # without resume, one that finds the directory while it is still empty meets the lock
    expected = ("is in use by another petune process",) if resume else ("exists already", "is in use by another")
    assert sum(any(words in text for words in expected) for text in said) == 7
    assert [process.exitcode for process in processes] == [0] * 8


def test_the_config_is_written_with_the_command_on_top(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "a" / "run", Settings(seed=3), resume=False, command=COMMAND) as place:
        text = (place / CONFIG_FILE).read_text()
    assert text.startswith(f"# {COMMAND}\n")
    assert Settings.build(read_yaml(place / CONFIG_FILE)) == Settings(seed=3)


def test_an_existing_directory_is_gone_on_in_only_when_asked(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND):
        pass
    with (
        pytest.raises(UsageError, match=r"exists already; go on in it with --resume"),
        open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND),
    ):
        pass
    with open_run_dir(tmp_path / "run", Settings(resume=True), resume=True, command=COMMAND) as place:
        assert place == tmp_path / "run"


def test_an_option_that_is_newer_than_the_directory_counts_as_its_default(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND):
        pass
    (tmp_path / "run" / CONFIG_FILE).write_text("seed: 0\n")
    (tmp_path / "run" / METRICS_FILE).touch()
    with open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND):
        pass
    with pytest.raises(UsageError, match=r"lr: 0\.1 before, 0\.2 now"):
        open_run_dir(tmp_path / "run", Settings(lr=0.2), resume=True, command=COMMAND).__enter__()


def test_another_configuration_is_refused_naming_the_keys(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND) as place:
        (place / "checkpoints").mkdir()
    check_config(place, Settings(output=tmp_path))
    with pytest.raises(UsageError, match="seed: 0 before, 1 now"):
        check_config(place, Settings(seed=1))
    with (
        pytest.raises(UsageError) as caught,
        open_run_dir(tmp_path / "run", Settings(seed=1, output=tmp_path), resume=True, command=COMMAND),
    ):
        pass
    assert "  - seed: 0 before, 1 now" in str(caught.value).splitlines()
    assert "lr" not in str(caught.value)
    assert "output:" not in str(caught.value)


def test_where_nothing_trained_another_configuration_begins_anew(tmp_path: Path) -> None:
    names = {"inputs.json", "dataset_manifest.json", "compare.json", "sweep.json"}
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND) as place:
        for name in names:
            (place / name).touch()
        (place / "notes").write_text("mine")
    tables = ("compare.json", "sweep.json")
    with open_run_dir(place, Settings(), resume=True, command=COMMAND, tables=tables):
        assert {p.name for p in place.iterdir()} & names == {"compare.json", "sweep.json"}  # of the same question
    check_config(place, Settings(seed=1))
    with open_run_dir(place, Settings(seed=1), resume=True, command=COMMAND, tables=tables):
        assert {p.name for p in place.iterdir()} == {CONFIG_FILE, LOCK_FILE, "notes"}
    assert Settings.build(read_yaml(place / CONFIG_FILE)) == Settings(seed=1)


def test_a_configuration_that_somebody_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("seed: 3\n")
    with pytest.raises(UsageError, match="seed: 3 before, 0 now"):
        open_run_dir(tmp_path, Settings(), resume=True, command=COMMAND).__enter__()
    assert (tmp_path / CONFIG_FILE).read_text() == "seed: 3\n"


class Nested(Config):
    train: Settings = Settings()
    options: dict[str, Any] = {}


def test_of_a_mapping_the_keys_that_changed_are_named(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Nested(), resume=False, command=COMMAND) as place:
        (place / "checkpoints").mkdir()
    other = Nested(train=Settings(lr=1), options={"depth": 2})
    with pytest.raises(UsageError) as caught, open_run_dir(tmp_path / "run", other, resume=True, command=COMMAND):
        pass
    assert str(caught.value).splitlines()[1:] == [
        "  - options: {} before, None now",
        "  - options.depth: None before, 2 now",
        "  - train.lr: 0.1 before, 1.0 now",
        "Ask for the same again, or name another --output",
    ]


def test_the_lock_goes_with_the_context(tmp_path: Path) -> None:
    with (
        open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND),
        pytest.raises(UsageError, match="in use"),
        open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND),
    ):
        pass
    with open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND):
        pass


def test_a_place_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        with (
            pytest.raises(UsageError, match=r"cannot be made or written"),
            open_run_dir(path, Settings(), resume=True, command=COMMAND),
        ):
            pass


def test_an_error_inside_is_not_taken_for_one_of_the_directory(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="inside"),
        open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND),
    ):
        raise OSError("inside")


def test_free_path_makes_what_it_returns(tmp_path: Path) -> None:
    for name in ("run", "run-2", "run-3"):
        assert unique_path(tmp_path / "a" / "run") == tmp_path / "a" / name
        assert (tmp_path / "a" / name).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        unique_path(tmp_path / "file" / "run")


def test_the_latest_of_a_name_is_the_run_that_began_last(tmp_path: Path) -> None:
    wanted = tmp_path / "run"
    assert latest_path(wanted) is None
    for number, name in enumerate(("run", "run-2", "run-4", "run-x", "runs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).touch()
        os.utime(tmp_path / name / CONFIG_FILE, (number, number))
    (tmp_path / "run-5").mkdir()  # nothing began in it
    assert latest_path(wanted) == tmp_path / "run-4"
    os.utime(wanted / CONFIG_FILE, (9, 9))  # made anew where there was room
    assert latest_path(wanted) == wanted
    (wanted / CONFIG_FILE).unlink()
    assert latest_path(wanted) == tmp_path / "run-4"


def test_what_was_killed_as_it_began_is_no_run(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with open_run_dir(tmp_path, Settings(), resume=False, command=COMMAND):
        assert (tmp_path / CONFIG_FILE).exists()


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, Settings(), resume=False, command=COMMAND):
        assert (tmp_path / CONFIG_FILE).exists()
    with (
        pytest.raises(UsageError, match="exists already"),
        open_run_dir(tmp_path, Settings(), resume=False, command=COMMAND),
    ):
        pass


def _result() -> RunResult:
    numbers = dict.fromkeys(
        [
            "seed",
            "epoch",
            "epochs",
            "lr",
            "tuned",
            "head",
            "total",
            "forward_flops",
            "adapter_bytes",
            "peak_memory_bytes",
        ],
        1,
    )
    shares = dict.fromkeys(
        ["top1", "top5", "percent_of_total", "percent_of_backbone", "images_per_s", "step_time_s", "time_s"],
        0.5,
    )
    texts = dict.fromkeys(["method", "backbone", "backbone_full_name", "weights", "dataset", "output"], "x")
    return RunResult.build({**numbers, **shares, **texts, "val_top1": None, "provenance": {"git": None}})


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert not RunResult.exists(tmp_path)
    written = _result().write(tmp_path)
    assert RunResult.exists(tmp_path)
    assert RunResult.read(tmp_path) == written


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"method": "x"', "\x00"])
def test_a_result_that_is_none_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"result\.json must be the result of a finished run"):
        RunResult.read(tmp_path)


STUMPS = (".adapter-ab_d1234", "checkpoints/.step-000000012-x1y2z3w4")
OTHERS = (".pre-commit", ".adapter-mine", ".adapter-ab_d1234-old", "checkpoints/step-000000012")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("compare.json", "a/result.json", "b/config.yaml"), "is a comparison, whose runs have adapters; name one that "
         "is finished: here/a"),
        (("sweep.json",), "is a sweep, whose runs have adapters; name one that is finished: none is"),
        (("config.yaml", "trial.json"), "is a trial that did not read test, and has no adapter; run it: petune run "
         "--config here/config.yaml"),
        (("config.yaml", "metrics.jsonl"), "is a run that is not finished; go on: petune run --config here/config.yaml "
         "--output here --resume"),
        (("config.yaml", "result.json"), "is a run without an adapter; a pretraining is for --weights"),
        (("cat.jpg",), "must be an adapter directory, but holds no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_has_no_adapter_is_called_by_its_name(
    files: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="an adapter directory must be there, but there is no here"):
        restore("here")
    for file in files:
        (tmp_path / "here" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / file).touch()
    with pytest.raises(CheckpointError) as caught:
        restore("here")
    assert str(caught.value) == f"here {said}"


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND):
        for name in (*STUMPS, *OTHERS):
            (tmp_path / "run" / name).mkdir(parents=True)
    with open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND):
        left = {name for name in (*STUMPS, *OTHERS) if (tmp_path / "run" / name).exists()}
    assert left == set(OTHERS)


def test_a_folder_that_was_no_run_keeps_all_that_it_holds(tmp_path: Path) -> None:
    for name in STUMPS:
        (tmp_path / name).mkdir(parents=True)
    with open_run_dir(tmp_path, Settings(), resume=True, command=COMMAND):
        assert all((tmp_path / name).exists() for name in STUMPS)

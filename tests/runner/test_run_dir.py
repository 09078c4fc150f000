"""Run directories are locked while in use and keep one configuration once training has started."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from petune.base.config import Config
from petune.base.errors import CheckpointError, UsageError
from petune.base.yaml_values import read_yaml
from petune.runner.file_names import CONFIG_FILE, LOCK_FILE
from petune.runner.result import RunResult
from petune.runner.run_dir import latest_path, make_unique_dir, open_run_dir
from petune.runner.stored_config import check_config
from petune.serving.restore import restore
from petune.training.run_files import METRICS_FILE

COMMAND = "run"


class Settings(Config):
    seed: int = 0
    lr: float = 0.1
    output: Path | None = None
    resume: bool = False


def _start(path: Path, resume: bool, barrier: Barrier, results: Any) -> None:
    barrier.wait(20)
    try:
        with open_run_dir(path, Settings(), resume=resume, command=COMMAND):
            results.put("opened")
            barrier.wait(20)  # hold it until all have tried
    except UsageError as error:
        results.put(str(error))
        barrier.wait(20)


@pytest.mark.filterwarnings("ignore:the file system of")
def test_without_file_locks_one_process_starts_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run_dir = tmp_path / "run"
    with open_run_dir(run_dir, Settings(), resume=False, command=COMMAND):
        (run_dir / CONFIG_FILE).unlink()  # as another process finds it that comes a moment later
        second = open_run_dir(run_dir, Settings(), resume=False, command=COMMAND)
        with pytest.raises(UsageError, match=r"in use .*delete .*\.lock"):
            second.__enter__()
    with open_run_dir(run_dir, Settings(), resume=True, command=COMMAND):
        assert (run_dir / CONFIG_FILE).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_of_eight_processes_exactly_one_opens_the_directory(resume: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    arguments = (tmp_path / "run", resume, barrier, results)
    processes = [context.Process(target=_start, args=arguments, daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join(timeout=20)
    assert outcomes.count("opened") == 1
    # without resume, a process that finds the directory while it is still empty meets the lock
    expected = ("is in use",) if resume else ("already exists", "is in use")
    assert sum(any(words in text for words in expected) for text in outcomes) == 7
    assert [process.exitcode for process in processes] == [0] * 8


def test_the_config_is_written_with_the_command_on_top(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "a" / "run", Settings(seed=3), resume=False, command=COMMAND) as run_dir:
        text = (run_dir / CONFIG_FILE).read_text()
    assert text.startswith("# petune run --config config.yaml\n")
    assert Settings.build(read_yaml(run_dir / CONFIG_FILE)) == Settings(seed=3)


def test_an_existing_directory_is_opened_only_to_resume(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND):
        pass
    with (
        pytest.raises(UsageError, match="already exists") as error,
        open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND),
    ):
        pass
    assert "--resume" in error.value.cli_hint
    with open_run_dir(tmp_path / "run", Settings(resume=True), resume=True, command=COMMAND) as run_dir:
        assert run_dir == tmp_path / "run"


def test_an_option_added_after_the_start_counts_as_its_default(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND):
        pass
    (tmp_path / "run" / CONFIG_FILE).write_text("seed: 0\n")
    (tmp_path / "run" / METRICS_FILE).touch()
    with open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND):
        pass
    with pytest.raises(UsageError, match=r"lr: 0\.1 before, 0\.2 now"):
        open_run_dir(tmp_path / "run", Settings(lr=0.2), resume=True, command=COMMAND).__enter__()


def test_another_configuration_is_refused_with_the_changed_keys(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND) as run_dir:
        (run_dir / "checkpoints").mkdir()
    check_config(run_dir, Settings(output=tmp_path))
    check_config(run_dir, Settings(seed=1), may_change=("seed",))
    with pytest.raises(UsageError, match="seed: 0 before, 1 now"):
        check_config(run_dir, Settings(seed=1))
    with (
        pytest.raises(UsageError) as caught,
        open_run_dir(tmp_path / "run", Settings(seed=1, output=tmp_path), resume=True, command=COMMAND),
    ):
        pass
    assert "  - seed: 0 before, 1 now" in str(caught.value).splitlines()
    assert "lr" not in str(caught.value)
    assert "output:" not in str(caught.value)


def test_before_training_another_configuration_replaces_the_old_one(tmp_path: Path) -> None:
    names = {"inputs.json", "dataset_manifest.json", "compare.json", "sweep.json"}
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND) as run_dir:
        for name in names:
            (run_dir / name).touch()
        (run_dir / "notes").write_text("mine")
    tables = ("compare.json", "sweep.json")
    with open_run_dir(run_dir, Settings(), resume=True, command=COMMAND, tables=tables):
        assert {p.name for p in run_dir.iterdir()} & names == {"compare.json", "sweep.json"}
    check_config(run_dir, Settings(seed=1))
    with open_run_dir(run_dir, Settings(seed=1), resume=True, command=COMMAND, tables=tables):
        assert {p.name for p in run_dir.iterdir()} == {CONFIG_FILE, LOCK_FILE, "notes"}
    assert Settings.build(read_yaml(run_dir / CONFIG_FILE)) == Settings(seed=1)


def test_a_config_yaml_that_petune_did_not_write_is_kept(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("seed: 3\n")
    with pytest.raises(UsageError, match="seed: 3 before, 0 now"):
        open_run_dir(tmp_path, Settings(), resume=True, command=COMMAND).__enter__()
    assert (tmp_path / CONFIG_FILE).read_text() == "seed: 3\n"


class Nested(Config):
    train: Settings = Settings()
    options: dict[str, Any] = {}


def test_nested_keys_that_changed_are_listed(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Nested(), resume=False, command=COMMAND) as run_dir:
        (run_dir / "checkpoints").mkdir()
    other = Nested(train=Settings(lr=1), options={"depth": 2})
    with pytest.raises(UsageError) as caught, open_run_dir(tmp_path / "run", other, resume=True, command=COMMAND):
        pass
    assert str(caught.value).splitlines()[1:-1] == [
        "  - options: {} before, None now",
        "  - options.depth: None before, 2 now",
        "  - train.lr: 0.1 before, 1.0 now",
    ]


def test_the_lock_is_released_at_the_end(tmp_path: Path) -> None:
    with (
        open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND),
        pytest.raises(UsageError, match="in use"),
        open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND),
    ):
        pass
    with open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND):
        pass


def test_a_directory_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        with (
            pytest.raises(UsageError, match="cannot create"),
            open_run_dir(path, Settings(), resume=True, command=COMMAND),
        ):
            pass


def test_an_error_inside_the_context_passes_unchanged(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="inside"),
        open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND),
    ):
        raise OSError("inside")


def test_make_unique_dir_creates_what_it_returns(tmp_path: Path) -> None:
    for name in ("run", "run-2", "run-3"):
        assert make_unique_dir(tmp_path / "a" / "run") == tmp_path / "a" / name
        assert (tmp_path / "a" / name).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot create"):
        make_unique_dir(tmp_path / "file" / "run")


def test_the_latest_of_a_name_is_the_run_that_started_last(tmp_path: Path) -> None:
    wanted = tmp_path / "run"
    assert latest_path(wanted) is None
    for number, name in enumerate(("run", "run-2", "run-4", "run-x", "runs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).touch()
        os.utime(tmp_path / name / CONFIG_FILE, (number, number))
    (tmp_path / "run-5").mkdir()  # nothing started in it
    assert latest_path(wanted) == tmp_path / "run-4"
    os.utime(wanted / CONFIG_FILE, (9, 9))  # created again after it was removed
    assert latest_path(wanted) == wanted
    (wanted / CONFIG_FILE).unlink()
    assert latest_path(wanted) == tmp_path / "run-4"


def test_a_lock_file_alone_is_no_run(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with open_run_dir(tmp_path, Settings(), resume=False, command=COMMAND):
        assert (tmp_path / CONFIG_FILE).exists()


def test_an_empty_directory_counts_as_new(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, Settings(), resume=False, command=COMMAND):
        assert (tmp_path / CONFIG_FILE).exists()
    with (
        pytest.raises(UsageError, match="already exists"),
        open_run_dir(tmp_path, Settings(), resume=False, command=COMMAND),
    ):
        pass


METRICS = {
    "task": "classification",
    "metrics": {"top1": 0.5},
    "val_metrics": None,
    "metric_info": [{"name": "top1", "label": "top-1", "percent": True}],
}


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
        ["percent_of_total", "percent_of_backbone", "images_per_s", "step_time_s", "time_s"],
        0.5,
    )
    texts = dict.fromkeys(["method", "backbone", "backbone_full_name", "weights", "dataset", "output"], "x")
    return RunResult.build({**numbers, **shares, **texts, **METRICS, "provenance": {"git": None}})


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert not RunResult.exists(tmp_path)
    written = _result().write(tmp_path)
    assert RunResult.exists(tmp_path)
    assert RunResult.read(tmp_path) == written


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"method": "x"', "\x00"])
def test_a_damaged_result_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"result\.json is not the result of a finished run"):
        RunResult.read(tmp_path)


PARTIAL_CHECKPOINT = "checkpoints/.step-000000012-x1y2z3w4"
PARTIAL_WRITES = (".adapter-ab_d1234", PARTIAL_CHECKPOINT, f"final_fit/{PARTIAL_CHECKPOINT}")
OTHERS = (".pre-commit", ".adapter-mine", ".adapter-ab_d1234-old", "checkpoints/step-000000012")


@pytest.mark.parametrize(
    ("files", "explanation"),
    [
        (("compare.json", "a/result.json", "b/config.yaml"), "comparison.* one that is finished: here/a"),
        (("sweep.json",), "sweep.* one that is finished: none is"),
        (("config.yaml", "trial.json"), "trial .* petune run --config here/config.yaml"),
        (
            ("config.yaml", "metrics.jsonl"),
            "not finished.* petune run --config here/config.yaml --output here --resume",
        ),
        (("config.yaml", "result.json"), "pretraining"),
        (("cat.jpg",), "adapter_config.json is missing"),
    ],
)
def test_a_directory_without_an_adapter_is_explained(
    files: tuple[str, ...], explanation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run or adapter directory at here"):
        restore("here")
    for file in files:
        (tmp_path / "here" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / file).touch()
    with pytest.raises(CheckpointError, match=explanation):
        restore("here")


def test_a_directory_of_runs_names_them_the_newest_first(tmp_path: Path) -> None:
    for number, run in enumerate(("old", "study/new")):
        adapter = tmp_path / "runs" / run / "adapter"
        adapter.mkdir(parents=True)
        (adapter.parent / "config.yaml").touch()
        (adapter / "adapter_config.json").touch()
        os.utime(adapter / "adapter_config.json", (number, number))
    (tmp_path / "runs" / "pulled").mkdir()
    (tmp_path / "runs" / "pulled" / "adapter_config.json").touch()
    (tmp_path / "runs" / "unfinished").mkdir()
    runs = [tmp_path / "runs" / name for name in ("pulled", "study/new", "old")]
    with pytest.raises(CheckpointError, match="not a run itself") as caught:
        restore(tmp_path / "runs")
    assert [Path(line.strip()) for line in str(caught.value).splitlines()[1:]] == runs
    with pytest.raises(CheckpointError, match="is a file"):
        restore(tmp_path / "runs" / "old" / "config.yaml")


def test_partial_writes_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", Settings(), resume=False, command=COMMAND):
        for name in (*PARTIAL_WRITES, *OTHERS):
            (tmp_path / "run" / name).mkdir(parents=True)
    with open_run_dir(tmp_path / "run", Settings(), resume=True, command=COMMAND):
        left = {name for name in (*PARTIAL_WRITES, *OTHERS) if (tmp_path / "run" / name).exists()}
    assert left == set(OTHERS)


def test_a_folder_that_was_no_run_keeps_its_files(tmp_path: Path) -> None:
    for name in PARTIAL_WRITES:
        (tmp_path / name).mkdir(parents=True)
    with open_run_dir(tmp_path, Settings(), resume=True, command=COMMAND):
        assert all((tmp_path / name).exists() for name in PARTIAL_WRITES)

"""Several processes do one run: the result is that of one process, and an error or signal ends all of them.

The processes are children of a fork server that has torch and timm imported, with the environment that torchrun gives.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from petune.base.distributed import SINGLE_PROCESS, Group, init_group, is_main_process, is_reported_elsewhere
from petune.base.errors import ConfigError, DataError, Stopped, UnknownName
from petune.cli.main import main
from petune.runner.result import RunResult
from petune.runner.run_adapter import read_run_adapter
from tests.fake_plugin import Fake, fake
from tests.sampling import sampled

__all__ = ["fake"]
TINY = (
    "--backbone=vit_nano", "--weights=none", "--set=backbone_options.depth=2", "--set=backbone_options.embed_dim=48",
    "--dataset=digits", "--shots=20", "--epochs=2", "--batch-size=15", "--device=cpu", "--precision=fp32",
    "--set=train.log_every=1", "--set=train.eval_batch_size=50",
)  # fmt: skip
WITHOUT_DATASET = tuple(word for word in TINY if not word.startswith(("--dataset", "--shots")))
LINES = 24 + 2  # of metrics.jsonl: a step each, an epoch each
PRELOAD = ["petune.runner.run", "petune.runner.compare", "petune.cli.main", "timm", "sklearn.datasets", "torchmetrics"]
Prelude = Callable[[int], None]


def nothing(rank: int) -> None:
    """Every process is as it should be."""


def no_cache_for_the_second(rank: int) -> None:
    os.environ["PETUNE_CACHE"] = "/proc/nowhere" if rank == 1 else tempfile.mkdtemp()


def full_disk(rank: int) -> None:
    real, calls = os.fsync, [0]

    def failing(number: int) -> None:
        calls[0] += 1
        if calls[0] > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    os.fsync = failing


def second_fails_at_its_third_step(rank: int) -> None:
    real, calls = torch.nn.functional.cross_entropy, [0]

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            raise RuntimeError("out of everything")
        return real(*args, **options)

    torch.nn.functional.cross_entropy = failing


def dropout_drops_all(rank: int) -> None:
    real = torch.nn.functional.dropout

    def dropping(x: torch.Tensor, p: float = 0.5, *args: Any, **options: Any) -> torch.Tensor:
        return x * 0 if p else real(x, p, *args, **options)

    torch.nn.functional.dropout = dropping


def one_of_several(rank: int, size: int, port: int, place: Path, prelude: Prelude, words: tuple[str, ...]) -> None:
    """A child: `petune WORDS` as process `rank` of `size`; what it prints goes to files in `place`."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # the launcher holds the store
    os.environ.update({name: str(value) for name, value in told.items()})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    prelude(rank)
    main(words)


class Several:
    """Starts `petune WORDS` as so many processes together."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.started: list[BaseProcess] = []
        self.stores: list[torch.distributed.TCPStore] = []

    def start(self, size: int, *words: object, prelude: Prelude = nothing) -> list[BaseProcess]:
        # as torchrun does: a port that a child would bind itself could be taken meanwhile
        self.stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        plain = tuple(str(word) for word in words)
        args = [(rank, size, self.stores[-1].port, self.place, prelude, plain) for rank in range(size)]
        started = [self.context.Process(target=one_of_several, args=a) for a in args]
        for process in started:
            process.start()
        self.started += started
        return started

    def finish(self, size: int, *words: object, prelude: Prelude = nothing) -> list[int | None]:
        started = self.start(size, *words, prelude=prelude)
        for process in started:
            process.join(120)
        return [process.exitcode for process in started]

    def end(self) -> None:
        """Nobody is left behind, waiting for others that do not come; what was said goes to a failed test's report."""
        for process in self.started:
            process.kill()
            process.join()
        for file in sorted(self.place.glob("err*")):
            print(f"{file.name}: {file.read_text()}")

    def said(self, rank: int, stream: str = "err") -> str:
        return (self.place / f"{stream}{rank}").read_text()


@pytest.fixture
def several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Several]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-several"))
    found = Several(tmp_path)
    yield found
    found.end()


def rows(place: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def farthest(a: Path, b: Path) -> float:
    """The largest difference of what two runs trained: their newest checkpoints and adapters."""
    files = ("adapter/adapter_model.safetensors", max(a.glob("checkpoints/*")).relative_to(a) / "model.safetensors")
    pairs = [(load_file(a / file), load_file(b / file)) for file in files]
    assert all(x.keys() == y.keys() for x, y in pairs)
    return max(float((x[key].float() - y[key].float()).abs().max()) for x, y in pairs for key in x)


def assert_same_run(a: Path, b: Path) -> None:
    assert farthest(a, b) < 1e-5
    one, other = RunResult.read(a), RunResult.read(b)
    assert (one.top1, one.top5, one.val_top1, one.epoch) == (other.top1, other.top5, other.val_top1, other.epoch)
    for mine, theirs in zip(rows(a), rows(b), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "words"),
    sampled(
        [
            ("adaptformer:dropout=0", ()),
            ("full", ("--mixup=0.4", "--batch-size=16")),
            ("adaptformer:dropout=0", ("--shots=7", "--batch-size=32")),
        ],
        lambda row: row[1][:1] == ("--shots=7",),
    ),
)
def test_two_processes_train_as_one(method: str, words: tuple[str, ...], several: Several, tmp_path: Path) -> None:
    whole = ("run", "--method", method, *TINY, *words, "--output")
    assert several.finish(1, *whole, tmp_path / "one") == [0]
    assert several.finish(2, *whole, tmp_path / "two") == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert RunResult.read(tmp_path / "two").provenance["num_processes"] == 2
    assert "top-1 on test" in several.said(0, "out")
    assert several.said(1) == several.said(1, "out") == ""


def test_a_method_that_calibrates_and_has_losses_of_its_own_trains_as_one(
    fake: Fake, several: Several, tmp_path: Path
) -> None:
    fake("petune-fake-chooser", {"chooser": "tests.chooser:Chooser"})
    whole = ("run", "--method", "chooser", *TINY, "--output")
    assert several.finish(1, *whole, tmp_path / "one") == [0]
    assert several.finish(2, *whole, tmp_path / "two", "--set=train.micro_batch_size=4") == [0, 0]
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith("indices"))
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("targets", "words"),
    sampled(
        [
            ("labels", ()),
            ("numbers", ()),
            ("labels", ("--mixup=0.4", "--batch-size=16")),
            ("numbers", ("--mixup=0.4", "--batch-size=16")),
        ],
        ("labels", ("--mixup=0.4", "--batch-size=16")).__eq__,
    ),
)
def test_two_processes_train_and_evaluate_other_tasks_as_one(
    targets: str, words: tuple[str, ...], fake: Fake, several: Several, tmp_path: Path
) -> None:
    fake("petune-fake", {"quadrants": "tests.quadrants:Quadrants"}, group="petune.datasets")
    words = (
        "run",
        "--method=adaptformer:dropout=0",
        *WITHOUT_DATASET,
        f"--dataset=quadrants,targets={targets}",
        *words,
    )
    assert several.finish(1, *words, "--output", tmp_path / "one") == [0]
    assert several.finish(2, *words, "--output", tmp_path / "two") == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    one, two = RunResult.read(tmp_path / "one"), RunResult.read(tmp_path / "two")
    assert two.metrics == pytest.approx(one.metrics, abs=1e-4)
    states = [read_run_adapter(tmp_path / n).config["metadata"]["task"]["state"] for n in ("one", "two")]
    for key, value in states[0].items():
        assert states[1][key] == pytest.approx(value, abs=1e-5)


@pytest.mark.exhaustive
def test_sharded_blocks_train_the_same_adapter(several: Several, tmp_path: Path) -> None:
    words = ("run", "--method=adaptformer:dropout=0", *TINY, "--set=train.eval_batch_size=71", "--output")
    assert several.finish(1, *words, tmp_path / "one") == [0]
    assert several.finish(2, *words, tmp_path / "two", "--set=train.shard=true", "--tracker=tensorboard") == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    configs = [json.loads((tmp_path / n / "adapter" / "adapter_config.json").read_text()) for n in ("one", "two")]
    no_logits = [config.pop("reference_logits") is None for config in configs]
    assert no_logits == [False, True]  # no process has a whole model
    assert configs[0] == configs[1]  # the fingerprint of the frozen weights included
    assert list((tmp_path / "two" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "words",
    [pytest.param(("--set=train.shard=true",), marks=pytest.mark.exhaustive), ("--epochs=1", "--batch-size=60")],
)
def test_an_adapter_without_effect_is_an_error(words: tuple[str, ...], several: Several, tmp_path: Path) -> None:
    """Also where the blocks are spread, and in a run of three steps."""
    run = ("run", "--method=lora:lora_dropout=0.5", *TINY, *words, "--output", tmp_path / "x")
    assert several.finish(2, *run, prelude=dropout_drops_all) == [1, 1]
    assert "lora does not learn" in several.said(0)


@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_all_and_another_number_resumes(several: Several, tmp_path: Path) -> None:
    words = ("run", "--method=adaptformer:dropout=0", *TINY, "--output")
    assert several.finish(1, *words, tmp_path / "one") == [0]
    place = tmp_path / "two"
    started = several.start(2, *words, place)
    while not (place / "metrics.jsonl").exists() or len(rows(place)) < 3:
        time.sleep(0.01)
        assert all(process.is_alive() for process in started)
    for _ in range(2):  # a launcher sends it once more
        os.kill(started[1].pid or 0, signal.SIGTERM)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [75, 75]
    done = len(rows(place))
    assert done < LINES
    assert "stopped by a signal to another process" in several.said(0)
    assert several.finish(3, *words, place, "--resume") == [0] * 3
    assert_same_run(tmp_path / "one", place)


@pytest.mark.parametrize(
    ("prelude", "codes", "message"),
    sampled(
        [
            (full_disk, [4, 4], "No space left on device"),
            (second_fails_at_its_third_step, [1, 1], "process 2 failed: RuntimeError: out of everything"),
        ],
        lambda row: row[1] == [1, 1],
    ),
)
def test_an_error_on_one_process_ends_all(
    prelude: Prelude, codes: list[int], message: str, several: Several, tmp_path: Path
) -> None:
    words = ("run", "--method=linear", *TINY, "--output", tmp_path / "x")
    assert several.finish(2, *words, prelude=prelude) == codes
    assert message in several.said(0)
    assert "error" not in several.said(1) or "bug in petune: RuntimeError: out of everything" in several.said(1)
    assert several.finish(1, *words, "--resume") == [0]


def test_an_error_before_training_is_printed_by_the_main_process(several: Several, tmp_path: Path) -> None:
    for number in range(12):
        image = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(image)
    data = (f"--dataset=folder:{tmp_path / 'images'}", "--shots=2", "--batch-size=2")
    words = ("run", "--method=linear", *TINY, *data, "--output", tmp_path / "x")
    assert several.finish(2, *words, prelude=no_cache_for_the_second) == [4, 4]
    assert "cannot write the cache" in several.said(0)
    assert "(process 2 of 2, on " in several.said(0)
    assert several.said(1) == ""
    assert not (tmp_path / "x").exists()


def test_a_killed_process_does_not_block_the_others(several: Several, tmp_path: Path) -> None:
    place = tmp_path / "x"
    started = several.start(2, "run", "--method=full", *TINY, "--epochs=50", "--output", place)
    while not (place / "metrics.jsonl").exists():
        time.sleep(0.01)
        assert all(process.is_alive() for process in started)
    started[1].kill()
    started[0].join(60)
    assert started[0].exitcode == 1
    assert "process 1 of 2 lost the connection" in several.said(0)


@pytest.mark.exhaustive
def test_a_comparison_is_one_table(several: Several, tmp_path: Path) -> None:
    words = ("compare", "linear", "bitfit", *TINY, "--epochs=1", "--json", "--output", tmp_path / "x")
    assert several.finish(2, *words) == [0, 0]
    found = json.loads(several.said(0, "out"))
    assert [(row["method"], row["status"]) for row in found["rows"]] == [("linear", "done"), ("bitfit", "done")]
    assert several.said(1) == several.said(1, "out") == ""


def test_commands_for_one_process_refuse_a_launcher(several: Several, tmp_path: Path) -> None:
    assert several.finish(2, "methods") == [2, 2]
    assert several.said(0).startswith("error: petune methods runs in one process, but 2 were started")
    assert several.said(1) == ""


@pytest.mark.exhaustive
def test_torchrun(several: Several, tmp_path: Path) -> None:
    words = ("run", "--method=linear", *TINY, "--epochs=1", "--output")
    assert several.finish(1, *words, tmp_path / "one") == [0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "petune"]
    done = subprocess.run(
        [*launch, *map(str, words), str(tmp_path / "two")], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1 on test") == 1
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("count", "size"), [(10, 3), (2, 2), (1, 4), (128, 1)])
def test_shards_cover_everything_and_differ_by_one(count: int, size: int) -> None:
    parts = [range(count)[Group(rank, size).shard(count)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_single_process_is_unaffected() -> None:
    assert init_group() is SINGLE_PROCESS
    assert is_main_process()
    assert SINGLE_PROCESS.any_rank(True)
    assert not SINGLE_PROCESS.any_rank(False)
    assert (
        SINGLE_PROCESS.broadcast(lambda: 3)
        == SINGLE_PROCESS.main_first(lambda: 3)
        == SINGLE_PROCESS.all_reduce_min(3)
        == 3
    )
    with pytest.raises(DataError), SINGLE_PROCESS.raise_together():
        raise DataError("x")
    with pytest.raises(DataError):
        SINGLE_PROCESS.any_rank(errors=[DataError("x")])


def test_which_process_prints_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, own, alike = UnknownName("method", "x", ["y"]), DataError("x"), Stopped("x")
    assert not is_reported_elsewhere(wrong)
    for name, value in (("WORLD_SIZE", 4), ("RANK", 3), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    assert [is_reported_elsewhere(e) for e in (wrong, own, alike)] == [True, False, True]
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first one of a second machine, where files may differ
    assert not is_reported_elsewhere(wrong)


def test_each_process_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(1, 2, 1)
    assert group.device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="several processes cannot share the device mps"):
        group.device(torch.device("mps"))
    with pytest.raises(ConfigError, match="device is cuda:0"):
        group.device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU"):
        group.device(torch.device("cuda"))

"""Run the Paddle study at full size in the quarter of an hour that a GPU is lent for.

    python benchmarks/seed_on_gpu.py split ../shared/data                  # here: the images in pieces of 40 MiB
    python benchmarks/seed_on_gpu.py run --output DIR                      # there: everything, at most 13 minutes
    python benchmarks/seed_on_gpu.py run --output DIR --smoke              # anywhere: on digits, in a minute

`runs/seed_on_gpu/pieces` travels, a piece at a time if need be, and `run` puts the files together. The stages are those
of suites/paddle_study.yaml, by `petune.pretrain` and `petune.run`: 80 epochs on CIFAR-100, then 10 on CIFAR-10 with the
backbone frozen, and 10 with it trained; in bfloat16 on a GPU. One minute of warm-up measures the steps, compiled and
not, and decides how many epochs fit. If it is stopped, or killed, rerun the same command to resume: checkpoints are in
`--work`. `DIR/seed_on_gpu.json` has everything that is measured so far, after every epoch.
Copy it to benchmarks/results/, and `python benchmarks/tables.py` shows it in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from card import describe_card
from pieces import MIB, join_pieces, write_pieces
from result_files import need_same_size, write_json
from seed_on_gpu_page import RESULT, SUITE
from seed_plan import STAGES, Rate, epochs_left, plan_epochs, warm_up
from suite import Piece, read_suite

import petune
from petune.base.errors import Stopped
from petune.runner.provenance import device_name, git_state, provenance
from petune.runner.result import RunResult
from petune.training.events import EpochEnded, Note
from petune.training.precision import choose_device

ROOT = Path(__file__).resolve().parents[1]
HOME, SMOKE_HOME = ROOT / "runs" / "seed_on_gpu", ROOT / "runs" / "seed_on_gpu_smoke"
DATASETS = ("cifar100", "cifar10")


@dataclass(frozen=True)
class Study:
    """Everything that the stages need: what trains, where, and until when.

    Attributes:
        piece: The suite's pretraining and comparison.
        work: Runs, checkpoints and images.
        output: Where the result is written.
        device: Where it trains.
        ends_at: When the GPU is gone, in seconds since 1970; kept over restarts.
        warm_up_s: Time to measure the rate.
        smoke: Digits instead of CIFAR.
        limit_minutes: As given.
        commit: Of this code, where git cannot say.
    """

    piece: Piece
    work: Path
    output: Path
    device: torch.device
    ends_at: float
    warm_up_s: float
    smoke: bool
    limit_minutes: float
    commit: str | None

    @property
    def seconds_left(self) -> float:
        """Time until the GPU is gone."""
        return self.ends_at - time.time()

    def fields(self, stage: str) -> dict[str, Any]:
        """Return the arguments of the stage's run, at its full length."""
        assert self.piece.pretrain is not None
        if stage == "pretrain":
            fields = dict(self.piece.pretrain)
        else:
            methods = self.piece.compare["methods"]
            method = methods[STAGES.index(stage) - 1]
            fields = self.piece.compare["run"] | {"method": method, "weights": str(self.work / "pretrain")}
        on_gpu = {"precision": "bf16"} if self.device.type == "cuda" else {}
        return fields | {"train": fields["train"] | on_gpu, "data_dir": self.work / "data", "device": str(self.device)}

    def wanted(self) -> dict[str, int]:
        """Return the epochs of each stage in the study."""
        return {stage: self.fields(stage)["train"]["epochs"] for stage in STAGES}


def config_of(study: Study, stage: str, epochs: int, compiled: bool) -> petune.RunConfig:
    """Return the configuration of a stage; a shorter one has a shorter warm-up of the learning rate."""
    fields = study.fields(stage)
    wanted = fields["train"]["epochs"]
    warmup = max(1, round(fields["train"]["warmup"] * epochs / wanted))
    train = fields["train"] | {"epochs": epochs, "warmup": warmup, "compile": compiled}
    if stage == "pretrain":  # it keeps its last epoch
        train["val_every"] = max(1, epochs // 8)
    kind = petune.PretrainConfig if stage == "pretrain" else petune.RunConfig
    return kind.build(fields | {"train": train, "output": study.work / stage, "resume": True}, stage)


def run_study(study: Study) -> None:
    """Warm up, then run each stage; what an earlier call finished is read."""
    plan = _stored(study.work / "plan.json", lambda: make_plan(study))
    rate = Rate(**plan["rate"])
    for number, stage in enumerate(STAGES):
        epochs = plan["epochs"][stage]
        if number:
            path = study.work / f"plan-{stage}.json"
            left = len(STAGES) - number
            epochs = _stored(path, lambda e=epochs, n=left, r=rate: epochs_left(r, study.seconds_left, e, n))
        write_result(study)
        if epochs == 0:
            print(f"{stage}: no time is left for an epoch", flush=True)
            continue
        config = config_of(study, stage, epochs, rate.compiled)
        print(f"{stage}: {epochs} of {study.wanted()[stage]} epochs, {study.seconds_left:.0f} s left", flush=True)
        train = petune.pretrain if stage == "pretrain" else petune.run
        result = train(config, watch=lambda event: watch(study, event))  # type: ignore[operator]
        rate = Rate(result.time_s / epochs, rate.start_s, rate.compiled)
        write_result(study)


def make_plan(study: Study) -> dict[str, Any]:
    """Decode the images, measure the rate, and decide how many epochs each stage has."""
    wanted = study.wanted()
    for fields in map(study.fields, STAGES):
        petune.load_dataset(fields["dataset"], fields["data_dir"])
    config = config_of(study, "pretrain", wanted["pretrain"], compiled=False)
    trial = config.model_copy(update={"output": study.work / "warm-up"})
    assert isinstance(trial, petune.PretrainConfig)
    rate, measured = warm_up(trial, study.warm_up_s, compile_too=study.device.type == "cuda")
    seconds = study.seconds_left
    epochs = plan_epochs(rate, seconds, wanted)
    print(
        f"an epoch takes {rate.epoch_s:.1f} s ({'compiled' if rate.compiled else 'not compiled'}), and {seconds:.0f} s "
        f"are left: {', '.join(f'{stage} {epochs[stage]} of {wanted[stage]}' for stage in STAGES)} epochs fit",
        flush=True,
    )
    return {"rate": rate.__dict__, "measured": measured, "seconds_left": seconds, "epochs": epochs, "wanted": wanted}


def _stored(path: Path, compute: Any) -> Any:
    """Return what an earlier call has written, or compute and write it."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text())


def watch(study: Study, event: Any) -> None:
    """Print epochs and notes, and write the result after every epoch."""
    if isinstance(event, Note):
        print(f"  {event.text}", flush=True)
    elif isinstance(event, EpochEnded):
        values = {name: round(value, 3) for name, value in event.metrics.items()}
        print(f"  {values}, {study.seconds_left:.0f} s left", flush=True)
        write_result(study)


def write_result(study: Study) -> dict[str, Any]:
    """Write what is on disk of plan and stages as one file, and return it."""
    plan_file = study.work / "plan.json"
    origin = provenance(study.device)
    origin["git"] = commit_here(study.commit)
    result = {
        "command": shlex.join(["python", "benchmarks/seed_on_gpu.py", *sys.argv[1:]]),
        "card": describe_card(study.device),
        "provenance": origin,
        "smoke": study.smoke,
        "limit_minutes": study.limit_minutes,
        "seconds_left": round(study.seconds_left, 1),
        "plan": json.loads(plan_file.read_text()) if plan_file.exists() else None,
        "expected": {what: e.model_dump() for what, e in read_suite(SUITE, study.smoke).expected[SUITE].items()},
        "stages": {stage: stage_record(study, stage) for stage in STAGES},
    }
    write_json(study.output / RESULT.name, result)
    return result


def stage_record(study: Study, stage: str) -> dict[str, Any]:
    """Return what is on disk of a stage: its epochs so far, and its result if it is finished."""
    run_dir = study.work / stage
    metrics = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    result = RunResult.read(run_dir).model_dump(mode="json") if RunResult.exists(run_dir) else None
    fields = study.fields(stage)
    return {
        "method": fields["method"],
        "dataset": fields["dataset"],
        "wanted": fields["train"]["epochs"],
        "curve": [line for line in lines if "train_loss" in line],
        "result": result,
    }


def stop_after(seconds: float) -> None:
    """Ask this process to save a checkpoint and stop, as SIGTERM does."""
    timer = threading.Timer(max(0.1, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def summary(result: dict[str, Any]) -> str:
    """Return the result in lines."""
    lines = []
    for stage, record in result["stages"].items():
        done, found = len(record["curve"]), record["result"]
        metrics = f"top-1 {found['metrics']['top1']:.2f}, {found['images_per_s']:,.0f} images/s" if found else "no test"
        lines.append(f"{stage}: {done} of {record['wanted']} epochs, {metrics}")
    return "\n".join(lines)


def open_study(args: argparse.Namespace) -> Study:
    """Return a new study, or the one that an earlier call began.

    Raises:
        SystemExit: It is of another size, device or commit, or its result would replace one of another size.
    """
    home = SMOKE_HOME if args.smoke else HOME
    work, output = (args.work or home / "work").resolve(), (args.output or home).resolve()
    need_same_size(output / RESULT.name, args.smoke)
    device = choose_device("cpu" if args.smoke else "auto")
    origin = {"smoke": args.smoke, "device": device_name(device), "commit": commit_here(args.commit)["commit"]}
    started = _stored(work / "started.json", lambda: {"time": time.time(), **origin})
    before = started if isinstance(started, dict) else {}  # an earlier version wrote only the time
    if others := [key for key in origin if before.get(key, "unknown") != origin[key]]:
        values = "; ".join(f"{key} {before.get(key, 'unknown')}, now {origin[key]}" for key in others)
        raise SystemExit(f"the study in {work} was begun under other conditions: {values}. Use another --work")
    return Study(
        read_suite(SUITE, args.smoke).pieces[SUITE],
        work,
        output,
        device,
        started["time"] + 60 * args.minutes,
        args.warm_up_s,
        args.smoke,
        args.minutes,
        args.commit,
    )


def commit_here(given: str | None) -> dict[str, Any]:
    """Return commit and dirty flag of this code; as given where git cannot say."""
    return git_state() or {"commit": given, "dirty": False}


def main() -> None:
    """Run the command line."""
    args = _arguments()
    if args.command == "split":
        names = [f"{name}/{part}.parquet" for name in DATASETS for part in ("train", "test")]
        files = {name: args.data / name for name in names}
        for piece in write_pieces(files, args.to, args.piece_mib * MIB):
            print(piece)
        return
    study = open_study(args)
    if not all(RunResult.exists(study.work / stage) for stage in STAGES):
        if study.seconds_left <= 0:
            raise SystemExit(
                f"{args.minutes:g} minutes are over since the first call with {args.work}. Give more with --minutes, "
                "or use another --work"
            )
        stop_after(min(60 * args.command_minutes, study.seconds_left))
    if not args.smoke:
        join_pieces(args.pieces, study.work / "data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Stopped.exit_code))  # petune has its own while it trains
    try:
        run_study(study)
    except Stopped as error:
        print(error, flush=True)
        raise SystemExit(error.exit_code) from None
    finally:
        print(summary(write_result(study)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split", help="cut CIFAR's Parquet files into pieces")
    split.add_argument("data", type=Path, help="has cifar100/ and cifar10/ with train.parquet and test.parquet")
    split.add_argument("--to", type=Path, default=HOME / "pieces", help="gets the pieces; may hold earlier ones only")
    split.add_argument("--piece-mib", type=int, default=40)
    run = commands.add_parser("run", help="run the study, or continue it")
    run.add_argument("--pieces", type=Path, default=HOME / "pieces")
    run.add_argument("--work", type=Path, help="runs and checkpoints, 5 GB; /dev/shm is fastest")
    run.add_argument("--output", type=Path, help="gets seed_on_gpu.json; by default runs/seed_on_gpu")
    run.add_argument("--minutes", type=float, default=13, help="from the first call on, later calls included")
    run.add_argument("--command-minutes", type=float, default=9.5, help="stop this call then, to be resumed")
    run.add_argument("--warm-up-s", type=float, default=60)
    run.add_argument("--commit", help="of this code, where git cannot say")
    run.add_argument("--smoke", action="store_true", help="digits and a tiny model on the CPU, in folders of its own")
    return parser.parse_args()


if __name__ == "__main__":
    main()

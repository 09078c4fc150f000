"""Run petune on datasets and tasks of every kind, with backbones of three families.

python benchmarks/any_task.py                   # make the datasets in runs/any_task/data, print the commands
python benchmarks/any_task.py --run             # run them one after the other; rerun to resume
python benchmarks/any_task.py --run --only vtab # some of them
python benchmarks/any_task.py --run --keep      # also copy the results to benchmarks/results/any_task
python benchmarks/any_task.py --smoke --run     # few images and one epoch

`python benchmarks/tables.py` writes the table in docs/tasks.md from the kept results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from any_task_data import SMOKE, Constant, Sizes, make_datasets
from any_task_page import RESULTS
from result_files import write_json

from petune.runner.grid import Grid

SCRATCH = {"weights": "none", "method": "full"}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit_nano": {"backbone": "vit_nano", "method": "adaptformer", "train": {"epochs": 2, "batch_size": 32}},
    "swin": {
        **SCRATCH,
        "backbone": "swin_tiny_patch4_window7_224",
        "image_size": 32,
        "backbone_options": {
            "patch_size": 4, "window_size": 4, "embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4],
        },
        "train": {"epochs": 15, "batch_size": 32, "lr": 0.001},
    },
    "vit": {**SCRATCH, "backbone": "hf:{data}/vit", "train": {"epochs": 8, "batch_size": 32, "lr": 0.001}},
}  # fmt: skip
"""Configurations of the runs; those of random weights train everything."""
VIT = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 192, "image_size": 32, "patch_size": 8,
}  # fmt: skip
"""A configuration of transformers, which `hf:DIR` reads."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A command for each backbone.

    Attributes:
        flags: Of `petune run`; `{data}`, `{source}` and `{fashion}` are folders.
        metrics: Names of the metrics in the table, from the test split.
        constant: The dataset whose constant prediction is shown, or the metrics of one.
        seeds: None for cross-validation.
    """

    name: str
    flags: str
    metrics: tuple[str, ...]
    constant: str | Constant
    seeds: tuple[int, ...] | None = SEEDS


def unbalanced(name: str, flags: str) -> Case:
    """Return a case of the unbalanced folder."""
    common = "--dataset {data}/unbalanced --augment light --val-fraction 0.2 --set train.choose=macro_f1"
    return Case(f"unbalanced-{name}", f"{common} {flags}".rstrip(), ("macro_f1", "top1"), "unbalanced")


CASES = (
    unbalanced("none", ""),
    unbalanced("inverse", "--task classification:class_weights=inverse"),
    unbalanced("effective", "--task classification:class_weights=effective"),
    unbalanced("sampling", "--set train.sampling=balanced"),
    Case(
        "pairs", '--dataset "table:{data}/pairs/table.csv,labels=labels,separator=|" --augment light',
        ("map", "macro_f1"), "pairs",
    ),
    Case(
        "animals", "--dataset table:{data}/animals/table.csv,target=animals --augment light",
        ("mae", "rmse", "r2"), "animals",
    ),
    Case("bands", "--dataset {data}/bands --augment shift", ("top1",), "bands"),
    Case("vtab", "--dataset vtab:{data}/vtab", ("top1", "top5"), {"top1": 1.0, "top5": 5.0}),
    Case(
        "fashion",
        "--dataset torchvision:FashionMNIST --data-dir {fashion} --shots 50 --val-fraction 0.02 --augment shift",
        ("top1",), {"top1": 10.0},
    ),
    Case(
        "hf", "--dataset hf:{source}/sign_digits --shots 50 --augment shift",
        ("top1",), {"top1": 10.0},
    ),
    Case(
        "folds", "--dataset table:{data}/animals/table.csv,target=animals --augment light --folds 5",
        ("mae", "rmse", "r2"), "animals", None,
    ),
    Case(
        "canvas", "--dataset table:{data}/canvas/table.csv,mask=mask --image-size 64 --batch-size 8",
        ("miou", "pixel_accuracy"), "canvas",
    ),
)  # fmt: skip
GRID = (
    "petune compare linear bitfit adaptformer --backbone vit_nano --epochs 2 --batch-size 32 --augment light "
    "--dataset {data}/unbalanced --dataset {data}/bands"
)
DONE_BY = "command.json"
"""The command and the seed of the datasets that a result is of; written after a run without an error."""


@dataclass(frozen=True)
class Command:
    """One command and where its result is.

    Attributes:
        text: The command line.
        data_seed: Of the datasets.
    """

    case: str
    backbone: str
    text: str
    output: Path
    metrics: tuple[str, ...]
    constant: Constant
    data_seed: int = 0

    @property
    def name(self) -> str:
        """Name of the result's file."""
        return f"{self.case}.{self.backbone}"

    @property
    def record(self) -> dict[str, Any]:
        """Command and seed that a result must be of to be kept."""
        return {"command": self.text, "data_seed": self.data_seed}


def list_commands(args: argparse.Namespace, constants: Mapping[str, Constant]) -> Iterator[Command]:
    """Yield the commands that `args` asks for."""
    folders = {"data": args.output / "data", "source": args.source, "fashion": args.fashion_mnist}
    short = " --set train.epochs=1" if args.smoke else ""
    for case in CASES:
        seeds = case.seeds[: args.seeds] if case.seeds else None
        constant = constants[case.constant] if isinstance(case.constant, str) else case.constant
        for backbone in BACKBONES:
            output = args.output / case.name / backbone
            text = f"petune run --config {folders['data']}/{backbone}.yaml {case.flags.format(**folders)}{short}"
            text += _seeds_flag(seeds) if seeds else ""
            text += f" --output {output}"
            yield Command(case.name, backbone, text, output, case.metrics, constant, args.seed)
    output = args.output / "grid"
    text = f"{GRID.format(**folders)}{_seeds_flag(SEEDS[: args.seeds])}{short} --output {output}"
    yield Command("grid", "vit_nano", text, output, (), {}, args.seed)


def _seeds_flag(seeds: tuple[int, ...]) -> str:
    return f" --seeds {','.join(map(str, seeds))}"


def write_configs(data: Path) -> None:
    """Write a configuration for each backbone, and that of transformers' ViT."""
    (data / "vit").mkdir(parents=True, exist_ok=True)
    (data / "vit" / "config.json").write_text(json.dumps(VIT, indent=1) + "\n")
    for name, values in BACKBONES.items():
        config = {**values, "backbone": values["backbone"].format(data=data)}
        (data / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def run_command(command: Command) -> int:
    """Run a command in this process, which saves its start; what petune already finished is not repeated."""
    from petune.cli.main import main as petune

    (command.output / DONE_BY).unlink(missing_ok=True)
    code = 0
    try:
        with contextlib.redirect_stdout(sys.stderr):
            petune(shlex.split(command.text)[1:])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    if code == 0:
        write_json(command.output / DONE_BY, command.record)
    return code


def read_result(command: Command) -> dict[str, Any] | None:
    """Return the result of a finished command; None if there is none.

    Raises:
        ValueError: It failed, wholly or for one of its methods.
    """
    result = {"case": command.case, "backbone": command.backbone, "command": command.text, "constant": command.constant}
    stored = {name: _read(command.output / f"{name}.json") for name in ("compare", "folds", "grid")}
    if grid := stored["grid"]:
        if reasons := Grid.read(command.output).failures():
            raise ValueError("; ".join(reasons))
        parts = sorted(command.output.glob("*/compare.json"))
        return {**result, **_pick(grid, "methods", "columns"), "provenance": _read(parts[0])["provenance"]}
    if folds := stored["folds"]:
        provenance = _read(command.output / "fold-1" / "result.json")["provenance"]
        return {**result, **_describe(command, folds, folds["metrics"]), "provenance": provenance}
    if compared := stored["compare"]:
        row = compared["rows"][0]
        if row["status"] != "done":
            raise ValueError(f"{row['method']} failed: {row['reason']}")
        described = _describe(command, compared, row["metrics"])
        return {**result, **_pick(row, "seeds", "images_per_s"), **described, **_pick(compared, "provenance")}
    return None


def _describe(command: Command, stored: Mapping[str, Any], values: Mapping[str, list[float]]) -> dict[str, Any]:
    infos = {info["name"]: info for info in stored["metric_info"]}
    metrics = [
        {
            **_pick(infos[name], "name", "label", "percent"),
            "values": values[name],
            "mean": statistics.fmean(values[name]),
            "std": statistics.stdev(values[name]) if len(values[name]) > 1 else None,
        }
        for name in command.metrics
    ]
    return {"task": stored["task"], "metrics": metrics}


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def keep(command: Command, results: Path) -> None:
    """Write the result of a finished command into a folder; without a result, nothing.

    Raises:
        ValueError: The command failed, or its result is of another command or other datasets.
    """
    result = read_result(command)
    if result is None:
        return
    if _read(command.output / DONE_BY) != command.record:
        raise ValueError("its result is not that of a finished run of this command. Run it again with --run")
    write_json(results / f"{command.name}.json", result)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: runs/any_task, or runs/any_task_smoke")
    parser.add_argument("--source", type=Path, default=Path("../shared/data"), help="Parquet files of real images")
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets"), help="Debian's package")
    parser.add_argument("--seed", type=int, default=0, help="of the datasets")
    parser.add_argument("--seeds", type=int, help="largest number of runs for each command")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="names of cases")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.output = args.output or Path("runs") / f"any_task{'_smoke' * args.smoke}"
    return args


def main() -> int:
    """Make the datasets, then print or run the commands."""
    args = parse_arguments()
    data = args.output / "data"
    constants = make_datasets(args.source, data, SMOKE if args.smoke else Sizes(), args.seed)
    write_configs(data)
    failed, not_kept = [], []
    for command in list_commands(args, constants):
        if args.only and command.case not in args.only:
            continue
        print(command.text, flush=True)
        if args.run and run_command(command):
            failed.append(command.name)
        if args.keep:
            try:
                keep(command, args.output / "results" if args.smoke else RESULTS)
            except ValueError as error:  # the others are kept
                not_kept.append(f"{command.name} is not kept: {error}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    print("".join(f"{line}\n" for line in not_kept), end="", file=sys.stderr)
    return 1 if failed or not_kept else 0


if __name__ == "__main__":
    raise SystemExit(main())

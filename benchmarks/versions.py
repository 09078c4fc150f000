"""Move adapters between the oldest and the newest supported versions of the libraries, and write docs/versions.md.

    python benchmarks/versions.py [--work DIR] [--models NAME ...]

`newest` is the environment that runs this. `oldest` is built on top of it, with the lowest releases in
pyproject.toml. `benchmarks/versions_worker.py` saves adapters of every method in each of them, and
loads them in the other one. The downloads take 4 GB and the environment 7 GB, most of it torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

from result_files import write_json

from petune.base.files import replace_file

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "benchmarks" / "versions_worker.py"
PAGE = ROOT / "docs" / "versions.md"
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "peft")
WITH_OLD_TRANSFORMERS = ("huggingface_hub<1.0", "tokenizers<0.23")
"""What transformers 4 needs in older versions than transformers 5."""
Reports = dict[str, dict[str, str]]
"""By `from → to`, and by `model|method`, what came out."""
Versions = dict[str, dict[str, str]]
"""By environment and library."""


def main() -> None:
    """Build the environments, move the adapters, and write the result and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/petune-versions"))
    parser.add_argument("--page", action="store_true", help="only write the page, from the saved result")
    parser.add_argument("--models", nargs="+", default=[], help="only these rows of the page, such as 'timm ViT'")
    arguments = parser.parse_args()
    if not arguments.page:
        work = arguments.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        interpreters = {"oldest": oldest_environment(work / "oldest"), "newest": Path(sys.executable)}
        versions = {name: installed_versions(python) for name, python in interpreters.items()}
        before = json.loads(RESULT.read_text()) if arguments.models else None
        if before is not None and before["versions"] != versions:
            sys.exit(f"the other models were measured with other versions: {before['versions']}. Leave out --models")
        reports = moved_adapters(work, interpreters, arguments.models)
        if before is not None:
            reports = merged(before["reports"], reports)
        write_json(RESULT, {"versions": versions, "reports": reports})
    result = json.loads(RESULT.read_text())
    replace_file(PAGE, page(result["versions"], result["reports"]).encode())
    wrong = [key for report in result["reports"].values() for key, text in report.items() if is_wrong(text)]
    sys.exit(f"wrong or crashed: {', '.join(wrong)}" if wrong else 0)


def lowest_versions() -> list[str]:
    """Return the lowest releases that pyproject.toml allows, as requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["transformers"]]
    bounds = dict(r.split(">=") for r in requirements if r.count(">=") == 1)
    return [f"{name}=={full_version(bounds[name])}" for name in LIBRARIES]


def full_version(version: str) -> str:
    """Return a version with three numbers."""
    return ".".join([*version.split("."), "0", "0"][:3])


def oldest_environment(path: Path) -> Path:
    """Return the Python of an environment with the oldest libraries, on top of the packages of this one."""
    python, complete = path / "bin" / "python", path / "complete"
    wanted = "\n".join([*lowest_versions(), *WITH_OLD_TRANSFORMERS])
    if complete.exists() and complete.read_text() == wanted:
        return python
    if (path / "pyvenv.cfg").exists():  # of other versions, or stopped in the middle
        shutil.rmtree(path)
    venv.create(path, symlinks=True)
    packages = next(path.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    torch, torchvision, *others = lowest_versions()
    subprocess.run([*install, torch, torchvision], check=True)
    subprocess.run([*install, "--no-deps", "--upgrade", *others, *WITH_OLD_TRANSFORMERS], check=True)
    (packages / "newest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    complete.write_text(wanted)
    return python


def moved_adapters(work: Path, interpreters: dict[str, Path], models: list[str]) -> Reports:
    """Save in each environment and load in the other one; all models if none are named."""
    reports: Reports = {}
    for source, python in interpreters.items():
        saved = work / f"adapters-{source}"
        shutil.rmtree(saved, ignore_errors=True)
        saved.mkdir()
        run(python, "save", saved, saved / "saved.json", *models)
        report_of_saving = json.loads((saved / "saved.json").read_text())
        crashed = {key: f"{text} (while saving)" for key, text in report_of_saving.items() if is_wrong(text)}
        for target, other in interpreters.items():
            if target == source:
                continue
            report = work / f"{source}-{target}.json"
            run(other, "load", saved, report, *models)
            reports[f"{source} → {target}"] = json.loads(report.read_text()) | crashed
    return reports


def merged(before: Reports, reports: Reports) -> Reports:
    """Return earlier reports with new ones for some of the models, in the same order."""
    models = {key.partition("|")[0] for report in reports.values() for key in report}

    def rows(pair: str, model: str) -> dict[str, str]:
        source = reports if model in models else before
        return {key: text for key, text in source[pair].items() if key.partition("|")[0] == model}

    names = dict.fromkeys(key.partition("|")[0] for report in (*before.values(), *reports.values()) for key in report)
    return {pair: {key: text for name in names for key, text in rows(pair, name).items()} for pair in reports}


def run(python: Path, *arguments: str | Path) -> None:
    """Run the worker in an environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([python, WORKER, *arguments], check=True, env=environment)


def installed_versions(python: Path) -> dict[str, str]:
    """Return the versions of the libraries in an environment."""
    code = f"import importlib.metadata as m; print(*(m.version(p) for p in {LIBRARIES!r}))"
    answer = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(LIBRARIES, answer, strict=True))


def is_wrong(text: str) -> bool:
    """Return True for logits that differ, and for what is no error of petune's own."""
    return text.startswith(("WRONG", "CRASH"))


def page(versions: Versions, reports: Reports) -> str:
    """Return docs/versions.md."""
    pairs = list(reports)
    rows = ["| model | " + " | ".join(pairs) + " |", "| --- |" + " --- |" * len(pairs)]
    reasons: dict[str, str] = {}
    for model in dict.fromkeys(key.partition("|")[0] for key in reports[pairs[0]]):
        cells = [cell(model, report, reasons) for report in reports.values()]
        rows.append(f"| {model} | {' | '.join(cells)} |")
    libraries = ["| library | oldest | newest |", "| --- | --- | --- |"]
    libraries += [f"| {name} | {versions['oldest'][name]} | {versions['newest'][name]} |" for name in LIBRARIES]
    notes = [f"{number}. {text}" for text, number in reasons.items()]
    return HEAD + "\n".join([*libraries, "", *rows, "", *notes]).rstrip() + "\n"


def cell(model: str, report: dict[str, str], reasons: dict[str, str]) -> str:
    """Return how many methods of a model hold, and the numbers of the reasons why others do not."""
    own = {key.partition("|")[2]: text for key, text in report.items() if key.partition("|")[0] == model}
    good = [method for method, text in own.items() if text.partition(" ")[0] == "ok"]
    numbers: dict[str, list[str]] = {}
    for method, text in own.items():
        if method not in good:
            reason = re.sub(r"/\S*/", "", text.partition("\n")[0])[:300]
            numbers.setdefault(reasons.setdefault(reason, str(len(reasons) + 1)), []).append(method)
    refused = "".join(f"; {', '.join(methods)}: {number}" for number, methods in numbers.items())
    return f"{len(good)} of {len(own)}{refused}"


HEAD = """# Versions of the libraries

An adapter belongs to the weights of a backbone, not to the names that a library gives its modules. `make versions`
saves adapters with the oldest and the newest supported versions, and loads them with the other ones. A cell counts the
methods whose adapter loads and computes the same logits; methods that a model refuses from the start are not counted.

**Not every pair can hold.** If a version computes something else with the same weights, or splits or fuses layers, the
adapter is refused. A bit-identical resume needs the same versions, so a checkpoint of an unfinished run does not move.
An adapter that PEFT alone wrote has the library's names only. `petune.load` follows the renames that transformers makes
when it loads an old checkpoint, so from transformers 4 to 5; otherwise it is refused. One that petune saved moves.

"""


if __name__ == "__main__":
    main()

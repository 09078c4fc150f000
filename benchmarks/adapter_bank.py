"""Measure petune.AdapterBank: a hundred adapters on one ViT-B/16.

    python benchmarks/adapter_bank.py             # writes results/adapter_bank-vit_base.json and docs/many-tasks.md
    python benchmarks/adapter_bank.py --page      # rewrites the table from the results
    python benchmarks/adapter_bank.py --only vpt  # measures one method and keeps the rows of the others

The weights are random, since neither time nor memory depends on them. Each method runs in its own process. Times are
CPU times of one thread, so that other work on the machine matters little. Memory is the growth of the process, and next
to it the bytes of all tensors. Runs on Linux.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

METHODS = {"adaptformer": 100, "lora": 100, "vpt": 100}
"""Number of adapters by method."""
CLASSES = 100
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "adapter_bank-vit_base.json"
PAGE = HERE.parent / "docs" / "many-tasks.md"
BEGIN, END = "<!-- adapters:begin -->\n", "<!-- adapters:end -->\n"
COLUMNS = (
    "method", "parameters", "file", "adapters", "memory", "of it tensors", "load one", "load all", "switch",
    "4 images, 4 adapters", "4 images, no adapter",
)  # fmt: skip


def measure(method: str, count: int) -> dict[str, Any]:
    """Load `count` adapters of one method, each with its own values, and use them."""
    import timm
    import torch

    import petune

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).eval()
    with tempfile.TemporaryDirectory() as directory:
        # from a copy, so that petune has cached nothing about this model
        num_parameters = save_adapters(copy.deepcopy(model), method, count, Path(directory))
        file_bytes = (Path(directory) / "0" / "adapter_model.safetensors").stat().st_size
        bank, x = petune.AdapterBank(model), torch.randn(4, 3, 224, 224)
        with torch.no_grad():
            plain_s = cpu_time(lambda: model(x))
        backbone_bytes, resident_before = tensor_bytes(model.state_dict().values()), resident_bytes()
        times = [cpu_time(lambda n=n: bank.load(n, f"{directory}/{n}")) for n in map(str, range(count))]
        resident_growth = resident_bytes() - resident_before
    names = [str(n) for n in range(min(4, count))]
    switch_s = sum(cpu_time(lambda n=n: bank.use(n)) for n in names) / len(names)
    bank.use(None)
    with torch.no_grad():
        mixed_s = cpu_time(lambda: bank(x, names))
        mixed = bank(x, names)
        single = [bank.use(name)(x[n : n + 1])[0] for n, name in enumerate(names)]
    difference = max(float((a - b).abs().max()) for a, b in zip(mixed, single, strict=True))
    return {
        "method": method,
        "adapters": count,
        "parameters": num_parameters,
        "file_bytes": file_bytes,
        "backbone_bytes": backbone_bytes,
        "first_load_s": times[0],
        "load_s": sum(times[1:]) / max(1, count - 1),
        "last_load_s": times[-1],
        "all_loads_s": sum(times),
        "resident_bytes": resident_growth,
        "tensor_bytes": tensor_bytes(held_tensors(bank)) - backbone_bytes,
        "switch_s": switch_s,
        "plain_batch_s": plain_s,
        "mixed_batch_s": mixed_s,
        "largest_difference": difference,
    }


def save_adapters(model: Any, method: str, count: int, directory: Path) -> int:
    """Save `count` different adapters; return their number of parameters, classifier included."""
    import torch

    import petune

    attachment = petune.attach(model, method)
    for number in range(count):
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        attachment.save(directory / str(number))
    return attachment.counts.tuned + attachment.counts.head


def cpu_time(action: Callable[[], Any]) -> float:
    """Return the CPU time of an action in seconds."""
    start = time.process_time()
    action()
    return time.process_time() - start


def resident_bytes() -> int:
    """Return the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of all tensors, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held_tensors(bank: Any) -> Iterator[Any]:
    """Yield the tensors of the model, of all classifiers, and the values that attachments keep."""
    from petune.injector.trainable import trainable_state_of

    for module in (bank.model, *(entry.head for entry in bank.adapters.values())):
        yield from module.parameters()
        yield from module.buffers()
    state = trainable_state_of(bank.model)
    for parts in state.attachments.values() if state else ():
        for values in parts.in_place.values():
            yield from (tensor for tensor in (values.original, *values.trained.values()) if tensor is not None)


def run(methods: Iterable[str]) -> dict[str, Any]:
    """Measure each method in its own process; keep the rows of other methods."""
    import torch

    from petune.runner.provenance import provenance

    rows = {row["method"]: row for row in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    results: dict[str, Any] = {}
    for method in methods:
        command = [sys.executable, __file__, "--one", method]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(rows[method]), file=sys.stderr)
        results = {"rows": [rows[m] for m in METHODS if m in rows], "provenance": provenance(torch.device("cpu"))}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown, between their marks."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results["rows"]]
    backbone = mebibytes(results["rows"][0]["backbone_bytes"])
    return BEGIN + f"The backbone takes {backbone}.\n\n" + "\n".join(lines) + "\n" + END


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the text of one row."""
    return (
        row["method"],
        f"{row['parameters']:,}",
        mebibytes(row["file_bytes"]),
        str(row["adapters"]),
        mebibytes(row["resident_bytes"]),
        mebibytes(row["tensor_bytes"]),
        f"{row['load_s']:.2f} s",
        f"{row['all_loads_s']:.0f} s",
        f"{row['switch_s'] * 1e3:.0f} ms",
        f"{row['mixed_batch_s']:.1f} s",
        f"{row['plain_batch_s']:.1f} s",
    )


def mebibytes(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:,.1f} MiB"


def write_page(results: dict[str, Any]) -> None:
    """Put the table into docs/many-tasks.md."""
    text = PAGE.read_text(encoding="utf-8")
    new, count = re.subn(f"{BEGIN}.*?{END}", lambda _: table(results), text, flags=re.DOTALL)
    assert count == 1, f"{PAGE} needs the marks exactly once"
    PAGE.write_text(new, encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*METHODS], metavar="METHOD")
    parser.add_argument("--one", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="rewrite the table from the results")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, METHODS[args.one])))
    else:
        write_page(json.loads(RESULTS.read_text()) if args.page else run(args.only))


if __name__ == "__main__":
    main()

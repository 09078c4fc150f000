"""A hundred tasks on one ViT-B/16: how long they take to load, what they hold, what a switch and a mixed batch cost.

    python benchmarks/tasks.py               # writes results/tasks-vit_base.json and the table in docs/many-tasks.md
    python benchmarks/tasks.py --page        # the table again, from the results
    python benchmarks/tasks.py --only vpt    # one method; the others' rows stay as they were

Random weights: neither time nor memory depends on the values. Each method has a process of its own. Seconds are of the
processor (one thread), so that other work on the machine counts little; memory is what the process holds more than
before, and, beside it, the bytes of all tensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

METHODS = {"adaptformer": 100, "lora": 100, "vpt": 100}  # how many tasks
CLASSES = 100
HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "tasks-vit_base.json", HERE.parent / "docs" / "many-tasks.md"
BEGIN, END = "<!-- tasks:begin -->\n", "<!-- tasks:end -->\n"


def measure(method: str, count: int) -> dict[str, Any]:
    """Load `count` tasks of one method, each with values of its own, and use them."""
    import psutil
    import timm
    import torch

    import petune

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).eval()
    held = psutil.Process().memory_info
    with tempfile.TemporaryDirectory() as place:
        parameters = _save(copy.deepcopy(model), method, count, Path(place))  # of a copy: nothing is known of this one
        file = (Path(place) / "0" / "adapter_model.safetensors").stat().st_size
        tasks, x = petune.AdapterBank(model), torch.randn(4, 3, 224, 224)
        with torch.no_grad():
            plain_s = _seconds(lambda: model(x))
        base, before = _bytes([model]), held().rss
        times = [_seconds(lambda n=n: tasks.load(n, f"{place}/{n}")) for n in map(str, range(count))]
        grown = held().rss - before
    names = [str(n) for n in range(min(4, count))]
    switch_s = sum(_seconds(lambda n=n: tasks.use(n)) for n in names) / len(names)
    tasks.use(None)
    rows = names[:4]
    with torch.no_grad():
        mixed_s = _seconds(lambda: tasks(x, rows))
        mixed = tasks(x, rows)
        alone = [tasks.use(name)(x[n : n + 1])[0] for n, name in enumerate(rows)]
        wrong = max(float((a - b).abs().max()) for a, b in zip(mixed, alone, strict=True))
    tensors = _bytes([model, *(task.head for task in tasks.tasks.values())], tasks) - base
    return {
        "method": method, "tasks": count, "parameters": parameters, "file_bytes": file, "backbone_bytes": base,
        "first_load_s": times[0], "load_s": sum(times[1:]) / max(1, count - 1), "last_load_s": times[-1],
        "all_loads_s": sum(times), "resident_bytes": grown, "tensor_bytes": tensors, "switch_s": switch_s,
        "plain_batch_s": plain_s, "mixed_batch_s": mixed_s, "largest_difference": wrong,
    }  # fmt: skip


def _save(model: Any, method: str, count: int, place: Path) -> int:
    import torch

    import petune

    att = petune.attach(model, method)
    for number in range(count):
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=1e-3)
        att.save(place / str(number))
    parameters = att.counts.tuned + att.counts.head
    att.detach()
    return parameters


def _seconds(what: Callable[[], Any]) -> float:
    before = time.process_time()
    what()
    return time.process_time() - before


def _bytes(modules: Iterable[Any], tasks: Any = None) -> int:
    """Of all tensors that they hold, each storage once; with what attachments keep beside the model."""
    storages = {}
    for tensor in _tensors(modules, tasks):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(modules: Iterable[Any], tasks: Any) -> Iterator[Any]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
    for task in tasks.tasks.values() if tasks else ():
        att = task.attachment
        yield from att.model.petune_trainable_state.claims[att.edit_log.name].kept.values()
        yield from (value for _, value in (att._originals or {}).values())


def run(methods: Iterable[str]) -> dict[str, Any]:
    """Every method in a process of its own, and what the machine was; rows of others stay."""
    import torch

    from petune.runner.provenance import provenance

    rows = {row["method"]: row for row in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    for method in methods:
        words = [sys.executable, __file__, "--one", method]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(rows[method]), file=sys.stderr)
        results = {"rows": [rows[m] for m in METHODS if m in rows], "provenance": provenance(torch.device("cpu"))}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, between their marks."""
    first = results["rows"][0]
    head = (
        "method", "parameters", "file", "tasks", "they hold", "of it tensors", "load one", "load all",
        "switch", "4 images, 4 tasks", "4 images, bare",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for r in results["rows"]:
        cells = (
            r["method"], f"{r['parameters']:,}", _mib(r["file_bytes"]), str(r["tasks"]), _mib(r["resident_bytes"]),
            _mib(r["tensor_bytes"]), f"{r['load_s']:.2f} s", f"{r['all_loads_s']:.0f} s",
            f"{r['switch_s'] * 1e3:.0f} ms", f"{r['mixed_batch_s']:.1f} s", f"{r['plain_batch_s']:.1f} s",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return BEGIN + f"The backbone holds {_mib(first['backbone_bytes'])}.\n\n" + "\n".join(lines) + "\n" + END


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def write_page(results: dict[str, Any]) -> None:
    """Put the table in docs/many-tasks.md."""
    text = PAGE.read_text(encoding="utf-8")
    new, found = re.subn(f"{BEGIN}.*?{END}", lambda _: table(results), text, flags=re.DOTALL)
    assert found == 1, f"{PAGE} must have the marks once"
    PAGE.write_text(new, encoding="utf-8")


def main() -> None:
    """Parse the arguments and do one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*METHODS], metavar="METHOD")
    parser.add_argument("--one", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="write the table again from the results")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, METHODS[args.one])))
    else:
        write_page(json.loads(RESULTS.read_text()) if args.page else run(args.only))


if __name__ == "__main__":
    main()

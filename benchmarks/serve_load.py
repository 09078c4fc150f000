"""Measure examples/serve.py: a hundred adapters behind one server, asked by sixteen clients with skewed traffic.

    python benchmarks/serve_load.py            # writes results/serve_load.json and docs/many-tasks.md
    python benchmarks/serve_load.py --page     # rewrites the text from the results

Two servers run at once, both on 127.0.0.1: one with a bank, one that computes the bare model for the same requests.
They are asked in turns, so that other work on the machine affects both. Adapters are drawn by Zipf's law. Every answer
of the bank is compared with that of the adapter loaded alone, and a request without logits counts as wrong. While the
bank is asked, an adapter is added and removed again.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from page_section import with_section
from result_files import write_json

from petune.base.files import replace_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
from serve import AdapterAPI  # noqa: E402 (spawned workers import it by this name)

RESULTS = HERE / "results" / "serve_load.json"
PAGE = HERE.parent / "docs" / "many-tasks.md"
BEGIN, END = "<!-- serve:begin -->\n", "<!-- serve:end -->\n"
BACKBONE = "vit_small_patch16_224"
METHODS = ("adaptformer", "lora", "vpt", "houlsby")
NUM_ADAPTERS, NUM_CLIENTS, NUM_IMAGES, NUM_ROUNDS, REQUESTS = 100, 16, 2, 4, 64
PORTS = {"bank": 8801, "bare": 8802}
TOLERANCE = 1e-4


class BareAPI(AdapterAPI):
    """Computes the bare model, whatever adapter a request names."""

    def change(self, request: dict[str, Any]) -> None:
        """Compute every request."""

    def image(self, request: dict[str, Any]) -> Any:
        """Decode the image; no adapter is loaded."""
        return self.pixels(request["image"])

    def logits(self, images: Any, names: list[str | None]) -> Any:
        """Return the bare model's logits."""
        return self.bank.model(images)


def serve(kind: str, folder: str) -> None:
    """Run one of the two servers until it is killed."""
    import litserve

    api = (AdapterAPI if kind == "bank" else BareAPI)(folder, BACKBONE, pretrained=False)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=PORTS[kind], generate_client_file=False, log_level="warning")


def save_adapters(folder: Path, images: list[bytes]) -> dict[str, list[list[float]]]:
    """Save adapters of several methods with different values; return the logits of each for each image."""
    import timm
    import torch
    from PIL import Image

    import petune

    torch.manual_seed(0)
    model = timm.create_model(BACKBONE).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
    expected = {}
    for start, method in enumerate(METHODS):
        attachment = petune.attach(model, method)
        for number in range(start, NUM_ADAPTERS, len(METHODS)):
            with torch.no_grad():
                for parameter in attachment.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-2)
                expected[f"task{number}"] = model(x).tolist()
            attachment.save(folder / f"task{number}")
        attachment.detach()
    return expected


class Client:
    """Asks one server from several threads.

    Attributes:
        latencies: Seconds of each request that was answered with logits.
        wrong: Requests that failed, and answers that are not those of the adapter alone.
    """

    def __init__(self, kind: str, images: list[str], expected: dict[str, list[list[float]]]) -> None:
        self.kind = kind
        self.images = images
        self.expected = expected
        self.latencies: list[float] = []
        self.wrong: list[str] = []

    def round(self, jobs: list[tuple[str, int]]) -> float:
        """Ask for these adapters and images from all clients at once; return answers per second."""
        waiting, before = iter(jobs), len(self.latencies)
        lock = threading.Lock()

        def work() -> None:
            with closing(http.client.HTTPConnection("127.0.0.1", PORTS[self.kind], timeout=120)) as connection:
                while True:
                    with lock:
                        job = next(waiting, None)
                    if job is None:
                        return
                    self._ask(connection, *job)

        threads = [threading.Thread(target=work) for _ in range(NUM_CLIENTS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (len(self.latencies) - before) / (time.perf_counter() - start)

    def _ask(self, connection: http.client.HTTPConnection, name: str, image: int) -> None:
        start, wanted = time.perf_counter(), self.expected[name][image]
        try:
            answer = post(connection, {"adapter": name, "image": self.images[image]})
            logits = logits_of(answer, len(wanted))
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()  # the next request opens it
            self._note(name, image, f"{type(error).__name__}: {error}")
            return
        self.latencies.append(time.perf_counter() - start)
        difference = max(abs(a - b) for a, b in zip(logits, wanted, strict=True))
        if self.kind == "bank" and difference > TOLERANCE * max(map(abs, wanted)):
            self._note(name, image, str(logits))

    def _note(self, name: str, image: int, reason: str) -> None:
        self.wrong.append(f"{self.kind}, {name}, image {image}: {reason[:200]}")


def post(connection: http.client.HTTPConnection, content: dict[str, Any]) -> dict[str, Any]:
    """Send one request and return the answer.

    Raises:
        OSError, http.client.HTTPException: There is none.
        ValueError: It is an error, or no JSON.
    """
    connection.request("POST", "/predict", json.dumps(content), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode(errors="replace")
    if response.status != http.client.OK:
        raise ValueError(f"status {response.status}: {text}")
    answer: dict[str, Any] = json.loads(text)
    return answer


def logits_of(answer: Any, count: int) -> list[float]:
    """Return the logits in an answer.

    Raises:
        ValueError: There are not as many finite numbers.
    """
    logits = answer.get("logits") if isinstance(answer, dict) else None
    is_good = isinstance(logits, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in logits)
    if not is_good or len(logits) != count:
        raise ValueError(f"no {count} logits: {answer}")
    return logits


@contextmanager
def servers(folder: Path, directory: Path) -> Iterator[None]:
    """Run both servers inside the context."""
    empty = directory / "empty"
    empty.mkdir()
    folders = {"bank": folder, "bare": empty}
    processes = [
        subprocess.Popen([sys.executable, __file__, "--serve", kind, str(folders[kind])], start_new_session=True)
        for kind in PORTS
    ]
    try:
        for kind, process in zip(PORTS, processes, strict=True):
            wait_until_ready(kind, process)
        yield
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def wait_until_ready(kind: str, process: subprocess.Popen[bytes]) -> None:
    """Return when a server answers."""
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORTS[kind], timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server {kind} did not start")


def measure(prepared: Path | None) -> dict[str, Any]:
    """Ask both servers in turns.

    Args:
        prepared: Where the adapters are kept for the next time; None makes them in a temporary directory.
    """
    random = Random(0)
    images = [jpeg(number) for number in range(NUM_IMAGES)]
    weights = [1 / (rank + 1) for rank in range(NUM_ADAPTERS)]
    with tempfile.TemporaryDirectory() as directory:
        folder = (prepared or Path(directory)) / "adapters"
        known = folder.parent / "expected.json"
        if not known.exists():
            write_json(known, save_adapters(folder, images))
        expected = json.loads(known.read_text())
        encoded = [base64.b64encode(image).decode() for image in images]
        clients = {kind: Client(kind, encoded, expected) for kind in PORTS}
        rates: dict[str, list[float]] = {kind: [] for kind in PORTS}
        names = [*expected]
        random.shuffle(names)
        with servers(folder, Path(directory)):
            for number in range(NUM_ROUNDS + 1):
                chosen = random.choices(names, weights, k=REQUESTS)
                jobs = [(name, random.randrange(NUM_IMAGES)) for name in chosen]
                for kind, client in clients.items():
                    if number == 1:
                        client.latencies.clear()  # the first round warms up
                    rate = client.round(jobs)
                    rates[kind] += [rate] if number else []
                change_adapters(folder, Path(directory), number)
    wrong = [text for client in clients.values() for text in client.wrong]
    if not all(rate for kind in rates for rate in rates[kind]):
        raise SystemExit(f"a server answered no request of a round, so there is nothing to compare. First: {wrong[0]}")
    return {
        "bank_per_s": statistics.median(rates["bank"]),
        "bare_per_s": statistics.median(rates["bare"]),
        "ratio": statistics.median(a / b for a, b in zip(rates["bank"], rates["bare"], strict=True)),
        "p95_s": {kind: percentile(client.latencies, 95) for kind, client in clients.items()},
        "p50_s": {kind: percentile(client.latencies, 50) for kind, client in clients.items()},
        "requests": NUM_ROUNDS * REQUESTS,
        "wrong": wrong,
    }


def change_adapters(folder: Path, directory: Path, number: int) -> None:
    """Add an adapter under a new name to the running server, and remove it again."""
    connection = http.client.HTTPConnection("127.0.0.1", PORTS["bank"], timeout=120)
    new = directory / f"new{number}"
    shutil.copytree(folder / f"task{number}", new)
    assert new.name in post(connection, {"load": str(new)})["adapters"]
    assert new.name not in post(connection, {"remove": new.name})["adapters"]


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile of at least two values."""
    return statistics.quantiles(values, n=100)[percent - 1]


def jpeg(seed: int) -> bytes:
    """Return an image of noise with some structure, as a JPEG file."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256)).save(file, "JPEG")
    return file.getvalue()


def text(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    p95 = results["p95_s"]
    p50 = results["p50_s"]
    return (
        f"{NUM_ADAPTERS} adapters ({', '.join(METHODS)}) on ViT-S/16 at 224, {NUM_CLIENTS} clients, adapters "
        f"drawn by Zipf's law, {results['requests']} requests: {results['bank_per_s']:.1f} images per second, "
        f"{results['ratio']:.2f} of the bare model behind the same server ({results['bare_per_s']:.1f}); p50 "
        f"{p50['bank']:.2f} s and p95 {p95['bank']:.2f} s (bare {p50['bare']:.2f} s and {p95['bare']:.2f} s); "
        f"{len(results['wrong'])} wrong answers.\n"
    )


def write_page(results: dict[str, Any]) -> None:
    """Put the text into docs/many-tasks.md."""
    replace_file(PAGE, with_section(PAGE, BEGIN, END, text(results)).encode())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="rewrite the text from the results")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="keep the adapters there, or take them from there")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    if not args.page:
        results = measure(args.adapters)
        print(json.dumps(results, indent=1))
        write_json(RESULTS, results)
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()

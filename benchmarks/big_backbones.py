"""Measure big backbones: the peak memory of `petune run`, against the size of the bfloat16 weights; the time of attach.

    python benchmarks/big_backbones.py                        # ViT-g/14 (1.0 B), batch 4 at 224, about ten minutes
    python benchmarks/big_backbones.py --model vit_gigantic_patch14_224 --formats bf16
    python benchmarks/big_backbones.py --formats bf16 int8    # int8 needs petune[quantized]
    python benchmarks/big_backbones.py --model vit_tiny_patch16_224 --image-size 32 --quick   # to see that it runs

Random float32 weights are written to a temporary file, tensor by tensor. Each run is a process of its own: two steps of
AdaptFormer with checkpointing, a validation, a test, and saving. The peak is that of its resident memory, from start to
end, libraries included. `--depth` shortens the model.
Expected: ViT-g/14 in bf16 at most 3.3 GB, and 1.6 times its weights; int8 at most 0.65 of bf16; attach under 2 s.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import petune
from petune.base.files import replace_file
from petune.runner.provenance import PeakMemory, provenance

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OPTIONS = {"fp32": ("--precision", "fp32"), "bf16": ("--precision", "bf16")}
QUANTIZED = {name: ("--precision", "fp32", "--base-precision", name) for name in ("int8", "nf4")}
CHUNK = 2**20


def main() -> None:
    options = _options()
    settings = {"img_size": options.image_size} | ({"depth": options.depth} if options.depth else {})
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        count = write_weights(options.model, settings, top / "weights.safetensors")
        write_images(top / "images", options.image_size)
        result: dict[str, Any] = {
            "model": options.model,
            "settings": settings,
            "parameters": count,
            "provenance": provenance(CPU),
            "attach_s": attach_seconds(options.model, settings),
            "peak_bytes": {name: peak_of_run(options, top, name) for name in options.formats},
        }
    print(markdown(result))
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"big-{options.model}.json"
    replace_file(file, (json.dumps(result, indent=1) + "\n").encode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_giant_patch14_224", help="of timm")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--formats", nargs="+", default=["bf16"], choices=[*OPTIONS, *QUANTIZED])
    parser.add_argument("--quick", action="store_true", help="one block")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "speed")
    options = parser.parse_args()
    options.depth = 1 if options.quick else options.depth
    return options


def write_weights(name: str, settings: dict[str, int], path: Path) -> int:
    """Write random weights of a model of timm in float32 and return the number of parameters."""
    with torch.device("meta"):
        tensors = timm.create_model(name, **settings).state_dict()
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in tensors.items():
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).standard_normal(CHUNK, dtype=np.float32) / 50
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            values = noise if tensor.ndim > 1 else noise + 1
            for start in range(0, tensor.numel(), CHUNK):
                file.write(values[: min(CHUNK, tensor.numel() - start)].tobytes())
    return sum(tensor.numel() for tensor in tensors.values())


def write_images(path: Path, size: int) -> None:
    """Write a folder of noise: eight images to train on, and four each for val and test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label in ("one", "two"):
            (path / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / label / f"{i}.png")


def attach_seconds(name: str, settings: dict[str, int]) -> float:
    """Return the seconds that AdaptFormer takes to attach to a model in bfloat16 whose weights are in memory."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **settings)
    model = model.bfloat16().to_empty(device="cpu").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    start = time.perf_counter()
    petune.attach(model, "adaptformer", keep_original=False)
    return time.perf_counter() - start


def peak_of_run(options: argparse.Namespace, top: Path, number_format: str) -> int:
    """Return the peak resident memory of a run in a process of its own, in bytes."""
    depth = ["--set", f"backbone_options.depth={options.depth}"] if options.depth else []
    arguments = [
        *("run", "--backbone", options.model, "--weights", str(top / "weights.safetensors"), "--grad-checkpointing"),
        *("--dataset", f"folder:{top / 'images'}", "--image-size", str(options.image_size), "--batch-size", "4"),
        *("--epochs", "1", "--device", "cpu", "--set", "train.eval_batch_size=4", *depth),
        *("--output", str(top / number_format), *(OPTIONS | QUANTIZED)[number_format]),
    ]
    command = [sys.executable, "-W", "ignore", __file__, "--run", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.splitlines()[-1])


def run_and_report(arguments: list[str]) -> None:
    """Do what the command line does, and print the peak of this process."""
    from petune.cli.main import app

    peak = PeakMemory(CPU)
    try:
        app(arguments, standalone_mode=False)
    finally:
        print(peak.bytes())


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a measurement."""
    weights = 2 * result["parameters"]
    lines = [
        f"{result['model']} {result['settings']}, {result['parameters'] / 1e6:,.0f} M parameters: attach takes "
        f"{result['attach_s']:.2f} s",
        "",
        "| frozen weights in | peak memory | times the size of the bf16 weights |",
        "| --- | ---: | ---: |",
    ]
    for name, peak in result["peak_bytes"].items():
        lines.append(f"| {name} | {peak / 1e9:.2f} GB | {peak / weights:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_and_report(sys.argv[2:])
    else:
        main()

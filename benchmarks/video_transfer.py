"""Transfer of a small video model to another task: AdaptFormer against a linear probe on frozen weights.

python benchmarks/video_transfer.py runs/video_transfer
python benchmarks/video_transfer.py runs/video_transfer_directions --source directions

A VideoMAE of 0.5 M parameters is trained from scratch (`petune pretrain`) on clips of moving digits, to tell which
digit it is, as Kinetics is mostly told by appearance; or to tell four directions (up, down, left, right). It is then
frozen, and tuned to tell eight directions, for which a still frame says nothing, as in Something-Something. Digits and
speeds are drawn anew. Trained models are tested on the test clips, and on the same clips with the frames of each in
random order. By the set of its positions a shuffled clip still tells the axis of its movement, which is right in 1 of
4; without any movement 1 of 8 is.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from moving_digits import DIRECTIONS, Form, make_clips
from result_files import write_json

import petune
from petune.data.batches import eval_batches

STRAIGHT = ("up", "down", "left", "right")
SIDE, FRAMES = 32, 8
SOURCE = {"train": 4800, "val": 320, "test": 320}
TARGET = {"train": 800, "val": 160, "test": 400}
METHODS = {"linear": "linear", "adaptformer": "adaptformer:dropout=0,bottleneck=16"}
SEEDS = (0, 1, 2)


def make_data(folder: Path, source: str) -> None:
    """Write source and target."""
    make_clips(folder / "source", SOURCE, Form(SIDE, step=(2, 3)), seed=1)
    if source == "digits":
        class_by_digit(folder / "source")
    else:
        for direction in set(DIRECTIONS) - set(STRAIGHT):
            for part in SOURCE:
                shutil.rmtree(folder / "source" / part / direction)
    make_clips(folder / "target", TARGET, Form(SIDE, step=(2, 4)), seed=2)


def class_by_digit(folder: Path) -> None:
    """Move clips from folders of directions to folders of digits."""
    for path in sorted(folder.glob("*/*/*.mp4")):
        digit = int(path.stem) // len(DIRECTIONS) % 10  # as `make_clips` deals them out
        target = path.parents[1] / f"digit_{digit}" / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    for direction in DIRECTIONS:
        for part in SOURCE:
            (folder / part / direction).rmdir()


def make_backbone(folder: Path) -> str:
    """Write the config of the model and return its name for petune."""
    import transformers

    transformers.VideoMAEConfig(
        image_size=SIDE,
        patch_size=8,
        num_frames=FRAMES,
        tubelet_size=2,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
    ).save_pretrained(folder / "backbone")
    return f"hf:{folder / 'backbone'}"


def main(words: Sequence[str]) -> None:
    """Run the whole comparison and print its table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", choices=("digits", "directions"), default="digits")
    parser.add_argument("--source-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args(words)
    folder: Path = args.folder
    start = time.process_time()
    if not (folder / "target" / "test").exists():
        make_data(folder, args.source)
    backbone = make_backbone(folder)
    train = {"batch_size": 32, "augment": "none"}
    pretrained = petune.pretrain(
        backbone=backbone,
        dataset=f"video:{folder / 'source'}",
        output=folder / "pretrained",
        resume=True,
        train={**train, "epochs": args.source_epochs},
    )
    print(f"source: top-1 {pretrained.top1:.1f}", flush=True)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for seed in SEEDS:
        for name, method in METHODS.items():
            output = folder / f"{name}-{seed}"
            petune.run(
                method=method,
                backbone=backbone,
                weights=str(folder / "pretrained"),
                dataset=f"video:{folder / 'target'}",
                output=output,
                resume=True,
                seed=seed,
                train={**train, "epochs": args.epochs},
            )
            rows[name].append(test(output, folder / "target"))
            print(f"{name}, seed {seed}: {rows[name][-1]}", flush=True)
    write_json(folder / "table.json", rows)
    print(table(rows))
    print(f"{time.process_time() - start:.0f} s of one core, torch {torch.__version__}")


def test(run_dir: Path, target: Path) -> tuple[float, float]:
    """Return top-1 in percent on the test clips, and on the same with the frames of each in random order."""
    predictor = petune.Predictor(run_dir)
    split = petune.load_dataset(f"video:{target}", image_size=SIDE, frames=FRAMES).test
    generator = torch.Generator().manual_seed(0)
    right = np.zeros(2)
    for batch in eval_batches(split, predictor.transform.preprocess, 100, predictor.device):
        clips_BTCHW: torch.Tensor = batch.x_BCHW
        shuffled_BTCHW = torch.stack([clip[torch.randperm(FRAMES, generator=generator)] for clip in clips_BTCHW])
        for number, x_BTCHW in enumerate((clips_BTCHW, shuffled_BTCHW)):
            right[number] += int((predictor.logits(x_BTCHW).argmax(1) == batch.y_B).sum())
    plain, shuffled = 100 * right / len(split)
    return float(plain), float(shuffled)


def table(rows: dict[str, list[tuple[float, float]]]) -> str:
    """Return mean and standard deviation over the seeds as a table."""
    lines = ["| method | test clips | frames shuffled |", "| --- | --- | --- |"]
    for name, values in rows.items():
        cells = [f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for v in np.array(values).T]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

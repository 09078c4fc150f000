"""Pretraining from scratch: everything trains, the last epoch is kept, the result is a `--weights` for `run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save as save_tensors
from torch import nn

from petune.arguments import check_watch
from petune.attach import attach
from petune.files import replace_file
from petune.measure import PeakMemory, provenance
from petune.registry import build_tuner
from petune.results import RunResult
from petune.run import RunConfig, Watch, prepare_backbone, prepare_data, preprocessing, run_result, with_recipe
from petune.rundir import claimed, free_path
from petune.train import Note, StopFlag, TrainConfig, Trainer, choose_device
from petune.train.evaluate import load_accuracy
from petune.tuner import Recipe
from petune.weights import BACKBONE_FILE

# Muon orthogonalises the momentum of every matrix (Jordan et al., 2024). After one epoch of CIFAR-100 at equal
# cost vit_nano reached 25.5 % with it; the first trial with AdamW needed 28 epochs for 45.6 %.
RECIPE = Recipe(lr=2e-3, weight_decay=0.05, optimizer="nmuon")


class PretrainTraining(TrainConfig):
    """TrainConfig with the defaults of pretraining; they hold beside values that are given."""

    epochs: int = Field(30, ge=1, le=100_000)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class PretrainConfig(RunConfig):
    """All that decides a pretraining run: a RunConfig with other defaults.

    Attributes:
        weights: `none` starts from random weights; a path goes on from there, with its head where the classes agree.
        dtype: Number format of `backbone.safetensors`.
    """

    method: str = "full"
    backbone: str = "vit_nano"
    weights: str = "none"
    dataset: str = "cifar100"
    val_fraction: float = Field(0.02, gt=0, lt=1)
    dtype: Literal["fp32", "fp16"] = "fp32"
    train: PretrainTraining = PretrainTraining.model_construct()


def pretrain(config: PretrainConfig | None = None, *, watch: Watch = lambda event: None, **fields: Any) -> RunResult:
    """Train a backbone from scratch; `output` then holds `backbone.safetensors`.

    Args:
        config: The run; without it `fields` make one.
        watch: Told of every step, epoch and note.

    Raises:
        PetuneError: With one message; see petune.errors for which.
    """
    check_watch("petune.pretrain", watch)
    config = PretrainConfig.given(config, fields, "petune.pretrain(...)")
    tuner = build_tuner(config.method)
    place = config.output or free_path(Path("runs") / f"pretrain-{config.backbone}-{config.dataset}-seed{config.seed}")
    with (
        claimed(place, config, resume=config.resume, command="petune pretrain --config config.yaml"),
        StopFlag() as stop,
    ):
        if RunResult.exists(place):
            return RunResult.read(place)
        with stop.at_once():
            load_accuracy()
            device = choose_device(config.device)
            dataset = prepare_data(config)
            backbone = prepare_backbone(config, dataset, keep_head=True)
            watch(Note(f"{backbone.full_name}, weights {backbone.weights}; {dataset.name} from {dataset.source}"))
            memory = PeakMemory(device)
            attachment = attach(backbone.model.to(device), tuner, name=config.method, keep_original=False)
        preprocess = preprocessing(backbone, dataset)
        trainer = Trainer(
            attachment,
            dataset,
            preprocess,
            with_recipe(config.train, RECIPE, dataset),
            seed=config.seed,
            device=device,
            directory=place,
            stop=stop,
            choose="last",
            on_event=watch,
        )
        fitted = trainer.fit()
        test = trainer.evaluate("test")
        info = {
            "backbone": config.backbone,
            "full_name": backbone.full_name,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "image_size": preprocess.image_size,
            "classes": dataset.classes,
            "top1": test.top1,
            "top5": test.top5,
            "config": config.model_dump(mode="json"),
            "provenance": provenance(device),
        }
        size = _save(attachment.model, place, info, config.dtype)
        return run_result(config, backbone, attachment, fitted, test, place, memory.bytes(), size).write(place)


def _save(model: nn.Module, place: Path, info: dict[str, Any], dtype: str) -> int:
    half = dtype == "fp16"
    tensors = {
        key: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous()
        for key, t in model.state_dict().items()
    }
    content = save_tensors(tensors, metadata={"petune": json.dumps(info)})
    replace_file(place / BACKBONE_FILE, content)
    return len(content)

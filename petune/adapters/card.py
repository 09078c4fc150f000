"""The model card, an adapter directory's `README.md`: what it is, on what, how good, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petune.base.text import escape_markdown, hide_folders, printable
from petune.injector.counts import Counts

TEMPLATES = Path(__file__).parent
HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
WEIGHTS = {"weights", "weights_option"}
MANY_CLASSES = 20


def model_card(config: Mapping[str, Any], counts: Counts, *, with_peft: bool) -> str:
    """The card as Markdown with a YAML head as the Hugging Face Hub reads it.

    Args:
        config: petune's part of `adapter_config.json`; a run's `metadata` gives data, numbers and base model.
        counts: How much was trained.
        with_peft: PEFT loads the directory too.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False, finalize=lambda v: escape_markdown(v) if type(v) is str else v,
    )  # fmt: skip
    said = _known(config["metadata"])
    classes = [str(name) for name in said["classes"]]
    return environment.get_template("model_card.md.jinja").render(
        head=_Plain(_yaml(_front_matter(config["tuner"], said, with_peft))),
        name=said["method"] or config["tuner"],
        options={key: str(value) for key, value in config["config"].items()},
        config=config,
        counts=counts,
        backbone=said["backbone"],
        dataset=said["dataset"],
        test=said["test"],
        training=said["training"],
        classes=classes[:MANY_CLASSES],
        more_classes=max(0, len(classes) - MANY_CLASSES),
        whole={"backbone", "classes", "preprocess"} <= config["metadata"].keys(),
        with_peft=with_peft,
    )


def public(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's metadata without the folders of this machine: of images, and of weights."""
    shown = dict(metadata)
    if isinstance(shown.get("dataset"), str):
        shown["dataset"] = hide_folders(shown["dataset"])
    if isinstance(shown.get("backbone"), Mapping):
        inner = shown["backbone"].items()
        shown["backbone"] = {
            key: hide_folders(v, is_path=key in WEIGHTS and not v.startswith("hf:")) if isinstance(v, str) else v
            for key, v in inner
        }
    return shown


class _Plain(str):
    """Text that is Markdown, or YAML, already."""


def _known(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says of itself; anyone may save anything as metadata, and what is of another form is left out."""
    kinds = {"method": str, "dataset": str, "license": str, "backbone": Mapping, "training": Mapping, "test": Mapping}
    shown = public(metadata)
    known = {key: shown.get(key) if isinstance(shown.get(key), kind) else None for key, kind in kinds.items()}
    measured = known["test"] or {}
    if not all(isinstance(measured.get(key), int | float) for key in ("top1", "top5", "num_images")):
        known["test"] = None
    classes = metadata.get("classes")
    known["classes"] = classes if isinstance(classes, list | tuple) else []
    backbone = {"full_name": None, "weights": None, "hub_id": None, **(known["backbone"] or {})}
    return known | {"backbone": backbone, "training": {"val_top1": None, **(known["training"] or {})}}


def _front_matter(tuner: str, said: Mapping[str, Any], with_peft: bool) -> dict[str, Any]:
    """Only what is known: the hub takes a wrong base model or licence as said."""
    dataset, base = said["dataset"], said["backbone"]["hub_id"]
    known = HUB_DATASETS.get(dataset)
    head: dict[str, Any] = {
        "library_name": "peft" if with_peft else "petune",
        "pipeline_tag": "image-classification",
        "tags": ["petune", "vision-transformer", "adapter", tuner],
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "license": said["license"],
        "datasets": [known] if known else None,
    }
    if said["test"] and dataset:
        head["metrics"] = ["accuracy"]
        head["model-index"] = [_results(said["method"] or tuner, dataset, known, said["test"])]
    return {key: value for key, value in head.items() if value is not None}


def _results(name: str, dataset: str, known: str | None, test: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [
        {"type": kind, "name": title, "value": round(test[key] / 100, 6)}
        for kind, title, key in (("accuracy", "top-1 accuracy", "top1"), ("top_5_accuracy", "top-5 accuracy", "top5"))
    ]
    data = {"type": known or "".join(c if c.isalnum() or c in "-_." else "-" for c in dataset), "name": dataset}
    task = {"type": "image-classification"}
    return {"name": name, "results": [{"task": task, "dataset": {**data, "split": "test"}, "metrics": metrics}]}


def _yaml(head: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_shown(head), sort_keys=False, allow_unicode=True, width=10_000)


def _shown(value: Any) -> Any:
    """Without control characters, which could end the head."""
    if isinstance(value, str):
        return " ".join(printable(value).split())
    if isinstance(value, Mapping):
        return {key: _shown(inner) for key, inner in value.items()}
    return [_shown(inner) for inner in value] if isinstance(value, list) else value

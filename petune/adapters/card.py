"""The model card, `README.md` of an adapter directory: what was trained on what, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from petune.adapters.card_code import model_code
from petune.adapters.card_origin import known_average, known_conversion, without_folders
from petune.adapters.card_task import (
    HUB_TASKS,
    PIPELINES,
    dense_head_code,
    example_of,
    hub_metric,
    num_outputs,
    target_kind,
    target_names,
)
from petune.adapters.format import OLD_SPLIT_OPTIONS, SPLIT_OPTIONS
from petune.base.errors import ConfigError
from petune.base.metric import Metric, shown_metrics
from petune.base.text import escape_markdown, hide_folders, printable

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent
HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
HUB_LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-amlr", "apple-ascl", "gemma"}
"""Licenses of timm's weights that the Hugging Face Hub knows by the same name."""
WEIGHTS = {"weights", "weights_option"}
MAX_CLASSES = 20
"""More class names than these are only counted."""
FIELDS = {
    "method": str,
    "dataset": str,
    "dataset_license": str,
    "dataset_citation": str,
    "license": str,
    "backbone": Mapping,
    "training": Mapping,
    "test": Mapping,
    "metric_info": list,
    "task": Mapping,
    "classes": list | tuple,
    "continued_from": list,
    "averaged_from": Mapping,
    "converted_from": Mapping,
}
"""The metadata that a card shows, and the type that each entry must have."""


class ParameterCounts(Protocol):
    """The numbers of parameters that a card shows."""

    @property
    def tuned(self) -> int:
        """The method's."""

    @property
    def head(self) -> int:
        """The classifier's."""

    @property
    def percent_of_backbone(self) -> float:
        """Both, of backbone and classifier."""


def model_card(config: Mapping[str, Any], counts: ParameterCounts, *, is_peft: bool) -> str:
    """Return the card in Markdown, with a YAML head that the Hugging Face Hub reads.

    Args:
        config: petune's part of `adapter_config.json`. The `metadata` of a run names data, results and base model.
        counts: Numbers of parameters.
        is_peft: The method is PEFT's own, and PEFT loads the directory without petune.
    """
    known = known_metadata(config["metadata"])
    classes = [str(name) for name in known["classes"]]
    arguments, shown = example_of(known["task"])
    return _template().render(
        head=_Markup(_yaml(_front_matter(config["tuner"], known, is_peft))),
        name=known["method"] or config["tuner"],
        options={key: str(value) for key, value in config["config"].items()},
        config=config,
        counts=counts,
        backbone=known["backbone"],
        dataset=known["dataset"],
        dataset_license=known["dataset_license"],
        citation=_Markup(_in_code_block(known["dataset_citation"] or "")),
        task=(known["task"] or {}).get("name"),
        outputs=num_outputs(config["metadata"]),
        test=known["test"],
        metrics=known["metric_info"],
        training=known["training"],
        classes=classes[:MAX_CLASSES],
        earlier=known["continued_from"],
        average=known_average(known["averaged_from"]),
        converted=known_conversion(known["converted_from"]),
        more_classes=max(0, len(classes) - MAX_CLASSES),
        build=_Markup(model_code(config, public_metadata(config["metadata"]))),
        is_complete={"backbone", "classes", "preprocess"} <= config["metadata"].keys(),
        is_peft=is_peft,
        numbers=target_names(known["task"]) if target_kind(known["task"]) == "number" else [],
        add_head=_Markup(dense_head_code(known["task"])),
        example=_Markup(f'predictor(["image.png"]{arguments})'),
        shown=_Markup(shown),
    )


@cache
def _template() -> Template:
    """Return the compiled template: compiling takes longer than rendering."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=lambda value: escape_markdown(value) if type(value) is str else value,
    )
    return environment.get_template("model_card.md.jinja")


def public_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's metadata without the folders of this machine: of images, and of weights."""
    shown = dict(metadata)
    if isinstance(shown.get("dataset"), str):
        shown["dataset"] = hide_folders(shown["dataset"])
    for key in {SPLIT_OPTIONS, OLD_SPLIT_OPTIONS} & shown.keys():
        options = shown[key]
        if isinstance(options, Mapping) and isinstance(options.get("dataset"), str):
            shown[key] = {**options, "dataset": hide_folders(options["dataset"])}
    if isinstance(shown.get("backbone"), Mapping):
        shown["backbone"] = {key: _public_value(key, value) for key, value in shown["backbone"].items()}
    if isinstance(shown.get("continued_from"), list):
        shown["continued_from"] = [_public_run(entry) for entry in shown["continued_from"]]
    average = shown.get("averaged_from")
    if isinstance(average, Mapping) and isinstance(average.get("adapters"), list):
        shown["averaged_from"] = {**average, "adapters": [without_folders(entry) for entry in average["adapters"]]}
    if isinstance(shown.get("converted_from"), Mapping):
        shown["converted_from"] = without_folders(shown["converted_from"])
    return shown


def _public_run(entry: Any) -> dict[str, Any]:
    """Return what an adapter records about an earlier run, without folders of this machine."""
    known = entry if isinstance(entry, Mapping) else {}
    dataset = known.get("dataset")
    return {
        "sha256": known.get("sha256"),
        "dataset": hide_folders(dataset) if isinstance(dataset, str) else None,
        "epochs": known.get("epochs"),
    }


def _public_value(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return hide_folders(value, is_path=key in WEIGHTS and not value.startswith("hf:"))


def _in_code_block(text: str) -> str:
    """Return text of others, such as BibTeX, so that no line of it ends a code block."""
    return "\n".join(printable(line).replace("`", "'") for line in text.strip().splitlines())


class _Markup(str):
    """Text that is Markdown or YAML already and is not escaped."""


def known_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a run. Users may save anything: entries of another type count as missing."""
    shown = public_metadata(metadata)
    known = {key: shown.get(key) if isinstance(shown.get(key), kind) else None for key, kind in FIELDS.items()}
    known["test"], known["metric_info"] = _known_results(known["test"], known["metric_info"])
    known["classes"] = known["classes"] or []
    known["continued_from"] = known["continued_from"] or []
    known["backbone"] = {
        "full_name": None,
        "weights": None,
        "hub_id": None,
        "license": None,
        **(known["backbone"] or {}),
    }
    training = known["training"] or {}
    val = training.get("val_metrics")
    known["training"] = {**training, "val_metrics": val if _are_numbers(val) else {}}
    return known


def _known_results(test: Any, metrics: Any) -> tuple[Mapping[str, Any] | None, list[Metric]]:
    """Return the results and the metrics to show of them; none if either has another form."""
    try:
        shown = shown_metrics(Metric.build(metric) for metric in metrics or ())
    except ConfigError:
        return None, []
    values = (test or {}).get("metrics")
    if not isinstance(values, Mapping) or not _are_numbers(values) or not isinstance(test.get("num_images"), int):
        return None, []
    shown = [metric for metric in shown if metric.name in values]
    return (test, shown) if shown else (None, [])


def _are_numbers(values: Any) -> bool:
    return isinstance(values, Mapping) and all(isinstance(value, int | float) for value in values.values())


def _front_matter(tuner: str, known: Mapping[str, Any], is_peft: bool) -> dict[str, Any]:
    """Return the entries of the head that are known: the hub does not check a base model or a license."""
    dataset = known["dataset"]
    base_model = known["backbone"]["hub_id"]
    hub_dataset = HUB_DATASETS.get(dataset)
    head: dict[str, Any] = {
        "library_name": "peft" if is_peft else "petune",
        "pipeline_tag": PIPELINES.get(target_kind(known["task"])),
        "tags": ["petune", "vision-transformer", "adapter", tuner],
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        **_license(known),
        "datasets": [hub_dataset] if hub_dataset else None,
    }
    if known["test"] and dataset:
        head["metrics"] = [hub_metric(known["metric_info"][0])[0]]
        head["model-index"] = [_model_index(tuner, known)]
    return {key: value for key, value in head.items() if value is not None}


def _license(known: Mapping[str, Any]) -> dict[str, str]:
    """Return the license that the user gave, or that of the backbone; the hub calls those it does not know `other`."""
    if known["license"]:
        return {"license": known["license"]}
    name = known["backbone"]["license"]
    if not isinstance(name, str) or not name:
        return {}
    return {"license": name} if name in HUB_LICENSES else {"license": "other", "license_name": name}


def _model_index(tuner: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results as the hub reads them."""
    dataset = known["dataset"]
    hub_dataset = HUB_DATASETS.get(dataset)
    metrics = []
    for metric in known["metric_info"]:
        kind, title = hub_metric(metric)
        value = known["test"]["metrics"][metric.name] / (100 if metric.percent else 1)
        metrics.append({"type": kind, "name": title, "value": round(value, 6)})
    dataset_type = hub_dataset or "".join(c if c.isalnum() or c in "-_." else "-" for c in dataset)
    return {
        "name": known["method"] or tuner,
        "results": [
            {
                "task": {"type": HUB_TASKS[target_kind(known["task"])]},
                "dataset": {"type": dataset_type, "name": dataset, "split": "test"},
                "metrics": metrics,
            }
        ],
    }


def _yaml(head: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_on_one_line(head), sort_keys=False, allow_unicode=True, width=10_000)


def _on_one_line(value: Any) -> Any:
    """Return plain data without control characters, which could end the head."""
    if isinstance(value, str):
        return " ".join(printable(value).split())
    if isinstance(value, Mapping):
        return {key: _on_one_line(inner) for key, inner in value.items()}
    return [_on_one_line(inner) for inner in value] if isinstance(value, list) else value

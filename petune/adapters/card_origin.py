"""The part of a model card on an adapter that was made of others: an average, or a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petune.base.errors import ConfigError
from petune.base.metric import Metric
from petune.base.text import hide_folders


def without_folders(entry: Any) -> dict[str, Any]:
    """Return what an average records about an adapter, with the name of its directory alone."""
    known = dict(entry) if isinstance(entry, Mapping) else {}
    return {**known, "path": hide_folders(str(known.get("path")), is_path=True)}


def known_average(average: Any) -> dict[str, Any] | None:
    """Return what a card shows of an average; None if the metadata has another form."""
    known = average if isinstance(average, Mapping) else {}
    listed = known.get("adapters")
    adapters = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    numbers = [entry.get("coefficient") for entry in adapters]
    if not numbers or not all(isinstance(number, int | float) for number in numbers):
        return None
    try:
        metric = Metric.build(known["metric"]) if known.get("metric") else None
    except ConfigError:
        metric = None
    rows = [{**entry, "sha256": str(entry.get("sha256"))[:12]} for entry in adapters]
    return {"algorithm": str(known.get("algorithm")), "adapters": rows, "metric": metric, "val": known.get("val")}


def known_conversion(conversion: Any) -> dict[str, Any] | None:
    """Return what a card shows of a conversion; None if the metadata has another form."""
    known = conversion if isinstance(conversion, Mapping) else {}
    texts = {key: str(known[key]) for key in ("path", "sha256", "method") if key in known}
    errors = [known.get(key) for key in ("largest_error", "max_abs_diff")]
    return {**texts, "errors": errors} if len(texts) == 3 and all(isinstance(e, int | float) for e in errors) else None

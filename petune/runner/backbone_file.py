"""The weights file that a pretraining leaves, for `--weights`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save as save_tensors
from torch import nn

from petune.backbones.weights import BACKBONE_FILE
from petune.base.files import replace_file
from petune.base.metric import SplitMetrics
from petune.injector.attachment import Attachment
from petune.runner.provenance import provenance
from petune.runner.trained import Trained

Dtype = Literal["fp32", "fp16"]


def save_backbone(trained: Trained, test: SplitMetrics, dtype: Dtype) -> int:
    """Save the whole model of a pretraining in its run directory and return the size in bytes."""
    return write_weights(trained.ready.attachment.model, trained.run_dir, describe_weights(trained, test), dtype)


def describe_weights(trained: Trained, test: SplitMetrics) -> dict[str, Any]:
    """Return the file's metadata: what the weights are, and how images must be prepared for them."""
    ready = trained.ready
    return {
        "backbone": ready.config.backbone,
        "full_name": ready.backbone.full_name,
        "mean": ready.preprocess.mean,
        "std": ready.preprocess.std,
        "image_size": ready.preprocess.image_size,
        "classes": ready.dataset.classes,
        "method": ready.config.method,
        "metrics": test.report(trained.metric_info),
        "config": ready.config.model_dump(mode="json"),
        "adapters": _adapter_keys(ready.attachment),
        "provenance": provenance(ready.device),
    }


def write_weights(model: nn.Module, run_dir: Path, metadata: dict[str, Any], dtype: Dtype) -> int:
    """Write all tensors of a model to `backbone.safetensors` and return the size in bytes.

    Raises:
        CheckpointError: The file cannot be written.
    """
    half = dtype == "fp16"
    tensors = {
        # copied, since safetensors refuses weights that share memory
        key: (t.half() if half and t.is_floating_point() else t).detach().to("cpu", copy=True).contiguous()
        for key, t in model.state_dict().items()
    }
    content = save_tensors(tensors, metadata={"petune": json.dumps(metadata)})
    replace_file(run_dir / BACKBONE_FILE, content)
    return len(content)


def _adapter_keys(attachment: Attachment) -> list[str]:
    """Return the keys of the tensors that the method added."""
    added = {id(t) for t in attachment.edit_log.new_tensors()}
    return sorted(key for key, t in attachment.model.state_dict(keep_vars=True).items() if id(t) in added)

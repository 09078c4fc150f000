"""A trained model without petune: its adapters folded into the backbone's own weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save as save_tensors

from petune.errors import UsageError
from petune.files import replace_file
from petune.restore import restore


def export_merged(path: Path, out: Path, weights: str | None = None) -> int:
    """Merge a run's adapter and write the plain model's weights; `--weights OUT`, timm and safetensors read them.

    Args:
        path: A run directory, or the adapter directory in it.
        out: The file to write.
        weights: Where the backbone's weights are now; None takes them from where the run did.

    Returns:
        The file's size in bytes.

    Raises:
        NotMergeable: The method is no change of weights.
        UsageError: `out` exists, or is no safetensors file.
        CheckpointError: See `petune.restore`.
    """
    if out.suffix != ".safetensors" or out.exists():
        reason = "exists already" if out.exists() else "is not called so"
        raise UsageError(f"--merged takes the name of a new .safetensors file, but {out} {reason}")
    restored = restore(path, weights)
    method = restored.attachment.name
    restored.attachment.merge()
    card, backbone = restored.card, restored.backbone
    info = {
        "backbone": card["backbone"]["name"],
        "full_name": backbone.full_name,
        "image_size": backbone.image_size,
        "mean": card["preprocess"]["mean"],
        "std": card["preprocess"]["std"],
        "classes": card["classes"],
        "method": method,
        "test": card.get("test"),
    }
    tensors = {key: t.detach().cpu().contiguous() for key, t in backbone.model.state_dict().items()}
    content = save_tensors(tensors, metadata={"petune": json.dumps(info)})
    replace_file(out, content)
    return len(content)

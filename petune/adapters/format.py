"""The adapter directory: a configuration, tensors and a model card, for one backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from petune.adapters.migrations import migrate
from petune.adapters.peft_format import as_peft, from_peft, petune_part
from petune.adapters.unwrapped import unwrap
from petune.base.block_choice import ALL
from petune.base.errors import CheckpointError, UsageError
from petune.base.files import MANIFEST, verify_directory, write_directory
from petune.sites.input_spec import have_same_form
from petune.sites.sites import Sites

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
SPLIT_OPTIONS, OLD_SPLIT_OPTIONS = "split_options", "val_split"
"""Keys of the metadata, the second an older one: what chose a run's images, see `petune.runner.split_options`."""
REQUIRED = {"tuner", "config", "train_head", "geometry", "fingerprint", "metadata"}


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter directory.

    Attributes:
        path: The directory, for messages.
        config: petune's configuration, in the current format.
        tensors: By the file's keys.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def check_plain(metadata: Mapping[str, Any]) -> None:
    """Check that metadata can be written as JSON, before anything else is done.

    Raises:
        UsageError: An entry holds something else than numbers, text, lists and dicts of Python.
    """
    for key, value in metadata.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"metadata[{key!r}] cannot be saved as JSON: {error}. Give plain numbers, text, lists and dicts"
            ) from None


def write_adapter(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    peft_config: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter directory, completely or not at all.

    Args:
        path: The directory; an adapter that is there is replaced.
        config: petune's configuration.
        tensors: By the file's keys.
        card: The model card, in Markdown.
        peft_config: PEFT's own configuration, for a method of PEFT's.

    Raises:
        UsageError: `path` is a file, or a directory that holds something else.
        CheckpointError: It cannot be written.
    """
    check_replaceable(path)
    on_cpu = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    files = {
        CONFIG_FILE: (json.dumps(as_peft(config, peft_config), indent=1) + "\n").encode(),
        TENSOR_FILE: save_tensors(on_cpu),
        CARD_FILE: card.encode(),
    }
    write_directory(path, files)


def check_replaceable(path: Path) -> None:
    """Check that `path` does not exist, is an empty directory, or is an adapter directory without other files.

    Raises:
        UsageError: It is something else.
    """
    if not path.exists() and not path.is_symlink():
        return
    names = {file.name for file in path.iterdir()} if path.is_dir() and not path.is_symlink() else {""}
    if names and (CONFIG_FILE not in names or names - {CONFIG_FILE, TENSOR_FILE, CARD_FILE, MANIFEST}):
        raise UsageError(f"{path} exists and is not an adapter directory, so it is not replaced. Use another path")


def adapter_path(path: Path) -> Path:
    """Return the adapter directory of a run directory; any other path as it is."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def read_adapter(path: Path) -> SavedAdapter:
    """Read an adapter directory that petune or PEFT wrote.

    Args:
        path: The directory.

    Raises:
        CheckpointError: It is missing, damaged or incomplete, or a newer petune wrote it.
    """
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"no adapter in {path}: {CONFIG_FILE} is missing")
    try:
        content = json.loads((path / CONFIG_FILE).read_bytes())
        part = petune_part(content)
        if part is not None or "peft_type" not in content:
            verify_directory(path, except_for={CARD_FILE})  # users may edit the model card
        tensors = load_tensors((path / TENSOR_FILE).read_bytes())
        config = from_peft(content) if part is None else migrate(part, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not an adapter directory that petune can read: {error!r}") from None
    missing = sorted(REQUIRED - set(config))
    if missing:
        raise CheckpointError(f"{path / CONFIG_FILE} is incomplete: {', '.join(missing)} is missing")
    config["config"].setdefault("blocks", ALL)  # older versions had no such option
    return SavedAdapter(path, *unwrap(config, tensors))


def geometry_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the keys of `geometry` in which a saved adapter differs; empty if only the name of the model's class does.

    The model may be wrapped in another one, or its class renamed; the fingerprint and the reference logits decide.
    """
    is_unnamed = "model" in saved and saved["model"] is None
    different = [key for key in current if saved.get(key) != current[key] and not (key == "model" and is_unnamed)]
    if "input" in different and have_same_form(saved.get("input"), current["input"]):
        different.remove("input")
    return different if different != ["model"] else []


def chosen_sites(sites: Sites) -> dict[str, Any]:
    """Return which sites the user has chosen, for the configuration: indices of blocks, paths of heads and of a tower.

    None means what `find_sites` finds. Several heads are always named. Blocks that the method's option `blocks` chose
    are not counted: the options say which ones.
    """
    sites = sites.given
    is_reduced = len(sites.blocks) < len(sites.all_blocks)
    head = sites.parts.get("head")
    has_several = head is not None and len(head.named_modules) > 1
    paths = [path for path, _ in head.named_modules] if head is not None and has_several else sites.chosen_head
    within = {"within": sites.within} if sites.within else {}
    return {"blocks": [b.index for b in sites.blocks] if is_reduced else None, "head": paths and [*paths], **within}


def geometry(sites: Sites) -> dict[str, Any]:
    """Return the shape of a backbone, for the configuration; the first thing that is compared when loading."""
    sites = sites.given
    return {
        "model": sites.model,
        "depth": len(sites.blocks),
        "width": sites.embed_dim,
        "grid": list(sites.grid_size) if sites.grid_size else None,
        "prefix_tokens": sites.num_prefix_tokens,
        "input": sites.input_spec.to_json(),
    }

"""Pretrained weights from a hub: from the cache, or downloaded now, or one clear error within seconds."""

from __future__ import annotations

import os
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from petune.base.errors import WeightsUnavailable
from petune.base.files import whole_file
from petune.base.network import reachable

FILE_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""Names of a weights file in a repository, tried in this order."""
TIMEOUT_S = 5.0
"""For the first answer of a server. A stalled download ends by huggingface_hub's own HF_HUB_DOWNLOAD_TIMEOUT."""
CLI_HINT = (
    "Use --weights PATH for a file you have, --weights none for random ones, or --backbone vit_nano, whose weights "
    "come with petune"
)


@dataclass(frozen=True)
class HubFile:
    """A weights file on the Hugging Face Hub or at a URL; the fields are those of timm's PretrainedCfg."""

    hf_hub_id: str
    hf_hub_filename: str | None = None
    url: str | None = None


def fetch_weights(model_name: str, config: Any) -> Path:
    """Return the weights file of a model, downloaded unless it is cached.

    Args:
        model_name: For messages.
        config: timm's PretrainedCfg of the model, or a HubFile.

    Raises:
        WeightsUnavailable: There are none, or they are neither cached nor downloadable, or damaged.
    """
    cached = _find_cached(model_name, config)
    if cached is not None:
        return verify_safetensors(cached, f"the cached weights of {model_name}")
    _require_server(model_name, config)
    try:
        path = _download_from_hub(config) if config.hf_hub_id else _download_url(config)
    except Exception as error:  # the libraries raise dozens of types; each means that the file is not available
        message = " ".join(str(error).split())[:300]
        _refuse(model_name, config, f"{_server(config)} answered with {type(error).__name__}: {message}")
    return verify_safetensors(path, f"the download of {_label(config)} from {_server(config)}")


def check_weights_available(model_name: str, config: Any) -> None:
    """Check that `fetch_weights` has a chance: the file is cached or its server answers.

    Raises:
        WeightsUnavailable: Neither is true, or timm has no weights for the model.
    """
    if _find_cached(model_name, config) is None:
        _require_server(model_name, config)


def hub_url() -> str:
    """Return the address of the Hugging Face Hub, or of the mirror in HF_ENDPOINT."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def why_unreachable(url: str, *, is_hub: bool) -> str | None:
    """Return why a server cannot be asked, or None if it accepts connections.

    Args:
        url: Its address.
        is_hub: HF_HUB_OFFLINE applies to it.
    """
    if is_hub and os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    return None if reachable(url) else f"{url} cannot be reached"


def verify_safetensors(path: Path, description: str) -> Path:
    """Return `path` if its header is readable; delete a damaged file, so that the next try downloads it again.

    Args:
        path: A weights file; other formats than safetensors are not checked.
        description: What the file is, for messages.

    Raises:
        WeightsUnavailable: It is damaged or not readable.
    """
    if path.suffix != ".safetensors":
        return path
    try:
        with path.open("rb") as file:
            file.read(1)
        with safe_open(path, framework="pt"):
            return path
    except OSError as error:
        raise WeightsUnavailable(
            f"cannot read {description}, {path}: {error.strerror}. Use another cache (HF_HOME) or a weights file",
            cli_hint=CLI_HINT,
        ) from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise WeightsUnavailable(
            f"{description}, {path} of {size:,} bytes, is not a whole safetensors file ({error}). {_delete(path)}",
            cli_hint=CLI_HINT,
        ) from None


def _delete(path: Path) -> str:
    try:
        for file in {path.resolve(), path}:
            file.unlink(missing_ok=True)
    except OSError as error:
        return f"It cannot be deleted ({error.strerror}). Delete it and try again"
    return "It was deleted. Try again"


def _find_cached(model_name: str, config: Any) -> Path | None:
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(config.hf_hub_id, name) for name in _names(config))
        return next((Path(path) for path in found if isinstance(path, str)), None)
    if not config.url:
        raise WeightsUnavailable(
            f"timm has no pretrained weights for {model_name}. Pass a weights file, or use random weights",
            cli_hint=CLI_HINT,
        )
    path = _cache_dir(config) / Path(config.url).name
    return path if path.is_file() else None


def _require_server(model_name: str, config: Any) -> None:
    problem = why_unreachable(_server(config), is_hub=bool(config.hf_hub_id))
    if problem is not None:
        _refuse(model_name, config, problem, is_offline=True)


def _refuse(model_name: str, config: Any, problem: str, *, is_offline: bool = False) -> NoReturn:
    raise WeightsUnavailable(
        f"no pretrained weights for {model_name}: {_label(config)} is not in {_cache_dir(config)} and {problem}. "
        "Download it where there is a network and copy the cache, pass a weights file, or use random weights",
        is_offline=is_offline,
        cli_hint=CLI_HINT,
    ) from None


def _download_from_hub(config: Any) -> Path:
    """Download the first of the file's possible names that the repository has."""
    from huggingface_hub import hf_hub_download

    names = _names(config)
    name = next((name for name in names if _exists_on_hub(config.hf_hub_id, name)), names[0])
    return Path(hf_hub_download(config.hf_hub_id, name))


def _exists_on_hub(repo: str, name: str) -> bool:
    """Ask for a file's metadata with a short timeout: hf_hub_download retries a silent server for minutes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo, name), timeout=TIMEOUT_S)
    except EntryNotFoundError:
        return False
    return True


def _download_url(config: Any) -> Path:
    path = _cache_dir(config) / Path(config.url).name
    with whole_file(path) as partial:
        with urllib.request.urlopen(config.url, timeout=2 * TIMEOUT_S) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
            wanted = int(response.headers.get("Content-Length") or file.tell())
        if partial.stat().st_size != wanted:
            raise OSError(f"the connection ended after {partial.stat().st_size:,} of {wanted:,} bytes")
    return path


def _names(config: Any) -> tuple[str, ...]:
    return (config.hf_hub_filename,) if config.hf_hub_filename else FILE_NAMES


def _label(config: Any) -> str:
    return f"{config.hf_hub_id}/{_names(config)[0]}" if config.hf_hub_id else str(config.url)


def _server(config: Any) -> str:
    return hub_url() if config.hf_hub_id else str(config.url)


def _cache_dir(config: Any) -> Path:
    if config.hf_hub_id:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE)
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"

"""Pretrained weights from a hub: in the cache, or fetched now, or one clear error within seconds."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from petune.base.errors import WeightsUnavailable
from petune.base.network import reachable

HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
ANSWER_TIMEOUT_S, SILENCE_S = 5.0, 8.0  # a transfer may take as long as it takes, but not stand still


@dataclass(frozen=True)
class HubFile:
    """Where a file lies, as timm's PretrainedCfg says it."""

    hf_hub_id: str
    hf_hub_filename: str | None = None
    url: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The file names it may have on the hub."""
        return (self.hf_hub_filename,) if self.hf_hub_filename else HUB_FILES


def overlay(model_name: str, config: Any, *, fetch: bool = True) -> dict[str, Any]:
    """What to lay over timm's pretrained_cfg so that loading neither stalls nor fails late: the file itself.

    Args:
        model_name: For messages.
        config: timm's PretrainedCfg of the model, or a HubFile.
        fetch: Download what is not cached; else only see whether the hub is there.

    Raises:
        WeightsUnavailable: timm has none, or they are neither cached nor to be had from the hub.
    """
    ways_out = f"--weights PATH for a file you have, or --weights none for random ones ({model_name} then starts anew)"
    if not (config.hf_hub_id or config.url):
        raise WeightsUnavailable(f"timm has no pretrained weights for {model_name}; give {ways_out}")
    file = HubFile(config.hf_hub_id or "", config.hf_hub_filename, config.url)
    cached = _cached(file)
    if cached is not None:
        return {"file": str(_whole(cached, f"the cached weights of {model_name}"))}
    hub = hub_url() if file.hf_hub_id else str(file.url)
    what = f"{file.hf_hub_id}/{file.names[0]}" if file.hf_hub_id else file.url
    problem = unreachable(hub, bool(file.hf_hub_id))
    if problem is None and not fetch:
        return {}
    if problem is None:
        try:
            return {"file": str(_whole(_fetch(file, hub), f"what {hub} sent for {what}"))}
        except WeightsUnavailable:
            raise
        except Exception as error:  # the libraries below raise dozens of types; each means that it cannot be had
            problem = f"{hub} answered with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    raise WeightsUnavailable(
        f"the pretrained weights of {model_name} must be cached or downloadable, but {what} is not in "
        f"{_cache_place(file)} and {problem}. Ways out: download it where there is a network and copy the cache; "
        f"{ways_out}"
    )


def hub_url() -> str:
    """The Hugging Face Hub, or what stands in for it."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def unreachable(url: str, is_hub: bool) -> str | None:
    """Why nothing can be asked of a hub, or another server; None where it is there."""
    if is_hub and os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE is set"
    return None if reachable(url) else f"{url} cannot be reached"


def _cached(file: HubFile) -> Path | None:
    if file.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for name in file.names:
            found = try_to_load_from_cache(file.hf_hub_id, name)
            if isinstance(found, str):
                return Path(found)
        return None
    path = _cache_place(file) / Path(str(file.url)).name
    return path if path.is_file() else None


def _cache_place(file: HubFile) -> Path:
    if file.hf_hub_id:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE)
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"


def _whole(path: Path, what: str) -> Path:
    """`path`, if it can be read; a damaged file is taken out of the cache, so that it is fetched anew."""
    if path.suffix != ".safetensors":
        return path
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise WeightsUnavailable(
            f"{what} must be readable, but {path} is not ({error.strerror}); it is left alone. Give --weights PATH, or "
            "another cache by HF_HOME"
        ) from None
    try:
        with safe_open(path, framework="pt"):
            return path
    except SafetensorError as error:
        size, left = path.stat().st_size, "it was deleted. Try again"
        try:
            for damaged in {path.resolve(), path}:
                damaged.unlink(missing_ok=True)
        except OSError as refused:
            left = f"it cannot be deleted ({refused.strerror}). Delete it and try again"
        raise WeightsUnavailable(
            f"{what} must be a whole safetensors file, but {path} of {size:,} bytes is not ({error}); {left}, or give "
            "--weights PATH"
        ) from None


def _fetch(file: HubFile, hub: str) -> Path:
    """Download the first of the file's names that the hub has."""
    if not file.hf_hub_id:
        from torch.hub import download_url_to_file

        target = _cache_place(file) / Path(str(file.url)).name
        target.parent.mkdir(parents=True, exist_ok=True)
        while_it_moves(
            lambda: download_url_to_file(str(file.url), str(target), progress=False), lambda: bytes_below(target.parent)
        )
        return target
    from huggingface_hub import hf_hub_download

    in_small_pieces()
    name = next((n for n in file.names if _is_there(f"{hub}/{file.hf_hub_id}/resolve/main/{n}")), file.names[0])
    place = _cache_place(file) / f"models--{file.hf_hub_id.replace('/', '--')}"
    found = while_it_moves(lambda: hf_hub_download(file.hf_hub_id, name), lambda: bytes_below(place))
    return Path(found)


def in_small_pieces() -> None:
    """In pieces of 10 MB, or of 64 by its Xet client, a slow transfer would look as if it stood still."""
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE, constants.HF_HUB_DISABLE_XET = 1 << 18, True


def _is_there(url: str) -> bool:
    """Asked once with a short patience, since huggingface_hub asks a hub that is down for a minute and a half.

    Raises:
        OSError: The hub answers with an error other than 404, or not at all.
    """
    from huggingface_hub import get_token

    token = get_token()
    request = urllib.request.Request(url, method="HEAD", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def while_it_moves(transfer: Callable[[], Any], moved: Callable[[], int], silence_s: float | None = None) -> Any:
    """The result of `transfer`, as long as it goes on.

    Args:
        transfer: Called in a thread of its own, which is left behind when it stands still.
        moved: How many bytes have been; what it raises ends the waiting.
        silence_s: How long that number may stay the same; None is SILENCE_S.

    Raises:
        TimeoutError: Nothing moved for so long.
    """
    patience_s = SILENCE_S if silence_s is None else silence_s
    done: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            done.put((transfer(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    size, since = -1, time.monotonic()
    while time.monotonic() - since < patience_s:
        with contextlib.suppress(queue.Empty):
            result, error = done.get(timeout=0.2)
            if error is not None:
                raise error
            return result
        now = moved()
        if now != size:
            size, since = now, time.monotonic()
    raise TimeoutError(f"nothing more came for {patience_s:.0f} s")


def bytes_below(place: Path) -> int:
    """Bytes of all files below a directory, which may not be there yet."""
    total = 0
    for file in place.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total

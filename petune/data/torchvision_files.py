"""Find, download and open the files of torchvision's datasets."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from petune.base.errors import DataError
from petune.base.files import whole_file
from petune.base.network import reachable
from petune.data.cache import alone, cache_dir, file_key
from petune.data.find_images import size_and_time
from petune.data.torchvision_table import Entry, Splits

OPEN_ERRORS = (RuntimeError, OSError, ValueError, LookupError, ImportError, EOFError, TypeError)
IDX_FILES = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
"""Files of MNIST and of the datasets that copy its format; they are published with the suffix .gz."""
GZIPPED = {"MNIST", "FashionMNIST", "KMNIST"}
MAX_FILES = 200_000
"""More files than these take too long to look at in every run."""


def find_root(name: str, entry: Entry, data_dir: Path | None) -> Path | None:
    """Return the folder to give torchvision as the root; None if the dataset is not here, or a part of a download."""
    own = None if _unfinished(name).exists() else cache_dir() / "data"
    for folder in (data_dir, own):
        if folder is None:
            continue
        for root in dict.fromkeys((folder / entry.root, folder)):
            if top_file(root, entry) is not None or (name in GZIPPED and _packed_folder(name, root)):
                return root
    return None


def top_file(root: Path, entry: Entry) -> Path | None:
    """Return the file or folder by which a dataset is recognized, if it is in `root`."""
    return next(iter(sorted(root.glob(entry.file))), None) if root.is_dir() else None


def prepared_root(name: str, entry: Entry, data_dir: Path | None, splits: Splits) -> Path:
    """Return the folder to give torchvision as the root; download the files if they are not here.

    Raises:
        DataError: They are not here, and torchvision cannot download them.
    """
    root = find_root(name, entry, data_dir)
    if root is None:
        return _download(name, entry, data_dir, splits)
    packed = _packed_folder(name, root) if name in GZIPPED else None
    return _unpacked(name, packed) if packed else root


def open_split(name: str, root: Path, args: Mapping[str, Any], entry: Entry) -> Any:
    """Return torchvision's dataset of one split.

    Raises:
        DataError: Files are missing or damaged, or a package that reads them is not installed.
    """
    from torchvision import datasets

    cls = getattr(datasets, name, None)
    if cls is None:
        raise DataError(f"this torchvision has no {name}. Upgrade it: pip install -U torchvision")
    download = {"download": False} if name == "SEMEION" else {}  # whose default is to download
    try:
        return cls(str(root), **args, **download)
    except OPEN_ERRORS as error:
        raise _unreadable(name, root, entry, error) from None


def files_state(root: Path, entry: Entry) -> list[Any]:
    """Return a digest of names, sizes and times of the files of a dataset, so that changed ones are decoded again.

    Of a dataset with very many files, only those near the top count; of one that is a file, those of its suffix.
    """
    top = top_file(root, entry) or root
    if top.is_file():  # the folder may hold other datasets
        files = [path for path in top.parent.iterdir() if path.suffix == top.suffix and path.is_file()]
    else:
        files = list(islice(top.rglob("*"), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        files = list(_upper_files(top))
    state = []
    for path in sorted(files):
        size, time = size_and_time(path)
        state.append([str(path.relative_to(root)), size if path.is_file() else 0, time])
    return [len(state), hashlib.sha256(json.dumps(state).encode()).hexdigest()]


def file_names(dataset: Any) -> Sequence[str] | None:
    """Return the file of each image of torchvision's dataset, if it keeps them in one of the usual attributes."""
    for attribute in ("_image_files", "images", "_images", "imgs", "samples", "_samples", "data", "filename"):
        items = getattr(dataset, attribute, None)
        if not isinstance(items, list | tuple) or len(items) != len(dataset) or not len(items):
            continue
        firsts = [item[0] if isinstance(item, tuple | list) else item for item in items]
        if all(isinstance(first, str | Path) for first in firsts):
            return [str(first) for first in firsts]
    return None


def _upper_files(top: Path) -> Iterator[Path]:
    yield top
    for path in top.iterdir():
        yield path
        if path.is_dir():
            yield from path.iterdir()


def _packed_folder(name: str, root: Path) -> Path | None:
    """Return the folder of a dataset in MNIST's format whose files torchvision would not find: packed, as in Debian."""
    for folder in _folders_of(name, root):
        if all((folder / file).is_file() for file in IDX_FILES):
            return None if folder == root / name / "raw" else folder
        if all((folder / f"{file}.gz").is_file() for file in IDX_FILES):
            return folder
    return None


def _folders_of(name: str, root: Path) -> Iterator[Path]:
    def is_named(folder: Path) -> bool:
        return folder.name.lower().replace("-", "").replace("_", "") == name.lower()

    yield root / name / "raw"
    if is_named(root):
        yield root
    if root.is_dir():
        yield from sorted(folder for folder in root.iterdir() if is_named(folder))


def _unpacked(name: str, folder: Path) -> Path:
    """Copy files in MNIST's format, unpacked, into the cache, where torchvision expects them; return the root."""
    sources = [path for file in IDX_FILES for path in (folder / file, folder / f"{file}.gz") if path.is_file()]
    digest = hashlib.sha256(repr([file_key(path) for path in sources]).encode()).hexdigest()[:16]
    root = cache_dir() / "unpacked" / digest
    raw = root / name / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with alone(raw):
            for path in sources:
                target = raw / path.name.removesuffix(".gz")
                if not target.exists():
                    _unpack(path, target)
    except (OSError, EOFError) as error:
        raise DataError(f"cannot unpack the files in {folder} to {raw}: {error}") from None
    return root


def _unpack(source: Path, target: Path) -> None:
    """Copy a file, unpacked; a process that is killed leaves none of its name."""
    opened = gzip.open if source.suffix == ".gz" else open
    with whole_file(target) as temporary, opened(source, "rb") as packed, temporary.open("wb") as file:
        shutil.copyfileobj(packed, file)


def _download(name: str, entry: Entry, data_dir: Path | None, splits: Splits) -> Path:
    own = cache_dir() / "data"
    expected = Path(entry.root) / entry.file
    searched = f"{data_dir} and {own}" if data_dir else str(own)
    problem = f"torchvision:{name} not found: {expected} is not in {searched}"
    advice = "Set data_dir or PETUNE_DATA to the directory that holds it, as torchvision expects it"
    hint = "Name the directory with --data-dir"
    if not entry.url:
        raise DataError(f"{problem}, and torchvision cannot download it. {advice}", cli_hint=hint)
    if not reachable(entry.url):
        raise DataError(f"{problem}, and {entry.url} cannot be reached. {advice}", cli_hint=hint)
    root = own / entry.root
    root.mkdir(parents=True, exist_ok=True)
    try:
        with alone(_unfinished(name)):
            if find_root(name, entry, None) is None:
                _fetch(name, entry, root, splits)
    except OPEN_ERRORS as error:
        raise DataError(
            f"downloading torchvision:{name} to {root} failed: {_one_line(error)}. {advice}", cli_hint=hint
        ) from None
    return root


def _unfinished(name: str) -> Path:
    """Return a file that is there while a dataset is downloaded to petune's cache, and stays if that is cut short."""
    return cache_dir() / "data" / f".downloading-{name}"


def _fetch(name: str, entry: Entry, root: Path, splits: Splits) -> None:
    """Let torchvision download a dataset, from the beginning if a part of it is there, which it takes for all."""
    from torchvision import datasets

    part = top_file(root, entry)
    if part is not None and part.is_dir():
        shutil.rmtree(part)
    elif part is not None:
        part.unlink()
    _unfinished(name).touch()
    for args in (splits.train, splits.val, splits.test):
        if args is not None:
            getattr(datasets, name)(str(root), **args, download=True)
    _unfinished(name).unlink()


def _unreadable(name: str, root: Path, entry: Entry, error: Exception) -> DataError:
    if isinstance(error, ImportError) or (entry.needs and entry.needs.lower() in str(error).lower()):
        package = entry.needs or getattr(error, "name", None) or "a package"
        return DataError(f"torchvision needs {package} to read {name}. Install it with: pip install {package}")
    return DataError(f"torchvision cannot read {name} in {root}: {_one_line(error).rstrip('.')}. Get its files again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).replace(" You can use download=True to download it", "")[:300] or repr(error)

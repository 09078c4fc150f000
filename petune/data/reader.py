"""The plugin contract of datasets: one class with one required method. This file is its manual.

A reader turns a name on the command line, `NAME[:ARGUMENT][,key=value...]`, into a `petune.Dataset`: three splits of
images and targets. petune does the rest: it cuts missing splits, augments, trains and evaluates. A whole plugin:

    class LeavesConfig(petune.ReaderConfig):
        "Photos of leaves."
        season: str = "spring"

    class Leaves(petune.DatasetReader[LeavesConfig]):
        about = "1,200 photos of leaves, 6 species"
        needs = "a download of 80 MB"

        def load(self, context: petune.ReadContext) -> petune.Dataset:
            images, labels = download(self.config.season)             # uint8 (N, H, W, 3), int64 (N,)
            train = petune.Split.of(images, labels)
            empty = train.take(np.arange(0))
            target = petune.Target("class", ("ash", "beech", "birch", "elm", "lime", "oak"))
            dataset = petune.Dataset("leaves", target, "leaves.org", "crop", train, val=empty, test=empty)
            return dataset.with_test()                                # cuts a stratified fifth

    # pyproject.toml of the plugin; the name on the left is the dataset's name everywhere:
    [project.entry-points."petune.datasets"]
    leaves = "petune_leaves:Leaves"

`petune run --dataset leaves,season=fall` then trains on it, and `petune datasets` lists it.

What `load` returns is checked: targets in range and finite, every class with a training image, at least one test
image, no group in two splits. A val split may be empty; it is then cut from train. Import optional packages inside the
methods, and raise `petune.MissingExtra` or `petune.DataError` with what the user should do.

The other methods have defaults. Override `target` if `load` is slow, since the names are needed before any image is;
`find` if the files may be missing; `manifest` if the images can change between two runs, since val and test are drawn
from them; `resizes` if there is no manifest, but petune decodes the images; `path` and `labeled_files` if the argument
is a path; `num_frames` if the samples are clips of videos, whose images are uint8 (N, frames, H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from numpy.typing import NDArray

from petune.base.config import Config
from petune.base.plugins import set_config_class
from petune.data.cache import CACHE_GB
from petune.data.dataset import FRAMES, MAX_BROKEN, Dataset, OnBroken, Target
from petune.data.manifest import Manifest


class ReaderConfig(Config):
    """Options of a dataset: pydantic fields with a type and a default. Unknown keys and wrong types are refused.

    Attributes:
        text_options: Options that are names, such as those of columns: on the command line `no` and `007` stay text.
    """

    text_options: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class ReadContext:
    """Directory, image size and policy of reading, the same for every dataset.

    Attributes:
        image_size: Side, in pixels, at which the images will be used.
        data_dir: Directory of downloaded datasets; None if the user named none.
        on_broken: What to do with an image that cannot be decoded.
        channels: Channels that the backbone takes; None if it takes RGB.
        cache_gb: Splits whose decoded images are larger, in 10⁹ bytes, are to be decoded each time they are read.
        max_broken: Largest share of images that `skip` leaves out.
        frames: Frames of a clip that the backbone takes; datasets of videos sample as many unless told otherwise.
    """

    image_size: int = 224
    data_dir: Path | None = None
    on_broken: OnBroken = "error"
    channels: int | None = None
    cache_gb: float = CACHE_GB
    max_broken: float = MAX_BROKEN
    frames: int = FRAMES


@dataclass(frozen=True)
class LabeledFiles:
    """Images of one split, to evaluate on without training.

    Attributes:
        split: `test` or `val`; `all` if the dataset has no splits.
        files: The images: files, the bytes of files, or arrays (H, W) or (H, W, C).
        target, targets: As in a dataset, except that classes may be missing.
        note: What was not read; empty if everything was.
        names: Of the images, for people; None if they are files, whose paths are their names.
    """

    split: str
    files: Sequence[Path | bytes | NDArray[Any]]
    target: Target
    targets: NDArray[Any]
    note: str = ""
    names: list[str] | None = None


ConfigT = TypeVar("ConfigT", bound=ReaderConfig)


class DatasetReader(Generic[ConfigT]):
    """Base of every dataset reader. Subclass it with the class of its options: `class Leaves(DatasetReader[...])`.

    Attributes:
        Config: The class of the options, taken from the type parameter of `DatasetReader[...]`.
        about: What the dataset is, one line for `petune datasets`.
        needs: What it needs: an extra, a download of 170 MB; empty if it needs nothing.
        argument: The word for its argument, `PATH` in `folder:PATH`; empty if it takes none, as `cifar10`.
        name: The name under which the reader was built; empty for one that was made by hand.
        argument_value: The text after the colon: `pets` in `folder:pets`.
        config: The options of this instance.
    """

    Config: ClassVar[type[ReaderConfig]]
    about: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    argument: ClassVar[str] = ""
    name: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take `Config` from the type parameter of the base class.

        Raises:
            TypeError: The class names no config class.
        """
        super().__init_subclass__(**kwargs)
        set_config_class(cls, DatasetReader, ReaderConfig)

    def __init__(self, argument_value: str = "", config: ConfigT | None = None, **options: Any) -> None:
        """Configure the reader with a config, or with options; nothing is read yet.

        Raises:
            ConfigError: An option is unknown or has a wrong value; the message lists all problems.
        """
        self.argument_value = argument_value
        self.config: ConfigT = self.Config.from_call(config, options, type(self).__name__)  # type: ignore[assignment]

    def load(self, context: ReadContext) -> Dataset:
        """Read the dataset. Images may be any array-like object that decodes on request; see `Split`.

        Raises:
            DataError: It is missing, broken or inconsistent.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load(self, context)")

    def target(self, context: ReadContext) -> Target:
        """Return kind and names of the targets, if possible without decoding an image."""
        return self.load(context).target

    def num_frames(self, context: ReadContext) -> int | None:
        """Return the number of frames of a clip; None, the default, if the samples are images."""
        return None

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """Return the arguments that it takes, each with a line about it, for `petune datasets NAME`; default none."""
        return {}

    def find(self, data_dir: Path | None) -> str | None:
        """Return where it would be read from; None, the default, if it would be downloaded or is not here."""
        return None

    def manifest(self, data_dir: Path | None) -> Manifest:
        """Return a digest of the files by split and class; empty, the default, if the images never change."""
        return {}

    def resizes(self, data_dir: Path | None) -> bool:
        """Return True if images are resized when they are decoded; by default, if there is a manifest."""
        return bool(self.manifest(data_dir))

    @property
    def path(self) -> Path | None:
        """The file or folder that the argument names; None, the default, if it names none."""
        return None

    def labeled_files(self, part: str) -> LabeledFiles | None:
        """Return the image files of `test` or `val`, to evaluate on; None, the default, if images are not files.

        Unlike in `load`, the splits are those on disk, and classes may be missing.
        """
        return None

    def image_files(self) -> list[Path] | None:
        """Return the files of all images, to predict on; None, the default, if images are not files."""
        return None

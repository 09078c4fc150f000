"""Write predicted masks as images: one to read by programs, one to look at."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import UsageError
from petune.base.files import replace_file
from petune.runner.report.tiles import COLORS, with_mask
from petune.serving.image_transform import ImageTransform
from petune.serving.predict import Predictor
from petune.serving.predictions import Prediction
from petune.serving.whole_image import WholeImage, visible

OVERLAY = "-overlay"
SUMMARY = "summary.json"


@dataclass
class MaskFiles:
    """Writes NAME.png, whose values are the numbers of classes, and NAME-overlay.png, the image colored by them.

    Attributes:
        directory: Where to; it is made if it is missing.
        names: Of the classes.
        transform: Of the model, to read the images again.
        taken: Names of files of this call.
        images: What `summary.json` says of each image, those of earlier calls first.
    """

    directory: Path
    names: Sequence[str]
    transform: ImageTransform
    taken: set[str] = field(default_factory=set)
    images: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, predictor: Predictor, directory: Path) -> MaskFiles:
        """Return the writer for the masks of a model.

        Raises:
            UsageError: The model predicts no masks, or `directory` is a file.
        """
        if predictor.task.target_kind != "mask":
            raise UsageError(
                f"masks are written of a model for segmentation, and this one is for {predictor.task.name}",
                cli_hint="Drop --output; --json and --csv print predictions",
            )
        if directory.exists() and not directory.is_dir():
            raise UsageError(f"{directory} is a file, and masks go into a directory. Use another path")
        names = predictor.task.target.names
        earlier = _earlier_images(directory, names)
        return cls(directory, names, predictor.transform, images=earlier)

    def write(self, prediction: Prediction) -> list[Path]:
        """Write mask and overlay of an image; return the files.

        Raises:
            CheckpointError: They cannot be written.
        """
        if prediction.mask is None:
            return []
        name = self._name(prediction.image)
        files = {name: mask_png(prediction.mask)}
        path = Path(prediction.image)
        if path.is_file():
            pixels = visible(WholeImage.read(path, self.transform).pixels)
            files[f"{name}{OVERLAY}"] = _png(with_mask(pixels, prediction.mask, ignore_index=-1))
        if not (self.directory / SUMMARY).exists():  # after a stop it says whose masks these are
            self.write_summary()
        paths = {self.directory / f"{stem}.png": content for stem, content in files.items()}
        for file, content in paths.items():
            replace_file(file, content)
        entry = {"image": _place(prediction.image), "mask": f"{name}.png", "fractions": prediction.fractions}
        self.images = [other for other in self.images if other["mask"] != entry["mask"]] + [entry]
        return list(paths)

    def write_summary(self) -> Path:
        """Write `summary.json`: the classes by number, and of each image its mask and the share of each class."""
        file = self.directory / SUMMARY
        content = {"classes": list(self.names), "images": self.images}
        replace_file(file, (json.dumps(content, indent=1) + "\n").encode())
        return file

    def _name(self, image: str) -> str:
        """Return the name of an image for files; the one that it has, if a summary of an earlier call names it."""
        place = _place(image)
        before = next((Path(other["mask"]).stem for other in self.images if other["image"] == place), None)
        return before or self._free_name(Path(image).stem)

    def _free_name(self, stem: str) -> str:
        """Return a name that no other image has: images of several folders may have the same."""
        name, number = stem, 1
        while any((self.directory / f"{name}{end}.png").exists() for end in ("", OVERLAY)) or name in self.taken:
            number += 1
            name = f"{stem}-{number}"
        self.taken |= {name, f"{name}{OVERLAY}"}
        return name


def _place(image: str) -> str:
    """Return the absolute path of a file, as another call may start in another directory; another name as it is."""
    return str(Path(image).absolute()) if Path(image).is_file() else image


def _earlier_images(directory: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the summary of an earlier call says.

    Raises:
        UsageError: The directory has files that are no masks of a model with these classes.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        return []
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        images = [{key: entry[key] for key in ("image", "mask", "fractions")} for entry in summary["images"]]
        is_own = summary["classes"] == list(names)
    except (OSError, ValueError, KeyError, TypeError):
        is_own = False
    if not is_own:
        raise UsageError(
            f"{directory} has other files than masks of these classes, and masks could replace them. Use a new one",
            cli_hint="Name it with --output",
        )
    return images


def mask_png(mask: NDArray[np.uint8]) -> bytes:
    """Return a mask as a palette PNG: its values are the numbers of classes, shown in the colors of an overlay."""
    from PIL import Image

    image = Image.fromarray(mask)
    colors = [(0, 0, 0), *(COLORS[i % len(COLORS)] for i in range(255))]
    image.putpalette([value for color in colors for value in color])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _png(pixels_HWC: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()

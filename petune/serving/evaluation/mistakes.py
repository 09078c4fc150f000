"""Galleries of an evaluation: the worst mistakes and the most confident ones, with what the model attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from petune.runner.report.tiles import Gallery, Tile, TileImage, tile_image, visible_images, with_mask
from petune.serving.evaluation.attention_maps import attention_maps, over_image
from petune.serving.evaluation.eval_images import Load
from petune.serving.evaluation.rows import ImageRow
from petune.serving.predict import Predictor

NUM_SHOWN = 24
"""Images of a gallery."""
NO_ATTENTION = (
    "Attention is not shown: the last block of this model has no attention weights over all patches of the image."
)

OF_CLIPS = "Of each clip, four frames are shown in reading order."


def galleries_of(predictor: Predictor, rows: Sequence[ImageRow], load: Load) -> tuple[Gallery, ...]:
    """Return the galleries of an evaluation; none if nothing is wrong.

    Args:
        predictor: The model.
        rows: Of all images, in order.
        load: Loads images by position.
    """
    kind = predictor.task.target_kind
    wrong = [i for i, row in enumerate(rows) if row.is_wrong is not False]
    worst = sorted(wrong, key=lambda i: -rows[i].loss)[:NUM_SHOWN]
    galleries = []
    if worst:
        are_compared = kind in {"class", "multi_hot"} and not any(row.is_wrong is None for row in rows)
        title = "Worst mistakes" if are_compared else "Largest errors"
        about = "The images with the highest loss."
        galleries.append(_gallery(predictor, rows, load, worst, title, about))
    confident = [i for i in wrong if rows[i].confidence is not None]
    if confident and kind == "class":  # of several labels, the loss orders mistakes as confidence does
        best = sorted(confident, key=lambda i: -(rows[i].confidence or 0))[:NUM_SHOWN]
        about = "The wrong predictions with the highest probability."
        galleries.append(_gallery(predictor, rows, load, best, "Confident mistakes", about))
    return tuple(galleries)


def _gallery(
    predictor: Predictor, rows: Sequence[ImageRow], load: Load, positions: Sequence[int], title: str, about: str
) -> Gallery:
    x_BCHW, targets = load(np.array(positions))
    x_BCHW = x_BCHW[:: len(x_BCHW) // len(positions)]  # of several views of a video the first one
    pixels_BHWC = visible_images(x_BCHW, predictor.transform.preprocess)
    columns = [[tile_image(pixels) for pixels in pixels_BHWC]]
    if predictor.task.target_kind == "mask":
        columns = _mask_columns(predictor, x_BCHW, targets, pixels_BHWC)
    maps_BHW = None if x_BCHW.ndim == 5 else attention_maps(predictor, x_BCHW)
    if maps_BHW is not None:
        pairs = zip(pixels_BHWC, maps_BHW, strict=True)
        columns.append([tile_image(over_image(pixels, map_HW), "attention") for pixels, map_HW in pairs])
    tiles = [
        Tile(title=_title(rows[i]), lines=_lines(rows[i]), images=images)
        for i, *images in zip(positions, *columns, strict=True)
    ]
    note = "Attention is rolled out over all blocks."
    if maps_BHW is None:
        note = OF_CLIPS if x_BCHW.ndim == 5 else NO_ATTENTION
    return Gallery(title=title, about=f"{about} {note}", tiles=tuple(tiles))


def _mask_columns(
    predictor: Predictor, x_BCHW: Tensor, targets: Tensor, pixels_BHWC: NDArray[np.uint8]
) -> list[list[TileImage]]:
    ignore = predictor.task.target.ignore_index
    predicted_BSS = predictor.outputs(x_BCHW).argmax(1).cpu().numpy()
    masks: list[tuple[str, NDArray[Any]]] = [("target", targets.cpu().numpy()), ("prediction", predicted_BSS)]
    return [
        [tile_image(with_mask(*pair, ignore), name) for pair in zip(pixels_BHWC, masks_BSS, strict=True)]
        for name, masks_BSS in masks
    ]


def _title(row: ImageRow) -> str:
    return row.prediction if not row.target else f"{row.target} → {row.prediction}"


def _lines(row: ImageRow) -> tuple[str, ...]:
    sure = "" if row.confidence is None else f"{100 * row.confidence:.1f} % sure, "
    return f"{sure}loss {row.loss:.3g}", row.image

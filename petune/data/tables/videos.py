"""Clips of a table whose column of images holds paths of videos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from petune.base.errors import DataError
from petune.data.copies import rows_of_copies
from petune.data.dataset import Dataset, Split
from petune.data.folder import BROKEN_LABEL, CROP
from petune.data.reader import ReadContext
from petune.data.tables.plan import Plan
from petune.data.video.decode import ANIMATED_SUFFIXES, VIDEO_SUFFIXES
from petune.data.video.folder import AUGMENT, with_test_views
from petune.data.video.options import ClipOptions
from petune.data.video.store import Readable, check_broken, read_clips, readable_rows, short_note


def has_videos(plan: Plan) -> bool:
    """Return True if the table lists videos.

    Raises:
        DataError: It also lists images, its targets are masks, or options for videos are given for images.
    """
    files = plan.images.files or []
    suffixes = VIDEO_SUFFIXES | ANIMATED_SUFFIXES
    others = [file for file in files if file.suffix.lower() not in suffixes]
    is_animated = bool(files) and all(file.suffix.lower() in ANIMATED_SUFFIXES for file in files)
    given = [name for name in ClipOptions.model_fields if name in plan.options.model_fields_set]
    if len(others) == len(files) or (is_animated and not given):
        if given:
            raise DataError(f"{given[0]} is for videos, but {plan.table.title} lists images. Leave it out")
        return False
    if others:
        raise DataError(f"{plan.table.title} lists videos and images, such as {others[0]}. Use a table for each")
    if not isinstance(plan.options, ClipOptions):
        raise DataError(f"{plan.table.title} holds videos. They are read from files: use table:FILE or video:PATH")
    if plan.columns.kind == "mask":
        raise DataError(f"{plan.table.title} has masks for videos. Use one target for each video")
    return True


def look_at_videos(plan: Plan, context: ReadContext) -> Readable:
    """Look at the videos of all rows.

    Raises:
        DataError: One cannot be decoded; with `on_broken='skip'`, too many cannot.
    """
    videos = readable_rows(plan.images.files or [])
    check_broken([videos], context)
    return videos


def clips_of(plan: Plan, videos: Readable, context: ReadContext) -> Split:
    """Return the clips of all rows; targets are 0, or `BROKEN_LABEL` where a video cannot be decoded."""
    assert isinstance(plan.options, ClipOptions)
    clips = read_clips(videos, plan.options.sampling_of(context), context)
    labels = np.array([BROKEN_LABEL if path in videos.broken else 0 for path in videos.paths])
    return Split(clips, labels, rows_of_copies(videos.paths), CROP)


def finished(dataset: Dataset, plan: Plan, videos: Readable, context: ReadContext) -> Dataset:
    """Return the dataset with the clips and crops of tests, an augmentation that never mirrors, and what is short."""
    assert isinstance(plan.options, ClipOptions)
    dataset = replace(dataset, augment=AUGMENT, test=with_test_views(dataset.test, videos, plan.options, context))
    return dataset.with_note(short_note([videos], plan.options.sampling_of(context)))

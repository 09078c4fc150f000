"""Load videos in class folders, with or without train, val and test above them, as `petune.data.folder` does images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from petune.base.text import plural
from petune.data.copies import copies_note, rows_of_copies
from petune.data.dataset import Dataset, Split
from petune.data.doubtful_classes import names_of_splits_note
from petune.data.find_images import VIDEOS, skipped_note
from petune.data.folder import with_splits
from petune.data.layout import list_images
from petune.data.on_request import on_request_note
from petune.data.reader import ReadContext
from petune.data.splits import left_out_note
from petune.data.video.options import ClipOptions
from petune.data.video.store import Readable, check_broken, read_clips, readable_videos, short_note, stored_share

AUGMENT = "crop_only"
"""Never mirrors: left is not right, and to push is not to pull."""


def load_videos(path: Path, options: ClipOptions, context: ReadContext) -> Dataset:
    """Load PATH/train/CLASS/*.mp4, PATH/val/CLASS/*.mp4, PATH/test/CLASS/*.mp4, or PATH/CLASS/*.mp4.

    Missing splits are cut as from a folder of images.

    Args:
        path: The folder.
        options: Which frames make a clip.
        context: See `ReadContext`.

    Raises:
        DataError: No videos, fewer than two classes, an empty class, classes that differ between splits, or a video
            that cannot be decoded (with its path).
        MissingExtra: PyAV is not installed.
    """
    files, skipped = list_images(path, VIDEOS)
    paths = {part: list(chain(*classes.values())) for part, classes in files.items()}
    videos = {part: readable_videos(part_paths) for part, part_paths in paths.items()}
    check_broken(videos.values(), context)
    tested = "test" if "test" in files else "val"
    splits = {
        part: _split(videos[part], [len(group) for group in files[part].values()], options, context, part == tested)
        for part in files
    }
    dataset = with_splits(f"video:{path}", path, tuple(files["train"]), splits)
    if dataset.cut_test:
        dataset = replace(dataset, test=with_test_views(dataset.test, videos["train"], options, context))
    sampling = options.sampling_of(context)
    num_copies = len(splits["train"]) - len(np.unique(splits["train"].rows))
    notes = (
        _broken_note(path, videos),
        f"{plural(num_copies, 'copy', 'copies')} of other videos, kept in the same split" if num_copies else "",
        copies_note(paths, path, "video"),
        short_note(list(videos.values()), sampling),
        dataset.missing_classes_note("test"),
        skipped_note(skipped, VIDEOS),
        left_out_note(path, VIDEOS),
        names_of_splits_note(dataset.classes),
        on_request_note(splits),
    )
    for note in notes:
        dataset = dataset.with_note(note)
    return replace(dataset, augment=AUGMENT).validated()


def with_test_views(test: Split, videos: Readable, options: ClipOptions, context: ReadContext) -> Split:
    """Return a test split that was cut from train with the clips and crops of tests.

    Args:
        test: Its rows are those of `videos`.
        videos: All videos of train.
        options, context: As for `load_videos`.
    """
    if len(options.views) == 1:
        return test
    sampling = options.sampling_of(context)
    clips = read_clips(videos, sampling, context, random=False, views=options.views, rows=test.rows)
    return replace(test, images=clips, crop=stored_share(options.views))


def _split(videos: Readable, sizes: list[int], options: ClipOptions, context: ReadContext, is_test: bool) -> Split:
    sampling = options.sampling_of(context)
    labels = np.repeat(np.arange(len(sizes)), sizes)[videos.positions]
    if is_test:
        clips = read_clips(videos, sampling, context, random=False, views=options.views)
    else:
        clips = read_clips(videos, sampling, context)
    names = np.array([str(path) for path in videos.paths])
    return Split(clips, labels, rows_of_copies(videos.paths), stored_share(clips.views), names=names)


def _broken_note(path: Path, videos: Mapping[str, Readable]) -> str:
    broken = [str(file.relative_to(path)) for part in videos.values() for file in part.broken]
    shown = ", ".join(broken[:5]) + (", …" if len(broken) > 5 else "")
    return f"{plural(len(broken), 'broken video')} skipped: {shown}" if broken else ""

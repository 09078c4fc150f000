"""`petune data`: check a dataset, and show what a model sees of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petune.base.text import plural
from petune.cli.data_tables import print_counts
from petune.cli.help import Command
from petune.cli.options import DataDir, Json, user_path
from petune.cli.terminal import clean, print_data, print_json, print_status

if TYPE_CHECKING:
    from petune.data.check import DataReport, NearDuplicates, NearPair

NUM_SHOWN = 3
"""Near-duplicates that are printed, for each pair of splits; --json has more."""

DatasetName = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="Dataset: a name of `petune datasets`, or a folder or table of images."),
]
ImageSize = Annotated[
    int, typer.Option("--image-size", metavar="PIXELS", min=1, help="Side of the model's input, in pixels.")
]

Split = Annotated[
    Literal["train", "val", "test"], typer.Option("--split", metavar="train|val|test", help="Split to show.")
]
Augment = Annotated[
    str,
    typer.Option(
        "--augment", metavar="NAME", help="Augmentation, or a list as in train.augment; auto is the dataset's own."
    ),
]
Images = Annotated[int, typer.Option("--images", metavar="NUMBER", min=1, help="Number of images.")]
Times = Annotated[int, typer.Option("--times", metavar="NUMBER", min=1, help="Augmentations of each image.")]
Seed = Annotated[int, typer.Option("--seed", metavar="NUMBER", min=0, help="Selects images and augmentations.")]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="FILE", help="File to write; an older page is replaced, no other file."),
]

data = typer.Typer(help="Check and show a dataset.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """Check and show a dataset."""


@data.command(cls=Command)
def check(dataset: DatasetName, data_dir: DataDir = None, image_size: ImageSize = 224, json: Json = False) -> None:
    """Look for broken images, copies and near-duplicates, leaks between splits, imbalance and small images.

    The exit code is 4 if an image is broken, or is in two splits or classes. Near-duplicates (recompressed, resized,
    brightened or mirrored) are reported only.
    """
    from petune.data.check import check_dataset

    report = check_dataset(dataset, user_path(data_dir) if data_dir else None, image_size)
    if json:
        print_json(asdict(report))
    else:
        _print_report(report)
    if not report.is_sound:
        raise typer.Exit(4)


@data.command(cls=Command)
def show(
    dataset: DatasetName,
    data_dir: DataDir = None,
    image_size: ImageSize = 224,
    split: Split = "train",
    augment: Augment = "auto",
    images: Images = 24,
    times: Times = 3,
    seed: Seed = 0,
    output: Output = Path("images.html"),
    json: Json = False,
) -> None:
    """Write one HTML page with random images as a model sees them, before and after augmentation."""
    from petune.base.yaml_values import parse_value
    from petune.data.load import load_readable
    from petune.runner.report.data_page import Sample, write_data_page

    loaded = load_readable(dataset, user_path(data_dir) if data_dir else None, image_size)
    steps = parse_value(augment) if augment.startswith("[") else augment
    print_status(clean(f"{loaded.name} from {loaded.source}"))
    sample = Sample(split, image_size, steps, images, times, seed)
    page = write_data_page(loaded, user_path(output), sample)
    if json:
        print_json(page)
    else:
        print_data(clean(f"{page['output']}  {page['images']} images"))


def _print_report(report: DataReport) -> None:
    from petune.data.find_images import skipped_note

    if report.images:
        print_counts(report)
    otherwise = "in another class" if report.kind == "class" else "with other targets"
    messages = [
        *_contents(report),
        *report.broken,
        report.mixed_channels,
        *(f"{image} is the same {report.sample} as {twin}, in another split" for image, twin in report.in_two_splits),
        *(f"{image} is the same {report.sample} as {twin}, {otherwise}" for image, twin in report.in_two_classes),
    ]
    if report.copies:
        messages.append(
            f"{plural(report.copies, 'copy', 'copies')} within a class; cutting a split keeps copies together"
        )
    for found in report.near_duplicates:
        messages += _near_duplicates(found, report)
    for part, classes in (("test", report.too_few_for_test), ("val", report.too_few_for_val)):
        if classes:
            messages.append(f"too few different {report.sample}s for a {part} split: {', '.join(classes)}")
    messages += [skipped_note(report.skipped), report.left_out, report.doubtful_classes]
    for message in filter(None, messages):
        print_data(clean(message))
    print_data(_summary(report))


def _contents(report: DataReport) -> list[str]:
    lines = [f"read from {report.source}"] if report.source else []
    balance, sizes = report.balance, report.sizes
    if balance is not None and balance.ratio > 1:
        (smallest, fewest), (largest, most) = balance.smallest, balance.largest
        ends = f"largest {largest} ({most:,}), smallest {smallest} ({fewest:,})"
        lines.append(f"imbalance in train: {balance.ratio:g} to 1; {ends}")
    if sizes is not None:
        low, middle, high = (f"{width}x{height}" for width, height in (sizes.smallest, sizes.median, sizes.largest))
        extent = low if low == high else f"{low} to {high}, median {middle}"
        total = sum(report.num_images.values())
        number = "all" if sizes.num_smaller == total else f"{sizes.num_smaller:,} of {total:,}"
        lines.append(f"sizes in pixels: {extent}; {number} smaller than the input of {sizes.input_size}")
    return lines


def _near_duplicates(found: NearDuplicates, report: DataReport) -> list[str]:
    images = plural(found.num_images, report.sample)
    pairs = plural(found.num_pairs, "pair")
    if found.split == found.other:
        lines = [f"near-duplicates within {found.split}: {pairs}"]
    else:
        share = f"{found.num_images / report.num_images[found.split]:.1%}"
        lines = [f"leak: {images} of {found.split} ({share}) with a near-duplicate in {found.other}; {pairs}"]
    lines += [f"  {_pair(pair)}" for pair in found.pairs[:NUM_SHOWN]]
    return lines


def _pair(pair: NearPair) -> str:
    notes = [f"similarity {pair.similarity:.3f}"]
    notes += ["mirrored"] * pair.mirrored + ["with other targets"] * (not pair.same_target)
    return f"{pair.image} ~ {pair.twin} ({', '.join(notes)})"


def _summary(report: DataReport) -> str:
    if report.is_sound:
        leaks = [found for found in report.near_duplicates if found.split != found.other]
        return "no problems found, besides near-duplicates between splits" if leaks else "no problems found"
    return (
        f"{len(report.broken)} broken, {len(report.in_two_splits)} in two splits, "
        f"{len(report.in_two_classes)} in two classes{', unusable channels' if report.mixed_channels else ''}"
    )

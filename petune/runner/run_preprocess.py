"""Turn a run's images into the backbone's input: their channels, and the statistics that normalize them."""

from __future__ import annotations

import numpy as np

from petune.backbones.create import Backbone
from petune.backbones.input_channels import RGB_CHANNELS
from petune.base.errors import ConfigError
from petune.base.text import plural
from petune.data import Dataset, Preprocess
from petune.data.preprocess import GRAY_WEIGHTS
from petune.data.statistics import Statistics


def choose_preprocess(
    backbone: Backbone, dataset: Dataset, statistics: Statistics | None = None, channels: int = 3
) -> Preprocess:
    """Normalize by `statistics`, else as the weights were trained, else by the training split's own mean and std.

    Args:
        backbone: Its image size, and the statistics of its weights.
        dataset: RGB images of 8 bits have the statistics of the weights; others are measured.
        statistics: Mean and standard deviation per channel.
        channels: Channels of the backbone's input. One gets gray images, with the mean of the channels' statistics,
            weighted as the channels are in gray.

    Raises:
        ConfigError: It is not what the dataset has, nor 1 for RGB images.
    """
    images = dataset.train.images
    stored = images.shape[-1]
    check_channels(channels, stored)
    is_rgb = stored == RGB_CHANNELS and images.dtype == np.uint8
    if (
        statistics is None
        and backbone.mean
        and backbone.std
        and (is_rgb or len(backbone.mean) == stored != RGB_CHANNELS)
    ):
        statistics = backbone.mean, backbone.std
    mean, std = statistics or dataset.train.channel_statistics()
    if channels == 1 and len(mean) == 3:
        mean, std = ((sum(w * v for w, v in zip(GRAY_WEIGHTS, values, strict=True)),) for values in (mean, std))
    return Preprocess(backbone.image_size, mean, std, dataset.train.num_frames)


def check_channels(channels: int, stored: int = RGB_CHANNELS) -> None:
    """Check that a backbone takes images as the dataset has them.

    Args:
        channels: Of the backbone's input.
        stored: Of the images.

    Raises:
        ConfigError: It takes another number, and not one for RGB images, which become gray.
    """
    if not are_convertible(stored, channels):
        gray = " (RGB), or 1 after conversion to gray" if stored == RGB_CHANNELS else ""
        raise ConfigError(
            f"the backbone takes images of {plural(channels, 'channel')}, but the dataset has {stored}{gray}. Leave "
            "in_chans out: the backbone is adapted to the images"
        )


def are_convertible(stored: int, channels: int) -> bool:
    """Return True if images of `stored` channels can be given to a backbone of `channels`: RGB becomes gray, too."""
    return channels == stored or (channels == 1 and stored == RGB_CHANNELS)

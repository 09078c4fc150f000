"""Check before a model is built what would otherwise be refused when training starts."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from petune.backbones.create import Backbone
from petune.base.errors import ConfigError
from petune.injector.attach import attach
from petune.injector.tuner import Tuner
from petune.runner.run_config import RunConfig
from petune.training.config import TrainConfig
from petune.training.layer_decay import lr_scales

LOG = logging.getLogger(__name__)


def check_head(head: str, train: TrainConfig) -> None:
    """Check that a head with BatchNorm gets more than one image at a time, as far as the options tell.

    Raises:
        ConfigError: A batch, or a micro-batch, is a single image.
    """
    if head == "bn_linear" and min(train.batch_size, train.micro_batch_size or train.batch_size) == 1:
        raise ConfigError(
            "head=bn_linear has a BatchNorm, which needs at least two images at a time. Use another train.batch_size "
            "or train.micro_batch_size, or head=linear"
        )


def check_layer_decay(
    config: RunConfig, tuner: Tuner[Any], decay: float, build: Callable[[RunConfig], Backbone]
) -> None:
    """Check on a model without memory that the method trains something in the blocks, before the weights are read.

    What cannot be built so is checked when training starts.

    Args:
        config: The run.
        tuner: Its method.
        decay: Its `layer_decay`.
        build: Builds the backbone of a configuration.

    Raises:
        ConfigError: It trains nothing there, so that `layer_decay` would have no effect.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when the model itself is built
            model = build(config.model_copy(update={"weights": "none"})).model
            attachment = attach(model, copy.deepcopy(tuner), name=tuner.method)
            lr_scales(attachment, {**attachment.tuned, **attachment.head}, decay)
    except ConfigError:
        raise
    except Exception:  # whatever the code of a backbone or a method raises on the meta device
        LOG.debug("the method is not checked before the weights are read", exc_info=True)

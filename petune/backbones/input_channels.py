"""Give a backbone another number of input channels: the first convolution is adapted by timm's rule.

timm sums the weights of red, green and blue for one channel, and repeats them for more, scaled by 3 / C, so that an
input whose channels are alike gives the same output as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from petune.base.errors import ConfigError
from petune.base.text import plural
from petune.sites.new_weights import keep_flag

RGB_CHANNELS = 3


def channel_settings(name: str, settings: Mapping[str, Any], channels: int | None, *, is_timm: bool) -> dict[str, Any]:
    """Return a model's arguments with its number of input channels, for the models of timm.

    Args:
        name: The backbone, for the message.
        settings: Its arguments.
        channels: Channels of the images; None leaves the model as it is.
        is_timm: It is a model of timm, which builds them.

    Raises:
        ConfigError: The arguments ask for another number.
    """
    given = settings.get("in_chans")
    if channels is None or not is_timm or given == channels:
        return dict(settings)
    if given is not None:
        raise ConfigError(
            f"{name} is to take images of {plural(int(given), 'channel')}, by its option in_chans, but the images have "
            f"{channels}. Leave in_chans out"
        )
    return {**settings, "in_chans": channels}


def set_input_channels(name: str, model: nn.Module, channels: int) -> None:
    """Give a model of another library than timm this number of input channels, if it has three.

    Args:
        name: The backbone, for the message.
        model: Its first convolution is replaced.
        channels: Channels of the images.

    Raises:
        ConfigError: The model has no convolution that reads RGB images.
    """
    found = _first_convolution(model)
    if found is not None and found[1].in_channels == channels:
        return
    if found is None or found[1].in_channels != RGB_CHANNELS or found[1].groups != 1:
        raise ConfigError(
            f"the images have {plural(channels, 'channel')}, but the first layer of {name} is no convolution of RGB "
            "images that could be adapted. Build the model for them, as package.module:factory, or use one of timm's"
        )
    path, old = found
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    weight = nn.Parameter(adapted_weight(old.weight.detach(), channels), old.weight.requires_grad)
    new.weight = keep_flag(weight, old.weight)
    if old.bias is not None:
        new.bias = old.bias
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new.train(old.training))
    _tell_channels(model, channels)


def adapted_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with the first convolution adapted, if the model has other input channels.

    Args:
        model: See `petune.backbones.weights.fitting_tensors`.
        tensors: By state_dict key.
    """
    found = _first_convolution(model)
    key = f"{found[0]}.weight" if found else ""
    if found is None or key not in tensors:
        return dict(tensors)
    stored, channels = tensors[key], found[1].in_channels
    if stored.ndim != 4 or stored.shape[1] != RGB_CHANNELS or channels == RGB_CHANNELS:
        return dict(tensors)
    return {**tensors, key: adapted_weight(stored, channels)}


def adapted_weight(weight: Tensor, channels: int) -> Tensor:
    """Return the weight of a convolution of RGB images for another number of channels."""
    from timm.models import adapt_input_conv

    adapted: Tensor = adapt_input_conv(channels, weight)
    return adapted.contiguous()


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    return next(((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)


def _tell_channels(model: nn.Module, channels: int) -> None:
    """Tell the modules that compare the input with `num_channels`, as those of transformers do."""
    for module in model.modules():
        if getattr(module, "num_channels", None) == RGB_CHANNELS:
            module.num_channels = channels  # type: ignore[assignment]
        config = getattr(module, "config", None)
        if getattr(config, "num_channels", None) == RGB_CHANNELS:
            config.num_channels = channels  # type: ignore[union-attr]

"""Let dropout and drop path of the backbone act in a run for every method alike, or for none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from petune.base.errors import AttachError, ConfigError
from petune.injector.attachment import Attachment


def choose_backbone_dropout(attachment: Attachment, rates: Mapping[str, float], note: Callable[[str], None]) -> None:
    """Turn dropout and drop path of the backbone on if a run asks for a rate, and else off, also in what trains.

    Args:
        attachment: The method on its backbone.
        rates: What the run asks for, by the backbone's option.
        note: Shows a sentence to the user.

    Raises:
        ConfigError: The backbone has no layer in which the rates act, or the method does not work with them.
    """
    model = attachment.sites.model
    given = " and ".join(f"{key}={value:g}" for key, value in rates.items())
    try:
        number = attachment.set_backbone_dropout(bool(rates))
    except AttachError as error:
        if not rates:
            return  # the frozen parts run in eval mode, in which they work
        raise ConfigError(
            f"{attachment.name} does not work with {given} on {model}: {error}. Leave it out, or use another method"
        ) from None
    if rates and not number:
        raise ConfigError(f"{given} has no effect on {model}: no layer drops anything in training. Leave it out")
    if rates:
        note(f"dropout and drop path act in {number} modules of {model} in training, whether they are frozen or not")
    elif number:
        note(
            f"{model} comes with dropout or drop path in {number} modules. They are off, as for every method. Set "
            "drop_path, or a drop rate in backbone_options, to train with them"
        )

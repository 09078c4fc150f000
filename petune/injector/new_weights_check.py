"""Check that random weights do not stay frozen."""

from __future__ import annotations

import warnings

from petune.base.errors import AttachError
from petune.base.text import plural, shortened
from petune.injector.attachment import Attachment
from petune.sites.new_weights import NewWeights, placed_in_blocks
from petune.sites.used_parameters import used_parameters


def check_new_weights(attachment: Attachment, new: NewWeights, *, advises: bool) -> None:
    """Check that what the checkpoint did not fill trains, because it is random.

    Args:
        attachment: The new one.
        new: What the checkpoint did not fill.
        advises: Warn also of parameters that the output does not depend on.

    Raises:
        AttachError: Parameters that the output depends on would stay frozen.
    """
    sites, model = attachment.sites, attachment.model
    parameters = dict(model.named_parameters())
    known = {id(p) for p in attachment.tensors.trainable().values()} | placed_in_blocks(sites.all_blocks)
    frozen = {key: p for key in new.keys if (p := parameters.get(key)) is not None and id(p) not in known}
    if not frozen:
        return
    used = {id(p) for p in used_parameters(model, sites.input_spec, frozen.values())}
    keys = [key for key, p in frozen.items() if id(p) in used] or [*frozen]
    message = (
        f"{plural(len(keys), 'parameter')} of {sites.model} got random values, because the weights that it was loaded "
        f"from lack them, or were replaced later, and {attachment.name} keeps them frozen: {shortened(keys, 3)}"
    )
    owners = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    if used and sites.chosen_head is None:
        heads = ", ".join(repr(path) for path, _ in sites.head.named_modules)
        raise AttachError(
            f"{message}. To train the modules that hold them, use head=[{heads}, {', '.join(map(repr, owners[:3]))}]; "
            f"to keep them as they are, name the heads alone: head=[{heads}]. Or do not replace a parameter: set "
            "its values in place, by copy_ under torch.no_grad()"
        )
    if used or advises:
        warnings.warn(f"{message}. To train them, add to head: {', '.join(owners[:3])}", stacklevel=4)

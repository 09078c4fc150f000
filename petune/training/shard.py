"""Spread the frozen part of a backbone over the processes of a group (FSDP2): each block is gathered when it runs.

What trains stays whole on every process: it is small, and its gradients are summed as without sharding.
"""

from __future__ import annotations

import torch

from petune.base.distributed import Group
from petune.base.errors import ConfigError
from petune.injector.attachment import Attachment


def shard_frozen_blocks(attachment: Attachment, group: Group, device: torch.device) -> None:
    """Spread the frozen weights of the blocks over the processes.

    Args:
        attachment: Its model is on `device`. Its fingerprint is computed now, while the weights can be read.
        group: More than one process.
        device: Of this process.

    Raises:
        ConfigError: Nothing is frozen, or no block of the model is one module.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (group.size,))
    # what the method added stays whole even where it is frozen: saving finds it by identity
    log = attachment.edit_log
    whole = {*attachment.parameters(), *log.new_parameters(), *(p for entries in log.sparse for p in entries.targets)}
    blocks = list(dict.fromkeys(block.module for block in attachment.sites.all_blocks if block.is_module))
    if all(p in whole for block in blocks for p in block.parameters()):
        raise ConfigError(
            f"train.shard has nothing to do: no block of {attachment.sites.model} has frozen weights with "
            f"{attachment.name}. Use train.shard=false"
        )
    attachment.tensors.keep_fingerprint()
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)

"""The frozen part of a backbone spread over the processes of a group by FSDP2: each block is gathered when it runs.

What trains is left alone: it is small, every process has all of it, and its gradients are summed as without this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from petune.base.distributed import Group
from petune.base.errors import ConfigError

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment


class Sharded:
    """The blocks of a model, spread.

    Args:
        attachment: Whose model it is; on its device.
        group: More than one process.

    Raises:
        ConfigError: Nothing is frozen, or the model has no blocks that are one module each.
    """

    def __init__(self, attachment: Attachment, group: Group, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (group.size,))
        # what the method added stays whole even where it is frozen: the adapter's file tells it by identity
        kept = {*attachment.parameters(), *attachment.edit_log.new_parameters()}
        blocks = list(dict.fromkeys(block.module for block in attachment.sites.blocks if block.is_module))
        spread = [p for block in blocks for p in block.parameters() if p not in kept]
        if not spread:
            raise ConfigError(
                f"train.shard spreads the frozen weights of blocks, but with {attachment.name} there are none in "
                f"{attachment.sites.model}; leave it out"
            )
        attachment.keep_fingerprint()  # the leader alone cannot read what is sharded
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)

"""Partial fine-tuning: the last blocks train."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator
from torch import nn

import petune


class PartialConfig(petune.TunerConfig):
    """Options of partial fine-tuning.

    Attributes:
        num_blocks: k, counted from the output. The default 1 is that of VPT's comparison. With the option
            `blocks`, all blocks that it names train instead.
    """

    num_blocks: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.blocks != "all" and self.num_blocks != 1:
            raise ValueError("num_blocks and blocks both choose the blocks that train. Give one of them")
        return self


class Partial(petune.Tuner[PartialConfig]):
    """Train the last k blocks and the final norm.

    Partial fine-tuning (Yosinski et al., NeurIPS 2014, arXiv 1411.1792; for ViTs: MAE, arXiv 2111.06377, figure 9).

    Trains: the last k blocks and the final norm; they are in train mode. Every block trains if there are fewer than k.
    The blocks before are frozen, so the backward pass ends at block L - k. `blocks=first:2` trains those instead. In a
    model of several towers, such as CLIP's image and text, these are the last k blocks and the final norm of each. If
    several norms are between blocks and heads, such as two in a row or one after each block, all of them train.
    Parameters: 12·D² + 13·D per block with an MLP of 4·D, and 2·D for the norm. ViT-B/16, k = 1: 7,089,408.
    """

    recipe = petune.Recipe(lr=5e-4, weight_decay=0.05)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze whole blocks, by position: a part of a name would take block 10 for block 1."""
        blocks = edit.sites.require_blocks()
        first = -self.config.num_blocks if self.config.blocks == "all" else 0
        chosen = dict.fromkeys(block for tower in edit.sites.towers for block in tower.blocks[first:])
        for block in chosen:
            edit.train(block)
        for tower in edit.sites.towers:
            for norm in tower.norms:
                edit.train(norm)
        trained = {p for block in chosen for p in _parameters_of(block)}
        shared = [b.path for b in blocks if b not in chosen and not trained.isdisjoint(_parameters_of(b))]
        if shared:
            warnings.warn(
                f"{', '.join(shared)} shares parameters with the blocks that train, so these train there, too",
                stacklevel=2,
            )


def _parameters_of(block: petune.Block) -> Iterator[nn.Parameter]:
    return (p for module in block.own_modules for p in module.parameters())

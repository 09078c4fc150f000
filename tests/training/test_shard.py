"""Sharded blocks give the same gradients bit for bit: here with one process, in test_distributed.py with two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from petune.base.distributed import Group
from petune.base.errors import ConfigError
from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.training.shard import shard_frozen_blocks
from tests.tiny import X, randomised, tiny


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def attached(method: str) -> Attachment:
    torch.manual_seed(0)
    return randomised(attach(tiny(), method))


def gradients(att: Attachment) -> dict[str, torch.Tensor]:
    att.train()
    torch.manual_seed(0)
    att.model(X).square().sum().backward()
    return {key: p.grad.clone() for key, p in {**att.tuned, **att.head}.items() if p.grad is not None}


@pytest.mark.parametrize("method", ["adaptformer", "vpt", "lora", "bitfit", "lst", "fact"])
def test_sharding_changes_neither_gradients_nor_fingerprint(method: str) -> None:
    whole = attached(method)
    expected, frozen = gradients(whole), whole.fingerprint()
    att = attached(method)
    shard_frozen_blocks(att, Group(0, 1), torch.device("cpu"))
    assert att.fingerprint() == frozen
    spread = [p for p in att.model.parameters() if isinstance(p, DTensor)]
    assert spread
    assert not any(p.requires_grad for p in spread)
    found = gradients(att)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert sum(isinstance(p, DTensor) for p in att.model.parameters()) == len(spread)  # let go after the step


def test_sharding_without_frozen_weights_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no block of VisionTransformer has frozen weights with full"):
        shard_frozen_blocks(attach(tiny(), "full"), Group(0, 1), torch.device("cpu"))

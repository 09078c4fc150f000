"""Optional speed-ups that do not change results; undone when training ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import ConfigError, Diverged
from petune.base.malloc import keep_heap
from petune.training.precision import precision_note
from petune.training.speed.bf16_weights import store_in_bf16
from petune.training.speed.context import SAMPLE_IMAGES, Forward, Logits, StepContext
from petune.training.speed.feature_cache import delete_features, fill_cache, plan_cache
from petune.training.speed.grad_checkpointing import checkpoint_blocks
from petune.training.speed.onednn_linear import use_onednn_linear

MAX_COMPILED = 10_000
"""Models of one class that a process may compile."""


@contextmanager
def apply_speedups(context: StepContext) -> Iterator[Forward]:
    """Apply what the configuration asks for and what is safe anyway; yield the forward to train with.

    Raises:
        ConfigError: What was asked for is not possible.
        Stopped: A signal came while features were computed.
    """
    job, config = context.job, context.job.config
    on_cpu = job.device.type == "cpu"
    if note := precision_note(config.precision, context.precision, job.device):
        context.note(note)
    with ExitStack() as stack:
        plan = plan_cache(context)
        if context.precision == "bf16" and not context.sharded:
            stack.enter_context(store_in_bf16(context.model, context.sample_logits, job.directory))
        if config.grad_checkpointing:
            stack.enter_context(checkpoint_blocks(job.attachment))
        micro_batch = context.choose_micro_batch()
        if on_cpu:
            stack.enter_context(keep_heap(lean=config.grad_checkpointing))
        cached = fill_cache(context, plan, micro_batch) if plan else {}
        forward: Logits = context.model
        if cached and config.compile:
            context.note("nothing is compiled: with cached features, little is left to compute")
        elif config.compile:
            forward = _compiled(context.model)
        elif on_cpu and not cached and not config.grad_checkpointing:  # it takes memory, which checkpointing is to save
            scale = micro_batch / SAMPLE_IMAGES
            stack.enter_context(use_onednn_linear(context.model, context.sample_logits, scale))
        try:
            yield Forward(forward, cached)
        except Diverged:  # any other exception leaves the features for the resume
            delete_features(job.directory)
            raise
        delete_features(job.directory)


def _compiled(model: nn.Module) -> Logits:
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    compiled = torch.compile(model, dynamic=False)
    allowed: dict[str, Any] = {
        # a hook keeps a tensor on its holder only within one block, so there is nothing that a recompute must repeat
        "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
        # torch would leave the ninth model of a class, and all after it, uncompiled: a comparison can have more
        "recompile_limit": MAX_COMPILED,
        "accumulated_recompile_limit": MAX_COMPILED,
    }

    def forward(x: Tensor) -> Tensor:
        try:
            with torch._dynamo.config.patch(allowed):
                out: Tensor = compiled(x)
        except (BackendCompilerFailed, InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"torch.compile failed: {reason}. Use compile=false") from None
        return out

    return forward

"""Find norms next to each other after the last block, and those of them that the output depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.sites.forward import black_image
from petune.sites.input_spec import InputSpec
from petune.sites.norms import is_norm
from petune.sites.returned import tensors_returned
from petune.sites.site import Block, Site, modules_in
from petune.sites.trace import Call, Trace
from petune.sites.undisturbed import undisturbed

LAST = 0
"""The key of the last block, where other keys are times of calls."""


def norms_at_end(trace: Trace, last: Block, head: Site | None, calls: Sequence[Call]) -> list[Call]:
    """Return the norms that read the last block, and no other norm or matrix after it, one call of each module.

    Args:
        trace: The forward.
        last: The last block.
        head: Its norms do not count.
        calls: Those among which norms are looked for.
    """
    left = max((c for c in trace.calls if c.module is last.exit), key=lambda c: c.stop)
    inside = {id(m) for m in modules_in([head] if head is not None else [])}
    norms = [c for c in calls if c.start > left.stop and is_norm(c) and id(c.module) not in inside]
    if not norms:
        return []
    others = [c for c in trace.calls if c.start > left.stop and c.has_matrix]
    spans = {left.start: LAST, **{c.start: c.start for c in (*norms, *others)}}
    sources = trace.flow.sources(spans, [c.start for c in norms])
    return list({id(c.module): c for c in norms if sources.get(c.start) == {LAST}}.values())


def with_effect(model: nn.Module, spec: InputSpec, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of some modules whose outputs reach what the model returns.

    A graph does not tell: tokens that are cut away later are in it, too. So each module returns NaN once, which also
    passes layers of zeros. None is returned if the model does not run like that.
    """
    try:
        return [module for module in modules if _passes_nan(model, spec, module)]
    except Exception:  # whatever a model's own code raises at NaN
        return []


def _passes_nan(model: nn.Module, spec: InputSpec, module: nn.Module) -> bool:
    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.nan)

    with undisturbed(model), torch.no_grad():
        handle = module.register_forward_hook(replace)
        try:
            returned = list(tensors_returned(black_image(model, spec).call(model)))
        finally:
            handle.remove()
    return any(bool(y.isnan().any()) for y in returned if y.is_floating_point())

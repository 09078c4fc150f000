"""The error of a training whose numbers are no longer finite."""

from __future__ import annotations

import math

from petune.base.errors import Diverged
from petune.data.batches import Batch
from petune.training.run_files import RunFiles

MAX_SHOWN = 8


def check_finite(loss: float, norm: float, lr: float, batch: Batch, step: int, files: RunFiles) -> None:
    """Check the loss and the gradient norm of a step.

    Args:
        loss, norm, lr: Loss, gradient norm and learning rate of the step.
        batch: Its images, for the message.
        step: Steps done before.
        files: Of the run, for the message.

    Raises:
        Diverged: One of them is not finite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    positions = [int(position) for position in batch.positions]
    shown = f"{positions[:MAX_SHOWN]}{' …' if len(positions) > MAX_SHOWN else ''}"
    raise diverged(f"the loss is {loss} and the gradient norm {norm} (lr {lr:.3g}, images {shown})", step, files)


def diverged(problem: str, step: int, files: RunFiles) -> Diverged:
    """Return the error, with the problem and the last checkpoint before it."""
    last = files.last_step()
    good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is of step {last}"
    return Diverged(
        f"training diverged at step {step}: {problem}; {good}. Use a lower learning rate",
        cli_hint="Set it with --lr, or with --set lrs.METHOD=… in a comparison",
    )

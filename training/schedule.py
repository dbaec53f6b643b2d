"""Learning-rate schedules."""

from __future__ import annotations

import math

from training.console import warn


def scheduled_lr(lr: float, step: int, steps: int, warmup: int = 0, cosine: bool = False) -> float:
    """The learning rate of a step, the first being 1: linear warm-up, then constant or a cosine to 0.

    It depends on nothing but the step, so a resumed run has nothing to restore.
    """
    if step <= warmup:
        return lr * step / warmup
    if not cosine:
        return lr
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def warn_of_long_warmup(warmup: int, steps: int) -> None:
    """Warns of a warm-up that the run is too short for."""
    if warmup >= steps:
        warn(
            f"--warmup {warmup:,} is no shorter than the run, {steps:,} steps: the learning rate will not "
            "reach --lr. Give a smaller --warmup or train longer."
        )

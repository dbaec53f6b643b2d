"""The learning rate: warm-up, then a constant, cosine or plateau schedule."""

from __future__ import annotations

import math
from typing import Any

from training.console import warn

import torch

# More than PATIENCE epochs in a row without a better validation loss halve the plateau's learning rate.
PATIENCE = 5
LR_FACTOR = 0.5


class LearningRate:
    """Sets an optimizer's learning rate before every step.

    Args:
        lr: the peak learning rate.
        schedule: 'constant', 'cosine' (to 0 after the last step) or 'plateau' (see `end_epoch`).
        warmup: steps in which it grows linearly from 0.
        total_steps: length of the run, for the cosine.
        optimizer: its groups' learning rates are set.
        device: on a CUDA device the learning rate is a tensor that stays in place, because a captured step
            reads it at each replay.

    Except for the plateau, the learning rate depends only on the step.
    """

    def __init__(
        self,
        lr: float,
        schedule: str,
        warmup: int,
        total_steps: int,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self.lr, self.schedule, self.warmup, self.total_steps = lr, schedule, warmup, total_steps
        self.optimizer = optimizer
        self.tensor = torch.tensor(lr, device=device) if device.type == "cuda" else None
        self.plateau_factor, self.best_loss, self.bad_epochs = 1.0, math.inf, 0
        self.cosine_start = 0.0  # last step with the full rate; a task may set it (inf: not known yet)
        self.current = self.rate_at(1)

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step; the first step is 1."""
        lr = self.lr * self.plateau_factor
        if step <= self.warmup:
            return lr * step / self.warmup
        if self.schedule != "cosine":
            return lr
        peak = max(1, self.warmup, self.cosine_start)
        # 1 after the last step
        progress = 0.0 if step <= peak else (step - peak) / max(1, self.total_steps + 1 - peak)
        return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def set(self, step: int) -> None:
        """Set the optimizer's learning rate for a step."""
        self.current = self.rate_at(step)
        lr = self.current if self.tensor is None else self.tensor.fill_(self.current)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def end_epoch(self, valid_loss: float) -> None:
        """Halve the plateau's learning rate after more than PATIENCE epochs without a lower loss."""
        if self.schedule != "plateau":
            return
        if valid_loss < self.best_loss:
            self.best_loss, self.bad_epochs = valid_loss, 0
        else:
            self.bad_epochs += 1
        if self.bad_epochs > PATIENCE:
            self.plateau_factor *= LR_FACTOR
            self.bad_epochs = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        names = ("plateau_factor", "best_loss", "bad_epochs", "total_steps", "cosine_start")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Restore what `state_dict` returned, after `step` steps and after the optimizer was restored."""
        self.plateau_factor, self.best_loss = float(state["plateau_factor"]), float(state["best_loss"])
        self.bad_epochs, self.cosine_start = int(state["bad_epochs"]), float(state["cosine_start"])
        falling = self.schedule == "cosine" and step > self.cosine_start
        if falling and state["total_steps"] != self.total_steps:
            warn("the length of the run has changed: the learning rate jumps to the new cosine")
        for group in self.optimizer.param_groups:  # the run may have been on another kind of device
            group["capturable"] = self.tensor is not None
        self.set(max(step, 1))

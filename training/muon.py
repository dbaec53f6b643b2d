"""Muon for weight matrices, with Adam for everything else, behind the interface of one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from training.console import UserError

import torch
from torch import Tensor

# Muon's learning rate, as a multiple of Adam's. In Nth farthest a factor of 1 learns more slowly, and with 8
# the stage of four vectors does not leave its plateau.
FACTOR = 3.0


class MuonWithAdam:
    """Muon (Jordan et al. 2024) for matrices and Adam for vectors, such as biases and gains of norms.

    Muon replaces the averaged gradient of a matrix by a nearly orthogonal matrix, so that all directions
    change about equally fast. Its steps are scaled to the size of Adam's (Liu et al. 2025, arXiv:2502.16982).

    Args:
        parameters: of the model.
        lr: learning rate of Adam; Muon's is FACTOR times as high. `param_groups` has Adam's.
        fused: as for torch.optim.Adam.
        capturable: as for torch.optim.Adam; Muon itself cannot be captured in a CUDA graph.

    Raises:
        UserError: this torch has no Muon.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, fused: bool = False, capturable: bool = False
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"--optimizer muon requires torch 2.9 or newer, found {torch.__version__}. Update torch."
            )
        parameters = list(parameters)
        matrices, vectors = ([p for p in parameters if (p.dim() == 2) == wanted] for wanted in (True, False))
        self.muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.Adam(vectors, lr=lr, fused=fused, capturable=capturable)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups."""
        return self.adam.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of every parameter."""
        return {**self.muon.state, **self.adam.state}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients."""
        self.muon.zero_grad(set_to_none)
        self.adam.zero_grad(set_to_none)

    def step(self) -> None:
        """Take one step with both optimizers."""
        for group in self.muon.param_groups:
            group["lr"] = FACTOR * float(self.adam.param_groups[0]["lr"])
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Return both states as plain data."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


OPTIMIZERS = {"adam": torch.optim.Adam, "muon": MuonWithAdam}

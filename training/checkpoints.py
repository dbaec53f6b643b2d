"""Checkpoints: plain data (tensors, numbers, strings, None, lists, tuples, dicts) in torch.save's format.

They are written under a temporary name and renamed, so that a checkpoint is never half written. Reading one
cannot run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.console import UserError, first_line, is_out_of_memory, warn
from training.files import atomic_write
from training.runs import VERSION

import torch
from torch import nn


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint. If this fails, the earlier file stays."""
    record = {"project": VERSION, "torch": str(torch.__version__), **contents}
    atomic_write(path, lambda file: torch.save(record, file))


def try_save_checkpoint(path: str | Path, contents: dict[str, Any]) -> bool:
    """Write a checkpoint. If this fails (disk full, folder removed), warn and return False."""
    try:
        save_checkpoint(path, contents)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some failed writes into RuntimeError
        if is_out_of_memory(error):
            raise
        kept = "the previous file is kept" if Path(path).exists() else "there is no previous file"
        full = ", as when the disk is full" if isinstance(error, RuntimeError) else ""
        warn(f"could not write {path} ({first_line(error)}{full}); {kept}, training continues")
        return False
    return True


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a file written by `save_checkpoint`.
        device: device of the loaded tensors.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}. A run writes best.pt at its first report or at the end of an "
            "epoch, unless the disk is full."
        )
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(contents, dict):
            raise TypeError(f"it contains a {type(contents).__name__}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # pickle and torch raise many types for foreign bytes
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} is not a checkpoint of this project, or it is damaged ({first_line(error)}). Use a "
            "best.pt or last.pt from a run folder."
        ) from None
    return contents


# ---- contents


def rebuild_model(checkpoint: Mapping[str, Any], kinds: Mapping[str, type[nn.Module]]) -> nn.Module:
    """Build the model that a checkpoint describes by `kind`, `config` and `model`, in eval mode.

    Args:
        checkpoint: the contents of a best.pt or last.pt.
        kinds: the model classes by `kind`.

    Raises:
        UserError: the checkpoint is of another kind, or its parts do not match.
    """
    kind = checkpoint.get("kind")
    if kind not in kinds:
        raise UserError(
            f"the checkpoint contains a model of kind {kind!r}, expected {' or '.join(map(repr, kinds))}. "
            "Choose a checkpoint of that kind."
        )
    try:
        model = kinds[kind](**checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint is inconsistent ({type(error).__name__}: {first_line(error)}). It may have been "
            "altered. Use another one."
        ) from None
    return model.eval()

"""Checkpoints: plain data (tensors, numbers, strings, None, lists, tuples, dicts) in torch.save's format.

They are written under a temporary name and renamed, so that a checkpoint is never half written. Reading one
cannot run code.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.console import UserError, first_line, is_out_of_memory, warn
from training.devices import without_memory
from training.files import atomic_write
from training.runs import VERSION, read_log

import torch
from torch import nn

CHECKPOINT_FORMAT = 1  # increases when older code can no longer read the contents


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint. If this fails, the earlier file stays."""
    record = {"format": CHECKPOINT_FORMAT, "project": VERSION, "torch": str(torch.__version__), **contents}
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
        device: device of its tensors, whatever device they were saved from.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint of this project, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: it is {'a folder' if path.is_dir() else 'missing'}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual contents, which are checked below
            contents = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # zipfile, pickle and torch raise many types for foreign bytes
        if is_out_of_memory(error):
            raise UserError(
                f"{path} needs more memory than is available, for a file of {path.stat().st_size:,} bytes "
                f"({first_line(error)}). Use another checkpoint, or a machine with more memory."
            ) from None
        raise UserError(
            f"{path} is not a checkpoint of this project, or it is damaged ({first_line(error)}). "
            "Use another checkpoint."
        ) from None
    if not isinstance(contents, dict) or "format" not in contents:
        raise UserError(
            f"{path} is not a checkpoint of this project. Use a best.pt or last.pt from a run folder."
        )
    if type(contents["format"]) is not int or contents["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {_brief(contents['format'])}, of project version "
            f"{_brief(contents.get('project'))}; this version, {VERSION}, reads format {CHECKPOINT_FORMAT}. "
            "Use the version of the project that wrote it."
        )
    for tensor in _tensors(contents):
        # A tensor of stride 0 can have any size over a small storage; a copy of it takes that much memory.
        if (
            tensor.layout is not torch.strided
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise UserError(
                f"{path} holds a tensor of shape {tuple(tensor.shape)} with less data than its shape "
                "requires. Use another checkpoint."
            )
    return contents


def load_last(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return the contents of a run's last.pt, or None if the run was killed before its first save.

    Raises:
        UserError: see `load_checkpoint`; or the log shows that a last.pt was deleted. Training from the start
            would then mix two runs in one folder.
    """
    path, log = folder / "last.pt", folder / "log.jsonl"
    if path.exists():
        return load_checkpoint(path, device)
    for event in read_log(log) if log.exists() else ():
        epoch = event.get("epoch")
        later = isinstance(epoch, (int, float)) and epoch > 1
        if later or event.get("event") in ("test", "final", "interrupt"):
            raise UserError(
                f"{folder} has no last.pt, although its log shows that one was written. Start a new run "
                "without --resume."
            )
    return None


_DOS_FOLDER = 0x10  # the attribute of a folder in a zip archive


def _check_archive(path: Path) -> None:
    """Raise ValueError, or an error of zipfile's, unless the file is an intact archive of torch.save's."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores without compression; compressed entries could expand to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries")
        # torch reads an entry with this bit as a folder and returns uninitialised memory.
        if any(entry.external_attr & _DOS_FOLDER for entry in entries):
            raise ValueError("folders among the entries")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("entries larger than the file")
        damaged = archive.testzip()  # torch.load does not compare the checksums
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")


def _brief(value: Any) -> str:
    """Return at most 80 characters of a value from a checkpoint, in one line."""
    return repr(value).splitlines()[0][:80]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested containers, which may also contain each other or themselves."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


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
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(
            f"the checkpoint holds a model of kind {_brief(kind)}, expected {' or '.join(map(repr, kinds))}. "
            "Choose a checkpoint of that kind."
        )
    try:
        config, weights = checkpoint["config"], checkpoint["model"]
        for name, value in config.items():  # layers are built one by one: 10^9 of them would take forever
            if isinstance(value, int) and ("layers" in name or "blocks" in name) and value > len(weights):
                raise ValueError(f"{name} is {value}, but there are {len(weights)} weights")
        # First without memory: the config may describe a larger model than the file contains.
        with without_memory():
            expected = {name: value.shape for name, value in kinds[kind](**config).state_dict().items()}
        for name in sorted(expected.keys() | weights.keys()):
            found = weights[name].shape if name in weights else None
            if expected.get(name) != found:
                raise ValueError(f"{name}: expected {expected.get(name)}, found {found}")
        if any(value.is_complex() or not value.isfinite().all() for value in weights.values()):
            raise ValueError("weights that are not finite real numbers")
        model = kinds[kind](**config)
        model.load_state_dict(weights)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint is inconsistent ({type(error).__name__}: {first_line(error)}). It may have been "
            "altered. Use another one."
        ) from None
    return model.eval()


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the tensors of an optimiser's state have their parameter's shape and type.

    torch's fused kernels do not check this and would write beyond the end of a smaller tensor.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or name == "step" and value.numel() == 1:
                continue
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise ValueError(
                    f"the optimiser's {name} is {tuple(value.shape)} {value.dtype}, for a parameter of "
                    f"{tuple(parameter.shape)} {parameter.dtype}"
                )


def restore_fields(position: Any, saved: Mapping[str, Any]) -> None:
    """Set the fields of a dataclass from a checkpoint's dict.

    Raises:
        KeyError: a field is missing.
        ValueError: a value is of another type or a negative count.
    """
    for name, present in vars(position).items():
        value = saved[name]
        kinds = (int, float) if isinstance(present, float) else type(present)
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} is {_brief(value)}")
        setattr(position, name, value)

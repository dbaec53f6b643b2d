"""Checkpoints: plain data, written whole, read without running code.

A checkpoint holds tensors, numbers, strings, lists and dicts. It is written under a temporary name and
renamed, so that a file of the right name is a whole file.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.console import UserError, first_line, is_out_of_memory, warn
from training.files import atomic_write
from training.runs import VERSION, read_log

CHECKPOINT_FORMAT = 1  # increases when older code can no longer read the contents


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Write plain data (tensors, numbers, strings, None, lists, tuples, dicts), all or nothing."""
    record = {"format": CHECKPOINT_FORMAT, "project": VERSION, "torch": str(torch.__version__), **contents}
    atomic_write(path, lambda file: torch.save(record, file))


def try_save_checkpoint(path: str | Path, contents: dict[str, Any]) -> bool:
    """Save a checkpoint; on failure (disk full, folder removed) warn, keep the earlier file, return False."""
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
    """Read a checkpoint. The file can run no code, and a damaged file is refused.

    Args:
        path: a file written by `save_checkpoint`.
        device: where its tensors go, whatever device they were saved from.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint of this project, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: it is {'a folder' if path.is_dir() else 'missing'}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual contents; errors are what matters
            contents = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # pickle, zip and torch raise almost anything on foreign bytes
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
            f"{path} has checkpoint format {contents['format']!r:.80}, of project version "
            f"{contents.get('project')!r:.80}; this version, {VERSION}, reads format {CHECKPOINT_FORMAT}. "
            "Use the version of the project that wrote it."
        )
    for tensor in _tensors(contents):
        # A tensor of stride 0 can claim any size over a small storage, and takes that much once copied.
        if (
            tensor.layout is not torch.strided
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise UserError(
                f"{path} holds a tensor of shape {tuple(tensor.shape)} with less data than its shape claims. "
                "Use another checkpoint."
            )
    return contents


def load_last(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return the contents of a run's last.pt, or None for a run that was killed before its first save.

    Raises:
        UserError: as `load_checkpoint`; or last.pt is missing although the log shows later work: started
            again, the run would mix two runs in one folder.
    """
    path, log = folder / "last.pt", folder / "log.jsonl"
    if path.exists():
        return load_checkpoint(path, device)
    for event in read_log(log) if log.exists() else ():
        epoch = event.get("epoch")
        later = isinstance(epoch, (int, float)) and epoch > 1
        if later or event.get("event") in ("test", "final", "interrupt"):
            raise UserError(
                f"{folder} has no last.pt, although its log shows a run that had saved one. Start a new run "
                "without --resume."
            )
    return None


_DOS_FOLDER = 0x10  # attribute of a zip entry


def _check_archive(path: Path) -> None:
    """Raise ValueError or zipfile's errors unless the file is an intact archive as torch.save writes it."""
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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested containers, visiting each container once: they may contain each other."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


# ---- what checkpoints contain


def rebuild_model(checkpoint: Mapping[str, Any], kinds: Mapping[str, type[nn.Module]]) -> nn.Module:
    """Build the model that a checkpoint describes by `kind`, `config` and `model`, in eval mode.

    Args:
        checkpoint: the contents of a best.pt or last.pt.
        kinds: the classes that `kind` may mean.

    Raises:
        UserError: the checkpoint is of another kind, or its parts do not fit together.
    """
    kind = checkpoint.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(
            f"the checkpoint holds a model of kind {kind!r:.80}, expected {' or '.join(map(repr, kinds))}. "
            "Use a checkpoint of the right script."
        )
    try:
        config, weights = checkpoint["config"], checkpoint["model"]
        for name, value in config.items():  # layers are built one by one: a made-up number would take forever
            if isinstance(value, int) and ("layers" in name or "blocks" in name) and value > len(weights):
                raise ValueError(f"{name} is {value}, with {len(weights)} weights in all")
        # Built without memory first: a config may describe a larger model than the file holds.
        with torch.device("meta"):
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
            f"the checkpoint does not fit together ({type(error).__name__}: {first_line(error)}). It may "
            "have been altered. Use another one."
        ) from None
    return model.eval()


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless each tensor of a loaded optimiser's state fits its parameter.

    torch's fused kernels do not check sizes and would write beyond the tensor.
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
    """Set a dataclass's fields from a checkpoint's dict.

    Raises:
        KeyError, ValueError: a field is missing, of another type, or a negative count.
    """
    for name, present in vars(position).items():
        value = saved[name]
        kinds = (int, float) if isinstance(present, float) else type(present)
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} is {value!r:.80}")
        setattr(position, name, value)

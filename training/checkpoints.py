"""Checkpoints: plain data, written whole, read without running code."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from training.console import UserError, first_line, in_one_line, is_out_of_memory, warn
from training.files import atomic_write
from training.runs import VERSION, read_log

CHECKPOINT_FORMAT = 1  # raised when a checkpoint's contents change so that older code cannot read them

# ---- checkpoints


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes plain data (tensors, numbers, strings, None, lists, tuples, dicts), all or nothing."""
    record = {"format": CHECKPOINT_FORMAT, "project": VERSION, "torch": str(torch.__version__), **contents}
    atomic_write(path, lambda file: torch.save(record, file))


def try_save_checkpoint(path: str | Path, contents: dict[str, Any]) -> bool:
    """`save_checkpoint`, but a failure (disk full, folder gone) only warns, and the earlier file stays."""
    try:
        save_checkpoint(path, contents)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some failed writes into RuntimeError
        if is_out_of_memory(error):
            raise
        kept = "the one written before is kept" if Path(path).exists() else "there is none before it"
        full = ", as when the disk is full" if isinstance(error, RuntimeError) else ""
        warn(f"could not write {path} ({first_line(error)}{full}); {kept}, training goes on")
        return False
    return True


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint. Nothing in the file can run code; a damaged file is refused, not half used.

    Args:
        path: a file written by `save_checkpoint`.
        device: where its tensors go, whatever device they were saved from.

    Raises:
        UserError: the file is missing, damaged, no checkpoint of this project, or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: it is {'a folder' if path.is_dir() else 'not there'}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd things in the file; what matters is an error
            contents = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # pickle, zip and torch raise almost anything on foreign bytes
        if is_out_of_memory(error):
            raise UserError(
                f"{path} asks for more memory than there is, in a file of {path.stat().st_size:,} bytes "
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
            f"{path} has checkpoint format {in_one_line(contents['format'])}, of project version "
            f"{in_one_line(contents.get('project'))}; this version, {VERSION}, reads format "
            f"{CHECKPOINT_FORMAT}. Use the version of the project that wrote it."
        )
    for tensor in _tensors(contents):
        # A tensor may claim any size over a small storage (stride 0): harmless as it is, a bomb once copied.
        if (
            tensor.layout is not torch.strided
            or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        ):
            raise UserError(
                f"{path} holds a tensor of shape {tuple(tensor.shape)} with less data than its shape claims. "
                "Use another checkpoint."
            )
    return contents


def load_last(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The contents of a run's last.pt, on a device; None for a run that was killed before its first save.

    Raises:
        UserError: as `load_checkpoint`; or there is no last.pt of a run that has come further, by its log:
            begun again, it would mix two runs in one folder.
    """
    path, log = Path(folder) / "last.pt", Path(folder) / "log.jsonl"
    if path.exists():
        return load_checkpoint(path, device)
    for event in read_log(log) if log.exists() else ():
        epoch = event.get("epoch")
        later = isinstance(epoch, (int, float)) and epoch > 1
        if later or event.get("event") in ("test", "final", "interrupt"):
            raise UserError(
                f"{folder} has no last.pt to go on from, though its log tells of work that was saved. "
                "Start a new run without --resume."
            )
    return None


_DOS_FOLDER = 0x10  # attribute of a zip entry


def _check_archive(path: Path) -> None:
    """Raises ValueError or zipfile's errors unless the file is an intact archive as torch.save makes it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores without compression; compressed entries could unfold to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries")
        # torch's reader takes an entry with this bit for a folder and hands out memory that nobody wrote to.
        if any(entry.external_attr & _DOS_FOLDER for entry in entries):
            raise ValueError("folders among the entries")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("entries larger than the file")
        damaged = archive.testzip()  # torch.load itself does not compare the checksums
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} is wrong")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in containers of any depth, each container looked at once: one may hold itself, or be held
    twice at each of many levels, which no walk through all the ways would come to the end of."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def check_layer_counts(config: dict[str, Any], weights: dict[str, Any]) -> None:
    """ValueError for a checkpoint's config with more layers than there are weights, TypeError for no config.

    They are built one by one, and a number made up could take for ever.
    """
    if not (isinstance(config, dict) and isinstance(weights, dict)):
        raise TypeError("config and weights must be dictionaries")
    for name, value in config.items():
        if isinstance(value, int) and ("layers" in name or "blocks" in name) and value > len(weights):
            raise ValueError(f"{name} is {value}, with {len(weights)} weights in all")

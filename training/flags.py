"""Flags that all training scripts share, their value types, and --resume."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.console import UserError, warn


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; appends defaults to the help, but not where they say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


# ---- argparse value types


def _number(kind: type, low: float, high: float, rule: str, low_open: bool = False, high_open: bool = False):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}") from None
        # Written so that NaN, which compares false with everything, is refused.
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        if not (above and below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return parse


_HUGE = 2**31 - 1  # no count in these scripts is sensible above it, and torch's sizes stay in range below it
positive_int = _number(int, 1, _HUGE, "a whole number from 1 to 2147483647")
layer_count = _number(int, 1, 1000, "a whole number from 1 to 1000")  # each is built in a Python loop
non_negative_int = _number(int, 0, _HUGE, "a whole number from 0 to 2147483647")
# A system without room for that many threads ends the process, with no chance to answer.
thread_count = _number(int, 0, 1024, "a whole number from 0 to 1024")
seed_int = _number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")  # numpy's range
finite_float = _number(float, -1e30, 1e30, "a finite number")
positive_float = _number(float, 0, 1e30, "a finite number above 0", low_open=True)
non_negative_float = _number(float, 0, 1e30, "a finite number, 0 or more")
fraction = _number(float, 0, 1, "at least 0 and below 1", high_open=True)  # dropout: 1 would erase everything
probability = _number(float, 0, 1, "above 0 and at most 1", low_open=True)


# ---- flags of every script

# What may differ when a run goes on: where it runs and how much it tells and saves, not what it computes.
RESUME_MAY_CHANGE = frozenset(
    {
        "resume",
        "cuda",
        "log_interval",
        "save_every",
        "threads",
        "runs_folder",
        "no_cuda_graph",
        "accumulate",
        "collective_timeout",
    }
)


def add_run_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the flags that have the same meaning in every training script. Returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=seed_int, default=1111, metavar="N", help="seed of all random numbers")
    group.add_argument(
        "--cuda", action="store_true", help="train on the GPU (all visible ones); without it on the CPU"
    )
    group.add_argument(
        "--threads",
        type=thread_count,
        default=0,
        metavar="N",
        help="CPU threads that torch may use; 0 = its own choice",
    )
    group.add_argument(
        "--log-interval",
        "--log_interval",
        type=positive_int,
        default=100,
        metavar="STEPS",
        help="training steps between two log entries",
    )
    group.add_argument(
        "--name", default=None, help="name of the run's folder (default: script, date and time)"
    )
    group.add_argument("--runs-folder", default="runs", metavar="FOLDER", help="where run folders are made")
    group.add_argument(
        "--save-every",
        type=non_negative_float,
        default=10.0,
        metavar="MINUTES",
        help="save last.pt this often too, besides after each epoch (if the task has any) and at the end; "
        "0 = only then",
    )
    group.add_argument(
        "--resume",
        default=None,
        metavar="RUN_FOLDER",
        help="go on with an earlier run, exactly where its last.pt stands and with its arguments",
    )
    return group


def add_precision_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that trade exactness for speed, or the reverse."""
    group.add_argument(
        "--bf16",
        action="store_true",
        help="train with products in bfloat16; softmax, norms, memory and evaluation stay in float32, and so "
        "do torch's fused recurrent layers on a GPU",
    )
    group.add_argument(
        "--strict-float32",
        action="store_true",
        help="no TF32 in the products on a GPU (they are faster with it, and rounded to 10 bits)",
    )
    group.add_argument(
        "--no-cuda-graph",
        action="store_true",
        help="launch a training step's operations one by one on a GPU, not as one CUDA graph",
    )


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, script: str, may_change: Sequence[str] = ()
) -> argparse.Namespace:
    """Parses the command line; with `--resume RUN_FOLDER` fills in the arguments of that run.

    Args:
        parser: has the flags of `add_run_flags`.
        argv: command line without the program, None for the process's own.
        script: name of the calling script, as recorded in args.json.
        may_change: names, as in the namespace, that may differ too, besides RESUME_MAY_CHANGE.

    Raises:
        UserError: the folder cannot be resumed, or the command line contradicts its arguments.
    """
    plain = parser.parse_args(argv)
    if plain.resume is None:
        return plain
    given = given_arguments(parser, argv)
    folder = Path(plain.resume)
    saved = _saved_arguments(folder, parser, script)
    allowed = RESUME_MAY_CHANGE | set(may_change)
    merged = {name: saved.get(name, default) for name, default in vars(plain).items() if name not in given}
    for name, value in given.items():
        if name not in allowed and value != saved.get(name, parser.get_default(name)):
            flag = flag_of(parser, name)
            raise UserError(
                f"{flag} cannot change when a run is resumed: {folder} was started with "
                f"{saved.get(name, parser.get_default(name))!r}, got {value!r}. Leave {flag} away, "
                "or start a new run without --resume."
            )
        merged[name] = value
    return argparse.Namespace(**merged)


def given_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The arguments that the command line itself gives, by name, without the defaults."""
    absent = object()  # argparse leaves an attribute that is there alone: what still holds this was not given
    start = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {
        name: value for name, value in vars(parser.parse_args(argv, start)).items() if value is not absent
    }


def flag_of(parser: argparse.ArgumentParser, name: str) -> str:
    """The flag, as typed, whose value has this name in the namespace."""
    return next(action.option_strings[0] for action in parser._actions if action.dest == name)


def warn_of_ignored(parser: argparse.ArgumentParser, given: Iterable[str], used: frozenset[str]) -> None:
    """Warns of arguments, by name, that the command line gives to an --evaluate which looks at others."""
    ignored = [flag_of(parser, name) for name in given if name not in used | {"evaluate"}]
    if ignored:
        warn(f"--evaluate ignores {', '.join(ignored)}: the model comes with its run.")


def _saved_arguments(folder: Path, parser: argparse.ArgumentParser, script: str) -> dict[str, Any]:
    """The arguments in a run folder's args.json, each checked as the command line would be."""
    if not folder.is_dir():
        raise UserError(
            f"--resume needs the folder of an earlier run, got {folder}, which is "
            f"{'a file' if folder.exists() else 'not there'}."
        )
    path = folder / "args.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved, started_by = dict(record["arguments"]), str(record["script"])
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a run folder: it has no args.json. "
            "--resume needs a folder made by an earlier run."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Start a new run."
        ) from None
    if started_by != script:
        raise UserError(
            f"{folder} is a run of {started_by}.py, this is {script}.py. Use {started_by}.py for it."
        )
    for action in parser._actions:
        if action.dest in saved and not _could_be_given(action, saved[action.dest]):
            raise UserError(
                f"{path} holds {saved[action.dest]!r} for {action.option_strings[0]}, no valid value. "
                "Was it edited? Put the old value back or start a new run."
            )
    return saved


def _could_be_given(action: argparse.Action, value: Any) -> bool:
    """Whether a flag on the command line could have this value, or has it by default."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    if action.nargs == "+":
        return isinstance(value, list) and len(value) > 0 and all(_is_one(action, item) for item in value)
    return _is_one(action, value)


def _is_one(action: argparse.Action, value: Any) -> bool:
    try:
        parsed = action.type(str(value)) if action.type else str(value)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)

"""Command lines: the parser, types of values, the flags that scripts share, recipes, --resume."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training import runs
from training.console import UserError

# ---- the parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description; omits defaults that mean "off"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == ""
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser of this project's scripts.

    Flags of several words are spelled --like-this and accepted --like_this. A mistake raises UserError.
    """

    def __init__(self, script: str, description: str | None) -> None:
        super().__init__(
            prog=f"{script}.py", description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse, after replacing underscores in the names of flags."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._hyphenated(word) for word in words], namespace)

    def _hyphenated(self, word: str) -> str:
        name, equals, value = word.partition("=")
        known = name.startswith("--") and name.replace("_", "-") in self._option_string_actions
        return name.replace("_", "-") + equals + value if known else word

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}. See {self.prog} --help.")

    def defaults(self) -> dict[str, Any]:
        """Return all flags' defaults, by their names in the namespace."""
        return vars(self.parse_args([]))

    def given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Return the flags that the command line contains, without the defaults, by name."""
        absent = object()  # argparse keeps attributes that exist already
        start = argparse.Namespace(**{action.dest: absent for action in self._actions})
        return {
            name: value for name, value in vars(self.parse_args(argv, start)).items() if value is not absent
        }

    def flag(self, name: str) -> str:
        """Return the flag, as typed, whose value has this name in the namespace."""
        return next(action.option_strings[0] for action in self._actions if action.dest == name)

    def as_typed(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words of a command line that gives these values."""
        words = []
        for name, value in values.items():
            flag = self.flag(name)
            if value is True:
                words.append(flag)
            elif value is False:  # with --no-FLAG if it exists, else by omitting the flag
                no = f"--no-{flag.removeprefix('--')}"
                words += [no] if no in self._option_string_actions else []
            elif isinstance(value, list):
                words += [flag, *map(str, value)]
            elif value is not None:
                words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
        return words


def option(
    group: argparse._ActionsContainer,
    flag: str,
    kind: Callable[[str], Any] | None,
    default: Any,
    metavar: str | None,
    text: str,
    **more: Any,
) -> None:
    """Add a flag that takes a value."""
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text, **more)


def switch(group: argparse._ActionsContainer, flag: str, text: str) -> None:
    """Add a flag without a value."""
    group.add_argument(flag, action="store_true", help=text)


# ---- types of values


def _number(kind: type, rule: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")

    return parse


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number from low to high."""
    return _number(int, f"a whole number from {low} to {high}", lambda value: low <= value <= high)


_HUGE = 2**31 - 1  # torch's sizes stay in range below it
positive_int = whole_number(1, _HUGE)
layer_count = whole_number(1, 1000)  # each is built in a Python loop
non_negative_int = whole_number(0, _HUGE)
thread_count = whole_number(0, 1024)  # more could end the process
seed_int = whole_number(0, 2**32 - 1)
# Comparisons with NaN are false.
finite_float = _number(float, "a finite number", lambda value: abs(value) <= 1e30)
positive_float = _number(float, "a finite number above 0", lambda value: 0 < value <= 1e30)
non_negative_float = _number(float, "a finite number, 0 or more", lambda value: 0 <= value <= 1e30)
fraction = _number(float, "at least 0 and below 1", lambda value: 0 <= value < 1)
probability = _number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)


# ---- flags of every training script

# Flags that may change when a run is resumed: where it runs and what it prints, not what it computes.
RESUME_MAY_CHANGE = frozenset({
    "resume", "cuda", "save_every", "threads", "runs_folder", "no_cuda_graph", "accumulate",
})  # fmt: skip


def add_recipe_flag(parser: argparse.ArgumentParser, recipes: Iterable[str]) -> None:
    """Add --recipe, which names a set of flags."""
    parser.add_argument(
        "--recipe", choices=sorted(recipes), help="set several flags; flags on the command line override it"
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that have the same meaning in every training script."""
    # fmt: off
    run = parser.add_argument_group("run")
    option(run, "--seed", seed_int, 1111, "N", "seed of all random numbers")
    switch(run, "--cuda", "train on all visible GPUs (default: on the CPU)")
    option(run, "--threads", thread_count, 0, "N", "CPU threads; 0 = all available cores, with --cuda one")
    option(run, "--log-interval", positive_int, 100, "STEPS", "training steps between two log entries")
    option(run, "--name", None, None, None, "name of the run's folder (default: script, date and time)")
    option(run, "--runs-folder", None, "runs", "FOLDER", "folder in which run folders are created")
    option(run, "--save-every", non_negative_float, 10.0, "MINUTES",
           "interval between saves of last.pt, in addition to those after each epoch and at the end; "
           "0 = only those")
    option(run, "--resume", None, None, "RUN_FOLDER",
           "continue an earlier run from its last.pt, with its arguments")
    switch(run, "--bf16",
           "train with matrix products in bfloat16; softmax, norms, memory and evaluation stay in float32; "
           "so do torch's fused recurrent layers on a GPU, and on a CPU without a bfloat16 LSTM")
    switch(run, "--strict-float32",
           "no TF32 in matrix products on a GPU (TF32 is faster and rounds to 10 bits)")
    switch(run, "--no-cuda-graph",
           "launch a training step's operations one by one on a GPU, not as a CUDA graph")
    parts = parser.add_argument_group("large batches, and several processes (torchrun)")
    option(parts, "--accumulate", positive_int, 1, "N",
           "split the batch of each process into N micro-batches and sum their gradients: the same step in "
           "less memory")
    # fmt: on


def add_step_flags(group: argparse._ArgumentGroup, steps: int, batch_size: int, lr: float) -> None:
    """Add the flags of training by steps on fresh examples, with these defaults."""
    # fmt: off
    option(group, "--steps", positive_int, steps, "N", "training steps; can be changed with --resume")
    option(group, "--batch-size", positive_int, batch_size, "N", "examples per step, each used once")
    option(group, "--lr", positive_float, lr, "X", "peak learning rate")
    option(group, "--optimizer", None, "adam", None,
           "adam, or muon: Muon at three times --lr for weight matrices, Adam for the rest",
           choices=("adam", "muon"))
    option(group, "--warmup", non_negative_int, 0, "STEPS", "steps in which the learning rate grows from 0")
    option(group, "--schedule", None, "constant", None,
           "learning rate after warm-up: constant, or along a cosine to 0 at --steps",
           choices=("constant", "cosine"))
    option(group, "--clip", non_negative_float, 0.1, "NORM",
           "clip the gradient to this L2 norm; 0 = no clipping")
    option(group, "--evaluate", None, None, "RUN_FOLDER",
           "only measure the best.pt of a run on fresh examples")
    # fmt: on


# ---- from the command line to arguments


def parse(
    parser: Parser,
    script: str,
    given: dict[str, Any],
    recipes: Mapping[str, Mapping[str, Any]],
    may_change: frozenset[str],
) -> argparse.Namespace:
    """Return a script's arguments: its defaults, then a recipe or the run to resume, then the command line.

    Each of these overrides those before it.

    Args:
        parser: has the flags of `add_run_flags`.
        script: name of the script, as in args.json.
        given: the flags that the command line contains, by name.
        recipes: named sets of flags, for --recipe.
        may_change: flags that may differ from those of the run to resume, besides RESUME_MAY_CHANGE.

    Raises:
        UserError: the folder cannot be resumed with these flags.
    """
    if given.get("resume") is not None:
        saved = runs.saved_arguments(Path(given["resume"]), script)
        # A run of another version may lack flags, which then have their defaults, or have more.
        base = {name: saved.get(name, default) for name, default in parser.defaults().items()}
        for name, value in given.items():
            if name not in RESUME_MAY_CHANGE | may_change and value != base[name]:
                flag = parser.flag(name)
                raise UserError(
                    f"{flag} cannot change when a run is resumed: {given['resume']} was started with "
                    f"{base[name]!r}, got {value!r}. Omit {flag}, or start a new run without --resume."
                )
    else:
        recipe = recipes[given["recipe"]] if given.get("recipe") else {}
        base = parser.defaults() | recipe
    return argparse.Namespace(**{**base, **given})


def describe_recipe(parser: Parser, args: argparse.Namespace, recipe: Mapping[str, Any]) -> str:
    """Return the words of a command line that sets the flags of a recipe to their values in `args`."""
    return shlex.join(parser.as_typed({name: getattr(args, name) for name in recipe}))

"""The main program of every training script: train, resume, or evaluate, as the command line says."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoints, console, devices, distributed, flags, runs
from training.console import UserError, say
from training.distributed import Processes
from training.trainer import Trainer

import torch


@dataclass(frozen=True)
class Script:
    """A training script.

    Attributes:
        name: without '.py'.
        parser: its command line.
        build: makes the trainer from arguments, device and processes.
        evaluate: what --evaluate does, if there is this flag, from the script, arguments and the flags that
            the command line contains; returns the exit status.
        recipes: what --recipe may name.
        resume_may_change: flags that may change when a run is resumed, besides those of every script.
    """

    name: str
    parser: flags.Parser
    build: Callable[[argparse.Namespace, torch.device, Processes], Trainer]
    evaluate: Callable[[Script, argparse.Namespace, dict[str, Any]], int] | None = None
    recipes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    resume_may_change: frozenset[str] = frozenset()


def open_best(
    script: Script, args: argparse.Namespace
) -> tuple[argparse.Namespace, torch.device, dict[str, Any]]:
    """Return what --evaluate needs: arguments and best.pt of the run, and the device of this command line.

    Raises:
        UserError: there is no such run, or it has no best.pt.
    """
    folder = Path(args.evaluate)
    of_run = flags.parse(script.parser, script.name, {"resume": str(folder)}, {}, script.resume_may_change)
    device = devices.choose_device(args.cuda, of_run.strict_float32)
    devices.choose_threads(args.threads, device)
    return of_run, device, checkpoints.load_checkpoint(folder / "best.pt", device)


def run(script: Script, argv: Sequence[str] | None) -> int:
    """Train, or with --evaluate only measure, as the command line says.

    A run that fails before its first report and checkpoint removes its folder.

    Args:
        script: what to run.
        argv: the command line; None for that of the process.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.
    """
    given = script.parser.given(argv)
    args = flags.parse(script.parser, script.name, given, script.recipes, script.resume_may_change)
    if given.get("evaluate") is not None:
        return script.evaluate(script, args, given)
    device, processes = distributed.start(args)
    torch.manual_seed(args.seed)
    trainer = script.build(args, device, processes)
    if args.resume is None and given.get("recipe"):
        recipe = flags.describe_recipe(script.parser, args, script.recipes[args.recipe])
        print(f"recipe {args.recipe}: {recipe}")
    processes.seed_apart(args.seed)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"model: {type(trainer.model).__name__}, {parameters:,} parameters")
    if args.resume is None:
        facts = {**processes.facts, "parameters": parameters, **trainer.task.facts()}
        record = runs.record_of(script.name, args, argv, **facts)
        folder = processes.broadcast(
            lambda: runs.create_run_folder(args.runs_folder, args.name, script.name, record)
        )
        print(f"run folder: {folder}", flush=True)
    else:
        folder = trainer.folder = Path(args.resume)
        resume(trainer, argv)
    try:
        finished = trainer.train(folder)
    except BaseException:
        # Any exception, KeyboardInterrupt included.
        begun = trainer.position.step > trainer.position.interval_steps or (folder / "last.pt").exists()
        if args.resume is None and processes.is_main and not begun:
            runs.discard_run_folder(folder)
        raise
    if finished:
        trainer.task.finish(trainer)
        return 0
    position = trainer.position
    say(f"stopped by {trainer.interrupts.requested} at step {position.step:,}")
    if position.best_step:
        say(f"best {trainer.task.score_name.replace('_', ' ')} so far: {position.best_score:.4g}")
        say(f"To measure the best model: {console.command(script.name, '--evaluate', folder)}")
    say(f"To resume: {console.command(script.name, '--resume', folder, launcher=processes.launcher)}")
    return trainer.interrupts.exit_status


def resume(trainer: Trainer, argv: Sequence[str] | None) -> None:
    """Restore a run from its last.pt and record it in args.json and log.jsonl."""
    args, processes, folder = trainer.args, trainer.processes, trainer.folder
    where, last = trainer.device if processes.alone else "cpu", folder / "last.pt"
    if not processes.broadcast(last.is_file):
        raise UserError(f"there is no {last}: the run ended before its first save. Start a new run.")
    trainer.restore(processes.broadcast(lambda: checkpoints.load_checkpoint(last, where)))
    trainer.restore_best()
    step = trainer.position.step
    if processes.is_main:
        # args.json of a finished run keeps its arguments: its --epochs may be larger than the present one.
        runs.note_resume(folder, None if trainer.task.finished(step) else args, argv, **processes.facts)
        runs.RunLog(folder / "log.jsonl").write("resume", **trainer.task.log_fields(), step=step)
    print(f"run folder: {folder}, resumed at step {step:,}", flush=True)
    if trainer.task.finished(step):
        print("nothing to train: the run is finished.")

"""The training engine behind all training scripts.

A `Task` supplies the model, its batches, the loss of a step, evaluation, and what a checkpoint records of the
model. Everything else exists once, here: the loop, the optimizer's step, learning rates, CUDA graphs, several
GPUs and processes, the log, checkpoints, resuming and signals. training/script.py has the main program.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training import checkpoints, console, devices, runs
from training.console import UserError, warn
from training.cuda_graphs import capture_together
from training.distributed import FlatGradients, Processes
from training.muon import MuonWithAdam
from training.schedule import LearningRate

import torch
from torch import Tensor, nn


@dataclass
class Position:
    """The progress of a run, without weights and random generators."""

    best_score: float = -math.inf  # of best.pt, in the task's units
    best_step: int = 0  # 0: no best.pt yet
    step: int = 0  # optimizer steps since the start of the run
    interval_steps: int = 0  # steps since the last report
    interval_count: int = 0  # targets in these steps
    seconds: float = 0.0  # of work, without interruptions


@dataclass
class NoPosition:
    """The position of a task that keeps none of its own."""


class Interrupted(Exception):
    """Raised between steps after a stop signal."""


class Task:
    """A model and what it is trained on: all that the engine uses of a task.

    Attributes:
        model: the model in training, on its device; `config` has its constructor's arguments as plain data.
        kind: what checkpoints call the model.
        total_steps: steps of the full run.
        full_count: targets of a full batch; only full batches are captured as CUDA graphs.
        can_be_captured: whether a step never synchronizes with the GPU.
        sums: names of the sums that `losses` returns, plural nouns.
        state: the recurrent state of this process's examples, carried from step to step and changed in place,
            (examples, ...), or None.
        average: a `WeightAverage`, or None.
        position: a dataclass with the task's part of the position.
        score_name: the name of the score in best.pt.
        higher_is_better: whether a higher score is better.
        lower: what to lower when training diverges; completes "Start a new run with ...".

    Subclasses must define the attributes without a value here, and `next_batch`, `losses` and `report`. The
    other methods have defaults for a run of `total_steps` steps.
    """

    model: nn.Module
    kind: str
    total_steps: int
    full_count: int
    can_be_captured = True
    sums: tuple[str, ...]
    state: Tensor | None = None
    average: Any = None
    position: Any = NoPosition()
    score_name: str
    higher_is_better = False
    lower = "a lower --lr"

    def next_batch(self) -> tuple[tuple[Tensor, ...], int]:
        """Return this process's inputs (examples, ...) and the number of targets of the full batch.

        The number of examples must be a multiple of `args.accumulate`.
        """
        raise NotImplementedError

    def losses(
        self, model: nn.Module, state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the summed loss to minimize, (), the sums, (len(self.sums),), and the state afterward."""
        raise NotImplementedError

    def report(self, trainer: Trainer, totals: dict[str, float], elapsed: float) -> tuple[dict, str, str]:
        """Return the fields of the "train" event, a short text for the bar and a longer line.

        Args:
            trainer: `position.interval_count` has the number of targets since the last report.
            totals: the sums since the last report, over all processes.
            elapsed: seconds of training since the last report of this session.
        """
        raise NotImplementedError

    def after_report(self, trainer: Trainer) -> None:
        """Act on a report that was just logged; `trainer.offer_best` keeps the best model."""

    def finish(self, trainer: Trainer) -> None:
        """Measure the best model, print and log the result."""

    # ---- the order of a run: spans of steps, each with its own progress bar

    def finished(self, step: int) -> bool:
        """Return whether the run is complete after so many steps."""
        return step >= self.total_steps

    def span(self, step: int) -> tuple[str, int, int]:
        """Return label, number of steps and steps already taken of the next progress bar."""
        return "steps", self.total_steps, step

    def span_is_over(self, step: int) -> bool:
        """Return whether the progress bar's steps are done; a report and `end_span` follow."""
        return self.finished(step)

    def end_span(self, trainer: Trainer) -> None:
        """Act on the end of a progress bar, such as an epoch."""

    # ---- what is recorded

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return what `checkpoints.rebuild_model` requires."""
        return {"kind": self.kind, "config": model.config, "model": model.state_dict()}

    def facts(self) -> dict[str, Any]:
        """Return further entries of args.json."""
        return {}

    def log_fields(self) -> dict[str, Any]:
        """Return what every event records of the task's position."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the task's further state for last.pt, as plain data."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore what `state_dict` returned, after `step` steps; the position is restored already.

        Raises:
            UserError: the run cannot be resumed here.
        """


class Trainer:
    """A task in training: the loop, its log and its checkpoints.

    Args:
        task: what to train.
        args: the flags of `flags.add_run_flags`, and lr, warmup, schedule, clip.
        device: where to compute.
        processes: the processes that divide the batch; each splits its shard into `args.accumulate`
            micro-batches. Each loss is divided by the number of targets of the full batch, so that the
            gradients of all processes and micro-batches add up to that of the mean.
        optimizer: makes the optimizer from the keyword arguments lr, fused and capturable.
    """

    def __init__(
        self,
        task: Task,
        args: argparse.Namespace,
        device: torch.device,
        processes: Processes,
        optimizer: Callable[..., torch.optim.Optimizer],
    ) -> None:
        self.task, self.args, self.device, self.processes = task, args, device, processes
        self.model = task.model
        processes.check_batch("--batch-size", args.batch_size, args.accumulate)
        processes.share_weights(self.model)
        self.shard, alone = processes.shard(args.batch_size), processes.alone
        rows = (self.shard.stop - self.shard.start) // args.accumulate
        self.replicas = devices.wrap_data_parallel(self.model, device, rows) if alone else self.model
        self.gradients = None if alone and args.accumulate == 1 else FlatGradients(self.model.parameters())
        self.optimizer = optimizer(lr=args.lr, fused=True, capturable=device.type == "cuda")
        self.lr = LearningRate(args.lr, args.schedule, args.warmup, task.total_steps, self.optimizer, device)
        # Sums since the last report, the last one of gradient norms. They stay on the device: reading them
        # makes the host wait for the GPU.
        self.sums = torch.zeros(len(task.sums) + 1, dtype=torch.float64, device=device)
        # The parts of a step. Processes exchange gradients between the two, outside the CUDA graphs.
        self.parts = self.captured_parts = [self.add_gradients, self.update]
        # Neither Muon nor replicas, which run in threads, can be captured.
        captures = task.can_be_captured and not isinstance(self.optimizer, MuonWithAdam)
        if captures and not args.no_cuda_graph and self.replicas is self.model:
            parts = [self.whole_step] if alone and device.type == "cuda" else self.parts
            self.captured_parts = capture_together(parts, device, warn)
        self.worst_score = -math.inf if task.higher_is_better else math.inf
        self.position = Position(self.worst_score)
        self.interrupts = console.Interrupts()
        self.folder = Path()
        self.log: runs.RunLog | None = None
        self.count = 0  # targets of the present batch
        self.clock = time.perf_counter()
        self.start_interval()

    # ---- one step

    def step(self) -> None:
        """Take one optimizer step on the next batch."""
        inputs, self.count = self.task.next_batch()
        self.lr.set(self.position.step + 1)
        first, *last = self.captured_parts if self.count == self.task.full_count else self.parts
        first(*inputs)
        if not self.processes.alone:
            self.processes.all_reduce(self.gradients.flat)
        for part in last:
            part()
        if self.task.average is not None:
            self.task.average.update(self.model)
        self.position.step += 1
        self.position.interval_steps += 1
        self.position.interval_count += self.count
        self.timed_steps += 1
        self.timed_count += self.count

    def whole_step(self, *inputs: Tensor) -> None:
        """Compute the gradient and update the weights, without waiting for the device."""
        self.add_gradients(*inputs)
        self.update()

    def add_gradients(self, *inputs: Tensor) -> None:
        """Compute this process's part of the gradient, one micro-batch at a time."""
        if self.gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.gradients.flat.zero_()
        state, size = self.task.state, len(inputs[0]) // self.args.accumulate
        for start in range(0, len(inputs[0]), size):
            rows = slice(start, start + size)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                objective, sums, after = self.task.losses(
                    self.replicas, None if state is None else state[rows], *(x[rows] for x in inputs)
                )
            (objective / self.count).backward()
            if state is not None:
                state[rows].copy_(after.detach())  # keep the values, cut the history
            self.sums[:-1] += sums.detach()

    def update(self) -> None:
        """Clip the gradient and take the optimizer's step."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        self.optimizer.step()
        self.sums[-1] += norm

    # ---- the loop

    def train(self, folder: Path) -> bool:
        """Train until the task is finished, and write to the run folder.

        Returns:
            True if the task is finished, False if the run was stopped; last.pt has been written.

        Raises:
            UserError: the loss is no longer finite; the checkpoints are from before.
        """
        self.folder = folder
        self.log = runs.RunLog(folder / "log.jsonl" if self.processes.is_main else os.devnull)
        if self.device.type == "cpu":
            devices.keep_freed_memory()
        saving = console.Alarm(self.args.save_every)
        task, self.clock = self.task, time.perf_counter()
        self.start_interval()
        with self.interrupts:
            try:
                while not task.finished(self.position.step):
                    self.model.train()
                    label, steps, done = task.span(self.position.step)
                    with console.Progress(steps, label, done) as progress:
                        while not task.span_is_over(self.position.step):
                            self.step()
                            self.after_step(progress, saving)
                    task.end_span(self)
                    self.save_last()
                    self.start_interval()
            except Interrupted:
                self.save_last()
                return task.finished(self.position.step)
        return True

    def after_step(self, progress: console.Progress, saving: console.Alarm) -> None:
        """Report, save and stop when it is time to."""
        progress.advance()
        step = self.position.step
        if step % self.args.log_interval == 0 or self.task.span_is_over(step):
            self.report(progress)
        stop, save = self.processes.agree(self.interrupts, saving.due())
        if save:
            self.save_last()
        if stop:
            raise Interrupted

    def report(self, progress: console.Progress) -> None:
        """Read the sums and the clock; log a "train" event and print a line."""
        totals = self.read_sums()
        self.update_clock()
        fields, short, line = self.task.report(self, totals, max(self.clock - self.interval_clock, 1e-9))
        self.write("train", **fields, grad_norm=totals["gradient norms"] / self.position.interval_steps)
        progress.report(short, line)
        self.position.interval_steps = self.position.interval_count = 0
        self.sums.zero_()
        self.task.after_report(self)
        self.start_interval()

    def read_sums(self) -> dict[str, float]:
        """Return the sums since the last report, over all processes, all of which must call it.

        Raises:
            UserError: a sum is not finite.
        """
        losses = self.processes.all_reduce(self.sums[:-1].clone()).tolist()
        norms = self.sums[-1].item()  # of the full gradient, the same in all processes
        totals = {**dict(zip(self.task.sums, losses, strict=True)), "gradient norms": norms}
        for name, value in totals.items():
            if not math.isfinite(value):
                self.diverged(f"sum of the {name} since the last report is {value}")
        return totals

    def diverged(self, what: str) -> None:
        """Raise the UserError of a run whose numbers are no longer finite."""
        raise UserError(
            f"training has diverged: the {what}, at step {self.position.step:,}. Start a "
            f"new run with {self.task.lower}."
        )

    def start_interval(self) -> None:
        """Start another measurement of the speed."""
        self.interval_clock = time.perf_counter()
        self.timed_steps = self.timed_count = 0

    def update_clock(self) -> None:
        """Add the time since the last call to the run's seconds."""
        now = time.perf_counter()
        self.position.seconds += now - self.clock
        self.clock = now

    def write(self, event: str, **fields: Any) -> None:
        """Log an event with the present position."""
        where = {**self.task.log_fields(), "step": self.position.step, "lr": self.lr.current}
        self.log.write(event, **where, **fields, seconds=round(self.position.seconds, 3))

    # ---- checkpoints

    def save_last(self) -> None:
        """Write last.pt: everything that the next step depends on, from all processes.

        Raises:
            UserError: training has diverged; the previous last.pt is kept.
        """
        totals = self.read_sums()
        self.update_clock()
        state = self.task.state
        if state is not None and not self.processes.alone:
            state = state.cpu()
        parts = self.processes.gather((state, devices.random_states(self.device)))
        if not self.processes.is_main:
            return
        states, random = zip(*parts, strict=True)
        average = self.task.average
        checkpoints.try_save_checkpoint(
            self.folder / "last.pt",
            {
                **self.task.describe(self.model),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.lr.state_dict(),
                "average": None if average is None else average.state_dict(),
                "position": asdict(self.position),
                "task_position": asdict(self.task.position),
                "sums": torch.tensor(list(totals.values()), dtype=torch.float64),
                "state": None if state is None else torch.cat(states),
                "random": list(random),  # by rank
                "task": self.task.state_dict(),
                "args": vars(self.args),
            },
        )

    def offer_best(self, score: float, model: nn.Module) -> bool:
        """Write best.pt if the score is the best so far; return whether it was written.

        All processes must call this. The main process's score counts: others may round differently.

        Args:
            score: in the task's units.
            model: the model that has reached it: the one in training, or an average of it.
        """
        best = self.position.best_score

        def save_if_better() -> float | None:
            if not (score > best if self.task.higher_is_better else score < best):
                return None
            contents = {
                **self.task.describe(model),
                "args": vars(self.args),
                "scores": {**self.task.log_fields(), "step": self.position.step, self.task.score_name: score},
            }
            return score if checkpoints.try_save_checkpoint(self.folder / "best.pt", contents) else None

        saved = self.processes.broadcast(save_if_better)
        if saved is not None:
            self.position.best_score, self.position.best_step = saved, self.position.step
        return saved is not None

    def load_best(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the contents of best.pt."""
        return checkpoints.load_checkpoint(self.folder / "best.pt", device)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Restore everything from a last.pt.

        Raises:
            UserError: the checkpoint does not fit the run.
        """
        try:
            self.position = Position(**checkpoint["position"])
            self.task.position = type(self.task.position)(**checkpoint["task_position"])
            step = self.position.step
            self.task.load_state_dict(checkpoint["task"], step)
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.lr.load_state_dict(checkpoint["schedule"], step)
            if self.task.average is not None:
                self.task.average.load_state_dict(checkpoint["average"])
            # The main process continues with the sums of all; the norms are the same for all.
            self.sums.copy_(checkpoint["sums"])
            self.sums[:-1] *= self.processes.is_main
            if self.task.state is not None:
                self.task.state.copy_(checkpoint["state"][self.shard])
            self.processes.restore_random_states(checkpoint["random"], self.device, self.args.seed, step)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if console.is_out_of_memory(error):
                raise
            raise UserError(
                f"last.pt does not fit this run ({type(error).__name__}: {console.first_line(error)}). It or "
                "args.json may have been altered, or written by another version. Start a new run."
            ) from None

    def restore_best(self) -> None:
        """Set the score to beat to that of best.pt, which a killed run may have written after last.pt."""
        best = self.folder / "best.pt"
        scores = self.processes.broadcast(lambda: self.load_best()["scores"] if best.is_file() else None)
        if scores is None:
            self.position.best_score, self.position.best_step = self.worst_score, 0
        else:
            self.position.best_score, self.position.best_step = scores[self.task.score_name], scores["step"]

"""Train a relational memory core, or an LSTM, on the paper's task "Nth farthest" (arXiv:1806.01822).

A sequence shows labelled vectors and asks which one is the n-th farthest from the vector labelled m. The
defaults are the paper's settings: 8 vectors of 16 dimensions, Adam at 1e-4, batch 1600. Chance is 1/8; a
model that has learned only that the nearest vector is m itself scores 2/8, and stays there for long; the
paper's core ends at 91 %.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nth_farthest import (
    MODELS,
    NthFarthestModel,
    accuracy_by_rank,
    is_correct,
    loss_and_correct,
    make_batch,
    question_of,
)
from training import checkpoints, console, devices, distributed, flags, runs, schedule
from training.console import UserError, say
from training.core_flags import add_core_flags, core_arguments
from training.cuda_graphs import capture_together
from training.distributed import ALONE, FlatGradients, Processes

SCRIPT = "train_nth_farthest"
KIND = "nth_farthest"

# Seeds of the two test sets, the same for every run, so that their scores compare. The first is looked at
# during training and chooses best.pt; the second, four times as large, is for the final figures, which are
# then free of that choice.
TEST_SEED, FINAL_TEST_SEED = 91_000_001, 91_000_002
FINAL_TEST_FACTOR = 4

LOWER_MEMORY = "--batch-size (or raise --accumulate), --test-examples or the sizes of the model"
HOLD = 3  # evaluations in a row that must reach --target-accuracy


# ---- flags


def build_parser() -> argparse.ArgumentParser:
    """All flags of the script."""
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py", description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False
    )
    task = parser.add_argument_group("task")
    task.add_argument(
        "--num-vectors",
        type=_sequence_length,
        default=8,
        metavar="K",
        help="vectors in a sequence, and labels",
    )
    task.add_argument(
        "--num-dims", type=flags.positive_int, default=16, metavar="D", help="dimensions of a vector"
    )
    task.add_argument(
        "--test-examples",
        type=flags.positive_int,
        default=3200,
        metavar="N",
        help="fixed examples on which the test accuracy is measured",
    )

    easier = parser.add_argument_group(
        "curriculum", "Easier tasks to train on first. The test accuracy is the full task's at any time."
    )
    easier.add_argument(
        "--curriculum-vectors",
        type=_sequence_length,
        default=None,
        nargs="+",
        metavar="N",
        help="vectors shown in each stage before the full task: the last N steps of a sequence bring one",
    )
    easier.add_argument(
        "--curriculum-dims",
        type=flags.positive_int,
        default=None,
        nargs="+",
        metavar="N",
        help="dimensions used in each stage before the full task: the other coordinates are 0",
    )
    easier.add_argument(
        "--curriculum-accuracy",
        type=flags.probability,
        default=0.9,
        metavar="P",
        help="training accuracy over a log interval that ends a stage",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=MODELS, default="rmc", help="relational memory core, or LSTM baseline"
    )
    add_core_flags(model, memslots=8, headsize=32, numheads=8, attmlplayers=2, keysize=0)
    model.add_argument(
        "--total-units",
        type=flags.positive_int,
        default=None,
        metavar="N",
        help="memslots x numheads x headsize; sets the head size, in place of --headsize",
    )
    model.add_argument(
        "--nhid", type=flags.positive_int, default=512, metavar="N", help="hidden units of the LSTM"
    )
    model.add_argument(
        "--outputlayers",
        type=flags.layer_count,
        default=4,
        metavar="N",
        help="ReLU layers between the core and the logits",
    )
    model.add_argument("--outputunits", type=flags.positive_int, default=256, metavar="N", help="their width")
    model.add_argument(
        "--input-scale",
        type=flags.positive_float,
        default=1.0,
        metavar="X",
        help="factor on the vectors' coordinates; 1 = the paper's protocol",
    )
    model.add_argument(
        "--memory-scale",
        type=flags.positive_float,
        default=1.0,
        metavar="X",
        help="factor on the identity that the memory starts as; 1 = the paper's protocol",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps",
        type=flags.positive_int,
        default=500_000,
        metavar="N",
        help="training steps; with --resume it may be changed",
    )
    training.add_argument(
        "--batch-size",
        "--batch_size",
        type=flags.positive_int,
        default=1600,
        metavar="N",
        help="examples per step, drawn afresh each time",
    )
    training.add_argument("--lr", type=flags.positive_float, default=1e-4, help="Adam's learning rate")
    training.add_argument(
        "--warmup",
        type=flags.non_negative_int,
        default=0,
        metavar="STEPS",
        help="steps in which the learning rate grows linearly from 0 to --lr",
    )
    training.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="the learning rate after the warm-up: as it is, or down to 0 at --steps along a cosine",
    )
    training.add_argument(
        "--clip",
        type=flags.non_negative_float,
        default=0.1,
        metavar="NORM",
        help="largest L2 norm of the gradient; 0 = no clipping",
    )
    training.add_argument(
        "--target-accuracy",
        type=flags.probability,
        default=1.0,
        metavar="P",
        help=f"stop early when the test accuracy has reached this {HOLD} times in a row",
    )
    training.add_argument(
        "--stop-after",
        type=flags.non_negative_float,
        default=0.0,
        metavar="MINUTES",
        help="stop this session (not the run: --resume goes on) after this time; 0 = off",
    )
    training.add_argument(
        "--evaluate",
        default=None,
        metavar="RUN_FOLDER",
        help="train nothing: accuracy by n and picture of the attention of a run's best.pt, "
        "in that run's precision",
    )
    distributed.add_flags(parser)
    flags.add_precision_flags(flags.add_run_flags(parser))
    return parser


# What --resume may change, besides what runs.py lists: when to stop or to go on to the next stage, and how
# the GPU is told.
RESUME_MAY_CHANGE = (
    "steps",
    "target_accuracy",
    "curriculum_accuracy",
    "stop_after",
    "no_cuda_graph",
    "evaluate",
)


def _sequence_length(text: str) -> int:
    value = flags.positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(
            f"must be 2 or more, as there is nothing to compare otherwise, got {value}"
        )
    return value


def build_model(args: argparse.Namespace, head_size_given: bool = False) -> NthFarthestModel:
    """The model that the flags describe.

    Raises:
        UserError: --total-units does not fit the other sizes.
    """
    head_size = args.headsize
    if args.total_units is not None:
        rows = args.memslots * args.numheads
        if head_size_given:
            raise UserError(
                "--total-units and --headsize exclude each other: the one follows from the other."
            )
        if args.total_units % rows:
            raise UserError(
                f"--total-units must be a multiple of --memslots x --numheads = {rows}, "
                f"got {args.total_units}. Try {max(1, round(args.total_units / rows)) * rows}."
            )
        head_size = args.total_units // rows
    return NthFarthestModel(
        **core_arguments(args) | {"head_size": head_size},
        num_vectors=args.num_vectors,
        num_dims=args.num_dims,
        model=args.model,
        hidden_size=args.nhid,
        head_layers=args.outputlayers,
        head_units=args.outputunits,
        input_scale=args.input_scale,
        memory_scale=args.memory_scale,
    )


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step, the first being 1.

    It depends on nothing but the step, so a resumed run has nothing to restore. A schedule that waits for the
    loss to improve would be wrong here: on the plateau the loss stands still although all is well.
    """
    return schedule.scheduled_lr(args.lr, step, args.steps, args.warmup, args.schedule == "cosine")


def curriculum(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Vectors and dimensions shown in each stage of the training; the last stage is the full task.

    Raises:
        UserError: the stages of the two flags do not go together, or one is larger than the full task.
    """
    full = (args.num_vectors, args.num_dims)
    vectors, dims = args.curriculum_vectors, args.curriculum_dims
    if vectors is None and dims is None:
        return [full]
    vectors = vectors or [args.num_vectors] * len(dims)
    dims = dims or [args.num_dims] * len(vectors)
    if len(vectors) != len(dims):
        raise UserError(
            "--curriculum-vectors and --curriculum-dims need one number each per stage, got "
            f"{len(vectors)} and {len(dims)} numbers."
        )
    for name, numbers, most in (("vectors", vectors, args.num_vectors), ("dims", dims, args.num_dims)):
        if max(numbers) > most:
            raise UserError(
                f"--curriculum-{name} must not exceed --num-{name}, which is {most}, got {max(numbers)}."
            )
    return [*zip(vectors, dims, strict=True), full]


# ---- training


@dataclass
class Position:
    """Where a run stands, beyond the tensors."""

    step: int = 0
    interval_steps: int = 0  # since the last report
    best_accuracy: float = -1.0  # on the test set
    best_step: int = 0
    times_on_target: int = 0  # reports in a row that have reached the target accuracy
    stage: int = 0  # of the curriculum
    seconds: float = 0.0  # of work, interruptions not counted


class Trainer:
    """A model in training: the loop, its log and its checkpoints.

    Args:
        model: on `device`.
        args: the flags of `build_parser`.
        device: where to compute.
        processes: among which the batch's examples are dealt out; a process's share is cut into
            `args.accumulate` pieces.
    """

    def __init__(
        self,
        model: NthFarthestModel,
        args: argparse.Namespace,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.args, self.device, self.processes = model, args, device, processes
        processes.check_batch("--batch-size", args.batch_size, args.accumulate)
        processes.share_weights(model)
        mine = processes.share(args.batch_size)
        rows = (mine.stop - mine.start) // args.accumulate
        self.pieces = [slice(start, start + rows) for start in range(mine.start, mine.stop, rows)]
        self.replicas = devices.wrap_data_parallel(model, device, rows) if processes.alone else model
        whole = processes.alone and args.accumulate == 1
        self.gradients = None if whole else FlatGradients(model.parameters())
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.lr = torch.zeros((), device=device)  # a tensor: a captured step reads it anew at each replay
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=self.lr, fused=True, capturable=device.type == "cuda"
        )
        # Sums of losses, right answers and gradient norms since the last report. They stay on the device: to
        # read them the host has to wait for the GPU.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        captured = functools.partial(
            capture_together,
            device=device,
            enabled=not args.no_cuda_graph and self.replicas is model,
            generators=[self.generator],
            on_failure=self.without_graph,
            beside_threads=not processes.alone,
        )
        self.stages = curriculum(args)
        # Without a curriculum the examples are drawn as they always were.
        self.shown = torch.tensor(self.stages[0], device=device) if len(self.stages) > 1 else None
        # As one graph, or as two, with the exchange between processes outside.
        self.parts = (self.add_gradients, self.update)
        if processes.alone:
            (self.step,) = captured([self.train_step])
        else:
            self.parts = captured(self.parts)
            self.step = self.train_step
        self.test_set = fixed_test_set(args, TEST_SEED, args.test_examples, device)
        self.at = Position()
        self.interrupts = console.Interrupts()

    def without_graph(self, reason: str) -> None:
        """Tells that steps could not be captured: the run is then slower than its arguments say."""
        console.warn(reason)
        self.log.write("not_captured", step=self.at.step, reason=reason)

    def train_step(self) -> None:
        """One optimiser step on a fresh batch. Nothing in it waits for the device, as CUDA graphs want it."""
        add_gradients, update = self.parts
        add_gradients()
        if self.gradients is not None:
            self.processes.add_up(self.gradients.flat)
        update()

    def add_gradients(self) -> None:
        """Draws a batch and makes the gradient of this process's part of it.

        All processes draw the whole batch, hence the same one, and each takes its own examples: N processes
        train on what one would. The price is that drawing, a small part of a step, gets no faster.
        """
        args = self.args
        inputs, targets = make_batch(
            args.batch_size, args.num_vectors, args.num_dims, self.generator, self.device, self.shown
        )
        if self.gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.gradients.flat.zero_()
        for rows in self.pieces:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                logits = self.replicas(inputs[rows])
            loss, correct = loss_and_correct(logits, targets[rows])
            loss = loss * (len(logits) / args.batch_size)  # the piece's part of the batch's mean
            loss.backward()
            self.sums[:2] += torch.stack([loss.detach(), correct]).double()

    def update(self) -> None:
        """Clips the gradient and takes the optimiser's step."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        self.optimizer.step()
        self.sums[2] += norm

    def train(self, folder: Path) -> str:
        """Trains until the steps are done, the target is held, the session's time is over or a signal comes.

        Returns:
            'finished', 'time' or 'interrupted'; last.pt has been written.

        Raises:
            UserError: the loss is no longer finite; the checkpoints are from before.
        """
        self.folder = folder
        self.log = runs.RunLog(folder / "log.jsonl" if self.processes.is_main else os.devnull)
        if self.device.type == "cpu":
            devices.keep_freed_memory()
        saving, ending = console.Alarm(self.args.save_every), console.Alarm(self.args.stop_after)
        self.start_interval()
        self.clock = self.interval_clock
        self.model.train()
        first_step = console.FirstStep(self.device)
        with self.interrupts, console.Progress(self.args.steps, self.args.model, self.at.step) as progress:
            while not self.finished():
                self.lr.fill_(learning_rate(self.at.step + 1, self.args))
                self.step()
                self.at.step += 1
                self.at.interval_steps += 1
                self.timed_steps += 1
                progress.advance()
                to_log = min(-self.at.step % self.args.log_interval, self.args.steps - self.at.step)
                first_step.tell(to_log, self.args.steps, "the run")
                if self.at.step % self.args.log_interval == 0 or self.at.step == self.args.steps:
                    self.report(progress)
                stop, save, end = self.processes.agree(self.interrupts, saving.due(), ending.due())
                if save:
                    self.save_last()
                if stop or end:
                    break
            self.save_last()
        if self.finished():
            return "finished"
        return "interrupted" if self.interrupts.requested else "time"

    def finished(self) -> bool:
        """Whether all steps are done, or the target accuracy has been held."""
        return self.at.step >= self.args.steps or self.at.times_on_target >= HOLD

    def report(self, progress: console.Progress) -> None:
        """Reads the sums, measures the test accuracy; a "train" event and a line; best.pt where it is due."""
        args, at = self.args, self.at
        loss, accuracy, grad_norm = (self.finite_sums() / at.interval_steps).tolist()
        accuracy /= args.batch_size
        # The clock is read after the sums, for which the device had to finish, and before the test.
        speed = self.timed_steps * args.batch_size / max(time.perf_counter() - self.interval_clock, 1e-9)
        test_accuracy = self.test()
        self.update_clock()
        self.log.write(
            "train",
            step=at.step,
            loss=loss,
            accuracy=accuracy,
            test_accuracy=test_accuracy,
            grad_norm=grad_norm,
            lr=float(f"{self.lr.item():.6g}"),  # as the optimiser had it, in float32
            examples_per_second=round(speed, 1),
            seconds=round(at.seconds, 3),
            **({} if self.shown is None else {"stage": at.stage}),
        )
        progress.report(
            f"loss {loss:.4f} | train {accuracy:.1%} | test {test_accuracy:.1%} | {speed:,.0f} examples/s"
        )
        at.times_on_target = at.times_on_target + 1 if test_accuracy >= args.target_accuracy else 0
        if test_accuracy > at.best_accuracy:
            self.save_best(test_accuracy)
        if at.stage + 1 < len(self.stages) and accuracy >= args.curriculum_accuracy:
            self.enter_stage(at.stage + 1)
            vectors, dims = self.stages[at.stage]
            self.log.write("stage", step=at.step, stage=at.stage, vectors=vectors, dims=dims)
            say(f"from step {at.step + 1:,} on: vectors {vectors}, dimensions {dims}")
        at.interval_steps = 0
        self.sums.zero_()
        self.start_interval()

    def enter_stage(self, stage: int) -> None:
        """Draws the next examples at this stage of the curriculum."""
        self.at.stage = stage
        if self.shown is not None:  # in place: a captured step reads this tensor
            self.shown.copy_(torch.tensor(self.stages[stage]))

    def start_interval(self) -> None:
        """Begins to measure the speed anew."""
        self.interval_clock, self.timed_steps = time.perf_counter(), 0

    def test(self) -> float:
        """Accuracy on the test set, not in bfloat16: as the final report measures it."""
        inputs, targets = self.test_set
        mine = self.processes.share(len(targets))
        right = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        if mine.stop > mine.start:
            right += is_correct(self.model, inputs[mine], targets[mine], self.args.batch_size).sum()
        self.model.train()
        return self.processes.add_up(right).item() / len(targets)

    def update_clock(self) -> None:
        """Adds the time since the last call to the run's seconds."""
        now = time.perf_counter()
        self.at.seconds += now - self.clock
        self.clock = now

    def finite_sums(self) -> torch.Tensor:
        """The sums since the last report, (3,), over all processes; UserError if they are not finite.

        All have to call it. The norm is everywhere that of the whole gradient.
        """
        sums = torch.cat([self.processes.add_up(self.sums[:2].clone()), self.sums[2:]])
        if not sums.isfinite().all():
            last = self.folder / "last.pt"
            kept = f"{last} is from before" if last.exists() else "No checkpoint had been written yet"
            raise UserError(
                f"the loss or its gradient is no longer finite (noticed at step {self.at.step:,}). {kept}. "
                f"Start a new run with a lower --lr than {self.args.lr:g}, or with --input-scale and "
                "--memory-scale nearer to 1."
            )
        return sums

    # -- checkpoints

    def save_best(self, accuracy: float) -> None:
        """Writes best.pt and takes its accuracy as the one to beat: both or neither, so that they agree."""
        contents = {
            **describe_model(self.model),
            "args": vars(self.args),
            "scores": {"step": self.at.step, "test_accuracy": accuracy},
        }
        saved = self.processes.from_main(lambda: checkpoints.try_save_checkpoint(self.folder / "best.pt", contents))
        if saved:
            self.at.best_accuracy, self.at.best_step = accuracy, self.at.step

    def restore_best(self, folder: Path) -> None:
        """Takes best.pt's own accuracy as the one to beat: after a kill it may be newer than last.pt.

        Raises:
            UserError: best.pt cannot be read.
        """
        path = folder / "best.pt"
        self.at.best_accuracy, self.at.best_step = Position.best_accuracy, Position.best_step
        best = self.processes.from_main(lambda: checkpoints.load_checkpoint(path) if path.exists() else None)
        if best is None:
            return
        try:
            scores = best["scores"]
            self.at.best_accuracy, self.at.best_step = float(scores["test_accuracy"]), int(scores["step"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} does not say how good it is. Was it altered? Move it away to go on without it."
            ) from None

    def save_last(self) -> None:
        """Writes last.pt: everything that the next step depends on."""
        sums = self.finite_sums()
        self.update_clock()
        if not self.processes.is_main:
            return
        checkpoints.try_save_checkpoint(
            self.folder / "last.pt",
            {
                **describe_model(self.model),
                "optimizer": self.optimizer.state_dict(),
                "position": asdict(self.at),
                "sums": sums,
                "generator": self.generator.get_state(),
                "device": self.device.type,
                "random": devices.random_states(),
                "args": vars(self.args),
            },
        )

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Puts back what `save_last` wrote; warns where the run will not go on as it would have.

        Raises:
            UserError: the checkpoint does not fit this run.
        """
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.at = Position(**checkpoint["position"])
            self.enter_stage(self.at.stage)
            # The main process goes on with the losses of all; the norms are the same for all.
            self.sums.copy_(checkpoint["sums"])
            self.sums[:2] *= self.processes.is_main
            if checkpoint["device"] == self.device.type:
                self.generator.set_state(checkpoint["generator"].cpu())
            else:  # CPU and GPU generators cannot take each other's state; fresh examples serve as well
                self.generator.manual_seed(self.args.seed + self.at.step)
                console.warn(
                    f"the run was on another device ({checkpoint['device']}): "
                    "its examples go on with other numbers"
                )
            devices.restore_random_states(checkpoint["random"])
            before = argparse.Namespace(**{**vars(self.args), **checkpoint["args"]})
            if before.target_accuracy != self.args.target_accuracy:
                self.at.times_on_target = 0  # they were on another target
            old, new = (learning_rate(self.at.step + 1, args) for args in (before, self.args))
            self.lr.fill_(float(self.optimizer.param_groups[0]["lr"]))  # a run that is done saves it again
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if console.is_out_of_memory(error):
                raise
            raise UserError(
                f"last.pt does not fit this run ({console.first_line(error)}). Was it altered? "
                "Start a new run."
            ) from None
        if old != new:
            console.warn(
                f"--steps is now {self.args.steps:,}, not {before.steps:,}, and with it the cosine: at step "
                f"{self.at.step + 1:,} the learning rate jumps from {old:.3g} to {new:.3g}"
            )
        # The state dict brought its own learning rate, and the settings of the device it was saved on.
        self.optimizer.param_groups[0].update(lr=self.lr, capturable=self.device.type == "cuda")


def fixed_test_set(
    args: argparse.Namespace, seed: int, examples: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same examples for every run of a task, whatever its seed and device: they are drawn on the CPU."""
    batch = make_batch(examples, args.num_vectors, args.num_dims, torch.Generator().manual_seed(seed))
    return batch[0].to(device), batch[1].to(device)


def describe_model(model: NthFarthestModel) -> dict[str, Any]:
    """What rebuilds a model without repeating a flag, as plain data."""
    return {"kind": KIND, "config": model.config, "model": model.state_dict()}


def load_model(checkpoint: dict[str, Any], device: torch.device | str = "cpu") -> NthFarthestModel:
    """Rebuilds the model of a checkpoint, in eval mode.

    Raises:
        UserError: the checkpoint is of another kind, or its parts do not fit together.
    """
    if checkpoint.get("kind") != KIND:
        raise UserError(
            f"the checkpoint holds a model of kind {console.in_one_line(checkpoint.get('kind'))}, not one "
            f"made by {SCRIPT}.py. Use a best.pt or last.pt of such a run."
        )
    try:
        config, weights = checkpoint["config"], checkpoint["model"]
        checkpoints.check_layer_counts(config, weights)
        # Built without memory first: a config that asks for more than the file holds gets none.
        with torch.device("meta"):
            expected = {name: value.shape for name, value in NthFarthestModel(**config).state_dict().items()}
        if expected != {name: value.shape for name, value in weights.items()}:
            raise ValueError("weights and config are of different models")
        if any(value.is_complex() or not value.isfinite().all() for value in weights.values()):
            raise ValueError("weights that are no finite real numbers")
        model = NthFarthestModel(**config)
        model.load_state_dict(weights)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if console.is_out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint does not fit together ({console.first_line(error)}). Was it altered? "
            "Use another one."
        ) from None
    return model.to(device).eval()


# ---- after training


def final_report(folder: Path, args: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """Measures best.pt on fresh examples, and draws its attention on one of them.

    Never in bfloat16; on a GPU the products' factors are rounded to TF32 unless the run has --strict-float32.

    Args:
        folder: the run's.
        args: the run's.
        device: where to compute, as `devices.choose_device` has set it up for the run's precision.

    Returns:
        what was printed, None if there is no best.pt: best_step, accuracy, accuracy_by_n, examples.
    """
    path = folder / "best.pt"
    if not path.is_file():
        say(f"no best.pt in {folder}, so there is nothing to measure yet")
        return None
    checkpoint = checkpoints.load_checkpoint(path, device)
    model = load_model(checkpoint, device)
    inputs, targets = fixed_test_set(args, FINAL_TEST_SEED, FINAL_TEST_FACTOR * args.test_examples, device)
    correct = is_correct(model, inputs, targets, args.batch_size)
    by_rank = accuracy_by_rank(correct, question_of(inputs, args.num_vectors)[0], args.num_vectors)
    accuracy, step = correct.double().mean().item(), checkpoint["scores"]["step"]
    say(f"best model (step {step:,}): accuracy {accuracy:.2%} on {len(targets):,} fresh examples; by n:")
    for rank, score in enumerate(by_rank):
        note = "  the farthest" if rank == 0 else "  m itself" if rank == args.num_vectors - 1 else ""
        say(f"  n = {rank}  {score:7.2%}{note}")
    if args.model == "rmc":
        draw_attention(model, inputs[:1], folder / "attention.png")
    return {"best_step": step, "accuracy": accuracy, "accuracy_by_n": by_rank, "examples": len(targets)}


def draw_attention(model: NthFarthestModel, inputs: torch.Tensor, path: Path) -> None:
    """Writes a picture of the attention in one example, or says what is missing for it."""
    try:
        from tools import plot_runs

        plot_runs.draw_attention(model.attention(inputs)[0].cpu().numpy(), path)
    except UserError as error:
        say(f"no picture of the attention: {error}")
    else:
        say(f"attention on one example: {path}")


# ---- the script


def main(argv: Sequence[str] | None = None) -> int:
    """Trains (or, with --evaluate, only measures) as the command line says; returns the exit status."""
    parser = build_parser()
    argv = distributed.arguments_to_go_on(parser, argv)
    args = flags.parse_arguments(parser, argv, SCRIPT, may_change=RESUME_MAY_CHANGE)
    if args.evaluate is not None:
        if args.resume is not None:
            raise UserError("--evaluate and --resume exclude each other: give the run folder to one of them.")
        flags.warn_of_ignored(parser, flags.given_arguments(parser, argv), frozenset(("cuda", "threads")))
        return evaluate_run(parser, args)
    device, processes = distributed.start(args)
    devices.seed_everything(args.seed)
    build = functools.partial(build_model, args, "headsize" in flags.given_arguments(parser, argv))
    devices.check_model_fits(build, device)
    model = build().to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    K = args.num_vectors
    print(f"task: {K} vectors of {args.num_dims} dimensions; chance {1 / K:.1%}, plateau {2 / K:.1%}")
    print(f"model: {args.model}, {parameters:,} parameters")
    trainer = Trainer(model, args, device, processes)
    schedule.warn_of_long_warmup(args.warmup, args.steps)

    with processes.run_folder(args, SCRIPT) as folder:
        if args.resume is not None:
            go_on(trainer, folder, argv)
        else:
            if processes.is_main:
                runs.write_arguments(folder, SCRIPT, args, argv, **processes.facts, parameters=parameters)
            print(f"run folder: {folder}", flush=True)
        try:
            outcome = trainer.train(folder)
        except BaseException:
            # A run without one report or checkpoint has nothing in it worth a folder.
            begun = trainer.at.best_step or (folder / "last.pt").exists()
            if args.resume is None and processes.is_main and not begun:
                runs.discard_run_folder(folder)
            raise
        if outcome != "finished":
            why = trainer.interrupts.requested or f"--stop-after {args.stop_after:g}"
            best = max(0.0, trainer.at.best_accuracy)
            say(f"stopped by {why} at step {trainer.at.step:,}, test accuracy at best {best:.1%}")
            say(f"to measure what there is: python {SCRIPT}.py --evaluate {folder}")
            say(f"to go on: {processes.launcher} {SCRIPT}.py --resume {folder}")
            return trainer.interrupts.exit_status
        if processes.is_main and (scores := final_report(folder, args, device)):
            trainer.log.write("final", step=trainer.at.step, **scores)
    return 0


def go_on(trainer: Trainer, folder: Path, argv: Sequence[str] | None) -> None:
    """Takes up a run where its last.pt stands, and notes it."""
    args, processes = trainer.args, trainer.processes
    where = trainer.device if processes.alone else "cpu"
    checkpoint = processes.from_main(lambda: checkpoints.load_last(folder, where))
    if checkpoint is not None:  # else it was killed before its first save: begin again, same seed
        trainer.restore(checkpoint)
    trainer.restore_best(folder)
    if processes.is_main:
        runs.note_resume(folder, args, argv, **processes.facts)
        runs.RunLog(folder / "log.jsonl").write("resume", step=trainer.at.step)
    print(f"run folder: {folder}, resumed at step {trainer.at.step:,}", flush=True)
    if trainer.at.times_on_target >= HOLD:
        say(
            f"nothing to train: the test accuracy has reached --target-accuracy {args.target_accuracy:g} "
            f"{HOLD} times in a row. To go on, give a higher one (--steps alone does not help)."
        )
    elif trainer.finished():
        say(f"nothing to train: all {args.steps:,} steps are done. To go on, give more --steps.")


def evaluate_run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Measures the best model of a run, with its own arguments and precision, on the device asked for now."""
    if not distributed.from_environment().is_main:  # nothing to share: seconds of work
        return 0
    folder = Path(args.evaluate)
    of_run = flags.parse_arguments(parser, ["--resume", str(folder)], SCRIPT)
    of_run.cuda, of_run.threads = args.cuda, args.threads
    final_report(folder, of_run, devices.choose_device(of_run.cuda, of_run.threads, of_run.strict_float32))
    return 0


if __name__ == "__main__":
    distributed.run_script(main, LOWER_MEMORY)

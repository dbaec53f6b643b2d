"""Train a relational memory core, or an LSTM, on the paper's task "Nth farthest" (arXiv:1806.01822).

The inputs are labelled vectors, one per step. The answer is the label of the n-th farthest from the vector
labelled m. The defaults are the paper's settings: 8 vectors of 16 dimensions, Adam at 1e-4, batch 1600.
Chance is 1/8. A model that has learned only that the nearest vector is m itself scores 2/8, and training
stays at that level for a long time. The paper's core reaches 91 %.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoints, console, devices, distributed, files, flags, trainer
from training.console import UserError, say, warn
from training.distributed import ALONE, Processes
from training.flags import option
from training.trainer import Trainer

import torch
from torch import Tensor

from tasks.nth_farthest import (
    MODELS,
    NthFarthestModel,
    accuracy_by_rank,
    is_correct,
    loss_and_correct,
    make_batch,
    question_of,
)

SCRIPT = "train_nth_farthest"
KIND = "nth_farthest"

# Seeds of the two test sets, the same for every run, so that scores can be compared. The first set measures
# training and chooses best.pt. The second, four times as large, gives the final figures, independent of that
# choice.
TEST_SEED, FINAL_TEST_SEED = 91_000_001, 91_000_002
FINAL_TEST_FACTOR = 4
HOLD = 3  # evaluations in a row that must reach --target-accuracy

# ---- flags


def build_parser() -> flags.Parser:
    """Return the script's command line."""
    parser = flags.Parser(SCRIPT, __doc__)
    # fmt: off
    task = parser.add_argument_group("task")
    option(task, "--num-vectors", _sequence_length, 8, "K", "vectors in a sequence, and labels")
    option(task, "--num-dims", flags.positive_int, 16, "D", "dimensions of a vector")
    option(task, "--test-examples", flags.positive_int, 3200, "N",
           "number of fixed examples on which the test accuracy is measured")
    easier = parser.add_argument_group(
        "curriculum", "Easier tasks to train on first. The test accuracy is always that of the full task.")
    option(easier, "--curriculum-vectors", _sequence_length, None, "N",
           "vectors in each stage before the full task; they are shown in the last N steps of a sequence",
           nargs="+")
    option(easier, "--curriculum-dims", flags.positive_int, None, "N",
           "dimensions in each stage before the full task: the other coordinates are 0", nargs="+")
    option(easier, "--curriculum-accuracy", flags.probability, 0.9, "P",
           "a stage ends when the training accuracy over a log interval reaches this")
    model = parser.add_argument_group("model")
    option(model, "--model", None, "rmc", None, "relational memory core, or LSTM baseline", choices=MODELS)
    flags.add_core_flags(model, memslots=8, headsize=32, numheads=8, attmlplayers=2, keysize=0)
    option(model, "--nhid", flags.positive_int, 512, "N", "hidden units of the LSTM")
    option(model, "--outputlayers", flags.layer_count, 4, "N", "ReLU layers between the core and the logits")
    option(model, "--outputunits", flags.positive_int, 256, "N", "units of each of these layers")
    option(model, "--input-scale", flags.positive_float, 1.0, "X",
           "factor on the vectors' coordinates; 1 in the paper")
    option(model, "--memory-scale", flags.positive_float, 1.0, "X",
           "factor on the identity matrix that is the initial memory; 1 in the paper")
    training = parser.add_argument_group("training")
    option(training, "--steps", flags.positive_int, 500_000, "N",
           "training steps; can be changed with --resume")
    option(training, "--batch-size", flags.positive_int, 1600, "N", "examples per step, each used once")
    option(training, "--lr", flags.positive_float, 1e-4, "X", "highest learning rate of Adam")
    option(training, "--warmup", flags.non_negative_int, 0, "STEPS",
           "steps in which the learning rate grows from 0")
    option(training, "--schedule", None, "constant", None,
           "learning rate after the warm-up: constant, or along a cosine to 0 at --steps",
           choices=("constant", "cosine"))
    option(training, "--clip", flags.non_negative_float, 0.1, "NORM",
           "largest L2 norm of the gradient; 0 = no clipping")
    option(training, "--target-accuracy", flags.probability, 1.0, "P",
           f"stop early when the test accuracy has reached this {HOLD} times in a row")
    option(training, "--evaluate", None, None, "RUN_FOLDER",
           "only measure a run's best.pt: accuracy by n, and a picture of the attention")
    # fmt: on
    flags.add_run_flags(parser)
    return parser


RESUME_MAY_CHANGE = frozenset({"steps", "target_accuracy", "curriculum_accuracy"})


def _sequence_length(text: str) -> int:
    value = flags.positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, got {value}")
    return value


def build_model(args: argparse.Namespace) -> NthFarthestModel:
    """Return the model that the flags describe, with random weights."""
    return NthFarthestModel(
        **flags.core_arguments(args),
        num_vectors=args.num_vectors,
        num_dims=args.num_dims,
        model=args.model,
        hidden_size=args.nhid,
        head_layers=args.outputlayers,
        head_units=args.outputunits,
        input_scale=args.input_scale,
        memory_scale=args.memory_scale,
    )


def curriculum(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Return vectors and dimensions shown in each stage; the last stage is the full task.

    Raises:
        UserError: the two flags have different numbers of stages, or a stage exceeds the full task.
    """
    full = (args.num_vectors, args.num_dims)
    vectors, dims = args.curriculum_vectors, args.curriculum_dims
    if vectors is None and dims is None:
        return [full]
    vectors = vectors or [args.num_vectors] * len(dims)
    dims = dims or [args.num_dims] * len(vectors)
    if len(vectors) != len(dims):
        raise UserError(
            "--curriculum-vectors and --curriculum-dims require one number each per stage, got "
            f"{len(vectors)} and {len(dims)} numbers."
        )
    for name, numbers, most in (("vectors", vectors, args.num_vectors), ("dims", dims, args.num_dims)):
        if max(numbers) > most:
            raise UserError(
                f"--curriculum-{name} must not exceed --num-{name}, which is {most}, got {max(numbers)}."
            )
    return [*zip(vectors, dims, strict=True), full]


# ---- the task


@dataclass
class Stage:
    """Where a run stands in its curriculum."""

    stage: int = 0
    times_on_target: int = 0  # reports in a row that have reached the target accuracy


class NthFarthest(trainer.Task):
    """Training on fresh examples of the task.

    All processes draw the same whole batch and each takes its own examples, so that N processes train on what
    one process would.

    Args:
        model: on `device`.
        args: the flags of `build_parser`.
        device: where to compute.
        processes: divide the batch's examples, in order.
    """

    sums = ("losses", "correct")
    score_name = "test_accuracy"
    higher_is_better = True

    def __init__(
        self,
        model: NthFarthestModel,
        args: argparse.Namespace,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.args, self.device = model, args, device
        self.mine = processes.share(args.batch_size)
        self.examples = self.mine.stop - self.mine.start
        self.full_count, self.total_steps = args.batch_size, args.steps
        self.stages = curriculum(args)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.test_set = fixed_test_set(args, TEST_SEED, args.test_examples, device)
        self.train_accuracy = self.test_accuracy = 0.0  # of the last report
        self.position = Stage()

    def describe(self, model: NthFarthestModel) -> dict[str, Any]:
        return {"kind": KIND, "config": model.config, "model": model.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "device": self.device.type,
            "target_accuracy": self.args.target_accuracy,
        }

    def load_state_dict(self, saved: Mapping[str, Any], step: int) -> None:
        if saved["target_accuracy"] != self.args.target_accuracy:
            self.position.times_on_target = 0
        if saved["device"] == self.device.type:
            self.generator.set_state(saved["generator"].cpu())
        else:  # CPU and GPU generators have different states; other fresh examples serve as well
            self.generator.manual_seed(self.args.seed + step)
            warn(f"the run was on another device ({saved['device']}): it continues with other examples")

    # -- the loop

    def finished(self, step: int) -> bool:
        return step >= self.args.steps or self.position.times_on_target >= HOLD

    def span(self, step: int) -> tuple[str, int, int]:
        return self.args.model, self.args.steps, step

    def span_is_over(self, step: int) -> bool:
        return self.finished(step)

    def next_batch(self) -> tuple[tuple[Tensor, ...], int]:
        args, stage = self.args, self.position.stage
        shown = self.stages[stage] if stage + 1 < len(self.stages) else None  # None: the full task
        inputs, targets = make_batch(
            args.batch_size, args.num_vectors, args.num_dims, self.generator, self.device, shown
        )
        return (inputs[self.mine], targets[self.mine]), args.batch_size

    def losses(
        self, model: NthFarthestModel, state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        loss, correct = loss_and_correct(model(inputs[0]), inputs[1])
        loss = loss * len(inputs[1])
        return loss, torch.stack([loss, correct.to(loss.dtype)]), None

    # -- reports and scores

    def report(
        self, trainer: Trainer, totals: dict[str, float], elapsed: float
    ) -> tuple[dict[str, Any], str, str]:
        count = trainer.position.interval_count
        loss, accuracy = totals["losses"] / count, totals["correct"] / count
        speed = trainer.timed_count / elapsed
        self.test_accuracy, self.train_accuracy = self.test(trainer.processes), accuracy
        fields = {
            "loss": loss,
            "accuracy": accuracy,
            "test_accuracy": self.test_accuracy,
            "examples_per_second": round(speed, 1),
            **({"stage": self.position.stage} if len(self.stages) > 1 else {}),
        }
        text = f"loss {loss:.4f} | train {accuracy:.1%} | test {self.test_accuracy:.1%}"
        return fields, text, f"{text} | {speed:,.0f} examples/s"

    def after_report(self, trainer: Trainer) -> None:
        """Keep the best model, count how often the target is reached, and enter the next stage."""
        here = self.position
        on_target = self.test_accuracy >= self.args.target_accuracy
        here.times_on_target = here.times_on_target + 1 if on_target else 0
        trainer.offer_best(self.test_accuracy, self.model)
        if here.stage + 1 < len(self.stages) and self.train_accuracy >= self.args.curriculum_accuracy:
            here.stage += 1
            vectors, dims = self.stages[here.stage]
            trainer.write("stage", stage=here.stage, vectors=vectors, dims=dims)
            say(f"from step {trainer.position.step + 1:,}: {vectors} vectors, {dims} dimensions")

    def test(self, processes: Processes) -> float:
        """Return the accuracy on the test set, never in bfloat16."""
        inputs, targets = self.test_set
        mine = processes.share(len(targets))
        right = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        if mine.stop > mine.start:
            right += is_correct(self.model, inputs[mine], targets[mine], self.args.batch_size).sum()
        self.model.train()
        return processes.all_reduce(right).item() / len(targets)

    def finish(self, trainer: Trainer, event: str) -> None:
        """Measure the best model on fresh examples and draw its attention."""
        if trainer.processes.is_main:
            scores = measure(trainer.load_best(self.device), trainer.folder, self.args, self.device)
            trainer.write("final", **scores)

    def stopped(self, trainer: Trainer) -> None:
        """Print what the run has reached."""
        if trainer.position.best_step:
            say(f"best test accuracy so far: {trainer.position.best_score:.1%}")
            say(f"To measure the best model: {console.command(SCRIPT, '--evaluate', trainer.folder)}")

    def lower_advice(self) -> str:
        return f"a lower --lr (it was {self.args.lr:g}), or with --input-scale and --memory-scale nearer to 1"


def fixed_test_set(
    args: argparse.Namespace, seed: int, examples: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the same examples for every run of a task: they are drawn on the CPU, from their own seed."""
    batch = make_batch(examples, args.num_vectors, args.num_dims, torch.Generator().manual_seed(seed))
    return batch[0].to(device), batch[1].to(device)


# ---- after training


def measure(
    checkpoint: dict[str, Any], folder: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Measure a run's best model on fresh examples, draw its attention on one of them, and print both.

    Matrix products are float32 on a CPU; on a GPU they are TF32 unless the run has --strict-float32.

    Args:
        checkpoint: the contents of best.pt.
        folder: the run's, for the picture.
        args: the run's.
        device: where to compute.

    Returns:
        What was printed: best_step, accuracy, accuracy_by_n, examples.
    """
    model = checkpoints.rebuild_model(checkpoint, {KIND: NthFarthestModel}).to(device)
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


def draw_attention(model: NthFarthestModel, inputs: Tensor, path: Path) -> None:
    """Draw the attention of one sequence: a row of pictures for each head, a column for each time step.

    A picture has a row for each memory slot as query and a column for each key: the slots, then the input.

    Args:
        inputs: one sequence, (1, K, F).
        path: the PNG to write. If matplotlib is missing or the file cannot be written, one line says so.
    """
    try:
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # ValueError: MPLBACKEND is a notebook's, not installed here
        say(f"no picture of the attention, which needs matplotlib ({error})")
        return
    weights = model.attention(inputs)[0].cpu().numpy()  # (T, heads, R, R); the input row is the last one
    steps, heads, rows, _ = weights.shape
    figure = Figure(figsize=(1 + 0.9 * steps, 0.9 + 0.9 * heads), layout="constrained")
    axes = figure.subplots(heads, steps, squeeze=False)
    for head in range(heads):
        for step in range(steps):
            # The input row as query is omitted: with one block its result is dropped.
            shown = weights[step, head, : rows - 1]
            image = axes[head][step].imshow(shown, vmin=0, vmax=1, cmap="magma", aspect="auto")
            axes[head][step].set(xticks=[], yticks=[])
        axes[head][0].set_ylabel(f"head {head + 1}", fontsize=8)
    for step in range(steps):
        axes[0][step].set_title(f"step {step + 1}", fontsize=8)
    figure.supxlabel(f"key: slots 1 to {rows - 1}, then the input (last column)", fontsize=8)
    figure.supylabel(f"query: slots 1 to {rows - 1}", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    try:
        files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
    except OSError as error:
        say(f"no picture of the attention: cannot write {path} ({error.strerror or error})")
    else:
        say(f"attention on one example: {path}")


# ---- the script


def build(args: argparse.Namespace, device: torch.device, processes: Processes) -> Trainer:
    """Return the trainer that the arguments describe."""
    make = functools.partial(build_model, args)
    devices.check_model_fits(make, device)
    model = make().to(device)
    work, neighbours = work_of(model, args) / processes.world_size, distributed.processes_on_this_host()
    args.threads = devices.choose_threads(args.threads, work, device, neighbours)
    chance, plateau = 1 / args.num_vectors, 2 / args.num_vectors
    print(
        f"task: {args.num_vectors} vectors, dimensions: {args.num_dims}; chance {chance:.1%}, "
        f"plateau {plateau:.1%}"
    )
    task = NthFarthest(model, args, device, processes)
    adam = functools.partial(torch.optim.Adam, model.parameters())
    return Trainer(task, args, device, processes, adam)


def work_of(model: NthFarthestModel, args: argparse.Namespace) -> float:
    """Return roughly the number of multiplications of a step's forward pass."""
    size = sum(parameter.numel() for parameter in model.parameters())
    slots = args.memslots if args.model == "rmc" else 1
    return size * args.batch_size * args.num_vectors * slots


def evaluate_run(parser: flags.Parser, args: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """Measure the best model of a run with the run's own arguments, on the device asked for now."""
    flags.warn_of_ignored(parser, given, frozenset(("cuda", "threads")))
    if not distributed.from_environment().is_main:  # seconds of work, not worth sharing
        return 0
    folder = Path(args.evaluate)
    of_run = flags.parse(parser, SCRIPT, {"resume": str(folder)}, {}, RESUME_MAY_CHANGE)
    device = devices.choose_device(args.cuda, of_run.strict_float32)
    if not (folder / "best.pt").is_file():
        raise UserError(f"{folder} has no best.pt yet: it is written at the first report. Resume the run.")
    checkpoint = checkpoints.load_checkpoint(folder / "best.pt", device)
    devices.choose_threads(args.threads, work_of(build_model(of_run), of_run), device)
    measure(checkpoint, folder, of_run, device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = build_parser()
    evaluate = functools.partial(evaluate_run, parser)
    script = trainer.Script(SCRIPT, parser, build, evaluate, resume_may_change=RESUME_MAY_CHANGE)
    return trainer.run(script, argv)


if __name__ == "__main__":
    distributed.run_script(
        main, "--batch-size (or raise --accumulate), --test-examples or the sizes of the model"
    )

"""The task "Nth farthest" (arXiv:1806.01822, sections 4.1 and A.1): examples, models, training, scores.

A sequence shows K vectors of D dimensions, one per time step, each with a label. Every step repeats the
question "which vector is the n-th farthest from the vector labeled m?"; the answer is its label.

Shapes named in the comments of this file:
    B batch   K num_vectors, which is also the number of time steps, of labels and of classes   D num_dims
    F = 3 * K + D, the numbers per time step: (vector, label, n, m), the last three one-hot

Counting starts at 0: label 0 is the paper's label 1, and n = 0 is the farthest vector. For n = K - 1 the
answer is m, whose distance from itself is 0.

A curriculum trains on easier tasks first. A stage (k, d) has sequences of k vectors whose first d coordinates
are not 0; everything else has the shapes of the full task (K, D), so the model stays the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoints, files
from training.console import say, warn
from training.distributed import ALONE, Processes
from training.trainer import Task, Trainer

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relational_rnn_models
from layers.fused import fused_precision
from layers.mlp import answer_mlp
from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import as_integer, as_number

KIND = "nth_farthest"
MODELS = ("rmc", "lstm")

# Seeds of the two test sets, the same for every run, so that scores can be compared. The first set measures
# training and chooses best.pt. The second, four times as large, gives the final figures, independent of that
# choice.
TEST_SEED, FINAL_TEST_SEED = 91_000_001, 91_000_002
FINAL_TEST_FACTOR = 4
HOLD = 3  # reports in a row that must reach the target accuracy

# RelationalMemory's keyword arguments in the paper's model of this task.
CORE_DEFAULTS = relational_rnn_models.CORE_DEFAULTS | {
    "mem_slots": 8,
    "head_size": 32,
    "num_heads": 8,
    "attention_mlp_layers": 2,
    "key_size": None,
}


def make_batch(
    batch_size: int,
    num_vectors: int,
    num_dims: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    shown: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw fresh examples.

    The vectors are uniform in [-1, 1)^D, the labels a random permutation, n and m uniform.

    Args:
        batch_size: examples B.
        num_vectors: vectors K of a sequence.
        num_dims: dimensions D of a vector.
        generator: the only source of randomness, on the same device; its state advances.
        device: where the examples are made.
        shown: a curriculum's stage (k, d): sequences of k vectors (2 to K) with k of the K labels, whose
            coordinates after the first d (1 to D) are 0. The first d are multiplied by sqrt(D / d), so that
            vectors keep their length from stage to stage. The K - k absent vectors count as infinitely far
            away and are never the answer: n = K - 1 means m itself and n = K - 2 its nearest neighbor in
            every stage. None for the full task.

    Returns:
        inputs: (B, k, F) float32.
        targets: (B,) int64, the labels that are the answers.
    """
    B, K, D = batch_size, num_vectors, num_dims
    k, d = shown or (K, D)
    vectors = torch.rand(B, k, d, generator=generator, device=device) * 2 - 1
    labels = torch.rand(B, K, generator=generator, device=device).argsort(dim=1)[:, :k]
    n, position = (torch.randint(k, (B, 1), generator=generator, device=device) for _ in range(2))
    m = labels.gather(1, position)

    reference = vectors.gather(1, position.unsqueeze(2).expand(B, 1, d))
    distances = (vectors - reference).square().sum(dim=2)  # (B, k), squared: the order is the same
    farthest_first = distances.argsort(dim=1, descending=True)  # (B, k) positions
    targets = labels.gather(1, farthest_first.gather(1, n)).squeeze(1)

    vectors = F.pad(vectors * (D / d) ** 0.5, (0, D - d))
    question = torch.cat([_one_hot(n + K - k, K), _one_hot(m, K)], dim=2).expand(B, k, 2 * K)
    return torch.cat([vectors, _one_hot(labels, K), question], dim=2), targets


def _one_hot(indices: Tensor, size: int) -> Tensor:
    """Return (..., size) float32; twice as fast as F.one_hot(...).float()."""
    return (indices.unsqueeze(-1) == torch.arange(size, device=indices.device)).float()


def question_of(inputs: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Return n and m of each sequence, (B,) each, read from the inputs (B, K, F)."""
    n, m = inputs[:, 0, -2 * num_vectors :].split(num_vectors, dim=1)
    return n.argmax(dim=1), m.argmax(dim=1)


class NthFarthestModel(nn.Module):
    """A recurrent core that reads the sequence, and an MLP from its last output to logits of the K labels.

    Args:
        num_vectors, num_dims: sizes K and D of the task.
        model: 'rmc' for the relational memory core, 'lstm' for one nn.LSTM layer; the MLP is the same.
        hidden_size: units of the LSTM.
        head_layers, head_units: number and width of the MLP's hidden ReLU layers.
        input_scale: factor on the vectors' coordinates (not on the one-hot parts); 1 in the paper.
        memory_scale: factor on the identity matrix that is the initial memory; 1 in the paper.
        core: keyword arguments of RelationalMemory; CORE_DEFAULTS has the defaults.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(
        self,
        num_vectors: int = 8,
        num_dims: int = 16,
        model: str = "rmc",
        hidden_size: int = 512,
        head_layers: int = 4,
        head_units: int = 256,
        input_scale: float = 1.0,
        memory_scale: float = 1.0,
        **core: Any,
    ):
        super().__init__()
        core = CORE_DEFAULTS | core
        # Plain data for a checkpoint: NthFarthestModel(**config) has the same shape.
        self.config = {
            "num_vectors": as_integer("num_vectors", num_vectors),
            "num_dims": as_integer("num_dims", num_dims),
            "model": model,
            "hidden_size": as_integer("hidden_size", hidden_size),
            "head_layers": head_layers,
            "head_units": head_units,
            "input_scale": as_number("input_scale", input_scale, positive=True),
            "memory_scale": as_number("memory_scale", memory_scale, positive=True),
            **core,
        }
        self.num_vectors, self.num_dims = num_vectors, num_dims
        self.input_scale, self.memory_scale = input_scale, memory_scale
        input_size = 3 * num_vectors + num_dims
        if model == "rmc":
            self.core = FastRelationalMemory(input_size=input_size, **core)
            width = self.core.output_size
        elif model == "lstm":
            self.core = nn.LSTM(input_size, hidden_size, batch_first=True)
            width = hidden_size
        else:
            raise ValueError(f"model must be 'rmc' or 'lstm', got {model!r}")
        self.head = answer_mlp(width, head_layers, head_units, num_vectors)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K) of the answer, before any softmax, from inputs (B, K, F)."""
        inputs = self.scaled(inputs)
        if isinstance(self.core, nn.LSTM):
            with fused_precision(self.core):
                outputs, _ = self.core(inputs)
            return self.head(outputs[:, -1])
        output, _ = self.core(inputs, self.initial_memory(inputs.size(0)))
        return self.head(output)

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the vectors' coordinates multiplied by input_scale."""
        if self.input_scale == 1:
            return inputs
        vectors, rest = inputs.tensor_split([self.num_dims], dim=2)
        return torch.cat([vectors * self.input_scale, rest], dim=2)

    def initial_memory(self, batch_size: int) -> Tensor:
        """Return the memory before the first step, (B, mem_slots, mem_size)."""
        return self.core.initial_state(batch_size) * self.memory_scale

    def attention(self, inputs: Tensor) -> Tensor:
        """Return the first block's attention weights, (B, T, heads, rows, rows), from inputs (B, T, F).

        Rows are the memory's slots, then the input row. The last dimension is the row attended to; it sums
        to 1.
        """
        if isinstance(self.core, nn.LSTM):
            raise ValueError("an LSTM has no attention weights; use model='rmc'")
        return self.core.inspect(self.scaled(inputs), self.initial_memory(len(inputs))).attention[0]


@torch.no_grad()
def is_correct(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """Return which examples the model answers correctly, (B,) bool, computed batch_size at a time."""
    pieces = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    return torch.cat([model(part).argmax(dim=1) == answers for part, answers in pieces])


def accuracy_by_rank(correct: Tensor, n: Tensor, num_vectors: int) -> list[float]:
    """Return the accuracy for each n from 0 (the farthest) to K - 1 (m itself); NaN without examples."""
    return [correct[n == rank].double().mean().item() for rank in range(num_vectors)]


def loss_and_correct(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats and the number of correct answers, both () on the device."""
    logits = logits.float()
    return F.cross_entropy(logits, targets), (logits.argmax(dim=1) == targets).sum()


# ---- training


@dataclass
class Stage:
    """Where a run stands in its curriculum."""

    stage: int = 0
    times_on_target: int = 0  # reports in a row that have reached the target accuracy


class NthFarthest(Task):
    """Training on fresh examples of the task, of a curriculum's stages first.

    All processes draw the same batch and each takes its own examples, so that N processes train on the
    same examples as one.

    Args:
        model: on `device`.
        args: the flags of train_nth_farthest.py.
        stages: vectors and dimensions of each stage; the last one is the full task.
        device: where to compute.
        processes: divide the batch's examples, in order.
    """

    kind = KIND
    sums = ("losses", "correct")
    score_name = "test_accuracy"
    higher_is_better = True
    lower = "a lower --lr, or --input-scale and --memory-scale nearer to 1"

    def __init__(
        self,
        model: NthFarthestModel,
        args: argparse.Namespace,
        stages: list[tuple[int, int]],
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.args, self.device, self.processes = model, args, device, processes
        self.total_steps = args.steps
        self.stages = stages
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.test_set = fixed_test_set(args, TEST_SEED, args.test_examples, device)
        self.train_accuracy = self.test_accuracy = 0.0  # of the last report
        self.position = Stage()

    @property
    def in_full_task(self) -> bool:
        """Whether the curriculum is over."""
        return self.position.stage + 1 == len(self.stages)

    @property
    def full_count(self) -> int:
        """Targets of a batch of the full task; other stages have other shapes and are not captured."""
        return self.args.batch_size if self.in_full_task else 0

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
        return super().finished(step) or self.position.times_on_target >= HOLD

    def next_batch(self) -> tuple[tuple[Tensor, ...], int]:
        args, full = self.args, self.in_full_task
        count = args.batch_size if full else args.curriculum_batch_size or args.batch_size
        inputs, targets = make_batch(
            count,
            args.num_vectors,
            args.num_dims,
            self.generator,
            self.device,
            None if full else self.stages[self.position.stage],
        )
        mine = self.processes.shard(count)
        return (inputs[mine], targets[mine]), count

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
        stage = "" if self.in_full_task else "{} x {}: ".format(*self.stages[self.position.stage])
        text = f"{stage}loss {loss:.4f} | train {accuracy:.1%} | test {self.test_accuracy:.1%}"
        return fields, text, f"{text} | {speed:,.0f} examples/s"

    def after_report(self, trainer: Trainer) -> None:
        """Keep the best model, count how often the target is reached, and enter the next stage."""
        here = self.position
        on_target = self.test_accuracy >= self.args.target_accuracy
        here.times_on_target = here.times_on_target + 1 if on_target else 0
        trainer.offer_best(self.test_accuracy, self.model)
        over = self.in_full_task or self.finished(trainer.position.step)
        if not over and self.train_accuracy >= self.args.curriculum_accuracy:
            here.stage += 1
            vectors, dims = self.stages[here.stage]
            trainer.write("stage", stage=here.stage, vectors=vectors, dims=dims)
            say(f"from step {trainer.position.step + 1:,}: {vectors} vectors, {dims} dimensions")
            if self.in_full_task:
                trainer.lr.cosine_start = trainer.position.step + 1

    def test(self, processes: Processes) -> float:
        """Return the accuracy on the test set, never in bfloat16."""
        inputs, targets = self.test_set
        mine = processes.shard(len(targets))
        right = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        if mine.stop > mine.start:
            right += is_correct(self.model, inputs[mine], targets[mine], self.args.batch_size).sum()
        self.model.train()
        return processes.all_reduce(right).item() / len(targets)

    def finish(self, trainer: Trainer) -> None:
        """Measure the best model on fresh examples and draw its attention."""
        if trainer.processes.is_main:
            scores = measure(trainer.load_best(self.device), trainer.folder, self.args, self.device)
            trainer.write("final", **scores)


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
        path: the PNG to write. If matplotlib is missing, one line says so.
    """
    try:
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # ValueError: MPLBACKEND is a notebook's, not installed here
        say(f"no picture of the attention, which requires matplotlib ({error})")
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
    files.atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
    say(f"attention on one example: {path}")

"""The task "Learning to Execute" (arXiv:1806.01822, sections 5.2 and A.2): programs, model and training.

A model reads a short program, one character per step. Then it writes the result, one character per step,
without being shown any of it. The programs follow Zaremba & Sutskever 2014 (arXiv:1410.4615). They are
Python, and the result is the value of the last line modulo 10^(length + 1), as in DeepMind's own script of
this task. Copy, reverse and double are strings of digits, to be written once, backward or twice.

Shapes named in the comments of this file:
    B batch   P characters of the longest program   A characters of the longest answer, with its end mark
    T = P + A time steps   C = len(CHARACTERS)   S = len(SYMBOLS)
"""

from __future__ import annotations

import argparse
import itertools
import random
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from training import checkpoints, trainer
from training.console import say
from training.distributed import ALONE, Processes
from training.trainer import Trainer

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relational_rnn_models
from layers.fused import fused_precision
from layers.mlp import answer_mlp
from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import as_integer

SCRIPT = "train_learning_to_execute"
MODELS = ("rmc", "lstm")
CORE_DEFAULTS = relational_rnn_models.CORE_DEFAULTS | {"mem_slots": 4, "head_size": 128, "num_heads": 4}
CORE_DEFAULTS |= {"gate_style": "memory", "attention_mlp_layers": 2, "key_size": None}
CHARACTERS = string.digits + string.ascii_lowercase + "+-*=<>(): \n"  # of programs
END = "."
SYMBOLS = string.digits + END  # of answers
NOT_SCORED = -100  # target of the steps after an answer's end, which cross_entropy ignores
# Seeds of the two test sets, the same for every run. The first measures training and chooses best.pt. The
# second, ten times as large, gives the final figures, independent of that choice.
TEST_SEED, FINAL_TEST_SEED = 91_000_003, 91_000_004
FINAL_TEST_FACTOR = 10

# ---- programs

# An operation: number of operands, lines added to the program, expression that stands for the result, and the
# result. {0}, {1}, ... and a, b, ... are operands, {v} is a new variable, {n} and n are a small number.
ADD = (2, "", "({0}+{1})", lambda n, a, b: a + b)
SUBTRACT = (2, "", "({0}-{1})", lambda n, a, b: a - b)
MULTIPLY = (1, "", "({0}*{n})", lambda n, a: a * n)
LESS = (4, "", "({0} if {1}<{2} else {3})", lambda n, a, b, c, d: a if b < c else d)
MORE = (4, "", "({0} if {1}>{2} else {3})", lambda n, a, b, c, d: a if b > c else d)
LOOP = (2, "{v}={0}\nfor x in range({n}):{v}+={1}\n", "{v}", lambda n, a, b: a + n * b)
ASSIGN = (2, "{v}={0}\n", "({v}+{1})", lambda n, a, b: a + b)
OPERATIONS = {
    "addition": (ADD,),
    "control": (LESS, MORE, LOOP),
    "program": (ADD, SUBTRACT, MULTIPLY, LESS, MORE, LOOP, ASSIGN),
}
STRINGS = {"copy": lambda text: text, "reverse": lambda text: text[::-1], "double": lambda text: text + text}
PROGRAM_KINDS = (*OPERATIONS, *STRINGS)
VARIABLES = "abcdefghi"  # one for each operation at most
# Share of examples whose nesting and length are uniform from 1 to the task's; the others have the task's.
DIFFICULTIES = {"mix": 1.0, "combined": 0.5, "full": 0.0}


def write_program(kind: str, nesting: int, length: int, draw: random.Random) -> tuple[str, str]:
    """Return a random program of so many operations on numbers of so many digits, and its answer."""
    if kind in STRINGS:
        text = "".join(draw.choices(string.digits, k=length))
        return text, STRINGS[kind](text)
    smallest = 10 ** (length - 1)
    program, expression, value = "", None, 0
    for variable in draw.sample(VARIABLES, nesting):
        operands, lines, result, compute = draw.choice(OPERATIONS[kind])
        values = [draw.randrange(smallest, 10 * smallest) for _ in range(operands)]
        texts = [str(number) for number in values]
        if expression is not None:  # the result so far takes the place of one number
            place = draw.randrange(operands)
            texts[place], values[place] = expression, value
        small = draw.randint(1, 4 * length)  # as in Zaremba & Sutskever
        program += lines.format(*texts, v=variable, n=small)
        expression = result.format(*texts, v=variable, n=small)
        value = compute(small, *values)
    if expression.startswith("("):  # around the whole expression
        expression = expression[1:-1]
    return program + expression, str(value % (100 * smallest))


def write_programs(
    args: argparse.Namespace, count: int, draw: random.Random, difficulty: str = "full"
) -> list[tuple[str, str]]:
    """Return programs and answers of the flags' kind, nesting and length, and of one of DIFFICULTIES."""
    examples = []
    for _ in range(count):
        nesting, length = args.nesting, args.length
        if draw.random() < DIFFICULTIES[difficulty]:
            nesting, length = draw.randint(1, nesting), draw.randint(1, length)
        examples.append(write_program(args.program_kind, nesting, length, draw))
    return examples


def longest(kind: str, nesting: int, length: int) -> tuple[int, int]:
    """Return bounds of P and A for programs of at most this difficulty."""
    digits = "9" * length
    if kind in STRINGS:
        return length, len(STRINGS[kind](digits)) + 1
    operands = ["", digits, digits, digits]  # the first is the result so far
    added = [(lines + text).format(*operands, v="v", n=4 * length) for _, lines, text, _ in OPERATIONS[kind]]
    return length + nesting * max(map(len, added)), length + 2


def encode(examples: Sequence[tuple[str, str]], sizes: tuple[int, int] = (0, 0)) -> tuple[Tensor, ...]:
    """Return programs and answers as tensors.

    The answer is written in the steps right after the program. Padding comes later and cannot change it.

    Args:
        examples: programs and answers.
        sizes: P and A to pad to, if larger than those of the examples.

    Returns:
        codes: (B, T), indices into CHARACTERS; from the program's end on C, which means no character.
        steps: (B, A), the steps that write the answer.
        targets: (B, A), indices into SYMBOLS, with the end mark; NOT_SCORED afterward.
    """
    programs, answers = zip(*examples, strict=True)
    answers = [answer + END for answer in answers]
    P, A = (max(size, *map(len, texts)) for size, texts in zip(sizes, (programs, answers), strict=True))
    lengths = torch.tensor([len(program) for program in programs])
    codes = _indices(programs, P + A, CHARACTERS, len(CHARACTERS))
    return codes, lengths.unsqueeze(1) + torch.arange(A), _indices(answers, A, SYMBOLS, NOT_SCORED)


def _indices(texts: Sequence[str], width: int, alphabet: str, padding: int) -> Tensor:
    """Return the indices of characters in the alphabet, (len(texts), width)."""
    table = torch.full((128,), padding)
    table[list(alphabet.encode())] = torch.arange(len(alphabet))
    padded = bytearray("".join(text.ljust(width, "\0") for text in texts), "ascii")
    return table[torch.frombuffer(padded, dtype=torch.uint8).long()].view(-1, width)


def constant_accuracy(examples: Sequence[tuple[str, str]]) -> float:
    """Return the character accuracy of the best answer that does not depend on the program."""
    answers = [answer for _, answer in examples]
    places = [Counter(filter(None, place)) for place in itertools.zip_longest(*answers)]
    return sum(max(place.values()) for place in places) / sum(map(len, answers))


# ---- the model


class ExecuteModel(nn.Module):
    """A recurrent core that reads the program and writes the answer, and an MLP for each character written.

    As in DeepMind's script, the same core reads and writes, and its input is zero while it writes.

    Args:
        model: 'rmc', or 'lstm' for two LSTM layers with skip connections: the second layer also reads the
            input, and the MLP reads both layers.
        hidden_size: units of each LSTM layer.
        head_layers, head_units: number and width of the MLP's hidden ReLU layers.
        core: keyword arguments of RelationalMemory; CORE_DEFAULTS has the defaults.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(self, model: str, hidden_size: int, head_layers: int, head_units: int, **core: Any):
        super().__init__()
        core = CORE_DEFAULTS | core
        # Plain data for a checkpoint: ExecuteModel(**config) has the same shape.
        sizes = {"hidden_size": hidden_size, "head_layers": head_layers, "head_units": head_units}
        self.config = {"model": model, **sizes, **core}
        inputs = len(CHARACTERS)
        if model == "rmc":
            self.core = FastRelationalMemory(input_size=inputs, return_all_outputs=True, **core)
            width = self.core.output_size
        elif model == "lstm":
            sizes = (inputs, inputs + as_integer("hidden_size", hidden_size))
            self.core = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
            width = 2 * hidden_size
        else:
            raise ValueError(f"model must be 'rmc' or 'lstm', got {model!r}")
        self.head = answer_mlp(width, head_layers, head_units, len(SYMBOLS))

    def forward(self, codes: Tensor, steps: Tensor) -> Tensor:
        """Return logits (B, A, S) of the answer from codes (B, T) and steps (B, A)."""
        characters = torch.arange(len(CHARACTERS), device=codes.device)
        inputs = (codes.unsqueeze(2) == characters).to(self.head[0].weight.dtype)  # one-hot, (B, T, C)
        if isinstance(self.core, nn.ModuleList):
            first, second = self.core
            with fused_precision(first):
                lower, _ = first(inputs)
                upper, _ = second(torch.cat([inputs, lower], dim=2))
            outputs = torch.cat([lower, upper], dim=2)
        else:
            outputs, _ = self.core(inputs)
        return self.head(outputs.take_along_dim(steps.unsqueeze(2), dim=1))


def loss_and_counts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score answers from logits (B, A, S) and targets (B, A).

    Returns:
        loss: the sum over the batch of each answer's mean nats per character, the end mark included, ().
        counts: characters without end marks, how many of them are right, and how many answers are right in
            all characters and their end, (3,).
    """
    scored = targets != NOT_SCORED
    nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # (B, A)
    right = logits.argmax(dim=2) == targets
    characters = scored & (targets != SYMBOLS.index(END))
    counts = torch.stack([characters.sum(), (right & characters).sum(), (right | ~scored).all(dim=1).sum()])
    return (nats.sum(dim=1) / scored.sum(dim=1)).sum(), counts


@torch.no_grad()
def count_correct(model: nn.Module, batch: Sequence[Tensor], batch_size: int) -> Tensor:
    """Return the counts of `loss_and_counts` over many examples, computed batch_size at a time."""
    pieces = zip(*(part.split(batch_size) for part in batch), strict=True)
    return sum(loss_and_counts(model(codes, steps), targets)[1] for codes, steps, targets in pieces)


# ---- training


class LearningToExecute(trainer.Task):
    """Training on fresh programs. All processes draw the same batch and divide it."""

    kind = "learning_to_execute"
    sums = ("losses", "characters", "correct characters", "correct answers")
    score_name = "test_accuracy"
    higher_is_better = True

    def __init__(
        self,
        model: ExecuteModel,
        args: argparse.Namespace,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.args, self.device = model, args, device
        self.mine = processes.shard(args.batch_size)
        self.full_count, self.total_steps = args.batch_size, args.steps
        self.draw = random.Random(args.seed)
        # A captured step needs batches of one shape. On a CPU, shorter batches save time.
        on_gpu = device.type == "cuda"
        self.sizes = longest(args.program_kind, args.nesting, args.length) if on_gpu else (0, 0)
        examples = write_programs(args, args.test_examples, random.Random(TEST_SEED))
        self.chance = constant_accuracy(examples)
        mine = processes.shard(len(examples))
        self.test_set = [part[mine].to(device) for part in encode(examples)]

    def facts(self) -> dict[str, Any]:
        return {"chance": self.chance}

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.draw.getstate()}

    def load_state_dict(self, saved: Mapping[str, Any], step: int) -> None:
        self.draw.setstate(saved["random"])

    def next_batch(self) -> tuple[tuple[Tensor, ...], int]:
        examples = write_programs(self.args, self.args.batch_size, self.draw, self.args.difficulty)
        batch = encode(examples[self.mine], self.sizes)
        return tuple(part.to(self.device) for part in batch), self.args.batch_size

    def losses(self, model: nn.Module, state: None, *inputs: Tensor) -> tuple[Tensor, Tensor, None]:
        codes, steps, targets = inputs
        loss, counts = loss_and_counts(model(codes, steps), targets)
        return loss, torch.cat([loss.detach().view(1), counts]), None

    def report(self, trainer: Trainer, totals: dict[str, float], elapsed: float) -> tuple[dict, str, str]:
        count, speed = trainer.position.interval_count, trainer.timed_count / elapsed
        self.model.eval()
        counts = count_correct(self.model, self.test_set, self.args.batch_size)
        self.model.train()
        characters, right, answers = trainer.processes.all_reduce(counts).tolist()
        fields = {
            "loss": totals["losses"] / count,
            "accuracy": totals["correct characters"] / totals["characters"],
            "answers": totals["correct answers"] / count,
            "test_accuracy": right / characters,
            "test_answers": answers / self.args.test_examples,
            "examples_per_second": round(speed, 1),
        }
        self.test_accuracy = fields["test_accuracy"]
        text = "loss {loss:.4f} | train {accuracy:.1%} | test {test_accuracy:.1%}".format(**fields)
        return fields, text, f"{text}, whole answers {fields['test_answers']:.1%} | {speed:,.0f} examples/s"

    def after_report(self, trainer: Trainer) -> None:
        trainer.offer_best(self.test_accuracy, self.model)

    def finish(self, trainer: Trainer) -> None:
        if trainer.processes.is_main:
            trainer.write("final", **measure(trainer.load_best(self.device), self.args, self.device))


def measure(checkpoint: dict, args: argparse.Namespace, device: torch.device, show: int = 0) -> dict:
    """Measure a best.pt on fresh examples of full difficulty; print and return the result.

    Args:
        checkpoint: the contents of best.pt.
        args: the run's.
        device: where to compute.
        show: number of examples to print with the model's answers.
    """
    model = checkpoints.rebuild_model(checkpoint, {LearningToExecute.kind: ExecuteModel}).to(device)
    examples = write_programs(args, FINAL_TEST_FACTOR * args.test_examples, random.Random(FINAL_TEST_SEED))
    batch = [part.to(device) for part in encode(examples)]
    characters, right, whole = count_correct(model, batch, args.batch_size).tolist()
    scores = {"accuracy": right / characters, "answers": whole / len(examples), "examples": len(examples)}
    scores |= {"chance": constant_accuracy(examples), "best_step": checkpoint["scores"]["step"]}
    say(
        "best model (step {best_step:,}): {accuracy:.2%} of characters right (constant answer: {chance:.2%}) "
        "and {answers:.2%} of whole answers, {examples:,} fresh examples".format(**scores)
    )
    if show:
        codes, steps, _ = (part[:show] for part in batch)
        rows = model(codes, steps).argmax(dim=2).tolist()
        show_examples(
            args, examples[:show], ["".join(SYMBOLS[i] for i in row).partition(END)[0] for row in rows]
        )
    return scores


def show_examples(
    args: argparse.Namespace, examples: Sequence[tuple[str, str]], written: Sequence[str] = ()
) -> None:
    """Print programs of the kind that args describe, answers and, if given, what a model has written."""
    if args.program_kind in OPERATIONS:
        say(f"Answers are modulo 10^(length + 1) = {10 ** (args.length + 1):,}.\n")
    for (program, answer), text in itertools.zip_longest(examples, written):
        say(f"{program}\n    answer: {answer}" + ("" if text is None else f"   model: {text}") + "\n")

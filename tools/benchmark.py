"""Time the relational memory core against an LSTM and against its floor, the matrix products that it needs.

Examples:
    python tools/benchmark.py --quick                 two minutes on two CPU cores
    python tools/benchmark.py --threads 2 > cpu.md    everything, as Markdown tables

Sections (--only):
    lm       the language models: a training step, and the forward pass alone (evaluation)
    nth      the same for the Nth-farthest model
    core     the core alone: forward, and forward with backward
    step     one time step of one sequence, as generation and control need it, against nn.LSTMCell
    memory   peak memory of a training step, each variant in its own process

All variants of a table take turns, round after round, in rotating order: a busy machine slows them alike.
Times are medians with smallest and largest; a ratio is the median of the ratios within each round. A
training step is forward, backward, gradient clipping and Adam. Word frequencies are like a text's. "naive" is
the plain core with embedding and softmax inside the time loop and an Adam that is not fused.

The floor is the matrix products of the best arrangement known, without softmax, norms, gates, dropout or
optimiser. Forward, it is the products from the input to queries, keys, values and gates of all time steps at
once (with the two weight matrices multiplied beforehand where that is cheaper); per time step those of
queries, keys and values, the MLP, the memory's part of the gates and, with several slots, attention; and the
output layer in chunks (adaptive: the rows of each cluster) or the Nth-farthest model's head. A training step
adds the gradient of each input, and the gradient of each weight over all time steps at once.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import NamedTuple

import _project  # noqa: F401
from training import console, devices, flags, runs

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.softmax import choose_cutoffs
from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import RelationalMemory
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from tasks.nth_farthest import NthFarthestModel, make_batch

SECTIONS = ("lm", "nth", "core", "step", "memory")
SHORTEST_SAMPLE = 0.02  # seconds; several calls make one sample of a faster function
FEWEST_ROUNDS = 3  # a median of fewer means nothing
CHUNK = {"cpu": 256, "cuda": 2048}  # rows of the output layer at once, in the floor
NTH_DIMENSIONS = 16
RMC, PLAIN, NAIVE, LSTM, CELLS, FLOOR = "RMC", "RMC, plain core", "naive RMC", "LSTM", "LSTM, cells", "floor"
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Task:
    """Sizes of a model and its batch. The model's defaults are those of train_rmc.py and train_rnn.py."""

    batch: int = 32
    steps: int = 35  # time steps; for Nth farthest the number of vectors
    vocab_size: int | None = 33278  # None for Nth farthest
    adaptive: bool = False
    embedding: int = 192
    mem_slots: int = 1
    head_size: int = 192
    num_heads: int = 4
    key_size: int = 64
    mlp_layers: int = 3
    lstm_size: int = 300  # units of the LSTM, and its embedding size

    def __str__(self) -> str:
        if self.vocab_size is None:
            return f"Nth farthest, {self.batch} x {self.steps}, {self.mem_slots} slots"
        softmax = "adaptive" if self.adaptive else "full"
        return f"language model, {self.batch} x {self.steps}, {self.vocab_size:,} words, {softmax} softmax"

    @property
    def core(self) -> dict[str, int]:
        names = ("mem_slots", "head_size", "num_heads", "key_size")
        return {name: getattr(self, name) for name in names} | {"attention_mlp_layers": self.mlp_layers}

    @property
    def mem_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def input_size(self) -> int:
        return self.embedding if self.vocab_size else 3 * self.steps + NTH_DIMENSIONS


NTH = Task(1600, 8, None, False, 192, 8, 32, 8, 32, 2, 512)


class Plan(NamedTuple):
    """What is measured, and for how long: seconds after which a table gets no further round, 0 = no limit."""

    language_models: tuple[Task, ...]
    rounds: int
    seconds: float
    nth: Task = NTH


FULL = Plan(tuple(Task(b, t, adaptive=a) for b, t in ((32, 35), (64, 100)) for a in (False, True)), 7, 0)
QUICK = Plan(tuple(Task(16, 20, 10000, a) for a in (False, True)), 5, 2, replace(NTH, batch=100))


# ---- what is timed


class Model:
    """A model with its batch and optimiser. `train` and `forward` do one step and return nothing."""

    def __init__(self, task: Task, variant: str, device: torch.device, bf16: bool):
        torch.manual_seed(1)
        self.task, self.variant, self.device, self.bf16 = task, variant, device, bf16
        self.model = build_model(task, variant).to(device)
        self.inputs = make_inputs(task, device)
        self.state = self.model.initial_state(task.batch) if task.vocab_size else None
        # CUDA graphs as in training, which does without them for the adaptive softmax.
        captured = device.type == "cuda" and variant in (RMC, LSTM) and not task.adaptive
        # A learning rate of 0 costs the same and keeps the weights.
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=0.0, fused=variant != NAIVE, capturable=captured
        )
        self.train, self.forward = self._train, self._forward
        if captured:
            from training.cuda_graphs import CapturedStep

            self.train, self.forward = (CapturedStep(f, device) for f in (self._train, self._forward))

    def loss(self) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss of the batch in nats, and the state after it."""
        first, second = self.inputs
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.state is None:
                return F.cross_entropy(self.model(first).float(), second), None
            if self.variant == NAIVE:
                return naive_loss(self.model, first, second, self.state)
            return self.model.loss(first, second, self.state)

    def _train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, state = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        if state is not None:
            self.state.copy_(state.detach())

    @torch.no_grad()
    def _forward(self) -> None:
        self.model.eval()
        self.loss()


def build_model(task: Task, variant: str) -> nn.Module:
    """Build a model of a variant, on the CPU."""
    if task.vocab_size is None:
        kind = "lstm" if variant == LSTM else "rmc"
        model = NthFarthestModel(
            task.steps, NTH_DIMENSIONS, model=kind, hidden_size=task.lstm_size, **task.core
        )
    else:
        softmax = {"cutoffs": choose_cutoffs(task.vocab_size) if task.adaptive else None, "tied": True}
        options = {"dropout_input": 0.5, "dropout_output": 0.5, **softmax}
        if variant in (LSTM, CELLS):
            size, fused = task.lstm_size, variant == LSTM
            return RNNLM(task.vocab_size, "LSTM", size, size, fused=fused, **options)
        model = RelationalMemoryLM(task.vocab_size, task.embedding, **task.core, **options)
    if variant in (PLAIN, NAIVE):
        model.core.__class__ = RelationalMemory  # same parameters, without the fast path
    return model


def make_inputs(task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the batch of all variants: tokens and targets (B, T), or inputs (B, K, F) and targets (B,)."""
    generator = torch.Generator().manual_seed(2)
    if task.vocab_size is None:
        batch = make_batch(task.batch, task.steps, NTH_DIMENSIONS, generator)
    else:
        # Frequencies of about 1 / rank decide how many rows each cluster of the adaptive softmax gets.
        weights = 1 / (torch.arange(task.vocab_size) + 2.7)
        ids = torch.multinomial(weights, task.batch * (task.steps + 1), replacement=True, generator=generator)
        text = ids.view(task.batch, task.steps + 1)
        batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return batch[0].to(device), batch[1].to(device)


def naive_loss(model: nn.Module, tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a window and the state after it, with everything inside the time loop."""
    nats = 0
    for token, target in zip(tokens.unbind(1), targets.unbind(1), strict=True):
        embedded = F.dropout(model.embedding(token), model.dropout_input, model.training)
        state = model.core.step(embedded, state)
        hidden = F.dropout(model.projection(state.flatten(1)), model.dropout_output, model.training)
        nats = nats + model.output_layer(hidden, target)
    return nats / targets.numel(), state


# ---- the floor


class Product:
    """The matrix products of a linear layer, over `steps` time steps of `rows` rows each.

    Outputs serve as their own gradients, as only shapes matter. With `chunk`, the rows are taken in pieces.
    """

    def __init__(
        self, device: torch.device, rows: int, width: int, out: int, steps: int = 1, input_grad: bool = True,
        chunk: int | None = None,
    ):  # fmt: skip
        self.rows, self.chunk, self.has_input_grad = rows, chunk or max(rows, 1), input_grad
        self.inputs = torch.randn(steps, rows, width, device=device)
        self.outputs = torch.randn(steps, min(self.chunk, rows), out, device=device)
        self.weight, self.weight_grad = torch.randn(2, out, width, device=device)
        self.input_grad = torch.randn(rows, width, device=device)

    def forward(self, t: int = 0, train: bool = False) -> None:
        for start in range(0, self.rows, self.chunk):
            inputs = self.inputs[t, start : start + self.chunk]
            outputs = self.outputs[t, : len(inputs)]
            torch.mm(inputs, self.weight.t(), out=outputs)
            if train and self.chunk < self.rows:  # the next chunk overwrites the outputs
                torch.mm(outputs, self.weight, out=self.input_grad[start : start + self.chunk])
                torch.mm(outputs.t(), inputs, out=self.weight_grad)

    def backward(self, t: int = 0) -> None:
        if self.has_input_grad and self.chunk >= self.rows:
            torch.mm(self.outputs[t], self.weight, out=self.input_grad)

    def weight_gradient(self) -> None:
        if self.chunk >= self.rows:
            torch.mm(self.outputs.flatten(0, 1).t(), self.inputs.flatten(0, 1), out=self.weight_grad)


class Attention:
    """The two batched products of attention in one time step: scores, and the weighted sum of the values."""

    def __init__(self, device: torch.device, task: Task):
        heads, queries, keys = task.batch * task.num_heads, task.mem_slots, task.mem_slots + 1
        self.query, self.query_grad = torch.randn(2, heads, queries, task.key_size, device=device)
        self.key, self.key_grad = torch.randn(2, heads, keys, task.key_size, device=device)
        self.value, self.value_grad = torch.randn(2, heads, keys, task.head_size, device=device)
        self.weights, self.weights_grad = torch.randn(2, heads, queries, keys, device=device)
        self.update = torch.randn(heads, queries, task.head_size, device=device)

    def forward(self, t: int, train: bool = False) -> None:
        torch.bmm(self.query, self.key.transpose(1, 2), out=self.weights)
        torch.bmm(self.weights, self.value, out=self.update)

    def backward(self, t: int) -> None:
        torch.bmm(self.update, self.value.transpose(1, 2), out=self.weights_grad)
        torch.bmm(self.weights.transpose(1, 2), self.update, out=self.value_grad)
        torch.bmm(self.weights, self.key, out=self.query_grad)
        torch.bmm(self.weights.transpose(1, 2), self.query, out=self.key_grad)

    def weight_gradient(self) -> None:
        """Do nothing: attention has no weights."""


class Floor:
    """The matrix products of a task, explained at the top of this file."""

    def __init__(self, task: Task, device: torch.device):
        torch.manual_seed(1)
        self.steps = task.steps
        width, rows, count = task.mem_size, task.batch * task.mem_slots, task.batch * task.steps
        qkv, gates = task.num_heads * (2 * task.key_size + task.head_size), 2 * width
        apart = count * width * (task.input_size + qkv + gates)
        folded = (count + width) * task.input_size * (qkv + gates)
        learned = task.vocab_size is not None  # the task's vectors need no gradient, the embedding does
        if folded < apart:
            first = Product(device, qkv + gates, width, task.input_size)
            second = Product(device, count, task.input_size, qkv + gates, input_grad=learned)
        else:
            first = Product(device, count, task.input_size, width, input_grad=learned)
            second = Product(device, count, width, qkv + gates)
        self.before = [first, second]
        self.recurrent: list[Product | Attention] = [Product(device, rows, width, qkv, task.steps)]
        if task.mem_slots > 1:  # attention over two keys needs no matrix product
            self.recurrent.append(Attention(device, task))
        self.recurrent += [Product(device, rows, width, width, task.steps) for _ in range(task.mlp_layers)]
        self.recurrent.append(Product(device, rows, width, gates, task.steps))

        model, chunk = build_model(task, RMC), CHUNK[device.type]
        if task.vocab_size is None:
            head = [layer for layer in model.head if isinstance(layer, nn.Linear)]
            self.after = [
                Product(device, task.batch, layer.in_features, layer.out_features) for layer in head
            ]
            return
        self.after = [Product(device, count, task.mem_slots * width, task.embedding)]
        if not task.adaptive:
            self.after.append(Product(device, count, task.embedding, task.vocab_size, chunk=chunk))
            return
        targets = make_inputs(task, device)[1]
        layer, low = model.output_layer, choose_cutoffs(task.vocab_size)
        self.after.append(Product(device, count, task.embedding, layer.head.out_features, chunk=chunk))
        for start, stop, (project, _) in zip(low, [*low[1:], task.vocab_size], layer.tail, strict=True):
            inside = int(((targets >= start) & (targets < stop)).sum())
            self.after.append(Product(device, inside, task.embedding, project.out_features))
            self.after.append(Product(device, inside, project.out_features, stop - start, chunk=chunk))

    @torch.no_grad()
    def forward(self, train: bool = False) -> None:
        for product in self.before:
            product.forward()
        for t in range(self.steps):
            for product in self.recurrent:
                product.forward(t)
        for product in self.after:
            product.forward(train=train)

    @torch.no_grad()
    def train(self) -> None:
        self.forward(train=True)
        for product in reversed(self.after):
            product.backward()
            product.weight_gradient()
        for t in reversed(range(self.steps)):
            for product in reversed(self.recurrent):
                product.backward(t)
        for product in [*self.recurrent, *reversed(self.before)]:
            product.weight_gradient()
        for product in reversed(self.before):
            product.backward()


# ---- timing


class Bench:
    """The device, the clock and the way of measuring; prints the tables."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.device, self.bf16 = device, args.bf16
        self.plan = QUICK if args.quick else FULL
        self.rounds = args.rounds or self.plan.rounds
        self.clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def header(self, clock: str) -> str:
        about = runs.describe_environment()
        gpu = f"{', '.join(about['gpus'])}, CUDA {about['cuda']}, " if self.device.type == "cuda" else ""
        return (
            f"{gpu}{about['cpu']}, {about['cpu_cores']} cores; torch {about['torch']}; {about['threads']} "
            f"CPU threads; {'bf16' if self.bf16 else 'float32'}; commit {about['commit']}\n\n"
            f"Milliseconds of {clock} time: median (smallest - largest) of up to {self.rounds} rounds."
        )

    def time(self, call: Callable[[], object], repeats: int) -> float:
        """Return the seconds of one call, averaged over `repeats` calls."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = self.clock()
        for _ in range(repeats):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (self.clock() - began) / repeats

    def measure(self, calls: Calls) -> dict[str, list[float]]:
        """Return milliseconds per call, one sample per round for each label, in rotating order."""
        repeats = {}
        for label, call in calls.items():
            for _ in range(5 if self.device.type == "cuda" else 1):  # a CUDA graph is captured meanwhile
                seconds = self.time(call, 1)
            repeats[label] = max(1, min(1000, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-6))))
        samples: dict[str, list[float]] = {label: [] for label in calls}
        labels, began = list(calls), time.perf_counter()
        for number in range(self.rounds):
            if number >= FEWEST_ROUNDS and 0 < self.plan.seconds < time.perf_counter() - began:
                break
            first = number % len(labels)
            for label in labels[first:] + labels[:first]:
                samples[label].append(1000 * self.time(calls[label], repeats[label]))
        return samples

    def table(self, title: str, calls: Calls, items: int = 0) -> None:
        """Measure and print a table, with the tokens or examples per second if a call has `items` of them."""
        print(f"... {title}", file=sys.stderr, flush=True)
        samples = self.measure(calls)
        against = [label for label in (FLOOR, LSTM, NAIVE) if label in calls]
        columns = ["ms", *(["per second"] if items else []), *(f"x {label}" for label in against)]
        rows = []
        for label, own in samples.items():
            per_second = [f"{1000 * items / median(own):,.0f}"] if items else []
            rows.append([label, spread(own), *per_second])
            rows[-1] += [f"{ratio(own, samples[other]):.2f}" for other in against]
        say_table(title, ["variant", *columns], rows)
        calls.clear()  # a model and its captured graphs refer to each other
        gc.collect()

    # ---- sections

    def models(self, task: Task, variants: Sequence[str]) -> None:
        """Print the tables of a task: training step and forward pass."""
        for phase, title in (("train", "training step"), ("forward", "forward pass")):
            calls = {
                variant: getattr(Model(task, variant, self.device, self.bf16), phase) for variant in variants
            }
            calls[FLOOR] = getattr(Floor(task, self.device), phase)
            items = task.batch * (task.steps if task.vocab_size else 1)
            self.table(f"{task}: {title}", calls, items)

    def core(self, task: Task) -> None:
        """Print the table of the core alone, without and with backward."""
        inputs = torch.randn(task.batch, task.steps, task.input_size, device=self.device)
        calls: Calls = {}
        for label, kind in ((RMC, FastRelationalMemory), (PLAIN, RelationalMemory)):
            core = kind(input_size=task.input_size, return_all_outputs=True, **task.core).to(self.device)

            def train(core: nn.Module = core) -> None:
                core.zero_grad()
                core(inputs)[0].sum().backward()

            forward = torch.no_grad()(functools.partial(core, inputs))
            calls |= {f"{label}: forward": forward, f"{label}: forward and backward": train}
        self.table(f"the core alone, {task.batch} x {task.steps}", calls, task.batch * task.steps)

    @torch.no_grad()
    def step(self, task: Task) -> None:
        """Print the table of one time step of one sequence."""
        x = torch.randn(1, task.input_size, device=self.device)
        core = FastRelationalMemory(input_size=task.input_size, **task.core).to(self.device)
        cell = nn.LSTMCell(task.input_size, task.mem_size, device=self.device)
        memory, state = core.initial_state(1), x.new_zeros(2, 1, task.mem_size).unbind()
        calls = {RMC: lambda: core.step(x, memory), LSTM: lambda: cell(x, state)}
        self.table(f"one time step of one sequence, state of {task.mem_size} units", calls)

    def memory(self, tasks: Sequence[Task]) -> None:
        """Print the table of peak memory."""
        rows = []
        for task in tasks:
            for variant in (NAIVE, PLAIN, RMC, LSTM) if task.vocab_size else (PLAIN, RMC, LSTM):
                peak, start = self.peak(task, variant)
                rows.append([str(task), variant, f"{peak:,.0f}", f"{peak - start:,.0f}"])
        say_table("peak memory of a training step", ["task", "variant", "MB", "MB above start"], rows)

    def peak(self, task: Task, variant: str) -> tuple[float, float]:
        """Return the peak of two training steps in a process of its own, and its start, in MB.

        On the CPU, resident memory; the start includes one step of a minimal model, which loads libraries. On
        a GPU, allocated memory; the start is 0.
        """
        print(f"... memory: {task}: {variant}", file=sys.stderr, flush=True)
        request = {
            "task": asdict(task), "variant": variant, "device": str(self.device), "bf16": self.bf16,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        answer = subprocess.run(
            [sys.executable, __file__, "--peak-of", json.dumps(request)], capture_output=True, text=True
        )
        if answer.returncode:
            last = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
            print(f"warning: peak memory of {variant} is unknown ({last})", file=sys.stderr)
            return math.nan, math.nan
        peak, start = json.loads(answer.stdout.splitlines()[-1])
        return peak / 1e6, start / 1e6


def say_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table with its title."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    console.say("\n".join([f"\n**{title}**\n", lines[0], "|---" * len(columns) + "|", *lines[1:]]))


def spread(samples: Sequence[float]) -> str:
    """Return 'median (smallest - largest)'."""
    digits = 0 if median(samples) >= 100 else 1 if median(samples) >= 10 else 2
    numbers = (median(samples), min(samples), max(samples))
    return "{} ({} - {})".format(*(f"{number:,.{digits}f}" for number in numbers))


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return median(a / b for a, b in zip(own, other, strict=True))


def report_peak(request: str) -> None:
    """Print the peak and the start in bytes, for Bench.peak."""
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    device, task = torch.device(wanted["device"]), Task(**wanted["task"])
    devices.keep_freed_memory()

    def run(task: Task, steps: int) -> int:
        model = Model(task, wanted["variant"], device, wanted["bf16"])
        for _ in range(steps):
            model.train()
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()

    small = {"batch": 2, "steps": 2, "embedding": 4, "head_size": 4, "key_size": 4, "lstm_size": 4}
    start = run(replace(task, **small, vocab_size=task.vocab_size and 50), 1)
    print(json.dumps([run(task, 5 if device.type == "cuda" else 2), 0 if device.type == "cuda" else start]))


def peak_resident() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    try:  # on Linux getrusage would include the process that started this one
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sections on the command line."""
    introduction, _, _ = __doc__.partition("\nExamples:")
    parser = argparse.ArgumentParser(description=introduction, formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes and few rounds: two minutes on two CPU cores")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
        help=f"sections to run, of {', '.join(SECTIONS)}")  # fmt: skip
    add("--rounds", type=flags.positive_int, metavar="N", help="samples of each variant (7, with --quick 5)")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: processor time of all threads, for a busy machine; best with --threads 1")  # fmt: skip
    add("--cuda", action="store_true", help="measure on the GPU")
    add("--bf16", action="store_true", help="matrix products in bfloat16, except in the floor")
    add("--threads", type=flags.thread_count, default=0, metavar="N", help="CPU threads; 0 = torch's choice")
    add("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak_of is not None:
        return report_peak(args.peak_of)
    if args.cuda and args.clock == "cpu":
        parser.error("--clock cpu cannot time a GPU: use --clock wall")
    device = devices.choose_device(args.cuda)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    devices.keep_freed_memory()
    bench = Bench(args, device)
    console.say(bench.header(args.clock))
    language_models, nth = bench.plan.language_models, bench.plan.nth
    for task in language_models if "lm" in args.only else ():
        bench.models(task, (RMC, PLAIN, NAIVE, LSTM, CELLS))
    if "nth" in args.only:
        bench.models(nth, (RMC, PLAIN, LSTM))
    for task in (*language_models[::2], nth) if "core" in args.only else ():
        bench.core(task)
    if "step" in args.only:
        bench.step(language_models[0])
    if "memory" in args.only:
        bench.memory([*language_models[-2:], nth])


if __name__ == "__main__":
    console.run_script(main, lower="the sizes with --quick, or choose sections with --only")

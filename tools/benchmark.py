"""Times the relational memory core against an LSTM and against the floor: the matrix products that it needs.

Examples:
    python benchmark.py --quick                                             two minutes on two CPU cores
    python benchmark.py --markdown results/cpu.md --csv results/cpu.csv     everything
    python benchmark.py --cuda --only lm options

Sections (--only):
    lm         the language models, a training step and the forward pass alone, full and adaptive softmax
    nth        the Nth-farthest model
    options    each option switched by itself, all else as in the training scripts
    sequence, batch, slots, size    how the cost of a training step grows with one of them, all else fixed
    memory     peak memory of a training step, each variant in a process of its own

How to read the tables: variants take turns, round after round, in rotating order, so that a busy or throttled
machine slows them alike. Times are medians with smallest and largest; a ratio is the median of the ratios
within each round. A training step is forward, backward, gradient clipping and Adam; "forward" is evaluation,
without gradients or dropout. Words are drawn with frequencies like those of a text.

The floor is nothing but matrix products, with the shapes and in the order of the best arrangement known, on
tensors made beforehand: no softmax, norm, gate, dropout, clipping or optimiser. It contains, forward,
    * the input's way into the first block's queries, keys, values and into the gates, all time steps at once:
      one product with weights multiplied together beforehand (and that multiplication) where it is cheaper;
    * per time step, with B * N rows: queries, keys and values, the MLP's layers, the memory's part of the
      gates, and with more than one slot the attention's two batched products;
    * the projection to the embedding's size and the output layer in the chunks that the loss uses (adaptive:
      only the clusters' own rows), or the Nth-farthest model's head;
and for a training step the two products behind each: one for the gradient of the input, per time step, and
one for the gradient of the weight, over all time steps at once.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relational_rnn_general
from layers import softmax as output_layers
from layers.softmax import AdaptiveSoftmax, choose_cutoffs, plain_linear_cross_entropy
from nth_farthest import NthFarthestModel, loss_and_correct, make_batch
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from training import console, cuda_graphs, devices, files, flags, runs
from training.console import UserError
from training.cuda_graphs import CapturedStep

SECTIONS = ("lm", "nth", "options", "sequence", "batch", "slots", "size", "memory")
CLIP = 0.1
# A sample shorter than this says more of the clock than of the work: then several calls make one sample.
SHORTEST_SAMPLE = 0.02  # seconds
FEWEST_ROUNDS = 3  # of fewer, a median says nothing: one disturbance can put the step below its own floor


# ---- what is timed


@dataclass(frozen=True)
class Task:
    """Sizes of a model and of its batch. The defaults are those of train_rmc.py on WikiText-2."""

    kind: str = "lm"  # 'lm' or 'nth'
    batch: int = 64
    steps: int = 100  # time steps; of the Nth-farthest task the number of vectors
    vocab_size: int = 33278
    adaptive: bool = False
    mem_slots: int = 1
    num_heads: int = 4
    head_size: int = 192  # the language model's embedding size too
    key_size: int = 64
    mlp_layers: int = 3
    lstm_size: int = 300  # of the language model's embedding too; about as many parameters

    def __str__(self) -> str:
        if self.kind == "nth":
            return f"Nth farthest, {self.batch} x {self.steps}, {self.mem_slots} slots"
        softmax = "adaptive" if self.adaptive else "full"
        return (
            f"language model, {self.batch} x {self.steps}, {softmax} softmax over {self.vocab_size:,} words"
        )

    @property
    def mem_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def input_size(self) -> int:
        return self.head_size if self.kind == "lm" else 3 * self.steps + NTH_DIMENSIONS

    @property
    def cutoffs(self) -> list[int] | None:
        return choose_cutoffs(self.vocab_size) if self.adaptive else None


NTH_DIMENSIONS = 16
NTH = Task(
    "nth",
    batch=1600,
    steps=8,
    mem_slots=8,
    num_heads=8,
    head_size=32,
    key_size=32,
    mlp_layers=2,
    lstm_size=512,
)


@dataclass(frozen=True)
class Variant:
    """One way to compute a task. The defaults are what the training scripts do."""

    label: str
    model: str = "rmc"  # 'rmc', 'lstm' or 'floor'
    fast: bool = True  # the core's fast path, not its plain step; the LSTM's fused layer, not its loop
    per_step_loss: bool = False  # embedding, output layer and softmax at every time step, as written naively
    deferred: bool | None = None  # weight gradients after the time loop; None = by the core's own rule
    chunked: bool = True  # cross-entropy in chunks, not on all logits at once
    fused_adam: bool = True
    graph: bool = True  # capture as a CUDA graph; no effect on a CPU
    tf32: bool = True  # no effect on a CPU
    bf16: bool = False


NAIVE = Variant(
    "naive: plain step, softmax per step, Adam unfused",
    fast=False,
    per_step_loss=True,
    chunked=False,
    fused_adam=False,
    graph=False,
)
NAIVE_FUSED_ADAM = replace(NAIVE, label="naive with fused Adam", fused_adam=True)
PLAIN = Variant("RMC plain step", fast=False, graph=False)
FAST = Variant("RMC fast path")
LSTM = Variant("LSTM fused", model="lstm")
LSTM_LOOP = Variant("LSTM loop of cells", model="lstm", fast=False, graph=False)
FLOOR = Variant("floor: matrix products only", model="floor")
EACH_STEP = replace(FAST, label="RMC fast path, weight gradients at every step", deferred=False)
AFTER_LOOP = replace(FAST, label="RMC fast path, weight gradients after the loop", deferred=True)

LM_VARIANTS = [NAIVE, NAIVE_FUSED_ADAM, PLAIN, FAST, LSTM, LSTM_LOOP, FLOOR]
NTH_VARIANTS = [
    replace(PLAIN, fused_adam=False, label="naive: plain step, Adam unfused"),
    PLAIN,
    FAST,
    LSTM,
    FLOOR,
]


def distinct(variants: Sequence[Variant], phase: str) -> list[Variant]:
    """The variants without those that do the same as one before: forward, Adam makes no difference."""
    if phase == "train":
        return list(variants)
    return list(
        {replace(variant, label="", fused_adam=True): variant for variant in reversed(variants)}.values()
    )[::-1]


def option_variants(task: Task, device: torch.device) -> list[Variant]:
    """The fast path with one option switched in each variant; first as it is, last the floor."""
    variants = [
        FAST,
        replace(FAST, fast=False, label="fast path off: plain step"),
        EACH_STEP,
        AFTER_LOOP,
        replace(FAST, fused_adam=False, label="fused Adam off"),
    ]
    if task.kind == "lm":
        variants.append(replace(FAST, chunked=False, label="chunked cross-entropy off"))
    variants.append(replace(FAST, bf16=True, label="bf16 on"))
    if device.type == "cuda":
        variants += [
            replace(FAST, graph=False, label="CUDA graph off"),
            replace(FAST, tf32=False, label="TF32 off"),
            replace(FAST, bf16=True, graph=False, label="bf16 on, CUDA graph off"),
            replace(LSTM, graph=False, label="LSTM fused, CUDA graph off"),
        ]
    return [*variants, LSTM, replace(LSTM, bf16=True, label="LSTM fused, bf16 on"), FLOOR]


@contextmanager
def settings(variant: Variant, device: torch.device) -> Iterator[None]:
    """The switches of a variant that belong to whole modules, set for the duration of a call."""
    changes = []
    if variant.deferred is not None:
        changes.append((relational_rnn_general, "DEFERRED_ROWS", sys.maxsize if variant.deferred else 0))
        changes.append((relational_rnn_general, "DEFERRED_SPAN", sys.maxsize))
    if not variant.chunked:
        changes.append((output_layers, "linear_cross_entropy", plain_linear_cross_entropy))
    before = [getattr(module, name) for module, name, _ in changes]
    precision = torch.get_float32_matmul_precision()
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if variant.tf32 else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


class ModelRunner:
    """A model, its batch and its optimiser: `train()` is one training step, `forward()` one evaluation."""

    def __init__(self, task: Task, variant: Variant, device: torch.device, dropout: float = 0.5):
        torch.manual_seed(1)
        self.task, self.variant, self.device = task, variant, device
        self.model = build_model(task, variant, dropout).to(device)
        self.inputs = make_inputs(task, device)
        graph = can_be_captured(task, variant.graph)
        # A learning rate of 0 does all of the work and leaves every round the same weights to do it on.
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=0.0,
            fused=variant.fused_adam,
            capturable=device.type == "cuda" and graph,
        )
        self.state = self.model.initial_state(task.batch) if task.kind == "lm" else None
        self.notes: list[str] = []
        if device.type == "cuda" and variant.bf16 and variant.model == "lstm" and variant.fast:
            self.notes.append("fused layers in float32")
        self._train, self._forward = (
            CapturedStep(function, device, graph, on_failure=self.notes.append)
            for function in (self._train_step, self._evaluate)
        )

    def train(self) -> Tensor:
        self.model.train()
        with settings(self.variant, self.device):
            return self._train(*self.inputs)

    def forward(self) -> Tensor:
        self.model.eval()
        with settings(self.variant, self.device):
            return self._forward(*self.inputs)

    def loss(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean nats and the state after."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.bf16):
            if self.task.kind == "nth":
                return loss_and_correct(self.model(inputs[0]), inputs[1])[0], None
            if self.variant.per_step_loss:
                return per_step_loss(self.model, *inputs, self.state)
            return self.model.loss(*inputs, self.state)

    def _train_step(self, *inputs: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss, state = self.loss(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        if state is not None:
            self.state.copy_(state.detach())
        return loss.detach()

    @torch.no_grad()
    def _evaluate(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs)[0]


def can_be_captured(task: Task, wanted: bool = True) -> bool:
    """Whether CUDA graphs are tried: not with adaptive softmax, which waits for the device, as in training.

    The floor goes without them there, too, so that both launch operation by operation.
    """
    return wanted and not task.adaptive


def build_model(task: Task, variant: Variant, dropout: float = 0.5) -> nn.Module:
    """The model of a variant, on the CPU; `dropout` at every place that has one."""
    if task.kind == "nth":
        model = NthFarthestModel(
            task.steps,
            NTH_DIMENSIONS,
            variant.model,
            task.mem_slots,
            task.head_size,
            task.num_heads,
            attention_mlp_layers=task.mlp_layers,
            key_size=task.key_size,
            hidden_size=task.lstm_size,
        )
    elif variant.model == "lstm":
        return RNNLM(
            task.vocab_size,
            "LSTM",
            task.lstm_size,
            task.lstm_size,
            dropout_input=dropout,
            dropout_output=dropout,
            cutoffs=task.cutoffs,
            tied=True,
            fused=variant.fast,
        )
    else:
        model = RelationalMemoryLM(
            task.vocab_size,
            task.head_size,
            task.mem_slots,
            task.head_size,
            task.num_heads,
            key_size=task.key_size,
            attention_mlp_layers=task.mlp_layers,
            dropout_input=dropout,
            dropout_output=dropout,
            cutoffs=task.cutoffs,
        )
    if variant.model == "rmc":
        model.core.fast = variant.fast
    return model


def make_inputs(task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch of all variants: tokens and targets (B, T), or inputs (B, K, F) and targets (B,)."""
    generator = torch.Generator().manual_seed(2)
    if task.kind == "nth":
        batch = make_batch(task.batch, task.steps, NTH_DIMENSIONS, generator)
    else:
        # Frequencies of about 1 / rank, as of words: they decide how many rows each cluster gets.
        weights = 1 / (torch.arange(task.vocab_size) + 2.7)
        ids = torch.multinomial(weights, task.batch * (task.steps + 1), replacement=True, generator=generator)
        text = ids.view(task.batch, task.steps + 1)
        batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return tuple(part.to(device) for part in batch)


def per_step_loss(
    model: RelationalMemoryLM, tokens: Tensor, targets: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean loss of a window as one would first write it: all of it, the softmax too, in the time loop."""
    nats = 0
    for token, target in zip(tokens.unbind(1), targets.unbind(1), strict=True):
        embedded = F.dropout(model.embedding(token), model.dropout_input, model.training)
        state = model.core.step(embedded, state)
        hidden = F.dropout(model.projection(state.flatten(1)), model.dropout_output, model.training)
        nats = nats + model.output_layer(hidden, target)
    return nats / targets.numel(), state


# ---- the floor


class Product:
    """A linear layer's products, over `steps` time steps of `rows` rows, on tensors made beforehand."""

    def __init__(
        self, device: torch.device, rows: int, width: int, out: int, steps: int = 1, input_grad: bool = True
    ):
        self.inputs, self.outputs = _randn(device, steps, rows, width), _randn(device, steps, rows, out)
        self.weight, self.weight_grad = _randn(device, out, width), _randn(device, out, width)
        self.input_grad = _randn(device, rows, width) if input_grad else None
        self.flops = 2 * steps * rows * width * out

    def forward(self, t: int = 0) -> None:
        torch.mm(self.inputs[t], self.weight.t(), out=self.outputs[t])

    def backward(self, t: int = 0) -> None:
        """The gradient of step t's input. Outputs serve as their own gradients: only shapes matter here."""
        if self.input_grad is not None:
            torch.mm(self.outputs[t], self.weight, out=self.input_grad)

    def weight_gradient(self) -> None:
        torch.mm(self.outputs.flatten(0, 1).t(), self.inputs.flatten(0, 1), out=self.weight_grad)

    @property
    def backward_flops(self) -> int:
        return self.flops * (1 if self.input_grad is None else 2)


class ChunkedProduct:
    """The output layer's products in chunks of rows, whose outputs are overwritten by the next chunk's."""

    def __init__(self, device: torch.device, rows: int, width: int, out: int):
        self.chunk = min(output_layers.chunk_rows(device), max(rows, 1))
        self.inputs, self.outputs = _randn(device, rows, width), _randn(device, self.chunk, out)
        self.weight, self.weight_grad = _randn(device, out, width), torch.zeros(out, width, device=device)
        self.input_grad = _randn(device, rows, width)
        self.flops = 2 * rows * width * out
        self.backward_flops = 2 * self.flops

    def run(self, backward: bool) -> None:
        for inputs, input_grad in zip(
            self.inputs.split(self.chunk), self.input_grad.split(self.chunk), strict=True
        ):
            outputs = self.outputs[: len(inputs)]
            torch.mm(inputs, self.weight.t(), out=outputs)
            if backward:
                torch.mm(outputs, self.weight, out=input_grad)
                torch.mm(outputs.t(), inputs, out=self.weight_grad)


class Attention:
    """The two batched products of one time step's attention: scores, and the weighted sum of values."""

    def __init__(self, device: torch.device, task: Task):
        heads, queries, keys = task.batch * task.num_heads, task.mem_slots, task.mem_slots + 1
        self.query, self.key = (
            _randn(device, heads, queries, task.key_size),
            _randn(device, heads, keys, task.key_size),
        )
        self.value, self.update = (
            _randn(device, heads, keys, task.head_size),
            _randn(device, heads, queries, task.head_size),
        )
        self.weights = _randn(device, heads, queries, keys)
        self.query_grad, self.key_grad, self.value_grad, self.weights_grad = (
            torch.empty_like(x) for x in (self.query, self.key, self.value, self.weights)
        )
        self.flops = 2 * task.steps * heads * queries * keys * (task.key_size + task.head_size)
        self.backward_flops = 2 * self.flops

    def forward(self, t: int) -> None:
        torch.bmm(self.query, self.key.transpose(1, 2), out=self.weights)
        torch.bmm(self.weights, self.value, out=self.update)

    def backward(self, t: int) -> None:
        torch.bmm(self.update, self.value.transpose(1, 2), out=self.weights_grad)
        torch.bmm(self.weights.transpose(1, 2), self.update, out=self.value_grad)
        torch.bmm(self.weights, self.key, out=self.query_grad)
        torch.bmm(self.weights.transpose(1, 2), self.query, out=self.key_grad)

    def weight_gradient(self) -> None:
        """Attention has no weights of its own."""


class Floor:
    """The matrix products of a task and nothing else; see the module's docstring for what they are."""

    def __init__(self, task: Task, device: torch.device):
        torch.manual_seed(1)
        self.task, self.device = task, device
        self.notes: list[str] = []
        width, rows = task.mem_size, task.batch * task.mem_slots
        count = task.batch * task.steps
        qkv, gates = task.num_heads * (2 * task.key_size + task.head_size), 2 * width

        # From the input to queries, keys, values and gates: by way of the projected row, or folded.
        apart = count * width * (task.input_size + qkv + gates)
        folded = (count + width) * task.input_size * (qkv + gates)
        learned_input = task.kind == "lm"  # the embedding; the task's vectors need no gradient
        if folded < apart:
            self.before = [
                Product(device, qkv + gates, width, task.input_size),
                Product(device, count, task.input_size, qkv + gates, input_grad=learned_input),
            ]
        else:
            self.before = [
                Product(device, count, task.input_size, width, input_grad=learned_input),
                Product(device, count, width, qkv + gates),
            ]

        self.recurrent: list[Product | Attention] = [Product(device, rows, width, qkv, task.steps)]
        if task.mem_slots > 1:  # attention over two keys needs no matrix product
            self.recurrent.append(Attention(device, task))
        self.recurrent += [Product(device, rows, width, width, task.steps) for _ in range(task.mlp_layers)]
        self.recurrent.append(Product(device, rows, width, gates, task.steps))

        self.chunked: list[ChunkedProduct] = []
        if task.kind == "nth":
            head = [layer for layer in build_model(task, FAST).head if isinstance(layer, nn.Linear)]
            self.after = [
                Product(device, task.batch, layer.in_features, layer.out_features) for layer in head
            ]
        else:
            self.after = [Product(device, count, task.mem_slots * width, task.head_size)]
            if not task.adaptive:
                self.chunked.append(ChunkedProduct(device, count, task.head_size, task.vocab_size))
            else:
                layer = AdaptiveSoftmax(task.head_size, task.vocab_size, task.cutoffs)
                targets = make_inputs(task, torch.device("cpu"))[1]
                self.chunked.append(ChunkedProduct(device, count, task.head_size, layer.head.out_features))
                for (low, high), (project, _) in zip(layer.bounds, layer.tail, strict=True):
                    inside = int(((targets >= low) & (targets < high)).sum())
                    self.after.append(Product(device, inside, task.head_size, project.out_features))
                    self.chunked.append(ChunkedProduct(device, inside, project.out_features, high - low))
        self._train, self._forward = (
            CapturedStep(function, device, can_be_captured(task), on_failure=self.notes.append)
            for function in (self._run_train, self._run_forward)
        )

    def flops(self, backward: bool) -> int:
        """Floating point operations, a multiplication and an addition each counted, of one call."""
        products = [*self.before, *self.recurrent, *self.after, *self.chunked]
        return sum(p.flops + (p.backward_flops if backward else 0) for p in products)

    def train(self) -> None:
        with settings(FLOOR, self.device):
            self._train()

    def forward(self) -> None:
        with settings(FLOOR, self.device):
            self._forward()

    @torch.no_grad()
    def _run_forward(self) -> None:
        self._products_forward()
        for product in self.chunked:
            product.run(backward=False)

    @torch.no_grad()
    def _run_train(self) -> None:
        self._products_forward()
        for product in self.chunked:
            product.run(backward=True)
        for product in reversed(self.after):
            product.backward()
            product.weight_gradient()
        for t in reversed(range(self.task.steps)):
            for product in reversed(self.recurrent):
                product.backward(t)
        for product in self.recurrent:
            product.weight_gradient()
        for product in reversed(self.before):
            product.backward()
            product.weight_gradient()

    def _products_forward(self) -> None:
        for product in self.before:
            product.forward()
        for t in range(self.task.steps):
            for product in self.recurrent:
                product.forward(t)
        for product in self.after:
            product.forward()


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device)


# ---- timing


def make_runner(task: Task, variant: Variant, device: torch.device) -> ModelRunner | Floor:
    return Floor(task, device) if variant.model == "floor" else ModelRunner(task, variant, device)


def warm_up(call: Callable[[], object], device: torch.device) -> int:
    """Uncounted calls, in which caches fill, libraries choose algorithms and graphs are captured.

    Returns:
        How many calls make a sample that is long enough to time.
    """
    for _ in range(cuda_graphs.WARMUP_CALLS + 2 if device.type == "cuda" else 1):
        duration = _time(call, 1, device)
    return max(1, min(1000, math.ceil(SHORTEST_SAMPLE / max(duration, 1e-6))))


def measure(
    calls: dict[str, Callable[[], object]],
    repeats: dict[str, int],
    rounds: int,
    seconds: float,
    device: torch.device,
) -> dict[str, list[float]]:
    """Milliseconds per call: for each label one sample per round, all labels taking turns.

    Args:
        calls: what to time, by label.
        repeats: calls that make one sample, by label.
        rounds: samples of each.
        seconds: after this time no round beyond the first three is begun; 0 = no limit.
        device: is waited for before the clock is read.
    """
    samples: dict[str, list[float]] = {label: [] for label in calls}
    labels, began = list(calls), time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and seconds and time.perf_counter() - began > seconds:
            break
        first = number % max(1, len(labels))
        for label in labels[first:] + labels[:first]:
            samples[label].append(1000 * _time(calls[label], repeats[label], device) / repeats[label])
    return samples


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds for all repeats together, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


# ---- results


@dataclass
class Row:
    """One line of the results: what was measured, of what. None where a column does not apply."""

    section: str
    task: str
    variant: str
    phase: str  # 'train' or 'forward'
    batch: int
    steps: int
    mem_slots: int
    mem_size: int
    vocab_size: int | None
    softmax: str | None
    rounds: int = 0
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    per_second: float | None = None  # tokens, or examples of the Nth-farthest task
    unit: str = "tokens"
    ratio_to_floor: float | None = None
    ratio_to_lstm: float | None = None
    faster_than_naive: float | None = None
    gflop_per_s: float | None = None  # of the floor's products
    peak_mb: float | None = None  # of the process, or of what was allocated on the GPU
    peak_above_start_mb: float | None = None
    note: str = ""


def new_row(section: str, task: Task, variant: Variant, phase: str) -> Row:
    lm = task.kind == "lm"
    return Row(
        section,
        str(task),
        variant.label,
        phase,
        task.batch,
        task.steps,
        task.mem_slots,
        task.mem_size,
        task.vocab_size if lm else None,
        ("adaptive" if task.adaptive else "full") if lm else None,
        unit="tokens" if lm else "examples",
    )


@dataclass
class Report:
    """All rows, and the tables as they are printed."""

    device: torch.device
    rounds: int
    seconds: float
    csv_path: Path | None = None
    markdown_path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    markdown: list[str] = field(default_factory=list)
    environment: dict[str, object] = field(default_factory=dict)
    match: Sequence[str] = ()  # parts of labels; other variants are left out

    def time(self, section: str, task: Task, variants: Sequence[Variant], phase: str = "train") -> list[Row]:
        """Times the variants of one task against each other; one row for each."""
        variants = [v for v in distinct(variants, phase) if self.wants(v)]
        rows = {variant.label: new_row(section, task, variant, phase) for variant in variants}
        runners: dict[str, ModelRunner | Floor] = {}
        repeats: dict[str, int] = {}
        for variant in variants:
            say(f"{section}: {task}, {phase}: {variant.label}")
            try:
                runner = make_runner(task, variant, self.device)
                repeats[variant.label] = warm_up(getattr(runner, phase), self.device)
                runners[variant.label] = runner
            except (MemoryError, RuntimeError) as error:
                if not console.is_out_of_memory(error):
                    raise
                rows[variant.label].note = "out of memory"
            if rows[variant.label].note:
                runner = None
                self.free()
        calls = {label: getattr(runner, phase) for label, runner in runners.items()}
        samples = measure(calls, repeats, self.rounds, self.seconds, self.device)
        for label, runner in runners.items():
            self._fill(rows[label], runner, samples)
        self.rows += rows.values()
        runner = None
        for held in (runners, calls):
            held.clear()
        self.free()
        return list(rows.values())

    def free(self) -> None:
        """Gives memory back that no runner needs any more.

        A runner and its captured steps refer to each other. Without a collection their memory would not be
        there for the next ones, and a graph could be destroyed while another is being captured.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wants(self, variant: Variant) -> bool:
        """Whether the variant is to be measured."""
        return not self.match or any(part in variant.label for part in self.match)

    def _fill(self, row: Row, runner: ModelRunner | Floor, samples: dict[str, list[float]]) -> None:
        own = samples[row.variant]

        def ratio(label: str, inverse: bool = False) -> float | None:
            others = samples.get(label)
            if others is None:
                return None
            return median(b / a if inverse else a / b for a, b in zip(own, others, strict=True))

        row.rounds, row.median_ms, row.min_ms, row.max_ms = len(own), median(own), min(own), max(own)
        items = row.batch * (row.steps if row.unit == "tokens" else 1)
        row.per_second = 1000 * items / row.median_ms
        row.ratio_to_floor, row.ratio_to_lstm = ratio(FLOOR.label), ratio(LSTM.label)
        naive = next((label for label in samples if label.startswith("naive: ")), "")
        row.faster_than_naive = ratio(naive, inverse=True)
        if isinstance(runner, Floor):
            row.gflop_per_s = runner.flops(backward=row.phase == "train") / row.median_ms / 1e6
        row.note = "; ".join(runner.notes)

    def show(self, title: str, columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> None:
        """Prints a table, keeps it for the Markdown file, and writes both files as far as they go."""
        if not rows:
            return
        shown = {name: [cell(row) for row in rows] for name, cell in columns.items()}
        shown = {name: cells for name, cells in shown.items() if any(cells)}
        lines = list(zip(*shown.values(), strict=True))
        widths = [max(map(len, [name, *cells])) for name, cells in shown.items()]

        def line(cells: Sequence[str], separator: str) -> str:
            # The first column is text, the others are numbers.
            aligned = [
                cells[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
            ]
            return separator.join(aligned)

        print(
            f"\n{title}\n" + "\n".join(line(cells, "  ").rstrip() for cells in [list(shown), *lines]),
            flush=True,
        )
        rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
        table = [list(shown), rule, *lines]
        self.markdown += ["", f"**{title}**", "", *(f"| {line(cells, ' | ')} |" for cells in table)]
        self.write()

    def write(self) -> None:
        if self.csv_path is not None:
            text = io.StringIO()
            writer = csv.DictWriter(
                text, [*(f.name for f in fields(Row)), *self.environment], lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows({**asdict(row), **self.environment} for row in self.rows)
            files.atomic_write(self.csv_path, lambda file: file.write(text.getvalue().encode("utf-8")))
        if self.markdown_path is not None:
            text_lines = "\n".join([*self.header(), *self.markdown]) + "\n"
            files.atomic_write(self.markdown_path, lambda file: file.write(text_lines.encode("utf-8")))

    def header(self) -> list[str]:
        about = self.environment
        return [
            f"{about['hardware']}; torch {about['torch']}; {about['threads']} CPU threads; "
            f"{about['precision']}; medians (smallest-largest) of up to {self.rounds} rounds"
        ]


def describe(device: torch.device) -> dict[str, object]:
    """What the numbers depend on; columns of the CSV file."""
    about = runs.describe_environment()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "hardware": f"{gpu}, CUDA {about['cuda']}, {about['cpu']}"
        if gpu
        else f"{about['cpu']}, {about['cpu_cores']} cores",
        "torch": about["torch"],
        "python": about["python"],
        "threads": about["threads"],
        "precision": "float32 (TF32 products)" if gpu else "float32",
        "commit": about["commit"],
    }


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _milliseconds(row: Row) -> str:
    if row.median_ms is None:
        return row.note
    digits = 0 if row.median_ms >= 100 else 1 if row.median_ms >= 10 else 2
    return f"{row.median_ms:,.{digits}f} ({row.min_ms:,.{digits}f}-{row.max_ms:,.{digits}f})"


TIMES: dict[str, Callable[[Row], str]] = {
    "ms": _milliseconds,
    "tokens/s": lambda row: _number(row.per_second) if row.unit == "tokens" else "",
    "examples/s": lambda row: _number(row.per_second) if row.unit == "examples" else "",
    "x floor": lambda row: _number(row.ratio_to_floor, 2),
    "x LSTM": lambda row: _number(row.ratio_to_lstm, 2),
    "faster than naive": lambda row: _number(row.faster_than_naive, 2),
    "GFLOP/s": lambda row: _number(row.gflop_per_s),
    "note": lambda row: row.note if row.median_ms is not None else "",
}
PHASES = {"train": "training step", "forward": "forward pass alone"}


# ---- sections


@dataclass(frozen=True)
class Plan:
    """What is run: the sizes, and how long to measure."""

    lm: tuple[Task, ...] = (
        Task(),
        Task(adaptive=True),
        Task(batch=32, steps=35),
        Task(batch=32, steps=35, adaptive=True),
    )
    nth: tuple[Task, ...] = (NTH,)
    memory: tuple[Task, ...] = (Task(), Task(adaptive=True), NTH)
    # Sweeps have the adaptive softmax: the full one takes most of the time and would hide what grows.
    swept: Task = Task(batch=32, steps=35, adaptive=True)
    sequence: tuple[int, ...] = (10, 25, 50, 100, 200)
    batch: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    slots: tuple[int, ...] = (1, 2, 4, 8)
    size: tuple[int, ...] = (64, 128, 192, 256, 384)
    rounds: int = 7
    seconds: float = 0  # 0 = no limit


FULL = Plan()
QUICK = Plan(
    lm=tuple(Task(batch=16, steps=20, vocab_size=10000, adaptive=adaptive) for adaptive in (False, True)),
    nth=(replace(NTH, batch=100),),
    memory=(Task(batch=16, steps=20, vocab_size=10000),),
    swept=Task(batch=16, steps=10, vocab_size=10000, adaptive=True),
    sequence=(5, 20),
    batch=(8, 32),
    slots=(1, 4),
    size=(64, 192),
    rounds=5,
    seconds=2,
)


def run_tables(report: Report, plan: Plan, sections: Sequence[str]) -> None:
    """All sections asked for, in order."""
    for section, tasks, variants in (("lm", plan.lm, LM_VARIANTS), ("nth", plan.nth, NTH_VARIANTS)):
        for task in tasks if section in sections else ():
            for phase, name in PHASES.items():
                rows = report.time(section, task, variants, phase)
                report.show(f"{task}: {name}", {"variant": lambda row: row.variant, **TIMES}, rows)
    for task in (plan.lm[0], *plan.nth) if "options" in sections else ():
        rows = report.time("options", task, option_variants(task, report.device))
        report.show(f"{task}: training step, options", {"variant": lambda row: row.variant, **TIMES}, rows)
    for section in ("sequence", "batch", "slots", "size"):
        if section in sections:
            sweep(report, section, plan)
    if "memory" in sections:
        memory_table(report, plan)


def sweep(report: Report, section: str, plan: Plan) -> None:
    """Training steps of tasks that differ in one size."""
    change = {
        "sequence": lambda value: {"steps": value},
        "batch": lambda value: {"batch": value},
        "slots": lambda value: {"mem_slots": value},
        "size": lambda value: {
            "head_size": value,
            "lstm_size": round(value * Task.lstm_size / Task.head_size),
        },
    }[section]
    # Slots and batch make the rows of a step, by which the core chooses how to sum its weight gradients.
    arrangements = [EACH_STEP, AFTER_LOOP] if section in ("batch", "slots") else []
    rows = []
    for value in getattr(plan, section):
        task = replace(plan.swept, **change(value))
        rows += report.time(section, task, [PLAIN, FAST, *arrangements, LSTM, FLOOR])
    name, cell = {
        "sequence": ("sequence length", lambda row: str(row.steps)),
        "batch": ("batch", lambda row: str(row.batch)),
        "slots": ("slots", lambda row: str(row.mem_slots)),
        "size": ("memory size", lambda row: str(row.mem_size)),
    }[section]
    report.show(
        f"Against {name}; otherwise {plan.swept}: training step",
        {"variant": lambda row: row.variant, name: cell, **TIMES},
        rows,
    )


def memory_table(report: Report, plan: Plan) -> None:
    rows = []
    for task in plan.memory:
        variants = [NAIVE, PLAIN, FAST, LSTM] if task.kind == "lm" else [PLAIN, FAST, LSTM]
        for variant in filter(report.wants, variants):
            say(f"memory: {task}: {variant.label}")
            row = new_row("memory", task, variant, "train")
            row.peak_mb, row.peak_above_start_mb, row.note = peak_memory(task, variant, report.device)
            rows.append(row)
    report.rows += rows
    report.show(
        "Peak memory of a training step",
        {
            "variant": lambda row: row.variant,
            "task": lambda row: row.task,
            "peak MB": lambda row: _number(row.peak_mb),
            "above start MB": lambda row: _number(row.peak_above_start_mb),
            "note": lambda row: row.note,
        },
        rows,
    )


# ---- peak memory


def peak_memory(task: Task, variant: Variant, device: torch.device) -> tuple[float | None, float | None, str]:
    """Peak of two training steps in a process of its own: MB in all, MB above its start, and a note.

    On a CPU it is resident memory, and the start is what a step of a minuscule model takes. On a GPU it is
    what torch has allocated there, and the start is 0.
    """
    request = json.dumps(
        {
            "task": asdict(task),
            "variant": asdict(variant),
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
    )
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--peak-of", request], capture_output=True, text=True
    )
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"ended with status {answer.returncode}"])[-1]
        killed = answer.returncode < 0 or "out of memory" in answer.stderr
        return None, None, "out of memory" if killed else f"failed: {last}"
    peak, start = json.loads(answer.stdout.splitlines()[-1])
    if peak is None:
        return None, None, "not known on this system"
    return peak / 1e6, (peak - start) / 1e6, ""


def report_peak(request: str) -> None:
    """In the process of its own: prints the peak and the start, in bytes."""
    wanted = json.loads(request)
    torch.set_num_threads(wanted["threads"])
    device = torch.device(wanted["device"])
    if device.type == "cpu":
        devices.keep_freed_memory()
    task, variant = Task(**wanted["task"]), Variant(**wanted["variant"])
    # A step of a minuscule model has the libraries load what they need; that is not the model's.
    tiny = {"batch": 2, "steps": 2, "vocab_size": 50, "head_size": 4, "key_size": 4, "lstm_size": 4}
    ModelRunner(replace(task, **tiny), variant, device).train()
    start = 0 if device.type == "cuda" else _peak_resident()
    runner = ModelRunner(task, variant, device)
    for _ in range(cuda_graphs.WARMUP_CALLS + 2 if device.type == "cuda" else 2):
        runner.train()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()
    print(json.dumps([peak, start]))


def _peak_resident() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell."""
    try:
        # Not getrusage where this is to be had: on Linux its figure is inherited from the starting process.
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


# ---- command line


def build_parser() -> argparse.ArgumentParser:
    introduction, _, _ = __doc__.partition("\nExamples:")
    parser = argparse.ArgumentParser(description=introduction, formatter_class=flags.HelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: two minutes on two CPU cores"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"which sections to run, of {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--match",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only variants whose label contains one of these, such as naive: fast floor",
    )
    parser.add_argument(
        "--rounds",
        type=flags.positive_int,
        default=None,
        metavar="N",
        help=f"samples of each variant (default: {FULL.rounds}, with --quick {QUICK.rounds})",
    )
    parser.add_argument(
        "--seconds",
        type=flags.non_negative_float,
        default=None,
        metavar="S",
        help=f"begin no round of a table's phase beyond the first {FEWEST_ROUNDS} after this time; 0 = no "
        f"limit (default: {FULL.seconds}, with --quick {QUICK.seconds})",
    )
    parser.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=None,
        metavar="BATCHxSTEPS",
        help="batches and sequence lengths of the language model (default: 64x100 32x35, with --quick 16x20)",
    )
    parser.add_argument(
        "--markdown", type=Path, default=None, metavar="FILE", help="also write the tables as Markdown"
    )
    parser.add_argument(
        "--csv", type=Path, default=None, metavar="FILE", help="also write every number as CSV"
    )
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument(
        "--threads",
        type=flags.thread_count,
        default=0,
        metavar="N",
        help="CPU threads that torch may use; 0 = its own choice",
    )
    parser.add_argument(
        "--give-back-memory",
        action="store_true",
        help="leave freed memory to the C library, as the training scripts do not (devices.keep_freed_memory)",
    )
    parser.add_argument("--peak-of", default=None, help=argparse.SUPPRESS)
    return parser


def _shape(text: str) -> tuple[int, int]:
    batch, x, steps = text.partition("x")
    try:
        return flags.positive_int(batch), flags.positive_int(steps)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be two whole numbers like 64x100, got {text!r}") from None


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.peak_of is not None:
        return report_peak(args.peak_of)
    for path in (args.csv, args.markdown):  # now, not after an hour of measuring
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
            raise UserError(f"{path} {what}. Give the path of a file in a folder that exists.")
    plan = QUICK if args.quick else FULL
    if args.shapes is not None:
        sizes = dict.fromkeys((task.vocab_size, task.adaptive) for task in plan.lm)
        plan = replace(
            plan,
            lm=tuple(
                replace(plan.lm[0], batch=b, steps=t, vocab_size=v, adaptive=a)
                for b, t in args.shapes
                for v, a in sizes
            ),
        )
    if args.cuda:  # adaptive softmax rules out CUDA graphs, without which launches would hide what grows
        plan = replace(plan, swept=replace(plan.swept, adaptive=False))
    device = devices.choose_device(args.cuda, args.threads)
    if device.type == "cpu" and not args.give_back_memory:
        devices.keep_freed_memory()
    report = Report(
        device,
        args.rounds or plan.rounds,
        plan.seconds if args.seconds is None else args.seconds,
        args.csv,
        args.markdown,
        environment=describe(device),
        match=args.match,
    )
    print(*report.header(), sep="\n")
    report.write()  # an unwritable file is found out here
    run_tables(report, plan, args.only)
    if not report.rows:
        raise UserError(
            f"nothing was measured: no variant's label contains {' or '.join(map(repr, args.match))}. Labels "
            f"are, for instance, {', '.join(repr(variant.label) for variant in LM_VARIANTS)}."
        )


if __name__ == "__main__":
    console.run_script(main, lower="--shapes, or choose sections with --only")

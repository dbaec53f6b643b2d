"""Time the fast relational memory core against the plain one and against an LSTM of equal size.

A row of the table is a training step (forward, backward, gradient clipping and Adam) of the language model or
of Nth farthest, or one time step of one sequence without gradients, as in generation. The columns:

    RMC                FastRelationalMemory, as the scripts train it, in milliseconds
    plain core         the same model with RelationalMemory, the loop that is easy to read
    old port's way     the plain core, with embedding and softmax inside the time loop and an Adam that is not
                       fused, as in L0SG/relational-rnn-pytorch
    LSTM, equal size   a model with equally many parameters whose recurrent part is torch's fused LSTM

All but the first are multiples of the RMC's time. The variants of a row take turns, round after round, in
rotating order, so that a busy machine slows all of them equally. Times are medians with the smallest and the
largest; a multiple is the median of the multiples within each round.

Examples: python tools/benchmark.py --threads 1 --clock cpu > cpu.md
          python tools/benchmark.py --cuda > gpu.md
          python tools/benchmark.py --quick --only lm
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

import _project  # noqa: F401
from training import console, devices, flags, runs
from training.cuda_graphs import CapturedStep

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.softmax import choose_cutoffs
from relational_rnn_general import RelationalMemory
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from tasks.nth_farthest import NthFarthestModel, make_batch

SECTIONS = ("lm", "nth", "step")
RMC, PLAIN, OLD, LSTM = VARIANTS = ("RMC", "plain core", "old port's way", "LSTM, equal size")
SHORTEST_SAMPLE = 0.02  # seconds; several calls make one sample of a faster function
Calls = dict[str, Callable[[], object]]
Loss = Callable[..., tuple[Tensor, Tensor | None]]


class Plan(NamedTuple):
    """What is measured."""

    vocab_size: int
    windows: tuple[tuple[int, int], ...]  # (batch, time steps) of the language model
    nth_batch: int


FULL, QUICK = Plan(33278, ((32, 35), (64, 100)), 512), Plan(5000, ((8, 10),), 64)
# Parameters of RMC and LSTM: 10,753,158 and 10,733,894 (language models), 156,936 and 156,776 (Nth farthest).
EMBEDDING, HEAD_SIZE, UNITS = 184, 176, 960
NTH, NTH_CORE, NTH_UNITS = (8, 16), {"mem_slots": 8, "head_size": 16, "num_heads": 4}, 130

# ---- models


def language_models(vocab_size: int, adaptive: bool) -> dict[str, nn.Module]:
    """Return the language model of each variant."""
    torch.manual_seed(1)
    options = {"cutoffs": choose_cutoffs(vocab_size) if adaptive else None, "tied": True}
    rmc = RelationalMemoryLM(vocab_size, EMBEDDING, head_size=HEAD_SIZE, **options)
    lstm = RNNLM(vocab_size, "LSTM", EMBEDDING, UNITS, project=True, **options)
    return {RMC: rmc, PLAIN: with_plain_core(rmc), OLD: with_plain_core(rmc), LSTM: lstm}


def nth_farthest_models() -> dict[str, nn.Module]:
    """Return the model of Nth farthest of each variant."""
    torch.manual_seed(1)
    build = functools.partial(NthFarthestModel, *NTH, head_units=128, input_scale=1.5)
    rmc = build(memory_scale=8.0, **NTH_CORE)
    return {RMC: rmc, PLAIN: with_plain_core(rmc), LSTM: build(model="lstm", hidden_size=NTH_UNITS)}


def with_plain_core(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the loop of the plain core."""
    model = copy.deepcopy(model)
    model.core.__class__ = RelationalMemory
    return model


def words(vocab_size: int, batch: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, (B, T) each, whose frequencies fall like those of a text."""
    # They decide how many rows each cluster of the adaptive softmax gets.
    weights = 1 / (torch.arange(vocab_size) + 2.7)
    text = torch.multinomial(weights, batch * (steps + 1), replacement=True).view(batch, steps + 1)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


# ---- losses: of a model, the two tensors of a batch and the state; with the state after the batch, or None


def window_loss(model: nn.Module, tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a window of words in nats."""
    return model.loss(tokens, targets, state)


def old_loss(model: nn.Module, tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same with everything inside the time loop."""
    nats = 0
    for token, target in zip(tokens.unbind(1), targets.unbind(1), strict=True):
        embedded = F.dropout(model.embedding(token), model.dropout_input, model.training)
        state = model.core.step(embedded, state)
        hidden = F.dropout(model.projection(state.flatten(1)), model.dropout_output, model.training)
        nats = nats + model.output_layer(hidden, target)
    return nats / targets.numel(), state


def answer_loss(model: nn.Module, inputs: Tensor, targets: Tensor, state: None) -> tuple[Tensor, None]:
    """Return the mean loss of Nth farthest in nats."""
    return F.cross_entropy(model(inputs).float(), targets), None


# ---- timing


class Bench:
    """The device, the clock and the rows of the table, which are printed as they are measured."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.device, self.bf16, self.rounds = device, args.bf16, args.rounds
        self.clock = time.process_time if args.clock == "cpu" else time.perf_counter
        about = runs.describe_environment()
        gpu = f"{', '.join(about['gpus'])}, CUDA {about['cuda']}, " if device.type == "cuda" else ""
        console.say(
            f"{gpu}{about['cpu']}, {about['cpu_cores']} cores; torch {about['torch']}; CPU threads: "
            f"{about['threads']}; {'bf16' if self.bf16 else 'float32'}; {args.clock} time; commit "
            f"{about['commit']}\n\n"
            f"| | rounds | RMC, ms | {' | '.join(VARIANTS[1:])} |\n|---|---|---|{'---|' * len(VARIANTS[1:])}"
        )

    def training_step(self, model: nn.Module, batch: Iterable[Tensor], loss: Loss, variant: str) -> Callable:
        """Return a function that takes one training step, as a CUDA graph where training would use one."""
        model, batch = model.to(self.device).train(), [tensor.to(self.device) for tensor in batch]
        state = model.initial_state(len(batch[0])) if loss is not answer_loss else None
        adaptive = state is not None and model.config["cutoffs"] is not None
        captured = self.device.type == "cuda" and variant in (RMC, LSTM) and not adaptive
        # A learning rate of 0 costs the same and keeps the weights.
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=variant != OLD, capturable=captured)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                mean, after = loss(model, *batch, state)
            mean.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if after is not None:
                state.copy_(after.detach())

        return CapturedStep(step, self.device) if captured else step

    def time(self, call: Callable[[], object], repeats: int) -> float:
        """Return the seconds of one call, averaged over `repeats` calls."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        began = self.clock()
        for _ in range(repeats):
            call()
        synchronize()
        return (self.clock() - began) / repeats

    def measure(self, calls: Calls) -> dict[str, list[float]]:
        """Return milliseconds per call, one sample per round for each label, in rotating order."""
        repeats = {}
        for label, call in calls.items():
            for _ in range(5 if self.device.type == "cuda" else 1):  # a CUDA graph is captured meanwhile
                seconds = self.time(call, 1)
            repeats[label] = max(1, min(1000, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-6))))
        samples: dict[str, list[float]] = {label: [] for label in calls}
        labels = list(calls)
        for number in range(self.rounds):
            first = number % len(labels)
            for label in labels[first:] + labels[:first]:
                samples[label].append(1000 * self.time(calls[label], repeats[label]))
        return samples

    def row(self, title: str, calls: Calls) -> None:
        """Measure and print a row of the table."""
        print(f"... {title}", file=sys.stderr, flush=True)
        samples = self.measure(calls)
        rmc = samples[RMC]
        ratios = [f"{ratio(samples[name], rmc):.2f}" if name in samples else "-" for name in VARIANTS[1:]]
        console.say(f"| {title} | {len(rmc)} | {spread(rmc)} | {' | '.join(ratios)} |")
        calls.clear()  # a model and its captured graphs refer to each other
        gc.collect()

    # ---- rows

    def language_model(self, vocab_size: int, batch: int, steps: int, adaptive: bool) -> None:
        """Time a training step of the language model."""
        models, text = language_models(vocab_size, adaptive), words(vocab_size, batch, steps)
        calls = {
            name: self.training_step(model, text, old_loss if name == OLD else window_loss, name)
            for name, model in models.items()
        }
        self.row(f"language model, {batch} x {steps}, {'adaptive' if adaptive else 'full'} softmax", calls)

    def nth_farthest(self, batch_size: int) -> None:
        """Time a training step of Nth farthest."""
        batch, models = make_batch(batch_size, *NTH, torch.Generator().manual_seed(2)), nth_farthest_models()
        calls = {name: self.training_step(model, batch, answer_loss, name) for name, model in models.items()}
        self.row(f"Nth farthest, {NTH[0]} x {NTH[1]}, batch {batch_size}", calls)

    @torch.no_grad()
    def step(self, vocab_size: int) -> None:
        """Time one step of one sequence: the recurrent parts of the language models."""
        models = language_models(vocab_size, False)
        x = torch.randn(1, EMBEDDING, device=self.device)
        cores = {name: models[name].core.to(self.device) for name in (RMC, PLAIN)}
        cell = nn.LSTMCell(EMBEDDING, UNITS, device=self.device)
        memory, state = cores[RMC].initial_state(1), x.new_zeros(2, 1, UNITS).unbind()
        calls = {name: functools.partial(core.step, x, memory) for name, core in cores.items()}
        self.row("one step of one sequence", calls | {LSTM: lambda: cell(x, state)})


def spread(samples: Sequence[float]) -> str:
    """Return 'median (smallest - largest)'."""
    digits = 0 if median(samples) >= 100 else 1 if median(samples) >= 10 else 2
    numbers = (median(samples), min(samples), max(samples))
    return "{} ({} - {})".format(*(f"{number:,.{digits}f}" for number in numbers))


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return median(a / b for a, b in zip(own, other, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table that the command line specifies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="small vocabulary and batches")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION",
        help="rows to measure: lm (language models), nth (Nth farthest), step (a single step)")  # fmt: skip
    add("--rounds", type=flags.positive_int, default=7, metavar="N", help="samples of each variant")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: processor time of all threads, for a busy machine; best with --threads 1")  # fmt: skip
    add("--cuda", action="store_true", help="measure on the GPU")
    add("--bf16", action="store_true", help="matrix products in bfloat16")
    add("--threads", type=flags.thread_count, default=0, metavar="N", help="CPU threads; 0 = torch's choice")
    args = parser.parse_args(argv)
    if args.cuda and args.clock == "cpu":
        parser.error("--clock cpu cannot time a GPU: use --clock wall")
    device = devices.choose_device(args.cuda)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    devices.keep_freed_memory()
    bench, plan = Bench(args, device), QUICK if args.quick else FULL
    for batch, steps in plan.windows if "lm" in args.only else ():
        for adaptive in (False, True):
            bench.language_model(plan.vocab_size, batch, steps, adaptive)
    if "nth" in args.only:
        bench.nth_farthest(plan.nth_batch)
    if "step" in args.only:
        bench.step(plan.vocab_size)


if __name__ == "__main__":
    console.run_script(main, lower="the sizes with --quick, or choose sections with --only")

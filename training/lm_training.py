"""Training, evaluation and checkpoints of the word-level language models: one home for all of them.

`train_rmc.py` and `train_rnn.py` declare their model's flags and hand over a function that builds it; what is
here is the same for both, so that their numbers can be compared.

Losses are in nats per token (natural logarithm), weighed by tokens; perplexity is e to that power.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools import state_lengths
import torch
from torch import nn

from data_utils import Corpus, TokenColumns, Vocabulary, load_corpus
from layers.language_model import LanguageModel, perplexity
from layers.regularisation import WeightAverage, parameter_groups, window_stops
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from training import checkpoints, console, devices, distributed, flags, runs, schedule
from training.console import UserError, say
from training.cuda_graphs import capture_together
from training.distributed import ALONE, FlatGradients, Processes
from training.lm_flags import LR_FACTOR, PATIENCE, Recipes, apply_recipe, choose_softmax

MODELS: dict[str, type[LanguageModel]] = {"rmc": RelationalMemoryLM, "rnn": RNNLM}
SCRIPTS = ("train_rmc", "train_rnn")
FEW_STEPS = 20  # an epoch of fewer is warned of
# Arguments that --evaluate looks at: the others are those of the run that made the model.
USED_BY_EVALUATE = frozenset({
    "bptt", "collective_timeout", "cuda", "data", "eval_batch_size", "state_lengths", "strict_float32",
    "threads",
})  # fmt: skip
LOWER_MEMORY = "--batch_size or --bptt, use --adaptivesoftmax, or raise --accumulate"


# ---- evaluation


class Interrupted(Exception):
    """Raised by work between steps when the user or the system has asked to stop."""


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    ids: torch.Tensor,
    batch_size: int,
    bptt: int,
    device: torch.device | str,
    interrupts: console.Interrupts | None = None,
    label: str = "evaluating",
    processes: Processes = ALONE,
) -> float:
    """Mean loss of a split in nats per token, each of its N - 1 targets scored once.

    Args:
        model: is in eval mode meanwhile, and put back in the mode it was in.
        ids: the split, (N,).
        batch_size: columns that it is dealt to; each starts from the initial state and carries its state
            to its end: fewer columns lose less context, 1 scores the split as one stream.
        bptt: tokens of a column per step: only speed and memory depend on it.
        interrupts: looked at between windows.
        processes: share the columns; each gets the whole split's loss.

    Raises:
        UserError: the split has fewer targets than columns.
        Interrupted: `interrupts` asked to stop.
    """
    columns = TokenColumns(ids, batch_size, device)
    mine = processes.share(batch_size)
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once, so that a GPU never waits
        state = model.initial_state(mine.stop - mine.start)
        with console.Progress(-(-columns.length // bptt), label, quiet=True) as progress:
            for tokens, targets in columns.windows(bptt):
                if len(state):  # with more processes than columns, some have none
                    nats, state = model(tokens[mine], targets[mine], state)
                    total += nats.sum()
                progress.advance()
                if interrupts is not None and processes.agree(interrupts)[0]:
                    raise Interrupted
        return processes.add_up(total).item() / columns.num_pairs
    finally:
        model.train(was_training)


# ---- models and checkpoints


def describe_model(kind: str, model: LanguageModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """What rebuilds a model without repeating a flag, as plain data."""
    return {"kind": kind, "config": model.config, "model": model.state_dict(), "words": vocabulary.words}


def load_model(
    checkpoint: dict[str, Any], device: torch.device | str = "cpu"
) -> tuple[LanguageModel, Vocabulary]:
    """Rebuilds the model of a checkpoint (best.pt or last.pt, of either script), in eval mode.

    Raises:
        UserError: the checkpoint is no language model's, or its parts do not fit together.
    """
    kind = checkpoint.get("kind")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UserError(
            f"the checkpoint holds a model of kind {console.in_one_line(kind)}, not a language model "
            f"({' or '.join(map(repr, MODELS))}). Use a best.pt made by train_rmc.py or train_rnn.py."
        )
    try:
        words, config, weights = checkpoint["words"], checkpoint["config"], checkpoint["model"]
        checkpoints.check_layer_counts(config, weights)
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise TypeError("words must be a list of strings")
        vocabulary = Vocabulary(words)
        if config["vocab_size"] != len(words):
            raise ValueError(
                f"the model is for {config['vocab_size']} words, the vocabulary has {len(words)}"
            )
        # Built without memory first: a config that asks for more than the file holds gets none.
        with torch.device("meta"):
            expected = {
                name: tuple(value.shape) for name, value in MODELS[kind](**config).state_dict().items()
            }
        found = {name: tuple(value.shape) for name, value in weights.items()}
        if expected != found:
            name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
            raise ValueError(
                f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
            )
        if any(value.is_complex() or not value.isfinite().all() for value in weights.values()):
            raise ValueError("weights that are no finite real numbers")
        model = MODELS[kind](**config)
        model.load_state_dict(weights)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if console.is_out_of_memory(error):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else console.first_line(error)
        raise UserError(
            f"the checkpoint does not fit together ({reason}). Was it altered? Use another one."
        ) from None
    return model.to(device).eval(), vocabulary


def find_checkpoint(given: str | Path) -> Path:
    """The checkpoint meant by a path: the file itself, or the best model of a run folder."""
    path = Path(given)
    if not path.is_dir():
        return path
    if not (path / "best.pt").is_file():
        raise UserError(f"no best.pt in {path}. Give a run folder with a finished epoch, or a checkpoint.")
    return path / "best.pt"


def fingerprint(corpus: Corpus) -> str:
    """A digest of vocabulary and ids: a run is resumed on the corpus that it was started on or not at all."""
    digest = hashlib.sha256("\n".join(corpus.vocabulary.words).encode("utf-8", errors="surrogatepass"))
    for ids in (corpus.train, corpus.valid, corpus.test):
        digest.update(f"\0{len(ids)}\0".encode())
        digest.update(ids.numpy())
    return digest.hexdigest()


# ---- training


@dataclass
class Position:
    """Where a run stands, beyond the weights: all of it goes into last.pt."""

    epoch: int = 1  # the current one, from 1
    place: int = 0  # places of the columns already trained on in this epoch
    step: int = 0  # optimiser steps since the start of the run
    epoch_nats: float = 0.0  # sum of the losses of this epoch's targets, up to the last reading
    epoch_tokens: int = 0  # targets trained on in this epoch, up to the last reading
    interval_tokens: int = 0  # and since the last reading
    interval_steps: int = 0
    best_valid: float = math.inf  # nats per token
    best_epoch: int = 0
    seconds: float = 0.0  # of work, interruptions not counted


class ForwardTimer:
    """Times the forward passes: by the clock on a CPU, by events on a GPU, which works behind the host.

    In training, the output layer makes its gradients in the forward pass already: these times hold it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """A mark in time; two of them make a span. None while a graph is captured, in which nothing runs."""
        if not self.on_gpu:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, start: Any) -> None:
        """Notes the span from `start` until now."""
        if start is not None:
            self.spans.append((start, self.now()))

    def mean_ms(self, steps: int, pieces: int = 1) -> float | None:
        """Mean time of a step in ms, and forgets the spans; None unless each piece of each step had one.

        To be called when the device has finished.
        """
        spans, self.spans = self.spans, []
        if not steps or len(spans) != steps * pieces:
            return None
        lengths = [start.elapsed_time(end) if self.on_gpu else 1000 * (end - start) for start, end in spans]
        return sum(lengths) / steps


class Trainer:
    """A model in training: the loop, its log and its checkpoints.

    Args:
        model: on `device`.
        corpus: what it reads.
        args: the flags of `add_flags`.
        kind: key of MODELS.
        device: where to compute.
        processes: among which the batch's columns are dealt out, in order; a process's share is cut into
            `args.accumulate` pieces. Each loss is divided by the number of targets of the whole batch, so
            that the gradients of all processes and pieces add up to that of the mean.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        args: argparse.Namespace,
        kind: str,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.corpus, self.args, self.kind, self.device = model, corpus, args, kind, device
        self.processes = processes
        processes.check_batch("--batch_size", args.batch_size, args.accumulate)
        for name in ("valid", "test"):  # too short for the batch: say so now, not after the first epoch
            with split_named(name, "--eval-batch-size"):
                TokenColumns(getattr(corpus, name), args.eval_batch_size)
        with split_named("train", "--batch_size"):
            self.columns = TokenColumns(corpus.train, args.batch_size, device)
        self.mine = processes.share(args.batch_size)
        columns = self.mine.stop - self.mine.start
        rows = columns // args.accumulate
        self.pieces = [slice(start, start + rows) for start in range(0, columns, rows)]
        self.replicas = devices.wrap_data_parallel(model, device, rows) if processes.alone else model
        # On a GPU each group's learning rate is a tensor: a captured step reads it anew at each replay.
        on_gpu = device.type == "cuda"
        adam = torch.optim.AdamW if args.weight_decay else torch.optim.Adam
        apart = () if args.embedding_lr is None else (model.embedding.weight,)
        grouped = bool(args.weight_decay or apart)
        groups = parameter_groups(model, args.weight_decay, apart) if grouped else model.parameters()
        self.optimizer = adam(groups, lr=args.lr, fused=True, capturable=on_gpu)
        # What the schedule's learning rate is multiplied with, by group; the first group's is 1.
        self.lr_factors = [1.0] * len(self.optimizer.param_groups)
        if apart:
            self.lr_factors[-1] = args.embedding_lr / args.lr
        count = len(self.optimizer.param_groups) if on_gpu else 0
        self.lr_tensors = [torch.tensor(args.lr, device=device) for _ in range(count)]
        self.lr = self.plateau_lr = args.lr
        factors = (args.ar, args.tar)
        self.penalties = {"penalties": factors} if any(factors) else {}
        decay = args.average_decay if args.average == "ema" else None
        self.average = None if args.average == "none" else WeightAverage(model, decay, args.average_trigger)
        self.total_steps = args.epochs * -(-self.columns.length // args.bptt)
        if args.random_bptt is not None and args.schedule == "cosine":
            self.total_steps = sum(len(self.window_stops(1 + epoch)) for epoch in range(args.epochs))
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=LR_FACTOR, patience=PATIENCE, threshold=0.0
        )
        self.fingerprint = fingerprint(corpus)
        processes.check_same("the text", self.fingerprint)
        processes.share_weights(model)
        self.at = Position()
        # Stays in place, as a captured step wants it; each step leaves the state after its window here: that
        # of this process's columns.
        self.state = model.initial_state(columns)
        self.capture()
        # Sums of losses and gradient norms since the last reading. They stay on the device: to read them the
        # host has to wait for the GPU.
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.timer = ForwardTimer(device)
        self.clock = time.perf_counter()  # when `at.seconds` was last brought up to date
        self.interval_clock, self.timed_steps, self.timed_tokens = self.clock, 0, 0
        self.alarm = console.Alarm(args.save_every)
        self.interrupts = console.Interrupts()
        self.first_step = console.FirstStep(device)

    def capture(self) -> None:
        """Prepares a step on a full window for CUDA graphs: as one, or around what lies between the pieces.

        No graph holds an exchange between processes: gradients are added up between two of them.
        """
        whole = self.processes.alone and len(self.pieces) == 1
        self.gradients = None if whole else FlatGradients(self.model.parameters())
        count = self.args.batch_size * self.args.bptt
        captured = functools.partial(
            capture_together,
            device=self.device,
            # Adaptive softmax looks up which words are where, for which the host waits; replicas need
            # threads.
            enabled=self.replicas is self.model
            and not (self.args.no_cuda_graph or self.args.adaptivesoftmax),
            on_failure=self.without_graph,
            beside_threads=not self.processes.alone,
        )
        if whole:
            (self.full_window,) = captured([functools.partial(self.train_window, count=count)])
        else:
            parts = (functools.partial(self.add_gradients, count=count), self.update)
            add_gradients, update = captured(parts)
            self.full_window = functools.partial(
                self.train_pieces, add_gradients=add_gradients, update=update
            )

    def without_graph(self, reason: str) -> None:
        """Tells that steps could not be captured: the run is then slower than its arguments say."""
        console.warn(reason)
        self.write("not_captured", reason=reason)

    # -- the loop

    def train(self, folder: Path) -> None:
        """Trains up to `args.epochs`, writing to the run folder.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; last.pt has been written.
            UserError: the loss is no longer finite; the checkpoints are from before.
        """
        self.folder = folder
        self.log = runs.RunLog(folder / "log.jsonl" if self.processes.is_main else os.devnull)
        if self.device.type == "cpu":
            devices.keep_freed_memory()
        self.clock = self.interval_clock = time.perf_counter()
        self.alarm.reset()
        self.first_step = console.FirstStep(self.device)
        with self.interrupts:
            try:
                while self.at.epoch <= self.args.epochs:
                    self.train_epoch()
                    self.validate()
            except Interrupted:
                self.save_last()
                raise

    def train_epoch(self) -> None:
        """Goes through what is left of the epoch."""
        self.model.train()
        if self.at.place == 0:
            self.state.copy_(self.model.initial_state(len(self.state)))
        stops = self.window_stops(self.at.epoch)
        done = bisect.bisect_right(stops, self.at.place)
        with console.Progress(len(stops), f"epoch {self.at.epoch}", done) as progress:
            for end in stops[done:]:
                self.step(*self.columns.window(self.at.place, end))
                progress.advance()
                to_log = -self.at.step % self.args.log_interval
                self.first_step.tell(min(to_log, len(stops) - progress.done), len(stops), "an epoch")
                if self.at.step % self.args.log_interval == 0:
                    self.report(progress)
                stop, save = self.processes.agree(self.interrupts, self.alarm.due())
                if save:
                    self.save_last()
                if stop:
                    raise Interrupted
            if self.at.interval_steps:
                self.report(progress)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        """One optimiser step on a window, (B, T) tokens and targets."""
        self.schedule_lr(tokens.shape[1])
        stop = self.at.place + tokens.shape[1]
        count = self.targets_before(stop) - self.targets_before(self.at.place)
        tokens, targets = tokens[self.mine], targets[self.mine]
        # Only windows that are full have the shape of the captured step; the last one of an epoch may not.
        if count == self.args.batch_size * self.args.bptt:
            self.full_window(tokens, targets)
        elif self.gradients is None:
            self.train_window(tokens, targets, count)
        else:
            add_gradients = functools.partial(self.add_gradients, count=count)
            self.train_pieces(tokens, targets, add_gradients, self.update)
        if self.average is not None:
            self.average.update(self.model)
        self.at.place = stop
        self.at.step += 1
        self.at.interval_steps += 1
        self.at.interval_tokens += count
        self.timed_steps += 1
        self.timed_tokens += count

    def train_window(self, tokens: torch.Tensor, targets: torch.Tensor, count: int) -> None:
        """The work of a step, without waiting for the device; `count` targets of the batch are scored."""
        self.optimizer.zero_grad(set_to_none=True)
        total, state = self.add_gradients(tokens, targets, self.state, count)
        norm = self.update()
        self.state.copy_(state)  # keep the values, cut the history
        self.sums += torch.stack([total, norm]).double()

    def train_pieces(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        add_gradients: Callable[..., Any],
        update: Callable[..., Any],
    ) -> None:
        """The same step, its gradient added up over pieces of this process's columns, and over processes."""
        self.gradients.flat.zero_()
        for piece in self.pieces:
            total, state = add_gradients(tokens[piece], targets[piece], self.state[piece])
            self.state[piece].copy_(state)
            self.sums[0] += total
        self.processes.add_up(self.gradients.flat)
        self.sums[1] += update()

    def add_gradients(
        self, tokens: torch.Tensor, targets: torch.Tensor, state: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores columns, adds their part of the batch's gradient; summed nats, (), and the state after."""
        started = self.timer.now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            nats, state, *penalty = self.replicas(tokens, targets, state, **self.penalties)
        self.timer.span(started)
        total = nats.sum()  # one number per replica
        objective = total + penalty[0].sum() if penalty else total
        (objective / count).backward()
        return total.detach(), state.detach()

    def update(self) -> torch.Tensor:
        """Clips the gradient and takes the optimiser's step; returns the gradient's norm before, ()."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf)
        self.optimizer.step()
        return norm

    def window_stops(self, epoch: int) -> list[int]:
        """Where the windows of an epoch end."""
        args = self.args
        return window_stops(self.columns.length, args.bptt, args.random_bptt, args.seed, epoch)

    def targets_before(self, place: int) -> int:
        """How many targets lie before a place of the columns, counted without a look at the tensors."""
        return min(place * self.args.batch_size, self.columns.num_pairs)

    def report(self, progress: console.Progress) -> None:
        """Reads the sums and the clock; a "train" event and a line for the steps since the last reading."""
        nats, norms = self.read_sums()
        self.update_clock()
        elapsed = max(self.clock - self.interval_clock, 1e-9)
        loss = nats / self.at.interval_tokens
        speed = {
            "ms_per_batch": 1000 * elapsed / max(self.timed_steps, 1),
            "forward_ms_per_batch": self.timer.mean_ms(self.timed_steps, len(self.pieces)),
            "tokens_per_second": self.timed_tokens / elapsed,
        }
        self.write(
            "train", loss=loss, ppl=perplexity(loss), grad_norm=norms / self.at.interval_steps, **speed
        )
        forward = speed["forward_ms_per_batch"]  # None inside a CUDA graph, which has no such point in time
        progress.report(
            f"loss {loss:.4f} | ppl {perplexity(loss):.2f} | {speed['tokens_per_second']:,.0f} tokens/s | "
            f"{speed['ms_per_batch']:.1f} ms/batch{'' if forward is None else f', forward {forward:.1f}'} | "
            f"lr {self.lr:g}"
        )
        self.at.epoch_nats += nats
        self.at.epoch_tokens += self.at.interval_tokens
        self.at.interval_steps = self.at.interval_tokens = 0
        self.sums.zero_()
        self.interval_clock, self.timed_steps, self.timed_tokens = self.clock, 0, 0

    def validate(self) -> None:
        """Ends an epoch: validation loss, learning rate, best.pt, last.pt."""
        loss = self.evaluate("valid", self.interrupts)
        if perplexity(loss) == math.inf:
            raise UserError(self.diverged(f"validation loss is {loss:.4g} nats"))
        train_loss = self.at.epoch_nats / self.at.epoch_tokens
        best, model, averaged, average_ppl = loss, self.model, {}, None
        if self.average is not None and self.average.steps:
            average_loss = self.evaluate("valid", self.interrupts, self.average.model)
            averaged = {"average_loss": average_loss, "average_ppl": perplexity(average_loss)}
            average_ppl = averaged["average_ppl"]
            if average_loss < loss:
                best, model = average_loss, self.average.model
        better = best < self.at.best_valid
        self.update_clock()
        self.write(
            "valid",
            loss=loss,
            ppl=perplexity(loss),
            **averaged,
            train_loss=train_loss,
            train_ppl=perplexity(train_loss),
        )
        say(
            f"epoch {self.at.epoch}: train ppl {perplexity(train_loss):.2f} | valid loss {loss:.4f}, ppl "
            f"{perplexity(loss):.2f}{' (best)' if better and model is self.model else ''}"
            + ("" if average_ppl is None else f", averaged {average_ppl:.2f}")
            + (" (best)" if better and model is not self.model else "")
            + f" | {self.at.seconds:.0f} s"
        )
        self.step_schedule(loss)
        if self.average is not None:
            self.average.watch(loss)
        if better:
            self.save_best(best, model)
        self.at.epoch += 1
        self.at.place = self.at.epoch_tokens = 0
        self.at.epoch_nats = 0.0
        self.save_last()
        self.interval_clock = time.perf_counter()  # evaluation is not part of the next ms/batch

    def evaluate(
        self, split: str, interrupts: console.Interrupts | None = None, model: LanguageModel | None = None
    ) -> float:
        """Mean loss of a split in nats per token, of the model in training or of another."""
        return evaluate(
            model or self.model,
            getattr(self.corpus, split),
            self.args.eval_batch_size,
            self.args.bptt,
            self.device,
            interrupts,
            split,
            self.processes,
        )

    def test(self) -> float | None:
        """The best model's test loss in nats per token, None when there is no best model yet."""
        if not self.at.best_epoch:
            return None
        checkpoint = self.processes.from_main(lambda: checkpoints.load_checkpoint(self.folder / "best.pt"))
        best, _ = load_model(checkpoint, self.device)
        return self.evaluate("test", model=best)

    # -- log, checkpoints

    @property
    def lr(self) -> float:
        """The schedule's learning rate at the last step; random windows scale it for their step alone.

        It is that of all matrices and vectors but the embedding's, if that has one of its own.
        """
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = value
        self.fill_lr(value)

    def fill_lr(self, value: float) -> None:
        """Gives the optimiser a learning rate; where it has tensors, as on a GPU, they stay the same ones."""
        for index, group in enumerate(self.optimizer.param_groups):
            lr = value * self.lr_factors[index]
            group["lr"] = self.lr_tensors[index].fill_(lr) if self.lr_tensors else lr

    def schedule_lr(self, length: int) -> None:
        """The learning rate of the next step, on a window of `length` tokens per column."""
        args, step = self.args, self.at.step + 1
        if args.schedule == "cosine" or step <= args.warmup + 1:
            highest = args.lr if args.schedule == "cosine" else self.plateau_lr
            self.lr = schedule.scheduled_lr(
                highest, step, self.total_steps, args.warmup, cosine=args.schedule == "cosine"
            )
        if args.random_bptt is not None:
            self.fill_lr(self.lr * length / args.bptt)

    def step_schedule(self, valid_loss: float) -> None:
        """Tells the plateau schedule of a finished epoch."""
        if self.args.schedule == "plateau":
            self.fill_lr(self.plateau_lr)
            self.scheduler.step(valid_loss)
            lr = float(self.optimizer.param_groups[0]["lr"])
            # A tensor's is float32, whose digits end here.
            self.lr = self.plateau_lr = float(f"{lr:.6g}") if self.lr_tensors else lr

    def update_clock(self) -> None:
        """Adds the time since the last call to the run's seconds."""
        now = time.perf_counter()
        self.at.seconds += now - self.clock
        self.clock = now

    def write(self, event: str, **fields: Any) -> None:
        """Logs an event of this moment."""
        self.log.write(
            event,
            epoch=min(self.at.epoch, self.args.epochs),
            step=self.at.step,
            lr=self.lr,
            **fields,
            seconds=round(self.at.seconds, 3),
        )

    def read_sums(self) -> tuple[float, float]:
        """Sums of losses and gradient norms since the last reading; UserError if training has diverged.

        Losses of all processes: all have to call it. The norm is everywhere that of the whole gradient.
        """
        nats, norms = self.processes.add_up(self.sums[0].clone()).item(), self.sums[1].item()
        if self.at.interval_tokens and perplexity(nats / self.at.interval_tokens) == math.inf:
            raise UserError(
                self.diverged(f"training loss is {nats / self.at.interval_tokens:.4g} nats per token")
            )
        if not math.isfinite(norms):  # the loss was still finite, but the weights no longer are
            raise UserError(self.diverged(f"norm of the gradient is {norms:.4g}"))
        return nats, norms

    def diverged(self, what: str) -> str:
        """The message of a run that has come to nothing."""
        last = self.folder / "last.pt"
        kept = f"{last} is from before" if last.exists() else "no checkpoint had been written yet"
        return (
            f"the {what} in epoch {self.at.epoch}, step {self.at.step}: training has diverged. {kept}. "
            f"Start again with a lower --lr (it was {self.args.lr:g}"
            + (f", --embedding-lr {self.args.embedding_lr:g}" if self.args.embedding_lr is not None else "")
            + ") or a lower --clip."
        )

    def save_last(self) -> bool:
        """Writes last.pt; when the numbers have gone bad, raises UserError and leaves the earlier file.

        The main process writes what all bring together: the states of all columns in their order, the loss of
        all, the random generators of each.
        """
        nats, norms = self.read_sums()
        self.update_clock()
        state = self.state if self.processes.alone else self.state.cpu()
        parts = self.processes.gather((state, devices.random_states()))
        if not self.processes.is_main:
            return True
        states, random = zip(*parts, strict=True)
        return checkpoints.try_save_checkpoint(
            self.folder / "last.pt",
            {
                **describe_model(self.kind, self.model, self.corpus.vocabulary),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "lr": [self.lr, self.plateau_lr],
                "average": None if self.average is None else self.average.state_dict(),
                "position": asdict(self.at),
                "sums": torch.tensor([nats, norms], dtype=torch.float64),
                "state": torch.cat(states),
                "random": random[0],
                "random_of_others": random[1:],  # ranks 1, 2, ...
                "corpus": self.fingerprint,
                "args": vars(self.args),
            },
        )

    def save_best(self, loss: float, model: LanguageModel | None = None) -> None:
        """Writes best.pt and takes its loss as the one to beat: both or neither, so that they agree.

        Its weights are those of the model in training or of another, the average.
        """
        contents = {
            **describe_model(self.kind, model or self.model, self.corpus.vocabulary),
            "args": vars(self.args),
            "scores": {"epoch": self.at.epoch, "step": self.at.step, "valid_loss": loss},
        }
        saved = self.processes.from_main(
            lambda: checkpoints.try_save_checkpoint(self.folder / "best.pt", contents)
        )
        if saved:
            self.at.best_valid, self.at.best_epoch = loss, self.at.epoch

    def restore_best(self, folder: Path) -> None:
        """Takes best.pt's own loss as the one to beat where it is newer than last.pt, as after a kill.

        On a CPU the epoch done again ends with the same loss; on a GPU it may end with another. Without a
        best.pt there is none to beat.

        Raises:
            UserError: best.pt cannot be read.
        """
        path = folder / "best.pt"
        exists, best = self.processes.from_main(
            lambda: (
                (True, checkpoints.load_checkpoint(path).get("scores")) if path.exists() else (False, None)
            )
        )
        if not exists:
            self.at.best_valid, self.at.best_epoch = Position.best_valid, Position.best_epoch
            return
        try:
            if int(best["step"]) >= self.at.step:
                self.at.best_valid, self.at.best_epoch = float(best["valid_loss"]), int(best["epoch"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} does not say how good it is. Was it altered? Move it away to go on without it."
            ) from None

    @property
    def drops_out(self) -> bool:
        """Whether any dropout is on."""
        return any(value for name, value in self.model.config.items() if name.startswith("dropout"))

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes up everything from a last.pt; warns where dropout will not go on as it would have.

        Raises:
            UserError: it was made with another corpus, or does not fit the model.
        """
        if checkpoint.get("corpus") != self.fingerprint:
            raise UserError(
                f"the text in {self.corpus.folder} is not the one this run was started on (other words "
                "or another order). Give the folder of that text with --data, or start a new run."
            )
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            lr = float(self.optimizer.param_groups[0]["lr"])
            self._lr, self.plateau_lr = map(float, checkpoint.get("lr", (lr, lr)))
            self.fill_lr(lr)
            for group in self.optimizer.param_groups:
                group["capturable"] = bool(self.lr_tensors)
            if self.average is not None:
                self.average.load_state_dict(checkpoint["average"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            self.at = Position(**checkpoint["position"])
            # The main process goes on with the losses of all; the norms are the same for all.
            self.sums.copy_(checkpoint["sums"])
            self.sums[0] *= self.processes.is_main
            self.state.copy_(checkpoint["state"][self.mine])
            self.processes.restore_random_states(
                [checkpoint["random"], *checkpoint.get("random_of_others", ())], self.args.seed, self.at.step
            )
            pieces = checkpoint["args"].get("accumulate", 1)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            if console.is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"last.pt does not fit its run ({reason}). Was it or args.json altered? Start a new run."
            ) from None
        if pieces != self.args.accumulate and self.drops_out:
            console.warn(
                f"--accumulate was {pieces}, now it is {self.args.accumulate}: dropout goes on with other "
                "random numbers, and masks that a whole batch shares (of words and weights) are drawn for "
                "each piece"
            )


@contextlib.contextmanager
def split_named(name: str, flag: str) -> Iterator[None]:
    """Adds the split's name and the flag to a UserError from within."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}.txt and {flag} do not fit: {error}") from None


@contextlib.contextmanager
def text_may_have_moved(known_from_the_run: object) -> Iterator[None]:
    """Adds what to do to a UserError from within, where it was the run that named the text."""
    try:
        yield
    except UserError as error:
        if not known_from_the_run:
            raise
        raise UserError(f"{error} If the text has moved, name its new place with --data.") from None


# ---- the scripts' main program


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    script: str,
    kind: str,
    build_model: Callable[[argparse.Namespace, int, list[int] | None], LanguageModel],
    recipes: Recipes,
) -> int:
    """Trains (or, with --evaluate, only scores) as the command line says.

    Args:
        parser: has `add_flags` and the model's own flags.
        argv: the command line, None for the process's own.
        script: the script's name without '.py'.
        kind: key of MODELS.
        build_model: makes the model from arguments, vocabulary size and cutoffs (None: full softmax); what it
            raises as ValueError is told to the user.
        recipes: what `--recipe` may name.

    Returns:
        the exit status: 0, or 128 + the number of the signal that stopped the run.
    """
    argv = distributed.arguments_to_go_on(parser, argv)
    apply_recipe(parser, argv, recipes)
    may_change = ("epochs", "data", "evaluate", "state_lengths")
    args = flags.parse_arguments(parser, argv, script, may_change)
    if args.state_lengths and args.evaluate is None:
        raise UserError("--state-lengths needs --evaluate RUN: it scores a trained model.")
    if args.evaluate is not None:
        if args.resume is not None:
            raise UserError("--evaluate and --resume exclude each other: give the run folder to one of them.")
        given = flags.given_arguments(parser, argv)
        flags.warn_of_ignored(parser, given, USED_BY_EVALUATE)
        return score(args, given)
    device, processes = distributed.start(args)
    devices.seed_everything(args.seed)
    with processes.one_per_host_first(), text_may_have_moved(args.resume):
        corpus = load_corpus(args.data, args.vocab_from)
    print(
        f"corpus: {corpus.folder}, {len(corpus.train):,} / {len(corpus.valid):,} / {len(corpus.test):,} "
        f"tokens (train / valid / test), {len(corpus.vocabulary):,} words"
    )
    try:
        cutoffs = choose_softmax(args, len(corpus.vocabulary))
        build = functools.partial(build_model, args, len(corpus.vocabulary), cutoffs)
        devices.check_model_fits(build, device)
        model = build().to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {type(model).__name__}, {parameters:,} parameters")
    trainer = Trainer(model, corpus, args, kind, device, processes)
    schedule.warn_of_long_warmup(args.warmup, trainer.total_steps)
    warn_of_short_epochs(args, len(trainer.window_stops(1)), len(corpus.train) - 1)
    processes.draw_apart(args.seed)

    with processes.run_folder(args, script) as folder:
        if args.resume is not None:
            go_on(trainer, folder, argv, new_epochs="epochs" in flags.given_arguments(parser, argv))
        else:
            print(f"run folder: {folder}", flush=True)
        try:
            if args.resume is None and processes.is_main:
                runs.write_arguments(
                    folder,
                    script,
                    args,
                    argv,
                    **processes.facts,
                    parameters=parameters,
                    corpus={
                        "folder": str(corpus.folder),
                        "words": len(corpus.vocabulary),
                        "train": len(corpus.train),
                        "valid": len(corpus.valid),
                        "test": len(corpus.test),
                        "sha256": trainer.fingerprint,
                    },
                )
            trainer.train(folder)
        except Interrupted:
            return tell_interrupted(trainer, script)
        except BaseException:
            # Whatever it was: a run without one good loss or a checkpoint has nothing in it worth a folder.
            begun = trainer.at.epoch_tokens or trainer.at.epoch > 1 or (folder / "last.pt").exists()
            if args.resume is None and processes.is_main and not begun:
                runs.discard_run_folder(folder)
            raise
        tell_test(trainer, trainer.test(), "test")
    return 0


def warn_of_short_epochs(args: argparse.Namespace, steps: int, targets: int) -> None:
    """Warns of a text that batch and window are too large for: learning takes steps, and an epoch has few."""
    if steps >= FEW_STEPS:
        return
    fitting = (targets - 1) // ((FEW_STEPS - 1) * args.bptt)  # columns of more than FEW_STEPS - 1 windows
    console.warn(
        f"the training text has {targets + 1:,} tokens: with --batch_size {args.batch_size} and --bptt "
        f"{args.bptt} an epoch has no more than {steps} step{'s' * (steps > 1)}, and learning takes many. "
        + (f"Lower --batch_size to {fitting} or less" if fitting else "Lower --batch_size and --bptt")
        + ", or train for more --epochs."
    )


def go_on(trainer: Trainer, folder: Path, argv: Sequence[str] | None, new_epochs: bool) -> None:
    """Takes up a run where its last.pt stands, and notes it; `new_epochs`: --epochs was given too."""
    args, processes = trainer.args, trainer.processes
    checkpoint = processes.from_main(lambda: checkpoints.load_last(folder))
    if checkpoint is not None:  # else it was killed before its first save: begin again, same seed
        trainer.restore(checkpoint)
    trainer.restore_best(folder)
    if args.schedule == "cosine" and new_epochs:
        console.warn("with another number of --epochs, the cosine schedule goes on along another curve")
    if processes.is_main:
        runs.note_resume(folder, args, argv, **processes.facts)
        runs.RunLog(folder / "log.jsonl").write("resume", epoch=trainer.at.epoch, step=trainer.at.step)
    if trainer.at.epoch > args.epochs:
        print(f"nothing to train: all {args.epochs} epochs are done. To go on, give more --epochs.")
    print(
        f"run folder: {folder}, resumed at step {trainer.at.step:,} in epoch "
        f"{min(trainer.at.epoch, args.epochs)}",
        flush=True,
    )


def tell_interrupted(trainer: Trainer, script: str) -> int:
    """After an interrupt: the best model's test score (if nobody is in a hurry) and how to go on.

    A scheduler that sends SIGTERM is in a hurry, and so is torchrun, which kills half a minute after Ctrl-C.
    """
    at, signal_name = trainer.at, trainer.interrupts.requested
    say(f"stopped by {signal_name} at step {at.step:,} in epoch {at.epoch}")
    if signal_name == "SIGINT" and trainer.processes.alone:
        if at.best_epoch:
            tell_test(trainer, trainer.test(), "interrupt")
        else:
            say("no epoch was finished, so there is no best model to test yet")
    say(f"to go on: {trainer.processes.launcher} {script}.py --resume {trainer.folder}")
    return trainer.interrupts.exit_status


def tell_test(trainer: Trainer, loss: float | None, event: str) -> None:
    """Logs and prints the best model's scores, beside the best that the corpus allows where that is known."""
    at = trainer.at
    if loss is None:
        say(f"no best.pt could be written to {trainer.folder}, so nothing is there to test")
        return
    trainer.write(
        event,
        loss=loss,
        ppl=perplexity(loss),
        best_epoch=at.best_epoch,
        valid_loss=at.best_valid,
        valid_ppl=perplexity(at.best_valid),
    )
    limit = best_possible(trainer.corpus.folder, "test")
    valid = loss_text(at.best_valid)
    say(f"best model (epoch {at.best_epoch}): valid {valid} | test {loss_text(loss)}{limit}")


def loss_text(loss: float) -> str:
    """A loss as people want to read it."""
    return f"loss {loss:.4f}, ppl {perplexity(loss):.2f}"


def best_possible(folder: Path, split: str) -> str:
    """' (best possible: ...)' if the corpus has an entropy.json, as a generated corpus may; else ''."""
    try:
        known = json.loads((folder / "entropy.json").read_text(encoding="utf-8"))[split]["perplexity"]
        return f" (best possible: {float(known):.2f})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def score(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Scores a checkpoint on valid and test: the --evaluate of both scripts, for either one's models.

    Text and columns are those of its run, unless the command line gives others.
    """
    path = find_checkpoint(args.evaluate)
    device, processes = distributed.start(args)
    checkpoint = checkpoints.load_checkpoint(path)
    model, vocabulary = load_model(checkpoint, device)
    saved = checkpoint.get("args")
    saved = saved if isinstance(saved, dict) else {}
    vocab_from = saved.get("vocab_from") if saved.get("vocab_from") in ("all", "train") else args.vocab_from
    with processes.one_per_host_first(), text_may_have_moved("data" not in given):
        corpus = load_corpus(args.data if "data" in given else str(saved.get("data", args.data)), vocab_from)
    columns = args.eval_batch_size
    if "eval_batch_size" not in given and isinstance(saved.get("eval_batch_size"), int):
        columns = max(1, saved["eval_batch_size"])
    if corpus.vocabulary.words != vocabulary.words:
        raise UserError(
            f"{path} was trained on another vocabulary ({len(vocabulary):,} words) than that "
            f"of {corpus.folder} ({len(corpus.vocabulary):,} words). Name its own corpus with --data."
        )
    print(f"{path} ({type(model).__name__}) on {corpus.folder}, {columns} columns", flush=True)
    lengths = {}
    for split in ("valid", "test"):
        with split_named(split, "--eval-batch-size"):
            ids = getattr(corpus, split)
            loss = evaluate(model, ids, columns, args.bptt, device, None, split, processes)
        say(f"{split}: {loss_text(loss)}{best_possible(corpus.folder, split)}")
        if args.state_lengths:
            rows = state_lengths.state_lengths(model, getattr(corpus, split), args.state_lengths, device)
            say(state_lengths.table(rows, loss, columns))
            lengths[split] = (rows, loss)
    if lengths and processes.is_main:
        state_lengths.write_csv(path.parent / "state_lengths.csv", lengths, columns)
        say(f"written: {path.parent / 'state_lengths.csv'}")
    return 0

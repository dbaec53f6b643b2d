"""Word-level language modeling: the task of train_rmc.py and train_rnn.py, and its evaluation.

Everything here is the same for both scripts, so that their numbers can be compared. Losses are in nats per
token (natural logarithm), averaged over tokens; perplexity is e to that power.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import checkpoints, distributed, flags, runs
from training.console import Interrupts, Progress, UserError, say
from training.distributed import ALONE, Processes
from training.script import Script
from training.trainer import Interrupted, Task, Trainer

import torch
from torch import Tensor

from data_utils import Corpus, TokenStreams, Vocabulary, load_corpus
from layers.language_model import LanguageModel, perplexity
from layers.regularization import WeightAverage
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from tasks.language_flags import choose_softmax

MODELS: dict[str, type[LanguageModel]] = {"rmc": RelationalMemoryLM, "rnn": RNNLM}
SCRIPTS = ("train_rmc", "train_rnn")
LOWER_MEMORY = "--batch-size or --bptt, use --adaptivesoftmax, or raise --accumulate"

# ---- evaluation


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    ids: Tensor,
    batch_size: int,
    bptt: int,
    device: torch.device | str,
    interrupts: Interrupts | None = None,
    label: str = "evaluating",
    processes: Processes = ALONE,
) -> float:
    """Return the mean loss of a split in nats per token, with each of its N - 1 targets scored once.

    Args:
        model: in eval mode during the call, in its previous mode afterward.
        ids: the split, (N,).
        batch_size: streams that the split is divided into. Each starts from the initial state and keeps its
            state until its last token: fewer streams lose less context, 1 scores the split as one stream.
        bptt: tokens of a stream per step; changes speed and memory, not the result.
        interrupts: checked between windows.
        label: name of the split, beside the progress bar.
        processes: divide the streams; each process gets the loss of the full split.

    Raises:
        UserError: the split has fewer targets than streams.
        Interrupted: a stop was requested.
    """
    streams = TokenStreams(ids, batch_size, device)
    mine = processes.shard(batch_size)
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once: reading makes a GPU wait
        state = model.initial_state(mine.stop - mine.start)
        with Progress(-(-streams.length // bptt), label) as progress:
            for tokens, targets in streams.windows(bptt):
                if len(state):  # with more processes than streams, some have none
                    nats, state = model(tokens[mine], targets[mine], state)
                    total += nats.sum()
                progress.advance()
                if interrupts is not None and processes.agree(interrupts)[0]:
                    raise Interrupted
        return processes.all_reduce(total).item() / streams.num_pairs
    finally:
        model.train(was_training)


def describe_model(kind: str, model: LanguageModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return what a checkpoint contains for `load_model`, as plain data."""
    return {"kind": kind, "config": model.config, "model": model.state_dict(), "words": vocabulary.words}


def load_model(
    checkpoint: Mapping[str, Any], device: torch.device | str = "cpu"
) -> tuple[LanguageModel, Vocabulary]:
    """Rebuild the model of a checkpoint (best.pt or last.pt, of either script), in eval mode.

    Raises:
        UserError: the checkpoint is not a language model's, or its weights do not match its sizes.
    """
    model = checkpoints.rebuild_model(checkpoint, MODELS)
    return model.to(device), Vocabulary(checkpoint["words"])


def find_checkpoint(given: str | Path) -> Path:
    """Return the checkpoint that a path means: the file, or best.pt of a run folder."""
    path = Path(given)
    return path / "best.pt" if path.is_dir() else path


# ---- the task


@dataclass
class Reading:
    """Where a run stands in its text."""

    epoch: int = 1  # the present one, from 1
    offset: int = 0  # tokens of each stream that this epoch has trained on
    epoch_nats: float = 0.0  # summed losses of this epoch, up to the last report


class LanguageModeling(Task):
    """Training of a language model on windows of a text, epoch by epoch.

    Args:
        model: on `device`.
        corpus: the text.
        args: the flags of `language_flags.add_flags`.
        kind: key of MODELS.
        device: where to compute.
        processes: divide the streams of the batch, in order.
    """

    sums = ("losses",)
    score_name = "valid_loss"
    lower = "a lower --lr or --clip"

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
        for name in ("valid", "test"):  # fail now, not after the first epoch
            split_streams(corpus, name, args.eval_batch_size, "--eval-batch-size")
        self.streams = split_streams(corpus, "train", args.batch_size, "--batch-size", device)
        self.mine = processes.shard(args.batch_size)
        self.examples = self.mine.stop - self.mine.start
        self.full_count = args.batch_size * args.bptt
        self.can_be_captured = not args.adaptivesoftmax  # which makes the host wait for the GPU
        self.state = model.initial_state(self.examples)  # stays in place, as a captured step requires
        self.position = Reading()
        if args.average == "ema":
            self.average = WeightAverage(model, args.average_decay)
        self.epoch_steps = math.ceil(self.streams.length / args.bptt)
        self.total_steps = args.epochs * self.epoch_steps
        self.fingerprint = corpus.fingerprint()

    def facts(self) -> dict[str, Any]:
        corpus = self.corpus
        sizes = {name: len(getattr(corpus, name)) for name in ("train", "valid", "test")}
        words = len(corpus.vocabulary)
        return {"corpus": {"folder": str(corpus.folder), "words": words, **sizes, "sha256": self.fingerprint}}

    def describe(self, model: LanguageModel) -> dict[str, Any]:
        return describe_model(self.kind, model, self.corpus.vocabulary)

    def state_dict(self) -> dict[str, Any]:
        return {"corpus": self.fingerprint}

    def load_state_dict(self, saved: Mapping[str, Any], step: int) -> None:
        if saved["corpus"] != self.fingerprint:
            raise UserError(
                f"the text in {self.corpus.folder} is not the one that this run was started on. Name the "
                "folder of that text with --data, or start a new run."
            )

    # -- batches

    def finished(self, step: int) -> bool:
        return self.position.epoch > self.args.epochs

    def span(self, step: int) -> tuple[str, int, int]:
        return f"epoch {self.position.epoch}", self.epoch_steps, self.position.offset // self.args.bptt

    def span_is_over(self, step: int) -> bool:
        return self.position.offset >= self.streams.length

    def next_batch(self) -> tuple[tuple[Tensor, ...], int]:
        start = self.position.offset
        stop = self.position.offset = min(start + self.args.bptt, self.streams.length)
        tokens, targets = self.streams.window(start, stop)
        count = self.targets_before(stop) - self.targets_before(start)
        return (tokens[self.mine], targets[self.mine]), count

    def targets_before(self, offset: int) -> int:
        """Return the number of targets before an offset of the streams, without reading the tensors."""
        return min(offset * self.args.batch_size, self.streams.num_pairs)

    def losses(
        self, model: LanguageModel, state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        nats, after = model(*inputs, state)
        total = nats.sum()  # one number per replica
        return total, total.reshape(1), after

    # -- reports and scores

    def log_fields(self) -> dict[str, Any]:
        return {"epoch": min(self.position.epoch, self.args.epochs)}

    def report(self, trainer: Trainer, totals: dict[str, float], elapsed: float) -> tuple[dict, str, str]:
        steps = max(trainer.timed_steps, 1)
        loss = totals["losses"] / trainer.position.interval_count
        if perplexity(loss) == math.inf:
            trainer.diverged(f"training loss is {loss:.4g} nats per token")
        self.position.epoch_nats += totals["losses"]
        fields = {
            "loss": loss,
            "ppl": perplexity(loss),
            "ms_per_batch": 1000 * elapsed / steps,
            "tokens_per_second": trainer.timed_count / elapsed,
        }
        speed = f"{fields['tokens_per_second']:,.0f} tokens/s"
        short = f"loss {loss:.3f}, ppl {perplexity(loss):.1f}, {speed}"
        times = f"{speed} | {fields['ms_per_batch']:.1f} ms/batch"
        return fields, short, f"{loss_text(loss)} | {times} | lr {trainer.lr.current:g}"

    def end_span(self, trainer: Trainer) -> None:
        """End an epoch: validation loss, learning rate, best.pt."""
        loss = self.evaluate(trainer, "valid", self.model, trainer.interrupts)
        if perplexity(loss) == math.inf:
            trainer.diverged(f"validation loss is {loss:.4g} nats per token")
        best, best_model, averaged = loss, self.model, {}
        if self.average is not None:
            average_loss = self.evaluate(trainer, "valid", self.average.model, trainer.interrupts)
            averaged = {"average_loss": average_loss, "average_ppl": perplexity(average_loss)}
            if average_loss < loss:
                best, best_model = average_loss, self.average.model
        train_loss = self.position.epoch_nats / self.streams.num_pairs
        train = {"train_loss": train_loss, "train_ppl": perplexity(train_loss)}
        trainer.update_clock()
        trainer.write("valid", loss=loss, ppl=perplexity(loss), **averaged, **train)
        trainer.lr.end_epoch(loss)
        mark = " (best)" if trainer.offer_best(best, best_model) else ""
        line = f"valid {loss_text(loss)}{mark if best_model is self.model else ''}"
        if averaged:
            line += f", averaged {averaged['average_ppl']:.2f}{mark if best_model is not self.model else ''}"
        epoch, seconds = self.position.epoch, trainer.position.seconds
        say(f"epoch {epoch}: train ppl {train['train_ppl']:.2f} | {line} | {seconds:.0f} s")
        self.position = Reading(epoch + 1)
        self.state.copy_(self.model.initial_state(self.examples))

    def evaluate(
        self, trainer: Trainer, split: str, model: LanguageModel, interrupts: Interrupts | None = None
    ) -> float:
        """Return the mean loss of a split in nats per token."""
        args, ids = self.args, getattr(self.corpus, split)
        streams, processes = args.eval_batch_size, trainer.processes
        return evaluate(model, ids, streams, args.bptt, self.device, interrupts, split, processes)

    def finish(self, trainer: Trainer) -> None:
        """Test the best model."""
        best = trainer.processes.broadcast(trainer.load_best)
        model, _ = load_model(best, self.device)
        loss, valid = self.evaluate(trainer, "test", model), trainer.position.best_score
        epoch = best["scores"]["epoch"]
        scores = {"loss": loss, "ppl": perplexity(loss), "best_epoch": epoch}
        trainer.write("test", **scores, valid_loss=valid, valid_ppl=perplexity(valid))
        limit = best_possible(self.corpus.folder, "test")
        say(f"best model (epoch {epoch}): valid {loss_text(valid)} | test {loss_text(loss)}{limit}")


def split_streams(
    corpus: Corpus, split: str, batch_size: int, flag: str, device: torch.device | str = "cpu"
) -> TokenStreams:
    """Return a split in streams; add its name and the flag of the batch size to a UserError."""
    try:
        return TokenStreams(getattr(corpus, split), batch_size, device)
    except UserError as error:
        raise UserError(f"{split}.txt and {flag} do not fit: {error}") from None


def loss_text(loss: float) -> str:
    """Return a loss and its perplexity as text."""
    return f"loss {loss:.4f}, ppl {perplexity(loss):.2f}"


def best_possible(folder: Path, split: str) -> str:
    """Return ' (best possible: PERPLEXITY)' if the corpus has an entropy.json, as data/tiny has; else ''."""
    path = folder / "entropy.json"
    return f" (best possible: {runs.read_json(path)[split]['perplexity']:.2f})" if path.exists() else ""


# ---- the scripts


def script(
    name: str,
    kind: str,
    parser: flags.Parser,
    build_model: Callable[[argparse.Namespace, int, list[int] | None], LanguageModel],
    recipes: Mapping[str, Mapping[str, Any]],
) -> Script:
    """Return a language model's training script.

    Args:
        name: without '.py'.
        kind: key of MODELS.
        parser: has `language_flags.add_flags` and the model's own flags.
        build_model: makes the model from arguments, vocabulary size and cutoffs (None: full softmax). A
            ValueError becomes the user's error message.
        recipes: what `--recipe` may name.
    """

    def build(args: argparse.Namespace, device: torch.device, processes: Processes) -> Trainer:
        with processes.one_per_host_first():
            corpus = load_corpus(args.data, args.vocab_from)
        words = len(corpus.vocabulary)
        print(
            f"corpus: {corpus.folder}, {len(corpus.train):,} / {len(corpus.valid):,} / {len(corpus.test):,} "
            f"tokens (train / valid / test), {words:,} words"
        )
        try:
            model = build_model(args, words, choose_softmax(args, words)).to(device)
        except ValueError as error:
            raise UserError(str(error)) from None
        task = LanguageModeling(model, corpus, args, kind, device, processes)
        return Trainer(task, args, device, processes, optimizer_of(model, args))

    return Script(name, parser, build, score, recipes, frozenset({"epochs", "data"}))


def optimizer_of(model: LanguageModel, args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer's constructor."""
    parameters = list(model.parameters())
    if not args.weight_decay:
        return functools.partial(torch.optim.Adam, parameters)
    # Biases and the gains of norms do not decay.
    vectors = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    matrices = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay}
    return functools.partial(torch.optim.AdamW, [matrices, vectors])


def score(script: Script, args: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """Score a checkpoint on valid and test: the --evaluate of both scripts, for the models of either one.

    Text and streams are those of its run, unless the command line names others.
    """
    path = find_checkpoint(args.evaluate)
    device, processes = distributed.start(args)
    checkpoint = checkpoints.load_checkpoint(path)
    model, vocabulary = load_model(checkpoint, device)
    of_run = checkpoint["args"]
    with processes.one_per_host_first():
        corpus = load_corpus(given.get("data", of_run["data"]), of_run["vocab_from"])
    if corpus.vocabulary.words != vocabulary.words:
        raise UserError(
            f"the vocabulary of {path} ({len(vocabulary):,} words) differs from that of {corpus.folder} "
            f"({len(corpus.vocabulary):,} words). A model trained with --vocab-from train can be scored on "
            "another valid.txt and test.txt beside its own train.txt, other models only on their own text."
        )
    streams = given.get("eval_batch_size", of_run["eval_batch_size"])
    print(f"{path} ({type(model).__name__}) on {corpus.folder}, streams: {streams}", flush=True)
    for split in ("valid", "test"):
        split_streams(corpus, split, streams, "--eval-batch-size")
        ids = getattr(corpus, split)
        loss = evaluate(model, ids, streams, args.bptt, device, None, split, processes)
        say(f"{split}: {loss_text(loss)}{best_possible(corpus.folder, split)}")
    return 0

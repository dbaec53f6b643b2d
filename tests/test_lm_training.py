"""Training and evaluation of the language models, in one process, on a synthetic text."""

import copy
import math
import random

from training import checkpoints, console, runs
from training.console import UserError
from training.distributed import ALONE
from training.schedule import PATIENCE, LearningRate
from training.trainer import Trainer

import pytest
import torch
from torch import nn

import train_rmc
import train_rnn
from data_utils import Corpus, Vocabulary
from tasks import language_modeling
from tasks.language_flags import choose_softmax

V = 29
SCRIPTS = {
    "rmc": (train_rmc, "--emsize 12 --headsize 5 --numheads 2 --keysize 3 --memslots 2"),
    "rnn": (train_rnn, "--emsize 12 --nhid 14 --nlayers 2"),
}
# 504 targets in 7 streams of 72: 7 windows of 11 in an epoch, the last of 6.
COMMON = "--batch-size 7 --bptt 11 --eval-batch-size 3 --dropout 0"
STEPS = 7
ADAPTIVE = ["--adaptivesoftmax", "--cutoffs", "8", "17"]
KINDS = pytest.mark.parametrize("kind", SCRIPTS)


def ids(count, seed):
    draw = random.Random(seed)
    return torch.tensor([draw.randrange(V) for _ in range(count)], dtype=torch.uint8)


def make_trainer(folder, kind, *argv, dtype=torch.float32):
    script, sizes = SCRIPTS[kind]
    args = script.build_parser().parse_args([*f"{sizes} {COMMON}".split(), *argv])
    torch.manual_seed(args.seed)
    corpus = Corpus(folder, Vocabulary([f"w{i}" for i in range(V)]), ids(505, 1), ids(101, 2), ids(97, 3))
    model = script.build_model(args, V, choose_softmax(args, V)).to(dtype)
    cpu = torch.device("cpu")
    task = language_modeling.LanguageModeling(model, corpus, args, kind, cpu)
    trainer = Trainer(task, args, cpu, ALONE, language_modeling.optimizer_of(model, args))
    trainer.folder, trainer.log = folder, runs.RunLog(folder / "log.jsonl")
    return trainer


def take_steps(trainer, count=STEPS):
    """Take steps of the first epoch, without reports."""
    trainer.model.train()
    trainer.task.span(0)
    for _ in range(count):
        trainer.step()


def events(folder, kind):
    return [event for event in runs.read_log(folder / "log.jsonl") if event["event"] == kind]


def validate_with(trainer, monkeypatch, *losses):
    """Let validation return these losses, one after the other."""
    given = iter(losses)
    monkeypatch.setattr(trainer.task, "evaluate", lambda *arguments: next(given))


# ---- evaluation


class Table(nn.Module):
    """A language model without memory: the loss of each pair of words is a number in a table."""

    def __init__(self):
        super().__init__()
        self.nats = torch.rand(V, V, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)

    def initial_state(self, batch_size):
        return torch.zeros(batch_size, 1)

    def forward(self, tokens, targets, state):
        scored = targets >= 0
        return self.dropout(self.nats[tokens[scored], targets[scored]]).sum().reshape(1), state


def test_evaluation_scores_every_target_once_whatever_batch_and_window():
    text, table = ids(101, 4), Table()
    expected = sum(table.nats[text[i].long(), text[i + 1].long()].item() for i in range(100)) / 100
    for batch_size in (1, 2, 3, 7, 50, 100):
        for bptt in (1, 4, 5, 1000):
            found = language_modeling.evaluate(table, text, batch_size, bptt, "cpu")
            assert found == pytest.approx(expected, abs=1e-12), (batch_size, bptt)


@KINDS
def test_evaluation_with_one_stream_reads_the_text_word_by_word(tmp_path, kind):
    model = make_trainer(tmp_path, kind, "--dropout", "0.6", dtype=torch.float64).model.eval()
    text, state, nats = ids(60, 5).long(), model.initial_state(1), 0.0
    with torch.no_grad():
        for word, following in zip(text[:-1], text[1:], strict=True):
            log_probabilities, state = model.log_probabilities(word.reshape(1, 1), state)
            nats -= log_probabilities[0, following].item()
    model.train()
    for bptt in (1, 7, 59, 1000):  # dropout is off, and the window changes nothing
        found = language_modeling.evaluate(model, text, 1, bptt, "cpu")
        assert found == pytest.approx(nats / 59, abs=1e-10)
    assert model.training
    language_modeling.evaluate(model.eval(), text, 1, 7, "cpu")
    assert not model.training


# ---- training steps against an obvious loop


def plain_training(model, text, args):
    """Train with a plain loop.

    Returns:
        Learning rate, mean loss and gradient norm of every step, the mean loss of every epoch, and the moving
        average of the parameters.
    """
    pairs, batch = len(text) - 1, args.batch_size
    base, extra = divmod(pairs, batch)
    starts = [stream * base + min(stream, extra) for stream in range(batch)]
    lengths = [base + (stream < extra) for stream in range(batch)]
    stops = [*range(args.bptt, max(lengths), args.bptt), max(lengths)]
    total = len(stops) * args.epochs
    parameters = list(model.parameters())
    decays = [{"params": p, "weight_decay": args.weight_decay if p.dim() > 1 else 0} for p in parameters]
    adam = torch.optim.AdamW(decays, foreach=False)
    average = [p.detach().clone() for p in parameters]
    rows, epochs, step = [], [], 0
    for _ in range(args.epochs):
        state, start = model.initial_state(batch), 0
        epochs.append(0.0)
        for stop in stops:
            step += 1
            tokens = torch.zeros(batch, stop - start, dtype=torch.long)
            targets = torch.full_like(tokens, -1)
            for stream in range(batch):
                for index in range(start, min(stop, lengths[stream])):
                    tokens[stream, index - start] = text[starts[stream] + index]
                    targets[stream, index - start] = text[starts[stream] + index + 1]
            nats, state = model(tokens, targets, state.detach())
            loss = nats.sum() / (targets >= 0).sum()
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
            lr = args.lr
            if step <= args.warmup:
                lr *= step / args.warmup
            elif args.schedule == "cosine":
                peak = max(args.warmup, 1)
                lr *= 0.5 * (1 + math.cos(math.pi * (step - peak) / (total - peak + 1)))
                assert lr > 0
            rows.append((lr, loss.item(), norm))
            epochs[-1] += nats.item() / pairs
            shrink = min(1, args.clip / (norm + 1e-6)) if args.clip else 1
            for group, parameter, gradient in zip(adam.param_groups, parameters, gradients, strict=True):
                group["lr"], parameter.grad = lr, gradient * shrink
            adam.step()
            share = max(1 - args.average_decay, 1 / step)
            average = [
                (1 - share) * old + share * new.detach() for old, new in zip(average, parameters, strict=True)
            ]
            start = stop
    return rows, epochs, average


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("rmc", "--warmup 3 --clip 0.05 --average ema --average-decay 0.8"),
        ("rmc", "--schedule cosine --accumulate 7 --clip 0.05 --weight-decay 0.2"),
        ("rnn", "--tied --project --schedule cosine --warmup 4 --weight-decay 0.3"),
        ("rnn", "--clip 0 --batch-size 5 --average ema"),
    ],
)
def test_two_epochs_equal_a_plain_loop(tmp_path, kind, flags):
    """Learning rate, loss and gradient norm of every step, and the weights and their average at the end."""
    flags = ["--lr", "0.01", "--epochs", "2", "--log-interval", "1", *flags.split()]
    trainer = make_trainer(tmp_path, kind, *flags, dtype=torch.float64)
    args, model = trainer.args, copy.deepcopy(trainer.model)
    rows, epochs, average = plain_training(model, ids(505, 1).long(), args)
    assert args.clip == 0 or max(norm for _, _, norm in rows) > args.clip  # some steps are clipped
    assert trainer.train(tmp_path)
    logged = [(event["lr"], event["loss"], event["grad_norm"]) for event in events(tmp_path, "train")]
    exact = {"dtype": torch.float64}
    torch.testing.assert_close(
        torch.tensor(logged, **exact), torch.tensor(rows, **exact), rtol=1e-9, atol=1e-15
    )
    assert [event["train_loss"] for event in events(tmp_path, "valid")] == pytest.approx(epochs, rel=1e-9)
    for (name, expected), found in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=name)
    if args.average == "ema":
        averaged = trainer.task.average.model.parameters()
        torch.testing.assert_close([p.data for p in averaged], average, rtol=0, atol=1e-9)


def assert_same_steps(one, other):
    for trainer in (one, other):
        take_steps(trainer)
    torch.testing.assert_close(other.sums[0], one.sums[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(other.task.state, one.task.state, rtol=0, atol=1e-9)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        # Adam divides by gradients that may be near 0.
        assert torch.allclose(b, a, rtol=0, atol=1e-7)


class Shards(nn.Module):
    """What DataParallel does, by hand: arguments cut along the batch, results joined."""

    def __init__(self, model, count):
        super().__init__()
        self.model, self.count = model, count

    def forward(self, *arguments, **named):
        pieces = zip(*(argument.chunk(self.count) for argument in arguments), strict=True)
        results = [self.model(*piece, **named) for piece in pieces]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize("softmax", [[], ADAPTIVE], ids=["full", "adaptive"])
@KINDS
def test_replicas_take_the_step_of_one_model(tmp_path, kind, softmax):
    one = make_trainer(tmp_path, kind, *softmax, dtype=torch.float64)
    many = make_trainer(tmp_path, kind, *softmax, dtype=torch.float64)
    many.replicas = Shards(many.model, 3)
    assert_same_steps(one, many)


@KINDS
def test_bf16_trains_in_lower_precision_and_evaluates_in_full(tmp_path, kind):
    exact, lower = (make_trainer(tmp_path, kind, *flags) for flags in ((), ("--bf16",)))
    losses = [t.task.evaluate(t, "valid", t.model) for t in (exact, lower)]
    assert losses[0] == losses[1]
    for trainer in (exact, lower):
        take_steps(trainer)
    assert lower.task.state.dtype == torch.float32
    assert lower.sums[0] != exact.sums[0]
    torch.testing.assert_close(lower.sums[0], exact.sums[0], rtol=0.02, atol=0)


# ---- learning rates


def test_plateau_equals_torch_and_survives_a_checkpoint():
    def make():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.008)
        return LearningRate(0.008, "plateau", 0, 100, optimizer, torch.device("cpu"))

    draw, ours = random.Random(3), make()
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.008)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.5, patience=PATIENCE, threshold=0.0)
    for epoch in range(1, 80):
        loss = draw.choice([3.0, 4.0, 5.0]) - epoch / 40
        plateau.step(loss)
        ours.end_epoch(loss)
        if epoch % 7 == 0:
            state, ours = ours.state_dict(), make()
            ours.load_state_dict(state, epoch)
        ours.set(epoch)
        assert ours.optimizer.param_groups[0]["lr"] == ours.current == theirs.param_groups[0]["lr"]
    assert 0 < ours.current < 0.001


# ---- best.pt, last.pt, the average


def test_best_model_and_learning_rate_follow_the_validation_loss(tmp_path, monkeypatch):
    """Six epochs without a better loss halve the rate (five do not); best.pt is that of the best epoch."""
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "12", "--bptt", "200", "--lr", "0.004")
    validate_with(trainer, monkeypatch, 5.0, 4.0, *[4.5] * 7, 3.0, 9.0, 3.0)
    trainer.train(tmp_path)
    assert [event["lr"] for event in events(tmp_path, "valid")] == [0.004] * 8 + [0.002] * 4
    best = checkpoints.load_checkpoint(tmp_path / "best.pt")
    assert best["scores"] == {"epoch": 10, "step": 10, "valid_loss": 3.0}
    assert (trainer.position.best_step, trainer.position.best_score) == (10, 3.0)


def test_checkpoints_are_written_when_they_should_be(tmp_path, monkeypatch):
    """best.pt at each better epoch, last.pt after every epoch, by the clock and at a stop."""
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "3", "--save-every", "9")
    validate_with(trainer, monkeypatch, 2.0, 3.0, 1.0)
    written = []
    monkeypatch.setattr(
        checkpoints,
        "save_checkpoint",
        lambda path, contents: written.append((path.name, trainer.position.step)),
    )
    assert console.Alarm(9).seconds == 540
    monkeypatch.setattr(
        console.Alarm, "due", lambda alarm: bool(alarm.seconds) and trainer.position.step == 4
    )
    assert trainer.train(tmp_path)
    best, last = [("best.pt", 7), ("best.pt", 21)], [("last.pt", step) for step in (4, 7, 14, 21)]
    assert written == [last[0], best[0], last[1], last[2], best[1], last[3]]
    written.clear()
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "3", "--save-every", "0")
    step = trainer.step
    monkeypatch.setattr(
        trainer, "step", lambda: (step(), setattr(trainer.interrupts, "requested", "SIGTERM"))[0]
    )
    assert not trainer.train(tmp_path) and written == [("last.pt", 1)]


@pytest.mark.parametrize("gain, averaged_is_best", [(0.01, True), (-0.01, False)])
def test_best_pt_holds_the_weights_or_their_average_whichever_is_better(
    tmp_path, monkeypatch, capsys, gain, averaged_is_best
):
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "1", "--average", "ema")
    task, evaluate = trainer.task, trainer.task.evaluate

    def shifted(trainer, split, model, interrupts):
        same = evaluate(trainer, split, task.model, interrupts)
        return same - gain * (model is task.average.model)

    monkeypatch.setattr(task, "evaluate", shifted)
    trainer.train(tmp_path)
    assert task.average.steps == STEPS
    best = checkpoints.load_checkpoint(tmp_path / "best.pt")
    chosen, other = (task.average.model, task.model)[:: 1 if averaged_is_best else -1]
    assert all(torch.equal(value, best["model"][name]) for name, value in chosen.state_dict().items())
    assert not torch.equal(best["model"]["embedding.weight"], other.embedding.weight)
    (valid,) = events(tmp_path, "valid")
    assert best["scores"]["valid_loss"] == min(valid["loss"], valid["average_loss"])
    assert valid["average_ppl"] == pytest.approx(math.exp(valid["average_loss"]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.count("(best)") == 1 and (f"{valid['average_ppl']:.2f} (best)" in line) == averaged_is_best


@pytest.mark.parametrize("moment", ["log interval", "timed save", "stop", "end of epoch"])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(tmp_path, monkeypatch, moment):
    interval = "4" if moment == "log interval" else "999"
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "3", "--log-interval", interval)
    losses, kept = trainer.task.losses, {}

    def spoilt(*arguments):
        objective, sums, state = losses(*arguments)
        return objective, sums * (math.nan if trainer.position.step > STEPS else 1), state

    def due(alarm):
        if trainer.position.step == STEPS + 1:  # all is well until here
            kept.update({name: (tmp_path / name).read_bytes() for name in ("best.pt", "last.pt")})
        if moment == "stop" and trainer.position.step == STEPS + 3:
            trainer.interrupts.requested = "SIGINT"
        return moment == "timed save" and trainer.position.step == STEPS + 3

    monkeypatch.setattr(trainer.task, "losses", spoilt)
    monkeypatch.setattr(console.Alarm, "due", due)
    message = "diverged: the sum of the losses .* is nan.*lower --lr"
    with pytest.raises(UserError, match=message):
        trainer.train(tmp_path)
    assert kept and kept == {name: (tmp_path / name).read_bytes() for name in kept}


def test_training_that_has_diverged_is_noticed_in_other_numbers_too(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "rnn")
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    take_steps(trainer, 1)
    with pytest.raises(UserError, match="sum of the gradient norms since the last report is (inf|nan)"):
        trainer.save_last()
    assert not (tmp_path / "last.pt").exists()
    trainer = make_trainer(tmp_path, "rnn")
    validate_with(trainer, monkeypatch, math.nan)
    with pytest.raises(UserError, match="validation loss is nan nats per token"):
        trainer.train(tmp_path)
    trainer = make_trainer(tmp_path, "rnn", "--lr", "0.25")
    losses = trainer.task.losses
    monkeypatch.setattr(trainer.task, "losses", lambda *given: tuple(x * 1e6 for x in losses(*given)))
    with pytest.raises(UserError, match="training loss is .* nats per token.*lower --lr or --clip"):
        trainer.train(tmp_path)

"""The training loop and the evaluation that both language models share."""

import argparse
import math
import random

import pytest
import torch
from torch import nn

import train_rmc
import train_rnn
from data_utils import Corpus, TokenColumns, Vocabulary
from training import checkpoints, console, devices, lm_flags, lm_training, runs
from training.console import UserError

V = 29
RMC = ["--emsize", "12", "--headsize", "5", "--numheads", "2", "--keysize", "3", "--memslots", "2"]
RNN = ["--emsize", "12", "--nhid", "14", "--nlayers", "2"]
COMMON = ["--batch_size", "7", "--bptt", "11", "--eval-batch-size", "3", "--dropout", "0"]
ADAPTIVE = ["--adaptivesoftmax", "--cutoffs", "8", "17"]
SCRIPTS = {"rmc": (train_rmc, RMC), "rnn": (train_rnn, RNN)}


def ids(count, seed):
    draw = random.Random(seed)
    return torch.tensor([draw.randrange(V) for _ in range(count)], dtype=torch.uint8)


def make_corpus(tmp_path):
    return Corpus(tmp_path, Vocabulary([f"w{i}" for i in range(V)]), ids(505, 1), ids(101, 2), ids(97, 3))


def make_trainer(tmp_path, kind, *argv, device="cpu"):
    script, sizes = SCRIPTS[kind]
    args = script.build_parser().parse_args([*sizes, *COMMON, *argv])
    devices.seed_everything(args.seed)
    corpus = make_corpus(tmp_path)
    model = script.build_model(args, V, lm_flags.choose_softmax(args, V)).to(device)
    trainer = lm_training.Trainer(model, corpus, args, kind, torch.device(device))
    trainer.folder = tmp_path
    trainer.log = runs.RunLog(tmp_path / "log.jsonl")
    return trainer


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


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50, 100])
@pytest.mark.parametrize("bptt", [1, 4, 5, 1000])
def test_fault_4_every_target_is_scored_once_whatever_batch_and_window(batch_size, bptt):
    """The old port dropped leftover tokens and weighed a short last window as a full one."""
    text, table = ids(101, 4), Table()
    expected = sum(table.nats[text[i].long(), text[i + 1].long()].item() for i in range(100)) / 100
    assert lm_training.evaluate(table, text, batch_size, bptt, "cpu") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_fault_4_one_evaluation_for_both_models_as_one_stream(tmp_path, kind):
    """With one column: the mean of what the model says word by word, RMC and LSTM by the same function."""
    model = make_trainer(tmp_path, kind).model.double().eval()
    text, state, nats = ids(60, 5).long(), model.initial_state(1), 0.0
    with torch.no_grad():
        for word, following in zip(text[:-1], text[1:], strict=True):
            log_probabilities, state = model.log_probabilities(word.reshape(1, 1), state)
            nats -= log_probabilities[0, following].item()
    expected = nats / 59
    for bptt in (1, 7, 59, 1000):
        assert lm_training.evaluate(model, text, 1, bptt, "cpu") == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_evaluation_does_not_depend_on_the_window(tmp_path, kind):
    model = make_trainer(tmp_path, kind, "--dropout", "0.6").model.double()
    model.train()
    losses = [lm_training.evaluate(model, ids(100, 6), 4, bptt, "cpu") for bptt in (2, 9, 25, 300)]
    assert max(losses) - min(losses) < 1e-10  # and dropout is off
    assert model.training  # put back as it was


def test_evaluation_stops_when_asked(tmp_path):
    interrupts = console.Interrupts()
    interrupts.requested = "SIGTERM"
    table = Table()
    with pytest.raises(lm_training.Interrupted):
        lm_training.evaluate(table, ids(50, 1), 2, 5, "cpu", interrupts)
    assert table.training


def test_split_shorter_than_its_batch_names_split_and_flag(tmp_path):
    with pytest.raises(UserError, match="valid.txt and --eval-batch-size"):
        make_trainer(tmp_path, "rnn", "--eval-batch-size", "101")
    with pytest.raises(UserError, match="train.txt and --batch_size"):
        make_trainer(tmp_path, "rnn", "--batch_size", "505")


def test_perplexity_of_a_huge_loss_is_infinite():
    assert lm_training.perplexity(math.log(105.5)) == pytest.approx(105.5)
    assert lm_training.perplexity(1e6) == lm_training.perplexity(math.nan) == math.inf


# ---- the loop


@pytest.mark.parametrize("batch_size, bptt", [(1, 50), (7, 11), (8, 9), (504, 3), (60, 100)])
def test_targets_are_counted_as_the_windows_hold_them(tmp_path, batch_size, bptt):
    trainer = make_trainer(tmp_path, "rnn", "--batch_size", str(batch_size))
    place = 0
    for _, targets in TokenColumns(ids(505, 1), batch_size).windows(bptt):
        stop = place + targets.shape[1]
        assert trainer.targets_before(stop) - trainer.targets_before(place) == (targets >= 0).sum()
        place = stop
    assert trainer.targets_before(place) == 504


@pytest.mark.parametrize("kind", SCRIPTS)
def test_training_loss_is_weighed_by_tokens_and_state_is_carried(tmp_path, kind):
    """With next to no learning rate, an epoch of training must report what evaluation of that text does."""
    trainer = make_trainer(tmp_path, kind, "--lr", "1e-30")
    expected = lm_training.evaluate(trainer.model, trainer.corpus.train, 7, 1000, "cpu")
    trainer.train_epoch()
    assert trainer.at.epoch_tokens == 504
    assert trainer.at.epoch_nats / 504 == pytest.approx(expected, rel=1e-6)


def test_training_is_in_training_mode(tmp_path):
    trainer = make_trainer(tmp_path, "rnn")
    trainer.model.eval()
    trainer.train_epoch()
    assert trainer.model.training


def test_gradient_is_that_of_the_mean_and_is_clipped(tmp_path):
    trainer = make_trainer(tmp_path, "rnn", "--clip", "0.01")
    tokens, targets = next(trainer.columns.windows(11))
    loss, _ = trainer.model.loss(tokens, targets, trainer.model.initial_state(7))
    loss.backward()
    expected = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    norm = torch.stack([gradient.square().sum() for gradient in expected]).sum().sqrt()
    assert norm > 0.01
    trainer.state = trainer.model.initial_state(7)
    trainer.step(tokens, targets)
    for gradient, parameter in zip(expected, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient * (0.01 / norm), rtol=1e-4, atol=1e-9)
    assert trainer.sums.tolist() == pytest.approx([loss.item() * 77, norm.item()], rel=1e-5)
    assert not trainer.state.requires_grad


class Shards(nn.Module):
    """What DataParallel does, by hand: arguments cut along the batch, results joined along theirs."""

    def __init__(self, model, count):
        super().__init__()
        self.model, self.count = model, count

    def forward(self, *arguments):
        pieces = zip(*(argument.chunk(self.count) for argument in arguments), strict=True)
        results = [self.model(*piece) for piece in pieces]
        return tuple(torch.cat(column) for column in zip(*results, strict=True))


@pytest.mark.parametrize("softmax", [[], ADAPTIVE], ids=["full", "adaptive"])
@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("count", [2, 3])
def test_fault_5_replicas_split_inputs_targets_and_state_along_the_batch(tmp_path, kind, softmax, count):
    """An epoch on several devices is the epoch on one: the last, ragged window included."""
    one, many = (make_trainer(tmp_path, kind, *softmax) for _ in range(2))
    many.replicas = Shards(many.model, count)
    for trainer in (one, many):
        trainer.model.double()
        trainer.state = trainer.state.double()
        trainer.train_epoch()
    assert many.at.epoch_nats == pytest.approx(one.at.epoch_nats, rel=1e-12)
    torch.testing.assert_close(many.state, one.state, rtol=0, atol=1e-10)
    for (name, a), b in zip(one.model.named_parameters(), many.model.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-10)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-7)  # Adam divides by gradients that may be near 0


@pytest.mark.parametrize("kind", SCRIPTS)
def test_fault_3_adaptive_softmax_is_in_optimiser_and_checkpoint(tmp_path, kind):
    """The old LSTM's adaptive-softmax weights were in neither: they never learned and were lost."""
    trainer = make_trainer(tmp_path, kind, *ADAPTIVE)
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, trainer.model.parameters()))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train_epoch()
    for name, value in trainer.model.named_parameters():
        assert not torch.equal(value, before[name]), name
    loss = trainer.evaluate("valid")
    trainer.save_best(loss)
    model, vocabulary = lm_training.load_model(checkpoints.load_checkpoint(tmp_path / "best.pt"))
    assert lm_training.evaluate(model, trainer.corpus.valid, 3, 11, "cpu") == loss
    assert vocabulary.words == trainer.corpus.vocabulary.words


def test_best_model_and_learning_rate_follow_the_validation_loss(tmp_path, monkeypatch):
    """Six epochs without a better loss halve the rate (five do not); best.pt is that of the best epoch."""
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "12", "--bptt", "200", "--lr", "0.004")
    losses = iter([5.0, 4.0, *[4.5] * 7, 3.0, 9.0, 3.5])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: next(losses))
    trainer.train(tmp_path)
    valid = [event for event in runs.read_log(tmp_path / "log.jsonl") if event["event"] == "valid"]
    assert [event["lr"] for event in valid] == [0.004] * 8 + [0.002] * 4
    assert checkpoints.load_checkpoint(tmp_path / "best.pt")["scores"]["epoch"] == 10
    assert (trainer.at.best_epoch, trainer.at.best_valid) == (10, 3.0)


def test_timed_saves_within_an_epoch(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "1")
    due = iter([False] * 3 + [True] + [False] * 3)
    monkeypatch.setattr(trainer.alarm, "due", lambda: next(due))
    saved = []
    monkeypatch.setattr(trainer, "save_last", lambda: saved.append(trainer.at.step))
    trainer.train(tmp_path)
    assert saved == [4, 7]  # step 4 by the clock; 7 steps make the epoch, which ends in a save


def spoil(trainer, at_step):
    """Makes the model give NaN from a step on."""
    forward = trainer.replicas.forward

    def spoilt(tokens, targets, state):
        nats, state = forward(tokens, targets, state)
        return (nats * math.nan if trainer.at.step >= at_step else nats), state

    trainer.replicas.forward = spoilt


@pytest.mark.parametrize("moment", ["log interval", "timed save", "interrupt", "end of epoch"])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(tmp_path, monkeypatch, moment):
    trainer = make_trainer(
        tmp_path, "rnn", "--epochs", "3", "--log-interval", "4" if moment == "log interval" else "999"
    )
    steps = math.ceil(72 / 11)
    spoil(trainer, steps + 1)
    kept = {}

    def due():
        if trainer.at.step == steps + 1:  # all is well until here
            kept.update({name: (tmp_path / name).read_bytes() for name in ("best.pt", "last.pt")})
        if moment == "interrupt" and trainer.at.step == steps + 3:
            trainer.interrupts.requested = "SIGINT"
        return moment == "timed save" and trainer.at.step == steps + 3

    monkeypatch.setattr(trainer.alarm, "due", due)
    with pytest.raises(UserError, match="loss is nan nats.*diverged.*last.pt is from before.*lower --lr"):
        trainer.train(tmp_path)
    assert kept and kept == {name: (tmp_path / name).read_bytes() for name in kept}


def test_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    """A finite loss with an infinite gradient spoils the weights in the same step."""
    trainer = make_trainer(tmp_path, "rnn")
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    trainer.state = trainer.model.initial_state(7)
    trainer.step(*next(trainer.columns.windows(11)))
    with pytest.raises(UserError, match="norm of the gradient is (inf|nan)"):
        trainer.save_last()
    assert not (tmp_path / "last.pt").exists()


def test_validation_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "rnn")
    monkeypatch.setattr(trainer, "evaluate", lambda *_: math.nan)
    with pytest.raises(UserError, match="the validation loss is nan nats"):
        trainer.train(tmp_path)
    assert not (tmp_path / "best.pt").exists()


def test_failed_writes_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    """A full disk at the best epoch: its score is not taken for saved, a later and worse one is written."""
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "2", "--bptt", "200")
    losses = iter([2.0, 3.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: next(losses))
    save, calls = checkpoints.save_checkpoint, []

    def full_disk_at_first(path, contents):
        calls.append(path.name)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        save(path, contents)

    monkeypatch.setattr(checkpoints, "save_checkpoint", full_disk_at_first)
    trainer.train(tmp_path)
    assert calls == ["best.pt", "last.pt"] * 2
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert checkpoints.load_checkpoint(tmp_path / "best.pt")["scores"]["valid_loss"] == trainer.at.best_valid == 3.0


# ---- checkpoints


def checkpoint_of(tmp_path, kind="rnn"):
    trainer = make_trainer(tmp_path, kind)
    trainer.save_best(1.0)
    return checkpoints.load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_fault_7_a_checkpoint_rebuilds_the_model_from_plain_data(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind)
    trainer.save_best(1.0)
    contents = torch.load(tmp_path / "best.pt", weights_only=True)
    model, _ = lm_training.load_model(contents)
    assert type(model) is type(trainer.model) and model.config == trainer.model.config and not model.training
    for (name, a), b in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(kind="cnn"), "kind 'cnn'"),
        (lambda c: c.update(kind=["rnn"]), "kind"),
        (lambda c: c.pop("model"), "no 'model'"),
        (lambda c: c.update(config=3), "does not fit"),
        (lambda c: c.update(model=[1]), "does not fit"),
        (lambda c: c["words"].pop(), "29 words, the vocabulary has 28"),
        (lambda c: c["words"].__setitem__(3, "w4"), "different"),
        (lambda c: c["words"].__setitem__(3, 4), "strings"),
        (lambda c: c["config"].update(hidden_size=10**6), "expected"),
        (lambda c: c["config"].update(hidden_size="x"), "does not fit"),
        (lambda c: c["config"].update(strange=1), "strange"),
        (lambda c: c["model"].pop("embedding.weight"), "embedding.weight"),
        (lambda c: c["model"]["embedding.weight"].fill_(math.nan), "no finite"),
        (lambda c: c["model"].update({"embedding.weight": torch.zeros(2)}), "embedding.weight: expected"),
    ],
)
def test_checkpoints_whose_parts_do_not_fit_are_refused(tmp_path, change, message):
    contents = checkpoint_of(tmp_path)
    change(contents)
    with pytest.raises(UserError, match=message) as caught:
        lm_training.load_model(contents)
    assert "\n" not in str(caught.value)


def test_find_checkpoint(tmp_path):
    assert lm_training.find_checkpoint(tmp_path / "x.pt") == tmp_path / "x.pt"
    with pytest.raises(UserError, match="no best.pt"):
        lm_training.find_checkpoint(tmp_path)
    (tmp_path / "best.pt").write_bytes(b"")
    assert lm_training.find_checkpoint(tmp_path) == tmp_path / "best.pt"


def test_fingerprint_changes_with_words_and_text(tmp_path):
    whole = lm_training.fingerprint(make_corpus(tmp_path))
    assert whole == lm_training.fingerprint(make_corpus(tmp_path / "elsewhere"))
    for name in ("train", "valid", "test"):
        other = make_corpus(tmp_path)
        getattr(other, name)[5] += 1
        assert lm_training.fingerprint(other) != whole
    other = make_corpus(tmp_path)
    other.vocabulary.words[3] = "changed"
    assert lm_training.fingerprint(other) != whole


# ---- flags


def softmax_of(*argv):
    parser = argparse.ArgumentParser()
    lm_flags.add_flags(parser, {})
    return lm_flags.choose_softmax(parser.parse_args(list(argv)), 1000)


def test_cutoffs(capsys):
    assert softmax_of() is None
    assert softmax_of("--adaptivesoftmax", "--cutoffs", "10", "999") == [10, 999]
    chosen = softmax_of("--adaptivesoftmax")
    assert chosen == sorted(set(chosen)) and 0 < chosen[-1] < 1000
    assert " ".join(map(str, chosen)) in capsys.readouterr().out
    for bad in (["20", "10"], ["10", "10"], ["10", "1000"], ["10000", "50000", "100000"]):
        with pytest.raises(UserError, match=r"increasing and below the vocabulary size 1,000.*Try --cutoffs"):
            softmax_of("--adaptivesoftmax", "--cutoffs", *bad)
    with pytest.raises(UserError, match="without --adaptivesoftmax"):
        softmax_of("--cutoffs", "10")


def test_best_possible_perplexity_is_told_where_it_is_known(tmp_path):
    assert lm_training.best_possible(tmp_path, "test") == ""
    for text in ("", "[]", '{"test": 3}', '{"test": {"perplexity": "x"}}'):
        (tmp_path / "entropy.json").write_text(text)
        assert lm_training.best_possible(tmp_path, "test") == ""
    (tmp_path / "entropy.json").write_text('{"test": {"perplexity": 1.654}}')
    assert lm_training.best_possible(tmp_path, "test") == " (best possible: 1.65)"


def test_cosine_schedule_warms_up_and_ends_near_zero_and_survives_a_resume(tmp_path):
    flags = ("--schedule", "cosine", "--warmup", "3", "--epochs", "2", "--lr", "0.004", "--log-interval", "1")
    trainer = make_trainer(tmp_path, "rnn", *flags)
    trainer.train(tmp_path)
    rates = [event["lr"] for event in runs.read_log(tmp_path / "log.jsonl") if event["event"] == "train"]
    steps = len(rates)
    expected = [
        0.004 * step / 3 if step <= 3 else 0.002 * (1 + math.cos(math.pi * (step - 3) / (steps - 3)))
        for step in range(1, steps + 1)
    ]
    assert rates == pytest.approx(expected, abs=1e-12)
    again = make_trainer(tmp_path, "rnn", *flags)
    again.restore(checkpoints.load_checkpoint(tmp_path / "last.pt"))
    assert again.lr == trainer.lr


@pytest.mark.parametrize("kind", SCRIPTS)
def test_bf16_trains_in_lower_precision_and_evaluates_in_full(tmp_path, kind):
    exact, lower = (make_trainer(tmp_path, kind, *flags) for flags in ((), ("--bf16",)))
    lower.model.load_state_dict(exact.model.state_dict())
    assert lower.evaluate("valid") == exact.evaluate("valid")
    for trainer in (exact, lower):
        trainer.train_epoch()
    assert lower.state.dtype == torch.float32
    assert lower.at.epoch_nats != exact.at.epoch_nats
    assert lower.at.epoch_nats == pytest.approx(exact.at.epoch_nats, rel=0.02)


def test_learning_rate_stays_one_tensor_where_it_is_one(tmp_path):
    """As a captured step needs it on a GPU: through the schedule, the setter and a resume."""

    def with_tensor(*flags):
        trainer = make_trainer(tmp_path, "rnn", "--lr", "0.004", "--embedding-lr", "0.001", *flags)
        trainer.lr_tensors = [torch.tensor(0.004) for _ in trainer.optimizer.param_groups]
        trainer.lr = 0.004
        return trainer

    trainer = with_tensor()
    group = trainer.optimizer.param_groups[0]
    trainer.train_epoch()
    for loss in [5.0] + [6.0] * (lm_flags.PATIENCE + 1):
        assert trainer.lr == 0.004
        trainer.step_schedule(loss)
    assert trainer.lr == 0.002 and group["lr"] is trainer.lr_tensors[0]
    assert trainer.lr_tensors[-1].item() == pytest.approx(0.0005)
    trainer.folder = tmp_path
    assert trainer.save_last()
    again = with_tensor()
    again.restore(checkpoints.load_checkpoint(tmp_path / "last.pt"))
    assert again.lr == 0.002 and again.optimizer.param_groups[0]["lr"] is again.lr_tensors[0]
    assert again.optimizer.param_groups[0]["capturable"]
    assert again.optimizer.param_groups[-1]["lr"] is again.lr_tensors[-1]
    assert again.lr_tensors[-1].item() == pytest.approx(0.0005)


# Each leaves a trainer before its first step, and says which share of both learning rates that step has.
SCHEDULES = {
    "plateau": ([], 0, 1.0),
    "plateau, halved twice": ([], 0, 0.25),
    "warm-up": (["--warmup", "9"], 3, 4 / 9),
    "plateau, halved twice, after warm-up": (["--warmup", "3"], 3, 0.25),
    "cosine": (["--schedule", "cosine", "--epochs", "2"], 4, 0.5 * (1 + math.cos(math.pi * 5 / 14))),
    "random windows": (["--random-bptt", "2"], 0, 8 / 11),
}


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_embedding_has_its_learning_rate_and_all_else_the_other_one(tmp_path, name, decay):
    """Against Adam's first step by hand: lr * g / (|g| + 1e-8), after decay of the matrices by lr * decay."""
    flags, steps, share = SCHEDULES[name]
    kind, more = ("rmc", []) if name in ("plateau", "cosine") else ("rnn", ["--tied", "--project"])
    if name == "random windows":
        more = []  # untied: the softmax's own matrix has --lr
    both = ["--lr", "0.01", "--embedding-lr", "0.002", "--clip", "0", "--weight-decay", str(decay)]
    trainer = make_trainer(tmp_path, kind, *both, *flags, *more)
    for loss in [5.0] + [6.0] * (2 * lm_flags.PATIENCE + 2) if "halved" in name else []:
        trainer.step_schedule(loss)
    trainer.at.step = steps
    model, state = trainer.model, trainer.model.initial_state(7)
    tokens, targets = trainer.columns.window(0, 8 if name == "random windows" else 11)
    before = {key: parameter.detach().double().clone() for key, parameter in model.named_parameters()}
    model.loss(tokens, targets, state)[0].backward()
    slopes = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    trainer.step(tokens, targets)
    for key, found in model.named_parameters():
        lr = share * (0.002 if key == "embedding.weight" else 0.01)
        shrunk = before[key] * (1 - lr * decay * (found.dim() >= 2))
        expected = shrunk - lr * slopes[key] / (slopes[key].abs() + 1e-8)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-7, msg=f"{name}: {key}")
    assert trainer.lr == pytest.approx(0.01 if name == "random windows" else 0.01 * share)


@pytest.mark.parametrize("decay", ["0", "0.1"])
def test_with_the_embeddings_learning_rate_equal_to_the_other_nothing_changes(tmp_path, decay):
    flags = ["--lr", "0.01", "--epochs", "2", "--weight-decay", decay]
    plain = make_trainer(tmp_path, "rnn", *flags)
    equal = make_trainer(tmp_path, "rnn", *flags, "--embedding-lr", "0.01")
    other = make_trainer(tmp_path, "rnn", *flags, "--embedding-lr", "0.02")
    for trainer in (plain, equal, other):
        trainer.train_epoch()
    weights = [trainer.model.state_dict() for trainer in (plain, equal, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert not torch.equal(weights[0]["embedding.weight"], weights[2]["embedding.weight"])


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_epoch_starts_from_the_initial_state(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind, "--lr", "1e-30", "--dropout", "0", "--epochs", "2")
    trainer.train(tmp_path)
    first, second = (e["train_loss"] for e in runs.read_log(tmp_path / "log.jsonl") if e["event"] == "valid")
    assert first == second


def test_another_number_of_pieces_is_told_where_masks_are_drawn_for_each(tmp_path, capsys):
    for dropped, told in (["--dropout-words", "0.1"], 1), ([], 0):
        trainer = make_trainer(tmp_path, "rnn", *dropped)
        trainer.save_last()
        last = checkpoints.load_checkpoint(tmp_path / "last.pt")
        make_trainer(tmp_path, "rnn", *dropped).restore(last)
        assert "--accumulate" not in capsys.readouterr().err
        make_trainer(tmp_path, "rnn", *dropped, "--accumulate", "7").restore(last)
        assert capsys.readouterr().err.count("--accumulate was 1, now it is 7: dropout goes on") == told


def test_forward_time_is_given_only_if_every_step_was_timed():
    timer = lm_training.ForwardTimer(torch.device("cpu"))
    timer.span(timer.now())
    assert timer.mean_ms(2) is None and timer.mean_ms(0) is None
    timer.span(timer.now())
    assert timer.mean_ms(1) >= 0


def test_forward_time_is_that_of_all_pieces_of_a_step():
    timer = lm_training.ForwardTimer(torch.device("cpu"))
    timer.spans = [(0.0, 0.001), (1.0, 1.003), (2.0, 2.001), (3.0, 3.005)]
    spans = list(timer.spans)
    assert timer.mean_ms(2, pieces=2) == pytest.approx(5) and timer.spans == []
    timer.spans = spans[:3]  # a piece without a span: its graph was replayed
    assert timer.mean_ms(2, pieces=2) is None


def test_the_first_step_of_a_session_tells_its_pace_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "LONG_SILENCE", 0.0)
    told = []
    monkeypatch.setattr(console.FirstStep, "tell", lambda step, *given: told.append((step, *given)))
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "2", "--log-interval", "4")
    trainer.train(tmp_path)
    # 7 steps in an epoch, with lines after steps 4 and 8 and at the end of each epoch.
    assert [given[1:] for given in told[:9]] == [
        (left, 7, "an epoch") for left in (3, 2, 1, 0, 2, 1, 0, 0, 3)
    ]
    assert len(told) == 14 and len({id(given[0]) for given in told}) == 1
    monkeypatch.undo()
    monkeypatch.setattr(console, "LONG_SILENCE", 0.0)
    make_trainer(tmp_path, "rnn", "--epochs", "2").train(tmp_path)
    assert capsys.readouterr().out.count("at this pace the next line") == 1


@pytest.mark.parametrize("targets, batch_size, bptt, fitting", [
    (2379, 14, 15, "--batch_size to 8 or less,"),
    (151, 7, 9, "--batch_size and --bptt,"),
    (7, 7, 1, "1 step,"),
])
def test_an_epoch_of_few_steps_is_warned_of_with_what_would_fit(targets, batch_size, bptt, fitting, capsys):
    def steps(columns):
        return math.ceil(math.ceil(targets / columns) / bptt)

    args = argparse.Namespace(batch_size=batch_size, bptt=bptt)
    lm_training.warn_of_short_epochs(args, steps(batch_size), targets)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{targets + 1:,} tokens" in said and fitting in said
    assert f"no more than {steps(batch_size)} step" in said
    if "to 8" in fitting:
        assert steps(8) >= lm_training.FEW_STEPS > steps(9)
    lm_training.warn_of_short_epochs(args, lm_training.FEW_STEPS, targets)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", [train_rmc, train_rnn])
def test_the_bundled_corpus_has_steps_enough_with_its_recipe(script):
    recipe = script.RECIPES["tiny"]
    assert 150_056 / recipe["batch_size"] / recipe["bptt"] > lm_training.FEW_STEPS


@pytest.mark.parametrize(("own", "averaged"), [(2.0, 1.5), (1.5, 2.0)])
def test_the_better_of_weights_and_average_is_called_the_best(tmp_path, capsys, own, averaged):
    trainer = make_trainer(tmp_path, "rnn", "--average", "ema")
    trainer.average.steps, trainer.at.epoch_tokens = 1, 1
    trainer.evaluate = lambda split, interrupts=None, model=None: own if model is None else averaged
    trainer.validate()
    said = capsys.readouterr().out
    best, other = f"{math.exp(min(own, averaged)):.2f} (best)", f"{math.exp(max(own, averaged)):.2f} (best)"
    assert best in said and other not in said and said.count("(best)") == 1

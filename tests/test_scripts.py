"""train_rmc.py and train_rnn.py from the command line: flags, runs, interrupts, exact resume, bad input."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_corpus

import train_rmc
import train_rnn
from training import checkpoints, console, lm_flags, lm_training, runs
from training.console import UserError

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    train_rmc: ["--emsize", "12", "--headsize", "5", "--numheads", "2", "--keysize", "3", "--memslots", "2"],
    train_rnn: ["--emsize", "12", "--nhid", "14", "--nlayers", "2"],
}
SCRIPTS = pytest.mark.parametrize("script", SIZES, ids=lambda script: script.SCRIPT)
# 2379 targets in 14 columns of 170 or fewer: 12 windows of 15 in an epoch, the last of 5.
LOOP = ["--batch_size", "14", "--bptt", "15", "--lr", "0.01", "--log-interval", "5", "--eval-batch-size", "3"]
STEPS = 12


def run(script, corpus, runs_folder, *argv):
    """Trains; returns the exit status and the newest run folder."""
    status = script.main(
        [*SIZES[script], *LOOP, "--data", str(corpus), "--runs-folder", str(runs_folder), *argv]
    )
    return status, max(runs_folder.iterdir(), key=lambda folder: folder.stat().st_ctime)


def numbers(folder):
    """The log without times, and without the traces of interrupting."""
    kept = (
        "event",
        "epoch",
        "step",
        "lr",
        "loss",
        "ppl",
        "grad_norm",
        "train_loss",
        "best_epoch",
        "valid_loss",
    )
    events = [
        event for event in runs.read_log(folder / "log.jsonl") if event["event"] in ("train", "valid", "test")
    ]
    return [{key: event[key] for key in kept if key in event} for event in events]


def flatten(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{name}[{i}]")
    else:
        yield name, value


def assert_same_checkpoint(one, other, ignoring=("seconds", ".args.")):
    a, b = (dict(flatten(checkpoints.load_checkpoint(path))) for path in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        if not any(word in name for word in ignoring):
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, name


def interrupt_at(monkeypatch, step, number=signal.SIGINT, during="step"):
    """Sends this process a signal when a trainer has done `step` steps, or before it validates then."""
    original = getattr(lm_training.Trainer, during)

    def interrupted(self, *arguments):
        result = original(self, *arguments) if during == "step" else None
        if self.at.step == step:
            monkeypatch.setattr(lm_training.Trainer, during, original)  # once
            os.kill(os.getpid(), number)
        return result if during == "step" else original(self, *arguments)

    monkeypatch.setattr(lm_training.Trainer, during, interrupted)


def flags_as_name(value):
    """A name for a parametrised case: its command line."""
    return " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else ""


# ---- whole runs


@SCRIPTS
def test_a_run_trains_logs_saves_and_tests(script, corpus_folder, tmp_path, capsys):
    (corpus_folder / "entropy.json").write_text('{"test": {"perplexity": 2.345}}')
    status, folder = run(
        script,
        corpus_folder,
        tmp_path / "runs",
        "--epochs",
        "3",
        "--name",
        "first",
        "--dropout",
        "0",
        "--lr",
        "0.03",
    )
    assert status == 0 and folder.name == "first"
    assert sorted(os.listdir(folder)) == ["args.json", "best.pt", "last.pt", "log.jsonl"]
    output, warned = capsys.readouterr()
    assert warned.count("warning: ") == 1 and "an epoch has no more than 12 steps" in warned
    for text in (
        "device: CPU",
        "2,380 / 602 / 574",
        "parameters",
        str(folder),
        "tokens/s",
        "best possible: 2.35",
    ):
        assert text in output

    events = runs.read_log(folder / "log.jsonl")
    train = [event for event in events if event["event"] == "train"]
    valid = [event for event in events if event["event"] == "valid"]
    assert [event["step"] for event in train] == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    assert [event["step"] for event in valid] == [12, 24, 36]
    # Fault 3 of the old port: tied embeddings at N(0, 1) made the first loss over three times ln V.
    assert train[0]["loss"] < 1.1 * math.log(23)
    assert valid[-1]["ppl"] < 12 < 23 / 2 + 1
    for event in train:
        assert event["ppl"] == pytest.approx(math.exp(event["loss"]))
        assert event["ms_per_batch"] > event["forward_ms_per_batch"] > 0 and event["tokens_per_second"] > 0
    assert [event["event"] for event in events[-2:]] == ["valid", "test"]
    best = checkpoints.load_checkpoint(folder / "best.pt")
    assert best["scores"]["valid_loss"] == min(event["loss"] for event in valid) == events[-1]["valid_loss"]


@SCRIPTS
def test_evaluate_scores_a_run_again_and_needs_no_other_flag(script, corpus_folder, tmp_path, capsys):
    _, folder = run(script, corpus_folder, tmp_path / "runs", "--epochs", "1", "--adaptivesoftmax")
    test = runs.read_log(folder / "log.jsonl")[-1]
    capsys.readouterr()
    assert script.main(["--evaluate", str(folder), "--eval-batch-size", "3", "--bptt", "500"]) == 0
    output = capsys.readouterr().out
    assert f"valid: loss {test['valid_loss']:.4f}" in output and f"test: loss {test['loss']:.4f}" in output
    assert script.main(["--evaluate", str(folder / "last.pt"), "--eval-batch-size", "1"]) == 0
    assert "1 columns" in capsys.readouterr().out
    write_corpus(tmp_path / "other", seed=6)
    (tmp_path / "other" / "train.txt").write_text("quite another text\n")
    with pytest.raises(UserError, match="another vocabulary"):
        script.main(["--evaluate", str(folder), "--data", str(tmp_path / "other")])
    with pytest.raises(UserError, match="exclude each other"):
        script.main(["--evaluate", str(folder), "--resume", str(folder)])


def test_same_seed_same_run_and_another_seed_another(corpus_folder, tmp_path):
    folders = [
        run(train_rnn, corpus_folder, tmp_path / f"runs{i}", "--epochs", "1", "--seed", seed)[1]
        for i, seed in enumerate(["3", "3", "4"])
    ]
    assert_same_checkpoint(folders[0] / "last.pt", folders[1] / "last.pt")
    assert numbers(folders[0]) == numbers(folders[1]) != numbers(folders[2])


# ---- interrupts and resume


@SCRIPTS
@pytest.mark.parametrize("softmax", [[], ["--adaptivesoftmax"]], ids=["full", "adaptive"])
def test_fault_7_resuming_from_the_middle_is_as_if_never_stopped(
    script, softmax, corpus_folder, tmp_path, monkeypatch
):
    """Bit for bit, with dropout: weights, optimiser, schedule, best score, random states, logged numbers."""
    flags = ["--epochs", "3", *softmax]
    _, whole = run(script, corpus_folder, tmp_path / "whole", *flags)
    interrupt_at(monkeypatch, STEPS + 7)  # in the second epoch, between two log entries
    status, folder = run(script, corpus_folder, tmp_path / "parts", *flags)
    assert status == 130
    assert checkpoints.load_checkpoint(folder / "last.pt")["position"]["step"] == STEPS + 7
    interrupt_at(monkeypatch, 2 * STEPS + 5)
    assert script.main(["--resume", str(folder)]) == 130
    assert script.main(["--resume", str(folder)]) == 0
    assert_same_checkpoint(whole / "last.pt", folder / "last.pt")
    assert_same_checkpoint(whole / "best.pt", folder / "best.pt")
    assert numbers(whole) == numbers(folder)


def test_resuming_an_epoch_that_ended_but_was_not_validated(corpus_folder, tmp_path, monkeypatch):
    _, whole = run(train_rnn, corpus_folder, tmp_path / "whole", "--epochs", "2")
    interrupt_at(monkeypatch, STEPS, during="validate")
    status, folder = run(train_rnn, corpus_folder, tmp_path / "parts", "--epochs", "2")
    assert status == 130 and not (folder / "best.pt").exists()
    assert train_rnn.main(["--resume", str(folder)]) == 0
    assert_same_checkpoint(whole / "last.pt", folder / "last.pt")
    assert numbers(whole) == numbers(folder)


def test_resuming_for_more_epochs(corpus_folder, tmp_path):
    _, whole = run(train_rnn, corpus_folder, tmp_path / "whole", "--epochs", "3")
    _, folder = run(train_rnn, corpus_folder, tmp_path / "parts", "--epochs", "1")
    assert train_rnn.main(["--resume", str(folder), "--epochs", "3", "--log-interval", "5"]) == 0
    assert_same_checkpoint(whole / "last.pt", folder / "last.pt")
    assert [event for event in numbers(folder) if event["step"] > STEPS] == [
        event for event in numbers(whole) if event["step"] > STEPS
    ]


def test_resuming_a_run_killed_before_its_first_save_starts_it_again(corpus_folder, tmp_path):
    _, whole = run(train_rnn, corpus_folder, tmp_path / "runs", "--epochs", "1", "--name", "whole")
    killed = tmp_path / "runs" / "killed"
    killed.mkdir()
    (killed / "args.json").write_bytes((whole / "args.json").read_bytes())
    (killed / "log.jsonl").write_text('{"event": "train", "step": 5, "loss": 9.9}\n{"event": "tr')
    assert train_rnn.main(["--resume", str(killed)]) == 0
    assert_same_checkpoint(whole / "last.pt", killed / "last.pt")
    assert numbers(whole) == numbers(killed)


def test_ctrl_c_saves_tests_the_best_model_and_says_how_to_go_on(
    corpus_folder, tmp_path, monkeypatch, capsys
):
    interrupt_at(monkeypatch, STEPS + 3)
    status, folder = run(train_rmc, corpus_folder, tmp_path / "runs", "--epochs", "3")
    output = capsys.readouterr().out
    assert status == 130
    assert "best model (epoch 1)" in output and f"python train_rmc.py --resume {folder}" in output
    event = runs.read_log(folder / "log.jsonl")[-1]
    assert event["event"] == "interrupt" and event["best_epoch"] == 1 and event["loss"] > 0
    interrupt_at(monkeypatch, 3)
    assert run(train_rmc, corpus_folder, tmp_path / "runs", "--epochs", "3")[0] == 130
    assert "no epoch was finished" in capsys.readouterr().out


def test_sigterm_saves_and_leaves_at_once(corpus_folder, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, STEPS + 3, signal.SIGTERM)
    status, folder = run(train_rnn, corpus_folder, tmp_path / "runs", "--epochs", "3")
    assert status == 143 and "best model" not in capsys.readouterr().out
    assert checkpoints.load_checkpoint(folder / "last.pt")["position"]["step"] == STEPS + 3


def test_resume_refuses_another_corpus_and_a_spoilt_checkpoint(corpus_folder, tmp_path):
    _, folder = run(train_rnn, corpus_folder, tmp_path / "runs", "--epochs", "1")
    other = write_corpus(tmp_path / "other", seed=6)
    resume = ["--resume", str(folder), "--epochs", "2"]
    with pytest.raises(UserError, match="not the one this run was started on"):
        train_rnn.main([*resume, "--data", str(other)])
    with pytest.raises(UserError, match="a run of train_rnn.py, this is train_rmc.py"):
        train_rmc.main(resume)
    good = checkpoints.load_checkpoint(folder / "last.pt")
    for change in (
        {"position": {"epoch": 1, "strange": 2}},
        {"optimizer": None},
        {"state": torch.zeros(5)},
        {"sums": torch.zeros(3)},
        {"random": {}},
        {"model": {}},
        {"scheduler": 7},
    ):
        checkpoints.save_checkpoint(folder / "last.pt", {**good, **change})
        with pytest.raises(UserError, match="last.pt does not fit its run") as caught:
            train_rnn.main(resume)
        assert "\n" not in str(caught.value)
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        train_rnn.main(resume)


# ---- flags


def built(script, *argv):
    args = script.build_parser().parse_args([*SIZES[script], *argv])
    return script.build_model(args, 50, lm_flags.choose_softmax(args, 50))


REACHED = [
    (train_rmc, ["--emsize", "9"], lambda m: m.embedding.embedding_dim, 9),
    (train_rmc, ["--memslots", "5"], lambda m: m.core.mem_slots, 5),
    (train_rmc, ["--headsize", "6"], lambda m: m.core.head_size, 6),
    (train_rmc, ["--numheads", "3"], lambda m: m.core.num_heads, 3),
    (train_rmc, ["--numblocks", "2"], lambda m: m.core.num_blocks, 2),
    (train_rmc, ["--forgetbias", "-0.5"], lambda m: m.core.forget_bias, -0.5),
    (train_rmc, ["--inputbias", "0.25"], lambda m: m.core.input_bias, 0.25),
    (train_rmc, ["--gatestyle", "memory"], lambda m: m.core.gate_style, "memory"),
    (train_rmc, ["--gatestyle", "none"], lambda m: m.core.gate_style, None),
    (train_rmc, ["--attmlplayers", "4"], lambda m: m.core.attention_mlp_layers, 4),
    (train_rmc, ["--keysize", "8"], lambda m: m.core.key_size, 8),
    (train_rmc, ["--dropout", "0.3"], lambda m: (m.dropout_input, m.dropout_output), (0.3, 0.3)),
    (train_rmc, ["--dropout-input", "0.1"], lambda m: (m.dropout_input, m.dropout_output), (0.1, 0.5)),
    (train_rmc, ["--dropout-output", "0"], lambda m: (m.dropout_input, m.dropout_output), (0.5, 0)),
    (train_rnn, ["--model", "GRU"], lambda m: type(m.rnn), torch.nn.GRU),
    (train_rnn, ["--model", "RNN_RELU"], lambda m: m.rnn.nonlinearity, "relu"),
    (train_rnn, ["--model", "RNN_TANH"], lambda m: m.rnn.nonlinearity, "tanh"),
    (train_rnn, ["--emsize", "9"], lambda m: m.embedding.embedding_dim, 9),
    (train_rnn, ["--nhid", "15"], lambda m: m.rnn.hidden_size, 15),
    (train_rnn, ["--nlayers", "3"], lambda m: m.rnn.num_layers, 3),
    (
        train_rnn,
        ["--dropout", "0.3"],
        lambda m: (m.dropout_input, m.rnn.dropout, m.dropout_output),
        (0.3,) * 3,
    ),
    (
        train_rnn,
        ["--dropout-input", "0"],
        lambda m: (m.dropout_input, m.rnn.dropout, m.dropout_output),
        (0, 0.5, 0.5),
    ),
    (
        train_rnn,
        ["--dropout-hidden", "0"],
        lambda m: (m.dropout_input, m.rnn.dropout, m.dropout_output),
        (0.5, 0, 0.5),
    ),
    (
        train_rnn,
        ["--dropout-output", "0"],
        lambda m: (m.dropout_input, m.rnn.dropout, m.dropout_output),
        (0.5, 0.5, 0),
    ),
    (train_rnn, ["--nhid", "12", "--tied"], lambda m: m.output_layer.weight is m.embedding.weight, True),
    (train_rnn, ["--nhid", "12"], lambda m: m.output_layer.weight is m.embedding.weight, False),
    (train_rnn, ["--cudnn"], lambda m: m.fused, True),
    (train_rnn, [], lambda m: m.fused, False),
    (train_rmc, ["--adaptivesoftmax", "--cutoffs", "7", "20"], lambda m: m.config["cutoffs"], [7, 20]),
    (train_rnn, ["--adaptivesoftmax", "--cutoffs", "7", "20"], lambda m: m.config["cutoffs"], [7, 20]),
]


@pytest.mark.parametrize(
    "script, argv, look, expected",
    REACHED,
    ids=flags_as_name,
)
def test_fault_3_flags_reach_the_model(script, argv, look, expected):
    """In the old port --gatestyle and the dropout flags never did."""
    assert look(built(script, *argv)) == expected


@pytest.mark.parametrize(
    "argv, look, expected",
    [
        (["--lr", "0.25"], lambda t: t.optimizer.param_groups[0]["lr"], 0.25),
        (["--batch_size", "5"], lambda t: t.columns.batch_size, 5),
        (["--batch-size", "6"], lambda t: t.columns.batch_size, 6),
        (["--save-every", "3"], lambda t: t.alarm.seconds, 180),
        (["--clip", "0.001"], lambda t: last_gradient_norm(t) <= 0.00101, True),
        (["--clip", "0"], lambda t: last_gradient_norm(t) > 0.01, True),
        (["--bptt", "17"], lambda t: (t.train_epoch(), t.at.step)[1], 10),
        (
            ["--log-interval", "2", "--bptt", "60"],
            lambda t: (t.train_epoch(), [e["step"] for e in runs.read_log(t.log.path)])[1],
            [2, 3],
        ),
        (["--epochs", "2", "--bptt", "200"], lambda t: (t.train(t.folder), t.at.step)[1], 2),
        (
            ["--eval-batch-size", "4"],
            lambda t: (
                abs(t.evaluate("valid") - evaluated(t, 4)) < 1e-6 < abs(t.evaluate("valid") - evaluated(t, 5))
            ),
            True,
        ),
    ],
    ids=flags_as_name,
)
def test_flags_reach_the_training_loop(corpus_folder, tmp_path, argv, look, expected):
    args = train_rnn.build_parser().parse_args([*SIZES[train_rnn], "--batch_size", "14", *argv])
    corpus = lm_training.load_corpus(str(corpus_folder))
    model = train_rnn.build_model(args, len(corpus.vocabulary), None)
    trainer = lm_training.Trainer(model, corpus, args, "rnn", torch.device("cpu"))
    trainer.folder, trainer.log = tmp_path, runs.RunLog(tmp_path / "log.jsonl")
    assert look(trainer) == expected


def last_gradient_norm(trainer):
    trainer.state = trainer.model.initial_state(14)
    trainer.step(*next(trainer.columns.windows(20)))
    return torch.stack([p.grad.square().sum() for p in trainer.model.parameters()]).sum().sqrt().item()


def evaluated(trainer, batch_size):
    return lm_training.evaluate(trainer.model, trainer.corpus.valid, batch_size, 9, "cpu")


def test_vocabulary_flag_reaches_the_corpus(corpus_folder, tmp_path):
    (corpus_folder / "test.txt").write_text("the yak saw the ant\n" * 30)
    words = {}
    for choice in ("all", "train"):
        _, folder = run(train_rnn, corpus_folder, tmp_path / choice, "--epochs", "1", "--vocab-from", choice)
        words[choice] = checkpoints.load_checkpoint(folder / "best.pt")["words"]
        assert train_rnn.main(["--evaluate", str(folder)]) == 0  # remembers the choice
    assert "yak" in words["all"] and "yak" not in words["train"]


PUBLISHED = {
    "data": "./data/wikitext-2",
    "lr": 0.001,
    "clip": 0.1,
    "epochs": 100,
    "batch_size": 64,
    "bptt": 100,
    "seed": 1111,
    "cuda": False,
    "log_interval": 100,
    "adaptivesoftmax": False,
    "dropout": 0.5,
    "eval_batch_size": 32,
}
PUBLISHED_OF = {
    train_rmc: {
        "emsize": 192,
        "memslots": 1,
        "headsize": 192,
        "numheads": 4,
        "numblocks": 1,
        "forgetbias": 1,
        "inputbias": 0,
        "gatestyle": "unit",
        "attmlplayers": 3,
        "keysize": 64,
    },
    train_rnn: {"model": "LSTM", "emsize": 300, "nhid": 300, "nlayers": 1, "tied": False, "cudnn": False},
}


@SCRIPTS
def test_defaults_are_the_published_ones_and_help_names_every_flag(script):
    parser = script.build_parser()
    args = vars(parser.parse_args([]))
    for name, value in {**PUBLISHED, **PUBLISHED_OF[script]}.items():
        assert args[name] == value, name
    text = parser.format_help()
    for action in parser._actions:
        assert action.help and all(option in text for option in action.option_strings)
    assert "(default: None)" not in text


# ---- bad input


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch_size", "2380"], "train.txt and --batch_size"),
        (["--eval-batch-size", "602"], "valid.txt and --eval-batch-size"),
        (["--adaptivesoftmax", "--cutoffs", "20", "10"], "increasing"),
        (["--cutoffs", "10"], "without --adaptivesoftmax"),
        (["--tied", "--adaptivesoftmax"], "exclude each other"),
        (["--tied"], "tied"),
        (["--name", "a b"], "--name"),
        (["--nhid", "2000000"], "needs .* GB"),
        (["--nhid", "2147483647", "--emsize", "2147483647"], "a model of these sizes"),
        (["--data", "no/such/corpus"], "no/such/corpus"),
        (["--resume", "no/such/run"], "not there"),
        (["--evaluate", "no/such/file.pt"], "no checkpoint"),
        (["--cuda"], "--cuda was given but"),
        (["--lr", "1e30", "--epochs", "1"], "training loss is .*e.30 nats.*diverged"),
    ],
)
def test_bad_input_is_answered_and_leaves_no_run_folder(corpus_folder, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        run(train_rnn, corpus_folder, tmp_path / "runs", *argv)
    assert not (tmp_path / "runs").exists() or not os.listdir(tmp_path / "runs")


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--dropout", "1"],
        ["--epochs", "0"],
        ["--bptt", "-3"],
        ["--clip", "inf"],
        ["--cutoffs", "x"],
        ["--model", "CNN"],
        ["--seed", "-1"],
        ["--batch", "3"],
        ["--unknown"],
        ["--data"],
    ],
)
def test_bad_flags_end_as_argparse_ends_them(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        train_rnn.main(argv)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_memory_that_runs_out_is_answered_with_what_to_lower(corpus_folder, tmp_path, monkeypatch, capsys):
    def too_much(self, tokens, targets):
        return torch.empty(2**60)

    monkeypatch.setattr(lm_training.Trainer, "step", too_much)
    with pytest.raises(SystemExit) as caught:
        console.run_script(lambda: run(train_rnn, corpus_folder, tmp_path / "runs")[0], lm_training.LOWER_MEMORY)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "Lower --batch_size or --bptt, use --adaptivesoftmax, " in message
    assert not os.listdir(tmp_path / "runs")


def test_ctrl_c_as_a_shell_sees_it(corpus_folder, tmp_path):
    """As a shell sees it: no traceback, status 130, a saved run."""
    command = [
        sys.executable,
        str(ROOT / "train_rnn.py"),
        *SIZES[train_rnn],
        *LOOP,
        "--data",
        str(corpus_folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--epochs", "100000", "--runs-folder", "runs"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        for line in process.stdout:
            if "(best)" in line:
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors and "stopping after this step" in errors
    assert "test loss" in output and "--resume runs/" in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "args.json").read_text())["command_line"][:2] == SIZES[train_rnn][:2]


def test_killed_while_it_saves_nothing_is_lost(corpus_folder, tmp_path):
    """Saving at every step, killed without warning: what is left resumes to the same end, bit for bit."""
    flags = [*SIZES[train_rnn], *LOOP, "--data", str(corpus_folder), "--epochs", "4"]
    assert train_rnn.main([*flags, "--runs-folder", str(tmp_path / "whole"), "--name", "run"]) == 0
    arguments = ["--runs-folder", str(tmp_path / "killed"), "--name", "run", "--save-every", "0.000001"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_rnn.py"), *flags, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 2"):
                break
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    assert 0 < checkpoints.load_checkpoint(killed / "last.pt")["position"]["step"] < 4 * STEPS
    (killed / ".last.pt.left.tmp").write_bytes(b"half a checkpoint")
    assert train_rnn.main(["--resume", str(killed), "--save-every", "0"]) == 0
    assert sorted(os.listdir(killed)) == ["args.json", "best.pt", "last.pt", "log.jsonl"]
    assert_same_checkpoint(whole / "last.pt", killed / "last.pt")
    assert_same_checkpoint(whole / "best.pt", killed / "best.pt")
    assert numbers(whole) == numbers(killed)


def test_a_best_model_newer_than_the_last_checkpoint_is_the_one_to_beat(corpus_folder, tmp_path):
    """Killed between the two writes; on a GPU the epoch done again may end with a worse loss."""
    _, folder = run(train_rnn, corpus_folder, tmp_path / "runs", "--epochs", "1")
    best = checkpoints.load_checkpoint(folder / "best.pt")
    best["scores"] = {"epoch": 2, "step": 2 * STEPS, "valid_loss": 0.125}
    checkpoints.save_checkpoint(folder / "best.pt", best)
    kept = (folder / "best.pt").read_bytes()
    assert train_rnn.main(["--resume", str(folder), "--epochs", "3"]) == 0
    assert (folder / "best.pt").read_bytes() == kept
    position = checkpoints.load_checkpoint(folder / "last.pt")["position"]
    assert (position["best_valid"], position["best_epoch"]) == (0.125, 2)
    (folder / "best.pt").unlink()  # then the next epoch makes one
    assert train_rnn.main(["--resume", str(folder), "--epochs", "4"]) == 0
    assert checkpoints.load_checkpoint(folder / "best.pt")["scores"]["epoch"] == 4
    del best["scores"]
    checkpoints.save_checkpoint(folder / "best.pt", best)
    with pytest.raises(UserError, match="does not say how good it is"):
        train_rnn.main(["--resume", str(folder), "--epochs", "5"])


@pytest.mark.parametrize("script", [train_rmc, train_rnn])
def test_recipe_sets_its_flags_says_so_and_gives_way_to_flags_on_the_command_line(script, tmp_path, capsys):
    status = script.main(
        ["--recipe", "tiny", "--data", str(write_corpus(tmp_path)), "--emsize", "6"]
        + (["--headsize", "4"] if script is train_rmc else ["--nhid", "6"])
        + ["--epochs", "1", "--batch_size", "2", "--runs-folder", str(tmp_path / "runs"), "--name", "r"]
    )
    assert status == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith(f"recipe tiny: --data {tmp_path} --emsize 6 ")
    assert second.startswith(f"given beside it: --data {tmp_path} in place of --data tiny, --emsize 6 in")
    assert ("--headsize 4" if script is train_rmc else "--nhid 6") + " in place of" in second
    assert "--epochs 1 in place of --epochs 11" in second and second.count("in place") == 5
    args = json.loads((tmp_path / "runs" / "r" / "args.json").read_text(encoding="utf-8"))["arguments"]
    recipe = script.RECIPES["tiny"]
    assert args["recipe"] == "tiny" and args["emsize"] == 6 and args["epochs"] == 1
    for flag in ("lr", "clip", "schedule", "dropout", "bptt"):
        assert args[flag] == recipe[flag] != script.build_parser().get_default(flag), flag


def test_a_recipe_is_not_asked_again_when_its_run_goes_on(tmp_path, capsys, monkeypatch):
    """The run's own flags count: the recipe's, and those that were given beside it."""
    text, sizes = str(write_corpus(tmp_path / "text")), ["--emsize", "6", "--nhid", "6", "--bptt", "8"]
    begun = ["--recipe", "wikitext2-regularised", "--data", text, *sizes, "--warmup", "1", "--epochs", "1"]
    begun += ["--runs-folder", str(tmp_path), "--name", "r"]
    assert train_rnn.main(begun) == 0
    folder = tmp_path / "r"
    capsys.readouterr()
    again = ["--resume", str(folder), "--recipe", "wikitext2-regularised", "--epochs", "2"]
    assert train_rnn.main(again) == 0
    assert "recipe wikitext2-regularised:" not in capsys.readouterr().out
    args = checkpoints.load_checkpoint(folder / "last.pt")["args"]
    assert args["dropout_input"] == 0.4 and args["emsize"] == 6 and args["epochs"] == 2
    # As torchrun does it, with the command line that began the run; here with nothing left to do.
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    again = [word if word != "1" or begun[i - 1] != "--epochs" else "2" for i, word in enumerate(begun)]
    assert train_rnn.main(again) == 0
    assert "nothing to train: all 2 epochs are done" in capsys.readouterr().out
    with pytest.raises(UserError, match="--recipe cannot change"):
        train_rnn.main(["--resume", str(folder), "--recipe", "tiny"])
    with pytest.raises(UserError, match="trains nothing"):
        train_rnn.main(["--evaluate", str(folder), "--recipe", "tiny"])
    (tmp_path / "text").rename(tmp_path / "moved")
    for flag in ("--evaluate", "--resume"):
        with pytest.raises(UserError, match="name its new place with --data"):
            train_rnn.main([flag, str(folder)])
    assert train_rnn.main(["--evaluate", str(folder), "--data", str(tmp_path / "moved")]) == 0


def test_evaluate_uses_the_columns_of_the_run_unless_told_otherwise(corpus_folder, tmp_path, capsys):
    """What a run printed at its end comes out again, and not where other columns are given."""
    _, folder = run(train_rnn, corpus_folder, tmp_path / "runs", "--epochs", "1")
    printed = capsys.readouterr().out.split("| test ")[-1].strip()
    train_rnn.main(["--evaluate", str(folder)])
    told = capsys.readouterr().out
    assert "3 columns" in told and f"test: {printed}" in told
    train_rnn.main(["--evaluate", str(folder), "--eval-batch-size", "1"])
    other = capsys.readouterr().out
    assert "1 columns" in other and f"test: {printed}" not in other

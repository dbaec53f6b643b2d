"""train_rmc.py and train_rnn.py from the command line: runs, exact resume, --evaluate, flags, recipes."""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

from training import checkpoints, flags, runs
from training.console import UserError
from training.trainer import Trainer

import pytest
import torch
from conftest import write_corpus
from same_runs import after_step, assert_same_checkpoint, assert_same_run, numbers

import train_rmc
import train_rnn
from tasks import language_modeling
from tasks.language_flags import choose_softmax

SIZES = {
    train_rmc: "--emsize 12 --headsize 5 --numheads 2 --keysize 3 --memslots 2",
    train_rnn: "--emsize 12 --nhid 14 --nlayers 2",
}
SCRIPTS = pytest.mark.parametrize("script", SIZES, ids=lambda script: script.__name__)
# 2379 targets in 14 streams of 170 or fewer: 12 windows of 15 in an epoch, the last of 5.
LOOP = "--batch-size 14 --bptt 15 --lr 0.01 --log-interval 5 --eval-batch-size 3"
SMALL = {script: f"{sizes} {LOOP}".split() for script, sizes in SIZES.items()}
STEPS = 12


def run(script, corpus, runs_folder, *argv):
    """Train; return the exit status and the newest run folder."""
    where = ["--data", str(corpus), "--runs-folder", str(runs_folder)]
    status = script.main([*SMALL[script], *where, *argv])
    return status, max(runs_folder.iterdir(), key=lambda folder: folder.stat().st_ctime)


# ---- whole runs


@SCRIPTS
def test_a_run_trains_logs_saves_and_tests(script, corpus_folder, tmp_path, capsys):
    (corpus_folder / "entropy.json").write_text('{"test": {"perplexity": 2.345}}')
    argv = ["--epochs", "3", "--name", "first", "--dropout", "0", "--lr", "0.03"]
    status, folder = run(script, corpus_folder, tmp_path / "runs", *argv)
    assert status == 0 and folder.name == "first"
    assert sorted(os.listdir(folder)) == ["args.json", "best.pt", "last.pt", "log.jsonl"]
    output, warned = capsys.readouterr()
    assert not warned
    shown = (
        "epoch 2  8/12",
        "device: CPU",
        "2,380 / 602 / 574",
        "parameters",
        str(folder),
        "tokens/s",
        "best possible: 2.35",
    )
    assert all(text in output for text in shown)

    events = runs.read_log(folder / "log.jsonl")
    train, valid = ([event for event in events if event["event"] == kind] for kind in ("train", "valid"))
    assert [event["step"] for event in train] == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    assert [event["step"] for event in valid] == [12, 24, 36]
    assert [event["epoch"] for event in train] == [1] * 3 + [2] * 3 + [3] * 4
    assert train[0]["loss"] < 1.1 * math.log(23)  # tied embeddings at N(0, 1) start over three times higher
    assert valid[-1]["ppl"] < 12 < 23 / 2 + 1
    assert {"lr", "tokens_per_second", "grad_norm", "seconds"} < train[0].keys()
    for event in train:
        assert event["ppl"] == pytest.approx(math.exp(event["loss"]))
        assert event["ms_per_batch"] > 0 and event["tokens_per_second"] > 0
    assert [event["event"] for event in events[-2:]] == ["valid", "test"]
    best = checkpoints.load_checkpoint(folder / "best.pt")
    assert best["scores"]["valid_loss"] == min(event["loss"] for event in valid) == events[-1]["valid_loss"]
    assert events[-1]["best_epoch"] == best["scores"]["epoch"]

    record = json.loads((folder / "args.json").read_text())
    assert record["parameters"] == sum(w.numel() for w in best["model"].values()) - (
        script is train_rmc and best["model"]["embedding.weight"].numel()  # its softmax is tied
    )
    assert record["corpus"]["train"] == 2380 and record["corpus"]["words"] == 22


# ---- interrupts and resume

EVERYTHING = (
    "--locked-dropout --dropout 0.3 --dropout-words 0.2 --dropout-weights 0.3 --dropout-candidate 0.2 "
    "--weight-decay 0.1 --warmup 9"
)


@pytest.mark.parametrize(
    "script, more",
    [
        (train_rmc, "--average ema --average-decay 0.9 --schedule cosine"),
        (train_rnn, "--average ema"),
        (train_rnn, "--adaptivesoftmax --accumulate 2 --dropout-candidate 0 --cudnn"),
    ],
)
def test_resume_equals_uninterrupted(script, more, corpus_folder, tmp_path, monkeypatch):
    """Bit for bit, with all regularization: weights, optimizer, average, rates, logged numbers."""
    argv = f"--epochs 2 {EVERYTHING} {more}".split()
    _, whole = run(script, corpus_folder, tmp_path / "whole", *argv)
    after_step(monkeypatch, 17)  # in the second epoch, between two log entries
    status, folder = run(script, corpus_folder, tmp_path / "parts", *argv)
    assert status == 130
    last = checkpoints.load_checkpoint(folder / "last.pt")
    position, offset = last["position"], last["task_position"]["offset"]
    assert position["step"] == 17 and 0 < offset < 170
    after_step(monkeypatch, 21)
    assert script.main(["--resume", str(folder)]) == 130
    assert script.main(["--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


def test_resume_for_more_epochs(corpus_folder, tmp_path, capsys):
    _, whole = run(train_rnn, corpus_folder, tmp_path / "whole", "--epochs", "3")
    _, folder = run(train_rnn, corpus_folder, tmp_path / "parts", "--epochs", "1")
    assert train_rnn.main(["--resume", str(folder), "--epochs", "3", "--log-interval", "5"]) == 0
    assert_same_checkpoint(whole / "last.pt", folder / "last.pt")
    assert_same_checkpoint(whole / "best.pt", folder / "best.pt")
    later = [[event for event in numbers(run) if event["step"] > STEPS] for run in (whole, folder)]
    assert later[0] == later[1]
    record = json.loads((folder / "args.json").read_text())
    assert record["arguments"]["epochs"] == 3 and len(record["resumed"]) == 1
    capsys.readouterr()
    assert train_rnn.main(["--resume", str(folder)]) == 0
    assert "nothing to train" in capsys.readouterr().out


def test_ctrl_c_saves_and_shows_how_to_measure_and_to_resume(corpus_folder, tmp_path, monkeypatch, capsys):
    after_step(monkeypatch, STEPS + 3)
    status, folder = run(train_rmc, corpus_folder, tmp_path / "runs", "--epochs", "3")
    output = capsys.readouterr().out
    assert status == 130 and checkpoints.load_checkpoint(folder / "last.pt")["position"]["step"] == 15
    assert "stopped by SIGINT at step 15" in output and "best valid loss so far: " in output
    for flag in ("--evaluate", "--resume"):
        assert f"train_rmc.py {flag} {folder}" in output


# ---- the numbers of the log


def test_reported_speeds_norms_and_losses_are_those_of_their_steps(corpus_folder, tmp_path, monkeypatch):
    """On a clock that only these stand-ins advance; after step 17 the run is stopped and resumed."""
    now, nats, norms = [100.0], [], []
    losses, clip = language_modeling.LanguageModeling.losses, torch.nn.utils.clip_grad_norm_
    evaluate = language_modeling.evaluate

    def slow_losses(task, *arguments):
        found = losses(task, *arguments)
        nats.append(found[0].item())
        now[0] += len(nats) / 32  # every step takes longer than the one before
        return found

    def slow_clip(*arguments):
        norms.append(clip(*arguments))
        now[0] += 0.25
        return norms[-1]

    def slow_evaluate(*arguments):
        now[0] += 3
        return evaluate(*arguments)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(language_modeling.LanguageModeling, "losses", slow_losses)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", slow_clip)
    monkeypatch.setattr(language_modeling, "evaluate", slow_evaluate)
    after_step(monkeypatch, 17)
    _, folder = run(train_rnn, corpus_folder, tmp_path / "runs", "--epochs", "2")
    now[0] += 5000  # between the two sessions
    assert train_rnn.main(["--resume", str(folder)]) == 0

    counts = [210] * 11 + [69] + [210] * 11 + [69]  # targets of each step
    took = [n / 32 + 0.25 for n in range(1, 25)]
    events = [e for e in runs.read_log(folder / "log.jsonl") if e["event"] != "resume"]
    intervals = {5: (0, 0), 10: (5, 5), 12: (10, 10), 15: (12, 12), 20: (15, 17), 24: (20, 20)}
    for event in events:
        step = event["step"]
        work = sum(took[:step]) + 3 * ((step > 12) + (step == 12) * (event["event"] == "valid"))
        if event["event"] == "train":
            first, timed = intervals.pop(step)  # the steps since the last report, and those of this session
            elapsed, steps = sum(took[timed:step]), step - timed
            mean = sum(nats[first:step]) / sum(counts[first:step])
            assert event["loss"] == pytest.approx(mean) and event["ppl"] == pytest.approx(math.exp(mean))
            assert event["grad_norm"] == pytest.approx(sum(norms[first:step]).item() / (step - first))
            assert event["ms_per_batch"] == pytest.approx(1000 * elapsed / steps)
            assert event["tokens_per_second"] == pytest.approx(sum(counts[timed:step]) / elapsed)
        elif event["event"] == "valid":
            assert event["train_loss"] == pytest.approx(sum(nats[step - 12 : step]) / 2379)
            assert event["train_ppl"] == pytest.approx(math.exp(event["train_loss"]))
        if step == 24 and event["event"] != "train":
            work += 3
        assert event["seconds"] == pytest.approx(work, abs=0.001), (event["event"], step)
    assert not intervals and [event["event"] for event in events].count("valid") == 2


def test_only_full_batches_are_captured(corpus_folder, tmp_path, monkeypatch):
    captured = []

    def capture_together(functions, device, on_failure):
        first, *rest = functions
        return [lambda *inputs: (captured.append(inputs[0].shape), first(*inputs)), *rest]

    monkeypatch.setattr("training.trainer.capture_together", capture_together)
    assert run(train_rnn, corpus_folder, tmp_path, "--epochs", "2")[0] == 0
    assert captured == [(14, 15)] * 22  # of 24 steps: the last window of an epoch has 5 tokens


# ---- files of a run that are missing, foreign or altered


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a corpus and finished runs of one epoch: runs/train_rmc and runs/train_rnn."""
    root = tmp_path_factory.mktemp("finished")
    write_corpus(root / "corpus")
    for script in SIZES:
        run(script, root / "corpus", root / "runs", "--epochs", "1", "--name", script.__name__)
    return root


def test_a_finished_run_without_best_pt_says_so(finished, tmp_path):
    shutil.copytree(finished / "runs" / "train_rnn", tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    with pytest.raises(UserError, match="there is no checkpoint .*best.pt"):
        train_rnn.main(["--resume", str(tmp_path / "run")])


def test_resume_rejects_another_text(finished, tmp_path):
    other = write_corpus(tmp_path / "other", seed=6)
    resume = ["--resume", str(finished / "runs" / "train_rnn"), "--epochs", "2"]
    with pytest.raises(UserError, match="not the one that this run was started on"):
        train_rnn.main([*resume, "--data", str(other)])


@pytest.mark.parametrize("written", [0, 1], ids=["nothing written", "one report"])
def test_a_run_that_fails_early_removes_its_folder(corpus_folder, tmp_path, monkeypatch, written):
    step = Trainer.step

    def failing(trainer):
        if trainer.position.step == 3:
            raise ZeroDivisionError
        step(trainer)

    monkeypatch.setattr(Trainer, "step", failing)
    argv = [*SMALL[train_rnn], "--data", str(corpus_folder), "--runs-folder", str(tmp_path / "runs")]
    with pytest.raises(ZeroDivisionError):
        train_rnn.main([*argv, "--log-interval", "2" if written else "5"])
    assert len(os.listdir(tmp_path / "runs")) == written


# ---- --evaluate


@SCRIPTS
def test_evaluate_repeats_the_scores_of_a_run(script, finished, capsys):
    folder = finished / "runs" / script.__name__
    test = runs.read_log(folder / "log.jsonl")[-1]
    for other in SIZES:  # either script
        assert other.main(["--evaluate", str(folder), "--bptt", "500"]) == 0
        output, warned = capsys.readouterr()
        assert f"valid: loss {test['valid_loss']:.4f}" in output and not warned
        assert f"test: loss {test['loss']:.4f}" in output and "streams: 3" in output
    assert script.main(["--evaluate", str(folder / "last.pt"), "--eval-batch-size", "1"]) == 0
    output = capsys.readouterr().out
    assert "streams: 1" in output and f"test: loss {test['loss']:.4f}" not in output


def test_evaluate_on_another_text_requires_vocab_from_train(finished, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "test.txt").write_text("the yak saw the ant\n" * 30)
    for choice in ("all", "train"):
        _, folder = run(train_rnn, corpus, tmp_path / choice, "--epochs", "1", "--vocab-from", choice)
        words = checkpoints.load_checkpoint(folder / "best.pt")["words"]
        assert ("yak" in words) == (choice == "all")
        assert train_rnn.main(["--evaluate", str(folder)]) == 0
        other = write_corpus(tmp_path / f"other {choice}", seed=6)
        (other / "test.txt").write_text("a gnat and a newt\n" * 30)
        if choice == "train":  # with the run's own train.txt
            shutil.copy(corpus / "train.txt", other / "train.txt")
            assert train_rnn.main(["--evaluate", str(folder), "--data", str(other)]) == 0
        (other / "train.txt").write_text("quite another text\n")
        with pytest.raises(UserError, match="differs from that of .*trained with --vocab-from train"):
            train_rnn.main(["--evaluate", str(folder), "--data", str(other)])


def test_a_text_that_has_moved_can_be_named(finished, tmp_path):
    shutil.copytree(finished / "corpus", tmp_path / "corpus")
    _, folder = run(train_rnn, tmp_path / "corpus", tmp_path / "runs", "--epochs", "1")
    (tmp_path / "corpus").rename(tmp_path / "moved")
    for flag in ("--evaluate", "--resume"):
        assert train_rnn.main([flag, str(folder), "--data", str(tmp_path / "moved")]) == 0


# ---- flags

BOTH = "--locked-dropout --dropout-words 0.2 --dropout-weights 0.3 --adaptivesoftmax --cutoffs 7 20"
OF_BOTH = {"locked_dropout": True, "dropout_words": 0.2, "dropout_weights": 0.3, "cutoffs": [7, 20]}
REACHED = [
    (
        train_rmc,
        f"--emsize 9 --memslots 5 --headsize 6 --numheads 3 --numblocks 2 --forgetbias -0.5 --inputbias 0.25 "
        f"--gatestyle memory --attmlplayers 4 --keysize 8 --init-scale 2 {BOTH} "
        "--dropout-candidate 0.1 --dropout-output 0",
        {"embedding_size": 9, "mem_slots": 5, "head_size": 6, "num_heads": 3, "num_blocks": 2}
        | {"forget_bias": -0.5, "input_bias": 0.25, "gate_style": "memory", "attention_mlp_layers": 4}
        | {"key_size": 8, "init_scale": 2, "dropout_candidate": 0.1, "dropout_input": 0.5}
        | {"dropout_output": 0} | OF_BOTH,
    ),
    (train_rmc, "--gatestyle None --dropout 0.3", {"gate_style": None, "dropout_input": 0.3}),
    (train_rmc, "--dropout 0.3 --dropout-input 0.1", {"dropout_input": 0.1, "dropout_output": 0.3}),
    (
        train_rnn,
        f"--model GRU --emsize 9 --nhid 15 --nlayers 3 --project --dropout-hidden 0.1 --cudnn {BOTH}",
        {"model": "GRU", "embedding_size": 9, "hidden_size": 15, "num_layers": 3, "project": True}
        | {"dropout_hidden": 0.1, "dropout_input": 0.5, "fused": True} | OF_BOTH,
    ),
    (train_rnn, "--model RNN_RELU", {"model": "RNN_RELU", "nonlinearity": "relu"}),
    (train_rnn, "--dropout 0.3", {"dropout_input": 0.3, "dropout_hidden": 0.3, "dropout_output": 0.3}),
    (train_rnn, "--dropout-candidate 0.2 --no-cudnn", {"dropout_candidate": 0.2, "fused": False}),
    (train_rnn, "--nhid 12 --tied", {"tied": True}),
]  # fmt: skip


@pytest.mark.parametrize("script, line, expected", REACHED)
def test_flags_reach_the_model(script, line, expected):
    args = script.build_parser().parse_args(f"{SIZES[script]} {line}".split())
    model = script.build_model(args, 50, choose_softmax(args, 50))
    part = vars(model.core if script is train_rmc else model.rnn)
    if script is train_rnn:
        part = {**part, "num_layers": 1 + len(model.upper)}
    for name, value in expected.items():
        assert model.config.get(name, value) == value == part.get(name, value), name


PUBLISHED = {
    "data": "./data/wikitext-2", "lr": 0.001, "clip": 0.1, "epochs": 100, "batch_size": 64, "bptt": 100,
    "seed": 1111, "cuda": False, "log_interval": 100, "adaptivesoftmax": False, "dropout": 0.5,
    "eval_batch_size": 32,
}  # fmt: skip
PUBLISHED_OF = {
    train_rmc: {
        "emsize": 192, "memslots": 1, "headsize": 192, "numheads": 4, "numblocks": 1, "forgetbias": 1,
        "inputbias": 0, "gatestyle": "unit", "attmlplayers": 3, "keysize": 64, "init_scale": 1,
    },
    train_rnn: {"model": "LSTM", "emsize": 300, "nhid": 300, "nlayers": 1, "tied": False, "cudnn": False},
}  # fmt: skip


@SCRIPTS
def test_defaults_are_the_published_ones_and_help_names_every_flag(script):
    parser = script.build_parser()
    assert parser.defaults().items() >= {**PUBLISHED, **PUBLISHED_OF[script]}.items()
    text = parser.format_help()
    for action in parser._actions:
        assert action.help and all(option in text for option in action.option_strings)
    assert "(default: None)" not in text and "(default: False)" not in text


# ---- recipes


@SCRIPTS
def test_recipe_for_wikitext2_has_at_most_eleven_million_parameters(script):
    given = {"recipe": "wikitext2"}
    args = flags.parse(script.build_parser(), script.__name__, given, script.RECIPES, frozenset())
    with torch.device("meta"):
        model = script.build_model(args, 33278, None)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 10_500_000 < count <= 11_000_000
    assert f"{count:,} parameters" in Path(script.__file__).read_text(encoding="utf-8")
    assert model.output_layer.weight is model.embedding.weight
    assert model.dropout_input == model.dropout_output == 0.3


@SCRIPTS
def test_the_flags_that_a_recipe_prints_have_its_effect_when_they_are_typed(script):
    for name in ("tiny", "wikitext2"):
        parser, recipe = script.build_parser(), script.RECIPES[name]
        by_recipe = flags.parse(parser, script.__name__, {"recipe": name}, script.RECIPES, frozenset())
        typed = parser.parse_args(shlex.split(flags.describe_recipe(parser, by_recipe, recipe)))
        assert {**vars(typed), "recipe": name} == vars(by_recipe)
        assert vars(by_recipe).items() >= recipe.items()
    words = parser.as_typed({"locked_dropout": False, "adaptivesoftmax": False, "data": "a b", "name": "-x"})
    assert words == ["--no-locked-dropout", "--data", "a b", "--name=-x"]


def test_a_resumed_run_keeps_the_flags_of_its_recipe(finished, tmp_path, capsys, monkeypatch):
    argv = ["--recipe", "tiny", "--data", str(finished / "corpus"), "--emsize", "6"]
    argv += ["--nhid", "6", "--bptt", "8", "--warmup", "1", "--runs-folder", str(tmp_path), "--name", "r"]
    argv += ["--epochs"]
    assert train_rnn.main([*argv, "1"]) == 0
    folder = str(tmp_path / "r")
    assert f"recipe tiny: --data {finished / 'corpus'} --dropout 0.1" in capsys.readouterr().out
    again = ["--resume", folder, "--recipe", "tiny", "--epochs", "2"]
    assert train_rnn.main(again) == 0
    output, warned = capsys.readouterr()
    assert "recipe tiny:" not in output and "the learning rate jumps" in warned
    args = checkpoints.load_checkpoint(tmp_path / "r" / "last.pt")["args"]
    assert args["dropout"] == 0.1 and args["emsize"] == 6 and args["epochs"] == 2
    with pytest.raises(UserError, match="--recipe cannot change"):
        train_rnn.main(["--resume", folder, "--recipe", "wikitext2"])

"""Learning to Execute: programs against Python itself, the model, and the script's runs."""

import argparse
import itertools
import random
import re
from collections import Counter
from types import SimpleNamespace

from training import checkpoints, runs
from training.console import UserError

import compare_runs
import numpy as np
import plot_runs
import pytest
import run_files
import torch
import torch.nn.functional as F
from same_runs import after_step, assert_same_run

import train_learning_to_execute as script
from tasks import learning_to_execute as task
from tasks.learning_to_execute import CHARACTERS, OPERATIONS, PROGRAM_KINDS, SYMBOLS, ExecuteModel, encode

MODELS = pytest.mark.parametrize("kind", ["rmc", "lstm"])
SIZES = {"hidden_size": 6, "head_layers": 2, "head_units": 7}
CORE = {"mem_slots": 3, "head_size": 5, "num_heads": 2, "gate_style": "memory"}
# A run of a second; all sizes differ.
TINY = "--program-kind reverse --length 3 --memslots 4 --numheads 2 --headsize 5 --nhid 6 --outputlayers 1 "
TINY += "--outputunits 7 --batch-size 11 --test-examples 13 --lr 0.01 --threads 1 --log-interval 5"


def model_of(kind):
    torch.manual_seed(2)
    return ExecuteModel(kind, **SIZES, **CORE).double()


def train(folder, *flags, name="run"):
    """Run the script in this process; return its exit status and run folder."""
    status = script.main([*TINY.split(), "--runs-folder", str(folder), "--name", name, *map(str, flags)])
    return status, folder / name


# ---- programs


@pytest.mark.parametrize("kind", PROGRAM_KINDS)
def test_ten_thousand_answers_are_those_of_python(kind):
    draw = random.Random(5)
    for _ in range(10_000):
        nesting, length = draw.randint(1, 4), draw.randint(1, 6)
        program, answer = task.write_program(kind, nesting, length, draw)
        if kind in OPERATIONS:
            *lines, last = program.split("\n")
            names = {}
            exec("\n".join(lines), names)
            assert answer == str(eval(last, names) % 10 ** (length + 1)), program
        else:
            backward = "".join(program[-place] for place in range(1, length + 1))
            assert answer == {"copy": program, "reverse": backward, "double": f"{program}{program}"}[kind]
            assert len(program) == length
        most, most_of_answer = task.longest(kind, nesting, length)
        assert len(program) <= most and len(answer) < most_of_answer


def test_kinds_and_difficulties():
    draw, seen = random.Random(6), {}
    for kind in OPERATIONS:
        programs = "".join(task.write_program(kind, 2, 2, draw)[0] for _ in range(500))
        seen[kind] = {sign for sign in ("+", "-", "*", "<", ">", "for", "=") if sign in programs}
    assert seen["addition"] == {"+"} and seen["control"] == {"+", "<", ">", "for", "="}
    assert len(seen["program"]) == 7
    args = argparse.Namespace(program_kind="addition", nesting=3, length=5)
    for difficulty, mixed in task.DIFFICULTIES.items():
        programs = [program for program, _ in task.write_programs(args, 6000, draw, difficulty)]
        found = Counter((program.count("+"), len(program.split("+")[0].strip("("))) for program in programs)
        for nesting, length in itertools.product(range(1, 4), range(1, 6)):
            share = mixed / 15 + (1 - mixed) * ((nesting, length) == (3, 5))
            assert found[nesting, length] / 6000 == pytest.approx(share, abs=0.025)


def test_encode_writes_the_answer_after_the_program():
    codes, steps, targets = encode([("12+9", "21"), ("7", "3")])
    plus, none, end = CHARACTERS.index("+"), len(CHARACTERS), SYMBOLS.index(".")
    assert codes.tolist() == [[1, 2, plus, 9, none, none, none], [7] + 6 * [none]]
    assert steps.tolist() == [[4, 5, 6], [1, 2, 3]]
    assert targets.tolist() == [[2, 1, end], [3, end, -100]]
    other = encode([("12+9", "34"), ("7", "5")])
    assert torch.equal(other[0], codes) and torch.equal(other[1], steps)  # the answer is not shown


def test_constant_accuracy():
    answers = [("", "1"), ("", "15"), ("", "269")]  # the best one has 1, then 5 or 6, then 9
    assert task.constant_accuracy(answers) == pytest.approx(4 / 6)


# ---- the model


@MODELS
def test_the_core_reads_the_program_and_writes_with_zero_input(kind):
    model = model_of(kind)
    examples = [("a=52\na+7", "594"), ("3", "3")]
    logits = model(*encode(examples)[:2])
    for row, (program, answer) in enumerate(examples):
        steps = len(program) + len(answer) + 1
        inputs = torch.zeros(1, steps, len(CHARACTERS), dtype=torch.float64)
        for place, character in enumerate(program):
            inputs[0, place, CHARACTERS.index(character)] = 1
        state, outputs = model.core.initial_state(1) if kind == "rmc" else [None, None], []
        for x in inputs.split(1, dim=1):
            if kind == "rmc":
                state = model.core.step(x[:, 0], state)
                outputs.append(state.flatten(1))
            else:
                lower, state[0] = model.core[0](x, state[0])
                upper, state[1] = model.core[1](torch.cat([x, lower], dim=2), state[1])
                outputs.append(torch.cat([lower, upper], dim=2)[:, 0])
        written = model.head(torch.stack(outputs[len(program) :], dim=1))[0]
        torch.testing.assert_close(logits[row, : len(written)], written)


@MODELS
def test_padding_and_other_programs_change_nothing(kind):
    model = model_of(kind)
    example, other = ("52+7", "59"), ("b=88\nfor x in range(3):b+=22\nb", "154")
    codes, steps, targets = encode([example])
    alone = model(codes, steps)
    for batch in (encode([example], (9, 8)), encode([example, other]), encode([example, other], (50, 6))):
        torch.testing.assert_close(model(*batch[:2])[:1, :3], alone)
        padded = task.loss_and_counts(model(*batch[:2])[:1], batch[2][:1])
        torch.testing.assert_close(padded, task.loss_and_counts(alone, targets))
    assert not torch.equal(model(*encode([("53+7", "59")])[:2]), alone)


def test_defaults_are_the_papers_and_the_lstm_has_at_least_as_many_parameters():
    args = script.build_parser().parse_args([])
    assert (args.lr, args.batch_size, args.steps, args.nesting, args.length) == (1e-3, 128, 200_000, 2, 5)
    model = script.build_model(args)
    assert model.core.state_size == (4, 512) and model.core.gate_style == "memory"
    assert [layer.out_features for layer in model.head[::2]] == [256, 256, 256, 256, len(SYMBOLS)]
    for recipe in ({}, *script.RECIPES.values()):
        args, sizes = argparse.Namespace(**script.build_parser().defaults() | recipe), []
        for args.model in ("rmc", "lstm"):
            sizes.append(sum(weight.numel() for weight in script.build_model(args).parameters()))
        assert sizes[0] <= sizes[1]


def test_loss_and_counts():
    logits = np.random.default_rng(3).normal(size=(3, 4, len(SYMBOLS)))
    answers, targets = [[4, 7, 10], [2, 10], [1, 1, 1, 10]], np.full((3, 4), -100)
    logits[1, 0, 2] = logits[1, 1, 10] = logits[0, 1, 7] = logits[2, 3, 10] = 9  # what is right
    expected, right = 0.0, 0
    for row, answer in enumerate(answers):
        targets[row, : len(answer)] = answer
        rows = np.exp(logits[row, : len(answer)])
        expected -= np.log(rows[range(len(answer)), answer] / rows.sum(axis=1)).mean()
        right += (rows.argmax(axis=1) == answer)[:-1].sum()
    loss, counts = task.loss_and_counts(torch.tensor(logits), torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert counts.tolist() == [6, right, 1] and 2 <= right < 6


# ---- training


def test_training_is_adam_on_fresh_programs(tmp_path):
    """The script's weights after 7 steps equal those of a plain loop, written out here."""
    _, folder = train(tmp_path, "--steps", 7, "--seed", 5)
    torch.manual_seed(5)
    model = ExecuteModel("rmc", 6, 1, 7, mem_slots=4, num_heads=2, head_size=5, gate_style="memory")
    optimizer, draw = torch.optim.Adam(model.parameters(), lr=0.01), random.Random(5)
    args = argparse.Namespace(program_kind="reverse", nesting=2, length=3)
    for _ in range(7):
        codes, steps, targets = encode(task.write_programs(args, 11, draw, "mix"))
        loss = 0
        for logits, target in zip(model(codes, steps), targets, strict=True):
            loss = loss + F.cross_entropy(logits, target, ignore_index=-100) / 11
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    trained = checkpoints.load_checkpoint(folder / "last.pt")["model"]
    for name, weight in model.state_dict().items():  # biases of keys have no gradient and move by noise
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-3)


@MODELS
def test_resume_equals_uninterrupted(kind, tmp_path, monkeypatch):
    train(tmp_path, "--steps", 12, "--model", kind, name="whole")
    after_step(monkeypatch, 7)
    status, folder = train(tmp_path, "--steps", 12, "--model", kind)
    assert status == 130
    assert script.main(["--resume", str(folder)]) == 0
    assert_same_run(tmp_path / "whole", folder)


def test_processes_divide_the_batch_and_the_test_set_which_is_the_same_for_all_seeds():
    args, cpu = script.build_parser().parse_args(TINY.split()), torch.device("cpu")
    whole, test_set = task.write_programs(args, 11, random.Random(args.seed), "mix"), []
    for part, tested in ((slice(0, 6), slice(0, 4)), (slice(6, 11), slice(4, 13))):
        processes = SimpleNamespace(shard={11: part, 13: tested}.get)
        trained = task.LearningToExecute(None, args, cpu, processes)
        assert all(map(torch.equal, trained.next_batch()[0], encode(whole[part])))
        test_set.append(trained.test_set)
    args.seed = 9
    whole = task.LearningToExecute(None, args, cpu).test_set
    assert all(map(torch.equal, whole, map(torch.cat, zip(*test_set, strict=True))))


def test_both_models_learn_in_seconds(tmp_path):
    for kind in ("rmc", "lstm"):
        flags = "--length 2 --steps 250 --batch-size 64 --nhid 32 --headsize 16 --clip 1 --outputunits 64"
        _, folder = train(tmp_path, "--model", kind, *flags.split(), "--log-interval", 200, name=kind)
        final = runs.read_log(folder / "log.jsonl")[-1]
        assert final["event"] == "final" and final["examples"] == 130
        assert final["accuracy"] > 0.9 and final["chance"] < 0.3


def test_show_evaluate_and_tools(tmp_path, capsys):
    assert script.main(["--program-kind", "double", "--length", "4", "--show", "2"]) == 0
    shown = re.findall(r"^(\d+)\n    answer: (\d+)\n", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == 2 and all(answer == 2 * program for program, answer in shown)
    _, folder = train(tmp_path, "--steps", 10)
    capsys.readouterr()
    assert script.main(["--evaluate", str(folder), "--show", "3"]) == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"^(\d{3})\n    answer: \d{3}   model: \d*$", output, re.MULTILINE)) == 3
    final = runs.read_log(folder / "log.jsonl")[-1]
    assert f"{final['accuracy']:.2%} of characters right" in output
    compare_runs.main([str(folder)])
    cells = capsys.readouterr().out.splitlines()[-2].split(" | ")
    assert [cells[3], *cells[6:8]] == [f"{100 * final[n]:.1f}" for n in ("accuracy", "answers", "chance")]
    ((value, text),) = plot_runs.reference_lines(run_files.read_runs([folder]))
    assert 10 < value < 30 and text == f"constant answer {value:.3g} %"
    (folder / "best.pt").unlink()
    with pytest.raises(UserError, match="there is no checkpoint .*best.pt"):
        script.main(["--evaluate", str(folder)])
    with pytest.raises(UserError, match="--nesting: must be a whole number from 1 to 9, got '10'"):
        script.main(["--nesting", "10"])

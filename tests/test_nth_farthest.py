"""The task "Nth farthest", its models and its training script."""

import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_nth_farthest as script
from nth_farthest import NthFarthestModel, loss_and_correct, make_batch
from training import checkpoints, console, cuda_graphs, devices, runs
from training.cuda_graphs import CapturedStep

ROOT = Path(__file__).parent.parent

# A run that takes a second: the sizes all differ.
TINY = ["--num-vectors", "3", "--num-dims", "2", "--memslots", "4", "--numheads", "2", "--headsize", "5"]
TINY += [
    "--outputunits",
    "7",
    "--batch-size",
    "11",
    "--test-examples",
    "50",
    "--lr",
    "0.01",
    "--threads",
    "1",
]
TINY += ["--log-interval", "5"]


def tiny_model(**options):
    torch.manual_seed(0)
    sizes = {"mem_slots": 4, "num_heads": 2, "head_size": 5, "head_units": 7, "hidden_size": 6}
    return NthFarthestModel(3, 2, **{**sizes, **options})


def train(folder, *flags, name="run"):
    """Runs the script in this process; returns its exit status and run folder."""
    status = script.main([*TINY, "--runs-folder", str(folder), "--name", name, *map(str, flags)])
    return status, Path(folder) / name


def weights(folder, name="last.pt"):
    return checkpoints.load_checkpoint(folder / name)["model"]


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take a second each; only the tests about them draw them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(script, "draw_attention", lambda *arguments: None)


# ---- flags


def test_default_flags_are_the_papers():
    args = script.build_parser().parse_args([])
    assert (args.lr, args.batch_size, args.num_vectors, args.num_dims, args.clip) == (1e-4, 1600, 8, 16, 0.1)
    assert script.build_model(args).config == NthFarthestModel().config


@pytest.mark.parametrize(
    ("flags", "setting", "value"),
    [
        ("--memslots 3", "mem_slots", 3),
        ("--headsize 9", "head_size", 9),
        ("--numheads 5", "num_heads", 5),
        ("--numblocks 2", "num_blocks", 2),
        ("--forgetbias 0.5", "forget_bias", 0.5),
        ("--inputbias -0.5", "input_bias", -0.5),
        ("--gatestyle memory", "gate_style", "memory"),
        ("--gatestyle none", "gate_style", None),
        ("--attmlplayers 3", "attention_mlp_layers", 3),
        ("--keysize 6", "key_size", 6),
        ("--total-units 1024", "head_size", 16),
        ("--total-units 2048 --memslots 16 --numheads 1", "head_size", 128),
        ("--nhid 77", "hidden_size", 77),
        ("--outputlayers 2", "head_layers", 2),
        ("--outputunits 33", "head_units", 33),
        ("--input-scale 3", "input_scale", 3.0),
        ("--memory-scale 8", "memory_scale", 8.0),
        ("--model lstm", "model", "lstm"),
        ("--num-vectors 5", "num_vectors", 5),
        ("--num-dims 32", "num_dims", 32),
    ],
)
def test_every_flag_reaches_the_model(flags, setting, value):
    """A fault of the 2018 port: flags that never reached the model."""
    model = script.build_model(script.build_parser().parse_args(flags.split()))
    assert model.config[setting] == value
    core = "core" if hasattr(model.core, setting) else None
    if core:
        assert getattr(model.core, setting) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--total-units 1000", "multiple of --memslots x --numheads = 64, got 1000. Try 1024"),
        ("--total-units 2048 --headsize 32", "exclude each other"),
        ("--resume no-such-folder", "not there"),
        ("--evaluate no-such-folder", "not there"),
        ("--evaluate a --resume b", "exclude each other|not there"),
        ("--curriculum-dims 1 17", "--curriculum-dims must not exceed --num-dims, which is 16, got 17"),
        ("--curriculum-vectors 9", "--curriculum-vectors must not exceed --num-vectors, which is 8, got 9"),
        ("--curriculum-vectors 2 4 --curriculum-dims 8", "one number each per stage, got 2 and 1 numbers"),
    ],
)
def test_mistakes_are_told(flags, message, tmp_path):
    with pytest.raises(console.UserError, match=message):
        script.main([*flags.split(), "--runs-folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags", ["--num-vectors 1", "--steps 0", "--lr nan", "--target-accuracy 2", "--model gru", "--step 3"]
)
def test_senseless_values_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        script.main(flags.split())
    error = capsys.readouterr().err
    assert flags.split()[0] in error and error.startswith("usage: train_nth_farthest.py ")


# ---- the schedule


def options(**changed):
    return argparse.Namespace(**{"lr": 0.5, "warmup": 0, "schedule": "constant", "steps": 100, **changed})


def test_learning_rate_schedules():
    assert [script.learning_rate(step, options()) for step in (1, 50, 100)] == [0.5] * 3
    warm = options(warmup=4)
    rates = [script.learning_rate(step, warm) for step in range(1, 7)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    cosine = options(warmup=20, schedule="cosine")
    assert script.learning_rate(20, cosine) == pytest.approx(0.5)
    assert script.learning_rate(60, cosine) == pytest.approx(0.25)  # half way from 20 to 100
    assert script.learning_rate(100, cosine) == pytest.approx(0.0)


def test_the_schedule_reaches_the_optimiser():
    """The learning rate is a tensor that a captured step reads; the weights must move by what is written."""
    args = script.build_parser().parse_args([*TINY, "--steps", "2"])
    moved = {}
    for rate in (0.0, 0.001, 0.002):
        trainer = script.Trainer(tiny_model(), args, torch.device("cpu"))
        before = trainer.model.head[-1].bias.detach().clone()
        trainer.lr.fill_(rate)
        trainer.step()
        moved[rate] = (trainer.model.head[-1].bias.detach() - before).abs().max().item()
    assert moved[0.0] == 0
    assert moved[0.001] == pytest.approx(0.001, rel=1e-3)  # Adam's first step is as long as the learning rate
    assert moved[0.002] == pytest.approx(0.002, rel=1e-3)


def test_the_logged_rates_are_the_schedules(tmp_path):
    """What is logged is read from the tensor that the optimiser uses."""
    _, folder = train(tmp_path, "--steps", 20, "--warmup", 10, "--schedule", "cosine")
    rates = {e["step"]: e["lr"] for e in runs.read_log(folder / "log.jsonl") if e["event"] == "train"}
    expected = {5: 0.005, 10: 0.01, 15: 0.005, 20: 0.0}
    assert rates == {step: pytest.approx(rate, abs=1e-8) for step, rate in expected.items()}


# ---- the loop


def test_training_is_adam_on_fresh_batches(tmp_path):
    """The script's weights after 7 steps equal a plain loop's, written out here."""
    _, folder = train(tmp_path, "--steps", 7, "--seed", 5)
    torch.manual_seed(5)
    model = NthFarthestModel(3, 2, mem_slots=4, num_heads=2, head_size=5, head_units=7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(7):
        inputs, targets = make_batch(11, 3, 2, generator)
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    for name, value in weights(folder).items():
        # Adam turns rounding errors of gradients near 0 into steps of up to the learning rate, 0.01.
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=2e-4)
    logged = [e["loss"] for e in runs.read_log(folder / "log.jsonl") if e["event"] == "train"]
    assert logged == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 2], rel=1e-5)


def test_a_run_folder_holds_what_the_run_was(tmp_path, capsys):
    status, folder = train(tmp_path, "--steps", 12)
    assert status == 0
    assert {"args.json", "log.jsonl", "best.pt", "last.pt"} <= {path.name for path in folder.iterdir()}
    record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    assert record["script"] == "train_nth_farthest" and record["arguments"]["memslots"] == 4
    events = runs.read_log(folder / "log.jsonl")
    assert [(e["event"], e["step"]) for e in events[:3]] == [("train", 5), ("train", 10), ("train", 12)]
    assert events[0]["examples_per_second"] > 0 and 0 <= events[0]["accuracy"] <= 1
    final = events[-1]
    assert (
        final["event"] == "final"
        and final["step"] == 12
        and len(final["accuracy_by_n"]) == 3
        and final["examples"] == 200
    )
    text = capsys.readouterr().out
    assert "chance 33.3%, plateau 66.7%" in text and "n = 2" in text and "m itself" in text

    model = script.load_model(checkpoints.load_checkpoint(folder / "best.pt"))
    args = script.build_parser().parse_args(TINY)
    inputs, targets = script.fixed_test_set(args, script.FINAL_TEST_SEED, 200, torch.device("cpu"))
    assert final["accuracy"] == pytest.approx((model(inputs).argmax(1) == targets).float().mean().item())
    scores = checkpoints.load_checkpoint(folder / "best.pt")["scores"]
    trained = {e["step"]: e["test_accuracy"] for e in events if e["event"] == "train"}
    assert scores["test_accuracy"] == max(trained.values()) == trained[scores["step"]]


def test_the_test_set_is_the_same_for_every_seed_and_not_trained_on():
    args = script.build_parser().parse_args([*TINY, "--seed", "8"])
    other = script.build_parser().parse_args([*TINY, "--seed", "9"])
    cpu = torch.device("cpu")
    assert torch.equal(
        script.Trainer(tiny_model(), args, cpu).test_set[0],
        script.Trainer(tiny_model(), other, cpu).test_set[0],
    )

    def trained_on(seed):
        """The vectors of the batches that a trainer of this seed draws, as the script draws them."""
        args = script.build_parser().parse_args([*TINY, "--seed", str(seed)])
        trainer, drawn = script.Trainer(tiny_model(), args, cpu), []

        def spy(*arguments):
            drawn.append(make_batch(*arguments))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "make_batch", spy)
            for _ in range(20):
                trainer.step()
        assert len(drawn) == 20 and all(inputs.shape == (11, 3, 11) for inputs, _ in drawn)
        return vectors_in(torch.cat([inputs for inputs, _ in drawn]))

    def vectors_in(inputs):
        return set(map(tuple, inputs[..., :2].flatten(0, 1).tolist()))

    for seed, examples in ((script.TEST_SEED, 50), (script.FINAL_TEST_SEED, 200)):
        tested = vectors_in(script.fixed_test_set(args, seed, examples, cpu)[0])
        assert len(tested) == 3 * examples
        for usual in (args.seed, other.seed, script.build_parser().get_default("seed")):
            assert not tested & trained_on(usual)
        assert len(tested & trained_on(seed)) >= 3 * 11  # what it would look like


# Three stages for TINY, each left at the first report.
STAGES = ["--curriculum-vectors", 2, 3, "--curriculum-dims", 2, 1, "--curriculum-accuracy", 0.01]


@pytest.mark.parametrize(("stopped_at", "stages"), [(5, []), (8, []), (5, STAGES), (8, STAGES)])
def test_resuming_equals_never_stopping(tmp_path, monkeypatch, stopped_at, stages):
    """At the end of a log interval, where a stage of a curriculum may end too, and within one."""
    flags = ["--steps", 15, "--warmup", 12, *stages]
    _, whole = train(tmp_path, *flags, name="whole")
    monkeypatch.setattr(script.Trainer, "train_step", stop_after(stopped_at, script.Trainer.train_step))
    status, pieces = train(tmp_path, *flags, name="pieces")
    monkeypatch.undo()
    assert status == 130
    assert checkpoints.load_checkpoint(pieces / "last.pt")["position"]["step"] == stopped_at
    torch.manual_seed(999)
    assert script.main(["--resume", str(pieces)]) == 0

    expected, found = weights(whole), weights(pieces)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    keys = ("event", "step", "loss", "accuracy", "test_accuracy", "grad_norm", "lr", "accuracy_by_n")
    keys += ("stage", "vectors", "dims")

    def facts(folder):
        events = [e for e in runs.read_log(folder / "log.jsonl") if e["event"] != "resume"]
        return [{key: event.get(key) for key in keys} for event in events]

    assert facts(pieces) == facts(whole)


def test_a_curriculum_goes_on_when_the_training_accuracy_is_reached(tmp_path, monkeypatch, capsys):
    """The batches are those of the stage; the accuracy that counts is that of the training examples."""
    seen, tested = [], []

    def spy(*arguments, **options):
        inputs, targets = make_batch(*arguments, **options)
        coordinates, labels = inputs[..., :2], inputs[..., 2:5]
        seen.append((labels.sum() / len(inputs), (coordinates != 0).any(0).any(0).sum()))
        return inputs, targets

    def test(self):
        tested.append(self.test_set[0][..., 2:5].sum() / 50)
        return 0.9  # does not end a stage

    monkeypatch.setattr(script, "make_batch", spy)
    monkeypatch.setattr(script.Trainer, "test", test)
    right = iter([6] * 5 + [7] * 5 + [6] * 5 + [8] * 5 + [9] * 10)  # of 11, in each step
    monkeypatch.setattr(
        script, "loss_and_correct", lambda *x: (loss_and_correct(*x)[0], torch.tensor(next(right)))
    )
    flags = [*STAGES[:-1], 0.63]  # 7 of 11 are 0.64
    _, folder = train(tmp_path, "--steps", 30, "--log-interval", 5, *flags)
    assert tested == [3] * 6  # the test set has all vectors at any time
    assert seen[1:31] == [(2, 2)] * 10 + [(3, 1)] * 10 + [(3, 2)] * 10
    events = runs.read_log(folder / "log.jsonl")
    stages = [(e["step"], e["stage"], e["vectors"], e["dims"]) for e in events if e["event"] == "stage"]
    assert stages == [(10, 1, 3, 1), (20, 2, 3, 2)]
    assert [e["stage"] for e in events if e["event"] == "train"] == [0, 0, 1, 1, 2, 2]
    assert "from step 11 on: vectors 3, dimensions 1" in capsys.readouterr().out


def test_a_captured_step_would_see_the_next_stage():
    """A CUDA graph reads memory by address: the sizes stay where they are."""
    args = script.build_parser().parse_args([*TINY, *map(str, STAGES)])
    trainer = script.Trainer(tiny_model(), args, torch.device("cpu"))
    address = trainer.shown.data_ptr()
    trainer.enter_stage(1)
    assert trainer.shown.data_ptr() == address and trainer.shown.tolist() == [3, 1]


def stop_after(steps, train_step):
    """A train_step that asks for an interrupt in the given step, as Ctrl-C would."""
    count = 0

    def stopping(self):
        nonlocal count
        train_step(self)
        count += 1
        if count == steps:
            self.interrupts.requested = "SIGINT"

    return stopping


def test_a_finished_run_can_be_lengthened(tmp_path):
    _, whole = train(tmp_path, "--steps", 10, name="whole")
    _, pieces = train(tmp_path, "--steps", 5, name="pieces")
    script.main(["--resume", str(pieces), "--steps", "10"])
    expected, found = weights(whole), weights(pieces)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def steps_logged(folder):
    return [event["step"] for event in runs.read_log(folder / "log.jsonl") if event["event"] == "train"]


def test_a_run_that_held_its_target_goes_on_to_a_higher_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.Trainer, "test", lambda self: 0.9)
    _, folder = train(tmp_path, "--steps", 100, "--target-accuracy", 0.9)
    assert steps_logged(folder) == [5, 10, 15]
    capsys.readouterr()

    for flags in ([], ["--steps", "1000"]):
        assert script.main(["--resume", str(folder), *flags]) == 0
        assert (
            "nothing to train: the test accuracy has reached --target-accuracy 0.9" in capsys.readouterr().out
        )
        assert steps_logged(folder) == [5, 10, 15]

    scores = iter([0.95, 0.95, 0.9, 0.95, 0.95, 0.95])
    monkeypatch.setattr(script.Trainer, "test", lambda self: next(scores))
    script.main(["--resume", str(folder), "--target-accuracy", "0.95"])
    assert "nothing to train" not in capsys.readouterr().out
    assert steps_logged(folder) == [5, 10, 15, 20, 25, 30, 35, 40, 45]


def test_resuming_a_run_whose_steps_are_done_says_so(tmp_path, capsys):
    _, folder = train(tmp_path, "--steps", 5)
    capsys.readouterr()
    script.main(["--resume", str(folder)])
    assert "nothing to train: all 5 steps are done. To go on, give more --steps." in capsys.readouterr().out


def test_a_target_partly_held_is_still_held_after_an_interrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(script.Trainer, "test", lambda self: 0.9)
    monkeypatch.setattr(script.Trainer, "train_step", stop_after(12, script.Trainer.train_step))
    _, folder = train(tmp_path, "--steps", 100, "--target-accuracy", 0.9)
    script.main(["--resume", str(folder)])
    assert steps_logged(folder) == [5, 10, 15]


@pytest.mark.parametrize(
    ("schedule", "steps", "warning"),
    [
        # 0.01 (1 + cos(11 pi / 20)) / 2
        ("cosine", "20", "at step 11 the learning rate jumps from 0 to 0.00422"),
        ("cosine", "10", None),
        ("constant", "20", None),
    ],
)
def test_a_cosine_of_another_length_is_warned_of(tmp_path, capsys, schedule, steps, warning):
    _, folder = train(tmp_path, "--steps", 10, "--schedule", schedule)
    capsys.readouterr()
    script.main(["--resume", str(folder), "--steps", steps])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_best_accuracy_and_best_pt_agree_when_the_disk_is_full(tmp_path, monkeypatch):
    """An accuracy whose model was not written must not keep a later, lower one from being written."""
    scores, real = iter([0.5, 0.9, 0.7]), checkpoints.save_checkpoint
    monkeypatch.setattr(script.Trainer, "test", lambda self: next(scores))

    def full_for_a_while(path, contents):
        if Path(path).name == "best.pt" and contents["scores"]["step"] == 10:
            raise OSError("No space left on device")
        real(path, contents)

    monkeypatch.setattr(checkpoints, "save_checkpoint", full_for_a_while)
    _, folder = train(tmp_path, "--steps", 15)
    assert checkpoints.load_checkpoint(folder / "best.pt")["scores"] == {"step": 15, "test_accuracy": 0.7}
    position = checkpoints.load_checkpoint(folder / "last.pt")["position"]
    assert (position["best_accuracy"], position["best_step"]) == (0.7, 15)


@pytest.mark.parametrize("lost", [None, "best.pt", "last.pt"])
def test_after_a_kill_best_pt_says_itself_what_is_to_beat(tmp_path, monkeypatch, lost):
    """best.pt is from step 10, last.pt from step 5, or one of them is not there."""
    accuracies = {5: 0.5, 10: 0.9, 15: 0.7}
    monkeypatch.setattr(script.Trainer, "test", lambda self: accuracies[self.at.step])
    _, folder = train(tmp_path, "--steps", 5)
    early = (folder / "last.pt").read_bytes()
    script.main(["--resume", str(folder), "--steps", "10"])
    (folder / "last.pt").write_bytes(early)
    if lost:
        (folder / lost).unlink()
    if lost == "last.pt":  # killed before its first save: the log knows no end
        log = folder / "log.jsonl"
        kept = [line for line in log.read_text().splitlines(keepends=True) if '"train"' in line]
        log.write_text("".join(kept))
    accuracies[10] = 0.6  # as on another device, where the same steps go a little differently
    script.main(["--resume", str(folder), "--steps", "15"])
    best = {"step": 15, "test_accuracy": 0.7} if lost == "best.pt" else {"step": 10, "test_accuracy": 0.9}
    assert checkpoints.load_checkpoint(folder / "best.pt")["scores"] == best
    assert checkpoints.load_checkpoint(folder / "last.pt")["position"]["best_step"] == best["step"]


def test_a_best_pt_without_scores_is_refused(tmp_path):
    _, folder = train(tmp_path, "--steps", 5)
    contents = checkpoints.load_checkpoint(folder / "best.pt")
    del contents["scores"]
    checkpoints.save_checkpoint(folder / "best.pt", contents)
    with pytest.raises(console.UserError, match="does not say how good it is"):
        script.main(["--resume", str(folder), "--steps", "10"])


def test_fault_2_a_run_saves_itself_and_shows_its_curve_while_it_goes(tmp_path, monkeypatch):
    """Faults of the 2018 port: it never saved anything and plotted after 10 million epochs."""
    seen = []

    def look(self, progress, report=script.Trainer.report):
        report(self, progress)
        events = [event["event"] for event in runs.read_log(self.folder / "log.jsonl")]
        seen.append((events.count("train"), (self.folder / "best.pt").exists()))

    monkeypatch.setattr(script.Trainer, "report", look)
    monkeypatch.setattr(console.Alarm, "due", lambda alarm: alarm.seconds == 60)
    monkeypatch.setattr(
        script.Trainer,
        "save_last",
        lambda self, save=script.Trainer.save_last: (
            save(self),
            seen.append(checkpoints.load_checkpoint(self.folder / "last.pt")["position"]["step"]),
        ),
    )
    train(tmp_path, "--steps", 11, "--save-every", 1)
    assert [entry for entry in seen if isinstance(entry, tuple)] == [(1, True), (2, True), (3, True)]
    assert [entry for entry in seen if isinstance(entry, int)] == [*range(1, 12), 11]


def test_ctrl_c_saves_and_tells_how_to_go_on(tmp_path):
    command = [sys.executable, str(ROOT / "train_nth_farthest.py"), *TINY, "--steps", "1000000"]
    command += ["--runs-folder", str(tmp_path), "--name", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        for line in process.stdout:
            if line.startswith("rmc") and " 10/" in line:
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped by SIGINT at step" in output and f"--resume {tmp_path / 'run'}" in output
    assert "Traceback" not in errors
    assert checkpoints.load_checkpoint(tmp_path / "run" / "last.pt")["position"]["step"] >= 10


def test_target_accuracy_must_be_held(tmp_path, monkeypatch):
    scores = iter([0.9, 0.1, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(script.Trainer, "test", lambda self: next(scores))
    _, folder = train(tmp_path, "--steps", 1000, "--target-accuracy", 0.9)
    steps = [e["step"] for e in runs.read_log(folder / "log.jsonl") if e["event"] == "train"]
    assert steps == [5, 10, 15, 20, 25]


def test_a_session_can_be_short(tmp_path, capsys):
    status, folder = train(tmp_path, "--steps", 1_000_000, "--stop-after", 0.01)
    assert status == 0
    assert "to go on: python train_nth_farthest.py --resume" in capsys.readouterr().out
    events = runs.read_log(folder / "log.jsonl")
    assert all(event["event"] == "train" for event in events)
    assert checkpoints.load_checkpoint(folder / "last.pt")["position"]["step"] > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, "--steps", 5)
    good = weights(tmp_path / "run")
    real = script.loss_and_correct
    monkeypatch.setattr(script, "loss_and_correct", lambda *x: (real(*x)[0] * math.nan, real(*x)[1]))
    with pytest.raises(console.UserError, match="no longer finite.*lower --lr"):
        script.main(["--resume", str(tmp_path / "run"), "--steps", "10"])
    assert all(torch.equal(value, good[name]) for name, value in weights(tmp_path / "run").items())


def test_a_picture_of_the_attention_is_drawn_or_missed_politely(tmp_path, monkeypatch, capsys):
    _, folder = train(tmp_path, "--steps", 1)
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # as if it were not installed
    assert script.main(["--evaluate", str(folder)]) == 0
    assert "no picture of the attention: plots need matplotlib" in capsys.readouterr().out


def test_evaluate_measures_a_finished_run(tmp_path, capsys):
    _, folder = train(tmp_path, "--steps", 5)
    first = [line for line in capsys.readouterr().out.splitlines() if "n = " in line or "best model" in line]
    log = (folder / "log.jsonl").read_bytes()
    assert script.main(["--evaluate", str(folder)]) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if "n = " in line or "best model" in line]
    assert again == first and len(first) == 4
    assert (folder / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("strict", [True, False])
def test_evaluate_takes_its_precision_from_the_run(tmp_path, monkeypatch, strict):
    _, folder = train(tmp_path, "--steps", 5, *(["--strict-float32"] if strict else []))
    asked, real = [], devices.choose_device

    def choose(cuda, threads, strict_float32):
        asked.append(strict_float32)
        return real(cuda, threads, strict_float32)

    monkeypatch.setattr(devices, "choose_device", choose)
    script.main(["--evaluate", str(folder), *([] if strict else ["--strict-float32"])])
    assert asked == [strict]


def test_bf16_is_for_training_and_not_for_measuring():
    args = script.build_parser().parse_args([*TINY, "--bf16"])
    trainer, seen = script.Trainer(tiny_model(), args, torch.device("cpu")), []
    trainer.model.head[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train_step()
    assert seen == [torch.bfloat16]
    trainer.test()
    assert set(seen[1:]) == {torch.float32}


def test_the_first_step_tells_when_the_next_line_comes_and_how_long_the_run_is(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(script.runs.FirstStep, "tell", lambda step, *given: told.append(given))
    train(tmp_path, "--steps", 7)
    assert told == [(left, 7, "the run") for left in (4, 3, 2, 1, 0, 1, 0)]  # lines after steps 5 and 7


def test_bf16_and_lstm_train(tmp_path):
    for name, flags in {"bf16": ["--bf16"], "lstm": ["--model", "lstm", "--nhid", 6]}.items():
        status, folder = train(tmp_path, "--steps", 5, *flags, name=name)
        assert status == 0 and all(value.isfinite().all() for value in weights(folder).values())
        assert all(value.dtype == torch.float32 for value in weights(folder).values())


def test_a_foreign_checkpoint_is_refused():
    with pytest.raises(console.UserError, match="kind 'rmc'"):
        script.load_model({"kind": "rmc", "format": 1})
    model = tiny_model()
    with pytest.raises(console.UserError, match="does not fit together"):
        script.load_model(
            {"kind": "nth_farthest", "config": {**model.config, "mem_slots": 9}, "model": model.state_dict()}
        )


@pytest.mark.timeout(600)  # some 15 seconds on a core of its own
def test_the_core_leaves_the_plateau_and_the_lstm_does_not(tmp_path):
    """Three points on a line: 2/3 for who knows only that the nearest is m itself. Seeded, end to end."""
    flags = ["--num-vectors", 3, "--num-dims", 1, "--outputunits", 64, "--batch-size", 64, "--lr", 0.001]
    flags += ["--test-examples", 2000, "--log-interval", 50, "--input-scale", 3]
    core = ["--memslots", 3, "--numheads", 2, "--headsize", 16, "--memory-scale", 6]
    beyond = 0.72  # 5 standard deviations above 2/3

    _, folder = train(tmp_path, *flags, *core, "--steps", 1600, "--target-accuracy", beyond, name="rmc")
    steps, accuracies = zip(*logged_accuracies(folder), strict=True)
    assert min(accuracies[-3:]) >= beyond
    assert max(accuracies[: len(accuracies) // 2]) < beyond  # the plateau was there, and for long

    train(tmp_path, *flags, "--model", "lstm", "--nhid", 64, "--steps", steps[-1], name="lstm")
    steps, accuracies = zip(*logged_accuracies(tmp_path / "lstm"), strict=True)
    assert accuracies[-1] > 0.62 and max(accuracies) < beyond


def logged_accuracies(folder):
    return [
        (e["step"], e["test_accuracy"]) for e in runs.read_log(folder / "log.jsonl") if e["event"] == "train"
    ]


# ---- the captured step


def test_a_captured_step_is_a_plain_call_on_a_cpu():
    step = CapturedStep(lambda x: (x + 1, x * 2), torch.device("cpu"))
    assert [value.item() for value in step(torch.tensor(3))] == [4, 6]


def test_a_step_that_cannot_be_captured_goes_on_without(monkeypatch):
    """Each call still does its work exactly once, and the reason is told once."""

    class Refusing:
        def __init__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    calls, told = [], []
    step = CapturedStep(calls.append, torch.device("cpu"), on_failure=told.append)
    step.enabled = True
    monkeypatch.setattr(step, "_on_side_stream", lambda inputs: step.function(*inputs))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    for number in range(cuda_graphs.WARMUP_CALLS + 3):
        step(torch.tensor(number))
    assert [call.item() for call in calls] == list(range(cuda_graphs.WARMUP_CALLS + 3))
    assert len(told) == 1 and "not permitted" in told[0] and "\n" not in told[0]


class FailingCapture:
    """torch.cuda.graph on a CPU, with a capture that turns out to have failed at its end.

    As in a real one nothing has run: tensors have their old values. Gradients are memory never written.
    """

    def __init__(self, trainer):
        state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
        self.tensors = [*trainer.model.parameters(), trainer.sums, *state]
        self.trainer, self.captures = trainer, 0

    def __call__(self, graph, stream, capture_error_mode):
        return self

    def __enter__(self):
        self.captures += 1
        self.before = [tensor.detach().clone() for tensor in self.tensors]
        self.drawn = self.trainer.generator.get_state()

    def __exit__(self, *exception):
        with torch.no_grad():
            for tensor, value in zip(self.tensors, self.before, strict=True):
                assert tensor.shape == value.shape
                tensor.copy_(value)
        self.trainer.generator.set_state(self.drawn)
        for parameter in self.trainer.model.parameters():
            assert parameter.grad is not None  # the function did enter
            parameter.grad.fill_(math.nan)
        raise RuntimeError("operation failed due to a previous error during capture\nmore")


def test_a_capture_that_fails_at_its_end_leaves_the_eager_steps_right(monkeypatch):
    args = script.build_parser().parse_args(TINY)
    plain, failing = (script.Trainer(tiny_model(), args, torch.device("cpu")) for _ in range(2))
    told = []
    failing.step.enabled, failing.step.on_failure = True, told.append
    monkeypatch.setattr(failing.step, "_on_side_stream", lambda inputs: failing.step.function(*inputs))
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: argparse.Namespace(register_generator_state=no_registration)
    )
    for trainer in (plain, failing):
        trainer.lr.fill_(0.01)
        for _ in range(cuda_graphs.WARMUP_CALLS):
            trainer.step()
    capture = FailingCapture(failing)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    for _ in range(3):
        plain.step()
        failing.step()
        for ours, theirs in zip(failing.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(failing.sums, plain.sums)
    assert capture.captures == 1
    assert len(told) == 1 and "previous error during capture" in told[0] and "\n" not in told[0]


def no_registration(generator):
    """Stands for what torch does with a generator."""


def test_a_failed_capture_lets_its_generators_go(monkeypatch):
    """torch takes generators out of a capture only when it ends well; until then they refuse eager draws."""

    class Generator:
        device, state = torch.device("cuda", 0), "capturing"

        def clone_state(self):
            return "free"

        def graphsafe_set_state(self, state):
            self.state = state

    def refuse(*arguments, **options):
        raise RuntimeError("no")

    generator = Generator()
    step = CapturedStep(lambda: generator.state, torch.device("cpu"), generators=[generator], on_failure=len)
    step.enabled, step.warmup_left = True, 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    assert step() == "free"


def test_when_one_of_several_steps_cannot_be_captured_none_is_replayed(monkeypatch):
    told = []
    steps = cuda_graphs.capture_together(
        [lambda: "first", lambda: "second"], told.append, device=torch.device("cpu")
    )
    assert [step() for step in steps] == ["first", "second"] and not told
    for step in steps:
        step.enabled, step.warmup_left = True, 0
    steps[0].graph = object()  # recorded before

    def refuse(*arguments, **options):
        assert not gc.isenabled()
        raise RuntimeError("no")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    assert steps[1]() == "second" and steps[0]() == "first"
    assert len(told) == 1 and "(no)" in told[0]
    assert not any(step.enabled or step.graph for step in steps)
    assert gc.isenabled()


def test_inputs_elsewhere_than_the_captured_step_are_refused(monkeypatch):
    """What is on another device would be recorded once and for all."""
    step = CapturedStep(lambda *inputs: None, torch.device("cpu"))
    step.enabled, step.warmup_left = True, 0
    with pytest.raises(ValueError, match="input 1 of a captured step must be on cpu, got one on meta"):
        step(torch.zeros(2), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="input 0 of a captured step must be on cpu, got a float"):
        step(0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_whose_capture_fails_equals_an_eager_one_on_a_gpu():
    """In a process of its own: torch up to 2.12 captures nothing more after a failure, or keeps memory."""
    code = "import test_nth_farthest; test_nth_farthest.compare_failed_capture_with_eager_steps()"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def compare_failed_capture_with_eager_steps():
    """The fourth call, the captured one, asks the GPU for a number, which breaks the capture."""
    device, results = torch.device("cuda", 0), []
    for enabled in (False, True):
        generator, told, calls = torch.Generator(device).manual_seed(7), [], []
        torch.cuda.manual_seed(8)
        weight = torch.zeros(3, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1, capturable=True)

        def work():
            calls.append(None)  # noqa: B023
            inputs = torch.rand(5, 3, generator=generator, device=device) + torch.rand(3, device=device)  # noqa: B023
            optimizer.zero_grad(set_to_none=True)  # noqa: B023
            loss = (weight * inputs - 1).square().sum()  # noqa: B023
            loss.backward()
            if len(calls) == cuda_graphs.WARMUP_CALLS + 1:  # noqa: B023
                loss.item()
            optimizer.step()  # noqa: B023

        step = CapturedStep(work, device, enabled, generators=[generator], on_failure=told.append)
        for _ in range(8):
            step()
        assert len(told) == enabled and len(calls) == 8 + enabled
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("more", [[], STAGES, ["--model", "lstm", "--nhid", "9"],
                                  ["--model", "lstm", "--nhid", "9", "--bf16"]])
def test_a_captured_run_equals_an_eager_one(tmp_path, more, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # several would rule captures out
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    flags = ["--steps", 30, "--cuda", "--warmup", 20, *more]
    _, eager = train(tmp_path, *flags, "--no-cuda-graph", name="eager")
    _, captured = train(tmp_path, *flags, name="captured")
    assert "cannot be captured" not in capsys.readouterr().err
    assert len(replays) == 30 - cuda_graphs.WARMUP_CALLS
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(captured)[name], value, rtol=1e-3, atol=1e-4)

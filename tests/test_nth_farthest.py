"""train_nth_farthest.py: its flags, training, curriculum, scores and what a run leaves behind."""

import json
import math
import sys
from pathlib import Path

from training import checkpoints, flags, runs
from training.console import UserError
from training.muon import MuonWithAdam

import pytest
import torch
import torch.nn.functional as F
from same_runs import after_step, assert_same_run

import train_nth_farthest as script
from tasks import nth_farthest
from tasks.nth_farthest import NthFarthestModel, loss_and_correct, make_batch

CPU = torch.device("cpu")
# A run that takes a second; all sizes differ.
TINY = "--num-vectors 3 --num-dims 2 --memslots 4 --numheads 2 --headsize 5 --outputunits 7 --batch-size 11 "
TINY += "--test-examples 50 --lr 0.01 --threads 1 --log-interval 5"
# Three stages for TINY, each left at the first report.
STAGES = ["--curriculum", "2x2", "3x1", "--curriculum-batch-size", 10, "--curriculum-accuracy", 0.01]


def arguments(*words):
    return script.build_parser().parse_args([*TINY.split(), *map(str, words)])


def train(folder, *flags, name="run"):
    """Run the script in this process; return its exit status and run folder."""
    status = script.main([*TINY.split(), "--runs-folder", str(folder), "--name", name, *map(str, flags)])
    return status, Path(folder) / name


def resume(folder, *flags):
    return script.main(["--resume", str(folder), *flags])


def build(*words):
    """Return a trainer, and write it no run folder."""
    torch.manual_seed(1)
    return script.build(arguments(*words), CPU, nth_farthest.ALONE)


def weights(folder, name="last.pt"):
    return checkpoints.load_checkpoint(folder / name)["model"]


def events(folder, *kinds):
    return [event for event in runs.read_log(folder / "log.jsonl") if event["event"] in kinds]


def steps_logged(folder):
    return [event["step"] for event in events(folder, "train")]


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take a second each; only the tests about them draw them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(nth_farthest, "draw_attention", lambda *arguments: None)


@pytest.fixture
def score(monkeypatch):
    """Return a function that sets the test accuracy: a number, or a number for each step."""
    report = nth_farthest.NthFarthest.report

    def set_score(accuracy):
        def patched(self, trainer, totals, elapsed):
            found = accuracy[trainer.position.step] if isinstance(accuracy, dict) else accuracy
            self.test = lambda processes: found
            return report(self, trainer, totals, elapsed)

        monkeypatch.setattr(nth_farthest.NthFarthest, "report", patched)

    return set_score


# ---- flags


def test_every_flag_reaches_the_model():
    flags = "--memslots 3 --headsize 9 --numheads 5 --numblocks 2 --forgetbias 0.5 --inputbias -0.5 "
    flags += "--keysize 6 --gatestyle memory --attmlplayers 4 --nhid 77 --outputlayers 7 --outputunits 33 "
    flags += "--input-scale 1.5 --memory_scale 8 --num-vectors 10 --num-dims 32 --init-scale 2"
    model = script.build_model(script.build_parser().parse_args(flags.split()))
    expected = {"mem_slots": 3, "head_size": 9, "num_heads": 5, "num_blocks": 2, "forget_bias": 0.5}
    expected |= {"input_bias": -0.5, "key_size": 6, "gate_style": "memory", "attention_mlp_layers": 4}
    expected |= {"hidden_size": 77, "head_layers": 7, "head_units": 33, "input_scale": 1.5}
    expected |= {"memory_scale": 8.0, "init_scale": 2.0, "num_vectors": 10, "num_dims": 32, "model": "rmc"}
    assert model.config == expected
    assert {name: getattr(model.core, name) for name in expected if hasattr(model.core, name)}.items() <= (
        expected.items()
    )
    assert arguments("--gatestyle", "None").gatestyle == "none"
    assert script.build_model(arguments("--gatestyle", "none")).config["gate_style"] is None
    assert script.build_model(arguments("--model", "lstm")).config["model"] == "lstm"


def test_defaults_are_the_papers():
    args = script.build_parser().parse_args([])
    assert (args.lr, args.batch_size, args.num_vectors, args.num_dims, args.clip) == (1e-4, 1600, 8, 16, 0.1)
    model, core = script.build_model(args), script.build_model(args).core
    assert (core.mem_slots, core.num_heads, core.head_size, core.num_blocks) == (8, 8, 32, 1)
    assert (core.attention_mlp_layers, core.key_size, core.input_size) == (2, 32, 40)
    linear = [layer for layer in model.head if isinstance(layer, torch.nn.Linear)]
    assert [layer.in_features for layer in linear] == [2048, 256, 256, 256, 256]
    assert model.config == {**NthFarthestModel().config, "key_size": None}


# ---- training


def test_training_is_adam_on_fresh_batches(tmp_path):
    """The script's weights after 7 steps equal those of a plain loop, written out here."""
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
    logged = [event["loss"] for event in events(folder, "train")]
    assert logged == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 2], rel=1e-5)


def test_run_folder_and_final_report(tmp_path, capsys):
    """The final accuracy is that of best.pt on the second test set."""
    status, folder = train(tmp_path, "--steps", 12)
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {"args.json", "log.jsonl", "best.pt", "last.pt"}
    record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    assert record["script"] == "train_nth_farthest" and record["arguments"]["memslots"] == 4
    trained = {event["step"]: event for event in events(folder, "train")}
    assert list(trained) == [5, 10, 12] and trained[5]["examples_per_second"] > 0
    assert [event["event"] for event in runs.read_log(folder / "log.jsonl")] == ["train"] * 3 + ["final"]
    best = checkpoints.load_checkpoint(folder / "best.pt")
    score = best["scores"]["test_accuracy"]
    assert score == max(e["test_accuracy"] for e in trained.values())
    assert score == trained[best["scores"]["step"]]["test_accuracy"]

    model = NthFarthestModel(**best["config"])
    model.load_state_dict(best["model"])
    inputs, targets = make_batch(200, 3, 2, torch.Generator().manual_seed(nth_farthest.FINAL_TEST_SEED))
    (final,) = events(folder, "final")
    assert final["accuracy"] == pytest.approx((model(inputs).argmax(1) == targets).float().mean().item())
    assert final["examples"] == 200 and len(final["accuracy_by_n"]) == 3
    text = capsys.readouterr().out
    assert "chance 33.3%, plateau 66.7%" in text and "n = 0" in text and "m itself" in text


def test_test_set_is_the_same_for_every_seed():
    assert torch.equal(build("--seed", 8).task.test_set[0], build("--seed", 9).task.test_set[0])


# ---- the curriculum


def test_stage_ends_when_the_training_accuracy_is_reached(tmp_path, monkeypatch, capsys, score):
    """Batches are those of the stage. The test set, which does not end a stage, is always the full task."""
    seen = []

    def spy(*arguments):
        inputs, targets = make_batch(*arguments)
        seen.append((inputs.size(1), (inputs[..., :2] != 0).any(0).any(0).sum(), len(inputs)))
        return inputs, targets

    score(0.9)
    monkeypatch.setattr(nth_farthest, "make_batch", spy)
    right = iter([6] * 5 + [7] * 5 + [6] * 5 + [8] * 5 + [9] * 10)  # of 10 or, in the full task, 11
    monkeypatch.setattr(
        nth_farthest, "loss_and_correct", lambda *x: (loss_and_correct(*x)[0], torch.tensor(next(right)))
    )
    _, folder = train(tmp_path, "--steps", 30, *STAGES[:-1], 0.65)
    assert seen[0] == (3, 2, 50)  # the test set
    assert seen[1:31] == [(2, 2, 10)] * 10 + [(3, 1, 10)] * 10 + [(3, 2, 11)] * 10
    stages = [(e["step"], e["stage"], e["vectors"], e["dims"]) for e in events(folder, "stage")]
    assert stages == [(10, 1, 3, 1), (20, 2, 3, 2)]
    assert [event["stage"] for event in events(folder, "train")] == [0, 0, 1, 1, 2, 2]
    assert "from step 11: 3 vectors, 1 dimensions" in capsys.readouterr().out


def test_cosine_falls_in_the_full_task_only(tmp_path):
    """The rate is --lr through the curriculum, two stages of 5 steps, and then falls to 0 at --steps."""
    _, folder = train(tmp_path, "--steps", 30, "--schedule", "cosine", *STAGES)
    rates = {event["step"]: event["lr"] / 0.01 for event in events(folder, "train")}
    progress = [(step - 11) / 20 for step in (15, 20, 25, 30)]
    assert rates == pytest.approx(
        {5: 1, 10: 1} | {11 + 20 * x: (1 + math.cos(math.pi * x)) / 2 for x in progress}
    )


def test_longer_run_keeps_the_rate_until_the_full_task():
    """A run that ended within the curriculum is resumed with more steps."""
    short = build("--steps", 6, "--schedule", "cosine", *STAGES)
    long = build("--steps", 60, "--schedule", "cosine", *STAGES)
    long.lr.load_state_dict(short.lr.state_dict(), 6)
    assert long.lr.rate_at(6) == long.lr.rate_at(60) == 0.01


def test_curriculum_recipe_reaches_the_model_and_the_task():
    given = script.build_parser().given(["--recipe", "curriculum", "--seed", "2"])
    args = flags.parse(script.build_parser(), script.SCRIPT, given, script.RECIPES, frozenset())
    assert script.curriculum(args)[0] == (3, 1) and script.curriculum(args)[-1] == (8, 16)
    assert (
        args.optimizer == "muon"
        and args.seed == 2
        and sum(parameter.numel() for parameter in script.build_model(args).parameters()) == 156_936
    )


# ---- Muon

WITH_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch below 2.9")


@WITH_MUON
def test_muon_moves_matrices_along_orthogonal_directions_and_vectors_as_adam_does(tmp_path):
    model, other = (torch.nn.Linear(5, 7).double() for _ in range(2))
    other.load_state_dict(model.state_dict())
    optimizer = MuonWithAdam(model.parameters(), lr=0.01)
    adam = torch.optim.Adam([other.bias], lr=0.01)
    before = model.weight.detach().clone()
    inputs = torch.randn(11, 5, dtype=torch.float64)
    for layer, updates in ((model, optimizer), (other, adam)):
        layer(inputs).square().sum().backward()
        updates.step()
    torch.testing.assert_close(model.bias, other.bias)
    sizes = torch.linalg.svdvals(before - model.weight.detach()) / (0.03 * 0.2 * 7**0.5)
    assert sizes.min() > 0.6 and sizes.max() < 1.3  # Newton-Schulz stops near 1


def test_muon_needs_a_torch_that_has_it(monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match="requires torch 2.9 or newer, found"):
        build("--optimizer", "muon")


# ---- stopping and resuming


MUON = [*STAGES, "--optimizer", "muon", "--schedule", "cosine"]


@pytest.mark.parametrize(
    ("stop", "stages"),
    [(5, []), (8, []), (5, STAGES), pytest.param(8, MUON, marks=WITH_MUON)],
)
def test_resume_equals_uninterrupted(tmp_path, monkeypatch, stop, stages, capsys):
    """Interrupted at the end of a log interval, where a stage may end too, and within one."""
    flags = ["--steps", 15, "--warmup", 12, *stages]
    _, whole = train(tmp_path, *flags, name="whole")
    after_step(monkeypatch, stop)
    status, parts = train(tmp_path, *flags, name="parts")
    output = capsys.readouterr().out
    assert status == 130 and f"stopped by SIGINT at step {stop}" in output and f"--resume {parts}" in output
    assert checkpoints.load_checkpoint(parts / "last.pt")["position"]["step"] == stop
    torch.manual_seed(999)
    assert resume(parts) == 0
    assert_same_run(whole, parts)


def test_resume_on_another_kind_of_device_draws_other_examples(tmp_path, capsys):
    """Generators of CPUs and GPUs cannot take over each other's states."""
    _, folder = train(tmp_path, "--steps", 5)
    last = checkpoints.load_checkpoint(folder / "last.pt")
    last["task"] |= {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
    trainer = build()
    trainer.restore(last)
    assert "the run was on another device (cuda)" in capsys.readouterr().err
    seen = trainer.task.next_batch()[0][0]
    assert not torch.equal(seen, build().task.next_batch()[0][0])


# ---- target accuracy and best.pt


def test_held_target_survives_an_interrupt_and_can_be_raised(tmp_path, score, monkeypatch, capsys):
    score(0.9)
    after_step(monkeypatch, 12)
    _, folder = train(tmp_path, "--steps", 100, "--target-accuracy", 0.9)
    resume(folder)
    for more in ([], ["--steps", "1000"]):
        capsys.readouterr()
        assert resume(folder, *more) == 0
        assert "nothing to train" in capsys.readouterr().out and steps_logged(folder) == [5, 10, 15]
    score({20: 0.95, 25: 0.95, 30: 0.9, 35: 0.95, 40: 0.95, 45: 0.95})
    resume(folder, "--target-accuracy", "0.95")
    assert steps_logged(folder) == [5, 10, 15, 20, 25, 30, 35, 40, 45]


def test_score_of_an_unwritten_best_model_does_not_count(tmp_path, score, monkeypatch, capsys):
    save = checkpoints.save_checkpoint

    def full_for_a_while(path, contents):
        if Path(path).name == "best.pt" and contents["scores"]["step"] == 10:
            raise OSError("No space left on device")
        save(path, contents)

    score({5: 0.5, 10: 0.9, 15: 0.7})
    monkeypatch.setattr(checkpoints, "save_checkpoint", full_for_a_while)
    _, folder = train(tmp_path, "--steps", 15)
    assert "No space left" in capsys.readouterr().err
    assert checkpoints.load_checkpoint(folder / "best.pt")["scores"] == {"step": 15, "test_accuracy": 0.7}
    position = checkpoints.load_checkpoint(folder / "last.pt")["position"]
    assert (position["best_score"], position["best_step"]) == (0.7, 15)


@pytest.mark.parametrize("lost", [False, True])
def test_killed_run_compares_with_the_score_in_best_pt(tmp_path, score, lost):
    """After a kill, best.pt is from step 10, or missing, and last.pt from step 5."""
    score({5: 0.5, 10: 0.9})
    _, folder = train(tmp_path, "--steps", 5)
    early = (folder / "last.pt").read_bytes()
    resume(folder, "--steps", "10")
    (folder / "last.pt").write_bytes(early)
    if lost:
        (folder / "best.pt").unlink()
    score({5: 0.5, 10: 0.6, 15: 0.7})  # as on another device, where the same steps round differently
    resume(folder, "--steps", "15")
    best = {"step": 15, "test_accuracy": 0.7} if lost else {"step": 10, "test_accuracy": 0.9}
    assert checkpoints.load_checkpoint(folder / "best.pt")["scores"] == best
    assert checkpoints.load_checkpoint(folder / "last.pt")["position"]["best_step"] == best["step"]


# ---- --evaluate and pictures


def test_picture_of_the_attention_is_drawn_or_its_absence_explained(tmp_path, monkeypatch, capsys):
    _, folder = train(tmp_path, "--steps", 1)
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert script.main(["--evaluate", str(folder)]) == 0
    assert "no picture of the attention, which requires matplotlib" in capsys.readouterr().out
    _, folder = train(tmp_path, "--steps", 1, "--model", "lstm", name="lstm")  # has no attention
    assert not (folder / "attention.png").exists()


def test_evaluate_repeats_the_final_report_and_changes_nothing(tmp_path, capsys):
    def report():
        return [
            line for line in capsys.readouterr().out.splitlines() if "n = " in line or "best model" in line
        ]

    _, folder = train(tmp_path, "--steps", 5)
    first, before = report(), {path.name: path.read_bytes() for path in folder.iterdir()}
    assert script.main(["--evaluate", str(folder)]) == 0
    assert report() == first and len(first) == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- learning


def test_the_core_leaves_the_plateau_and_the_lstm_does_not(tmp_path):
    """Three points on a line: a model that knows only the nearest (m itself) scores 2/3."""
    flags = ["--num-vectors", 3, "--num-dims", 1, "--outputlayers", 2, "--outputunits", 64, "--lr", 0.006]
    flags += ["--batch-size", 256, "--test-examples", 1000, "--log-interval", 25, "--input-scale", 3]
    core = ["--memslots", 3, "--numheads", 2, "--headsize", 8, "--memory-scale", 6]
    beyond = 0.74  # 5 standard deviations above 2/3

    _, folder = train(tmp_path, *flags, *core, "--steps", 3000, "--target-accuracy", beyond, name="rmc")
    accuracies = [event["test_accuracy"] for event in events(folder, "train")]
    assert min(accuracies[-script.HOLD :]) >= beyond
    assert max(accuracies[: len(accuracies) // 2]) < beyond  # on the plateau for long

    steps = steps_logged(folder)[-1]
    _, folder = train(tmp_path, *flags, "--model", "lstm", "--nhid", 64, "--steps", steps, name="lstm")
    accuracies = [event["test_accuracy"] for event in events(folder, "train")]
    assert accuracies[-1] > 0.62 and max(accuracies) < beyond


# ---- the model in the repository


def test_the_trained_model_of_the_repository_solves_the_papers_task(capsys):
    """Chance is 12.5 %, the plateau 25 %, and the paper reports 91 %."""
    folder = Path(script.__file__).parent / "results" / "nth_farthest" / "model"
    assert (folder / "best.pt").stat().st_size < 1_000_000
    checkpoint = checkpoints.load_checkpoint(folder / "best.pt")
    assert "optimizer" not in checkpoint
    model = NthFarthestModel(**checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    inputs, targets = make_batch(1000, 8, 16, torch.Generator().manual_seed(5))
    assert nth_farthest.is_correct(model, inputs, targets, 500).float().mean() > 0.91
    assert script.main(["--evaluate", str(folder)]) == 0
    assert "12,800 fresh examples" in capsys.readouterr().out

"""Regularisation in the training scripts: resuming, averages, penalties, learning rates, recipes."""

import shlex
from pathlib import Path

import pytest
import torch
from test_language_modelling import make_trainer
from test_scripts import assert_same_checkpoint, interrupt_at, numbers, run

import train_rmc
import train_rnn
from layers import regularisation
from training import checkpoints, console, lm_flags, runs


@pytest.mark.parametrize(
    "flags", [["--cudnn"], ["--model", "GRU"], ["--recipe", "wikitext2-regularised"]], ids=" ".join
)
def test_candidate_dropout_is_refused_where_it_cannot_act(flags, corpus_folder, tmp_path):
    with pytest.raises(console.UserError, match="Give --model LSTM and --no-cudnn"):
        run(train_rnn, corpus_folder, tmp_path, *flags, "--dropout-candidate", "0.2")
    with pytest.raises(console.UserError, match="dropout_candidate needs gates"):
        run(train_rmc, corpus_folder, tmp_path, "--gatestyle", "none", "--dropout-candidate", "0.2")


EVERYTHING = [
    "--locked-dropout",
    "--dropout",
    "0.3",
    "--dropout-words",
    "0.2",
    "--dropout-weights",
    "0.3",
    "--ar",
    "2",
    "--tar",
    "1",
    "--weight-decay",
    "0.1",
    "--random-bptt",
    "3",
    "--warmup",
    "9",
    "--embedding-lr",
    "0.003",
    "--dropout-candidate",
    "0.2",
]


@pytest.mark.parametrize(
    "script, more",
    [
        (train_rmc, ["--average", "ema", "--average-decay", "0.9", "--schedule", "cosine"]),
        (train_rnn, ["--average", "nt-asgd"]),
    ],
    ids=["ema, cosine", "nt-asgd, plateau"],
)
def test_resuming_with_everything_on_is_as_if_never_stopped(
    script, more, corpus_folder, tmp_path, monkeypatch
):
    """Bit for bit: weights, average, windows, learning rates and logged numbers."""

    def start_at_once(average, loss):
        average.started = True
        average.losses.append(loss)

    monkeypatch.setattr(regularisation.WeightAverage, "watch", start_at_once)
    flags = ["--epochs", "3", *EVERYTHING, *more]
    _, whole = run(script, corpus_folder, tmp_path / "whole", *flags)
    interrupt_at(monkeypatch, 17)  # in the second epoch, in warm-up no more
    status, folder = run(script, corpus_folder, tmp_path / "parts", *flags)
    assert status == 130
    place = checkpoints.load_checkpoint(folder / "last.pt")["position"]["place"]
    assert 0 < place < 170 and place % 15
    interrupt_at(monkeypatch, 30)
    assert script.main(["--resume", str(folder)]) == 130
    assert script.main(["--resume", str(folder)]) == 0
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(whole / name, folder / name)
    assert numbers(whole) == numbers(folder)
    average = checkpoints.load_checkpoint(folder / "last.pt")["average"]
    assert average["started"] and average["steps"] > 0
    assert "average_loss" in [e for e in runs.read_log(folder / "log.jsonl") if e["event"] == "valid"][-1]


def test_best_pt_holds_the_average_where_that_is_better(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "1", "--average", "ema")
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *given: evaluate(*given) - 9 * (trainer.average.model in given)
    )
    trainer.train(tmp_path)
    best = checkpoints.load_checkpoint(tmp_path / "best.pt")
    averaged = trainer.average.model.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in best["model"].items())
    assert not torch.equal(best["model"]["embedding.weight"], trainer.model.embedding.weight)
    valid = next(event for event in runs.read_log(tmp_path / "log.jsonl") if event["event"] == "valid")
    assert best["scores"]["valid_loss"] == valid["average_loss"] == trainer.at.best_valid < valid["loss"]


@pytest.mark.parametrize("kind", ["rmc", "rnn"])
def test_the_penalty_is_minimised_and_not_reported(tmp_path, kind):
    plain, punished = (make_trainer(tmp_path, kind, *flags) for flags in ([], ["--ar", "2", "--tar", "1"]))
    tokens, targets = next(plain.columns.windows(11))
    for trainer in (plain, punished):
        trainer.state = trainer.model.initial_state(7)
        trainer.step(tokens, targets)
    assert plain.sums[0] == punished.sums[0] and plain.sums[1] != punished.sums[1]
    again = make_trainer(tmp_path, kind)
    features, hidden, _ = again.model._run(tokens, again.model.initial_state(7))
    nats, _ = again.model.loss(tokens, targets, again.model.initial_state(7))
    (nats + 2 * hidden.square().mean() + (features[1:] - features[:-1]).square().mean()).backward()
    norm = torch.stack([p.grad.square().sum() for p in again.model.parameters()]).sum().sqrt()
    assert punished.sums[1].item() == pytest.approx(norm.item(), rel=1e-5)


def test_decay_shrinks_the_weights_by_the_learning_rate_and_the_optimiser_holds_all(tmp_path):
    plain, decayed = (make_trainer(tmp_path, "rmc", "--weight-decay", x, "--lr", "0.01") for x in ("0", "3"))
    before = {name: p.detach().clone() for name, p in decayed.model.named_parameters()}
    held = [id(p) for group in decayed.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, decayed.model.parameters()))
    for trainer in (plain, decayed):
        trainer.state = trainer.model.initial_state(7)
        trainer.step(*next(trainer.columns.windows(11)))
    for (name, p), q in zip(plain.model.named_parameters(), decayed.model.parameters(), strict=True):
        shrunk = 0.01 * 3 * before[name] if p.dim() == 2 else 0
        torch.testing.assert_close(q, p - shrunk, rtol=0, atol=1e-6, msg=name)


def test_a_step_on_a_random_window_has_its_share_of_the_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, "rnn", "--random-bptt", "2", "--lr", "0.01", "--warmup", "2")
    for step, (first, stop) in enumerate([(0, 8), (8, 19), (19, 22)], start=1):
        trainer.state = trainer.model.initial_state(7)
        trainer.step(*trainer.columns.window(first, stop))
        schedule = 0.01 * min(1, step / 2)
        assert trainer.lr == pytest.approx(schedule)
        used = trainer.optimizer.param_groups[0]["lr"]
        assert used == pytest.approx(schedule * (stop - first) / 11)
    trainer.step_schedule(1.0)
    assert trainer.lr == trainer.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("script", [train_rmc, train_rnn], ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize("name", ["wikitext2", "wikitext2-regularised"])
def test_recipes_for_wikitext2_are_within_eleven_million_parameters_and_reach_the_model(script, name):
    parser = script.build_parser()
    lm_flags.apply_recipe(parser, ["--recipe", name], script.RECIPES)
    args = parser.parse_args(["--recipe", name, "--no-locked-dropout"])
    with torch.device("meta"):
        model = script.build_model(args, 33278, None)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 10_500_000 < count <= 11_000_000
    assert f"{count:,} parameters" in Path(script.__file__).read_text(encoding="utf-8")
    assert not model.locked_dropout and model.output_layer.weight is model.embedding.weight
    dropped = (0.3, 0.0, 0.0) if name == "wikitext2" else (0.4, 0.1, 0.4)
    assert (model.dropout_input, model.dropout_words, model.dropout_weights) == dropped


@pytest.mark.parametrize("name", ["tiny", "wikitext2", "wikitext2-regularised"])
@pytest.mark.parametrize("script", [train_rmc, train_rnn], ids=lambda script: script.SCRIPT)
def test_the_flags_that_a_recipe_prints_mean_the_same_when_they_are_typed(script, name, capsys):
    parser = script.build_parser()
    lm_flags.apply_recipe(parser, ["--recipe", name], script.RECIPES)
    by_recipe = parser.parse_args([])
    printed = capsys.readouterr().out.removeprefix(f"recipe {name}: ")
    assert script.build_parser().parse_args(shlex.split(printed)) == by_recipe
    words = lm_flags.as_typed(parser, {"locked_dropout": False, "adaptivesoftmax": False, "data": "a b"})
    assert words == ["--no-locked-dropout", "--data", "a b"]

"""Curves from logs: what is drawn is what was logged, and mistakes are told."""

import json
import sys
from pathlib import Path

import numpy as np
import plot_runs
import pytest

from training import console, runs

PNG = b"\x89PNG\r\n\x1a\n"


def run_folder(root, name, script, events, **arguments):
    """A run folder as the training scripts leave it."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(
        json.dumps({"script": script, "arguments": arguments}), encoding="utf-8"
    )
    log = runs.RunLog(folder / "log.jsonl")
    for event in events:
        log.write(**event)
    return folder


def nth_farthest_run(root, name, K=8, D=16, accuracies=(0.13, 0.25, 0.6), **arguments):
    events = []
    for i, accuracy in enumerate(accuracies, start=1):
        scores = {"loss": 2.0 / i, "accuracy": accuracy - 0.01, "test_accuracy": accuracy}
        events.append({"event": "train", "step": 100 * i, "seconds": 30.0 * i, **scores})
    return run_folder(root, name, "train_nth_farthest", events, num_vectors=K, num_dims=D, **arguments)


def language_run(root, name, script, perplexities=(300.0, 200.0, 150.0)):
    events = []
    for i, ppl in enumerate(perplexities, start=1):
        scores = {"ppl": ppl, "train_ppl": ppl / 2, "loss": 5.0}
        events.append({"event": "valid", "epoch": i, "step": 9 * i, "seconds": 120.0 * i, **scores})
    return run_folder(root, name, script, events)


def curves(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def draw(function, folders):
    plt = plot_runs.import_pyplot()
    figure = function(plt, [plot_runs.read_run(folder) for folder in folders])
    axes = figure.get_axes()
    plt.close(figure)
    return axes


def test_nth_farthest_curves_are_the_logs(tmp_path):
    first = nth_farthest_run(tmp_path, "rmc-1")
    second = nth_farthest_run(tmp_path, "lstm-1", accuracies=(0.2, 0.24))
    accuracy, accuracy_in_time, loss, loss_in_time = draw(plot_runs.draw_nth_farthest, [first, second])
    assert curves(accuracy)["rmc-1"] == ([100, 200, 300], [0.13, 0.25, 0.6])
    assert curves(accuracy)["lstm-1"] == ([100, 200], [0.2, 0.24])
    assert curves(accuracy_in_time)["rmc-1"] == ([0.5, 1.0, 1.5], [0.13, 0.25, 0.6])
    assert ([100, 200, 300], [2.0, 1.0, 2 / 3]) in curves(loss).values()
    assert ([0.5, 1.0], [2.0, 1.0]) in curves(loss_in_time).values()


@pytest.mark.parametrize(
    ("K", "D", "expected"),
    [
        (8, 16, [(1 / 8, "chance 1/8"), (2 / 8, "plateau 2/8"), (0.91, "the paper's RMC, 91 %")]),
        (3, 1, [(1 / 3, "chance 1/3"), (2 / 3, "plateau 2/3")]),
    ],
)
def test_lines_to_compare_with(tmp_path, K, D, expected):
    folder = nth_farthest_run(tmp_path, "run", K=K, D=D)
    lines = plot_runs.reference_lines([plot_runs.read_run(folder)])
    assert [name for _, name in lines] == [name for _, name in expected]
    assert [value for value, _ in lines] == pytest.approx([value for value, _ in expected])
    axis = draw(plot_runs.draw_nth_farthest, [folder])[0]
    heights = [y[0] for _, y in curves(axis).values() if len(set(y)) == 1]
    assert heights == pytest.approx([value for value, _ in expected])


def test_language_model_curves_are_the_logs(tmp_path):
    folders = [
        language_run(tmp_path, "rmc", "train_rmc"),
        language_run(tmp_path, "lstm", "train_rnn", (90.0,)),
    ]
    by_epoch, by_minute = draw(plot_runs.draw_language_models, folders)
    assert curves(by_epoch)["rmc: valid"] == ([1, 2, 3], [300.0, 200.0, 150.0])
    assert curves(by_epoch)["rmc: train"] == ([1, 2, 3], [150.0, 100.0, 75.0])
    assert curves(by_minute)["rmc: valid"] == ([2.0, 4.0, 6.0], [300.0, 200.0, 150.0])
    assert curves(by_minute)["lstm: valid"] == ([2.0], [90.0])


def test_what_a_resumed_run_did_twice_is_drawn_once(tmp_path):
    folder = nth_farthest_run(tmp_path, "run")
    log = runs.RunLog(folder / "log.jsonl")
    log.write("resume", step=100)
    log.write("train", step=200, seconds=61.0, loss=0.9, accuracy=0.2, test_accuracy=0.3)
    assert curves(draw(plot_runs.draw_nth_farthest, [folder])[0])["run"] == ([100, 200], [0.13, 0.3])


def test_values_that_were_not_finite_are_left_out(tmp_path):
    folder = language_run(tmp_path, "run", "train_rnn", (300.0, float("inf"), 150.0))
    assert curves(draw(plot_runs.draw_language_models, [folder])[0])["run: valid"] == ([1, 3], [300.0, 150.0])


def test_the_command_writes_a_small_png(tmp_path, capsys):
    folders = [str(nth_farthest_run(tmp_path, f"run-{i}")) for i in range(3)]
    assert plot_runs.main([*folders, "--outf", str(tmp_path / "curves.png")]) == 0
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(PNG) and len(content) < 200_000
    assert "3 runs" in capsys.readouterr().out
    words = [str(language_run(tmp_path, "lm", "train_rmc"))]
    assert plot_runs.main([*words, "--outf", str(tmp_path / "lm.png")]) == 0
    assert (tmp_path / "lm.png").read_bytes().startswith(PNG)


def test_a_folder_stands_for_the_runs_in_it_and_what_is_left_out_is_told(tmp_path, capsys):
    inside = tmp_path / "runs"
    (inside / "deep").mkdir(parents=True)
    for name in ("b", "a", "deep/c"):
        nth_farthest_run(inside, name)
    nth_farthest_run(inside, "young", accuracies=())
    (nth_farthest_run(inside, "begun") / "log.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    folders = (tmp_path / "empty", inside, inside / "a")
    assert plot_runs.main([*map(str, folders), "--outf", str(tmp_path / "curves.png")]) == 0
    said = capsys.readouterr()
    assert "3 runs" in said.out
    told = [Path(line.removeprefix("left out: ").split(": ")[0]).name for line in said.err.splitlines()]
    assert told == ["empty", "begun", "young"]
    again = nth_farthest_run(tmp_path / "other", "a")
    assert [run.label for run in plot_runs.read_runs([inside, again])] == ["runs/a", "b", "c", "other/a"]


def test_attention_is_drawn(tmp_path):
    weights = np.random.default_rng(1).dirichlet(np.ones(5), size=(3, 2, 5))
    plot_runs.draw_attention(weights, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(PNG)


def test_missing_matplotlib_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(console.UserError, match="need matplotlib.*pip install -r requirements-extra.txt"):
        plot_runs.draw_runs([nth_farthest_run(tmp_path, "run")], tmp_path / "curves.png")


def test_mistakes_are_told(tmp_path):
    out = tmp_path / "curves.png"

    def message(*folders, out=out):
        with pytest.raises(console.UserError) as caught:
            plot_runs.draw_runs(folders, out)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    good = nth_farthest_run(tmp_path, "good")
    assert "not there" in message(tmp_path / "absent")
    assert "no run to draw" in message(tmp_path / "empty")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "log.jsonl").touch()
    assert "no args.json" in message(tmp_path / "half")
    assert "no plot" in message(run_folder(tmp_path, "other", "train_something", []))
    assert "separately" in message(good, language_run(tmp_path, "lm", "train_rmc"))
    assert "nothing to plot yet" in message(nth_farthest_run(tmp_path, "young", accuracies=()))
    assert "cannot write" in message(good, out=tmp_path / "no" / "such" / "folder.png")
    (good / "args.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in message(good)
    assert not out.exists()

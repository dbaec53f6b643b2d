"""plot_runs.py: the curves are those of the logs, with the right names and axes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from training.console import UserError

import plot_runs
import pytest
import run_files

TOOL = Path(plot_runs.__file__)


def make_run(root, name, script, events, **arguments):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script, "arguments": arguments}))
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def nth_farthest_run(root, name, K=8, D=16, accuracies=(0.125, 0.25, 0.75), **arguments):
    events = [
        {"event": "train", "step": 100 * i, "seconds": 30.0 * i, "test_accuracy": accuracy, "accuracy": 0.5}
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    more = {"num_vectors": K, "num_dims": D, "model": "rmc", **arguments}
    return make_run(root, name, "train_nth_farthest", events, **more)


def language_run(root, name, script, perplexities=(300.0, 200.0, 150.0), average=(None,) * 3, **arguments):
    events = [
        {"event": "valid", "epoch": i, "step": 9 * i, "seconds": 120.0 * i, "ppl": p, "train_ppl": 7.0 + i}
        | {"average_ppl": a}
        for i, (p, a) in enumerate(zip(perplexities, average, strict=False), start=1)
    ]
    return make_run(root, name, script, events, **arguments)


def draw(paths, against, training=False):
    """Return for each panel its curves with points, by color, and the legend."""
    groups = run_files.group(run_files.read_runs(paths))
    figure = plot_runs.draw(groups, plot_runs.name_groups(groups), against, training)
    panels = []
    for axis in figure.get_axes():
        lines = [line for line in axis.get_lines() if len(line.get_xdata()) and line.get_linestyle() != ":"]
        panels.append([(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in lines])
    return panels, [text.get_text() for text in figure.get_axes()[0].get_legend().get_texts()]


def test_nth_farthest_curves_are_the_logs(tmp_path):
    paths = [
        nth_farthest_run(tmp_path, "first", seed=1),
        nth_farthest_run(tmp_path, "second", seed=2, accuracies=(0.25,)),
        nth_farthest_run(tmp_path, "copy", seed=2, accuracies=(0.5,)),
        nth_farthest_run(tmp_path, "third", model="lstm", accuracies=(0.25, 0.5)),
    ]
    panels, legend = draw(paths, ["steps", "wall"])
    assert panels[0] == [
        ("C0", [100, 200, 300], [12.5, 25, 75]),
        ("C0", [100], [25]),
        ("C0", [100], [50]),
        ("C1", [100, 200], [25, 50]),
    ]
    assert panels[1][0] == ("C0", [0.5, 1.0, 1.5], [12.5, 25, 75])
    assert legend == ["RMC, 2 seeds", "LSTM"]


def test_language_model_curves_are_the_logs(tmp_path):
    paths = [
        language_run(tmp_path, "_rmc$a", "train_rmc", lr=0.1),
        language_run(tmp_path, "b", "train_rmc", (90.0, None, 70.0), (95.0, None, 65.0), lr=0.2),
        language_run(tmp_path, "any", "train_rnn", (80.0,), model="LSTM"),
    ]
    panels, legend = draw(paths, ["epochs", "wall"], training=True)
    assert panels[0] == [
        ("C0", [1, 2, 3], [300, 200, 150]),
        ("C0", [1, 2, 3], [8, 9, 10]),
        ("C1", [1, 3], [90, 65]),  # a loss that was not finite is null in the log
        ("C1", [1, 2, 3], [8, 9, 10]),
        ("C2", [1], [80]),
        ("C2", [1], [8]),
    ]
    assert panels[1][2] == ("C1", [2, 6], [90, 65])
    assert legend == ["_rmc$a", "b", "LSTM", "training"]


def test_nth_farthest_has_lines_to_compare_with(tmp_path):
    full, small = (
        run_files.read_run_folder(nth_farthest_run(tmp_path, name, K=K, D=D))
        for name, K, D in (("full", 8, 16), ("small", 3, 1))
    )
    paper = [(12.5, "chance 12.5 %"), (25, "plateau 25 %"), (91, "RMC of the paper 91 %")]
    assert plot_runs.reference_lines([full]) == paper
    assert [name for _, name in plot_runs.reference_lines([small])] == ["chance 33.3 %", "plateau 66.7 %"]
    small.record["script"] = "train_learning_to_execute"
    assert plot_runs.reference_lines([small]) == []


def test_the_command_writes_a_png_whatever_the_names_and_the_notebook(tmp_path):
    names = ["_a$b$", "$x_$", "a`|b", "\\frac{"]
    for seed, name in enumerate(names):
        nth_farthest_run(tmp_path / "runs", name, lr=seed)
    nth_farthest_run(tmp_path / "runs", "young", accuracies=())
    command = [sys.executable, TOOL, tmp_path / "runs", "--outf", tmp_path / "out.png"]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "curves of 4 runs" in ran.stdout and "young: its log has no finished epoch" in ran.stderr


def test_mistakes_are_answered(tmp_path, monkeypatch):
    good, words = nth_farthest_run(tmp_path, "good"), language_run(tmp_path, "lm", "train_rmc")
    for paths, out, more, message in [
        ([good, words], "x.png", {}, "cannot share a plot"),
        ([good], "x.png", {"against": ["epochs"]}, "no epochs"),
        ([good], "x.png", {"labels": ["a", "b"]}, "requires 1 texts, got 2. The groups are: good"),
    ]:
        with pytest.raises(UserError, match=message):
            plot_runs.draw_runs(paths, tmp_path / out, **more)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="require matplotlib.*pip install -r requirements-extra.txt"):
        plot_runs.draw_runs([good], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()

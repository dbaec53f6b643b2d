"""plot_runs.py: the curves are those of the logs, with the right names and axes."""

import json
import sys

from training.console import UserError

import plot_runs
import pytest
import run_files


def make_run(root, name, script, events, **arguments):
    folder = root / name
    folder.mkdir(parents=True)
    record = {"script": script, "arguments": arguments, "corpus": {"train": 2_000_000}}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def nth_farthest_run(root, name, K=8, D=16, accuracies=(0.13, 0.25, 0.6), **arguments):
    events = [
        {"event": "train", "step": 100 * i, "seconds": 30.0 * i, "loss": 2.0 / i, "test_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    more = {"num_vectors": K, "num_dims": D, "model": "rmc", **arguments}
    return make_run(root, name, "train_nth_farthest", events, **more)


def language_run(root, name, script, perplexities=(300.0, 200.0, 150.0), **arguments):
    events = [
        {"event": "valid", "epoch": i, "step": i, "seconds": 120.0 * i, "ppl": p, "train_ppl": p and p / 2}
        for i, p in enumerate(perplexities, start=1)
    ]
    return make_run(root, name, script, events, **arguments)


def draw(draw, paths, against):
    """Return for each panel its curves with points, by colour and line style."""
    plt = plot_runs.import_pyplot()
    figure = draw(plt, run_files.read_runs(paths), against)
    panels = []
    for axis in figure.get_axes():
        lines = [line for line in axis.get_lines() if len(line.get_xdata()) and line.get_linestyle() != ":"]
        panels.append([(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in lines])
    legend = [text.get_text() for text in figure.get_axes()[0].get_legend().get_texts()]
    plt.close(figure)
    return panels, legend


def test_nth_farthest_curves_are_the_logs(tmp_path):
    paths = [
        nth_farthest_run(tmp_path, "first", seed=1),
        nth_farthest_run(tmp_path, "second", seed=2, accuracies=(0.2,)),
        nth_farthest_run(tmp_path, "third", model="lstm", accuracies=(0.2, 0.24)),
    ]
    panels, legend = draw(plot_runs.draw_nth_farthest, paths, ["steps", "wall"])
    assert panels[0] == [
        ("C0", [100, 200, 300], [0.13, 0.25, 0.6]),
        ("C0", [100], [0.2]),
        ("C1", [100, 200], [0.2, 0.24]),
    ]
    assert panels[1][0][1:] == ([0.5, 1.0, 1.5], [0.13, 0.25, 0.6])
    assert panels[2][0][1:] == ([100, 200, 300], [2.0, 1.0, 2 / 3])
    assert panels[3][2][1:] == ([0.5, 1.0], [2.0, 1.0])
    assert legend == ["RMC (2 seeds)", "LSTM"]


def test_language_model_curves_are_the_logs(tmp_path):
    paths = [
        language_run(tmp_path, "rmc-a", "train_rmc", lr=0.1),
        language_run(tmp_path, "rmc-b", "train_rmc", (90.0, None, 70.0), lr=0.2),
        language_run(tmp_path, "any", "train_rnn", (80.0,), model="LSTM"),
    ]
    panels, legend = draw(plot_runs.draw_language_models, paths, ["epochs", "tokens", "wall"])
    assert panels[0][:2] == [
        ("C0", [1, 2, 3], [300.0, 200.0, 150.0]),
        ("C0", [1, 2, 3], [150.0, 100.0, 75.0]),
    ]
    assert panels[0][2] == ("C1", [1, 3], [90.0, 70.0])  # a loss that was not finite is null in the log
    assert panels[1][0][1] == [2.0, 4.0, 6.0] and panels[2][0][1] == [2.0, 4.0, 6.0]
    assert panels[1][4] == ("C2", [2.0], [80.0])
    assert legend == ["rmc-a", "rmc-b", "LSTM", "validation", "validation, averaged weights", "training"]


@pytest.mark.parametrize(
    ("K", "D", "expected"),
    [
        (8, 16, {"chance, 1/8": 1 / 8, "chance + nearest, 2/8": 2 / 8, "the paper's RMC, 91 %": 0.91}),
        (3, 1, {"chance, 1/3": 1 / 3, "chance + nearest, 2/3": 2 / 3}),
    ],
)
def test_nth_farthest_has_lines_to_compare_with(tmp_path, K, D, expected):
    run = run_files.read_run_folder(nth_farthest_run(tmp_path, "run", K=K, D=D))
    lines = {name: value for value, name in plot_runs.reference_lines([run])}
    assert lines == pytest.approx(expected)


def test_the_command_writes_a_png(tmp_path, capsys):
    for name in ("a", "b"):
        nth_farthest_run(tmp_path / "runs", name, seed=name)
    nth_farthest_run(tmp_path / "runs", "young", accuracies=())
    out = tmp_path / "curves.png"
    plot_runs.main([str(tmp_path / "runs"), "--outf", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    said = capsys.readouterr()
    assert "curves of 2 runs" in said.out and "young: its log has no results yet" in said.err
    plot_runs.main(
        [str(language_run(tmp_path, "lm", "train_rmc")), "--against", "tokens", "--outf", str(out)]
    )
    assert "curves of 1 run:" in capsys.readouterr().out


def test_mistakes_are_answered(tmp_path, monkeypatch):
    good, words = nth_farthest_run(tmp_path, "good"), language_run(tmp_path, "lm", "train_rmc")
    other = make_run(tmp_path, "other", "train_something", [])
    for paths, out, against, message in [
        ([other], "x.png", None, "a run of train_something.py"),
        ([good, words], "x.png", None, "cannot share a plot"),
        ([good], "no/such/folder.png", None, "cannot write"),
        ([good], "x.png", ["epochs"], "no epochs or tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            plot_runs.draw_runs(paths, tmp_path / out, against)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(UserError, match="need matplotlib.*pip install -r requirements-extra.txt"):
        plot_runs.draw_runs([good], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()

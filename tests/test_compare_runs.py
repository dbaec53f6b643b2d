"""compare_runs.py on the logs in results/ and on logs made by hand."""

import json
import statistics
from pathlib import Path

import compare_runs
import pytest

from training.console import UserError

RESULTS = Path(__file__).resolve().parent.parent / "results"


def cells(text):
    """The table's rows as dicts."""
    lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
    assert lines[0] == list(compare_runs.HEADER)
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def make_run(folder, seed=1, test=19.0, script="train_rmc", average=None, record=(), gpus=(), **arguments):
    valid = (30.0, 20.0, 25.0)
    folder.mkdir(parents=True)
    arguments = {"lr": 0.1, "seed": seed, "name": folder.name, "threads": seed, "cuda": False, **arguments}
    record = {
        "script": script,
        "arguments": arguments,
        "parameters": 12345,
        "command_line": ["--lr", "0.1", "--seed", str(seed), "--name", folder.name, "--dropout-words=0.1"],
        "environment": {"torch": "2.13.0", "threads": 1, "gpus": list(gpus)},
        **dict(record),
    }
    (folder / "args.json").write_text(json.dumps(record))
    events = [{"event": "valid", "epoch": i + 1, "step": i, "ppl": ppl, "seconds": 60.0 * (i + 1)}
              for i, ppl in enumerate(valid)]
    if average is not None:
        events[-1]["average_ppl"] = average
    if test is not None:
        events.append({"event": "test", "epoch": len(valid), "step": 9, "ppl": test, "seconds": 200.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_the_logs_in_results_give_the_numbers_of_the_readme(capsys, tmp_path):
    names = ("tiny/rmc", "tiny/lstm", "wikitext2_cpu/rmc", "tiny/lstm-30-epochs")
    folders = [RESULTS / name for name in names]
    picture = tmp_path / "curves.png"
    assert compare_runs.main([*map(str, folders), "--outf", str(picture)]) == 0
    found = cells(capsys.readouterr().out)
    assert [row["model"] for row in found] == ["RMC", "LSTM", "RMC", "LSTM"]
    assert [row["parameters"] for row in found] == ["198,521", "199,471", "12,426,853", "199,471"]
    assert [row["valid"] for row in found] == ["1.67", "2.06", "277.99", "1.74"]
    assert [row["test"] for row in found] == ["1.67", "2.06", "259.59", "1.75"]
    assert found[3]["epochs"].startswith("30 ") and found[2]["epochs"] == "1 (best 1)"
    assert found[0]["command"] == "`python train_rmc.py --recipe tiny`"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_seeds_of_the_same_arguments_are_one_row_with_mean_and_deviation(tmp_path, capsys):
    tests = [19.0, 20.5, 24.0]
    # An older run knows nothing of flags that newer ones were not given.
    flags = [{}, {"embedding_lr": None, "tar": 0.0}, {"dropout_candidate": 0.0, "average_decay": 0.999}]
    folders = [make_run(tmp_path / f"run{seed}", seed, test=test, **more)
               for seed, (test, more) in enumerate(zip(tests, flags, strict=True), start=1)]
    other = make_run(tmp_path / "other", lr=0.2, average=18.5, embedding_lr=0.1)
    unfinished = make_run(tmp_path / "unfinished", lr=0.3, test=None)
    lstm = make_run(tmp_path / "lstm", script="train_rnn", model="LSTM")
    compare_runs.main([str(folder) for folder in (*folders, other, unfinished, lstm)])
    rows = cells(capsys.readouterr().out)
    assert len(rows) == 4
    assert rows[0]["run"] == "run1, run2, run3" and rows[0]["seeds"] == "1 2 3"
    assert rows[0]["test"] == f"{sum(tests) / 3:.2f} ± {statistics.stdev(tests):.2f}" == "21.17 ± 2.57"
    assert rows[0]["valid"] == "20.00 ± 0.00" and rows[0]["epochs"] == "3 (best 2)"
    assert rows[0]["minutes"] == "3.3" and rows[0]["hardware"] == "CPU, 1 thread(s), torch 2.13.0"
    assert rows[0]["command"] == "`python train_rmc.py --lr 0.1 --dropout-words=0.1`"
    assert rows[1]["valid"] == "18.50" and rows[1]["epochs"] == "3 (best 3)"  # the average's
    assert rows[2]["test"] == "-" and rows[2]["valid"] == "20.00"
    assert rows[3]["model"] == "LSTM"


def test_a_seed_counts_once_however_often_it_was_run(tmp_path, capsys):
    """The first tested run stands for its seed; the others are named and in no number."""
    given = [("a", 1, None), ("b", 2, 20.0), ("c", 3, 24.0), ("d", 1, 19.0), ("e", 1, 99.0), ("f", 2, 99.0)]
    folders = [make_run(tmp_path / name, seed, test) for name, seed, test in given]
    compare_runs.main([str(folder) for folder in folders])
    (row,) = cells(capsys.readouterr().out)
    assert row["test"] == f"21.00 ± {statistics.stdev([19, 20, 24]):.2f}"
    assert row["run"] == "d, b, c"
    assert row["seeds"] == "1 2 3; left out: a (seed 1 again), e (seed 1 again), f (seed 2 again)"
    compare_runs.main([str(folder) for folder in folders[3:5]])
    (row,) = cells(capsys.readouterr().out)
    assert row["test"] == "19.00" and row["seeds"] == "1; left out: e (seed 1 again)"


@pytest.mark.parametrize("dropouts, apart", [
    ({"dropout": 0.5, "dropout_input": None, "dropout_words": 0.0}, True),
    ({"dropout": 0.5}, True),
    ({"dropout": 0.0, "dropout_input": None, "dropout_words": 0.1}, True),
    ({"dropout": 0.5, "dropout_input": 0.0, "dropout_words": 0.0}, False),
    ({"dropout": 0.0, "dropout_input": None, "dropout_words": 0.0}, False),
])
def test_what_draws_other_masks_is_another_row(tmp_path, capsys, dropouts, apart):
    gpu = {"cuda": True, **dropouts}
    one, two = ({"processes": n, "launcher": launcher}
                for n, launcher in ((1, "python"), (2, "torchrun --nproc-per-node=2")))
    folders = [
        make_run(tmp_path / "one", 1, **dropouts),
        make_run(tmp_path / "two", 2, record=two, **dropouts),
        make_run(tmp_path / "pieces", 3, accumulate=2, **dropouts),
        make_run(tmp_path / "replicas", 4, gpus=["H100"] * 3, **gpu),
        make_run(tmp_path / "same", 5, accumulate=1, record=one, **dropouts),
    ]
    compare_runs.main([str(folder) for folder in folders])
    rows = cells(capsys.readouterr().out)
    if not apart:
        assert [row["run"] for row in rows] == ["one, two, pieces, replicas, same"]
        return
    assert [row["run"] for row in rows] == ["one, same", "two", "pieces", "replicas"]
    assert rows[1]["command"] == "`torchrun --nproc-per-node=2 train_rmc.py --lr 0.1 --dropout-words=0.1`"
    assert rows[1]["hardware"] == "CPU, 1 thread(s), 2 processes, torch 2.13.0"
    assert rows[3]["hardware"] == "3 x H100, torch 2.13.0"


def test_runs_that_differ_in_no_number_are_one_row_and_what_differs_is_told(tmp_path, capsys):
    """A recipe is the flags that it sets, a run older than a flag went without it; devices are all named."""
    flags = {"schedule": "plateau", "warmup": 0, "project": False, "recipe": None}
    young = make_run(tmp_path / "young", 1, script="train_rnn", **flags)
    old = make_run(tmp_path / "old", 2, script="train_rnn", recipe="tiny", gpus=["H100"], cuda=True)
    compare_runs.main([str(young), str(old)])
    (row,) = cells(capsys.readouterr().out)
    assert row["run"] == "young, old" and row["valid"] == "20.00 ± 0.00"
    assert row["hardware"] == "CPU, 1 thread(s), torch 2.13.0; H100, torch 2.13.0"
    log = old / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")  # one epoch: not to be averaged with three
    compare_runs.main([str(young), str(old)])
    (row,) = cells(capsys.readouterr().out)
    assert (row["valid"], row["test"], row["epochs"]) == ("-", "-", "1 to 3 (best 1 to 2)")


@pytest.mark.parametrize(("begun", "resumed", "shown"), [
    (["--epochs", "40", "--lr", "0.1"], [["--resume", "x", "--epochs", "3"]], "--lr 0.1 --epochs 3"),
    (["--epochs=40"], [["--resume", "x"]], "--epochs 3"),
    (["--recipe", "tiny"], [["--resume", "x", "--epochs", "3"]], "--recipe tiny --epochs 3"),
    (["--recipe", "tiny"], [], "--recipe tiny"),
])
def test_the_command_is_of_the_epochs_that_the_run_ended_with(tmp_path, capsys, begun, resumed, shown):
    record = {"command_line": begun, "resumed": [{"command_line": words} for words in resumed]}
    compare_runs.main([str(make_run(tmp_path / "run", record=record, epochs=3))])
    (row,) = cells(capsys.readouterr().out)
    assert row["command"] == f"`python train_rmc.py {shown}`"


def test_folders_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        compare_runs.read_result(tmp_path / "nothing")
    nth = make_run(tmp_path / "nth", script="train_nth_farthest")
    with pytest.raises(UserError, match="has no perplexity"):
        compare_runs.read_result(nth)
    (tmp_path / "empty").mkdir()
    for folders, message in [
        ([nth], "no language-model run to compare"),
        ([tmp_path / "empty"], "no language-model run to compare"),
        ([make_run(tmp_path / "good"), tmp_path / "nothing"], "no run folder"),
    ]:
        with pytest.raises(UserError, match=message):
            compare_runs.main([str(folder) for folder in folders])


def test_a_folder_stands_for_the_runs_in_it_and_what_is_left_out_is_told(tmp_path, capsys):
    inside = tmp_path / "runs"
    for number, name in enumerate(("b", "a", "plan/c", "plan/deep/d")):
        make_run(inside / name, lr=number)
    make_run(inside / "nth", script="train_nth_farthest")
    (make_run(inside / "young") / "log.jsonl").write_text('{"event": "train", "step": 1}\n')
    (make_run(inside / "broken") / "args.json").write_text("{")
    (make_run(inside / "begun") / "log.jsonl").unlink()
    (inside / "output").mkdir()
    (inside / "summary.md").write_text("no folder")
    named = make_run(tmp_path / "named", script="train_nth_farthest")
    young = make_run(tmp_path / "also young", test=None, lr=9)
    (young / "log.jsonl").write_text("")
    picture = tmp_path / "curves.png"
    folders = (inside, inside / "a", named, young)
    assert compare_runs.main([*map(str, folders), "--outf", str(picture)]) == 0
    said = capsys.readouterr()
    assert [row["run"] for row in cells(said.out)] == ["a", "b", "c", "also young"]
    told = [line.removeprefix("left out: ").split(": ", 1) for line in said.err.splitlines()]
    assert [Path(folder).name for folder, _ in told] == ["begun", "broken", "nth", "young", "named"]
    reasons = ("log.jsonl", "cannot be read", "has no perplexity", "no epoch", "has no perplexity")
    for (_, reason), words in zip(told, reasons, strict=True):
        assert words in reason
    assert picture.is_file()
    compare_runs.main([str(inside / "a"), str(make_run(tmp_path / "other" / "a", lr=7))])
    assert [row["run"] for row in cells(capsys.readouterr().out)] == ["runs/a", "other/a"]

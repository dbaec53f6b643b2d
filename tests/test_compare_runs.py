"""compare_runs.py on the logs in results/ and on logs made by hand."""

import json
import statistics
from pathlib import Path

import compare_runs

RESULTS = Path(__file__).resolve().parent.parent / "results"


def table(capsys, *paths):
    """Run the tool; return the rows of all its tables as dicts."""
    compare_runs.main([str(path) for path in paths])
    rows = []
    for text in capsys.readouterr().out.strip().split("\n\n"):
        lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines()]
        rows += [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return rows


def make_run(folder, seed=1, test=19.0, valid=(30.0, 20.0, 25.0), average=None, **more):
    gpus = more.pop("gpus", [])
    command_line = ["--seed", str(seed), "--name", "a|b"]
    record = {"script": "train_rmc", "parameters": 12345, "command_line": command_line}
    record |= {"environment": {"cpu": "Some CPU", "torch": "2.13.0", "threads": 1, "gpus": gpus}}
    for name in {"processes", "launcher", "resumed", "command_line"} & more.keys():
        record[name] = more.pop(name)
    record["arguments"] = {"lr": 0.1, "seed": seed, "name": folder.name, "cuda": bool(gpus), **more}
    events = [
        {"event": "valid", "epoch": i, "step": 9 * i, "ppl": ppl, "average_ppl": average, "seconds": 60.0 * i}
        for i, ppl in enumerate(valid, start=1)
    ]
    if test is not None:
        events.append({"event": "test", "epoch": 3, "step": 27, "ppl": test, "seconds": 200.0})
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_committed_logs_give_the_published_numbers(capsys):
    tiny, wikitext2 = RESULTS / "tiny", RESULTS / "wikitext2_cpu"
    rows = table(
        capsys, tiny, wikitext2 / "full_softmax" / "*-lr-[14]e-3",
        wikitext2 / "adaptive_softmax" / "rmc",
    )  # fmt: skip
    assert [row["model"] for row in rows] == ["LSTM", "LSTM", "RMC", "RMC", "LSTM", "RMC"]
    assert [row["parameters"] for row in rows[1:4]] == ["199,471", "198,521", "10,753,158"]
    valid = ["2.01 ± 0.09", "1.74", "1.69 ± 0.01", "94.73", "111.94", "277.99"]
    assert [row["valid"] for row in rows] == valid
    test = ["2.02 ± 0.08", "1.75", "1.70 ± 0.02", "89.83", "104.82", "259.59"]
    assert [row["test"] for row in rows] == test
    assert rows[1]["epochs"] == "30 (best 30)" and rows[3]["minutes"] == "261.3"
    assert rows[1]["command"] == "`python train_rnn.py --recipe tiny --epochs 30 --name tiny-lstm-30`"


def test_committed_pairs_give_the_published_numbers(capsys):
    study = RESULTS / "wikitext2_pair" / "runs"
    main = table(capsys, study / "constant-*")
    assert [row["test"] for row in main] == ["88.31 ± 0.84", "90.30 ± 0.04"]
    assert [row["valid"] for row in main] == ["93.72 ± 0.99", "95.00 ± 0.28"]
    rows = table(capsys, study / "pair-*", study / "seeds-*")
    assert [row["test"] for row in rows] == ["112.80", "106.89", "147.36 ± 0.45", "143.41 ± 0.66"]
    assert [row["valid"] for row in rows] == ["119.72", "113.37", "157.67 ± 1.02", "153.84 ± 1.01"]
    assert [row["seeds"] for row in main + rows] == ["2 3", "2 3", "1", "1", "1 2 3", "1 2 3"]


def test_committed_nth_farthest_runs_give_the_published_numbers(capsys):
    study = RESULTS / "nth_farthest" / "small" / "runs"
    rmc, lstm, unscaled = table(capsys, study / "rmc-seed*", study / "lstm-seed1", study / "x1-m1-seed*")
    assert rmc["model"] == "RMC" and rmc["parameters"] == "63,811" and rmc["seeds"] == "1 2 3"
    assert rmc["accuracy %"] == f"{statistics.mean((94.83, 92.60, 94.73)):.1f} ± 1.3"
    assert rmc["steps to leave the plateau"] == "700 / 1,500 / 700"
    assert rmc["steps to 90 %"] == "1,100 / 1,800 / 1,100" and rmc["steps"] == "2,000"
    assert (lstm["accuracy %"], lstm["steps to leave the plateau"]) == ("66.7", "-")
    assert unscaled["steps to leave the plateau"] == "- / 1,200" and unscaled["steps"] == "2,000 / 1,800"


def test_committed_runs_with_four_points_give_the_published_numbers(capsys):
    rmc, double, lstm = table(
        capsys,
        *(RESULTS / "nth_farthest" / "four" / f"{name}-1024-*" for name in ("original", "double", "lstm")),
    )
    assert [row["accuracy %"] for row in (rmc, double, lstm)] == ["90.1 ± 0.5", "90.3 ± 0.5", "50.4 ± 0.1"]
    assert rmc["steps to leave the plateau"] == "1,800 / 2,000 / 2,200"
    assert double["steps to 90 %"] == "11,000 / 12,600 / 16,400" and lstm["steps to 90 %"] == "- / - / -"


def test_seeds_share_a_row_with_mean_and_deviation(tmp_path, capsys):
    tests = [19.0, 20.5, 24.0]
    flags = [{}, {"warmup": 0, "tar": 0.0}, {"recipe": "tiny"}]  # older runs: fewer flags, former flags
    folders = [
        make_run(tmp_path / f"run{seed}", seed, test=test, **more)
        for seed, (test, more) in enumerate(zip(tests, flags, strict=True), start=1)
    ]
    other = make_run(tmp_path / "other", lr=0.2, average=18.5)
    untested = make_run(tmp_path / "untested", lr=0.3, test=None)
    rows = table(capsys, *folders, other, untested)
    assert len(rows) == 3
    assert rows[0]["run"] == "`run1`, `run2`, `run3`" and rows[0]["seeds"] == "1 2 3"
    assert rows[0]["test"] == f"{sum(tests) / 3:.2f} ± {statistics.stdev(tests):.2f}" == "21.17 ± 2.57"
    assert rows[0]["valid"] == "20.00 ± 0.00" and rows[0]["epochs"] == "3 (best 2)"
    assert rows[0]["minutes"] == "3.3 ± 0.0" and rows[0]["hardware"] == "Some CPU, 1 thread(s), torch 2.13.0"
    assert rows[1]["valid"] == "18.50"  # of the averaged weights
    assert rows[2]["test"] == "-" and rows[2]["valid"] == "20.00"


def test_runs_that_draw_other_dropout_masks_have_their_own_row(tmp_path, capsys):
    rows = table(
        capsys,
        make_run(tmp_path / "one", 1),
        make_run(tmp_path / "two", 2, processes=2, launcher="torchrun --nproc-per-node=2"),
        make_run(tmp_path / "pieces", 3, accumulate=2),
        make_run(tmp_path / "gpus", 4, gpus=["H100"] * 3),
        make_run(tmp_path / "same", None, processes=1, init_scale=1.0),
    )
    assert [row["run"] for row in rows] == ["`one`, `same`", "`two`", "`pieces`", "`gpus`"]
    assert rows[0]["seeds"] == "1 None" and rows[0]["command"].endswith("(seed 1)")
    assert rows[1]["command"].startswith("`torchrun --nproc-per-node=2 train_rmc.py --seed 2")
    assert rows[1]["hardware"] == "Some CPU, 1 thread(s), 2 processes, torch 2.13.0"
    assert rows[3]["hardware"] == "3 x H100, torch 2.13.0"


def test_the_command_is_the_one_that_ran_with_its_resumptions(tmp_path, capsys):
    resumed = [{"command_line": ["--resume", "runs/a b", "--epochs", "3"]}]
    one = make_run(tmp_path / "one", 4, command_line=["--epochs", "40", "--seed", "4"], resumed=resumed)
    two = make_run(tmp_path / "two", 5)
    (row,) = table(capsys, one, two)
    first = "`python train_rmc.py --epochs 40 --seed 4`"
    assert row["command"] == f"{first}, then `python train_rmc.py --resume 'runs/a b' --epochs 3` (seed 4)"
    (row,) = table(capsys, two)
    assert row["command"] == "`python train_rmc.py --seed 5 --name 'a\\|b'`"


def test_every_training_script_has_a_table_of_its_own(tmp_path, capsys):
    words, other = make_run(tmp_path / "words"), make_run(tmp_path / "other")
    record = json.loads((other / "args.json").read_text()) | {"script": "train_learning_to_execute"}
    (other / "args.json").write_text(json.dumps(record))
    events = [
        {"event": "train", "step": 300, "test_accuracy": 0.9},
        {"event": "final", "step": 300, "accuracy": 0.75},
    ]
    (other / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    first, second = table(capsys, words, other)
    assert first["test"] == "19.00" and "accuracy %" not in first
    assert (second["accuracy %"], second["steps to 90 %"], second["steps"]) == ("75.0", "300", "300")

"""Reading runs: run folders, folders with runs, study files; packing them."""

import json
from pathlib import Path

from training.console import UserError

import pack_runs
import pytest
import run_files

RESULTS = Path(__file__).resolve().parent.parent / "results"
EVENTS = [
    {"event": "train", "step": 10, "loss": 0.1 + 0.2, "note": "two\u2028lines"},
    {"event": "valid", "epoch": 1, "step": 10, "ppl": 3.0, "average_ppl": None},
    {"event": "train", "step": 20, "loss": 2.0},
    {"event": "resume", "step": 10},
    {"event": "train", "step": 20, "loss": 1.5},
]


def make_run(folder, script="train_rmc", **arguments):
    folder.mkdir(parents=True)
    record = {"script": script, "arguments": {"lr": 0.1, **arguments}, "command_line": ["--name", "läuft"]}
    (folder / "args.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    log = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in EVENTS)
    (folder / "log.jsonl").write_text(log + '{"event": "tra', encoding="utf-8")  # as a kill leaves it
    return folder


def names(paths):
    return [run.name for run in run_files.read_runs(paths)]


def test_a_packed_run_has_all_arguments_and_events_and_reads_like_its_folder(tmp_path):
    folders = [make_run(tmp_path / "b", seed=2), make_run(tmp_path / "a", "train_rnn", seed=3)]
    study = tmp_path / "study.jsonl"
    pack_runs.main([*map(str, folders), "--outf", str(study)])
    lines = [json.loads(line) for line in study.read_text(encoding="utf-8").strip().split("\n")]
    for line, folder in zip(lines, folders, strict=True):
        assert line["args"] == json.loads((folder / "args.json").read_text(encoding="utf-8"))
        assert line["log"] == EVENTS
    for packed, folder in zip(run_files.read_study(study), folders, strict=True):
        unpacked = run_files.read_run_folder(folder)
        assert (packed.name, packed.record) == (unpacked.name, unpacked.record)
        assert packed.events == unpacked.events
        assert [e["loss"] for e in packed.events if e["event"] == "train"] == [0.1 + 0.2, 1.5]


def test_a_folder_means_the_runs_and_studies_in_it(tmp_path, capsys):
    root = tmp_path / "runs"
    for name in ("b", "a", "deep/er/c"):
        make_run(root / name)
    pack_runs.main([str(make_run(tmp_path / "packed")), "--outf", str(root / "study.jsonl")])
    (root / "other.jsonl").write_text('{"flags": "--lr 1"}\n')
    (make_run(root / "begun") / "log.jsonl").write_text('{"event": "train", "step": 10}\n')
    assert names([root, root / "a"]) == ["a", "b", "c", "packed"]
    assert "begun: its log has no finished epoch" in capsys.readouterr().err


def test_a_run_of_a_study_can_be_named_with_its_study(tmp_path):
    folders = [make_run(tmp_path / "runs" / name) for name in ("a-1", "a-2", "b")]
    pack_runs.main([*map(str, folders), "--outf", str(tmp_path / "study.jsonl")])
    assert names([tmp_path / "study" / "b"]) == ["b"]
    assert names([tmp_path / "study" / "a-*"]) == ["a-1", "a-2"]
    assert names([tmp_path / "study.jsonl", tmp_path / "runs" / "b"]) == ["a-1", "a-2", "study/b", "runs/b"]


def test_paths_that_cannot_be_read_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"name": "x"}\n')
    (make_run(tmp_path / "half") / "args.json").unlink()
    for path, message in [
        (tmp_path / "absent", "absent does not exist"),
        (Path("absent"), "absent does not exist"),  # a path of one part
        (tmp_path / "empty", "no run with results found"),
        (tmp_path / "half", "args.json cannot be read .FileNotFound"),
        (odd, "line 1 is not a run .KeyError"),
    ]:
        with pytest.raises(UserError, match=message):
            names([path])


def test_all_committed_runs_can_be_read():
    studies = [path for path in RESULTS.rglob("*.jsonl") if run_files.is_study(path)]
    assert sum(len(run_files.read_study(path)) for path in studies) >= 141
    assert len({path.parent for path in RESULTS.rglob("args.json")}) == 3

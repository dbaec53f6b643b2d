"""The plan of the WikiText-2 runs: its commands fit the scripts; it stops, goes on, notes failures."""

import collections
import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import train_rmc
import train_rnn
from training import console, lm_flags

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"rmc": train_rmc, "lstm": train_rnn}

# Stands in for the training scripts: --epochs epochs of 10 ms, counted in a file; its score is its --lr.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
def value(flag, default=None):
    return words[len(words) - 1 - words[::-1].index(flag) + 1] if flag in words else default
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
if value("--evaluate"):
    print("scored as", value("--eval-batch-size"))
    sys.exit(0)
if value("--resume"):
    folder = Path(value("--resume"))
    words = json.loads((folder / "args.json").read_text())
else:
    folder = Path(value("--runs-folder")) / value("--name")
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(words))
    (folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if (folder / "busy").exists():
    print(f"error: {folder} is in training by another process (process 1 on x). Wait for its end.")
    sys.exit(2)
if value("--dropout-weights") == "0":
    print("error: no good")
    sys.exit(2)
done = folder / "last"
for epoch in range(int(done.read_text()) if done.exists() else 0, int(value("--epochs", 2))):
    time.sleep(0.01)
    done.write_text(str(epoch + 1))
    if stop:
        sys.exit(143)
with open(folder / "log.jsonl", "a") as log:
    for event in ("valid", "test"):
        print(json.dumps({"event": event, "ppl": float(value("--lr", 9)), "epoch": epoch}), file=log)
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The module, with scripts beside it that only pretend."""
    spec = importlib.util.spec_from_file_location("run_plan", ROOT / "results" / "wikitext2" / "run_plan.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_plan", module)
    spec.loader.exec_module(module)
    for name in ("train_rmc", "train_rnn"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    (tmp_path / "compare_runs.py").write_text("import sys; print(len(sys.argv) - 1, 'runs')")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    # The test run's own handlers stay.
    module.handlers = {}
    monkeypatch.setattr(module.signal, "signal", module.handlers.__setitem__)
    return module


def test_every_command_fits_its_script_and_the_search_stays_within_its_size(plan):
    trials = plan.search(12, 30)
    flags = {job.model: job.flags[:-2] for job in trials[-2:]}
    jobs = [*plan.original(), *plan.recipe(), *plan.published_table(), *trials]
    jobs += [*plan.best(flags), *plan.ablation(flags)]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        script = SCRIPTS[job.model]
        parser = script.build_parser()
        lm_flags.apply_recipe(parser, job.flags, script.RECIPES)
        args = parser.parse_args(job.flags)
        with torch.device("meta"):
            model = script.build_model(args, 33278, None)
        count = sum(parameter.numel() for parameter in model.parameters())
        if job.name.startswith(("recipe", "search", "best", "ablation")):
            assert 10e6 < count <= 11e6, (job, count)
        if job.name.startswith(("original-lstm", "original-rmc-10.75M")):
            assert 10.7e6 < count < 10.8e6
    per_model = [[job for job in trials if job.model == model] for model in SCRIPTS]
    assert len(per_model[0]) == len(per_model[1]) == 12
    shared = [[job.flags[job.flags.index("--lr") :][:-4] for job in jobs[1:]] for jobs in per_model]
    assert shared[0] == shared[1]  # the same draws for both, but for size and own part


def test_the_plan_takes_the_best_trials_notes_failures_and_does_nothing_twice(plan, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--parallel", "4", "--trials", "3", "--epochs", "1",
            "--stages", "search", "best", "ablation"]
    assert plan.main(argv) == 0
    output = capsys.readouterr().out
    assert "all is finished" in output and "2 failures" in output
    assert sorted(path.name for path in (out / "failed").iterdir()) == [
        "ablation-lstm-no-weights.txt", "ablation-rmc-no-weights.txt"
    ]
    assert "no good" in (out / "failed" / "ablation-rmc-no-weights.txt").read_text()
    best = plan.best_trials(out, plan.search(3, 30))
    lowest = min((job.flags for job in plan.search(3, 30)[2:] if job.model == "rmc"),
                 key=lambda flags: float(flags[flags.index("--lr") + 1]))
    assert best["rmc"] == lowest[:-2]
    assert (out / "best-rmc-seed3" / "evaluation.txt").read_text() == "scored as 1\n"
    assert (out / "summary.md").read_text().endswith("runs\n")
    plan.main(argv)
    assert "training" not in capsys.readouterr().out


def test_a_plan_that_is_stopped_goes_on_where_it_stood(plan, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--parallel", "3", "--epochs", "40", "--stages", "original"]
    soon = ["--minutes", "0.006", "--scoring-minutes", "0"]  # 0.36 s: in the first three runs of 0.4 s
    assert plan.main([*argv, *soon]) == 0
    output = capsys.readouterr().out
    assert "stopped; call again" in output and "no failures" in output
    assert not list(out.glob("*/log.jsonl"))
    assert plan.main(argv) == 0
    assert "all is finished" in capsys.readouterr().out
    assert len(list(out.glob("original-*/evaluation.txt"))) == 9
    # What was done before was not done again: a run writes its two lines once, at its end.
    assert all(len(path.read_text().splitlines()) == 2 for path in out.glob("*/log.jsonl"))
    shutil.rmtree(out)


def test_scoring_has_the_device_to_itself_and_is_not_begun_late(plan, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--parallel", "9", "--epochs", "1", "--stages", "original"]
    with pytest.raises(console.UserError, match="no run could ever be scored"):
        plan.main([*argv, "--minutes", "3"])
    assert plan.main([*argv, "--minutes", "3.0001", "--scoring-minutes", "3"]) == 0
    output = capsys.readouterr().out
    assert output.count("finished") == 9 and "scoring original" not in output and "call again" in output
    assert "no scoring is begun with less than 3 minutes left" in output
    start, at_once = plan.subprocess.Popen, []

    def popen(command, **options):
        running = [process for process in at_once if process.poll() is None]
        assert not running, "two at once"
        at_once.append(start(command, **options))
        return at_once[-1]

    monkeypatch.setattr(plan.subprocess, "Popen", popen)
    monkeypatch.setattr(plan.Plan, "summarise", lambda *_: None)
    assert plan.main(argv) == 0
    assert "all is finished" in capsys.readouterr().out and len(at_once) == 9


@pytest.mark.parametrize("visible, count, expected", [("3, 5,-1,6", 8, {"3": 5, "5": 4}),
                                                      (None, 2, {"0": 5, "1": 4}), (None, 1, {"0": 9})])
def test_each_run_has_one_gpu(plan, tmp_path, monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    out = tmp_path / "out"
    argv = ["--out", str(out), "--parallel", "9", "--epochs", "1", "--stages", "original"]
    assert plan.main([*argv, "--cuda"]) == 0
    assert collections.Counter(path.read_text() for path in out.glob("*/gpus")) == expected


def test_an_ablation_that_changes_nothing_is_left_out(plan):
    shared = "--recipe wikitext2-regularised --dropout-words 0 --dropout-weights 0.2 --ar 0"
    flags = {"rmc": (*shared.split(), "--dropout-candidate", "0.0"),
             "lstm": (*shared.split(), "--dropout-hidden", "0.1")}
    names = {job.name for job in plan.ablation(flags)}
    every = {f"ablation-{model}-{part}"
             for model in flags for part in {**plan.PARTS, **plan.OWN_PARTS[model]}}
    assert every - names == {"ablation-rmc-no-words", "ablation-rmc-no-ar", "ablation-rmc-no-candidate",
                             "ablation-lstm-no-words", "ablation-lstm-no-ar"}
    # By the recipe's own values nothing is 0 but what it does not set.
    recipe = ("--recipe", "wikitext2-regularised")
    assert len(plan.ablation({model: recipe for model in flags})) == len(every)
    one_layer = (*recipe, "--nlayers", "1", "--nhid", "960", "--project")
    assert {f"ablation-lstm-{part}" for part in plan.PARTS} == {
        job.name for job in plan.ablation({"lstm": one_layer})
    }


def test_a_run_in_other_hands_is_left_alone_and_no_failure(plan, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--parallel", "9", "--epochs", "1", "--stages", "original"]
    folder = out / "original-lstm-seed2"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps([]))
    (folder / "busy").touch()
    killed = out / "original-rmc-seed3"  # as it made its folder
    killed.mkdir()
    (killed / ".lock").touch()
    assert plan.main(argv) == 0
    output = capsys.readouterr().out
    assert "busy     original-lstm-seed2" in output and "no failures" in output and "call again" in output
    assert len(list(out.glob("*/log.jsonl"))) == 8 and not (folder / "log.jsonl").exists()
    (folder / "busy").unlink()
    assert plan.main(argv) == 0
    output = capsys.readouterr().out
    assert "all is finished" in output and output.count("training") == 1


def test_one_plan_at_a_time_works_on_a_folder(plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    argv = ["--out", str(out), "--stages", "best"]
    with plan.alone(out), pytest.raises(console.UserError, match="another run_plan.py works on"):
        plan.main(argv)
    assert plan.main(argv) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_a_closed_terminal_stops_the_plan_unless_it_is_told_to_stay(plan, tmp_path, monkeypatch):
    args = plan.build_parser().parse_args(["--out", str(tmp_path)])
    monkeypatch.setattr(plan.signal, "getsignal", lambda number: signal.SIG_DFL)  # under nohup too
    stopped = plan.Plan(args)
    plan.handlers[signal.SIGHUP](signal.SIGHUP, None)
    assert stopped.over
    plan.handlers.clear()
    monkeypatch.setattr(plan.signal, "getsignal", lambda number: signal.SIG_IGN)  # nohup
    plan.Plan(args)
    assert signal.SIGHUP not in plan.handlers


def test_what_a_resumed_run_took_back_does_not_make_it_the_best(plan, tmp_path):
    jobs = [job for job in plan.search(2, 30) if job.model == "rmc"]
    valid, test, back = (lambda step, ppl=9.0, kind=kind: {"event": kind, "step": step, "ppl": ppl}
                         for kind in ("valid", "test", "resume"))
    logs = ([valid(4, 50.0), test(4)], [valid(2, 60.0), valid(4, 40.0), back(2), valid(4, 55.0), test(4)])
    for job, log in zip(jobs, logs, strict=True):
        (tmp_path / job.name).mkdir()
        (tmp_path / job.name / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    assert plan.best_trials(tmp_path, jobs) == {"rmc": jobs[0].flags[:-2]}

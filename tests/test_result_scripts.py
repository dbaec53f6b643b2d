"""Scripts under results/: commands fit the training scripts, finished work is not repeated."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Takes the place of python: notes its arguments and makes the log of a finished run with --lr as perplexity.
FAKE = """#!/usr/bin/env bash
echo "$*" >>{calls}
lr=9
while (($#)); do
    case $1 in --name) name=$2 ;; --runs-folder) out=$2 ;; --lr) lr=$2 ;; esac
    shift
done
[[ -z ${{name:-}} ]] && exit
mkdir "$out/$name" && touch "$out/$name/args.json" "$out/$name/last.pt"
[[ $name = {unfinished} ]] && exit
exec >"$out/$name/log.jsonl"
printf '%s\\n' '{{"event": "train", "step": 70}}' '{{"event": "valid", "ppl": '$lr'}}' '{{"event": "test"}}'
"""


def run(script, tmp_path, *words, unfinished="nothing"):
    """Run a script of results/ with the fake interpreter; return the commands that it gave."""
    calls, python = tmp_path / "calls", tmp_path / "python"
    calls.write_text("")
    python.write_text(FAKE.format(calls=calls, unfinished=unfinished))
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": str(python)}
    answer = subprocess.run(
        [ROOT / "results" / script, *words], env=environment, capture_output=True, text=True, timeout=120
    )
    return answer, [line.split() for line in calls.read_text().splitlines()]


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("wikitext2/run_gpu.sh", 74),
        ("nth_farthest/run_gpu.sh", 4),
        ("nth_farthest/sweep.sh", 76),
        ("nth_farthest/curriculum.sh", 9),
        ("learning_to_execute/run.sh", 12),
        ("recipe_cpu/run.sh", 16),
        ("wikitext2_pair/run.sh", 52),
    ],
)
def test_every_command_fits_its_script_and_finished_runs_are_skipped(script, count, tmp_path):
    answer, calls = run(script, tmp_path)
    assert answer.returncode == 0, answer.stderr
    training = [words for words in calls if words[0].startswith("train_")]
    assert len({words[words.index("--name") + 1] for words in training}) == len(training) == count
    parsers = {
        name: importlib.import_module(name.removesuffix(".py")).build_parser()
        for name in {words[0] for words in training}
    }
    for name, *flags in training:
        parsers[name].parse_args(flags)
    _, again = run(script, tmp_path)
    assert not [words for words in again if words[0].startswith("train_")]


def test_the_best_trials_are_those_with_the_lowest_validation_perplexity(tmp_path):
    _, calls = run("wikitext2/run_gpu.sh", tmp_path, "search", "best")
    best = [words for words in calls if words[0] == "train_rmc.py" and words[-2].startswith("best")]
    assert len(best) == 3 and all("0.001" in words for words in best)


def test_an_unfinished_run_is_resumed_or_without_a_save_started_again(tmp_path):
    run("nth_farthest/run_gpu.sh", tmp_path, unfinished="rmc-seed2")
    _, calls = run("nth_farthest/run_gpu.sh", tmp_path)
    assert calls[0] == ["train_nth_farthest.py", "--resume", str(tmp_path / "rmc-seed2"), "--cuda"]
    (tmp_path / "rmc-seed2" / "last.pt").unlink()
    _, calls = run("nth_farthest/run_gpu.sh", tmp_path)
    assert "--resume" not in calls[0] and calls[0][calls[0].index("--name") + 1] == "rmc-seed2"
    assert (tmp_path / "rmc-seed2" / "log.jsonl").exists()

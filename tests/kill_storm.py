"""Kill training runs at random moments, a few hundred times, and resume them.

    OMP_NUM_THREADS=1 python tests/kill_storm.py --kills 240 --seed 1 --outf kill_storm.txt

A process that has imported torch forks children, which train. A timer of the kernel ends each child at a
random moment, as `kill -9` does: while it reads its text, writes the corpus cache, args.json or a checkpoint,
or trains. After each kill every file must be whole, and the next child resumes the run. The finished run must
equal an undisturbed one bit for bit, with no temporary file left.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from training import checkpoints, console, flags, runs  # noqa: E402

import torch  # noqa: E402
from conftest import write_corpus  # noqa: E402
from same_runs import assert_same_run  # noqa: E402

import train_nth_farthest  # noqa: E402
import train_rmc  # noqa: E402
import train_rnn  # noqa: E402

EVERY_STEP = ["--save-every", "0.0000001", "--log-interval", "5"]
LM = "--batch-size 14 --bptt 15 --lr 0.01 --epochs 2 --eval-batch-size 3 --emsize 12"
CORE = "--headsize 5 --numheads 2 --memslots 2"
NTH = "--num-vectors 3 --num-dims 2 --outputunits 8 --batch-size 8 --test-examples 10 --steps 23"
# A run takes half a second. The language models use dropout, for which random states matter.
RUNS = {
    "RMC": (train_rmc, f"{LM} {CORE} --keysize 3"),
    "RMC, adaptive softmax": (train_rmc, f"{LM} {CORE} --keysize 3 --adaptivesoftmax"),
    "LSTM, cosine": (train_rnn, f"{LM} --nhid 14 --schedule cosine"),
    "Nth farthest, RMC": (train_nth_farthest, f"{NTH} {CORE}"),
    "Nth farthest, LSTM": (train_nth_farthest, f"{NTH} --model lstm --nhid 9 --schedule cosine"),
}
PHASES = ("starting", "training", "writing a checkpoint", "writing args.json", "writing the corpus cache")
phase = mmap.mmap(-1, 1)  # index in PHASES of what the child does, shared with the parent


# ---- children


def run_child(work: Callable[[], int], timer: tuple[str, int, float] | None = None) -> bool:
    """Run `work` in a forked process; return True if it ended with status 0, False if it was killed.

    Args:
        work: returns the exit status.
        timer: kill the child this many seconds after it has begun a phase for the n-th time: (phase, n,
            seconds).
    """
    phase[0] = 0
    child = os.fork()
    if child == 0:
        status, error_output = 70, os.dup(2)
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            report_phases(timer)
            status = work()
        except BaseException as error:
            os.write(error_output, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGALRM), status
    return status == 0


def report_phases(timer: tuple[str, int, float] | None) -> None:
    """In a child: keep `phase` up to date and start the timer in its phase."""
    begun = Counter()

    def begin(name: str) -> None:
        phase[0] = PHASES.index(name)
        begun[name] += 1
        if timer is not None and (name, begun[name]) == timer[:2]:
            signal.setitimer(signal.ITIMER_REAL, max(timer[2], 1e-6))  # SIGALRM ends the process

    write, enter = checkpoints.atomic_write, console.Interrupts.__enter__

    def writing(path: str | Path, *args: object) -> None:
        before, name = PHASES[phase[0]], Path(path).name
        of_cache, of_args = name.startswith(".corpus"), name == "args.json"
        begin(PHASES[4] if of_cache else PHASES[3] if of_args else PHASES[2])
        write(path, *args)
        phase[0] = PHASES.index(before)

    def entering(self: console.Interrupts) -> console.Interrupts:
        begin("training")
        return enter(self)

    checkpoints.atomic_write = runs.atomic_write = writing
    console.Interrupts.__enter__ = entering
    begin("starting")


def check_files(folder: Path) -> None:
    """Check that every file of a run folder is whole."""
    for path in folder.iterdir():
        leftover = path.name.startswith(".") and path.name.endswith(".tmp")
        assert leftover or path.name in ("args.json", "log.jsonl", "best.pt", "last.pt"), path
    assert runs.read_json(folder / "args.json")["script"]
    for path in folder.glob("*.pt"):
        assert checkpoints.load_checkpoint(path)["model"]
    if (folder / "log.jsonl").exists():
        assert all("event" in event for event in runs.read_log(folder / "log.jsonl"))


# ---- the storm


class Storm:
    """Kills and resumes runs.

    Args:
        scratch: an empty folder.
        draw: source of every random choice.
    """

    def __init__(self, scratch: Path, draw: random.Random) -> None:
        self.scratch, self.draw = scratch, draw
        self.kills: Counter[tuple[str, str]] = Counter()
        self.before_the_folder = self.finished = 0
        self.corpus = write_corpus(scratch / "corpus")
        train_nth_farthest.draw_attention = lambda *_: None  # takes a second, after the run
        # Once in this process: children then need not import what torch imports at its first step.
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            self.command("LSTM, cosine", scratch / "warm-up")()

    def command(self, kind: str, folder: Path) -> Callable[[], int]:
        """Return what a child does: start the run in this folder, or resume it."""
        script, options = RUNS[kind]
        if folder.exists():
            return lambda: script.main(["--resume", str(folder)])
        data = [] if script is train_nth_farthest else ["--data", str(self.corpus)]
        place = ["--runs-folder", str(folder.parent), "--name", folder.name]
        return lambda: script.main([*options.split(), *EVERY_STEP, *data, *place])

    def remove_cache(self) -> None:
        """Remove the corpus cache, so that the next child writes it."""
        for path in self.corpus.glob(".*"):
            path.unlink()

    def train(self, kind: str, kills: int) -> None:
        """Kill runs of a kind this many times; finish each run and compare it with an undisturbed one."""
        whole = self.scratch / kind.replace(",", "").replace(" ", "-")
        started = time.monotonic()
        run_child(self.command(kind, whole))
        seconds, done, number = time.monotonic() - started, 0, 0
        while done < kills or number == 0:
            number += 1
            folder = self.scratch / f"{whole.name}-{number}"
            while True:
                if self.draw.random() < 0.3:
                    self.remove_cache()
                # After the last kill, the run may finish.
                timer = self.aim(seconds) if done < kills else None
                if run_child(self.command(kind, folder), timer):
                    break
                done += 1
                self.kills[kind, PHASES[phase[0]]] += 1
                if folder.exists():
                    check_files(folder)
                else:
                    self.before_the_folder += 1
            assert_same_run(whole, folder)
            self.finished += 1

    def aim(self, seconds: float) -> tuple[str, int, float]:
        """Choose when to kill a run that takes so many seconds: half of the time while it saves."""
        target = self.draw.random()
        if target < 0.2:
            return "starting", 1, self.draw.uniform(0, 0.1 * seconds)
        if target < 0.3:
            return self.draw.choice(PHASES[3:]), 1, self.draw.uniform(0, 0.001)
        if target < 0.75:
            return "writing a checkpoint", self.draw.randint(1, 8), self.draw.uniform(0, 0.006)
        return "training", 1, self.draw.uniform(0, 0.3 * seconds)


def main() -> None:
    """Run the storm and report it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=flags.positive_int, default=240, help="in all")
    parser.add_argument("--kinds", nargs="+", choices=RUNS, default=list(RUNS), metavar="KIND")
    parser.add_argument("--seed", type=flags.seed_int, default=1)
    parser.add_argument("--outf", type=Path, default=None, metavar="FILE", help="file for the report")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has only the thread that forked
    machine, started = runs.describe_environment(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        storm = Storm(Path(scratch), random.Random(args.seed))
        for number, kind in enumerate(args.kinds):
            storm.train(kind, args.kills // len(args.kinds) + (number < args.kills % len(args.kinds)))
    lines = [
        f"python tests/kill_storm.py --kills {args.kills} --seed {args.seed}",
        f"torch {torch.__version__}, Python {platform.python_version()}, {machine['cpu']}, "
        f"{machine['cpu_cores']} cores, commit {machine['commit']}, {time.strftime('%Y-%m-%d %H:%M %Z')}",
        "",
        *(f"{kind:<24}{name:<28}{count:>4}" for (kind, name), count in sorted(storm.kills.items())),
        f"{'in all':<52}{storm.kills.total():>4}",
        f"of these {storm.before_the_folder} before the run folder existed",
        f"{storm.finished} runs finished, each equal to an undisturbed one bit for bit; "
        f"{time.monotonic() - started:.0f} s",
    ]
    print("\n".join(lines))
    if args.outf:
        args.outf.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Everything that is to be found out on WikiText-2, unattended, several runs side by side.

    python results/wikitext2/run_plan.py --cuda --parallel 4               until all is finished
    python results/wikitext2/run_plan.py --cuda --parallel 4 --minutes 9   in pieces: call it until it says so

It may be stopped at any moment (Ctrl-C, SIGTERM, a closed terminal, the end of the minutes): runs save
themselves, and the next call, with the same flags, goes on where they stood. One plan works on a folder at a
time. If a plan is killed (SIGKILL), its runs train on; the next call leaves them alone and says that they are
busy. A run that fails is noted in OUT/failed/ and left out; delete the note to try again.

Stages, each done before the next begins:
    original   the published arguments, three seeds: the RMC (11.8M parameters with the original module's
               maths), the LSTM (tied, 10.7M), and the RMC at the LSTM's size
    recipe     the recipe wikitext2 of either model, three seeds
    table      the rows of the published search over the RMC's sizes, one seed
    search     for the best recipe at no more than 11M parameters: as many trials for either model, the recipe
               wikitext2-regularised first, the others drawn at random from the same ranges, for a part of the
               epochs
    best       the trial of each model with the best validation perplexity, all epochs, three seeds
    ablation   of these, one part at a time taken away or added, one seed; a part that they are without is not
               taken away: that would be the same run again

After the stages `original`, `recipe` and `best` each run is scored as one stream (--eval-batch-size 1), with
perplexity against the length of the state, into its folder's evaluation.txt. OUT/summary.md has the table of
all runs after each call.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lm_flags  # noqa: E402 (found by the line above)

import train_rmc  # noqa: E402
import train_rnn  # noqa: E402
from training import console, runs  # noqa: E402

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

STAGES = ("original", "recipe", "table", "search", "best", "ablation")
SEEDS = (1, 2, 3)
SCRIPTS = {"rmc": train_rmc, "lstm": train_rnn}
# In the message of a script that finds its run folder in another process's hands.
BUSY = "in training by another process"
STATE_LENGTHS = ("1", "3", "10", "30", "100", "300", "1000", "3000", "10000")

# Embedding and head size, heads, MLP layers, key size, dropout of the output, slots. The row 192, 4, 3, 64,
# 0.5, 1 is the stage `original`.
TABLE = (
    (128, 4, 3, 128, 0.0, 1), (128, 8, 3, 128, 0.0, 1), (128, 4, 3, 32, 0.0, 1), (128, 4, 3, 32, 0.5, 1),
    (128, 4, 3, 64, 0.0, 1), (128, 4, 3, 64, 0.5, 1), (128, 4, 2, 64, 0.5, 1), (64, 4, 3, 64, 0.5, 1),
    (64, 4, 3, 32, 0.5, 1), (64, 4, 3, 32, 0.5, 4), (192, 4, 3, 64, 0.5, 4), (256, 4, 3, 256, 0.0, 1),
    (256, 4, 3, 64, 0.5, 1),
)  # fmt: skip

# Sizes of 10.2 to 10.8 million parameters; the first is the recipe's.
SIZES = {
    "rmc": (
        "--emsize 256 --headsize 120 --attmlplayers 2", "--emsize 240 --headsize 128 --attmlplayers 2",
        "--emsize 184 --headsize 176 --attmlplayers 3", "--emsize 240 --headsize 140 --attmlplayers 1",
    ),
    "lstm": (
        "--emsize 280 --nhid 280 --nlayers 2", "--emsize 220 --nhid 450 --nlayers 2 --project",
        "--emsize 184 --nhid 960 --nlayers 1 --project", "--emsize 184 --nhid 580 --nlayers 2 --project",
    ),
}  # fmt: skip
RANGES = {
    "--lr": (0.001, 0.002, 0.004),
    "--batch_size": (20, 40, 64),
    "--dropout-input": (0.2, 0.3, 0.4, 0.5),
    "--dropout-output": (0.3, 0.4, 0.5),
    "--dropout-words": (0.0, 0.05, 0.1, 0.2),
    "--dropout-weights": (0.0, 0.2, 0.4, 0.6),
    "--ar": (0.0, 0.2, 0.5, 2.0),
    "--weight-decay": (0.003, 0.03, 0.1, 0.3),
}
# The last range is each model's own: recurrent dropout of the one, dropout between layers of the other.
OWN_RANGES = {
    "rmc": ("--dropout-candidate", (0.0, 0.1, 0.2, 0.3)),
    "lstm": ("--dropout-hidden", (0.1, 0.2, 0.3, 0.4)),
}
PARTS = {
    "no-locked": "--no-locked-dropout",
    "no-words": "--dropout-words 0",
    "no-weights": "--dropout-weights 0",
    "no-ar": "--ar 0",
    "no-tar": "--tar 0",
    "no-decay": "--weight-decay 0",
    "no-average": "--average none",
    "plateau": "--schedule plateau",
    # To be held against the part above: NT-ASGD waits for a loss that stalls, as a cosine's does not.
    "plateau-nt-asgd": "--average nt-asgd --schedule plateau",
    "random-windows": "--random-bptt",
    "random-windows-two-lengths": "--random-bptt 0",
    "clip-0.1": "--clip 0.1",
    # Below and above every --lr of the search.
    "embedding-lr-lower": "--embedding-lr 0.0005",
    "embedding-lr-higher": "--embedding-lr 0.006",
}
OWN_PARTS = {"rmc": {"no-candidate": "--dropout-candidate 0"}, "lstm": {"no-hidden": "--dropout-hidden 0"}}


@dataclass(frozen=True)
class Job:
    """A run to train, or (`evaluate`) one to score as one stream."""

    name: str
    model: str
    flags: tuple[str, ...] = ()
    evaluate: bool = False


def original() -> list[Job]:
    """The published arguments, and the pair of equal size."""
    kinds = {
        "rmc": ("rmc", ""),
        "lstm": ("lstm", "--tied --cudnn"),
        "rmc-10.75M": ("rmc", "--emsize 184 --headsize 176"),
    }
    return [
        Job(f"original-{name}-seed{seed}", model, (*flags.split(), "--seed", str(seed)))
        for seed in SEEDS
        for name, (model, flags) in kinds.items()
    ]


def recipe() -> list[Job]:
    """The recommended recipe of either model."""
    return [
        Job(f"recipe-{model}-seed{seed}", model, ("--recipe", "wikitext2", "--seed", str(seed)))
        for seed in SEEDS
        for model in SCRIPTS
    ]


def published_table() -> list[Job]:
    """The rows of the published search."""
    jobs = []
    for size, heads, layers, key, dropout, slots in TABLE:
        flags = (
            f"--emsize {size} --headsize {size} --numheads {heads} --attmlplayers {layers} --keysize {key} "
            f"--dropout-output {dropout} --memslots {slots}"
        )
        name = f"table-{size}-{heads}-{layers}-{key}-{'yes' if dropout else 'no'}-{slots}"
        jobs.append(Job(name, "rmc", tuple(flags.split())))
    return jobs


def search(trials: int, epochs: int) -> list[Job]:
    """As many trials for either model, drawn alike; the first is the recipe as it stands."""
    jobs = []
    for number in range(trials):
        draw = random.Random(number)  # the same for both models
        shared = [word for flag, values in RANGES.items() for word in (flag, str(draw.choice(values)))]
        size, own = draw.randrange(4), draw.randrange(4)
        for model in SCRIPTS:
            flags = ["--recipe", "wikitext2-regularised"]
            if number:
                flag, values = OWN_RANGES[model]
                flags += [*SIZES[model][size].split(), *shared, flag, str(values[own])]
            jobs.append(Job(f"search-{model}-{number:02}", model, (*flags, "--epochs", str(epochs))))
    return jobs


def best_trials(out: Path, jobs: Sequence[Job]) -> dict[str, tuple[str, ...]]:
    """By model the flags of its trial with the best validation perplexity, without --epochs."""
    best: dict[str, tuple[float, tuple[str, ...]]] = {}
    for job in jobs:
        scores = [
            event[key]
            for event in log_of(out / job.name)
            for key in ("ppl", "average_ppl")
            if event.get("event") == "valid" and event.get(key) is not None
        ]
        if finished(out, job) and (job.model not in best or min(scores) < best[job.model][0]):
            best[job.model] = (min(scores), job.flags[: job.flags.index("--epochs")])
    return {model: flags for model, (_, flags) in best.items()}


def best(flags: dict[str, tuple[str, ...]]) -> list[Job]:
    """The best trials with all epochs, three seeds."""
    return [
        Job(f"best-{model}-seed{seed}", model, (*flags[model], "--seed", str(seed)))
        for seed in SEEDS
        for model in flags
    ]


def ablation(flags: dict[str, tuple[str, ...]]) -> list[Job]:
    """The best trials, with one part taken away or added; seed 1, as in `best`.

    A change that changes nothing (the trial had drawn 0 for the part) is left out.
    """
    jobs = []
    for model, of_best in flags.items():
        base = (*of_best, "--seed", "1")
        for name, change in {**PARTS, **OWN_PARTS[model]}.items():
            changed = (*base, *change.split())
            if arguments(model, changed) != arguments(model, base):
                jobs.append(Job(f"ablation-{model}-{name}", model, changed))
    return jobs


def arguments(model: str, flags: Sequence[str]) -> dict[str, Any]:
    """What a script makes of these flags, its recipes and defaults included."""
    script = SCRIPTS[model]
    parser = script.build_parser()
    with contextlib.redirect_stdout(io.StringIO()):  # it says what the recipe sets
        lm_flags.apply_recipe(parser, flags, script.RECIPES)
    args = vars(parser.parse_args(flags))
    if args.get("nlayers") == 1:
        args["dropout_hidden"] = None  # there is nothing between the layers
    return args


# ---- doing them


def log_of(folder: Path) -> list[dict]:
    """The events of a run's log; none if there is no log."""
    path = folder / "log.jsonl"
    return runs.read_log(path) if path.exists() else []


def finished(out: Path, job: Job) -> bool:
    """Whether the job has been done."""
    if job.evaluate:
        return (out / job.name / "evaluation.txt").exists()
    return any(event.get("event") == "test" for event in log_of(out / job.name))


def failed(out: Path, job: Job) -> Path:
    """The note of a job's failure."""
    return out / "failed" / f"{job.name}{'-evaluation' if job.evaluate else ''}.txt"


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other plans from the folder, where the system has locks; the system frees it when this one ends.

    Raises:
        console.UserError: another plan works on the folder.
    """
    with open(out / ".lock", "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise console.UserError(
                    f"another run_plan.py works on {out}. Wait for its end, stop it, or give another --out."
                ) from None
            except OSError as error:
                say(f"cannot lock {out} ({error.strerror}): see to it that no other plan works on it")
        yield


def say(text: str) -> None:
    """Prints a line, where there is still a terminal to print to."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, for one GPU each."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if "-1" in named:  # where CUDA stops reading
        named = named[: named.index("-1")]
    named = [name for name in named if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


class Plan:
    """Does jobs, several at once, until the time is over or someone asks to stop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.deadline = time.monotonic() + args.minutes * 60 if args.minutes else None
        self.stop = False
        # One for each run side by side, where there are several: a run would else take them all.
        self.gpus = visible_gpus() if args.cuda else []
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last: a closed terminal; not on Windows
            number = getattr(signal, name, None)
            # Under nohup SIGHUP is ignored, and is to stay so.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self.stop = True

    @property
    def over(self) -> bool:
        """Whether no more work is to be begun."""
        return self.stop or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return self.deadline - time.monotonic() if self.deadline is not None else math.inf

    def command(self, job: Job) -> list[str]:
        """What starts the job, or goes on with it."""
        args, folder = self.args, self.out / job.name
        script = [sys.executable, str(ROOT / f"{SCRIPTS[job.model].SCRIPT}.py")]
        device = ["--cuda"] if args.cuda else []
        if job.evaluate:
            lengths = ["--eval-batch-size", "1", "--state-lengths", *STATE_LENGTHS]
            return [*script, "--evaluate", str(folder), *lengths, *device]
        if (folder / "args.json").exists():
            return [*script, "--resume", str(folder), *device]
        runs.discard_unbegun_run_folder(folder)  # left by a run that was killed as it made its folder
        changed = shlex.split(args.extra)
        if args.epochs:
            changed += ["--epochs", str(args.epochs)]
        where = ["--runs-folder", str(self.out), "--name", job.name, "--save-every", "2"]
        return [*script, *job.flags, *changed, *where, *device]

    def do(self, jobs: Sequence[Job]) -> bool:
        """Does the jobs that are neither done nor noted as failed.

        Returns:
            False if there is more to do: it had to stop before the end, or others are at work on a run.
        """
        waiting = [job for job in jobs if not finished(self.out, job) and not failed(self.out, job).exists()]
        running: dict[Job, tuple[subprocess.Popen, Path, int, str | None]] = {}
        busy = False
        # Scoring saves nothing on the way: one at a time has the device to itself, and none is begun that
        # would hardly end.
        scoring = any(job.evaluate for job in jobs)
        parallel = 1 if scoring else self.args.parallel
        while waiting or running:
            if scoring and waiting and not running and self.left < self.args.scoring_minutes * 60:
                say(f"no scoring is begun with less than {self.args.scoring_minutes:g} minutes left")
                return False
            while waiting and len(running) < parallel and not self.over:
                job = waiting.pop(0)
                output = self.out / "output" / failed(self.out, job).name
                gpu = min(self.gpus, key=[gpu for *_, gpu in running.values()].count, default=None)
                with open(output, "ab") as file:
                    said = file.tell()  # what earlier calls have left there
                    # In a group of its own: Ctrl-C must reach it once, through us.
                    process = subprocess.Popen(
                        self.command(job), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                        start_new_session=True,
                        env=os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
                    )  # fmt: skip
                say(f"{'scoring' if job.evaluate else 'training'} {job.name}")
                running[job] = (process, output, said, gpu)
            if self.over:
                for process, *_ in running.values():
                    process.terminate()
                for job, (process, output, said, _) in running.items():
                    process.wait()
                    self.note(job, process.returncode, output, said)
                return not (waiting or busy) and all(finished(self.out, job) for job in running)
            for job, (process, output, said, _) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    busy |= self.note(job, process.returncode, output, said)
            time.sleep(0.05)
        return not busy

    def note(self, job: Job, status: int, output: Path, said: int) -> bool:
        """Keeps a score, or the reason of a failure; a run that was stopped or is busy is neither.

        Args:
            status: exit status of the job's process.
            output: file that it wrote to, from byte `said` on.

        Returns:
            Whether another process is at work on the run.
        """
        folder = self.out / job.name
        if status == 0 and job.evaluate:
            os.replace(output, folder / "evaluation.txt")
        elif status == 0:
            say(f"finished {job.name}")
        elif not (self.over and status in (130, 143, -signal.SIGINT, -signal.SIGTERM)):
            text = output.read_bytes()[said:].decode("utf-8", errors="replace")
            if BUSY in text:
                say(f"busy     {job.name}: another process trains it, it is left alone")
                return True
            failed(self.out, job).write_text(text[-5000:], encoding="utf-8")
            say(f"FAILED   {job.name}: see {failed(self.out, job)}")
        elif job.evaluate:
            output.unlink()
        return False

    def summarise(self, jobs: Sequence[Job]) -> None:
        """The table of all runs that have a log."""
        folders = [str(self.out / job.name) for job in jobs if log_of(self.out / job.name)]
        if folders:
            command = [sys.executable, str(ROOT / "compare_runs.py"), *folders]
            table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
            (self.out / "summary.md").write_text(table.stdout or table.stderr, encoding="utf-8")

    def run(self) -> bool:
        """All stages asked for; False if there is more to do."""
        args, done, known = self.args, True, []
        trials = search(args.trials, args.search_epochs)
        for stage in STAGES:
            if stage == "original":
                jobs = original()
            elif stage == "recipe":
                jobs = recipe()
            elif stage == "table":
                jobs = published_table()
            elif stage == "search":
                jobs = trials
            else:
                jobs = (best if stage == "best" else ablation)(best_trials(self.out, trials))
            known += jobs
            if stage not in args.stages:
                continue
            if stage in ("best", "ablation") and not jobs:
                say(f"stage {stage}: no finished trial of the stage search to start from")
                continue
            done = self.do(jobs)
            if done and stage in ("original", "recipe", "best"):
                trained = [job for job in jobs if finished(self.out, job)]
                done = self.do([Job(job.name, job.model, evaluate=True) for job in trained])
            if not done:
                break
        self.summarise(known)
        return done


def build_parser() -> argparse.ArgumentParser:
    """All flags of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which ones (default: all)")
    add("--out", type=Path, default=Path("runs/wikitext2"), help="folder of the runs (runs/wikitext2)")
    add("--minutes", type=float, default=0, help="stop after so long, to go on with another call (0: never)")
    add("--scoring-minutes", type=float, default=4, help="begin no scoring with less time left than this (4)")
    add("--parallel", type=int, default=1, help="runs side by side, dealt to all visible GPUs (1)")
    add("--cuda", action="store_true", help="on the GPU")
    add("--trials", type=int, default=12, help="of each model in the stage search (12)")
    add("--search-epochs", type=int, default=30, help="epochs of a trial (30)")
    add("--epochs", type=int, default=0, help="epochs of every run, for a rehearsal (0: each stage's own)")
    add("--extra", default="", help="further flags for every run, for a rehearsal; they win over the plan's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Works on the plan; returns 0, also when there is more to do."""
    args = build_parser().parse_args(argv)
    if 0 < args.minutes <= args.scoring_minutes:
        raise console.UserError(
            f"with --minutes {args.minutes:g} no run could ever be scored, as no scoring is begun with less "
            f"than --scoring-minutes {args.scoring_minutes:g} left. Raise the one or lower the other."
        )
    args.out = args.out if args.out.is_absolute() else ROOT / args.out
    for folder in ("failed", "output"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    with alone(args.out):
        done = Plan(args).run()
    notes = len(list((args.out / "failed").iterdir()))
    say(f"{notes} failures, see {args.out / 'failed'}" if notes else "no failures")
    say(f"all is finished: {args.out}" if done else "stopped; call again to go on")
    return 0


if __name__ == "__main__":
    console.run_script(main)

"""A text of WikiText-103's size and shape from end to end: tokenise, cache, load, a thousand training steps.

    OMP_NUM_THREADS=1 python tests/large_corpus.py --folder /somewhere/large --outf results/reliability/large

writes the text into the folder (about 600 MB; kept, so that a second call need not write it again), does each
phase in a fresh process, and prints a table of times and peak memory. With --compare the obvious loop over
the text twice is timed too, and its ids compared. Needs Linux, whose /proc tells a process's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.measure_tokenising import write_texts  # noqa: E402
from training import checkpoints, flags, runs  # noqa: E402


def peak_mb(pid: int) -> float:
    """Largest resident size of a process so far."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith("VmHWM:"))


def tokenise(way: str, folder: Path) -> dict:
    """What `measure_tokenising.py` measures in a process of its own."""
    script = Path(__file__).with_name("measure_tokenising.py")
    command = [sys.executable, str(script), "--one", way, str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)


def train(folder: Path, steps: int, flags: list[str], tell: Callable[[str], None]) -> None:
    """Trains until the log shows that many steps, then SIGTERM; says how it went."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "large"
        command = [sys.executable, "train_rmc.py", *flags, "--data", str(folder)]
        command += ["--runs-folder", scratch, "--name", "large"]
        started, peak, first = time.monotonic(), 0.0, None
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            events = []
            while not events or events[-1]["step"] < steps:
                time.sleep(1)
                if process.poll() is not None:
                    raise SystemExit(f"training ended with status {process.returncode}")
                peak = max(peak, peak_mb(process.pid))
                with contextlib.suppress(FileNotFoundError):
                    events = [e for e in runs.read_log(run / "log.jsonl") if e["event"] == "train"]
                    first = first or time.monotonic()  # model built, training begun
            trained = time.monotonic()
            process.send_signal(signal.SIGTERM)
            while process.poll() is None:
                with contextlib.suppress(OSError, StopIteration):
                    peak = max(peak, peak_mb(process.pid))
                time.sleep(0.2)
            saved = time.monotonic() - trained
        finally:
            process.kill()
            process.wait()
        parameters = json.loads((run / "args.json").read_text(encoding="utf-8"))["parameters"]
        size = (run / "last.pt").stat().st_size / 1e6
        reading = time.monotonic()
        at = checkpoints.load_checkpoint(run / "last.pt")["position"]["step"]
        tell(f"training: {parameters:,} parameters, {first - started:.0f} s from the start to the first step")
        tell(
            f"  {events[-1]['step']:,} steps in {events[-1]['seconds']:.0f} s, "
            f"{sum(e['ms_per_batch'] for e in events) / len(events):.0f} ms per step, "
            f"loss {events[0]['loss']:.3f} in the first {events[0]['step']} steps, "
            f"{events[-1]['loss']:.3f} in the last"
        )
        tell(f"  peak memory {peak:,.0f} MB, saving included")
        tell(
            f"  SIGTERM: status {process.returncode} after {saved:.1f} s, last.pt {size:,.0f} MB at step "
            f"{at:,}, read and checked in {time.monotonic() - reading:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the text is or is to be written")
    parser.add_argument("--tokens", type=flags.positive_int, default=103_000_000)
    parser.add_argument("--types", type=flags.positive_int, default=267_735)
    parser.add_argument("--steps", type=flags.positive_int, default=1000)
    parser.add_argument("--compare", action="store_true", help="time the obvious loop as well")
    parser.add_argument("--outf", type=Path, required=True, metavar="PATH_WITHOUT_SUFFIX")
    args = parser.parse_args()
    arguments = ["--adaptivesoftmax", "--batch_size", "16", "--bptt", "35", "--threads", "1"]
    arguments += ["--log-interval", "50"]
    with open(args.outf.with_suffix(".txt"), "w", encoding="utf-8") as file:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        tell(
            f"python tests/large_corpus.py --folder FOLDER --tokens {args.tokens} --types {args.types} "
            f"--steps {args.steps}{' --compare' if args.compare else ''}"
        )
        machine = runs.describe_environment()
        tell(
            f"torch {machine['torch']}, Python {platform.python_version()}, {machine['cpu']}, "
            f"{machine['cpu_cores']} cores shared with other work (load {os.getloadavg()[0]:.1f} before the "
            f"start), commit {machine['commit']}, {time.strftime('%Y-%m-%d %H:%M %Z')}"
        )
        if not (args.folder / "test.txt").exists():
            args.folder.mkdir(parents=True, exist_ok=True)
            write_texts(args.folder, args.tokens, args.types)
        for cache in args.folder.glob(".corpus-*"):
            cache.unlink()
        size = sum(path.stat().st_size for path in args.folder.glob("*.txt")) / 1e6
        tell(f"text: {args.tokens:,} tokens, {args.types:,} types, {size:,.0f} MB, frequencies after Zipf")
        rows = []
        for way in ("load_corpus, no cache", "load_corpus, cached"):
            row = tokenise(way, args.folder)
            rows.append(row)
            tell(
                f"{way}: {row['seconds']:.1f} s ({row['busy']:.1f} s of processors), peak "
                f"{row['peak']:,.0f} MB, of which {row['before']:,.0f} at the start and {row['ids']:,.0f} "
                f"for the ids; a worker process at most {row['worker']:,.0f} MB"
            )
            assert (row["tokens"], row["types"]) == (args.tokens, args.types), row
        train(args.folder, args.steps, arguments, tell)
        tell(f"  flags: train_rmc.py {' '.join(arguments)} --data FOLDER")
        if args.compare:
            row = tokenise("obvious loop", args.folder)
            rows.append(row)
            tell(
                f"obvious loop: {row['seconds']:.1f} s ({row['busy']:.1f} s of processors), peak "
                f"{row['peak']:,.0f} MB; load_corpus was {row['seconds'] / rows[0]['seconds']:.1f} times as "
                f"fast by the clock, {row['busy'] / rows[0]['busy']:.1f} times by processor time"
            )
        assert len({row["digest"] for row in rows}) == 1, "results differ"
        tell("vocabulary and ids of all ways equal")


if __name__ == "__main__":
    main()

"""Train for an hour with checkpoints every minute, and watch: memory, processor time per step, the log.

    OMP_NUM_THREADS=1 python tests/soak.py --minutes 60 --outf results/reliability/soak

starts `train_rmc.py --recipe tiny` in a process of its own, looks at it every few seconds from outside, ends
it with SIGTERM, and writes OUTF.csv (a line per look, as it goes) and OUTF.txt (the summary). Processor time
is used and not the clock, as the machine may have other work. Needs psutil.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training import checkpoints, flags, runs  # noqa: E402

FIELDS = ("minute", "rss_mb", "cpu_seconds", "step", "log_lines", "saves", "open_files", "folder_mb", "load")
WARM_UP = 5.0  # minutes before which allocator and caches are still filling; not part of the slopes


class LogReader:
    """Reads what has been appended to a log since the last look, as a plot of a running run does."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.lines, self.step = path, 0, 0, 0

    def look(self) -> None:
        """Parses the new lines; a line without its end is left for the next look. ValueError: not JSON."""
        with open(self.path, "rb") as file:
            file.seek(self.place)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.place += len(whole)
        for line in whole.splitlines():
            self.step = max(self.step, json.loads(line)["step"])
            self.lines += 1


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line."""
    return statistics.linear_regression(x, y).slope


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a file is there; the process must live meanwhile."""
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f"training ended with status {process.returncode} before it wrote {path.name}")
        time.sleep(0.1)


def watch(command: list[str], folder: Path, minutes: float, every: float, table: Path) -> list[dict]:
    """Runs the command and returns what was seen of it; the command has been ended with SIGTERM then."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    rows, saves, saved_at = [], 0, None
    try:
        wait_for(folder / "log.jsonl", process)
        watched, log = psutil.Process(process.pid), LogReader(folder / "log.jsonl")
        started = time.monotonic()
        with open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            while (minute := (time.monotonic() - started) / 60) < minutes:
                if process.poll() is not None:
                    raise SystemExit(f"training ended by itself with status {process.returncode}")
                log.look()
                busy = watched.cpu_times()
                if (folder / "last.pt").exists():
                    now = (folder / "last.pt").stat().st_mtime_ns
                    saves, saved_at = saves + (now != saved_at), now
                rows.append(
                    {
                        "minute": round(minute, 2),
                        "rss_mb": round(watched.memory_info().rss / 1e6, 2),
                        "cpu_seconds": round(busy.user + busy.system, 2),
                        "step": log.step,
                        "log_lines": log.lines,
                        "saves": saves,
                        "open_files": watched.num_fds(),
                        "folder_mb": round(
                            sum(path.stat().st_size for path in folder.glob("*.*")) / 1e6, 3
                        ),
                        "load": round(os.getloadavg()[0], 2),
                    }
                )
                writer.writerow(rows[-1])
                file.flush()
                time.sleep(every)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
        if status != 128 + signal.SIGTERM:
            raise SystemExit(f"ended by SIGTERM with status {status}, expected {128 + signal.SIGTERM}")
    finally:
        process.kill()
        process.wait()
    return rows


def summary(rows: list[dict], folder: Path, command: str) -> str:
    """The figures in words."""
    steady = [row for row in rows if row["minute"] >= WARM_UP] or rows
    first, last = steady[0], steady[-1]
    hours = [row["minute"] / 60 for row in steady]
    growth = slope(hours, [row["rss_mb"] for row in steady])
    lines = [
        f"command: {command}",
        f"watched: {rows[-1]['minute'] / 60:.2f} hours, {len(rows)} looks, {rows[-1]['step']:,} steps, "
        f"{rows[-1]['saves']} checkpoints seen, {rows[-1]['log_lines']:,} log lines read while being written",
        f"resident memory: {rows[0]['rss_mb']:.0f} MB at the start, {first['rss_mb']:.1f} MB after "
        f"{first['minute']:.0f} minutes, {last['rss_mb']:.1f} MB at the end, at most "
        f"{max(row['rss_mb'] for row in rows):.1f} MB",
        f"slope of resident memory after minute {WARM_UP:.0f}: {growth:+.2f} MB per hour",
        f"open files: {min(row['open_files'] for row in steady)} to "
        f"{max(row['open_files'] for row in steady)}",
        "processor ms per step (evaluation and saving included), by ten minutes:",
    ]
    parts, begin = [], steady[0]
    for row in steady[1:]:
        if row["minute"] - begin["minute"] >= 10 or (row is last and row["minute"] - begin["minute"] >= 5):
            ms = 1000 * (row["cpu_seconds"] - begin["cpu_seconds"]) / max(row["step"] - begin["step"], 1)
            parts.append(f"  minute {begin['minute']:5.1f} to {row['minute']:5.1f}: {ms:.2f}")
            begin = row
    events = runs.read_log(folder / "log.jsonl")
    saved = checkpoints.load_checkpoint(folder / "last.pt")["position"]["step"]
    ended = f"after SIGTERM: status 143, last.pt whole, at step {saved:,}; {len(events):,} events in the log"
    machine = runs.describe_environment()
    where = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {machine['cpu']}, "
        f"{machine['cpu_cores']} cores shared with other work (load at the median "
        f"{statistics.median(row['load'] for row in rows):.1f}), commit {machine['commit']}, "
        f"ended {time.strftime('%Y-%m-%d %H:%M %Z')}"
    )
    return "\n".join([*lines, *parts, ended, where]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=flags.positive_float, default=60.0)
    parser.add_argument("--every", type=flags.positive_float, default=10.0, metavar="SECONDS")
    parser.add_argument("--save-every", type=flags.positive_float, default=1.0, metavar="MINUTES")
    parser.add_argument("--outf", type=Path, default=Path("soak"), metavar="PATH_WITHOUT_SUFFIX")
    args = parser.parse_args()
    arguments = ["--recipe", "tiny", "--seed", "1111", "--epochs", "100000"]
    arguments += ["--save-every", f"{args.save_every:g}"]
    with tempfile.TemporaryDirectory() as scratch:
        place = ["--runs-folder", scratch, "--name", "soak"]
        command = [sys.executable, "train_rmc.py", *arguments, *place]
        folder = Path(scratch) / "soak"
        rows = watch(command, folder, args.minutes, args.every, args.outf.with_suffix(".csv"))
        text = summary(rows, folder, f"python train_rmc.py {' '.join(flags)}")
    args.outf.with_suffix(".txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

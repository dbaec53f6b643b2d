"""Kill -9 at random moments, a few hundred times: training, checkpoints, corpus cache, downloads.

    OMP_NUM_THREADS=1 python tests/kill_storm.py --kills 240 --seed 1 --outf results/reliability/kill_storm

A process that has torch loaded forks the scripts as children, waits until a child has come to a certain point
(the k-th write of a checkpoint, the start of its loop, the download), waits a random moment more and kills
it. After each kill every file that is there must be whole, and the next child goes on with `--resume`. When
a run has ended its weights, optimiser, random states and logged numbers must be those of a run that was never
interrupted, bit for bit. Needs a system with fork.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import mmap
import os
import platform
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import plot_runs  # noqa: E402
import test_download  # noqa: E402
import torch  # noqa: E402
from conftest import write_corpus  # noqa: E402
from test_scripts import flatten  # noqa: E402

import data_utils  # noqa: E402
import train_nth_farthest  # noqa: E402
import train_rmc  # noqa: E402
import train_rnn  # noqa: E402
from training import checkpoints, console, files, flags, runs  # noqa: E402

EVERY_STEP = ["--save-every", "0.0000001", "--log-interval", "5"]
LM = ["--batch_size", "14", "--bptt", "15", "--lr", "0.01", "--epochs", "2", "--eval-batch-size", "3"]
CORE = ["--headsize", "5", "--numheads", "2", "--memslots", "2"]
RUNS = {  # small enough for a run of half a second; dropout on, so that the random states matter
    "RMC": (train_rmc, [*LM, *CORE, "--emsize", "12", "--keysize", "3"]),
    "RMC, adaptive softmax": (
        train_rmc,
        [*LM, *CORE, "--emsize", "12", "--keysize", "3", "--adaptivesoftmax"],
    ),
    "LSTM, cosine": (train_rnn, [*LM, "--emsize", "12", "--nhid", "14", "--schedule", "cosine"]),
    "Nth farthest, RMC": (
        train_nth_farthest,
        [*CORE, "--num-vectors", "3", "--num-dims", "2", "--outputunits", "8", "--batch-size", "8"]
        + ["--test-examples", "10", "--steps", "23"],
    ),
    "Nth farthest, LSTM": (
        train_nth_farthest,
        ["--model", "lstm", "--nhid", "9", "--num-vectors", "3", "--num-dims", "2", "--outputunits", "8"]
        + ["--batch-size", "8", "--test-examples", "10", "--steps", "23", "--schedule", "cosine"],
    ),
}
RUN_FILES = {"args.json", "log.jsonl", "best.pt", "last.pt"}
TIMES = {"seconds", "ms_per_batch", "forward_ms_per_batch", "tokens_per_second", "examples_per_second"}


# ---- children that say where they are


class Child:
    """A forked process that runs `work`; it tells its phase and marks points on its way."""

    phase_byte = mmap.mmap(-1, 1)  # shared with the children

    def __init__(self, work: Callable[[], object]) -> None:
        self.reader, writer = os.pipe()
        self.phase_byte[0:1] = b"s"
        self.started = time.monotonic()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.close(self.reader)
                silence, told = os.open(os.devnull, os.O_RDWR), os.dup(2)
                for stream in (1, 2):
                    os.dup2(silence, stream)
                instrument(writer)
                status = work() or 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException as error:
                os.write(told, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        os.close(writer)

    def wait_for(self, point: bytes, times: int = 1) -> bool:
        """Until the child has marked a point so many times; False if it ended before."""
        while times:
            mark = os.read(self.reader, 1)
            if not mark:
                return False
            times -= mark == point
        return True

    def kill_after(self, seconds: float) -> str | None:
        """Kills it then; the phase it was in, None if it had ended by itself."""
        if not select.select([self.reader], [], [], 0)[0] or os.read(self.reader, 1):
            time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)  # still there as a zombie if it has ended
        status = self.end()
        return self.phase_byte[0:1].decode() if status == -signal.SIGKILL else None

    def end(self) -> int:
        """Its exit status, once it has ended; negative for a signal."""
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.reader)
        return self.status


PHASES = {
    "s": "starting or reading",
    "t": "training and evaluation",
    "w": "writing a checkpoint",
    "j": "writing args.json",
    "k": "tokenising",
    "c": "writing the corpus cache",
    "d": "downloading",
}


def instrument(writer: int) -> None:
    """In a child: tells the parent of loop, writes, tokenising and download as they begin."""

    def mark(point: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(writer, point)

    def within(phase: bytes, function: Callable, name_of_phase: Callable | None = None) -> Callable:
        def wrapped(*args, **kwargs):
            before = Child.phase_byte[0:1]
            now = name_of_phase(*args) if name_of_phase else phase
            Child.phase_byte[0:1] = now
            mark(now)
            result = function(*args, **kwargs)
            Child.phase_byte[0:1] = before
            return result

        return wrapped

    def of_file(path, *_):
        return {".pt": b"w", ".pkl": b"c"}.get(Path(path).suffix, b"j")

    enter = console.Interrupts.__enter__

    def entered(self):
        Child.phase_byte[0:1] = b"t"
        mark(b"t")
        return enter(self)

    console.Interrupts.__enter__ = entered
    files.atomic_write = data_utils.atomic_write = within(b"w", files.atomic_write, of_file)
    data_utils.tokenise = within(b"k", data_utils.tokenise)
    data_utils.fetch = within(b"d", data_utils.fetch)


# ---- what must hold


def is_whole(folder: Path) -> bool:
    """Checks every file of a run folder that a reader may take; whether the run had begun."""
    for path in folder.iterdir():
        leftover = path.name == runs.LOCK or path.name.startswith(".") and path.name.endswith(".tmp")
        assert path.name in RUN_FILES or leftover, path
    if not (folder / "args.json").exists():
        assert {path.name for path in folder.iterdir()} & RUN_FILES == set()
        return False
    json.loads((folder / "args.json").read_text(encoding="utf-8"))
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            assert checkpoints.load_checkpoint(folder / name)["model"]
    if (folder / "log.jsonl").exists():
        for line in (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]:  # the last may be half
            # A half line of an earlier kill is ended when the run goes on: it spoils only itself.
            with contextlib.suppress(ValueError):
                assert isinstance(json.loads(line), dict)
        runs.read_log(folder / "log.jsonl")
    return True


def numbers(folder: Path) -> list[dict]:
    """The log without times and traces of interruptions."""
    events = runs.read_log(folder / "log.jsonl")
    return [
        {key: value for key, value in event.items() if key not in TIMES}
        for event in events
        if event["event"] != "resume"
    ]


def assert_same_run(one: Path, other: Path) -> None:
    """Two finished runs are equal in every bit that does not tell a time or a place."""
    for name in ("last.pt", "best.pt"):
        a, b = (dict(flatten(checkpoints.load_checkpoint(folder / name))) for folder in (one, other))
        assert a.keys() == b.keys()
        for key in a:
            if "seconds" in key or ".args." in key:
                continue
            same = torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
            assert same, (name, key)
    assert numbers(one) == numbers(other)
    assert {path.name for path in other.iterdir()} == RUN_FILES, "a temporary file was left"


# ---- the storms


class Storm:
    """Counts what was killed and what survived.

    Args:
        scratch: an empty folder.
        draw: source of every random choice.
        tell: gets a line now and then.
    """

    def __init__(self, scratch: Path, draw: random.Random, tell: Callable[[str], None]) -> None:
        self.scratch, self.draw, self.tell = scratch, draw, tell
        self.kills: Counter[tuple[str, str]] = Counter()
        self.finished: Counter[str] = Counter()
        self.before_begin = 0
        self.corpus = write_corpus(scratch / "corpus")
        data_utils.load_corpus(str(self.corpus))
        # A picture takes a second and is drawn when all is done.
        plot_runs.import_pyplot = lambda: (_ for _ in ()).throw(console.UserError("no pictures here"))
        # Once in this process, so that no child has to import what torch imports at its first step.
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            self.command("LSTM, cosine", scratch / "warm-up", resume=False)()

    def command(self, kind: str, folder: Path, resume: bool) -> Callable[[], int]:
        """What a child does: begins the run in this folder, or goes on with it."""
        script, flags = RUNS[kind]
        if resume:
            return lambda: script.main(["--resume", str(folder)])
        data = [] if script is train_nth_farthest else ["--data", str(self.corpus)]
        place = ["--runs-folder", str(folder.parent), "--name", folder.name]
        return lambda: script.main([*flags, *EVERY_STEP, *data, *place])

    def train(self, kind: str, kills: int) -> None:
        """Kills runs of a kind so many times; each run is resumed until it ends, and compared then."""
        whole = self.scratch / f"whole-{kind.replace(' ', '-').replace(',', '')}"
        child = Child(self.command(kind, whole, resume=False))
        assert child.wait_for(b"t")
        begun = time.monotonic()
        assert child.end() == 0
        length, startup = time.monotonic() - begun, begun - child.started
        write = self.time_of_a_write(whole)
        done, number = 0, 0
        while done < kills:
            number += 1
            folder = self.scratch / f"{whole.name}-killed-{number}"
            while True:
                resume = folder.exists()
                child = Child(self.command(kind, folder, resume))
                # The last run is let go to its end.
                phase = self.aim(child, startup, length, write) if done < kills else None
                if phase is None:
                    status = child.status if child.status is not None else child.end()
                    assert status == 0, (kind, status)
                    break
                done += 1
                self.kills[kind, PHASES[phase]] += 1
                if folder.exists() and not is_whole(folder):
                    self.before_begin += 1  # nothing of it was there to go on with: begin anew
                    shutil.rmtree(folder)
            assert_same_run(whole, folder)
            self.finished[kind] += 1
            shutil.rmtree(folder)
        self.tell(f"{kind}: {done} kills, {number} runs finished, all equal")

    def aim(self, child: Child, startup: float, length: float, write: float) -> str | None:
        """Kills a child of a training run: half of them while it saves, some as it starts."""
        target = self.draw.random()
        if target < 0.1:
            return child.kill_after(self.draw.uniform(0, startup))
        if not child.wait_for(b"t"):
            return None
        if target < 0.55:
            if not child.wait_for(b"w", self.draw.randint(1, 8)):
                return None
            return child.kill_after(self.draw.uniform(0, 1.2 * write))
        return child.kill_after(self.draw.uniform(0, 0.3 * length))

    def time_of_a_write(self, folder: Path) -> float:
        """Seconds to save a checkpoint of this run."""
        contents = checkpoints.load_checkpoint(folder / "last.pt")
        started = time.monotonic()
        for _ in range(3):
            checkpoints.save_checkpoint(self.scratch / "try.pt", contents)
        return (time.monotonic() - started) / 3

    def cache(self, kills: int) -> None:
        """Kills processes that tokenise and cache a corpus; half of them have worker processes."""
        folder = write_corpus(self.scratch / "to-cache", lines=(4000, 500, 400))
        expected, _ = data_utils.tokenise(folder, "all")
        started = time.monotonic()
        data_utils.load_corpus(str(folder))
        length = time.monotonic() - started
        (cache,) = folder.glob(".corpus-*.pkl")
        key = cache.stem.rsplit("-", 1)[1]
        done = 0
        while done < kills:
            cache.unlink(missing_ok=True)
            workers = self.draw.random() < 0.5
            child = Child(lambda workers=workers: load_with_workers(folder) if workers else load(folder))
            point = self.draw.choice([b"k", b"c"])
            assert child.wait_for(point)
            phase = child.kill_after(self.draw.uniform(0, length if point == b"k" else length / 8))
            if phase is None:
                continue
            done += 1
            self.kills["corpus cache", PHASES[phase]] += 1
            found = data_utils.load_cache(folder, "all", key)
            assert cache.exists() == (found is not None), "a cache that cannot be used was left"
            again = found or data_utils.load_corpus(str(folder))  # a reader makes its own
            assert again.vocabulary.words == expected.vocabulary.words
            for split in data_utils.SPLITS:
                assert torch.equal(getattr(again, split), getattr(expected, split))
        self.finished["corpus cache"] += done
        self.tell(f"corpus cache: {done} kills, every reader had the right ids")

    def download(self, kills: int, port: int, archive: bytes) -> None:
        """Kills processes that fetch a corpus, as texts and as an archive."""
        data_utils.DATA_FOLDER = self.scratch / "data"
        mirrors = [f"http://127.0.0.1:{port}/raw/", f"http://127.0.0.1:{port}/corpus.zip"]
        done, length = 0, None
        while done < kills or length is None:
            mirror = self.draw.choice(mirrors)
            published = data_utils.Published((mirror,), test_download.digests(archive), 10_000)
            data_utils.PUBLISHED = {"corpus": published}
            child = Child(lambda: load("corpus"))
            assert child.wait_for(b"d")
            begun = time.monotonic()
            if length is None:
                phase = None
                assert child.end() == 0
                length = time.monotonic() - begun
            else:
                phase = child.kill_after(self.draw.uniform(0, length))
            target = data_utils.DATA_FOLDER / "corpus"
            for path in data_utils.DATA_FOLDER.iterdir():
                assert path == target or path.name.endswith(".partial"), path
            if target.exists():
                for split, text in test_download.TEXTS.items():
                    assert (target / f"{split}.txt").read_bytes() == text
                shutil.rmtree(target)
            if phase is not None:
                done += 1
                self.kills["download", PHASES[phase]] += 1
        assert Child(lambda: load("corpus")).end() == 0  # with all the remains beside it
        assert (data_utils.DATA_FOLDER / "corpus").exists()
        self.finished["download"] += done
        self.tell(f"download: {done} kills, every corpus that was there was whole")


def load(folder: str | Path) -> None:
    """Loads a corpus."""
    data_utils.load_corpus(str(folder))


def load_with_workers(folder: Path) -> None:
    """Loads a corpus in small blocks, by two worker processes."""
    data_utils.BLOCK_BYTES, data_utils.PARALLEL_BYTES = 20_000, 0
    os.sched_getaffinity = lambda pid: {0, 1}
    load(folder)


def serve(archive: bytes) -> tuple[int, int]:
    """A slow mirror on loopback in a process of its own: (its pid, its port)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), test_download.Handler)
    server.daemon_threads = True
    server.requested = []

    def slowly(body: bytes) -> Callable:
        def reply(handler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            for start in range(0, len(body), len(body) // 5 + 1):
                time.sleep(0.004)
                with contextlib.suppress(OSError):
                    handler.wfile.write(body[start : start + len(body) // 5 + 1])

        return reply

    bodies = test_download.texts() | {"/corpus.zip": archive}
    server.files = {path: slowly(body) for path, body in bodies.items()}
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 2)
        server.serve_forever(0.05)
    port = server.server_port
    server.socket.close()
    return pid, port


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=flags.positive_int, default=240, help="in all")
    parser.add_argument("--seed", type=flags.seed_int, default=1)
    parser.add_argument("--outf", type=Path, default=None, metavar="PATH_WITHOUT_SUFFIX")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork keeps one thread only
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        os.environ.pop(name, None)
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    machine = runs.describe_environment()
    tell(f"python tests/kill_storm.py --kills {args.kills} --seed {args.seed}")
    tell(
        f"torch {torch.__version__}, Python {platform.python_version()}, {machine['cpu']}, "
        f"{machine['cpu_cores']} cores shared with other work, commit {machine['commit']}, "
        f"{time.strftime('%Y-%m-%d %H:%M %Z')}"
    )
    started = time.monotonic()
    archive = test_download.zipped(test_download.TEXTS)
    server, port = serve(archive)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            storm = Storm(Path(scratch), random.Random(args.seed), tell)
            # Three quarters for training, which is what loses days.
            each = args.kills * 3 // 4 // len(RUNS)
            for kind in RUNS:
                storm.train(kind, each)
            rest = args.kills - each * len(RUNS)
            storm.cache(rest // 2)
            storm.download(rest - rest // 2, port, archive)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    tell("")
    for (kind, phase), count in sorted(storm.kills.items()):
        tell(f"{kind:<24}{phase:<28}{count:>4}")
    tell(f"{'in all':<52}{storm.kills.total():>4}")
    tell(f"of these {storm.before_begin} before the run had written its args.json: nothing to resume yet")
    trained = sum(storm.finished[kind] for kind in RUNS)
    tell(
        f"{trained} training runs finished and equal to the uninterrupted one in every bit; "
        f"{time.monotonic() - started:.0f} s by the clock"
    )
    if args.outf:
        args.outf.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

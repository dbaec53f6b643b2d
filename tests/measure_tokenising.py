"""Time and peak memory of tokenising a text of WikiText-103's shape, against the obvious loop over it twice.

    python tests/measure_tokenising.py --tokens 103000000 --types 267735

writes a text of that size to a temporary folder, reads it in fresh processes in both ways, compares the
results and prints a table. The loop takes some minutes at that size.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def write_texts(folder: Path, tokens: int, types: int, seed: int = 1) -> None:
    """Three texts with `tokens` tokens and `types` types in all, `<eos>` included, frequencies after Zipf."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxzéñøß"))
    sizes = [max(3, rank.bit_length() // 3 + 1) for rank in range(types - 1)]  # rare words are longer
    words = np.array(
        ["".join(letters[[rank // 30**i % 30 for i in range(n)]]) + " " for rank, n in enumerate(sizes)],
        dtype=object,
    )
    cumulative = np.cumsum(1 / (np.arange(types - 1) + 3.0))
    line = 56  # words, about what WikiText-103 has

    def write(name, count, start):
        with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
            while count > 0:
                now = min(count, 1 << 20)
                draws = rng.random(now) * cumulative[-1]
                ranks = np.minimum(np.searchsorted(cumulative, draws), types - 2)
                ranks[: len(start)] = start[:now]  # every type occurs
                start = start[now:]
                chunk = words[ranks]
                chunk[line::line + 1] = "\n"  # the place of a word: its <eos> is counted as a token
                chunk[-1] = "\n"
                file.write("".join(chunk.tolist()))
                count -= now

    held_out = max(tokens // 400, 2)
    write("train.txt", tokens - 2 * held_out, np.repeat(rng.permutation(types - 1), 2))
    write("valid.txt", held_out, np.empty(0, np.int64))
    write("test.txt", held_out, np.empty(0, np.int64))


def obvious_loop(folder: Path) -> tuple[list[str], dict[str, array]]:
    """Count the words line by line, then read again and look up each: what `load_corpus` must equal."""
    counts = Counter()
    for split in ("train", "valid", "test"):
        with open(folder / f"{split}.txt", encoding="utf-8-sig", newline="\n") as file:
            for text in file:
                for word in [*text.split(), "<eos>"]:
                    counts[word] += 1
    words = sorted(counts, key=lambda word: (-counts[word], word))
    index = {word: i for i, word in enumerate(words)}
    ids = {}
    for split in ("train", "valid", "test"):
        ids[split] = array("i")
        with open(folder / f"{split}.txt", encoding="utf-8-sig", newline="\n") as file:
            for text in file:
                for word in [*text.split(), "<eos>"]:
                    ids[split].append(index[word])
    return words, ids


def measure(way: str, folder: Path) -> dict:
    """One way, in this process: seconds, peak memory in MB before and after, a digest of the result."""
    import resource

    import data_utils

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # given in kB on Linux

    def processor_seconds():  # of this process and those it has waited for
        both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(sum(resource.getrusage(who)[:2]) for who in both)

    before, busy_before, started = peak(), processor_seconds(), time.perf_counter()
    if way == "obvious loop":
        words, ids = obvious_loop(folder)
        seconds = time.perf_counter() - started
        arrays = [np.asarray(ids[split]) for split in ("train", "valid", "test")]
    else:
        corpus = data_utils.load_corpus(str(folder))
        seconds = time.perf_counter() - started
        words = corpus.vocabulary.words
        arrays = [corpus.train.numpy(), corpus.valid.numpy(), corpus.test.numpy()]
    after, busy = peak(), processor_seconds() - busy_before
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    digest = hashlib.sha256("\n".join(words).encode())
    for ids in arrays:
        for start in range(0, len(ids), 1 << 20):
            digest.update(ids[start : start + (1 << 20)].astype(np.int64).tobytes())
    size = sum(ids.nbytes for ids in arrays) / 1e6
    return {
        "way": way, "seconds": seconds, "busy": busy, "before": before, "peak": after, "worker": worker,
        "ids": size, "tokens": sum(map(len, arrays)), "types": len(words), "digest": digest.hexdigest(),
    }  # fmt: skip


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--types", type=int, default=30_000)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder), args.tokens, args.types)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"{args.tokens:,} tokens, {args.types:,} types, {size / 1e6:,.0f} MB of text")
        print(
            f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.system()}, "
            f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} before the start"
        )
        heads = ("seconds", "x loop", "CPU s", "peak MB", "at start", "ids MB", "worker MB")
        print(f"{'way':<24}" + "".join(f"{head:>10}" for head in heads))
        rows = []
        for way in ("obvious loop", "load_corpus, no cache", "load_corpus, cached"):
            command = [sys.executable, __file__, "--one", way, folder]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rows.append(row)
            numbers = [row["seconds"], rows[0]["seconds"] / row["seconds"], row["busy"]]
            sizes = [row["peak"], row["before"], row["ids"], row["worker"]]
            cells = [f"{x:>10.1f}" for x in numbers] + [f"{x:>10.0f}" for x in sizes]
            print(f"{way:<24}" + "".join(cells), flush=True)
        assert len({(row["digest"], row["tokens"], row["types"]) for row in rows}) == 1, "results differ"
        assert rows[0]["tokens"] == args.tokens and rows[0]["types"] == args.types, rows[0]
        print("results equal")


if __name__ == "__main__":
    main()

"""Measure time and peak memory of loading a corpus, compared with an obvious loop over its texts.

    python tools/measure_tokenising.py --tokens 103000000 --types 267735

writes texts of that size (here that of WikiText-103), reads them in each way in a fresh process, checks that
the results are equal and prints a table. The loop takes some minutes at that size. Linux and macOS only.
"""

import argparse
import hashlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from pathlib import Path

import _project  # noqa: F401
import numpy as np

from data_utils import EOS, SPLITS, load_corpus

WAYS = ("obvious loop", "load_corpus, no cache", "load_corpus, cached")


def write_texts(folder: Path, tokens: int, types: int, seed: int = 1) -> None:
    """Write three texts of `tokens` tokens and `types` types, `<eos>` included, with Zipf frequencies."""
    rng = np.random.default_rng(seed)
    letters = list("etaoinshrdlucmfwypvbgkjqxzéñøß")
    sizes = [max(3, rank.bit_length() // 3 + 1) for rank in range(types - 1)]  # rare words are longer
    words = np.array(
        ["".join(letters[rank // 30**i % 30] for i in range(size)) + " " for rank, size in enumerate(sizes)],
        dtype=object,
    )
    cumulative = np.cumsum(1 / (np.arange(types - 1) + 3.0))
    held_out = max(tokens // 400, 2)
    start = np.repeat(rng.permutation(types - 1), 2)  # train.txt begins with every word twice
    for split, count in zip(SPLITS, (tokens - 2 * held_out, held_out, held_out), strict=True):
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            while count > 0:
                draws = rng.random(min(count, 1 << 20)) * cumulative[-1]
                ranks = np.minimum(np.searchsorted(cumulative, draws), types - 2)
                ranks[: len(start)] = start[: len(ranks)]
                start = start[len(ranks) :]
                chunk = words[ranks]
                chunk[56::57] = "\n"  # about the sentence length of WikiText-103; the <eos> replaces a word
                chunk[-1] = "\n"
                file.write("".join(chunk.tolist()))
                count -= len(ranks)


def obvious_loop(folder: Path) -> tuple[list[str], list[np.ndarray]]:
    """Count words line by line, then read again and look up each word."""

    def words_of(split):
        with open(folder / f"{split}.txt", encoding="utf-8", newline="\n") as file:
            for line in file:
                yield from line.split()
                yield EOS

    counts = Counter(word for split in SPLITS for word in words_of(split))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    index = {word: i for i, word in enumerate(words)}
    return words, [np.asarray(array("i", map(index.__getitem__, words_of(split)))) for split in SPLITS]


def measure(way: str, folder: Path) -> dict:
    """Read a corpus in one way, in this process; return seconds, peak memory in MB and a digest."""

    def peak():
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    before, busy, started = peak(), time.process_time(), time.perf_counter()
    if way == "obvious loop":
        words, ids = obvious_loop(folder)
    else:
        corpus = load_corpus(str(folder))
        words, ids = corpus.vocabulary.words, [getattr(corpus, split).numpy() for split in SPLITS]
    busy, seconds, after = time.process_time() - busy, time.perf_counter() - started, peak()
    digest = hashlib.sha256("\n".join(words).encode())
    for text in ids:
        digest.update(text.astype(np.int32).tobytes())
    numbers = [seconds, busy, before, after, sum(text.nbytes for text in ids) / 1e6]
    return {"numbers": numbers, "result": [sum(map(len, ids)), len(words), digest.hexdigest()]}


def main() -> None:
    """Measure each way in a new process and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, default=2_000_000, help="size of the texts (default: %(default)s)"
    )
    parser.add_argument("--types", type=int, default=30_000, help="different words (default: %(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder), args.tokens, args.types)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        print(f"{args.tokens:,} tokens, {args.types:,} types, {size:,.0f} MB of text")
        print(f"Python {platform.python_version()}, NumPy {np.__version__}, {platform.system()}")
        heads = ("seconds", "CPU s", "MB before", "peak MB", "ids MB")
        print(f"{'way':<24}" + "".join(f"{head:>10}" for head in heads))
        results = []
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, folder]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"{way:<24}" + "".join(f"{number:>10.1f}" for number in row["numbers"]), flush=True)
            results.append(row["result"])
    assert all(result == results[0] for result in results), "the results differ"
    assert results[0][:2] == [args.tokens, args.types], results[0]
    print("results equal")


if __name__ == "__main__":
    main()

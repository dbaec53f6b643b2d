"""Word-level corpora: vocabulary, tokenizing, cache, download, and parallel streams of tokens for training.

A corpus is a folder with train.txt, valid.txt and test.txt in UTF-8. Words are what `str.split` returns, a
line ends at a line feed, and every line, blank or not, ends in one `<eos>` token. A line that already ends in
the word `<eos>` stays as it is. Byte order marks at the start of a line or inside a word are removed.
Carriage returns count as white space.

This command makes a corpus, here data/book, from any text:

    python data_utils.py book.txt
"""

import argparse
import codecs
import hashlib
import itertools
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training import checkpoints
from training.console import UserError, run_script, say, warn
from training.files import atomic_write

import numpy as np
import torch
from tqdm import tqdm

from corpora import download, punctuation

EOS = "<eos>"
UNK = "<unk>"
IGNORED = -100  # target at a position without a word; every loss of this project skips negative targets
SPLITS = download.SPLITS
DATA_FOLDER = Path(__file__).resolve().parent / "data"
FEW_TOKENS = 1000  # with 2 nats of deviation per token, their perplexity is uncertain by 6 %

# ---- vocabulary, corpus


class Vocabulary:
    """Words and their ids, 0 to V - 1.

    Args:
        words: all different; the id of a word is its position. Adaptive softmax expects frequent words first.

    Raises:
        ValueError: the words are not strings or not all different.
    """

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}
        if not all(isinstance(word, str) for word in self.words):
            raise ValueError("words must be strings")
        if len(self.index) != len(self.words):
            raise ValueError(f"words must differ, got {len(self.index):,} different of {len(self.words):,}")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str], allow_unknown: bool = False) -> list[int]:
        """Return the ids of words; an unknown word is `<unk>` if allowed and available, else a UserError."""
        words = list(words)
        unknown = list(dict.fromkeys(word for word in words if word not in self.index))
        if unknown and not (allow_unknown and UNK in self.index):
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise UserError(
                f"not in the vocabulary of {len(self):,} words: {shown}. Words are whole tokens of the "
                "training text: check spelling, capitals, and the spaces around punctuation marks. A corpus "
                f"that data_utils.py makes with --vocab-size has {UNK} for unknown words."
            )
        return [self.index.get(word, self.index.get(UNK)) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of ids, which are from 0 to V - 1."""
        return [self.words[i] for i in ids]


@dataclass
class Corpus:
    """Three texts as 1-D tensors of ids, of the smallest of uint8, int16, int32, int64 that holds them."""

    folder: Path
    vocabulary: Vocabulary
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor

    def fingerprint(self) -> str:
        """Return a digest of vocabulary and ids, to check that a run is resumed on the same corpus."""
        digest = hashlib.sha256("\n".join(self.vocabulary.words).encode("utf-8", errors="surrogatepass"))
        for ids in (self.train, self.valid, self.test):
            digest.update(f"\0{len(ids)}\0".encode())
            digest.update(ids.numpy())
        return digest.hexdigest()


def load_corpus(data: str, vocab_from: str = "all") -> Corpus:
    """Load a corpus from its cache, or from its texts if these have changed or have no cache.

    Args:
        data: a folder, or the name of one under data/. The WikiText corpora are downloaded if missing.
        vocab_from: "all" gives every word of the three texts an id, in order of descending count, equal
            counts alphabetically. "train" does so for the words of train.txt only; all others become `<unk>`.

    Raises:
        UserError: no such folder; a text missing, empty or not UTF-8; a failed download.
    """
    folder = find_folder(data)
    check_folder(folder)
    key = hashlib.sha256(f"{CACHE_FORMAT} {vocab_from}".encode())
    for split in SPLITS:
        key.update(b"\0")  # which no text contains
        with open(folder / f"{split}.txt", "rb") as file:
            while block := file.read(BLOCK_BYTES):
                key.update(block)
    path = folder / f".corpus-{vocab_from}-{key.hexdigest()[:32]}.pt"
    corpus = load_cache(path)
    if corpus is None:
        corpus = tokenize(folder, vocab_from)
        save_cache(corpus, path)
    if UNK in corpus.vocabulary.index:
        unk = corpus.vocabulary.index[UNK]
        train, valid, test = (int((getattr(corpus, split) == unk).sum()) for split in SPLITS)
        if not train and valid + test:
            warn(
                f"{UNK} occurs in valid.txt ({valid:,}) and test.txt ({test:,}) but not in train.txt: the "
                "model cannot learn its probability. Replace rare words of train.txt by it, as data_utils.py "
                "does with a --vocab-size below the number of words."
            )
    return corpus


def find_folder(data: str) -> Path:
    """Return the folder `data`, or else data/<name> beside this file; download a published corpus if needed.

    A folder without any of the three texts is skipped.
    """
    parts = Path(data).parts  # ("data", "x") for ./data/x
    name = parts[-1] if len(parts) == 1 or (len(parts) == 2 and parts[0] == "data") else None
    candidates = [Path(data), DATA_FOLDER / name] if name else [Path(data)] if data else []
    for folder in candidates:
        if any(os.path.isfile(folder / f"{split}.txt") for split in SPLITS):
            return folder
    if name in download.PUBLISHED:
        download.fetch(name, DATA_FOLDER / name)
        return DATA_FOLDER / name
    for folder in candidates:
        if os.path.isdir(folder):
            return folder  # check_folder says what is missing
    if data and os.path.exists(data):
        raise UserError(
            f"{data} is a file. Expected a folder with train.txt, valid.txt and test.txt. To make one from a "
            f"text: python data_utils.py {shlex.quote(data)}"
        )
    raise UserError(
        f"no folder {data!r:.300}, and none of that name in {DATA_FOLDER}. Expected a folder with train.txt, "
        "valid.txt and test.txt, the bundled corpus 'tiny', or one that can be downloaded: "
        f"{', '.join(map(repr, download.PUBLISHED))}. If it was moved, give its new folder with --data."
    )


def check_folder(folder: Path) -> None:
    """Raise a UserError unless the folder contains the three texts."""
    found = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not os.path.isfile(path):
            what = f"{path} is not a file" if path.name in found else f"no {path.name} in {folder}"
            listed = ", ".join(found[:8]) + (f" and {len(found) - 8:,} more" if len(found) > 8 else "")
            advice = ""
            if not any(f"{split}.txt" in found for split in SPLITS) and any(folder.glob("*.txt")):
                advice = f" To make them from its texts: python data_utils.py {shlex.quote(str(folder))}"
            raise UserError(
                f"{what} (found: {listed or 'nothing'}). "
                f"Expected train.txt, valid.txt and test.txt, one sentence per line.{advice}"
            )


# ---- tokenizing

CACHE_FORMAT = 4
BLOCK_BYTES = 1 << 20  # bytes of text processed at a time; as words they take about twelve times the memory
# Within a line, WikiText-2 has U+FEFF as a word; it is kept. At a line's start or in a word it is a mark.
BYTE_ORDER_MARK = re.compile(r"(?m)^\ufeff|(?<=\S)\ufeff|\ufeff(?=\S)")
BEFORE_LAST_WORD = re.compile(rb".* (?=[!-~])", re.DOTALL)
EOS_AT_LINE_END = re.compile(r"(?<!\S)<eos>[^\S\n]*(?=\n)")


def tokenize(folder: Path, vocab_from: str) -> Corpus:
    """Read the three texts once and return the corpus.

    Words are first numbered in order of appearance. Once all are counted, ids replace these numbers.
    """
    numbers = defaultdict(itertools.count().__next__)  # a new word gets the next number
    texts, known = {}, 0
    total = sum(os.path.getsize(folder / f"{split}.txt") for split in SPLITS)
    with tqdm(total=total, unit="B", unit_scale=True, delay=1, disable=None, desc="tokenizing") as progress:
        for split in SPLITS:
            path, chunks = folder / f"{split}.txt", []
            for text in read_text(path):
                words = EOS_AT_LINE_END.sub("", text) if EOS in text else text
                words = words.replace("\n", f" {EOS} ").split()
                chunks.append(np.fromiter(map(numbers.__getitem__, words), np.int32, len(words)))
                progress.update(len(text.encode()))
            if not chunks:
                raise UserError(f"{path} is empty. Expected one sentence per line, words between spaces.")
            texts[split] = np.concatenate(chunks)
            if split == "train" or vocab_from == "all":
                known = len(numbers)

    counted = SPLITS if vocab_from == "all" else ("train",)
    counts = sum(np.bincount(texts[split], minlength=len(numbers)) for split in counted).tolist()
    words = list(numbers)
    order = sorted(range(known), key=lambda number: (-counts[number], words[number]))
    vocabulary = Vocabulary([words[number] for number in order])
    if vocab_from == "train" and UNK not in vocabulary.index:
        vocabulary = Vocabulary([*vocabulary.words, UNK])
    dtype = smallest_dtype(len(vocabulary))
    ids = np.full(len(numbers), vocabulary.index.get(UNK, 0), dtype)  # by number
    ids[order] = np.arange(known, dtype=dtype)
    splits = {split: torch.from_numpy(ids[texts.pop(split)]) for split in SPLITS}
    return Corpus(folder, vocabulary, **splits)


def read_text(path: Path) -> Iterator[str]:
    """Yield a text in blocks that end between words, without byte order marks and with a final line feed.

    Raises:
        UserError: the file is not UTF-8.
    """
    data, offset, more = b"", 0, True
    with open(path, "rb") as file:
        while more:
            block = file.read(BLOCK_BYTES)
            data += block
            more = len(block) == BLOCK_BYTES
            cut = data.rfind(b"\n") + 1 if more else len(data)
            if not cut and (start := BEFORE_LAST_WORD.match(data)):  # in a line longer than a block
                cut = start.end()
            try:
                text = data[:cut].decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_text(path, offset + error.start) from None
            if "\0" in text:
                raise not_text(path, offset + data.index(b"\0"))
            if "\ufeff" in text:
                text = BYTE_ORDER_MARK.sub("", text)
            if text:
                yield text if more or text.endswith("\n") else text + "\n"
            data, offset = data[cut:], offset + cut


BINARY = {  # kinds of files by their first bytes
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip archive, as .docx, .epub and .odt files are",
    b"%PDF": "a PDF file",
    b"\xd0\xcf\x11\xe0": "an old Office document, as .doc files are",
}


def not_text(path: Path, offset: int) -> UserError:
    """Return the error for a file that is not UTF-8 at byte `offset`, with what to do."""
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(offset)
        byte = file.read(1)
    for signature, kind in BINARY.items():
        if start.startswith(signature):
            return UserError(f"{path} is {kind}. Expected plain text in UTF-8: unpack it or save it as text.")
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or byte == b"\0"
    encoding = "UTF-16" if utf16 else "CP1252"  # which contains Latin-1 without its control characters
    return UserError(
        f"{path} is not UTF-8 text: byte {offset:,} is 0x{byte.hex()}. Expected plain text. If it has "
        f"another encoding, convert it, for example with: iconv -f {encoding} -t UTF-8 {path.name} > "
        "converted.txt"
    )


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type for ids below `vocab_size`; not uint16, for which torch lacks operations."""
    for dtype in (np.uint8, np.int16, np.int32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int64)


# ---- cache


def save_cache(corpus: Corpus, path: Path) -> None:
    """Write the cache and remove outdated ones of the same option; if it cannot be written, warn."""
    words = "\n".join(corpus.vocabulary.words)  # no word contains white space
    contents = {"words": words, **{split: getattr(corpus, split) for split in SPLITS}}
    if checkpoints.try_save_checkpoint(path, contents):
        for other in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
            if other != path:
                other.unlink(missing_ok=True)


def load_cache(path: Path) -> Corpus | None:
    """Return the corpus from its cache; None if there is no cache, or with a warning if it is unusable."""
    if not path.exists():
        return None
    try:
        contents = checkpoints.load_checkpoint(path)
        vocabulary = Vocabulary(contents["words"].split("\n"))
        return Corpus(path.parent, vocabulary, *(contents[split] for split in SPLITS))
    except (UserError, LookupError):
        warn(f"the corpus cache {path} cannot be read or is damaged; the texts are tokenized again")
        return None


# ---- batching


class TokenStreams:
    """The N - 1 (token, next token) pairs of a text, in B parallel streams of consecutive tokens.

    Read stream after stream, the pairs are those of the text in order. No pair is dropped, and the lengths of
    streams differ by at most one. Ids keep their small type; each window is converted to int64 on `device`.

    Args:
        ids: the text, (N,).
        batch_size: number of streams B.
        device: where the text is kept.

    Attributes:
        length: pairs in the longest stream.
        num_pairs: N - 1.

    Raises:
        UserError: fewer pairs than streams.
    """

    def __init__(self, ids: torch.Tensor, batch_size: int, device: str | torch.device = "cpu"):
        self.num_pairs = max(len(ids) - 1, 0)
        if self.num_pairs < batch_size:
            raise UserError(
                f"a text of {len(ids):,} tokens, <eos> included, is too short for a batch of {batch_size:,}, "
                f"which needs {batch_size + 1:,}. "
                + (f"Use a batch of at most {self.num_pairs:,}." if self.num_pairs else "Use a longer text.")
            )
        self.ids = ids.to(device)
        self.batch_size = batch_size
        # The first num_longer streams are longer by 1.
        self.shortest, self.num_longer = divmod(self.num_pairs, batch_size)
        self.length = self.shortest + (self.num_longer > 0)
        stream = torch.arange(batch_size, device=device)
        self.starts = stream * self.shortest + stream.clamp(max=self.num_longer)  # (B,)

    def windows(self, bptt: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the windows of `bptt` positions; the last window may be shorter.

        Yields:
            tokens and targets, both (B, t) int64 on the device. Where a stream has ended, the target is
            IGNORED and the token 0. Nothing here waits for a GPU.
        """
        for first in range(0, self.length, bptt):
            yield self.window(first, min(first + bptt, self.length))

    def window(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and targets of the positions from `first` to `stop` - 1, as `windows` yields them."""
        positions = self.starts[:, None] + torch.arange(first, stop, device=self.ids.device)  # (B, t)
        ended = stop > self.shortest and self.num_longer > 0  # the shorter streams, before the last position
        if ended:
            positions.clamp_(max=self.num_pairs - 1)
        tokens, targets = self.ids[positions].long(), self.ids[positions + 1].long()
        if ended:
            tokens[self.num_longer :, -1] = 0
            targets[self.num_longer :, -1] = IGNORED
        return tokens, targets


# ---- raw texts


def paragraphs(texts: list[str]) -> tuple[list[str], str]:
    """Return the texts' paragraphs, if blank lines separate them at least 20 times, or lines; and which."""
    found = [re.split(r"\n\s*\n", text.strip()) for text in texts]
    if sum(len(parts) - 1 for parts in found) >= 20:
        return [" ".join(paragraph.split()) for parts in found for paragraph in parts], "paragraphs"
    return [line for text in texts for line in text.split("\n") if line.strip()], "lines"


def read_texts(paths: list[Path]) -> list[str]:
    """Return the texts of files, and of the .txt files of folders, sorted by name."""
    texts = []
    for path in paths:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"no .txt file in the folder {path}. Name a folder of texts, or the files.")
        for file in files:
            texts.append("".join(read_text(file)))
            if not texts[-1].strip():
                raise UserError(f"{file} is empty. Omit it.")
    return texts


def main(argv: list[str] | None = None) -> None:
    """Make a corpus from raw texts."""
    parser = argparse.ArgumentParser(
        description="Make a corpus from raw texts: one paragraph per line, words and punctuation marks "
        "separated by spaces, 90 percent for training, the next 5 for validation and the last 5 for testing."
    )
    parser.add_argument(
        "texts", nargs="+", type=Path, metavar="TEXT",
        help="UTF-8 files, in order; a folder means its .txt files, sorted by name",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="folder of the corpus (default: data/book for book.txt or a folder book)",
    )  # fmt: skip
    parser.add_argument("--lower", action="store_true", help="convert to lower case")
    parser.add_argument(
        "--vocab-size", "--vocab_size", type=int, metavar="N",
        help="words in the vocabulary, <unk> and <eos> included; rarer ones become <unk> (default: all)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    out = args.out or DATA_FOLDER / args.texts[0].resolve().stem
    if any((out / f"{split}.txt").exists() for split in SPLITS):
        raise UserError(f"{out} already contains a corpus. Choose another folder with --out.")
    if args.vocab_size is not None and args.vocab_size < 3:
        raise UserError(f"--vocab-size must be at least 3, got {args.vocab_size}.")
    units, unit = paragraphs(read_texts(args.texts))
    lines = [line.split() for line in punctuation.separate("\n".join(units), args.lower).split("\n")]
    if len(lines) < 3:
        raise UserError(f"too few lines to split into three texts: {len(lines)}. Use at least 3 lines.")
    ends = np.cumsum([len(line) + 1 for line in lines])  # tokens up to the end of each line
    first, second = np.searchsorted(20 * ends, [18 * ends[-1], 19 * ends[-1]], side="right")
    first = np.clip(first, 1, len(lines) - 2)  # every part has a line
    second = np.clip(second, first + 1, len(lines) - 1)
    splits = dict(zip(SPLITS, (lines[:first], lines[first:second], lines[second:]), strict=True))
    if args.vocab_size is not None:
        counts = Counter(word for line in splits["train"] for word in line if word != UNK)
        known = {word for word, _ in counts.most_common(args.vocab_size - 2)}
        for line in lines:
            line[:] = [word if word in known else UNK for word in line]
    out.mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        content = "".join(" ".join(line) + "\n" for line in part).encode()
        atomic_write(out / f"{split}.txt", lambda file, content=content: file.write(content))
        tokens = sum(map(len, part)) + len(part)
        say(f"{out / split}.txt: {len(part):,} {unit}, {tokens:,} tokens")
        if split != "train" and tokens < FEW_TOKENS:
            warn(f"{split}.txt has fewer than {FEW_TOKENS:,} tokens, too few for a reliable perplexity")
    name = out.name if args.out is None else str(out)
    say(f"To train on it: python train_rmc.py --recipe tiny --data {shlex.quote(name)}")


if __name__ == "__main__":
    run_script(main)

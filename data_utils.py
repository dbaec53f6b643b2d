"""Word-level corpora: vocabulary, tokenising, cache, download, and columns of tokens for training.

A corpus is a folder with train.txt, valid.txt and test.txt in UTF-8. Words are what `str.split` yields (any Unicode
white space separates), a line ends at a line feed, and every line, blank ones included, ends in one `<eos>` token.
"""

import codecs
import contextlib
import errno
import hashlib
import os
import pickle
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runs import UserError, atomic_write, warn

EOS = "<eos>"
UNK = "<unk>"
IGNORED = -100  # target of a place without a word; every loss of the project skips negative targets
SPLITS = ("train", "valid", "test")
DATA_FOLDER = Path(__file__).resolve().parent / "data"
BLOCK_BYTES = 1 << 17  # text handled at once: small enough that its words stay in the processor's cache


# ---------------------------------------------------------------------------------------------------- vocabulary


class Vocabulary:
    """Words and their ids, 0 to V - 1.

    Args:
        words: all different; the id of a word is its position. Adaptive softmax wants the frequent words first.
    """

    def __init__(self, words: list[str]):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}
        if len(self.index) != len(self.words):
            raise ValueError(f"words must differ, got {len(self.words):,} with {len(self.index):,} different ones")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Iterable[str], allow_unknown: bool = False) -> list[int]:
        """Ids of words. An unknown word is a UserError, or with `allow_unknown` the id of `<unk>` if there is one."""
        words = list(words)
        missing = list(dict.fromkeys(word for word in words if word not in self.index))
        if missing and not (allow_unknown and UNK in self.index):
            shown = ", ".join(repr(word) for word in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"not among the {len(self):,} words of the vocabulary: {shown}. "
                "Words are whole tokens of the training text: check spelling, case and spaces around punctuation."
            )
        return [self.index[word] if word in self.index else self.index[UNK] for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of ids; an id outside 0 to V - 1 is a ValueError (a negative one would silently count from the end)."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                raise ValueError(f"ids must be from 0 to {len(self) - 1:,}, got {i}")
        return [self.words[i] for i in ids]


@dataclass
class Corpus:
    """Three splits as 1-D tensors of ids, in the smallest of uint8, int16, int32 and int64 that holds every id."""

    folder: Path
    vocabulary: Vocabulary
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor


def load_corpus(data: str, vocab_from: str = "all") -> Corpus:
    """Read the corpus that `data` names, from its cache when the texts have not changed.

    Args:
        data: a folder, or the name of one under data/.
        vocab_from: "all": the words of the three splits; "train": those of train.txt, the others becoming `<unk>`.

    Raises:
        UserError: no such folder, a file missing, empty or not UTF-8 text.
    """
    if vocab_from not in ("all", "train"):
        raise ValueError(f"vocab_from must be 'all' or 'train', got {vocab_from!r}")
    folder = find_folder(data)
    check_folder(folder)
    key = corpus_key(hash_files(folder), vocab_from)
    corpus = load_cache(folder, vocab_from, key)
    if corpus is None:
        corpus, digests = tokenise(folder, vocab_from)
        # Keyed by the bytes that were tokenised, not by those hashed above: somebody may be writing the files.
        save_cache(corpus, vocab_from, corpus_key(digests, vocab_from))
    return corpus


def find_folder(data: str) -> Path:
    """The folder meant by `data`: itself, or data/<name> beside this file."""
    if data and os.path.isdir(data):
        return Path(data)
    parts = Path(os.path.normpath(data)).parts
    name = parts[-1] if parts and parts[:-1] in ((), ("data",)) else None
    if name and os.path.isdir(DATA_FOLDER / name):
        return DATA_FOLDER / name
    raise UserError(f"no corpus {data!r}. Expected a folder with train.txt, valid.txt and test.txt, or a name under data/.")


def check_folder(folder: Path) -> None:
    """Raise a UserError unless the folder holds the three files."""
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as problem:
        raise UserError(f"cannot read the folder {folder} ({problem.strerror}). Check its permissions.") from None
    for split in SPLITS:
        if not os.path.isfile(folder / f"{split}.txt"):
            what = "is not a file" if f"{split}.txt" in found else None
            listed = ", ".join(found[:8]) + (f" and {len(found) - 8:,} more" if len(found) > 8 else "")
            problem = f"{folder / split}.txt {what}" if what else f"no {split}.txt in {folder}"
            raise UserError(
                f"{problem} (found: {listed or 'nothing'}). "
                "Expected train.txt, valid.txt and test.txt, one sentence per line."
            )


# ---------------------------------------------------------------------------------------------------- tokenising


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type that holds ids below `vocab_size` (torch cannot index tensors of uint16)."""
    for dtype in (np.uint8, np.int16, np.int32):
        if vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    return np.dtype(np.int64)


def read_blocks(path: Path, digest) -> Iterator[bytes]:
    """The bytes of a file in blocks that end where a word ends; `digest` is updated with all of them."""
    with open(path, "rb") as file:
        pending = []
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            # Both bytes stand for themselves wherever they occur in UTF-8, so no character is cut.
            cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
            if cut == 0:  # within a very long word
                pending.append(block)
                continue
            yield b"".join([*pending, block[:cut]])
            pending = [block[cut:]]
        yield b"".join(pending)


def read_words(path: Path, digest, progress: tqdm | None = None) -> Iterator[list[str]]:
    """Lists of the words of a text file, `<eos>` after each line; a last line without line feed counts as a line."""
    offset = 0
    last = b"\n"
    for block in read_blocks(path, digest):
        if not block:
            continue
        skip = len(codecs.BOM_UTF8) if offset == 0 and block.startswith(codecs.BOM_UTF8) else 0
        nul = block.find(b"\0")
        try:
            text = block[skip:].decode("utf-8")
        except UnicodeDecodeError as problem:
            raise not_text(path, offset + skip + problem.start) from None
        if nul >= 0:
            raise not_text(path, offset + nul)
        yield text.replace("\n", f" {EOS} ").split()
        offset += len(block)
        last = block[-1:] if len(block) > skip else last
        if progress is not None:
            progress.update(len(block))
    if last != b"\n":
        yield [EOS]


def not_text(path: Path, offset: int) -> UserError:
    """The error for a file that is not UTF-8 text, with what it may be instead."""
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(offset)
        byte = file.read(1)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        guess, encoding = "It starts like UTF-16", "UTF-16"
    elif byte == b"\0":
        guess, encoding = "It looks like UTF-16 or no text at all", "UTF-16"
    else:
        guess, encoding = "It may be Latin-1", "LATIN1"
    value = f"0x{byte[0]:02x}" if byte else "end of file"
    return UserError(
        f"{path} is not UTF-8 text: byte {offset:,} is {value}. {guess}; "
        f"convert it, for example with: iconv -f {encoding} -t UTF-8 {path.name} > converted.txt"
    )


def tokenise(folder: Path, vocab_from: str) -> tuple[Corpus, list[str]]:
    """Read the three texts once; returns the corpus and the SHA-256 of each file.

    A word's provisional id is the order in which words first appear, which a dictionary gives while it is looked up.
    Ids by frequency follow by permuting numbers, so no word is split or looked up twice.
    """
    index: defaultdict[str, int] = defaultdict()
    index.default_factory = index.__len__  # an unseen word gets the next id
    provisional: dict[str, list[np.ndarray]] = {}
    digests = []
    train_types = 0
    total_bytes = sum(os.path.getsize(folder / f"{split}.txt") for split in SPLITS)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, delay=1, disable=None, desc="tokenising") as progress:
        for split in SPLITS:
            path = folder / f"{split}.txt"
            digest = hashlib.sha256()
            try:
                provisional[split] = [
                    np.fromiter(map(index.__getitem__, words), np.int32, len(words))
                    for words in read_words(path, digest, progress)
                ]
            except OSError as problem:
                raise UserError(f"cannot read {path} ({problem.strerror}). Check the file and its permissions.") from None
            if not any(map(len, provisional[split])):
                raise UserError(f"{path} is empty. Expected one sentence per line, words separated by spaces.")
            digests.append(digest.hexdigest())
            if split == "train":
                train_types = len(index)

    counted = SPLITS if vocab_from == "all" else ("train",)
    counts = np.zeros(len(index) + 1, np.int64)  # one more for <unk>, should it be missing
    for split in counted:
        for chunk in provisional[split]:
            counts[: len(index)] += np.bincount(chunk, minlength=len(index))
    words = list(index)
    kept = len(words)
    if vocab_from == "train":
        kept = train_types
        if index.get(UNK, kept) >= kept:  # not a word of train.txt
            words = [*words[:kept], UNK]
            counts[kept] = 0
            kept += 1
    order = sorted(range(kept), key=lambda i: (-counts[i], words[i]))
    vocabulary = Vocabulary([words[i] for i in order])
    dtype = smallest_dtype(kept)
    final = np.full(len(index) + 1, vocabulary.index.get(UNK, 0), dtype)  # words beyond `kept` stay <unk>
    final[order] = np.arange(kept, dtype=dtype)
    splits = {}
    for split in SPLITS:
        chunks = provisional.pop(split)
        ids = np.empty(sum(map(len, chunks)), dtype)
        end = 0
        for i, chunk in enumerate(chunks):
            ids[end : end + len(chunk)] = final[chunk]
            end += len(chunk)
            chunks[i] = None  # freed as we go: one copy of the ids in memory, not two
        splits[split] = torch.from_numpy(ids)
    return Corpus(folder, vocabulary, **splits), digests


# --------------------------------------------------------------------------------------------------------- cache
#
# A pickle file next to the texts, followed by the SHA-256 of the pickle. It holds one dictionary of strings, numbers
# and bytes, so its reader can refuse every name of a class or function, and with that everything that could run code.

CACHE_FORMAT = 1


def hash_files(folder: Path) -> list[str]:
    """SHA-256 of train.txt, valid.txt and test.txt."""
    digests = []
    for split in SPLITS:
        path = folder / f"{split}.txt"
        digest = hashlib.sha256()
        try:
            for _ in read_blocks(path, digest):
                pass
        except OSError as problem:
            raise UserError(f"cannot read {path} ({problem.strerror}). Check the file and its permissions.") from None
        digests.append(digest.hexdigest())
    return digests


def corpus_key(digests: list[str], vocab_from: str) -> str:
    """What a cache depends on, as one short name: the texts, the options, the format, the byte order of the ids."""
    parts = [str(CACHE_FORMAT), sys.byteorder, vocab_from, *digests]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def cache_path(folder: Path, vocab_from: str, key: str) -> Path:
    return folder / f".corpus-{vocab_from}-{key}.pkl"


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, bytes and containers of them; refuses whatever is looked up by name."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class HashingWriter:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)


def save_cache(corpus: Corpus, vocab_from: str, key: str) -> None:
    """Write the cache; where that is impossible say so and go on without."""
    # PickleBuffer: written without a copy, and read back as a bytearray that a tensor can use in place.
    contents = {
        "format": CACHE_FORMAT,
        "key": key,
        "words": "\n".join(corpus.vocabulary.words),
        "dtype": str(corpus.train.numpy().dtype),
        "ids": {split: pickle.PickleBuffer(getattr(corpus, split).numpy()) for split in SPLITS},
    }

    def write(file):
        writer = HashingWriter(file)
        pickle.dump(contents, writer, protocol=5)
        file.write(writer.digest.digest())

    path = cache_path(corpus.folder, vocab_from, key)
    try:
        if not os.stat(corpus.folder).st_mode & 0o222:  # root could write even so, but was not meant to
            raise OSError(errno.EROFS, "the folder is read-only")
        atomic_write(path, write)
    except OSError as problem:
        warn(f"no corpus cache in {corpus.folder} ({problem.strerror}): the texts are tokenised anew each time")
        return
    for old in corpus.folder.glob(f".corpus-{vocab_from}-*.pkl"):
        if old != path:  # of texts that have changed since; nobody would remove it otherwise
            with contextlib.suppress(OSError):
                old.unlink()


def load_cache(folder: Path, vocab_from: str, key: str) -> Corpus | None:
    """The corpus from its cache; None, with a line of explanation where there is need for one, if it must be rebuilt."""
    path = cache_path(folder, vocab_from, key)
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:
            check_digest(file)
            contents = PlainUnpickler(file).load()
        return corpus_from(contents, folder, key)
    except Exception as problem:  # whatever is wrong with it, the texts are there to make another
        warn(f"the corpus cache {path} is damaged or foreign ({problem}): building it again")
        return None


def check_digest(file) -> None:
    """Raise ValueError unless the file ends in the SHA-256 of what comes before; leaves the file at its start.

    Meant for accidents, a flipped bit or a short copy: a pickle so damaged could ask for any amount of memory.
    """
    left = os.fstat(file.fileno()).st_size - hashlib.sha256().digest_size
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if left != 0 or file.read() != digest.digest():
        raise ValueError("its checksum is wrong")
    file.seek(0)


def corpus_from(contents, folder: Path, key: str) -> Corpus:
    """Check the contents of a cache file and build the corpus; raises whatever is wrong."""
    if not isinstance(contents, dict) or contents.get("format") != CACHE_FORMAT or contents.get("key") != key:
        raise ValueError("it was made for other texts, options or versions")
    vocabulary = Vocabulary(contents["words"].split("\n"))
    dtype = smallest_dtype(len(vocabulary))
    if contents["dtype"] != str(dtype) or EOS not in vocabulary.index:
        raise ValueError("its vocabulary is wrong")
    splits = {}
    for split in SPLITS:
        data = contents["ids"][split]
        if not isinstance(data, bytearray) or not data:
            raise ValueError(f"its {split} ids are wrong")
        ids = np.frombuffer(data, dtype)
        if ids.min() < 0 or ids.max() >= len(vocabulary):
            raise ValueError(f"its {split} ids do not fit the vocabulary")
        splits[split] = torch.from_numpy(ids)
    return Corpus(folder, vocabulary, **splits)


# ------------------------------------------------------------------------------------------------------- batching


class TokenColumns:
    """The N - 1 (token, next token) pairs of a text, dealt to columns of consecutive tokens.

    Column by column the pairs are those of the text in order; lengths differ by at most one, so nothing is trimmed
    and every pair is in exactly one place. Ids stay in their small type and are widened window by window, on `device`.

    Args:
        ids: the text, (N,).
        batch_size: number of columns B.

    Attributes:
        length: pairs in the longest column.
        num_pairs: N - 1.

    Raises:
        UserError: fewer pairs than columns.
    """

    def __init__(self, ids: torch.Tensor, batch_size: int, device: str | torch.device = "cpu"):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.num_pairs = max(len(ids) - 1, 0)
        if self.num_pairs < batch_size:
            raise UserError(
                f"a text of {len(ids):,} tokens is too short for a batch of {batch_size:,}, which needs at least "
                f"{batch_size + 1:,}. Use a smaller batch size"
                + (f", at most {self.num_pairs:,}." if self.num_pairs else " and a longer text.")
            )
        self.ids = ids.to(device)
        self.batch_size = batch_size
        self.shortest, self.num_longer = divmod(self.num_pairs, batch_size)  # the first `num_longer` have one more
        self.length = self.shortest + (self.num_longer > 0)
        column = torch.arange(batch_size, device=device)
        self.starts = column * self.shortest + column.clamp(max=self.num_longer)  # (B,)

    def windows(self, bptt: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Windows of at most `bptt` places from place `start` of the columns on, the last one as long as is left.

        Yields:
            tokens and targets, both (B, t) int64 on the device. Where a column has ended the target is IGNORED and
            the token 0. Nothing here waits for a GPU.
        """
        if bptt < 1 or start < 0:
            raise ValueError(f"bptt must be at least 1 and start at least 0, got {bptt} and {start}")
        for first in range(start, self.length, bptt):
            stop = min(first + bptt, self.length)
            places = self.starts[:, None] + torch.arange(first, stop, device=self.ids.device)  # (B, t)
            if stop > self.shortest and self.num_longer:
                places.clamp_(max=self.num_pairs - 1)  # the last column's place beyond its end
            tokens, targets = self.ids[places].long(), self.ids[places + 1].long()
            if stop > self.shortest and self.num_longer:
                tokens[self.num_longer :, -1] = 0
                targets[self.num_longer :, -1] = IGNORED
            yield tokens, targets

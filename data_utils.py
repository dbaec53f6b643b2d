"""Word-level corpora: vocabulary, tokenising, cache, download, and columns of tokens for training.

A corpus is a folder with train.txt, valid.txt and test.txt in UTF-8. Words are what `str.split` yields (any
Unicode white space separates), a line ends at a line feed, and every line, blank ones included, ends in one
`<eos>` token. A byte order mark at the start and carriage returns before line feeds change nothing.
"""

import codecs
import contextlib
import ctypes
import errno
import hashlib
import http.client
import multiprocessing
import os
import pickle
import secrets
import shutil
import signal
import sys
import time
import urllib.request
import zipfile
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from tqdm import tqdm

from training.console import UserError, say, warn
from training.files import atomic_write

EOS = "<eos>"
UNK = "<unk>"
IGNORED = -100  # target of a place without a word; every loss of the project skips negative targets
SPLITS = ("train", "valid", "test")
DATA_FOLDER = Path(__file__).resolve().parent / "data"

# ---- vocabulary, corpus


class Vocabulary:
    """Words and their ids, 0 to V - 1.

    Args:
        words: all different; a word's id is its position. Adaptive softmax wants the frequent ones first.

    Raises:
        ValueError: not strings, or not all different.
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
        """Ids of words; an unknown one is a UserError or, if allowed and in the vocabulary, `<unk>`."""
        words = list(words)
        unknown = list(dict.fromkeys(word for word in words if word not in self.index))
        if unknown and not (allow_unknown and UNK in self.index):
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise UserError(
                f"not in the vocabulary of {len(self):,} words: {shown}. Words are whole tokens of the "
                "training text: check spelling, capitals, and the spaces around punctuation marks."
            )
        return [self.index.get(word, self.index.get(UNK)) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of ids. An id outside 0 to V - 1 is a ValueError; -1 must not quietly mean the last word."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise ValueError(f"ids must be from 0 to {len(self) - 1:,}, got {min(ids):,} to {max(ids):,}")
        return [self.words[i] for i in ids]


@dataclass
class Corpus:
    """Three splits as 1-D tensors of ids, the smallest of uint8, int16, int32, int64 that holds them."""

    folder: Path
    vocabulary: Vocabulary
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.vocabulary.words).encode("utf-8", errors="surrogatepass"))
        for ids in (self.train, self.valid, self.test):
            digest.update(f"\0{len(ids)}\0".encode())
            digest.update(ids.numpy())
        return digest.hexdigest()


def load_corpus(data: str, vocab_from: str = "all") -> Corpus:
    """Read the corpus that `data` names; from its cache when the texts are those that were cached.

    Args:
        data: a folder, or the name of one under data/. The WikiText corpora are fetched when missing.
        vocab_from: "all": every word of the three texts has an id, in order of descending count, equal counts
            alphabetically; "train": so have the words of train.txt, all others become `<unk>`.

    Raises:
        UserError: no such folder; a text missing, empty or not UTF-8; a download that failed.
    """
    if vocab_from not in ("all", "train"):
        raise ValueError(f"vocab_from must be 'all' or 'train', got {vocab_from!r}")
    folder = find_folder(data)
    check_folder(folder)
    key = corpus_key([hash_text(folder / f"{split}.txt") for split in SPLITS], vocab_from)
    corpus = load_cache(folder, vocab_from, key)
    if corpus is None:
        corpus, digests = tokenise(folder, vocab_from)
        # Named after the bytes that were tokenised, not those hashed above: a text may just have changed.
        save_cache(corpus, vocab_from, corpus_key(digests, vocab_from))
    return corpus


def find_folder(data: str) -> Path:
    """The folder that `data` names: itself, or else data/<name> beside this file, fetched if need be."""
    if data and os.path.isdir(data):
        return Path(data)
    parts = Path(data).parts  # of ./data/x: data, x
    if len(parts) == 1 or (len(parts) == 2 and parts[0] == "data"):
        name = parts[-1]
        if name not in PUBLISHED or os.path.isdir(DATA_FOLDER / name):
            folder = DATA_FOLDER / name
        else:
            folder = fetch(name)
        if os.path.isdir(folder):
            return folder
    if data and os.path.exists(data):
        raise UserError(f"{data} is a file. Expected a folder with train.txt, valid.txt and test.txt.")
    raise UserError(
        f"no folder {data!r:.300}, nor one of that name in {DATA_FOLDER}. Expected a folder with train.txt, "
        "valid.txt and test.txt, or the bundled corpus 'tiny', or one that can be fetched: "
        f"{', '.join(map(repr, PUBLISHED))}."
    )


def check_folder(folder: Path) -> None:
    """Raise a UserError unless the three texts are there."""
    try:
        found = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as problem:
        raise UserError(f"cannot read {folder} ({problem.strerror}): check its permissions.") from None
    for split in SPLITS:
        path = folder / f"{split}.txt"
        if not os.path.isfile(path):
            what = f"{path} is not a file" if path.name in found else f"no {path.name} in {folder}"
            listed = ", ".join(found[:8]) + (f" and {len(found) - 8:,} more" if len(found) > 8 else "")
            raise UserError(
                f"{what} (found: {listed or 'nothing'}). "
                "Expected train.txt, valid.txt and test.txt, one sentence per line."
            )


@contextlib.contextmanager
def reading(path: Path):
    """Opens a text for reading bytes; what the system refuses becomes a UserError."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as problem:
        raise UserError(f"cannot read {path} ({problem.strerror}): check its permissions.") from None


# ---- tokenising

BLOCK_BYTES = 1 << 22  # text handled at once; as words it takes about twelve times as much memory
PARALLEL_BYTES = 8 * BLOCK_BYTES  # smaller corpora are done before worker processes would pay


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type for ids below `vocab_size`; not uint16, for which torch lacks operations."""
    for dtype in (np.uint8, np.int16, np.int32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.int64)


def read_blocks(path: Path, digest) -> Iterator[bytes]:
    """The bytes of a text in blocks that end where a word ends; `digest` is updated with them.

    A line of any length is cut between words; only a single word beyond BLOCK_BYTES makes a larger block.
    """
    with reading(path) as file:
        pending = []
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            # In UTF-8 these two bytes are never part of another character.
            cut = max(block.rfind(b" "), block.rfind(b"\n")) + 1
            if cut:
                yield b"".join([*pending, block[:cut]])
                pending = []
            pending.append(block[cut:])
        if any(pending):
            yield b"".join(pending)


def clean_blocks(path: Path, digest, progress: tqdm) -> Iterator[bytes]:
    """The blocks of a text without a byte order mark and with a line feed at its end."""
    last = b"\n"
    for i, block in enumerate(read_blocks(path, digest)):
        if b"\0" in block:
            raise not_text(path)
        if i == 0 and block.startswith(codecs.BOM_UTF8):
            block = block[len(codecs.BOM_UTF8) :]
        last = block[-1:] or last
        yield block
        progress.update(len(block))
    if last != b"\n":
        yield b"\n"


def not_text(path: Path) -> UserError:
    """The error for a file that is not UTF-8: where it fails, and a guess at what it is."""
    start, offset = b"", 0
    for block in read_blocks(path, hashlib.sha256()):
        start = start or block[:2]
        bad = block.find(b"\0")
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as problem:
            bad = min(bad, problem.start) if bad >= 0 else problem.start
        if bad >= 0:
            break
        offset += len(block)
    else:
        return UserError(f"{path} changed while it was read. Try again when it is complete.")
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        guess, encoding = "It starts like UTF-16", "UTF-16"
    elif block[bad] == 0:
        guess, encoding = "If it is text at all, it may be UTF-16", "UTF-16LE"
    else:
        guess, encoding = "It may be Latin-1", "LATIN1"
    return UserError(
        f"{path} is not UTF-8 text: byte {offset + bad:,} is 0x{block[bad]:02x}. {guess}; "
        f"convert it, for instance by: iconv -f {encoding} -t UTF-8 {path.name} > converted.txt"
    )


def index_block(block: bytes) -> tuple[list[str], np.ndarray]:
    """The different words of a block in order of appearance, and the block as places among them, (n,) int32.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    # Bytes split faster than characters do, and this way only the different words are decoded.
    different, places = number_words(block.replace(b"\n", f" {EOS} ".encode()).split())
    text = b" ".join(different).decode("utf-8")
    words = text.split()
    if " ".join(words) == text:
        return words, places
    # Some word holds white space that only str.split knows, such as a no-break space.
    return number_words(block.decode("utf-8").replace("\n", f" {EOS} ").split())


def number_words(words: list) -> tuple[list, np.ndarray]:
    """The different words in order of appearance, and the place of each word in that list, (n,) int32."""
    index = defaultdict()
    index.default_factory = index.__len__  # an unseen word gets the next number
    places = np.fromiter(map(index.__getitem__, words), np.int32, len(words))
    index.default_factory = None  # it refers back to the dictionary: a cycle, kept until garbage is collected
    return list(index), places


def tokenise(folder: Path, vocab_from: str) -> tuple[Corpus, list[str]]:
    """Read the three texts once; returns the corpus and the SHA-256 of each text.

    Words are numbered as they appear, within a block and then over all; once the counts are known, ids by
    frequency are a permutation of these numbers. So no word is split off or looked up twice.
    """
    index: dict[str, int] = {}
    numbers: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    counts = np.zeros(0, np.int64)  # of the words that get an id; those without are numbered after them
    digests = []
    total = sum(os.path.getsize(folder / f"{split}.txt") for split in SPLITS)
    with (
        worker_map(total) as map_blocks,
        tqdm(total=total, unit="B", unit_scale=True, delay=1, disable=None, desc="tokenising") as progress,
    ):
        for split in SPLITS:
            path = folder / f"{split}.txt"
            digest = hashlib.sha256()
            try:
                for words, places in map_blocks(index_block, clean_blocks(path, digest, progress)):
                    block_index = np.array([index.setdefault(word, len(index)) for word in words], np.int32)
                    numbers[split].append(block_index[places])
                    if split == "train" or vocab_from == "all":
                        counts = np.concatenate([counts, np.zeros(len(index) - len(counts), np.int64)])
                        counts[block_index] += np.bincount(places, minlength=len(words))
            except UnicodeDecodeError:
                raise not_text(path) from None
            if not any(map(len, numbers[split])):
                raise UserError(f"{path} is empty. Expected one sentence per line, words between spaces.")
            digests.append(digest.hexdigest())

    counted = list(index)[: len(counts)]
    order = sorted(range(len(counted)), key=lambda i: (-counts[i], counted[i]))
    words = [counted[i] for i in order]
    if vocab_from == "train" and index.get(UNK, len(counted)) >= len(counted):
        words.append(UNK)  # train.txt has none
    vocabulary = Vocabulary(words)
    dtype = smallest_dtype(len(vocabulary))
    id_of_number = np.full(len(index), vocabulary.index.get(UNK, 0), dtype)
    id_of_number[order] = np.arange(len(order), dtype=dtype)
    splits = {split: torch.from_numpy(renumber(numbers.pop(split), id_of_number)) for split in SPLITS}
    return Corpus(folder, vocabulary, **splits), digests


def renumber(chunks: list[np.ndarray], new: np.ndarray) -> np.ndarray:
    """new[all chunks], emptying `chunks` on the way so that the ids are not in memory twice."""
    result = np.empty(sum(map(len, chunks)), new.dtype)
    end = len(result)
    while chunks:
        chunk = chunks.pop()
        result[end - len(chunk) : end] = new[chunk]
        end -= len(chunk)
    return result


@contextlib.contextmanager
def worker_map(total_bytes: int):
    """`map`, or where it pays one that uses all cores; results in order, few of them in memory at a time."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    # Elsewhere a process with torch in it cannot safely be forked, and importing torch anew costs the gain.
    if cores == 1 or total_bytes < PARALLEL_BYTES or multiprocessing.current_process().daemon:
        yield map
        return
    workers = min(cores, 8)  # one process feeds them all
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker) as pool:

        def parallel_map(function: Callable, items: Iterable) -> Iterator:
            waiting = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield parallel_map
        except BrokenProcessPool:
            raise UserError("a tokenising process was killed: is the machine short of memory?") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker() -> None:
    """Ctrl-C is for the main process to answer, and a worker must not outlive it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# ---- cache
#
# A pickle file beside the texts: one dictionary of strings, numbers and bytes, so that its reader can refuse
# every name of a class or function, and with them everything that could run code. The SHA-256 of the pickle
# follows it, against accidents; the checks of the contents are for what was made to deceive.

CACHE_FORMAT = 1


def hash_text(path: Path) -> str:
    """SHA-256 of a text."""
    digest = hashlib.sha256()
    with reading(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def corpus_key(digests: list[str], vocab_from: str) -> str:
    """What a cache depends on, in one short name: the texts, the option, the format, the byte order."""
    parts = [str(CACHE_FORMAT), sys.byteorder, vocab_from, *digests]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def cache_path(folder: Path, vocab_from: str, key: str) -> Path:
    """Where the cache lies; it names its option, so that an outdated one can be told from another's."""
    return folder / f".corpus-{vocab_from}-{key}.pkl"


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, bytes and containers of them; refuses all that is looked up by name."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class HashingWriter:
    """Passes bytes on to a file and hashes them."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)


def save_cache(corpus: Corpus, vocab_from: str, key: str) -> None:
    """Write the cache; where that is impossible, say so and go on without."""
    contents = {
        "format": CACHE_FORMAT,
        "key": key,
        "words": "\n".join(corpus.vocabulary.words),  # no word holds white space
        # PickleBuffer: written without a copy, and read back as a bytearray that a tensor can use in place.
        "ids": {split: pickle.PickleBuffer(getattr(corpus, split).numpy()) for split in SPLITS},
    }

    def write(file):
        writer = HashingWriter(file)
        pickle.dump(contents, writer, protocol=5)
        file.write(writer.digest.digest())

    path = cache_path(corpus.folder, vocab_from, key)
    try:
        if not os.stat(corpus.folder).st_mode & 0o222:  # root could write all the same, but is not meant to
            raise OSError(errno.EROFS, "the folder is read-only")
        atomic_write(path, write)
    except OSError as problem:
        reason = problem.strerror or problem
        warn(f"no corpus cache in {corpus.folder} ({reason}): the texts are tokenised anew each time")
        return
    for left in corpus.folder.glob(".*.tmp"):
        # Of a process killed while it wrote; a fresh one may be at work still.
        if left.name.startswith("..corpus-"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 86400:
                    left.unlink()
    for other in corpus.folder.glob(f".corpus-{vocab_from}-*.pkl"):
        if other != path:  # of texts that are no more; nobody else would remove it
            with contextlib.suppress(OSError):
                other.unlink()


def load_cache(folder: Path, vocab_from: str, key: str) -> Corpus | None:
    """The corpus from its cache; None if there is no cache, or with a warning if it cannot be used."""
    path = cache_path(folder, vocab_from, key)
    try:
        with open(path, "rb") as file:
            check_digest(file)
            contents = PlainUnpickler(file).load()
        return corpus_from(contents, folder, key)
    except FileNotFoundError:
        return None
    except Exception as problem:  # whatever it is, the texts are there to make another
        reason = str(problem) or type(problem).__name__
        warn(f"the corpus cache {path} is damaged or foreign ({reason}): building it again")
        return None


def check_digest(file) -> None:
    """Raise ValueError unless the file ends in the SHA-256 of what comes before; rewinds it.

    A pickle damaged by accident never reaches the unpickler, which it could ask for any amount of memory.
    """
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size - digest.digest_size
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if file.read() != digest.digest():
        raise ValueError("its checksum is wrong")
    file.seek(0)


def corpus_from(contents, folder: Path, key: str) -> Corpus:
    """Build the corpus from what a cache file holds; raises whatever is wrong with it."""
    if contents["format"] != CACHE_FORMAT or contents["key"] != key:
        raise ValueError("it was made for other texts or options")
    vocabulary = Vocabulary(contents["words"].split("\n"))
    if EOS not in vocabulary.index:
        raise ValueError("its vocabulary has no end of line")
    dtype = smallest_dtype(len(vocabulary))
    splits = {}
    for split in SPLITS:
        data = contents["ids"][split]
        if not isinstance(data, bytearray):
            raise ValueError(f"its ids of {split} are a {type(data).__name__}")
        ids = np.frombuffer(data, dtype)
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= len(vocabulary):
            raise ValueError(f"its ids of {split} do not fit the vocabulary")
        splits[split] = torch.from_numpy(ids)
    return Corpus(folder, vocabulary, **splits)


# ---- download

USER_AGENT = "relational-rnn-pytorch (corpus download)"  # one of the hosts turns Python's own name away
TIMEOUT = 30.0  # seconds without a byte before a mirror is given up


@dataclass(frozen=True)
class Published:
    """A corpus to fetch.

    Attributes:
        mirrors: addresses in the order of trying; of a folder with the three texts (ends in /), or of a zip
            archive with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.
        digests: by file name, of archives and texts: algorithm and hexadecimal value. "git" is the name that
            git gives to a file's content.
        max_bytes: no file fetched is larger.
    """

    mirrors: tuple[str, ...]
    digests: dict[str, tuple[str, str]]
    max_bytes: int


PUBLISHED = {
    "wikitext-2": Published(
        mirrors=(
            "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",
            "https://wikitext.smerity.com/wikitext-2-v1.zip",
        ),
        digests={
            "train.txt": ("git", "2d84b35af79e411d73ea7cae83c73964c6ac83b4"),
            "valid.txt": ("sha256", "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
            "test.txt": ("sha256", "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
            "wikitext-2-v1.zip": ("md5", "542ccefacc6c27f945fb54453812b3cd"),
        },
        max_bytes=16_000_000,
    ),
    "wikitext-103": Published(
        mirrors=("https://wikitext.smerity.com/wikitext-103-v1.zip",),
        digests={
            "wikitext-103-v1.zip": (
                "sha256",
                "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            )
        },
        max_bytes=400_000_000,
    ),
}


class Unusable(Exception):
    """A mirror that does not give the right files; the message says why."""


def fetch(name: str) -> Path:
    """Fetch a published corpus into data/<name>, whole and verified or not at all; returns that folder.

    Raises:
        UserError: no mirror had it, or it cannot be written.
    """
    published = PUBLISHED[name]
    target = DATA_FOLDER / name
    # Beside the target, so that putting it in place is one renaming; another run may be fetching as well.
    work = DATA_FOLDER / f".{name}-{secrets.token_hex(4)}.partial"
    try:
        work.mkdir(parents=True)
        for old in DATA_FOLDER.glob(f".{name}-*.partial"):
            if time.time() - old.stat().st_mtime > 86400:  # of a process killed outright
                shutil.rmtree(old, ignore_errors=True)
        fetch_any(name, published, work)
        try:
            work.rename(target)
        except OSError:
            if not os.path.isdir(target):  # if it is, another run was faster and has verified it
                raise
    except OSError as problem:
        raise UserError(f"cannot write the corpus into {target} ({problem.strerror}).") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def fetch_any(name: str, published: Published, work: Path) -> None:
    """Fill the folder `work` from the first mirror that has the right files."""
    reasons = []
    for mirror in published.mirrors:
        host = urlsplit(mirror).netloc
        say(f"fetching {name} from {host}")
        try:
            if mirror.endswith("/"):
                for split in SPLITS:
                    download(f"{mirror}{split}.txt", work / f"{split}.txt", published)
            else:
                archive = work / mirror.rsplit("/", 1)[-1]
                download(mirror, archive, published)
                extract(archive, work)
                archive.unlink()
                for split in SPLITS:
                    verify(work / f"{split}.txt", published)
            return
        except Unusable as problem:
            reasons.append(f"{host}: {problem}")
    archive = published.mirrors[-1].rsplit("/", 1)[-1]
    raise UserError(
        f"cannot fetch {name} ({'; '.join(reasons)}). Put its train.txt, valid.txt and test.txt into "
        f"{DATA_FOLDER / name} by hand (in {archive} they are wiki.train.tokens, wiki.valid.tokens and "
        "wiki.test.tokens), or start with the bundled corpus: --data tiny"
    )


def download(url: str, path: Path, published: Published) -> None:
    """Fetch and verify a file. Unusable: a failing network or wrong bytes; OSError: a failing disk."""
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
        size = response.headers.get("Content-Length", "")
    except (OSError, http.client.HTTPException) as problem:
        raise Unusable(problem) from None
    total = int(size) if size.isdecimal() else None
    with (
        response,
        open(path, "wb") as file,
        tqdm(total=total, unit="B", unit_scale=True, delay=1, disable=None, desc=path.name) as progress,
    ):
        while True:
            try:
                block = response.read(1 << 16)
            except (OSError, http.client.HTTPException) as problem:
                raise Unusable(f"{path.name} broke off after {file.tell():,} bytes ({problem})") from None
            if not block:
                break
            file.write(block)
            progress.update(len(block))
            if file.tell() > published.max_bytes:
                raise Unusable(f"{path.name} is larger than {published.max_bytes:,} bytes")
    verify(path, published)


def verify(path: Path, published: Published) -> None:
    """Raise Unusable unless the file has the published digest, if there is one."""
    algorithm, expected = published.digests.get(path.name, (None, None))
    if algorithm is None:
        return
    if algorithm == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise Unusable(f"{path.name}, {path.stat().st_size:,} bytes, has the wrong checksum")


def extract(archive: Path, work: Path) -> None:
    """Write an archive's texts as train.txt, valid.txt and test.txt, whatever paths it has for them."""
    try:
        with zipfile.ZipFile(archive) as package:
            members = {info.filename.rsplit("/", 1)[-1]: info for info in package.infolist()}
            for split in SPLITS:
                with (
                    package.open(members[f"wiki.{split}.tokens"]) as member,
                    open(work / f"{split}.txt", "wb") as file,
                ):
                    shutil.copyfileobj(member, file, 1 << 20)
    except KeyError as problem:
        raise Unusable(f"{archive.name} has no {problem.args[0]}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as problem:
        raise Unusable(f"{archive.name} cannot be unpacked ({problem})") from None


# ---- batching


class TokenColumns:
    """The N - 1 (token, next token) pairs of a text, dealt to columns of consecutive tokens.

    Column after column the pairs are those of the text in order, and lengths differ by at most one: nothing
    is trimmed, every pair is in exactly one place. Ids keep their small type and are widened per window, on
    `device`.

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
                f"a text of {len(ids):,} tokens, <eos> included, is too short for a batch of {batch_size:,}, "
                f"which needs {batch_size + 1:,}. "
                + (f"Use a batch of at most {self.num_pairs:,}." if self.num_pairs else "Use a longer text.")
            )
        self.ids = ids.to(device)
        self.batch_size = batch_size
        self.shortest, self.num_longer = divmod(self.num_pairs, batch_size)  # the first ones are longer by 1
        self.length = self.shortest + (self.num_longer > 0)
        column = torch.arange(batch_size, device=device)
        self.starts = column * self.shortest + column.clamp(max=self.num_longer)  # (B,)

    def windows(self, bptt: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Windows of `bptt` places from place `start` of the columns on, the last as long as what is left.

        Yields:
            tokens and targets, both (B, t) int64 on the device. Where a column has ended, the target is
            IGNORED and the token 0. Nothing here waits for a GPU.
        """
        if bptt < 1 or start < 0:
            raise ValueError(f"bptt must be at least 1 and start at least 0, got {bptt} and {start}")
        for first in range(start, self.length, bptt):
            yield self.window(first, min(first + bptt, self.length))

    def window(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets of the places from `first` up to `stop`, as `windows` yields them."""
        places = self.starts[:, None] + torch.arange(first, stop, device=self.ids.device)  # (B, t)
        if stop > self.shortest and self.num_longer:
            places.clamp_(max=self.num_pairs - 1)  # the last column's place beyond its end
        tokens, targets = self.ids[places].long(), self.ids[places + 1].long()
        if stop > self.shortest and self.num_longer:
            tokens[self.num_longer :, -1] = 0
            targets[self.num_longer :, -1] = IGNORED
        return tokens, targets

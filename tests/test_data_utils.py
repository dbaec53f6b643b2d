"""Corpora: splitting, vocabulary, cache and columns, against slow and obvious code."""

import gc
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from data_utils import EOS, IGNORED, UNK, TokenColumns, Vocabulary, load_corpus, smallest_dtype
from tests.measure_tokenising import obvious_loop, write_texts
from training.console import UserError

ROOT = Path(__file__).resolve().parent.parent
SPLITS = data_utils.SPLITS
TRAIN, VALID, TEST = "b a a\nb a c\n\n", "a d\n", "c e e e <unk>\nb\n"


def write(folder, train=TRAIN, valid=VALID, test=TEST):
    folder.mkdir(exist_ok=True)
    for split, text in zip(SPLITS, (train, valid, test), strict=True):
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def words_of(corpus, split):
    return corpus.vocabulary.decode(getattr(corpus, split).tolist())


def equal(corpus, other):
    return corpus.vocabulary.words == other.vocabulary.words and all(
        torch.equal(getattr(corpus, split), getattr(other, split)) for split in SPLITS
    )


def caches(folder):
    return sorted(path.name for path in folder.glob(".*"))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "corpus")


# ---- vocabulary


def test_vocabulary_round_trip_and_its_errors():
    vocabulary = Vocabulary(["the", EOS, UNK, "é"])
    assert len(vocabulary) == 4
    assert vocabulary.encode(["é", "the"]) == [3, 0]
    assert vocabulary.decode(torch.tensor([3, 1])) == ["é", EOS]
    assert vocabulary.encode(["what", "the"], allow_unknown=True) == [2, 0]
    with pytest.raises(UserError, match=r"not in the vocabulary of 4 words: 'what', 'is'\."):
        vocabulary.encode(["what", "the", "is", "what"])
    with pytest.raises(UserError, match="'what'"):
        Vocabulary(["the"]).encode(["what"], allow_unknown=True)
    for wrong in ([4], [-1], [0, -1]):
        with pytest.raises(ValueError, match="ids must be from 0 to 3"):
            vocabulary.decode(wrong)
    with pytest.raises(ValueError, match="2 different of 3"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="strings"):
        Vocabulary(["a", 1])


def test_ids_are_in_order_of_count_then_alphabet_and_round_trip(folder):
    corpus = load_corpus(str(folder))
    # <eos> 6; a 4; b, e 3; c 2; <unk>, d 1
    assert corpus.vocabulary.words == [EOS, "a", "b", "e", "c", UNK, "d"]
    assert words_of(corpus, "train") == ["b", "a", "a", EOS, "b", "a", "c", EOS, EOS]
    assert words_of(corpus, "valid") == ["a", "d", EOS]
    assert words_of(corpus, "test") == ["c", "e", "e", "e", UNK, EOS, "b", EOS]


def test_vocabulary_from_train_alone(folder):
    corpus = load_corpus(str(folder), vocab_from="train")
    # in train: a 3, <eos> 3, b 2, c 1; <unk> is added, never having occurred there
    assert corpus.vocabulary.words == [EOS, "a", "b", "c", UNK]
    assert words_of(corpus, "train") == ["b", "a", "a", EOS, "b", "a", "c", EOS, EOS]
    assert words_of(corpus, "valid") == ["a", UNK, EOS]
    assert words_of(corpus, "test") == ["c", UNK, UNK, UNK, UNK, EOS, "b", EOS]


def test_vocabulary_from_train_that_knows_unk(tmp_path):
    corpus = load_corpus(str(write(tmp_path / "c", "z <unk> <unk>\n", "y\n", "<unk> z\n")), "train")
    assert corpus.vocabulary.words == [UNK, EOS, "z"]
    assert words_of(corpus, "valid") == [UNK, EOS]
    assert words_of(corpus, "test") == [UNK, "z", EOS]


def test_the_option_has_two_values(folder):
    with pytest.raises(ValueError, match="vocab_from must be 'all' or 'train', got 'valid'"):
        load_corpus(str(folder), vocab_from="valid")


@pytest.mark.parametrize(
    "size, dtype",
    [(2, "uint8"), (256, "uint8"), (257, "int16"), (32768, "int16"), (32769, "int32"), (2**31 + 1, "int64")],
)
def test_smallest_dtype(size, dtype):
    assert smallest_dtype(size) == dtype
    assert np.array(size - 1).astype(dtype) == size - 1


@pytest.mark.parametrize("types, dtype", [(249, torch.uint8), (250, torch.int16), (33000, torch.int32)])
def test_ids_are_kept_in_the_smallest_type(tmp_path, types, dtype):
    # valid.txt and test.txt have six more words and <eos>
    corpus = load_corpus(str(write(tmp_path / "c", " ".join(f"w{i}" for i in range(types)) + "\n")))
    assert len(corpus.vocabulary) == types + 7
    assert corpus.train.dtype == corpus.valid.dtype == corpus.test.dtype == dtype
    assert words_of(corpus, "train")[: types + 1] == [f"w{i}" for i in range(types)] + [EOS]


# ---- tokenising


def check_against_obvious_loop(folder):
    words, ids = obvious_loop(folder)
    corpus, digests = data_utils.tokenise(folder, "all")
    assert corpus.vocabulary.words == words
    for split in SPLITS:
        assert getattr(corpus, split).tolist() == ids[split].tolist()
    assert digests == [hashlib.sha256((folder / f"{split}.txt").read_bytes()).hexdigest() for split in SPLITS]


# Spaces that str.split knows and bytes.split does not, spaces of several bytes, line ends that are none here.
SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000"
TEXT = st.text(st.sampled_from("ab \n\r\t" + SPACES + "é\u200b\ufeff😀"), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(train=TEXT, valid=TEXT, block=st.sampled_from([1, 2, 7, 1 << 22]))
def test_any_text_is_split_as_by_the_obvious_loop(tmp_path_factory, train, valid, block):
    folder = write(tmp_path_factory.mktemp("any"), train + "x", valid + "\n", "a\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, "BLOCK_BYTES", block)
        check_against_obvious_loop(folder)


def test_small_blocks_and_worker_processes_give_the_same(tmp_path, monkeypatch):
    write_texts(tmp_path, 40_000, 3_000)
    check_against_obvious_loop(tmp_path)
    serial, digests = data_utils.tokenise(tmp_path, "train")
    monkeypatch.setattr(data_utils, "BLOCK_BYTES", 5_003)
    monkeypatch.setattr(data_utils, "PARALLEL_BYTES", 0)
    if sys.platform == "linux":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    check_against_obvious_loop(tmp_path)
    parallel, digests_again = data_utils.tokenise(tmp_path, "train")
    assert equal(serial, parallel) and digests == digests_again


def test_a_block_leaves_no_garbage():
    """Memory grew with the text when each block's dictionary was part of a reference cycle."""
    gc.collect()
    gc.disable()
    try:
        data_utils.index_block(b"a b\nc\xc2\xa0d\n")
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a b\r\n\r\nc\r\n", ["a", "b", EOS, EOS, "c", EOS]),
        ("a b\n \nc\n", ["a", "b", EOS, EOS, "c", EOS]),
        ("\ufeffa b", ["a", "b", EOS]),
        ("a\n\n\n", ["a", EOS, EOS, EOS]),
        ("a", ["a", EOS]),
        ("\n", [EOS]),
        ("  a\t b  ", ["a", "b", EOS]),
        ("\u3000", [EOS]),
        ("a\xa0b\x1fc\n", ["a", "b", "c", EOS]),
    ],
)  # fmt: skip
def test_what_a_line_is(tmp_path, text, expected):
    assert words_of(load_corpus(str(write(tmp_path / "c", valid=text))), "valid") == expected


def test_one_endless_line_and_one_endless_word_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "BLOCK_BYTES", 64)
    write(tmp_path, "ab " * 5_000, "x" * 5_000, "é" * 3_000 + "\n")
    assert max(map(len, data_utils.read_blocks(tmp_path / "train.txt", hashlib.sha256()))) <= 64 + 3
    check_against_obvious_loop(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"caf\xe9 au lait\n", r"byte 3 is 0xe9\. It may be Latin-1; .*: iconv -f LATIN1 -t UTF-8 valid.txt"),
        ("a b\n".encode("utf-16"), r"starts like UTF-16; .*iconv -f UTF-16 "),
        ("a b\n".encode("utf-16-le"), r"byte 1 is 0x00\. .*iconv -f UTF-16LE "),
        (b"a b\n\0\0\n", r"byte 4 is 0x00"),
        (b"a \xc3", r"byte 2 is 0xc3"),
        (b"\xef\xbb\xbf" + b"a b\n" * 50 + b"\xff\n", r"byte 203 is 0xff"),
        (b"\xed\xa0\x80\n", r"byte 0 is 0xed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [16, 1 << 22])
def test_what_is_not_utf8_text_is_refused(tmp_path, monkeypatch, text, message, block):
    monkeypatch.setattr(data_utils, "BLOCK_BYTES", block)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(write(tmp_path / "c", valid=text)))
    assert "valid.txt" in str(error.value) and "\n" not in str(error.value)
    assert caches(tmp_path / "c") == []


def test_errors_of_worker_processes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "BLOCK_BYTES", 16)
    monkeypatch.setattr(data_utils, "PARALLEL_BYTES", 0)
    with pytest.raises(UserError, match="byte 400 is 0xff"):
        load_corpus(str(write(tmp_path / "c", b"a b\n" * 100 + b"\xff" + b"a b\n" * 1000)))


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(tmp_path_factory, text):
    folder = write(tmp_path_factory.mktemp("bytes"), text)
    try:
        corpus = load_corpus(str(folder))
    except UserError as error:
        assert "train.txt" in str(error)
    else:
        assert words_of(corpus, "train") == [
            word
            for line in text.removeprefix(b"\xef\xbb\xbf").decode().removesuffix("\n").split("\n")
            for word in [*line.split(), EOS]
        ]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are used on Linux only")
def test_no_worker_process_outlives_a_killed_run(tmp_path):
    script = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data_utils
os.sched_getaffinity = lambda pid: {{0, 1}}
with data_utils.worker_map(data_utils.PARALLEL_BYTES) as parallel_map:
    print(*parallel_map(os.getpgid, [0]), flush=True)  # they are at work
    print(*(child.pid for child in data_utils.multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while alive := [pid for pid in workers if running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- folders


def test_a_missing_file_is_named_with_what_was_found(folder):
    (folder / "valid.txt").unlink()
    (folder / "notes.md").write_text("")
    with pytest.raises(UserError) as error:
        load_corpus(str(folder))
    assert str(error.value) == (
        f"no valid.txt in {folder} (found: notes.md, test.txt, train.txt). "
        "Expected train.txt, valid.txt and test.txt, one sentence per line."
    )


def test_folders_that_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train.txt in .*found: nothing"):
        load_corpus(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="train.txt is a file. Expected a folder"):
        load_corpus(str(folder / "train.txt"))
    for wrong in ("no-such-corpus", "no/such/corpus", "", "x" * 5000, "nul\0"):
        with pytest.raises(UserError, match="no folder .* 'tiny'"):
            load_corpus(wrong)
    (folder / "test.txt").unlink()
    (folder / "test.txt").mkdir()
    with pytest.raises(UserError, match="test.txt is not a file"):
        load_corpus(str(folder))


def test_names_are_looked_up_beside_the_code(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "DATA_FOLDER", tmp_path)
    monkeypatch.chdir("/")
    for name in ("corpus", "data/corpus", "./data/corpus"):
        assert load_corpus(name).folder == folder
    with pytest.raises(UserError):
        load_corpus("other/corpus")


# ---- cache


def tokenise_is_forbidden(*args):
    raise AssertionError("the cache was not used")


def test_the_cache_is_used_while_texts_and_options_are_the_same(folder, monkeypatch):
    first = load_corpus(str(folder))
    from_train = load_corpus(str(folder), "train")
    assert len(caches(folder)) == 2
    monkeypatch.setattr(data_utils, "tokenise", tokenise_is_forbidden)
    again = load_corpus(str(folder))
    assert equal(first, again) and again.train.dtype == torch.uint8
    assert equal(from_train, load_corpus(str(folder), "train"))
    again.train += 1  # an ordinary tensor, not memory that must not be written


@pytest.mark.parametrize("split", SPLITS)
def test_fault_stale_cache_after_an_edit(folder, split):
    """The old port's cache was keyed by the folder's name: an edited text was not noticed."""
    load_corpus(str(folder))
    load_corpus(str(folder), "train")
    path = folder / f"{split}.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("a", "z").replace("b", "z"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert "z" in words_of(load_corpus(str(folder)), split)
    assert len(caches(folder)) == 2  # the outdated one is gone, the other option's is not ours to remove


def write_cache(folder, contents, tail=None):
    """A cache file in the place of the corpus's own, with the right checksum unless `tail` is given."""
    (name,) = caches(folder)
    body = contents if isinstance(contents, bytes) else pickle.dumps(contents, protocol=5)
    (folder / name).write_bytes(body + (hashlib.sha256(body).digest() if tail is None else tail))


def expect_rebuilt(folder, capsys, expected):
    (name,) = caches(folder)
    bad = (folder / name).read_bytes()
    assert equal(load_corpus(str(folder)), expected)
    err = capsys.readouterr().err
    assert "is damaged or foreign" in err and "building it again" in err and err.count("\n") == 1
    assert (folder / name).read_bytes() != bad
    assert equal(load_corpus(str(folder)), expected)
    assert capsys.readouterr().err == ""


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("attacked",))


def test_fault_cache_that_runs_code(folder, capsys, monkeypatch, tmp_path):
    """The old port's cache was a plain pickle: loading a foreign one ran what its author wanted."""
    monkeypatch.chdir(tmp_path)
    expected = load_corpus(str(folder))
    write_cache(folder, {"format": Attack()})
    expect_rebuilt(folder, capsys, expected)
    assert not (tmp_path / "attacked").exists()
    pickle.loads(pickle.dumps(Attack()))  # it would have
    assert (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "body",
    [b"", b"garbage", b"\x80\x05.", b"cos\nsystem\n.", pickle.dumps([]), pickle.dumps({}), pickle.dumps(7)],
)
@pytest.mark.parametrize("tail", [None, b"", b"x" * 32])
def test_foreign_caches_are_rebuilt(folder, capsys, body, tail):
    expected = load_corpus(str(folder))
    write_cache(folder, body, tail)
    expect_rebuilt(folder, capsys, expected)


def good_contents(folder):
    (name,) = caches(folder)
    return pickle.loads((folder / name).read_bytes()[:-32])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"key": "0" * 32},
        {"words": "a\nb"},
        {"words": "a\na\n<eos>"},
        {"words": 3},
        {"words": "\n".join([EOS, *map(str, range(256))])},  # would need int16
        {"ids": {}},
        {"ids": dict.fromkeys(SPLITS, bytearray())},
        {"ids": dict.fromkeys(SPLITS, bytearray([0, 7]))},  # 7 words
        {"ids": dict.fromkeys(SPLITS, "text")},
        {"ids": dict.fromkeys(SPLITS, [1, 2])},
    ],
)
def test_caches_whose_contents_do_not_fit_are_rebuilt(folder, capsys, change):
    expected = load_corpus(str(folder))
    write_cache(folder, good_contents(folder) | change)
    expect_rebuilt(folder, capsys, expected)


def test_every_flipped_bit_and_every_cut_is_noticed(folder, capsys):
    expected = load_corpus(str(folder))
    (name,) = caches(folder)
    whole = (folder / name).read_bytes()
    key = name.removesuffix(".pkl").rsplit("-", 1)[1]
    assert equal(data_utils.load_cache(folder, "all", key), expected)
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ 1 << place % 8])
        (folder / name).write_bytes(whole[:place] + flipped + whole[place + 1 :])
        assert data_utils.load_cache(folder, "all", key) is None
        (folder / name).write_bytes(whole[:place])
        assert data_utils.load_cache(folder, "all", key) is None
    capsys.readouterr()


def test_a_read_only_folder_gives_a_warning_and_the_corpus(folder, capsys):
    folder.chmod(0o555)
    try:
        corpus = load_corpus(str(folder))
    finally:
        folder.chmod(0o755)
    assert len(corpus.train) == 9 and caches(folder) == []
    err = capsys.readouterr().err
    assert "no corpus cache in" in err and err.count("\n") == 1


def test_a_full_disk_gives_a_warning_and_the_corpus(folder, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(load_corpus(str(folder)).train) == 9
    assert "(No space left on device)" in capsys.readouterr().err
    assert caches(folder) == []


def test_a_text_that_changes_meanwhile_does_not_leave_a_wrong_cache(folder, monkeypatch):
    tokenise = data_utils.tokenise

    def edited_after_hashing(*args):
        (folder / "train.txt").write_text("new words\n")
        return tokenise(*args)

    monkeypatch.setattr(data_utils, "tokenise", edited_after_hashing)
    load_corpus(str(folder))
    monkeypatch.setattr(data_utils, "tokenise", tokenise_is_forbidden)
    assert words_of(load_corpus(str(folder)), "train") == ["new", "words", EOS]


def test_several_runs_cache_at_once(folder, capsys):
    results, problems = [], []

    def load():
        try:
            results.append(load_corpus(str(folder)))
        except BaseException as problem:
            problems.append(problem)

    for _ in range(10):
        for name in caches(folder):
            (folder / name).unlink()
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems and len(results) == 40 and all(equal(results[0], other) for other in results)
    assert capsys.readouterr().err == "" and len(caches(folder)) == 1


# ---- columns


def test_columns_of_the_alphabet():
    columns = TokenColumns(torch.arange(12, dtype=torch.uint8), batch_size=4)  # 11 pairs
    assert (columns.num_pairs, columns.length) == (11, 3)
    (tokens, targets), (last_tokens, last_targets) = columns.windows(2)
    assert tokens.tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert targets.tolist() == [[1, 2], [4, 5], [7, 8], [10, 11]]
    assert last_tokens.tolist() == [[2], [5], [8], [0]]
    assert last_targets.tolist() == [[3], [6], [9], [IGNORED]]
    assert tokens.dtype == targets.dtype == torch.int64


@settings(max_examples=300, deadline=None)
@given(data=st.data(), length=st.integers(2, 60), bptt=st.integers(1, 70))
def test_every_pair_is_in_exactly_one_place(data, length, bptt):
    batch_size = data.draw(st.integers(1, length - 1))
    ids = torch.arange(length, dtype=torch.int16)
    columns = TokenColumns(ids, batch_size)
    windows = list(columns.windows(bptt))
    assert [tokens.shape[1] for tokens, _ in windows[:-1]] == [bptt] * (len(windows) - 1)
    tokens = torch.cat([tokens for tokens, _ in windows], dim=1)
    targets = torch.cat([targets for _, targets in windows], dim=1)
    assert tokens.shape == targets.shape == (batch_size, columns.length)
    real = targets != IGNORED
    # Read column after column, they are the pairs of the text in order.
    assert tokens[real].tolist() == list(range(length - 1))
    assert targets[real].tolist() == list(range(1, length))
    lengths = real.sum(1)
    assert real.eq(torch.arange(columns.length) < lengths[:, None]).all()  # a column ends once
    assert lengths.max() - lengths.min() <= 1 and (tokens[~real] == 0).all()
    assert columns.num_pairs == length - 1 == lengths.sum()
    start = data.draw(st.integers(0, columns.length + 3))
    rest = list(columns.windows(bptt, start))
    assert sum(tokens.shape[1] for tokens, _ in rest) == max(columns.length - start, 0)
    if rest:
        assert torch.equal(torch.cat([tokens for tokens, _ in rest], dim=1), tokens[:, start:])
        assert torch.equal(torch.cat([targets for _, targets in rest], dim=1), targets[:, start:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_columns_keep_the_small_type(dtype):
    columns = TokenColumns(torch.arange(9).to(dtype), 3)
    assert columns.ids.dtype == dtype
    assert next(columns.windows(2))[0].dtype == torch.int64


def test_a_text_shorter_than_the_batch_is_refused_with_numbers():
    with pytest.raises(UserError, match="6 tokens.* a batch of 6, which needs 7. Use a batch of at most 5"):
        TokenColumns(torch.arange(6), 6)
    TokenColumns(torch.arange(6), 5)
    for length in (0, 1):
        with pytest.raises(UserError, match="Use a longer text"):
            TokenColumns(torch.arange(length), 1)
    for batch_size, bptt, start in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            list(TokenColumns(torch.arange(6), batch_size).windows(bptt, start))


# ---- the real corpus


def wikitext_2():
    for folder in (os.environ.get("RMC_WIKITEXT2"), ROOT / "data" / "wikitext-2"):
        if folder and os.path.isdir(folder):
            return str(folder)
    pytest.skip("no WikiText-2: name its folder in RMC_WIKITEXT2, or have it in data/wikitext-2")


def test_wikitext_2_has_the_published_counts():
    corpus = load_corpus(wikitext_2())
    assert len(corpus.vocabulary) == 33278
    assert [len(getattr(corpus, split)) for split in SPLITS] == [2088628, 217646, 245569]
    assert corpus.train.dtype == torch.int32
    assert corpus.vocabulary.words[:4] == ["the", ",", ".", UNK]
    assert TokenColumns(corpus.test, 10).num_pairs == 245568

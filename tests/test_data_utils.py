"""Corpora: words, vocabulary, cache, streams and raw texts, compared with slow and obvious code."""

import gzip
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

from training.console import UserError

import pytest
import torch
from conftest import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from data_utils import (
    EOS,
    IGNORED,
    SPLITS,
    UNK,
    Corpus,
    TokenStreams,
    Vocabulary,
    load_corpus,
)

ROOT = Path(__file__).resolve().parent.parent
TRAIN, VALID, TEST = "b a a\nb a c\n\n", "a d\n", "c e e e f\nb\n"


def write(folder, train=TRAIN, valid=VALID, test=TEST):
    folder.mkdir(parents=True, exist_ok=True)
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
    return sorted(folder.glob(".*"))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "corpus")


# ---- vocabulary


def test_vocabulary_round_trip_and_errors():
    vocabulary = Vocabulary(["the", EOS, UNK, "é"])
    assert len(vocabulary) == 4
    assert vocabulary.encode(["é", "the"]) == [3, 0]
    assert vocabulary.decode(torch.tensor([3, 1])) == ["é", EOS]
    assert vocabulary.encode(["what", "the"], allow_unknown=True) == [2, 0]
    with pytest.raises(UserError, match=r"not in the vocabulary of 4 words: 'what', 'is'\."):
        vocabulary.encode(["what", "the", "is", "what"])
    with pytest.raises(UserError, match="'what'"):
        Vocabulary(["the"]).encode(["what"], allow_unknown=True)
    with pytest.raises(ValueError, match="2 different of 3"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="strings"):
        Vocabulary(["a", 1])


def test_ids_are_in_order_of_count_then_alphabet(folder):
    corpus = load_corpus(str(folder))
    # <eos> 6; a 4; b, e 3; c 2; d, f 1
    assert corpus.vocabulary.words == [EOS, "a", "b", "e", "c", "d", "f"]
    assert corpus.train.tolist() == [2, 1, 1, 0, 2, 1, 4, 0, 0]
    assert words_of(corpus, "valid") == ["a", "d", EOS]
    assert words_of(corpus, "test") == ["c", "e", "e", "e", "f", EOS, "b", EOS]


def test_vocabulary_from_train_only(folder, tmp_path):
    corpus = load_corpus(str(folder), vocab_from="train")
    # in train: a 3, <eos> 3, b 2, c 1; <unk> is added
    assert corpus.vocabulary.words == [EOS, "a", "b", "c", UNK]
    assert words_of(corpus, "train") == ["b", "a", "a", EOS, "b", "a", "c", EOS, EOS]
    assert words_of(corpus, "valid") == ["a", UNK, EOS]
    assert words_of(corpus, "test") == ["c", UNK, UNK, UNK, UNK, EOS, "b", EOS]
    corpus = load_corpus(str(write(tmp_path / "c", "z <unk> <unk>\n", "y\n", "<unk> z\n")), "train")
    assert corpus.vocabulary.words == [UNK, EOS, "z"]
    assert words_of(corpus, "valid") == [UNK, EOS]


def test_an_unk_that_training_never_shows_gives_one_warning(folder, tmp_path, capsys):
    for _ in range(2):  # from the texts and from the cache
        load_corpus(str(folder), vocab_from="train")
        assert "<unk> occurs in valid.txt (1) and test.txt (4) but not in train" in capsys.readouterr().err
    load_corpus(str(write(tmp_path / "shown", "a <unk>\n")), vocab_from="train")
    load_corpus(str(write(tmp_path / "known", "a b c d e <unk>\n")), vocab_from="train")
    assert capsys.readouterr().err == ""


def test_fingerprint_has_its_known_value_and_depends_on_words_and_ids(folder):
    """The value is stored in checkpoints: another one would make old runs impossible to resume."""
    corpus = load_corpus(str(folder))
    expected = hashlib.sha256(b"<eos>\na\nb\ne\nc\nd\nf")
    for split in (b"\0009\0\2\1\1\0\2\1\4\0\0", b"\0003\0\1\5\0", b"\0008\0\4\3\3\3\6\0\2\0"):
        expected.update(split)
    assert corpus.fingerprint() == expected.hexdigest()
    renamed = Vocabulary([*corpus.vocabulary.words[:-1], "D"])
    assert (
        Corpus(folder, renamed, corpus.train, corpus.valid, corpus.test).fingerprint() != corpus.fingerprint()
    )
    corpus.test[3] = 1
    assert corpus.fingerprint() != expected.hexdigest()


# ---- tokenizing


def obvious_loop(folder):
    """Return the vocabulary's words, and the words of each text."""
    texts, counts = {}, Counter()
    for split in SPLITS:
        text = (folder / f"{split}.txt").read_bytes().decode()
        texts[split] = []
        for line in text.removesuffix("\ufeff").removesuffix("\n").split("\n"):
            words = line.lstrip("\ufeff").split()
            words = [word if word == "\ufeff" else word.replace("\ufeff", "") for word in words]
            words = [word for word in words if word]
            texts[split] += words if words[-1:] == [EOS] else [*words, EOS]
        counts.update(texts[split])
    return sorted(counts, key=lambda word: (-counts[word], word)), texts


def check_against_obvious_loop(folder):
    words, texts = obvious_loop(folder)
    corpus = data_utils.tokenize(folder, "all")
    assert corpus.vocabulary.words == words
    for split in SPLITS:
        assert words_of(corpus, split) == texts[split]


# White space of str.split that bytes.split does not know, of several bytes, and line ends that are none here.
SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000"
TEXT = st.text(st.sampled_from("ab \n\r\t" + SPACES + "é\u200b\ufeff😀"), max_size=60)
WITH_EOS = st.lists(st.sampled_from(["<eos>", "<eos>", " ", "\n", "\r\n", "a", "\xa0", "<eos"]), max_size=30)


@fuzz(200)
@given(text=TEXT | WITH_EOS.map("".join), block=st.sampled_from([1, 2, 7, 1 << 20]))
def test_texts_are_split_as_by_the_obvious_loop(tmp_path, text, block):
    write(tmp_path, text + "x", text + "\n", "a\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, "BLOCK_BYTES", block)
        check_against_obvious_loop(tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\ufeffa b\r\n\r\n\ufeffc\r\n", ["a", "b", EOS, EOS, "c", EOS]),
        ("a\ufeffb \ufeff c\n \n\u3000", ["ab", "\ufeff", "c", EOS, EOS, EOS]),
        ("a <eos>\nb <eos> \r\n<eos>\n\nc <eos>", ["a", EOS, "b", EOS, EOS, EOS, "c", EOS]),
        (" a <eos> b\nc<eos>\n", ["a", EOS, "b", EOS, "c<eos>", EOS]),
    ],
)
def test_words_of_a_line(tmp_path, text, expected):
    assert words_of(load_corpus(str(write(tmp_path / "c", valid=text))), "valid") == expected


CONVERT = r"If it has another encoding, convert it, .*: iconv -f CP1252 -t UTF-8 valid.txt > "
REJECTED = {
    "empty": (b"", "is empty"),
    "Latin-1": (b"caf\xe9 au lait\n", r"byte 3 is 0xe9\. Expected plain text\. " + CONVERT),
    "Windows-1252": ("Don\u2019t \u2013 \u201chéhé\u201d\n".encode("cp1252"), "byte 3 is 0x92.*" + CONVERT),
    "UTF-16": ("a b\n".encode("utf-16"), "byte 0 is 0xff.*iconv -f UTF-16 "),
    "gzip": (gzip.compress(b"a b\n", mtime=0), "is a gzip file. Expected plain text"),
    "PDF": (b"%PDF-1.7\n%\xb5\xb5\xb5\xb5\n", "is a PDF file. "),
    "late": (b"\xef\xbb\xbf" + b"a b\n" * 50 + b"\xff\n", "byte 203 is 0xff"),
}


@pytest.mark.parametrize("kind", REJECTED)
@pytest.mark.parametrize("block", [16, 1 << 20])
def test_files_that_are_not_utf8_are_rejected_with_advice(tmp_path, monkeypatch, kind, block):
    text, message = REJECTED[kind]
    monkeypatch.setattr(data_utils, "BLOCK_BYTES", block)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(write(tmp_path / "c", valid=text)))
    assert "valid.txt" in str(error.value) and "\n" not in str(error.value)
    assert caches(tmp_path / "c") == []


# ---- folders


def test_a_missing_text_is_named_with_what_was_found(folder):
    (folder / "valid.txt").unlink()
    (folder / "notes.md").write_text("")
    with pytest.raises(UserError) as error:
        load_corpus(str(folder))
    assert str(error.value) == (
        f"no valid.txt in {folder} (found: notes.md, test.txt, train.txt). "
        "Expected train.txt, valid.txt and test.txt, one sentence per line."
    )
    (folder / "valid.txt").mkdir()
    with pytest.raises(UserError, match="valid.txt is not a file"):
        load_corpus(str(folder))


def test_data_that_is_not_a_folder(folder, tmp_path):
    (tmp_path / "my books").mkdir()
    with pytest.raises(UserError, match=r"no train.txt in .*found: nothing.*per line\.$"):
        load_corpus(str(tmp_path / "my books"))
    (tmp_path / "my books" / "1.txt").write_text("")
    with pytest.raises(UserError, match="found: 1.txt.* its texts: python data_utils.py '.*/my books'$"):
        load_corpus(str(tmp_path / "my books"))
    for file in (folder / "train.txt", "/dev/null"):
        with pytest.raises(UserError, match=f"is a file. Expected a folder.*python data_utils.py {file}"):
            load_corpus(str(file))
    for wrong in ("no-such-corpus", "no/such/corpus", "", "x" * 5000, "nul\0"):
        with pytest.raises(UserError, match="no folder .* 'tiny'"):
            load_corpus(wrong)


def test_names_are_also_looked_up_beside_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "DATA_FOLDER", tmp_path / "project")
    bundled = write(tmp_path / "project" / "corpus")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()  # a folder without texts does not hide a corpus
    for name in ("corpus", "data/corpus", "./data/corpus"):
        assert load_corpus(name).folder == bundled
    with pytest.raises(UserError):
        load_corpus("other/corpus")
    (tmp_path / "corpus" / "train.txt").write_text("a\n")  # one text: probably a mistake, which is reported
    with pytest.raises(UserError, match=r"no valid.txt in corpus \(found: train.txt\)"):
        load_corpus("corpus")


# ---- cache


def test_the_cache_is_used_while_texts_and_options_are_the_same(folder, monkeypatch):
    first, from_train = load_corpus(str(folder)), load_corpus(str(folder), "train")
    monkeypatch.setattr(data_utils, "tokenize", None)
    again = load_corpus(str(folder))
    assert equal(first, again) and again.train.dtype == torch.uint8
    assert equal(from_train, load_corpus(str(folder), "train"))
    again.train += 1  # the memory is writable
    monkeypatch.undo()
    write(folder, TRAIN + VALID, "x\n")
    load_corpus(str(folder))
    assert words_of(load_corpus(str(write(folder, TRAIN, VALID + "x\n"))), "valid") == [
        "a",
        "d",
        EOS,
        "x",
        EOS,
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_an_edited_text_makes_the_cache_invalid(folder, split):
    load_corpus(str(folder))
    load_corpus(str(folder), "train")
    (folder / ".corpus-all-0123.pkl").write_bytes(b"of an earlier version")
    path = folder / f"{split}.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("a", "z").replace("b", "z"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert "z" in words_of(load_corpus(str(folder)), split)
    assert len(caches(folder)) == 2  # the outdated one is removed, that of the other option is kept


def test_unusable_caches_are_rebuilt(folder, capsys):
    expected = load_corpus(str(folder))
    (path,) = caches(folder)
    path.write_bytes(path.read_bytes()[:500])
    for message in ("is damaged; the texts are tokenized again", ""):
        assert equal(load_corpus(str(folder)), expected)
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == bool(message) and "best.pt" not in err


def test_a_cache_that_cannot_be_written_gives_a_warning_and_the_corpus(folder, capsys, monkeypatch):
    def fail(handle):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fail)
    assert len(load_corpus(str(folder)).train) == 9 and caches(folder) == []
    err = capsys.readouterr().err
    assert "could not write" in err and "Read-only file system" in err and err.count("\n") == 1


# ---- streams


@settings(max_examples=300, deadline=None)
@given(data=st.data(), length=st.integers(2, 60), bptt=st.integers(1, 70))
def test_every_pair_is_in_exactly_one_place(data, length, bptt):
    batch_size = data.draw(st.integers(1, length - 1))
    streams = TokenStreams(torch.arange(length, dtype=torch.int16), batch_size)
    windows = list(streams.windows(bptt))
    assert [tokens.shape[1] for tokens, _ in windows[:-1]] == [bptt] * (len(windows) - 1)
    tokens = torch.cat([tokens for tokens, _ in windows], dim=1)
    targets = torch.cat([targets for _, targets in windows], dim=1)
    assert tokens.shape == targets.shape == (batch_size, streams.length)
    assert tokens.dtype == targets.dtype == torch.int64 and streams.ids.dtype == torch.int16
    real = targets != IGNORED
    # Read stream after stream, they are the pairs of the text in order.
    assert tokens[real].tolist() == list(range(length - 1))
    assert targets[real].tolist() == list(range(1, length))
    lengths = real.sum(1)
    assert real.eq(torch.arange(streams.length) < lengths[:, None]).all()  # a stream ends once
    assert lengths.max() - lengths.min() <= 1 and (tokens[~real] == 0).all()
    assert streams.num_pairs == length - 1 == lengths.sum()


# ---- raw texts


def test_a_book_becomes_a_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_utils, "DATA_FOLDER", tmp_path / "data")
    book = tmp_path / "my book.txt"
    book.write_text("".join(f"Word{i} is\nnew.\n\n" for i in range(100)), encoding="utf-8-sig")
    data_utils.main([str(book), "--lower"])
    out, err = capsys.readouterr()
    assert out.endswith("python train_rmc.py --recipe tiny --data 'my book'\n")
    folder = tmp_path / "data" / "my book"
    lines = [f"word{i} is new .\n" for i in range(100)]
    for split, part in zip(SPLITS, (lines[:90], lines[90:95], lines[95:]), strict=True):
        assert (folder / f"{split}.txt").read_text() == "".join(part)
    assert f"{folder / 'train.txt'}: 90 paragraphs, 450 tokens" in out
    assert re.findall(r"(\w+)\.txt has fewer than 1,000 tokens", err) == ["valid", "test"]
    assert len(load_corpus("my book").vocabulary) == 104
    with pytest.raises(UserError, match="already contains a corpus. Choose another folder with --out"):
        data_utils.main([str(book)])


def test_several_texts_with_a_limited_vocabulary(tmp_path, capsys):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "10.txt").write_text("a a a\n" * 15)
    (folder / "2.txt").write_text("a a b\nb c a\n")
    (folder / "notes.md").write_text("x")
    (tmp_path / "last").write_text("a a d\n" * 3)
    texts = [str(folder), str(tmp_path / "last")]
    data_utils.main([*texts, "--out", str(tmp_path / "out"), "--vocab_size", "4"])
    assert f"--data {tmp_path / 'out'}\n" in capsys.readouterr().out
    corpus = load_corpus(str(tmp_path / "out"))
    assert set(corpus.vocabulary.words) == {"a", "b", UNK, EOS}
    assert words_of(corpus, "train")[-12:] == ["a", "a", "b", EOS, "b", UNK, "a", EOS, "a", "a", UNK, EOS]
    assert words_of(corpus, "valid") == words_of(corpus, "test")[:4] == ["a", "a", UNK, EOS]


def test_lines_are_joined_if_the_whole_text_has_twenty_blank_lines():
    one, two = "a\nb\n\n\n" * 10 + "c", "d\n\n" * 10 + "e\nf\n"
    assert data_utils.paragraphs([one, two])[0] == ["a b"] * 10 + ["c"] + ["d"] * 10 + ["e f"]
    lines = ["a", "b"] * 10 + ["c"] + ["d"] * 9 + ["e", "f"]
    assert data_utils.paragraphs([one, two[3:]]) == (lines, "lines")
    assert data_utils.paragraphs(["a\nb"] * 30)[0] == ["a", "b"] * 30


@pytest.mark.parametrize("lines", [["a"] * 40 + ["b " * 99], ["a " * 99] + ["b"] * 40, ["a " * 99, "b", "c"]])
def test_every_part_has_a_line(tmp_path, lines):
    (tmp_path / "raw").write_text("\n".join(lines))
    data_utils.main([str(tmp_path / "raw"), "--out", str(tmp_path / "out")])
    parts = [(tmp_path / "out" / f"{split}.txt").read_text().splitlines() for split in SPLITS]
    assert all(parts) and sum(parts, []) == [line.strip() for line in lines]


@pytest.mark.parametrize(
    "texts, flags, message",
    [
        ([b"two\nlines\n"], [], "too few lines to split into three texts: 2. Use at least 3 lines"),
        ([b"a\n" * 9, b" \n"], [], "1.txt is empty"),
        ([b"a\n" * 9], ["--vocab-size", "2"], "--vocab-size must be at least 3, got 2"),
        ([b"caf\xe9"], [], "0.txt is not UTF-8 text"),
        ([], [], "no .txt file in the folder"),
    ],
)
def test_raw_texts_that_are_rejected(tmp_path, texts, flags, message):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        data_utils.main([str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


# ---- the real corpus


def test_wikitext_2_has_the_published_counts():
    for folder in (os.environ.get("RMC_WIKITEXT2"), ROOT / "data" / "wikitext-2"):
        if folder and os.path.isdir(folder):
            break
    else:
        pytest.skip("no WikiText-2: name its folder in RMC_WIKITEXT2, or have it in data/wikitext-2")
    corpus = load_corpus(str(folder))
    assert len(corpus.vocabulary) == 33278
    assert [len(getattr(corpus, split)) for split in SPLITS] == [2088628, 217646, 245569]
    assert corpus.train.dtype == torch.int32
    assert corpus.vocabulary.words[:4] == ["the", ",", ".", UNK]
    assert TokenStreams(corpus.test, 10).num_pairs == 245568

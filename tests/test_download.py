"""Fetching corpora from a local server that has every fault a mirror can have."""

import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import data_utils
from data_utils import Published, load_corpus
from training.console import UserError

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {"train": b"a b a\n" * 30, "valid": b"b c\n", "test": "a é\n".encode()}


def zipped(texts, folder="wikitext-2/"):
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as file:
        for split, text in texts.items():
            file.writestr(f"{folder}wiki.{split}.tokens", text)
    return package.getvalue()


def git_name(text):
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


def digests(archive=None):
    result = {
        "train.txt": ("git", git_name(TEXTS["train"])),
        "valid.txt": ("sha256", hashlib.sha256(TEXTS["valid"]).hexdigest()),
        "test.txt": ("sha256", hashlib.sha256(TEXTS["test"]).hexdigest()),
    }
    return result | ({"corpus.zip": ("md5", hashlib.md5(archive).hexdigest())} if archive else {})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path)
        if self.headers["User-Agent"].startswith("Python-urllib"):
            self.send_error(403)
            return
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
        elif callable(body):
            body(self)
        else:
            self.reply(body)

    def reply(self, body, size=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.requested, server.stop = {}, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data_utils, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr(data_utils, "TIMEOUT", 0.5)
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def publish(monkeypatch, mirrors, expected=None, max_bytes=10_000):
    published = Published(tuple(mirrors), digests() if expected is None else expected, max_bytes)
    monkeypatch.setattr(data_utils, "PUBLISHED", {"corpus": published})


def texts(prefix="/raw/"):
    return {f"{prefix}{split}.txt": text for split, text in TEXTS.items()}


def check_fetched():
    folder = data_utils.DATA_FOLDER / "corpus"
    assert sorted(os.listdir(data_utils.DATA_FOLDER)) == ["corpus"]
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["test.txt", "train.txt", "valid.txt"]
    for split, text in TEXTS.items():
        assert (folder / f"{split}.txt").read_bytes() == text


def check_nothing_left():
    assert os.listdir(data_utils.DATA_FOLDER) == []


# ---- what works


@pytest.mark.parametrize("name", ["corpus", "data/corpus", "./data/corpus"])
def test_texts_are_fetched_once_and_loaded(server, monkeypatch, name):
    server.files = texts()
    publish(monkeypatch, [f"{server.url}/raw/"])
    corpus = load_corpus(name)
    assert corpus.vocabulary.decode(corpus.test.tolist()) == ["a", "é", "<eos>"]
    check_fetched()
    assert server.requested == ["/raw/train.txt", "/raw/valid.txt", "/raw/test.txt"]
    load_corpus(name)
    assert len(server.requested) == 3


@pytest.mark.parametrize("folder", ["wikitext-2/", "", "../../up/", "/root/"])
def test_an_archive_is_unpacked_by_file_name_alone(server, monkeypatch, tmp_path, folder):
    archive = zipped(TEXTS, folder)
    server.files = {"/corpus.zip": archive}
    publish(monkeypatch, [f"{server.url}/corpus.zip"], digests(archive))
    load_corpus("corpus")
    check_fetched()
    assert os.listdir(tmp_path) == ["data"]


def test_an_archive_alone_has_a_checksum(server, monkeypatch):
    archive = zipped(TEXTS)
    server.files = {"/corpus.zip": archive}
    expected = {"corpus.zip": ("sha256", hashlib.sha256(archive).hexdigest())}
    publish(monkeypatch, [f"{server.url}/corpus.zip"], expected)
    load_corpus("corpus")
    check_fetched()


def test_the_folder_is_readable_as_any_other(server, monkeypatch, tmp_path):
    server.files = texts()
    publish(monkeypatch, [f"{server.url}/raw/"])
    load_corpus("corpus")
    (tmp_path / "other").mkdir()
    assert (data_utils.DATA_FOLDER / "corpus").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_second_mirror_is_tried(server, monkeypatch, capsys):
    archive = zipped(TEXTS)
    server.files = texts() | {"/corpus.zip": archive, "/raw/test.txt": b"wrong\n"}
    publish(monkeypatch, [f"{server.url}/raw/", f"{server.url}/corpus.zip"], digests(archive))
    load_corpus("corpus")
    check_fetched()
    assert capsys.readouterr().out.count("fetching corpus from 127.0.0.1") == 2


def test_two_runs_fetch_at_once(server, monkeypatch):
    both = threading.Barrier(2, timeout=10)

    def wait_for_the_other(handler):
        both.wait()
        handler.reply(TEXTS["test"])

    server.files = texts() | {"/raw/test.txt": wait_for_the_other}
    publish(monkeypatch, [f"{server.url}/raw/"])
    monkeypatch.setattr(data_utils, "TIMEOUT", 10)
    results = []
    threads = [threading.Thread(target=lambda: results.append(data_utils.fetch("corpus"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [data_utils.DATA_FOLDER / "corpus"] * 2
    check_fetched()


def test_the_remains_of_a_killed_run_are_removed_after_a_day(server, monkeypatch):
    server.files = texts()
    publish(monkeypatch, [f"{server.url}/raw/"])
    for age in (2, 0):
        old = data_utils.DATA_FOLDER / f".corpus-{age}.partial"
        old.mkdir(parents=True)
        (old / "train.txt").write_text("half")
        os.utime(old, (time.time() - age * 86400,) * 2)
    load_corpus("corpus")
    assert sorted(os.listdir(data_utils.DATA_FOLDER)) == [".corpus-0.partial", "corpus"]


# ---- what does not


def truncated(handler):
    handler.reply(TEXTS["train"][:-7], size=len(TEXTS["train"]))
    handler.close_connection = True


def hanging(handler):
    handler.reply(TEXTS["train"][:-7], size=len(TEXTS["train"]))
    handler.server.stop.wait(20)


def silent(handler):
    handler.server.stop.wait(20)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"a b\n" * 1000)
    except OSError:
        pass


def garbled(handler):
    handler.wfile.write(b"this is no HTTP\r\n\r\n")
    handler.close_connection = True


FAULTS = {
    "missing": (None, "HTTP Error 404"),
    "truncated": (truncated, "wrong checksum|broke off after"),
    "wrong bytes": (b"A b a\n" * 30, "train.txt, 180 bytes, has the wrong checksum"),
    "an error page": (b"<html>", "wrong checksum"),
    "empty": (b"", "wrong checksum"),
    "hanging": (hanging, "broke off after .*timed out"),
    "silent": (silent, "timed out"),
    "endless": (endless, "train.txt is larger than 10,000 bytes"),
    "garbled": (garbled, "no HTTP"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_mirror_leaves_nothing_and_is_explained(server, monkeypatch, fault):
    body, reason = FAULTS[fault]
    server.files = texts() | {"/raw/train.txt": body}
    publish(monkeypatch, [f"{server.url}/raw/"])
    with pytest.raises(UserError, match=rf"cannot fetch corpus \(127.0.0.1:\d+: .*({reason})") as error:
        load_corpus("corpus")
    assert f"into {data_utils.DATA_FOLDER / 'corpus'} by hand" in str(error.value)
    assert "--data tiny" in str(error.value)
    check_nothing_left()


def flipped(archive):
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 1]) + archive[middle + 1 :]


@pytest.mark.parametrize(
    "archive, checked, reason",
    [
        (b"no archive", False, "cannot be unpacked"),
        (zipped(TEXTS)[:-30], False, "cannot be unpacked"),
        (zipped({"train": TEXTS["train"]}), False, "has no wiki.valid.tokens"),
        (flipped(zipped(TEXTS)), True, "corpus.zip, .* wrong checksum"),
        (zipped(TEXTS | {"test": b"a\n"}), False, "test.txt, 2 bytes, has the wrong checksum"),
    ],
)
def test_a_faulty_archive_leaves_nothing_and_is_explained(server, monkeypatch, archive, checked, reason):
    server.files = {"/corpus.zip": archive}
    publish(monkeypatch, [f"{server.url}/corpus.zip"], digests(zipped(TEXTS) if checked else None))
    with pytest.raises(UserError, match=reason):
        load_corpus("corpus")
    check_nothing_left()


def test_offline_every_mirror_is_named(server, monkeypatch):
    publish(monkeypatch, ["http://127.0.0.1:9/raw/", "http://no-such-host.invalid/corpus.zip"])
    with pytest.raises(UserError, match=r"127.0.0.1:9: .*; no-such-host.invalid: .*in corpus.zip they are "):
        load_corpus("corpus")
    check_nothing_left()


def test_a_folder_that_cannot_be_written(server, monkeypatch, tmp_path):
    server.files = texts()
    publish(monkeypatch, [f"{server.url}/raw/"])
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UserError, match="cannot write the corpus into"):
        load_corpus("corpus")
    assert server.requested == []


def test_a_full_disk_is_not_blamed_on_the_mirror(server, monkeypatch):
    server.files = texts()
    publish(monkeypatch, [f"{server.url}/raw/"] * 2)
    real_open = open

    class FullDisk(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def open_full_disk(path, mode):
        return FullDisk() if mode == "wb" else real_open(path, mode)

    monkeypatch.setattr(data_utils, "open", open_full_disk, raising=False)
    with pytest.raises(UserError, match=r"cannot write the corpus into .* \(No space left on device\)"):
        load_corpus("corpus")
    check_nothing_left()
    assert len(server.requested) == 1


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_midway_leaves_nothing(server, tmp_path):
    asked = threading.Event()

    def slow(handler):
        handler.reply(TEXTS["valid"][:1], size=len(TEXTS["valid"]))
        asked.set()
        handler.server.stop.wait(20)

    server.files = texts() | {"/raw/valid.txt": slow}
    script = f"""
import signal, sys
from pathlib import Path
# Whoever runs the tests in a shell's background runs them with Ctrl-C ignored, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(ROOT)!r})
import data_utils, runs
data_utils.DATA_FOLDER = Path({str(tmp_path / "data")!r})
data_utils.PUBLISHED = {{"corpus": data_utils.Published(("{server.url}/raw/",), {digests()!r}, 10_000)}}
console.run_script(lambda: data_utils.load_corpus("corpus") and None)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert asked.wait(60)
    (partial,) = os.listdir(tmp_path / "data")
    assert partial.endswith(".partial")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    check_nothing_left()


def test_the_published_table_is_complete():
    assert list(data_utils.PUBLISHED) == ["wikitext-2", "wikitext-103"]
    lengths = {"git": 40, "sha256": 64, "md5": 32}
    for published in data_utils.PUBLISHED.values():
        for mirror in published.mirrors:
            assert mirror.startswith("https://")
            last = mirror.rsplit("/", 1)[1]
            for name in [last] if last else ["train.txt", "valid.txt", "test.txt"]:  # all get verified
                algorithm, digest = published.digests[name]
                assert len(bytes.fromhex(digest)) * 2 == lengths[algorithm]

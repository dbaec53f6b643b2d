"""Downloading corpora from a local server with the faults that mirrors have."""

import hashlib
import http.server
import io
import os
import threading
import urllib.request
import zipfile

from training.console import UserError

import pytest

import data_utils
from corpora import download
from data_utils import SPLITS, load_corpus

TEXTS = {"train": b"a b a\n" * 30, "valid": b"b c\n", "test": "a é\n".encode()}
RAW = {f"/raw/{split}.txt": text for split, text in TEXTS.items()}


FILES = {
    "train.txt": "git:" + hashlib.sha1(b"blob %d\0" % len(TEXTS["train"]) + TEXTS["train"]).hexdigest(),
    "valid.txt": "sha256:" + hashlib.sha256(TEXTS["valid"]).hexdigest(),
    "test.txt": "md5:" + hashlib.md5(TEXTS["test"]).hexdigest(),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path)
        body = self.server.files.get(self.path)
        if body is None or self.headers["User-Agent"].startswith("Python-urllib"):
            self.send_error(404)
        elif callable(body):
            body(self)
        else:
            self.reply(body)

    def reply(self, body, size=None):
        self.send_response(200)
        self.send_header("Content-Length", str(size or len(body)))
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
    monkeypatch.setattr(urllib.request, "_opener", None)  # which keeps the proxies of its first use
    monkeypatch.setattr(data_utils, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def publish(monkeypatch, *mirrors):
    monkeypatch.setattr(download, "PUBLISHED", {"corpus": mirrors})


def check_downloaded():
    folder = data_utils.DATA_FOLDER / "corpus"
    assert os.listdir(data_utils.DATA_FOLDER) == ["corpus"]
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["test.txt", "train.txt", "valid.txt"]
    for split, text in TEXTS.items():
        assert (folder / f"{split}.txt").read_bytes() == text


def check_failed(match):
    with pytest.raises(UserError, match=match) as error:
        load_corpus("corpus")
    assert os.listdir(data_utils.DATA_FOLDER) == []
    return str(error.value)


# ---- mirrors that work


@pytest.mark.parametrize("name", ["corpus", "data/corpus", "./data/corpus"])
def test_texts_are_downloaded_once_and_loaded(server, monkeypatch, tmp_path, name):
    server.files = RAW
    publish(monkeypatch, (f"{server.url}/raw/", FILES))
    corpus = load_corpus(name)
    assert corpus.vocabulary.decode(corpus.test.tolist()) == ["a", "é", "<eos>"]
    check_downloaded()
    (tmp_path / "other").mkdir()
    assert corpus.folder.stat().st_mode == (tmp_path / "other").stat().st_mode
    load_corpus(name)
    assert server.requested == list(RAW)


@pytest.mark.parametrize("folder", ["wikitext-2/", "", "../../up/", "/root/"])
def test_the_second_mirror_has_an_archive_whose_paths_are_ignored(
    server, monkeypatch, tmp_path, folder, capsys
):
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as file:
        for split, text in TEXTS.items():
            file.writestr(f"{folder}wiki.{split}.tokens", text)
    archive = package.getvalue()
    server.files = RAW | {"/corpus.zip": archive, "/raw/test.txt": b"wrong\n"}
    checksum = "sha256:" + hashlib.sha256(archive).hexdigest()
    publish(monkeypatch, (f"{server.url}/raw/", FILES), (f"{server.url}/", {"corpus.zip": checksum}))
    load_corpus("corpus")
    check_downloaded()
    assert os.listdir(tmp_path) == ["data"]
    assert capsys.readouterr().out.count("downloading corpus from 127.0.0.1") == 2


# ---- mirrors that fail


def truncated(handler):
    handler.reply(TEXTS["train"][:-7], size=len(TEXTS["train"]))
    handler.close_connection = True


FAULTS = {
    "missing": (None, "404"),
    "truncated": (truncated, "wrong checksum|IncompleteRead"),
    "wrong bytes": (b"A b a\n" * 30, "train.txt, 180 bytes, has the wrong checksum"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_mirror_leaves_nothing_and_is_explained(server, monkeypatch, fault):
    body, reason = FAULTS[fault]
    server.files = RAW | {"/raw/train.txt": body}
    publish(monkeypatch, (f"{server.url}/raw/", FILES))
    message = check_failed(rf"cannot download corpus \(127.0.0.1:\d+: .*({reason})")
    assert f"into {data_utils.DATA_FOLDER / 'corpus'} by hand" in message
    assert message.endswith("or start with the bundled corpus: --recipe tiny")


def test_without_a_network_every_mirror_is_named(server, monkeypatch):
    publish(monkeypatch, ("http://127.0.0.1:9/raw/", FILES), ("http://no-such-host.invalid/", {"c.zip": ""}))
    check_failed(r"127.0.0.1:9: .*; no-such-host.invalid: .*in c.zip they are ")
    monkeypatch.setenv("http_proxy", "http:/my.proxy:3128")  # malformed
    check_failed("cannot download corpus .*--recipe tiny")


def test_every_published_file_is_verified():
    assert list(download.PUBLISHED) == ["wikitext-2", "wikitext-103"]
    lengths = {"git": 40, "sha256": 64, "md5": 32}
    for mirrors in download.PUBLISHED.values():
        for address, files in mirrors:
            assert address.startswith("https://") and address.endswith("/")
            assert list(files) == [f"{split}.txt" for split in SPLITS] or list(files)[0].endswith(".zip")
            for checksum in files.values():
                algorithm, digest = checksum.split(":")
                assert len(bytes.fromhex(digest)) * 2 == lengths[algorithm]

"""Downloads of the published corpora, verified by their checksums."""

import hashlib
import http.client
import os
import secrets
import shutil
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from training.console import UserError, say

from tqdm import tqdm

SPLITS = ("train", "valid", "test")
USER_AGENT = "relational-rnn-pytorch (corpus download)"  # one host rejects Python's default
TIMEOUT = 30.0  # seconds without data before the next mirror is tried

# Mirrors of each corpus, tried in order: an address, and its files with their checksums. They are the three
# texts, or a zip archive with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens. "git" is the SHA-1
# under which git stores a file.
PUBLISHED = {
    "wikitext-2": (
        (
            "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/",
            {
                "train.txt": "git:2d84b35af79e411d73ea7cae83c73964c6ac83b4",
                "valid.txt": "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                "test.txt": "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            },
        ),
        ("https://wikitext.smerity.com/", {"wikitext-2-v1.zip": "md5:542ccefacc6c27f945fb54453812b3cd"}),
    ),
    "wikitext-103": (
        (
            "https://wikitext.smerity.com/",
            {
                "wikitext-103-v1.zip": (
                    "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
                )
            },
        ),
    ),
}


class Unusable(Exception):
    """A mirror that does not deliver the right files; the message says why."""


def fetch(name: str, target: Path) -> None:
    """Download a published corpus into the folder `target`, complete and verified or not at all.

    Raises:
        UserError: every mirror failed, or the folder cannot be written.
    """
    # A random name, as another run may be downloading too, and beside the target, to be renamed to it.
    work = target.with_name(f".{name}-{secrets.token_hex(4)}.partial")
    try:
        work.mkdir(parents=True)
        reasons = []
        for address, files in PUBLISHED[name]:
            host = urlsplit(address).netloc
            say(f"downloading {name} from {host}")
            try:
                for file, checksum in files.items():
                    download(address + file, work / file, checksum)
                break
            except Unusable as error:
                reasons.append(f"{host}: {error}")
        else:
            *_, archive = files  # of the last mirror
            raise UserError(
                f"cannot download {name} ({'; '.join(reasons)}). Put its train.txt, valid.txt and test.txt "
                f"into {target} by hand (in {archive} they are wiki.train.tokens, wiki.valid.tokens and "
                "wiki.test.tokens), or start with the bundled corpus: --recipe tiny"
            )
        try:
            work.rename(target)
        except OSError:  # the target exists, without texts or just written by another run
            for split in SPLITS:
                os.replace(work / f"{split}.txt", target / f"{split}.txt")
    except OSError as error:
        raise UserError(f"cannot write the corpus into {target} ({error.strerror}).") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download(url: str, path: Path, checksum: str) -> None:
    """Download one file, verify it, and unpack an archive; raise Unusable if the mirror fails."""
    with open(path, "wb") as file:
        for block in receive(url, path.name):
            file.write(block)
    algorithm, _, expected = checksum.partition(":")
    content = path.read_bytes()
    if algorithm == "git":
        algorithm, content = "sha1", b"blob %d\0" % len(content) + content
    if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != expected:
        raise Unusable(f"{path.name}, {path.stat().st_size:,} bytes, has the wrong checksum")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.rsplit("/", 1)[-1]: info for info in archive.infolist()}
            for split in SPLITS:
                text = path.with_name(f"{split}.txt")
                with archive.open(members[f"wiki.{split}.tokens"]) as member, open(text, "wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
        path.unlink()


def receive(url: str, label: str) -> Iterator[bytes]:
    """Yield what an address delivers, block by block; raise Unusable for failures of the network."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            size = response.headers.get("Content-Length", "")
            total = int(size) if size.isdecimal() else None
            with tqdm(total=total, unit="B", unit_scale=True, delay=1, disable=None, desc=label) as progress:
                while block := response.read(1 << 16):
                    yield block
                    progress.update(len(block))
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a malformed proxy
        raise Unusable(f"{label}: {error}") from None

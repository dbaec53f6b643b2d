"""What can go wrong around a run: full disks, folders that vanish, other processes, clocks, altered files."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import write_corpus
from test_scripts import LOOP, SIZES, STEPS, assert_same_checkpoint, numbers

import data_utils
import train_nth_farthest
import train_rmc
import train_rnn
from training import checkpoints, console, lm_training, runs
from training.console import UserError

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [*SIZES[train_rnn], *LOOP, "--epochs", "2"]


def train(corpus, root, *argv):
    """A run named 'run' in `root`; returns the exit status."""
    data = ["--data", str(corpus), "--runs-folder", str(root), "--name", "run"]
    return train_rnn.main([*FLAGS, *data, *argv])


def before_step(monkeypatch, step, act):
    """Calls `act` once, when a trainer has done `step` steps; the loop looks at its alarm after each."""
    due, done = console.Alarm.due, []

    def looked(self):
        done.append(1)
        if len(done) == step:
            act()
        return due(self)

    monkeypatch.setattr(console.Alarm, "due", looked)


@contextlib.contextmanager
def files_of_at_most(size):
    """What the kernel does when the disk is full: a write beyond this size fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- two processes, one run folder


NTH = ["--num-vectors", "3", "--num-dims", "2", "--model", "lstm", "--nhid", "9", "--outputunits", "8"]
NTH += ["--batch-size", "8", "--test-examples", "10", "--steps", "2"]


@pytest.mark.parametrize("script", [train_rnn, train_nth_farthest])
def test_a_run_folder_in_which_another_process_trains_is_refused(script, corpus_folder, tmp_path):
    folder = tmp_path / "run"
    if script is train_rnn:
        train(corpus_folder, tmp_path, "--epochs", "1")
    else:
        script.main([*NTH, "--runs-folder", str(tmp_path), "--name", "run"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert runs.LOCK not in before
    with runs.locked(folder):
        with pytest.raises(UserError, match=rf"in training by another process \(process {os.getpid()} on "):
            script.main(["--resume", str(folder)])
        assert {name: (folder / name).read_bytes() for name in before} == before
    assert script.main(["--resume", str(folder)]) == 0
    record = json.loads((folder / "args.json").read_text())
    for noted in (record, record["resumed"][-1]):
        assert (noted["processes"], noted["launcher"]) == (1, "python")
    assert not (folder / runs.LOCK).exists()


def test_the_lock_of_a_process_that_was_killed_hinders_nobody(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with runs.locked(tmp_path):
            os.write(writer, b"!")
            signal.pause()
        os._exit(1)
    assert os.read(reader, 1) == b"!"
    try:
        with pytest.raises(UserError, match=f"process {child} on"), runs.locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert os.listdir(tmp_path) == [runs.LOCK]
    with runs.locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_the_end_of_a_run_leaves_the_lock_of_a_new_folder_in_its_place(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with runs.locked(folder):
        runs.discard_run_folder(folder)
        folder.mkdir()
        (folder / runs.LOCK).write_text("of another")
    assert (folder / runs.LOCK).read_text() == "of another"


# ---- disk


def test_a_disk_that_is_full_for_a_while_costs_nothing(corpus_folder, tmp_path, monkeypatch, capsys):
    """The checkpoint from before stays; with room again the run saves, and ends as if undisturbed."""
    assert train(corpus_folder, tmp_path / "whole") == 0
    save, saved = torch.save, []

    def save_on_a_disk(contents, file):
        saved.append((contents.get("position") or contents["scores"])["step"])
        if STEPS <= saved[-1] < STEPS + 6:
            path = tmp_path / "parts" / "run" / "last.pt"
            before = path.read_bytes()
            try:
                with files_of_at_most(3000):
                    save(contents, file)
            finally:
                assert path.read_bytes() == before
        else:
            save(contents, file)

    monkeypatch.setattr(torch, "save", save_on_a_disk)
    assert train(corpus_folder, tmp_path / "parts", "--save-every", "0.0000001") == 0
    err = capsys.readouterr().err
    assert err.count("could not write") == sum(STEPS <= step < STEPS + 6 for step in saved) > 6
    assert "last.pt (" in err and "best.pt (" in err and "before is kept, training goes on" in err
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert sorted(os.listdir(parts)) == ["args.json", "best.pt", "last.pt", "log.jsonl"]
    # The best model of the first epoch could not be written, so that of the second is the first.
    a, b = (checkpoints.load_checkpoint(folder / "last.pt") for folder in (whole, parts))
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name])
    assert_same_checkpoint(whole / "best.pt", parts / "best.pt")


def test_a_disk_with_no_room_at_all_is_said_at_the_end(corpus_folder, tmp_path, monkeypatch, capsys):
    save = torch.save

    def save_on_a_full_disk(contents, file):
        with files_of_at_most(1000):
            save(contents, file)

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    assert train(corpus_folder, tmp_path) == 0
    said = capsys.readouterr()
    assert "there is none before it, training goes on" in said.err
    assert "no best.pt could be written" in said.out
    assert sorted(os.listdir(tmp_path / "run")) == ["args.json", "log.jsonl"]
    assert len(numbers(tmp_path / "run")) > 4


def test_a_runs_folder_that_cannot_be_written(corpus_folder, tmp_path, monkeypatch):
    """Permissions stop nobody who tests as root: the system's answer is given here."""

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match="cannot make a run folder in .*Permission denied. Give another"):
        train(corpus_folder, tmp_path / "runs")


def test_a_run_folder_that_vanishes_and_comes_back(corpus_folder, tmp_path, monkeypatch, capsys):
    """A network disk that is away for some steps: warnings, then checkpoints again; the same end."""
    assert train(corpus_folder, tmp_path / "whole") == 0
    run, away = tmp_path / "parts" / "run", tmp_path / "away"
    before_step(monkeypatch, 3, lambda: run.rename(away))
    returned = checkpoints.try_save_checkpoint

    def comes_back_after_a_failure(path, contents):
        saved = returned(path, contents)
        if not saved:
            away.rename(run)
        return saved

    monkeypatch.setattr(checkpoints, "try_save_checkpoint", comes_back_after_a_failure)
    assert train(corpus_folder, tmp_path / "parts", "--save-every", "0.0000001") == 0
    err = capsys.readouterr().err
    assert err.count("could not write") >= 1 and "training goes on" in err
    assert_same_checkpoint(tmp_path / "whole" / "run" / "last.pt", run / "last.pt")


def test_a_run_folder_that_vanishes_for_good(corpus_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "run"
    before_step(monkeypatch, STEPS + 3, lambda: shutil.rmtree(run))
    with pytest.raises(UserError, match="no checkpoint .*best.pt: it is not there"):
        train(corpus_folder, tmp_path / "runs")
    err = capsys.readouterr().err
    assert "could not write to" in err and "last.pt" in err and "training goes on" in err
    assert "Traceback" not in err


# ---- several at once


def start(barrier, folder, results):
    barrier.wait()
    try:
        corpus = data_utils.load_corpus(str(folder))
        run = runs.create_run_folder(folder / "runs", None, "train_rmc")
        results.put((run.name, [int(getattr(corpus, split).sum()) for split in data_utils.SPLITS]))
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_started_at_once_share_corpus_and_runs_folder(tmp_path):
    """Each gets a run folder of its own, and all the same ids, whoever wrote the cache."""
    folder = write_corpus(tmp_path / "corpus")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=start, args=(barrier, folder, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(isinstance(one, tuple) for one in found), found
    assert len({name for name, _ in found}) == 4 and len({tuple(sums) for _, sums in found}) == 1
    assert len(list(folder.glob(".corpus-*.pkl"))) == 1 and not list(folder.glob(".*.tmp"))


def test_what_a_killed_process_left_of_a_cache_is_removed_after_a_day(tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    for age in (0, 2):
        left = folder / f"..corpus-all-0.pkl.{age}.tmp"
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age * 86400,) * 2)
    data_utils.load_corpus(str(folder))
    assert [path.name for path in folder.glob(".*.tmp")] == ["..corpus-all-0.pkl.0.tmp"]


# ---- signals and clocks


@pytest.mark.parametrize("moment", ["validate", "save_last"])
def test_sigterm_in_the_midst_of_other_work_saves_and_ends(corpus_folder, tmp_path, monkeypatch, moment):
    """A scheduler's signal comes whenever it likes: while evaluating, while a checkpoint is written."""
    assert train(corpus_folder, tmp_path / "whole") == 0
    original = getattr(lm_training.Trainer, moment)

    def interrupted(self, *args):
        monkeypatch.setattr(lm_training.Trainer, moment, original)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(lm_training.Trainer, moment, interrupted)
    assert train(corpus_folder, tmp_path / "parts", "--save-every", "0.0000001") == 143
    run = tmp_path / "parts" / "run"
    assert train_rnn.main(["--resume", str(run)]) == 0
    assert_same_checkpoint(tmp_path / "whole" / "run" / "last.pt", run / "last.pt")
    assert numbers(tmp_path / "whole" / "run") == numbers(run)


NTH = ["--num-vectors", "3", "--num-dims", "2", "--model", "lstm", "--nhid", "7", "--outputunits", "8"]
NTH += ["--batch-size", "8", "--test-examples", "10", "--steps", "6", "--log-interval", "4"]


def test_sigterm_ends_nth_farthest_with_a_checkpoint(tmp_path, monkeypatch):
    before_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_nth_farthest.main([*NTH, "--runs-folder", str(tmp_path), "--name", "run"]) == 143
    assert 0 < checkpoints.load_checkpoint(tmp_path / "run" / "last.pt")["position"]["step"] < 6


@pytest.mark.parametrize("steps_of_last", [6])
def test_a_run_killed_after_its_last_save_is_resumed_to_the_same_file(tmp_path, steps_of_last):
    """Nothing is left to train; what is saved again must be what was saved, the learning rate included."""
    assert train_nth_farthest.main([*NTH, "--runs-folder", str(tmp_path), "--name", "run"]) == 0
    shutil.copy(tmp_path / "run" / "last.pt", tmp_path / "before.pt")
    assert train_nth_farthest.main(["--resume", str(tmp_path / "run")]) == 0
    assert checkpoints.load_checkpoint(tmp_path / "before.pt")["position"]["step"] == steps_of_last
    assert_same_checkpoint(tmp_path / "before.pt", tmp_path / "run" / "last.pt")


def test_a_laptop_that_slept_saves_once_when_it_wakes_and_then_as_before(monkeypatch):
    """Eight hours without a step: one save is due, not one for each period; the wall's clock may jump."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.time, "time", lambda: -1e9)
    alarm, saved = console.Alarm(10), []
    for minute in [*range(0, 25), *range(505, 530)]:  # slept from minute 25 to 505
        now[0] = 60.0 * minute
        if alarm.due():
            saved.append(minute)
    assert saved == [10, 20, 505, 515, 525]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX signals")
def test_a_stopped_process_goes_on_where_it_was(corpus_folder, tmp_path):
    assert train(corpus_folder, tmp_path / "whole") == 0
    command = [sys.executable, str(ROOT / "train_rnn.py"), *FLAGS, "--data", str(corpus_folder)]
    process = subprocess.Popen(
        [*command, "--runs-folder", str(tmp_path / "parts"), "--name", "run", "--save-every", "0.0000001"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 1"):
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.3)
                process.send_signal(signal.SIGCONT)
                break
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert numbers(tmp_path / "whole" / "run") == numbers(tmp_path / "parts" / "run")
    assert_same_checkpoint(tmp_path / "whole" / "run" / "last.pt", tmp_path / "parts" / "run" / "last.pt")


# ---- checkpoints of others


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """best.pt of a run of each script."""
    root = tmp_path_factory.mktemp("finished")
    corpus = write_corpus(root / "corpus")
    for script in (train_rmc, train_rnn):
        data = ["--data", str(corpus), "--runs-folder", str(root), "--name", script.SCRIPT, "--epochs", "1"]
        assert script.main([*SIZES[script], *LOOP, *data]) == 0
    assert train_nth_farthest.main([*NTH, "--runs-folder", str(root), "--name", "train_nth_farthest"]) == 0
    return root


def test_another_version_of_the_project_is_read_and_another_format_is_not(finished, tmp_path):
    contents = checkpoints.load_checkpoint(finished / "train_rnn" / "best.pt")
    for change, read in (
        ({"project": "0.1"}, True),
        ({"format": 2, "project": "7.0"}, False),
        ({"format": None}, False),
    ):
        torch.save({**contents, **change}, tmp_path / "other.pt")
        if read:
            lm_training.load_model(checkpoints.load_checkpoint(tmp_path / "other.pt"))
        else:
            with pytest.raises(UserError, match="has checkpoint format .*, of project version .*Use the v"):
                checkpoints.load_checkpoint(tmp_path / "other.pt")
    contents["config"] = {**contents["config"], "a_later_option": 1}
    with pytest.raises(UserError, match="does not fit together .*a_later_option"):
        lm_training.load_model(contents)


def regions(path):
    """Places in every part of a zip archive: each entry's header, name and data, the directory, the end."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            start = entry.header_offset
            # Magic number, checksum, size, lengths, name.
            yield from (start, start + 14, start + 18, start + 26, start + 30)
            begin = start + 30 + len(entry.filename)
            yield from (begin + 3, begin + entry.compress_size // 2)
        directory = archive.start_dir
    yield from range(directory, len(data), 13)
    yield len(data) - 1


def test_a_file_marked_as_a_folder_in_the_archive_is_refused(finished, tmp_path):
    """torch.load would return a tensor of memory that nobody has written to, and no checksum says so."""
    path = tmp_path / "best.pt"
    data = bytearray((finished / "train_rnn" / "best.pt").read_bytes())
    place = data.rindex(b"archive/data/1") if b"archive/data/1" in data else data.rindex(b"/data/1")
    place = data.rindex(b"PK\x01\x02", 0, place) + 38
    data[place] ^= 0x10
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # quite content
    with pytest.raises(UserError, match="folders among the entries"):
        checkpoints.load_checkpoint(path)


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_flipped_bit_in_any_region_is_refused_or_changes_nothing(finished, tmp_path, name):
    path, damaged = finished / "train_rnn" / name, tmp_path / name
    whole = path.read_bytes()
    expected, refused = checkpoints.load_checkpoint(path), 0
    places = sorted(set(regions(path)))
    for place in places[:: max(1, len(places) // 120)]:
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = checkpoints.load_checkpoint(damaged)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            assert found["words"] == expected["words"]
            for key, value in expected["model"].items():
                assert torch.equal(value, found["model"][key])
    assert refused > 20


def crafted(body):
    """A file like one of torch.save's, with this pickle in it."""
    with io.BytesIO() as plain:
        torch.save({"format": checkpoints.CHECKPOINT_FORMAT}, plain)
        with zipfile.ZipFile(plain) as old, io.BytesIO() as made:
            with zipfile.ZipFile(made, "w") as new:
                for entry in old.namelist():
                    new.writestr(entry, body if entry.endswith("data.pkl") else old.read(entry))
            return made.getvalue()


def holding_itself():
    contents = {"format": checkpoints.CHECKPOINT_FORMAT, "model": []}
    contents["model"].append(contents)
    return contents


def shared_at_every_level():
    """A billion billion references in a few hundred bytes."""
    value = [0]
    for _ in range(60):
        value = [value, value]
    return {"format": checkpoints.CHECKPOINT_FORMAT, "model": value}


def nested(depth):
    return b"\x80\x02}(X\x06\0\0\0formatK\x01X\x05\0\0\0model" + b"]" * depth + b"a" * (depth - 1) + b"u."


BOMBS = {
    "holds itself": lambda: pickle.dumps(holding_itself(), protocol=2),
    "shared at every level": lambda: pickle.dumps(shared_at_every_level(), protocol=2),
    "nested": lambda: nested(100_000),
    "a string that claims 2^60 bytes": lambda: b"\x80\x02\x8e" + (2**60).to_bytes(8, "little") + b"x.",
    "a bytearray of 2^60": lambda: (
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + (2**60).to_bytes(8, "little") + b"\x85R."
    ),
    "a number of 2^31 digits": lambda: b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "an empty pickle": lambda: b"",
    "a stack that is empty": lambda: b"\x80\x02.",
    "calls eval": lambda: b"\x80\x02cbuiltins\neval\nX\x03\0\0\x001+1\x85R.",
    "calls os.system": lambda: b"\x80\x02cos\nsystem\nX\x05\0\0\0false\x85R.",
    "calls torch.load": lambda: b"\x80\x02ctorch\nload\nX\x01\0\0\0x\x85R.",
    "builds a module": lambda: b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_crafted_checkpoints_end_in_one_line(bomb, tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(crafted(BOMBS[bomb]()))
    for use in (lm_training.load_model, train_nth_farthest.load_model):
        with pytest.raises(UserError) as caught:
            use(checkpoints.load_checkpoint(path))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["config"].update(num_blocks=10**9),
        lambda c: c["config"].update(attention_mlp_layers=10**9),
        lambda c: c["config"].update(head_size=10**15),
        lambda c: c["config"].update(head_size=2**70),
        lambda c: c["config"].update(mem_slots=-1),
        lambda c: c["config"].update(vocab_size=10**12),
        lambda c: c.update(config=[1]),
        lambda c: c.update(config=None),
        lambda c: c.update(model=3),
        lambda c: c.update(model={}),
        lambda c: c.update(model={name: 1 for name in c["model"]}),
        lambda c: c.update(words=c["words"][:-1]),
        lambda c: c.update(words="words"),
        lambda c: c.update(words=[*c["words"][:-1], c["words"][0]]),
        lambda c: c.update(words=[*c["words"][:-1], 7]),
        lambda c: c["model"].update(strange=torch.zeros(2)),
        lambda c: c["model"].update({next(iter(c["model"])): torch.zeros(2)}),
        lambda c: c["model"].update({n: torch.full_like(t, math.nan) for n, t in c["model"].items()}),
        lambda c: c["model"].update({n: t.to(torch.complex64) for n, t in c["model"].items()}),
        lambda c: c.update(kind=["rmc"]),
    ],
)
def test_checkpoints_whose_parts_do_not_fit(change, finished, tmp_path):
    contents = checkpoints.load_checkpoint(finished / "train_rmc" / "best.pt")
    change(contents)
    checkpoints.save_checkpoint(tmp_path / "c.pt", contents)
    with pytest.raises(UserError, match="checkpoint") as caught:
        lm_training.load_model(checkpoints.load_checkpoint(tmp_path / "c.pt"))
    assert "\n" not in str(caught.value)


def test_a_foreign_best_pt_in_a_run_is_one_line(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished / "train_rnn", run)
    shutil.copy(finished / "train_nth_farthest" / "best.pt", run / "best.pt")
    with pytest.raises(UserError, match="not a language model"):
        train_rnn.main(["--evaluate", str(run)])
    shutil.copy(finished / "train_nth_farthest" / "last.pt", run / "last.pt")
    with pytest.raises(UserError, match="not the one this run was started on|does not fit"):
        train_rnn.main(["--resume", str(run), "--epochs", "2"])
    assert json.loads((run / "args.json").read_text())["arguments"]["resume"] is None

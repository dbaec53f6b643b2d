"""Several processes against one: the same losses, gradients and weights; stops, resumes, failures, restarts.

Starting a process costs seconds, so the processes of a group go through all cases one after the other.
"""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing as multiprocessing

import train_nth_farthest
import train_rmc
import train_rnn
from data_utils import Corpus, Vocabulary
from nth_farthest import make_batch
from training import checkpoints, devices, distributed, lm_training, runs
from training.console import UserError
from training.distributed import ALONE, Processes

ROOT = Path(__file__).resolve().parent.parent
V = 29
SCRIPTS = {
    "rmc": (train_rmc, {"emsize": 12, "headsize": 5, "numheads": 2, "keysize": 3, "memslots": 2}),
    "rnn": (train_rnn, {"emsize": 12, "nhid": 14, "nlayers": 2}),
}
# 499 targets in 12 columns of 42 or 41, so that only some processes have targets in the last place; the
# validation text in 5 columns does not divide among 2 or 3 processes, and the test text in 2 leaves one idle.
COMMON = "--batch_size 12 --bptt 11 --eval-batch-size 5 --log-interval 3 --clip 0.05 --lr 0.003 --epochs 2"
FULL: list[str] = []
# Words from 17 on are in the first columns alone, and none is in the last cluster.
ADAPTIVE = ["--adaptivesoftmax", "--cutoffs", "8", "17", "27"]
SCHEDULE = ["--schedule", "cosine", "--warmup", "3"]
CASES = {
    f"{kind} {name}": (kind, flags)
    for kind in SCRIPTS
    for name, flags in {
        "full": FULL,
        "adaptive": ADAPTIVE,
        "accumulate": ["--accumulate", "2"],
        "adaptive accumulate": [
            *ADAPTIVE, "--accumulate", "2", *SCHEDULE, "--ar", "2", "--tar", "1", "--embedding-lr", "0.001",
        ],
    }.items()
}
NTH = "--num-vectors 3 --num-dims 2 --memslots 4 --numheads 2 --headsize 5 --outputunits 7 --batch-size 24 "
NTH += "--test-examples 50 --lr 0.01 --log-interval 5 --steps 15"
NTH_CASES = {"rmc": [], "lstm": ["--model", "lstm", "--nhid", "9"], "accumulate": ["--accumulate", "4"]}


def ids(count, seed):
    draw = random.Random(seed)
    return torch.tensor(
        [draw.randrange(27 if i < count // 4 else 17) for i in range(count)], dtype=torch.uint8
    )


def language_trainer(folder, processes, kind, *argv):
    """A trainer in double precision, where sums in another order differ by next to nothing."""
    script, sizes = SCRIPTS[kind]
    args = script.build_parser().parse_args([*COMMON.split(), "--dropout", "0", *argv])
    vars(args).update(sizes)
    devices.seed_everything(args.seed)
    corpus = Corpus(folder, Vocabulary([f"w{i}" for i in range(V)]), ids(500, 1), ids(101, 2), ids(97, 3))
    model = script.build_model(args, V, lm_training.choose_softmax(args, V))
    model = model if "--bf16" in argv else model.double()
    trainer = lm_training.Trainer(model, corpus, args, kind, torch.device("cpu"), processes)
    processes.draw_apart(args.seed)
    return trainer


def double_batch(*arguments):
    inputs, targets = make_batch(*arguments)
    return inputs.double(), targets


def nth_trainer(processes, *argv):
    args = train_nth_farthest.build_parser().parse_args([*NTH.split(), *argv])
    devices.seed_everything(args.seed)
    model = train_nth_farthest.build_model(args).double()
    return train_nth_farthest.Trainer(model, args, torch.device("cpu"), processes)


def trained(folder, trainer):
    """Trains in a folder of its own; what there is to compare."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train(folder)
    found = {"grad": {name: p.grad.clone() for name, p in trainer.model.named_parameters()}}
    found["weights"] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if isinstance(trainer, lm_training.Trainer):
        trainer.args.eval_batch_size = 2
        found["test"] = trainer.test()
    return found


def all_cases(folder, processes):
    """What each process of a group does; `folder` is shared by the group."""
    results = {}
    for name, (kind, flags) in CASES.items():
        results[name] = trained(folder / name, language_trainer(folder, processes, kind, *flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_nth_farthest, "make_batch", double_batch)
        for name, flags in NTH_CASES.items():
            results[f"nth {name}"] = trained(folder / f"nth {name}", nth_trainer(processes, *flags))
    results["bf16"] = trained(folder / "bf16", language_trainer(folder, processes, "rmc", "--bf16"))
    return results


def group_only_cases(folder, processes, others):
    """Dropout, exact resuming, resuming what another number of processes began, stops."""
    results = {"rank": processes.rank, "values": processes.gather(processes.rank * 10)}
    dropout = ("--dropout", "0.3")
    results["whole"] = trained(folder / "whole", language_trainer(folder, processes, "rmc", *dropout))
    first = language_trainer(folder, processes, "rmc", *dropout)
    step = first.step

    def asked_at_step_5(tokens, targets):
        step(tokens, targets)
        if processes.rank == 1 and first.at.step == 5:
            first.interrupts.requested = "SIGTERM"

    first.step = asked_at_step_5
    (folder / "parts").mkdir(exist_ok=True)
    with pytest.raises(lm_training.Interrupted):
        first.train(folder / "parts")
    results["stopped"] = first.at.step, first.interrupts.requested
    again = language_trainer(folder, processes, "rmc", *dropout)
    again.restore(checkpoints.load_checkpoint(folder / "parts" / "last.pt"))
    results["dropout draws"] = torch.rand(3)
    again.restore(checkpoints.load_checkpoint(folder / "parts" / "last.pt"))
    results["parts"] = trained(folder / "parts", again)
    for name, checkpoint in others.items():  # begun by another number of processes, here without dropout
        other = language_trainer(folder, processes, "rmc")
        other.restore(checkpoints.load_checkpoint(checkpoint))
        results[name] = trained(folder / name, other)
    return results


def worker(rank, world_size, port, folder, others):
    torch.set_num_threads(1)
    os.environ.update(place_of(rank, world_size, port))
    args = train_rmc.build_parser().parse_args(["--collective-timeout", "60"])
    _, processes = distributed.start(args)
    results = all_cases(folder, processes) | group_only_cases(folder, processes, others)
    torch.save(results, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()


def place_of(rank, world_size, port):
    """What torchrun tells a process, with the port of a store that is there already, as torchrun's is."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in place.items()}


def key_value_store():
    """A store for one group of processes, at a port of its own choice, as long as somebody holds it."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def half(folder):
    """A run without dropout that one process began, and was stopped in the midst of its first epoch."""
    trainer = language_trainer(folder, ALONE, "rmc")
    step = trainer.step

    def stop_at_step_2(tokens, targets):
        step(tokens, targets)
        if trainer.at.step == 2:
            trainer.interrupts.requested = "SIGTERM"

    trainer.step = stop_at_step_2
    (folder / "half").mkdir()
    with pytest.raises(lm_training.Interrupted):
        trainer.train(folder / "half")
    return folder / "half" / "last.pt"


@pytest.fixture(scope="module")
def groups(folder, half):
    """By number of processes: a list with the results of each of them."""
    spawn = multiprocessing.get_context("spawn")
    processes, stores = [], []
    try:
        for world_size in (2, 3):
            shared = folder / str(world_size)
            shared.mkdir()
            stores.append(key_value_store())
            for rank in range(world_size):
                arguments = (rank, world_size, stores[-1].port, shared, {"half": half})
                processes.append(spawn.Process(target=worker, args=arguments))
                processes[-1].start()
        alone = folder / "1"
        alone.mkdir()
        results = {1: [all_cases(alone, ALONE)]}
        for process in processes:
            process.join(timeout=170)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * 5
    for world_size in (2, 3):
        files = (folder / str(world_size) / f"results-{rank}.pt" for rank in range(world_size))
        results[world_size] = [torch.load(file) for file in files]
    return results


def assert_same(found, expected, tolerance=1e-9, weights=1e-7):
    """Adam divides by gradients that may be near 0: weights get a wider tolerance."""
    assert found["grad"].keys() == expected["grad"].keys()
    for name in expected["grad"]:
        close = functools.partial(torch.testing.assert_close, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        close(found["grad"][name], expected["grad"][name], atol=tolerance)
        close(found["weights"][name], expected["weights"][name], atol=weights)
    if "test" in expected:
        assert found["test"] == pytest.approx(expected["test"], rel=weights)


def numbers(folder):
    """The log's numbers without times."""
    kept = ("event", "step", "loss", "grad_norm", "train_loss", "lr", "accuracy", "test_accuracy")
    return [{k: e[k] for k in kept if k in e} for e in runs.read_log(folder / "log.jsonl")]


def assert_same_log(found, expected, tolerance):
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and one.pop("event") == other.pop("event")
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


# ---- the same numbers


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_many_processes_equal_one(groups, folder, case, world_size):
    """Losses, clipped gradients, weights; full and adaptive softmax; each process has the same."""
    expected = groups[1][0][case]
    for results in groups[world_size]:
        assert_same(results[case], expected)
    one, many = folder / "1" / case, folder / str(world_size) / case
    assert_same_log(numbers(many), numbers(one), 1e-8)
    a, b = (checkpoints.load_checkpoint(path / "last.pt") for path in (one, many))
    torch.testing.assert_close(b["state"], a["state"], rtol=0, atol=1e-7)
    assert b["position"]["best_valid"] == pytest.approx(a["position"]["best_valid"], rel=1e-8)
    assert checkpoints.load_checkpoint(many / "best.pt")["scores"]["epoch"] == a["position"]["best_epoch"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_cluster_without_targets_gets_a_gradient_of_zero_everywhere(groups, world_size):
    for results in groups[world_size]:
        gradients = results["rmc adaptive"]["grad"]
        assert not gradients["output_layer.tail.2.1.weight"].any()  # words 27 and 28
        assert gradients["output_layer.tail.0.1.weight"].any()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_pieces_equal_the_whole_batch(groups, folder, kind):
    assert_same(groups[1][0][f"{kind} accumulate"], groups[1][0][f"{kind} full"])
    pieces, whole = (numbers(folder / "1" / f"{kind} {name}") for name in ("accumulate", "full"))
    assert_same_log(pieces, whole, 1e-8)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", NTH_CASES)
def test_nth_farthest_many_processes_equal_one(groups, folder, case, world_size):
    """On the examples that one process draws; accuracies are counts and equal exactly."""
    expected = groups[1][0]["nth rmc" if case == "accumulate" else f"nth {case}"]
    for results in groups[world_size]:
        assert_same(results[f"nth {case}"], expected, 1e-7, 1e-6)  # the loss is in float32
    one, many = (numbers(folder / str(count) / f"nth {case}") for count in (1, world_size))
    assert_same_log(many, one, 1e-6)
    assert [e["test_accuracy"] for e in many] == [e["test_accuracy"] for e in one]


@pytest.mark.parametrize("world_size", [2, 3])
def test_bf16_many_processes_equal_one_roughly(groups, folder, world_size):
    assert_same_log(numbers(folder / str(world_size) / "bf16"), numbers(folder / "1" / "bf16"), 0.02)


# ---- random numbers, stops, resuming


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_are_gathered_by_rank_in_the_main_process(groups, world_size):
    expected = [rank * 10 for rank in range(world_size)]
    assert [results["values"] for results in groups[world_size]] == [expected] + [None] * (world_size - 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_process_has_its_own_dropout(groups, world_size):
    draws = [tuple(results["dropout draws"].tolist()) for results in groups[world_size]]
    assert len(set(draws)) == world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_stop_asked_of_one_process_stops_all_at_the_same_step(groups, folder, world_size):
    assert [results["stopped"] for results in groups[world_size]] == [(5, "SIGTERM")] * world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_resuming_equals_never_stopping_bit_for_bit_with_dropout(groups, folder, world_size):
    """The weights do; the losses of the interval broken into are added up in another order."""
    for results in groups[world_size]:
        for name, weight in results["whole"]["weights"].items():
            assert torch.equal(results["parts"]["weights"][name], weight), name
    whole, parts = (numbers(folder / str(world_size) / name) for name in ("whole", "parts"))
    assert_same_log(parts, whole, 1e-13)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_run_goes_on_with_another_number_of_processes(groups, half, folder, tmp_path, world_size, capsys):
    """Begun by one and finished by several, and the reverse: as if the number had never changed."""
    expected = groups[1][0]["rmc full"]
    for results in groups[world_size]:
        assert_same(results["half"], expected)
    back = language_trainer(tmp_path, ALONE, "rmc", "--dropout", "0.3")
    back.restore(checkpoints.load_checkpoint(folder / str(world_size) / "parts" / "last.pt"))
    assert f"the run was in {world_size} processes, now it is in 1" in capsys.readouterr().err
    assert len(back.state) == 12


def test_checkpoints_from_before_there_were_processes_go_on(half, groups, tmp_path):
    old = checkpoints.load_checkpoint(half)
    del old["random_of_others"]
    trainer = language_trainer(tmp_path, ALONE, "rmc")
    trainer.restore(old)
    assert_same(trained(tmp_path, trainer), groups[1][0]["rmc full"])


# ---- scripts in several processes


def start(argv, cwd, environment, stderr=subprocess.PIPE):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        encoding="utf-8",
    )


@contextlib.contextmanager
def script(*argv, world_size=2, program="train_rnn.py", cwd):
    """Starts the processes as torchrun would, without the time that torchrun takes to start."""
    store, processes = key_value_store(), []
    try:
        for rank in range(world_size):
            place = place_of(rank, world_size, store.port)
            processes.append(start([ROOT / program, *argv], cwd, place))
        yield processes
    finally:
        for process in processes:
            end_with_children(process)


def end_with_children(process):
    """Kills what a test that failed would leave behind: torchrun's processes are groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def ends(processes):
    """Exit statuses, outputs and errors; a process that hangs fails the test."""
    told = [process.communicate(timeout=100) for process in processes]
    return [process.returncode for process in processes], *map(list, zip(*told, strict=True))


SMALL = ["--emsize", "12", "--nhid", "14", "--batch_size", "14", "--bptt", "15"]
SMALL += ["--eval-batch-size", "3", "--dropout", "0.2"]

BUG = """
import sys
import distributed, lm_training, train_rnn
step = lm_training.Trainer.step
def buggy(self, tokens, targets):
    step(self, tokens, targets)
    if self.processes.rank == 1 and self.at.step == 3:
        raise ZeroDivisionError("a bug in one process")
lm_training.Trainer.step = buggy
distributed.run_script(train_rnn.main, "the batch")
"""


def test_a_bug_in_one_process_ends_all_with_its_own_message(corpus_folder, tmp_path):
    (tmp_path / "buggy.py").write_text(BUG)
    argv = [*SMALL, "--data", str(corpus_folder)]
    with script(*argv, program=tmp_path / "buggy.py", cwd=tmp_path) as processes:
        statuses, outputs, errors = ends(processes)
    assert all(statuses), statuses
    assert "error in process 1 of 2: Traceback" in errors[1] and "a bug in one process" in errors[1]
    assert outputs[1] == "" and "error" not in errors[0]  # it has only lost contact, and leaves it the word
    assert not os.listdir(tmp_path / "runs")


def test_sigterm_to_one_process_saves_and_stops_both(corpus_folder, tmp_path):
    argv = [*SMALL, "--data", str(corpus_folder), "--epochs", "100000", "--name", "run"]
    with script(*argv, cwd=tmp_path) as processes:
        for line in processes[0].stdout:
            if "(best)" in line:
                processes[1].send_signal(signal.SIGTERM)
                break
        statuses, outputs, errors = ends(processes)
    assert statuses == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM" in outputs[0] and "--resume runs/run" in outputs[0] and outputs[1] == ""
    assert "Traceback" not in "".join(errors)
    checkpoint = checkpoints.load_checkpoint(tmp_path / "runs" / "run" / "last.pt")
    assert f"step {checkpoint['position']['step']:,}" in outputs[0] and len(checkpoint["state"]) == 14
    record = json.loads((tmp_path / "runs" / "run" / "args.json").read_text())
    assert (record["processes"], record["launcher"]) == (2, "torchrun --nproc-per-node=2")


KILLED = """
import os, signal
import distributed, lm_training, train_rnn
train_epoch = lm_training.Trainer.train_epoch
def killed_in_epoch_4(self):
    step = self.step
    def step_and_die(tokens, targets):
        step(tokens, targets)
        if self.at.epoch == 4 and self.processes.rank == 1 and self.processes.restarts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    self.step = step_and_die
    train_epoch(self)
    self.step = step
lm_training.Trainer.train_epoch = killed_in_epoch_4
distributed.run_script(train_rnn.main)
"""


def test_torchrun_restarts_after_a_kill_and_goes_on_from_the_last_checkpoint(corpus_folder, tmp_path):
    """Rank 1 is killed without warning; the finished run equals one that nobody disturbed."""
    (tmp_path / "killed.py").write_text(KILLED)
    argv = [*SMALL, "--data", str(corpus_folder), "--epochs", "6", "--save-every", "0.002", "--name"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun += [tmp_path / "killed.py", *argv, "killed"]
    with script(*argv, "whole", cwd=tmp_path) as undisturbed:
        process = start(torchrun, tmp_path, {}, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=170)
        finally:
            end_with_children(process)
        assert process.returncode == 0, output
        assert ends(undisturbed)[0] == [0, 0]
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert output.count("resumed at step") == 1
    assert [noted["processes"] for noted in json.loads((killed / "args.json").read_text())["resumed"]] == [2]
    a, b = (checkpoints.load_checkpoint(path / "last.pt") for path in (whole, killed))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    scores = [[e for e in numbers(path) if e["event"] in ("valid", "test")] for path in (whole, killed)]
    assert len(scores[0]) == 7
    assert_same_log(scores[1], scores[0], 1e-13)


# ---- the environment, shares, messages


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}


def test_the_environment_of_torchrun_is_recognised():
    assert distributed.from_environment({}) == ALONE
    assert distributed.from_environment({"MASTER_ADDR": "h", "MASTER_PORT": "1"}) == ALONE
    assert distributed.from_environment(TORCHRUN) == Processes(1, 3, 0)
    assert distributed.from_environment({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}).restarts == 2


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_part_of_the_environment_is_refused(name):
    rest = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=f"is set as for several processes, but {name} is not"):
        distributed.from_environment(rest)


@pytest.mark.parametrize(
    "change", [{"RANK": "3"}, {"RANK": "-1"}, {"WORLD_SIZE": "x"}, {"LOCAL_RANK": "2"}, {"RANK": "1.5"}]
)
def test_an_environment_that_contradicts_itself_is_refused(change):
    with pytest.raises(UserError, match="RANK must be below WORLD_SIZE"):
        distributed.from_environment({**TORCHRUN, **change})


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_neighbours_in_order_and_differ_by_at_most_one(count, world_size):
    shares = [range(count)[Processes(rank, world_size).share(count)] for rank in range(world_size)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    "batch, world_size, pieces, message",
    [
        (64, 3, 1, r"64 does not divide by 3 \(3 processes\).*Try 63 or 66\."),
        (64, 1, 5, r"64 does not divide by 5 \(--accumulate 5\).*Try 60 or 65\."),
        (64, 3, 2, r"64 does not divide by 6 \(3 processes x --accumulate 2\).*Try 60 or 66\."),
        (2, 3, 1, r"Try 3\."),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_would(batch, world_size, pieces, message):
    with pytest.raises(UserError, match=message):
        Processes(0, world_size).check_batch("--batch_size", batch, pieces)


def test_more_processes_than_gpus_are_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"started 4 processes on this host, but torch finds 2 GPUs.*node=2"):
        devices.choose_device(True, own_gpu=3)


def test_restarts_need_a_name(monkeypatch, tmp_path):
    parser = train_rnn.build_parser()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="torchrun --max-restarts=3 needs --name"):
        distributed.arguments_to_go_on(parser, [])
    argv = ["--name", "a", "--runs-folder", str(tmp_path)]
    assert distributed.arguments_to_go_on(parser, argv) == argv
    (tmp_path / "a").mkdir()  # killed before it wrote a word: begun anew
    assert distributed.arguments_to_go_on(parser, argv) == argv and not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()  # killed amid that word
    (tmp_path / "a" / ".args.json.abc.tmp").touch()
    (tmp_path / "a" / runs.LOCK).touch()
    assert distributed.arguments_to_go_on(parser, argv) == argv and not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "last.pt").touch()  # somebody took args.json away: theirs to mend
    assert distributed.arguments_to_go_on(parser, argv) == argv and (tmp_path / "a" / "last.pt").exists()
    (tmp_path / "a" / "args.json").write_text("{}")
    resuming = [*argv, "--resume", str(tmp_path / "a")]
    assert distributed.arguments_to_go_on(parser, argv) == resuming

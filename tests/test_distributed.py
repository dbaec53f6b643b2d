"""Training in several processes: as in one; stops, resumed runs, failures and restarts.

Run as a script, this file starts the groups of processes that the tests compare. Starting Python costs
seconds, so all processes are forked from one and do all cases in turn.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from training import checkpoints, distributed, runs
from training.console import UserError
from training.distributed import ALONE, Processes

import pytest
import torch

import tasks.nth_farthest
import train_learning_to_execute
import train_nth_farthest
import train_rmc
import train_rnn
from tasks import language_modeling
from tasks.nth_farthest import make_batch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# 499 training targets in 12 streams of 42 or 41: only some processes have targets in the last position. The
# validation text in 5 streams does not divide among 2 or 3 processes, and the test text in 2 leaves one idle.
FLAGS = "--batch-size 12 --bptt 11 --eval-batch-size 5 --log-interval 3 --clip 0.05 --lr 0.003 --epochs 2 "
FLAGS += "--threads 1 --emsize 12"
MODELS = {
    "rmc": (train_rmc, "--headsize 5 --numheads 2 --keysize 3 --memslots 2"),
    "rnn": (train_rnn, "--nhid 14 --nlayers 2"),
}
ADAPTIVE = "--adaptivesoftmax --cutoffs 8 17 27"  # no word of the last cluster is in the training text
CASES = {
    "rmc": ("rmc", ""),
    "rmc adaptive": ("rmc", f"{ADAPTIVE} --schedule cosine --warmup 3"),
    "rnn": ("rnn", "--average ema --average-decay 0.9"),
}
STEPS = "--memslots 4 --numheads 2 --headsize 5 --outputunits 7 --batch-size 24 --test-examples 50 --lr 0.01 "
STEPS += "--log-interval 5 --steps 15 --threads 1"
NTH = f"{STEPS} --num-vectors 3 --num-dims 2"
STEP_CASES = {
    "nth rmc": (train_nth_farthest, NTH),
    "nth lstm": (train_nth_farthest, f"{NTH} --model lstm --nhid 9"),
    "execute": (train_learning_to_execute, f"{STEPS} --program-kind control --nesting 1 --length 2"),
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    STEP_CASES["nth muon"] = (train_nth_farthest, f"{NTH} --optimizer muon")


def write_text(folder):
    """29 words with <eos>. Words 17 to 26 are in the first quarter only, 27 and 28 in test.txt only."""
    draw = random.Random(1)
    for name, count in (("train", 499), ("valid", 100), ("test", 96)):
        ranks = [draw.randrange(26 if name == "train" and i < count // 4 else 16) for i in range(count)]
        ranks += [26, 27] if name == "test" else []
        (folder / f"{name}.txt").write_text(" ".join(f"w{rank:02}" for rank in ranks) + "\n")


# ---- one process or a member of a group


def language_trainer(folder, processes, kind, flags="--dropout 0"):
    """Return a trainer in double precision, where sums in another order differ very little."""
    script, sizes = MODELS[kind]
    parser = script.build_parser()
    args = parser.parse_args([*FLAGS.split(), *sizes.split(), *flags.split(), "--data", str(folder / "text")])
    torch.manual_seed(args.seed)
    built = language_modeling.script(
        f"train_{kind}", kind, parser, lambda *given: script.build_model(*given).double(), {}
    )
    trainer = built.build(args, CPU, processes)
    processes.seed_apart(args.seed)
    return trainer


def step_trainer(processes, case, flags=""):
    script, own = STEP_CASES[case]
    args = script.build_parser().parse_args([*own.split(), *flags.split()])
    torch.manual_seed(args.seed)
    return script.build(args, CPU, processes)


def trained(folder, trainer):
    """Train in a new folder and return what the tests compare."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train(folder)
    found = {"gradients": {name: p.grad.clone() for name, p in trainer.model.named_parameters()}}
    found["weights"] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if isinstance(trainer.task, language_modeling.LanguageModeling):
        trainer.args.eval_batch_size = 2
        found["test"] = trainer.task.evaluate(trainer, "test", trainer.model)
    return found


def stopped(folder, trainer, step, rank=0):
    """Train in a new folder until one process is asked to stop after a step."""
    folder.mkdir(parents=True, exist_ok=True)
    take = trainer.step

    def take_and_ask():
        take()
        if trainer.position.step == step and trainer.processes.rank == rank:
            trainer.interrupts.requested = "SIGTERM"

    trainer.step = take_and_ask
    assert trainer.train(folder) is False
    return trainer


def all_cases(folder, processes, more=""):
    """Train all cases; `folder` is shared by the group."""
    own, results = folder / str(processes.world_size), {}
    for case, (kind, flags) in CASES.items():
        trainer = language_trainer(folder, processes, kind, f"--dropout 0 {flags} {more}")
        results[case] = trained(own / case, trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.nth_farthest, "make_batch", double_batch)
        for script in (train_nth_farthest, train_learning_to_execute):
            build = script.build_model
            patch.setattr(script, "build_model", lambda args, build=build: build(args).double())
        for case in STEP_CASES:
            results[case] = trained(own / case, step_trainer(processes, case, more))
    return results


def double_batch(*arguments):
    inputs, targets = make_batch(*arguments)
    return inputs.double(), targets


def group_cases(folder, processes):
    """Train with dropout, stop and resume; resume what one process began, without dropout."""
    own, dropout = folder / str(processes.world_size), "--dropout 0.3"
    results = {"whole": trained(own / "whole", language_trainer(folder, processes, "rmc", dropout))}
    first = stopped(own / "parts", language_trainer(folder, processes, "rmc", dropout), 5, rank=1)
    assert (first.position.step, first.interrupts.requested) == (5, "SIGTERM")
    last = processes.broadcast(lambda: checkpoints.load_checkpoint(own / "parts" / "last.pt"))
    again = language_trainer(folder, processes, "rmc", dropout)
    again.restore(last)
    results["draws"] = torch.rand(3)
    again.restore(last)
    results["parts"] = trained(own / "parts", again)
    offers = step_trainer(processes, "nth rmc")
    offers.folder = own
    # Process 1 rounds differently: it would keep the second model, and not the third.
    scores = zip([0.5, 0.5, 0.5 + 1e-9], [0.5, 0.5 + 1e-9, 0.5], strict=True)
    results["offers"] = [offers.offer_best(pair[processes.rank], offers.model) for pair in scores]
    results["best score"] = offers.position.best_score
    other = language_trainer(folder, processes, "rmc")
    other.restore(checkpoints.load_checkpoint(folder / "half" / "last.pt"))
    results["half"] = trained(own / "half", other)
    return results


def member(rank, world_size, port, folder):
    os.environ.update(place_of(rank, world_size, port))
    args = train_rmc.build_parser().parse_args(["--threads", "1"])
    _, processes = distributed.start(args)
    # In three processes, each one's shard of the batch is split into micro-batches too.
    results = (
        group_cases(folder, processes) if world_size == 2 else all_cases(folder, processes, "--accumulate 2")
    )
    torch.save(results, folder / str(world_size) / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()


def place_of(rank, world_size, port):
    """Return torchrun's variables. Like torchrun's, the key-value store at the port already exists."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in place.items()}


def key_value_store():
    """Return a store at a free port, for one group of processes. It exists as long as it is referenced."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start_groups(folder, ports):
    torch.set_num_threads(1)
    language_trainer(folder, ALONE, "rmc")  # imports what a trainer needs, once for all processes
    fork = multiprocessing.get_context("fork")
    members = []
    for world_size, port in zip((2, 3), map(int, ports), strict=True):
        (folder / str(world_size)).mkdir()
        for rank in range(world_size):
            members.append(fork.Process(target=member, args=(rank, world_size, port, folder), daemon=True))
            members[-1].start()
    for one in members:
        one.join()
    sys.exit(max(abs(one.exitcode) for one in members))


if __name__ == "__main__":
    start_groups(Path(sys.argv[1]), sys.argv[2:])


# ---- fixtures and comparisons


def start(argv, folder, environment=None, **options):
    """Start a Python process in a folder, with text pipes."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        cwd=folder,
        env=os.environ | settings | (environment or {}),
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def ended_with_children(*processes):
    """Kill processes and their children at the end of the block."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and a run without dropout that one process began and left in its first epoch."""
    folder = tmp_path_factory.mktemp("groups")
    (folder / "text").mkdir()
    write_text(folder / "text")
    stopped(folder / "half", language_trainer(folder, ALONE, "rmc"), 2)
    return folder


@pytest.fixture(scope="module")
def groups(folder):
    """The results of each process, by number of processes."""
    stores = [key_value_store(), key_value_store()]
    argv = [__file__, folder, *(store.port for store in stores)]
    process = start(argv, folder, stderr=subprocess.STDOUT)
    with ended_with_children(process):
        results = {1: [all_cases(folder, ALONE)]}
        output, _ = process.communicate(timeout=170)
        assert process.returncode == 0, output
    for world_size in (2, 3):
        files = (folder / str(world_size) / f"results-{rank}.pt" for rank in range(world_size))
        results[world_size] = [torch.load(file) for file in files]
    return results


def assert_same(found, expected, gradients=1e-9, weights=1e-7):
    """Adam divides by gradients that may be near 0: weights get a wider tolerance."""
    for kind, tolerance in {"gradients": gradients, "weights": weights}.items():
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(
                found[kind][name],
                value,
                rtol=0,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    if "test" in expected:
        assert found["test"] == pytest.approx(expected["test"], rel=weights)


def numbers(folder):
    """Return the log's numbers without times."""
    kept = ("step", "loss", "grad_norm", "train_loss", "average_loss", "lr", "accuracy", "test_accuracy")
    events = runs.read_log(folder / "log.jsonl")
    return [(e["event"], {key: e[key] for key in kept if key in e}) for e in events if e["event"] != "resume"]


def assert_same_log(found, expected, tolerance):
    assert [event for event, _ in found] == [event for event, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


# ---- the same numbers


@pytest.mark.parametrize("case", CASES)
def test_three_processes_equal_one(groups, folder, case):
    """Losses, clipped gradients, weights, evaluations and checkpoints; every process has the same."""
    for results in groups[3]:
        assert_same(results[case], groups[1][0][case])
    own, single = folder / "3" / case, folder / "1" / case
    assert_same_log(numbers(own), numbers(single), 1e-8)
    a, b = (checkpoints.load_checkpoint(path / "last.pt") for path in (single, own))
    torch.testing.assert_close(b["state"], a["state"], rtol=0, atol=1e-7)
    assert b["position"]["best_score"] == pytest.approx(a["position"]["best_score"], rel=1e-8)
    assert checkpoints.load_checkpoint(own / "best.pt")["scores"]["step"] == a["position"]["best_step"]


@pytest.mark.parametrize("case", STEP_CASES)
def test_tasks_of_fresh_examples_three_processes_equal_one(groups, folder, case):
    """On the examples that one process draws; accuracies are counts and equal exactly."""
    for results in groups[3]:
        assert_same(results[case], groups[1][0][case], 1e-7, 1e-6)  # the loss is in float32
    found, expected = (numbers(folder / count / case) for count in "31")
    assert_same_log(found, expected, 1e-6)
    scores = [[numbers.get("test_accuracy") for _, numbers in log] for log in (found, expected)]
    assert scores[0] == scores[1] and len(scores[0]) == 3


def test_the_main_process_decides_what_is_best(groups):
    for results in groups[2]:
        assert results["offers"] == [True, False, True] and results["best score"] == 0.5 + 1e-9


# ---- random numbers, stops, resuming


def test_each_process_has_its_own_dropout(groups):
    assert len({tuple(results["draws"].tolist()) for results in groups[2]}) == 2


def test_resume_equals_uninterrupted(groups, folder):
    """The weights bit for bit; a loss of the interval that was interrupted is summed in another order."""
    for results in groups[2]:
        for name, weight in results["whole"]["weights"].items():
            assert torch.equal(results["parts"]["weights"][name], weight), name
    parts, whole = (numbers(folder / "2" / name) for name in ("parts", "whole"))
    assert_same_log(parts, whole, 1e-13)


def test_resume_with_another_number_of_processes(groups, folder, capsys):
    """Without dropout, as if the number had not changed; with it, with other random numbers."""
    for results in groups[2]:
        assert_same(results["half"], groups[1][0]["rmc"])
    last = checkpoints.load_checkpoint(folder / "2" / "parts" / "last.pt")
    draws = []
    for step in (5, 6):
        last["position"]["step"] = step
        back = language_trainer(folder, ALONE, "rmc", "--dropout 0.3")
        capsys.readouterr()
        back.restore(last)
        assert "dropout continues with other random numbers" in capsys.readouterr().err
        draws.append(torch.rand(3))
    assert torch.equal(back.task.state, last["state"])
    torch.manual_seed(back.args.seed)
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], torch.rand(3))


# ---- scripts in several processes


def ends(processes):
    """Return exit statuses, outputs and errors; a process that hangs fails the test."""
    texts = [process.communicate(timeout=100) for process in processes]
    return [process.returncode for process in processes], *map(list, zip(*texts, strict=True))


@contextlib.contextmanager
def two_processes(folder, *argv):
    """Start a script in two processes as torchrun does, without the time that torchrun takes."""
    store, processes = key_value_store(), []
    with contextlib.ExitStack() as stack:
        for rank in range(2):
            processes.append(start(argv, folder, place_of(rank, 2, store.port)))
            stack.enter_context(ended_with_children(processes[-1]))
        yield processes


PATCHED = """
import os, signal
import train_rnn
from training import distributed
from training.trainer import Trainer
step = Trainer.step
def patched(self):
    step(self)
    if self.processes.rank == 1 and {condition}:
        {action}
Trainer.step = patched
distributed.run_script(train_rnn.main)
"""


def write_script(folder, condition, action):
    (folder / "script.py").write_text(PATCHED.format(condition=condition, action=action))
    return folder / "script.py"


SMALL = "--emsize 12 --nhid 14 --batch-size 14 --bptt 15 --eval-batch-size 3 --threads 1 --log-interval 10"


def test_bug_in_one_process_ends_all_with_its_traceback(corpus_folder, tmp_path):
    script = write_script(tmp_path, "self.position.step == 3", "1 / 0")
    with two_processes(tmp_path, script, *SMALL.split(), "--data", corpus_folder) as processes:
        statuses, outputs, errors = ends(processes)
    assert all(statuses), statuses
    assert "error: in process 1 of 2: Traceback" in errors[1] and "ZeroDivisionError" in errors[1]
    assert outputs[1] == ""
    assert "error: in process 0 of 2: Traceback" in errors[0]  # it has lost the connection
    assert not os.listdir(tmp_path / "runs")


# ---- the environment, shares, messages


def test_environment_of_torchrun_is_recognized(monkeypatch):
    torchrun = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for environment, found in (
        ({}, ALONE),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "h"}, ALONE),
        (torchrun, Processes(1, 3, 0)),
    ):
        monkeypatch.setattr(os, "environ", environment)
        assert distributed.from_environment() == found
    del torchrun["LOCAL_RANK"]
    with pytest.raises(UserError, match="the environment sets WORLD_SIZE but not LOCAL_RANK"):
        distributed.from_environment()


def test_uneven_batch_is_rejected_with_sizes_that_fit():
    for batch, message in (
        (64, r"64 is not a multiple of 6 \(processes x --acc.*Try 60 or 66\."),
        (2, r"Try 6\."),
    ):
        with pytest.raises(UserError, match=message):
            Processes(0, 3).check_batch("--batch-size", batch, 2)

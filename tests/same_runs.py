"""Interrupts runs and compares finished ones."""

import signal

from training import checkpoints, runs
from training.trainer import Trainer

import torch

TIMES = {"seconds", "ms_per_batch", "tokens_per_second", "examples_per_second"}


def after_step(monkeypatch, step, act=lambda: signal.raise_signal(signal.SIGINT)):
    """Call `act` once, when a trainer has taken `step` steps of its run; by default, press Ctrl-C."""
    take = Trainer.step

    def patched(trainer):
        take(trainer)
        if trainer.position.step == step:
            monkeypatch.setattr(Trainer, "step", take)
            act()

    monkeypatch.setattr(Trainer, "step", patched)


def flatten(value, name=""):
    """Yield names and values of everything in nested containers."""
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(item, f"{name}.{key}")
    else:
        yield name, value


def assert_same_checkpoint(one, other):
    """Check that two checkpoints are equal bit for bit, except for times and arguments."""
    a, b = (dict(flatten(checkpoints.load_checkpoint(path))) for path in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if not name.startswith(".args.") and name != ".position.seconds":
            same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
            assert same, name


def numbers(folder, *left_out):
    """Return a run's logged events without times and without events of the named kinds."""
    events = (event for event in runs.read_log(folder / "log.jsonl") if event["event"] not in left_out)
    return [{name: value for name, value in event.items() if name not in TIMES} for event in events]


def assert_same_run(one, other):
    """Check that two finished runs are equal in files, checkpoints and logged numbers."""
    files = {"args.json", "log.jsonl", "best.pt", "last.pt"}
    assert {path.name for folder in (one, other) for path in folder.iterdir()} - {"attention.png"} == files
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(one / name, other / name)
    assert numbers(one, "resume") == numbers(other, "resume")

"""CUDA graphs and GPUs: the numbers of a CPU, and with a graph those of an eager run.

All but the tests of failed captures require a GPU and are skipped without one.
"""

import contextlib
import gc
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_corpus

import train_nth_farthest
import train_rmc
import train_rnn
from layers import softmax
from layers.softmax import AdaptiveSoftmax, FullSoftmax
from relational_rnn_general import RelationalMemory
from training import cuda_graphs, devices, runs
from training.cuda_graphs import CapturedStep, capture_together

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

# ---- captures that fail, on a CPU


@pytest.fixture
def capture(monkeypatch):
    """Replace torch's capture by one that fails at its end, as a real one does after an error."""

    @contextlib.contextmanager
    def graph(*arguments, **options):
        assert not gc.isenabled()
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(CapturedStep, "_on_side_stream", lambda step, inputs: step.function(*inputs))


def function_failing_in_capture(error, calls):
    """Return a function that fails in its fourth call, which is the captured one, before it does its work."""
    numbers = iter(range(100))

    def function(x):
        if next(numbers) == cuda_graphs.WARMUP_CALLS and error is not None:
            raise error
        calls.append(x.item())

    return function


@pytest.mark.usefixtures("capture")
def test_failed_capture_reports_its_cause_and_continues_eagerly():
    """Every call does its work exactly once."""
    calls, reasons = [], []
    cause = RuntimeError("operation not permitted when stream is capturing\nmore")
    step = CapturedStep(function_failing_in_capture(cause, calls), CPU, on_failure=reasons.append)
    step.enabled = True
    for number in range(cuda_graphs.WARMUP_CALLS + 3):
        step(torch.tensor(number))
    assert calls == list(range(cuda_graphs.WARMUP_CALLS + 3)) and gc.isenabled()
    assert len(reasons) == 1
    assert "(operation not permitted when stream is capturing)" in reasons[0] and "\n" not in reasons[0]


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize(
    "cause",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_out_of_memory_hidden_by_a_failed_capture_is_raised(cause):
    step = CapturedStep(function_failing_in_capture(cause, []), CPU, on_failure=pytest.fail)
    step.enabled, step.warmup_left = True, 0
    step.function = lambda x: (_ for _ in ()).throw(cause)
    with pytest.raises(RuntimeError, match="previous error") as raised:
        step(torch.tensor(0))
    assert raised.value.__context__ is cause


@pytest.mark.usefixtures("capture")
def test_when_one_step_cannot_be_captured_none_is_replayed():
    reasons = []
    steps = capture_together([lambda: "first", lambda: "second"], reasons.append, device=CPU)
    assert [step() for step in steps] == ["first", "second"] and not reasons
    for step in steps:
        step.enabled, step.warmup_left = True, 0
    steps[0].graph = object()  # recorded before
    assert steps[1]() == "second" and steps[0]() == "first"
    assert len(reasons) == 1 and not any(step.enabled or step.graph for step in steps)


def test_steps_after_a_failed_capture_equal_eager_ones(monkeypatch, tmp_path):
    """In a capture nothing runs: tensors keep their values, and gradients may be unwritten memory."""
    flags = "--num-vectors 3 --num-dims 2 --memslots 4 --numheads 2 --headsize 5 --batch-size 11 --threads 1"
    args, trainers = train_nth_farthest.build_parser().parse_args(flags.split()), []
    for _ in range(2):
        devices.seed_everything(3)
        trainers.append(train_nth_farthest.build(args, CPU, train_nth_farthest.ALONE))
    plain, failing = trainers
    failing.captured_step.enabled, failing.log = True, runs.RunLog(tmp_path / "log.jsonl")
    captures = []

    @contextlib.contextmanager
    def graph(*arguments, **options):
        state = [value for entry in failing.optimizer.state.values() for value in entry.values()]
        tensors = [*failing.model.parameters(), failing.sums, *state]
        captures.append([tensor.detach().clone() for tensor in tensors])
        yield
        with torch.no_grad():
            for tensor, value in zip(tensors, captures[0], strict=True):
                tensor.copy_(value)
        for parameter in failing.model.parameters():
            parameter.grad.fill_(math.nan)
        raise RuntimeError("no")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(CapturedStep, "_on_side_stream", lambda step, inputs: step.function(*inputs))
    for _ in range(cuda_graphs.WARMUP_CALLS + 3):
        plain.step()
        failing.step()
        for ours, expected in zip(failing.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(ours, expected)
    assert torch.equal(failing.sums, plain.sums) and len(captures) == 1
    (event,) = runs.read_log(tmp_path / "log.jsonl")
    assert event["event"] == "not_captured" and "(no)" in event["reason"]


@gpu
def test_generators_draw_as_before_after_a_failed_capture_on_a_gpu():
    """In its own process: some versions of torch capture nothing more after a failure, or keep memory."""
    code = "import test_gpu; test_gpu.compare_failed_capture_with_eager_steps()"
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare_failed_capture_with_eager_steps():
    results = []
    for enabled in (False, True):
        torch.cuda.manual_seed(8)
        weight = torch.zeros(3, device=GPU, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1, capturable=True)
        calls, reasons = [], []

        def work(calls=calls, weight=weight, optimizer=optimizer):
            calls.append(None)
            optimizer.zero_grad(set_to_none=True)
            loss = (weight * torch.rand(5, 3, device=GPU) - 1).square().sum()
            loss.backward()
            if len(calls) == cuda_graphs.WARMUP_CALLS + 1:
                loss.item()  # waits for the GPU, which breaks the capture
            optimizer.step()

        step = CapturedStep(work, GPU, enabled, on_failure=reasons.append)
        for _ in range(8):
            step()
        assert len(reasons) == enabled and len(calls) == 8 + enabled
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


# ---- parts of the models


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_on_both(compute):
    """Compare what `compute(device)` returns."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    on_cpu, on_gpu = ([x.detach().cpu().clone() for x in compute(device)] for device in (CPU, GPU))
    torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-9)


@gpu
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(
    "options",
    [
        {"mem_slots": 1},
        {"mem_slots": 3},
        {"mem_slots": 3, "num_blocks": 2, "gate_style": "memory"},
        {"mem_slots": 2, "input_rows": 2, "gate_style": None},
    ],
    ids=["one-slot", "slots", "blocks", "rows"],
)
def test_core_on_a_gpu_equals_the_core_on_a_cpu(options, fast):
    from relational_rnn_fast import FastRelationalMemory

    torch.manual_seed(2)
    sizes = {"head_size": 5, "input_size": 11, "num_heads": 3, "key_size": 4}
    kind = FastRelationalMemory if fast else RelationalMemory
    core = kind(**sizes, return_all_outputs=True, **options).double()
    inputs = randn(2, 7, 11) if core.input_rows == 1 else randn(2, 7, core.input_rows, 11)
    memory = randn(2, core.mem_slots, core.mem_size, seed=3)
    mask = randn(2, core.mem_slots, core.mem_size, seed=4)

    def compute(device):
        core.to(device).zero_grad()
        given = [x.detach().to(device).requires_grad_() for x in (inputs, memory)]
        outputs, last = core(*given, candidate_mask=mask.to(device))
        (outputs.square().sum() + last.sum()).backward()
        return [outputs, last, *(x.grad for x in (*given, *core.parameters()))]

    assert_same_on_both(compute)


@gpu
@pytest.mark.parametrize("chunk", [3, 2048])
@pytest.mark.parametrize("cutoffs", [None, [5, 12]], ids=["full", "adaptive"])
def test_losses_on_a_gpu_equal_those_on_a_cpu(cutoffs, chunk, monkeypatch):
    monkeypatch.setitem(softmax.CHUNK_ROWS, "cuda", chunk)
    torch.manual_seed(4)
    layer = (FullSoftmax(8, 31) if cutoffs is None else AdaptiveSoftmax(8, 31, cutoffs)).double()
    targets = torch.arange(17).mul(7).remainder(31)
    targets[4] = -1

    def compute(device):
        layer.to(device).zero_grad()
        hidden = randn(17, 8, seed=5).to(device).requires_grad_()
        nats = layer(hidden, targets.to(device))
        nats.sum().backward()
        return [nats, hidden.grad, *(p.grad for p in layer.parameters())]

    assert_same_on_both(compute)


# ---- training

TEXT = "--epochs 2 --batch-size 8 --bptt 4 --eval-batch-size 2 --emsize 12 --dropout 0 --threads 1 "
TEXT += "--log-interval 5 --strict-float32"
NTH = "--num-vectors 3 --num-dims 2 --memslots 4 --numheads 2 --headsize 5 --outputunits 7 --batch-size 12 "
NTH += "--test-examples 50 --lr 0.01 --threads 1 --log-interval 4 --steps 12 --nhid 9 --strict-float32"
KINDS = {
    "rmc": (train_rmc, f"{TEXT} --headsize 5 --numheads 2 --keysize 3 --memslots 2"),
    "cells": (train_rnn, f"{TEXT} --nhid 12"),
    "cudnn": (train_rnn, f"{TEXT} --nhid 12 --cudnn"),
    "nth rmc": (train_nth_farthest, NTH),
    "nth lstm": (train_nth_farthest, f"{NTH} --model lstm"),
}
FLAGS = {
    "plain": "",
    "masks": "--dropout 0.3 --locked-dropout --dropout-words 0.1 --dropout-weights 0.2 --ar 2 --tar 1",
    "rates": "--schedule cosine --warmup 5 --weight-decay 0.1 --embedding-lr 0.0005 --random-bptt 0",
    "average": "--dropout 0.3 --average ema --average-decay 0.9",
    "bf16": "--bf16",
    "curriculum": "--curriculum-vectors 2 3 --curriculum-dims 2 1 --curriculum-accuracy 0.01",
}
CASES = [(kind, flags) for kind in KINDS for flags in FLAGS if (flags == "curriculum") <= ("nth" in kind)]
CASES = [(k, f) for k, f in CASES if "nth" not in k or f in ("plain", "bf16", "curriculum")]
CASES.remove(("cudnn", "average"))  # cuDNN's own dropout is seeded once in a process


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that runs a script and returns its log's numbers; on one GPU unless told otherwise."""
    corpus = write_corpus(tmp_path / "corpus", lines=(13, 6, 6))
    count = torch.cuda.device_count

    def run(name, kind, *flags, cuda=True, gpus=1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: min(gpus, count()))
        script, sizes = KINDS[kind]
        argv = [*sizes.split(), *" ".join(flags).split(), *(["--cuda"] if cuda else [])]
        argv += [] if "nth" in kind else ["--data", str(corpus)]
        assert script.main([*argv, "--runs-folder", str(tmp_path), "--name", name]) == 0
        gc.collect()  # a captured step and its owner refer to each other
        return numbers(tmp_path / name)

    return run


def numbers(folder):
    kept = ("loss", "grad_norm", "test_accuracy", "accuracy")
    return [event[key] for event in runs.read_log(folder / "log.jsonl") for key in kept if key in event]


@pytest.fixture
def replays(monkeypatch):
    """Return a list with an entry for each replay of a graph."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: found.append(replay(graph)))
    return found


def assert_close(found, expected, tolerance=1e-3):
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@gpu
@pytest.mark.parametrize(("kind", "flags"), CASES)
def test_captured_run_equals_an_eager_one(train, replays, kind, flags):
    eager = train("eager", kind, FLAGS[flags], "--no-cuda-graph")
    assert not replays
    captured = train("captured", kind, FLAGS[flags])
    assert replays
    assert_close(captured, eager, 2e-2 if flags == "bf16" else 1e-3)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_a_graph_equal_the_whole_batch(train, replays, kind):
    pieces = train("pieces", kind, "--accumulate 4")
    assert replays
    assert_close(pieces, train("whole", kind, "--no-cuda-graph"))


@gpu
@pytest.mark.parametrize("flags", ["", "--adaptivesoftmax --cutoffs 8 15"], ids=["full", "adaptive"])
@pytest.mark.parametrize("kind", ["rmc", "cells", "cudnn"])
def test_run_on_a_gpu_equals_one_on_a_cpu_and_is_evaluated_there(train, tmp_path, kind, flags, capsys):
    assert_close(train("gpu", kind, flags), train("cpu", kind, flags, cuda=False))
    scores = []
    for more in ([], ["--cuda"]):
        capsys.readouterr()
        evaluate = ["--evaluate", str(tmp_path / "gpu"), "--data", str(tmp_path / "corpus"), *more]
        assert KINDS[kind][0].main(evaluate) == 0
        scores.append([float(line.split()[2].strip(",")) for line in capsys.readouterr().out.splitlines()
                       if line.startswith(("valid:", "test:"))])  # fmt: skip
    assert len(scores[0]) == 2
    assert_close(scores[0], scores[1])


@gpu
@pytest.mark.parametrize(("kind", "flag", "half", "whole"), [("rmc", "--epochs", "1", "2"),
                                                            ("nth lstm", "--steps", "8", "12")])  # fmt: skip
def test_resume_equals_uninterrupted_on_a_gpu(train, tmp_path, kind, flag, half, whole):
    dropout = FLAGS["average"] if kind == "rmc" else ""
    expected = train("whole", kind, dropout)
    train("half", kind, dropout, f"{flag} {half}")
    KINDS[kind][0].main(["--resume", str(tmp_path / "half"), flag, whole, "--cuda"])
    events = [e for e in runs.read_log(tmp_path / "half" / "log.jsonl") if e["event"] in ("train", "valid")]
    assert_close([event["loss"] for event in events], [
        event["loss"] for event in runs.read_log(tmp_path / "whole" / "log.jsonl")
        if event["event"] in ("train", "valid")
    ])  # fmt: skip
    assert expected


@two_gpus
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", ["", "--bf16", "--accumulate 2"])
def test_two_gpus_in_one_process_equal_one(train, kind, flags):
    assert_close(
        train("two", kind, flags, gpus=2), train("one", kind, flags), 2e-2 if "bf16" in flags else 1e-3
    )


@two_gpus
def test_resume_with_another_number_of_gpus_warns(train, tmp_path, capsys, monkeypatch):
    train("run", "rmc", "--dropout 0.3", gpus=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    capsys.readouterr()
    train_rmc.main(["--resume", str(tmp_path / "run"), "--epochs", "3", "--cuda"])
    assert "number of processes or GPUs has changed" in capsys.readouterr().err


@gpu
@pytest.mark.timeout(900)
def test_torchrun_with_one_gpu_equals_no_torchrun(train, tmp_path):
    expected = train("alone", "rmc")
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(ROOT / "train_rmc.py")]
    argv += [*KINDS["rmc"][1].split(), "--data", str(tmp_path / "corpus"), "--cuda"]
    argv += ["--runs-folder", str(tmp_path), "--name", "torchrun"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(numbers(tmp_path / "torchrun"), expected)

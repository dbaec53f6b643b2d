"""CUDA graphs and GPUs: the numbers of a CPU, and with a graph those of an eager run.

All but the tests of failed captures require a GPU and are skipped without one.
"""

import contextlib
import gc
import subprocess
import sys
from pathlib import Path

from training import cuda_graphs, runs
from training.cuda_graphs import CapturedStep, capture_together

import pytest
import torch
from conftest import write_corpus

import train_learning_to_execute
import train_nth_farthest
import train_rmc
import train_rnn
from layers import softmax
from layers.softmax import AdaptiveSoftmax, FullSoftmax
from relational_rnn_general import RelationalMemory

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

# ---- captures that fail, on a CPU


@pytest.fixture
def capture(monkeypatch):
    """Capture on a CPU, in a way that fails at its end, as a real capture does after an error."""

    @contextlib.contextmanager
    def graph(*arguments, **options):
        assert not gc.isenabled()
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(CapturedStep, "_on_side_stream", lambda step, inputs: step.function(*inputs))


def step_failing_in_capture(cause, calls, **options):
    """Return a step that notes its calls, except the captured one, in which it raises `cause`."""
    numbers = iter(range(100))

    def function(x):
        if next(numbers) == cuda_graphs.WARMUP_CALLS:
            raise cause
        calls.append(x)

    return CapturedStep(function, CPU, **options)


def test_failed_capture_reports_its_cause_and_continues_eagerly(capture):
    """Every call does its work exactly once."""
    calls, reasons = [], []
    cause = RuntimeError("operation not permitted when stream is capturing\nmore")
    step = step_failing_in_capture(cause, calls, on_failure=reasons.append)
    for number in range(cuda_graphs.WARMUP_CALLS + 3):
        step(torch.tensor(number))
    assert calls == list(range(cuda_graphs.WARMUP_CALLS + 3)) and gc.isenabled()
    assert len(reasons) == 1
    assert "(operation not permitted when stream is capturing)" in reasons[0] and "\n" not in reasons[0]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_hidden_by_a_failed_capture_is_raised(capture, kind):
    cause = kind("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    step = step_failing_in_capture(cause, [], on_failure=pytest.fail)
    for number in range(cuda_graphs.WARMUP_CALLS):
        step(torch.tensor(number))
    with pytest.raises(RuntimeError, match="previous error") as raised:
        step(torch.tensor(0))
    assert raised.value.__context__ is cause


def test_when_one_step_cannot_be_captured_none_is_replayed(capture):
    reasons = []
    steps = capture_together([lambda: "first", lambda: "second"], CPU, reasons.append)
    assert [step() for step in steps] == ["first", "second"] and not reasons
    for step in steps:
        step.warmup_left = 0
    steps[0].graph = object()  # recorded before
    assert steps[1]() == "second" and steps[0]() == "first"
    assert len(reasons) == 1 and not any(step.enabled or step.graph for step in steps)


def test_run_whose_capture_fails_is_finished_with_a_warning(capture, tmp_path, capsys):
    flags = [*KINDS["nth lstm"][1].split(), "--runs-folder", str(tmp_path), "--name", "run"]
    assert train_nth_farthest.main(flags) == 0
    assert "cannot be captured as a CUDA graph" in capsys.readouterr().err


@gpu
def test_failed_capture_leaves_the_generator_usable_on_a_gpu():
    """In its own process: some versions of torch capture nothing more after a failure, or keep memory."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
    code = "import test_gpu; test_gpu.compare_failed_capture_with_eager_steps()"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare_failed_capture_with_eager_steps():
    draws = []
    for enabled in (False, True):
        torch.cuda.manual_seed(8)
        found, reasons = [], []

        def work(found=found):
            found.append(torch.rand(3, device=GPU))
            if len(found) == cuda_graphs.WARMUP_CALLS + 1:
                found[0].sum().item()  # waits for the GPU, which breaks the capture

        step = CapturedStep(work, GPU, on_failure=reasons.append) if enabled else work
        for _ in range(8):
            step()
        assert len(reasons) == enabled and len(found) == 8 + enabled
        if enabled:
            del found[cuda_graphs.WARMUP_CALLS]  # of the capture
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        draws.append(torch.stack(found))
    assert torch.equal(*draws)


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
STEPS = "--memslots 4 --numheads 2 --headsize 5 --outputunits 7 --batch-size 12 --test-examples 50 --lr 0.01 "
STEPS += "--threads 1 --log-interval 4 --steps 12 --nhid 9 --strict-float32"
NTH = f"{STEPS} --num-vectors 3 --num-dims 2"
KINDS = {
    "rmc": (train_rmc, f"{TEXT} --headsize 5 --numheads 2 --keysize 3 --memslots 2"),
    "cells": (train_rnn, f"{TEXT} --nhid 12"),
    "cudnn": (train_rnn, f"{TEXT} --nhid 12 --cudnn --nlayers 2"),
    "nth rmc": (train_nth_farthest, NTH),
    "nth lstm": (train_nth_farthest, f"{NTH} --model lstm"),
    # Short: over many steps, differences in rounding grow a thousandfold in the gradient.
    "execute": (train_learning_to_execute, f"{STEPS} --program-kind copy --length 3"),
}
ALL = ["rmc", "cells", "cudnn"]
NTH_ALL = ["nth rmc", "nth lstm"]
MASKS = "--dropout 0.3 --locked-dropout --dropout-words 0.1 --dropout-weights 0.2"
RATES = "--schedule cosine --warmup 5 --weight-decay 0.1"
AVERAGE = "--dropout 0.3 --average ema --average-decay 0.9"
STAGES = "--curriculum 2x2 3x1 --curriculum-accuracy 0.01"
CASES = [(kind, flags) for kind in ALL for flags in ("", MASKS, RATES, "--bf16")]
CASES += [(kind, flags) for kind in NTH_ALL for flags in ("", STAGES, "--bf16")]
CASES += [("execute", flags) for flags in ("", "--bf16", "--model lstm")]
# Not for cuDNN, whose own dropout is seeded once in a process.
CASES += [("rmc", AVERAGE), ("cells", AVERAGE), *((kind, "--accumulate 4") for kind in KINDS)]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that runs a script on one GPU, or as many as given, and returns its log's numbers."""
    corpus = write_corpus(tmp_path / "corpus", lines=(13, 6, 6))

    def run(name, kind, *flags, gpus=1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        script, sizes = KINDS[kind]
        argv = [*sizes.split(), *" ".join(flags).split(), *(["--cuda"] if gpus else [])]
        argv += ["--data", str(corpus)] if kind in ALL else []
        assert script.main([*argv, "--runs-folder", str(tmp_path), "--name", name]) == 0
        gc.collect()  # a captured step and its owner refer to each other
        return numbers(tmp_path / name)

    return run


def numbers(folder):
    events = [e for e in runs.read_log(folder / "log.jsonl") if e["event"] in ("train", "valid")]
    return [event[key] for event in events for key in ("loss", "grad_norm", "test_accuracy") if key in event]


@pytest.fixture
def replays(monkeypatch):
    """Return a list with an entry for each replay of a graph."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: found.append(replay(graph)))
    return found


def assert_close(found, expected, flags=""):
    tolerance = 2e-2 if "--bf16" in flags else 1e-3
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@gpu
@pytest.mark.parametrize(("kind", "flags"), CASES)
def test_captured_run_equals_an_eager_one(train, replays, kind, flags):
    """Of the whole batch, for --accumulate."""
    eager = train("eager", kind, flags.replace("--accumulate 4", ""), "--no-cuda-graph")
    assert not replays
    captured = train("captured", kind, flags)
    assert replays
    assert_close(captured, eager, flags)


@gpu
@pytest.mark.parametrize("flags", ["", "--adaptivesoftmax --cutoffs 8 15"], ids=["full", "adaptive"])
@pytest.mark.parametrize("kind", ALL)
def test_run_on_a_gpu_equals_one_on_a_cpu_and_is_evaluated_there(train, tmp_path, kind, flags):
    assert_close(train("gpu", kind, flags), train("cpu", kind, flags, gpus=0))
    assert KINDS[kind][0].main(["--evaluate", str(tmp_path / "gpu")]) == 0


@gpu
@pytest.mark.parametrize(
    ("kind", "flag", "half", "whole"), [("rmc", "--epochs", "1", "2"), ("nth lstm", "--steps", "8", "12")]
)
def test_resume_equals_uninterrupted_on_a_gpu(train, tmp_path, kind, flag, half, whole):
    flags = AVERAGE if kind == "rmc" else ""
    expected = train("whole", kind, flags)
    train("half", kind, flags, f"{flag} {half}")
    KINDS[kind][0].main(["--resume", str(tmp_path / "half"), flag, whole, "--cuda"])
    assert_close(numbers(tmp_path / "half"), expected)


@two_gpus
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", ["", "--bf16", "--accumulate 2"])
def test_two_gpus_in_one_process_equal_one(train, kind, flags):
    assert_close(train("two", kind, flags, gpus=2), train("one", kind, flags), flags)


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

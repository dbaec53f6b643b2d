"""What only a GPU can show: the numbers of a CPU, and as a CUDA graph those of an eager run.

All of it is skipped where there is no GPU. `pytest -k "gpu or cuda"` runs this file and what others have.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lm_training import ADAPTIVE, ids, make_trainer

import relational_rnn_general
from layers import softmax as output_layers
from layers.softmax import AdaptiveSoftmax, FullSoftmax
from relational_rnn_general import RelationalMemory
from training import lm_training
from training.cuda_graphs import CapturedStep

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    gc.collect()  # a captured step and its owner refer to each other


@pytest.fixture(autouse=True)
def one_gpu(request, monkeypatch):
    """With several, the trainers would spread their batches, which rules captures out."""
    if "two_gpus" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- parts


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("deferred", [0, 512])
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
def test_the_core_on_a_gpu_equals_the_core_on_a_cpu(options, deferred, fast, monkeypatch):
    monkeypatch.setattr(relational_rnn_general, "DEFERRED_ROWS", deferred)
    torch.manual_seed(2)
    sizes = {"head_size": 5, "input_size": 11, "num_heads": 3, "key_size": 4}
    core = RelationalMemory(**sizes, return_all_outputs=True, **options)
    core.double().fast = fast
    inputs = randn(2, 7, 11) if core.input_rows == 1 else randn(2, 7, core.input_rows, 11)
    memory = randn(2, core.mem_slots, core.mem_size, seed=3)
    mask = randn(2, core.mem_slots, core.mem_size, seed=4)
    results = []
    for device in (torch.device("cpu"), DEVICE):
        core.to(device).zero_grad()
        given = [x.detach().to(device).requires_grad_() for x in (inputs, memory)]
        outputs, last = core(*given, candidate_mask=mask.to(device))
        (outputs.square().sum() + last.sum()).backward()
        gradients = [x.grad for x in (*given, *core.parameters())]
        results.append([x.detach().cpu().clone() for x in (outputs, last, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [3, 2048])
@pytest.mark.parametrize("cutoffs", [None, [5, 12]], ids=["full", "adaptive"])
def test_losses_on_a_gpu_equal_those_on_a_cpu(cutoffs, chunk, monkeypatch):
    monkeypatch.setitem(output_layers.CHUNK_ROWS, "cuda", chunk)
    torch.manual_seed(4)
    layer = (FullSoftmax(8, 31) if cutoffs is None else AdaptiveSoftmax(8, 31, cutoffs)).double()
    targets = torch.arange(17).mul(7).remainder(31)
    targets[4] = -1
    results = []
    for device in (torch.device("cpu"), DEVICE):
        layer.to(device).zero_grad()
        hidden = randn(17, 8, seed=5).to(device).requires_grad_()
        nats = layer(hidden, targets.to(device))
        nats.backward()
        gradients = [hidden.grad, *(p.grad for p in layer.parameters())]
        results.append([x.detach().cpu().clone() for x in (nats, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-9)


# ---- training

KINDS = {"rmc": ("rmc",), "cells": ("rnn",), "cudnn": ("rnn", "--cudnn")}
FLAGS = {
    "plain": [],
    "dropout": ["--dropout", "0.3"],
    "masks": ["--dropout", "0.3", "--locked-dropout", "--dropout-words", "0.1", "--dropout-weights", "0.2"],
    "penalties": ["--ar", "2", "--tar", "1"],
    "decay-average": ["--weight-decay", "0.1", "--average", "ema", "--average-decay", "0.9"],
    "cosine": ["--schedule", "cosine", "--warmup", "5"],
    "two-lengths": ["--random-bptt", "0"],
    "embedding": ["--embedding-lr", "0.0005"],
    "bf16": ["--bf16"],
}


def train(folder, kind, *flags, device=None, epochs=3):
    folder.mkdir()
    name, *more = KINDS[kind]
    trainer = make_trainer(folder, name, "--epochs", str(epochs), *more, *flags, device=device or DEVICE)
    trainer.train(folder)
    return trainer


def losses(folder):
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] in ("train", "valid")]


def captured(trainer):
    step = trainer.full_window
    step = step if isinstance(step, CapturedStep) else step.keywords["add_gradients"]
    return step.graph is not None


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_run_equals_an_eager_one_on_a_gpu(tmp_path, kind, name):
    if (kind, name) == ("cudnn", "dropout"):
        pytest.skip("dropout between layers is cuDNN's own, which is seeded once in a process")
    eager = train(tmp_path / "eager", kind, *FLAGS[name], "--no-cuda-graph")
    graph = train(tmp_path / "graph", kind, *FLAGS[name])
    assert captured(graph) and not captured(eager)
    tolerance = 2e-2 if name == "bf16" else 1e-3
    torch.testing.assert_close(
        losses(tmp_path / "graph"), losses(tmp_path / "eager"), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_a_graph_equal_the_whole_batch_on_a_gpu(tmp_path, kind):
    """Seven columns in seven pieces."""
    whole = train(tmp_path / "whole", kind, "--no-cuda-graph")
    pieces = train(tmp_path / "pieces", kind, "--accumulate", "7")
    assert captured(pieces) and not captured(whole)
    torch.testing.assert_close(losses(tmp_path / "pieces"), losses(tmp_path / "whole"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("softmax", [[], ADAPTIVE], ids=["full", "adaptive"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_gpu_equals_one_on_a_cpu_and_its_model_loads_there(tmp_path, kind, softmax):
    train(tmp_path / "cpu", kind, *softmax, device=torch.device("cpu"))
    train(tmp_path / "gpu", kind, *softmax)
    torch.testing.assert_close(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=1e-3, atol=1e-3)
    checkpoint = lm_training.runs.load_checkpoint(tmp_path / "gpu" / "best.pt")
    scores = []
    for device in ("cpu", DEVICE):
        model, _ = lm_training.load_model(checkpoint, device)
        scores.append(lm_training.evaluate(model, ids(97, 3), 3, 11, device))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one_on_a_gpu(tmp_path):
    flags = ["--dropout", "0.3", "--average", "ema", "--average-decay", "0.9"]
    train(tmp_path / "whole", "rmc", *flags, epochs=4)
    first = train(tmp_path / "half", "rmc", *flags, epochs=2)
    second = make_trainer(first.folder, "rmc", "--epochs", "4", *flags, device=DEVICE)
    second.restore(lm_training.runs.load_checkpoint(first.folder / "last.pt"))
    second.train(first.folder)
    torch.testing.assert_close(losses(tmp_path / "half"), losses(tmp_path / "whole"), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--ar", "2", "--tar", "1"]], ids=["plain", "bf16", "ar"])
def test_two_gpus_in_one_process_equal_one(tmp_path, monkeypatch, flags):
    """DataParallel: words are scored against targets of their own moments, whatever the replica."""
    text = ["--batch_size", "8", *flags]
    train(tmp_path / "two", "rmc", *text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    train(tmp_path / "one", "rmc", *text)
    tolerance = 2e-2 if "--bf16" in flags else 1e-3
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("flags", [[], ["--dropout-weights", "0.2"]], ids=["layer", "weight-drop"])
def test_the_fused_layer_computes_in_float32_under_autocast_on_a_gpu(tmp_path, flags):
    """torch would give cuDNN float16, whatever type autocast asks for."""
    trainer = make_trainer(tmp_path, "rnn", "--cudnn", *flags, device=DEVICE)
    tokens = ids(7 * 11, 6).view(7, 11).long().to(DEVICE)
    results = []
    for dtype in (torch.bfloat16, torch.float16, None):
        torch.manual_seed(3)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            state = trainer.model.initial_state(7)
            results.append(trainer.model.recur(trainer.model.embedding(tokens.T), state))
    for outputs, after in results[:2]:
        assert outputs.dtype == after.dtype == torch.float32
        assert torch.equal(outputs, results[2][0]) and torch.equal(after, results[2][1])


@pytest.mark.timeout(900)
def test_the_scripts_run_on_a_gpu_alone_and_under_torchrun(tmp_path, corpus_folder):
    flags = ["--cuda", "--data", str(corpus_folder), "--epochs", "2", "--batch_size", "8", "--bptt", "12"]
    flags += ["--eval-batch-size", "2", "--emsize", "12", "--headsize", "5", "--dropout", "0"]
    results = []
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1"]
    for name, launcher in {"alone": [], "torchrun": torchrun}.items():
        command = [sys.executable, *launcher, str(ROOT / "train_rmc.py"), *flags]
        command += ["--runs-folder", str(tmp_path), "--name", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(losses(tmp_path / name))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    words = [sys.executable, str(ROOT / "generate_rmc.py"), "--cuda", "--checkpoint", str(tmp_path / "alone")]
    words += ["--words", "30", "--outf", str(tmp_path / "words.txt")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "words.txt").read_text(encoding="utf-8").split()) >= 20

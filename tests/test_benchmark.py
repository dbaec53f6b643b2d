"""The benchmark: variants compute the same, the floor has the right products, tables are complete.

No test here depends on how long something takes.
"""

from dataclasses import replace
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmark import CELLS, LSTM, NAIVE, PLAIN, RMC, Floor, Model, Plan, Task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import RelationalMemory

CPU = torch.device("cpu")
LM = Task(3, 4, 61, False, embedding=9, head_size=6, num_heads=2, key_size=5, mlp_layers=2, lstm_size=7)
ADAPTIVE = replace(LM, adaptive=True)
SLOTS = replace(LM, mem_slots=3, steps=40)  # long enough for folded weights
NTH = replace(LM, vocab_size=None, steps=5, mem_slots=2)
TASKS = pytest.mark.parametrize("task", [LM, ADAPTIVE, SLOTS, NTH], ids=["full", "adaptive", "slots", "nth"])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", Plan((LM, ADAPTIVE), 2, 0, NTH))
    monkeypatch.setattr(benchmark, "SHORTEST_SAMPLE", 0.0)


def make_bench(rounds=3, seconds=0.0):
    bench = benchmark.Bench(SimpleNamespace(bf16=False, quick=True, rounds=rounds, clock="wall"), CPU)
    bench.plan = bench.plan._replace(seconds=seconds)
    return bench


def model(task, variant):
    return Model(task, variant, CPU, False)


class ProductCounter(TorchDispatchMode):
    """Counts the operations of matrix products. FlopCounterMode has hooks, which turn the fast core off."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket
        if name is torch.ops.aten.addmm_:
            name = torch.ops.aten.addmm
        if name in flop_registry:
            self.operations += flop_registry[name](*args, **(kwargs or {}), out_val=result)
        return result


def rows_of(output):
    """Return the rows of all tables by title and variant."""
    tables, title = {}, None
    for line in output.splitlines():
        if line.startswith("**"):
            title = line.strip("*")
            tables[title] = {}
        elif line.startswith("| ") and title:
            name, *cells = line.strip("| ").split(" | ")
            tables[title][name] = cells
    return tables


def test_all_sections_print_all_variants(small, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.Bench, "peak", lambda self, task, variant: (123.4, 23.4))
    benchmark.main(["--quick", "--only", "lm", "nth", "core", "step", "memory", "--clock", "cpu"])
    output = capsys.readouterr().out
    tables = rows_of(output)
    assert f"torch {torch.__version__}" in output and "Milliseconds of cpu time" in output
    for task, variants in (
        (LM, (RMC, PLAIN, NAIVE, LSTM, CELLS)),
        (ADAPTIVE, (RMC, NAIVE)),
        (NTH, (RMC, LSTM)),
    ):
        for phase in ("training step", "forward pass"):
            table = tables[f"{task}: {phase}"]
            assert {*variants, "floor"} <= table.keys()
            assert table["variant"][:3] == ["ms", "per second", "x floor"]
            assert float(table["floor"][2]) == 1 and float(table[LSTM][3]) == 1
    assert len(tables["the core alone, 3 x 4"]) == 5 and len(tables["the core alone, 3 x 5"]) == 5
    assert tables["one time step of one sequence, state of 12 units"].keys() == {"variant", RMC, LSTM}
    assert tables["peak memory of a training step"][str(NTH)] == [LSTM, "123", "100"]


def test_variants_take_turns_in_rotating_order_until_the_time_limit(monkeypatch):
    called = []
    calls = {label: lambda label=label: called.append(label) for label in "abc"}
    monkeypatch.setattr(benchmark, "SHORTEST_SAMPLE", 0.0)
    make_bench(rounds=3).measure(calls)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"  # the first three are not counted
    samples = make_bench(rounds=5, seconds=1e-9).measure(calls)
    assert {label: len(times) for label, times in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_medians_of_the_ratios_within_each_round():
    """A round in which the machine was slow has slowed all variants."""
    own = [2.0, 40.0, 6.0]
    assert benchmark.ratio(own, [1.0, 10.0, 3.0]) == 2.0
    assert benchmark.ratio(own, [4.0, 160.0, 6.0]) == 0.5
    assert benchmark.spread(own) == "6.00 (2.00 - 40.00)"


def test_all_variants_of_a_model_compute_the_same_loss():
    for task, variants in (
        (LM, (RMC, PLAIN, NAIVE)),
        (ADAPTIVE, (RMC, NAIVE)),
        (NTH, (RMC, PLAIN)),
        (LM, (LSTM, CELLS)),
    ):
        losses = []
        for variant in variants:
            made = model(task, variant)
            made.model.eval()
            losses.append(made.loss()[0])
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0])
    assert type(model(NTH, PLAIN).model.core) is type(model(LM, NAIVE).model.core) is RelationalMemory
    assert type(model(LM, RMC).model.core) is FastRelationalMemory
    assert model(LM, LSTM).model.fused and not model(LM, CELLS).model.fused


@TASKS
@pytest.mark.parametrize("phase", ["forward", "train"])
def test_the_floor_has_the_products_that_the_model_needs(task, phase):
    def count(made):
        with ProductCounter() as counter:
            getattr(made, phase)()
        return counter.operations

    floor = count(Floor(task, CPU))
    assert 1 <= count(model(task, RMC)) / floor < 1.03  # the model has products with bias vectors too
    assert count(model(task, PLAIN)) > floor


def test_peak_memory_counts_weights_gradients_and_adams_two_moments():
    task = replace(LM, vocab_size=100_000, embedding=32)
    peak, start = make_bench().peak(task, RMC)
    weights = 4 * sum(p.numel() for p in model(task, RMC).model.parameters()) / 1e6
    assert 4 * weights < peak - start < 12 * weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(small, capsys):
    benchmark.main(["--quick", "--cuda"])
    assert "CUDA" in capsys.readouterr().out

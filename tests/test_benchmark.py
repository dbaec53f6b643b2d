"""The benchmark: variants compute the same, models are equally large, the table is complete, turns rotate.

No test here depends on how long something takes.
"""

from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmark import LSTM, OLD, PLAIN, RMC, VARIANTS, Plan

from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import RelationalMemory


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", Plan(61, ((3, 4),), 5))
    monkeypatch.setattr(benchmark, "SHORTEST_SAMPLE", 0.0)


def count(model):
    return sum(weight.numel() for weight in model.parameters())


def test_the_variants_compute_the_same_and_the_lstms_are_equally_large():
    words, nth = benchmark.language_models(benchmark.FULL.vocab_size, False), benchmark.nth_farthest_models()
    for models in (words, nth):
        assert type(models[PLAIN].core) is RelationalMemory and type(models[RMC].core) is FastRelationalMemory
        assert count(models[LSTM]) == pytest.approx(count(models[RMC]), rel=0.002)
    inputs, targets = benchmark.make_batch(5, *benchmark.NTH, torch.Generator().manual_seed(1))
    losses = [benchmark.answer_loss(nth[name], inputs, targets, None)[0] for name in (RMC, PLAIN)]
    torch.testing.assert_close(*losses)
    for adaptive in (False, True):
        models, (tokens, targets) = benchmark.language_models(61, adaptive), benchmark.words(61, 3, 4)
        state = torch.randn(3, 1, models[RMC].core.mem_size)
        ways = {RMC: benchmark.window_loss, PLAIN: benchmark.window_loss, OLD: benchmark.old_loss}
        rmc, *others = (way(models[name].eval(), tokens, targets, state) for name, way in ways.items())
        for other in others:
            torch.testing.assert_close(other, rmc)


def test_the_table_has_all_rows_and_variants(small, capsys):
    benchmark.main(["--quick", "--clock", "cpu", "--rounds", "2"])
    about, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in about and "cpu time" in about
    assert header == f"| | rounds | RMC, ms | {' | '.join(VARIANTS[1:])} |"
    cells = {row.strip("| ").split(" | ")[0]: row.strip("| ").split(" | ")[1:] for row in rows}
    for softmax in ("full", "adaptive"):
        rounds, _, *ratios = cells[f"language model, 3 x 4, {softmax} softmax"]
        assert rounds == "2" and all(float(ratio) > 0 for ratio in ratios) and len(ratios) == 3
    for title in ("Nth farthest, 8 x 16, batch 5", "one step of one sequence"):
        _, _, plain, old, lstm = cells[title]
        assert float(plain) > 0 and old == "-" and float(lstm) > 0


def test_variants_take_turns_in_rotating_order(small, capsys):
    called = []
    calls = {label: lambda label=label: called.append(label) for label in "abc"}
    args = SimpleNamespace(bf16=False, rounds=3, clock="wall")
    samples = benchmark.Bench(args, torch.device("cpu")).measure(calls)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"  # the first three are not counted
    assert {label: len(times) for label, times in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_multiple_is_the_median_of_the_multiples_within_each_round():
    """A round in which the machine was slow has slowed all variants."""
    own = [2.0, 40.0, 6.0]
    assert benchmark.ratio(own, [1.0, 10.0, 3.0]) == 2.0
    assert benchmark.ratio(own, [4.0, 160.0, 6.0]) == 0.5
    assert benchmark.spread(own) == "6.00 (2.00 - 40.00)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(small, capsys):
    benchmark.main(["--quick", "--cuda", "--rounds", "1"])
    assert "CUDA" in capsys.readouterr().out

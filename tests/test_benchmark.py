"""The benchmark: its variants compute the same, its floor is what it says, its tables and files are whole.

Nothing here looks at how long something took.
"""

import csv
import math
from dataclasses import replace

import benchmark
import pytest
import torch
from benchmark import FAST, LSTM, LSTM_LOOP, NAIVE, PLAIN, Floor, ModelRunner, Plan, Task
from torch.utils.flop_counter import FlopCounterMode

from training.console import UserError

CPU = torch.device("cpu")
LM = Task(batch=3, steps=4, vocab_size=61, num_heads=2, head_size=6, key_size=5, mlp_layers=2, lstm_size=7)
ADAPTIVE = replace(LM, adaptive=True)
SLOTS = replace(LM, mem_slots=3, steps=40)              # long enough for folded weights
NTH = replace(LM, kind="nth", mem_slots=2, steps=5)
MINUSCULE = Plan(lm=(LM, ADAPTIVE), nth=(NTH,), memory=(LM,), swept=ADAPTIVE, sequence=(2, 3), batch=(2, 5),
                 slots=(1, 3), size=(4, 8), rounds=2, seconds=0)


@pytest.fixture
def minuscule(monkeypatch):
    monkeypatch.setattr(benchmark, "QUICK", MINUSCULE)
    monkeypatch.setattr(benchmark, "SHORTEST_SAMPLE", 0.0)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_quick_mode_measures_all_it_promises(minuscule, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "peak_memory", lambda task, variant, device: (123.4, 45.6, ""))
    csv_path, markdown_path = tmp_path / "all.csv", tmp_path / "all.md"
    benchmark.main(["--quick", "--csv", str(csv_path), "--markdown", str(markdown_path)])
    rows = rows_of(csv_path)
    assert {row["section"] for row in rows} == set(benchmark.SECTIONS)
    promised = {"variant", "phase", "median_ms", "min_ms", "max_ms", "per_second", "unit", "ratio_to_floor",
                "ratio_to_lstm", "faster_than_naive", "peak_mb", "hardware", "torch", "threads", "device",
                "batch", "steps", "mem_slots", "mem_size", "softmax", "rounds"}
    assert promised <= rows[0].keys()

    timed = [row for row in rows if row["section"] != "memory"]
    for row in timed:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"]) < math.inf
        items = int(row["batch"]) * (int(row["steps"]) if row["unit"] == "tokens" else 1)
        assert float(row["per_second"]) == pytest.approx(1000 * items / float(row["median_ms"]))
        assert row["rounds"] == "2" and float(row["ratio_to_lstm"]) > 0 and float(row["ratio_to_floor"]) > 0
        if row["variant"] == benchmark.FLOOR.label:
            assert float(row["ratio_to_floor"]) == 1 and float(row["gflop_per_s"]) > 0

    chosen = [row for row in timed if row["section"] == "lm"]
    train = [row["variant"] for row in chosen if (row["phase"], row["softmax"]) == ("train", "full")]
    assert train == [variant.label for variant in benchmark.LM_VARIANTS]
    forward = [row["variant"] for row in chosen if (row["phase"], row["softmax"]) == ("forward", "full")]
    train.remove(benchmark.NAIVE_FUSED_ADAM.label)                       # forward, it is the naive one again
    assert forward == train
    assert {(row["phase"], row["softmax"]) for row in chosen} == {
        (phase, softmax) for phase in ("train", "forward") for softmax in ("full", "adaptive")}
    for section, column, values in (("sequence", "steps", "23"), ("batch", "batch", "25"),
                                    ("slots", "mem_slots", "13"), ("size", "mem_size", ["8", "16"])):
        assert {row[column] for row in timed if row["section"] == section} == set(values)

    printed, markdown = capsys.readouterr().out, markdown_path.read_text(encoding="utf-8")
    for text in (printed, markdown):
        assert f"torch {torch.__version__}" in text and "CPU threads" in text
        assert "x floor" in text and "Against sequence length" in text and "45" in text
    assert "| :--" in markdown and "| RMC fast path" in markdown


def test_only_the_chosen_sections_are_run(minuscule, tmp_path):
    path = tmp_path / "some.csv"
    benchmark.main(["--quick", "--only", "slots", "nth", "--rounds", "1", "--csv", str(path)])
    rows = rows_of(path)
    assert {row["section"] for row in rows} == {"nth", "slots"}
    assert {row["rounds"] for row in rows} == {"1"}


def test_shapes_replace_those_of_the_language_model(minuscule, tmp_path):
    path = tmp_path / "shapes.csv"
    benchmark.main(["--quick", "--only", "lm", "--rounds", "1", "--shapes", "2x3", "5x1", "--csv", str(path)])
    assert {(row["batch"], row["steps"], row["softmax"]) for row in rows_of(path)} == {
        (*shape, softmax) for shape in (("2", "3"), ("5", "1")) for softmax in ("full", "adaptive")}


def test_only_the_variants_that_match_are_measured(minuscule, tmp_path):
    path = tmp_path / "numbers.csv"
    flags = ["--quick", "--only", "lm", "--rounds", "1", "--csv", str(path), "--match"]
    benchmark.main([*flags, "naive:", "floor"])
    labels = {row["variant"] for row in rows_of(path)}
    assert labels == {benchmark.NAIVE.label, benchmark.FLOOR.label}
    with pytest.raises(UserError, match="no variant's label contains 'nonesuch'"):
        benchmark.main([*flags, "nonesuch"])


def test_variants_take_turns_in_rotating_order_and_stop_at_the_time_limit():
    called = []
    calls = {label: lambda label=label: called.append(label) for label in "abc"}
    samples = benchmark.measure(calls, {"a": 1, "b": 2, "c": 1}, rounds=3, seconds=0, device=CPU)
    assert "".join(called) == "abbc" + "bbca" + "cabb"
    assert {label: len(times) for label, times in samples.items()} == {"a": 3, "b": 3, "c": 3}
    samples = benchmark.measure(calls, dict.fromkeys("abc", 1), rounds=5, seconds=1e-9, device=CPU)
    assert {label: len(times) for label, times in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_medians_of_the_ratios_within_each_round():
    """A round in which the machine was slow has slowed all variants: its ratios are as good as any."""
    report = benchmark.Report(CPU, rounds=3, seconds=0)
    row = benchmark.new_row("lm", LM, FAST, "train")
    samples = {FAST.label: [2.0, 40.0, 6.0], benchmark.FLOOR.label: [1.0, 10.0, 3.0],
               LSTM.label: [4.0, 160.0, 6.0], NAIVE.label: [6.0, 80.0, 30.0]}
    report._fill(row, ModelRunner(LM, FAST, CPU), samples)
    assert (row.median_ms, row.min_ms, row.max_ms) == (6.0, 2.0, 40.0)
    assert (row.ratio_to_floor, row.ratio_to_lstm, row.faster_than_naive) == (2.0, 0.5, 3.0)
    assert row.per_second == pytest.approx(1000 * 3 * 4 / 6.0) and row.gflop_per_s is None


@pytest.mark.parametrize("task", [LM, ADAPTIVE, SLOTS, NTH], ids=["full", "adaptive", "slots", "nth"])
def test_all_variants_of_the_core_compute_the_same_loss_and_weights(task):
    """Otherwise their times could not be compared."""
    variants = [NAIVE if task.kind == "lm" else PLAIN, *benchmark.option_variants(task, CPU)]
    results = []
    for variant in variants:
        if variant.model == "rmc" and not variant.bf16:
            runner = ModelRunner(task, variant, CPU, dropout=0.0)
            runner.optimizer.param_groups[0]["lr"] = 0.01
            losses = [runner.train(), runner.train(), runner.forward()]
            results.append((torch.stack(losses), [p.detach() for p in runner.model.parameters()]))
    assert len(results) >= 5
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(other[1], results[0][1], strict=True):
            # Adam's first step is lr * sign(gradient): where that is 0 but for rounding, it may differ.
            assert (ours - theirs).abs().median() < 1e-5
    assert results[0][0][1] < results[0][0][0]                           # it was a training step


def test_the_fused_and_the_looped_lstm_compute_the_same_loss():
    losses = [torch.stack([runner.train(), runner.forward()]) for runner in
              (ModelRunner(LM, variant, CPU, dropout=0.0) for variant in (LSTM, LSTM_LOOP))]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("task", [LM, ADAPTIVE, NTH], ids=["full", "adaptive", "nth"])
def test_bf16_runs_and_comes_near(task):
    exact, near = (ModelRunner(task, replace(FAST, bf16=bf16), CPU, dropout=0.0) for bf16 in (False, True))
    losses = exact.train(), near.train()
    torch.testing.assert_close(losses[1].float(), losses[0], rtol=0.02, atol=0)
    assert losses[0] != losses[1]


def test_a_variants_switches_act_during_its_calls_and_are_put_back():
    core, layers = benchmark.relational_rnn_general, benchmark.output_layers
    before = core.DEFERRED_ROWS, layers.linear_cross_entropy
    with benchmark.settings(benchmark.EACH_STEP, CPU):
        assert before[0] > 0 and core.DEFERRED_ROWS == 0
    with benchmark.settings(replace(FAST, chunked=False), CPU):
        assert layers.linear_cross_entropy is layers.plain_linear_cross_entropy
    assert (core.DEFERRED_ROWS, layers.linear_cross_entropy) == before
    assert ModelRunner(LM, FAST, CPU).model.core.fast and not ModelRunner(LM, PLAIN, CPU).model.core.fast
    assert not ModelRunner(NTH, PLAIN, CPU).model.core.fast


@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("task", [LM, ADAPTIVE, SLOTS, replace(SLOTS, mem_slots=1), NTH],
                         ids=["full", "adaptive", "slots", "folded", "nth"])
def test_the_floor_holds_the_products_it_claims_and_no_more_than_the_model_needs(task, phase):
    def count(run):
        # Torch counts no in-place products by itself.
        in_place = {torch.ops.aten.addmm_: lambda out, a, b, *rest, **named: 2 * a[0] * a[1] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            getattr(run, phase)()
        return counter.get_total_flops()

    floor = Floor(task, CPU)
    assert count(floor) == floor.flops(backward=phase == "train")
    # The model's own, found by torch's counter, are the same but for products with bias vectors.
    assert 1 <= count(ModelRunner(task, FAST, CPU)) / floor.flops(backward=phase == "train") < 1.03
    assert count(ModelRunner(task, PLAIN, CPU)) > count(floor)


def test_what_does_not_fit_into_memory_is_left_out_and_said(minuscule, monkeypatch, tmp_path):
    build = benchmark.build_model

    def full(task, variant, *dropout):
        if variant is PLAIN:
            raise MemoryError
        return build(task, variant, *dropout)

    monkeypatch.setattr(benchmark, "build_model", full)
    path = tmp_path / "memory.csv"
    benchmark.main(["--quick", "--only", "nth", "--csv", str(path)])
    rows = {row["variant"]: row for row in rows_of(path) if row["phase"] == "train"}
    assert rows[PLAIN.label]["note"] == "out of memory" and rows[PLAIN.label]["median_ms"] == ""
    assert float(rows[FAST.label]["median_ms"]) > 0


def test_peak_memory_counts_weights_gradients_and_adams_two_moments():
    task = replace(LM, vocab_size=100_000, head_size=32)
    peak, above, note = benchmark.peak_memory(task, FAST, CPU)
    weights = 4 * sum(p.numel() for p in benchmark.build_model(task, FAST).parameters()) / 1e6
    assert note == "" and peak > above
    assert 4 * weights < above < 12 * weights            # and what the step needs, and gaps in kept memory


@pytest.mark.parametrize("flags, message", [
    (["--csv", "no/such/folder/x.csv"], "no folder"),
    (["--markdown", "."], "is a folder"),
])
def test_files_that_cannot_be_written_are_refused_before_measuring(minuscule, flags, message, capsys):
    with pytest.raises(UserError, match=message):
        benchmark.main(["--quick", *flags])
    assert "x floor" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--only", "speed"], ["--shapes", "64"], ["--shapes", "0x3"],
                                   ["--rounds", "0"], ["--seconds", "nan"]])
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(UserError, match="--cuda was given but"):
        benchmark.main(["--quick", "--cuda"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_too(minuscule, tmp_path):
    path = tmp_path / "gpu.csv"
    benchmark.main(["--quick", "--cuda", "--only", "lm", "nth", "options", "--csv", str(path)])
    assert {row["device"] for row in rows_of(path)} == {"cuda"}

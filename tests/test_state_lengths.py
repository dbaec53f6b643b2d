"""Perplexity by the length of the state, compared with an obvious loop over single words."""

import csv
import math

from training.console import UserError

import pytest
import state_lengths
import torch

import train_rnn
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM

V = 29
MODELS = {
    "rmc": lambda: RelationalMemoryLM(V, embedding_size=6, head_size=4, num_heads=2, key_size=3),
    "lstm": lambda: RNNLM(V, embedding_size=6, hidden_size=7),
}


def nats_one_by_one(model, text, length):
    """Return the nats of every target, with resets every `length` words, and the words since a reset."""
    nats, since = [], []
    with torch.no_grad():
        for place in range(len(text) - 1):
            if place % length == 0:
                state = model.initial_state(1)
            log_probabilities, state = model.log_probabilities(text[place].reshape(1, 1), state)
            nats.append(-log_probabilities[0, text[place + 1]].item())
            since.append(place % length + 1)
    return nats, since


@pytest.mark.parametrize("at_once", [20, 6400])
@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_those_of_a_loop_over_single_words(name, at_once, monkeypatch):
    monkeypatch.setattr(state_lengths, "WINDOW", 5)
    monkeypatch.setattr(state_lengths, "TOKENS_AT_ONCE", at_once)
    torch.manual_seed(1)
    model = MODELS[name]().double().eval()
    text = torch.randint(V, (98,))  # 97 targets: no length divides them
    rows = state_lengths.state_lengths(model, text.to(torch.uint8), [12, 3, 40, 12], "cpu")
    assert [row.words for row in rows] == [3, 12, 40]
    on_longest, since = nats_one_by_one(model, text, 40)
    for row, low in zip(rows, (0, 3, 12), strict=True):
        nats, _ = nats_one_by_one(model, text, row.words)
        assert row.targets == 97 and row.loss == pytest.approx(sum(nats) / 97, abs=1e-10)
        between = [x for x, k in zip(on_longest, since, strict=True) if low < k <= row.words]
        assert row.targets_between == len(between)
        assert row.loss_between == pytest.approx(sum(between) / len(between), abs=1e-10)


def test_a_length_beyond_the_text_is_the_whole_text_and_its_bin_is_empty():
    torch.manual_seed(1)
    model = MODELS["lstm"]().double().eval()
    rows = state_lengths.state_lengths(model, torch.randint(V, (20,)), [19, 500, 1000], "cpu")
    assert rows[0].loss == rows[1].loss == rows[2].loss == pytest.approx(rows[0].loss_between)
    assert [row.targets_between for row in rows] == [19, 0, 0] and math.isnan(rows[2].loss_between)
    last = state_lengths.table(rows, 1.0, 1).splitlines()[-2].split()
    assert last == ["1,000", f"{math.exp(rows[2].loss):.2f}", "19", "|", "501-1,000", "-", "0"]


def test_the_tool_measures_a_trained_run_on_its_own_corpus(corpus_folder, tmp_path, capsys):
    sizes = ["--emsize", "6", "--nhid", "7", "--epochs", "1", "--batch_size", "14", "--bptt", "15"]
    place = ["--data", str(corpus_folder), "--runs-folder", str(tmp_path), "--name", "run"]
    assert train_rnn.main([*sizes, *place]) == 0
    state_lengths.main([str(tmp_path / "run"), "--lengths", "5", "50", "1000"])
    output = capsys.readouterr().out
    assert "words since a reset" in output and "(1 columns)" in output and " 6-50 " in output
    with open(tmp_path / "run" / "state_lengths.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["split"], row["words"]) for row in rows] == [
        (split, words) for split in ("valid", "test") for words in ("5", "50", "1000", "")
    ]
    assert [row["columns"] for row in rows] == ["", "", "", "1"] * 2
    # Longer than the split: one segment, which is the split read as one stream.
    assert float(rows[2]["loss"]) == pytest.approx(float(rows[3]["loss"]), rel=1e-5)
    with pytest.raises(UserError, match="differs from that of"):
        state_lengths.main([str(tmp_path / "run" / "best.pt"), "--data", "tiny"])

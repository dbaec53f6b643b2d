"""generate_rmc.py: choosing words, carrying state, prompts, punctuation, files."""

import json
import math
import os

from training import checkpoints
from training.console import UserError

import pytest
import torch
from conftest import write_corpus

import data_utils
import generate_rmc
from data_utils import Vocabulary
from generate_rmc import choose, encode_prompt
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from tasks import language_modeling

NAMES = pytest.mark.parametrize("name", ["rnn", "rmc-adaptive"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders of two little trained models by name; rmc-adaptive is the newer one."""
    root = tmp_path_factory.mktemp("generate")
    corpus = data_utils.load_corpus(str(write_corpus(root / "corpus")))
    streams = corpus.train.long()[: 14 * 170].view(14, 170)
    torch.manual_seed(1)
    models = {
        "rnn": RNNLM(22, embedding_size=12, hidden_size=14),
        "rmc-adaptive": RelationalMemoryLM(22, embedding_size=12, head_size=5, mem_slots=2, cutoffs=[6, 13]),
    }
    folders = {}
    for age, (name, model) in enumerate(models.items()):
        optimizer = torch.optim.Adam(model.eval().parameters(), lr=0.03)  # without dropout
        for start in [*range(0, 165, 15)] * 2:
            tokens, targets = streams[:, start : start + 15], streams[:, start + 1 : start + 16]
            loss, _ = model.loss(tokens[:, : targets.size(1)], targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        folders[name] = root / "runs" / name
        folders[name].mkdir(parents=True)
        (folders[name] / "args.json").write_text(
            json.dumps({"script": f"train_{name[:3]}", "arguments": {"data": f"of-{name}"}})
        )
        contents = language_modeling.describe_model(name[:3], model, corpus.vocabulary)
        checkpoints.save_checkpoint(folders[name] / "best.pt", contents)
        os.utime(folders[name] / "best.pt", (1000 + age, 1000 + age))
    return folders


def written(trained, tmp_path, *argv, model="rnn"):
    """The text that the script writes."""
    path = tmp_path / "text.txt"
    argv = ["--checkpoint", str(trained[model]), "--outf", str(path), "--words", "50", *argv]
    assert generate_rmc.main(argv) == 0
    return path.read_bytes().decode("utf-8")


# ---- choosing a word

P = [0.1, 0.4, 0.05, 0.25, 0.2]
CHOICES = [
    ({}, P),
    ({"temperature": 0.5}, [p**2 for p in P]),
    ({"temperature": 2}, [math.sqrt(p) for p in P]),
    ({"temperature": 1e30}, [1, 1, 1, 1, 1]),
    ({"temperature": 0}, [0, 1, 0, 0, 0]),
    ({"temperature": 5e-324}, [0, 1, 0, 0, 0]),
    ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
    ({"top_k": 99}, P),
    ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0]),
    ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2]),
    ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0]),  # of the three, 0.4 and 0.25 have 0.76
    ({"banned": [1]}, [0.1, 0, 0.05, 0.25, 0.2]),
    ({"banned": [1], "temperature": 0}, [0, 0, 0, 1, 0]),
    ({"banned": [1], "top_k": 2}, [0, 0, 0, 0.25, 0.2]),
    ({"banned": [0, 1, 2, 3], "top_p": 0.01}, [0, 0, 0, 0, 1]),
]


@pytest.mark.parametrize("options, expected", CHOICES)
def test_words_are_drawn_with_their_probabilities(options, expected):
    logs = torch.tensor(P).log().expand(20_000, 5)
    ids = choose(logs, generator=torch.Generator().manual_seed(7), **options)
    for i, weight in enumerate(expected):
        frequency = (ids == i).double().mean().item()
        assert frequency == pytest.approx(weight / sum(expected), abs=0.015)
        assert frequency == 0 or weight > 0


def test_rows_are_independent_and_the_input_is_unchanged():
    logs = torch.full((3, 4), -1e9, dtype=torch.float64)
    for row, word in enumerate((2, 0, 3)):
        logs[row, word] = 0
    before = logs.clone()
    assert choose(logs, top_k=2, banned=[1]).tolist() == [2, 0, 3]
    assert torch.equal(logs, before)


# ---- from the model to the text


@NAMES
def test_each_word_comes_from_the_distribution_given_the_whole_text(trained, name):
    """The 2018 port sampled from an embedding vector when the softmax was adaptive."""
    model, _ = language_modeling.load_model(checkpoints.load_checkpoint(trained[name] / "best.pt"))
    seen = []

    def greedy(log_probabilities):
        seen.append(log_probabilities)
        return log_probabilities.argmax(dim=1)

    ids = generate_rmc.generate(model, [3, 1, 4], 2, 9, greedy)
    assert ids.shape == (2, 9)
    text = torch.cat([torch.tensor([[3, 1, 4]] * 2), ids], dim=1)
    with torch.no_grad():
        for i, logs in enumerate(seen):
            again, _ = model.log_probabilities(text[:, : 3 + i], model.initial_state(2))
            torch.testing.assert_close(logs, again, rtol=0, atol=1e-5)


@NAMES
def test_text_has_the_asked_number_of_words_of_the_vocabulary(trained, tmp_path, name):
    tokens = written(trained, tmp_path, "--words", "300", model=name).replace("\n", " <eos> ").split()
    words = checkpoints.load_checkpoint(trained[name] / "best.pt")["words"]
    assert len(tokens) == 300 + 1 and set(tokens) <= set(words)  # and the newline that ends the file
    assert {"Übermut", "<unk>"} <= set(tokens)


def test_choices(trained, tmp_path):
    first = written(trained, tmp_path, "--seed", "3")
    assert written(trained, tmp_path, "--seed", "3") == first != written(trained, tmp_path, "--seed", "4")
    greedy = written(trained, tmp_path, "--temperature", "0")
    assert greedy == written(trained, tmp_path, "--top-k", "1") != first
    assert greedy == written(trained, tmp_path, "--top-p", "1e-9")
    assert "<unk>" not in written(trained, tmp_path, "--words", "300", "--no-unk")


def test_prompt_starts_the_text_and_decides_what_follows(trained, tmp_path):
    greedy = ["--temperature", "0", "--words", "1", "--prompt"]
    assert written(trained, tmp_path, *greedy, "the dog saw") == "the dog saw the\n"
    assert written(trained, tmp_path, *greedy, "the dog saw the fox") == "the dog saw the fox at\n"


def test_samples_differ_and_are_separated(trained, tmp_path):
    text = written(trained, tmp_path, "--samples", "3", "--prompt", "the ant", "--words", "30")
    parts = text.split("=== sample ")
    assert parts[0] == "" and [part[:6] for part in parts[1:]] == ["1 ===\n", "2 ===\n", "3 ===\n"]
    bodies = [part[6:] for part in parts[1:]]
    assert len(set(bodies)) == 3 and all(body.startswith("the ant ") for body in bodies)


# ---- prompts and punctuation


def test_unknown_words_of_a_prompt(capsys):
    assert encode_prompt("the zebu saw", Vocabulary(["<unk>", "the", "saw"])) == [1, 0, 2]
    assert f"read as {data_utils.UNK}: zebu" in capsys.readouterr().err
    with pytest.raises(UserError, match="words: 'gnu', 'zebu'.*--vocab-size has <unk>"):
        encode_prompt("the gnu zebu?", Vocabulary(["the", "?"]))


def test_prompt_is_tokenized_when_a_word_is_unknown(capsys):
    lower = Vocabulary(["tom", "don", "'t", ".", "run", "<unk>", "—"])
    assert encode_prompt("tom don 't run .", lower) == [0, 1, 2, 4, 3]
    assert capsys.readouterr().err == ""
    assert encode_prompt("Tom don't run.", lower) == [0, 1, 2, 4, 3]
    assert "read as: tom don 't run ." in capsys.readouterr().err
    assert encode_prompt("tom: zebu.", lower) == [0, 5, 5, 3]  # as many unknown words, but tom is known
    assert encode_prompt("run—tom", lower) == [4, 6, 0]  # a vocabulary without @—@
    capitals = Vocabulary(["Tom", "tom", "run", "."])
    assert encode_prompt("Tom run.", capitals) == [0, 2, 3]
    raw = Vocabulary(["run.", "the", "<unk>"])  # of a corpus that was not tokenized
    assert encode_prompt("run. zebu, the", raw) == [0, 2, 1]


def test_detokenize(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_rmc, "to_text", lambda words: "don 't ( 3 @,@ 000 ) .")
    assert written(trained, tmp_path, "--detokenize") == "don't (3,000).\n"
    assert written(trained, tmp_path) == "don 't ( 3 @,@ 000 ) .\n"


# ---- the script


def test_default_is_the_best_model_of_the_newest_run(trained, tmp_path, monkeypatch, capsys):
    root = trained["rnn"].parent
    (root / "other").mkdir(exist_ok=True)
    (root / "other" / "args.json").write_text('{"script": "train_nth_farthest"}')
    (root / "other" / "best.pt").write_bytes(b"")  # newer, but not a language model
    monkeypatch.chdir(root.parent)
    assert generate_rmc.main(["--words", "5"]) == 0  # into generated.txt here
    path = os.path.join("runs", "rmc-adaptive", "best.pt")
    assert f"checkpoint: {path}, trained on of-rmc-adaptive (the newest" in capsys.readouterr().out
    text = (root.parent / "generated.txt").read_text(encoding="utf-8")
    assert len(text.replace("\n", " <eos> ").split()) == 6
    with pytest.raises(UserError, match="no trained model.*train_rmc.py"):
        generate_rmc.main(["--runs-folder", str(tmp_path)])


def test_dash_prints_the_text_and_writes_no_file(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", str(trained["rnn"]), "--outf", "-", "--words", "5", "--log-interval", "2"]
    assert generate_rmc.main(argv) == 0
    text, messages = capsys.readouterr()
    assert "device: CPU" in messages and os.listdir(tmp_path) == []
    assert len(text.replace("\n", " <eos> ").split()) == 6  # the words and the end of the last line

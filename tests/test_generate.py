"""generate_rmc.py: choosing words, carrying state, prompts, files."""

import math
import os

import pytest
import torch

import generate_rmc
import train_rmc
import train_rnn
from data_utils import Vocabulary
from generate_rmc import choose
from training import checkpoints, lm_training
from training.console import UserError

SIZES = {
    train_rmc: ["--emsize", "12", "--headsize", "5", "--numheads", "2", "--keysize", "3", "--memslots", "2"],
    train_rnn: ["--emsize", "12", "--nhid", "14", "--cudnn"],
}
LOOP = ["--batch_size", "14", "--bptt", "15", "--epochs", "2", "--lr", "0.03", "--dropout", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders by (script, softmax), all under one folder; the newest is the last."""
    from conftest import write_corpus

    root = tmp_path_factory.mktemp("generate")
    corpus = write_corpus(root / "corpus")
    folders = {}
    for age, (script, softmax) in enumerate(
        [(train_rmc, "full"), (train_rnn, "full"), (train_rnn, "adaptive"), (train_rmc, "adaptive")]
    ):
        name = f"{script.SCRIPT}-{softmax}"
        flags = ["--adaptivesoftmax", "--cutoffs", "6", "13"] if softmax == "adaptive" else []
        script.main(
            [
                *SIZES[script],
                *LOOP,
                *flags,
                "--data",
                str(corpus),
                "--runs-folder",
                str(root / "runs"),
                "--name",
                name,
            ]
        )
        folders[script, softmax] = root / "runs" / name
        os.utime(root / "runs" / name / "best.pt", (1000 + age, 1000 + age))
    return folders


def written(trained, tmp_path, *argv, model=(train_rnn, "full")):
    """The text that the script writes."""
    path = tmp_path / "text.txt"
    assert (
        generate_rmc.main(["--checkpoint", str(trained[model]), "--outf", str(path), "--words", "50", *argv])
        == 0
    )
    return path.read_bytes().decode("utf-8")


# ---- choosing a word


def frequencies(draws, **options):
    """How often each of five words of known probability is drawn."""
    log_probabilities = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log().expand(draws, 5)
    ids = choose(log_probabilities, generator=torch.Generator().manual_seed(7), **options)
    return [(ids == i).double().mean().item() for i in range(5)]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0025, 0.0625, 0.04]),
        ({"temperature": 2}, [math.sqrt(p) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]),
        ({"temperature": 1e30}, [1, 1, 1, 1, 1]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 5e-324}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0]),
        ({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0]),  # of the three, 0.4 and 0.25 have 0.76
        ({"banned": [1]}, [0.1, 0, 0.05, 0.25, 0.2]),
        ({"banned": [1], "temperature": 0}, [0, 0, 0, 1, 0]),
        ({"banned": [1], "top_k": 2}, [0, 0, 0, 0.25, 0.2]),
        ({"banned": [0, 1, 2, 3], "top_p": 0.01}, [0, 0, 0, 0, 1]),
    ],
)
def test_words_are_drawn_with_the_probabilities_asked_for(options, expected):
    found = frequencies(20_000, **options)
    for frequency, weight in zip(found, expected, strict=True):
        assert frequency == pytest.approx(weight / sum(expected), abs=0.015)
        assert (frequency == 0) == (weight == 0) or 0 < weight / sum(expected) < 0.01


def test_rows_are_drawn_on_their_own_and_the_input_is_left_alone():
    log_probabilities = torch.full((3, 4), -1e9)
    for row, word in enumerate((2, 0, 3)):
        log_probabilities[row, word] = 0
    before = log_probabilities.clone()
    assert choose(log_probabilities, top_k=2, banned=[1]).tolist() == [2, 0, 3]
    assert torch.equal(log_probabilities, before)


# ---- from the model to the text


@pytest.mark.parametrize("softmax", ["full", "adaptive"])
@pytest.mark.parametrize("script", SIZES, ids=lambda script: script.SCRIPT)
def test_fault_3_words_come_from_the_models_distribution(trained, script, softmax):
    """Step by step with the state carried equals reading the whole text for each word. The old port sampled
    from an embedding vector when the softmax was adaptive."""
    model, vocabulary = lm_training.load_model(checkpoints.load_checkpoint(trained[script, softmax] / "best.pt"))
    seen = []

    def greedy(log_probabilities):
        seen.append(log_probabilities)
        return log_probabilities.argmax(dim=1)

    ids = generate_rmc.generate(model, [3, 1, 4], 2, 9, greedy)
    assert ids.shape == (2, 9) and len(vocabulary) == 22
    text = torch.cat([torch.tensor([[3, 1, 4]] * 2), ids], dim=1)
    with torch.no_grad():
        for i, log_probabilities in enumerate(seen):
            again, _ = model.log_probabilities(text[:, : 3 + i], model.initial_state(2))
            torch.testing.assert_close(log_probabilities, again, rtol=0, atol=1e-5)
            torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("softmax", ["full", "adaptive"])
@pytest.mark.parametrize("script", SIZES, ids=lambda script: script.SCRIPT)
def test_text_of_every_kind_of_checkpoint(trained, tmp_path, script, softmax):
    text = written(trained, tmp_path, model=(script, softmax))
    tokens = text.replace("\n", " <eos> ").split()
    words = checkpoints.load_checkpoint(trained[script, softmax] / "best.pt")["words"]
    assert len(tokens) == 50 + 1 and set(tokens) <= set(words)  # and the newline that ends the file
    assert "Übermut" in written(trained, tmp_path, "--words", "300", model=(script, softmax))


def test_seed_decides(trained, tmp_path):
    first = written(trained, tmp_path, "--seed", "3")
    assert written(trained, tmp_path, "--seed", "3") == first != written(trained, tmp_path, "--seed", "4")


def test_temperature_near_zero_is_greedy(trained, tmp_path):
    greedy = written(trained, tmp_path, "--temperature", "0")
    assert greedy == written(trained, tmp_path, "--temperature", "1e-12", "--seed", "5")
    assert (
        greedy == written(trained, tmp_path, "--top-k", "1") == written(trained, tmp_path, "--top-p", "1e-9")
    )
    assert greedy != written(trained, tmp_path)


def test_prompt_begins_the_text_and_guides_it(trained, tmp_path):
    greedy = ["--temperature", "0", "--words", "1", "--prompt"]
    assert written(trained, tmp_path, *greedy, "the dog saw").startswith("the dog saw the")
    assert written(trained, tmp_path, *greedy, "the dog saw the fox at").startswith(
        "the dog saw the fox at the"
    )


def test_unknown_words_of_a_prompt(trained, tmp_path, capsys):
    text = written(trained, tmp_path, "--prompt", "the yak saw")
    assert text.startswith("the <unk> saw ") and "yak" in capsys.readouterr().err
    with pytest.raises(UserError, match="'yak', 'zebu'"):
        written(trained, tmp_path, "--prompt", "yak zebu")
    with pytest.raises(UserError, match="'yak'"):
        generate_rmc.encode_prompt("the yak", Vocabulary(["the", "<eos>"]))  # no <unk> to stand for it


def test_no_unk(trained, tmp_path):
    assert "<unk>" in written(trained, tmp_path, "--words", "300")
    assert "<unk>" not in written(trained, tmp_path, "--words", "300", "--no-unk")


def test_samples_differ_and_are_separated(trained, tmp_path):
    text = written(trained, tmp_path, "--samples", "3", "--prompt", "the ant", "--words", "30")
    parts = text.split("=== sample ")
    assert parts[0] == "" and [part[:6] for part in parts[1:]] == ["1 ===\n", "2 ===\n", "3 ===\n"]
    bodies = [part[6:] for part in parts[1:]]
    assert len(set(bodies)) == 3 and all(body.startswith("the ant ") for body in bodies)


def test_default_is_the_best_model_of_the_newest_run(trained, tmp_path, monkeypatch, capsys):
    root = trained[train_rmc, "full"].parent
    nth = root / "other"
    nth.mkdir()
    (nth / "args.json").write_text('{"script": "train_nth_farthest"}')
    (nth / "best.pt").write_bytes(b"")  # newer, but no language model
    monkeypatch.chdir(root.parent)
    assert generate_rmc.main(["--words", "5"]) == 0  # into generated.txt here
    assert f"checkpoint: {os.path.join('runs', 'train_rmc-adaptive', 'best.pt')}" in capsys.readouterr().out
    assert (
        len((root.parent / "generated.txt").read_text(encoding="utf-8").replace("\n", " <eos> ").split()) == 6
    )
    with pytest.raises(UserError, match="no trained model.*train_rmc.py"):
        generate_rmc.main(["--runs-folder", str(tmp_path)])


def test_to_the_terminal(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(trained[train_rnn, "full"] / "last.pt")
    assert (
        generate_rmc.main(["--checkpoint", checkpoint, "--outf", "-", "--words", "5", "--data", "anything"])
        == 0
    )
    output = capsys.readouterr().out
    assert "--data is ignored" in output and os.listdir(tmp_path) == []


def test_to_text():
    assert generate_rmc.to_text(["a", "b", "<eos>", "<eos>", "c"]) == "a b\n\nc"
    assert generate_rmc.to_text([]) == ""


# ---- bad input


@pytest.mark.parametrize(
    "argv",
    [
        ["--temperature", "nan"],
        ["--temperature", "-1"],
        ["--temperature", "inf"],
        ["--top-k", "-1"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--top-p", "nan"],
        ["--words", "0"],
        ["--samples", "0"],
        ["--seed", "x"],
        ["--log-interval", "0"],
    ],
)
def test_nonsense_values_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        generate_rmc.main(argv)
    assert caught.value.code == 2 and ": must be" in capsys.readouterr().err


def test_bad_checkpoints_and_files_are_refused(trained, tmp_path):
    best = trained[train_rnn, "full"] / "best.pt"
    (tmp_path / "bad.pt").write_bytes(best.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        generate_rmc.main(["--checkpoint", str(tmp_path / "bad.pt")])
    with pytest.raises(UserError, match="no best.pt"):
        generate_rmc.main(["--checkpoint", str(tmp_path)])
    with pytest.raises(UserError, match="not there"):
        generate_rmc.main(["--checkpoint", str(tmp_path / "none.pt")])
    for outf in (str(tmp_path), str(tmp_path / "none" / "text.txt")):
        with pytest.raises(UserError, match="--outf"):
            generate_rmc.main(["--checkpoint", str(best), "--outf", outf])
    checkpoints.save_checkpoint(tmp_path / "nth.pt", {"kind": "nth_farthest"})
    with pytest.raises(UserError, match="not a language model"):
        generate_rmc.main(["--checkpoint", str(tmp_path / "nth.pt")])
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "nth.pt"]


def test_only_unk_to_write(tmp_path):
    args = train_rnn.build_parser().parse_args(["--nhid", "3", "--emsize", "3"])
    model = train_rnn.build_model(args, 1, None)
    contents = lm_training.describe_model("rnn", model, Vocabulary(["<unk>"]))
    checkpoints.save_checkpoint(tmp_path / "best.pt", contents)
    with pytest.raises(UserError, match="--no-unk leaves nothing"):
        generate_rmc.main(["--checkpoint", str(tmp_path), "--no-unk"])

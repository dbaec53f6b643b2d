"""data/tiny: its files are what the generator makes, and the stated entropies are the generator's, computed
twice.
"""

import contextlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from data import make_tiny
from data.make_tiny import EOS, SPLITS, Story, Teller, tokens_with_probabilities

FOLDER = Path(make_tiny.__file__).parent / "tiny"
STATED = json.loads((FOLDER / "entropy.json").read_text())


def read(split: str) -> list[str]:
    lines = (FOLDER / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    return [word for line in lines for word in [*line.split(), EOS]]


# -- an independent reader: no tries, no assumption that the text shows the choices
class ReadEnough(Exception):
    """The retold words differ from the given ones, or cover them."""


class Retelling(Teller):
    """Follows a script of option indices (then always option 0) and compares the told words with given
    ones.
    """

    def __init__(self, given: list[str], script: list[int]):
        super().__init__(lambda weights: 0)
        self.given, self.script = given, script
        self.sizes: list[int] = []  # options at each choice so far
        self.probability = 1.0
        self.matched = 0

    def say(self, phrase):
        for word in phrase.split():
            if self.matched == len(self.given) or word != self.given[self.matched]:
                raise ReadEnough
            self.matched += 1

    def pick(self, options):
        weights = options if isinstance(options, dict) else {option: 1 for option in options}
        index = self.script[len(self.sizes)] if len(self.sizes) < len(self.script) else 0
        self.sizes.append(len(weights))
        option = list(weights)[index]
        self.probability *= weights[option] / sum(weights.values())
        self.say(option)
        return option


def prefix_probabilities(tell_all, given: list[str]) -> list[float]:
    """P(a telling begins with the first n given words), n = 0 ... len(given), by going through every
    telling that could.
    """
    mass = [0.0] * (len(given) + 1)
    script: list[int] = []
    while True:
        retelling = Retelling(given, script)
        with contextlib.suppress(ReadEnough):
            tell_all(retelling)
        # What follows a differing word does not matter: all tellings that begin like this one count together.
        for n in range(retelling.matched + 1):
            mass[n] += retelling.probability
        script = script[: len(retelling.sizes)] + [0] * (len(retelling.sizes) - len(script))
        while script and script[-1] == retelling.sizes[len(script) - 1] - 1:
            script.pop()
        if not script:
            return mass
        script[-1] += 1


def tell_stories(teller):
    while True:
        Story(teller).run()


def test_word_probabilities_equal_those_of_an_exhaustive_reader():
    stream = list(tokens_with_probabilities(seed=5, at_least=150))
    words = [word for word, _ in stream]
    mass = prefix_probabilities(tell_stories, words)
    assert mass[0] == pytest.approx(1.0, rel=1e-9)
    for n, (word, probability) in enumerate(stream):
        assert probability == pytest.approx(mass[n + 1] / mass[n], rel=1e-9), (n, word)


def test_options_that_begin_alike_share_the_weight_of_their_common_words():
    def tell(teller):
        teller.pick({"the old cat": 1, "the old dog": 2, "the end": 3, "a cat": 4})
        teller.say("ran")

    def word_probabilities(index):
        teller = Teller(lambda weights: index)
        tell(teller)
        return teller.words

    assert word_probabilities(1) == [("the", 6 / 10), ("old", 3 / 6), ("dog", 2 / 3), ("ran", 1.0)]
    assert word_probabilities(3) == [("a", 4 / 10), ("cat", 1.0), ("ran", 1.0)]
    for index in range(4):
        told = word_probabilities(index)
        mass = prefix_probabilities(tell, [word for word, _ in told])
        assert [p for _, p in told] == pytest.approx([b / a for a, b in zip(mass, mass[1:], strict=False)])


def test_an_option_that_begins_another_is_refused():
    with pytest.raises(ValueError, match="'ran' must not be the beginning of another"):
        Teller(lambda weights: 0).pick(["ran", "ran away"])


# -- the files
def test_files_are_reproduced_byte_for_byte():
    made = make_tiny.files()
    assert set(made) == {"train.txt", "valid.txt", "test.txt", "entropy.json"}
    for name, content in made.items():
        assert (FOLDER / name).read_bytes() == content, name


def test_sizes_and_word_types():
    assert 148_000 <= len(read("train")) <= 155_000
    for split in ("valid", "test"):
        assert 14_500 <= len(read(split)) <= 16_000
    types = set(read("train"))
    assert 100 <= len(types - {EOS}) < 400
    assert set(read("valid")) <= types and set(read("test")) <= types
    assert all(re.fullmatch(r"[a-z]+|[.,:?]|<eos>", word) for word in types)


@pytest.mark.parametrize("split", SPLITS)
def test_stated_entropy_is_the_mean_over_all_targets(split):
    """N tokens with an <eos> per line have N - 1 targets: the first token of the stream is given."""
    told = list(tokens_with_probabilities(*SPLITS[split]))
    assert [word for word, _ in told] == read(split)
    nats = sum(-math.log(probability) for _, probability in told[1:]) / (len(told) - 1)
    assert STATED[split]["tokens"] == len(told)
    assert STATED[split]["nats_per_token"] == pytest.approx(nats, abs=1e-6)
    assert STATED[split]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


def stories(split: str) -> list[str]:
    return re.split(r"(?m)^(?=one )", (FOLDER / f"{split}.txt").read_text())[1:]


def test_valid_and_test_stories_are_new():
    known = set(stories("train"))
    assert len(known) > 1000
    for split in ("valid", "test"):
        mine = stories(split)
        assert not known & set(mine)
    assert not set(stories("valid")) & set(stories("test"))


def test_entropy_rate_is_the_limit_of_the_measured_one():
    """An independent estimate: many stories from another seed, compared within four standard errors."""
    told = list(tokens_with_probabilities(seed=99, at_least=400_000))
    nats, tokens = [0.0], [0]  # per story
    for word, probability in told:
        if word == "one":
            nats.append(0.0)
            tokens.append(0)
        nats[-1] -= math.log(probability)
        tokens[-1] += 1
    rate = STATED["rate"]["nats_per_token"]
    residuals = [n - rate * t for n, t in zip(nats[1:], tokens[1:], strict=True)]
    error = math.sqrt(sum(r * r for r in residuals)) / sum(tokens)
    assert error < 0.002
    assert abs(sum(nats) / sum(tokens) - rate) < 4 * error


def test_entropy_rate_of_a_grammar_worked_out_by_hand():
    def tell(story):
        first = story.tell.pick({"a": 3, "b c": 1})
        if first == "b c":
            story.tell.pick(["d", "e"])
        return first == "a"

    nats, tokens, true = make_tiny.expectation(tell)
    assert nats == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4) + 0.25 * math.log(2))
    assert tokens == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert true == pytest.approx(0.75)


def test_relations_hold_in_the_text():
    """Another reader keeps count of who has what and who is older, from the sentences alone."""
    checked = Counter()
    for story in stories("test"):
        lines = story.splitlines()
        owner, thing, other = re.fullmatch(r"(\w+) had a \w+ (\w+) and (\w+) had a .*", lines[1]).groups()
        children = {owner, other}
        assert len(children) == 2 and children <= set(lines[0].split())
        first, comparative, second = re.fullmatch(r"(\w+) was (\w+) than (\w+) \.", lines[2]).groups()
        assert {first, second} == children
        for line in lines[3:]:
            words = line.split()
            if words[0] == "then":
                assert line == f"then {owner} gave the {thing} to {other} .", story
                owner, other = other, owner
            elif words[0] == "who":
                assert line == f"who had the {thing} ? it was {owner} .", story
            elif words[0] == "the":
                assert words[2:4] == ["child", "was"], line
                assert words[4] == (first if words[1] == comparative else second), story
            elif words[0] == "at":
                assert line.startswith(f"at last {owner} took the {thing} "), story
            elif words[1] == "played":
                assert line == f"{owner} played with the {thing} .", story
            elif words[1] == "asked":
                assert line == f"{other} asked for the {thing} .", story
            elif words[1] in ("waved", "ran"):
                assert {words[0], words[-2]} == children, story
            else:
                assert words[0] in children and words[1] in ("saw", "felt", "ate"), line
            checked[words[1] if words[0] in children else words[0]] += 1
    assert min(checked[kind] for kind in ("then", "who", "the", "at", "played", "asked", "waved", "ran")) > 30


def n_gram_perplexity(order: int, discount: float = 0.75) -> float:
    """Test perplexity of an interpolated Kneser-Ney model, which sees order - 1 words and nothing before."""
    train, test = read("train"), read("test")
    counts = [Counter() for _ in range(order + 1)]
    counts[order] = Counter(zip(*(train[shift:] for shift in range(order)), strict=False))
    for size in range(order - 1, 0, -1):
        counts[size] = Counter(gram[1:] for gram in counts[size + 1])
    totals = [Counter() for _ in counts]
    followers = [Counter() for _ in counts]
    for size in range(1, order + 1):
        for gram, count in counts[size].items():
            totals[size][gram[:-1]] += count
            followers[size][gram[:-1]] += 1
    types = len(set(train))

    def probability(gram: tuple[str, ...]) -> float:
        if not gram:
            return 1 / types
        size, context = len(gram), gram[:-1]
        backed_off = probability(gram[1:])
        if not totals[size][context]:
            return backed_off
        kept = max(counts[size][gram] - discount, 0) / totals[size][context]
        return kept + discount * followers[size][context] / totals[size][context] * backed_off

    grams = [tuple(test[max(0, end - order) : end]) for end in range(2, len(test) + 1)]
    return math.exp(-sum(math.log(probability(gram)) for gram in grams) / len(grams))


@pytest.mark.parametrize("order", [3, 5, 6])
def test_relations_matter_a_model_of_the_last_few_words_is_clearly_worse(order):
    assert n_gram_perplexity(order) > 1.2 * STATED["test"]["perplexity"]


# -- the script
def test_script_writes_and_checks(tmp_path, capsys, monkeypatch):
    made = {
        name: (FOLDER / name).read_bytes() for name in ("train.txt", "valid.txt", "test.txt", "entropy.json")
    }
    monkeypatch.setattr(make_tiny, "files", lambda: made)  # that they are made so is another test's matter
    folder = tmp_path / "new"
    assert make_tiny.main(["--folder", str(folder), "--check"]) == 1
    assert "missing or changed" in capsys.readouterr().err
    assert not folder.exists()
    assert make_tiny.main(["--folder", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "entropy.json",
        "test.txt",
        "train.txt",
        "valid.txt",
    ]
    assert make_tiny.main(["--folder", str(folder), "--check"]) == 0
    assert f"{STATED['test']['perplexity']:.4f}" in capsys.readouterr().out
    (folder / "valid.txt").write_text("one cold morning .\n")
    assert make_tiny.main(["--folder", str(folder), "--check"]) == 1
    error = capsys.readouterr().err
    assert "valid.txt" in error and "train.txt" not in error and "make_tiny.py" in error


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "train.txt"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(make_tiny.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_tiny.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readme_states_these_numbers():
    readme = (FOLDER / "README.md").read_text()
    for split in SPLITS:
        best = STATED[split]
        assert (
            f"| {split} | {best['tokens']:,} | {best['perplexity']:.4f} | {best['nats_per_token']:.6f} |"
            in readme
        )
    rate = STATED["rate"]
    assert f"| endless text | | {rate['perplexity']:.4f} | {rate['nats_per_token']:.6f} |" in readme
    reached = (
        ", ".join(f"{n_gram_perplexity(order):.2f}" for order in (3, 5)) + f" and {n_gram_perplexity(6):.2f}"
    )
    assert f"test perplexity {reached}." in readme

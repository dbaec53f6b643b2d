"""data/tiny: the files are those of the generator, and the stated entropies are right."""

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


def read(split):
    lines = (FOLDER / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    return [word for line in lines for word in [*line.split(), EOS]]


# ---- probabilities, compared with a reader that enumerates all possible texts


class Stop(Exception):
    """The retold words differ from the given ones, or cover them."""


class Retelling(Teller):
    """Follow a script of option indices, then option 0, and compare the words with given ones."""

    def __init__(self, given, script):
        super().__init__(None)
        self.given, self.script = given, script
        self.sizes = []  # options at each choice so far
        self.probability = 1.0
        self.matched = 0

    def say(self, phrase):
        for word in phrase.split():
            if self.matched == len(self.given) or word != self.given[self.matched]:
                raise Stop
            self.matched += 1

    def pick(self, options):
        weights = options if isinstance(options, dict) else dict.fromkeys(options, 1)
        index = self.script[len(self.sizes)] if len(self.sizes) < len(self.script) else 0
        self.sizes.append(len(weights))
        option = list(weights)[index]
        self.probability *= weights[option] / sum(weights.values())
        self.say(option)
        return option


def prefix_probabilities(tell_all, given):
    """P(a text begins with the first n given words) for n = 0 ... len(given), from all texts that could."""
    mass = [0.0] * (len(given) + 1)
    script = []
    while True:
        retelling = Retelling(given, script)
        with contextlib.suppress(Stop):
            tell_all(retelling)
        # All texts that begin like this one are counted together, whatever follows the first different word.
        for n in range(retelling.matched + 1):
            mass[n] += retelling.probability
        script = script[: len(retelling.sizes)] + [0] * (len(retelling.sizes) - len(script))
        while script and script[-1] == retelling.sizes[len(script) - 1] - 1:
            script.pop()
        if not script:
            return mass
        script[-1] += 1


def test_word_probabilities_equal_those_of_an_exhaustive_reader():
    def tell_stories(teller):
        while True:
            Story(teller).run()

    stream = list(tokens_with_probabilities(seed=5, at_least=150))
    mass = prefix_probabilities(tell_stories, [word for word, _ in stream])
    assert mass[0] == pytest.approx(1.0, rel=1e-9)
    for n, (word, probability) in enumerate(stream):
        assert probability == pytest.approx(mass[n + 1] / mass[n], rel=1e-9), (n, word)


def test_options_with_common_first_words_share_their_weight():
    def word_probabilities(index):
        teller = Teller(lambda weights: index)
        teller.pick({"the old cat": 1, "the old dog": 2, "the end": 3, "a cat": 4})
        return teller.words

    assert word_probabilities(1) == [("the", 6 / 10), ("old", 3 / 6), ("dog", 2 / 3)]
    assert word_probabilities(3) == [("a", 4 / 10), ("cat", 1.0)]
    with pytest.raises(ValueError, match="'ran' must not be the beginning of another"):
        Teller(lambda weights: 0).pick(["ran", "ran away"])


@pytest.mark.parametrize("split", SPLITS)
def test_stated_entropy_is_the_mean_over_all_targets(split):
    """N tokens, one <eos> per line included, have N - 1 targets: the first token of the text is given."""
    told = list(tokens_with_probabilities(*SPLITS[split]))
    assert [word for word, _ in told] == read(split)
    nats = sum(-math.log(probability) for _, probability in told[1:]) / (len(told) - 1)
    assert STATED[split]["tokens"] == len(told)
    assert STATED[split]["nats_per_token"] == pytest.approx(nats, abs=1e-6)
    assert STATED[split]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


# ---- the files


def test_the_script_makes_the_files_byte_by_byte():
    made = make_tiny.files()
    assert made == {name: (FOLDER / name).read_bytes() for name in made}
    assert sorted(made) == ["entropy.json", "test.txt", "train.txt", "valid.txt"]


def test_relations_hold_in_the_text():
    """Owner and order are followed from the sentences alone."""
    checked = Counter()
    for story in re.split(r"(?m)^(?=one )", (FOLDER / "test.txt").read_text())[1:]:
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
                assert words[4] == (first if words[1] == comparative else second), story
            elif words[0] == "at":
                assert line.startswith(f"at last {owner} took the {thing} "), story
            elif words[1] == "played":
                assert line == f"{owner} played with the {thing} .", story
            elif words[1] == "asked":
                assert line == f"{other} asked for the {thing} .", story
            elif words[1] in ("waved", "ran"):
                assert {words[0], words[-2]} == children, story
            checked[words[1] if words[0] in children else words[0]] += 1
    assert min(checked[kind] for kind in ("then", "who", "the", "at", "played", "asked", "waved", "ran")) > 30


def n_gram_perplexity(order, discount=0.75):
    """Test perplexity of an interpolated Kneser-Ney model of `order` words (results/tiny/kneser_ney.txt)."""
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

    def probability(gram):
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


def test_a_model_of_the_last_five_words_is_far_from_the_optimum():
    assert n_gram_perplexity(6) == pytest.approx(2.1667, abs=1e-4)
    assert STATED["test"]["perplexity"] < 1.62

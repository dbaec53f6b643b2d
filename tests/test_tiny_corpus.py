"""data/tiny: the files are those of the generator, and the stated entropies are right."""

import contextlib
from pathlib import Path

import pytest

from data import make_tiny
from data.make_tiny import Story, Teller, tokens_with_probabilities

FOLDER = Path(make_tiny.__file__).parent / "tiny"

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


# ---- the files


def test_the_script_makes_the_files_byte_by_byte():
    made = make_tiny.files()
    assert made == {name: (FOLDER / name).read_bytes() for name in made}
    assert sorted(made) == ["entropy.json", "test.txt", "train.txt", "valid.txt"]

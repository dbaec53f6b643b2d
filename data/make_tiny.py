"""Write data/tiny: small stories whose best possible perplexity is known exactly.

    python data/make_tiny.py

Each story has two children, a thing that one of them owns, and an order (one is older, taller ...). After the
first sentences, many words are determined by RELATIONS: who has the thing, also after it was given away;
which child is the younger one; who the other child is. Everything else is a random choice with known weights.

Why the entropy is exact: a story is written from left to right, and each random choice is the choice of the
next words. The text shows every choice, so nothing stays hidden. The probability of a word given all words
before it is the share of the weights of those options that begin with the words written so far
(`Teller.pick`). Its negative logarithm, averaged over a file, is the loss of a reader who knows this script.
No model can be expected to do better.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tiny"
EOS = "<eos>"  # the end of a line; not written to the files
END = f". {EOS}"
SPLITS = {"train": (1, 150_000), "valid": (2, 15_000), "test": (3, 15_000)}  # seed, minimum number of tokens


GIRLS = ["anna", "emma", "lucy"]
BOYS = ["ben", "jack", "tom"]
THINGS = ["ball", "drum", "kite"]
COLORS = ["blue", "golden", "green", "red", "white", "yellow"]
PLACES = ["bridge", "castle", "forest", "garden", "lake", "market", "mill", "river", "tower", "well"]
WEATHER = ["bright", "cloudy", "cold", "foggy", "rainy", "snowy", "sunny", "windy"]
TIMES = ["morning", "noon", "afternoon", "evening"]
ANIMALS = ["bear", "cow", "crow", "deer", "duck", "fox", "frog", "hare", "horse", "mouse", "owl", "sheep"]
SIZES = ["big", "fat", "hungry", "lazy", "little", "quick", "shy", "small", "tired", "young"]
FEELINGS = ["cheerful", "clever", "happy", "lucky", "proud", "sleepy", "strong", "warm"]
FOODS = ["apples", "berries", "bread", "cake", "cheese", "honey", "nuts", "pears", "plums", "soup"]
ORDERS = {"older": "younger", "taller": "shorter", "stronger": "weaker", "faster": "slower"}

Options = Mapping[str, int] | Sequence[str]  # phrase -> weight, or phrases of equal weight
Choose = Callable[[list[int]], int]  # weights -> the index of the chosen option


class Teller:
    """Record words, each with its probability given all words before it.

    Args:
        choose: makes each choice; receives the weights of the options and returns an index.
    """

    def __init__(self, choose: Choose):
        self.choose = choose
        self.words: list[tuple[str, float]] = []

    def say(self, phrase: str) -> None:
        """Add words that are certain at this point."""
        self.words.extend((word, 1.0) for word in phrase.split())

    def pick(self, options: Options) -> str:
        """Choose a phrase, add its words and return it.

        Phrases may share their first words ("ran to", "ran away"). The probability of a word is the weight of
        all options that agree with the phrase up to this word, divided by the weight of those that agree up
        to the word before. No phrase may be the beginning of another: a reader could not know that the
        shorter one has ended.
        """
        weights = weighted(options)
        phrases = [tuple(phrase.split()) for phrase in weights]
        chosen = phrases[self.choose(list(weights.values()))]
        fitting = dict(zip(phrases, weights.values(), strict=True))
        for position, word in enumerate(chosen):
            before = sum(fitting.values())
            fitting = {phrase: weight for phrase, weight in fitting.items() if phrase[position] == word}
            self.words.append((word, sum(fitting.values()) / before))
        return " ".join(chosen)


def weighted(options: Options) -> dict[str, int]:
    """Return the weight of each phrase."""
    return dict(options) if isinstance(options, Mapping) else dict.fromkeys(options, 1)


class Story:
    """One story and its state: the children, the owner of the thing, and the order.

    The state has the same form before and after each episode, so any episode can follow any other.
    """

    def __init__(self, teller: Teller):
        self.tell = teller
        self.children: list[str] = []
        self.thing = ""
        self.owner = ""  # the child that has the thing
        self.comparative = ""
        self.first = ""  # the child that is older (taller ...)

    def other(self, child: str) -> str:
        return self.children[1 - self.children.index(child)]

    def begin(self) -> None:
        """Write the first three sentences: the children, the thing and the order."""
        tell = self.tell
        tell.say("one")
        tell.pick(WEATHER)
        tell.pick(TIMES)
        tell.pick({"at the": 3, "near the": 2, "behind the": 1})
        tell.pick(PLACES)
        child = tell.pick(GIRLS + BOYS)
        tell.pick({"met": 3, "called": 1})
        self.children = [child, tell.pick(BOYS if child in GIRLS else GIRLS)]
        tell.say(END)
        self.owner = tell.pick(self.children)
        tell.say("had a")
        tell.pick(COLORS)
        self.thing = tell.pick(THINGS)
        tell.say(f"and {self.other(self.owner)} had a")
        tell.pick(SIZES)
        tell.pick(ANIMALS)
        tell.say(END)
        self.first = tell.pick(self.children)
        tell.say("was")
        self.comparative = tell.pick(list(ORDERS))
        tell.say(f"than {self.other(self.first)} {END}")

    def episode(self) -> bool:
        """Write one sentence; return whether the story continues."""
        tell = self.tell
        opening = tell.pick(
            dict.fromkeys(self.children, 5) | {"who had the": 5, "the": 3, "then": 4, "at last": 3}
        )
        if opening in self.children:
            self.act(opening)
        elif opening == "who had the":
            tell.say(f"{self.thing} ? it was {self.owner}")
        elif opening == "the":
            word = tell.pick([self.comparative, ORDERS[self.comparative]])
            tell.say(f"child was {self.first if word == self.comparative else self.other(self.first)}")
        elif opening == "then":
            tell.say(f"{self.owner} gave the {self.thing} to {self.other(self.owner)}")
            self.owner = self.other(self.owner)
        else:
            tell.say(f"{self.owner} took the {self.thing}")
            tell.pick({"home": 2, "to bed": 1})
        tell.say(END)
        return opening != "at last"

    def act(self, child: str) -> None:
        """Write what a child does, after its name."""
        tell = self.tell
        play = "played with the" if child == self.owner else "asked for the"
        verb = tell.pick({play: 8, "saw a": 3, "waved to": 3, "felt": 2, "ran to the": 2, "ate": 2})
        if verb == play:
            tell.say(self.thing)
        elif verb == "saw a":
            tell.pick(SIZES)
            tell.pick(ANIMALS)
        elif verb == "waved to":
            tell.say(self.other(child))
        elif verb == "felt":
            tell.pick(FEELINGS)
        elif verb == "ran to the":
            tell.pick(PLACES)
            tell.say(f"with {self.other(child)}")
        else:
            tell.pick({"some": 2, "all the": 1})
            tell.pick(FOODS)

    def run(self) -> None:
        self.begin()
        while self.episode():
            pass


def tokens_with_probabilities(seed: int, at_least: int) -> Iterator[tuple[str, float]]:
    """Yield (token, its probability given all before it) of whole stories, `at_least` tokens in total."""
    generator = random.Random(seed)

    def choose(weights: list[int]) -> int:
        # Only random() is guaranteed to give the same numbers in all versions of Python.
        point = int(generator.random() * sum(weights))
        return next(index for index, end in enumerate(accumulate(weights)) if point < end)

    told = 0
    while told < at_least:
        teller = Teller(choose)
        Story(teller).run()
        told += len(teller.words)
        yield from teller.words


@cache
def tell_split(split: str) -> list[tuple[str, float]]:
    """Return the tokens of a file and their probabilities."""
    return list(tokens_with_probabilities(*SPLITS[split]))


def best_perplexity(split: str) -> dict[str, float]:
    """Return the loss of a reader who knows this script, on one of the files.

    The first token of a text is given, as for all language models of this project: N tokens have N - 1
    targets.
    """
    told = tell_split(split)
    nats = math.fsum(-math.log(probability) for _, probability in told[1:]) / (len(told) - 1)
    return {"tokens": len(told), "nats_per_token": round(nats, 6), "perplexity": round(math.exp(nats), 4)}


def text(split: str) -> str:
    """Return the text of a file: a sentence per line, words separated by spaces."""
    told = " ".join(word for word, _ in tell_split(split))
    return told.replace(f" {EOS} ", "\n").replace(f" {EOS}", "\n")


def files() -> dict[str, bytes]:
    """Return the content of each file by its name."""
    made = {f"{split}.txt": text(split).encode() for split in SPLITS}
    entropies = {split: best_perplexity(split) for split in SPLITS}
    made["entropy.json"] = (json.dumps(entropies, indent=2) + "\n").encode()
    return made


def main() -> None:
    """Write the files and print the entropies."""
    for name, content in files().items():
        (FOLDER / name).write_bytes(content)
    print((FOLDER / "entropy.json").read_text())


if __name__ == "__main__":
    main()

"""Write data/tiny: small stories whose best possible perplexity is known exactly.

    python data/make_tiny.py            write train.txt, valid.txt, test.txt and entropy.json
    python data/make_tiny.py --check    check that the files are byte for byte those of this script

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

import argparse
import json
import math
import random
import sys
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
COLOURS = ["blue", "golden", "green", "red", "white", "yellow"]
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
        for one in phrases:
            if any(one is not other and other[: len(one)] == one for other in phrases):
                raise ValueError(
                    f"option '{' '.join(one)}' must not be the beginning of another: {list(weights)}"
                )
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

    The state has the same form before and after each episode. So any episode can follow any other, with the
    same number of choices.
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
        tell.pick(COLOURS)
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
        # Owner and other child have the same number of words and choices, as class Story promises.
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


def entropy_rate() -> dict[str, float]:
    """Return the expected nats per token of an endless text: expected nats over expected tokens of a story.

    Stories are independent. Every episode has the same numbers of options with the same weights (see Story),
    and ends the story with a fixed probability, so a story has 1 / that probability episodes on average. It
    is enough to enumerate all beginnings and all single episodes.
    """
    start_nats, start_tokens, _ = expectation(lambda story: story.begin())
    both_nats, both_tokens, continued = expectation(lambda story: (story.begin(), story.episode())[1])
    episodes = 1 / (1 - continued)
    nats = start_nats + episodes * (both_nats - start_nats)
    tokens = start_tokens + episodes * (both_tokens - start_tokens)
    return {"nats_per_token": round(nats / tokens, 6), "perplexity": round(math.exp(nats / tokens), 4)}


def expectation(tell: Callable[[Story], bool | None]) -> tuple[float, float, float]:
    """Return expected nats, tokens and probability of a true result over all that `tell` can write."""
    nats = tokens = true = 0.0
    scripts: list[list[int]] = [[]]  # first choices of the texts still to be enumerated
    while scripts:
        teller = Enumerator(scripts.pop(), scripts)
        result = tell(Story(teller))
        nats += teller.probability * teller.nats
        tokens += teller.probability * len(teller.words)
        true += teller.probability * bool(result)
    return nats, tokens, true


class Enumerator(Teller):
    """Follow a script of option indices, then take the first options and add scripts for the others.

    Options of equal weight and length differ only in names. One of them represents all: otherwise there would
    be millions of texts.
    """

    def __init__(self, script: list[int], scripts: list[list[int]]):
        super().__init__(lambda weights: self.path[-1])
        self.script, self.scripts = script, scripts
        self.path: list[int] = []
        self.probability = 1.0
        self.nats = 0.0  # sum of the entropies of the choices so far

    def pick(self, options: Options) -> str:
        weights = weighted(options)
        shares = [weight / sum(weights.values()) for weight in weights.values()]
        self.nats -= sum(share * math.log(share) for share in shares)
        alike = len({(weight, len(phrase.split())) for phrase, weight in weights.items()}) == 1
        if len(self.path) < len(self.script):
            index = self.script[len(self.path)]
        else:
            index = 0
            self.scripts.extend(self.path + [other] for other in range(1, 1 if alike else len(shares)))
        self.path.append(index)
        self.probability *= 1.0 if alike else shares[index]
        return super().pick(options)


def text(split: str) -> str:
    """Return the text of a file: a sentence per line, words separated by spaces."""
    told = " ".join(word for word, _ in tell_split(split))
    return told.replace(f" {EOS} ", "\n").replace(f" {EOS}", "\n")


def files() -> dict[str, bytes]:
    """Return the content of each file by its name."""
    made = {f"{split}.txt": text(split).encode() for split in SPLITS}
    entropies = {split: best_perplexity(split) for split in SPLITS} | {"rate": entropy_rate()}
    made["entropy.json"] = (json.dumps(entropies, indent=2) + "\n").encode()
    return made


def main(argv: list[str] | None = None) -> int:
    """Write or check the files and print the entropies; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="folder of the files (default: data/tiny)"
    )
    args = parser.parse_args(argv)
    made = files()
    paths = {name: args.folder / name for name in made}
    if args.check:
        wrong = [
            name for name, path in paths.items() if not path.is_file() or path.read_bytes() != made[name]
        ]
        if wrong:
            print(f"error: missing or different in {args.folder}: {', '.join(wrong)}.", file=sys.stderr)
            print("To write the files: python data/make_tiny.py", file=sys.stderr)
            return 1
    else:
        try:
            args.folder.mkdir(parents=True, exist_ok=True)
            for name, path in paths.items():
                path.write_bytes(made[name])
        except OSError as error:
            print(f"error: cannot write into {args.folder}: {error.strerror}.", file=sys.stderr)
            print("Choose another --folder.", file=sys.stderr)
            return 2
    for name, best in json.loads(made["entropy.json"]).items():
        size = f"{best['tokens']:,} tokens" if "tokens" in best else "endless text"
        print(
            f"{name}: {size}, best possible perplexity {best['perplexity']:.4f} "
            f"({best['nats_per_token']:.6f} nats per token)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write data/tiny: small stories whose best possible perplexity is known exactly.

    python data/make_tiny.py            rewrite train.txt, valid.txt, test.txt and entropy.json
    python data/make_tiny.py --check    verify that the files are byte for byte what this script makes

Each story has three children, three things and an order among the children (older, taller ...). Once these are named,
many words are forced by RELATIONS: who holds the thing just mentioned (also after swaps), who is the youngest, who ran to
the place just mentioned. Everything else is a free choice with known weights.

Why the entropy is exact. A story is told from left to right, and every choice is the choice of the next words, so the text
shows each choice as it is made and nothing stays hidden. The probability of a word given all words before it is then the
share of the weight of the options that fit the words told so far (`Teller.pick`), and -log of it, averaged over a file, is
the loss of a reader who knows this script by heart. No model can expect to do better.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tiny"
EOS = "<eos>"  # stands for the end of a line; never written to the files
SPLITS = {"train": (1, 150_000), "valid": (2, 15_000), "test": (3, 15_000)}  # seed, tokens at least (EOS included)

GIRLS = "anna clara emma ida lucy mary nora rosa".split()
BOYS = "ben david finn hugo jack leo oscar tom".split()
THINGS = "ball bell boat book drum flute hat kite lamp ring shell whistle".split()
COLOURS = "black blue brown green red white yellow golden".split()
PLACES = "barn bridge castle church forest garden harbour lake market meadow mill river school tower".split()
WEATHER = "bright cloudy cold foggy rainy snowy sunny windy".split()
TIMES = "morning noon afternoon evening".split()
ANIMALS = "bear cat cow crow deer dog duck fox frog goat goose hare horse mouse owl sheep".split()
SIZES = "big fat hungry lazy little quick shy small tired young".split()
FEELINGS = "cheerful clever happy hungry lucky proud sleepy strong warm".split()
FOODS = "apples berries bread cake cheese honey nuts pears plums soup".split()
ORDERS = {  # comparative: (superlative of the first child, superlative of the last)
    "older": ("oldest", "youngest"),
    "taller": ("tallest", "shortest"),
    "faster": ("fastest", "slowest"),
    "stronger": ("strongest", "weakest"),
}

Options = Mapping[str, int] | Sequence[str]  # phrase -> weight, or phrases of equal weight
Choose = Callable[[list[int]], int]  # weights -> the index of the chosen option


class Teller:
    """Writes down words, each with its probability given everything told before it.

    Args:
        choose: decides each choice; receives the weights of the options and returns an index.
    """

    def __init__(self, choose: Choose):
        self.choose = choose
        self.words: list[tuple[str, float]] = []

    def say(self, phrase: str) -> None:
        """Tell words that are certain here."""
        self.words.extend((word, 1.0) for word in phrase.split())

    def pick(self, options: Options) -> str:
        """Choose a phrase, tell it and return it.

        Phrases may begin alike ("ran to", "ran away"): a word's probability is the weight of all options that agree with
        the phrase up to and including this word, divided by the weight of those that agree up to the word before.
        No phrase may begin with another whole phrase; the reader could not tell that the shorter one had ended.
        """
        weights = dict(options) if isinstance(options, Mapping) else dict.fromkeys(options, 1)
        phrases = [tuple(phrase.split()) for phrase in weights]
        for one in phrases:
            if any(one is not other and other[: len(one)] == one for other in phrases):
                raise ValueError(f"the option '{' '.join(one)}' must not be the beginning of another one: {list(weights)}")
        chosen = phrases[self.choose(list(weights.values()))]
        fitting = dict(zip(phrases, weights.values(), strict=True))
        for position, word in enumerate(chosen):
            before = sum(fitting.values())
            fitting = {phrase: weight for phrase, weight in fitting.items() if phrase[position] == word}
            self.words.append((word, sum(fitting.values()) / before))
        return " ".join(chosen)

    def end_line(self) -> None:
        self.say(f". {EOS}")


def without(items: Sequence[str], *used: str) -> list[str]:
    return [item for item in items if item not in used]


class Story:
    """The state of one story: who is there, who holds what, who comes before whom."""

    def __init__(self, teller: Teller):
        self.tell = teller
        self.children: list[str] = []
        self.holds: dict[str, str] = {}  # child -> thing
        self.colour: dict[str, str] = {}  # thing -> colour
        self.order: list[str] = []  # the oldest (tallest ...) child first
        self.comparative = ""

    # -- beginning: names the children, their things and their order ---------------------------------------------------
    def begin(self) -> None:
        tell = self.tell
        tell.say("one")
        tell.pick(WEATHER)
        tell.pick(TIMES)
        for joint in (",", "and", ""):
            self.children.append(tell.pick(without(GIRLS + BOYS, *self.children)))
            tell.say(joint)
        tell.pick({"met": 3, "played": 2, "sat": 1})
        tell.pick({"at the": 3, "near the": 2, "behind the": 1})
        tell.pick(PLACES)
        tell.end_line()
        for child, joint in zip(self.children, (",", "and", ""), strict=True):
            tell.say(child)
            tell.pick({"had a": 3, "brought a": 1})
            colour = tell.pick(without(COLOURS, *self.colour.values()))
            thing = tell.pick(without(THINGS, *self.colour))
            self.holds[child], self.colour[thing] = thing, colour
            tell.say(joint)
        tell.end_line()
        first = tell.pick(self.children)
        tell.say("was")
        self.comparative = tell.pick(list(ORDERS))
        tell.say("than")
        second = tell.pick(without(self.children, first))
        (third,) = without(self.children, first, second)
        tell.say(f"and {second} was {self.comparative} than {third}")
        tell.end_line()
        self.order = [first, second, third]

    # -- episodes: each leaves a story of the same shape, so that any may follow any other --------------------------------
    def ask(self) -> None:
        """Who holds it? The thing tells the child."""
        tell = self.tell
        tell.say("the")
        thing = tell.pick(list(self.colour))
        (holder,) = (child for child, held in self.holds.items() if held == thing)
        tell.say(f"? {holder} had the {self.colour[thing]} {thing}")

    def rank(self) -> None:
        """The superlative tells the child."""
        tell = self.tell
        first, last = ORDERS[self.comparative]
        superlative = tell.pick([first, last])
        tell.say(f"child , {self.order[0] if superlative == first else self.order[-1]} ,")
        tell.pick({"ate all the": 2, "wanted more": 1, "shared the": 1})
        tell.pick(FOODS)

    def act(self, one: str) -> None:
        tell = self.tell
        others = without(self.children, one)
        deed = tell.pick({"gave the": 4, "ran to the": 3, "waved to": 2, "sang because": 1, "smiled because": 1})
        if deed == "gave the":
            tell.say(f"{self.holds[one]} to")
            other = tell.pick(others)
            tell.say(f"and got the {self.holds[other]}")
            self.holds[one], self.holds[other] = self.holds[other], self.holds[one]
        elif deed == "ran to the":
            where = {tell.pick(PLACES): one}
            tell.say("but")
            other = tell.pick(others)
            tell.say("ran to the")
            where[tell.pick(without(PLACES, *where))] = other
            tell.end_line()
            tell.say("at the")
            tell.say(where[tell.pick(list(where))])
            tell.pick({"saw a": 2, "met a": 1})
            tell.pick(SIZES)
            tell.pick(ANIMALS)
        elif deed == "waved to":
            other = tell.pick(others)
            tell.say(f"and {other} waved back to {one}")
        else:
            tell.say("she was" if one in GIRLS else "he was")
            tell.pick(FEELINGS)

    # -- end ---------------------------------------------------------------------------------------------------------
    def end(self) -> None:
        tell = self.tell
        tell.pick({"home": 2, "to bed": 1})
        tell.say(":")
        for child, joint in zip(self.children, (",", "and", ""), strict=True):
            tell.say(f"{child} with the {self.holds[child]} {joint}")

    def run(self) -> None:
        self.begin()
        while True:
            opening = tell_opening(self)
            if opening == "who had":
                self.ask()
            elif opening == "the":
                self.rank()
            elif opening == "at last they went":
                self.end()
            else:
                self.act(opening)
            self.tell.end_line()
            if opening == "at last they went":
                return


def tell_opening(story: Story) -> str:
    return story.tell.pick({**dict.fromkeys(story.children, 4), "who had": 5, "the": 4, "at last they went": 5})


def tokens_with_probabilities(seed: int, at_least: int) -> Iterator[tuple[str, float]]:
    """Whole stories, until at least `at_least` tokens are told: (token, its probability given all tokens before it)."""
    generator = random.Random(seed)

    def choose(weights: list[int]) -> int:
        # Only random() is promised to stay the same from one Python version to the next; choices() and shuffle() are not.
        point = int(generator.random() * sum(weights))
        index = 0
        while point >= weights[index]:
            point -= weights[index]
            index += 1
        return index

    told = 0
    while told < at_least:
        teller = Teller(choose)
        Story(teller).run()
        told += len(teller.words)
        yield from teller.words


def best_perplexity(split: str) -> dict[str, float]:
    """The loss of the generator itself on one of its files.

    The first token of the stream is given, not predicted, as for every language model here: N tokens have N - 1 targets.
    """
    told = list(tokens_with_probabilities(*SPLITS[split]))
    nats = math.fsum(-math.log(probability) for _, probability in told[1:]) / (len(told) - 1)
    return {"tokens": len(told), "nats_per_token": round(nats, 6), "perplexity": round(math.exp(nats), 4)}


def text(split: str) -> str:
    """The text of a split's file: a sentence per line, words separated by spaces."""
    words = " ".join(word for word, _ in tokens_with_probabilities(*SPLITS[split]))
    return words.replace(f" {EOS} ", "\n").replace(f" {EOS}", "\n")


def files() -> dict[str, bytes]:
    """The name and content of every file that this script makes."""
    made = {f"{split}.txt": text(split).encode() for split in SPLITS}
    entropies = {split: best_perplexity(split) for split in SPLITS}
    made["entropy.json"] = (json.dumps(entropies, indent=2) + "\n").encode()
    return made


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that an interrupted run leaves the old file or the new one, never half."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file differs from what is made")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are (default: data/tiny)")
    args = parser.parse_args(argv)
    made = files()
    if args.check:
        wrong = [name for name, content in made.items()
                 if not (args.folder / name).is_file() or (args.folder / name).read_bytes() != content]
        if wrong:
            print(f"error: {', '.join(wrong)} in {args.folder} missing or changed; run python data/make_tiny.py", file=sys.stderr)
            return 1
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name, content in made.items():
            write_atomically(args.folder / name, content)
    for split, best in json.loads(made["entropy.json"]).items():
        print(f"{split}: {best['tokens']:,} tokens, best possible perplexity {best['perplexity']:.4f} "
              f"({best['nats_per_token']:.6f} nats per token)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write data/tiny: small stories whose best possible perplexity is known exactly.

    python data/make_tiny.py            rewrite train.txt, valid.txt, test.txt and entropy.json
    python data/make_tiny.py --check    verify that the files are byte for byte what this script makes

Each story has two children, a thing that one of them has, and an order (one is older, taller ...). Once this
is told, many words are forced by RELATIONS: who has the thing (also after it was given away), who the younger
child is, whose name comes back. Everything else is a free choice with known weights.

Why the entropy is exact. A story is told from left to right, and every choice is the choice of the next
words: the text shows each choice as it is made and nothing stays hidden. The probability of a word given
all words before it is then the share of the weight of the options that fit the words told so far
(`Teller.pick`); -log of it, averaged over a file, is the loss of a reader who knows this script by heart.
No model can expect to do better.
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
from functools import cache
from itertools import accumulate
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tiny"
EOS = "<eos>"  # stands for the end of a line; never written to the files
END = f". {EOS}"
SPLITS = {"train": (1, 150_000), "valid": (2, 15_000), "test": (3, 15_000)}  # seed, least number of tokens


def words(listed: str) -> list[str]:
    return listed.split()


GIRLS = words("anna emma lucy")
BOYS = words("ben jack tom")
THINGS = words("ball drum kite")
COLOURS = words("blue golden green red white yellow")
PLACES = words("bridge castle forest garden lake market mill river tower well")
WEATHER = words("bright cloudy cold foggy rainy snowy sunny windy")
TIMES = words("morning noon afternoon evening")
ANIMALS = words("bear cow crow deer duck fox frog hare horse mouse owl sheep")
SIZES = words("big fat hungry lazy little quick shy small tired young")
FEELINGS = words("cheerful clever happy lucky proud sleepy strong warm")
FOODS = words("apples berries bread cake cheese honey nuts pears plums soup")
ORDERS = {"older": "younger", "taller": "shorter", "stronger": "weaker", "faster": "slower"}

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

        Phrases may begin alike ("ran to", "ran away"): a word's probability is the weight of all options
        that agree with the phrase up to and including this word, divided by the weight of those that agree
        up to the word before. No phrase may be the beginning of another: a reader could not tell that the
        shorter one had ended.
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
    return dict(options) if isinstance(options, Mapping) else dict.fromkeys(options, 1)


class Story:
    """One story and its state: who is there, who has what, who is older.

    Between two episodes the state has the same shape (two children, a thing that one has, an order): any
    episode may follow any other, and offers the same number of choices wherever it comes.
    """

    def __init__(self, teller: Teller):
        self.tell = teller
        self.children: list[str] = []
        self.thing = ""
        self.owner = ""  # the child who has the thing
        self.comparative = ""
        self.first = ""  # the child who is older (taller ...) than the other

    def other(self, child: str) -> str:
        return self.children[1 - self.children.index(child)]

    def begin(self) -> None:
        """Name the children, the thing that one of them has, and their order."""
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
        """One sentence; returns whether the story goes on."""
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
        """What a child does, told from the verb on."""
        tell = self.tell
        # As many words and choices for the one as for the other, so that the state keeps its shape.
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
    """Tell whole stories until there are `at_least` tokens: (token, its probability given all before it)."""
    generator = random.Random(seed)

    def choose(weights: list[int]) -> int:
        # Only random() gives the same numbers in every version of Python; choices() and shuffle() need not.
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
    return list(tokens_with_probabilities(*SPLITS[split]))


def best_perplexity(split: str) -> dict[str, float]:
    """The loss of the generator itself on one of its files.

    As for every language model here, the first token of the stream is given: N tokens have N - 1 targets.
    """
    told = tell_split(split)
    nats = math.fsum(-math.log(probability) for _, probability in told[1:]) / (len(told) - 1)
    return {"tokens": len(told), "nats_per_token": round(nats, 6), "perplexity": round(math.exp(nats), 4)}


def entropy_rate() -> dict[str, float]:
    """Expected nats per token of an endless text: expected nats of a story over its expected length in
    tokens.

    Stories are independent, and an episode's choices have the same numbers of options and weights wherever
    it comes (see Story). So a story is its beginning and, as the episode that ends it comes with a fixed
    probability, on average 1 / that probability episodes: it is enough to go through all beginnings and all
    single episodes.
    """
    start_nats, start_tokens, _ = expectation(lambda story: story.begin())
    both_nats, both_tokens, goes_on = expectation(lambda story: (story.begin(), story.episode())[1])
    episodes = 1 / (1 - goes_on)
    nats = start_nats + episodes * (both_nats - start_nats)
    tokens = start_tokens + episodes * (both_tokens - start_tokens)
    return {"nats_per_token": round(nats / tokens, 6), "perplexity": round(math.exp(nats / tokens), 4)}


def expectation(tell: Callable[[Story], bool | None]) -> tuple[float, float, float]:
    """Expected nats, expected tokens and probability of a true result of `tell`, over all it can tell."""
    nats = tokens = true = 0.0
    scripts: list[list[int]] = [[]]  # how tellings begin that are still to be gone through
    while scripts:
        teller = Enumerator(scripts.pop(), scripts)
        result = tell(Story(teller))
        nats += teller.probability * teller.nats
        tokens += teller.probability * len(teller.words)
        true += teller.probability * bool(result)
    return nats, tokens, true


class Enumerator(Teller):
    """Follows a script of option indices, then takes first options and leaves scripts for the others.

    Options of equal weight and length are alike in this grammar: what follows them differs in the names
    only. One of them stands for all, or there would be millions of tellings.
    """

    def __init__(self, script: list[int], scripts: list[list[int]]):
        super().__init__(lambda weights: self.path[-1])
        self.script, self.scripts = script, scripts
        self.path: list[int] = []
        self.probability = 1.0
        self.nats = 0.0  # sum of the entropies of the choices met

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
    """The text of a split's file: a sentence per line, words separated by spaces."""
    told = " ".join(word for word, _ in tell_split(split))
    return told.replace(f" {EOS} ", "\n").replace(f" {EOS}", "\n")


def files() -> dict[str, bytes]:
    """The name and content of every file that this script makes."""
    made = {f"{split}.txt": text(split).encode() for split in SPLITS}
    entropies = {split: best_perplexity(split) for split in SPLITS} | {"rate": entropy_rate()}
    made["entropy.json"] = (json.dumps(entropies, indent=2) + "\n").encode()
    return made


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target and rename: an interrupted run leaves the old file or the new, never half."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file is not as made here"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: data/tiny)")
    args = parser.parse_args(argv)
    made = files()
    if args.check:
        paths = {name: args.folder / name for name in made}
        wrong = [
            name for name, path in paths.items() if not path.is_file() or path.read_bytes() != made[name]
        ]
        if wrong:
            print(f"error: missing or changed in {args.folder}: {', '.join(wrong)}.", file=sys.stderr)
            print("Run python data/make_tiny.py to write the files anew.", file=sys.stderr)
            return 1
    else:
        try:
            args.folder.mkdir(parents=True, exist_ok=True)
            for name, content in made.items():
                write_atomically(args.folder / name, content)
        except OSError as error:
            reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
            print(f"error: cannot write into {args.folder}: {reason}.", file=sys.stderr)
            print("Give another --folder.", file=sys.stderr)
            return 2
    for name, best in json.loads(made["entropy.json"]).items():
        size = f"{best['tokens']:,} tokens" if "tokens" in best else "of an endless text"
        print(
            f"{name}: {size}, best possible perplexity {best['perplexity']:.4f} "
            f"({best['nats_per_token']:.6f} nats per token)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

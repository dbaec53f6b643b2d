"""Words and punctuation marks: separated by spaces as in WikiText, and joined again.

"don't" becomes "don 't", "3,000" becomes "3 @,@ 000", "well-known" becomes "well @-@ known". As in WikiText,
a mark between @ is joined to the words on both sides. Here a mark may also have one @, on the side that is
joined. `separate` adds @ only where `join` would otherwise not restore the text. `join` drops a space that
separated text has too: before a closing mark ("Oui !", "5 %"), after an opening one, around a slash.
"""

import re

QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")
CLOSING = set(".,;:!?%)]}\u00bb")
OPENING = set("([{$\u00a3#\u00ab\u00bf\u00a1")
MARK = re.compile(
    r"""(--+ | \.\.+ | (?<=\d)[.,](?=\d) | (?<=[^\W_])-(?=[^\W_]) | ,
    | ^'(?:[stmd]|re|ve|ll)(?![\w']) | (?<=[\w.])'[^\W_]+          # 't in "don 't" and in "don't"
    | [][!?;:(){}'"|/%$&*+=#~_`\u20ac\u00a3\u00ab\u00bb\u00bf\u00a1\u2013\u2014\u2026])""",
    re.VERBOSE,
)
EXPLICIT = re.compile(r"(@?)(--+|\.\.+|[^\w\s@]|_)(@?)")
ABBREVIATIONS = """
    mr mrs ms messrs dr prof rev hon st mt sr jr col maj capt lt sgt gov gen vs etc cf viz al vol pp
    inc ltd corp dept jan feb aug sept oct nov dec
""".split()  # noqa: SIM905


def separate(text: str, lower: bool = False) -> str:
    """Separate words and punctuation marks by single spaces.

    The period after a word is separated too, except in acronyms (U.S.), and in abbreviations (Mr.) and
    initials (J.) inside a line. Curly quotation marks become straight. English text that is already separated
    does not change.

    Args:
        text: any text; its lines are kept.
        lower: convert to lower case.
    """
    text = "\n".join(map(_separate_line, text.translate(QUOTES).split("\n")))
    return text.lower() if lower else text


def join(text: str) -> str:
    """Join the punctuation marks of a separated text to its words.

    Straight quotation marks without @ are assumed to open and close alternately within a line.
    """
    lines = []
    for line in text.split("\n"):
        joined, glued, quotes = "", True, set()
        for word in line.split(" "):
            left, right = _sides(word, joined, quotes)
            explicit = EXPLICIT.fullmatch(word)
            joined += ("" if left or glued else " ") + (explicit[2] if explicit else word)
            glued = right
        lines.append(joined)
    return "\n".join(lines)


def _sides(word: str, before: str, quotes: set[str]) -> tuple[bool, bool]:
    """Return whether a word or mark is joined to what is on its left and on its right.

    Args:
        word: without spaces.
        before: the text or the word on its left.
        quotes: the quotation marks that are open in the line; updated.
    """
    explicit = EXPLICIT.fullmatch(word)
    if explicit and explicit[2] != word:
        return explicit[1] == "@", explicit[3] == "@"
    if word in ("'", '"'):
        if word == "'" and word not in quotes and before.endswith("s"):
            return True, False  # the brothers ' house
        quotes ^= {word}
        return word not in quotes, word in quotes
    joins_both = word == "/"
    return joins_both or word in CLOSING or len(word) > 1 and word[0] == "'", joins_both or word in OPENING


def _separate_line(line: str) -> str:
    words, glued, quotes = [], False, set()  # glued: join would put no space after the last word
    chunks = line.split()
    for place, chunk in enumerate(chunks, 1):
        pieces = [chunk] if EXPLICIT.fullmatch(chunk) else _split(chunk, place == len(chunks))
        for i, piece in enumerate(pieces):
            if not EXPLICIT.fullmatch(piece):
                words.append(piece)
                glued = False
                continue
            left, right = i > 0, i + 1 < len(pieces)  # what the text joins
            word_follows = right and not EXPLICIT.fullmatch(pieces[i + 1])
            open_before = set(quotes)
            joins_left, joins_right = _sides(piece, words[-1] if words else "", quotes)
            if left and not (joins_left or glued) or word_follows and not joins_right:
                piece, joins_right, quotes = "@" * left + piece + "@" * right, right, open_before
            words.append(piece)
            glued = joins_right
    return " ".join(words)


def _split(chunk: str, ends_line: bool) -> list[str]:
    """Return the words and marks of what is between two spaces."""
    pieces = []
    for piece in filter(None, MARK.split(chunk)):
        if pieces and re.match("'.", pieces[-1]) and piece[0] != "'" and not EXPLICIT.fullmatch(piece):
            pieces[-1] += piece  # more of a word that began at an apostrophe
            continue
        stem = piece.removesuffix(".")
        acronym = re.fullmatch(r"(\w{1,2}\.)+\w", stem)
        short = not ends_line and (re.fullmatch("[A-HJ-Z]", stem) or stem.lower() in ABBREVIATIONS)
        if stem in ("", piece) or stem.endswith(".") or acronym or short:
            pieces.append(piece)
        else:
            pieces += [stem, "."]
    return pieces

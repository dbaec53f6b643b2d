"""Separating punctuation from words, and joining it again."""

import re

import pytest
from conftest import fuzz
from hypothesis import given
from hypothesis import strategies as st

from corpora.punctuation import join, separate


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I don't, he'd.", "I don 't , he 'd ."),
        ("3,000 men at 1.5 km", "3 @,@ 000 men at 1 @.@ 5 km"),
        ("1,234,567 at 4:30", "1 @,@ 234 @,@ 567 at 4 @:@ 30"),
        ("a well-known man-of-war--here", "a well @-@ known man @-@ of @-@ war @--@ here"),
        ("(x) [y]: 5%; $3/4!", "( x ) [ y ] : 5 % ; $ 3 / 4 !"),
        ("Mr. J. Smith of the U.S. left.", "Mr. J. Smith of the U.S. left ."),
        ("It is I. We met Dr.\nNo.", "It is I . We met Dr .\nNo ."),
        ("\u201cWhat?\u201d\nhe said\u2026", '" What ? "\nhe said @\u2026'),
        ("the players' house, O'Brien's", "the players ' house , O 'Brien 's"),
        ("he said 'no.' Then... \u201eJa\u201c", "he said ' no . ' Then @... \" Ja \""),
        ("_The Times_ (word. \" x)", '_@ The Times @_ ( word . " x )'),
        ("www.site.com  <unk>\tx", "www.site.com <unk> x"),
        ("3 @,@ 000 @-@ don 't . \" x \" @\u2026 -- .", "3 @,@ 000 @-@ don 't . \" x \" @\u2026 -- ."),
        ('("Yes")', '( " Yes " )'),
        ("", ""),
    ],
)  # fmt: skip
def test_punctuation_is_separated_as_in_wikitext(text, expected):
    assert separate(text) == expected
    assert separate(text, lower=True) == expected.lower()


PROSE = """
I don't know; they've 3,000 well-known books (5% of 2.5 million)!
"Yes," he said, "and no." Then: "[...]?"
He'd come home at 4:30, and 'twas late; the brothers' house cost $3.5 or £20 and/or more. 'So?'
Then 'twas runnin' away--twice--and "It was--" "What?" asked O'Brien. The '60s... * * *
_The Times_ and (_The Mirror_) wrote of 1914–1918—*all* of it—in St. Paul's, Washington, D.C. A half." Quote.
C'est l'amitié, d'amitié aujourd'hui : qu'est-ce que «L'Odyssée»? — Oui, «Le Monde» l'a dit à 12h30.
Er sagte: »Ja, um 12.30 Uhr am 3. Mai.« Das kostet 3.000,50 € – oder? Z.B. die Nord-Süd-Straße, d. h. "fast".
—Hola —dijo Juan—. ¿Vienes a las 4:30? ¡No!—gritó ella—. «El Quijote» costó 1,5 euros.
L'ora dell'arte: un po' d'acqua, all'alba, «Così è (se vi pare)»; perché no? Un'altra volta, l'1,5 percento.

AT&T, 5 € and €5, word(s) and (s)he; a@b.c #1 * * *
"""


def test_prose_of_several_languages_is_restored():
    assert join(separate(PROSE)) == PROSE.replace("aujourd'hui :", "aujourd'hui:")  # the docs say so


CHARACTERS = "abS1.,;:!?'\"-_*—…()[]/$%«»¿é <> "


@fuzz(300)
@given(st.text(st.sampled_from(CHARACTERS)).map(lambda text: " ".join(text.split())))
def test_joining_can_only_drop_spaces_beside_marks(text):
    joined = join(separate(text))
    pattern = " ?".join(map(re.escape, joined.replace(" ", "\0"))).replace("\0", " ")
    assert re.fullmatch(pattern, text)
    assert re.findall(r"\w+ \w+", joined) == re.findall(r"\w+ \w+", text)

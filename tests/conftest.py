"""Fixtures that several test files share."""

import os
import random

from training import devices

import pytest
import torch
from hypothesis import HealthCheck, settings


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors: a second thread only makes the tests slower, and two test runs at once very slow."""
    torch.set_num_threads(1)
    devices.available_cores = lambda: 1


def fuzz(examples):
    """Run this many random examples, or as many as the variable FUZZ_EXAMPLES says."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    count = int(os.environ.get("FUZZ_EXAMPLES", examples))
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


def write_corpus(folder, lines=(170, 43, 41), seed=5):
    """A little text whose next word is fairly predictable; 23 words with <eos>, <unk> among them."""
    draw = random.Random(seed)
    animals = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
    places = ["barn", "lake", "mill", "nest", "road", "wood"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(("train", "valid", "test"), lines, strict=True):
        text = []
        for _ in range(count):
            first, second = draw.sample(animals, 2)
            text.append(
                f"the {first} saw the {second} at the {draw.choice(places)} and <unk> Übermut called {first}"
            )
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def corpus_folder(tmp_path):
    """A corpus of its own for a test: train 2380, valid 602, test 574 tokens."""
    return write_corpus(tmp_path / "corpus")

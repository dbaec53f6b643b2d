"""Regularisation of the language models: what is dropped, what is penalised, which weights are averaged.

The parts, each with its source, are those of the AWD-LSTM (Merity, Keskar & Socher 2018, arXiv:1708.02182):
    locked dropout      one mask for all time steps of a window: Gal & Ghahramani 2016, arXiv:1512.05287
    word dropout        whole rows of the embedding, one mask per window: the same paper
    weight drop         entries of the recurrent matrices, one mask per window: Merity, after Wan et al. 2013

A mask is drawn anew for every window, in training alone. It holds 0 where it drops and 1 / (1 - p) where it
keeps, so that the expectation of what it is multiplied with does not change and evaluation needs no factor.
Several replicas of a model each draw masks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor


def dropout_mask(like: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """A mask of this shape, of the dtype and device of `like`: 0 with probability p, else 1 / (1 - p)."""
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)


def dropout(x: Tensor, p: float, training: bool, locked: bool) -> Tensor:
    """Dropout of a window's vectors x (T, B, F): each element for itself; locked, one mask for all steps."""
    if not locked:
        return F.dropout(x, p, training)
    if not training or p == 0:
        return x
    return x * dropout_mask(x, (1, *x.shape[1:]), p)


def drop_words(embedded: Tensor, words: Tensor, vocab_size: int, p: float, training: bool) -> Tensor:
    """Dropout of whole rows of the embedding: a dropped word is zeros wherever it stands in the window.

    Args:
        embedded: the rows looked up, (T, B, E).
        words: their ids, (T, B), below vocab_size.
        p: probability of dropping a word of the vocabulary.

    Returns:
        (T, B, E). The matrix itself is untouched: a softmax tied to it sees all words.
    """
    if not training or p == 0:
        return embedded
    # One number per word, looked up like its row: the same as a masked matrix, without making one.
    return embedded * dropout_mask(embedded, (vocab_size, 1), p)[words]


def drop_weights(weights: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """Weight drop: the matrices by name, each times a fresh mask. Gradients reach the given ones."""
    return {name: weight * dropout_mask(weight, weight.shape, p) for name, weight in weights.items()}

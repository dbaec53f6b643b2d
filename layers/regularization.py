"""Regularization of the language models: dropout variants and averaged weights.

The sources:
    locked dropout      one mask for all time steps of a window: Gal & Ghahramani 2016, arXiv:1512.05287
    word dropout        whole rows of the embedding, one mask per window: arXiv:1512.05287; one mask for the
                        full batch, as in Merity, Keskar & Socher 2018, arXiv:1708.02182, section 4.3
    weight drop         entries of the recurrent matrices, one mask per window: arXiv:1708.02182, after Wan
                        et al. 2013

A mask is drawn for every window, in training only. It is 0 where it drops and 1 / (1 - p) elsewhere, so the
expectation does not change and evaluation needs no factor. Each replica of a model draws its own masks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout_mask(like: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Draw a mask on the device of `like`: 0 with probability p, else 1 / (1 - p).

    Its dtype is float32 or wider: in bfloat16 1 / (1 - p) would be rounded, to a mean of 0.998 at p = 0.4.
    The caller rounds the product.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=wide, device=like.device).bernoulli_(1 - p).div_(1 - p)


def dropout(x: Tensor, p: float, training: bool, locked: bool) -> Tensor:
    """Apply dropout to a window's vectors x (T, B, F); locked, with one mask for all time steps."""
    if not locked:
        return F.dropout(x, p, training)
    if not training or p == 0:
        return x
    return (x * dropout_mask(x, (1, *x.shape[1:]), p)).to(x.dtype)


def drop_words(embedded: Tensor, words: Tensor, vocab_size: int, p: float, training: bool) -> Tensor:
    """Apply dropout to whole rows of the embedding: a dropped word is zero everywhere in the window.

    Args:
        embedded: the embedded words, (T, B, E).
        words: their ids, (T, B), below vocab_size.
        p: probability of dropping a word of the vocabulary.

    Returns:
        (T, B, E). The embedding matrix is unchanged: a softmax tied to it scores all words.
    """
    if not training or p == 0:
        return embedded
    # A factor per word, looked up by its id: the same as masking the embedding matrix, without a copy of it.
    return (embedded * dropout_mask(embedded, (vocab_size, 1), p)[words]).to(embedded.dtype)


def drop_weights(weights: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """Return the matrices by name, each multiplied with a new mask; gradients reach the given ones."""
    return {
        name: (weight * dropout_mask(weight, weight.shape, p)).to(weight.dtype)
        for name, weight in weights.items()
    }


class WeightAverage:
    """A copy of a model whose weights are an exponential moving average of the model's after each step.

    The average starts as a plain mean, until 1 / (1 - decay) steps, so that the initial weights drop out.

    Args:
        model: the model in training; the copy is in eval mode.
        decay: decay of the average per step.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # deepcopy separates the weights; cuDNN needs one block of memory
        self.decay = decay
        self.steps = 0  # steps in the average

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step to the average."""
        self.steps += 1
        share = max(1 - self.decay, 1 / self.steps)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), share)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.steps = int(state["steps"])

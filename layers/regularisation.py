"""Regularisation of the language models: dropout variants, penalties, random windows, weight averages.

The parts of the AWD-LSTM (Merity, Keskar & Socher 2018, arXiv:1708.02182), each with its source:
    locked dropout      one mask for all time steps of a window: Gal & Ghahramani 2016, arXiv:1512.05287
    word dropout        whole rows of the embedding, one mask per window: the same paper; one mask for the
                        whole batch, as in Merity et al. 2018, section 4.3
    weight drop         entries of the recurrent matrices, one mask per window: Merity, after Wan et al. 2013
    AR and TAR          penalties on large and on quickly changing activations: Merity, McCann & Socher 2017,
                        arXiv:1708.01009
    random windows      windows of random length: Merity et al. 2018, section 4.1
    NT-ASGD             averaging that starts when validation stalls: the same, section 3; a plain mean of
                        the weights, after Polyak & Juditsky 1992
Also here:
    weight decay        decoupled from the gradient: Loshchilov & Hutter 2019, arXiv:1711.05101
    EMA                 exponential moving average of the weights

A mask is drawn for every window, in training only. It is 0 where it drops and 1 / (1 - p) elsewhere, so the
expectation does not change and evaluation needs no factor. Each replica of a model draws its own masks.
"""

from __future__ import annotations

import copy
import random
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


def activation_penalty(dropped: Tensor, raw: Tensor, ar: float, tar: float) -> Tensor:
    """Return AR + TAR of a window, a scalar to be added to its summed nats.

    Args:
        dropped: inputs of the output layer, after dropout, (T, B, E); AR penalises their squares.
        raw: outputs of the recurrent part, before projection and dropout, (T, B, F); TAR penalises the
            squares of their differences from step to step.
        ar, tar: the factors alpha and beta of the paper. An LSTM's outputs are within -1 and 1; projected
            ones may be larger, and alpha then weighs more.

    Returns:
        T * B * (ar * mean square + tar * mean square difference). Divided by the number of tokens, as the
        nats are, it is the penalty of the paper's code. The penalties of replicas add up.
    """
    wide = torch.promote_types(dropped.dtype, torch.float32)
    penalty = ar * dropped.square().mean(dtype=wide) if ar else dropped.new_zeros((), dtype=wide)
    if tar and len(raw) > 1:
        penalty = penalty + tar * (raw[1:] - raw[:-1]).square().mean(dtype=wide)
    return penalty * dropped.shape[:2].numel()


def parameter_groups(
    model: nn.Module, weight_decay: float, apart: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups: matrices decay, vectors (biases, gains of norms) do not.

    Args:
        apart: matrices for an additional last group.
    """
    parameters = [p for p in model.parameters() if not any(p is other for other in apart)]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [*groups, {"params": list(apart), "weight_decay": weight_decay}] if apart else groups


SHORTEST_WINDOW = 5
SHARE_OF_HALVES = 0.05


def window_stops(length: int, bptt: int, deviation: float | None, seed: int, epoch: int) -> list[int]:
    """Return the positions at which the windows of an epoch end; the last is `length`.

    Args:
        length: length of the columns in tokens.
        bptt: length of the windows; the last one may be shorter.
        deviation: None for windows of equal length. Else the standard deviation, in tokens, of normally
            distributed lengths: their mean is bptt (for 95 % of the windows) or half of it, and they are
            limited to 5 to 2 * bptt.
        seed, epoch: the only source of the random lengths, so a resumed run repeats them.
    """
    if deviation is None:
        return [*range(bptt, length, bptt), length]
    draw = random.Random(f"windows of epoch {epoch}, seed {seed}")
    stops = [0]
    while stops[-1] < length:
        mean = bptt / 2 if draw.random() < SHARE_OF_HALVES else bptt
        size = max(int(draw.gauss(mean, deviation)), min(SHORTEST_WINDOW, bptt))
        stops.append(min(stops[-1] + min(size, 2 * bptt), length))
    return stops[1:]


class WeightAverage:
    """A copy of a model whose weights are the average of the model's weights after each step.

    Args:
        model: the model in training; the copy is in eval mode.
        decay: decay of an exponential moving average. It starts as a plain mean and becomes the moving
            average after 1 / (1 - decay) steps, so the initial weights have no share in it. None: a plain
            mean (NT-ASGD), which `watch` starts.
        patience: the plain mean starts when a validation loss is above the best one, not counting the last
            `patience` losses.
    """

    def __init__(self, model: nn.Module, decay: float | None, patience: int = 5):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # deepcopy separates the weights; cuDNN needs one block of memory
        self.decay, self.patience = decay, patience
        self.started = decay is not None
        self.steps = 0  # steps in the average
        self.losses: list[float] = []  # validation losses

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step to the average, if it has started."""
        if not self.started:
            return
        self.steps += 1
        share = 1 / self.steps if self.decay is None else max(1 - self.decay, 1 / self.steps)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), share)

    def watch(self, loss: float) -> None:
        """Record an epoch's validation loss, which may start the plain mean."""
        if len(self.losses) > self.patience and loss > min(self.losses[: -self.patience]):
            self.started = True
        self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "started": self.started,
            "steps": self.steps,
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.started, self.steps = bool(state["started"]), int(state["steps"])
        self.losses = list(state["losses"])

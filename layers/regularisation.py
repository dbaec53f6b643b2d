"""Regularisation of the language models: what is dropped, what is penalised, which weights are averaged.

The parts, each with its source, are those of the AWD-LSTM (Merity, Keskar & Socher 2018, arXiv:1708.02182):
    locked dropout      one mask for all time steps of a window: Gal & Ghahramani 2016, arXiv:1512.05287
    word dropout        whole rows of the embedding, one mask per window: the same paper; one for the whole
                        batch, as in Merity et al. 2018, section 4.3
    weight drop         entries of the recurrent matrices, one mask per window: Merity, after Wan et al. 2013
    AR and TAR          penalties on large and on quickly changing activations: Merity, McCann & Socher 2017,
                        arXiv:1708.01009
    random windows      windows of random length: Merity et al. 2018, section 4.1
    NT-ASGD             averaging that starts when validation stalls: the same, section 3; a plain mean of
                        the weights, after Polyak & Juditsky 1992
Beside them:
    weight decay        decoupled from the gradient: Loshchilov & Hutter 2019, arXiv:1711.05101
    EMA                 exponential moving average of the weights

A mask is drawn anew for every window, in training alone. It holds 0 where it drops and 1 / (1 - p) where it
keeps, so that the expectation of what it is multiplied with does not change and evaluation needs no factor.
Several replicas of a model each draw masks of their own.
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
    """A mask of this shape, on the device of `like`: 0 with probability p, else 1 / (1 - p).

    It is of float32 at least: in bfloat16 1 / (1 - p) is rounded, to a mean of 0.998 at p = 0.4. Whoever
    multiplies by it rounds the product.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=wide, device=like.device).bernoulli_(1 - p).div_(1 - p)


def dropout(x: Tensor, p: float, training: bool, locked: bool) -> Tensor:
    """Dropout of a window's vectors x (T, B, F): each element for itself; locked, one mask for all steps."""
    if not locked:
        return F.dropout(x, p, training)
    if not training or p == 0:
        return x
    return (x * dropout_mask(x, (1, *x.shape[1:]), p)).to(x.dtype)


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
    return (embedded * dropout_mask(embedded, (vocab_size, 1), p)[words]).to(embedded.dtype)


def drop_weights(weights: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """Weight drop: the matrices by name, each times a fresh mask. Gradients reach the given ones."""
    return {
        name: (weight * dropout_mask(weight, weight.shape, p)).to(weight.dtype)
        for name, weight in weights.items()
    }


def activation_penalty(dropped: Tensor, raw: Tensor, ar: float, tar: float) -> Tensor:
    """AR + TAR of a window, a scalar that goes beside its summed nats.

    Args:
        dropped: vectors before the softmax, after dropout, (T, B, E): AR punishes their squares.
        raw: outputs of the recurrent part, before projection and dropout, (T, B, F): TAR punishes the squares
            of their differences from step to step.
        ar, tar: the factors alpha and beta of the paper. There what AR acts on lies between -1 and 1, as an
            LSTM's outputs do; after a projection it may not, and alpha then weighs more.

    Returns:
        T * B * (ar * mean square + tar * mean square difference): divided by the number of tokens, as the
        nats are, it is the penalty of the paper's code, and replicas' penalties add up.
    """
    wide = torch.promote_types(dropped.dtype, torch.float32)
    penalty = ar * dropped.square().mean(dtype=wide) if ar else dropped.new_zeros((), dtype=wide)
    if tar and len(raw) > 1:
        penalty = penalty + tar * (raw[1:] - raw[:-1]).square().mean(dtype=wide)
    return penalty * dropped.shape[:2].numel()


def parameter_groups(
    model: nn.Module, weight_decay: float, apart: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """An optimiser's groups: matrices decay, vectors (biases, gains of norms) do not.

    Args:
        apart: matrices that come in a last group of their own, which there is only if they are given.
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
    """Where the windows of an epoch end, the last at `length`.

    Args:
        length: places of the columns.
        bptt: length of the windows, the last as long as what is left.
        deviation: None, or for windows of random length their standard deviation in tokens. They are normally
            distributed around bptt (95 % of them) or half of it (the others), and cut to 5 to 2 * bptt.
        seed, epoch: the lengths depend on these alone, so that a resumed run finds them again.
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
    """A copy of a model whose weights are the average of the model's after each step.

    Args:
        model: the model in training; the copy is in eval mode.
        decay: of the exponential moving average. It starts as a plain mean, and becomes the moving average
            after 1 / (1 - decay) steps: nothing of the first weights is left over. None: a plain mean (ASGD)
            that starts when `watch` says so.
        patience: the plain mean starts when a validation loss is above the best of all but the last so many.
    """

    def __init__(self, model: nn.Module, decay: float | None, patience: int = 5):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # copied one by one; cuDNN wants them in one piece of memory
        self.decay, self.patience = decay, patience
        self.started = decay is not None
        self.steps = 0  # averaged over
        self.losses: list[float] = []  # of validation

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after a step."""
        if not self.started:
            return
        self.steps += 1
        share = 1 / self.steps if self.decay is None else max(1 - self.decay, 1 / self.steps)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), share)

    def watch(self, loss: float) -> None:
        """Tells of an epoch's validation loss, which may start the plain mean."""
        if len(self.losses) > self.patience and loss > min(self.losses[: -self.patience]):
            self.started = True
        self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "started": self.started,
            "steps": self.steps,
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.started, self.steps = bool(state["started"]), int(state["steps"])
        self.losses = list(state["losses"])

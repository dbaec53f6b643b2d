"""The task "Nth farthest" (arXiv:1806.01822, sections 4.1 and A.1): its examples and models.

A sequence shows K vectors of D dimensions, one per time step, each with a label. Every step repeats the
question "which vector is the n-th farthest from the vector labelled m?"; the answer is its label.

Shapes named in the comments of this file:
    B batch   K num_vectors, which is also the number of time steps, of labels and of classes   D num_dims
    F = 3 * K + D, the numbers per time step: (vector, label, n, m), the last three one-hot

Counting starts at 0: label 0 is the paper's label 1, and n = 0 is the farthest vector. For n = K - 1 the
answer is m, whose distance from itself is 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.fused import fused_precision
from layers.language_model import check_size, constructor_arguments
from relational_rnn_fast import FastRelationalMemory

MODELS = ("rmc", "lstm")

# RelationalMemory's keyword arguments in the paper's model of this task.
PUBLISHED_CORE = {
    "mem_slots": 8,
    "head_size": 32,
    "num_heads": 8,
    "num_blocks": 1,
    "forget_bias": 1.0,
    "input_bias": 0.0,
    "gate_style": "unit",
    "attention_mlp_layers": 2,
    "key_size": None,
    "init_scale": 1.0,
}


def make_batch(
    batch_size: int,
    num_vectors: int,
    num_dims: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    shown: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw fresh examples.

    The vectors are uniform in [-1, 1)^D, the labels a random permutation, n and m uniform.

    Args:
        batch_size: examples B.
        num_vectors: vectors K of a sequence.
        num_dims: dimensions D of a vector.
        generator: the only source of randomness, on the same device; its state advances.
        device: where the examples are made.
        shown: (k, d) for easier examples of the same shape, used by a curriculum; None for the full task.
            Only the last k steps (2 to K) hold a vector and its label, any of the K labels, and only the
            first d coordinates (1 to D) are not 0. The missing vectors count as infinitely far away and are
            never the answer, so n = K - 1 means m itself and n = K - 2 its nearest neighbour for any k.

    Returns:
        inputs: (B, K, F) float32.
        targets: (B,) int64, the labels that are the answers.
    """
    B, K, D = batch_size, num_vectors, num_dims
    vectors = torch.rand(B, K, D, generator=generator, device=device) * 2 - 1
    labels = torch.rand(B, K, generator=generator, device=device).argsort(dim=1)  # (B, K) permutations
    if shown is None:
        missing = 0
        n, m = (torch.randint(K, (B, 1), generator=generator, device=device) for _ in range(2))
    else:
        k, d = shown
        missing = K - k
        vectors[:, :, d:] = 0
        n, position = (
            missing + torch.randint(k, (B, 1), generator=generator, device=device) for _ in range(2)
        )
        m = labels.gather(1, position)

    is_reference = labels == m  # (B, K), one True per sequence
    reference = (vectors * is_reference.unsqueeze(2)).sum(dim=1, keepdim=True)  # (B, 1, D)
    distances = (vectors - reference).square().sum(dim=2)  # (B, K), squared: the order is the same
    if missing:
        distances[:, :missing] = math.inf
    farthest_first = distances.argsort(dim=1, descending=True)  # (B, K) positions
    targets = labels.gather(1, farthest_first.gather(1, n)).squeeze(1)

    rows = torch.cat([vectors, _one_hot(labels, K)], dim=2)
    if missing:
        rows[:, :missing] = 0
    question = torch.cat([_one_hot(n, K), _one_hot(m, K)], dim=2).expand(B, K, 2 * K)
    return torch.cat([rows, question], dim=2), targets


def _one_hot(indices: Tensor, size: int) -> Tensor:
    """Return (..., size) float32; twice as fast as F.one_hot(...).float()."""
    return (indices.unsqueeze(-1) == torch.arange(size, device=indices.device)).float()


def question_of(inputs: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Return n and m of each sequence, (B,) each, read from the inputs (B, K, F)."""
    n, m = inputs[:, 0, -2 * num_vectors :].split(num_vectors, dim=1)
    return n.argmax(dim=1), m.argmax(dim=1)


class NthFarthestModel(nn.Module):
    """A recurrent core that reads the sequence, and an MLP from its last output to logits of the K labels.

    Args:
        num_vectors, num_dims: sizes K and D of the task.
        model: 'rmc' for the relational memory core, 'lstm' for one nn.LSTM layer; the MLP is the same.
        hidden_size: units of the LSTM.
        head_layers, head_units: number and width of the MLP's hidden ReLU layers.
        input_scale: factor on the vectors' coordinates (not on the one-hot parts); 1 in the paper.
        memory_scale: factor on the identity matrix that is the initial memory; 1 in the paper.
        core: keyword arguments of RelationalMemory; PUBLISHED_CORE has the defaults.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(
        self,
        num_vectors: int = 8,
        num_dims: int = 16,
        model: str = "rmc",
        hidden_size: int = 512,
        head_layers: int = 4,
        head_units: int = 256,
        input_scale: float = 1.0,
        memory_scale: float = 1.0,
        **core: Any,
    ):
        core = PUBLISHED_CORE | core
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config  # plain data for a checkpoint: NthFarthestModel(**config) has the same shape
        for name in ("num_vectors", "num_dims", "hidden_size", "head_layers", "head_units"):
            check_size(name, config[name])
        for name in ("input_scale", "memory_scale"):
            value = config[name]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        self.num_vectors, self.num_dims = num_vectors, num_dims
        self.input_scale, self.memory_scale = input_scale, memory_scale
        input_size = 3 * num_vectors + num_dims
        if model == "rmc":
            self.core = FastRelationalMemory(input_size=input_size, **core)
            width = self.core.output_size
        elif model == "lstm":
            self.core = nn.LSTM(input_size, hidden_size, batch_first=True)
            width = hidden_size
        else:
            raise ValueError(f"model must be 'rmc' or 'lstm', got {model!r}")
        layers: list[nn.Module] = []
        for size in [width] + [head_units] * (head_layers - 1):
            layers += [nn.Linear(size, head_units), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(head_units, num_vectors))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K) of the answer, before any softmax, from inputs (B, K, F)."""
        inputs = self.scaled(inputs)
        if isinstance(self.core, nn.LSTM):
            with fused_precision(self.core):
                outputs, _ = self.core(inputs)
            return self.head(outputs[:, -1])
        output, _ = self.core(inputs, self.initial_memory(inputs.size(0)))
        return self.head(output)

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the vectors' coordinates multiplied by input_scale."""
        if self.input_scale == 1:
            return inputs
        vectors, rest = inputs.tensor_split([self.num_dims], dim=2)
        return torch.cat([vectors * self.input_scale, rest], dim=2)

    def initial_memory(self, batch_size: int) -> Tensor:
        """Return the memory before the first step, (B, mem_slots, mem_size)."""
        return self.core.initial_state(batch_size) * self.memory_scale

    def attention(self, inputs: Tensor) -> Tensor:
        """Return the first block's attention weights, (B, T, heads, rows, rows), from inputs (B, T, F).

        Rows are the memory's slots, then the input row. The last dimension is the row attended to; it sums
        to 1.
        """
        if isinstance(self.core, nn.LSTM):
            raise ValueError("an LSTM has no attention weights; use model='rmc'")
        return self.core.inspect(self.scaled(inputs), self.initial_memory(len(inputs))).attention[0]


@torch.no_grad()
def is_correct(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """Return which examples the model answers correctly, (B,) bool, computed batch_size at a time."""
    pieces = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    return torch.cat([model(part).argmax(dim=1) == answers for part, answers in pieces])


def accuracy_by_rank(correct: Tensor, n: Tensor, num_vectors: int) -> list[float]:
    """Return the accuracy for each n from 0 (the farthest) to K - 1 (m itself); NaN without examples."""
    return [correct[n == rank].double().mean().item() for rank in range(num_vectors)]


def loss_and_correct(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats and the number of correct answers, both () on the device."""
    logits = logits.float()
    return F.cross_entropy(logits, targets), (logits.argmax(dim=1) == targets).sum()

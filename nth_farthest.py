"""The task "Nth farthest" (arXiv:1806.01822, sections 4.1 and A.1): its examples, and models to solve it.

A sequence shows K vectors of D dimensions, one per time step, each with a label. The question, repeated at
every step, is "which vector is the n-th farthest from the vector labelled m?"; the answer is its label.

Shapes named in the comments of this file:
    B batch   K num_vectors, which is also the number of time steps, of labels and of classes   D num_dims
    F = 3 * K + D, the numbers per time step: (vector, label, n, m), the last three one-hot

Counting starts at 0 everywhere: label 0 is the paper's label 1, and n = 0 asks for the farthest vector. For
n = K - 1 the answer is m itself, at distance 0 from itself.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.language_model import check_size
from relational_rnn_general import RelationalMemory
from rnn_models import fused_precision

MODELS = ("rmc", "lstm")


def make_batch(
    batch_size: int,
    num_vectors: int,
    num_dims: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws fresh examples. All work is vectorised and stays on the device, so that a CUDA graph can hold it.

    For a curriculum there are easier examples of the same shape. With `shown` = (k, d) only the last k steps
    bring a vector and a label (any of the K labels), and only the first d coordinates of a vector are not 0.
    The question is about these k: missing vectors count as infinitely far away and are not asked for. So
    n = K - 1 asks for m itself and n = K - 2 for its nearest neighbour, whatever k is.

    Args:
        batch_size: examples B.
        num_vectors: vectors K of a sequence, uniform in [-1, 1)^D. Labels are a random permutation, so they
            tell nothing of the position; n and m are uniform.
        num_dims: dimensions D of a vector.
        generator: the only source of randomness, of the same device; it moves on by the batch drawn.
        device: where the examples are made.
        shown: (2,) int64 on that device: vectors k from 2 to K, dimensions d from 1 to D. A tensor, as a CUDA
            graph reads it anew at each replay. None for the full task.

    Returns:
        inputs: (B, K, F) float32.
        targets: (B,) int64, the labels that answer.

    Raises:
        ValueError: a size below 1.
    """
    B, K, D = batch_size, num_vectors, num_dims
    if min(B, K, D) < 1:
        raise ValueError(f"batch_size, num_vectors and num_dims must be at least 1, got {B}, {K} and {D}")
    vectors = torch.rand(B, K, D, generator=generator, device=device) * 2 - 1
    # A random permutation for each sequence: the label of each position, (B, K).
    labels = torch.rand(B, K, generator=generator, device=device).argsort(dim=1)
    if shown is None:
        n = torch.randint(K, (B, 1), generator=generator, device=device)
        m = torch.randint(K, (B, 1), generator=generator, device=device)
    else:
        k, d = shown
        vectors = vectors * (torch.arange(D, device=device) < d)
        # Both n and the position of m are among the last k of K. randint takes no tensor as its bound; the
        # remainder of so large a number is as good as uniform.
        n, position = K - 1 - torch.randint(2**62, (2, B, 1), generator=generator, device=device) % k
        m = labels.gather(1, position)

    is_reference = labels == m  # (B, K), one True per sequence
    reference = (vectors * is_reference.unsqueeze(2)).sum(dim=1, keepdim=True)  # (B, 1, D)
    distances = (vectors - reference).square().sum(dim=2)  # (B, K), squared: the order is the same
    if shown is not None:
        missing = torch.arange(K, device=device) < K - k  # (K,)
        distances = distances.masked_fill(missing, math.inf)
    farthest_first = distances.argsort(dim=1, descending=True)  # (B, K) positions
    targets = labels.gather(1, farthest_first.gather(1, n)).squeeze(1)

    question = torch.cat([_one_hot(n, K), _one_hot(m, K)], dim=2).expand(B, K, 2 * K)
    rows = torch.cat([vectors, _one_hot(labels, K)], dim=2)
    if shown is not None:
        rows = rows.masked_fill(missing.unsqueeze(1), 0)
    return torch.cat([rows, question], dim=2), targets


def _one_hot(indices: Tensor, size: int) -> Tensor:
    """(...) int64 -> (..., size) float32. F.one_hot may copy its argument to the host to check it."""
    return (indices.unsqueeze(-1) == torch.arange(size, device=indices.device)).float()


def question_of(inputs: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """n and m of each sequence, (B,) each, read back from the inputs (B, K, F)."""
    n, m = inputs[:, 0, -2 * num_vectors :].split(num_vectors, dim=1)
    return n.argmax(dim=1), m.argmax(dim=1)


class NthFarthestModel(nn.Module):
    """A recurrent core reads the sequence; from its last output an MLP makes the logits of the K labels.

    Args:
        num_vectors, num_dims: sizes of the task.
        model: 'rmc' for the relational memory core, 'lstm' for one nn.LSTM layer; the head is the same.
        mem_slots, head_size, num_heads, num_blocks, forget_bias, input_bias, gate_style,
            attention_mlp_layers, key_size: of the relational memory core.
        hidden_size: units of the LSTM.
        head_layers, head_units: hidden ReLU layers after the core, and their width.
        input_scale: factor on the vectors' coordinates (not on the one-hot parts). The paper's is 1.
        memory_scale: factor on the identity that the memory starts as. The paper's is 1.

    The unused core's settings decide nothing.

    Raises:
        ValueError: an argument outside its range; the message names it.
    """

    def __init__(
        self,
        num_vectors: int = 8,
        num_dims: int = 16,
        model: str = "rmc",
        mem_slots: int = 8,
        head_size: int = 32,
        num_heads: int = 8,
        num_blocks: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        gate_style: str | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        hidden_size: int = 512,
        head_layers: int = 4,
        head_units: int = 256,
        input_scale: float = 1.0,
        memory_scale: float = 1.0,
    ):
        super().__init__()
        for name, value in {
            "num_vectors": num_vectors,
            "num_dims": num_dims,
            "hidden_size": hidden_size,
            "head_layers": head_layers,
            "head_units": head_units,
        }.items():
            check_size(name, value)
        for name, value in {"input_scale": input_scale, "memory_scale": memory_scale}.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        # What rebuilds the model, as plain data for a checkpoint.
        self.config = {
            "num_vectors": num_vectors,
            "num_dims": num_dims,
            "model": model,
            "mem_slots": mem_slots,
            "head_size": head_size,
            "num_heads": num_heads,
            "num_blocks": num_blocks,
            "forget_bias": forget_bias,
            "input_bias": input_bias,
            "gate_style": gate_style,
            "attention_mlp_layers": attention_mlp_layers,
            "key_size": key_size,
            "hidden_size": hidden_size,
            "head_layers": head_layers,
            "head_units": head_units,
            "input_scale": input_scale,
            "memory_scale": memory_scale,
        }
        self.num_vectors, self.num_dims = num_vectors, num_dims
        self.input_scale, self.memory_scale = input_scale, memory_scale
        input_size = 3 * num_vectors + num_dims
        if model == "rmc":
            self.core = RelationalMemory(
                mem_slots,
                head_size,
                input_size,
                num_heads,
                num_blocks,
                forget_bias,
                input_bias,
                gate_style,
                attention_mlp_layers,
                key_size,
            )
            core_size = self.core.output_size
        elif model == "lstm":
            self.core = nn.LSTM(input_size, hidden_size, batch_first=True)
            core_size = hidden_size
        else:
            raise ValueError(f"model must be 'rmc' or 'lstm', got {model!r}")
        layers: list[nn.Module] = []
        for size in [core_size] + [head_units] * (head_layers - 1):
            layers += [nn.Linear(size, head_units), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(head_units, num_vectors))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K) of the answer, not yet passed through a softmax, from inputs (B, K, F)."""
        inputs = self.scaled(inputs)
        if isinstance(self.core, nn.LSTM):
            with fused_precision(inputs.device):
                outputs, _ = self.core(inputs)
            return self.head(outputs[:, -1])
        output, _ = self.core(inputs, self.initial_memory(inputs.size(0)))
        return self.head(output)

    def scaled(self, inputs: Tensor) -> Tensor:
        """The inputs with the vectors' coordinates multiplied by input_scale."""
        if self.input_scale == 1:
            return inputs
        vectors, rest = inputs.tensor_split([self.num_dims], dim=2)
        return torch.cat([vectors * self.input_scale, rest], dim=2)

    def initial_memory(self, batch_size: int) -> Tensor:
        """The memory core's state before the first step, (B, mem_slots, mem_size)."""
        return self.core.initial_state(batch_size) * self.memory_scale

    @torch.no_grad()
    def attention(self, inputs: Tensor) -> Tensor:
        """What the memory looks at: attention weights of the first block, (B, T, heads, rows, rows), from
        inputs (B, T, F).

        Rows are the memory's slots and then the input row; a query row's weights over the key rows (last) add
        up to 1.
        """
        if isinstance(self.core, nn.LSTM):
            raise ValueError("an LSTM has no attention to look at")
        memory, steps = self.initial_memory(inputs.size(0)), []
        for step_input in self.scaled(inputs).unbind(dim=1):
            memory, details = self.core.step(step_input, memory, return_details=True)
            steps.append(details.attention[0])
        return torch.stack(steps, dim=1)


@torch.no_grad()
def is_correct(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> Tensor:
    """Which examples the model gets right, (B,) bool, in pieces of batch_size."""
    pieces = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    return torch.cat([model(part).argmax(dim=1) == answers for part, answers in pieces])


def accuracy_by_rank(correct: Tensor, n: Tensor, num_vectors: int) -> list[float]:
    """Accuracy for each n from 0 (the farthest) to K - 1 (m itself); NaN where no example asks for it."""
    return [correct[n == rank].double().mean().item() for rank in range(num_vectors)]


def loss_and_correct(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats, and the number of right answers; both () and still on the device."""
    logits = logits.float()
    return F.cross_entropy(logits, targets), (logits.argmax(dim=1) == targets).sum()

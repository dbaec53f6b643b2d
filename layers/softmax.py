"""Output layers of the language models: full and adaptive softmax with one interface.

Neither holds the logits of all tokens, (n, V), at once.

Shapes: n tokens (batch and time flattened), H hidden_size, V vocab_size. Losses are in nats, summed over
the targets. A target below 0 is padding: it adds no loss and has no gradient.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of logits computed at once, by device type. On a CPU: enough for a fast product, few enough for the
# cache. On a GPU every chunk reads the whole weight twice and reads and writes its gradient, so larger chunks
# save time and cost memory.
CHUNK_ROWS = {"cpu": 256, "cuda": 2048}


class FullSoftmax(nn.Module):
    """Linear layer to the full vocabulary with softmax cross-entropy.

    Args:
        hidden_size: features H of the hidden vectors.
        vocab_size: number of words V.
        tied_weight: the embedding's weight (V, H), to share it (Press & Wolf 2017, arXiv:1608.05859); None
            creates a separate weight.
    """

    def __init__(self, hidden_size: int, vocab_size: int, tied_weight: nn.Parameter | None = None):
        super().__init__()
        if tied_weight is None:
            tied_weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
            # Small weights predict nearly uniformly, so the first loss is near ln V.
            nn.init.uniform_(tied_weight, -0.1, 0.1)
        self.weight = tied_weight
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p(target) in nats, a scalar; hidden (n, H), targets (n,)."""
        return linear_cross_entropy(hidden, self.weight, self.bias, targets)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities of all words, (n, H) -> (n, V)."""
        return _widened(F.linear(hidden, self.weight, self.bias)).log_softmax(dim=-1)


class AdaptiveSoftmax(nn.Module):
    """Adaptive softmax (Grave et al. 2017, arXiv:1609.04309): frequent words first, rare ones in clusters.

    Word ids must be sorted by descending frequency. The head scores the cutoffs[0] most frequent words and
    one entry per cluster. Cluster i scores the words from cutoffs[i] up to the next cutoff, from a projection
    to H / div_value ** (i + 1) features. The parameters have the names and shapes of
    torch.nn.AdaptiveLogSoftmaxWithLoss(head_bias=True).

    Args:
        hidden_size: features H of the hidden vectors.
        vocab_size: number of words V.
        cutoffs: increasing ids at which clusters begin, all between 1 and V - 1.
        div_value: factor by which the projection shrinks from cluster to cluster.

    Raises:
        ValueError: the cutoffs are not increasing or not below the vocabulary size.
    """

    def __init__(self, hidden_size: int, vocab_size: int, cutoffs: list[int], div_value: float = 4.0):
        super().__init__()
        cutoffs = list(cutoffs)
        bounds = [0, *cutoffs, vocab_size]
        valid = bool(cutoffs) and all(isinstance(cutoff, int) for cutoff in cutoffs)
        if not (valid and all(low < high for low, high in itertools.pairwise(bounds))):
            suggestion = " ".join(map(str, choose_cutoffs(vocab_size)))
            raise ValueError(
                "cutoffs must be increasing whole numbers, above 0 and below the vocabulary size "
                f"{vocab_size:,}, got {cutoffs}. Try --cutoffs {suggestion}."
            )
        self.cutoffs = cutoffs
        self.bounds = list(zip(cutoffs, [*cutoffs[1:], vocab_size], strict=True))
        # On the targets' device, to compare them with; not in checkpoints.
        self.register_buffer("starts", torch.tensor([*cutoffs, vocab_size]), persistent=False)
        self.head = nn.Linear(hidden_size, cutoffs[0] + len(self.bounds))
        # A cluster's entry starts with its number of words: all words start out equally likely.
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[cutoffs[0] :] = torch.tensor([high - low for low, high in self.bounds]).log()
        self.tail = nn.ModuleList()
        for cluster, (low, high) in enumerate(self.bounds):
            width = max(1, int(hidden_size / div_value ** (cluster + 1)))
            self.tail.append(
                nn.Sequential(
                    nn.Linear(hidden_size, width, bias=False), nn.Linear(width, high - low, bias=False)
                )
            )

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p(target) in nats, a scalar; hidden (n, H), targets (n,).

        Raises:
            IndexError: a target is not below the vocabulary size.
        """
        # 0 for a word of the head (and for padding), i + 1 for one of cluster i, the last for no word.
        part = torch.bucketize(targets.contiguous(), self.starts, right=True)
        # The number of rows per cluster depends on the data: here the host waits for a GPU.
        counts = (part.unsqueeze(1) == torch.arange(len(self.bounds) + 2, device=part.device)).sum(0).tolist()
        _, *rows_of, beyond = part.argsort(stable=True).split(counts)
        if len(beyond):
            size = self.bounds[-1][1]
            raise IndexError(
                f"target {targets[beyond[0]]} is out of bounds for a vocabulary of {size:,} words"
            )
        nats = _widened(hidden.new_zeros(()))
        for (project, score), (low, _), rows in zip(self.tail, self.bounds, rows_of, strict=True):
            # A cluster without targets stays in the graph: its gradient is then zero instead of None, which
            # replicas and optimizers need.
            nats = nats + linear_cross_entropy(project(hidden[rows]), score.weight, None, targets[rows] - low)
        head_targets = torch.where(part > 0, self.cutoffs[0] + part - 1, targets)
        return nats + linear_cross_entropy(hidden, self.head.weight, self.head.bias, head_targets)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities of all words, (n, H) -> (n, V)."""
        head = _widened(self.head(hidden)).log_softmax(dim=-1)
        parts = [head[:, : self.cutoffs[0]]]
        for cluster, tail in enumerate(self.tail):
            inside = _widened(tail(hidden)).log_softmax(dim=-1)
            parts.append(head[:, self.cutoffs[0] + cluster, None] + inside)
        return torch.cat(parts, dim=-1)


def choose_cutoffs(vocab_size: int) -> list[int]:
    """Return cutoffs for word frequencies that fall roughly as 1 / rank: 3, 15 and 60 % of the vocabulary.

    For WikiText-2 these are 1000, 5000 and 20000. A vocabulary below 5000 words gets one cutoff.

    Raises:
        ValueError: fewer than two words.
    """
    if vocab_size < 2:
        raise ValueError(
            f"adaptive softmax requires a vocabulary of at least 2 words, got {vocab_size}. Use the full "
            "softmax."
        )
    shares = (0.03, 0.15, 0.6) if vocab_size >= 5000 else (0.25,)
    return [max(1, int(float(f"{vocab_size * share:.1e}"))) for share in shares]  # two digits


def _widened(x: Tensor) -> Tensor:
    """Return x in float32 or wider, as sums of exponentials need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats of softmax(hidden @ weight.T + bias), computed in chunks.

    The gradients are computed in the forward pass, CHUNK_ROWS rows of logits at a time, because the logits of
    a full window would be by far its largest array. `plain_linear_cross_entropy` is the same function
    without chunks. Under autocast the products have the lower precision; the softmax and the sums do not.

    Args:
        hidden: (n, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (n,); values below 0 are ignored.

    Returns:
        A scalar.

    Raises:
        RuntimeError: in a backward pass with create_graph=True.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
            return _LinearCrossEntropy.apply(hidden, weight, bias, targets)
        nats, _ = _chunked_cross_entropy(hidden, weight, bias, targets, with_gradients=False)
        return nats


def plain_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Compute linear_cross_entropy the readable way: all logits at once, gradients by autograd."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        nats, gradients = _chunked_cross_entropy(hidden, weight, bias, targets, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return nats

    @staticmethod
    def backward(ctx, grad_nats):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative. Use plain_linear_cross_entropy."
            )
        gradients = (None if g is None else g * grad_nats.to(g.dtype) for g in ctx.saved_tensors)
        return *gradients, None


def _chunked_cross_entropy(hidden, weight, bias, targets, with_gradients):
    """Return the summed nats and, on demand, its gradients with respect to hidden, weight and bias."""
    full = torch.promote_types(hidden.dtype, torch.float32)
    nats = torch.zeros((), dtype=full, device=hidden.device)
    counted = (targets >= 0).to(full).unsqueeze(1)
    labels = targets.clamp(min=0).unsqueeze(1)
    # One buffer for the scores of all chunks: allocating each would take as long as the softmax.
    size = CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cpu"])
    buffer = torch.empty(min(size, hidden.size(0)), weight.size(0), dtype=full, device=hidden.device)
    if with_gradients:
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=full)
        grad_bias = None if bias is None else torch.zeros_like(bias)
    for start in range(0, hidden.size(0), size):
        rows = slice(start, start + size)
        chunk, label, counts = hidden[rows], labels[rows], counted[rows]
        scores = _scores(chunk, weight, bias, out=buffer[: chunk.size(0)])
        if with_gradients and scores.device.type == "cpu":
            logs, probabilities = _softmax_at_once(scores, label, chunk, weight, bias)
        else:
            # In place on a CPU only, whose kernel reads a row before it writes it.
            scores = torch.log_softmax(scores, dim=1, out=scores if scores.device.type == "cpu" else None)
            logs = scores.gather(1, label)
            probabilities = scores.exp_() if with_gradients else None
        nats -= (logs * counts).sum()
        if with_gradients:
            # d nats / d scores = softmax(scores) - onehot(label). Ignored rows are masked in the hidden
            # vectors, which are much smaller than the scores.
            errors = probabilities.scatter_add_(1, label, scores.new_full((), -1.0).expand_as(label))
            errors = errors.to(weight.dtype)
            counts = counts.to(weight.dtype)
            torch.mm(errors, weight, out=grad_hidden[rows]).mul_(counts)
            if errors.dtype == full:
                grad_weight.addmm_(errors.t(), chunk * counts)
            else:
                grad_weight += errors.t() @ (chunk * counts)
            if bias is not None:
                grad_bias += errors.t() @ counts.squeeze(1)
    return nats, ((grad_hidden, grad_weight.to(weight.dtype), grad_bias) if with_gradients else None)


_FADED = 1e-30  # smaller probabilities are near underflow, and their logarithm is inexact


def _softmax_at_once(scores, label, chunk, weight, bias):
    """Return the labels' log-probabilities (n, 1) and all probabilities (n, V), which overwrite the scores.

    On a CPU the exponentials take longer than anything but the products. They are computed once, and the
    logarithm is taken of the labels' probabilities only. Rows in which this probability is below _FADED are
    computed again. Finding these rows would synchronize with a GPU, so on a GPU log_softmax is used.
    """
    probabilities = torch.softmax(scores, dim=1, out=scores)
    picked = probabilities.gather(1, label)
    logs = picked.log()
    if (faded := picked.squeeze(1) < _FADED).any():
        fresh = scores.new_empty(int(faded.sum()), scores.size(1))
        fresh = _scores(chunk[faded], weight, bias, out=fresh).log_softmax(dim=1)
        logs[faded] = fresh.gather(1, label[faded])
    return logs, probabilities


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write hidden @ weight.T + bias to out, which may have a higher precision."""
    if hidden.dtype != out.dtype:
        out.copy_(hidden @ weight.t())
        return out if bias is None else out.add_(bias)
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)

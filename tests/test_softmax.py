"""The output layers against torch's own: values, every gradient, ignored targets."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layers import softmax
from layers.softmax import (
    AdaptiveSoftmax,
    FullSoftmax,
    choose_cutoffs,
    linear_cross_entropy,
    plain_linear_cross_entropy,
)

E, V, ROWS = 5, 23, 7
EXACT = {"rtol": 1e-12, "atol": 1e-12}
MAKE = pytest.mark.parametrize(
    "make", [lambda: FullSoftmax(E, V), lambda: AdaptiveSoftmax(E, V, [4, 11])], ids=["full", "adaptive"]
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 3 rows: 7 rows make two full chunks and a shorter one."""
    torch.manual_seed(1)
    monkeypatch.setitem(softmax.CHUNK_ROWS, "cpu", 3)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def sum_of_nats(hidden, weight, bias, targets):
    """Sum over the targets one by one, from the definition of the softmax."""
    total = hidden.new_zeros(())
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target >= 0:
            scores = weight @ row + (0 if bias is None else bias)
            total = total - torch.log(scores[target].exp() / scores.exp().sum())
    return total


# ---- the chunked cross-entropy


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 6, 7])
def test_chunked_cross_entropy_and_gradients_equal_the_definition(rows, with_bias):
    hidden, weight, bias = doubles(rows, E), doubles(V, E), doubles(V) if with_bias else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    targets = torch.randint(V, (rows,))
    targets[1::3] = -100
    results = [
        f(hidden, weight, bias, targets)
        for f in (sum_of_nats, linear_cross_entropy, plain_linear_cross_entropy)
    ]
    # The factor stands for the division by the number of tokens; it must reach every gradient.
    gradients = [torch.autograd.grad(-1.7 * nats, leaves) for nats in results]
    for nats, gradient in zip(results[1:], gradients[1:], strict=True):
        torch.testing.assert_close(nats, results[0], **EXACT)
        torch.testing.assert_close(gradient, gradients[0], **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, targets), results[0], **EXACT)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_with_vanishing_probability_has_its_exact_loss(dtype, with_bias):
    weight = torch.zeros(V, E, dtype=dtype)
    weight[:, 0] = torch.linspace(0.0, 1.0, V)
    sizes = torch.tensor(
        [1.0, 900.0, 2.0, 120.0, 98.0, 1e4], dtype=dtype
    )  # 98: e^-98 is subnormal in float32
    hidden = sizes[:, None] * torch.eye(1, E, dtype=dtype)
    bias = torch.linspace(-1.0, 1.0, V, dtype=dtype) if with_bias else None
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    targets = torch.tensor([0, 0, 4, 1, 0, -100])
    results = [f(hidden, weight, bias, targets) for f in (linear_cross_entropy, plain_linear_cross_entropy)]
    assert results[1] > 900
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result, leaves) for result in results))


def test_second_derivative_is_rejected():
    hidden = doubles(ROWS, E)
    nats = linear_cross_entropy(hidden, doubles(V, E), None, torch.randint(V, (ROWS,)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(nats, hidden, create_graph=True)


def test_no_tensor_of_all_tokens_by_all_words_exists():
    rows, words = 60, 500
    hidden, weight = torch.randn(rows, E, requires_grad=True), torch.randn(words, E, requires_grad=True)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            parts = result if isinstance(result, tuple) else (result,)
            sizes.extend(part.numel() for part in parts if isinstance(part, torch.Tensor))
            return result

    with Sizes():
        linear_cross_entropy(hidden, weight, None, torch.randint(words, (rows,))).backward()
    assert max(sizes) <= max(weight.numel(), 3 * words)


# ---- full softmax


def test_bfloat16_is_summed_in_float32():
    layer = FullSoftmax(E, V).to(torch.bfloat16)
    hidden = torch.randn(ROWS, E, dtype=torch.bfloat16, requires_grad=True)
    nats = layer(hidden, torch.randint(V, (ROWS,)))
    assert nats.dtype == layer.log_probabilities(hidden).dtype == torch.float32
    nats.backward()
    assert hidden.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


# ---- both


@MAKE
def test_probabilities_sum_to_one_and_agree_with_the_loss(make):
    layer = make().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    hidden, targets = doubles(ROWS, E), torch.randint(V, (ROWS,))
    logs = layer.log_probabilities(hidden)
    torch.testing.assert_close(logs.exp().sum(dim=1), torch.ones(ROWS).double(), **EXACT)
    torch.testing.assert_close(layer(hidden, targets), -logs.gather(1, targets.unsqueeze(1)).sum(), **EXACT)


# ---- adaptive softmax


@pytest.mark.parametrize("cutoffs", [[4], [4, 11], [1, 2, 22]])
def test_adaptive_softmax_equals_torchs_own(cutoffs):
    width = 70  # tails of 17, 4 and 1 features
    ours = AdaptiveSoftmax(width, V, cutoffs).double()
    theirs = nn.AdaptiveLogSoftmaxWithLoss(width, V, cutoffs, div_value=4.0, head_bias=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())  # strict: same names, same shapes
    hidden, targets = doubles(40, width), torch.randint(V, (40,))
    nats, expected = ours(hidden, targets), theirs(hidden, targets).loss * 40
    torch.testing.assert_close(nats, expected, **EXACT)
    weights, reference = dict(ours.named_parameters()), dict(theirs.named_parameters())
    gradients = torch.autograd.grad(nats, (hidden, *weights.values()))
    expected = torch.autograd.grad(expected, (hidden, *(reference[name] for name in weights)))
    torch.testing.assert_close(gradients, expected, **EXACT)
    torch.testing.assert_close(ours.log_probabilities(hidden), theirs.log_prob(hidden), **EXACT)


def test_cluster_without_targets_gets_a_zero_gradient():
    layer = AdaptiveSoftmax(E, V, [4, 11])
    layer(torch.randn(ROWS, E), torch.tensor([0, 1, 2, 3, -100, 4, 10])).backward()
    assert all(not parameter.grad.any() for parameter in layer.tail[1].parameters())
    assert layer.tail[0][0].weight.grad.any() and layer.head.weight.grad.any()


@pytest.mark.parametrize("vocab_size", [2, 3, 50, 4999, 5000, 33278, 267735])
def test_chosen_cutoffs_give_equal_first_probabilities(vocab_size):
    cutoffs = choose_cutoffs(vocab_size)
    assert all(1 <= cutoff < vocab_size for cutoff in cutoffs)
    logs = AdaptiveSoftmax(8, vocab_size, cutoffs).log_probabilities(torch.zeros(1, 8))
    torch.testing.assert_close(logs, torch.full_like(logs, -math.log(vocab_size)))


def test_chosen_cutoffs():
    assert choose_cutoffs(33278) == [1000, 5000, 20000]
    with pytest.raises(ValueError, match="at least 2 words, got 1"):
        choose_cutoffs(1)


@pytest.mark.parametrize("cutoffs", [[], [0, 5], [5, 5], [11, 4], [4, V], [4.0], ["4"]])
def test_bad_cutoffs_are_rejected_with_a_suggestion(cutoffs):
    with pytest.raises(ValueError, match=r"cutoffs must be increasing.*size 23, got \[.*Try --cutoffs 5\."):
        AdaptiveSoftmax(E, V, cutoffs)


@MAKE
def test_target_beyond_the_vocabulary_is_rejected_with_the_size(make):
    with pytest.raises((IndexError, RuntimeError), match=r"\b23\b.*\b(23|out of bounds)\b.*23"):
        make()(torch.randn(2, E), torch.tensor([1, 23]))

"""The output layers against torch's own: values, every gradient, targets that do not count."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers import softmax as output_layers
from layers.softmax import AdaptiveSoftmax, FullSoftmax, choose_cutoffs, linear_cross_entropy

E, V, ROWS = 5, 23, 7
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 3 rows: 7 rows then make two full chunks and a rest of one."""
    torch.manual_seed(1)
    monkeypatch.setitem(output_layers.CHUNK_ROWS, "cpu", 3)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def sum_of_nats(hidden, weight, bias, targets):
    """One target after the other, from the definition of the softmax."""
    total = hidden.new_zeros(())
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target >= 0:
            scores = weight @ row + (0 if bias is None else bias)
            total = total - torch.log(scores[target].exp() / scores.exp().sum())
    return total


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 6, 7])
def test_chunked_cross_entropy_and_its_gradients_equal_the_definition(rows, with_bias):
    hidden, weight, bias = doubles(rows, E), doubles(V, E), doubles(V) if with_bias else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    targets = torch.randint(V, (rows,))
    targets[1::3] = -100
    got, expected = (f(hidden, weight, bias, targets) for f in (linear_cross_entropy, sum_of_nats))
    torch.testing.assert_close(got, expected, **EXACT)
    # A scale above: the mean over tokens divides the sum, and its factor must reach every gradient.
    gradients, reference = (torch.autograd.grad(-1.7 * nats, leaves) for nats in (got, expected))
    torch.testing.assert_close(gradients, reference, **EXACT)


def test_plain_cross_entropy_is_the_same_function():
    hidden, weight, bias = doubles(ROWS, E), doubles(V, E), doubles(V)
    targets = torch.tensor([3, -100, 0, V - 1, -1, 5, 5])
    results = [f(hidden, weight, bias, targets)
               for f in (linear_cross_entropy, output_layers.plain_linear_cross_entropy)]
    torch.testing.assert_close(*results, **EXACT)
    gradients = [torch.autograd.grad(result, (hidden, weight, bias)) for result in results]
    torch.testing.assert_close(*gradients, **EXACT)


def test_gradients_are_those_of_finite_differences():
    targets = torch.tensor([3, -100, 0, V - 1])
    assert torch.autograd.gradcheck(lambda h, w, b: linear_cross_entropy(h, w, b, targets),
                                    (doubles(4, E), doubles(V, E), doubles(V)))


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    hidden, weight, bias = doubles(ROWS, E), doubles(V, E), doubles(V)
    targets = torch.randint(V, (ROWS,))
    results = []
    for size in (1, 2, 7, 256):
        monkeypatch.setitem(output_layers.CHUNK_ROWS, "cpu", size)
        nats = linear_cross_entropy(hidden, weight, bias, targets)
        results.append((nats, *torch.autograd.grad(nats, (hidden, weight, bias))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)


def test_chunks_are_larger_on_a_gpu():
    assert output_layers.chunk_rows(torch.device("cuda", 1)) == 2048
    for other in ("cpu", "meta"):
        assert output_layers.chunk_rows(torch.device(other)) == 3


def test_scores_far_apart_do_not_overflow():
    hidden, weight = torch.full((2, 1), 1e3, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    nats = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 1]))
    assert nats.item() == pytest.approx(2000)
    nats.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_label_whose_probability_fades_to_nothing_has_its_exact_cost(dtype, with_bias):
    weight = torch.zeros(V, E, dtype=dtype)
    weight[:, 0] = torch.linspace(0.0, 1.0, V)
    hidden = torch.tensor([1.0, 900.0, 2.0, 120.0, 1e4], dtype=dtype)[:, None] * torch.eye(1, E, dtype=dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    leaves += [torch.linspace(-1.0, 1.0, V, dtype=dtype).requires_grad_()] if with_bias else []
    targets = torch.tensor([0, 0, 4, 1, -100])
    results = [
        f(*leaves[:2], leaves[2] if with_bias else None, targets)
        for f in (linear_cross_entropy, output_layers.plain_linear_cross_entropy)
    ]
    assert results[1] > 900
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result, leaves) for result in results]
    torch.testing.assert_close(*gradients)


def test_ignored_targets_cost_nothing_and_have_no_gradient():
    hidden, weight, bias = doubles(ROWS, E), doubles(V, E), doubles(V)
    targets = torch.full((ROWS,), -100)
    nats = linear_cross_entropy(hidden, weight, bias, targets)
    assert nats.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(nats, (hidden, weight, bias)))


@pytest.mark.parametrize("make", [lambda: FullSoftmax(E, V), lambda: AdaptiveSoftmax(E, V, [4, 11])],
                         ids=["full", "adaptive"])
def test_rows_with_ignored_targets_may_as_well_be_left_out(make):
    layer = make().double()
    hidden, targets = doubles(ROWS, E), torch.randint(V, (ROWS,))
    targets[[1, 4]] = -100
    kept = targets >= 0
    whole, part = layer(hidden, targets), layer(hidden[kept], targets[kept])
    torch.testing.assert_close(whole, part, **EXACT)
    leaves = (hidden, *layer.parameters())
    torch.testing.assert_close(torch.autograd.grad(whole, leaves), torch.autograd.grad(part, leaves), **EXACT)


def test_a_tied_weight_gets_the_gradients_of_both_uses():
    embedding = nn.Embedding(V, E).double()
    tokens, targets = torch.randint(V, (2, ROWS))
    layer = FullSoftmax(E, V, embedding.weight).double()
    assert layer.weight is embedding.weight
    (together,) = torch.autograd.grad(layer(torch.tanh(embedding(tokens)), targets), embedding.weight)

    embed, score = (embedding.weight.detach().clone().requires_grad_() for _ in range(2))
    nats = F.cross_entropy(F.linear(torch.tanh(embed[tokens]), score, layer.bias), targets, reduction="sum")
    by_embed, by_score = torch.autograd.grad(nats, (embed, score))
    torch.testing.assert_close(together, by_embed + by_score, **EXACT)


def test_the_same_loss_with_and_without_gradients():
    layer, hidden, targets = FullSoftmax(E, V), torch.randn(ROWS, E), torch.randint(V, (ROWS,))
    with torch.no_grad():
        without = layer(hidden, targets)
    torch.testing.assert_close(layer(hidden, targets), without, rtol=1e-6, atol=0)  # other roundings
    assert not without.requires_grad


def test_a_second_derivative_is_refused():
    hidden, weight = doubles(ROWS, E), doubles(V, E)
    nats = linear_cross_entropy(hidden, weight, None, torch.randint(V, (ROWS,)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(nats, hidden, create_graph=True)


def test_no_array_of_all_tokens_by_all_words_ever_exists():
    """Long inputs and a large vocabulary: with all logits at once the largest tensor would be rows x V."""
    rows, words = 60, 500
    hidden, weight = torch.randn(rows, E, requires_grad=True), torch.randn(words, E, requires_grad=True)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,))
                         if isinstance(t, torch.Tensor))
            return result

    with Sizes():
        linear_cross_entropy(hidden, weight, None, torch.randint(words, (rows,))).backward()
    assert max(sizes) <= max(weight.numel(), 3 * words)


@pytest.mark.parametrize("cutoffs", [[4], [4, 11], [1, 2, 22]])
def test_adaptive_softmax_equals_torchs_own_in_loss_gradients_and_log_probabilities(cutoffs):
    width = 70                                                      # tails of 17, 4 and 1 features
    ours = AdaptiveSoftmax(width, V, cutoffs).double()
    theirs = nn.AdaptiveLogSoftmaxWithLoss(width, V, cutoffs, div_value=4.0, head_bias=True).double()
    theirs.load_state_dict(ours.state_dict())                       # strict: same names, same shapes
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    hidden, targets = doubles(40, width), torch.randint(V, (40,))
    nats, expected = ours(hidden, targets), theirs(hidden, targets).loss * 40
    torch.testing.assert_close(nats, expected, **EXACT)
    names = [name for name, _ in ours.named_parameters()]
    gradients = torch.autograd.grad(nats, (hidden, *ours.parameters()))
    reference = dict(theirs.named_parameters())
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, (hidden, *(reference[name] for name in names))), **EXACT)
    torch.testing.assert_close(ours.log_probabilities(hidden), theirs.log_prob(hidden), **EXACT)


def test_adaptive_softmax_without_a_target_in_some_cluster_still_gives_every_parameter_a_gradient():
    layer, hidden = AdaptiveSoftmax(E, V, [4, 11]), torch.randn(ROWS, E)
    layer(hidden, torch.tensor([0, 1, 2, 3, -100, 4, 10])).backward()          # none in the last cluster
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(not parameter.grad.any() for parameter in layer.tail[1].parameters())
    assert layer.head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [lambda: FullSoftmax(E, V), lambda: AdaptiveSoftmax(E, V, [4, 11])],
                         ids=["full", "adaptive"])
def test_probabilities_of_all_words_sum_to_one_and_agree_with_the_loss(make, dtype):
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    hidden, targets = torch.randn(ROWS, E, dtype=dtype), torch.randint(V, (ROWS,))
    log_probabilities = layer.log_probabilities(hidden)
    assert log_probabilities.shape == (ROWS, V) and log_probabilities.dtype == dtype
    near = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(log_probabilities.exp().sum(dim=1), torch.ones(ROWS, dtype=dtype), **near)
    torch.testing.assert_close(
        layer(hidden, targets), -log_probabilities.gather(1, targets.unsqueeze(1)).sum(), **near)


def test_half_precision_is_summed_in_single_precision():
    layer = FullSoftmax(E, V).to(torch.bfloat16)
    hidden = torch.randn(ROWS, E, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V, (ROWS,))
    nats = layer(hidden, targets)
    assert nats.dtype == torch.float32 and layer.log_probabilities(hidden).dtype == torch.float32
    nats.backward()
    assert hidden.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("vocab_size", [2, 3, 50, 4999, 5000, 33278, 267735])
def test_chosen_cutoffs_make_an_adaptive_softmax_whose_words_start_out_alike(vocab_size):
    cutoffs = choose_cutoffs(vocab_size)
    assert all(1 <= cutoff < vocab_size for cutoff in cutoffs) and sorted(set(cutoffs)) == cutoffs
    layer = AdaptiveSoftmax(8, vocab_size, cutoffs)
    log_probabilities = layer.log_probabilities(torch.zeros(1, 8))
    torch.testing.assert_close(log_probabilities, torch.full_like(log_probabilities, -math.log(vocab_size)))


def test_chosen_cutoffs_of_wikitext_2():
    assert choose_cutoffs(33278) == [1000, 5000, 20000]


@pytest.mark.parametrize("cutoffs", [[], [0, 5], [5, 5], [11, 4], [4, V], [4, V + 1]])
def test_bad_cutoffs_are_refused_with_the_numbers_and_a_proposal(cutoffs):
    with pytest.raises(ValueError, match=r"cutoffs must be increasing.*size 23, got \[.*Try --cutoffs 5\."):
        AdaptiveSoftmax(E, V, cutoffs)


def test_a_vocabulary_of_one_word_cannot_be_divided():
    with pytest.raises(ValueError, match="at least 2 words, got 1"):
        choose_cutoffs(1)


def test_a_tied_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"tied_weight must have shape \(23, 5\), got \(5, 23\)"):
        FullSoftmax(E, V, nn.Parameter(torch.zeros(E, V)))

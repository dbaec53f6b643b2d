"""Regularization: one mask per window, kept expectations, unchanged evaluation, equal paths, the average."""

import pytest
import torch
from test_language_models import EXACT, MODELS, NAMES, B, T, V, build, gradients
from torch import nn

import relational_rnn_models
import rnn_models
from layers import regularization

E = 6  # of the models
ALL = {"locked_dropout": True, "dropout_words": 0.3, "dropout_weights": 0.5, "dropout_input": 0.4}
ALL |= {"dropout_output": 0.2}


def window(model):
    torch.manual_seed(2)
    tokens, targets = torch.randint(V, (2, B, T))
    return tokens, targets, 0.5 * torch.randn_like(model.initial_state(B))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.fixture
def masks(monkeypatch):
    """Every mask that is drawn, in order."""
    drawn, original = [], regularization.dropout_mask

    def noted(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    for module in (regularization, relational_rnn_models, rnn_models):
        monkeypatch.setattr(module, "dropout_mask", noted)
    return drawn


# ---- masks


def test_mask_drops_with_its_probability_and_keeps_the_expectation():
    torch.manual_seed(1)
    mask = regularization.dropout_mask(torch.zeros(1, dtype=torch.float64), (200, 300), 0.3)
    assert mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0, 1 / 0.7}
    # 60,000 draws: the standard deviation of the share dropped is 0.0019.
    assert (mask == 0).double().mean().item() == pytest.approx(0.3, abs=0.008)


def test_bfloat16_keeps_the_expectation_and_the_type():
    """1 / 0.6 is 1.6640625 in bfloat16, a mean of 0.9984; 3 / 0.6 is exactly 5."""
    torch.manual_seed(1)
    x = torch.full((T, B, 4000), 3.0, dtype=torch.bfloat16)
    for dropped in (
        regularization.dropout(x, 0.4, True, locked=True),
        regularization.drop_words(x, torch.randint(V, (T, B)), V, 0.4, True),
        regularization.drop_weights({"w": x.flatten(0, 1)}, 0.4)["w"],
    ):
        assert dropped.dtype == torch.bfloat16 and dropped.unique().tolist() == [0, 5]


def test_word_dropout_equals_a_masked_matrix(masks):
    embedding = nn.Embedding(V, E).double()
    torch.manual_seed(1)
    words = torch.randint(V, (40, B))
    dropped = regularization.drop_words(embedding(words), words, V, 0.5, True)
    expected = (embedding.weight * masks[0])[words]
    assert masks[0].shape == (V, 1) and 0 < (masks[0] == 0).sum() < V
    torch.testing.assert_close(dropped, expected, rtol=0, atol=0)
    found = (torch.autograd.grad(x.square().sum(), embedding.weight) for x in (dropped, expected))
    torch.testing.assert_close(*found, **EXACT)


# ---- in the models


@NAMES
def test_evaluation_is_unchanged(name):
    more = {"dropout_candidate": 0.4} if name in ("rmc", "rmc-adaptive") else {}
    plain, regular = build(name), build(name, **ALL, **more)
    regular.load_state_dict(plain.state_dict())
    given = window(plain)
    expected = plain.eval()(*given)
    torch.testing.assert_close(regular.eval()(*given), expected, rtol=0, atol=0)
    assert regular.train()(*given)[0] != expected[0]


@NAMES
def test_locked_dropout_has_one_mask_per_window(name, masks):
    model = build(name, locked_dropout=True, dropout_input=0.5, dropout_output=0.5)
    tokens, _, state = window(model)
    hidden, _ = model.hidden(tokens, state)
    assert [mask.shape for mask in masks] == [(1, B, E), (1, B, hidden.size(2))]
    kept = (masks[1] != 0).expand_as(hidden)
    assert not hidden[~kept].any() and ("relu" in name or hidden[kept].all())  # a ReLU may give 0
    model.hidden(tokens, state)
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[1], masks[3])


@NAMES
def test_weight_drop_equals_a_model_with_dropped_weights(name, masks):
    """One mask per window on the named matrices, with gradients for the raw weights."""
    model, by_hand = build(name, dropout_weights=0.5), build(name)
    part, prefix = (by_hand.core, "core.") if "rmc" in name else (by_hand, "")
    tokens, targets, state = window(model)
    results = []
    for _ in range(2):
        masks.clear()
        nats, after = model(tokens, targets, state)
        found = gradients(model, nats.sum() + after.square().sum())
        results.append(nats)

        by_hand.load_state_dict(model.state_dict())
        dropped = {key: part.get_parameter(key) for key in model.recurrent_weights()}
        assert [mask.shape for mask in masks] == [weight.shape for weight in dropped.values()]
        with torch.no_grad():
            for weight, mask in zip(dropped.values(), masks, strict=True):
                weight.mul_(mask)
        nats_by_hand, after_by_hand = by_hand(tokens, targets, state)
        torch.testing.assert_close((nats, after), (nats_by_hand, after_by_hand), **EXACT)
        expected = gradients(by_hand, nats_by_hand.sum() + after_by_hand.square().sum())
        for key, mask in zip(dropped, masks, strict=True):
            expected[prefix + key] *= mask
        torch.testing.assert_close(found, expected, **EXACT)
    assert results[0] != results[1]


def test_weight_drop_acts_on_the_matrices_that_multiply_the_state():
    names = {name: set(build(name).recurrent_weights()) for name in MODELS}
    qkv = "blocks.0.qkv_projection.weight"
    gates = "memory_gate_projection.weight"
    assert names["rmc-adaptive"] == {qkv, "blocks.1.qkv_projection.weight", gates}
    assert names["rmc-untied"] == {qkv}
    assert names["lstm"] == {"rnn.weight_hh_l0", "upper.0.weight_hh_l0"}


@pytest.mark.parametrize("name, changes", [("rmc", {}), ("lstm", {"fused": False})])
def test_candidate_dropout_lets_dropped_features_only_fade(name, changes, masks):
    """Without a candidate the forget gate shrinks a feature and keeps its sign. One mask per window."""
    model = build(name, dropout_candidate=0.5, **changes)
    tokens, targets, state = window(model)
    after = [model(tokens, targets, state)[1] for _ in range(2)][0]
    layers = 1 if name == "rmc" else 2
    assert len(masks) == 2 * layers and not torch.equal(masks[0], masks[layers])
    dropped = (masks[0] if name == "rmc" else torch.stack(masks[:2], dim=1)) == 0
    before, after = state[:, -dropped.size(1) :], after[:, -dropped.size(1) :]  # an LSTM's cells come last
    assert torch.equal(after[dropped].sign(), before[dropped].sign())
    assert (after[dropped].abs() < before[dropped].abs()).all()
    assert not torch.equal(after[~dropped].sign(), before[~dropped].sign())
    model.eval()(tokens, targets, state)
    assert len(masks) == 2 * layers


def test_lstm_cell_with_a_mask_scales_what_torchs_own_adds_to_the_cells():
    torch.manual_seed(1)
    x, hidden, cells = (torch.randn(3, width).double() for width in (4, 3, 3))
    ih, hh, bias_ih, bias_hh = weights = [torch.randn(s).double() for s in ((12, 4), (12, 3), (12,), (12,))]
    mask = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]]).double()
    found = rnn_models.lstm_cell(x, (hidden, cells), *weights, candidate_mask=mask)
    _, forget, _, out = (x @ ih.t() + bias_ih + hidden @ hh.t() + bias_hh).sigmoid().chunk(4, dim=1)
    kept = forget * cells
    expected = kept + mask * (torch.lstm_cell(x, (hidden, cells), *weights)[1] - kept)
    torch.testing.assert_close(found, (out * torch.tanh(expected), expected), **EXACT)


@pytest.mark.parametrize("options", [{}, ALL, ALL | {"dropout_hidden": 0.5}], ids=["plain", "all", "hidden"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("model", rnn_models.LAYERS)
def test_fused_layers_equal_a_loop_of_cells(model, layers, options, masks):
    """The same random numbers give the same results and gradients."""
    changes = {"model": model, "num_layers": layers, **options}
    fused, loop = (build("lstm", **changes, fused=fused) for fused in (True, False))
    loop.load_state_dict(fused.state_dict())
    tokens, targets, given = window(fused)
    weigh, found = torch.randn_like(given), []
    for each in (fused, loop):
        torch.manual_seed(5)
        state = given.clone().requires_grad_()
        nats, after = each(tokens, targets, state)
        found.append((nats, after, gradients(each, nats.sum() + (after * weigh).sum()), state.grad))
    torch.testing.assert_close(*found, **EXACT)
    # Per model: words, input, weight_hh of each layer, between the layers, output.
    between = (layers - 1) * ("dropout_hidden" in options)
    assert len(masks) == (2 * (3 + layers + between) if options else 0)


# ---- the average


def test_average_equals_a_loop_over_the_weights():
    model = nn.Linear(3, 2).double()
    average = regularization.WeightAverage(model, 0.75)
    torch.manual_seed(1)
    expected = None
    for step in range(1, 12):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        average.update(model)
        weights = [weight.detach().clone() for weight in model.parameters()]
        expected = expected or weights
        share = max(0.25, 1 / step)
        expected = [old + share * (new - old) for old, new in zip(expected, weights, strict=True)]
    torch.testing.assert_close(list(average.model.parameters()), expected, **EXACT)
    assert not any(weight.requires_grad for weight in average.model.parameters())


def test_averaged_copy_is_tied_in_eval_mode_and_flattened(monkeypatch):
    flattened = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda layer: flattened.append(layer))  # for cuDNN
    model = build("lstm-tied")  # two layers, each flattened on its own
    flattened.clear()
    copy = regularization.WeightAverage(model, 0.5).model
    assert flattened == [copy.rnn, *copy.upper] and len(copy.upper) == 1 and not copy.training
    assert copy.output_layer.weight is copy.embedding.weight is not model.embedding.weight

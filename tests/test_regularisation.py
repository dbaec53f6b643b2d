"""Regularisation: one mask per window, expectations kept, evaluation untouched, every path the same."""

import pytest
import torch
from torch import nn

import regularisation
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM

B, T, V, E = 3, 5, 29, 6
EXACT = {"rtol": 1e-10, "atol": 1e-10}
RMC = {"embedding_size": E, "mem_slots": 2, "head_size": 4, "num_heads": 3, "key_size": 7,
       "attention_mlp_layers": 2}
RNN = {"embedding_size": E, "hidden_size": 11, "num_layers": 2, "dropout_hidden": 0.0}
MODELS = {
    "rmc": (RelationalMemoryLM, RMC),
    "rmc-2-blocks": (RelationalMemoryLM, {**RMC, "num_blocks": 2, "gate_style": "memory", "mem_slots": 1}),
    "rmc-no-gates": (RelationalMemoryLM, {**RMC, "gate_style": None, "cutoffs": [5]}),
    "lstm": (RNNLM, RNN),
    "lstm-project": (RNNLM, {**RNN, "tied": True, "project": True}),
    "gru": (RNNLM, {**RNN, "model": "GRU"}),
    "relu": (RNNLM, {**RNN, "model": "RNN_RELU", "num_layers": 1}),
}
NAMES = pytest.mark.parametrize("name", MODELS)


def build(name, **changes):
    torch.manual_seed(1)
    kind, config = MODELS[name]
    config = {**config, "dropout_input": 0.0, "dropout_output": 0.0, **changes}
    return kind(V, **config).double().train()


def window(seed=2):
    torch.manual_seed(seed)
    return torch.randint(V, (B, T)), torch.randint(V, (B, T))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def masks(monkeypatch):
    """Every mask that is drawn, in order."""
    drawn, original = [], regularisation.dropout_mask

    def noted(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(regularisation, "dropout_mask", noted)
    return drawn


# ---- masks


def test_a_mask_drops_with_its_probability_and_keeps_the_expectation():
    torch.manual_seed(1)
    mask = regularisation.dropout_mask(torch.zeros(1, dtype=torch.float64), (200, 300), 0.3)
    assert mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0, 1 / 0.7}
    # 60,000 draws: the share dropped has deviation 0.0019, the mean 0.0027.
    assert (mask == 0).double().mean().item() == pytest.approx(0.3, abs=0.008)
    assert mask.mean().item() == pytest.approx(1, abs=0.011)


def test_locked_dropout_is_the_same_at_all_steps_and_another_per_sequence_and_window():
    torch.manual_seed(1)
    x = torch.ones(T, B, 50)
    first, second = (regularisation.dropout(x, 0.4, True, locked=True) for _ in range(2))
    for dropped in (first, second):
        assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert not torch.equal(first, second) and not torch.equal(first[:, 0], first[:, 1])
    loose = regularisation.dropout(x, 0.4, True, locked=False)
    assert not torch.equal(loose[0], loose[1])


def test_word_dropout_equals_a_masked_matrix(masks):
    embedding = nn.Embedding(V, E).double()
    torch.manual_seed(1)
    words = torch.randint(4, (40, B))  # few words, so that each stands in many places
    dropped = regularisation.drop_words(embedding(words), words, V, 0.5, True)
    matrix = embedding.weight * masks[0]
    assert masks[0].shape == (V, 1) and 0 < (masks[0][:4] == 0).sum() < 4
    torch.testing.assert_close(dropped, matrix[words], rtol=0, atol=0)
    weigh = torch.randn_like(dropped)
    by_lookup, by_matrix = (torch.autograd.grad((x * weigh).sum(), embedding.weight)[0]
                            for x in (dropped, matrix[words]))
    torch.testing.assert_close(by_lookup, by_matrix, **EXACT)


@pytest.mark.parametrize("part", ["dropout", "drop_words"])
def test_nothing_is_drawn_without_training_or_with_probability_zero(part, masks):
    x, words = torch.randn(T, B, E), torch.randint(V, (T, B))
    state = torch.get_rng_state()
    for p, training in ((0.5, False), (0.0, True)):
        if part == "dropout":
            assert regularisation.dropout(x, p, training, locked=True) is x
        else:
            assert regularisation.drop_words(x, words, V, p, training) is x
    assert not masks and torch.equal(torch.get_rng_state(), state)


# ---- in the models

ALL = {"locked_dropout": True, "dropout_words": 0.3, "dropout_weights": 0.5, "dropout_input": 0.4,
       "dropout_output": 0.2}


@NAMES
def test_evaluation_is_untouched_by_all_of_it(name):
    plain, regular = build(name), build(name, **ALL)
    regular.load_state_dict(plain.state_dict())
    tokens, targets = window()
    state = 0.5 * torch.randn_like(plain.initial_state(B))
    expected = plain.eval()(tokens, targets, state)
    torch.testing.assert_close(regular.eval()(tokens, targets, state), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert regular.train()(tokens, targets, state)[0] != expected[0]
    assert type(regular)(**regular.config).config == regular.config


@NAMES
def test_locked_dropout_in_the_model_has_one_mask_per_window(name, masks):
    model = build(name, locked_dropout=True, dropout_input=0.5, dropout_output=0.5)
    tokens, _ = window()
    hidden, _ = model.hidden(tokens, model.initial_state(B))
    shapes = [tuple(mask.shape) for mask in masks]
    assert shapes == [(1, B, E), (1, B, hidden.size(2))]
    kept = (masks[1] != 0).expand_as(hidden)
    # ReLU units may be zero by themselves; what is dropped is zero at every step.
    assert not hidden[~kept].any() and (name == "relu" or hidden[kept].all())
    model.hidden(tokens, model.initial_state(B))
    assert len(masks) == 4 and not torch.equal(masks[0], masks[2]) and not torch.equal(masks[1], masks[3])


@NAMES
def test_weight_drop_equals_a_model_with_the_dropped_weights_set_by_hand(name, masks):
    """One mask per window on the matrices it names, another in the next; its gradient by the raw weights."""
    model, by_hand = build(name, dropout_weights=0.5), build(name)
    tokens, targets = window()
    state = 0.5 * torch.randn_like(model.initial_state(B))
    results = []
    for _ in range(2):
        masks.clear()
        nats, after = model(tokens, targets, state)
        found = gradients(model, nats.sum() + after.square().sum())
        results.append(nats)

        by_hand.load_state_dict(model.state_dict())
        owner = by_hand.core if hasattr(by_hand, "core") else by_hand.rnn
        dropped = {key: owner.get_parameter(key) for key in model.recurrent_weights()}
        assert [mask.shape for mask in masks] == [weight.shape for weight in dropped.values()]
        with torch.no_grad():
            for weight, mask in zip(dropped.values(), masks, strict=True):
                weight.mul_(mask)
        nats_by_hand, after_by_hand = by_hand(tokens, targets, state)
        torch.testing.assert_close((nats, after), (nats_by_hand, after_by_hand), **EXACT)
        expected = gradients(by_hand, nats_by_hand.sum() + after_by_hand.square().sum())
        prefix = "core." if hasattr(by_hand, "core") else "rnn."
        for key, mask in zip(dropped, masks, strict=True):
            expected[prefix + key] *= mask
        torch.testing.assert_close(found, expected, **EXACT)
    assert results[0] != results[1]


def test_weight_drop_names_the_matrices_that_the_state_is_multiplied_with():
    names = {name: set(build(name).recurrent_weights()) for name in MODELS}
    assert names["rmc-2-blocks"] == {"blocks.0.qkv_projection.weight", "blocks.1.qkv_projection.weight",
                                     "memory_gate_projection.weight"}
    assert names["rmc-no-gates"] == {"blocks.0.qkv_projection.weight"}
    assert names["lstm"] == {"weight_hh_l0", "weight_hh_l1"}


@pytest.mark.parametrize("name", ["rmc", "rmc-2-blocks", "rmc-no-gates"])
def test_plain_and_fast_path_agree_with_everything_on(name):
    fast, plain = build(name, **ALL), build(name, **ALL)
    plain.core.fast = False
    compare(fast, plain)


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("name", ["lstm", "lstm-project", "gru", "relu"])
def test_fused_layer_and_loop_of_cells_agree_with_everything_on(name, hidden, masks):
    models = [build(name, **ALL, dropout_hidden=hidden, fused=fused) for fused in (True, False)]
    compare(*models)
    half = len(masks) // 2
    assert all(torch.equal(*pair) for pair in zip(masks[:half], masks[half:], strict=True))
    # Words, input, weight_hh of each layer, between the layers, output.
    layers = models[0].rnn.num_layers
    assert half == 3 + layers + (layers - 1) * (hidden > 0)


def compare(one, other):
    """The same random numbers, the same results and gradients."""
    other.load_state_dict(one.state_dict())
    tokens, targets = window()
    given = 0.5 * torch.randn_like(one.initial_state(B))
    found = []
    for model in (one, other):
        torch.manual_seed(5)
        state = given.clone().requires_grad_()
        nats, after = model(tokens, targets, state)
        found.append((nats, after, gradients(model, nats.sum() + after.square().sum()), state.grad))
    torch.testing.assert_close(*found, **EXACT)


def test_a_tied_softmax_sees_the_words_that_are_dropped_from_the_input(masks):
    """With all words dropped but one, the output bias and the matrix still score every word."""
    model = build("rmc", dropout_words=0.9)
    tokens, targets = window()
    model(tokens, targets, model.initial_state(B))
    dropped = (masks[0][:, 0] == 0).nonzero()[:, 0]
    assert len(dropped) > 5
    nats, _ = model(tokens, targets, model.initial_state(B))
    assert gradients(model, nats.sum())["embedding.weight"].any(dim=1).all()
    assert torch.equal(model.output_layer.weight, model.embedding.weight)

"""The language models: losses, states, parameters, configuration, dropout, precision."""

import itertools
import json
import math
import warnings

import pytest
import torch

from layers import fused
from layers.language_model import perplexity
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM

B, T, V = 4, 5, 29
RMC = {"embedding_size": 6, "mem_slots": 2, "head_size": 4, "num_heads": 3, "key_size": 7}
RNN = {"embedding_size": 6, "hidden_size": 11, "num_layers": 2, "dropout_hidden": 0.0}
MODELS = {
    "rmc": (RelationalMemoryLM, RMC),
    "rmc-adaptive": (RelationalMemoryLM, RMC | {"cutoffs": [5, 13], "num_blocks": 2, "gate_style": "memory"}),
    "rmc-untied": (RelationalMemoryLM, RMC | {"tied": False, "gate_style": None, "mem_slots": 1}),
    "lstm": (RNNLM, RNN),
    "lstm-loop-adaptive": (RNNLM, RNN | {"cutoffs": [5, 13], "fused": False}),
    "lstm-tied": (RNNLM, RNN | {"hidden_size": 6, "tied": True}),
    "gru": (RNNLM, RNN | {"model": "GRU"}),
    "tanh": (RNNLM, RNN | {"model": "RNN_TANH"}),
    "relu-loop-adaptive": (RNNLM, RNN | {"model": "RNN_RELU", "cutoffs": [5], "fused": False}),
}
NAMES = pytest.mark.parametrize("name", MODELS)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def build(name, dtype=torch.float64, **changes):
    kind, config = MODELS[name]
    return kind(V, **config | {"dropout_input": 0.0, "dropout_output": 0.0} | changes).to(dtype)


def window(batch=B, steps=T, vocab_size=V):
    return torch.randint(vocab_size, (2, batch, steps))


def random_state(model):
    return 0.5 * torch.randn_like(model.initial_state(B))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ---- losses and states


@pytest.mark.parametrize("shares", [None, [30, 6, 2]], ids=["full", "adaptive"])
@pytest.mark.parametrize("vocab_size", [200, 33278])
@pytest.mark.parametrize(
    "kind, options",
    [
        (RelationalMemoryLM, {}),
        (RelationalMemoryLM, {"tied": False, "mem_slots": 4, "head_size": 32}),
        (RNNLM, {}),
        (RNNLM, {"tied": True}),
        (RNNLM, {"model": "RNN_RELU", "num_layers": 2}),
    ],
)
def test_first_loss_is_near_ln_v(kind, options, vocab_size, shares):
    """The 2018 port left tied embeddings at N(0, 1): its first loss was 36.8 where ln V is 10.4."""
    model = kind(vocab_size, **options, cutoffs=shares and [vocab_size // share for share in shares])
    tokens, targets = window(8, 20, vocab_size)
    with torch.no_grad():
        loss, _ = model.loss(tokens, targets, model.initial_state(8))
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.1)


@NAMES
def test_loss_is_the_log_probability_of_each_next_word(name):
    model = build(name)
    tokens, targets = window()
    targets[1, 2] = targets[3] = -100
    state = random_state(model)
    nats, after = model(tokens, targets, state)
    expected, carried = 0.0, state
    for t in range(T):
        logs, carried = model.log_probabilities(tokens[:, t : t + 1], carried)
        torch.testing.assert_close(logs.exp().sum(1), torch.ones(B).double(), **EXACT)
        expected -= sum(logs[b, targets[b, t]] for b in range(B) if targets[b, t] >= 0)
    assert nats.shape == (1,)
    torch.testing.assert_close(nats[0], expected, **EXACT)
    torch.testing.assert_close(after, carried, **EXACT)
    torch.testing.assert_close(model.log_probabilities(tokens, state)[0], logs, **EXACT)
    mean, _ = model.loss(tokens, targets, state)
    torch.testing.assert_close(mean, expected / (2 * T + T - 1), **EXACT)


def test_window_without_targets_has_loss_zero():
    model = build("lstm")
    tokens, targets = window()
    loss, _ = model.loss(tokens, torch.full_like(targets, -100), model.initial_state(B))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@NAMES
def test_two_windows_equal_one_long_window(name):
    """Gradients included: the 2018 port detached the memory inside forward."""
    model = build(name)
    tokens, targets = window()
    whole, final = model(tokens, targets)
    first, carried = model(tokens[:, :2], targets[:, :2], model.initial_state(B))
    second, final_again = model(tokens[:, 2:], targets[:, 2:], carried)
    torch.testing.assert_close(first + second, whole, **EXACT)
    torch.testing.assert_close(final_again, final, **EXACT)
    torch.testing.assert_close(gradients(model, first + second), gradients(model, whole), **EXACT)


def test_perplexity():
    assert perplexity(math.log(105.5)) == pytest.approx(105.5)
    assert perplexity(1e6) == perplexity(math.nan) == math.inf


# ---- parameters and configuration


@NAMES
def test_every_parameter_is_listed_once_saved_and_gets_a_gradient(name):
    """In the 2018 port neither optimizer nor checkpoint held the adaptive softmax of the LSTM."""
    model = build(name)
    listed = {id(parameter) for parameter in model.parameters()}
    values = list(itertools.chain.from_iterable(vars(module).values() for module in model.modules()))
    assert not any(isinstance(value, torch.Tensor) for value in values)
    assert listed == {id(p) for module in model.modules() for p in module._parameters.values()} - {id(None)}
    assert {key for key, _ in model.named_parameters()} <= model.state_dict().keys()
    tied = getattr(model.output_layer, "weight", None) is model.embedding.weight
    assert tied == (name in ("rmc", "lstm-tied"))
    nats, _ = model(*window(steps=20), random_state(model))
    assert all(gradient.any() for gradient in gradients(model, nats.sum()).values())


@NAMES
def test_config_rebuilds_the_model(name):
    model = build(name, torch.float32, dropout_input=0.25)
    config = json.loads(json.dumps(model.config))  # plain data
    rebuilt = type(model)(**config)
    assert rebuilt.config == config == model.config and config["dropout_input"] == 0.25
    rebuilt.load_state_dict(model.state_dict())  # strict
    tokens, targets = window()
    results = (each.eval()(tokens, targets, model.initial_state(B)) for each in (rebuilt, model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_config_has_the_names_of_earlier_checkpoints():
    both = "vocab_size embedding_size dropout_input dropout_output cutoffs tied locked_dropout dropout_words"
    both = {*both.split(), "dropout_weights", "dropout_candidate"}
    core = "mem_slots head_size num_heads num_blocks forget_bias input_bias gate_style attention_mlp_layers"
    assert build("rmc").config.keys() == both | {*core.split(), "key_size", "init_scale"}
    rnn = "model hidden_size num_layers dropout_hidden fused project"
    assert build("lstm").config.keys() == both | {*rnn.split()}


def test_default_models_have_the_published_sizes():
    """Parameters counted by hand for WikiText-2's vocabulary."""
    words, emb, width, qkv = 33278, 192, 768, 4 * (64 + 64 + 192)
    core = emb * width + width  # input projection
    core += width * qkv + qkv + 3 * (width * width + width)  # queries, keys and values; MLP
    core += 2 * (width * 2 * width + 2 * width)  # gates, from input and memory
    core += 2 * qkv + 2 * width + 2 * width  # three norms
    expected = words * emb + core + (width * emb + emb) + words
    assert sum(p.numel() for p in RelationalMemoryLM(words).parameters()) == expected
    lstm = 4 * 300 * (300 + 300 + 2)
    assert sum(p.numel() for p in RNNLM(words).parameters()) == 2 * words * 300 + words + lstm


BOTH = {"vocab_size": [0, 2.0], "embedding_size": [0, True], "dropout_input": [-0.1, 1]}
BOTH |= {"dropout_output": [math.nan, "0.5"]}
BAD = {
    RelationalMemoryLM: BOTH | {"dropout_candidate": [1]},
    # Tied sizes differ, and recurrent dropout is not for fused layers.
    RNNLM: BOTH
    | {"model": ["QRNN"], "hidden_size": [0], "num_layers": [0], "dropout_hidden": [1.0]}
    | {"tied": [True], "dropout_candidate": [0.5]},
}
CASES = [(kind, name, v) for kind, rows in BAD.items() for name, values in rows.items() for v in values]


@pytest.mark.parametrize("kind, argument, value", CASES)
def test_bad_argument_is_named(kind, argument, value):
    config = {"vocab_size": V} | (RMC if kind is RelationalMemoryLM else RNN) | {argument: value}
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        kind(**config)


# ---- dropout


@pytest.mark.parametrize("place", ["dropout_input", "dropout_output"])
@pytest.mark.parametrize("name", ["rmc", "lstm", "lstm-loop-adaptive"])
def test_dropout_acts_in_its_place(name, place):
    model = build(name, **{place: 0.5})
    tokens, _ = window()
    state = model.initial_state(B)
    (hidden, after), (_, after_again) = (model.hidden(tokens, state) for _ in range(2))
    # Dropout before the softmax does not change the next state; dropout of the input does.
    assert torch.equal(after, after_again) == (place == "dropout_output")
    zeros = (hidden == 0).double().mean().item()
    assert (0.3 < zeros < 0.7) if place == "dropout_output" else zeros < 0.05


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_between_layers_acts_in_training_only(fused):
    model = build("lstm", dropout_hidden=0.5, fused=fused)
    tokens, _ = window()
    state = model.initial_state(B)
    first, second = (model.hidden(tokens, state)[1] for _ in range(2))
    assert torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, 1], second[:, 1])
    model.eval()
    assert torch.equal(*(model.hidden(tokens, state)[1] for _ in range(2)))


# ---- precision of fused layers


@pytest.fixture
def no_bfloat16_lstm(monkeypatch):
    """A CPU on which torch has no bfloat16 LSTM."""

    def refuse(*arguments):
        raise RuntimeError("could not create a primitive descriptor")

    fused.lstm_runs_in.cache_clear()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no bfloat16 LSTM for this CPU"):
        patch.setattr(torch, "lstm", refuse)
        assert not fused.lstm_runs_in(torch.bfloat16, "cpu")
    yield
    fused.lstm_runs_in.cache_clear()


@pytest.mark.parametrize("changes", [{}, {"dropout_weights": 0.5}], ids=["plain", "weight drop"])
def test_lstm_without_bfloat16_runs_in_float32_and_warns_once(no_bfloat16_lstm, changes):
    model = build("lstm", torch.float32, **changes)
    embedded, state = torch.randn(T, B, 6), random_state(model)
    torch.manual_seed(2)
    expected = model.recur(embedded, state)
    torch.manual_seed(2)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        found = model.recur(embedded, state.bfloat16().float())
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # the state was rounded
        torch.manual_seed(2)
        assert torch.equal(model.recur(embedded, state)[0], expected[0])
        model.recur(embedded, state.bfloat16())  # a state saved by a machine with a bfloat16 LSTM


@pytest.mark.filterwarnings("ignore:torch has no bfloat16 LSTM")
@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "lstm-loop-adaptive", "rmc"])
def test_bfloat16_training_step_on_this_machine(name):
    model = build(name, torch.float32, locked_dropout=True, dropout_weights=0.3)
    before = torch.get_rng_state()
    fused.lstm_runs_in(torch.bfloat16, "cpu")
    assert torch.equal(torch.get_rng_state(), before)  # the trial draws no random numbers
    state = model.initial_state(B)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, state = model.loss(*window(), state)
    found = gradients(model, loss)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in found.values())

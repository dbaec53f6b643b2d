"""The language models: first loss, states, shards, dropout, parameters, and that they learn.

"Fault" in a test's docstring is something that an earlier port of this model got wrong.
"""

import copy
import math

import pytest
import torch
from torch import nn

from layers.language_model import LanguageModel
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM

B, T, V = 4, 5, 29
NO_DROPOUT = {"dropout_input": 0.0, "dropout_output": 0.0}
RMC = {"embedding_size": 6, "mem_slots": 2, "head_size": 4, "num_heads": 3, "key_size": 7,
       "attention_mlp_layers": 2}
RNN = {"embedding_size": 6, "hidden_size": 11, "num_layers": 2, "dropout_hidden": 0.0}
MODELS = {
    "rmc": (RelationalMemoryLM, RMC),
    "rmc-adaptive": (RelationalMemoryLM,
                     {**RMC, "cutoffs": [5, 13], "num_blocks": 2, "gate_style": "memory"}),
    "rmc-untied": (RelationalMemoryLM, {**RMC, "tied": False, "gate_style": None, "mem_slots": 1}),
    "lstm": (RNNLM, RNN),
    "lstm-loop-adaptive": (RNNLM, {**RNN, "cutoffs": [5, 13], "fused": False}),
    "lstm-tied": (RNNLM, {**RNN, "hidden_size": 6, "tied": True}),
    "gru": (RNNLM, {**RNN, "model": "GRU"}),
    "gru-loop": (RNNLM, {**RNN, "model": "GRU", "fused": False}),
    "tanh": (RNNLM, {**RNN, "model": "RNN_TANH"}),
    "relu-adaptive": (RNNLM, {**RNN, "model": "RNN_RELU", "cutoffs": [5]}),
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def build(name: str, dtype=torch.float64, **changes) -> LanguageModel:
    kind, config = MODELS[name]
    return kind(V, **{**config, **NO_DROPOUT, **changes}).to(dtype)


def window(batch=B, steps=T, vocab_size=V):
    return torch.randint(vocab_size, (batch, steps)), torch.randint(vocab_size, (batch, steps))


def random_state(model: LanguageModel, batch=B) -> torch.Tensor:
    return 0.5 * torch.randn_like(model.initial_state(batch))


def gradients(model: LanguageModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ---- the first loss


@pytest.mark.parametrize("cutoffs", [None, "few", "many"])
@pytest.mark.parametrize("vocab_size", [200, 2000, 33278])
@pytest.mark.parametrize("kind, options", [
    (RelationalMemoryLM, {}),
    (RelationalMemoryLM, {"tied": False, "mem_slots": 4, "head_size": 32}),
    (RNNLM, {}),
    (RNNLM, {"tied": True}),
    (RNNLM, {"model": "GRU"}),
    (RNNLM, {"model": "RNN_TANH"}),
    (RNNLM, {"model": "RNN_RELU", "num_layers": 2}),
], ids=["rmc", "rmc-untied-4-slots", "lstm", "lstm-tied", "gru", "tanh", "relu"])
def test_first_loss_is_that_of_a_model_that_knows_nothing(kind, options, vocab_size, cutoffs):
    """Fault: tied embeddings were left at N(0, 1), and the first loss was 36.8 where ln V is 10.4."""
    shares = {None: None, "few": [4], "many": [30, 6, 2]}[cutoffs]
    model = kind(vocab_size, **options, cutoffs=shares and [vocab_size // share for share in shares])
    tokens, targets = window(8, 20, vocab_size)
    with torch.no_grad():
        loss, _ = model.loss(tokens, targets, model.initial_state(8))
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.1)


# ---- what forward and loss mean


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_log_probability_of_each_next_word_given_those_before(name):
    model = build(name)
    tokens, targets = window()
    targets[1, 2] = targets[3] = -100
    state = random_state(model)
    nats, after = model(tokens, targets, state)
    expected, carried = 0.0, state
    for t in range(T):
        log_probabilities, carried = model.log_probabilities(tokens[:, t : t + 1], carried)
        torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(B).double(), **EXACT)
        expected -= sum(log_probabilities[b, targets[b, t]] for b in range(B) if targets[b, t] >= 0)
    assert nats.shape == (1,)
    torch.testing.assert_close(nats[0], expected, **EXACT)
    torch.testing.assert_close(after, carried, **EXACT)
    whole, _ = model.log_probabilities(tokens, state)                    # of the word after the last token
    torch.testing.assert_close(whole, log_probabilities, **EXACT)
    mean, _ = model.loss(tokens, targets, state)
    torch.testing.assert_close(mean, expected / (2 * T + T - 1), **EXACT)


@pytest.mark.parametrize("name", ["rmc", "rmc-adaptive", "lstm"])
def test_a_last_column_without_targets_costs_nothing(name):
    """Columns of a text end at different places: the last window has targets that do not count."""
    model = build(name)
    tokens, targets = window()
    targets[:, -1] = -100
    padded, _ = model.loss(tokens, targets, model.initial_state(B))
    cut, _ = model.loss(tokens[:, :-1], targets[:, :-1], model.initial_state(B))
    torch.testing.assert_close(padded, cut, **EXACT)
    torch.testing.assert_close(gradients(model, padded), gradients(model, cut), **EXACT)


def test_a_window_without_any_target_has_loss_zero_and_no_division_by_zero():
    model = build("lstm")
    tokens, targets = window()
    loss, _ = model.loss(tokens, torch.full_like(targets, -100), model.initial_state(B))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("name", MODELS)
def test_two_windows_equal_one_long_window(name):
    model = build(name)
    tokens, targets = window()
    whole, final = model(tokens, targets, model.initial_state(B))
    first, carried = model(tokens[:, :2], targets[:, :2], model.initial_state(B))
    second, final_again = model(tokens[:, 2:], targets[:, 2:], carried)
    torch.testing.assert_close(first + second, whole, **EXACT)
    torch.testing.assert_close(final_again, final, **EXACT)
    torch.testing.assert_close(gradients(model, first + second), gradients(model, whole), **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_a_given_state_and_all_of_it_matters(name):
    """Fault: the memory was detached inside forward."""
    model = build(name)
    tokens, targets = window()
    state = random_state(model).requires_grad_()
    nats, after = model(tokens, targets, state)
    (by_loss,) = torch.autograd.grad(nats.sum(), state, retain_graph=True)
    (by_state,) = torch.autograd.grad(after.square().sum(), state)
    assert (by_loss.flatten(2).abs().sum(dim=2) > 0).all()
    assert by_state.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("name", MODELS)
def test_sequences_of_a_batch_and_later_words_do_not_touch_each_other(name):
    model = build(name)
    tokens, _ = window()
    state = random_state(model)
    before, _ = model.hidden(tokens, state)
    changed = tokens.clone()
    changed[2, 3:] = (changed[2, 3:] + 1) % V
    after, _ = model.hidden(changed, state)                              # (T, B, E)
    same = torch.ones(T, B, dtype=torch.bool)
    same[3:, 2] = False
    torch.testing.assert_close(after[same], before[same], **EXACT)
    assert not torch.isclose(after[~same], before[~same]).all(dim=1).any()


# ---- shards along the batch, as several GPUs get them


@pytest.mark.parametrize("name", ["rmc", "rmc-adaptive", "lstm", "lstm-loop-adaptive", "gru"])
def test_shards_along_the_batch_give_the_whole_batchs_nats_states_and_gradients(name):
    """Fault: with several GPUs inputs were split along the batch and flattened targets along time."""
    model = build(name)
    tokens, targets = window()
    targets[1, -1] = -100
    state = random_state(model)
    whole, after = model(tokens, targets, state)
    # torch.nn.DataParallel cuts every argument along its first dimension; here into shards of 3 and 1.
    shards = zip(*(part.split(3) for part in (tokens, targets, state)), strict=True)
    results = [model(*shard) for shard in shards]
    nats = torch.cat([result[0] for result in results])
    assert nats.shape == (2,)
    torch.testing.assert_close(nats.sum(), whole[0], **EXACT)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), after, **EXACT)
    torch.testing.assert_close(gradients(model, nats.sum()), gradients(model, whole.sum()), **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_states_have_the_batch_first_and_are_not_shared(name):
    model = build(name, torch.float32)
    state = model.initial_state(B)
    tokens, targets = window()
    _, after = model(tokens, targets, state)
    assert state.shape[0] == B and state.shape == after.shape
    assert state.dtype == after.dtype == torch.float32
    state[0] += 1
    assert not torch.equal(state[0], state[1])
    assert torch.equal(model.initial_state(B), model.initial_state(1).expand_as(state))


# ---- fused layers and loops of cells


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("model", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_the_fused_layer_equals_a_loop_of_cells_with_the_same_weights(model, layers):
    fused = build("lstm", model=model, num_layers=layers)
    loop = build("lstm", model=model, num_layers=layers, fused=False)
    loop.load_state_dict(fused.state_dict())
    tokens, targets = window()
    given = random_state(fused)
    weigh = torch.randn_like(given)
    found = []
    for either in (fused, loop):
        state = given.clone().requires_grad_()
        features, _ = either.hidden(tokens, state)
        nats, after = either(tokens, targets, state)
        by_weights = gradients(either, nats.sum() + (after * weigh).sum())
        found.append((features, nats, after, by_weights, state.grad))
    torch.testing.assert_close(*found, **EXACT)


def test_an_lstms_state_holds_the_hidden_vectors_and_then_the_cells():
    model = build("lstm")
    tokens, _ = window()
    state = random_state(model)                                          # (B, 2 layers + 2 layers, 11)
    before = tuple(part.transpose(0, 1).contiguous() for part in (state[:, :2], state[:, 2:]))
    outputs, (hidden, cell) = model.rnn(model.embedding(tokens).transpose(0, 1), before)
    features, after = model.hidden(tokens, state)
    torch.testing.assert_close(features, outputs, **EXACT)
    torch.testing.assert_close(after, torch.cat([hidden, cell]).transpose(0, 1), **EXACT)


# ---- parameters and configuration


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_trained_once_saved_and_gets_a_gradient(name):
    """Fault: the LSTM's adaptive-softmax weights were in neither the optimiser nor the checkpoint."""
    model = build(name)
    listed = list(model.parameters())
    assert len({id(parameter) for parameter in listed}) == len(listed)
    held = {id(value) for module in model.modules() for value in vars(module)["_parameters"].values()
            if value is not None}
    loose = [key for module in model.modules() for key, value in vars(module).items()
             if isinstance(value, torch.Tensor)]
    assert held == {id(parameter) for parameter in listed} and not loose
    saved = model.state_dict()
    assert {key for key, _ in model.named_parameters()} <= saved.keys()
    if "adaptive" in name:
        softmax = {"head.weight", "head.bias", "tail.0.0.weight", "tail.0.1.weight"}
        assert {f"output_layer.{part}" for part in softmax} <= {key for key, _ in model.named_parameters()}

    tokens, targets = window(batch=B, steps=20)
    nats, _ = model(tokens, targets, random_state(model))
    assert all(gradient.any() for gradient in gradients(model, nats.sum()).values())


def test_tied_weights_are_one_parameter_and_untied_ones_are_two():
    for name, tied in (("rmc", True), ("rmc-untied", False), ("lstm", False), ("lstm-tied", True)):
        model = build(name)
        assert (model.output_layer.weight is model.embedding.weight) == tied, name


@pytest.mark.parametrize("name", MODELS)
def test_the_config_rebuilds_the_model(name):
    model = build(name, torch.float32, dropout_input=0.25, dropout_output=0.125)
    config = copy.deepcopy(model.config)
    assert config["vocab_size"] == V and config["dropout_input"] == 0.25 and config["dropout_output"] == 0.125
    rebuilt = type(model)(**config)
    assert rebuilt.config == config
    rebuilt.load_state_dict(model.state_dict())                          # strict
    tokens, targets = window()
    state = random_state(model)
    results = (either.eval()(tokens, targets, state) for either in (rebuilt, model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_config_is_plain_data_that_a_caller_cannot_change_from_outside():
    cutoffs = [5, 13]
    model = RelationalMemoryLM(V, **RMC, cutoffs=cutoffs)
    cutoffs.append(20)
    assert model.config["cutoffs"] == model.output_layer.cutoffs == [5, 13]
    plain = (int, float, str, bool, list, type(None))
    assert all(isinstance(value, plain) for value in model.config.values())


@pytest.mark.parametrize("name, attribute, values", [
    ("rmc", "gate_style", ["unit", "memory", None]),
    ("rmc", "mem_slots", [1, 3]),
    ("rmc", "num_blocks", [1, 2]),
    ("rmc", "attention_mlp_layers", [1, 4]),
    ("rmc", "key_size", [3, 5]),
    ("rmc", "forget_bias", [0.0, 2.0]),
    ("rmc", "input_bias", [-1.0, 2.0]),
])
def test_options_of_the_core_reach_the_core(name, attribute, values):
    """Fault: --gatestyle never reached the model."""
    for value in values:
        assert getattr(build(name, **{attribute: value}).core, attribute) == value


def test_port_sized_models_have_the_ports_size():
    """Parameters counted by hand, from the default sizes and WikiText-2's vocabulary."""
    words, emb, width, qkv = 33278, 192, 768, 4 * (64 + 64 + 192)
    core = emb * width + width                                           # input projection
    core += width * qkv + qkv + 3 * (width * width + width)              # queries, keys and values; MLP
    core += 2 * (width * 2 * width + 2 * width)                          # gates, from input and memory
    core += 2 * qkv + 2 * width + 2 * width                              # three norms
    expected = words * emb + core + (width * emb + emb) + words
    assert sum(p.numel() for p in RelationalMemoryLM(words).parameters()) == expected
    lstm = 4 * 300 * (300 + 300 + 2)
    assert sum(p.numel() for p in RNNLM(words).parameters()) == 2 * words * 300 + words + lstm


# ---- dropout


@pytest.mark.parametrize("place", ["dropout_input", "dropout_output"])
@pytest.mark.parametrize("name", ["rmc", "lstm", "lstm-loop-adaptive"])
def test_dropout_acts_where_it_says_in_training_only(name, place):
    """Fault: the dropout flags never reached the model."""
    model = build(name, **{place: 0.5})
    tokens, targets = window()
    state = model.initial_state(B)
    assert model(tokens, targets, state)[0] != model(tokens, targets, state)[0]
    hidden = [model.hidden(tokens, state) for _ in range(2)]
    # Dropped before the softmax the state after is untouched; dropped on the way in it is not.
    assert torch.equal(hidden[0][1], hidden[1][1]) == (place == "dropout_output")
    zeros = (hidden[0][0] == 0).double().mean().item()
    assert (0.3 < zeros < 0.7) if place == "dropout_output" else zeros < 0.05
    model.eval()
    still = build(name)
    still.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens, targets, state), still(tokens, targets, state), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_between_layers_acts_in_training_only(fused):
    model = build("lstm", dropout_hidden=0.5, fused=fused)
    tokens, _ = window()
    state = model.initial_state(B)
    first, second = (model.hidden(tokens, state)[1] for _ in range(2))
    assert torch.equal(first[:, 0], second[:, 0])                        # the first layer is before it
    assert not torch.equal(first[:, 1], second[:, 1])
    model.eval()
    assert torch.equal(*(model.hidden(tokens, state)[1] for _ in range(2)))


@pytest.mark.parametrize("name", MODELS)
def test_without_dropout_nothing_is_random(name):
    model = build(name).train()
    tokens, targets = window()
    state = random_state(model)
    torch.testing.assert_close(model(tokens, targets, state), model(tokens, targets, state), rtol=0, atol=0)


# ---- refusals


@pytest.mark.parametrize("kind, argument, value", [
    *[(kind, argument, value) for kind in (RelationalMemoryLM, RNNLM) for argument, value in [
        ("vocab_size", 0), ("vocab_size", 2.0), ("embedding_size", 0), ("embedding_size", True),
        ("dropout_input", -0.1), ("dropout_input", 1), ("dropout_output", math.nan),
        ("dropout_output", "0.5"), ("cutoffs", [9, 5]), ("cutoffs", [V]), ("cutoffs", [])]],
    (RelationalMemoryLM, "mem_slots", 0), (RelationalMemoryLM, "head_size", -1),
    (RelationalMemoryLM, "num_heads", 1.5), (RelationalMemoryLM, "num_blocks", 0),
    (RelationalMemoryLM, "key_size", -1), (RelationalMemoryLM, "attention_mlp_layers", 0),
    (RelationalMemoryLM, "gate_style", "units"), (RelationalMemoryLM, "forget_bias", float("inf")),
    (RelationalMemoryLM, "input_bias", "1"),
    (RNNLM, "model", "QRNN"), (RNNLM, "hidden_size", 0), (RNNLM, "num_layers", 0),
    (RNNLM, "dropout_hidden", 1.0), (RNNLM, "tied", True),               # the embedding has another size
])
def test_a_bad_argument_is_refused_by_its_name(kind, argument, value):
    config = {"vocab_size": V, **(RMC if kind is RelationalMemoryLM else RNN), argument: value}
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        kind(**config)


# ---- learning


@pytest.mark.parametrize("cutoffs", [None, [5]], ids=["full", "adaptive"])
@pytest.mark.parametrize("kind, sizes, passes", [
    (RelationalMemoryLM, {"embedding_size": 16, "head_size": 16, "num_heads": 2, "key_size": 8}, 25),
    (RNNLM, {"embedding_size": 16, "hidden_size": 32}, 60),
], ids=["rmc", "lstm"])
def test_a_periodic_text_is_learned_to_near_zero(kind, sizes, passes, cutoffs):
    """The period holds two words twice, with different successors: the state must tell them apart."""
    model = kind(V, **sizes, **NO_DROPOUT, cutoffs=cutoffs)
    text = torch.tensor([3, 17, 3, 8, 21, 28, 8]).repeat(7)
    columns = torch.stack([text[start : start + 37] for start in range(5)])          # at five phases
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(passes):
        state = model.initial_state(len(columns))
        for start in range(0, 36, 9):
            tokens, targets = columns[:, start : start + 9], columns[:, start + 1 : start + 10]
            loss, state = model.loss(tokens, targets, state.detach())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()
    with torch.no_grad():
        _, state = model(columns[:, :7], columns[:, 1:8], model.initial_state(len(columns)))
        loss, _ = model.loss(columns[:, 7:-1], columns[:, 8:], state)
    assert loss.item() < 0.05

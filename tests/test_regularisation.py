"""Regularisation: one mask per window, expectations kept, evaluation untouched, every path the same."""

import math
import shlex
from pathlib import Path

import pytest
import torch
from test_lm_training import make_trainer
from test_scripts import assert_same_checkpoint, interrupt_at, numbers, run
from torch import nn

import relational_rnn_models
import rnn_models
import train_rmc
import train_rnn
from layers import regularisation
from relational_rnn_models import RelationalMemoryLM
from rnn_models import RNNLM
from training import checkpoints, console, lm_flags, runs

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

    for module in (regularisation, relational_rnn_models, rnn_models):
        monkeypatch.setattr(module, "dropout_mask", noted)
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


def test_in_bfloat16_the_expectation_is_kept_and_the_type_too():
    """1 / 0.6 is 1.6640625 in bfloat16, a mean of 0.9984."""
    torch.manual_seed(1)
    x = torch.full((T, B, 4000), 3.0, dtype=torch.bfloat16)
    assert regularisation.dropout_mask(x, (1000,), 0.4).unique().tolist() == pytest.approx([0, 1 / 0.6])
    weight = x.flatten(0, 1)
    for dropped in (
        regularisation.dropout(x, 0.4, True, locked=True),
        regularisation.drop_words(x, torch.randint(V, (T, B)), V, 0.4, True),
        regularisation.drop_weights({"w": weight}, 0.4)["w"],
    ):
        assert dropped.dtype == torch.bfloat16
        # 3 / 0.6 is 5 in bfloat16 too; 3 * 1.6640625 is not.
        assert dropped.unique().tolist() == [0, 5]


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
    more = {"dropout_candidate": 0.4} if name in ("rmc", "rmc-2-blocks") else {}
    plain, regular = build(name), build(name, **ALL, **more)
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


def test_recurrent_dropout_leaves_features_of_the_candidate_out_for_a_whole_window(masks):
    """Where the candidate is dropped, the memory only fades by its forget gate: its sign stays."""
    model = build("rmc", dropout_candidate=0.5)
    tokens, targets = window()
    state = 0.5 * torch.randn_like(model.initial_state(B))
    _, after = model(tokens, targets, state)
    dropped = masks[0] == 0
    assert masks[0].shape == state.shape and dropped.any() and not dropped.all()
    assert torch.equal(after[dropped].sign(), state[dropped].sign())
    assert (after[dropped].abs() < state[dropped].abs()).all()
    assert not torch.equal(after[~dropped].sign(), state[~dropped].sign())
    model(tokens, targets, state)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(*(model.eval()(tokens, targets, state)[0] for _ in range(2))) and len(masks) == 2


def test_recurrent_dropout_of_an_lstm_has_one_mask_per_layer_and_window(masks, monkeypatch):
    """Where the candidate is dropped, a cell only fades; with a mask of ones, the cells are torch's."""
    model = build("lstm", fused=False, dropout_candidate=0.5)
    tokens, targets = window()
    state = 0.5 * torch.randn_like(model.initial_state(B))
    results = [model(tokens, targets, state) for _ in range(2)]
    assert [mask.shape for mask in masks] == 4 * [(B, 11)] and results[0][0] != results[1][0]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    dropped = torch.stack(masks[:2], dim=1) == 0
    before, after = state[:, 2:], results[0][1][:, 2:]  # an LSTM's cells follow its hidden vectors
    assert dropped.any() and torch.equal(after[dropped].sign(), before[dropped].sign())
    assert (after[dropped].abs() < before[dropped].abs()).all()
    assert not torch.equal(after[~dropped].sign(), before[~dropped].sign())

    plain = build("lstm", fused=False)
    plain.load_state_dict(model.state_dict())
    same = [m.eval()(tokens, targets, state) for m in (model, plain)]
    assert len(masks) == 4 and torch.equal(same[0][0], same[1][0]) and torch.equal(same[0][1], same[1][1])
    monkeypatch.setattr(rnn_models, "dropout_mask", lambda like, shape, p: torch.ones_like(like))
    compare(model.train(), plain.train())


def test_the_cell_with_a_mask_is_that_of_a_loop_over_its_units():
    torch.manual_seed(1)
    inputs, size = 4, 3
    x, hidden, cells = (torch.randn(B, width).double() for width in (inputs, size, size))
    shapes = [(4 * size, inputs), (4 * size, size), (4 * size,), (4 * size,)]
    weights = [torch.randn(shape).double() for shape in shapes]
    mask = torch.tensor([[0, 2, 2], [2, 0, 0], [2, 2, 0]]).double()
    found = rnn_models.lstm_cell(x, (hidden, cells), *weights, candidate_mask=mask)
    ih, hh, bias_ih, bias_hh = (weight.tolist() for weight in weights)

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    for b in range(B):
        for u in range(size):
            i, f, g, o = (
                sum(w * v for w, v in zip(ih[row], x[b].tolist(), strict=True)) + bias_ih[row]
                + sum(w * v for w, v in zip(hh[row], hidden[b].tolist(), strict=True)) + bias_hh[row]
                for row in range(u, 4 * size, size)
            )
            c = sigmoid(f) * cells[b, u].item() + sigmoid(i) * math.tanh(g) * mask[b, u].item()
            assert found[1][b, u].item() == pytest.approx(c, abs=1e-12)
            assert found[0][b, u].item() == pytest.approx(sigmoid(o) * math.tanh(c), abs=1e-12)


@pytest.mark.parametrize(
    "flags", [["--cudnn"], ["--model", "GRU"], ["--recipe", "wikitext2-regularised"]], ids=" ".join
)
def test_recurrent_dropout_is_refused_where_it_cannot_be(flags, corpus_folder, tmp_path):
    with pytest.raises(console.UserError, match="Give --model LSTM and --no-cudnn"):
        run(train_rnn, corpus_folder, tmp_path, *flags, "--dropout-candidate", "0.2")
    with pytest.raises(ValueError, match="model='LSTM' and fused=False"):
        build("gru", dropout_candidate=0.2, fused=False)
    with pytest.raises(ValueError, match="dropout_candidate needs gates"):
        build("rmc-no-gates", dropout_candidate=0.2)
    with pytest.raises(console.UserError, match="dropout_candidate needs gates"):
        run(train_rmc, corpus_folder, tmp_path, "--gatestyle", "none", "--dropout-candidate", "0.2")


def test_weight_drop_names_the_matrices_that_the_state_is_multiplied_with():
    names = {name: set(build(name).recurrent_weights()) for name in MODELS}
    assert names["rmc-2-blocks"] == {"blocks.0.qkv_projection.weight", "blocks.1.qkv_projection.weight",
                                     "memory_gate_projection.weight"}
    assert names["rmc-no-gates"] == {"blocks.0.qkv_projection.weight"}
    assert names["lstm"] == {"weight_hh_l0", "weight_hh_l1"}


@pytest.mark.parametrize("name", ["rmc", "rmc-2-blocks", "rmc-no-gates"])
def test_plain_and_fast_path_agree_with_everything_on(name):
    more = {} if name == "rmc-no-gates" else {"dropout_candidate": 0.5}
    fast, plain = (build(name, **ALL, **more) for _ in range(2))
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


# ---- activation regularisation


def test_the_penalty_is_that_of_a_loop():
    torch.manual_seed(1)
    dropped, raw = torch.randn(T, B, E).double(), torch.randn(T, B, 7).double()
    squares = sum(x**2 for x in dropped.flatten().tolist()) / (T * B * E)
    cells = [(b, f) for b in range(B) for f in range(7)]
    changes = [(raw[t + 1, b, f] - raw[t, b, f]).item() ** 2 for t in range(T - 1) for b, f in cells]
    expected = 2 * squares + 3 * sum(changes) / len(changes)
    found = regularisation.activation_penalty(dropped, raw, 2.0, 3.0) / (T * B)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    one_step = regularisation.activation_penalty(dropped[:1], raw[:1], 0.0, 3.0)
    assert one_step == 0  # nothing follows it


@NAMES
def test_the_penalty_stands_beside_the_nats_and_adds_up_over_shards(name):
    model = build(name)
    tokens, targets = window()
    state = 0.5 * torch.randn_like(model.initial_state(B))
    nats, after = model(tokens, targets, state)
    same_nats, same_after, penalty = model(tokens, targets, state, penalties=(2.0, 1.0))
    assert torch.equal(nats, same_nats) and torch.equal(after, same_after) and penalty.shape == (1,)
    shards = [model(*(part[rows] for part in (tokens, targets, state)), penalties=(2.0, 1.0))[2]
              for rows in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(sum(shards), penalty, **EXACT)
    features, hidden, _ = model._run(tokens, state)
    torch.testing.assert_close(
        penalty[0], regularisation.activation_penalty(hidden, features, 2.0, 1.0), **EXACT
    )


# ---- random windows


def test_windows_cover_the_epoch_and_are_as_long_as_they_should_be():
    stops = regularisation.window_stops(400_000, 100, 5.0, seed=3, epoch=1)
    lengths = torch.tensor([b - a for a, b in zip([0, *stops], stops, strict=False)]).double()
    assert stops[-1] == 400_000 == lengths.sum()
    long = lengths[lengths > 75]
    assert (len(lengths) - len(long)) / len(lengths) == pytest.approx(0.05, abs=0.011)
    # int() cuts half a token off; the deviation of the mean of 4,000 lengths is 0.08.
    assert long.mean().item() == pytest.approx(99.5, abs=0.3)
    assert long.std().item() == pytest.approx(5, abs=0.3)
    assert lengths[lengths <= 75][:-1].mean().item() == pytest.approx(49.5, abs=1.5)


def test_windows_depend_on_seed_and_epoch_alone_and_stay_in_bounds():
    def stops(seed, epoch, length=1000, deviation=30.0):
        return regularisation.window_stops(length, 20, deviation, seed, epoch)

    assert stops(1, 1) == stops(1, 1) != stops(1, 2) and stops(1, 1) != stops(2, 1)
    lengths = [b - a for a, b in zip([0, *stops(1, 1)], stops(1, 1), strict=False)]
    assert min(lengths[:-1]) == 5 and max(lengths) == 40
    assert set(stops(1, 1, deviation=0.0)) >= {20, 40} and stops(1, 1, length=3) == [3]
    assert regularisation.window_stops(45, 20, None, 1, 1) == [20, 40, 45]
    assert regularisation.window_stops(40, 20, None, 1, 1) == [20, 40]
    assert regularisation.window_stops(9, 3, 1.0, 1, 1)[-1] == 9  # a window below the shortest is possible


# ---- averages


@pytest.mark.parametrize("decay", [0.75, None])
def test_the_average_equals_a_loop_over_the_weights(decay):
    model = nn.Linear(3, 2).double()
    average = regularisation.WeightAverage(model, decay)
    average.started = True
    torch.manual_seed(1)
    expected = None
    for step in range(1, 12):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        average.update(model)
        weights = [weight.detach().numpy().copy() for weight in model.parameters()]
        share = 1 / step if decay is None else max(0.25, 1 / step)
        expected = weights if expected is None else [
            old + share * (new - old) for old, new in zip(expected, weights, strict=True)
        ]
    for found, wanted in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, torch.from_numpy(wanted), **EXACT)
    assert not any(weight.requires_grad for weight in average.model.parameters())


def test_a_tied_matrix_is_averaged_once_and_stays_tied():
    model = build("rmc")
    average = regularisation.WeightAverage(model, 0.5)
    assert average.model.output_layer.weight is average.model.embedding.weight
    assert average.model.embedding.weight is not model.embedding.weight and not average.model.training


def test_the_copy_of_a_fused_layer_is_put_in_one_piece_of_memory_again(monkeypatch):
    """Without an effect on a CPU: cuDNN would copy the weights at every call."""
    model, flattened = build("lstm"), []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda layer: flattened.append(layer))
    average = regularisation.WeightAverage(model, 0.5)
    assert flattened == [average.model.rnn]


def test_the_plain_mean_starts_when_validation_stalls():
    """Merity et al. 2018, algorithm 1: the loss is above the best of all but the last n."""
    model = nn.Linear(3, 2)
    average = regularisation.WeightAverage(model, None, patience=2)
    for loss, started in [(5, False), (4, False), (4.5, False), (4.6, False), (4.2, True), (3, True)]:
        average.update(model)
        assert average.steps == 0 or average.started
        average.watch(loss)
        assert average.started == started, loss
    average.update(model)
    assert average.steps == 2  # after 4.2, and after 3


def test_matrices_decay_and_vectors_do_not():
    model = build("rmc")
    decaying, others = regularisation.parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    held = [*decaying["params"], *others["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert all(p.dim() == 2 for p in decaying["params"]) and all(p.dim() == 1 for p in others["params"])


# ---- in training

EVERYTHING = [
    "--locked-dropout", "--dropout", "0.3", "--dropout-words", "0.2", "--dropout-weights", "0.3",
    "--ar", "2", "--tar", "1", "--weight-decay", "0.1", "--random-bptt", "3", "--warmup", "9",
    "--embedding-lr", "0.003", "--dropout-candidate", "0.2",
]


@pytest.mark.parametrize("script, more", [
    (train_rmc, ["--average", "ema", "--average-decay", "0.9", "--schedule", "cosine"]),
    (train_rnn, ["--average", "nt-asgd"]),
], ids=["ema, cosine", "nt-asgd, plateau"])
def test_resuming_with_everything_on_is_as_if_never_stopped(
    script, more, corpus_folder, tmp_path, monkeypatch
):
    """Bit for bit: weights, average, windows, learning rates and logged numbers."""

    def start_at_once(average, loss):
        average.started = True
        average.losses.append(loss)

    monkeypatch.setattr(regularisation.WeightAverage, "watch", start_at_once)
    flags = ["--epochs", "3", *EVERYTHING, *more]
    _, whole = run(script, corpus_folder, tmp_path / "whole", *flags)
    interrupt_at(monkeypatch, 17)  # in the second epoch, in warm-up no more
    status, folder = run(script, corpus_folder, tmp_path / "parts", *flags)
    assert status == 130
    place = checkpoints.load_checkpoint(folder / "last.pt")["position"]["place"]
    assert 0 < place < 170 and place % 15
    interrupt_at(monkeypatch, 30)
    assert script.main(["--resume", str(folder)]) == 130
    assert script.main(["--resume", str(folder)]) == 0
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(whole / name, folder / name)
    assert numbers(whole) == numbers(folder)
    average = checkpoints.load_checkpoint(folder / "last.pt")["average"]
    assert average["started"] and average["steps"] > 0
    assert "average_loss" in [e for e in runs.read_log(folder / "log.jsonl") if e["event"] == "valid"][-1]


def test_best_pt_holds_the_average_where_that_is_better(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "rnn", "--epochs", "1", "--average", "ema")
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *given: evaluate(*given) - 9 * (trainer.average.model in given)
    )
    trainer.train(tmp_path)
    best = checkpoints.load_checkpoint(tmp_path / "best.pt")
    averaged = trainer.average.model.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in best["model"].items())
    assert not torch.equal(best["model"]["embedding.weight"], trainer.model.embedding.weight)
    valid = next(event for event in runs.read_log(tmp_path / "log.jsonl") if event["event"] == "valid")
    assert best["scores"]["valid_loss"] == valid["average_loss"] == trainer.at.best_valid < valid["loss"]


@pytest.mark.parametrize("kind", ["rmc", "rnn"])
def test_the_penalty_is_minimised_and_not_reported(tmp_path, kind):
    plain, punished = (make_trainer(tmp_path, kind, *flags) for flags in ([], ["--ar", "2", "--tar", "1"]))
    tokens, targets = next(plain.columns.windows(11))
    for trainer in (plain, punished):
        trainer.state = trainer.model.initial_state(7)
        trainer.step(tokens, targets)
    assert plain.sums[0] == punished.sums[0] and plain.sums[1] != punished.sums[1]
    again = make_trainer(tmp_path, kind)
    features, hidden, _ = again.model._run(tokens, again.model.initial_state(7))
    nats, _ = again.model.loss(tokens, targets, again.model.initial_state(7))
    (nats + 2 * hidden.square().mean() + (features[1:] - features[:-1]).square().mean()).backward()
    norm = torch.stack([p.grad.square().sum() for p in again.model.parameters()]).sum().sqrt()
    assert punished.sums[1].item() == pytest.approx(norm.item(), rel=1e-5)


def test_decay_shrinks_the_weights_by_the_learning_rate_and_the_optimiser_holds_all(tmp_path):
    plain, decayed = (make_trainer(tmp_path, "rmc", "--weight-decay", x, "--lr", "0.01") for x in ("0", "3"))
    before = {name: p.detach().clone() for name, p in decayed.model.named_parameters()}
    held = [id(p) for group in decayed.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, decayed.model.parameters()))
    for trainer in (plain, decayed):
        trainer.state = trainer.model.initial_state(7)
        trainer.step(*next(trainer.columns.windows(11)))
    for (name, p), q in zip(plain.model.named_parameters(), decayed.model.parameters(), strict=True):
        shrunk = 0.01 * 3 * before[name] if p.dim() == 2 else 0
        torch.testing.assert_close(q, p - shrunk, rtol=0, atol=1e-6, msg=name)


def test_a_step_on_a_random_window_has_its_share_of_the_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, "rnn", "--random-bptt", "2", "--lr", "0.01", "--warmup", "2")
    for step, (first, stop) in enumerate([(0, 8), (8, 19), (19, 22)], start=1):
        trainer.state = trainer.model.initial_state(7)
        trainer.step(*trainer.columns.window(first, stop))
        schedule = 0.01 * min(1, step / 2)
        assert trainer.lr == pytest.approx(schedule)
        used = trainer.optimizer.param_groups[0]["lr"]
        assert used == pytest.approx(schedule * (stop - first) / 11)
    trainer.step_schedule(1.0)
    assert trainer.lr == trainer.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("script", [train_rmc, train_rnn], ids=lambda script: script.SCRIPT)
@pytest.mark.parametrize("name", ["wikitext2", "wikitext2-regularised"])
def test_recipes_for_wikitext2_are_within_eleven_million_parameters_and_reach_the_model(script, name):
    parser = script.build_parser()
    lm_flags.apply_recipe(parser, ["--recipe", name], script.RECIPES)
    args = parser.parse_args(["--recipe", name, "--no-locked-dropout"])
    with torch.device("meta"):
        model = script.build_model(args, 33278, None)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 10_500_000 < count <= 11_000_000
    assert f"{count:,} parameters" in Path(script.__file__).read_text(encoding="utf-8")
    assert not model.locked_dropout and model.output_layer.weight is model.embedding.weight
    dropped = (0.3, 0.0, 0.0) if name == "wikitext2" else (0.4, 0.1, 0.4)
    assert (model.dropout_input, model.dropout_words, model.dropout_weights) == dropped


@pytest.mark.parametrize("name", ["tiny", "wikitext2", "wikitext2-regularised"])
@pytest.mark.parametrize("script", [train_rmc, train_rnn], ids=lambda script: script.SCRIPT)
def test_the_flags_that_a_recipe_prints_mean_the_same_when_they_are_typed(script, name, capsys):
    parser = script.build_parser()
    lm_flags.apply_recipe(parser, ["--recipe", name], script.RECIPES)
    by_recipe = parser.parse_args([])
    printed = capsys.readouterr().out.removeprefix(f"recipe {name}: ")
    assert script.build_parser().parse_args(shlex.split(printed)) == by_recipe
    words = lm_flags.as_typed(parser, {"locked_dropout": False, "adaptivesoftmax": False, "data": "a b"})
    assert words == ["--no-locked-dropout", "--data", "a b"]

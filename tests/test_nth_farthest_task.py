"""The task "Nth farthest": its examples against slow loops, and its models."""

import json
import math

import numpy as np
import pytest
import torch

from tasks.nth_farthest import (
    NthFarthestModel,
    accuracy_by_rank,
    is_correct,
    loss_and_correct,
    make_batch,
    question_of,
)

SIZES = {"mem_slots": 4, "num_heads": 2, "head_size": 5, "head_units": 7, "hidden_size": 6}
KINDS = pytest.mark.parametrize("kind", ["rmc", "lstm"])


def batch(B, K, D, seed=3, shown=None):
    return make_batch(B, K, D, torch.Generator().manual_seed(seed), shown=shown)


def tiny_model(**options):
    torch.manual_seed(0)
    return NthFarthestModel(3, 2, **SIZES | options)


# ---- the examples


@pytest.mark.parametrize(
    "K, D, k, d", [(8, 16, 8, 16), (3, 1, 3, 1), (5, 2, 5, 2), (6, 5, 2, 1), (6, 5, 3, 5), (6, 5, 6, 2)]
)
def test_examples_equal_a_slow_loop(K, D, k, d):
    """In a curriculum's stage (k, d) the absent vectors count as farther away than any other."""
    B = 300
    inputs, targets = batch(B, K, D, shown=None if (k, d) == (K, D) else (k, d))
    assert inputs.shape == (B, k, 3 * K + D) and inputs.dtype == torch.float32
    assert targets.shape == (B,) and targets.dtype == torch.int64
    asked = set()
    for number, sequence in enumerate(inputs.double().numpy()):
        vector_of, questions = {}, set()
        for vector, label, n, m in (np.split(step, [D, D + K, D + 2 * K]) for step in sequence):
            questions.add((list(n).index(1.0), list(m).index(1.0)))
            assert n.sum() == m.sum() == label.sum() == 1
            assert vector[:d].all() and not vector[d:].any()
            vector_of[list(label).index(1.0)] = vector
        ((n, m),) = questions  # every step repeats the question
        distance_of = {
            label: math.sqrt(sum((a - b) ** 2 for a, b in zip(vector, vector_of[m], strict=True)))
            for label, vector in vector_of.items()
        }
        from_far_to_near = [None] * (K - k) + sorted(distance_of, key=lambda label: -distance_of[label])
        assert from_far_to_near[n] == targets[number]
        asked.add((n, list(vector_of).index(m)))
    if K < 8:
        assert asked == {(n, position) for n in range(K - k, K) for position in range(k)}


@pytest.mark.parametrize("stage", [(2, 5), (4, 3), (3, 7)])
def test_vectors_keep_their_length_from_stage_to_stage(stage):
    """The mean square of a vector's length is that of D coordinates from U(-1, 1), D / 3."""
    vectors = batch(4000, 4, 7, shown=stage)[0][..., :7]
    assert vectors.square().sum(2).mean() == pytest.approx(7 / 3, rel=0.02)


def test_published_random_stream_is_unchanged():
    """Published runs repeat only while the full task draws the same numbers in the same order."""
    generator = torch.Generator().manual_seed(5)
    inputs, _ = make_batch(2, 3, 1, generator)
    draw = torch.Generator().manual_seed(5)
    vectors = torch.rand(2, 3, 1, generator=draw) * 2 - 1
    labels = torch.rand(2, 3, generator=draw).argsort(dim=1)
    n, position = torch.randint(3, (2, 1), generator=draw), torch.randint(3, (2, 1), generator=draw)
    m = labels.gather(1, position)
    assert torch.equal(inputs[:, :, :1], vectors) and torch.equal(inputs[:, :, 1:4].argmax(2), labels)
    assert torch.equal(torch.stack(question_of(inputs, 3), dim=1), torch.cat([n, m], dim=1))
    assert torch.equal(generator.get_state(), draw.get_state())


def test_labels_positions_and_question_are_independent_and_uniform():
    B, K = 60_000, 4
    inputs, targets = batch(B, K, 1)
    assert -1 <= inputs[..., 0].min() < -0.99 and 0.99 < inputs[..., 0].max() < 1
    labels = inputs[:, :, 1 : 1 + K]
    n, m = question_of(inputs, K)
    tables = {
        "label at each position": labels.mean(0),
        "n and m": torch.bincount(n * K + m, minlength=K * K) / B * K,
        "m and position": torch.stack([labels[m == k, :, k].mean(0) for k in range(K)]),
        "answer": torch.bincount(targets, minlength=K) / B,
        "first vector given its label": 1 / K
        + torch.stack([(inputs[:, 0, 0] * labels[:, 0, k]).sum() / labels[:, 0, k].sum() for k in range(K)]),
    }
    for name, table in tables.items():
        assert (table - 1 / K).abs().max() < 0.02, name  # 6 standard deviations and more


def test_questions_about_easier_examples_are_uniform():
    B, K = 60_000, 5
    inputs, targets = batch(B, K, 2, shown=(3, 2))
    n, m = question_of(inputs, K)
    position = inputs[:, :, 2 : 2 + K].gather(2, m.view(B, 1, 1).expand(B, 3, 1)).squeeze(2).argmax(dim=1)
    pairs = torch.bincount(n * K + position, minlength=K * K).view(K, K) / B
    assert (pairs[2:, :3] - 1 / 9).abs().max() < 0.008 and pairs.count_nonzero() == 9
    for labels in (m, targets):
        assert (torch.bincount(labels, minlength=K) / B - 1 / K).abs().max() < 0.01


# ---- the models


@KINDS
def test_config_rebuilds_the_model_and_has_the_names_of_earlier_checkpoints(kind):
    model = tiny_model(model=kind, gate_style="memory", input_scale=2.0)
    config = json.loads(json.dumps(model.config))
    names = "num_vectors num_dims model mem_slots head_size num_heads num_blocks forget_bias input_bias"
    names += " gate_style attention_mlp_layers key_size hidden_size head_layers head_units input_scale"
    assert config.keys() == {*names.split(), "memory_scale", "init_scale"}
    rebuilt = NthFarthestModel(**config)
    assert rebuilt.config == config
    rebuilt.load_state_dict(model.state_dict())
    inputs, _ = batch(4, 3, 2)
    assert torch.equal(rebuilt(inputs), model(inputs))


def test_loss_takes_logits():
    """The 2018 port applied softmax before cross-entropy, which bounds the loss away from 0."""
    inputs, targets = batch(13, 3, 2)
    logits = tiny_model()(inputs).detach() * 50  # far from uniform
    exponentials = np.exp(logits.double().numpy())
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    loss, correct = loss_and_correct(logits, targets)
    assert loss.item() == pytest.approx(
        -np.log(probabilities[np.arange(13), targets.numpy()]).mean(), rel=1e-5
    )
    assert correct.item() == (probabilities.argmax(axis=1) == targets.numpy()).sum()


@KINDS
def test_answer_depends_on_every_step_of_its_own_sequence_only(kind):
    model = tiny_model(model=kind).double()
    inputs = batch(4, 3, 2)[0].double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs)[1].square().sum(), inputs)
    assert (gradient[1].abs().sum(dim=1) > 0).all()
    assert (gradient[[0, 2, 3]] == 0).all()


def test_scales_act_on_coordinates_and_initial_memory():
    inputs, _ = batch(4, 3, 2)
    model = tiny_model(input_scale=3.0, memory_scale=8.0)
    scaled = torch.cat([3 * inputs[..., :2], inputs[..., 2:]], dim=2)
    output, _ = model.core(scaled, 8 * model.core.initial_state(4))
    assert torch.equal(model(inputs), model.head(output))


def test_attention_is_that_of_the_forward_pass():
    inputs, _ = batch(4, 3, 2)
    model = tiny_model(memory_scale=2.0, input_scale=3.0)
    attention = model.attention(inputs)
    assert attention.shape == (4, 3, 2, 5, 5)  # steps, heads, 4 slots and the input row
    torch.testing.assert_close(attention.sum(-1), torch.ones(4, 3, 2, 5))
    memory = model.initial_memory(4)
    for step in range(3):
        memory, details = model.core.step(model.scaled(inputs)[:, step], memory, return_details=True)
        assert torch.equal(attention[:, step], details.attention[0])
    torch.testing.assert_close(model.head(memory.flatten(1)), model(inputs))


@pytest.mark.filterwarnings("ignore:torch has no bfloat16 LSTM")
@KINDS
def test_bfloat16_training_step(kind):
    model = tiny_model(model=kind)
    inputs, targets = batch(8, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs)
        loss, _ = loss_and_correct(logits, targets)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.core.parameters())


def test_accuracy_in_pieces_and_by_rank():
    inputs, targets = batch(50, 3, 2)
    model = tiny_model()
    assert torch.equal(is_correct(model, inputs, targets, 7), model(inputs).argmax(1) == targets)
    n = torch.tensor([0, 0, 1, 2, 2, 2])
    by_rank = accuracy_by_rank(torch.tensor([True, False, False, True, True, True]), n, 4)
    assert by_rank[:3] == [0.5, 0.0, 1.0] and math.isnan(by_rank[3])


SIZE = "an integer of at least 1"
SCALE = "a finite number above 0"
BAD = [
    *[(name, 0, SIZE) for name in ("num_vectors", "num_dims", "hidden_size", "head_layers", "head_units")],
    *[("head_units", value, SIZE) for value in (-1, 2.0, True, None)],
    *[("input_scale", value, SCALE) for value in (0, -1.0, math.nan, math.inf, "3", True, None)],
    ("memory_scale", 0, SCALE),
    ("model", "gru", "'rmc' or 'lstm'"),
    ("mem_slots", 0, "."),
]


@pytest.mark.parametrize("name, value, rule", BAD)
def test_bad_argument_is_named(name, value, rule):
    with pytest.raises(ValueError, match=f"{name} must be {rule}.*got {value!r}"):
        NthFarthestModel(**SIZES | {name: value})

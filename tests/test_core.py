"""The relational memory core against independent truth: NumPy loops, invariants, numerical gradients, plain
against fast.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import relational_rnn_general
from relational_rnn_general import RelationalMemory

# All different, so that a swapped axis cannot pass by luck.
B, T, N, H, V, K, INPUT = 2, 5, 3, 4, 7, 11, 13
D = H * V


def make_core(seed=0, rough=0.3, **options):
    """A float64 core whose norms and biases are not at their neutral starting values."""
    torch.manual_seed(seed)
    options = {
        "mem_slots": N,
        "head_size": V,
        "input_size": INPUT,
        "num_heads": H,
        "key_size": K,
        "return_all_outputs": True,
    } | options
    core = RelationalMemory(**options).double()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(torch.randn_like(parameter) * rough)
    return core


def randn(*shape, requires_grad=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


@pytest.fixture(params=[False, True], ids=["plain", "fast"])
def fast(request):
    return request.param


# ---- One step, written down again as loops over rows and heads
# ----------------------------------------------------


def numpy_step(core, inputs, memory, mask=1):
    """One sequence, one step: inputs (M, input_size), memory and candidate mask (N, D) as arrays; straight
    from the equations.
    """
    p = {name: value.detach().numpy() for name, value in core.state_dict().items()}

    def linear(name, x):
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def norm(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    keys, values = core.key_size, core.head_size
    rows = [linear("input_projection", x) for x in inputs]
    z = [*memory, *rows]
    for b in range(core.num_blocks):
        features = [norm(f"blocks.{b}.qkv_norm", linear(f"blocks.{b}.qkv_projection", row)) for row in z]
        after = []
        for i, row in enumerate(z):
            update = []
            for h in range(core.num_heads):
                head = [f[h * (2 * keys + values) : (h + 1) * (2 * keys + values)] for f in features]
                scores = np.array([head[i][:keys] @ other[keys : 2 * keys] / np.sqrt(keys) for other in head])
                weights = np.exp(scores) / np.exp(scores).sum()
                update.extend(sum(w * other[2 * keys :] for w, other in zip(weights, head, strict=True)))
            attended = norm(f"blocks.{b}.attention_norm", row + np.array(update))
            hidden = attended
            for layer in range(core.attention_mlp_layers):
                hidden = linear(f"mlp.{layer}", np.maximum(hidden, 0) if layer else hidden)
            after.append(norm(f"blocks.{b}.mlp_norm", attended + hidden))
        z = after
    candidate = np.array(z[: core.mem_slots])
    if core.gate_style is None:
        return mask * candidate
    new = []
    for row, old in zip(mask * np.tanh(candidate), memory, strict=True):
        gates = linear("input_gate_projection", np.concatenate(rows)) + linear(
            "memory_gate_projection", np.tanh(old)
        )
        of_input, of_forget = np.split(gates, 2)
        new.append(
            sigmoid(of_input + core.input_bias) * row + sigmoid(of_forget + core.forget_bias) * old
        )
    return np.array(new)


@pytest.mark.parametrize("gate_style", ["unit", "memory", None])
@pytest.mark.parametrize(("blocks", "rows", "slots"), [(1, 1, 1), (1, 1, N), (2, 2, N), (3, 1, N)])
def test_a_sequence_equals_numpy_loops(gate_style, blocks, rows, slots, fast):
    core = make_core(
        gate_style=gate_style,
        num_blocks=blocks,
        input_rows=rows,
        mem_slots=slots,
        attention_mlp_layers=3,
        forget_bias=0.7,
        input_bias=-0.2,
    )
    core.fast = fast
    inputs, memory = randn(B, T, rows, INPUT), randn(B, slots, D, seed=2)
    # With recurrent dropout in some of the cases: it comes after the blocks, whatever their number.
    mask = randn(B, slots, D, seed=3) if blocks == 1 else None
    with torch.no_grad():
        outputs, final = core(inputs if rows > 1 else inputs.squeeze(2), memory, candidate_mask=mask)
    for b in range(B):
        expected = memory[b].numpy()
        factors = 1 if mask is None else mask[b].numpy()
        for t in range(T):
            expected = numpy_step(core, inputs[b, t].numpy(), expected, factors)
            np.testing.assert_allclose(outputs[b, t].view(slots, D).numpy(), expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(final[b].numpy(), expected, rtol=0, atol=1e-10)


# ---- The fast path and the plain step are the same function
# ------------------------------------------------------


def everything(core, inputs, memory, used, mask=None):
    """Outputs, final memory and all gradients of a random linear loss on the used results."""
    outputs, final = core(inputs, memory, candidate_mask=mask)
    loss = 0
    if "outputs" in used:
        loss = loss + (outputs * randn(*outputs.shape, seed=3).to(outputs.dtype)).sum()
    if "memory" in used:
        loss = loss + (final * randn(*final.shape, seed=4).to(outputs.dtype)).sum()
    names = ["inputs", "memory", *(name for name, _ in core.named_parameters())]
    gradients = torch.autograd.grad(loss, (inputs, memory, *core.parameters()))
    with torch.no_grad():
        again = core(inputs, memory, candidate_mask=mask)
    results = {
        "outputs": outputs,
        "final": final,
        "outputs without grad": again[0],
        "final without grad": again[1],
    }
    return results | dict(zip(names, gradients, strict=True))


OPTIONS = [
    {
        "mem_slots": slots,
        "input_rows": rows,
        "num_blocks": blocks,
        "gate_style": gate,
        "attention_mlp_layers": layers,
        "key_size": key,
        "steps": steps,
        "return_all_outputs": every,
        "used": used,
        "deferred": deferred,
        "masked": masked,
    }
    for index, (slots, rows, blocks, gate, layers, key, steps, every, used, deferred, masked) in enumerate(
        itertools.product(
            (1, N),
            (1, 2),
            (1, 3),
            ("unit", "memory", None),
            (1, 3),
            (None, K),
            (1, T),
            (True, False),
            ("outputs", "memory", "outputs and memory"),
            (True, False),
            (True, False),
        )
    )
    if index % 41 == 0  # 113 of 4,608 combinations; 41 shares no factor with the options' counts
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_fast_path_equals_plain_step_in_outputs_memories_and_every_gradient(options, monkeypatch):
    options = dict(options)
    steps, used, deferred = options.pop("steps"), options.pop("used"), options.pop("deferred")
    masked = options.pop("masked")
    monkeypatch.setattr(relational_rnn_general, "DEFERRED_ROWS", 512 if deferred else 0)
    core = make_core(head_size=5, num_heads=3, forget_bias=0.7, input_bias=-0.2, **options)
    # Two steps per product, so that the last one of a window of T steps has but one; or one step, for want of
    # room.
    span = 1 if masked else 2 * B * core.mem_slots + 1
    monkeypatch.setattr(relational_rnn_general, "DEFERRED_SPAN", span)
    rows = (core.input_rows, INPUT) if core.input_rows > 1 else (INPUT,)
    inputs = randn(B, steps, *rows, requires_grad=True)
    memory = randn(B, core.mem_slots, core.mem_size, requires_grad=True, seed=2)
    mask = randn(B, core.mem_slots, core.mem_size, seed=5) if masked else None
    results = []
    for core.fast in (False, True):
        results.append(everything(core, inputs, memory, used, mask))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("gate_style", ["unit", None])
def test_recurrent_dropout_multiplies_the_candidate_alone(gate_style, fast):
    core = make_core(gate_style=gate_style, forget_bias=100.0)
    core.fast = fast
    inputs, memory = randn(B, T, INPUT), randn(B, N, D, seed=2)
    mask = torch.zeros(B, N, D, requires_grad=True)
    outputs, final = core(inputs, memory, candidate_mask=mask)
    # Nothing new gets in; with gates, what was there stays.
    expected = torch.zeros_like(memory) if gate_style is None else memory
    torch.testing.assert_close(final, expected)
    assert torch.autograd.grad(final.sum(), mask, allow_unused=True)[0] is None
    half = torch.full((B, N, D), 0.5)
    stepped = core.step(inputs[:, 0], memory, candidate_mask=half)
    torch.testing.assert_close(core(inputs[:, :1], memory, candidate_mask=half)[1], stepped)
    with pytest.raises(ValueError, match=r"candidate_mask must have .* \(2, 3, 28\), got \(3, 28\)"):
        core(inputs, memory, candidate_mask=half[0])


def test_fast_path_equals_plain_step_in_float32():
    core = make_core(num_blocks=2, rough=0.1).float()
    inputs, memory = (
        randn(B, T, INPUT).float().requires_grad_(),
        randn(B, N, D, seed=2).float().requires_grad_(),
    )
    results = []
    for core.fast in (False, True):
        results.append(everything(core, inputs, memory, "outputs and memory"))
    for name, expected in results[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=1e-4 * max(1, scale), msg=name)


@pytest.mark.parametrize("slots", [1, N])
def test_inputs_larger_than_the_memory_are_not_folded_and_still_equal(slots):
    """Folding two layers into one pays for small inputs; both sides of that rule are one function."""
    core = make_core(mem_slots=slots, input_size=3 * D)
    inputs, memory = randn(B, T, 3 * D, requires_grad=True), randn(B, slots, D, requires_grad=True, seed=2)
    results = []
    for core.fast in (False, True):
        results.append(everything(core, inputs, memory, "outputs"))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-9, atol=1e-9, msg=name)


def test_many_windows_with_dropout_and_odd_lengths_equal_between_paths():
    core = make_core(mem_slots=1)
    inputs = nn.functional.dropout(randn(B, 17, INPUT), 0.5)
    results = []
    for core.fast in (False, True):
        core.zero_grad()
        memory, loss = core.initial_state(B), 0
        for window in inputs.split((1, 7, 8, 1), dim=1):
            outputs, memory = core(window, memory)
            loss = (
                loss + (outputs**2).mean() + memory.sum() * 0.1
            )  # outputs and memory used, and memory used twice
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in core.parameters()])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [512, 5])
@pytest.mark.parametrize("slots", [1, N])
def test_errors_wait_for_so_many_rows_and_no_longer(slots, rows, monkeypatch):
    """This bounds the memory of the backward pass."""
    made, gradient = [], relational_rnn_general._LinearGradient

    def noting(weight, stack):
        made.append((weight, stack))
        return gradient(weight, stack)

    monkeypatch.setattr(relational_rnn_general, "_LinearGradient", noting)
    monkeypatch.setattr(relational_rnn_general, "DEFERRED_SPAN", rows)
    core = make_core(mem_slots=slots)
    core(randn(B, T, INPUT))[0].sum().backward()
    steps = T if rows == 512 else max(1, 5 // (B * slots))
    stacks = [stack for weight, stack in made if slots > 1 or weight.size(0) != 2 * D]
    assert len(stacks) == 3 + (slots > 1) and {len(stack) for stack in stacks} == {steps}
    # A step with too many rows does not wait at all.
    monkeypatch.setattr(relational_rnn_general, "DEFERRED_ROWS", B * (slots + 1) - 1)
    made.clear()
    core(randn(B, T, INPUT))[0].sum().backward()
    assert [stack for weight, stack in made if slots > 1 or weight.size(0) != 2 * D] == [None] * len(stacks)


@pytest.mark.parametrize("slots", [1, N])
def test_backward_twice_through_a_retained_graph(slots, fast):
    core = make_core(mem_slots=slots)
    core.fast = fast
    outputs, _ = core(randn(B, T, INPUT))
    loss = outputs.square().sum()
    first = torch.autograd.grad(loss, list(core.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(core.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("slots", [1, N])
def test_memories_and_gradients_of_any_layout_equal_between_paths(slots):
    """A learned start expanded over the batch, a transposed memory, a result used transposed."""
    core = make_core(mem_slots=slots, num_blocks=2)
    inputs = randn(B, T, INPUT)
    learned = randn(1, slots, D, requires_grad=True)
    turned = randn(slots, B, D, seed=2, requires_grad=True)
    results = []
    for core.fast in (False, True):
        gradients = []
        for memory in (learned.expand(B, -1, -1), turned.transpose(0, 1)):
            outputs, final = core(inputs, memory)
            loss = (final.permute(1, 2, 0).contiguous() * randn(slots, D, B, seed=3)).sum()
            loss = loss + (outputs.permute(2, 0, 1).contiguous() * randn(slots * D, B, T, seed=4)).sum()
            gradients += torch.autograd.grad(loss, (memory, *core.parameters()))
        results.append(gradients)
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", [1, 2])
def test_autocast_lowers_products_alone(blocks):
    """Memory, norms, attention and gates stay in float32; both paths stay near the exact result."""
    core = make_core(num_blocks=blocks, rough=0.1).float()
    inputs = randn(B, T, INPUT).float()
    exact, _ = core(inputs)
    results = []
    for core.fast in (False, True):
        core.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, memory = core(inputs)
            _, details = core.step(inputs[:, 0], memory, return_details=True)
            loss = outputs.square().mean()
        loss.backward()
        inside = (outputs, memory, details.input_gate, details.attention[0])
        assert {value.dtype for value in inside} == {torch.float32}
        assert 0 < (outputs - exact).abs().max() < 0.1
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in core.parameters())
        results.append(outputs.detach())
    assert (results[0] - results[1]).abs().max() < 0.1
    lower = torch.bfloat16
    hoisted = core._hoist(inputs.transpose(0, 1).unsqueeze(2), core._scan_weights(lower), lower)
    for value in hoisted[:2]:  # numbers of full precision, not lowered ones that were widened
        assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float())


def test_autocast_leaves_a_core_of_another_precision_alone():
    core = make_core()
    inputs = randn(B, T, INPUT)
    expected, _ = core(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = core(inputs)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def test_an_empty_batch_gives_empty_results(fast):
    core = make_core()
    core.fast = fast
    outputs, memory = core(randn(0, T, INPUT))
    assert outputs.shape == (0, T, N * D) and memory.shape == (0, N, D)


# ---- Derivatives
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "rows", "blocks", "gate"), [(1, 1, 1, "unit"), (2, 1, 1, "memory"), (2, 2, 2, None)]
)
def test_gradients_equal_numerical_differences(slots, rows, blocks, gate, fast):
    core = make_core(
        mem_slots=slots,
        head_size=2,
        num_heads=2,
        key_size=3,
        input_size=3,
        input_rows=rows,
        num_blocks=blocks,
        gate_style=gate,
    )
    core.fast = fast
    inputs = randn(B, 3, *((rows, 3) if rows > 1 else (3,)), requires_grad=True)
    memory = randn(B, slots, 4, requires_grad=True, seed=2)
    parameters = [p.detach().clone().requires_grad_() for p in core.parameters()]
    names = [name for name, _ in core.named_parameters()]

    def run(inputs, memory, *values):
        return torch.func.functional_call(core, dict(zip(names, values, strict=True)), (inputs, memory))

    assert torch.autograd.gradcheck(run, (inputs, memory, *parameters))


def test_second_derivatives_are_right_on_the_plain_step_and_refused_on_the_fast_path():
    core = make_core(mem_slots=2, head_size=2, num_heads=2, key_size=3, input_size=3)
    inputs, memory = randn(1, 2, 3, requires_grad=True), randn(1, 2, 4, requires_grad=True, seed=2)
    core.fast = False
    assert torch.autograd.gradgradcheck(lambda x, m: core(x, m)[0], (inputs, memory))
    core.fast = True
    with pytest.raises(RuntimeError, match="core.fast = False"):
        torch.autograd.grad(core(inputs, memory)[0].sum(), inputs, create_graph=True)


def test_torch_func_transforms_equal_autograd():
    core = make_core()
    inputs = randn(B, T, INPUT)
    parameters = {name: p.detach() for name, p in core.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(core, parameters, (inputs,))[0].square().sum()

    transformed = torch.func.grad(loss)(parameters)
    core(inputs)[0].square().sum().backward()
    for name, parameter in core.named_parameters():
        torch.testing.assert_close(transformed[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_forward_mode_derivatives_are_right_and_batched_gradients_refused():
    core = make_core(mem_slots=2, head_size=2, num_heads=2, key_size=3, input_size=3)
    inputs, tangent = randn(B, T, 3), randn(B, T, 3, seed=2)
    _, expected = torch.func.jvp(lambda x: core(x)[0], (inputs,), (tangent,))
    with forward_ad.dual_level():
        outputs, _ = core(forward_ad.make_dual(inputs, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(outputs).tangent, expected)
    outputs, _ = core(inputs.requires_grad_())
    with pytest.raises(RuntimeError, match="core.fast = False"):
        torch.autograd.grad(outputs, inputs, torch.ones(2, *outputs.shape).double(), is_grads_batched=True)


def test_fault_6_every_parameter_and_the_given_memory_get_a_gradient(fast):
    """Rules out: memory detached inside forward, so that a given state gets no gradient."""
    core = make_core(num_blocks=3, attention_mlp_layers=2)
    core.fast = fast
    memory = randn(B, N, D, requires_grad=True)
    core(randn(B, T, INPUT), memory)[0].square().sum().backward()
    assert memory.grad.abs().sum() > 0
    for name, parameter in core.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ---- Invariants
# ------------------------------------------------------------------------------------------------------


def test_two_windows_equal_one_long_window_and_a_loop_of_steps(fast):
    core = make_core()
    core.fast = fast
    inputs = randn(B, T, INPUT)
    whole, final = core(inputs, core.initial_state(B))
    first, carried = core(inputs[:, :2], core.initial_state(B))
    second, final_again = core(inputs[:, 2:], carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(final_again, final)
    memory = core.initial_state(B)
    for t in range(T):
        memory = core.step(inputs[:, t], memory)
        torch.testing.assert_close(memory.flatten(1), whole[:, t])


def test_closed_input_gate_and_open_forget_gate_keep_the_memory_exactly(fast):
    core = make_core(forget_bias=1000.0, input_bias=-1000.0)
    core.fast = fast
    memory = randn(B, N, D)
    outputs, final = core(randn(B, T, INPUT), memory)
    assert torch.equal(final, memory)
    assert torch.equal(outputs, memory.flatten(1).unsqueeze(1).expand(-1, T, -1))


def test_permuted_slots_give_permuted_slots(fast):
    core = make_core(num_blocks=2)
    core.fast = fast
    inputs, memory, order = randn(B, T, INPUT), randn(B, N, D, seed=2), torch.tensor([2, 0, 1])
    torch.testing.assert_close(core(inputs, memory[:, order])[1], core(inputs, memory)[1][:, order])


def test_another_sequence_or_a_later_input_changes_nothing(fast):
    core = make_core()
    core.fast = fast
    inputs = randn(B, T, INPUT)
    outputs, _ = core(inputs)
    other = inputs.clone()
    other[1] += 1
    other[0, T - 1] += 1
    changed, _ = core(other)
    torch.testing.assert_close(changed[0, : T - 1], outputs[0, : T - 1], rtol=0, atol=1e-14)
    assert (changed[0, T - 1] - outputs[0, T - 1]).abs().max() > 1e-3


@pytest.mark.parametrize(("gate", "gate_size"), [("unit", 2 * D), ("memory", 2), (None, 0)])
def test_fault_1_parameter_count_equals_the_formula(gate, gate_size):
    """Rules out: one shared MLP layer; projections and norms shared by all blocks; trainable gate biases;
    norms over slots.
    """
    blocks, layers, rows, qkv = 3, 4, 2, H * (2 * K + V)
    expected = (INPUT + 1) * D + layers * (D + 1) * D + blocks * ((D + 1) * qkv + 2 * qkv + 4 * D)
    expected += (rows * D + 1) * gate_size + (D + 1) * gate_size
    for slots in (1, N, 50):
        core = make_core(
            mem_slots=slots, num_blocks=blocks, attention_mlp_layers=layers, gate_style=gate, input_rows=rows
        )
        assert sum(p.numel() for p in core.parameters()) == expected


def test_fault_1_parameters_do_not_depend_on_the_slot_count():
    """Rules out: layer norm over slots and features together. Weights of one slot count load into another."""
    few, many = make_core(mem_slots=2), make_core(mem_slots=9, seed=1)
    many.load_state_dict(few.state_dict())


def test_fault_1_norms_work_on_single_rows(fast):
    """Rules out: layer norm running over slots and features together. A row's value must not move another
    row's norm.
    """
    core = make_core(num_heads=1, head_size=6, key_size=4, gate_style=None)
    core.fast = fast
    with torch.no_grad():  # no values: rows cannot reach each other
        core.blocks[0].qkv_norm.weight[8:] = 0
        core.blocks[0].qkv_norm.bias[8:] = 0
    inputs, memory = randn(B, 1, INPUT), randn(B, N, 6, seed=2)
    changed = memory.clone()
    changed[:, 0] *= 5
    torch.testing.assert_close(core(inputs, changed)[1][:, 1:], core(inputs, memory)[1][:, 1:])


def test_fault_1_last_mlp_layer_is_linear():
    """Rules out: a ReLU after the last MLP layer, which cannot put out negative numbers."""
    core = make_core(gate_style=None, attention_mlp_layers=1)
    with torch.no_grad():
        core.mlp[0].weight.zero_()
        core.mlp[0].bias.copy_(-torch.arange(D).double() * 100)  # drowns the residual
        core.blocks[0].mlp_norm.weight.fill_(1)
        core.blocks[0].mlp_norm.bias.zero_()
    memory = core.step(randn(B, INPUT), core.initial_state(B))
    assert memory.std(dim=-1).min() > 0.9 and (memory.diff(dim=-1) < 0).all()


def test_scores_are_scaled_by_the_key_size():
    """Rules out: scores scaled by a size other than key_size. Equal rows but for K copies give the same
    attention.
    """
    one = make_core(num_heads=1, key_size=1, gate_style=None)
    four = make_core(num_heads=1, key_size=4, gate_style=None)
    with torch.no_grad():
        for core, copies in ((one, 1), (four, 4)):
            core.input_projection.weight.copy_(one.input_projection.weight)
            core.input_projection.bias.copy_(one.input_projection.bias)
            qkv = core.blocks[0].qkv_projection
            qkv.weight.zero_()
            qkv.bias.copy_(torch.tensor([1.0] * copies + [2.0] * copies + [0.0] * V))
            core.blocks[0].qkv_norm.weight.fill_(0)
            core.blocks[0].qkv_norm.bias.copy_(torch.tensor([1.0] * copies + [2.0] * copies + [0.0] * V))
    _, details = four.step(randn(B, INPUT), four.initial_state(B), return_details=True)
    torch.testing.assert_close(details.attention[0], torch.full((B, 1, N + 1, N + 1), 1 / (N + 1)).double())
    with torch.no_grad():  # row i's key is i: scores 4 * i / sqrt(4)
        for core, copies in ((one, 1), (four, 4)):
            core.blocks[0].qkv_norm.weight[copies : 2 * copies] = 1
            core.blocks[0].qkv_projection.weight[copies : 2 * copies] = 0
            core.blocks[0].qkv_projection.bias[copies : 2 * copies] = 3
    scores = {}
    for core, copies in ((one, 1), (four, 4)):
        rows = torch.cat([core.initial_state(B), core.input_projection(randn(B, 1, INPUT))], dim=1)
        block = core.blocks[0]
        features = block.qkv_norm(block.qkv_projection(rows))
        query, key = features[..., :copies], features[..., copies : 2 * copies]
        scores[copies] = torch.softmax(query @ key.transpose(1, 2) / copies**0.5, dim=-1)
        _, details = core.step(randn(B, 1, INPUT).squeeze(1), core.initial_state(B), return_details=True)
        torch.testing.assert_close(details.attention[0].squeeze(1), scores[copies])


# ---- The interface
# ---------------------------------------------------------------------------------------------------


def test_multi_dimensional_inputs_are_flattened(fast):
    core = make_core(input_size=3 * 4 * 2)
    core.fast = fast
    inputs = randn(B, T, 3, 4, 2)
    torch.testing.assert_close(core(inputs)[0], core(inputs.flatten(2))[0], rtol=0, atol=0)


def test_fault_6_input_rows_are_attended_each_by_itself(fast):
    """Rules out: input as a matrix of rows being unusable. Permuted input rows change only what the gates
    see.
    """
    core = make_core(input_rows=2, gate_style=None)
    core.fast = fast
    inputs = randn(B, T, 2, INPUT)
    torch.testing.assert_close(core(inputs.flip(2))[1], core(inputs)[1])
    torch.testing.assert_close(core(inputs.unflatten(-1, (INPUT, 1)))[1], core(inputs)[1], rtol=0, atol=0)


def test_outputs_are_the_memory_flattened_and_the_last_one_alone_on_request(fast):
    core = make_core()
    core.fast = fast
    inputs = randn(B, T, INPUT)
    outputs, memory = core(inputs)
    assert outputs.shape == (B, T, core.output_size) and memory.shape == (B, *core.state_size)
    assert torch.equal(outputs[:, -1], memory.flatten(1))
    core.return_all_outputs = False
    last, memory_again = core(inputs)
    assert torch.equal(last, memory.flatten(1)) and torch.equal(memory_again, memory)


def test_no_memory_given_means_the_initial_state_in_the_inputs_dtype(fast):
    core = make_core()
    core.fast = fast
    torch.testing.assert_close(
        core(randn(B, T, INPUT))[1], core(randn(B, T, INPUT), core.initial_state(B))[1]
    )
    assert core.initial_state(B).dtype == torch.float64
    assert torch.equal(core.initial_state(B), torch.eye(N, D).double().expand(B, N, D))
    tall = RelationalMemory(6, 2, 3)  # more slots than features
    assert torch.equal(tall.initial_state(B), torch.eye(6, 2).expand(B, 6, 2))


@pytest.mark.parametrize(("gate", "width"), [("unit", D), ("memory", 1)])
def test_gates_and_attention_on_request(gate, width, fast):
    core = make_core(gate_style=gate, num_blocks=2)
    core.fast = fast
    inputs = randn(B, T, INPUT)
    _, memory, gates = core(inputs, return_gates=True)
    _, before = core(inputs[:, :-1])
    after, details = core.step(inputs[:, -1], before, return_details=True)
    torch.testing.assert_close(after, memory)
    assert details.input_gate.shape == (B, N, width)
    torch.testing.assert_close(gates[0], details.input_gate)
    torch.testing.assert_close(gates[1], details.forget_gate)
    assert [a.shape for a in details.attention] == [(B, H, N + 1, N + 1)] * 2
    torch.testing.assert_close(details.attention[1].sum(-1), torch.ones(B, H, N + 1).double())


def test_gates_of_a_core_without_gates_are_refused():
    core = make_core(gate_style=None)
    with pytest.raises(ValueError, match="gate_style is None"):
        core(randn(B, T, INPUT), return_gates=True)
    assert core.step(randn(B, INPUT), core.initial_state(B), return_details=True)[1].input_gate is None


def test_initialisation_is_the_originals():
    core = RelationalMemory(2, 64, 50, num_heads=4, gate_style="unit")
    for module in core.modules():
        if isinstance(module, nn.Linear):
            deviation = module.in_features**-0.5
            assert module.weight.abs().max() <= 2 * deviation
            assert (
                abs(module.weight.std().item() / deviation - 0.8796) < 0.02
            )  # of a normal cut at two deviations
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5


def test_nothing_is_kept_on_the_module():
    """State is an argument and a return value: a call's answer does not depend on what ran before."""
    core = make_core()
    inputs = randn(B, T, INPUT)
    first, _ = core(inputs)
    core(randn(B, T, INPUT, seed=9))
    assert torch.equal(core(inputs)[0], first)
    assert not list(core.buffers())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("mem_slots", 0),
        ("head_size", -1),
        ("input_size", 0),
        ("num_heads", 1.5),
        ("num_blocks", 0),
        ("key_size", -2),
        ("attention_mlp_layers", 0),
        ("input_rows", 0),
        ("gate_style", "units"),
        ("gate_style", "none"),
        ("forget_bias", float("nan")),
        ("input_bias", float("inf")),
        ("mem_slots", True),
        ("head_size", "8"),
        ("forget_bias", None),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(argument, value):
    options = {"mem_slots": 2, "head_size": 3, "input_size": 5} | {argument: value}
    with pytest.raises(ValueError, match=rf"^{argument} must be .*got {value!r}"):
        RelationalMemory(**options)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (1, (B, T, INPUT + 1)),
        (1, (B, INPUT)),
        (1, (B, T)),
        (2, (B, T, 3, INPUT)),
        (2, (B, T, INPUT)),
        (2, (B, T, 2, INPUT - 1)),
    ],
)
def test_wrong_input_shapes_say_what_was_expected_and_found(rows, shape):
    core = make_core(input_rows=rows)
    with pytest.raises(ValueError, match=r"inputs must have shape \(B, T.*got \("):
        core(randn(*shape))


def test_wrong_memory_shapes_and_empty_sequences_are_refused():
    core = make_core()
    for shape in ((B, N, D + 1), (B + 1, N, D), (N, D)):
        with pytest.raises(ValueError, match=r"memory must have shape .*got \("):
            core(randn(B, T, INPUT), randn(*shape))
    for fast in (True, False):
        core.fast = fast
        with pytest.raises(ValueError, match="memory must be torch.float64, .* got torch.float32"):
            core(randn(B, T, INPUT), randn(B, N, D).float())
    with pytest.raises(ValueError, match="at least one time step"):
        core(randn(B, 0, INPUT))

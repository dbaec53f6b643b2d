"""Both classes of the core: NumPy loops, resets, derivatives, invariants, interface, mistakes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import RelationalMemory

# All different: a swapped axis cannot pass by luck.
B, T, N, H, V, K, INPUT = 2, 5, 3, 4, 7, 11, 13
D = H * V


@pytest.fixture(params=[RelationalMemory, FastRelationalMemory], ids=["plain", "fast"])
def kind(request):
    return request.param


def make_core(kind, seed=0, **options):
    """A float64 core whose norms and biases are not at their neutral initial values."""
    torch.manual_seed(seed)
    sizes = {"mem_slots": N, "head_size": V, "input_size": INPUT, "num_heads": H, "key_size": K}
    core = kind(**{**sizes, "return_all_outputs": True, **options}).double()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return core


def randn(*shape, requires_grad=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


# ---- one step, written down again as loops over rows and heads


def numpy_step(core, inputs, memory, mask=1):
    """One step of one sequence from the equations; inputs (M, input_size), memory and mask (N, D)."""
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
        gates = linear("input_gate_projection", np.concatenate(rows))
        of_input, of_forget = np.split(gates + linear("memory_gate_projection", np.tanh(old)), 2)
        new.append(sigmoid(of_input + core.input_bias) * row + sigmoid(of_forget + core.forget_bias) * old)
    return np.array(new)


@pytest.mark.parametrize("gate_style", ["unit", "memory", None])
@pytest.mark.parametrize(("blocks", "rows", "slots"), [(1, 1, 1), (1, 1, N), (2, 2, N), (3, 1, N)])
def test_sequence_equals_numpy_loops(gate_style, blocks, rows, slots, kind):
    core = make_core(
        kind, gate_style=gate_style, num_blocks=blocks, input_rows=rows, mem_slots=slots,
        attention_mlp_layers=3, forget_bias=0.7, input_bias=-0.2,
    )  # fmt: skip
    inputs, memory = randn(B, T, rows, INPUT), randn(B, slots, D, seed=2)
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


# ---- resets, masks, gates


@pytest.mark.parametrize("options", [{}, {"mem_slots": 1}, {"num_blocks": 2, "gate_style": "memory"}])
@pytest.mark.parametrize("given", [True, False], ids=["reset_memory", "initial_state"])
def test_resets_equal_a_loop_of_steps_with_where_in_results_and_gradients(options, given, kind):
    core = make_core(kind, **options)
    slots = core.mem_slots
    inputs = randn(B, T, INPUT, requires_grad=True)
    memory = randn(B, slots, D, requires_grad=True, seed=2)
    reset_memory = randn(B, slots, D, requires_grad=True, seed=3) if given else None
    resets = torch.tensor([[False, True, False, True, False], [True, False, False, False, True]])
    outputs, final = core(inputs, memory, resets=resets, reset_memory=reset_memory)
    expected, now = [], memory
    for t in range(T):
        fresh = core.initial_state(B) if reset_memory is None else reset_memory
        now = torch.where(resets[:, t, None, None], fresh, now)
        now = RelationalMemory.step(core, inputs[:, t], now)
        expected.append(now.flatten(1))
    torch.testing.assert_close(outputs, torch.stack(expected, dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(final, now, rtol=0, atol=1e-12)
    leaves = [inputs, memory, *core.parameters(), *([reset_memory] if given else [])]
    factor = randn(B, T, slots * D, seed=4)
    ours = torch.autograd.grad((outputs * factor).sum(), leaves)
    theirs = torch.autograd.grad((torch.stack(expected, dim=1) * factor).sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert ours[1][0].any() and not ours[1][1].any()  # the second sequence is reset at its first step


def test_steps_with_resets_equal_the_sequence_and_one_row_resets_the_batch(kind):
    core, inputs, row = make_core(kind), randn(B, T, INPUT), randn(1, N, D, requires_grad=True, seed=3)
    resets = torch.tensor([[False, True, False, True, False], [True, False, False, False, True]])
    for given in (row, None):
        outputs, final = core(inputs, resets=resets, reset_memory=given)
        memory = core.initial_state(B)
        for t in range(T):
            memory = core.step(inputs[:, t], memory, resets=resets[:, t], reset_memory=given)
            torch.testing.assert_close(outputs[:, t], memory.flatten(1), rtol=0, atol=1e-12)
        if given is not None:
            gradients = (torch.autograd.grad(x.sum(), row)[0] for x in (final, memory))
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_resets_of_another_type_or_shape_are_rejected(kind):
    core, inputs, fits = make_core(kind), randn(B, T, INPUT), torch.zeros(B, T, dtype=torch.bool)
    for resets in (torch.zeros(B, T), torch.zeros(T, B, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"resets must be bool of shape \(B, T\) = \(2, 5\), got"):
            core(inputs, resets=resets)
    with pytest.raises(ValueError, match=r"resets must be bool of shape \(B\) = \(2,\), got torch.bool of"):
        core.step(inputs[:, 0], core.initial_state(B), resets=fits)
    for resets in (fits.tolist(), fits.numpy()):
        with pytest.raises(TypeError, match="resets must be a tensor, got a (list|ndarray). .*as_tensor"):
            core(inputs, resets=resets)
    with pytest.raises(ValueError, match="reset_memory must have shape"):
        core(inputs, resets=fits, reset_memory=randn(B, N, D + 1))
    with pytest.raises(ValueError, match="reset_memory has no effect without resets"):
        core(inputs, reset_memory=randn(B, N, D))


@pytest.mark.parametrize("gate_style", ["unit", None])
def test_candidate_mask_multiplies_the_candidate_and_gets_no_gradient(gate_style, kind):
    core = make_core(kind, gate_style=gate_style, forget_bias=100.0)
    inputs, memory = randn(B, T, INPUT), randn(B, N, D, seed=2)
    mask = torch.zeros(B, N, D, requires_grad=True)
    outputs, final = core(inputs, memory, candidate_mask=mask)
    torch.testing.assert_close(final, torch.zeros_like(memory) if gate_style is None else memory)
    assert torch.autograd.grad(final.sum(), mask, allow_unused=True)[0] is None
    half = torch.full((B, N, D), 0.5, dtype=torch.float32)  # converted to the memory's type
    stepped = core.step(inputs[:, 0], memory, candidate_mask=half)
    outputs, _ = core(inputs[:, :2], memory, candidate_mask=half)
    torch.testing.assert_close(outputs[:, 0], stepped.flatten(1))
    single = make_core(kind).float()
    assert single(inputs.float(), candidate_mask=half.double())[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"candidate_mask must have .* \(2, 3, 28\), got \(3, 28\)"):
        core(inputs, memory, candidate_mask=half[0])


@pytest.mark.parametrize(("gate", "width"), [("unit", D), ("memory", 1)])
def test_gates_and_attention_of_one_step_and_of_a_sequence_agree(gate, width, kind):
    core = make_core(kind, gate_style=gate, num_blocks=2)
    inputs = randn(B, T, INPUT)
    _, memory = core(inputs)
    _, before = core(inputs[:, :-1])
    after, details = core.step(inputs[:, -1], before, return_details=True)
    torch.testing.assert_close(after, memory)
    assert details.input_gate.shape == (B, N, width)
    assert [a.shape for a in details.attention] == [(B, H, N + 1, N + 1)] * 2
    torch.testing.assert_close(details.attention[1].sum(-1), torch.ones(B, H, N + 1).double())
    at_end = torch.arange(T).expand(B, T) == T - 1
    for whole in core.inspect(inputs), core.inspect(inputs, randn(B, N, D), at_end, before):
        assert whole.attention[0].shape == (B, T, H, N + 1, N + 1) and not whole.attention[0].requires_grad
        torch.testing.assert_close(whole.input_gate[:, -1], details.input_gate)
        torch.testing.assert_close(whole.forget_gate[:, -1], details.forget_gate)
        torch.testing.assert_close([a[:, -1] for a in whole.attention], details.attention)


def test_core_without_gates_has_none_to_return(kind):
    core, inputs = make_core(kind, gate_style=None, input_rows=2), randn(B, T, 2, INPUT)
    assert core.step(inputs[:, 0], core.initial_state(B), return_details=True)[1].input_gate is None
    details = core.inspect(inputs, randn(B, N, D))
    assert details.forget_gate is None and details.attention[0].shape == (B, T, H, N + 2, N + 2)


# ---- derivatives


def test_plain_class_has_right_second_derivatives_and_fast_class_rejects_them():
    sizes = {"mem_slots": 2, "head_size": 2, "num_heads": 2, "key_size": 3, "input_size": 3}
    plain, fast = (make_core(kind, **sizes) for kind in (RelationalMemory, FastRelationalMemory))
    inputs, memory = randn(1, 2, 3, requires_grad=True), randn(1, 2, 4, requires_grad=True, seed=2)
    assert torch.autograd.gradgradcheck(lambda x, m: plain(x, m)[0], (inputs, memory))
    with pytest.raises(RuntimeError, match="Use RelationalMemory"):
        torch.autograd.grad(fast(inputs, memory)[0].sum(), inputs, create_graph=True)
    outputs, _ = fast(inputs, memory)
    with pytest.raises(RuntimeError, match="Use RelationalMemory"):
        torch.autograd.grad(outputs, inputs, torch.ones(2, *outputs.shape).double(), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:FastRelationalMemory runs the slower loop")
def test_torch_func_transforms_and_forward_mode_equal_autograd(kind):
    core, inputs, tangent = make_core(kind), randn(B, T, INPUT), randn(B, T, INPUT, seed=2)
    parameters = {name: p.detach() for name, p in core.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(core, parameters, (inputs,))[0].square().sum()

    transformed = torch.func.grad(loss)(parameters)
    core(inputs)[0].square().sum().backward()
    for name, parameter in core.named_parameters():
        torch.testing.assert_close(transformed[name], parameter.grad, rtol=1e-9, atol=1e-9)

    near = (core(inputs + 1e-6 * tangent)[0] - core(inputs - 1e-6 * tangent)[0]) / 2e-6
    with forward_ad.dual_level():
        outputs, _ = core(forward_ad.make_dual(inputs, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(outputs).tangent, near, rtol=1e-6, atol=1e-7)
    _, along = torch.func.jvp(lambda x: core(x)[0], (inputs,), (tangent,))
    torch.testing.assert_close(along, near, rtol=1e-6, atol=1e-7)
    several = torch.stack([inputs, tangent])
    together = torch.func.vmap(lambda x: core(x)[0])(several)
    torch.testing.assert_close(together, torch.stack([core(x)[0] for x in several]))


# ---- interface


def test_multi_dimensional_inputs_are_flattened(kind):
    core, inputs = make_core(kind, input_size=3 * 4 * 2), randn(B, T, 3, 4, 2)
    torch.testing.assert_close(core(inputs)[0], core(inputs.flatten(2))[0], rtol=0, atol=0)
    core, inputs = make_core(kind, input_rows=2), randn(B, T, 2, INPUT, 1)
    torch.testing.assert_close(core(inputs)[0], core(inputs.squeeze(4))[0], rtol=0, atol=0)


def test_outputs_are_the_flattened_memories_of_all_steps_or_of_the_last(kind):
    core, inputs = make_core(kind), randn(B, T, INPUT)
    outputs, memory = core(inputs)
    assert outputs.shape == (B, T, core.output_size) and memory.shape == (B, *core.state_size)
    assert torch.equal(outputs[:, -1], memory.flatten(1))
    core.return_all_outputs = False
    last, memory_again = core(inputs)
    assert torch.equal(last, memory.flatten(1)) and torch.equal(memory_again, memory)
    with torch.no_grad():
        last, memory_again = core(inputs)
        last.zero_()  # the output shares nothing with the memory, and the memory nothing with other steps
    assert torch.equal(memory_again, memory)
    assert memory_again.untyped_storage().nbytes() == memory_again.nbytes


def test_no_memory_means_the_initial_state(kind):
    core, inputs = make_core(kind), randn(B, T, INPUT)
    torch.testing.assert_close(core(inputs)[1], core(inputs, core.initial_state(B))[1])
    assert torch.equal(core.initial_state(B), torch.eye(N, D).double().expand(B, N, D))
    assert torch.equal(kind(6, 2, 3).initial_state(B), torch.eye(6, 2).expand(B, 6, 2))


def test_empty_batch_gives_empty_results(kind):
    outputs, memory = make_core(kind)(randn(0, T, INPUT))
    assert outputs.shape == (0, T, N * D) and memory.shape == (0, N, D)


@pytest.mark.parametrize("options", [{}, {"init_scale": 1.5}])
def test_initialization_is_the_originals_times_init_scale(options, kind):
    for module in kind(2, 64, 50, num_heads=4, **options).modules():
        if isinstance(module, nn.Linear):
            deviation = module.in_features**-0.5 * options.get("init_scale", 1)
            assert module.weight.abs().max() <= 2 * deviation
            assert abs(module.weight.std().item() / deviation - 0.8796) < 0.02  # a normal, cut at two
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-5


@pytest.mark.parametrize("blocks", [1, 2])
def test_autocast_lowers_products_only(blocks, kind):
    core, inputs = make_core(kind, num_blocks=blocks).float(), randn(B, T, INPUT).float()
    exact, _ = core(inputs)
    normed = []
    hook = core.blocks[0].qkv_norm.register_forward_hook(lambda module, given, out: normed.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), hook:
        core.step(inputs[:, 0], core.initial_state(B))
    assert normed == [torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, memory = core(inputs)
        _, details = core.step(inputs[:, 0], memory, return_details=True)
        from_lower, _ = core(inputs.bfloat16(), core.initial_state(B).bfloat16())
        with pytest.raises(ValueError, match="inputs must be torch.float32, .* got torch.int64"):
            core(inputs.long())
        loss = outputs.square().mean()
    loss.backward()
    assert {x.dtype for x in (outputs, memory, *details.attention, from_lower)} == {torch.float32}
    for value in (outputs, *details.attention, details.input_gate):
        assert not torch.equal(value, value.bfloat16().float())  # numbers of full precision
    assert 0 < (outputs - exact).abs().max() < 0.2 and (from_lower - exact).abs().max() < 0.2
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in core.parameters())


# ---- mistakes


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("mem_slots", value) for value in (0, True, None)),
        *(("head_size", value) for value in (-1, "8")),
        *(("input_size", 0), ("num_heads", 1.5), ("num_blocks", 0), ("key_size", -2)),
        *(("attention_mlp_layers", 0), ("input_rows", 0), ("gate_style", "units"), ("gate_style", "none")),
        *(("forget_bias", float("nan")), ("forget_bias", None), ("input_bias", float("inf"))),
        *(("init_scale", 0), ("init_scale", float("nan"))),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(argument, value):
    options = {"mem_slots": 2, "head_size": 3, "input_size": 5} | {argument: value}
    with pytest.raises(ValueError, match=rf"^{argument} must be .*got {value!r}"):
        RelationalMemory(**options)


def test_numpy_numbers_are_accepted_and_converted(kind):
    core = kind(np.int64(2), np.int32(3), np.int64(5), num_heads=np.int64(4), forget_bias=np.float32(0.5))
    assert {type(x) for x in (*core.state_size, core.output_size, core.key_size)} == {int}
    assert {type(x) for x in core.blocks[0].qkv_norm.normalized_shape} == {int}
    assert type(core.forget_bias) is float and core(torch.zeros(1, 1, 5))[1].shape == (1, 2, 12)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, (B, T, INPUT + 1)), (1, (B, INPUT)), (1, (B, T)), (2, (B, T, 3, INPUT)), (2, (B, T, INPUT))],
)
def test_wrong_input_shapes_say_what_was_expected_and_found(rows, shape):
    with pytest.raises(ValueError, match=r"inputs must have shape \(B, T.*got \("):
        make_core(RelationalMemory, input_rows=rows)(randn(*shape))


def test_inputs_of_another_kind_are_named(kind):
    core, packed = make_core(kind).float(), nn.utils.rnn.pack_sequence([torch.zeros(T, INPUT)])
    with pytest.raises(TypeError, match="got a PackedSequence. Unpack it with .*pad_packed_sequence"):
        core(packed)
    with pytest.raises(TypeError, match="inputs must be a tensor, got a ndarray"):
        core(np.zeros((B, T, INPUT)))
    for inputs in (randn(B, T, INPUT), torch.zeros(B, T, INPUT, dtype=torch.long)):
        with pytest.raises(ValueError, match=f"inputs must be torch.float32, .* got {inputs.dtype}"):
            core(inputs)
        with pytest.raises(ValueError, match=f"inputs must be torch.float32, .* got {inputs.dtype}"):
            core.step(inputs[:, 0], core.initial_state(B))
    with pytest.raises(ValueError, match="at least one time step"):
        core(torch.zeros(B, 0, INPUT))


def test_memories_of_another_kind_or_shape_are_named(kind):
    core, inputs = make_core(kind), randn(B, T, INPUT)
    state = torch.zeros(1, B, D)
    with pytest.raises(
        TypeError, match="memory must be one tensor .* got a tuple. .* no separate cell state"
    ):
        core(inputs, (state, state))
    for shape in ((B, N, D + 1), (B + 1, N, D), (N, D)):
        with pytest.raises(ValueError, match=r"memory must have shape .*got \([0-9, ]*\)$"):
            core(inputs, randn(*shape))
    with pytest.raises(ValueError, match="memory must be torch.float64, .* got torch.float32"):
        core(inputs, randn(B, N, D).float())
    with pytest.raises(ValueError, match=r"seem to be \(T, B, ...\): the batch must come first"):
        core(inputs.transpose(0, 1), core.initial_state(B))

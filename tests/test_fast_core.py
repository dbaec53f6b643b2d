"""FastRelationalMemory against RelationalMemory: results, gradients, and when it runs the loop."""

import copy
import itertools
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import relational_rnn_checks
import relational_rnn_fast
from relational_rnn_checks import obstacle
from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import AttentionBlock, RelationalMemory, RowMLP

# All different: a swapped axis cannot pass by luck.
B, T, N, H, V, K, INPUT = 2, 5, 3, 4, 7, 11, 13


def make_pair(dtype=torch.float64, rough=0.3, **options):
    """A plain and a fast core with the same weights, away from their initial values."""
    torch.manual_seed(0)
    sizes = {"mem_slots": N, "head_size": V, "input_size": INPUT, "num_heads": H, "key_size": K}
    options = {**sizes, "return_all_outputs": True, **options}
    plain, fast = RelationalMemory(**options).to(dtype), FastRelationalMemory(**options).to(dtype)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * rough)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def randn(*shape, requires_grad=False, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)


@pytest.fixture
def scans(monkeypatch):
    """Counts the calls that the hand-written pass serves, and allows the warning again."""
    counted, window = [], relational_rnn_fast._Window.forward

    def forward(self, *given, **options):
        if threading.current_thread() is threading.main_thread():  # not those of the comparison
            counted.append(self)
        return window(self, *given, **options)

    monkeypatch.setattr(relational_rnn_fast._Window, "forward", forward)
    monkeypatch.setattr(FastRelationalMemory, "_warned", set())
    return counted


def results(core, used="outputs and memory", dtype=torch.float64, **options):
    """Outputs, final memory, both again without gradients, and the gradients of a random linear loss."""
    steps, mask = options.pop("steps", T), options.pop("mask", None)
    shape = (core.input_rows, core.input_size) if core.input_rows > 1 else (core.input_size,)
    inputs = randn(B, steps, *shape, requires_grad=True, dtype=dtype)
    memory = randn(B, *core.state_size, requires_grad=True, seed=2, dtype=dtype)
    outputs, final = core(inputs, memory, candidate_mask=mask, **options)
    loss = 0
    if "outputs" in used:
        loss = loss + (outputs * randn(*outputs.shape, seed=3, dtype=dtype)).sum()
    if "memory" in used:
        loss = loss + (final * randn(*final.shape, seed=4, dtype=dtype)).sum()
    gradients = torch.autograd.grad(loss, (inputs, memory, *core.parameters()))
    with torch.no_grad():
        again = core(inputs, memory, candidate_mask=mask, **options)
    names = ["outputs", "final", "outputs without grad", "final without grad", "inputs", "memory"]
    names += [name for name, _ in core.named_parameters()]
    return dict(zip(names, (outputs, final, *again, *gradients), strict=True))


def assert_equal(ours, theirs, tolerance=1e-9):
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance, msg=name)


# ---- the same function

CHOICES = {
    "mem_slots": (1, N),
    "input_rows": (1, 2),
    "num_blocks": (1, 3),
    "gate_style": ("unit", "memory", None),
    "attention_mlp_layers": (1, 3),
    "key_size": (None, K),
    "steps": (1, T),
    "return_all_outputs": (True, False),
    "used": ("outputs", "memory", "outputs and memory"),
    "waiting": (512, 4 * B, 1),  # rows that wait for a product: all, several steps, none
    "masked": (True, False),
}
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]


@pytest.mark.parametrize(
    "options", COMBINATIONS[::61], ids=lambda o: "-".join(map(str, o.values()))
)  # 114 of 6,912; 61 shares no factor with the numbers of choices
def test_results_and_every_gradient_equal_those_of_the_plain_class(options, monkeypatch, scans):
    options = dict(options)
    call = {"steps": options.pop("steps"), "used": options.pop("used")}
    monkeypatch.setattr(relational_rnn_fast, "WAITING_ROWS", options.pop("waiting"))
    masked = options.pop("masked")
    plain, fast = make_pair(head_size=5, num_heads=3, forget_bias=0.7, input_bias=-0.2, **options)
    mask = randn(B, *plain.state_size, seed=5) if masked else None
    assert_equal(results(fast, mask=mask, **call), results(plain, mask=mask, **call))
    assert len(scans) == (2 if call["steps"] > 1 else 1)


@pytest.mark.parametrize("gate_style", ["unit", "memory"])
@pytest.mark.parametrize(("input_size", "folded"), [(3, True), (200, False)])
def test_folded_input_layers_with_several_input_rows_equal_the_plain_class(
    gate_style, input_size, folded, monkeypatch
):
    """Small inputs fold two linear layers into one; the bias of the gates then sums over the input rows."""
    widths, affine = [], relational_rnn_fast._affine

    def noting(inputs, weight, bias, lower):
        widths.append(weight.size(1))
        return affine(inputs, weight, bias, lower)

    plain, fast = make_pair(input_rows=3, input_size=input_size, gate_style=gate_style)
    results(fast)  # compares the two files, with other sizes
    monkeypatch.setattr(relational_rnn_fast, "_affine", noting)
    ours = results(fast, steps=20)
    assert widths[:2] == ([3, 9] if folded else [200, H * V])
    assert_equal(ours, results(plain, steps=20))


@pytest.mark.parametrize("blocks", [1, 2])
def test_bf16_gradients_stay_near_those_of_float32(blocks, scans):
    _, core = make_pair(dtype=torch.float32, rough=0.1, num_blocks=blocks)
    exact = results(core, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = results(core, dtype=torch.float32)
    assert len(scans) == 4 and scans[0].mlp[0].weight.dtype == torch.float32
    assert {layer.weight.dtype for layer in (*scans[2].mlp, scans[2].gate)} == {torch.bfloat16}
    for name, value in lowered.items():
        assert value.dtype == torch.float32
        error = (value - exact[name]).norm() / exact[name].norm()
        assert 1e-6 < error < 0.25, (name, error)


@pytest.mark.parametrize("slots", [1, N])
def test_memories_masks_and_gradients_of_any_layout_equal_the_plain_class(slots):
    cores, width = make_pair(mem_slots=slots, num_blocks=2), H * V
    inputs = randn(B, T, INPUT)
    learned = randn(1, slots, width, requires_grad=True)
    turned = randn(slots, B, width, seed=2, requires_grad=True)
    mask = randn(slots, width, B, seed=5).permute(2, 0, 1)
    found = []
    for core in cores:
        gradients = []
        for memory in (learned.expand(B, -1, -1), turned.transpose(0, 1)):
            outputs, final = core(inputs, memory, candidate_mask=mask)
            loss = (final.permute(1, 2, 0).contiguous() * randn(slots, width, B, seed=3)).sum()
            loss = loss + (outputs.permute(2, 0, 1).contiguous() * randn(slots * width, B, T, seed=4)).sum()
            gradients += torch.autograd.grad(loss + final.sum(), (memory, *core.parameters()))
        found.append(gradients)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slots", [1, N])
def test_second_backward_pass_through_a_retained_graph_gives_the_same_gradients(slots):
    _, core = make_pair(mem_slots=slots, num_blocks=2)
    outputs, _ = core(randn(B, T, INPUT))
    loss = outputs.square().sum()
    first = torch.autograd.grad(loss, core.mlp[0].weight, retain_graph=True)  # of one parameter only
    second = torch.autograd.grad(loss, list(core.parameters()), retain_graph=True)
    third = torch.autograd.grad(loss, list(core.parameters()))
    torch.testing.assert_close(second, third, rtol=0, atol=0)
    assert torch.equal(first[0], dict(zip(core.parameters(), third, strict=True))[core.mlp[0].weight])


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    cores = make_pair(num_blocks=2)
    for core in cores:
        for name, parameter in core.named_parameters():
            parameter.requires_grad_("mlp" in name)
        core(randn(B, T, INPUT))[0].square().sum().backward()
    for (name, plain), fast in zip(cores[0].named_parameters(), cores[1].parameters(), strict=True):
        assert (fast.grad is None) == ("mlp" not in name)
        torch.testing.assert_close(fast.grad, plain.grad, rtol=1e-9, atol=1e-9)


def test_replaced_weights_of_functional_call_get_the_gradients(scans):
    found = []
    for core in make_pair():
        names = ["blocks.0.qkv_projection.weight", "memory_gate_projection.weight"]
        own = dict(core.named_parameters())
        weights = {name: (own[name].detach() * 0.5).requires_grad_() for name in names}
        outputs, _ = torch.func.functional_call(core, weights, (randn(B, T, INPUT),))
        gradients = torch.autograd.grad(outputs.square().sum(), [*weights.values(), core.mlp[0].weight])
        found.append([outputs, *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert len(scans) == 1


def test_replicas_of_data_parallel_run_fast_and_return_gradients(scans):
    _, core = make_pair()
    expected = torch.autograd.grad(core(randn(B, T, INPUT))[0].square().sum(), list(core.parameters()))
    replica = core._replicate_for_data_parallel()
    for name, module in replica.named_children():
        setattr(replica, name, copy.deepcopy(module))
    for module, own in zip(replica.modules(), core.modules(), strict=True):
        module._parameters = {}
        for name, parameter in own._parameters.items():
            setattr(module, name, parameter * 1)  # a non-leaf tensor, as a broadcast returns
    assert not list(replica.parameters())
    loss = replica(randn(B, T, INPUT), replica.initial_state(B))[0].square().sum()
    gradients = torch.autograd.grad(loss, list(core.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    assert len(scans) == 2


def test_results_are_freed_without_the_garbage_collector():
    """A view of an output in save_for_backward would keep the whole graph alive."""
    _, core = make_pair(mem_slots=1)
    outputs, memory = core(randn(B, T, INPUT))
    watched = weakref.ref(outputs._base if outputs._base is not None else outputs), weakref.ref(memory)
    del outputs, memory
    assert [reference() for reference in watched] == [None, None]


def test_core_is_copied_and_pickled_with_its_class():
    _, core = make_pair()
    for other in (copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
        assert type(other) is FastRelationalMemory
        assert torch.equal(other(randn(B, T, INPUT))[0], core(randn(B, T, INPUT))[0])


# ---- modules that the hand-written pass does not know


class LowRank(nn.Module):
    """An adapter: a linear layer plus a product of two small matrices. It has no weight."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        generator = torch.Generator().manual_seed(7)
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=generator).double() * 0.1)
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=generator).double() * 0.1)

    def forward(self, inputs):
        return self.linear(inputs) + inputs @ self.down.t() @ self.up.t()


def adapt(core):
    core.input_projection = LowRank(core.input_projection)
    core.blocks[0].qkv_projection = LowRank(core.blocks[0].qkv_projection)
    core.mlp[1] = LowRank(core.mlp[1])


def without_bias(core):
    layer = nn.Linear(H * V, H * V, bias=False).double()
    layer.weight = core.mlp[0].weight
    core.mlp[0] = layer


def other_epsilon(core):
    core.blocks[0].mlp_norm.eps = 0.1


def own_forward(core):
    linear = core.memory_gate_projection
    linear.forward = lambda x: nn.functional.linear(x, linear.weight * 2, linear.bias)


def forward_hook(core):
    core.mlp[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def block_hook(core):
    core.blocks[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9, inputs[1]))


def backward_hook(core):
    core.blocks[0].attention_norm.register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * 3,)
    )


def backward_pre_hook(core):
    core.mlp[0].register_full_backward_pre_hook(lambda module, grad_out: (grad_out[0] * 3,))


def one_head(core):
    weights = core.blocks[0].state_dict()
    core.blocks[0] = AttentionBlock(1, H * K, H * V).double()
    core.blocks[0].load_state_dict(weights)


def own_gates(core):
    gates = core.gates
    core.gates = lambda rows, memory: tuple(gate / 2 for gate in gates(rows, memory))


def pruned(core):
    prune.l1_unstructured(core.mlp[0], "weight", amount=0.5)


def new_weight_norm(core):
    for linear in (core.blocks[0].qkv_projection, core.mlp[0], core.input_projection):
        parametrizations.weight_norm(linear)


SLOW = [
    adapt, without_bias, other_epsilon, own_forward, forward_hook, block_hook, backward_hook,
    backward_pre_hook, one_head, own_gates, pruned,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:FastRelationalMemory runs the slower loop")
@pytest.mark.parametrize("change", [*SLOW, new_weight_norm], ids=lambda change: change.__name__)
def test_changed_modules_act_as_in_the_plain_class(change, scans):
    plain, fast = make_pair()
    unchanged = plain(randn(B, T, INPUT))[0]
    for core in (plain, fast):
        change(core)
    assert_equal(results(fast), results(plain))
    assert bool(scans) == (change not in SLOW)
    if change not in (new_weight_norm, backward_hook, backward_pre_hook):  # these do not change the outputs
        assert not torch.allclose(fast(randn(B, T, INPUT))[0], unchanged)


def test_loop_warns_once_per_process_and_names_the_module(scans):
    _, core = make_pair()
    handle = core.mlp[1].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        core(randn(B, T, INPUT))
        core(randn(B, T, INPUT))
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and "its submodule mlp.1 was replaced or has hooks" in messages[0]
    assert caught[0].filename == __file__
    handle.remove()
    core(randn(B, T, INPUT))
    assert len(scans) == 1


def test_global_hooks_and_overridden_steps_are_respected(scans):
    _, core = make_pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with handle, pytest.warns(UserWarning, match="a hook is registered for all modules"):
        core(randn(B, T, INPUT))
    assert seen.count(core.mlp[0]) == T

    class Halved(FastRelationalMemory):
        def gates(self, rows, memory):
            return tuple(gate / 2 for gate in super().gates(rows, memory))

    halved = Halved(N, V, INPUT, num_heads=H, key_size=K, return_all_outputs=True).double()
    halved.load_state_dict(core.state_dict())
    inputs, memory = randn(B, 1, INPUT), randn(B, N, H * V)
    with pytest.warns(UserWarning, match="Halved overrides gates"):
        outputs, _ = halved(inputs, memory)
    torch.testing.assert_close(outputs, core(inputs, memory)[0] / 2)
    assert len(scans) == 1


# ---- edits of relational_rnn_general.py


def coupled_gates(self, rows, memory, gates=RelationalMemory.gates):
    """Eq. 7 with 1 - f in the place of i."""
    _, forget_gate = gates(self, rows, memory)
    return 1 - forget_gate, forget_gate


def larger_rows(self, rows, mlp, forward=AttentionBlock.forward):
    return forward(self, rows * 1.01, mlp)


def relu_after_the_last(self, rows, forward=RowMLP.forward):
    return forward(self, rows).relu()


def half_memory(self, inputs, memory, *rest, run=RelationalMemory._run):
    return run(self, inputs, memory / 2, *rest)


def impossible(self, rows, memory, gates=RelationalMemory.gates):
    return gates(self, rows, memory + memory.new_zeros(B, N, H * V))  # works with one size


EDITS = [
    (RelationalMemory, "gates", coupled_gates),
    (AttentionBlock, "forward", larger_rows),
    (RowMLP, "forward", relu_after_the_last),
    (RelationalMemory, "_run", half_memory),
    (RelationalMemory, "gates", impossible),
]


@pytest.mark.parametrize("kind, name, edit", EDITS, ids=[edit.__name__ for *_, edit in EDITS])
def test_edit_of_the_plain_file_acts_in_the_fast_class_with_one_warning(kind, name, edit, scans, monkeypatch):
    plain, fast = make_pair()
    results(fast)
    assert len(scans) == 2
    monkeypatch.setattr(kind, name, edit)
    with pytest.warns(UserWarning, match="relational_rnn_general.py") as caught:
        found = [results(fast), results(fast)]
    assert len([w for w in caught if "FastRelationalMemory runs the slower" in str(w.message)]) == 1
    for ours in found:
        assert_equal(ours, results(plain))


def test_edit_that_adds_an_option_acts_where_the_option_does(scans, monkeypatch):
    """With its default, and in evaluation, this option changes nothing, and the fast pass runs."""
    advance = RelationalMemory._advance

    def scaled(self, *given):
        memory, details = advance(self, *given)
        return memory * (self.scale if self.training else 1), details

    monkeypatch.setattr(RelationalMemory, "_advance", scaled)
    monkeypatch.setattr(RelationalMemory, "scale", 1.0, raising=False)
    plain, fast = make_pair()
    results(fast)
    assert len(scans) == 2
    plain.scale = fast.scale = 0.5
    with pytest.warns(UserWarning, match="compute different results"):
        assert_equal(results(fast), results(plain))
    results(fast.eval())
    assert len(scans) == 4


def test_files_are_compared_once_in_any_mode_without_a_trace(scans):
    """The comparison sees no mode of the caller and leaves the random state."""
    _, core = make_pair(dtype=torch.float32)
    modes = [
        torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: 1 / 0, lambda x: x),
    ]  # fmt: skip
    state = torch.get_rng_state()
    for layers, mode in enumerate(modes, start=5):
        core.attention_mlp_layers = layers
        with mode:
            assert obstacle(core, FastRelationalMemory) is None
    assert torch.equal(torch.get_rng_state(), state)
    compared = relational_rnn_checks._difference.cache_info().misses
    with ThreadPoolExecutor(8) as threads:
        core.attention_mlp_layers = len(modes) + 5
        assert set(threads.map(lambda _: obstacle(core, FastRelationalMemory), range(8))) == {None}
    assert relational_rnn_checks._difference.cache_info().misses > compared
    assert torch.equal(torch.get_rng_state(), state)

"""The core against DeepMind's original module: numbers written by dm-sonnet 1.36 on TensorFlow 1.15, float32.

The vectors' options, array names and maths are described in tests/golden/README.md.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from relational_rnn_general import RelationalMemory

CASES = sorted(path.stem for path in (Path(__file__).parent / "golden").glob("*.npz"))


def load_case(name, dtype=torch.float32):
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key != "config"}
        config = json.loads(str(file["config"]))
    options = (
        "mem_slots",
        "head_size",
        "num_heads",
        "num_blocks",
        "forget_bias",
        "input_bias",
        "gate_style",
        "attention_mlp_layers",
        "key_size",
    )
    core = RelationalMemory(
        input_size=config["input_shape"][-1],
        return_all_outputs=True,
        **{option: config[option] for option in options},
    ).to(dtype)
    core.load_sonnet_variables({key: value for key, value in arrays.items() if key.startswith("var/")})
    tensors = {key: torch.from_numpy(value).to(dtype) for key, value in arrays.items()}
    return core, config, tensors


def sonnet_gradients(core):
    """Gradients of all parameters under the original's names, in its layout."""
    return {name: (p.grad.t() if p.dim() == 2 else p.grad) for name, p in core._sonnet_names().items()}


def test_all_five_files_are_there():
    assert CASES == ["d1", "d2", "d3", "d4", "d5"]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("start", ["a", "b"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_memories_gates_loss_and_every_gradient_equal_the_original(name, start, fast):
    core, config, golden = load_case(name)
    core.fast = fast
    inputs = golden["inputs"].transpose(0, 1).clone().requires_grad_()  # (B, T, input_size)
    if start == "a":
        torch.testing.assert_close(
            core.initial_state(config["B"]), golden["a/initial_memory"], rtol=0, atol=0
        )
    memory = golden[f"{start}/initial_memory"].clone().requires_grad_()

    outputs, final = core(inputs, memory)
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(outputs.transpose(0, 1), golden[f"{start}/outputs"], **near)
    torch.testing.assert_close(final, golden[f"{start}/memories"][-1], **near)
    if config["gate_style"] is not None:
        _, _, (input_gate, forget_gate) = core(inputs, memory, return_gates=True)
        torch.testing.assert_close(input_gate, golden[f"{start}/input_gate_last"], **near)
        torch.testing.assert_close(forget_gate, golden[f"{start}/forget_gate_last"], **near)

    loss = (outputs.transpose(0, 1) * golden[f"{start}/R"]).sum()
    torch.testing.assert_close(loss, golden[f"{start}/loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    gradients = {f"var/relational_memory/{name}": value for name, value in sonnet_gradients(core).items()}
    gradients |= {"inputs": inputs.grad.transpose(0, 1), "initial_memory": memory.grad}
    assert {f"{start}/grad/{name}" for name in gradients} == {
        key for key in golden if f"{start}/grad/" in key
    }
    for key, gradient in gradients.items():
        expected = golden[f"{start}/grad/{key}"]
        largest = expected.abs().max().item()
        assert (gradient - expected).abs().max().item() <= 2e-5 * largest + 1e-12, key


@pytest.mark.parametrize("start", ["a", "b"])
@pytest.mark.parametrize("name", CASES)
def test_memory_after_every_step_equals_the_original_when_used_as_a_cell(name, start):
    core, config, golden = load_case(name)
    memory = golden[f"{start}/initial_memory"]
    for t in range(config["T"]):
        memory = core.step(golden["inputs"][t], memory)
        torch.testing.assert_close(memory, golden[f"{start}/memories"][t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_state_given_starts_as_the_original_does(name):
    core, _, golden = load_case(name)
    outputs, final = core(golden["inputs"].transpose(0, 1))
    torch.testing.assert_close(outputs.transpose(0, 1), golden["a/outputs"], rtol=0, atol=1e-5)
    torch.testing.assert_close(final, golden["a/memories"][-1], rtol=0, atol=1e-5)


def test_sonnet_variables_load_without_prefixes_and_from_tensors():
    core, _, golden = load_case("d3")
    other = RelationalMemory(3, 8, 5, num_heads=2, num_blocks=3, gate_style="memory")
    short = {
        key.removeprefix("var/relational_memory/"): value
        for key, value in golden.items()
        if key.startswith("var/")
    }
    other.load_sonnet_variables(short)
    for ours, theirs in zip(other.parameters(), core.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_wrong_sonnet_variables_are_refused_by_name_and_nothing_is_copied():
    core, _, golden = load_case("d1")
    variables = {key: value for key, value in golden.items() if key.startswith("var/")}
    del variables["var/relational_memory/layer_norm_1/beta"]
    variables["var/relational_memory/linear_9/w"] = torch.zeros(2, 2)
    variables["var/relational_memory/linear/w"] = torch.zeros(32, 7)  # not turned round
    before = [p.clone() for p in core.parameters()]
    with pytest.raises(ValueError) as error:
        core.load_sonnet_variables(variables)
    for part in (
        "missing: layer_norm_1/beta",
        "not of this core: linear_9/w",
        "linear/w must have shape (7, 32), got (32, 7)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(core.parameters(), before, strict=True))

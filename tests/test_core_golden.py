"""Both classes of the core against numbers of DeepMind's original module (Sonnet v1, float32).

tests/golden/README.md describes the options, the array names and the math.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import RelationalMemory

GOLDEN = Path(__file__).parent / "golden"
CASES = ["d1", "d2", "d3", "d4", "d5"]
CORE = (
    "mem_slots head_size num_heads num_blocks forget_bias input_bias gate_style attention_mlp_layers key_size"
)


def load_case(name, kind=RelationalMemory):
    """A core with the original's variables, the case's options, and its arrays as tensors."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key != "config"}
        config = json.loads(str(file["config"]))
    options = {option: config[option] for option in CORE.split()}
    core = kind(input_size=config["input_shape"][-1], return_all_outputs=True, **options)
    prefix = "var/relational_memory/"
    core.load_sonnet_variables({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
    return core, config, {key: torch.from_numpy(value) for key, value in arrays.items()}


@pytest.mark.parametrize("kind", [RelationalMemory, FastRelationalMemory], ids=["plain", "fast"])
@pytest.mark.parametrize("start", ["a", "b"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_memories_gates_loss_and_every_gradient_equal_the_original(name, start, kind):
    core, config, golden = load_case(name, kind)
    inputs = golden["inputs"].transpose(0, 1).clone().requires_grad_()  # (B, T, input_size)
    if start == "a":
        assert torch.equal(core.initial_state(config["B"]), golden["a/initial_memory"])
    memory = golden[f"{start}/initial_memory"].clone().requires_grad_()

    outputs, final = core(inputs, memory)
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(outputs.transpose(0, 1), golden[f"{start}/outputs"], **near)
    torch.testing.assert_close(final, golden[f"{start}/memories"][-1], **near)
    if config["gate_style"] is not None:
        gates = core.inspect(inputs, memory)
        torch.testing.assert_close(gates.input_gate[:, -1], golden[f"{start}/input_gate_last"], **near)
        torch.testing.assert_close(gates.forget_gate[:, -1], golden[f"{start}/forget_gate_last"], **near)

    loss = (outputs.transpose(0, 1) * golden[f"{start}/R"]).sum()
    torch.testing.assert_close(loss, golden[f"{start}/loss"], rtol=1e-5, atol=1e-5)
    loss.backward()
    gradients = {"inputs": inputs.grad.transpose(0, 1), "initial_memory": memory.grad}
    for variable, parameter in core._sonnet_names().items():
        gradient = parameter.grad.t() if parameter.dim() == 2 else parameter.grad
        gradients[f"var/relational_memory/{variable}"] = gradient
    assert {f"{start}/grad/{key}" for key in gradients} == {key for key in golden if f"{start}/grad/" in key}
    for key, gradient in gradients.items():
        expected = golden[f"{start}/grad/{key}"]
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-12, key


def test_wrong_sonnet_variables_are_all_named_and_nothing_is_copied():
    core, _, golden = load_case("d1")
    variables = {key: value + 1 for key, value in golden.items() if key.startswith("var/")}
    del variables["var/relational_memory/layer_norm_1/beta"]
    variables["var/relational_memory/linear_9/w"] = torch.zeros(2, 2)
    variables["var/relational_memory/linear/w"] = torch.zeros(32, 7)  # transposed
    variables["var/relational_memory/linear/b"] = torch.full((32,), float("nan"))
    variables["var/relational_memory/linear_1/b"] = torch.zeros(72, dtype=torch.long)
    before = [p.clone() for p in core.parameters()]
    with pytest.raises(ValueError) as error:
        core.load_sonnet_variables(variables)
    for part in (
        "missing: layer_norm_1/beta",
        "not of this core: linear_9/w",
        "linear/w must have shape (7, 32), got (32, 7)",
        "linear/b must contain finite numbers",
        "linear_1/b must contain floating point numbers",
    ):
        assert part in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(core.parameters(), before, strict=True))

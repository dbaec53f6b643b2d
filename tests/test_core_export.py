"""Both classes of the core under export, compilation, tracing, quantization and on the meta device."""

import io

import pytest
import torch
from torch import nn

from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import RelationalMemory

B, T, N, V, H, K, INPUT = 2, 3, 4, 7, 5, 11, 13

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore::UserWarning",
)


class Step(nn.Module):
    """Call the core's step where a tool calls forward."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, input_t, memory):
        return self.core.step(input_t, memory)


@pytest.fixture(params=[RelationalMemory, FastRelationalMemory], ids=["plain", "fast"])
def core(request):
    torch.manual_seed(1)
    return request.param(
        N, V, INPUT, num_heads=H, key_size=K, attention_mlp_layers=1, return_all_outputs=True
    )


def example(core, batch=B):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, T, INPUT, generator=generator), core.initial_state(batch)


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_exported_sequence_and_step_take_any_batch_size(core):
    inputs, memory = example(core)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch})
    sequence = torch.export.export(core, (inputs, memory), dynamic_shapes=shapes).module()
    step = torch.export.export(Step(core), (inputs[:, 0], memory), dynamic_shapes=shapes).module()
    inputs, memory = example(core, batch=3)
    assert_near(sequence(inputs, memory), core(inputs, memory))
    assert_near(step(inputs[:, 0], memory), core.step(inputs[:, 0], memory))


def test_compiled_sequence_and_step_are_one_graph_and_train_alike(core):
    """This backend traces both passes and generates no machine code, which would take a minute."""
    inputs, memory = example(core)
    torch._dynamo.reset()
    sequence = torch.compile(core, fullgraph=True, backend="aot_eager")
    step = torch.compile(core.step, fullgraph=True, backend="aot_eager")
    assert_near(step(inputs[:, 0], memory), core.step(inputs[:, 0], memory))
    expected = torch.autograd.grad(core(inputs, memory)[0].square().sum(), core.mlp[0].weight)
    found = torch.autograd.grad(sequence(inputs, memory)[0].square().sum(), core.mlp[0].weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_traced_sequence_and_step_equal_eager_mode_after_saving(core):
    inputs, memory = example(core)
    for module, given in ((core, (inputs, memory)), (Step(core), (inputs[:, 0], memory))):
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(module, given), file)
        file.seek(0)
        assert_near(torch.jit.load(file)(*given), module(*given))


def test_meta_device_gives_shapes(core):
    outputs, memory = core.to("meta")(torch.empty(B, T, INPUT, device="meta"))
    assert outputs.shape == (B, T, N * H * V) and memory.shape == (B, N, H * V)
    outputs.sum().backward()


def test_dynamic_quantization_changes_the_linear_layers_and_stays_near(core):
    inputs, memory = example(core)
    quantized = torch.ao.quantization.quantize_dynamic(core, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantized.mlp[0], nn.Linear)
    error = (quantized(inputs, memory)[0] - core(inputs, memory)[0]).abs().max()
    assert 0 < error < 0.3

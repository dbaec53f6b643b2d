"""Check whether the hand-written pass of relational_rnn_fast.py computes what the loop of a core computes."""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from relational_rnn_general import NORM_EPSILON, AttentionBlock, RelationalMemory, RowMLP

# torch has no public way to list hooks. These dictionaries exist in torch 2.6 to 2.14.
_HOOKS = ("forward_pre", "forward", "backward_pre", "backward")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global_{when}_hooks") for when in _HOOKS]


def obstacle(core: RelationalMemory, fast: type[RelationalMemory]) -> str | None:
    """Return why the hand-written pass of the class `fast` must not be used for this core, or None."""
    # Without public counterparts; both names exist in torch 2.6 to 2.14.
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if any(_GLOBAL_HOOKS):
        return "a hook is registered for all modules"
    for name in ("_advance", "gates"):  # on the class or on this object
        if getattr(getattr(core, name), "__func__", None) is not getattr(RelationalMemory, name):
            return f"{type(core).__name__} overrides {name}"
    sizes = core.num_heads, core.key_size, core.head_size
    for index, block in enumerate(core.blocks):
        if isinstance(block, AttentionBlock) and (block.num_heads, block.key_size, block.head_size) != sizes:
            return f"its submodule blocks.{index} has other sizes"
    for module, kind in _called_modules(core):
        if not _is_plain(module, kind):
            name = next(name for name, found in core.named_modules() if found is module)
            return f"its submodule {name} was replaced or has hooks"
    rows = min(core.input_rows, 2)
    structure = min(core.mem_slots, 2), core.num_blocks, core.gate_style, core.attention_mlp_layers, rows
    step = RelationalMemory._advance, RelationalMemory.gates, AttentionBlock.forward, RowMLP.forward
    options = tuple(_options(module) for module in (core, *core.blocks, core.mlp))
    return _difference(fast, structure, options, RelationalMemory._run, *step)


# Attributes that the small core of the comparison has in its own size.
_SIZES = {
    "mem_slots",
    "head_size",
    "input_size",
    "num_heads",
    "num_blocks",
    "attention_mlp_layers",
    "key_size",
}
_SIZES |= {"input_rows", "mem_size", "return_all_outputs"}


def _options(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """Return the numbers, words and switches of a module that are not sizes; an edit may add some."""
    plain = (int, float, str, type(None))  # bool is an int
    found = vars(module).items()
    return tuple((name, x) for name, x in found if isinstance(x, plain) and name not in _SIZES)


def _called_modules(core: RelationalMemory) -> Iterator[tuple[nn.Module, type]]:
    """Yield the submodules that the loop calls, each with the type that the hand-written pass assumes."""
    yield core.input_projection, nn.Linear
    if core.gate_style is not None:
        yield core.input_gate_projection, nn.Linear
        yield core.memory_gate_projection, nn.Linear
    for block in core.blocks:
        yield block, AttentionBlock
        yield block.qkv_projection, nn.Linear
        yield block.qkv_norm, nn.LayerNorm
        yield block.attention_norm, nn.LayerNorm
        yield block.mlp_norm, nn.LayerNorm
    yield core.mlp, RowMLP
    for linear in core.mlp:
        yield linear, nn.Linear


def _is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a call of the module computes what its type does with its weights, and nothing else."""
    if type(module) is not kind:
        parametrized = parametrize.is_parametrized(module)
        if not parametrized or parametrize.type_before_parametrizations(module) is not kind:
            return False
    if any(getattr(module, f"_{when}_hooks") for when in _HOOKS):
        return False
    if "forward" in vars(module) or (kind is nn.LayerNorm and module.eps != NORM_EPSILON):
        return False
    return kind not in (nn.Linear, nn.LayerNorm) or module.bias is not None


_comparing = threading.Lock()  # replicas of DataParallel run in threads


@functools.cache
def _difference(
    fast: type[RelationalMemory], structure: tuple, options: tuple, *loop: Callable
) -> str | None:
    """Return None if the loop and the hand-written pass agree on a small core, else what is wrong.

    Once per process, structure, options and loop, this compares outputs and gradients of 2 sequences of 3
    steps, in float64 on the CPU.
    """
    slots, blocks, gate_style, layers, rows = structure
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def compare() -> str | None:
        with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
            core = fast(slots, 2, 3, 2, blocks, 0.5, -0.3, gate_style, layers, 4, True, rows)
        weights = {name: draw(*p.shape) for name, p in core.named_parameters()}
        core.double().load_state_dict(weights, strict=False)  # an edited core may have buffers too
        for module, attributes in zip((core, *core.blocks, core.mlp), options, strict=True):
            vars(module).update(attributes)
        given = draw(2, 3, rows, 3), draw(2, *core.state_size), draw(2, *core.state_size)
        mask, factor = draw(2, *core.state_size).detach(), draw(2, 3, core.output_size)
        resets, results = torch.tensor([[False, True, False], [False, False, False]]), []
        for run in (RelationalMemory._run, fast._scan):
            outputs, last = run(core, *given[:2], mask, resets, given[2])
            loss = (outputs * factor).sum() + last.square().sum()
            leaves = (*given, *core.parameters())
            results.append([outputs, last, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
        if all(torch.allclose(x, y, rtol=1e-7, atol=1e-9) for x, y in zip(*results, strict=True)):
            return None
        return (
            "relational_rnn_general.py and relational_rnn_fast.py compute different results after an edit "
            "(make the same edit in both to make it fast again: docs/change_the_math.md)"
        )

    # In a thread of its own, no mode of the caller is active: no_grad, autocast, a default device and others.
    with _comparing, concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(compare).result()
        except Exception as error:  # an edited loop may not work with these sizes
            return f"relational_rnn_fast.py could not be compared with relational_rnn_general.py ({error})"

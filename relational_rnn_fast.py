"""FastRelationalMemory: RelationalMemory with the same parameters and results and a faster sequence loop.

This file can be copied together with relational_rnn_general.py and relational_rnn_checks.py. Shapes are named
as in relational_rnn_general.py. F = H * (2K + V) is the number of features of the queries, keys and values of
a row, G that of the gates.

Three things make it fast:
    * What depends only on the inputs is computed for all time steps at once (_hoist): the projected input
      rows, their queries, keys and values, and their part of the gates.
    * The last block computes only the memory rows. It needs only the keys and values of the input rows.
    * The backward pass is written by hand (_Scan, _Window). It computes the gradient of a recurrent weight in
      products over many time steps; one small product per step would read and write the full weight T times.

The hand-written pass supports only plain linear layers and layer norms. The class runs the loop of
RelationalMemory if relational_rnn_checks.py finds that the results would differ: a layer was replaced or has
hooks, or only one of the two files was edited. It also runs the loop for a single step without gradients, and
under torch.func, torch.compile, torch.export and torch.jit.trace.
"""

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relational_rnn_checks import obstacle
from relational_rnn_general import NORM_EPSILON, RelationalMemory

# On a CPU, the backward pass computes a weight's gradient each time this many rows have accumulated. On other
# devices, it does so once per window.
WAITING_ROWS = 512

aten = torch.ops.aten


class FastRelationalMemory(RelationalMemory):
    """RelationalMemory with a faster forward and backward pass over sequences.

    Arguments, parameters, state_dict, methods and results are those of RelationalMemory. Second derivatives
    (create_graph=True) and batched gradients (is_grads_batched=True) raise RuntimeError.

    If a submodule has been replaced or has hooks, a torch.func transform is active, or the two files compute
    different results after an edit, the loop of RelationalMemory runs, with one warning per reason.
    """

    _warned: set[str] = set()

    def _run(self, inputs, memory, mask, resets, reset_memory):
        run = self._scan if self._can_scan(inputs) else super()._run
        return run(inputs, memory, mask, resets, reset_memory)

    def _scan(self, inputs, memory, mask, resets, reset_memory):
        """Do what RelationalMemory._run does with the hand-written pass."""
        device, lower = inputs.device.type, None
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and memory.dtype == torch.float32:
            lower = torch.get_autocast_dtype(device)
        # Only products with weights are lowered: memory, norms, attention and gates keep their precision.
        with _without_autocast(device):
            weights = self._recurrent_weights()
            inputs = inputs.to(memory.dtype).transpose(0, 1).contiguous()  # (T, B, M, input_size)
            hoisted = self._hoist(inputs, weights, lower)
            if lower is not None:
                weights = [w.to(lower) if w.dim() == 2 else w for w in weights]
            memory = memory.contiguous()
            if resets is not None:
                resets = resets.t().contiguous()[:, :, None, None]  # (T, B, 1, 1)
                reset_memory = reset_memory.contiguous()
            given = (resets, mask, memory, reset_memory, *hoisted)
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, *weights)):
                memories, last = _Scan.apply(self, *given, *weights)
            else:
                memories = _Window(self, weights).forward(*given)
                last = memories[-1].clone()  # a view would keep the memories of all steps
        return memories.flatten(2).transpose(0, 1), last

    def _can_scan(self, inputs: Tensor) -> bool:
        """Return whether the hand-written pass is used; warn if hooks, layers or transforms prevent it."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or inputs.size(0) == 0:
            return False
        if inputs.size(1) == 1 and not torch.is_grad_enabled():
            return False  # with one step there is nothing to hoist, and the loop has less to prepare
        reason = obstacle(self, FastRelationalMemory)
        if reason is not None and reason not in FastRelationalMemory._warned:
            FastRelationalMemory._warned.add(reason)
            warnings.warn(
                f"FastRelationalMemory runs the slower loop of RelationalMemory because {reason}. The "
                "results are those of RelationalMemory. This warning is shown once.",
                stacklevel=6,  # the line that calls the core
            )
        return reason is None

    def _recurrent_weights(self) -> list[Tensor]:
        """Return the weights of the time loop in the order in which _Window takes them.

        Each is read once, because a parametrization may compute another value at every access.
        """
        # The scores' factor 1 / sqrt(K) goes into the queries' norm: once per window, not once per step.
        factor = self._like().new_ones(self.num_heads, 2 * self.key_size + self.head_size)
        factor[:, : self.key_size] = self.key_size**-0.5
        factor, weights = factor.flatten(), []
        for block in self.blocks:
            weights += [block.qkv_projection.weight, block.qkv_projection.bias]
            weights += [block.qkv_norm.weight * factor, block.qkv_norm.bias * factor]
            weights += [block.attention_norm.weight, block.attention_norm.bias]
            weights += [block.mlp_norm.weight, block.mlp_norm.bias]
        for linear in self.mlp:
            weights += [linear.weight, linear.bias]
        return weights if self.gate_style is None else [*weights, self.memory_gate_projection.weight]

    def _hoist(
        self, inputs: Tensor, weights: Sequence[Tensor], lower: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute what depends on the inputs (T, B, M, input_size) only.

        Returns:
            queries, keys and values of the input rows in the first block, normed, (T, B, M, F);
            the input's part of the gates with all their biases, (T, B, G), or None without gates;
            the projected rows (T, B, M, D) if there is a second block, which needs them, else None.
        """
        qkv, qkv_bias, gain, shift = weights[:4]
        weight_in, bias_in = self.input_projection.weight, self.input_projection.bias
        gate = gate_bias = gate_in = rows = None
        if self.gate_style is not None:
            gate, gate_bias = self.input_gate_projection.weight, self.input_gate_projection.bias
            fixed = gate_bias.new_full((2, len(gate_bias) // 2), self.input_bias)
            fixed[1] = self.forget_bias
            gate_bias = gate_bias + self.memory_gate_projection.bias + fixed.flatten()
        # With one block, the projected rows only go into two more linear layers. Two layers in a row can be
        # multiplied into one beforehand, which pays if the inputs are narrower than the rows and many.
        after = len(qkv) + (0 if gate is None else len(gate))
        count = inputs.shape[:3].numel()
        folded = (count + self.mem_size) * self.input_size * after
        if len(self.blocks) == 1 and folded < count * self.mem_size * (self.input_size + after):
            qkv_in = _affine(inputs, qkv @ weight_in, F.linear(bias_in, qkv, qkv_bias), lower)
            if gate is not None:
                by_row = gate.unflatten(1, (self.input_rows, self.mem_size))  # (G, M, D)
                gate_bias = gate_bias + by_row.sum(1) @ bias_in
                gate_in = _affine(inputs.flatten(2), (by_row @ weight_in).flatten(1), gate_bias, lower)
        else:
            rows = _affine(inputs, weight_in, bias_in, lower)
            qkv_in = _affine(rows, qkv, qkv_bias, lower)
            if gate is not None:
                gate_in = _affine(rows.flatten(2), gate, gate_bias, lower)
        qkv_in = F.layer_norm(qkv_in, gain.shape, gain, shift, NORM_EPSILON)
        return qkv_in, gate_in, rows if len(self.blocks) > 1 else None


class _Scan(torch.autograd.Function):
    """All time steps: the memory after each, (T, B, N, D), and a copy of the last one, (B, N, D)."""

    @staticmethod
    def forward(ctx, core, resets, mask, memory, reset_memory, qkv_in, gate_in, rows, *weights):
        window, kept = _Window(core, weights), []
        memories = window.forward(resets, mask, memory, reset_memory, qkv_in, gate_in, rows, kept)
        ctx.core, ctx.count = core, len(weights)
        # Tensors of save_for_backward are freed after the backward pass, attributes of ctx are not.
        ctx.save_for_backward(resets, mask, memory, reset_memory, memories, *weights, *kept)
        ctx.set_materialize_grads(False)
        return memories, memories[-1].clone()

    @staticmethod
    def backward(ctx, grad_memories, grad_last):
        grads = [g for g in (grad_memories, grad_last) if g is not None]
        if torch.is_grad_enabled() or any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
            raise RuntimeError(
                "FastRelationalMemory does not support second derivatives or batched gradients. Use "
                "RelationalMemory, which loads the same state_dict."
            )
        resets, mask, memory, reset_memory, memories, *rest = ctx.saved_tensors
        window, kept = _Window(ctx.core, rest[: ctx.count]), rest[ctx.count :]
        first = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        with _without_autocast(memory.device.type):
            gradients = window.backward(
                resets, mask, memory, reset_memory, memories, kept, grad_memories, grad_last, first
            )
        return None, None, None, *gradients


class _Window:
    """The time loop over one window, forward and backward, with the weights and their gradients.

    Arguments: resets (T, B, 1, 1) or None; mask (None without one), memory, reset_memory (B, N, D); qkv_in,
    gate_in and rows as _hoist returns them; memories and their gradient (T, B, N, D).

    A step pushes on the stack `kept`, for each block: its rows (B * S, D), except in the first block; mean,
    inverse deviation and inputs of the qkv norm; what the attention keeps; these three of the attention norm;
    the inputs (B * Q, D) of each MLP layer; these three of the MLP norm. With gates, the candidate (B, N, D),
    tanh(memory) (B * N, D) and the gates (B, N, G) follow. `backward` pops them in reverse order.
    """

    def __init__(self, core: FastRelationalMemory, weights: Sequence[Tensor]):
        given = iter(weights)

        def take(layer):
            return layer(next(given), next(given))

        self.blocks = [_Block(take(_Linear), take(_Norm), take(_Norm), take(_Norm)) for _ in core.blocks]
        self.mlp = [take(_Linear) for _ in core.mlp]
        self.gate = None if core.gate_style is None else _Linear(next(given), None)
        self.gate_style, self.width = core.gate_style, core.mem_size
        self.slots, self.input_rows = core.mem_slots, core.input_rows
        self.heads, self.sizes = core.num_heads, (core.key_size, core.key_size, core.head_size)
        # With two rows, attention is a sigmoid of one difference and needs no batched products.
        self.pair = core.mem_slots == core.input_rows == len(core.blocks) == 1

    def forward(self, resets, mask, memory, reset_memory, qkv_in, gate_in, rows, kept=None):
        """Return the memories (T, B, N, D), each after a step; push on `kept`, unless it is None."""
        memories = memory.new_empty(len(qkv_in), *memory.shape)
        given, stack = self._by_step(qkv_in), [] if kept is None else kept
        gate_in, rows = ([None] * len(qkv_in) if x is None else x.unbind(0) for x in (gate_in, rows))
        for t, after in enumerate(memories.unbind(0)):
            if resets is not None:
                memory = torch.where(resets[t], reset_memory, memory)
            self._step(memory, mask, given[t], gate_in[t], rows[t], after, stack)
            if kept is None:
                stack.clear()
            memory = after
        return memories

    def backward(self, resets, mask, memory, reset_memory, memories, kept, grad_memories, grad_last, first):
        """Return the gradients of memory (if first), reset_memory, qkv_in, gate_in, rows and the weights."""
        steps = len(memories)
        grad_qkv_in = memory.new_zeros(*memories.shape[:2], self.input_rows, self.heads * sum(self.sizes))
        to_given, to_gate_in, to_rows = self._by_step(grad_qkv_in), [None] * steps, [None] * steps
        grad_reset = None if resets is None else torch.zeros_like(memory)
        carry = torch.zeros_like(memory) if grad_last is None else grad_last
        for t in reversed(range(steps)):
            grad = carry if grad_memories is None else carry + grad_memories[t]
            before, wanted = (memories[t - 1], True) if t > 0 else (memory, first)
            if resets is not None:
                before = torch.where(resets[t], reset_memory, before)
            done = self._step_backward(before, mask, kept, grad, to_given[t], wanted)
            carry, to_gate_in[t], to_rows[t] = done
            if resets is not None and wanted:
                grad_reset += carry.masked_fill(~resets[t], 0)
                carry = carry.masked_fill(resets[t], 0)
        grad_gate_in = None if self.gate is None else torch.stack(to_gate_in)
        grad_rows = None if len(self.blocks) == 1 else torch.stack(to_rows)
        layers = [layer for block in self.blocks for layer in block] + self.mlp
        layers += [] if self.gate is None else [self.gate]
        to_weights = [gradient for layer in layers for gradient in layer.gradients()]
        return carry, grad_reset, grad_qkv_in, grad_gate_in, grad_rows, *to_weights

    def _by_step(self, qkv: Tensor) -> Sequence:
        """Split the input rows' features (T, B, M, F), or their gradient, by steps and heads.

        For each step (B, M, H, 2K + V). For a pair only keys (B, H, K) and values (B, H, V).
        """
        heads = qkv.unflatten(-1, (self.heads, -1))
        if not self.pair:
            return heads.unbind(0)
        _, keys, values = heads.squeeze(2).split(self.sizes, dim=-1)
        return list(zip(keys.unbind(0), values.unbind(0), strict=True))

    def _step(self, memory, mask, given, gate_in, rows, after, kept):
        """Write the memory after one step to `after`."""
        z = memory
        for index in range(len(self.blocks)):
            z = self._block(index, z, given, rows, kept)
        if self.gate is None:
            after.copy_(z if mask is None else z * mask)
            return
        candidate, squashed = _tanh(z), _tanh(memory).view(-1, self.width)
        if self.slots == 1:
            gates = self.gate.forward(squashed, gate_in).unsqueeze(1)
        else:
            gates = _product(squashed, self.gate.transposed).view(len(memory), self.slots, -1)
            gates = gates.add_(gate_in.unsqueeze(1))
        input_gate, forget_gate = gates.sigmoid_().chunk(2, dim=-1)
        torch.mul(forget_gate, memory, out=after)
        after.addcmul_(input_gate, candidate if mask is None else candidate * mask)
        kept += [candidate, squashed, gates]

    def _step_backward(self, memory, mask, kept, grad, to_given, wanted):
        """Return the gradients of memory (None if not wanted), gate_in and rows from that of the next memory.

        The gradient of the input rows' features is written to to_given.
        """
        grad_z = grad if mask is None else grad * mask
        carry = to_gate_in = None
        if self.gate is not None:
            gates, squashed, candidate = kept.pop(), kept.pop(), kept.pop()
            input_gate, forget_gate = gates.chunk(2, dim=-1)
            errors, factors = torch.empty_like(gates), ((grad_z, candidate), (grad, memory))
            for half, (left, right) in zip(errors.chunk(2, dim=-1), factors, strict=True):
                if self.gate_style == "unit":
                    torch.mul(left, right, out=half)
                else:
                    torch.sum(left * right, dim=-1, keepdim=True, out=half)
            aten.sigmoid_backward(errors, gates, grad_input=errors)
            to_gate_in = errors.sum(1) if self.slots > 1 else errors.squeeze(1)
            to_squashed = self.gate.backward(errors.flatten(0, 1), squashed, wanted)
            if wanted:
                carry = aten.tanh_backward(to_squashed, squashed).view_as(memory).addcmul_(grad, forget_gate)
            grad_z = aten.tanh_backward(grad_z * input_gate, candidate)
        for index in reversed(range(len(self.blocks))):
            grad_z, grad_residual = self._block_backward(index, memory, kept, grad_z, to_given, wanted)
            if index > 0:
                grad_z[:, : grad_residual.size(1)] += grad_residual
        if wanted:
            grad_z = grad_z.add_(grad_residual[:, : self.slots])
            carry = grad_z if carry is None else carry.add_(grad_z)
        return carry, to_gate_in, grad_residual[:, self.slots :]

    def _block(self, index, z, given, rows, kept):
        """Return a block's rows (B, Q, D). z (B, S, D) is the memory in the first block, later all rows."""
        block, first = self.blocks[index], index == 0
        source = z.view(-1, self.width)
        kept += [] if first else [source]  # the backward pass has the memories
        normed = block.qkv_norm.forward(block.qkv.forward(source, block.qkv.bias), kept)
        own = normed.view(len(z), -1, self.heads, sum(self.sizes))
        if self.pair:
            update = _attend_pair(self.sizes, own, *given, kept)
        else:
            last = index + 1 == len(self.blocks)
            update = _attend(self.sizes, own, given if first else None, self.slots if last else None, kept)
        if first and rows is not None:
            z = torch.cat([z, rows], dim=1)
        residual = (z[:, : update.size(1)].view_as(update) + update).reshape(-1, self.width)
        hidden = attended = block.attention_norm.forward(residual, kept)
        for layer, linear in enumerate(self.mlp):
            hidden = hidden.relu_() if layer > 0 else hidden
            kept.append(hidden)
            hidden = linear.forward(hidden, linear.bias)
        return block.mlp_norm.forward(hidden.add_(attended), kept).view(len(own), -1, self.width)

    def _block_backward(self, index, memory, kept, grad_z, to_given, wanted):
        """Return the gradients of a block's z (B, S, D), if wanted, and residual from that of its rows."""
        block, batch = self.blocks[index], len(memory)
        errors = grad_summed = block.mlp_norm.backward(grad_z.reshape(-1, self.width), kept)
        for layer in reversed(range(len(self.mlp))):
            inputs = kept.pop()
            errors = self.mlp[layer].backward(errors, inputs)
            if layer > 0:
                errors = aten.threshold_backward(errors, inputs, 0)
        grad_residual = block.attention_norm.backward(errors.add_(grad_summed), kept)
        grad_residual = grad_residual.view(batch, -1, self.width)
        if self.pair:
            grad_own = _attend_pair_backward(self.sizes, kept, grad_residual, *to_given)
        else:
            grad_own = _attend_backward(kept, grad_residual, to_given if index == 0 else None)
        errors = block.qkv_norm.backward(grad_own.view(-1, len(block.qkv.bias)), kept)
        source, wanted = (memory.view(-1, self.width), wanted) if index == 0 else (kept.pop(), True)
        grad_source = block.qkv.backward(errors, source, wanted)
        return grad_source.view(batch, -1, self.width) if wanted else None, grad_residual


class _Block(NamedTuple):
    """The layers of one attention block."""

    qkv: "_Linear"
    qkv_norm: "_Norm"
    attention_norm: "_Norm"
    mlp_norm: "_Norm"


class _Linear:
    """A linear layer of the time loop and its gradient, summed over the steps."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias, self.transposed = weight, bias, weight.t()
        self.errors, self.inputs, self.rows = [], [], 0
        self.weight_grad = self.bias_grad = None
        self.limit = WAITING_ROWS if weight.device.type == "cpu" else math.inf

    def forward(self, inputs: Tensor, bias: Tensor) -> Tensor:
        """Map (rows, in) to (rows, out). The product is of the weight's type, the result of the bias's."""
        if inputs.dtype == self.weight.dtype:
            return torch.addmm(bias, inputs, self.transposed)
        return torch.mm(inputs.to(self.weight.dtype), self.transposed) + bias

    def backward(self, errors: Tensor, inputs: Tensor, wanted: bool = True) -> Tensor | None:
        """Return the gradient of the inputs if wanted; store what the gradient of the weight needs."""
        self.errors.append(errors)
        self.inputs.append(inputs)
        self.rows += len(errors)
        if self.rows >= self.limit:
            self._multiply()
        return _product(errors, self.weight) if wanted else None

    def _multiply(self) -> None:
        errors, inputs = (x[0] if len(x) == 1 else torch.cat(x) for x in (self.errors, self.inputs))
        self.errors, self.inputs, self.rows = [], [], 0
        transposed, inputs = errors.t().to(self.weight.dtype), inputs.to(self.weight.dtype)
        if self.weight_grad is None:
            self.weight_grad, self.bias_grad = torch.mm(transposed, inputs), errors.sum(0)
        else:
            self.weight_grad.addmm_(transposed, inputs)
            self.bias_grad += errors.sum(0)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the weight and, if there is one, of the bias."""
        if self.rows > 0:
            self._multiply()
        return [self.weight_grad] if self.bias is None else [self.weight_grad, self.bias_grad]


class _Norm:
    """A layer norm of the time loop and its gradient, summed over the steps."""

    def __init__(self, gain: Tensor, shift: Tensor):
        self.gain, self.shift, self.shape = gain, shift, gain.shape
        self.gain_grads: list[Tensor] = []
        self.shift_grads: list[Tensor] = []

    def forward(self, inputs: Tensor, kept: list) -> Tensor:
        """Return the normed rows; keep the rows, their means and inverse deviations."""
        normed, *statistics = torch.native_layer_norm(inputs, self.shape, self.gain, self.shift, NORM_EPSILON)
        kept += [*statistics, inputs]
        return normed

    def backward(self, grad: Tensor, kept: list) -> Tensor:
        """Return the gradient of the inputs."""
        inputs, scale, mean = kept.pop(), kept.pop(), kept.pop()
        grad_inputs, gain_grad, shift_grad = aten.native_layer_norm_backward(
            grad, inputs, self.shape, mean, scale, self.gain, self.shift, (True, True, True)
        )
        self.gain_grads.append(gain_grad)
        self.shift_grads.append(shift_grad)
        return grad_inputs

    def gradients(self) -> list[Tensor]:
        """Return the gradients of gain and shift."""
        return [torch.stack(self.gain_grads).sum(0), torch.stack(self.shift_grads).sum(0)]


def _attend_pair(sizes, own, key_in, value_in, kept):
    """Let one memory row, features own (B, 1, H, 2K + V), attend to itself and one input row.

    Returns the update (B, 1, H, V). Keeps own, with key and value less those of the input row, and the weight
    of the memory row, (B, H, 1).
    """
    query, key, value = own.squeeze(1).split(sizes, dim=-1)
    key, value = key.sub_(key_in), value.sub_(value_in)
    weight = (query * key).sum(-1, keepdim=True).sigmoid_()
    kept += [own, weight]
    return torch.addcmul(value_in, weight, value).unsqueeze(1)


def _attend_pair_backward(sizes, kept, grad_update, to_key_in, to_value_in):
    """Return the gradient of own, (B, H, 2K + V); write those of key_in and value_in to the last two."""
    weight, own = kept.pop(), kept.pop()
    query, key, value = own.squeeze(1).split(sizes, dim=-1)
    grad_update = grad_update.view_as(value)
    score = aten.sigmoid_backward((grad_update * value).sum(-1, keepdim=True), weight)
    to_key, to_value = score * query, grad_update * weight
    torch.neg(to_key, out=to_key_in)
    torch.sub(grad_update, to_value, out=to_value_in)
    return torch.cat([score * key, to_key, to_value], dim=-1).unsqueeze(1)


def _attend(sizes, own, given, queries, kept):
    """Let the first `queries` (all if None) of the R rows attend to all of them.

    The rows' features are own (B, S, H, 2K + V) and, unless None, given (B, M, H, 2K + V). Returns the update
    (B, Q, H, V). Keeps the weights (B * H, R, Q), queries, keys and values, all contiguous: on a CPU, batched
    products of other layouts are slower.
    """
    query, key, value = own.transpose(1, 2).split(sizes, dim=-1)  # (B, H, S, K or V)
    if given is not None:
        query_in, key_in, value_in = given.transpose(1, 2).split(sizes, dim=-1)
        key, value = torch.cat([key, key_in], dim=2), torch.cat([value, value_in], dim=2)
        query = torch.cat([query, query_in], dim=2) if queries is None else query
    query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query[:, :, :queries], key, value))
    weights = _softmax(torch.bmm(key, query.transpose(1, 2)))
    kept += [weights, query, key, value]
    update = torch.bmm(weights.transpose(1, 2), value)
    return update.unflatten(0, (len(own), -1)).transpose(1, 2)


def _attend_backward(kept, grad_update, to_given):
    """Return the gradient of own, (B, S, H, 2K + V); write that of given to to_given unless it is None."""
    value, key, query, weights = (kept.pop() for _ in range(4))
    heads = len(value) // len(grad_update)
    grad_update = grad_update.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)  # (B * H, Q, V)
    score = torch.bmm(value, grad_update.transpose(1, 2))
    score = aten._softmax_backward_data(score, weights, 1, score.dtype)
    to_query = torch.bmm(score.transpose(1, 2), key)
    rows = key.size(1) - (0 if to_given is None else to_given.size(1))
    if query.size(1) < rows:
        to_query = F.pad(to_query, (0, 0, 0, rows - query.size(1)))  # the other rows sent no queries
    grads = to_query, torch.bmm(score, query), torch.bmm(weights, grad_update)
    grads = [x.unflatten(0, (-1, heads)).transpose(1, 2) for x in grads]  # (B, R, H, K or V)
    if to_given is not None:
        for part, grad in zip(to_given.split([x.size(-1) for x in grads], dim=-1), grads, strict=True):
            part[:, : grad.size(1) - rows].copy_(grad[:, rows:])  # no rows of the queries in the last block
    return torch.cat([x[:, :rows] for x in grads], dim=-1)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    available = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, computed in the type of right; the result is of the type of left."""
    if left.dtype == right.dtype:
        return torch.mm(left, right)
    return torch.mm(left.to(right.dtype), right).to(left.dtype)


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor, lower: torch.dtype | None) -> Tensor:
    """inputs @ weight.T + bias; the product is computed in the lower type, if there is one."""
    if lower is None:
        return F.linear(inputs, weight, bias)
    return F.linear(inputs.to(lower), weight.to(lower)).to(inputs.dtype) + bias


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over dimension 1 of 3. On a CPU, two copies and a softmax over dimension 0 are faster."""
    if scores.device.type != "cpu":
        return scores.softmax(dim=1)
    return scores.transpose(0, 1).softmax(dim=0).transpose(0, 1).contiguous()


def _tanh(x: Tensor) -> Tensor:
    """tanh(x), on a CPU from the sigmoid, which is several times faster there. The error is below 3e-7."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return x.tanh()
    return x.mul(2).sigmoid_().mul_(2).sub_(1)

"""Relational Memory Core (Santoro et al. 2018, arXiv:1806.01822, section 3), with the maths of DeepMind's
original module.

This file needs torch alone and can be copied into another project as it is.

Shapes named in the comments of this file:
    B batch   T time steps   N mem_slots   M input_rows   R = N + M rows attended over
    H num_heads   K key_size   V head_size   D mem_size = H * V, the width of one memory row

Where the original module departs from the paper, this file follows the module:
    * The new memory is the next hidden state and the output at once: the output gate of eqs. 6 and 8 does not
      exist, and eq. 7's update is applied to the memory itself.
    * The candidate passes through tanh before the input gate; in eq. 7 it is psi(m), the attention MLP's
      output.
    * Attention runs from all R rows, so that several blocks can refine the input rows too; eq. 2 has queries
      from the memory rows alone. With one block the two are equal, as the input rows are dropped afterwards.
    * Layer norm is applied to the projected queries, keys and values as well: one norm over all of a row's
      features.
    * The gates read tanh(memory) where eqs. 4 and 5 read the hidden state, and their two biases (forget_bias,
      input_bias) are fixed numbers beside learned ones.
    * Between blocks the attention MLP is shared; the query/key/value projections and all norms belong to one
      block.
The input projection, the MLP (no ReLU after its last layer) and every norm work on single rows, so that no
parameter depends on mem_slots, and permuting the slots of the memory permutes the slots of the result.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_STYLES = ("unit", "memory", None)
NORM_EPSILON = 1e-5

# Rows per time step (B * R) up to which the recurrent weights' gradients wait for one product over all steps.
DEFERRED_ROWS = 512


class StepDetails(NamedTuple):
    """What happened inside one step, for looking at.

    input_gate, forget_gate: after the sigmoid, (B, N, D) for gate_style 'unit', (B, N, 1) for 'memory', None
        without gates.
    attention: per block the attention weights from every row (memory rows first, then input rows), 
        (B, H, R, R).
    """

    input_gate: Tensor | None
    forget_gate: Tensor | None
    attention: list[Tensor]


class AttentionBlock(nn.Module):
    """The parts of an attention block that are its own: everything but the MLP, which all blocks share."""

    def __init__(self, mem_size: int, qkv_size: int):
        super().__init__()
        self.qkv_projection = nn.Linear(mem_size, qkv_size)
        self.qkv_norm = nn.LayerNorm(qkv_size, eps=NORM_EPSILON)
        self.attention_norm = nn.LayerNorm(mem_size, eps=NORM_EPSILON)
        self.mlp_norm = nn.LayerNorm(mem_size, eps=NORM_EPSILON)

    def norms(self) -> tuple[nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]:
        """The block's norms in the order of their use."""
        return self.qkv_norm, self.attention_norm, self.mlp_norm


class RelationalMemory(nn.Module):
    """A recurrent core whose state is a matrix of memory rows that interact by attention.

    Args:
        mem_slots: rows N of the memory matrix.
        head_size: size V of one head's values; a memory row has mem_size D = num_heads * head_size features.
        input_size: features of the input at one time step, after flattening (of one row, when
            input_rows > 1).
        num_heads: attention heads H.
        num_blocks: attention blocks applied one after the other within a time step.
        forget_bias: fixed number added to the forget gate before its sigmoid.
        input_bias: fixed number added to the input gate before its sigmoid.
        gate_style: 'unit' (a gate per feature), 'memory' (a gate per memory row) or None (no gates, the
            candidate is the memory).
        attention_mlp_layers: layers of the row-wise MLP that follows the attention.
        key_size: size K of one head's queries and keys; None or 0 means head_size.
        return_all_outputs: whether forward returns the outputs of all time steps or of the last one only.
        input_rows: rows M that the input of one time step brings; above 1 the input is (B, T, M, ...) and
            each row is attended over by itself (the original's `treat_input_as_matrix`).

    Raises:
        ValueError: an argument outside its range; the message names it.
    """

    def __init__(
        self,
        mem_slots: int,
        head_size: int,
        input_size: int,
        num_heads: int = 1,
        num_blocks: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        gate_style: str | None = "unit",
        attention_mlp_layers: int = 2,
        key_size: int | None = None,
        return_all_outputs: bool = False,
        input_rows: int = 1,
    ):
        super().__init__()
        sizes = {
            "mem_slots": mem_slots, "head_size": head_size, "input_size": input_size, "num_heads": num_heads,
            "num_blocks": num_blocks, "attention_mlp_layers": attention_mlp_layers, "input_rows": input_rows,
        }
        for name, value in sizes.items():
            _require_integer(name, value, minimum=1)
        _require_integer("key_size", 0 if key_size is None else key_size, minimum=0)
        for name, value in (("forget_bias", forget_bias), ("input_bias", input_bias)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if gate_style not in GATE_STYLES:
            raise ValueError(f"gate_style must be 'unit', 'memory' or None, got {gate_style!r}")

        self.mem_slots = mem_slots
        self.head_size = head_size
        self.input_size = input_size
        self.num_heads = num_heads
        self.num_blocks = num_blocks
        self.forget_bias = float(forget_bias)
        self.input_bias = float(input_bias)
        self.gate_style = gate_style
        self.attention_mlp_layers = attention_mlp_layers
        self.key_size = key_size or head_size
        self.return_all_outputs = return_all_outputs
        self.input_rows = input_rows
        self.mem_size = num_heads * head_size
        # False runs the plain step over the sequence: the same numbers, slower, derivatives of any order.
        self.fast = True

        qkv_size = num_heads * (2 * self.key_size + head_size)
        self.input_projection = nn.Linear(input_size, self.mem_size)
        self.blocks = nn.ModuleList(AttentionBlock(self.mem_size, qkv_size) for _ in range(num_blocks))
        self.mlp = nn.ModuleList(nn.Linear(self.mem_size, self.mem_size) for _ in range(attention_mlp_layers))
        if gate_style is not None:
            gate_size = 2 * (self.mem_size if gate_style == "unit" else 1)
            self.input_gate_projection = nn.Linear(input_rows * self.mem_size, gate_size)
            self.memory_gate_projection = nn.Linear(self.mem_size, gate_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the original: weights normal of deviation 1/sqrt(fan_in), cut at two, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                deviation = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    @property
    def state_size(self) -> tuple[int, int]:
        """Shape of one sequence's memory, (N, D)."""
        return self.mem_slots, self.mem_size

    @property
    def output_size(self) -> int:
        """Features of the output at one time step, N * D: the memory, slot by slot."""
        return self.mem_slots * self.mem_size

    def extra_repr(self) -> str:
        return (
            f"mem_slots={self.mem_slots}, head_size={self.head_size}, num_heads={self.num_heads}, "
            f"key_size={self.key_size}, gate_style={self.gate_style!r}, forget_bias={self.forget_bias}, input_bias={self.input_bias}"
        )

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory before the first step: the identity, cut or padded with zeros to D columns.

        Returns:
            (batch_size, N, D), on the parameters' device and of their dtype. The rows differ from the start,
            so that the slots can learn different roles; all sequences start alike.
        """
        return self._initial_state(batch_size, self.input_projection.weight)

    def _initial_state(self, batch_size: int, like: Tensor) -> Tensor:
        identity = torch.eye(self.mem_slots, self.mem_size, dtype=like.dtype, device=like.device)
        return identity.repeat(batch_size, 1, 1)

    def forward(
        self, inputs: Tensor, memory: Tensor | None = None, return_gates: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Run the core over a sequence.

        Args:
            inputs: (B, T, ...), flattened after T to input_size; with input_rows > 1, (B, T, M, ...),
                flattened after M.
            memory: the memory before the first step, (B, N, D); None for the initial state.
            return_gates: also return the last step's gates.

        Returns:
            outputs: (B, T, N * D) with return_all_outputs, else the last step's (B, N * D).
            memory: the memory after the last step, (B, N, D). Nothing is detached: gradients reach the given
                memory.
            (input_gate, forget_gate) of the last step after the sigmoid, if asked for: (B, N, D), or
            (B, N, 1) for gate_style 'memory'.

        Raises:
            ValueError: shapes that do not fit, or gates asked of a core without gates.
        """
        if return_gates and self.gate_style is None:
            raise ValueError("return_gates needs a core with gates, but gate_style is None")
        inputs = self._as_rows(inputs, leading=("B", "T"))
        batch_size, steps = inputs.shape[:2]
        if steps == 0:
            raise ValueError("inputs must hold at least one time step, got T = 0")
        if memory is None:
            memory = self._initial_state(batch_size, inputs)
        else:
            memory = self._checked_memory(memory, batch_size)
        if self.fast and not _functorch_is_active():
            outputs, memory, before = self._run_fast(inputs, memory)
        else:
            outputs, memory, before = self._run_plain(inputs, memory)
        output = outputs if self.return_all_outputs else memory.flatten(1)
        if return_gates:
            return output, memory, self.gates(self.input_projection(inputs[:, -1]), before)
        return output, memory

    def _run_plain(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """A loop of steps: outputs (B, T, N * D) if wanted, the last memory and the one before it."""
        outputs = []
        for input_t in inputs.unbind(1):
            before = memory
            memory = self._advance(self.input_projection(input_t), memory)
            if self.return_all_outputs:
                outputs.append(memory.flatten(1))
        return torch.stack(outputs, dim=1) if outputs else None, memory, before

    def _run_fast(self, inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as _run_plain, arranged for speed; see the second half of this file."""
        device = inputs.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shape = _Shape(
            self.mem_slots, self.input_rows, self.num_heads, self.key_size, self.head_size, self.num_blocks,
            self.attention_mlp_layers, self.gate_style,
        )
        qkv_in, gate_in, rows = self._hoist(inputs.transpose(0, 1))
        weights = self._scan_weights(autocast)
        with torch.autocast(device, enabled=False):
            if autocast is not None:             # the memory, norms, softmax and gates stay in full precision
                memory = memory.float()
                qkv_in, gate_in, rows = (x if x is None else x.float() for x in (qkv_in, gate_in, rows))
            flat = weights.flatten()
            if torch.is_grad_enabled() and any(
                x is not None and x.requires_grad for x in (memory, qkv_in, gate_in, rows, *flat)
            ):
                memories, last = _Scan.apply(shape, memory, qkv_in, gate_in, rows, *flat)
            else:
                stacks = _Stacks(shape, memory, 0, wanted=False)
                memories = _scan(shape, weights, memory, qkv_in, gate_in, rows, stacks, tape=None)
                last = memories[-1].clone()
        return memories.flatten(2).transpose(0, 1), last, memories[-2] if len(memories) > 1 else memory

    def _hoist(self, inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What depends on the inputs (T, B, M, input_size) alone, for all time steps at once.

        Returns:
            queries, keys and values of the input rows in the first block, normed, (T, B, M, F);
            the input's part of the gates with all their biases, (T, B, G), or None without gates;
            the projected rows (T, B, M, D) where blocks after the first need them, else None.
        """
        block, rows = self.blocks[0], None
        weight_in, bias_in = self.input_projection.weight, self.input_projection.bias
        qkv = block.qkv_projection
        # With one block the projected rows go nowhere but into two linear layers, so that the two layers in a
        # row can be multiplied into one beforehand. That pays when the inputs are smaller than the rows and
        # many.
        after = qkv.out_features + (0 if self.gate_style is None else self.input_gate_projection.out_features)
        count = inputs.shape[:3].numel()
        folded = count * self.input_size * after + self.mem_size * self.input_size * after
        apart = count * (self.input_size * self.mem_size + self.mem_size * after)
        fold = self.num_blocks == 1 and folded < apart
        if fold:
            folded_qkv = F.linear(inputs, qkv.weight @ weight_in, F.linear(bias_in, qkv.weight, qkv.bias))
        else:
            rows = self.input_projection(inputs)
            folded_qkv = qkv(rows)
        qkv_in = block.qkv_norm(folded_qkv)
        if self.gate_style is None:
            return qkv_in, None, rows if self.num_blocks > 1 else None
        weight, bias = self.input_gate_projection.weight, self.input_gate_projection.bias
        half = weight.size(0) // 2
        fixed = torch.cat([bias.new_full((half,), self.input_bias), bias.new_full((half,), self.forget_bias)])
        bias = bias + self.memory_gate_projection.bias + fixed
        if fold:
            by_row = weight.unflatten(1, (self.input_rows, self.mem_size))                  # (G, M, D)
            bias = bias + by_row.sum(1) @ bias_in
            gate_in = F.linear(inputs.flatten(2), (by_row @ weight_in).flatten(1), bias)
        else:
            gate_in = F.linear(rows.flatten(2), weight, bias)
        return qkv_in, gate_in, rows if self.num_blocks > 1 else None

    def _scan_weights(self, autocast: torch.dtype | None) -> "_Weights":
        """The recurrent weights; matrices in the autocast type, if there is one."""

        def matrix(linear: nn.Linear) -> Tensor:
            return linear.weight if autocast is None else linear.weight.to(autocast)

        blocks = [
            _BlockWeights(
                matrix(block.qkv_projection),
                block.qkv_projection.bias,
                *(p for norm in block.norms() for p in (norm.weight, norm.bias)),
            )
            for block in self.blocks
        ]
        mlp = [(matrix(linear), linear.bias) for linear in self.mlp]
        return _Weights(blocks, mlp, None if self.gate_style is None else matrix(self.memory_gate_projection))

    def step(
        self, input_t: Tensor, memory: Tensor, return_details: bool = False
    ) -> Tensor | tuple[Tensor, StepDetails]:
        """Advance the memory by one time step: the core as a cell, and the reference of the sequence path.

        Args:
            input_t: input of this step, (B, ...), flattened to input_size; with input_rows > 1, (B, M, ...).
            memory: memory before the step, (B, N, D).
            return_details: also return the gates and the attention weights of this step.

        Returns:
            The memory after the step, (B, N, D); its rows flattened are the output. With return_details, also
            StepDetails.

        Raises:
            ValueError: shapes that do not fit.
        """
        input_t = self._as_rows(input_t, leading=("B",))
        memory = self._checked_memory(memory, input_t.size(0))
        rows = self.input_projection(input_t)
        if not return_details:
            return self._advance(rows, memory)
        attention: list[Tensor] = []
        after = self._advance(rows, memory, attention)
        gates = (None, None) if self.gate_style is None else self.gates(rows, memory)
        return after, StepDetails(*gates, attention)

    def _advance(self, rows: Tensor, memory: Tensor, attention: list[Tensor] | None = None) -> Tensor:
        """One step from projected input rows (B, M, D) and memory (B, N, D) to the next memory."""
        attended = torch.cat([memory, rows], dim=1)                           # (B, R, D), the [M; x] of eq. 2
        for block in self.blocks:
            attended = self._attend(block, attended, attention)
        candidate = attended[:, : self.mem_slots]                              # (B, N, D), input rows dropped
        if self.gate_style is None:
            return candidate
        input_gate, forget_gate = self.gates(rows, memory)
        return input_gate * torch.tanh(candidate) + forget_gate * memory            # eq. 7

    def _attend(self, block: AttentionBlock, rows: Tensor, attention: list[Tensor] | None) -> Tensor:
        """One block: the rows (B, R, D) attend to each other (eq. 2, all heads), then each goes through the MLP."""
        qkv = block.qkv_norm(block.qkv_projection(rows))                            # (B, R, H * (2K + V))
        qkv = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)               # (B, H, R, 2K + V)
        query, key, value = qkv.split([self.key_size, self.key_size, self.head_size], dim=-1)
        scores = query @ key.transpose(-1, -2) * self.key_size**-0.5                # (B, H, R, R)
        weights = torch.softmax(scores, dim=-1)
        if attention is not None:
            attention.append(weights)
        update = (weights @ value).transpose(1, 2).flatten(2)                     # (B, R, D), head after head
        rows = block.attention_norm(rows + update)
        hidden = rows
        for layer, linear in enumerate(self.mlp):
            hidden = linear(hidden if layer == 0 else F.relu(hidden))
        return block.mlp_norm(rows + hidden)

    def gates(self, rows: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Input and forget gate, from the projected input rows (B, M, D) and the memory (B, N, D) before the step.

        Returns:
            Both after the sigmoid: (B, N, D) for gate_style 'unit', (B, N, 1) for 'memory'.
        """
        from_input = self.input_gate_projection(rows.flatten(1)).unsqueeze(1)       # (B, 1, 2D) or (B, 1, 2)
        from_memory = self.memory_gate_projection(torch.tanh(memory))               # (B, N, 2D) or (B, N, 2)
        input_gate, forget_gate = (from_input + from_memory).chunk(2, dim=-1)
        return torch.sigmoid(input_gate + self.input_bias), torch.sigmoid(forget_gate + self.forget_bias)

    def load_sonnet_variables(self, variables: Mapping[str, Any]) -> None:
        """Copy the variables of DeepMind's original module (Sonnet v1) into this core.

        Args:
            variables: the original's variable names, with or without the prefixes `var/` and
                `relational_memory/`, to arrays or tensors. Weight matrices are (fan_in, fan_out) there and
                are transposed here.

        Raises:
            ValueError: names missing or not of this core, or shapes that do not fit; the message lists them
                all. Nothing has been copied then.
        """
        given = {}
        for name, value in variables.items():
            short = name.removeprefix("var/").removeprefix("relational_memory/")
            if short in given:
                raise ValueError(f"variable {short!r} is given twice, with and without a prefix")
            given[short] = torch.as_tensor(value)
        expected = self._sonnet_names()
        problems = []
        if missing := sorted(expected.keys() - given.keys()):
            problems.append(f"missing: {', '.join(missing)}")
        if unknown := sorted(given.keys() - expected.keys()):
            problems.append(f"not of this core: {', '.join(unknown)}")
        for name in sorted(expected.keys() & given.keys()):
            value, parameter = given[name], expected[name]
            shape = tuple(parameter.shape)[::-1]                # a weight's is turned round; a vector's stays
            if tuple(value.shape) != shape:
                problems.append(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            elif not value.is_floating_point():
                problems.append(f"{name} must hold floating point numbers, got {value.dtype}")
        if problems:
            raise ValueError("these variables do not fit the core; " + "; ".join(problems))
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(given[name].t() if parameter.dim() == 2 else given[name])

    def _sonnet_names(self) -> dict[str, nn.Parameter]:
        """The original's variable names in the order in which it made them, each with its parameter here."""
        linears = [self.input_projection] + [block.qkv_projection for block in self.blocks]
        if self.gate_style is not None:
            linears += [self.input_gate_projection, self.memory_gate_projection]
        norms = [norm for block in self.blocks for norm in block.norms()]
        names = {}
        for index, linear in enumerate(linears):
            prefix = f"linear_{index}" if index else "linear"
            names |= {f"{prefix}/w": linear.weight, f"{prefix}/b": linear.bias}
        for index, norm in enumerate(norms):
            prefix = f"layer_norm_{index}" if index else "layer_norm"
            names |= {f"{prefix}/gamma": norm.weight, f"{prefix}/beta": norm.bias}
        for index, linear in enumerate(self.mlp):
            names |= {f"mlp/linear_{index}/w": linear.weight, f"mlp/linear_{index}/b": linear.bias}
        return names

    def _as_rows(self, inputs: Tensor, leading: tuple[str, ...]) -> Tensor:
        """Flatten what follows the leading dimensions to (..., M, input_size), or say what was expected."""
        many = self.input_rows > 1
        first = len(leading) + many
        fits = inputs.dim() > first and inputs.shape[first:].numel() == self.input_size
        if not fits or (many and inputs.size(first - 1) != self.input_rows):
            rows = f", {self.input_rows} rows" if many else ""
            raise ValueError(
                f"inputs must have shape ({', '.join(leading)}{rows}, ...) with {self.input_size} features "
                f"(input_size) after flattening the rest, got {tuple(inputs.shape)}"
            )
        inputs = inputs.flatten(first)
        return inputs if many else inputs.unsqueeze(-2)

    def _checked_memory(self, memory: Tensor, batch_size: int) -> Tensor:
        expected = (batch_size, self.mem_slots, self.mem_size)
        if tuple(memory.shape) != expected:
            raise ValueError(
                f"memory must have shape (B, mem_slots, mem_size) = {expected}, got {tuple(memory.shape)}"
            )
        return memory


def _functorch_is_active() -> bool:
    """Whether a torch.func transform is at work; the hand-written backward pass cannot take part in one."""
    return getattr(torch._C, "_are_functorch_transforms_active", lambda: False)()


def _require_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


# ----------------------------------------------------------------------------------------------------
# The fast sequence path: what RelationalMemory._advance computes step by step, arranged for speed.
#   * What depends on the inputs alone leaves the time loop for a few large products (RelationalMemory._hoist).
#   * In the last block only the memory rows go on: the input rows give keys and values and nothing else.
#   * The backward pass is written out. It saves what it needs and no more, and turns the gradient of every
#     recurrent weight into one product over all time steps instead of T small ones, which each read and write
#     the whole weight.


class _Shape(NamedTuple):
    """The sizes that the scan needs."""

    slots: int
    input_rows: int
    heads: int
    key_size: int
    head_size: int
    blocks: int
    mlp_layers: int
    gate_style: str | None

    @property
    def pair(self) -> bool:
        """One memory row, one input row, one block: attention over two keys needs no matrix product."""
        return self.slots == self.input_rows == self.blocks == 1


class _BlockWeights(NamedTuple):
    """One block's weights, in the order in which _Scan takes them."""

    qkv: Tensor
    qkv_bias: Tensor
    qkv_gain: Tensor
    qkv_shift: Tensor
    attention_gain: Tensor
    attention_shift: Tensor
    mlp_gain: Tensor
    mlp_shift: Tensor


class _Weights(NamedTuple):
    """All weights of the scan; gate is the memory's gate projection, its bias is in the hoisted input part."""

    blocks: list[_BlockWeights]
    mlp: list[tuple[Tensor, Tensor]]
    gate: Tensor | None

    @classmethod
    def group(cls, shape: _Shape, flat: Sequence[Any]) -> "_Weights":
        """Undo flatten()."""
        width = len(_BlockWeights._fields)
        blocks = [_BlockWeights(*flat[i * width : (i + 1) * width]) for i in range(shape.blocks)]
        rest = flat[shape.blocks * width :]
        mlp = [(rest[2 * i], rest[2 * i + 1]) for i in range(shape.mlp_layers)]
        return cls(blocks, mlp, rest[2 * shape.mlp_layers] if shape.gate_style else None)

    def flatten(self) -> tuple[Any, ...]:
        gate = () if self.gate is None else (self.gate,)
        return *(w for block in self.blocks for w in block), *(w for layer in self.mlp for w in layer), *gate


class _BlockTape(NamedTuple):
    """What one block of one step leaves for the backward pass: S rows projected, Q rows sent to the MLP."""

    inputs: Tensor | None        # (B * S, D), what was projected; None in the first block, where it is the memory
    projected: Tensor            # (B * S, F) before its norm, F = H * (2K + V)
    projected_stats: Any         # mean and inverse deviation of each row, (B * S, 1) each
    attention: Any               # what the attention's backward pass needs
    residual: Tensor             # (B * Q, D) before the norm after attention
    residual_stats: Any
    mlp_inputs: Any              # the input of each MLP layer, (B * Q, D)
    summed: Tensor               # (B * Q, D) before the norm after the MLP
    summed_stats: Any


class _StepTape(NamedTuple):
    """What one step leaves for the backward pass; the gate fields are None without gates."""

    blocks: Any                  # a _BlockTape per block
    candidate: Tensor | None     # after its tanh, (B, N, D)
    squashed: Tensor | None      # tanh(memory), (B, N, D)
    gates: Tensor | None         # after the sigmoid, (B, N, G)


class _Stacks:
    """Inputs of the recurrent linear layers at all steps, (T, rows, features) each, for one product over them.

    Where a product per step is to be used instead (`wanted` False), every stack is None.
    """

    def __init__(self, shape: _Shape, like: Tensor, steps: int, wanted: bool):
        batch, slots, width = like.shape

        def stack(rows: int) -> Tensor | None:
            return like.new_empty(steps, batch * rows, width) if wanted else None

        every = slots + shape.input_rows
        self.block_inputs = [stack(every) if index > 0 else None for index in range(shape.blocks)]
        self.mlp_inputs = [
            [stack(slots if index + 1 == shape.blocks else every) for _ in range(shape.mlp_layers)]
            for index in range(shape.blocks)
        ]
        self.squashed = stack(slots) if shape.gate_style else None


class _Scan(torch.autograd.Function):
    """All time steps of the core from hoisted input parts, forward and backward pass by hand.

    Inputs:  memory (B, N, D); qkv_in (T, B, M, F), normed; gate_in (T, B, G) with all biases, None without
             gates; rows (T, B, M, D) when there are blocks before the last, else None; then _Weights.flatten().
    Outputs: the memories after every step (T, B, N, D), and the last one again (B, N, D).
    """

    @staticmethod
    def forward(ctx, shape, memory, qkv_in, gate_in, rows, *flat):
        weights = _Weights.group(shape, flat)
        steps, batch = qkv_in.shape[:2]
        stacks = _Stacks(shape, memory, steps, batch * (shape.slots + shape.input_rows) <= DEFERRED_ROWS)
        tape: list[_StepTape] = []
        memories = _scan(shape, weights, memory, qkv_in, gate_in, rows, stacks, tape)
        ctx.shape = shape
        # Everything through save_for_backward, which lets go of it as soon as the backward pass is over.
        saved: list[Tensor] = []
        ctx.layout = _pack((weights.flatten(), memory, qkv_in, memories, vars(stacks), tape), saved)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return memories, memories[-1].clone()

    @staticmethod
    def backward(ctx, grad_memories, grad_last):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fast path of RelationalMemory has no second derivative; set core.fast = False to use the "
                "plain step, which has derivatives of any order"
            )
        flat, memory, qkv_in, memories, stacks, tape = _unpack(ctx.layout, ctx.saved_tensors)
        weights = _Weights.group(ctx.shape, flat)
        with torch.autocast(memory.device.type, enabled=False):
            return None, *_scan_backward(
                ctx.shape, weights, stacks, tape, memory, qkv_in, memories, grad_memories, grad_last
            )


def _pack(tree: Any, tensors: list[Tensor]) -> Any:
    """Move the tensors of nested containers to a list; each leaves its index behind."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return len(tensors) - 1
    if isinstance(tree, dict):
        return {key: _pack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        children = [_pack(value, tensors) for value in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else children
    return None


def _unpack(layout: Any, tensors: Sequence[Tensor]) -> Any:
    """Undo _pack()."""
    if isinstance(layout, int):
        return tensors[layout]
    if isinstance(layout, dict):
        return {key: _unpack(value, tensors) for key, value in layout.items()}
    if isinstance(layout, (list, tuple)):
        children = [_unpack(value, tensors) for value in layout]
        return type(layout)(*children) if hasattr(layout, "_fields") else children
    return None


def _scan(shape, weights, memory, qkv_in, gate_in, rows, stacks, tape):
    """The time loop; returns the memories (T, B, N, D). A tape takes what the backward pass needs."""
    steps = qkv_in.size(0)
    memories = memory.new_empty(steps, *memory.shape)
    for t in range(steps):
        z, blocks = memory, []
        for index in range(shape.blocks):
            given = (qkv_in[t], None if rows is None else rows[t]) if index == 0 else (None, None)
            z, block_tape = _block(shape, weights, index, z, *given, stacks, t)
            blocks.append(block_tape)
        if weights.gate is None:
            memories[t] = z
            step_tape = _StepTape(blocks, None, None, None)
        else:
            candidate = z.tanh_()
            squashed = torch.tanh(memory, out=_slot(stacks.squashed, t, memory))
            gates = _gates(weights.gate, gate_in[t], squashed)
            input_gate, forget_gate = gates.chunk(2, dim=-1)
            torch.mul(forget_gate, memory, out=memories[t]).addcmul_(input_gate, candidate)
            step_tape = _StepTape(blocks, candidate, squashed, gates)
        memory = memories[t]
        if tape is not None:
            tape.append(step_tape)
    return memories


def _slot(stack: Tensor | None, t: int, like: Tensor | None = None) -> Tensor | None:
    """Step t of a stack, in the shape of `like` if given; None where there is no stack: a fresh tensor then."""
    if stack is None:
        return None
    return stack[t] if like is None else stack[t].view(like.shape)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """inputs @ weight.T + bias; a weight of lower precision (autocast) lowers the product's, not the result's."""
    if inputs.dtype == weight.dtype:
        return torch.addmm(bias, inputs, weight.t(), out=out)
    return torch.add(inputs.to(weight.dtype) @ weight.t(), bias, out=out)


def _backward_product(errors: Tensor, weight: Tensor) -> Tensor:
    """errors @ weight, with the precision of the weight and a result of the errors' type."""
    return (errors.to(weight.dtype) @ weight).to(errors.dtype)


def _norm(inputs: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last axis, with each row's mean and inverse deviation."""
    return torch.native_layer_norm(inputs, (inputs.size(-1),), gain, shift, NORM_EPSILON)


def _gates(weight, gate_in, squashed):
    """Both gates after the sigmoid, (B, N, G), from the hoisted part (B, G) and tanh(memory) (B, N, D)."""
    if squashed.size(1) == 1:
        return _linear(squashed.flatten(0, 1), weight, gate_in).sigmoid_().unsqueeze(1)
    from_memory = squashed.flatten(0, 1).to(weight.dtype) @ weight.t()
    return (from_memory.unflatten(0, squashed.shape[:2]) + gate_in.unsqueeze(1)).sigmoid_()


def _block(shape, weights, index, z, given, rows, stacks, t):
    """One attention block; (B, S, D) -> (B, Q, D) and what its backward pass needs.

    z holds the rows to be projected here. In the first block that is the memory: the input rows' queries, keys
    and values are `given` (B, M, F), and the rows themselves, if they go on, are `rows` (B, M, D). In later
    blocks it is all rows.
    """
    block = weights.blocks[index]
    batch, _, width = z.shape
    queries = shape.slots if index + 1 == shape.blocks else shape.slots + shape.input_rows
    inputs = z.flatten(0, 1)
    projected = _linear(inputs, block.qkv, block.qkv_bias)
    normed, *projected_stats = _norm(projected, block.qkv_gain, block.qkv_shift)
    if shape.pair:
        update, attention = _attend_pair(shape, normed, given)
    else:
        update, attention = _attend_rows(shape, normed, given, batch, queries)
    carried = z if rows is None else torch.cat([z, rows], dim=1)
    residual = z.new_empty(batch, queries, shape.heads, shape.head_size)
    torch.add(carried[:, :queries].view_as(residual), update, out=residual)
    residual = residual.view(batch * queries, width)
    attended, *residual_stats = _norm(residual, block.attention_gain, block.attention_shift)
    mlp_inputs = []
    hidden = attended
    for layer, (weight, bias) in enumerate(weights.mlp):
        stack = stacks.mlp_inputs[index][layer]
        if layer > 0:
            hidden = hidden.relu_()
        elif stack is not None:
            hidden = stack[t].copy_(hidden)
        mlp_inputs.append(hidden)
        following = stacks.mlp_inputs[index][layer + 1] if layer + 1 < shape.mlp_layers else None
        hidden = _linear(hidden, weight, bias, out=_slot(following, t))
    summed = hidden.add_(attended)
    z, *summed_stats = _norm(summed, block.mlp_gain, block.mlp_shift)
    if index + 1 < shape.blocks and stacks.block_inputs[index + 1] is not None:
        z = stacks.block_inputs[index + 1][t].copy_(z)
    tape = _BlockTape(
        None if index == 0 else inputs,
        projected,
        projected_stats,
        attention,
        residual,
        residual_stats,
        mlp_inputs,
        summed,
        summed_stats,
    )
    return z.view(batch, queries, width), tape


def _attend_pair(shape, normed, given):
    """One memory row attends over itself and one input row: softmax over two scores is a sigmoid.

    normed (B, F) and given (B, 1, F) are the two rows' queries, keys and values; returns (B, 1, H, V) and
    what the backward pass needs.
    """
    own = normed.unflatten(-1, (shape.heads, -1))                                       # (B, H, 2K + V)
    other = given.squeeze(1).unflatten(-1, (shape.heads, -1))
    key, value = shape.key_size, 2 * shape.key_size
    key_difference = own[..., key:value] - other[..., key:value]
    value_difference = own[..., value:] - other[..., value:]
    score = (own[..., :key] * key_difference).sum(-1, keepdim=True)
    own_weight = score.mul_(key**-0.5).sigmoid_()                                       # (B, H, 1)
    update = torch.addcmul(other[..., value:], own_weight, value_difference)
    return update.unsqueeze(1), (own, key_difference, value_difference, own_weight)


def _attend_pair_backward(shape, saved, grad_update):
    """Gradients by both rows' queries, keys and values, (B, F) each, from grad_update (B, 1, D)."""
    own, key_difference, value_difference, own_weight = saved
    key, value = shape.key_size, 2 * shape.key_size
    grad_update = grad_update.view_as(value_difference)
    grad_score = (grad_update * value_difference).sum(-1, keepdim=True)
    grad_score = _sigmoid_backward(grad_score, own_weight).mul_(key**-0.5)
    grad_own, grad_other = torch.empty_like(own), torch.empty_like(own)
    torch.mul(grad_score, key_difference, out=grad_own[..., :key])
    torch.mul(grad_score, own[..., :key], out=grad_own[..., key:value])
    torch.mul(grad_update, own_weight, out=grad_own[..., value:])
    grad_other[..., :key] = 0                                                          # its query is not used
    torch.neg(grad_own[..., key:value], out=grad_other[..., key:value])
    torch.sub(grad_update, grad_own[..., value:], out=grad_other[..., value:])
    return grad_own.flatten(1), grad_other.flatten(1)


def _attend_rows(shape, normed, given, batch, queries):
    """The first Q rows attend over all R rows.

    normed (B * S, F) and given (B, M, F), or None, are the rows' queries, keys and values; returns
    (B, Q, H, V) and what the backward pass needs.
    """
    normed = normed.unflatten(-1, (shape.heads, -1)).unflatten(0, (batch, -1))          # (B, S, H, 2K + V)
    own, others = normed.size(1), 0 if given is None else given.size(1)
    qkv = normed.new_empty(batch, shape.heads, own + others, normed.size(-1))   # heads apart for the products
    qkv[:, :, :own] = normed.transpose(1, 2)
    if given is not None:
        qkv[:, :, own:] = given.unflatten(-1, (shape.heads, -1)).transpose(1, 2)
    qkv = qkv.flatten(0, 1)                                                             # (B * H, R, 2K + V)
    query, key, value = qkv.split([shape.key_size, shape.key_size, shape.head_size], dim=-1)
    scores = torch.bmm(query[:, :queries], key.transpose(1, 2)).mul_(shape.key_size**-0.5)
    weights = torch.softmax(scores, dim=-1)                                             # (B * H, Q, R)
    update = torch.bmm(weights, value).unflatten(0, (batch, shape.heads))
    return update.transpose(1, 2), (qkv, weights)


def _attend_rows_backward(shape, saved, grad_update):
    """Gradient by all rows' queries, keys and values, (B, R, F), as a view; grad_update (B, Q, D)."""
    qkv, weights = saved
    batch, queries = grad_update.shape[:2]
    sizes = [shape.key_size, shape.key_size, shape.head_size]
    query, key, value = qkv.split(sizes, dim=-1)
    grad_update = grad_update.unflatten(-1, (shape.heads, -1)).transpose(1, 2).flatten(0, 1)   # (B * H, Q, V)
    grad_weights = torch.bmm(grad_update, value.transpose(1, 2))
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_scores = grad_scores.mul_(shape.key_size**-0.5)
    grad_qkv = torch.empty_like(qkv)
    grad_query, grad_key, grad_value = grad_qkv.split(sizes, dim=-1)
    grad_query[:, :queries] = torch.bmm(grad_scores, key)
    grad_query[:, queries:] = 0
    grad_key.copy_(torch.bmm(grad_scores.transpose(1, 2), query[:, :queries]))
    grad_value.copy_(torch.bmm(weights.transpose(1, 2), grad_update))
    return grad_qkv.unflatten(0, (batch, shape.heads)).transpose(1, 2).flatten(2)


class _LinearGradient:
    """Gradient of one linear layer's weight and bias, summed over the time steps.

    With a stack for the errors, they are kept and multiplied with the inputs of all steps once, at the end:
    with few rows per step, a product at every step would spend its time on reading and writing the whole gradient. Without
    a stack, each step's product is added at once: with many rows that costs no more, and needs no memory for
    the errors.
    """

    def __init__(self, weight: Tensor, stack: Tensor | None):
        self.weight, self.stack = weight, stack
        self.weight_grad = self.bias_grad = None

    def add(self, t: int, errors: Tensor, inputs: Tensor) -> None:
        """errors (rows, out), the gradient by the layer's output at step t, and inputs (rows, in)."""
        if self.stack is None:
            self._accumulate(errors, inputs)
        elif errors.data_ptr() != self.stack[t].data_ptr():                        # else it was made in place
            self.stack[t].copy_(errors)

    def add_stack(self, steps: slice, inputs: Tensor) -> None:
        """The product over the given steps; inputs (steps, rows, in)."""
        self._accumulate(self.stack[steps].flatten(0, 1), inputs.flatten(0, 1))

    def _accumulate(self, errors: Tensor, inputs: Tensor) -> None:
        transposed, factor = errors.t().to(self.weight.dtype), inputs.to(self.weight.dtype)
        if self.weight_grad is None:
            self.weight_grad, self.bias_grad = transposed @ factor, errors.sum(0)
        else:
            self.weight_grad.addmm_(transposed, factor)
            self.bias_grad += errors.sum(0)


class _NormGradient:
    """Gradient of one layer norm's gain and shift, summed over the time steps."""

    def __init__(self, gain: Tensor, shift: Tensor):
        self.gain, self.shift = gain, shift
        self.gain_grad, self.shift_grad = torch.zeros_like(gain), torch.zeros_like(shift)

    def backward(self, grad: Tensor, inputs: Tensor, stats: Sequence[Tensor]) -> Tensor:
        """Gradient by the norm's input; what this step gives to gain and shift is added to theirs."""
        grad_inputs, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad, inputs, (inputs.size(-1),), *stats, self.gain, self.shift, (True, True, True)
        )
        self.gain_grad += grad_gain
        self.shift_grad += grad_shift
        return grad_inputs


def _scan_backward(shape, weights, stacks, tape, memory, qkv_in, memories, grad_memories, grad_last):
    """The time loop backwards; returns gradients by memory, qkv_in, gate_in, rows and the flat weights."""
    steps, batch, slots, width = memories.shape
    rows_after = [(slots if i + 1 == shape.blocks else slots + shape.input_rows) for i in range(shape.blocks)]
    rows_before = [slots, *rows_after[:-1]]
    deferred = stacks["mlp_inputs"][0][0] is not None

    def linear_gradient(weight, rows):
        stack = memory.new_empty(steps, batch * rows, weight.size(0)) if deferred else None
        return _LinearGradient(weight, stack)

    qkv_grads = [linear_gradient(weights.blocks[i].qkv, rows_before[i]) for i in range(shape.blocks)]
    mlp_grads = [[linear_gradient(weight, rows) for weight, _ in weights.mlp] for rows in rows_after]
    norm_grads = [
        (
            _NormGradient(block.qkv_gain, block.qkv_shift),
            _NormGradient(block.attention_gain, block.attention_shift),
            _NormGradient(block.mlp_gain, block.mlp_shift),
        )
        for block in weights.blocks
    ]
    gate_grad = grad_gate_in = None
    if weights.gate is not None:
        gate_grad = linear_gradient(weights.gate, slots)
        grad_gate_in = memory.new_empty(steps, batch, weights.gate.size(0))
    grad_qkv_in = torch.empty_like(qkv_in)
    grad_rows = memory.new_empty(steps, batch, shape.input_rows, width) if shape.blocks > 1 else None

    carry = torch.zeros_like(memory) if grad_last is None else grad_last
    for t in reversed(range(steps)):
        saved = tape[t]
        before = memories[t - 1] if t > 0 else memory
        grad = carry if grad_memories is None else carry + grad_memories[t]
        if weights.gate is None:
            grad_z, carry = grad, torch.zeros_like(memory)
        else:
            input_gate, forget_gate = saved.gates.chunk(2, dim=-1)
            grad_gates = _slot(gate_grad.stack, t, saved.gates)
            if grad_gates is None:
                grad_gates = torch.empty_like(saved.gates)
            to_input, to_forget = grad_gates.chunk(2, dim=-1)
            if shape.gate_style == "unit":
                torch.mul(grad, saved.candidate, out=to_input)
                torch.mul(grad, before, out=to_forget)
            else:
                torch.sum(grad * saved.candidate, dim=-1, keepdim=True, out=to_input)
                torch.sum(grad * before, dim=-1, keepdim=True, out=to_forget)
            grad_gates = _sigmoid_backward(grad_gates, saved.gates, out=grad_gates)
            torch.sum(grad_gates, dim=1, out=grad_gate_in[t])
            errors = grad_gates.flatten(0, 1)
            gate_grad.add(t, errors, saved.squashed.flatten(0, 1))
            grad_squashed = _backward_product(errors, weights.gate).view_as(memory)
            carry = _tanh_backward(grad_squashed, saved.squashed).addcmul_(grad, forget_gate)
            grad_z = _tanh_backward(grad * input_gate, saved.candidate)

        for index in reversed(range(shape.blocks)):
            block, kept, norms = weights.blocks[index], saved.blocks[index], norm_grads[index]
            grad_summed = norms[2].backward(grad_z.flatten(0, 1), kept.summed, kept.summed_stats)
            errors = grad_summed
            for layer in reversed(range(shape.mlp_layers)):
                mlp_grads[index][layer].add(t, errors, kept.mlp_inputs[layer])
                errors = _backward_product(errors, weights.mlp[layer][0])
                if layer > 0:
                    stack = mlp_grads[index][layer - 1].stack
                    errors = _relu_backward(errors, kept.mlp_inputs[layer], out=_slot(stack, t))
            grad_residual = norms[1].backward(errors.add_(grad_summed), kept.residual, kept.residual_stats)
            grad_residual = grad_residual.view(batch, rows_after[index], width)
            if shape.pair:
                grad_normed, grad_given = _attend_pair_backward(shape, kept.attention, grad_residual)
                grad_qkv_in[t, :, 0] = grad_given
            else:
                grad_normed = _attend_rows_backward(shape, kept.attention, grad_residual)
                if index == 0:
                    grad_qkv_in[t] = grad_normed[:, slots:]
                    grad_normed = grad_normed[:, :slots]
                grad_normed = grad_normed.flatten(0, 1)
            errors = norms[0].backward(grad_normed, kept.projected, kept.projected_stats)
            qkv_grads[index].add(t, errors, before.flatten(0, 1) if index == 0 else kept.inputs)
            grad_z = _backward_product(errors, block.qkv).view(batch, rows_before[index], width)
            if index > 0:
                grad_z[:, : rows_after[index]] += grad_residual
            elif grad_rows is not None:
                grad_rows[t] = grad_residual[:, slots:]
        carry = carry.add_(grad_z).add_(grad_residual[:, :slots])

    if deferred:
        first, later = slice(0, 1), slice(1, steps)
        qkv_grads[0].add_stack(first, memory.flatten(0, 1).unsqueeze(0))
        if steps > 1:
            qkv_grads[0].add_stack(later, memories[:-1].flatten(1, 2))
        every = slice(0, steps)
        for index in range(shape.blocks):
            if index > 0:
                qkv_grads[index].add_stack(every, stacks["block_inputs"][index])
            for layer in range(shape.mlp_layers):
                mlp_grads[index][layer].add_stack(every, stacks["mlp_inputs"][index][layer])
        if gate_grad is not None:
            gate_grad.add_stack(every, stacks["squashed"])
    blocks = [
        _BlockWeights(
            linear.weight_grad,
            linear.bias_grad,
            *(gradient for norm in norms for gradient in (norm.gain_grad, norm.shift_grad)),
        )
        for linear, norms in zip(qkv_grads, norm_grads, strict=True)
    ]
    mlp = []
    for layer in range(shape.mlp_layers):                       # shared by the blocks: their gradients add up
        parts = [grads[layer] for grads in mlp_grads]
        mlp.append((sum(part.weight_grad for part in parts), sum(part.bias_grad for part in parts)))
    gate = None if gate_grad is None else gate_grad.weight_grad
    return carry, grad_qkv_in, grad_gate_in, grad_rows, *_Weights(blocks, mlp, gate).flatten()


def _sigmoid_backward(grad: Tensor, result: Tensor, out: Tensor | None = None) -> Tensor:
    """grad * result * (1 - result) in one operation."""
    if out is None:
        return torch.ops.aten.sigmoid_backward(grad, result)
    return torch.ops.aten.sigmoid_backward.grad_input(grad, result, grad_input=out)


def _tanh_backward(grad: Tensor, result: Tensor) -> Tensor:
    """grad * (1 - result ** 2) in one operation."""
    return torch.ops.aten.tanh_backward(grad, result)


def _relu_backward(grad: Tensor, result: Tensor, out: Tensor | None = None) -> Tensor:
    """grad where result > 0, else 0, in one operation."""
    if out is None:
        return torch.ops.aten.threshold_backward(grad, result, 0)
    return torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=out)

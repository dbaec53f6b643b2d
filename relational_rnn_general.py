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
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_STYLES = ("unit", "memory", None)
NORM_EPSILON = 1e-5

# Rows per time step (B * R) up to which the recurrent weights' gradients wait for products over many steps.
DEFERRED_ROWS = 512
# How many memory rows (steps * B * N) wait for one product on a CPU: enough for a fast one, few to be kept.
# On other devices they are those of the whole window.
DEFERRED_SPAN = 512


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
            f"key_size={self.key_size}, gate_style={self.gate_style!r}, forget_bias={self.forget_bias}, "
            f"input_bias={self.input_bias}"
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
        self,
        inputs: Tensor,
        memory: Tensor | None = None,
        return_gates: bool = False,
        candidate_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Run the core over a sequence.

        Args:
            inputs: (B, T, ...), flattened after T to input_size; with input_rows > 1, (B, T, M, ...),
                flattened after M.
            memory: the memory before the first step, (B, N, D); None for the initial state.
            return_gates: also return the last step's gates.
            candidate_mask: factors on the candidate (after its tanh, if there are gates) at every step,
                (B, N, D); none where None. This is where Semeniuta et al. 2016 (arXiv:1603.05118) put their
                recurrent dropout. It gets no gradient.

        Returns:
            outputs: (B, T, N * D) with return_all_outputs, else the last step's (B, N * D).
            memory: the memory after the last step, (B, N, D). Nothing is detached: gradients reach the given
                memory. The backward pass needs the outputs as they are: do not change them in place.
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
        mask = self._checked_mask(candidate_mask, memory)
        if self.fast and batch_size > 0 and not _transforms_are_active():
            outputs, memory, before = self._run_fast(inputs, memory, mask)
        else:
            outputs, memory, before = self._run_plain(inputs, memory, mask)
        output = outputs if self.return_all_outputs else memory.flatten(1)
        if return_gates:
            return output, memory, self.gates(self.input_projection(inputs[:, -1]), before)
        return output, memory

    def _run_plain(
        self, inputs: Tensor, memory: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """A loop of steps: outputs (B, T, N * D) if wanted, the last memory and the one before it."""
        outputs = []
        for input_t in inputs.unbind(1):
            before = memory
            memory = self._advance(self.input_projection(input_t), memory, mask)
            if self.return_all_outputs:
                outputs.append(memory.flatten(1))
        return torch.stack(outputs, dim=1) if outputs else None, memory, before

    def _run_fast(
        self, inputs: Tensor, memory: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same as _run_plain, arranged for speed; see the second half of this file."""
        device, dtype = inputs.device.type, self.input_projection.weight.dtype
        lower = None                            # the type that autocast wants products to be of
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            lower = torch.get_autocast_dtype(device)
            inputs, memory = inputs.float(), memory.float()
        shape = _Shape(
            self.mem_slots, self.input_rows, self.num_heads, self.key_size, self.head_size, self.num_blocks,
            self.attention_mlp_layers, self.gate_style,
        )
        # Only the products with weights are lowered: memory, norms, attention and gates stay as they are.
        with torch.autocast(device, enabled=False):
            weights = self._scan_weights(lower)
            qkv_in, gate_in, rows = self._hoist(inputs.transpose(0, 1).contiguous(), weights, lower)
            memory = memory.contiguous()
            mask = None if mask is None else mask.to(memory).contiguous()
            flat = weights.flatten()
            if torch.is_grad_enabled() and any(
                x is not None and x.requires_grad for x in (memory, qkv_in, gate_in, rows, *flat)
            ):
                memories, last = _Scan.apply(shape, memory, mask, qkv_in, gate_in, rows, *flat)
            else:
                tapes = [_NoTape()] * (self.num_blocks + 1)
                memories = _scan(shape, weights, memory, mask, qkv_in, gate_in, rows, tapes)
                last = memories[-1].clone()
        return memories.flatten(2).transpose(0, 1), last, memories[-2] if len(memories) > 1 else memory

    def _hoist(
        self, inputs: Tensor, weights: "_Weights", lower: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
            bias = F.linear(bias_in, qkv.weight, qkv.bias)
            projected = _affine(inputs, qkv.weight @ weight_in, bias, lower)
        else:
            rows = _affine(inputs, weight_in, bias_in, lower)
            projected = _affine(rows, qkv.weight, qkv.bias, lower)
        gain, shift = weights.blocks[0].qkv_gain, weights.blocks[0].qkv_shift
        qkv_in = F.layer_norm(projected, projected.shape[-1:], gain, shift, NORM_EPSILON)
        if self.gate_style is None:
            return qkv_in, None, rows if self.num_blocks > 1 else None
        weight, bias = self.input_gate_projection.weight, self.input_gate_projection.bias
        half = weight.size(0) // 2
        fixed = torch.cat([bias.new_full((half,), self.input_bias), bias.new_full((half,), self.forget_bias)])
        bias = bias + self.memory_gate_projection.bias + fixed
        if fold:
            by_row = weight.unflatten(1, (self.input_rows, self.mem_size))                  # (G, M, D)
            bias = bias + by_row.sum(1) @ bias_in
            gate_in = _affine(inputs.flatten(2), (by_row @ weight_in).flatten(1), bias, lower)
        else:
            gate_in = _affine(rows.flatten(2), weight, bias, lower)
        return qkv_in, gate_in, rows if self.num_blocks > 1 else None

    def _scan_weights(self, lower: torch.dtype | None) -> "_Weights":
        """The recurrent weights; matrices in the lower type, if there is one."""

        def matrix(linear: nn.Linear) -> Tensor:
            return linear.weight if lower is None else linear.weight.to(lower)

        # The scores' factor 1 / sqrt(K) goes into the queries' norm: once per window, not once per step.
        head = self.input_projection.weight.new_ones(2 * self.key_size + self.head_size)
        head[: self.key_size] = self.key_size**-0.5
        factor = head.repeat(self.num_heads)
        blocks = [
            _BlockWeights(
                matrix(block.qkv_projection),
                block.qkv_projection.bias,
                block.qkv_norm.weight * factor,
                block.qkv_norm.bias * factor,
                *(p for norm in (block.attention_norm, block.mlp_norm) for p in (norm.weight, norm.bias)),
            )
            for block in self.blocks
        ]
        mlp = [(matrix(linear), linear.bias) for linear in self.mlp]
        return _Weights(blocks, mlp, None if self.gate_style is None else matrix(self.memory_gate_projection))

    def step(
        self,
        input_t: Tensor,
        memory: Tensor,
        return_details: bool = False,
        candidate_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StepDetails]:
        """Advance the memory by one time step: the core as a cell, and the reference of the sequence path.

        Args:
            input_t: input of this step, (B, ...), flattened to input_size; with input_rows > 1, (B, M, ...).
            memory: memory before the step, (B, N, D).
            return_details: also return the gates and the attention weights of this step.
            candidate_mask: as in forward.

        Returns:
            The memory after the step, (B, N, D); its rows flattened are the output. With return_details, also
            StepDetails.

        Raises:
            ValueError: shapes that do not fit.
        """
        input_t = self._as_rows(input_t, leading=("B",))
        memory = self._checked_memory(memory, input_t.size(0))
        mask = self._checked_mask(candidate_mask, memory)
        rows = self.input_projection(input_t)
        if not return_details:
            return self._advance(rows, memory, mask)
        attention: list[Tensor] = []
        after = self._advance(rows, memory, mask, attention)
        gates = (None, None) if self.gate_style is None else self.gates(rows, memory)
        return after, StepDetails(*gates, attention)

    def _advance(
        self,
        rows: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        attention: list[Tensor] | None = None,
    ) -> Tensor:
        """One step from projected input rows (B, M, D) and memory (B, N, D) to the next memory."""
        attended = torch.cat([memory, rows], dim=1)                           # (B, R, D), the [M; x] of eq. 2
        for block in self.blocks:
            attended = self._attend(block, attended, attention)
        candidate = attended[:, : self.mem_slots]                              # (B, N, D), input rows dropped
        if self.gate_style is not None:
            candidate = torch.tanh(candidate)
        if mask is not None:
            candidate = candidate * mask
        if self.gate_style is None:
            return candidate
        input_gate, forget_gate = self.gates(rows, memory)
        return input_gate * candidate + forget_gate * memory                        # eq. 7

    def _attend(self, block: AttentionBlock, rows: Tensor, attention: list[Tensor] | None) -> Tensor:
        """One block: the rows (B, R, D) attend to each other (eq. 2), then each goes through the MLP."""
        qkv = block.qkv_norm(self._full(block.qkv_projection(rows)))                # (B, R, H * (2K + V))
        qkv = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)               # (B, H, R, 2K + V)
        query, key, value = qkv.split([self.key_size, self.key_size, self.head_size], dim=-1)
        scores = query @ key.transpose(-1, -2) * self.key_size**-0.5                # (B, H, R, R)
        weights = torch.softmax(self._full(scores), dim=-1)
        if attention is not None:
            attention.append(weights)
        update = (weights @ value).transpose(1, 2).flatten(2)                     # (B, R, D), head after head
        rows = block.attention_norm(rows + update)
        hidden = rows
        for layer, linear in enumerate(self.mlp):
            hidden = linear(hidden if layer == 0 else F.relu(hidden))
        return block.mlp_norm(rows + hidden)

    def gates(self, rows: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Input and forget gate, from the projected input rows (B, M, D) and the memory before (B, N, D).

        Returns:
            Both after the sigmoid: (B, N, D) for gate_style 'unit', (B, N, 1) for 'memory'.
        """
        from_input = self.input_gate_projection(rows.flatten(1)).unsqueeze(1)       # (B, 1, 2D) or (B, 1, 2)
        from_memory = self.memory_gate_projection(torch.tanh(memory))               # (B, N, 2D) or (B, N, 2)
        input_gate, forget_gate = self._full(from_input + from_memory).chunk(2, dim=-1)
        return torch.sigmoid(input_gate + self.input_bias), torch.sigmoid(forget_gate + self.forget_bias)

    def _full(self, value: Tensor) -> Tensor:
        """In the parameters' precision, where autocast has lowered it."""
        return value.to(torch.promote_types(value.dtype, self.input_projection.weight.dtype))

    def load_sonnet_variables(self, variables: Mapping[str, Any]) -> None:
        """Copy the variables of DeepMind's original module (Sonnet v1) into this core.

        Args:
            variables: the original's variable names, with or without the prefixes `var/` and
                `relational_memory/`, to arrays or tensors. Weight matrices are (fan_in, fan_out) there and
                are transposed here.

        Raises:
            ValueError: no mapping, names missing or not of this core, shapes that do not fit, or values that
                are no finite numbers; the message lists them all. Nothing has been copied then.
        """
        if not isinstance(variables, Mapping):
            raise ValueError(f"variables must map names to arrays, got a {type(variables).__name__}")
        given = {}
        for name, value in variables.items():
            short = name.removeprefix("var/").removeprefix("relational_memory/")
            if short in given:
                raise ValueError(f"variable {short!r} is given twice, with and without a prefix")
            try:
                given[short] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):       # text, objects, lists of unequal length
                raise ValueError(f"{short} must be an array of numbers, got {value!r:.60}") from None
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
            elif not value.to(parameter.dtype).isfinite().all():
                problems.append(f"{name} must hold finite numbers within the range of {parameter.dtype}")
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
        dtype = self.input_projection.weight.dtype
        if memory.dtype != dtype and not torch.is_autocast_enabled(memory.device.type):
            raise ValueError(f"memory must be {dtype}, as the core's weights are, got {memory.dtype}")
        return memory

    def _checked_mask(self, mask: Tensor | None, memory: Tensor) -> Tensor | None:
        if mask is not None and mask.shape != memory.shape:
            raise ValueError(
                f"candidate_mask must have the memory's shape {tuple(memory.shape)}, got {tuple(mask.shape)}"
            )
        return None if mask is None else mask.detach()


def _transforms_are_active() -> bool:
    """Whether torch.func or forward-mode derivatives are at work: for them, the plain step."""
    functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)()
    return functorch or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor, lower: torch.dtype | None) -> Tensor:
    """inputs @ weight.T + bias; only the product is of the lower type, if there is one."""
    if lower is None:
        return F.linear(inputs, weight, bias)
    return F.linear(inputs.to(lower), weight.to(lower)).to(inputs.dtype) + bias


def _require_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


# ----------------------------------------------------------------------------------------------------
# The fast sequence path: what RelationalMemory._advance computes step by step, arranged for speed.
#   * What depends on the inputs alone leaves the time loop for a few large products (_hoist).
#   * In the last block only the memory rows go on: the input rows give keys and values and nothing else.
#   * The backward pass is written out. It saves what it needs and no more, and makes the gradient of every
#     recurrent weight in products over many time steps instead of T small ones, which each read and write the
#     whole weight.


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
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Features of one head's query, key and value."""
        return self.key_size, self.key_size, self.head_size

    def rows_before(self, index: int) -> int:
        """Rows that block `index` projects; in the first one the input rows' part is hoisted."""
        return self.slots if index == 0 else self.slots + self.input_rows

    def rows_after(self, index: int) -> int:
        """Rows that go on from block `index`: all of them, but from the last block the memory alone."""
        return self.slots if index + 1 == self.blocks else self.slots + self.input_rows

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
    """All weights of the scan; gate is the memory's gate projection, whose bias is in gate_in."""

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


class _Tape:
    """What one part of the core (a block, or the gates) leaves at every time step for the backward pass.

    tracks: by name, one tensor per time step.
    stacks: by name, the tracks that are views of one tensor (T, rows, features): inputs of linear layers,
        laid out so that many time steps' part of the gradient of the layer's weight is one product.
    """

    def __init__(self, stacks: Mapping[str, Tensor] = MappingProxyType({})):
        self.stacks = dict(stacks)
        self.tracks: dict[str, Any] = {name: stack.unbind(0) for name, stack in stacks.items()}

    def slot(self, name: str, t: int) -> Tensor | None:
        """Where step t of a stacked track is to be written; None, for a fresh tensor, if not stacked."""
        return self.tracks[name][t] if name in self.stacks else None

    def keep(self, **tensors: Tensor) -> None:
        """Append one time step to the tracks that are not stacked."""
        for name, tensor in tensors.items():
            if name not in self.stacks:
                self.tracks.setdefault(name, []).append(tensor)

    def pack(self) -> tuple[list[Tensor], tuple[list[str], list[str], int]]:
        """All tensors in one list, and what unpack() needs beside it."""
        single = [name for name in self.tracks if name not in self.stacks]
        tensors = list(self.stacks.values())
        for name in single:
            tensors.extend(self.tracks[name])
        return tensors, (list(self.stacks), single, len(self.tracks[single[0]]) if single else 0)

    def at(self, t: int) -> dict[str, Tensor]:
        """All tracks at step t."""
        return {name: track[t] for name, track in self.tracks.items()}

    @classmethod
    def unpack(cls, tensors: Sequence[Tensor], layout: tuple[list[str], list[str], int]) -> "_Tape":
        """Undo pack()."""
        stacked, single, steps = layout
        tape = cls(dict(zip(stacked, tensors, strict=False)))
        for index, name in enumerate(single):
            start = len(stacked) + index * steps
            tape.tracks[name] = tensors[start : start + steps]
        return tape


class _NoTape(_Tape):
    """Keeps nothing: for runs without a backward pass."""

    def keep(self, **tensors: Tensor) -> None:
        pass


_REFUSAL = (
    "the fast path of RelationalMemory has no second derivative and no batched one; set core.fast = False "
    "to use the plain step, which has derivatives of any order and kind"
)


class _Scan(torch.autograd.Function):
    """All time steps of the core from hoisted input parts, forward and backward pass by hand.

    Inputs:  memory (B, N, D); mask (B, N, D), the candidate's factors, or None; qkv_in (T, B, M, F), normed;
             gate_in (T, B, G) with all biases, None without gates; rows (T, B, M, D) if there are blocks
             before the last, else None; _Weights.flatten().
    Outputs: the memories after every step (T, B, N, D), and the last one again (B, N, D).
    """

    @staticmethod
    def forward(ctx, shape, memory, mask, qkv_in, gate_in, rows, *flat):
        weights = _Weights.group(shape, flat)
        steps, batch = qkv_in.shape[:2]
        deferred = batch * (shape.slots + shape.input_rows) <= DEFERRED_ROWS
        tapes = _make_tapes(shape, memory, steps if deferred else 0)
        memories = _scan(shape, weights, memory, mask, qkv_in, gate_in, rows, tapes)
        # Everything through save_for_backward, which lets go of it as soon as the backward pass is over.
        packed = [tape.pack() for tape in tapes]
        ctx.shape, ctx.deferred = shape, deferred
        ctx.layouts = [(len(tensors), layout) for tensors, layout in packed]
        own = (x for tensors, _ in packed for x in tensors)
        ctx.save_for_backward(memory, mask, memories, *flat, *own)
        ctx.set_materialize_grads(False)
        return memories, memories[-1].clone()

    @staticmethod
    def backward(ctx, grad_memories, grad_last):
        if torch.is_grad_enabled():
            raise RuntimeError(_REFUSAL)
        # Whoever used the results in another layout may hand back gradients in that layout.
        grad_memories, grad_last = (g if g is None else g.contiguous() for g in (grad_memories, grad_last))
        memory, mask, memories, *rest = ctx.saved_tensors
        end, tapes = len(rest), []
        for count, layout in reversed(ctx.layouts):
            tapes.insert(0, _Tape.unpack(rest[end - count : end], layout))
            end -= count
        weights = _Weights.group(ctx.shape, rest[:end])
        with torch.autocast(memory.device.type, enabled=False):
            try:
                grad_memory, *gradients = _scan_backward(
                    ctx.shape,
                    weights,
                    tapes,
                    ctx.deferred,
                    memory,
                    mask,
                    memories,
                    grad_memories,
                    grad_last,
                )
            except RuntimeError as error:
                # "Batching rule not implemented for ...": torch's vmap over the gradients.
                if "atching rule" in str(error):
                    raise RuntimeError(_REFUSAL) from error
                raise
        return None, grad_memory, None, *gradients


def _make_tapes(shape, memory, steps):
    """One tape per block, and one for the gates. Linear layers' inputs are stacked where steps > 0."""
    batch, slots, width = memory.shape

    def stacks(rows, names):
        return {name: memory.new_empty(steps, batch * rows, width) for name in names} if steps else {}

    tapes = []
    for index in range(shape.blocks):
        before, after = shape.rows_before(index), shape.rows_after(index)
        # The first block's input is the memory, which is kept anyway.
        own = {} if index == 0 else stacks(before, ["inputs"])
        tapes.append(_Tape(own | stacks(after, [f"mlp{layer}" for layer in range(shape.mlp_layers)])))
    return [*tapes, _Tape(stacks(slots, ["squashed"] if shape.gate_style else []))]


def _scan(shape, weights, memory, mask, qkv_in, gate_in, rows, tapes):
    """The time loop; returns the memories (T, B, N, D). The tapes take what the backward pass needs."""
    memories = memory.new_empty(qkv_in.size(0), *memory.shape)
    given = _given(shape, qkv_in)
    rows = None if rows is None else rows.unbind(0)
    gate_in = None if gate_in is None else gate_in.unbind(0)
    for t, after in enumerate(memories.unbind(0)):
        z = memory
        for index in range(shape.blocks):
            first = index == 0
            z = _block(
                shape, weights, index, t, z, given[t] if first else None, rows[t] if rows and first else None,
                tapes[index],
            )
        if weights.gate is None and mask is None:
            after.copy_(z)
        elif weights.gate is None:
            torch.mul(z, mask, out=after)
        else:
            candidate = z.tanh_()
            slot = tapes[-1].slot("squashed", t)
            squashed = torch.tanh(memory.view(-1, memory.size(-1)), out=slot)
            gates = _gates(weights.gate, gate_in[t], squashed)
            input_gate, forget_gate = gates.chunk(2, dim=-1)
            kept = candidate if mask is None else candidate * mask
            torch.mul(forget_gate, memory, out=after).addcmul_(input_gate, kept)
            tapes[-1].keep(candidate=candidate, squashed=squashed, gates=gates)
        memory = after
    return memories


def _given(shape, qkv_in):
    """Per time step, what the attention takes of the input rows' queries, keys and values, (T, B, M, F).

    For the pair, keys (B, H, K) and values (B, H, V); else queries, keys and values, (B, H, M, 2K + V).
    """
    heads = qkv_in.view(*qkv_in.shape[:3], shape.heads, -1).transpose(2, 3)
    if not shape.pair:
        return heads.unbind(0)
    _, keys, values = heads.squeeze(3).split(shape.qkv_sizes, dim=-1)
    return list(zip(keys.unbind(0), values.unbind(0), strict=True))


def _gates(weight, gate_in, squashed):
    """Both gates after the sigmoid, (B, N, G), from the hoisted part (B, G) and tanh(memory) (B * N, D)."""
    if squashed.size(0) == gate_in.size(0):
        return _linear(squashed, weight, gate_in).sigmoid_().unsqueeze(1)
    from_memory = _product(squashed, weight.t()).view(gate_in.size(0), -1, gate_in.size(1))
    return from_memory.add_(gate_in.unsqueeze(1)).sigmoid_()


def _block(shape, weights, index, t, z, given, rows, tape):
    """One attention block at step t, (B, S, D) -> (B, Q, D).

    z holds the rows to be projected here. In the first block that is the memory: of the input rows, what the
    attention needs is `given` (see _given), and the rows themselves, if they go on, are `rows` (B, M, D). In
    later blocks it is all rows.
    """
    block = weights.blocks[index]
    batch, _, width = z.shape
    queries = shape.rows_after(index)
    if index > 0:
        slot = tape.slot("inputs", t)
        z = z if slot is None else slot.copy_(z.view(-1, width)).view_as(z)
        tape.keep(inputs=z.view(-1, width))
    projected = _linear(z.view(-1, width), block.qkv, block.qkv_bias)
    normed, *qkv_stats = _norm(projected, block.qkv_gain, block.qkv_shift)
    attend = _attend_pair if shape.pair else _attend_rows
    update = attend(shape, normed.view(batch, -1, shape.heads, sum(shape.qkv_sizes)), given, queries, tape)
    carried = z if rows is None else torch.cat([z, rows], dim=1)
    residual = z.new_empty(update.shape)
    torch.add(carried[:, :queries].view_as(update), update, out=residual)
    residual = residual.view(-1, width)
    attended, *attention_stats = _norm(residual, block.attention_gain, block.attention_shift)
    slot = tape.slot("mlp0", t)
    hidden = attended if slot is None else slot.copy_(attended)
    for layer, (weight, bias) in enumerate(weights.mlp):
        if layer > 0:
            hidden = hidden.relu_()
        tape.keep(**{f"mlp{layer}": hidden})
        hidden = _linear(hidden, weight, bias, out=tape.slot(f"mlp{layer + 1}", t))
    summed = hidden.add_(attended)
    z, *mlp_stats = _norm(summed, block.mlp_gain, block.mlp_shift)
    tape.keep(
        projected=projected, qkv_mean=qkv_stats[0], qkv_scale=qkv_stats[1],
        residual=residual, attention_mean=attention_stats[0], attention_scale=attention_stats[1],
        summed=summed, mlp_mean=mlp_stats[0], mlp_scale=mlp_stats[1],
    )
    return z.view(batch, queries, width)


def _attend_pair(shape, own, given, queries, tape):
    """One memory row attends over itself and one input row: softmax over two scores is a sigmoid.

    own (B, 1, H, 2K + V) has the memory row's queries, keys and values, and is overwritten; given has the
    input row's keys and values. Returns the update (B, 1, H, V).
    """
    query, key, value = own.squeeze(1).split(shape.qkv_sizes, dim=-1)
    # In the place of what they are made from: that is not needed again, and `query` keeps it alive.
    key_difference = key.sub_(given[0])
    value_difference = value.sub_(given[1])
    own_weight = (query * key_difference).sum(-1, keepdim=True).sigmoid_()              # (B, H, 1)
    tape.keep(query=query, own_weight=own_weight)
    tape.keep(key_difference=key_difference, value_difference=value_difference)
    return torch.addcmul(given[1], own_weight, value_difference).unsqueeze(1)


def _attend_pair_backward(shape, kept, grad_update, grad_given):
    """Gradient by the memory row's queries, keys and values, (B, F), from grad_update (B, 1, D).

    The input row's are written to grad_given, as _given lays them out.
    """
    key_difference, value_difference = kept["key_difference"], kept["value_difference"]
    grad_update = grad_update.view_as(value_difference)
    grad_score = (grad_update * value_difference).sum(-1, keepdim=True)
    grad_score = _sigmoid_backward(grad_score, kept["own_weight"])
    grad_own = grad_update.new_empty(*grad_update.shape[:2], sum(shape.qkv_sizes))
    grad_query, grad_key, grad_value = grad_own.split(shape.qkv_sizes, dim=-1)
    torch.mul(grad_score, key_difference, out=grad_query)
    torch.mul(grad_score, kept["query"], out=grad_key)
    torch.mul(grad_update, kept["own_weight"], out=grad_value)
    torch.neg(grad_key, out=grad_given[0])
    torch.sub(grad_update, grad_value, out=grad_given[1])
    return grad_own.view(grad_own.size(0), -1)


def _attend_rows(shape, own, given, queries, tape):
    """The first Q rows attend over all R rows; returns the update (B, Q, H, V), as a view.

    own (B, S, H, 2K + V) and given (B, H, M, 2K + V), or None, are the rows' queries, keys and values. Each
    of the three is laid out by itself, and the weights are kept as (B * H, keys R, queries Q): on a CPU the
    batched products and the softmax are much faster so than on views with few and short last rows. On a GPU
    this has not been compared.
    """
    rows = own.size(1) + (0 if given is None else given.size(2))
    own_parts = own.transpose(1, 2).split(shape.qkv_sizes, dim=-1)
    given_parts = (None,) * 3 if given is None else given.split(shape.qkv_sizes, dim=-1)
    counts = queries, rows, rows
    query, key, value = (_gather(*parts) for parts in zip(own_parts, given_parts, counts, strict=True))
    weights = torch.bmm(key, query.transpose(1, 2)).softmax(dim=1)
    tape.keep(query=query, key=key, value=value, weights=weights)
    update = torch.bmm(weights.transpose(1, 2), value)
    return update.view(-1, shape.heads, queries, shape.head_size).transpose(1, 2)


def _gather(own, given, count):
    """The first `count` rows of own (B, H, S, ...) and then given (B, H, M, ...), as (B * H, count, ...)."""
    rows = own.new_empty(*own.shape[:2], count, own.size(-1))
    first = min(count, own.size(2))
    rows[:, :, :first].copy_(own[:, :, :first])
    if count > first:
        rows[:, :, first:].copy_(given[:, :, : count - first])
    return rows.flatten(0, 1)


def _attend_rows_backward(shape, kept, grad_update, grad_given):
    """Gradient by the S projected rows' queries, keys and values, (B * S, F), from grad_update (B, Q, D).

    The given rows' are written to grad_given (B, H, M, 2K + V), zero so far, if it is not None.
    """
    query, key, value, weights = kept["query"], kept["key"], kept["value"], kept["weights"]
    batch, queries = grad_update.shape[:2]
    grad_update = grad_update.view(batch, queries, shape.heads, -1).transpose(1, 2).flatten(0, 1)
    grad_weights = torch.bmm(value, grad_update.transpose(1, 2))
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, 1, weights.dtype)
    grads = (
        torch.bmm(grad_scores.transpose(1, 2), key),
        torch.bmm(grad_scores, query),
        torch.bmm(weights, grad_update),
    )
    given_parts = (None,) * 3 if grad_given is None else grad_given.split(shape.qkv_sizes, dim=-1)
    rows = key.size(1) - (0 if grad_given is None else grad_given.size(2))
    grad_own = key.new_empty(batch, rows, shape.heads, sum(shape.qkv_sizes))
    own_parts = grad_own.transpose(1, 2).split(shape.qkv_sizes, dim=-1)
    for grad, to_own, to_given in zip(grads, own_parts, given_parts, strict=True):
        _scatter(grad.view(batch, shape.heads, -1, grad.size(-1)), to_own, to_given)
    return grad_own.view(batch * rows, -1)


def _scatter(rows, own, given):
    """Undoes _gather for gradients (B, H, count, ...); rows of own that it did not take get 0."""
    first = min(rows.size(2), own.size(2))
    own[:, :, :first].copy_(rows[:, :, :first])
    if first < own.size(2):
        own[:, :, first:].zero_()
    elif given is not None:
        given[:, :, : rows.size(2) - first].copy_(rows[:, :, first:])


class _LinearGradient:
    """Gradient of one linear layer's weight and bias, summed over the time steps.

    With a stack (S, rows, out) for the errors, those of S steps are kept and multiplied with these steps'
    inputs in one product: with few rows per step, a product at every step would spend its time on reading and
    writing the whole gradient. Without a stack, each step's product is added at once: with many rows that
    costs no more, and it needs no memory for the errors.
    """

    def __init__(self, weight: Tensor, stack: Tensor | None):
        self.weight, self.stack = weight, stack
        self.slots = None if stack is None else stack.unbind(0)
        self.weight_grad = self.bias_grad = None

    def slot(self, t: int) -> Tensor | None:
        """Where the errors of step t may be written at once; None if they are not kept."""
        return None if self.slots is None else self.slots[t % len(self.slots)]

    def errors(self, start: int, stop: int) -> Tensor:
        """The kept errors of steps start to stop, (their rows, out)."""
        first = start % len(self.slots)
        return self.stack[first : first + stop - start].flatten(0, 1)

    def add(self, t: int, errors: Tensor, inputs: Tensor) -> None:
        """errors (rows, out), the gradient by the layer's output at step t, and inputs (rows, in)."""
        slot = self.slot(t)
        if slot is None:
            self.accumulate(errors, inputs)
        elif errors is not slot:
            slot.copy_(errors)

    def accumulate(self, errors: Tensor, inputs: Tensor) -> None:
        """Add what these rows give."""
        transposed, factor = errors.t().to(self.weight.dtype), inputs.to(self.weight.dtype)
        if self.weight_grad is None:
            self.weight_grad, self.bias_grad = transposed @ factor, errors.sum(0)
        else:
            self.weight_grad.addmm_(transposed, factor)
            self.bias_grad += errors.sum(0)


class _NormGradient:
    """Gradient of one layer norm's gain and shift, summed over the time steps."""

    def __init__(self, gain: Tensor, shift: Tensor, name: str):
        self.gain, self.shift = gain, shift
        self.mean, self.scale = f"{name}_mean", f"{name}_scale"
        self.gain_grads: list[Tensor] = []
        self.shift_grads: list[Tensor] = []

    def backward(self, grad: Tensor, inputs: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Gradient by the norm's input; what this step gives to gain and shift is noted."""
        stats = kept[self.mean], kept[self.scale]
        grad_inputs, grad_gain, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad, inputs, (inputs.size(-1),), *stats, self.gain, self.shift, (True, True, True)
        )
        self.gain_grads.append(grad_gain)
        self.shift_grads.append(grad_shift)
        return grad_inputs

    def result(self) -> tuple[Tensor, Tensor]:
        """The sums over the time steps."""
        return torch.stack(self.gain_grads).sum(0), torch.stack(self.shift_grads).sum(0)


def _scan_backward(shape, weights, tapes, deferred, memory, mask, memories, grad_memories, grad_last):
    """The time loop backwards; returns gradients by memory, qkv_in, gate_in, rows and the flat weights."""
    steps, batch, slots, width = memories.shape
    span = steps
    if memory.device.type == "cpu":
        span = max(1, min(steps, DEFERRED_SPAN // (batch * slots)))

    def linear_gradient(weight, rows):
        stack = memory.new_empty(span, batch * rows, weight.size(0)) if deferred else None
        return _LinearGradient(weight, stack)

    blocks = range(shape.blocks)
    qkv_grads = [linear_gradient(weights.blocks[index].qkv, shape.rows_before(index)) for index in blocks]
    mlp_grads = [
        [linear_gradient(weight, shape.rows_after(index)) for weight, _ in weights.mlp] for index in blocks
    ]
    norm_grads = [
        (
            _NormGradient(block.qkv_gain, block.qkv_shift, "qkv"),
            _NormGradient(block.attention_gain, block.attention_shift, "attention"),
            _NormGradient(block.mlp_gain, block.mlp_shift, "mlp"),
        )
        for block in weights.blocks
    ]
    gate_grad = grad_gate_in = grad_rows = None
    if weights.gate is not None:
        grad_gate_in = memory.new_empty(steps, batch, weights.gate.size(0))
        # With one slot, the gradients by the gates' hoisted part and by the memory's part are one tensor.
        if slots == 1:
            gate_grad = _LinearGradient(weights.gate, grad_gate_in)
        else:
            gate_grad = linear_gradient(weights.gate, slots)
    grad_qkv_in = memory.new_zeros(steps, batch, shape.input_rows, weights.blocks[0].qkv.size(0))
    grad_given = _given(shape, grad_qkv_in)
    if shape.blocks > 1:
        grad_rows = memory.new_empty(steps, batch, shape.input_rows, width)

    after = memories.unbind(0)
    grad_after = None if grad_memories is None else grad_memories.unbind(0)
    carry = torch.zeros_like(memory) if grad_last is None else grad_last
    for t in reversed(range(steps)):
        before = after[t - 1] if t > 0 else memory
        grad = carry if grad_after is None else carry + grad_after[t]
        grad_candidate = grad if mask is None else grad * mask
        if weights.gate is None:
            grad_z, carry = grad_candidate, None
        else:
            kept = tapes[-1].at(t)
            input_gate, forget_gate = kept["gates"].chunk(2, dim=-1)
            errors = gate_grad.slot(t)
            if errors is None:
                errors = memory.new_empty(batch * slots, weights.gate.size(0))
            grad_gates = errors.view(batch, slots, -1)
            to_input, to_forget = grad_gates.chunk(2, dim=-1)
            if shape.gate_style == "unit":
                torch.mul(grad_candidate, kept["candidate"], out=to_input)
                torch.mul(grad, before, out=to_forget)
            else:
                torch.sum(grad_candidate * kept["candidate"], dim=-1, keepdim=True, out=to_input)
                torch.sum(grad * before, dim=-1, keepdim=True, out=to_forget)
            _sigmoid_backward(grad_gates, kept["gates"], out=grad_gates)
            if slots > 1:
                torch.sum(grad_gates, dim=1, out=grad_gate_in[t])
            gate_grad.add(t, errors, kept["squashed"])
            grad_squashed = _tanh_backward(_product(errors, weights.gate), kept["squashed"])
            carry = grad_squashed.view_as(memory).addcmul_(grad, forget_gate)
            grad_z = _tanh_backward(grad_candidate * input_gate, kept["candidate"])

        for index in reversed(blocks):
            block, kept, norms = weights.blocks[index], tapes[index].at(t), norm_grads[index]
            grad_summed = norms[2].backward(grad_z.view(-1, width), kept["summed"], kept)
            errors = grad_summed
            for layer in reversed(range(shape.mlp_layers)):
                inputs = kept[f"mlp{layer}"]
                mlp_grads[index][layer].add(t, errors, inputs)
                errors = _product(errors, weights.mlp[layer][0])
                if layer > 0:
                    errors = _relu_backward(errors, inputs, out=mlp_grads[index][layer - 1].slot(t))
            grad_residual = norms[1].backward(errors.add_(grad_summed), kept["residual"], kept)
            grad_residual = grad_residual.view(batch, -1, width)
            attend_backward = _attend_pair_backward if shape.pair else _attend_rows_backward
            grad_normed = attend_backward(shape, kept, grad_residual, grad_given[t] if index == 0 else None)
            errors = norms[0].backward(grad_normed, kept["projected"], kept)
            qkv_grads[index].add(t, errors, kept["inputs"] if index > 0 else before.view(-1, width))
            grad_z = _product(errors, block.qkv).view(batch, -1, width)
            if index > 0:
                grad_z[:, : grad_residual.size(1)] += grad_residual
            elif grad_rows is not None:
                grad_rows[t] = grad_residual[:, slots:]
        grad_z = grad_z.add_(grad_residual[:, :slots])
        carry = grad_z if carry is None else carry.add_(grad_z)
        if deferred and t % span == 0:
            stop = min(t + span, steps)
            _multiply_stacks(shape, tapes, memory, memories, qkv_grads, mlp_grads, gate_grad, t, stop)

    if not deferred and gate_grad is not None and slots == 1:
        gate_grad.accumulate(grad_gate_in.flatten(0, 1), torch.cat(tapes[-1].tracks["squashed"]))
    gathered = [
        _BlockWeights(linear.weight_grad, linear.bias_grad, *(g for norm in norms for g in norm.result()))
        for linear, norms in zip(qkv_grads, norm_grads, strict=True)
    ]
    mlp = []
    for layer in range(shape.mlp_layers):                       # shared by the blocks: their gradients add up
        parts = [grads[layer] for grads in mlp_grads]
        mlp.append((sum(part.weight_grad for part in parts), sum(part.bias_grad for part in parts)))
    gate = None if gate_grad is None else gate_grad.weight_grad
    return carry, grad_qkv_in, grad_gate_in, grad_rows, *_Weights(gathered, mlp, gate).flatten()


def _multiply_stacks(shape, tapes, memory, memories, qkv_grads, mlp_grads, gate_grad, start, stop):
    """The products over time steps start to stop: kept errors times stacked inputs, for all weights."""

    def multiply(gradient, inputs, first):
        gradient.accumulate(gradient.errors(first, first + len(inputs)), inputs.flatten(0, -2))

    # The first block's input is the memory before each step: the initial one, then all but the last.
    if start == 0:
        multiply(qkv_grads[0], memory.unsqueeze(0), 0)
    if (first := max(1, start)) < stop:
        multiply(qkv_grads[0], memories[first - 1 : stop - 1], first)
    for index in range(shape.blocks):
        if index > 0:
            multiply(qkv_grads[index], tapes[index].stacks["inputs"][start:stop], start)
        for layer in range(shape.mlp_layers):
            multiply(mlp_grads[index][layer], tapes[index].stacks[f"mlp{layer}"][start:stop], start)
    if gate_grad is not None:
        multiply(gate_grad, tapes[-1].stacks["squashed"][start:stop], start)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """inputs @ weight.T + bias; the product is of the weight's precision, the result of the inputs' type."""
    if inputs.dtype == weight.dtype:
        return torch.addmm(bias, inputs, weight.t(), out=out)
    return torch.add(inputs.to(weight.dtype) @ weight.t(), bias, out=out)


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs @ weight, in the precision of the weight; the result is of the inputs' type."""
    if inputs.dtype == weight.dtype:
        return torch.mm(inputs, weight)
    return (inputs.to(weight.dtype) @ weight).to(inputs.dtype)


def _norm(inputs: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last axis, with each row's mean and inverse deviation."""
    return torch.native_layer_norm(inputs, (inputs.size(-1),), gain, shift, NORM_EPSILON)


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

"""Relational Memory Core (Santoro et al. 2018, arXiv:1806.01822, section 3), with the maths of DeepMind's original module.

This file needs torch alone and can be copied into another project as it is.

Shapes named in the comments of this file:
    B batch   T time steps   N mem_slots   M input_rows   R = N + M rows attended over
    H num_heads   K key_size   V head_size   D mem_size = H * V, the width of one memory row

Where the original module departs from the paper, this file follows the module:
    * The new memory is the next hidden state and the output at once: the output gate of eqs. 6 and 8 does not exist,
      and eq. 7's update is applied to the memory itself.
    * The candidate passes through tanh before the input gate; in eq. 7 it is psi(m), the attention MLP's output.
    * Attention runs from all R rows, so that several blocks can refine the input rows too; eq. 2 has queries from the
      memory rows alone. With one block the two are equal, as the input rows are dropped afterwards.
    * Layer norm is applied to the projected queries, keys and values as well: one norm over all of a row's features.
    * The gates read tanh(memory) where eqs. 4 and 5 read the hidden state, and their two biases (forget_bias, input_bias) are fixed numbers beside learned ones.
    * Between blocks the attention MLP is shared; the query/key/value projections and all norms belong to one block.
The input projection, the MLP (no ReLU after its last layer) and every norm work on single rows, so that no parameter
depends on mem_slots, and permuting the slots of the memory permutes the slots of the result.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_STYLES = ("unit", "memory", None)


class StepDetails(NamedTuple):
    """What happened inside one step, for looking at.

    input_gate, forget_gate: after the sigmoid, (B, N, D) for gate_style 'unit', (B, N, 1) for 'memory', None without gates.
    attention: per block the attention weights from every row (memory rows first, then input rows), (B, H, R, R).
    """

    input_gate: Tensor | None
    forget_gate: Tensor | None
    attention: list[Tensor]


class AttentionBlock(nn.Module):
    """The parts of an attention block that are its own: everything but the MLP, which all blocks share."""

    def __init__(self, mem_size: int, qkv_size: int):
        super().__init__()
        self.qkv_projection = nn.Linear(mem_size, qkv_size)
        self.qkv_norm = nn.LayerNorm(qkv_size)
        self.attention_norm = nn.LayerNorm(mem_size)
        self.mlp_norm = nn.LayerNorm(mem_size)


class RelationalMemory(nn.Module):
    """A recurrent core whose state is a matrix of memory rows that interact by multi-head dot product attention.

    Args:
        mem_slots: rows N of the memory matrix.
        head_size: size V of one head's values; a memory row has mem_size D = num_heads * head_size features.
        input_size: features of the input at one time step, after flattening (of one row, when input_rows > 1).
        num_heads: attention heads H.
        num_blocks: attention blocks applied one after the other within a time step.
        forget_bias: fixed number added to the forget gate before its sigmoid.
        input_bias: fixed number added to the input gate before its sigmoid.
        gate_style: 'unit' (a gate per feature), 'memory' (a gate per memory row) or None (no gates, the candidate is the memory).
        attention_mlp_layers: layers of the row-wise MLP that follows the attention.
        key_size: size K of one head's queries and keys; None or 0 means head_size.
        return_all_outputs: whether forward returns the outputs of all time steps or of the last one only.
        input_rows: rows M that the input of one time step brings; above 1 the input is (B, T, M, ...) and each row is
            attended over by itself (the original's `treat_input_as_matrix`).

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
        """Initialise as the original: weights from a normal of deviation 1/sqrt(fan_in) cut at two deviations, biases 0."""
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
            f"mem_slots={self.mem_slots}, head_size={self.head_size}, num_heads={self.num_heads}, key_size={self.key_size}, "
            f"gate_style={self.gate_style!r}, forget_bias={self.forget_bias}, input_bias={self.input_bias}"
        )

    def initial_state(self, batch_size: int) -> Tensor:
        """The memory before the first step: the identity, cut or padded with zeros to D columns; the same for every sequence.

        Returns:
            (batch_size, N, D), on the parameters' device and of their dtype. The rows differ from the start, so that
            the slots can learn different roles.
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
            inputs: (B, T, ...), flattened after T to input_size; with input_rows > 1, (B, T, M, ...), flattened after M.
            memory: the memory before the first step, (B, N, D); None for the initial state.
            return_gates: also return the last step's gates.

        Returns:
            outputs: (B, T, N * D) with return_all_outputs, else the last step's (B, N * D).
            memory: the memory after the last step, (B, N, D). Nothing is detached: gradients reach the given memory.
            (input_gate, forget_gate) of the last step after the sigmoid, if asked for: (B, N, D), or (B, N, 1) for 'memory'.

        Raises:
            ValueError: shapes that do not fit, or gates asked of a core without gates.
        """
        if return_gates and self.gate_style is None:
            raise ValueError("return_gates needs a core with gates, but gate_style is None")
        inputs = self._as_rows(inputs, leading=("B", "T"))
        batch_size, steps = inputs.shape[:2]
        if steps == 0:
            raise ValueError("inputs must hold at least one time step, got T = 0")
        memory = self._initial_state(batch_size, inputs) if memory is None else self._checked_memory(memory, batch_size)
        outputs = []
        for t in range(steps):
            before = memory
            memory = self._advance(self.input_projection(inputs[:, t]), memory)
            if self.return_all_outputs:
                outputs.append(memory.flatten(1))
        output = torch.stack(outputs, dim=1) if self.return_all_outputs else memory.flatten(1)
        if return_gates:
            return output, memory, self.gates(self.input_projection(inputs[:, -1]), before)
        return output, memory

    def step(
        self, input_t: Tensor, memory: Tensor, return_details: bool = False
    ) -> Tensor | tuple[Tensor, StepDetails]:
        """Advance the memory by one time step: the core as a cell, and the readable reference of the whole sequence path.

        Args:
            input_t: input of this step, (B, ...), flattened to input_size; with input_rows > 1, (B, M, ...).
            memory: memory before the step, (B, N, D).
            return_details: also return the gates and the attention weights of this step.

        Returns:
            The memory after the step, (B, N, D); its rows flattened are the output. With return_details, also StepDetails.

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
        attended = torch.cat([memory, rows], dim=1)                                 # (B, R, D), the [M; x] of eq. 2
        for block in self.blocks:
            attended = self._attend(block, attended, attention)
        candidate = attended[:, : self.mem_slots]                                   # (B, N, D), input rows dropped
        if self.gate_style is None:
            return candidate
        input_gate, forget_gate = self.gates(rows, memory)
        return input_gate * torch.tanh(candidate) + forget_gate * memory            # eq. 7

    def _attend(self, block: AttentionBlock, rows: Tensor, attention: list[Tensor] | None) -> Tensor:
        """One attention block: multi-head attention among the rows (eq. 2, the heads side by side), then the row-wise MLP; (B, R, D) -> (B, R, D)."""
        qkv = block.qkv_norm(block.qkv_projection(rows))                            # (B, R, H * (2K + V))
        qkv = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)               # (B, H, R, 2K + V)
        query, key, value = qkv.split([self.key_size, self.key_size, self.head_size], dim=-1)
        scores = query @ key.transpose(-1, -2) * self.key_size**-0.5                # (B, H, R, R)
        weights = torch.softmax(scores, dim=-1)
        if attention is not None:
            attention.append(weights)
        update = (weights @ value).transpose(1, 2).flatten(2)                       # (B, R, D), head after head
        rows = block.attention_norm(rows + update)
        hidden = rows
        for layer, linear in enumerate(self.mlp):
            hidden = linear(hidden if layer == 0 else F.relu(hidden))
        return block.mlp_norm(rows + hidden)

    def gates(self, rows: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Input and forget gate, from the projected input rows (B, M, D) and the memory before the step (B, N, D).

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
            variables: the original's variable names, with or without the prefixes `var/` and `relational_memory/`, to
                arrays or tensors. Weight matrices are (fan_in, fan_out) there and are transposed here.

        Raises:
            ValueError: names missing or not of this core, or shapes that do not fit; the message lists them all. Nothing
                has been copied then.
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
        norms = [norm for block in self.blocks for norm in (block.qkv_norm, block.attention_norm, block.mlp_norm)]
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
                f"inputs must have shape ({', '.join(leading)}{rows}, ...) with {self.input_size} features (input_size) "
                f"after flattening the rest, got {tuple(inputs.shape)}"
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


def _require_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")

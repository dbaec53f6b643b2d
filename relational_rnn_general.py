"""Relational Memory Core (Santoro et al. 2018, arXiv:1806.01822, section 3), with the math of DeepMind's
original module.

This file imports only torch and can be copied into another project as it is. relational_rnn_fast.py has a
faster class with the same parameters and results, whose hand-written pass repeats the math of this file.
After an edit here that class finds that the results differ, warns once and runs the loop of this file, in
training too (docs/change_the_math.md).

Shapes named in the comments of this file:
    B batch   T time steps   N mem_slots   M input_rows   R = N + M rows that attend to each other
    H num_heads   K key_size   V head_size   D mem_size = H * V, the width of one memory row

Departures from the paper, all taken from the original module:
    * The new memory is also the hidden state and the output. The output gate of eqs. 6 and 8 does not exist,
      and the update of eq. 7 is applied to the memory.
    * The candidate passes through tanh before the input gate. In eq. 7 it is psi(m), the output of the MLP.
    * Queries are computed for all R rows, so several blocks can refine the input rows too. Eq. 2 has queries
      of the memory rows only. With one block the results are equal, as the input rows are dropped afterward.
    * A layer norm is applied to the projected queries, keys and values: one norm over all features of a row.
    * The gates read tanh(memory) where eqs. 4 and 5 read the hidden state. Their two biases (forget_bias and
      input_bias) are fixed numbers that are added to learned ones.
    * The blocks share the attention MLP. Each block has its own query/key/value projection and norms.
The input projection, the MLP (no ReLU after its last layer) and the norms all work on single rows. Therefore
no parameter depends on mem_slots, and permuting the slots of the memory permutes the slots of the result.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATE_STYLES = ("unit", "memory", None)
NORM_EPSILON = 1e-5


class StepDetails(NamedTuple):
    """Gates and attention weights of one step, or of a sequence (with T after B in every shape).

    input_gate, forget_gate: after the sigmoid, (B, N, D) for gate_style 'unit', (B, N, 1) for 'memory', None
        without gates.
    attention: for each block the attention weights of every row (memory rows first, then input rows) over all
        rows, (B, H, R, R).
    """

    input_gate: Tensor | None
    forget_gate: Tensor | None
    attention: list[Tensor]


class RowMLP(nn.ModuleList):
    """Linear layers with a ReLU between them, applied to each row."""

    def forward(self, rows: Tensor) -> Tensor:
        # Repeated in relational_rnn_fast.py.
        for index, linear in enumerate(self):
            rows = linear(F.relu(rows) if index > 0 else rows)
        return rows


class AttentionBlock(nn.Module):
    """Multi-head attention between the rows and the residual connections and norms around it."""

    def __init__(self, num_heads: int, key_size: int, head_size: int):
        super().__init__()
        self.num_heads, self.key_size, self.head_size = num_heads, key_size, head_size
        mem_size, qkv_size = num_heads * head_size, num_heads * (2 * key_size + head_size)
        self.qkv_projection = nn.Linear(mem_size, qkv_size)
        self.qkv_norm = nn.LayerNorm(qkv_size, eps=NORM_EPSILON)
        self.attention_norm = nn.LayerNorm(mem_size, eps=NORM_EPSILON)
        self.mlp_norm = nn.LayerNorm(mem_size, eps=NORM_EPSILON)

    def forward(self, rows: Tensor, mlp: RowMLP) -> tuple[Tensor, Tensor]:
        """Let the rows (B, R, D) attend to each other (eq. 2), then pass each through the shared MLP.

        Returns:
            The new rows (B, R, D) and the attention weights (B, H, R, R).
        """
        # Repeated in relational_rnn_fast.py.
        dtype = rows.dtype  # results whose precision autocast has lowered are converted back to it
        qkv = self.qkv_norm(self.qkv_projection(rows).to(dtype))  # (B, R, H * (2K + V))
        qkv = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, R, 2K + V)
        query, key, value = qkv.split([self.key_size, self.key_size, self.head_size], dim=-1)
        scores = query @ key.transpose(-1, -2) * self.key_size**-0.5  # (B, H, R, R)
        weights = torch.softmax(scores.to(dtype), dim=-1)
        update = (weights @ value).transpose(1, 2).flatten(2)  # (B, R, D), head after head
        rows = self.attention_norm(rows + update)
        return self.mlp_norm(rows + mlp(rows)), weights


class RelationalMemory(nn.Module):
    """A recurrent core whose state is a matrix of memory rows that interact by attention.

    Args:
        mem_slots: rows N of the memory matrix.
        head_size: size V of one head's values. A memory row has mem_size D = num_heads * head_size features.
        input_size: features of the input at one time step after flattening (of one row if input_rows > 1).
        num_heads: attention heads H.
        num_blocks: attention blocks applied one after the other within a time step.
        forget_bias: fixed number added to the forget gate before its sigmoid.
        input_bias: fixed number added to the input gate before its sigmoid.
        gate_style: 'unit' (a gate per feature), 'memory' (a gate per memory row) or None (no gates: the
            candidate is the new memory).
        attention_mlp_layers: layers of the row-wise MLP that follows the attention.
        key_size: size K of one head's queries and keys. None or 0 means head_size.
        return_all_outputs: whether forward returns the outputs of all time steps or only the last one.
        input_rows: rows M in the input of one time step. With more than 1 the input is (B, T, M, ...) and
            every row takes part in the attention (the original's `treat_input_as_matrix`).
        init_scale: factor on the standard deviation of the initial weight matrices. 1 as in the original.

    Raises:
        ValueError: an argument outside its range. The message names it.
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
        init_scale: float = 1.0,
    ):
        super().__init__()
        if gate_style not in GATE_STYLES:
            raise ValueError(f"gate_style must be 'unit', 'memory' or None, got {gate_style!r}")
        self.mem_slots = as_integer("mem_slots", mem_slots)
        self.head_size = as_integer("head_size", head_size)
        self.input_size = as_integer("input_size", input_size)
        self.num_heads = as_integer("num_heads", num_heads)
        self.num_blocks = as_integer("num_blocks", num_blocks)
        self.forget_bias = as_number("forget_bias", forget_bias)
        self.input_bias = as_number("input_bias", input_bias)
        self.gate_style = gate_style
        self.attention_mlp_layers = as_integer("attention_mlp_layers", attention_mlp_layers)
        self.key_size = (
            as_integer("key_size", 0 if key_size is None else key_size, minimum=0) or self.head_size
        )
        self.return_all_outputs = return_all_outputs
        self.input_rows = as_integer("input_rows", input_rows)
        self.init_scale = as_number("init_scale", init_scale, positive=True)
        self.mem_size = self.num_heads * self.head_size

        sizes = (self.num_heads, self.key_size, self.head_size)
        self.input_projection = nn.Linear(self.input_size, self.mem_size)
        self.blocks = nn.ModuleList(AttentionBlock(*sizes) for _ in range(self.num_blocks))
        layers = range(self.attention_mlp_layers)
        self.mlp = RowMLP(nn.Linear(self.mem_size, self.mem_size) for _ in layers)
        if gate_style is not None:
            gate_size = 2 * (self.mem_size if gate_style == "unit" else 1)
            self.input_gate_projection = nn.Linear(self.input_rows * self.mem_size, gate_size)
            self.memory_gate_projection = nn.Linear(self.mem_size, gate_size)
        self.reset_parameters()

    def step(
        self,
        input_t: Tensor,
        memory: Tensor,
        return_details: bool = False,
        candidate_mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_memory: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, StepDetails]:
        """Advance the memory by one time step.

        Args:
            input_t: input of this step, (B, ...), flattened to input_size; with input_rows > 1, (B, M, ...).
            memory: memory before the step, (B, N, D).
            return_details: whether to return the gates and the attention weights of this step as well.
            candidate_mask, reset_memory: as in forward.
            resets: bool, (B,). Where True, a new sequence starts at this step.

        Returns:
            The memory after the step, (B, N, D). Its rows flattened are the output. With return_details, also
            StepDetails.

        Raises:
            ValueError, TypeError: an input that does not fit. The message says what was expected.
        """
        input_t = self._checked_inputs(input_t, leading=("B",))
        memory = self._checked_memory("memory", memory, input_t)
        mask = self._checked_mask(candidate_mask, memory)
        reset_memory = self._checked_resets(resets, reset_memory, input_t, leading=("B",))
        if resets is not None:
            memory = torch.where(resets[:, None, None], reset_memory, memory)
        after, details = self._advance(input_t, memory, mask)
        return (after, details) if return_details else after

    def _advance(
        self, input_t: Tensor, memory: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, StepDetails]:
        """One step from input_t (B, M, input_size) and memory (B, N, D)."""
        # Repeated in relational_rnn_fast.py, like `gates`.
        rows = self.input_projection(input_t)  # (B, M, D)
        attended, attention = torch.cat([memory, rows], dim=1), []  # (B, R, D), the [M; x] of eq. 2
        for block in self.blocks:
            attended, weights = block(attended, self.mlp)
            attention.append(weights)
        candidate = attended[:, : self.mem_slots]  # (B, N, D), input rows dropped
        if self.gate_style is not None:
            candidate = torch.tanh(candidate)
        if mask is not None:
            candidate = candidate * mask
        if self.gate_style is None:
            return candidate, StepDetails(None, None, attention)
        input_gate, forget_gate = self.gates(rows, memory)
        after = input_gate * candidate + forget_gate * memory  # eq. 7
        return after, StepDetails(input_gate, forget_gate, attention)

    def gates(self, rows: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the forget gate (eqs. 4 and 5) after the sigmoid.

        Args:
            rows: projected input rows, (B, M, D).
            memory: memory before the step, (B, N, D).

        Returns:
            Both (B, N, D) for gate_style 'unit', (B, N, 1) for 'memory'.
        """
        from_input = self.input_gate_projection(rows.flatten(1)).unsqueeze(1)  # (B, 1, 2D) or (B, 1, 2)
        from_memory = self.memory_gate_projection(torch.tanh(memory))  # (B, N, 2D) or (B, N, 2)
        both = (from_input + from_memory).to(memory.dtype)
        input_gate, forget_gate = both.chunk(2, dim=-1)
        return torch.sigmoid(input_gate + self.input_bias), torch.sigmoid(forget_gate + self.forget_bias)

    def forward(
        self,
        inputs: Tensor,
        memory: Tensor | None = None,
        candidate_mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the core over a sequence.

        Args:
            inputs: (B, T, ...), flattened after T to input_size; with input_rows > 1, (B, T, M, ...),
                flattened after M.
            memory: memory before the first step, (B, N, D). None means the initial state.
            candidate_mask: factors on the candidate (after its tanh if there are gates) at every step,
                (B, N, D). Recurrent dropout of Semeniuta et al. 2016 (arXiv:1603.05118) multiplies here. The
                mask gets no gradient.
            resets: bool, (B, T). Where True, a new sequence starts at that step: the memory before the step
                is reset_memory, and no gradient reaches the steps before it.
            reset_memory: memory of a sequence that is reset, (B, N, D), or (1, N, D) for all sequences. None
                means the initial state.

        Returns:
            outputs: (B, T, N * D) with return_all_outputs, else the last step's (B, N * D).
            memory: the memory after the last step, (B, N, D). Nothing is detached: gradients reach the given
                memory. Do not change the results in place before the backward pass.
            For padded sequences of different lengths (B,), use return_all_outputs: the memory at the end of
            each is outputs[torch.arange(B), lengths - 1].unflatten(1, (N, D)).

        Raises:
            ValueError, TypeError: an input that does not fit. The message says what was expected.
        """
        inputs = self._checked_inputs(inputs, leading=("B", "T"))  # (B, T, M, input_size)
        memory = self._checked_memory("memory", memory, inputs)
        mask = self._checked_mask(candidate_mask, memory)
        reset_memory = self._checked_resets(resets, reset_memory, inputs, leading=("B", "T"))
        outputs, memory = self._run(inputs, memory, mask, resets, reset_memory)
        # A copy, so that changing the output in place does not change the memory.
        return outputs if self.return_all_outputs else memory.flatten(1).clone(), memory

    def _run(
        self,
        inputs: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        resets: Tensor | None,
        reset_memory: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Loop over the steps; return outputs (B, T, N * D) or None, and the last memory (B, N, D)."""
        outputs = []
        for t, input_t in enumerate(inputs.unbind(1)):
            if resets is not None:
                memory = torch.where(resets[:, t, None, None], reset_memory, memory)
            memory, _ = self._advance(input_t, memory, mask)
            if self.return_all_outputs:
                outputs.append(memory.flatten(1))
        return torch.stack(outputs, dim=1) if outputs else None, memory

    @torch.no_grad()
    def inspect(
        self,
        inputs: Tensor,
        memory: Tensor | None = None,
        resets: Tensor | None = None,
        reset_memory: Tensor | None = None,
    ) -> StepDetails:
        """Return the gates and the attention weights of all steps of a sequence, without gradients.

        Args:
            inputs, memory, resets, reset_memory: as in forward.

        Returns:
            StepDetails whose tensors have T after B: gates (B, T, N, D) or (B, T, N, 1), attention
            (B, T, H, R, R) for each block.
        """
        inputs = self._checked_inputs(inputs, leading=("B", "T"))
        memory = self._checked_memory("memory", memory, inputs)
        reset_memory = self._checked_resets(resets, reset_memory, inputs, leading=("B", "T"))
        steps = []
        for t, input_t in enumerate(inputs.unbind(1)):
            if resets is not None:
                memory = torch.where(resets[:, t, None, None], reset_memory, memory)
            memory, details = self._advance(input_t, memory)
            steps.append(details)
        input_gates, forget_gates, attention = zip(*steps, strict=True)
        gates = (None, None)
        if self.gate_style is not None:
            gates = torch.stack(input_gates, dim=1), torch.stack(forget_gates, dim=1)
        return StepDetails(*gates, [torch.stack(block, dim=1) for block in zip(*attention, strict=True)])

    @property
    def state_size(self) -> tuple[int, int]:
        """Shape of one sequence's memory, (N, D)."""
        return self.mem_slots, self.mem_size

    @property
    def output_size(self) -> int:
        """Features of the output at one time step, N * D: the memory, slot by slot."""
        return self.mem_slots * self.mem_size

    def initial_state(self, batch_size: int) -> Tensor:
        """Return the memory before the first step: the identity, cut or padded with zeros to D columns.

        Returns:
            (batch_size, N, D), on the parameters' device and of their dtype. The rows differ, so the slots
            can learn different roles. All sequences start alike.
        """
        like = self._like()
        identity = torch.eye(self.mem_slots, self.mem_size, dtype=like.dtype, device=like.device)
        return identity.repeat(batch_size, 1, 1)

    def _like(self) -> Tensor:
        """A parameter, for its device and dtype."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return parameter
        return self.blocks[0].mlp_norm.weight  # replicas of DataParallel have weights but no parameters

    def reset_parameters(self) -> None:
        """Initialize as the original: weights normal, std 1/sqrt(fan_in), truncated at two std; biases 0.

        init_scale multiplies the weights.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                deviation = self.init_scale * module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"mem_slots={self.mem_slots}, head_size={self.head_size}, num_heads={self.num_heads}, "
            f"key_size={self.key_size}, gate_style={self.gate_style!r}, forget_bias={self.forget_bias}, "
            f"input_bias={self.input_bias}"
        )

    def load_sonnet_variables(self, variables: Mapping[str, Any]) -> None:
        """Copy the variables of DeepMind's original module (Sonnet v1) into this core.

        Args:
            variables: the original's variable names, with or without the prefixes `var/` and
                `relational_memory/`, mapped to arrays or tensors. Their weight matrices are (fan_in, fan_out)
                and are transposed here.

        Raises:
            ValueError: names that are missing or unknown, shapes that do not fit, or values that are not
                finite. The message lists all of them, and nothing is copied.
        """
        expected, given, problems = self._sonnet_names(), {}, []
        for name, value in variables.items():
            name = name.removeprefix("var/").removeprefix("relational_memory/")
            given[name] = torch.as_tensor(value)
        if missing := sorted(expected.keys() - given.keys()):
            problems.append(f"missing: {', '.join(missing)}")
        if unknown := sorted(given.keys() - expected.keys()):
            problems.append(f"not of this core: {', '.join(unknown)}")
        for name in sorted(expected.keys() & given.keys()):
            value, parameter = given[name], expected[name]
            shape = tuple(parameter.shape)[::-1]  # reversed for matrices, unchanged for vectors
            if tuple(value.shape) != shape:
                problems.append(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            elif not value.is_floating_point():
                problems.append(f"{name} must contain floating point numbers, got {value.dtype}")
            elif not value.to(parameter.dtype).isfinite().all():
                problems.append(f"{name} must contain finite numbers within the range of {parameter.dtype}")
        if problems:
            raise ValueError("these variables do not fit the core; " + "; ".join(problems))
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(given[name].t() if parameter.dim() == 2 else given[name])

    def _sonnet_names(self) -> dict[str, nn.Parameter]:
        """The original's variable names in the order in which it made them, with the parameters here."""
        linears = [self.input_projection, *(block.qkv_projection for block in self.blocks)]
        if self.gate_style is not None:
            linears += [self.input_gate_projection, self.memory_gate_projection]
        norms = [n for block in self.blocks for n in (block.qkv_norm, block.attention_norm, block.mlp_norm)]
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

    def _checked_inputs(self, inputs: Tensor, leading: tuple[str, ...]) -> Tensor:
        """Return the inputs as (..., M, input_size), or raise an error that says what was expected."""
        if not isinstance(inputs, Tensor):
            hint = ""
            if isinstance(inputs, nn.utils.rnn.PackedSequence):
                hint = " Unpack it with torch.nn.utils.rnn.pad_packed_sequence(..., batch_first=True)."
            raise TypeError(f"inputs must be a tensor, got a {type(inputs).__name__}.{hint}")
        many = self.input_rows > 1
        first = len(leading) + many
        fits = inputs.dim() > first and inputs.shape[first:].numel() == self.input_size
        if not fits or (many and inputs.size(first - 1) != self.input_rows):
            rows = f", {self.input_rows} rows" if many else ""
            raise ValueError(
                f"inputs must have shape ({', '.join(leading)}{rows}, ...) with {self.input_size} features "
                f"(input_size) after flattening the rest, got {tuple(inputs.shape)}"
            )
        if len(leading) > 1 and inputs.size(1) == 0:
            raise ValueError("inputs must contain at least one time step, got T = 0")
        self._check_dtype("inputs", inputs)
        inputs = inputs.flatten(first)
        return inputs if many else inputs.unsqueeze(-2)

    def _checked_memory(self, name: str, memory: Tensor | None, inputs: Tensor) -> Tensor:
        """Return the memory (the initial state for None) in the parameters' precision, or raise an error."""
        if memory is None:
            return self.initial_state(inputs.size(0))
        if not isinstance(memory, Tensor):
            raise TypeError(
                f"{name} must be one tensor (B, mem_slots, mem_size), got a {type(memory).__name__}. "
                "The core has no separate cell state."
            )
        expected = (inputs.size(0), self.mem_slots, self.mem_size)
        if tuple(memory.shape) != expected:
            hint = ""
            if inputs.dim() == 4 and tuple(memory.shape) == (inputs.size(1), *self.state_size):
                hint = ". The inputs seem to be (T, B, ...): the batch must come first, (B, T, ...)"
            raise ValueError(
                f"{name} must have shape (B, mem_slots, mem_size) = {expected}, "
                f"got {tuple(memory.shape)}{hint}"
            )
        self._check_dtype(name, memory)
        return memory.to(self._like().dtype)

    def _check_dtype(self, name: str, value: Tensor) -> None:
        dtype = self._like().dtype
        if value.dtype == dtype:
            return
        if not (value.is_floating_point() and torch.is_autocast_enabled(value.device.type)):
            raise ValueError(f"{name} must be {dtype}, as the core's weights are, got {value.dtype}")

    def _checked_mask(self, mask: Tensor | None, memory: Tensor) -> Tensor | None:
        if mask is not None and mask.shape != memory.shape:
            raise ValueError(
                f"candidate_mask must have the memory's shape {tuple(memory.shape)}, got {tuple(mask.shape)}"
            )
        return None if mask is None else mask.detach().to(memory.dtype)

    def _checked_resets(
        self, resets: Tensor | None, reset_memory: Tensor | None, inputs: Tensor, leading: tuple[str, ...]
    ) -> Tensor | None:
        """Return the memory of sequences that are reset, (B, N, D); None without resets."""
        if resets is None:
            if reset_memory is not None:
                raise ValueError("reset_memory has no effect without resets. Give both or omit both.")
            return None
        expected = tuple(inputs.shape[: len(leading)])
        if not isinstance(resets, Tensor):
            raise TypeError(
                f"resets must be a tensor, got a {type(resets).__name__}. Convert it with torch.as_tensor."
            )
        if resets.dtype != torch.bool or tuple(resets.shape) != expected:
            raise ValueError(
                f"resets must be bool of shape ({', '.join(leading)}) = {expected}, got {resets.dtype} of "
                f"shape {tuple(resets.shape)}"
            )
        if isinstance(reset_memory, Tensor) and reset_memory.shape == (1, *self.state_size):
            reset_memory = reset_memory.expand(len(inputs), -1, -1)
        return self._checked_memory("reset_memory", reset_memory, inputs)


def as_integer(name: str, value: int, minimum: int = 1) -> int:
    """Return the value as an int.

    Raises:
        ValueError: it is not an integer of at least `minimum`. The message has the argument's name.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:  # Integral: numpy's too
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def as_number(name: str, value: float, positive: bool = False) -> float:
    """Return the value as a float.

    Raises:
        ValueError: it is not a finite number (above 0). The message has the argument's name.
    """
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not finite or (positive and value <= 0):
        raise ValueError(f"{name} must be a finite number{' above 0' * positive}, got {value!r}")
    return float(value)

"""The RMC language model: the Relational Memory Core as the recurrent part of a word-level language model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.func import functional_call

from layers.language_model import LanguageModel, check_probability
from layers.regularization import drop_weights, dropout_mask
from relational_rnn_fast import FastRelationalMemory
from relational_rnn_general import as_integer

# RelationalMemory's keyword arguments in the language model of L0SG/relational-rnn-pytorch.
CORE_DEFAULTS = {
    "mem_slots": 1,
    "head_size": 192,
    "num_heads": 4,
    "num_blocks": 1,
    "forget_bias": 1.0,
    "input_bias": 0.0,
    "gate_style": "unit",
    "attention_mlp_layers": 3,
    "key_size": 64,
    "init_scale": 1.0,
}


class RelationalMemoryLM(LanguageModel):
    """Word-level language model around a relational memory (Santoro et al. 2018, sections 4.3 and A.4).

    The state is the memory, (B, mem_slots, mem_size).

    Args:
        vocab_size, embedding_size, dropout_input, dropout_output, cutoffs, tied, locked_dropout,
            dropout_words: see LanguageModel.
        dropout_weights: see LanguageModel. It acts on the matrices that multiply the memory at every step:
            the memory's gates and the queries, keys and values. They correspond to weight_hh of an LSTM. The
            attention MLP is not dropped: its input is normalized attention output.
        dropout_candidate: probability of dropping a feature of the candidate, which is written into the
            memory; requires gates, because the rest of the memory stays. As in Semeniuta et al. 2016
            (arXiv:1603.05118), with one mask for all steps of a window as in Gal & Ghahramani 2016
            (arXiv:1512.05287).
        core: keyword arguments of RelationalMemory; CORE_DEFAULTS has the defaults.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int = 192,
        dropout_input: float = 0.5,
        dropout_output: float = 0.5,
        cutoffs: Sequence[int] | None = None,
        tied: bool = True,
        locked_dropout: bool = False,
        dropout_words: float = 0.0,
        dropout_weights: float = 0.0,
        dropout_candidate: float = 0.0,
        **core: Any,
    ):
        core = CORE_DEFAULTS | core
        config = {
            "vocab_size": as_integer("vocab_size", vocab_size),
            "embedding_size": as_integer("embedding_size", embedding_size),
            "dropout_input": dropout_input,
            "dropout_output": dropout_output,
            "cutoffs": None if cutoffs is None else list(cutoffs),
            "tied": tied,
            "locked_dropout": locked_dropout,
            "dropout_words": dropout_words,
            "dropout_weights": dropout_weights,
            "dropout_candidate": dropout_candidate,
            **core,
        }
        check_probability("dropout_candidate", dropout_candidate)
        if dropout_candidate and core["gate_style"] is None:
            raise ValueError(
                "dropout_candidate (--dropout-candidate) requires gates: without gates the candidate "
                "replaces the memory, and dropped features would be lost. Set gate_style (--gatestyle) to "
                "'unit' or 'memory', or use another dropout."
            )
        memory = FastRelationalMemory(input_size=embedding_size, return_all_outputs=True, **core)
        super().__init__(config, memory.output_size)
        self.core = memory
        self.dropout_candidate = dropout_candidate

    def initial_state(self, batch_size: int) -> Tensor:
        """Return the core's initial memory, (B, mem_slots, mem_size)."""
        return self.core.initial_state(batch_size)

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the core: embedded (T, B, E) to features (T, B, mem_slots * mem_size)."""
        inputs, mask = embedded.transpose(0, 1), None
        if self.training and self.dropout_candidate:
            mask = dropout_mask(state, state.shape, self.dropout_candidate)
        if self.training and self.dropout_weights:
            dropped = drop_weights(self.recurrent_weights(), self.dropout_weights)
            outputs, memory = functional_call(self.core, dropped, (inputs, state, mask))
        else:
            outputs, memory = self.core(inputs, state, mask)
        return outputs.transpose(0, 1), memory

    def recurrent_weights(self) -> dict[str, Tensor]:
        """Return the core's matrices that weight drop acts on, by the core's names."""
        weights = {
            f"blocks.{index}.qkv_projection.weight": block.qkv_projection.weight
            for index, block in enumerate(self.core.blocks)
        }
        if self.core.gate_style is not None:
            weights["memory_gate_projection.weight"] = self.core.memory_gate_projection.weight
        return weights

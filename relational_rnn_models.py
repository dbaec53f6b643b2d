"""The RMC language model: the Relational Memory Core as the recurrent part of a word-level language model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.func import functional_call

from layers.language_model import LanguageModel, check_probability, check_size, constructor_arguments
from layers.regularisation import drop_weights, dropout_mask
from relational_rnn_fast import FastRelationalMemory

# RelationalMemory's keyword arguments in the published language model.
PUBLISHED_CORE = {
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
            attention MLP is not dropped: its input is normalised attention output.
        dropout_candidate: probability of dropping a feature of the candidate, which is written into the
            memory; what the memory already holds stays, which needs gates. The place is that of Semeniuta
            et al. 2016 (arXiv:1603.05118), with one mask for all steps of a window as in Gal & Ghahramani
            2016 (arXiv:1512.05287).
        core: keyword arguments of RelationalMemory; PUBLISHED_CORE has the defaults.

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
        core = PUBLISHED_CORE | core
        config = constructor_arguments(locals())
        check_probability("dropout_candidate", dropout_candidate)
        if dropout_candidate and core["gate_style"] is None:
            raise ValueError(
                "dropout_candidate (--dropout-candidate) requires gates: without gates the candidate "
                "replaces the memory, and dropped features would be lost. Set gate_style (--gatestyle) to "
                "'unit' or 'memory', or use another dropout."
            )
        check_size("embedding_size", embedding_size)  # checked here because the core's name is input_size
        memory = FastRelationalMemory(input_size=embedding_size, return_all_outputs=True, **core)
        super().__init__(config, memory.output_size)
        self.core = memory
        self.dropout_candidate = dropout_candidate

    def initial_state(self, batch_size: int) -> Tensor:
        """Return the core's initial memory, (B, mem_slots, mem_size)."""
        return self.core.initial_state(batch_size)

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the core: embedded (T, B, E) to features (T, B, mem_slots * mem_size)."""
        dropped, mask = {}, None
        if self.training and self.dropout_weights:
            dropped = drop_weights(self.recurrent_weights(), self.dropout_weights)
        if self.training and self.dropout_candidate:
            mask = dropout_mask(state, state.shape, self.dropout_candidate).to(state.dtype)
        outputs, memory = functional_call(
            self.core, dropped, (embedded.transpose(0, 1), state), {"candidate_mask": mask}
        )
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

"""The RMC language model: the Relational Memory Core as the recurrent part of a word-level language model."""

from collections.abc import Sequence

from torch import Tensor
from torch.func import functional_call

from layers.language_model import LanguageModel, check_probability, check_size
from layers.regularisation import drop_weights, dropout_mask
from relational_rnn_general import RelationalMemory


class RelationalMemoryLM(LanguageModel):
    """Word-level language model around a RelationalMemory (Santoro et al. 2018, sections 4.3 and A.4).

    The arguments are those of RelationalMemory and of LanguageModel. The state is the memory,
    (B, mem_slots, mem_size).

    Weight drop acts on the matrices that the memory itself is multiplied with at every step: those of the
    memory's gates and of queries, keys and values (the input row goes through the latter too). They are what
    weight_hh is to an LSTM. The MLP's are left whole: it works on what attention and a norm have made.

    Args:
        dropout_candidate: probability of dropping a feature of what is written into the memory: what it holds
            already stays, for which it needs gates. The place is that of Semeniuta et al. 2016
            (arXiv:1603.05118), who draw a mask for each step; one mask for all steps of a window is Gal &
            Ghahramani's way (2016, arXiv:1512.05287).

    Raises:
        ValueError: an argument outside its range; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int = 192,
        mem_slots: int = 1,
        head_size: int = 192,
        num_heads: int = 4,
        num_blocks: int = 1,
        forget_bias: float = 1.0,
        input_bias: float = 0.0,
        gate_style: str | None = "unit",
        attention_mlp_layers: int = 3,
        key_size: int | None = 64,
        dropout_input: float = 0.5,
        dropout_output: float = 0.5,
        cutoffs: Sequence[int] | None = None,
        tied: bool = True,
        locked_dropout: bool = False,
        dropout_words: float = 0.0,
        dropout_weights: float = 0.0,
        dropout_candidate: float = 0.0,
    ):
        check_probability("dropout_candidate", dropout_candidate)
        if dropout_candidate and gate_style is None:
            raise ValueError(
                "dropout_candidate needs gates: without them the candidate is the memory, and what is "
                "dropped would be lost at every step. Give a gate_style, or drop elsewhere."
            )
        check_size("embedding_size", embedding_size)  # here, as the core would call it input_size
        core = RelationalMemory(
            mem_slots,
            head_size,
            embedding_size,
            num_heads=num_heads,
            num_blocks=num_blocks,
            forget_bias=forget_bias,
            input_bias=input_bias,
            gate_style=gate_style,
            attention_mlp_layers=attention_mlp_layers,
            key_size=key_size,
            return_all_outputs=True,
        )
        super().__init__(
            vocab_size,
            embedding_size,
            core.output_size,
            dropout_input,
            dropout_output,
            cutoffs,
            tied,
            locked_dropout=locked_dropout,
            dropout_words=dropout_words,
            dropout_weights=dropout_weights,
        )
        self.core = core
        self.dropout_candidate = dropout_candidate
        self.config = {
            "vocab_size": vocab_size,
            "embedding_size": embedding_size,
            "mem_slots": mem_slots,
            "head_size": head_size,
            "num_heads": num_heads,
            "num_blocks": num_blocks,
            "forget_bias": forget_bias,
            "input_bias": input_bias,
            "gate_style": gate_style,
            "attention_mlp_layers": attention_mlp_layers,
            "key_size": key_size,
            "dropout_input": dropout_input,
            "dropout_output": dropout_output,
            "cutoffs": None if cutoffs is None else list(cutoffs),
            "tied": tied,
            "locked_dropout": locked_dropout,
            "dropout_words": dropout_words,
            "dropout_weights": dropout_weights,
            "dropout_candidate": dropout_candidate,
        }

    def initial_state(self, batch_size: int) -> Tensor:
        """The core's initial memory, (B, mem_slots, mem_size)."""
        return self.core.initial_state(batch_size)

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the core; embedded (T, B, E) to features (T, B, mem_slots * mem_size)."""
        dropped, mask = {}, None
        if self.training and self.dropout_weights:
            dropped = drop_weights(self.recurrent_weights(), self.dropout_weights)
        if self.training and self.dropout_candidate:
            # The core takes factors of the memory's dtype: float32 with --bf16 too.
            mask = dropout_mask(state, state.shape, self.dropout_candidate).to(state.dtype)
        outputs, memory = functional_call(
            self.core, dropped, (embedded.transpose(0, 1), state), {"candidate_mask": mask}
        )
        return outputs.transpose(0, 1), memory

    def recurrent_weights(self) -> dict[str, Tensor]:
        """The core's matrices that weight drop acts on, by the core's names."""
        weights = {
            f"blocks.{index}.qkv_projection.weight": block.qkv_projection.weight
            for index, block in enumerate(self.core.blocks)
        }
        if self.core.gate_style is not None:
            weights["memory_gate_projection.weight"] = self.core.memory_gate_projection.weight
        return weights

"""The baseline: LSTM, GRU and tanh or ReLU RNN language models, as one fused layer or as a loop of cells."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language_model import LanguageModel, check_probability, check_size

LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


class RNNLM(LanguageModel):
    """Word-level language model around an LSTM, GRU or simple RNN.

    Args:
        vocab_size, embedding_size, dropout_input, dropout_output, cutoffs, tied: as in LanguageModel.
        model: 'LSTM', 'GRU', 'RNN_TANH' or 'RNN_RELU'.
        hidden_size: hidden units per layer.
        num_layers: stacked layers.
        dropout_hidden: dropout probability between layers; without effect on a single layer.
        fused: True runs the whole sequence in one call (cuDNN on a GPU), False a Python loop of cells over
            the same weights. Both compute the same; the loop shows what a recurrence costs without one.

    The state is one tensor (B, S, hidden_size): the hidden vectors of the layers, then an LSTM's cells.

    Raises:
        ValueError: an argument outside its range; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        model: str = "LSTM",
        embedding_size: int = 300,
        hidden_size: int = 300,
        num_layers: int = 1,
        dropout_input: float = 0.5,
        dropout_hidden: float = 0.5,
        dropout_output: float = 0.5,
        cutoffs: Sequence[int] | None = None,
        tied: bool = False,
        fused: bool = True,
    ):
        if model not in LAYERS:
            raise ValueError(f"model must be one of {', '.join(LAYERS)}, got {model!r}")
        check_size("hidden_size", hidden_size)
        check_size("num_layers", num_layers)
        check_probability("dropout_hidden", dropout_hidden)
        super().__init__(
            vocab_size, embedding_size, hidden_size, dropout_input, dropout_output, cutoffs, tied,
            project=False,
        )
        options = {"nonlinearity": model.removeprefix("RNN_").lower()} if model.startswith("RNN_") else {}
        between = dropout_hidden if num_layers > 1 else 0.0   # torch warns of dropout without a second layer
        self.rnn = LAYERS[model](embedding_size, hidden_size, num_layers, dropout=between, **options)
        self.fused = fused
        self.config = {
            "vocab_size": vocab_size,
            "model": model,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "dropout_input": dropout_input,
            "dropout_hidden": dropout_hidden,
            "dropout_output": dropout_output,
            "cutoffs": None if cutoffs is None else list(cutoffs),
            "tied": tied,
            "fused": fused,
        }

    def initial_state(self, batch_size: int) -> Tensor:
        """Zeros, (B, num_layers, hidden_size), or (B, 2 * num_layers, hidden_size) for an LSTM."""
        rows = self.rnn.num_layers * (2 if self.config["model"] == "LSTM" else 1)
        return self.embedding.weight.new_zeros(batch_size, rows, self.rnn.hidden_size)

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers; embedded (T, B, E) to the last layer's outputs (T, B, hidden_size)."""
        # The layers want their states as (layers, B, hidden).
        states = tuple(part.contiguous() for part in state.transpose(0, 1).split(self.rnn.num_layers))
        if not self.fused:
            return self._loop_of_cells(embedded, states)
        lstm = self.config["model"] == "LSTM"
        outputs, after = self.rnn(embedded, states if lstm else states[0])
        return outputs, (torch.cat(after) if lstm else after).transpose(0, 1)

    def _loop_of_cells(self, embedded: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        cell = getattr(torch, self.config["model"].lower() + "_cell")   # functional, takes weights
        lstm = self.config["model"] == "LSTM"
        inputs, after = embedded, []
        for layer in range(self.rnn.num_layers):
            names = (f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            weights = [getattr(self.rnn, name) for name in names]
            state = tuple(part[layer] for part in states)
            outputs = []
            for x in inputs.unbind(0):
                state = cell(x, state, *weights) if lstm else (cell(x, state[0], *weights),)
                outputs.append(state[0])
            inputs = torch.stack(outputs)
            if layer + 1 < self.rnn.num_layers:
                inputs = F.dropout(inputs, self.rnn.dropout, self.training)
            after.append(state)
        return inputs, torch.stack([part for parts in zip(*after, strict=True) for part in parts], dim=1)

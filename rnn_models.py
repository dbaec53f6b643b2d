"""The baseline: LSTM, GRU and tanh or ReLU RNN language models, as a fused layer or as a loop of cells."""

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.fused import fused_precision
from layers.language_model import LanguageModel, check_probability
from layers.regularization import drop_weights, dropout, dropout_mask
from relational_rnn_general import as_integer

# With weight drop, cuDNN copies the weights into one block of memory at every call and warns each time. The
# filter is global because warnings.catch_warnings is not safe in the threads of DataParallel.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single")

LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


class RNNLM(LanguageModel):
    """Word-level language model around an LSTM, GRU or simple RNN.

    The state is one tensor (B, S, hidden_size): the hidden vectors of the layers, then an LSTM's cells.

    Args:
        vocab_size, embedding_size, dropout_input, dropout_output, cutoffs, tied, dropout_words: see
            LanguageModel.
        model: 'LSTM', 'GRU', 'RNN_TANH' or 'RNN_RELU'.
        hidden_size: hidden units per layer.
        num_layers: stacked layers.
        dropout_hidden: dropout probability between layers; no effect with a single layer.
        fused: True runs the full sequence in one call (cuDNN on a GPU), False runs a Python loop of cells
            with the same weights and the same results, to measure what the fused kernel saves.
        project: map the hidden units to the embedding's size before the output layer, as the RMC does; tied
            weights then work with any hidden_size.
        locked_dropout: see LanguageModel; it also locks the dropout between layers.
        dropout_weights: see LanguageModel; it acts on weight_hh of every layer.
        dropout_candidate: LSTM with fused=False only: probability of dropping a unit of what is added to the
            cells, as in Semeniuta et al. 2016 (arXiv:1603.05118), with one mask for all steps of a window.

    Raises:
        ValueError: an argument is outside its range; the message names it.
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
        project: bool = False,
        locked_dropout: bool = False,
        dropout_words: float = 0.0,
        dropout_weights: float = 0.0,
        dropout_candidate: float = 0.0,
    ):
        config = {
            "vocab_size": as_integer("vocab_size", vocab_size),
            "model": model,
            "embedding_size": as_integer("embedding_size", embedding_size),
            "hidden_size": as_integer("hidden_size", hidden_size),
            "num_layers": as_integer("num_layers", num_layers),
            "dropout_input": dropout_input,
            "dropout_hidden": dropout_hidden,
            "dropout_output": dropout_output,
            "cutoffs": None if cutoffs is None else list(cutoffs),
            "tied": tied,
            "fused": fused,
            "project": project,
            "locked_dropout": locked_dropout,
            "dropout_words": dropout_words,
            "dropout_weights": dropout_weights,
            "dropout_candidate": dropout_candidate,
        }
        if model not in LAYERS:
            raise ValueError(f"model must be one of {', '.join(LAYERS)}, got {model!r}")
        check_probability("dropout_candidate", dropout_candidate)
        if dropout_candidate and (model != "LSTM" or fused):
            raise ValueError(
                "dropout_candidate requires an LSTM as a loop of cells, got "
                f"{model}{' as a fused layer' if fused else ''}. Use model='LSTM' and fused=False (--model "
                "LSTM --no-cudnn), or dropout_weights (--dropout-weights), which works with every model."
            )
        check_probability("dropout_hidden", dropout_hidden)
        super().__init__(config, hidden_size)
        options = {"nonlinearity": model.removeprefix("RNN_").lower()} if model.startswith("RNN_") else {}
        # A module for each layer holds its weights: cuDNN would copy weights of a larger module.
        self.rnn = LAYERS[model](embedding_size, hidden_size, **options)  # the first layer
        upper = range(1, config["num_layers"])
        self.upper = nn.ModuleList(LAYERS[model](hidden_size, hidden_size, **options) for _ in upper)
        self.function_name = model.lower()  # of torch.lstm, torch.lstm_cell and so on
        self.is_lstm = model == "LSTM"
        self.fused = fused
        self.dropout_hidden, self.dropout_candidate = dropout_hidden, dropout_candidate

    def initial_state(self, batch_size: int) -> Tensor:
        """Return zeros, (B, num_layers, hidden_size), or (B, 2 * num_layers, hidden_size) for an LSTM."""
        rows = (1 + len(self.upper)) * (2 if self.is_lstm else 1)
        return self.embedding.weight.new_zeros(batch_size, rows, self.rnn.hidden_size)

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers: embedded (T, B, E) to the last layer's outputs (T, B, hidden_size)."""
        recurrent = self.recurrent_weights()
        if self.training and self.dropout_weights:
            recurrent = drop_weights(recurrent, self.dropout_weights)
        run_layer = self._fused_layer if self.fused else self._loop_of_cells
        # After bfloat16 steps the state may be of bfloat16.
        parts = state.to(embedded.dtype).transpose(0, 1).contiguous().split(1 + len(self.upper))
        outputs, after = embedded, []
        layers = zip([self.rnn, *self.upper], recurrent.values(), strict=True)
        for index, (layer, weight_hh) in enumerate(layers):
            if index > 0:
                outputs = dropout(outputs, self.dropout_hidden, self.training, self.locked_dropout)
            weights = [layer.weight_ih_l0, weight_hh, layer.bias_ih_l0, layer.bias_hh_l0]
            outputs, last = run_layer(outputs, [part[index] for part in parts], weights)
            after.append(last)
        return outputs, torch.stack([part for parts in zip(*after, strict=True) for part in parts], dim=1)

    def recurrent_weights(self) -> dict[str, Tensor]:
        """Return the matrices that weight drop acts on, weight_hh of every layer, by name."""
        upper = {f"upper.{i}.weight_hh_l0": layer.weight_hh_l0 for i, layer in enumerate(self.upper)}
        return {"rnn.weight_hh_l0": self.rnn.weight_hh_l0, **upper}

    def _fused_layer(
        self, inputs: Tensor, state: list[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Run one layer: inputs (T, B, F), its state and weights, to outputs and the state afterward."""
        function = getattr(torch, self.function_name)
        before = [part.unsqueeze(0) for part in state]
        with fused_precision(self.rnn):
            outputs, *after = function(
                inputs, before if self.is_lstm else before[0], weights,
                True, 1, 0.0, self.training, False, False,
            )  # fmt: skip
        return outputs, [part.squeeze(0) for part in after]

    def _loop_of_cells(
        self, inputs: Tensor, state: Sequence[Tensor], weights: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Compute _fused_layer step by step."""
        cell = getattr(torch, self.function_name + "_cell")
        if self.training and self.dropout_candidate:
            mask = dropout_mask(state[1], state[1].shape, self.dropout_candidate)
            cell = functools.partial(lstm_cell, candidate_mask=mask)
        outputs = []
        for x in inputs.unbind(0):
            state = cell(x, state, *weights) if self.is_lstm else [cell(x, state[0], *weights)]
            outputs.append(state[0])
        return torch.stack(outputs), state


def lstm_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    candidate_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute torch.lstm_cell with a mask, (B, hidden_size), on the candidate that is added to the cells."""
    hidden, cells = state
    gates = F.linear(x, weight_ih, bias_ih) + F.linear(hidden, weight_hh, bias_hh)
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=1)
    candidate = torch.tanh(candidate) * candidate_mask
    cells = torch.sigmoid(forget_gate) * cells + torch.sigmoid(input_gate) * candidate
    return torch.sigmoid(output_gate) * torch.tanh(cells), cells

"""The baseline: LSTM, GRU and tanh or ReLU RNN language models, as a fused layer or as a loop of cells."""

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.fused import fused_precision
from layers.language_model import LanguageModel, check_probability
from layers.regularisation import drop_weights, dropout, dropout_mask
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
        fused: True runs the whole sequence in one call (cuDNN on a GPU), False runs a Python loop of cells
            with the same weights and the same results, to measure what the fused kernel saves.
        project: map the hidden units to the embedding's size before the output layer, as the RMC does; tied
            weights then work with any hidden_size.
        locked_dropout: see LanguageModel; it also locks the dropout between layers.
        dropout_weights: see LanguageModel; it acts on weight_hh of every layer.
        dropout_candidate: LSTM with fused=False only: probability of dropping a unit of what is added to the
            cells; what the cells already hold stays. The place is that of Semeniuta et al. 2016
            (arXiv:1603.05118), with one mask for all steps of a window.

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
        between = dropout_hidden if num_layers > 1 else 0.0  # torch warns about dropout in a single layer
        self.rnn = LAYERS[model](embedding_size, hidden_size, num_layers, dropout=between, **options)
        self.function_name = model.lower()  # of torch.lstm, torch.lstm_cell and so on
        self.is_lstm = model == "LSTM"
        self.fused = fused
        self.dropout_candidate = dropout_candidate

    def initial_state(self, batch_size: int) -> Tensor:
        """Return zeros, (B, num_layers, hidden_size), or (B, 2 * num_layers, hidden_size) for an LSTM."""
        rows = self.rnn.num_layers * (2 if self.is_lstm else 1)
        return self.embedding.weight.new_zeros(batch_size, rows, self.rnn.hidden_size)

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers: embedded (T, B, E) to the last layer's outputs (T, B, hidden_size)."""
        # Each (layers, B, hidden_size), as the layers need them.
        states = tuple(part.contiguous() for part in state.transpose(0, 1).split(self.rnn.num_layers))
        dropped = {}
        if self.training and self.dropout_weights:
            dropped = drop_weights(self.recurrent_weights(), self.dropout_weights)
        weights = [
            [
                dropped.get(name, getattr(self.rnn, name))
                for name in (f"{part}_l{layer}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            ]
            for layer in range(self.rnn.num_layers)
        ]
        if not self.fused:
            return self._loop_of_cells(embedded, states, weights)
        # One call over all layers cannot lock the dropout between them.
        apart = self.training and self.locked_dropout and self.rnn.dropout > 0
        # After bfloat16 steps the state may be of bfloat16.
        states = tuple(part.to(embedded.dtype) for part in states)
        with fused_precision(self.rnn):
            if dropped or apart:
                return self._fused_layers(embedded, states, weights, apart)
            outputs, after = self.rnn(embedded, states if self.is_lstm else states[0])
            return outputs, (torch.cat(after) if self.is_lstm else after).transpose(0, 1)

    def recurrent_weights(self) -> dict[str, Tensor]:
        """Return the matrices that weight drop acts on, weight_hh of every layer, by nn.LSTM's names."""
        names = (f"weight_hh_l{layer}" for layer in range(self.rnn.num_layers))
        return {name: getattr(self.rnn, name) for name in names}

    def _fused_layers(
        self, embedded: Tensor, states: tuple[Tensor, ...], weights: list[list[Tensor]], apart: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the fused layers with given weights, in one call or, if `apart`, in one call per layer."""
        function = getattr(torch, self.function_name)
        calls = [range(i, i + 1) for i in range(len(weights))] if apart else [range(len(weights))]
        # With a single layer cuDNN's dropout would have no effect, yet draw a seed and wait for the GPU.
        between = 0.0 if apart else self.rnn.dropout
        outputs, after = embedded, []
        for layers in calls:
            if layers.start > 0:
                outputs = dropout(outputs, self.rnn.dropout, self.training, self.locked_dropout)
            given = tuple(part[layers.start : layers.stop] for part in states)
            if not self.is_lstm:
                (given,) = given
            flat = [weight for layer in layers for weight in weights[layer]]
            options = (True, len(layers), between, self.training, False, False)
            outputs, *part = function(outputs, given, flat, *options)
            after.append(part)
        return outputs, torch.cat([torch.cat(parts) for parts in zip(*after, strict=True)]).transpose(0, 1)

    def _loop_of_cells(
        self, embedded: Tensor, states: tuple[Tensor, ...], weights: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        cell = getattr(torch, self.function_name + "_cell")
        inputs, after = embedded, []
        for layer in range(self.rnn.num_layers):
            state = tuple(part[layer] for part in states)
            if self.training and self.dropout_candidate:
                mask = dropout_mask(state[1], state[1].shape, self.dropout_candidate)
                cell = functools.partial(lstm_cell, candidate_mask=mask)
            outputs = []
            for x in inputs.unbind(0):
                if self.is_lstm:
                    state = cell(x, state, *weights[layer])
                else:
                    state = (cell(x, state[0], *weights[layer]),)
                outputs.append(state[0])
            inputs = torch.stack(outputs)
            if layer + 1 < self.rnn.num_layers:
                inputs = dropout(inputs, self.rnn.dropout, self.training, self.locked_dropout)
            after.append(state)
        return inputs, torch.stack([part for parts in zip(*after, strict=True) for part in parts], dim=1)


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

"""Base class of the word-level language models: embedding, dropout, output layer, loss, log-probabilities.

A model adds its recurrent part in two methods:
    initial_state(batch_size) -> (B, ...)                                   one tensor, batch first
    recur(embedded (T, B, E), state (B, ...)) -> (features (T, B, F), state)
Tokens, targets and state all have the batch first, because torch.nn.DataParallel splits the first dimension.
"""

import math
from typing import Any

from torch import Tensor, nn

from layers.regularization import drop_words, dropout
from layers.softmax import AdaptiveSoftmax, FullSoftmax
from relational_rnn_general import as_number


class LanguageModel(nn.Module):
    """Embedding, dropout, recurrent part, projection to the embedding's size, dropout, output layer.

    Args:
        config: the model's constructor arguments as plain data, its sizes checked:
            `type(model)(**model.config)` has the same shape. The entries used here:
                vocab_size: number of words V.
                embedding_size: features E of a word's embedding.
                dropout_input: dropout probability on the embedded words.
                dropout_output: dropout probability before the output layer.
                cutoffs: None for a full softmax, or the cluster bounds of an adaptive softmax.
                tied: share the embedding's weight with the full softmax.
                project: map the features to E before the output layer (default True).
                locked_dropout: use one dropout mask for all steps of a window.
                dropout_words: probability of dropping a word of the vocabulary from a window's input.
                dropout_weights: probability of dropping an entry of the recurrent matrices for a window.
            The last three are explained in regularization.py. All dropout is active in training only.
        feature_size: features F that the recurrent part returns per time step.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(self, config: dict[str, Any], feature_size: int):
        super().__init__()
        self.config = config
        vocab_size, embedding_size = config["vocab_size"], config["embedding_size"]
        for name in ("dropout_input", "dropout_output", "dropout_words", "dropout_weights"):
            check_probability(name, config[name])
        self.vocab_size = vocab_size
        self.dropout_input = config["dropout_input"]
        self.dropout_output = config["dropout_output"]
        self.locked_dropout = config["locked_dropout"]
        self.dropout_words = config["dropout_words"]
        self.dropout_weights = config["dropout_weights"]
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        # With torch's N(0, 1) a tied softmax would start with large scores and a loss far above ln V.
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        project = config.get("project", True)
        self.projection = nn.Linear(feature_size, embedding_size) if project else nn.Identity()
        width = embedding_size if project else feature_size
        if config["cutoffs"] is not None:
            self.output_layer = AdaptiveSoftmax(width, vocab_size, config["cutoffs"])
        elif not config["tied"]:
            self.output_layer = FullSoftmax(width, vocab_size)
        elif width != embedding_size:
            raise ValueError(
                "tied (--tied) shares one matrix between embedding and softmax and requires hidden_size "
                f"(--nhid) equal to embedding_size (--emsize), got {width} and {embedding_size}. Make them "
                "equal, or set project=True (--project)."
            )
        else:
            self.output_layer = FullSoftmax(width, vocab_size, self.embedding.weight)

    def initial_state(self, batch_size: int) -> Tensor:
        """Return the state before the first token, one tensor (B, ...), on the model's device."""
        raise NotImplementedError

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the recurrent part: embedded (T, B, E), state (B, ...) to features (T, B, F), next state."""
        raise NotImplementedError

    def hidden(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the inputs of the output layer (T, B, E) and the next state; tokens are (B, T)."""
        state = self.initial_state(len(tokens)) if state is None else state
        words = tokens.t()
        embedded = drop_words(
            self.embedding(words), words, self.vocab_size, self.dropout_words, self.training
        )
        embedded = dropout(embedded, self.dropout_input, self.training, self.locked_dropout)
        features, state = self.recur(embedded, state)
        hidden = self.projection(features)
        return dropout(hidden, self.dropout_output, self.training, self.locked_dropout), state

    def forward(self, tokens: Tensor, targets: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score a window.

        Args:
            tokens: word ids, (B, T).
            targets: the next word of each token, (B, T); ids below 0 are not scored.
            state: the state before the window, (B, ...); it is not detached. None is the initial state.

        Returns:
            nats: sum of -log p(target) over the scored targets, (1,), which replicas can gather.
            state: the state after the window, (B, ...).
        """
        hidden, state = self.hidden(tokens, state)
        return self.output_layer(hidden.flatten(0, 1), targets.t().flatten()).reshape(1), state

    def loss(self, tokens: Tensor, targets: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean nats per scored target, a scalar, and the next state; shapes as in forward."""
        nats, state = self(tokens, targets, state)
        return nats.sum() / (targets >= 0).sum().clamp(min=1), state

    def log_probabilities(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the word after tokens (B, T), (B, V), and the next state."""
        hidden, state = self.hidden(tokens, state)
        return self.output_layer.log_probabilities(hidden[-1]), state


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless value is a dropout probability, 0 <= value < 1."""
    if not 0 <= as_number(name, value) < 1:
        raise ValueError(f"{name} must be a probability of at least 0 and below 1, got {value!r}")


def perplexity(loss: float) -> float:
    """Return e^loss for a loss in nats per token; infinity if it overflows or the loss is NaN."""
    return math.exp(loss) if loss < 700 else math.inf

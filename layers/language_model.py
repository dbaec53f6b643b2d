"""What the word-level language models share: embedding, dropout, output layer, loss and log-probabilities.

A model differs in its recurrent part alone. It hands its sizes to LanguageModel and defines two methods:
    initial_state(batch_size) -> (B, ...)                                   one tensor, batch first
    recur(embedded (T, B, E), state (B, ...)) -> (features (T, B, F), state)
Because tokens, targets and state all have the batch first, torch.nn.DataParallel splits them alike.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from layers.regularisation import activation_penalty, drop_words, dropout
from layers.softmax import AdaptiveSoftmax, FullSoftmax


class LanguageModel(nn.Module):
    """Embedding, dropout, recurrent part, projection to the embedding's size, dropout, output layer.

    Args:
        vocab_size: number of words V.
        embedding_size: features E of a word's embedding and of the vector before the output layer.
        feature_size: features F that the recurrent part puts out at one time step.
        dropout_input: dropout probability on the embedded words.
        dropout_output: dropout probability before the output layer.
        cutoffs: None for a full softmax, or the cluster bounds of an adaptive softmax.
        tied: share the embedding's weight with the full softmax.
        project: whether to project features to E; without, F itself goes into the output layer.
        locked_dropout: one dropout mask for all steps of a window, not one per element.
        dropout_words: probability of dropping a word of the vocabulary from the input for a whole window.
        dropout_weights: probability of dropping an entry of the recurrent matrices for a whole window.

    The three are explained in regularisation.py; all dropout acts in training alone.

    Raises:
        ValueError: an argument outside its range; the message names it.
    """

    config: dict  # the constructor's arguments as plain data: type(model)(**model.config) has the same shape

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        feature_size: int,
        dropout_input: float,
        dropout_output: float,
        cutoffs: Sequence[int] | None,
        tied: bool,
        project: bool = True,
        locked_dropout: bool = False,
        dropout_words: float = 0.0,
        dropout_weights: float = 0.0,
    ):
        super().__init__()
        check_size("vocab_size", vocab_size)
        check_size("embedding_size", embedding_size)
        check_probability("dropout_input", dropout_input)
        check_probability("dropout_output", dropout_output)
        check_probability("dropout_words", dropout_words)
        check_probability("dropout_weights", dropout_weights)
        self.vocab_size = vocab_size
        self.dropout_input = dropout_input
        self.dropout_output = dropout_output
        self.locked_dropout = locked_dropout
        self.dropout_words = dropout_words
        self.dropout_weights = dropout_weights
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        # Not torch's N(0, 1): a tied softmax would start with scores of that size, its loss far above ln V.
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.projection = nn.Linear(feature_size, embedding_size) if project else nn.Identity()
        width = embedding_size if project else feature_size
        if cutoffs is not None:
            self.output_layer = AdaptiveSoftmax(width, vocab_size, list(cutoffs))
        elif tied:
            if width != embedding_size:
                raise ValueError(
                    f"tied needs a hidden_size equal to the embedding_size {embedding_size}, got {width}"
                )
            self.output_layer = FullSoftmax(width, vocab_size, self.embedding.weight)
        else:
            self.output_layer = FullSoftmax(width, vocab_size)

    def initial_state(self, batch_size: int) -> Tensor:
        """State before the first token, one tensor (B, ...), on the model's device."""
        raise NotImplementedError

    def recur(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrent part: embedded (T, B, E), state (B, ...) to features (T, B, F), the state after."""
        raise NotImplementedError

    def hidden(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors before the output layer, time first, (T, B, E), and the state after; tokens (B, T)."""
        _, hidden, state = self._run(tokens, state)
        return hidden, state

    def _run(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The recurrent part's outputs (T, B, F), what becomes of them as in `hidden`, the state after."""
        words = tokens.t()
        embedded = drop_words(
            self.embedding(words), words, self.vocab_size, self.dropout_words, self.training
        )
        embedded = dropout(embedded, self.dropout_input, self.training, self.locked_dropout)
        features, state = self.recur(embedded, state)
        hidden = self.projection(features)
        return features, dropout(hidden, self.dropout_output, self.training, self.locked_dropout), state

    def forward(
        self, tokens: Tensor, targets: Tensor, state: Tensor, penalties: tuple[float, float] | None = None
    ) -> tuple[Tensor, ...]:
        """Score a window.

        Args:
            tokens: word ids, (B, T).
            targets: the next word of each token, (B, T); ids below 0 are not scored.
            state: the state before the window, (B, ...); nothing is detached.
            penalties: the factors of AR and TAR (see regularisation.py), for training.

        Returns:
            nats: sum of -log p(target) over the scored targets, (1,), so that replicas' sums can be gathered.
            state: the state after the window, (B, ...).
            penalty: only if `penalties` is given, their sum over the window, (1,), to be added to the nats
                that are minimised and never to those that are reported.
        """
        features, hidden, state = self._run(tokens, state)
        nats = self.output_layer(hidden.flatten(0, 1), targets.t().flatten()).reshape(1)
        if penalties is None:
            return nats, state
        return nats, state, activation_penalty(hidden, features, *penalties).reshape(1)

    def loss(self, tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Mean nats per scored target, a scalar, and the state after the window; shapes as in forward."""
        nats, state = self(tokens, targets, state)
        return nats.sum() / (targets >= 0).sum().clamp(min=1), state

    def log_probabilities(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the word after the last token, (B, V), and the state after; tokens (B, T)."""
        hidden, state = self.hidden(tokens, state)
        return self.output_layer.log_probabilities(hidden[-1]), state


def check_size(name: str, value: int) -> None:
    """Raise ValueError unless value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless value is a dropout probability, 0 <= value < 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a probability of at least 0 and below 1, got {value!r}")


def perplexity(loss: float) -> float:
    """e^loss, a loss in nats per token; infinite where that overflows and for a loss that is no number."""
    return math.exp(loss) if loss < 700 else math.inf

"""The MLP that turns the output of a core into an answer."""

from torch import nn

from relational_rnn_general import as_integer


def answer_mlp(inputs: int, head_layers: int, head_units: int, outputs: int) -> nn.Sequential:
    """Return `head_layers` ReLU layers of `head_units` units, then a linear layer to the outputs.

    Raises:
        ValueError: a number is below 1; the message names it.
    """
    sizes = [inputs] + [as_integer("head_units", head_units)] * as_integer("head_layers", head_layers)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))

"""Precision of torch's fused recurrent layers under autocast."""

import contextlib
import functools
import warnings

import torch
from torch import nn


def fused_precision(layer: nn.RNNBase) -> contextlib.AbstractContextManager[None]:
    """Return the context in which to call a fused recurrent layer; give it float32 inputs.

    Autocast is off inside, and the layer runs in float32, in two cases:
      * On a GPU: under any autocast torch passes float16 to cuDNN's recurrent layers
        (aten/src/ATen/cudnn/AutocastRNN.cpp), and small gradients vanish unless the loss is scaled.
      * On a CPU that has no fused LSTM in the type of autocast. This triggers one warning per process.
    """
    device = layer.weight_ih_l0.device.type
    if device == "cuda":
        return torch.autocast(device, enabled=False)
    if isinstance(layer, nn.LSTM) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if not lstm_runs_in(dtype, device):
            return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


@functools.cache
def lstm_runs_in(dtype: torch.dtype, device: str) -> bool:
    """Return whether the fused LSTM runs under autocast to this type, found by running a tiny one."""
    x, state, weight, bias = (
        torch.zeros(shape, device=device, requires_grad=True)
        for shape in ((1, 1, 2), (1, 1, 2), (8, 2), (8,))
    )
    try:
        with torch.enable_grad(), torch.autocast(device, dtype):
            torch.lstm(x, (state, state), (weight, weight, bias, bias), True, 1, 0.0, True, False, False)
    except RuntimeError:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"torch has no {name} LSTM for this {device.upper()}: it runs in float32.", stacklevel=3
        )
        return False
    return True

"""Training steps as CUDA graphs.

On a GPU, a step of many small operations takes as long as launching them one by one. A graph launches all of
them at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from training.console import first_line, is_out_of_memory

import torch
from torch import Tensor

DEVICE_TYPE = "cuda"  # where functions can be captured
# Eager calls before the capture. In them, libraries initialize and the optimizer creates its state.
WARMUP_CALLS = 3


class CapturedStep:
    """A function of tensors. On a GPU it is captured once and then replayed; elsewhere it is called directly.

    Every call does the work of the function exactly once, including the eager calls before the capture, so
    that weights, optimizer and random generators end up the same with and without graphs.

    A function that is to be captured must:
        * use the same shapes and the same operations in every call, and never wait for the device;
        * keep what changes from call to call in tensors that stay in place;
        * set gradients to None before its backward pass, or add to gradients that stay in place;
        * use Adam with `capturable=True`.
    The next call overwrites its results.

    Args:
        function: takes tensors on the device; returns a tensor, a structure of tensors or None.
        device: where it computes.
        on_failure: called with the reason, in one line, when the capture fails. Later calls are eager.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        on_failure: Callable[[str], None] = print,
    ):
        self.function = function
        self.device = torch.empty(0, device=device).device  # 'cuda' becomes 'cuda:0', as tensors have it
        self.on_failure = on_failure
        self.enabled = device.type == DEVICE_TYPE
        self.stream = torch.cuda.Stream(device) if self.enabled else None
        self.warmup_left = WARMUP_CALLS
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.enabled:
            return self.function(*inputs)
        if self.warmup_left:
            self.warmup_left -= 1
            return self._on_side_stream(inputs)
        if self.graph is None and not self._capture(inputs):
            return self.function(*inputs)
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _on_side_stream(self, inputs: tuple[Tensor, ...]) -> Any:
        """Call the function on the stream that the capture will use."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> bool:
        """Record the function without running it. Return False, after reporting the reason, on failure.

        A failure leaves the weights unchanged, because nothing has run. Gradients may then be memory that was
        never written; the function's next call resets them.
        """
        self.inputs = tuple(given.clone() for given in inputs)
        collecting = gc.isenabled()
        try:
            # A graph that the garbage collector destroys during the capture would break it.
            gc.collect()
            gc.disable()
            graph = torch.cuda.CUDAGraph()
            # The outer `with` restores the stream: torch.cuda.graph alone does not when its end fails.
            # thread_local: other threads may use the device meanwhile, as NCCL's watchdog does.
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            self.give_up()
            if is_out_of_memory(error):
                raise
            # The end of a failed capture raises an error of its own; the cause is the error before it.
            while error.__context__ is not None:
                error = error.__context__
            self.on_failure(
                f"the training step cannot be captured as a CUDA graph ({first_line(error)}); "
                "training continues without one"
            )
            return False
        finally:
            if collecting:
                gc.enable()
        self.graph = graph
        return True

    def give_up(self) -> None:
        """Call the function eagerly from now on."""
        self.enabled, self.graph, self.inputs, self.outputs = False, None, (), None
        if self.device.type == "cuda":
            # A failed capture leaves the random generator in capture mode, in which it cannot draw eagerly.
            # A clone has the same seed and offset, and is in no capture.
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())


def capture_together(
    functions: Sequence[Callable[..., Any]],
    device: torch.device,
    on_failure: Callable[[str], None] = print,
) -> Sequence[Callable[..., Any]]:
    """Return captured steps of which either all are replayed or none; the functions themselves on a CPU.

    When one cannot be captured, the others return to eager calls: a graph draws its random numbers from
    another part of the generator's stream than eager calls do. `on_failure` is called once.
    """
    if device.type != DEVICE_TYPE:
        return functions

    def failed(reason: str) -> None:
        for step in steps:
            step.give_up()
        on_failure(reason)

    steps = [CapturedStep(function, device, failed) for function in functions]
    return steps

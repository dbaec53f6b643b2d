"""A training step as one CUDA graph.

On a GPU, a step of many small operations takes as long as launching them one by one; a graph launches all at
once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Eager calls before the capture: in them libraries set themselves up and the optimiser makes its state.
WARMUP_CALLS = 3


class CapturedStep:
    """A function of tensors that is recorded once and then replayed on a GPU, and simply called elsewhere.

    Every call does the function's work exactly once, the eager ones before the recording too, so that what a
    training step changes (weights, optimiser, random generators) is the same with and without graphs.

    What the function must keep to, to be recorded:
        * the same shapes and the same operations at every call, and nothing that waits for the device
          (`.item()`, printing);
        * what it changes from call to call is in tensors that stay in place: a learning rate as a tensor,
          `add_` to a sum;
        * it sets gradients to None before its backward, so that the recorded backward writes them and does
          not add to them;
        * Adam with `capturable=True`;
        * its inputs are on the device.
    Its results are overwritten by the next call: use or copy them before.

    Args:
        function: takes tensors, returns a tensor, a structure of tensors or None.
        device: where it works; recorded only on a CUDA device.
        enabled: False calls it eagerly everywhere.
        generators: the random generators that it draws from, besides the device's default one.
        on_failure: told why, in one line, when recording fails; the function is called eagerly from then on.
        beside_threads: other threads use the device too (NCCL's watchdog does): what they do during the
            recording neither enters it nor breaks it.

    Raises:
        ValueError: at the recording, an input that is not a tensor on the device.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        enabled: bool = True,
        generators: Iterable[torch.Generator] = (),
        on_failure: Callable[[str], None] = print,
        beside_threads: bool = False,
    ):
        self.function = function
        self.device = torch.empty(0, device=device).device  # 'cuda' becomes 'cuda:0', as tensors have it
        self.generators = list(generators)
        self.on_failure = on_failure
        self.capture_error_mode = "thread_local" if beside_threads else "global"
        self.enabled = enabled and device.type == "cuda"
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
        """A plain call, on the kind of stream that recording will use."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> bool:
        """Records the function without running it. False, with the reason told, if that cannot be done.

        A failure half-way leaves the weights as they were, as nothing has run. Gradients may then be memory
        that was never written; the function's next call sets them to None.
        """
        for number, given in enumerate(inputs):
            # A copy from the host would be recorded with its present address, or not at all.
            if not isinstance(given, Tensor) or given.device != self.device:
                found = f"one on {given.device}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
                raise ValueError(f"input {number} of a captured step must be on {self.device}, got {found}")
        self.inputs = tuple(given.clone() for given in inputs)
        collecting = gc.isenabled()
        try:
            # A graph that the garbage collector destroyed during the recording would break it.
            gc.collect()
            gc.disable()
            graph = torch.cuda.CUDAGraph()
            if hasattr(graph, "register_generator_state"):  # may go: later versions do this at the first use
                for generator in self.generators:
                    graph.register_generator_state(generator)
            # The outer `with`: torch.cuda.graph alone leaves its stream the current one when its end fails.
            mode = self.capture_error_mode
            with (
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode),
            ):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:  # what torch raises when CUDA refuses
            self.give_up()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.on_failure(f"the step cannot be captured as a CUDA graph ({reason}); going on without")
            return False
        finally:
            if collecting:
                gc.enable()
        self.graph = graph
        return True

    def give_up(self) -> None:
        """From now on the function is called eagerly, with the random generators where they are."""
        self.enabled, self.graph, self.inputs, self.outputs = False, None, (), None
        self._release_generators()

    def _release_generators(self) -> None:
        """Takes random generators out of the capture in which a failed end leaves them.

        In it they refuse to draw eagerly. A clone has the same seed and offset, and is in no capture.
        """
        generators = self.generators
        if self.device.type == "cuda":
            generators = [*generators, torch.cuda.default_generators[self.device.index]]
        for generator in generators:
            if generator.device.type == "cuda":
                generator.graphsafe_set_state(generator.clone_state())


def capture_together(
    functions: Iterable[Callable[..., Any]], on_failure: Callable[[str], None] = print, **options: Any
) -> list[CapturedStep]:
    """Captured steps of which all are replayed or none: when one cannot be recorded, the others are given up.

    A graph that was recorded before draws its random numbers from where the eager draws do not look.

    Args:
        functions: one for each step.
        on_failure: as CapturedStep takes it; called once.
        options: further arguments of CapturedStep, the same for all.
    """

    def failed(reason: str) -> None:
        for step in steps:
            step.give_up()
        on_failure(reason)

    steps = [CapturedStep(function, on_failure=failed, **options) for function in functions]
    return steps

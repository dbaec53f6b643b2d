"""Training in several processes, on one host or many, as torchrun starts them.

Each process has the full model and an equal shard of the batch. Gradients are summed over all processes,
so that N processes take the step that one process would take. NCCL carries gradients between GPUs, gloo
between CPUs. Small messages (stop requests, checkpoints, file names) always use gloo, so that no GPU waits
for them. With a single process, every method of `Processes` returns its argument.

Only the main process, rank 0, prints results and writes files.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from training import console, devices
from training.console import UserError

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

# How long a process waits for the others. Reading WikiText-103 without its cache takes about three minutes.
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes that train together.

    Attributes:
        rank: from 0 to world_size - 1; 0 is the main process.
        world_size: number of processes on all hosts.
        local_rank: number of this process on its host, and of its GPU.
        control: gloo's group for small messages; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints results and writes files."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command that starts a script in as many processes on this host."""
        count = os.environ.get("LOCAL_WORLD_SIZE", self.world_size)
        return "python" if self.alone else f"torchrun --nproc-per-node={count}"

    @property
    def facts(self) -> dict[str, Any]:
        """The number of processes and the launcher, for args.json."""
        return {"processes": self.world_size, "launcher": self.launcher}

    def shard(self, count: int) -> slice:
        """Return this process's part of `count` items: consecutive items, in the order of the ranks.

        Parts differ by at most one item. With fewer items than processes, some parts are empty.
        """
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, bit for bit the same everywhere, and return it."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def all_max(self, *numbers: int) -> list[int]:
        """Return the largest of each number over all processes."""
        if self.alone:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def agree(self, interrupts: console.Interrupts, request: bool = False) -> tuple[bool, bool]:
        """Return whether any process has received a stop signal, and the main process's request.

        All processes must call this between steps. All get the same answer, so they save and stop at the same
        step. `interrupts.requested` is then the same in all of them.
        """
        number = signal.Signals[interrupts.requested].value if interrupts.requested else 0
        number, requested = self.all_max(number, request and self.is_main)
        if number and not interrupts.requested:
            interrupts.requested = signal.Signals(number).name
        return bool(number), bool(requested)

    def broadcast(self, function: Callable[[], Any]) -> Any:
        """Call a function in the main process and return its result in all of them."""
        if self.alone:
            return function()
        box = [function() if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Return the values of all processes, by rank, in the main process, and None in the others."""
        if self.alone:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    @contextlib.contextmanager
    def one_per_host_first(self) -> Iterator[None]:
        """Run the block in one process per host, and afterward in the others, which find its files."""
        if self.local_rank != 0:
            self.all_max(0)
        yield
        if self.local_rank == 0:
            self.all_max(0)

    def share_weights(self, model: nn.Module) -> None:
        """Copy the main process's weights to all processes, whose hardware may round differently."""
        if self.alone:
            return
        with torch.no_grad():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def seed_apart(self, seed: int, step: int = 0) -> None:
        """Give each process its own random numbers (dropout), from the run's seed, its rank and the step.

        At step 0 the main process keeps its generators, which are those of a run in one process.
        """
        if self.rank > 0 or step > 0:
            sequence = np.random.SeedSequence((seed, self.rank, step))
            torch.manual_seed(int(sequence.generate_state(1)[0]))

    def restore_random_states(
        self, states: Sequence[dict[str, Any]], device: torch.device, seed: int, step: int
    ) -> None:
        """Restore this process's random generators from those of all ranks.

        If the number of processes or of GPUs has changed, seed them from the run's seed, the rank and the
        step instead.
        """
        if len(states) == self.world_size and devices.restore_random_states(states[self.rank], device):
            return
        self.seed_apart(seed, max(step, 1))
        if self.is_main:
            console.warn(
                "the number of processes or GPUs has changed since the run was saved: dropout continues "
                "with other random numbers"
            )

    def check_batch(self, flag: str, batch_size: int, micro_batches: int = 1) -> None:
        """Raise UserError unless a batch divides equally among processes and micro-batches."""
        parts = self.world_size * micro_batches
        if batch_size % parts == 0:
            return
        below = batch_size // parts * parts
        raise UserError(
            f"{flag} {batch_size} is not a multiple of {parts} (processes x --accumulate). Try "
            f"{f'{below} or ' if below else ''}{below + parts}."
        )


ALONE = Processes()


# ---- start and end


def from_environment() -> Processes:
    """Return the rank and the number of processes from torchrun's variables, without communication.

    Raises:
        UserError: there are several processes, but a variable is missing.
    """
    # Clusters and containers set some of the variables for a single process too.
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return ALONE
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"the environment sets WORLD_SIZE but not {name}. Start with torchrun "
                "--nproc-per-node=N SCRIPT.py ..., or unset WORLD_SIZE to train in one process."
            )
    return Processes(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def start(args: argparse.Namespace) -> tuple[torch.device, Processes]:
    """Choose device and threads, and connect to the other processes, if torchrun has started any.

    Args:
        args: the flags `cuda`, `strict_float32` and `threads`, which is set to the number in use.

    Raises:
        UserError: as `from_environment` and `devices.choose_device`.
    """
    found = from_environment()
    device = devices.choose_device(args.cuda, args.strict_float32, None if found.alone else found.local_rank)
    args.threads = devices.choose_threads(args.threads, device)
    if found.alone:
        return device, found
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        control = dist.group.WORLD
    print(f"processes: {found.world_size}", flush=True)
    return device, replace(found, control=control)


def run_script(main: Callable[[], int | None], lower: str = "the batch size") -> NoReturn:
    """Run a script as `console.run_script` does, in a process that torchrun may have started.

    Only the main process prints results, warnings and a progress bar. Any process that fails prints the
    reason; torchrun then stops the others.
    """
    rank, world_size = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    if world_size == 1:
        console.run_script(main, lower)
    errors, status = sys.stderr, 1
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)

    def report(message: str) -> None:
        print(f"error: in process {rank} of {world_size}: {message}", file=errors, flush=True)

    try:
        console.run_script(main, lower, report)
    except SystemExit as end:
        status = end.code
    except Exception:
        report(traceback.format_exc())
    sys.stdout.flush()
    # Skip the usual clean-up, in which a group that has lost a member may wait forever.
    os._exit(status)


# ---- gradients


class FlatGradients:
    """The gradients of a model as views of one tensor, into which backward passes add.

    One all-reduce sums everything after the backward pass. DistributedDataParallel would send parts of the
    gradient during the backward pass, but a CUDA graph can contain the backward pass only without
    communication, and launching the RMC's many small operations one by one costs more than the overlap saves.
    The micro-batches of `--accumulate` add into the same tensor.

    Args:
        parameters: of one dtype and on one device; their `grad` is set and must stay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        first = parameters[0]
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for parameter, part in zip(parameters, self.flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

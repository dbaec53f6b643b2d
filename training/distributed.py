"""Training in several processes, on one host or many: what torchrun starts, on torch.distributed.

torchrun starts one command several times and tells each process by environment variables which one it is.
Each process holds the whole model and an equal share of the batch; gradients are added up over all of them,
so that N processes take the step that one would take. NCCL carries the gradients between GPUs, gloo between
CPUs; small messages (stop requests, checkpoints, file names) always go over gloo, on the host, for which no
GPU has to wait.

A process that is alone talks to nobody: every method of `Processes` then returns at once what it was given.

Of several processes only the main one, rank 0, prints and writes files.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from training import console, devices, flags, runs
from training.console import UserError

# What torchrun sets, as far as it is needed here.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Each of these alone shows that several processes were meant; the others are set on many clusters anyway.
TELLING = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

# A process that fails only because another one did leaves it this long to give the reason.
WAIT_FOR_REASON = 10.0


class LostContact(Exception):
    """Another process has ended, or has not answered within the time limit."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about the parts that a batch is dealt to."""
    group = parser.add_argument_group("parts of a batch (torchrun deals it to processes)")
    group.add_argument(
        "--accumulate",
        type=flags.positive_int,
        default=1,
        metavar="PIECES",
        help="pieces of a process's share of the batch, taken one after the other, their gradients added up: "
        "the same step in less memory",
    )
    group.add_argument(
        "--collective-timeout",
        type=flags.positive_float,
        default=600.0,
        metavar="SECONDS",
        help="how long a process waits for the others before it gives up; more than the first reading of a "
        "corpus takes",
    )


# ---- the processes


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: from 0 to world_size - 1; 0 is the main process.
        world_size: number of processes on all hosts.
        local_rank: number of this process on its host, and of the GPU that it takes.
        restarts: how often torchrun has started all processes again after one had failed.
        control: the group for small messages, gloo's; None before `start` and for a process that is alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0
    control: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """What to type before a script's name to start as many processes again on this host."""
        here = os.environ.get("LOCAL_WORLD_SIZE", str(self.world_size))
        return "python" if self.alone else f"torchrun --nproc-per-node={here}"

    @property
    def facts(self) -> dict[str, Any]:
        """How many processes train, and how they were started, for the record of a run."""
        return {"processes": self.world_size, "launcher": self.launcher}

    def share(self, count: int) -> slice:
        """This process's part of `count` things in a row: neighbours, dealt out in the order of the ranks.

        Parts differ by at most one; where there are fewer things than processes, the last ranks have none.
        """
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor by its sum over all processes, the same bits everywhere, and returns it."""
        if not self.alone:
            with _contact():
                dist.all_reduce(tensor)
        return tensor

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes. The host waits for the others, no GPU does."""
        if self.alone:
            return list(numbers)
        tensor = torch.tensor(numbers)
        with _contact():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def agree(self, interrupts: console.Interrupts, *wishes: bool) -> list[bool]:
        """Whether any process was asked to stop, and which of the wishes the main process has.

        The answer is the same in all, so that they save and stop at the same step; `interrupts` then says in
        all of them what signal it was. To be called between steps, by all.
        """
        asked = signal.Signals[interrupts.requested].value if interrupts.requested else 0
        asked, *wishes = self.largest(asked, *(wish and self.is_main for wish in wishes))
        if asked and not interrupts.requested:
            interrupts.requested = signal.Signals(asked).name
        return [bool(asked), *map(bool, wishes)]

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Calls a function in the main process and returns there and everywhere what it returned.

        An exception ends the main process, and with it the others (see `run_script`).
        """
        if self.alone:
            return function()
        box = [function() if self.is_main else None]
        with _contact():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    @contextlib.contextmanager
    def run_folder(self, args: argparse.Namespace, script: str) -> Iterator[Path]:
        """The folder to train in, that of --resume or a new one, locked by the main process meanwhile.

        Raises:
            UserError: as `runs.create_run_folder`, or another process trains in it.
        """
        if args.resume is not None:
            folder = Path(args.resume)
        else:
            folder = self.from_main(lambda: runs.create_run_folder(args.runs_folder, args.name, script))
        with runs.locked(folder) if self.is_main else contextlib.nullcontext():
            yield folder

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes, by rank, in the main process; None in the others."""
        if self.alone:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        with _contact():
            dist.gather_object(value, values, dst=0, group=self.control)
        return values

    @contextlib.contextmanager
    def one_per_host_first(self) -> Iterator[None]:
        """The block is run by one process per host and then by the others, who find its files."""
        if self.local_rank != 0:
            self.largest(0)
        yield
        if self.local_rank == 0:
            self.largest(0)

    def check_same(self, what: str, value: Any) -> None:
        """UserError unless all processes have the main process's value."""
        if self.from_main(lambda: value) != value:
            raise UserError(
                f"{what} differs between the hosts. Give all of them the same files, on a disk they share."
            )

    def share_weights(self, model: nn.Module) -> None:
        """Gives all processes the main process's weights: other hardware may round its own differently."""
        if self.alone:
            return
        with torch.no_grad(), _contact():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def draw_apart(self, seed: int, step: int = 0) -> None:
        """Gives each process random numbers (dropout) of its own, from the run's seed, rank and step.

        At step 0 the main process keeps the stream that it has, that of a run in one process.
        """
        if self.rank > 0 or step > 0:
            devices.seed_everything(int(np.random.SeedSequence((seed, self.rank, step)).generate_state(1)[0]))

    def restore_random_states(self, states: Sequence[dict[str, Any]], seed: int, step: int) -> None:
        """Puts back this process's random generators from those of all, by rank.

        When they were of another number of processes, each draws from a new stream: that of `draw_apart`.
        """
        if len(states) == self.world_size:
            devices.restore_random_states(states[self.rank])
            return
        self.draw_apart(seed, max(step, 1))
        if self.is_main:
            console.warn(
                f"the run was in {len(states)} process{'es' * (len(states) > 1)}, now it is in "
                f"{self.world_size}: dropout goes on with other random numbers"
            )

    def check_batch(self, flag: str, batch_size: int, pieces: int = 1) -> None:
        """UserError unless a batch can be dealt out to the processes and cut into so many pieces each."""
        parts = self.world_size * pieces
        if batch_size % parts == 0:
            return
        below = batch_size // parts * parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        shares = [] if self.alone else [f"{self.world_size} processes"]
        shares += [f"--accumulate {pieces}"] if pieces > 1 else []
        raise UserError(
            f"{flag} {batch_size} does not divide by {parts} ({' x '.join(shares)}): each process and piece "
            f"must have as many. Try {nearest}."
        )


ALONE = Processes()


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    """Turns what torch.distributed raises when another process is gone or silent into LostContact."""
    try:
        yield
    except RuntimeError as error:
        if console.is_out_of_memory(error):
            raise
        raise LostContact((str(error).strip() or type(error).__name__).splitlines()[0]) from None


# ---- start and end


def from_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """The place among the processes that torchrun has started, not yet in contact with them.

    Raises:
        UserError: the environment is torchrun's only in part, or contradicts itself.
    """
    if not any(environment.get(name) for name in TELLING):
        return ALONE
    missing = [name for name in VARIABLES if not environment.get(name)]
    present = [f"{name}={environment[name]}" for name in VARIABLES if environment.get(name)]
    advice = (
        "Start with torchrun --nproc-per-node=N SCRIPT.py ..., which sets all of them, or unset them to "
        "train in one process."
    )
    if missing:
        raise UserError(
            f"{', '.join(present)} is set as for several processes, but {', '.join(missing)} is not. {advice}"
        )
    numbers = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(value.isascii() and value.isdecimal() for value in numbers.values()) or not (
        int(numbers["RANK"]) < int(numbers["WORLD_SIZE"])
        and int(numbers["LOCAL_RANK"]) <= int(numbers["RANK"])
    ):
        found = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise UserError(f"RANK must be below WORLD_SIZE and LOCAL_RANK at most RANK, got {found}. {advice}")
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Processes(
        *(int(number) for number in (numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def start(args: argparse.Namespace) -> tuple[torch.device, Processes]:
    """Chooses the device and comes into contact with the other processes, if torchrun has started any.

    Args:
        args: cuda, threads, strict_float32 and collective_timeout, as the flags give them.

    Raises:
        UserError: as `from_environment` and `devices.choose_device`.
        LostContact: the others are not there.
    """
    place = from_environment()
    own_gpu = None if place.alone else place.local_rank
    device = devices.choose_device(args.cuda, args.threads, args.strict_float32, own_gpu)
    if place.alone:
        return device, place
    limit = datetime.timedelta(seconds=args.collective_timeout)
    with _contact():
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_fresh_part(store, rank, world_size, args.collective_timeout),
            rank=rank,
            world_size=world_size,
            timeout=limit,
        )
        control = dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else dist.group.WORLD
    processes = replace(place, control=control)
    asked = {name: value for name, value in vars(args).items() if name != "threads"}
    processes.check_same("what the command line asks for, or the run folder that it names,", asked)
    print(f"processes: {place.world_size}", flush=True)
    return device, processes


def _fresh_part(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """A part of torchrun's key-value store into which no earlier processes have written.

    torchrun keeps its store when it starts all processes again, and with it the addresses of those that are
    gone; the number of restarts that it tells need not be the same on all hosts. So the main process answers
    each of the others, who ask under names never used before.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        part = store.get(f"answer/{question}").decode()  # waits for it
        store.set(f"{part}/{rank}", "heard")
        return dist.PrefixStore(part, store)
    part, silent, end = uuid.uuid4().hex, set(range(1, world_size)), time.monotonic() + timeout
    while silent:
        if time.monotonic() > end:
            raise RuntimeError(f"no word from ranks {sorted(silent)} within {timeout:g} s")
        for rank in list(silent):
            if store.check([f"question/{rank}"]):  # perhaps an old one still: then ask again
                store.set(f"answer/{store.get(f'question/{rank}').decode()}", part)
            if store.check([f"{part}/{rank}"]):
                silent.remove(rank)
        time.sleep(0.01)
    return dist.PrefixStore(part, store)


def arguments_to_go_on(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Sequence[str] | None:
    """The command line; with --resume where torchrun may restart and the run that it names has begun.

    Restarted processes know nothing but their command line, the one that began the run. Hence --name. A whole
    torchrun that is given again after all of it has failed goes on in the same way.

    Raises:
        UserError: restarts are allowed, but the command line does not name the run.
    """
    allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if allowed == "0":
        return argv
    args = parser.parse_args(argv)
    if args.resume is not None or args.evaluate is not None:
        return argv
    if args.name is None:
        raise UserError(
            f"torchrun --max-restarts={allowed} needs --name NAME behind the script's name: by it the "
            "restarted processes find the run that they are to go on with."
        )
    folder = Path(args.runs_folder) / args.name
    if (folder / "args.json").is_file():
        return [*(sys.argv[1:] if argv is None else argv), "--resume", str(folder)]
    if from_environment().is_main:
        runs.discard_unbegun_run_folder(folder)
    return argv


def run_script(main: Callable[[], int | None], lower: str = "the batch size") -> NoReturn:
    """`console.run_script` for scripts that torchrun may start.

    Only the main process prints. When several processes fail, the first to do so says why; one that has only
    lost contact to the others speaks if none of them does. All end with a status that is not 0.
    """
    try:
        place = from_environment()
    except UserError as error:
        console.run_script(_raiser(error), lower)
    if place.alone:
        console.run_script(main, lower)
    failure = _Failure(place)
    if not place.is_main:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)

    def main_and_end() -> int | None:
        status = main()
        if dist.is_initialized():
            with _contact():
                dist.barrier(group=dist.group.WORLD)
            dist.destroy_process_group()
        return status

    try:
        console.run_script(main_and_end, lower, failure.tell)
    except SystemExit as end:  # argparse has printed its own message, where printing is on
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status == console.EXIT_USER_ERROR and not failure.is_told:
            failure.leave_to_main()
    except LostContact as error:
        status = 1
        failure.tell_lost(str(error))
    except BaseException:
        status = 1
        failure.tell(traceback.format_exc().rstrip())
    sys.stdout.flush()
    if failure.is_told:
        # Without the usual clean-up: a group that has lost a member may wait for it there for ever.
        os._exit(status)
    sys.exit(status)


def _raiser(error: Exception) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


class _Failure:
    """The end of a process that failed, arranged with the others over torchrun's key-value store.

    The connection is made when it is needed, as other connections may be what has failed.
    """

    def __init__(self, place: Processes) -> None:
        self.place = place
        self.is_told = False  # nothing is left to say for this process

    def tell(self, reason: str) -> None:
        """Prints the reason unless another process was faster, which is then waited for."""
        self.is_told = True
        store = self.store()
        try:
            first = store is None or store.add("failures", 1) == 1
        except RuntimeError:
            store, first = None, True
        if first:
            where = "" if self.place.is_main else f" in process {self.place.rank} of {self.place.world_size}"
            print(f"error{where}: {reason}", file=sys.__stderr__, flush=True)
            if store is not None:
                with contextlib.suppress(RuntimeError):
                    store.set("told", "yes")
        else:
            self.wait(store)

    def tell_lost(self, reason: str) -> None:
        """Says that contact was lost, if within a while no other process says why."""
        self.is_told = True
        if not self.wait(self.store()):
            self.tell(
                f"lost contact to another process ({reason}). It was killed, or it did not answer within "
                "--collective-timeout. The run folder keeps its last.pt."
            )

    def leave_to_main(self) -> None:
        """The same mistake of the user in all processes, which the main one has told already."""
        self.is_told = True
        if self.place.is_main:
            if (store := self.store()) is not None:
                with contextlib.suppress(RuntimeError):
                    store.set("told", "yes")
        else:
            self.wait(self.store())

    def store(self) -> Any:
        """The keys of this start of the processes, or None if there is no store (any more)."""
        try:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=datetime.timedelta(seconds=5),
            )
            return dist.PrefixStore(f"relational_rnn/{self.place.restarts}", store)
        except (RuntimeError, ValueError):
            return None

    def wait(self, store: Any) -> bool:
        """Waits until some process has given its reason; False if none does within WAIT_FOR_REASON."""
        if store is None:
            return False
        try:
            store.wait(["told"], datetime.timedelta(seconds=WAIT_FOR_REASON))
        except RuntimeError:
            return False
        return True


# ---- gradients


class FlatGradients:
    """The gradients of a model as views of one tensor, into which backward passes add.

    One all-reduce adds up everything after the backward pass. Why not DistributedDataParallel, which sends
    parts while the backward pass is still at work: a CUDA graph may then hold the backward pass and no
    communication, so that graphs stay in use with several GPUs, where launching an RMC's many small
    operations one by one costs more than the sending does; and there is little to overlap, as the largest
    gradient, that of the embedding tied to the softmax, is complete only at the very end, and the core's
    weights get theirs all at once after its last time step. Besides, pieces of a batch (`--accumulate`) add
    into the same place.

    Args:
        parameters: of one type and on one device; their `grad` is set, for good.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        for parameter, part in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

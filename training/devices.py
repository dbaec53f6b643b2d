"""Devices, random numbers and memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from training.console import UserError

# ---- randomness, devices


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all random number generators, as plain data for a checkpoint."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` returned; GPU states only where the number of GPUs is the same."""
    torch.set_rng_state(states["torch"].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def choose_device(
    cuda: bool, threads: int = 0, strict_float32: bool = False, own_gpu: int | None = None
) -> torch.device:
    """The device to compute on, said in one line.

    Args:
        cuda: the user asked for the GPU.
        threads: CPU threads for torch, 0 for its own choice.
        strict_float32: keep a GPU from rounding the products' factors to TF32.
        own_gpu: the number of the one GPU that this process is to use, the others being for processes
            beside it; None where it has them all.

    Raises:
        UserError: a GPU was asked for and there is none that torch can use, or too few for the processes.
    """
    if threads:
        torch.set_num_threads(threads)
    if not cuda:
        unused = " (a GPU is there and unused: --cuda uses it)" if torch.cuda.is_available() else ""
        print(f"device: CPU, {torch.get_num_threads()} threads{unused}", flush=True)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            "torch was installed without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        )
        raise UserError(
            f"--cuda was given but {why} (torch {torch.__version__}). Leave --cuda away to run on the CPU, "
            "or install a CUDA build of torch and check that nvidia-smi lists the GPU."
        )
    torch.set_float32_matmul_precision("highest" if strict_float32 else "high")
    torch.backends.cudnn.allow_tf32 = not strict_float32
    count = torch.cuda.device_count()
    if own_gpu is not None:
        if own_gpu >= count:
            raise UserError(
                f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', f'at least {own_gpu + 1}')} processes "
                f"on this host, but torch finds {count} GPU{'s' * (count != 1)} here, and each process needs "
                f"its own. Use --nproc-per-node={count}."
            )
        torch.cuda.set_device(own_gpu)
        print(f"device: GPU {torch.cuda.get_device_name(own_gpu)}, one for each process", flush=True)
        return torch.device("cuda", own_gpu)
    print(
        f"device: {count} x GPU {torch.cuda.get_device_name(0)}"
        if count > 1
        else f"device: GPU {torch.cuda.get_device_name(0)}",
        flush=True,
    )
    return torch.device("cuda", 0)


# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Has the C library keep freed memory for the next allocation; False if it cannot be told (not glibc).

    A training step on a CPU takes and frees hundreds of megabytes in large pieces. glibc returns pieces of
    more than 32 MB to the system at once and others when enough of them are free, and the system then clears
    every page anew. `benchmark.py --give-back-memory` times what that costs. The process stays as large as it
    once was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


def check_model_fits(build: Callable[[], nn.Module], device: torch.device) -> None:
    """Refuses a model that cannot be trained in the memory there is, before any of it is used.

    Systems that promise more memory than they have kill a process that takes them at their word.

    Args:
        build: makes the model; called once, for shapes only.
        device: where it is to be trained.

    Raises:
        UserError: weights, gradients and Adam's two moments together exceed the device's memory.
        ValueError: as `build` does.
    """
    try:
        with torch.device("meta"):
            needed = 4 * sum(weight.numel() * weight.element_size() for weight in build().parameters())
    except (RuntimeError, OverflowError) as error:  # products of sizes beyond 64 bits
        reason = str(error).splitlines()[0]
        raise UserError(f"a model of these sizes cannot be built ({reason}). Lower its sizes.") from None
    if device.type == "cuda":
        present = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > present:
        raise UserError(
            f"a model of these sizes needs {needed / 1e9:,.1f} GB for weights, gradients and optimiser, but "
            f"{device.type} memory has {present / 1e9:,.1f} GB in all. Lower the sizes."
        )


def replica_count(gpus: int, batch_size: int) -> int:
    """Among how many of the GPUs DataParallel divides a batch.

    Its pieces are equal but for the last, so that 20 examples on 8 GPUs are 7 pieces of 3 or fewer. A replica
    without examples would be called without arguments.
    """
    count = max(1, min(gpus, batch_size))
    return -(-batch_size // -(-batch_size // count))


def wrap_data_parallel(model: nn.Module, device: torch.device, batch_size: int) -> nn.Module:
    """The model as it is, or spread over the visible GPUs along the batch, at most one GPU per example.

    Arguments and results of the model's forward have the batch (or one row per replica) as first dimension.
    """
    count = replica_count(torch.cuda.device_count(), batch_size) if device.type == "cuda" else 1
    return Replicas(model, device_ids=list(range(count))) if count > 1 else model


class Replicas(nn.DataParallel):
    """DataParallel whose replicas compute in the precision that autocast has where they are called.

    torch tells the replicas' threads that autocast is on and not its type, and a thread begins with float16.
    """

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Any, kwargs: Any) -> list[Any]:
        """Calls each replica with its part of the inputs, in a thread of its own."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def call(replica: nn.Module, *given: Any, **named: Any) -> Any:
            with torch.autocast("cuda", dtype, enabled=enabled):
                return replica(*given, **named)

        calls = [functools.partial(call, replica) for replica in replicas]
        return super().parallel_apply(calls, inputs, kwargs)

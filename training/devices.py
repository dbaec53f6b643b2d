"""Devices, threads, memory, replicas and random numbers."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.console import UserError

import torch
from torch import nn

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# ---- devices


def choose_device(cuda: bool, strict_float32: bool = False, own_gpu: int | None = None) -> torch.device:
    """Return the device to compute on, and print it if it is a GPU. On a CPU, round subnormal numbers to 0.

    Args:
        cuda: use the GPU.
        strict_float32: compute matrix products in float32, not in TF32, on a GPU.
        own_gpu: index of the one GPU that this process may use; None for all of them.

    Raises:
        UserError: there is no usable GPU, or none for this process.
    """
    if not cuda:
        # Arithmetic with subnormal numbers is many times slower, and vanishing gradients and Adam's averages
        # of them become such numbers. The threads that torch starts later inherit the setting.
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"--cuda was given but torch {torch.__version__} finds no usable GPU. Omit --cuda to run on the "
            "CPU, or install a CUDA build of torch and check that nvidia-smi lists the GPU."
        )
    torch.set_float32_matmul_precision("highest" if strict_float32 else "high")
    torch.backends.cudnn.allow_tf32 = not strict_float32
    count = torch.cuda.device_count()
    if own_gpu is not None:
        if own_gpu >= count:
            raise UserError(
                f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', f'at least {own_gpu + 1}')} processes "
                f"on this host, but torch finds {count} GPU{'s' * (count != 1)}, and each process needs one. "
                f"Use --nproc-per-node={count}."
            )
        torch.cuda.set_device(own_gpu)
        print(f"device: GPU {torch.cuda.get_device_name(own_gpu)}, one for each process", flush=True)
        return torch.device("cuda", own_gpu)
    many = f"{count} x " if count > 1 else ""
    print(f"device: {many}GPU {torch.cuda.get_device_name(0)}", flush=True)
    return torch.device("cuda", 0)


def choose_threads(requested: int, device: torch.device) -> int:
    """Set the number of CPU threads that torch uses, print it and return it.

    Args:
        requested: the number; 0 divides the available cores among the processes of this host, and takes one
            thread for training on a GPU.
        device: where to compute.
    """
    share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = requested or (max(1, share) if device.type == "cpu" else 1)
    torch.set_num_threads(threads)
    if device.type == "cpu":
        unused = " (--cuda uses the GPU)" if torch.cuda.is_available() else ""
        print(f"device: CPU, {threads} thread{'s' * (threads > 1)}{unused}", flush=True)
    return threads


def available_cores() -> int:
    """Return how many cores this process may use, from its CPU affinity and the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # cgroup version 2: "QUOTA PERIOD" in microseconds, or "max PERIOD"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation. Return False with another C library.

    A training step on a CPU allocates and frees hundreds of megabytes in large blocks. By default glibc
    returns them to the system, which then zeroes every page.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))


# ---- several GPUs in one process


def wrap_data_parallel(model: nn.Module, device: torch.device, batch_size: int) -> nn.Module:
    """Return the model, or with several visible GPUs its replicas, which divide the batch.

    Arguments and results of the model's forward have the batch, or one row per replica, as first dimension.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    rows = -(-batch_size // max(1, min(count, batch_size)))
    count = -(-batch_size // rows)  # DataParallel makes parts of this many rows; none may be empty
    return Replicas(model, device_ids=list(range(count))) if count > 1 else model


class Replicas(nn.DataParallel):
    """DataParallel with the caller's autocast type in the replicas.

    torch passes on to the replicas' threads whether autocast is enabled, but not its type: they would use
    float16.
    """

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Any, kwargs: Any) -> list[Any]:
        """Call each replica with its part of the inputs, in its own thread."""
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

        def call(replica: nn.Module, *given: Any, **named: Any) -> Any:
            with torch.autocast("cuda", dtype, enabled=enabled):
                return replica(*given, **named)

        calls = [functools.partial(call, replica) for replica in replicas]
        return super().parallel_apply(calls, inputs, kwargs)


# ---- random numbers


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's random number generators for a checkpoint of a run on this device."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in range(gpus)],
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> bool:
    """Restore what `random_states` returned, for a run on this device.

    Returns:
        False if GPU states are needed and were not restored, because the number of visible GPUs has changed.
    """
    torch.set_rng_state(states["torch"].cpu())
    if device.type != "cuda":
        return True
    if len(states["cuda"]) != torch.cuda.device_count():
        return False
    for gpu, state in enumerate(states["cuda"]):
        torch.cuda.set_rng_state(state.cpu(), gpu)
    return True

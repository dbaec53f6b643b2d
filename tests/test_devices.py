"""Devices, threads, replicas and random numbers."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from training import devices
from training.console import UserError
from training.devices import available_cores  # conftest.py replaces devices.available_cores

import pytest
import torch
from torch import nn

CPU = torch.device("cpu")


# ---- devices


def test_process_without_its_own_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="started 3 processes .* finds 1 GPU, .* Use --nproc-per-node=1."):
        devices.choose_device(True, own_gpu=1)


def test_subnormal_numbers_are_rounded_to_0_in_all_threads():
    program = """
import torch
from training import devices

torch.set_num_threads(2)
devices.choose_device(False)
left = torch.full((1 << 20,), 1e-30).mul(1e-10).count_nonzero().item()
print(left if torch.set_flush_denormal(True) else 0)  # False: the processor has no such setting
"""
    home = Path(devices.__file__).parent.parent
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=home).stdout == "0\n"


# ---- threads


@pytest.mark.parametrize(
    "affinity, quota, cores",
    [
        (6, None, 6),
        (6, "max 100000\n", 6),
        (6, "350000 100000\n", 3),
        (2, "350000 100000\n", 2),
        (6, "50000 100000\n", 1),
    ],
)
def test_available_cores_respect_affinity_and_cgroup(monkeypatch, affinity, quota, cores):
    def read_text(path):
        if quota is None:
            raise FileNotFoundError
        return quota

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_cores() == cores


@pytest.mark.parametrize(
    "requested, device, processes, gpu, threads, printed",
    [
        (0, "cpu", 1, False, 5, "device: CPU, 5 threads\n"),
        (0, "cpu", 2, False, 2, "device: CPU, 2 threads\n"),
        (0, "cpu", 9, True, 1, "device: CPU, 1 thread (--cuda uses the GPU)\n"),
        (7, "cpu", 2, False, 7, "device: CPU, 7 threads\n"),
        (0, "cuda", 1, True, 1, ""),
        (3, "cuda", 1, True, 3, ""),
    ],
)
def test_threads_are_those_of_the_machine_or_the_flag(
    monkeypatch, capsys, requested, device, processes, gpu, threads, printed
):
    used = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(devices, "available_cores", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert devices.choose_threads(requested, torch.device(device)) == threads
    assert used == [threads] and capsys.readouterr().out == printed


# ---- memory


def test_freed_memory_is_kept_for_the_next_allocation():
    """In another process: what other tests have left in the heap decides where pieces fit."""
    program = """
import resource, torch
from training import devices

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(48 << 20, dtype=torch.uint8)  # more than glibc keeps by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned, kept = faults(20), devices.keep_freed_memory()
faults(20)  # glibc needs some aligned pieces before it finds a freed one that fits
print(faults(20) < returned / 5 if kept else "no glibc")
"""
    home = Path(devices.__file__).parent.parent
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=home).stdout != "False\n"


# ---- several GPUs in one process


def test_no_replica_is_without_examples(monkeypatch):
    monkeypatch.setattr(devices, "Replicas", lambda model, device_ids: len(device_ids))
    for gpus in range(1, 9):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # noqa: B023
        for rows in range(1, 30):
            count = devices.wrap_data_parallel(None, torch.device("cuda"), rows) or 1
            # DataParallel cuts a batch as `chunk` does, into as many pieces or fewer.
            assert len(torch.arange(rows).chunk(count)) == count == len(torch.arange(rows).chunk(gpus))
    assert devices.wrap_data_parallel(None, CPU, 20) is None


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replicas_compute_in_the_precision_of_the_caller(monkeypatch, dtype):
    """Without GPUs, this calls each replica in a new thread, as torch does."""
    seen = []

    def in_threads(self, replicas, inputs, kwargs):
        for replica, given, named in zip(replicas, inputs, kwargs, strict=True):
            thread = threading.Thread(target=replica, args=given, kwargs=named)
            thread.start()
            thread.join()

    def replica(number, penalty):
        seen.append((number, penalty, torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")))

    monkeypatch.setattr(nn.DataParallel, "parallel_apply", in_threads)
    replicas = devices.Replicas.__new__(devices.Replicas)
    with torch.autocast("cuda", dtype):
        enabled = torch.is_autocast_enabled("cuda")  # only where there is a GPU
        replicas.parallel_apply([replica, replica], [(1,), (2,)], [{"penalty": 3}, {"penalty": 4}])
    assert seen == [(1, 3, dtype, enabled), (2, 4, dtype, enabled)]


# ---- random numbers


def test_run_on_the_cpu_leaves_visible_gpus_alone(monkeypatch):
    """The driver may be too old for torch; a GPU that has appeared since the save changes nothing."""

    def fail(*arguments):
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", fail)
    monkeypatch.setattr(torch.cuda, "set_rng_state", fail)
    states = devices.random_states(CPU)
    expected = torch.rand(3)
    assert devices.restore_random_states(states, CPU) and torch.equal(torch.rand(3), expected)
    assert not devices.restore_random_states(states, torch.device("cuda"))

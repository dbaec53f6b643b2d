"""One against two CPU processes on the same batch, in one run, in turns: how much faster do two train?

    python results/scaling_cpu/measure.py > results/scaling_cpu/log.txt

Each process has one thread. In every round rank 0 first takes STEPS steps alone on the whole batch, while
rank 1 sleeps in a barrier; then both take as many together, each on its half of the columns. The RMC is that
of train_rmc.py's defaults, 32 columns of 35 tokens, full softmax over 10,000 words; the text is random, which
costs the same.
"""

import os
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import distributed  # noqa: E402
import lm_training  # noqa: E402

import train_rmc  # noqa: E402
from data_utils import Corpus, Vocabulary  # noqa: E402
from training import devices, runs
from training.distributed import ALONE  # noqa: E402

V, STEPS, ROUNDS = 10_000, 3, 9
FLAGS = ["--batch_size", "32", "--bptt", "35", "--threads", "1"]


def trainer_for(processes, args):
    devices.seed_everything(args.seed)
    words = torch.randint(V, (32 * 35 * 8 + 1,), dtype=torch.int16)
    corpus = Corpus(Path("."), Vocabulary([str(i) for i in range(V)]), words, words[:200], words[:200])
    model = train_rmc.build_model(args, V, None)
    trainer = lm_training.Trainer(model, corpus, args, "rmc", torch.device("cpu"), processes)
    model.train()
    return trainer


def seconds_per_step(trainer):
    start = time.perf_counter()
    for step in range(STEPS):
        trainer.at.place = 35 * step
        trainer.step(*trainer.columns.window(trainer.at.place, 35 * (step + 1)))
    return (time.perf_counter() - start) / STEPS


def scheduling():
    """Whether the command stands before all others on the machine, as with `chrt -f 5` before it."""
    if not hasattr(os, "sched_getscheduler"):
        return "scheduling not known"
    real_time = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return f"{'real-time' if real_time else 'ordinary'} priority"


def worker(rank, port):
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    args = train_rmc.build_parser().parse_args(FLAGS)
    _, processes = distributed.start(args)
    together, alone = trainer_for(processes, args), trainer_for(ALONE, args)
    count = together.gradients.flat.numel()
    print(f"torch {torch.__version__}, {runs.describe_environment()['cpu']}, {os.cpu_count()} cores, "
          f"{scheduling()}")
    print(f"{count:,} gradients, {4 * count / 1e6:.1f} MB per all-reduce; {' '.join(FLAGS)}")
    rows = []
    for number in range(ROUNDS + 1):
        processes.largest(0)
        one = seconds_per_step(alone) if rank == 0 else 0.0
        processes.largest(0)
        two = seconds_per_step(together)
        start = time.perf_counter()
        processes.add_up(together.gradients.flat)
        exchange = time.perf_counter() - start
        if number:  # the first round warms up
            rows.append((one, two, exchange, one / max(two, 1e-9)))
            print(
                f"round {number}: {1000 * one:7.1f} ms alone, {1000 * two:7.1f} ms in two "
                f"(all-reduce {1000 * exchange:5.1f}), ratio {one / two:.3f}",
                flush=True,
            )
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    ratios = [row[3] for row in rows]
    print(f"median: {1000 * medians[0]:.1f} ms alone, {1000 * medians[1]:.1f} ms in two, all-reduce "
          f"{1000 * medians[2]:.1f} ms, ratio {medians[3]:.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.perf_counter()
    multiprocessing.spawn(worker, (port,), nprocs=2)
    print(f"wall {time.perf_counter() - begun:.0f} s")

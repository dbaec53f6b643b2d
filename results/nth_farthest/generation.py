"""How long the examples of a training step take beside the step: 1600 of 8 vectors of 16 dimensions.

    python results/nth_farthest/generation.py > results/nth_farthest/generation.txt

The step is that of train_nth_farthest.py with its defaults, drawing of the examples included. Medians, one
thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import torch  # noqa: E402
from sweep import hardware  # noqa: E402

import train_nth_farthest as script  # noqa: E402
from nth_farthest import make_batch  # noqa: E402


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call in milliseconds, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Prints both times and their ratio."""
    torch.set_num_threads(1)
    args = script.build_parser().parse_args([])
    trainer = script.Trainer(script.build_model(args), args, torch.device("cpu"))
    sizes = (args.batch_size, args.num_vectors, args.num_dims, trainer.generator)
    drawing = median_ms(lambda: make_batch(*sizes), 20)
    shown = torch.tensor([4, 8])
    easier = median_ms(lambda: make_batch(*sizes, shown=shown), 20)
    step = median_ms(trainer.step, 3)
    print(f"examples   {drawing:8.1f} ms")
    print(f"of a stage {easier:8.1f} ms   (4 vectors of 8 dimensions shown)")
    print(f"step       {step:8.1f} ms   examples are {drawing / step:.2%} of it")
    print(f"torch {torch.__version__}, {hardware()}")


if __name__ == "__main__":
    main()

"""Time training steps with one and two threads, alone and beside other training processes.

    python results/benchmark_cpu/threads.py KIND THREADS SPIN BUSY

SPIN is the value of GOMP_SPINCOUNT, or - for the default. BUSY is the number of training processes beside it.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

kind, threads, spin, busy = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if spin != "-":
    os.environ["GOMP_SPINCOUNT"] = spin
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training import devices  # noqa: E402

import torch  # noqa: E402

from nth_farthest import NthFarthestModel, loss_and_correct, make_batch  # noqa: E402
from relational_rnn_models import RelationalMemoryLM  # noqa: E402
from rnn_models import RNNLM  # noqa: E402

V = 33278
CUTOFFS = [1000, 5000, 20000]
SMALL, TASK = {"head_size": 32, "attention_mlp_layers": 2}, {"mem_slots": 3, "head_size": 16, "num_heads": 4}
MODELS = {  # model, batch, time steps, words
    "tiny": lambda: (RelationalMemoryLM(121, 128, key_size=32, **SMALL), 32, 32, 121),
    "mid": lambda: (RelationalMemoryLM(10000, 128, key_size=32, **SMALL | {"head_size": 64}), 20, 35, 10000),
    "large": lambda: (RelationalMemoryLM(V), 32, 35, V),
    "adaptive": lambda: (RelationalMemoryLM(V, cutoffs=CUTOFFS), 32, 35, V),
    "lstm": lambda: (RNNLM(V, "LSTM", 184, 960, tied=True, fused=True, project=True), 32, 35, V),
    "nthsmall": lambda: (NthFarthestModel(3, 1, **TASK, head_units=64), 128, 0, 0),
    "nth": lambda: (NthFarthestModel(), 400, 0, 0),
}

torch.set_num_threads(threads)
devices.keep_freed_memory()
model, batch, steps, words = MODELS[kind]()
optimizer = torch.optim.Adam(model.parameters(), fused=True)
generator = torch.Generator().manual_seed(1)
text = torch.randint(max(words, 1), (batch, steps + 1))


def step() -> float:
    """Take one step and return its seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    if words:
        nats, _ = model(text[:, :-1], text[:, 1:], model.initial_state(batch))
        loss = nats.sum() / (batch * steps)
    else:
        inputs, targets = make_batch(batch, model.num_vectors, model.num_dims, generator)
        loss, _ = loss_and_correct(model(inputs), targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return time.perf_counter() - start


beside = [subprocess.Popen([sys.executable, __file__, "tiny", "1", "-", "-1"]) for _ in range(busy)]
time.sleep(6 if busy else 0)
try:
    [step() for _ in range(2)]
    end, times = time.perf_counter() + 5, []
    while busy < 0 or len(times) < 4 or time.perf_counter() < end:
        times.append(step())
finally:
    for process in beside:
        process.kill()
median = 1000 * statistics.median(times)
print(f"{kind:9} threads {threads} spin {spin:5} busy {busy}: median {median:8.1f} ms of {len(times)} steps")

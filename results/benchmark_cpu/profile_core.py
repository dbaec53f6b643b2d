"""Where the core's time goes, forward and backward, at the language model's default sizes.

    python results/benchmark_cpu/profile_core.py > results/benchmark_cpu/profile_core.txt
"""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from relational_rnn_general import RelationalMemory  # noqa: E402
from training import devices

B, T = 64, 100
torch.manual_seed(1111)
torch.set_num_threads(2)
devices.keep_freed_memory()  # as in training
core = RelationalMemory(1, 192, 192, 4, key_size=64, attention_mlp_layers=3, return_all_outputs=True)
inputs, errors = torch.randn(B, T, 192), torch.randn(B, T, core.output_size)


def forward() -> None:
    with torch.no_grad():
        core(inputs)


def forward_and_backward() -> None:
    core(inputs)[0].backward(errors)


print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {B} x {T}, seed 1111")
for work in (forward, forward_and_backward):
    for _ in range(3):
        work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    print(work.__name__)
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

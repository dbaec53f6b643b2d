"""On paper: the paper's WikiText-103 model on 1, 8 and 64 GPUs. Nothing here is measured on a GPU.

    python results/scaling_paper/estimate.py > results/scaling_paper/estimate.txt

The formulas are explained in docs/scaling.md; sizes come from the real class, built without memory.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from layers.softmax import CHUNK_ROWS  # noqa: E402
from relational_rnn_models import RelationalMemoryLM  # noqa: E402

V, E, D, BATCH, T, TOKENS = 267_735, 512, 2500, 384, 100, 103e6
# An H100 SXM by its data sheet: dense TF32 and bfloat16 products, memory.
PEAK = {"TF32": 495e12, "bfloat16": 989e12}
HBM, NVLINK, NETWORK = 3.35e12, 450e9, 50e9     # bytes/s; NVLink one way; a network of 400 Gbit/s per GPU
# Assumed, not measured:
PRODUCTS, MEMORY, LINK = 0.5, 0.7, 0.7          # shares of the peak that are reached
KERNELS, LATENCY = 45, 3e-6                     # dependent small operations per time step, in a CUDA graph
# Bytes that output_layers.linear_cross_entropy moves, counted from its code. In products: per score (written,
# read for two gradients), and per weight and chunk (read twice; the gradient read and written; in bfloat16
# only the chunk's part written). Between products: per score (bfloat16: copied and the bias added; then
# log_softmax, exp, bfloat16: rounded, the bias's gradient), per weight and chunk (bfloat16: the part added).
IN_PRODUCTS = {"TF32": (12, 16), "bfloat16": (6, 6)}
BETWEEN = {"TF32": (8 + 8 + 4, 0), "bfloat16": (6 + 8 + 8 + 8 + 6 + 2, 10)}


def softmax_seconds(precision: str, rows: int, rate: float, bandwidth: float) -> tuple[float, float]:
    """Of the loss of so many tokens with its gradients: its products, and the passes between them."""
    chunks = -(-rows // CHUNK_ROWS["cuda"])
    traffic = [
        (per_score * rows * V + per_weight * chunks * V * E) / bandwidth
        for per_score, per_weight in (IN_PRODUCTS[precision], BETWEEN[precision])
    ]
    return max(6 * rows * V * E / rate, traffic[0]), traffic[1]


def main() -> None:
    with torch.device("meta"):
        model = RelationalMemoryLM(V, E, 1, 625, 4, attention_mlp_layers=5, key_size=None)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    count = sum(sizes.values())
    recurrent = sum(
        sizes[name]
        for name in sizes
        if name in ("core.blocks.0.qkv_projection.weight", "core.memory_gate_projection.weight")
        or (name.startswith("core.mlp") and name.endswith("weight"))
    )
    hoisted = E * 3 * D + E * 2 * D + D * E     # inputs' part of q, k, v and gates; the projection to E
    softmax = V * E
    print(f"parameters {count:,}; recurrent weights {recurrent:,}; all-reduce {4 * count / 1e6:.0f} MB")
    print(f"per token, forward and backward: {6 * (recurrent + hoisted + softmax) / 1e9:.2f} GFLOP, "
          f"of which softmax {softmax / (recurrent + hoisted + softmax):.0%}")
    print("precision | GPUs | columns each | GB each | softmax products ms | softmax passes ms | "
          "other large products ms | recurrence ms | exchange ms | optimiser ms | step ms | "
          "tokens/s | hours per epoch | efficiency")
    for precision, peak in PEAK.items():
        single = None
        for gpus in (1, 8, 16, 32, 64):
            columns = BATCH // gpus
            rate, bandwidth = PRODUCTS * peak, MEMORY * HBM
            # Without order in time: softmax, inputs, and the weights' gradients, products over all steps.
            products, passes = softmax_seconds(precision, columns * T, rate, bandwidth)
            large = columns * T * (6 * hoisted + 2 * recurrent) / rate
            # In order of time, forward and backward: at least the weights read, the products, the launches.
            weight_bytes = recurrent * (4 if precision == "TF32" else 2)
            once = max(2 * columns * recurrent / rate, weight_bytes / bandwidth)
            recurrence = T * (2 * once + KERNELS * LATENCY)
            link = LINK * (NVLINK if gpus <= 8 else NETWORK)
            exchange = 2 * (gpus - 1) / gpus * 4 * count / link
            # Clipping reads the gradient, Adam reads four tensors and writes three, zeroing writes one.
            optimiser = 9 * 4 * count / bandwidth
            step = products + passes + large + recurrence + exchange + optimiser
            # Weights, gradients (with processes twice), two moments; the softmax's own gradient beside
            # them, and a chunk's scores twice; kept for the backward pass per column and token: q, k, v three
            # times 3 D, 5 layers of D, 10 D of norms, gates and memory, 6 E.
            kept = columns * T * (9 * D + 5 * D + 10 * D + 6 * E) * 4
            memory = (5 if gpus > 1 else 4) * 4 * count + kept + 4 * softmax
            memory += 2 * 4 * V * min(CHUNK_ROWS["cuda"], columns * T)
            speed = BATCH * T / step
            single = single or speed
            print(f"{precision} | {gpus} | {columns} | {memory / 1e9:.1f} | {1000 * products:.1f} | "
                  f"{1000 * passes:.1f} | {1000 * large:.1f} | "
                  f"{1000 * recurrence:.1f} | {1000 * exchange:.1f} | {1000 * optimiser:.1f} | "
                  f"{1000 * step:.0f} | {speed:,.0f} | {TOKENS / speed / 3600:.2f} | "
                  f"{speed / single / gpus:.0%}")


if __name__ == "__main__":
    main()

"""Errors of trained models of the full task: by n, by the step that shows m, by how close the distances are.

Example: python results/nth_farthest/errors.py results/nth_farthest/model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training import checkpoints  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from tasks.nth_farthest import KIND, NthFarthestModel, is_correct, make_batch, question_of  # noqa: E402

EXAMPLES, GAPS = 50_000, (0, 0.01, 0.02, 0.05, 0.1, 0.2, float("inf"))


def percent(correct: torch.Tensor, groups: list[torch.Tensor]) -> str:
    """Return the accuracy within each group of examples, (B,) booleans."""
    return " ".join(f"{100 * correct[group].double().mean():5.1f}" for group in groups)


for folder in sys.argv[1:]:
    model = checkpoints.rebuild_model(
        checkpoints.load_checkpoint(Path(folder, "best.pt"), torch.device("cpu")), {KIND: NthFarthestModel}
    )
    K, D = model.config["num_vectors"], model.config["num_dims"]
    inputs, targets = make_batch(EXAMPLES, K, D, torch.Generator().manual_seed(2))
    correct = is_correct(model, inputs, targets, 1000).bool()
    vectors, labels = inputs[..., :D], inputs[..., D : D + K].argmax(dim=2)
    n, m = question_of(inputs, K)
    shown = (labels == m[:, None]).int().argmax(dim=1)  # the step of m
    distances = (vectors - vectors[torch.arange(EXAMPLES), shown, None]).square().sum(dim=2).sqrt()
    ranked = distances.sort(dim=1, descending=True).values
    # From the answer's distance to the next larger or smaller one, whichever is closer.
    gaps = F.pad(ranked[:, :-1] - ranked[:, 1:], (1, 1), value=float("inf"))
    gap = torch.minimum(gaps[:, :-1], gaps[:, 1:]).gather(1, n[:, None]).squeeze(1)
    middle = n < K - 1
    close = [middle & (gap >= low) & (gap < high) for low, high in zip(GAPS, GAPS[1:], strict=False)]
    print(f"{folder}: {100 * correct.double().mean():.1f} % of {EXAMPLES:,} examples")
    print("  n = 0 to K - 1:             ", percent(correct, [n == rank for rank in range(K)]))
    print("  m shown at step 1 to K:     ", percent(correct, [shown == step for step in range(K)]))
    print("  gap to the next distance:   ", percent(correct, close))
    shares = " ".join(f"{100 * group.double().mean():5.1f}" for group in close)
    print(f"    share of the examples with a gap below {', '.join(map(str, GAPS[1:-1]))} and above: {shares}")

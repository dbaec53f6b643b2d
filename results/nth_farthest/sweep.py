"""What governs the plateau, one setting at a time: many short runs of train_nth_farthest.py on small tasks.

    python results/nth_farthest/sweep.py --workers 2 --minutes 60

Every run starts from BASE or HARD below and changes what SWEEP says. The readings of a finished run, one
every 100 steps, become one line of sweep.jsonl, and sweep.csv is its summary. What is finished there is not
run again, and a run that was stopped goes on where it was: interrupt the script and call it again at will.
With matplotlib sweep.png shows the steps that each run took to leave its plateau.

Columns of sweep.csv:
    left       first step at which the test accuracy was six standard deviations above the plateau
    to_90      first step at which it was 90 % or more
    accuracy   of the weights that did best on the test set, on 12,800 fresh examples
    steps      taken: a run ends at its --steps, or after three readings in a row of its --target-accuracy
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

import plot_runs  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import train_nth_farthest as script  # noqa: E402
from training import console, flags, runs  # noqa: E402

# Set in a worker that Ctrl-C has stopped: the pool may have given it the next run already.
STOPPED = threading.Event()

LOG, TABLE, PICTURE = (FOLDER / f"sweep.{ending}" for ending in ("jsonl", "csv", "png"))

# The small case of docs/nth_farthest.md with half its core and half its batch, as in the end-to-end test: a
# quarter of a minute on a quiet core. Two harder cases: the small case itself with two dimensions, and four
# vectors. Of a flag given twice the later counts.
BASE = "--num-vectors 3 --num-dims 1 --outputunits 64 --batch-size 64 --lr 1e-3 --steps 2000 --memslots 3 "
BASE += "--numheads 2 --headsize 16 --input-scale 3 --memory-scale 6 --target-accuracy 0.9"
PLANE = "--num-vectors 3 --num-dims 2 --outputunits 64 --batch-size 128 --lr 1e-3 --steps 3000 --memslots 3 "
PLANE += "--numheads 4 --headsize 16 --input-scale 3 --memory-scale 8 --target-accuracy 0.9"
HARD = "--num-vectors 4 --num-dims 2 --outputunits 64 --batch-size 64 --lr 5e-4 --steps 4000 --memslots 4 "
HARD += "--numheads 2 --headsize 16 --input-scale 2 --memory-scale 6 --target-accuracy 0.9"

# Name, task, what is changed, initialisation, seeds; in the order of their worth.
SWEEP = [
    ("base", BASE, "", None, 3),
    ("lr-3e-4", BASE, "--lr 3e-4", None, 3),
    ("lr-3e-3", BASE, "--lr 3e-3", None, 3),
    ("hard-curriculum-vectors", HARD, "--curriculum-vectors 2 3 --curriculum-accuracy 0.85", None, 2),
    ("hard", HARD, "", None, 2),
    ("plane-curriculum-dims", PLANE, "--curriculum-dims 1 --curriculum-accuracy 0.85", None, 3),
    ("plane", PLANE, "", None, 3),
    ("batch-16", BASE, "--batch-size 16", None, 3),
    ("batch-256", BASE, "--batch-size 256", None, 3),
    ("batch-256-lr-3e-3", BASE, "--batch-size 256 --lr 3e-3", None, 3),
    ("heads-1x32", BASE, "--numheads 1 --headsize 32", None, 3),
    ("heads-8x4", BASE, "--numheads 8 --headsize 4", None, 3),
    ("slots-1", BASE, "--memslots 1", None, 3),
    ("clip-none", BASE, "--clip 0", None, 3),
    ("batch-256-lr-3e-4", BASE, "--batch-size 256 --lr 3e-4", None, 3),
    ("slots-8", BASE, "--memslots 8", None, 3),
    ("init-head-he", BASE, "", "head-he", 3),
    ("warmup-500", BASE, "--warmup 500", None, 3),
    ("lr-1e-4", BASE, "--lr 1e-4 --steps 6000", None, 3),
    ("init-orthogonal", BASE, "", "orthogonal", 3),
    ("init-core-half", BASE, "", "core-half", 3),
    ("init-core-double", BASE, "", "core-double", 3),
    ("gates-none", BASE, "--gatestyle none", None, 3),
    ("gates-memory", BASE, "--gatestyle memory", None, 3),
    ("forget-bias-3", BASE, "--forgetbias 3", None, 3),
    ("heads-4x8", BASE, "--numheads 4 --headsize 8", None, 3),
    ("bf16", BASE, "--bf16", None, 3),
    ("clip-1", BASE, "--clip 1", None, 3),
]


@torch.no_grad()
def initialise(model: nn.Module, how: str) -> nn.Module:
    """Changes a fresh model's weights.

    Args:
        model: an NthFarthestModel with the memory core.
        how: 'head-he' draws the output layers' weights for ReLU, normal of variance 2 / fan_in (He et al.
            2015, arXiv:1502.01852), in place of torch's default, whose variance is a sixth of that;
            'orthogonal' gives the core's linear layers orthogonal rows or columns (Saxe et al. 2013,
            arXiv:1312.6120); 'core-half' and 'core-double' multiply the core's own weights.
    """
    layers = [layer for layer in model.core.modules() if isinstance(layer, nn.Linear)]
    if how == "head-he":
        for layer in model.head:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layer.bias.zero_()
    elif how == "orthogonal":
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
    else:
        for layer in layers:
            layer.weight.mul_({"core-half": 0.5, "core-double": 2.0}[how])
    return model


def run(name: str, flags: str, initialisation: str | None, seed: int, deadline: float) -> dict | None:
    """Trains one run, or goes on with it, in a folder of runs/sweep/; its record when it is finished."""
    minutes = (deadline - time.time()) / 60
    if minutes <= 0 or STOPPED.is_set():
        return None
    root = FOLDER.parents[1] / "runs" / "sweep"
    folder = root / f"{name}-seed{seed}"
    session = ["--threads", "1", "--save-every", "1", "--stop-after", f"{minutes:.3f}"]
    if (folder / "args.json").exists():
        argv = ["--resume", str(folder), *session]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        argv = [*flags.split(), "--seed", str(seed), *session]
        argv += ["--runs-folder", str(root), "--name", folder.name]
    # Only initialisations go beyond the flags of the script: they are put into the model that it builds.
    build, picture = script.build_model, script.draw_attention
    if initialisation:
        script.build_model = lambda *given: initialise(build(*given), initialisation)
    script.draw_attention = lambda *given: None
    try:
        if script.main(argv):
            STOPPED.set()
    finally:
        script.build_model, script.draw_attention = build, picture
    events = runs.read_log(folder / "log.jsonl")
    final = [event for event in events if event["event"] == "final"]
    if not final:
        return None
    readings = [event for event in events if event["event"] == "train"]
    record = {
        "name": name,
        "flags": flags,
        "initialisation": initialisation,
        "seed": seed,
        "accuracy": round(final[0]["accuracy"], 4),
        "minutes": round(readings[-1]["seconds"] / 60, 2),
        "torch": torch.__version__,
        "hardware": hardware(),
        "steps": [event["step"] for event in readings],
        "loss": [round(event["loss"], 4) for event in readings],
        "train_accuracy": [round(event["accuracy"], 4) for event in readings],
        "test_accuracy": [round(event["test_accuracy"], 4) for event in readings],
        "grad_norm": [round(event["grad_norm"], 4) for event in readings],
        "stages": [[e["step"], e["vectors"], e["dims"]] for e in events if e["event"] == "stage"],
    }
    shutil.rmtree(folder)
    return record


def hardware() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "unknown processor"
    return f"{model}, one thread of {os.cpu_count()}"


def records() -> list[dict[str, Any]]:
    """The finished runs, in the order of SWEEP."""
    if not LOG.exists():
        return []
    order = [entry[0] for entry in SWEEP]
    found = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda record: (order.index(record["name"]), record["seed"]))


def milestones(record: dict[str, Any]) -> tuple[int | None, int | None]:
    """The steps at which a run left its plateau, 2/K, and reached 90 %; None where it did not."""
    K = int(record["flags"].split("--num-vectors ")[1].split()[0])
    p = 2 / K
    beyond = p + 6 * math.sqrt(p * (1 - p) / 3200)

    def first(level: float) -> int | None:
        pairs = zip(record["steps"], record["test_accuracy"], strict=True)
        return next((step for step, accuracy in pairs if accuracy >= level), None)

    return first(beyond), first(0.9)


def write_table() -> None:
    """sweep.csv from sweep.jsonl."""
    with open(TABLE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = "name seed left to_90 accuracy steps minutes changed initialisation torch hardware"
        table.writerow(columns.split())
        task_of = {BASE: "", PLANE: "PLANE ", HARD: "HARD "}
        changed = {name: (task_of[task] + flags).strip() for name, task, flags, *_ in SWEEP}
        for record in records():
            left, to_90 = milestones(record)
            row = [record["name"], record["seed"], left, to_90, record["accuracy"], record["steps"][-1]]
            row += [record["minutes"], changed[record["name"]], record["initialisation"]]
            table.writerow([*row, record["torch"], record["hardware"]])


def print_summary() -> None:
    """A Markdown row per setting, with every seed: steps to leave, steps to 90 %, accuracy."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in records():
        by_name.setdefault(record["name"], []).append(record)
    for name, group in by_name.items():
        left, to_90 = zip(*(milestones(record) for record in group), strict=True)
        cells = [
            " / ".join("-" if step is None else f"{step:,}" for step in steps) for steps in (left, to_90)
        ]
        cells.append(" / ".join(f"{100 * record['accuracy']:.1f}" for record in group))
        print("|", " | ".join([f"`{name}`", *cells]), "|")


def draw() -> None:
    """sweep.png: a row per setting, a dot per seed where it left the plateau, a cross where it never did."""
    plt = plot_runs.import_pyplot()
    names = list(dict.fromkeys(record["name"] for record in records()))
    figure, axis = plt.subplots(figsize=(8, 1 + 0.25 * len(names)), layout="constrained")
    for record in records():
        left, row = milestones(record)[0], names.index(record["name"])
        shift = 0.2 * (record["seed"] - 2)  # equal steps of two seeds stay visible
        if left is None:
            axis.plot(record["steps"][-1], row + shift, "x", color="C3")
        else:
            axis.plot(left, row + shift, "o", color="C0", markersize=4)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(True, linewidth=0.3)
    axis.set_xlabel("steps to leave the plateau (cross: not left within so many steps)")
    plot_runs.save(figure, plt, PICTURE)


def main() -> None:
    """Runs what is missing, for as long as allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument(
        "--workers", type=flags.positive_int, default=1, help="runs side by side, 1 thread each"
    )
    parser.add_argument(
        "--minutes", type=flags.non_negative_float, default=60, help="0 = write the table only"
    )
    parser.add_argument("--only", default="", metavar="PREFIX", help="settings whose name begins so")
    args = parser.parse_args()
    done = {(record["name"], record["seed"]) for record in records()}
    deadline = time.time() + 60 * args.minutes
    todo = [
        functools.partial(run, name, f"{task} {flags}".strip(), initialisation, seed, deadline)
        for name, task, flags, initialisation, seeds in SWEEP
        for seed in range(1, seeds + 1)
        if (name, seed) not in done and name.startswith(args.only)
    ]
    # Processes and not threads: a run seeds and draws from global random states.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(job) for job in todo]):
                if (record := future.result()) is not None:
                    with open(LOG, "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    write_table()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    write_table()
    print_summary()
    try:
        draw()
    except console.UserError as error:
        print(f"no {PICTURE.name}: {error}")


if __name__ == "__main__":
    main()

"""Pack run folders into one study file: one run per line, with all of args.json and every event of the log.

Checkpoints are not packed. The other tools read study files like run folders.

Example: python tools/pack_runs.py runs/search-* --outf results/search.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import _project  # noqa: F401
from training import console, files, flags, runs


def pack(folder: Path) -> str:
    """Return the line of a study file for a run folder."""
    log = list(runs.log_events(folder / "log.jsonl"))
    entry = {"name": folder.resolve().name, "args": runs.read_json(folder / "args.json"), "log": log}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Pack the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="finished or stopped run")
    parser.add_argument("--outf", type=Path, required=True, metavar="JSONL", help="the study file to write")
    args = parser.parse_args(argv)
    text = "".join(pack(folder) for folder in args.folders)
    files.atomic_write(args.outf, lambda file: file.write(text.encode("utf-8")))
    console.say(f"{len(args.folders)} run{'s' * (len(args.folders) > 1)} packed into {args.outf}")


if __name__ == "__main__":
    console.run_script(main)

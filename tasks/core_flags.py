"""The flags of the relational memory core, which all tasks share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from training.flags import finite_float, layer_count, non_negative_int, option, positive_float, positive_int


def add_core_flags(group: argparse._ArgumentGroup, core: Mapping[str, Any]) -> None:
    """Add the flags of the relational memory core. `core` maps the core's arguments to defaults."""
    # fmt: off
    option(group, "--memslots", positive_int, core["mem_slots"], "N", "rows of the memory matrix")
    option(group, "--headsize", positive_int, core["head_size"], "UNITS",
           "value size of an attention head; a memory row has heads x this many units")
    option(group, "--numheads", positive_int, core["num_heads"], "N", "attention heads")
    option(group, "--numblocks", layer_count, core["num_blocks"], "N",
           "attention blocks per time step")
    option(group, "--forgetbias", finite_float, core["forget_bias"], "X",
           "fixed bias of the forget gate, before the sigmoid")
    option(group, "--inputbias", finite_float, core["input_bias"], "X",
           "fixed bias of the input gate, before the sigmoid")
    option(group, "--gatestyle", str.lower, core["gate_style"] or "none", None,
           "one gate per unit, one per memory row, or no gates", choices=("unit", "memory", "none"))
    option(group, "--attmlplayers", layer_count, core["attention_mlp_layers"], "N",
           "layers of the MLP after the attention")
    option(group, "--keysize", non_negative_int, core["key_size"] or 0, "UNITS",
           "query and key size of an attention head; 0 = the head size")
    option(group, "--init-scale", positive_float, core["init_scale"], "X",
           "factor on the core's initial weight matrices; 1 = as in the original")
    # fmt: on


def core_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the core's flags as arguments of RelationalMemory and of the models around it."""
    return {
        "mem_slots": args.memslots,
        "head_size": args.headsize,
        "num_heads": args.numheads,
        "num_blocks": args.numblocks,
        "forget_bias": args.forgetbias,
        "input_bias": args.inputbias,
        "gate_style": None if args.gatestyle == "none" else args.gatestyle,
        "attention_mlp_layers": args.attmlplayers,
        "key_size": args.keysize or None,
        "init_scale": args.init_scale,
    }

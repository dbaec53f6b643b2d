"""The flags of the relational memory core, for every script that has one: the same names, rules and help."""

from __future__ import annotations

import argparse
from typing import Any

from training import flags


def add_core_flags(
    group: argparse._ArgumentGroup,
    memslots: int,
    headsize: int,
    numheads: int,
    attmlplayers: int,
    keysize: int,
) -> None:
    """Adds the core's flags to a group, with these defaults and those that all scripts share."""
    group.add_argument(
        "--memslots", type=flags.positive_int, default=memslots, metavar="N", help="rows of the memory matrix"
    )
    group.add_argument(
        "--headsize",
        type=flags.positive_int,
        default=headsize,
        metavar="UNITS",
        help="value size of one attention head; a memory row has heads x this many units",
    )
    group.add_argument(
        "--numheads", type=flags.positive_int, default=numheads, metavar="N", help="attention heads"
    )
    group.add_argument(
        "--numblocks", type=flags.layer_count, default=1, metavar="N", help="attention blocks per time step"
    )
    group.add_argument(
        "--forgetbias",
        type=flags.finite_float,
        default=1.0,
        metavar="X",
        help="fixed bias of the forget gate, before the sigmoid",
    )
    group.add_argument(
        "--inputbias",
        type=flags.finite_float,
        default=0.0,
        metavar="X",
        help="fixed bias of the input gate, before the sigmoid",
    )
    group.add_argument(
        "--gatestyle",
        choices=("unit", "memory", "none"),
        default="unit",
        help="one gate per unit, one per memory row, or no gates",
    )
    group.add_argument(
        "--attmlplayers",
        type=flags.layer_count,
        default=attmlplayers,
        metavar="N",
        help="layers of the MLP after the attention",
    )
    group.add_argument(
        "--keysize",
        type=flags.non_negative_int,
        default=keysize,
        metavar="UNITS",
        help="query and key size of one attention head; 0 = the head size",
    )


def core_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags mean as arguments of RelationalMemory and of the models around it."""
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
    }

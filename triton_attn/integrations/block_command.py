"""triton-attn bench blocks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_attn import ArgumentError
from triton_attn.command_line import BadArgument, Device, Json, where_of

if TYPE_CHECKING:
    from triton_attn.report.tables import Table

DIRECTIONS = {"forward": False, "forward + backward": True}


def bench_blocks(
    d_model: Annotated[int, typer.Option(min=1, help="Width of tokens.")] = 768,
    n_head: Annotated[int, typer.Option(min=1, help="Heads, a divisor of the width.")] = 12,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens.")] = 197,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that do not count.")] = 10,
    iterations: Annotated[int, typer.Option(min=1, help="Rounds that count, in each of which every block runs once.")] = 100,
    device_name: Device = None,
    as_json: Json = False,
) -> int:
    """Time OpenCLIP's residual blocks in turns, forward and backward, beside the standard one."""
    where = where_of(device_name)
    from triton_attn.integrations.block_benchmark import benchmark_attention_blocks
    from triton_attn.report import terminal

    found: list[dict[str, Any]] = []
    try:
        with terminal.progress(len(DIRECTIONS) * (warmup + iterations), json=as_json) as (tick, step):
            for place, (direction, backward) in enumerate(DIRECTIONS.items()):
                tick(direction)
                results = benchmark_attention_blocks(
                    d_model,
                    n_head,
                    seq_len,
                    batch_size,
                    str(where),
                    warmup,
                    iterations,
                    backward=backward,
                    tick=lambda turn, place=place: step(place * (warmup + iterations) + turn),  # type: ignore[misc]
                )
                found += [{"block": kind, "direction": direction, **row} for kind, row in results.items()]
    except ArgumentError as error:
        raise BadArgument(str(error)) from error
    if as_json:
        for row in found:
            print(json.dumps(row))
    else:
        terminal.show(_table(found), f"{batch_size} x {seq_len} tokens, width {d_model}, {n_head} heads, float32, {where}")
    return 0


def _table(rows: list[dict[str, Any]]) -> Table:
    from triton_attn.report.tables import Table

    cells = [
        (
            row["block"],
            row["direction"],
            f"{row['avg_time_ms']:.3g} ms",
            f"{row['speedup']:.2f}",
            "not measured on a CPU" if row["memory_mb"] is None else f"{row['memory_mb']:.1f} MiB",
            f"{row['parameters']:,}",
        )
        for row in rows
    ]
    return Table(("block", "direction", "time>", "speed-up over standard>", "peak memory>", "parameters>"), cells)

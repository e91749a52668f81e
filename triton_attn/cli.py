"""The command line: triton-attn {list,explain,verify,teeth,compile,tune,bench,report,capacity,vit,train-clip-adapter}.

Exit codes: 0 right, 1 something is wrong, 2 a bad argument. With --json, standard output holds one JSON object per line and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from triton_attn import CATALOG, __version__, device

try:
    import typer
    import typer.core
except ModuleNotFoundError:
    raise SystemExit("triton-attn: the command line needs more packages: pip install 'triton-attn[cli]'") from None

from triton_attn.capacity import command as capacity
from triton_attn.clip import commands as clip
from triton_attn.command_line import (
    DTYPES,
    BadArgument,
    Device,
    Json,
    Names,
    Seconds,
    Targets,
    duration,
    exit_code,
    known,
    targets_of,
    where_of,
)
from triton_attn.integrations import block_command as blocks
from triton_attn.report import command as reporting
from triton_attn.tuning import command as tuning
from triton_attn.vit import commands as vit

if TYPE_CHECKING:
    pass

BAD_ARGUMENT, INTERRUPTED = 2, 130
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
EVERY_MECHANISM = "mechanisms"


class _BenchGroup(typer.core.TyperGroup):
    """`bench` with names of mechanisms, or with none, is `bench mechanisms`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = [EVERY_MECHANISM, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="Fast attention: which mechanisms there are, whether their kernels are right, what they use of a GPU, how fast they are.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
timing = typer.Typer(cls=_BenchGroup, help="Time mechanisms beside their peers, in turns, or OpenCLIP's residual blocks.")
app.add_typer(vit.app, name="vit")
app.add_typer(timing, name="bench")
app.command("tune")(tuning.tune)
app.command("capacity")(capacity.capacity)
app.command("report")(reporting.report)
app.command("train-clip-adapter")(clip.train_clip_adapter)
timing.command("blocks")(blocks.bench_blocks)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"triton-attn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command("list")
def list_mechanisms(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown, for pages.")] = False,
) -> int:
    """The mechanisms, their kernels and their inputs."""
    from triton_attn.report import tables, terminal

    if as_json:
        for row in CATALOG.values():
            kernels = {kernel.name: [device.architecture(known) for known in kernel.capabilities] for kernel in row.kernels}
            inputs = {name: {"axes": given.axes, "kind": given.kind} for name, given in row.inputs.items() if given.kind != "seed"}
            print(json.dumps({"name": row.name, "summary": row.summary, "kernels": kernels, "inputs": inputs, "peers": list(row.peers)}))
    elif markdown:
        from triton_attn.report.markdown import mechanisms

        print(mechanisms(CATALOG.values()))
    else:
        terminal.show(tables.mechanisms(CATALOG.values()))
    return 0


@app.command()
def explain(
    names: Names = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Size of an axis, like n=4096; may be repeated. Others: the first workload's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; by default bfloat16 on GPUs, float32 on a CPU.")] = None,
    device_name: Device = None,
    target: Targets = "",
    workloads: Annotated[bool, typer.Option("--workloads", help="Every workload, not only the first.")] = False,
    as_json: Json = False,
) -> int:
    """What a call would run, with which tiles, and why not something else. Nothing is run."""
    from triton_attn.report import calls, rows, tables, terminal

    mechanisms, where, targets = known(names), where_of(device_name), targets_of(target) if target else []
    if dtype not in (None, *DTYPES):
        raise BadArgument(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")

    def explained() -> Iterator[calls.Call]:
        for row in mechanisms:
            for architecture in ("", *targets):
                kind = "cuda" if architecture else where.type
                wanted = DTYPES[dtype] if dtype else torch.bfloat16 if kind == "cuda" else torch.float32
                for workload in row.workloads[kind] if workloads else row.workloads[kind][:1]:
                    try:
                        case = calls.sized(row.name, workload, size or [])
                        yield calls.on_target(row, case, wanted, architecture) if architecture else calls.here(row, case, wanted, where)
                    except (ValueError, NotImplementedError) as error:  # wrong arguments; no kernel, where one was insisted on
                        raise BadArgument(str(error)) from error
                    except RuntimeError as error:
                        raise BadArgument(f"{row.name}: no memory for {calls.sizes(case)}: {str(error).splitlines()[0]}") from error

    found = rows.collect(explained(), as_json)
    if not as_json:
        terminal.show(tables.calls(found))
    return 0


@app.command()
def verify(names: Names = None, device_name: Device = None, seconds: Seconds = math.inf, as_json: Json = False) -> int:
    """Run every case against the definition in float64: kernels compiled on a GPU, interpreted without."""
    mechanisms, where, seconds = known(names), where_of(device_name), duration(seconds)
    if where.type == "cuda" and device.interpreting():
        raise BadArgument("TRITON_INTERPRET=1 is set and device is cuda; unset it, or give --device cpu")
    if where.type == "cpu" and device.triton_version() and not device.interpreting():
        from triton_attn.report import gather

        device.interpret()
        return gather.again("verify", *(row.name for row in mechanisms), "--device", "cpu", seconds=seconds, as_json=as_json)
    from triton_attn.report import parts, rows, tables, terminal

    log = parts.Log()
    with terminal.progress(sum(len(row.cases) for row in mechanisms), json=as_json) as (log.tick, step):
        results = parts.verdicts(mechanisms, where, seconds, log)
        found = rows.collect(results, as_json, lambda done: step(len({(row.mechanism, row.case) for row in done})))
    faults = [f"{row.mechanism} {row.implementation} {row.case} {row.dtype}: {row.fault}" for row in found if row.fault]
    if not as_json:
        terminal.show(tables.checks(found))
        worst = f", the worst at {tables.percent(max(row.share for row in found))} of its bound" if found else ""
        terminal.conclude(len(found), f"checks{worst}", faults)
    return exit_code(log, faults)


@app.command()
def teeth(
    names: Names = None,
    some: Annotated[int | None, typer.Option(min=1, help="Plant only so many faults in each kernel.")] = None,
    seed: Annotated[int, typer.Option(help="Which ones, with --some.")] = 0,
    kept: Annotated[
        Path | None,
        typer.Option("--keep", help="Put what became of them into this file, which the report shows; each at once into one beside it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--anew", help="With --keep: go on where an earlier run ended, or begin again.")] = True,
    budget: Annotated[float, typer.Option(help="Begin no further fault after so many seconds.", show_default=False)] = math.inf,
    as_json: Json = False,
) -> int:
    """Plant faults in kernels, one after the other, and count which of them the row's cases catch. Runs in the interpreter."""
    mechanisms, wanted = known(names), duration(budget, "budget")
    if not device.triton_version():
        raise BadArgument("triton is not installed: there is nothing to plant a fault in")
    if not device.interpreting():
        from triton_attn.report import gather

        device.interpret()
        chosen = ["--seed", str(seed), *(["--some", str(some)] if some else []), *(["--keep", str(kept)] if kept else [])]
        chosen += [*([] if resume else ["--anew"]), *(["--budget", str(wanted)] if wanted < math.inf else [])]
        return gather.again("teeth", *(row.name for row in mechanisms), *chosen, seconds=math.inf, as_json=as_json)
    from triton_attn import teeth as planting
    from triton_attn.report import caught, parts, rows, tables, terminal

    if kept is not None and kept.exists():
        try:
            caught.read(kept)  # what cannot be added to had better be known before minutes have gone by
        except ValueError as error:
            raise BadArgument(str(error)) from error

    log, left = parts.Log(), dict[str, str]()
    with terminal.progress(None, json=as_json) as (log.tick, step):
        options: dict[str, Any] = {"evidence": kept and caught.evidence(kept), "anew": not resume, "budget": wanted, "left": left}
        results = planting.teeth(mechanisms, some=some, seed=seed, tick=log.tick, **options)
        found = rows.collect(results, as_json, lambda done: step(len(done)))
    log.left_out += [f"{name}: {text}: the same command goes on" for name, text in left.items()]
    if kept is not None:
        command = ["triton-attn teeth", *(row.name for row in mechanisms), *([f"--some {some} --seed {seed}"] if some else [])]
        whole = [tooth for tooth in found if f"{tooth.mechanism}/{tooth.kernel}" not in left]
        caught.keep(kept, whole, CATALOG, " ".join(command))
    faults = [f"{row.mechanism}/{row.kernel} {row.function}:{row.line} {row.fault}" for row in found if row.fault]
    if not as_json:
        terminal.show(tables.teeth(found))
        terminal.conclude(len(found), "faults planted", faults)
    return exit_code(log, faults)


@app.command("compile")
def compile_kernels(
    names: Names = None,
    target: Targets = "sm_80,sm_90",
    every_key: Annotated[bool, typer.Option("--tables", help="Every entry of the tile tables, not only a few.")] = False,
    every_tile: Annotated[bool, typer.Option("--every", help="Every candidate tile.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="How many processes compile.")] = 1,
    seconds: Seconds = math.inf,
    as_json: Json = False,
) -> int:
    """Compile kernels for GPUs that need not be here: registers, spills, shared memory, instructions, blocks per multiprocessor."""
    mechanisms, targets, seconds = known(names), targets_of(target), duration(seconds)
    if not device.triton_version():
        raise BadArgument("triton is not installed: nothing can be compiled")
    if device.interpreting():
        raise BadArgument("TRITON_INTERPRET=1 is set, which replaces the compiler; unset it")
    from triton_attn.report import parts, rows, terminal, tile_tables

    log = parts.Log()
    total = None if every_tile else parts.launches(mechanisms, targets, every_key=every_key)
    with terminal.progress(total, json=as_json) as (log.tick, step):
        results = parts.compiled(mechanisms, targets, seconds, log, every_key=every_key, every_tile=every_tile, jobs=jobs)
        found = rows.collect(results, as_json, lambda done: step(len(done)))
    faults = [f"{row.mechanism}/{row.kernel}/{row.launch} {row.target} {row.key} {row.tile}: {row.fault}" for row in found if row.fault]
    if not as_json:
        terminal.show(tile_tables.kernels(found))
        terminal.conclude(len(found), "kernels compiled", faults)
    return exit_code(log, faults)


@timing.command(EVERY_MECHANISM)
def bench(
    names: Names = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Only the first workload, with so many tokens; may be repeated.")] = None,
    device_name: Device = None,
    seconds: Seconds = math.inf,
    as_json: Json = False,
) -> int:
    """Time every workload beside its peers, in turns; what `triton-attn bench` does without a subcommand."""
    mechanisms, where, seconds = known(names), where_of(device_name), duration(seconds)
    from triton_attn.report import parts, rows, tables, terminal

    log = parts.Log()
    with terminal.progress(sum(len(length or row.workloads[where.type]) for row in mechanisms), json=as_json) as (log.tick, step):
        results = parts.timings(mechanisms, where, seconds, log, lengths=length)
        found = rows.collect(results, as_json, lambda done: step(len({(row.mechanism, row.case) for row in done})))
    if not as_json:
        terminal.show(tables.timings(found))
    return exit_code(log, [])


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; always ends in SystemExit."""
    from triton_attn.report.terminal import complain

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(app(args=given or ["--help"], prog_name="triton-attn", standalone_mode=False) or 0)
    except (BadArgument, _UsageError) as error:
        complain(getattr(error, "format_message", error.__str__)())
        sys.exit(BAD_ARGUMENT)
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(BAD_ARGUMENT)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        sys.exit(INTERRUPTED)

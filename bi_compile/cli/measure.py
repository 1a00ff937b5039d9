"""`bi-compile verify`, `bi-compile bisect` and `bi-compile probe`: what they take, and their tables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import MeasureError, OptionError, meant
from .console import Json, console, print_json, progress_bar, table
from .console import write as write_file
from .exits import FAILED, FOUND, OK, sentences

if TYPE_CHECKING:
    from ..measure.bisect import Bisection
    from ..measure.verify import Evidence

_COMPARE: dict[str, Any] = dict(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
verify_app = typer.Typer(help="Compare each row in a batch with the row alone, as bits.", **_COMPARE)
bisect_app = typer.Typer(help="Name the first operator whose row differs.", **_COMPARE)

FunctionPath = Annotated[str, typer.Argument(metavar="FUNCTION", help="package.module:name of a function or a model")]
Inputs = Annotated[
    str, typer.Option(help="package.module:name of a function that returns its arguments, all rows together")
]
BatchDims = Annotated[str, typer.Option(help="the batch dimension of every tensor, or one for each input: 0,none")]
Backend = Annotated[str | None, typer.Option(help="compile it with this backend of torch.compile")]
Seed = Annotated[int, typer.Option(help="the seed of everything random")]
Limit = Annotated[float, typer.Option(help="seconds after which no new batch starts")]
Model = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="a folder with a model")]
Steps = Annotated[
    Path | None,
    typer.Option("--write", metavar="FILE", help="also write the distances, for `bi-compile report --bisect`"),
]
Config = Annotated[str | None, typer.Option(help="vLLM's compilation config, as JSON")]
EngineArgs = Annotated[str, typer.Option(help='more arguments of vllm.LLM, as JSON: {"dtype": "bfloat16"}')]


def _function(fn: str, inputs: str, batch_dims: str) -> tuple[str, list[Any], Any]:
    """The first three arguments of `verify` and `bisect`."""
    from ..measure.row_function import load

    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    made = load(inputs)()
    try:
        dims = [None if d.strip() == "none" else int(d) for d in batch_dims.split(",")]
    except ValueError:
        raise MeasureError(f"--batch-dims {batch_dims}: numbers or none, as in 0 or 0,none") from None
    every = dims[0] if len(dims) == 1 and dims[0] is not None else dims
    return fn, list(made) if isinstance(made, (tuple, list)) else [made], every


def _check_backend(name: str | None) -> None:
    """Raise OptionError for a backend that torch.compile does not know."""
    if name is None:
        return
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(exclude_tags=())
    if name not in known:
        raise OptionError(f"--backend {name}{meant(name, known)}: torch.compile knows {', '.join(known)}")


def _plan(config: str | None, engine: str, **own: Any) -> dict[str, Any]:
    """The plan of an engine: vLLM's arguments and ours."""
    try:
        found = json.loads(engine) | ({"compilation_config": json.loads(config)} if config else {})
    except (ValueError, TypeError) as error:
        raise MeasureError(f"--compilation-config and --engine-args are JSON objects ({error})") from None
    return found | own


def _verified(equal: bool, rows: int) -> typer.Exit:
    """How a verification ends: nothing compared is not "equal"."""
    return typer.Exit(FOUND if not equal else OK if rows else FAILED)


@verify_app.command("function")
@sentences
def verify_function(
    fn: FunctionPath,
    inputs: Inputs,
    batch_dims: BatchDims = "0",
    backend: Backend = None,
    seed: Seed = 0,
    time_limit: Limit = 300.0,
    write: Annotated[Path, typer.Option(help="the program to write if a row differs")] = Path("counterexample.py"),
    as_json: Json = False,
) -> None:
    """A Python function, a model or something compiled. Exit code 1 if a row differs."""
    from ..measure import verify
    from ..measure.row_function import Case

    out = console(as_json)
    _check_backend(backend)
    given = _function(fn, inputs, batch_dims)
    with progress_bar(out, "each row alone") as progress:
        evidence = verify.verify(*given, backend=backend, seed=seed, time_limit=time_limit, progress=progress)
    if as_json:
        print_json(evidence.to_json())
    else:
        out.print(evidence_table(evidence))
        typer.echo(evidence.line())
    if evidence.mismatch is not None:
        verify.write(Case(*given, backend), evidence.mismatch, write)
        typer.echo(f"reproduce with: python {write}", err=as_json)
    raise _verified(evidence.equal, evidence.rows.total())


@verify_app.command("vllm")
@sentences
def verify_engine(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL_DIR",
            help="a folder with a model, or a counterexample.json to run again; with --base-url, the model's name there",
        ),
    ] = None,
    compilation_config: Config = None,
    engine_args: EngineArgs = "{}",
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="ask a running vLLM server instead of starting an engine")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a prompt on each line; FILE.jsonl: texts or lists of token ids as JSON"),
    ] = None,
    requests: Annotated[int, typer.Option(help="how many random requests, without --prompts")] = 16,
    tokens: Annotated[int, typer.Option(help="how many tokens for each request")] = 8,
    seed: Seed = 0,
    time_limit: Limit = 60.0,
    write: Annotated[Path, typer.Option(help="the plan to write if a request differs")] = Path("counterexample.json"),
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="also write one file about this machine: engines with and without the pass, their speed, native operators, products",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """A vLLM engine or a running server: compares logprobs and tokens of requests alone and together.

    Exit code 1 if a request differs."""
    from ..measure import verify_server, verify_vllm

    again = model is not None and model.is_file()
    plan = _plan(compilation_config, engine_args, requests=requests, tokens=tokens, seed=seed, time_limit=time_limit)
    if prompts is not None:
        plan["prompts"] = verify_vllm.read_prompts(prompts)
    if model is not None and again:
        model, plan = verify_vllm.read(model)
        base_url = plan.pop("base_url", None)
    if model is None and base_url is None:
        raise MeasureError("verify vllm takes a folder with a model, or --base-url with the address of a server")
    name = None if model is None else str(model if base_url else model.resolve())
    if report is not None:
        if model is None or again or base_url is not None:
            raise OptionError("--report compares two engines of a model: name its folder, without --base-url")
        _report(report, model, plan, time_limit, as_json)
    starts = "requests run" if base_url else "the engine starts, then requests run"
    with console(as_json).status(f"{starts} alone and together"):
        if base_url is not None:
            result = verify_server.verify(base_url, name, **plan)
        elif model is not None:
            result = verify_vllm.verify(model, **plan)
    if as_json:
        print_json(result)
    else:
        typer.echo(verify_vllm.line(result))
    if result["mismatch"] is not None and not again:
        only = {k: result["mismatch"][k] for k in ("request", "batch")}
        where = {"model": name} | ({"base_url": base_url} if base_url else {})
        write_file(write, json.dumps({**where, **plan, "only": only}), "--write")
        typer.echo(f"reproduce with: bi-compile verify vllm {write}", err=as_json)
    raise _verified(result["mismatch"] is None, result["rows"])


def _report(path: Path, model: Path, plan: dict[str, Any], time_limit: float, as_json: bool) -> None:
    """`--report`: ends the command."""
    from ..measure import device_report

    write_file(path, "", "--report")  # before the work, not after it
    out = console(as_json)
    with progress_bar(out) as progress:
        found = device_report.collect(model, plan, time_limit, progress)
    write_file(path, json.dumps(found, indent=1), "--report")
    if as_json:
        print_json(found)
    for line in device_report.lines(found):
        typer.echo(line, err=as_json)
    typer.echo(f"written to {path}", err=as_json)
    if found["failed"]:
        raise typer.Exit(FAILED)
    raise typer.Exit(FOUND if device_report.found_wrong(found) else OK)


@bisect_app.command("function")
@sentences
def bisect_function(
    fn: FunctionPath,
    inputs: Inputs,
    batch_dims: BatchDims = "0",
    backend: Backend = None,
    seed: Seed = 0,
    time_limit: Limit = 120.0,
    write: Steps = None,
    as_json: Json = False,
) -> None:
    """A Python function, a model or something compiled. Exit code 1 if a row differs."""
    from ..measure import bisect

    out = console(as_json)
    _check_backend(backend)
    given = _function(fn, inputs, batch_dims)
    with progress_bar(out, "each row alone") as progress:
        found = bisect.bisect(*given, backend=backend, seed=seed, time_limit=time_limit, progress=progress)
    _show(out, found, str(found.mismatch or ""), write, as_json)


@bisect_app.command("vllm")
@sentences
def bisect_engine(
    model: Model,
    compilation_config: Config = None,
    engine_args: EngineArgs = "{}",
    seed: Seed = 0,
    write: Steps = None,
    as_json: Json = False,
) -> None:
    """A vLLM engine, its compiled graphs run node by node. Exit code 1 if a request differs."""
    from ..measure import bisect_vllm, verify_vllm

    out = console(as_json)
    with out.status("the engine starts, then requests run alone and together, operator by operator"):
        mismatch, found = bisect_vllm.bisect(model, **_plan(compilation_config, engine_args, seed=seed))
    _show(out, found, verify_vllm.sentence(mismatch) if mismatch else "", write, as_json)


def _show(out: Console, found: Bisection, mismatch: str, path: Path | None, as_json: bool) -> None:
    """A bisection: which row, where it first differs, and how that grows."""
    if path is not None:
        write_file(path, json.dumps(found.to_json()), "--write")
    if as_json:
        print_json({"mismatch": mismatch or None, **found.to_json()})
    elif found.first is None:
        typer.echo(found.line())
    else:
        out.print(bisection_table(found))
        typer.echo(f"{mismatch}\n{found.line()}")
    raise typer.Exit(FOUND if found.first else OK)


@sentences
def probe(
    write: Annotated[Path, typer.Option(help="the file to write")] = Path("probe.json"),
    device: Annotated[str, typer.Option(help="torch's name of the device")] = "cpu",
    operator: Annotated[list[str] | None, typer.Option(help="measure only this operator; may be repeated")] = None,
    seed: Seed = 0,
    time_limit: Limit = 600.0,
    compiled: Annotated[bool, typer.Option(help="also measure the pointwise operators as compiled code")] = True,
) -> None:
    """Measure which native operators vary with the batch on this device, into a file that the option `probe` reads."""
    from ..measure import probe as measured

    out = console()
    with progress_bar(out) as progress:
        data = measured.measure(device, seed, time_limit, operator, progress, compiled)
    write_file(write, json.dumps(data, indent=1), "--write")
    out.print(probe_table(data))
    typer.echo(f'written to {write}; options={{"probe": "{write}"}} makes the audit use it')


# -- tables -----------------------------------------------------------------------------------------------------------


def evidence_table(evidence: Evidence) -> Table:
    """What ran, kind by kind, and what could not."""
    found = table(f"bi-compile verify: {evidence.name}", "varied", "batches", "rows compared")
    for kind, batches in evidence.batches.items():
        found.add_row(kind, str(batches), str(evidence.rows[kind]))
    for kind, why in evidence.not_run.items():
        found.add_row(kind, "not run", why)
    return found


SHOWN = 40


def bisection_table(found: Bisection) -> Table:
    """From the first operator that differs to the output; the middle of a long list is left out, and said so."""
    numbers = ("elements", "max ULP", "max absolute")
    out = table("Where the row differs", "operator, where, operands", *numbers, right=numbers, lines=True)
    start = next((i for i, s in enumerate(found.steps) if s.difference is not None), len(found.steps))
    rest = found.steps[start:]
    for i, step in enumerate(rest):
        if len(rest) > SHOWN and SHOWN // 2 <= i < len(rest) - SHOWN // 2:
            if i == SHOWN // 2:
                out.add_row(f"... {len(rest) - SHOWN} more", "", "", "")
            continue
        d = step.difference
        place = ", ".join(filter(None, (step.layer, _short(step.where))))
        cells = ("0", "0", "0")
        if d is not None:
            far = ("NaN", "NaN") if d.ulps is None else (str(d.ulps), f"{d.absolute:.3g}")
            cells = (f"{d.elements} of {d.of}", *far)
        lines = filter(None, (step.operator, place, step.arguments))
        out.add_row(escape("\n".join(lines)), *cells)
    return out


def _short(where: str) -> str:
    """The last folder, the file and the line."""
    file, _, line = where.partition(", ")
    return f"{'/'.join(file.split('/')[-2:])}, {line}" if line else where


def probe_table(data: dict[str, Any]) -> Table:
    """For each operator and dtype how many rows were equal, or that it varies."""
    dtypes = list(dict.fromkeys(dtype for by_dtype in data["operators"].values() for dtype in by_dtype))
    title = f"Operators on {data['device_name']}, torch {data['torch']}"
    out = table(title, "operator", *dtypes)
    for operator, by_dtype in data["operators"].items():
        out.add_row(operator, *(_cell(by_dtype.get(d)) for d in dtypes))
    for operator, by_dtype in data["compiled"].items():
        out.add_row(f"{operator}, compiled", *(_cell(by_dtype.get(d)) for d in dtypes))
    return out


def _cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not supported"
    cut = f", {measured['batches_left']} batches left" if measured["batches_left"] else ""
    if measured["mismatches"]:
        return f"[red]varies[/]{cut}"
    return f"{measured['rows']} rows equal{cut}" if measured["rows"] else "not run: time limit"

"""The command line: `bi-compile demo | bench | inspect DIR | report DIR | audit PATH | doctor | build | passes | verify … | bisect … | probe`.

How a command ends stands in `exits`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from . import exits
from .console import Json, console, print_json, write
from .exits import FOUND, OK, sentences
from .measure import bisect_app, probe, verify_app

# what a command needs is imported when it runs: `bi-compile --help` must not wait for a compiler
app = typer.Typer(
    name="bi-compile",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"bi-compile {__version__}")
        raise typer.Exit(OK)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="If something fails, also print the whole traceback.")
    ] = False,
) -> None:
    """Batch-invariant compilation: the same bits whether a request runs alone or in a batch.

    Exit codes: 0 nothing was found; 1 a row differs, a graph is not batch-invariant, something is missing; 2 wrong usage; 3 it failed.
    """
    exits.show_traces = traceback


@app.command()
@sentences
def demo() -> None:
    """Show what varies with the batch, and that nothing does with the pass: real vLLM and torch.compile on this CPU."""
    from . import demo as shown

    raise typer.Exit(OK if shown.show(console()) else FOUND)


@app.command()
@sentences
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="only these: product, engine, …")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="DIR", help="also write each table to DIR/NAME.csv")] = None,
    json: Annotated[Path | None, typer.Option(metavar="DIR", help="also write each table to DIR/NAME.json")] = None,
) -> None:
    """Measure what invariance costs on this device, as ratios against peers in the same run."""
    from . import bench as benches

    benches.show(names or [], csv, json, console())


@app.command()
@sentences
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder written by the option dump_dir")],
    as_json: Json = False,
) -> None:
    """Print a dump: the graphs, what each pass did, what is left or trusted, and why.

    Exit code 1 if something is left, or if a compilation stopped before its graph was judged."""
    from . import inspect as dumps

    graphs = dumps.read(folder)
    if as_json:
        print_json(dumps.to_json(graphs))
    else:
        out = console()
        for table in dumps.tables(graphs):
            out.print(table)
    raise typer.Exit(FOUND if any(g.objections or g.stopped for g in graphs) else OK)


@app.command()
@sentences
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder written by the option dump_dir")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="the page to write")] = Path(
        "report.html"
    ),
    bisection: Annotated[
        Path | None, typer.Option("--bisect", metavar="FILE", help="what `bi-compile bisect … --write FILE` wrote")
    ] = None,
) -> None:
    """Turn a dump into one HTML page that opens in a browser, offline.

    The page contains the lines of your program around those that the graphs came from."""
    from .. import report as pages

    page = pages.make(folder, bisection)
    write(output, page, "--output")
    typer.echo(f"written to {output} ({len(page) / 1e6:.1f} MB)")


@app.command()
@sentences
def audit(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="an audit.json or a folder written by dump_dir; with --target, a model's folder"
        ),
    ],
    check: Annotated[bool, typer.Option("--check", help="compare two; exit code 1 if they differ")] = False,
    target: Annotated[
        str | None, typer.Option(help="ascend-a2, ascend-a3 or ascend-950: audit a model of transformers for it, here")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="every node, line by line")] = False,
    verdict: Annotated[
        list[str] | None, typer.Option(metavar="VERDICT", help="the nodes with this verdict; may be repeated")
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(metavar="OPERATOR", help="the nodes of this operator, or a part of its name; may be repeated"),
    ] = None,
    as_json: Json = False,
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="with --target: write the graph there, for inspect and report")
    ] = None,
) -> None:
    """Print certificates: what the audit objects to, trusts and found replaced; with --check A B, compare two.

    With --target, show what the passes would do to a model on Ascend, without an NPU. Exit code 1 if a graph is not
    batch-invariant, or if two certificates differ.
    """
    from ..audit import certificate
    from ..audit.spec import Verdict
    from ..errors import OptionError, meant
    from . import audit as shown

    if dump is not None and target is None:
        raise OptionError("--dump goes with --target: a certificate is of a graph that was dumped already")
    if target is not None and (check or len(paths) != 1):
        raise OptionError("audit --target takes one folder of a model, and no --check")
    if target is not None:
        raise typer.Exit(OK if shown.offline(paths[0], target, dump, console()) else FOUND)
    if len(paths) != (2 if check else 1):
        raise OptionError(f"audit takes {'two paths with --check' if check else 'one path'}, got {len(paths)}")
    out = console()
    if check:
        differences = shown.differences(*paths)
        if as_json:
            print_json([d._asdict() for d in differences])
        elif differences:
            out.print(shown.differences_table(paths[0], paths[1], differences))
        else:
            typer.echo("no difference: the same graphs, versions, passes and trust")
        raise typer.Exit(FOUND if differences else OK)
    found = certificate.read(paths[0])
    known = [v.value for v in Verdict]
    unknown = [v for v in verdict or () if v not in known]
    if unknown:
        raise OptionError(f"--verdict {unknown[0]!r}{meant(unknown[0], known)}: the verdicts are {', '.join(known)}")
    asked = verdict or (known if everything or op or as_json else shown.SHOWN)
    if as_json:
        print_json({k: {**c, "nodes": shown.chosen(c, asked, op or ())} for k, c in found.items()})
    else:
        for table in shown.tables(found, asked, op or (), nodes=bool(everything or verdict or op)):
            out.print(table)
    raise typer.Exit(OK if all(c["invariant"] for c in found.values()) else FOUND)


@app.command()
@sentences
def doctor(
    probe_file: Annotated[
        Path | None, typer.Option("--probe", help="also check a file of `bi-compile probe`: does it fit this machine?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, kernels, plugins, settings. Exit code 1 if something needed is missing."""
    from . import doctor as checks

    out = console(as_json)
    lines = checks.look(out, probe_file)
    if as_json:
        print_json([dataclasses.asdict(line) for line in lines])
    else:
        checks.show(out, lines)
    raise typer.Exit(OK if checks.well(lines) else FOUND)


@app.command()
@sentences
def build() -> None:
    """Compile the C++ kernels in advance, for this processor, PyTorch and Python, and print where they are.

    Otherwise the first call compiles them, and a serving host may have no compiler. Set TORCH_EXTENSIONS_DIR to choose the folder, for
    this command and for the host. The kernels for CUDA are built if PyTorch finds a CUDA device; Triton's need no compiler."""
    import torch

    from ..kernels import calls, cpu

    extensions = [cpu.EXTENSION, calls.EXTENSION]
    if torch.cuda.is_available():
        from ..kernels.cuda.build import EXTENSION as CUDA_EXTENSION  # needs Triton

        extensions.append(CUDA_EXTENSION)
    for extension in extensions:
        there = extension.is_built()
        extension.load()
        typer.echo(f"{extension.prefix}: {'was built already' if there else 'built'}, {extension.build_folder()}")


@app.command()
@sentences
def passes(
    markdown: Annotated[bool, typer.Option("--markdown", help="as docs/reference/operators.md")] = False,
    as_json: Json = False,
) -> None:
    """Print the reference table: each operator, what replaces it, why, and the source."""
    from . import reference

    if as_json:
        print_json(reference.to_json())
    elif markdown:
        typer.echo(reference.markdown(), nl=False)
    else:
        out = console()
        for table in reference.tables():
            out.print(table)


app.add_typer(verify_app, name="verify")
app.add_typer(bisect_app, name="bisect")
app.command()(probe)

if __name__ == "__main__":
    app()

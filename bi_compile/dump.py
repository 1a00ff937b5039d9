"""A folder for each graph: the graph as it came, after each pass, the difference, and the audit.

    DIR/graph_000_captured/00_before.py        a Python program that runs the graph
                          /01_softmax.py       the same after the pass `softmax`
                          /changes.json        how many nodes compute something, what each pass did, and how long it took
                          /changes.diff        from first to last
                          /before.json         the nodes as data: dtype, size, stride, the lines of the user's program (see `describe`)
                          /after.json          the same of what was handed on
       /graph_001_final/…/audit.json           the certificate: the verdict on each node of the graph that runs (see `certificate`)

`bi-compile inspect DIR` prints them as tables, `bi-compile report DIR` makes a page of them. Under TORCH_TRACE programs, difference,
counts and certificate are also artifacts of PyTorch's structured trace, which `tlparse` shows, with a folder or without.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor, fx

from .audit.describe import describe
from .errors import OptionError
from .rewrite.splice import Change

_PROGRAM = '''\
"""{title}

Runs by itself: `python {name}`. Inputs are random, of the sizes that the compiler saw (a symbolic one by its hint).{needs}
"""
import importlib

import torch
import torch.fx._pytree as fx_pytree
from math import inf, nan
from torch import device
import bi_compile.ops
{imports}{stand_ins}

def forward({parameters}):
{body}

INPUTS = [
{inputs}
]

if __name__ == "__main__":
    torch.manual_seed(0)
    for i, out in enumerate(torch.utils._pytree.tree_leaves(forward(*(make() for make in INPUTS)))):
        print(i, tuple(out.shape) if isinstance(out, torch.Tensor) else out, getattr(out, "dtype", ""))
'''

_STAND_INS = """
# these read the forward context of a vLLM engine, which is not here: what they would write or return holds nothing in particular
STAND_INS = torch.library.Library("vllm", "IMPL")


def nothing(*args, **kwargs):
    return torch.empty_like([*args, *kwargs.values()][0])


for name in {names}:
    returns = getattr(torch.ops.vllm, name).default._schema.returns
    STAND_INS.impl(name, nothing if returns else lambda *args, **kwargs: None, {key!r}, allow_override=True)
"""

#: namespace of operators -> the module that registers them when it is imported
_REGISTERED_BY = {
    "vllm_ir": "vllm.ir.ops",
    "_C": "vllm._custom_ops",
    "vllm": "vllm.model_executor.layers.attention",
}


class Dump:
    """Writes the graphs of one process into a folder, if one is named; several processes may share it."""

    def __init__(self, folder: str | None) -> None:
        self.folder = Path(folder) if folder else None
        self.last: GraphDump | None = None
        self._traced = itertools.count()

    def begin(self, stage: str, graph: fx.Graph) -> GraphDump | None:
        """The dump of one graph; None where nobody would see it."""
        self.last = None
        if self.folder is not None:
            self.last = GraphDump(self._new(self.folder, stage).name, graph, self.folder)
        elif _traced():
            self.last = GraphDump(f"graph_{next(self._traced):03d}_{stage}", graph, None)
        return self.last

    @staticmethod
    def _new(folder: Path, stage: str) -> Path:
        """A folder for a graph, with the next number that is free."""
        for number in range(len(list(folder.glob("graph_*"))), 1_000_000):
            path = folder / f"graph_{number:03d}_{stage}"
            if any(folder.glob(f"graph_{number:03d}_*")):
                continue
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
            except OSError as error:
                raise OptionError(
                    f"dump_dir={str(folder)!r} cannot be written ({error.strerror}): name a folder that can"
                ) from error
        raise OptionError(f"dump_dir={str(folder)!r} holds a million graphs: name a new folder")


class GraphDump:
    """What is written of one graph."""

    def __init__(self, name: str, graph: fx.Graph, folder: Path | None) -> None:
        self.name = name
        self.path = None if folder is None else folder / name
        self.steps: list[dict[str, Any]] = []
        self.nodes_before = _computed(graph)
        self.first = self._program("before", graph, "The graph as it came in.")
        self.latest = self.first
        self._nodes("before.json", graph)

    def after(self, pass_name: str, graph: fx.Graph, changes: list[Change], seconds: float) -> None:
        self.latest = self._program(
            pass_name,
            graph,
            f"The graph after the pass {pass_name}: {len(changes)} replaced in {seconds * 1e3:.1f} ms.",
        )
        self.steps.append({"pass": pass_name, "seconds": seconds, "changes": [dataclasses.asdict(c) for c in changes]})

    def end(self, graph: fx.Graph) -> None:
        counts = {"nodes_before": self.nodes_before, "nodes_after": _computed(graph)}
        self.write("changes.json", json.dumps({**counts, "passes": self.steps}, indent=1))
        lines = difflib.unified_diff(self.first, self.latest, "before", "after", lineterm="")
        self.write("changes.diff", "\n".join(lines) + "\n")
        self._nodes("after.json", graph)

    def write(self, name: str, text: str) -> None:
        """Into the folder, and into PyTorch's structured trace, if there is one."""
        if self.path is not None:
            (self.path / name).write_text(text)
        torch._logging.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"bi_compile_{self.name}_{name}", "encoding": "string"},
            payload_fn=lambda: text,
        )

    def _nodes(self, name: str, graph: fx.Graph) -> None:
        if self.path is not None:  # for `bi-compile report`, which reads folders
            (self.path / name).write_text(json.dumps(describe(graph), separators=(",", ":")))

    def _program(self, label: str, graph: fx.Graph, title: str) -> list[str]:
        name = f"{len(self.steps) + (label != 'before'):02d}_{label}.py"
        text = program(graph, title, name)
        self.write(name, text)
        return text.splitlines()


def _traced() -> bool:
    """Whether PyTorch writes a structured trace, as TORCH_TRACE makes it do."""
    return bool(torch._logging._internal.trace_log.handlers)


def _computed(graph: fx.Graph) -> int:
    """How many nodes compute something: what is neither an input, nor a constant, nor the output."""
    return sum(node.op not in ("placeholder", "get_attr", "output") for node in graph.nodes)


def program(graph: fx.Graph, title: str, name: str) -> str:
    """A Python program that runs `graph` on random inputs."""
    code = graph.python_code(root_module="self", verbose=True, include_stride=True, include_device=True)
    _, _, body = code.src.lstrip().partition("\n")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    constants = [n for n in graph.nodes if n.op == "get_attr"]
    called = [x for n in graph.nodes for x in (n.target, *n.args) if isinstance(x, torch._ops.OpOverload)]
    spaces = {op.namespace for op in called}
    imports = [f"import {module}\n" for space, module in _REGISTERED_BY.items() if space in spaces]
    foreign = sorted(s for s in spaces - {"aten", "prims", "bi_compile", "inductor"} if not s.startswith("_"))
    needs = f" It needs the operators of {', '.join(foreign)} registered." if foreign else ""
    if constants:
        needs += f" Constants of the program ({', '.join(str(n.target) for n in constants)}) are made anew, at random."
    in_an_engine = sorted({op._opname for op in called if _needs_an_engine(op)})
    if in_an_engine:
        needs += f" Without an engine {', '.join(in_an_engine)} compute nothing here: see STAND_INS."
    return _PROGRAM.format(
        title=title,
        name=name,
        needs=needs,
        imports="".join(imports),
        stand_ins=_STAND_INS.format(names=in_an_engine, key=_dispatch_key(inputs)) if in_an_engine else "",
        parameters=", ".join(n.name for n in inputs),
        body=_constants(constants) + body.rstrip(),
        inputs="\n".join(f"    lambda: {_make(n)},  # {_called(n)} {_type(n)}" for n in inputs),
    ).replace(os.linesep, "\n")


def _called(node: fx.Node) -> str:
    """The placeholder's name, and what the program calls it where that is known."""
    name = node.meta.get("bi_compile_input")
    return f"{node.name} ({name})" if name else node.name


def _needs_an_engine(op: torch._ops.OpOverload) -> bool:
    """vLLM's attention, and what else finds its layer by name in the engine's forward context."""
    return op.namespace == "vllm" and any(a.name == "layer_name" for a in op._schema.arguments)


def _dispatch_key(inputs: list[fx.Node]) -> str:
    """That of the graph's device."""
    values = [n.meta.get("val") for n in inputs]
    devices = [v.device.type for v in values if isinstance(v, Tensor)]
    return torch._C._dispatch_key_for_device(next((d for d in devices if d != "cpu"), "cpu"))


def _constants(nodes: list[fx.Node]) -> str:
    if not nodes:
        return ""
    lines = ["    import types", "    self = types.SimpleNamespace()"]
    lines += [f"    setattr(self, {str(n.target)!r}, {_make(n)})" for n in nodes]
    return "\n".join(lines) + "\n"


def _hint(x: Any) -> int:
    if isinstance(x, int):
        return x
    hint = x.node.hint if isinstance(x, SymInt) else None
    return int(hint) if hint is not None else 8


def _type(node: fx.Node) -> str:
    v = node.meta.get("val")
    if v is not None and hasattr(v, "real_obj"):
        return type(v.real_obj).__name__  # without the address of the object
    return f"{v.dtype} {[str(n) for n in v.shape]}" if isinstance(v, Tensor) else str(v)


def _make(node: fx.Node) -> str:
    v = node.meta.get("val")
    if isinstance(v, Tensor):
        size, stride = [_hint(n) for n in v.shape], [_hint(n) for n in v.stride()]
        fill = ".normal_(std=0.1)" if v.is_floating_point() else ".zero_()"
        return f"torch.empty_strided({size}, {stride}, dtype={v.dtype}, device={str(v.device)!r}){fill}"
    real: Any = getattr(v, "real_obj", None)  # a FakeScriptObject: an opaque value, vLLM's name of a layer for one
    if hasattr(type(real), "__fx_repr__"):
        text, used = real.__fx_repr__()
        for name, cls in used.items():
            text = text.replace(name, f"importlib.import_module({cls.__module__!r}).{cls.__qualname__}", 1)
        return str(text)
    leaves = pytree.tree_leaves(v)
    return str(_hint(leaves[0])) if leaves and isinstance(leaves[0], (int, SymInt)) else repr(v)

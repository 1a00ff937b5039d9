"""A graph's nodes as data: what a reader of a dump wants to know of each, beside the verdict."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from ..rewrite.fx_utils import as_list, subgraphs
from ..user_code import is_of_the_model
from .report import argument_text, described, operator_name, value_of_node


class Frame(NamedTuple):
    """One line of a program on the way to a node."""

    file: str
    line: int
    function: str
    code: str


def describe(graph: fx.Graph) -> dict[str, Any]:
    """`frames`, each once, and `nodes` in the graph's order, those of the graphs that it holds behind their node.

    A node: its name, what kind of node it is (`op`), `operator`, `arguments`, `value` (dtype and sizes) and `stride` of each result,
    `inputs` (names), `stack` (numbers of frames, the outermost first), `own` (which of these is the line of the user's model), `layer` (the path of
    the module), `input` (what the program calls it, where that is known) and for what a pass put there `made` (`pass`, `node`, `operator`).
    """
    frames: dict[Frame, int] = {}
    nodes = list(_nodes(graph, "", frames))
    return {"frames": [list(f) for f in frames], "nodes": nodes}


def _nodes(graph: fx.Graph, inside: str, frames: dict[Frame, int]) -> Iterator[dict[str, Any]]:
    for node in graph.nodes:
        stack = stack_of(node.meta.get("stack_trace") or "")
        found: dict[str, Any] = {
            "node": inside + node.name,
            "op": node.op,
            "operator": operator_name(node),
            "arguments": argument_text(node),
            "value": described(value_of_node(node)),
            "stride": ", ".join(
                f"[{', '.join(map(str, v.stride()))}]"
                for v in as_list(value_of_node(node))
                if isinstance(v, Tensor) and not v.is_sparse and not v.is_sparse_csr
            ),
            "inputs": [inside + x.name for x in node.all_input_nodes],
            "stack": [frames.setdefault(f, len(frames)) for f in stack],
            "own": max((i for i, f in enumerate(stack) if is_of_the_model(f.file)), default=len(stack) - 1),
            "layer": layer_of(node),
        }
        made = node.meta.get("bi_compile")
        if made:
            found["made"] = {"pass": made["pass"], "node": made["node"], "operator": made["replaced"]}
        if "bi_compile_input" in node.meta:
            found["input"] = node.meta["bi_compile_input"]
        yield found
        for name, body, _, _ in subgraphs(node):
            yield from _nodes(body.graph, f"{inside}{node.name}/{name}/", frames)


@functools.lru_cache(maxsize=4096)
def stack_of(trace: str) -> tuple[Frame, ...]:
    """The frames of a node's `stack_trace`, the outermost first."""
    lines = trace.splitlines()
    found = []
    for i, line in enumerate(lines):
        match = re.match(r'\s*File "(.*)", line (\d+)(?:, in (.*))?', line)
        if match:
            after = lines[i + 1].strip() if i + 1 < len(lines) else ""
            code = "" if after.startswith('File "') else after
            found.append(Frame(match[1], int(match[2]), match[3] or "", code))
    return tuple(found)


def layer_of(node: fx.Node) -> str:
    """The path of the innermost module that the node was traced in, as `layers.3.self_attn`; empty where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()), ("",))[0]) if stack else ""
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    return re.sub(
        r"\._modules\['(\w+)'\]|\[(?:'(\w+)'|(\d+))\]", lambda m: "." + next(g for g in m.groups() if g), path
    )

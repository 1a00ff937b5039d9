"""What several test modules share: graphs of one operator, comparisons bit for bit, programs of their own."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from bi_compile import Options, Pipeline
from bi_compile.audit.report import Report, audit
from bi_compile.audit.spec import Knowledge, Verdict
from bi_compile.passes import PASSES
from bi_compile.rewrite.splice import Change, rewrite
from bi_compile.table import Pass, Table
from bi_compile.targets import get_target

#: operator, arguments, keywords
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
STACK_TRACE = '  File "model.py", line 7, in forward\n    y = layer(x)\n'
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: largest relative and absolute difference between two right results
TOLERANCE = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (3e-3, 3e-3),
    torch.float64: (1e-9, 1e-9),
}
BATCHES = (1, 2, 3, 16, 17, 33)


def rand(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same arguments."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 4).round().to(dtype) if not dtype.is_floating_point else x.to(dtype)


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results are equal bit for bit, the sign of zero included; any NaN is equal to any NaN."""
    xs, ys = tensors(a), tensors(b)
    return len(xs) == len(ys) and all(_same(x, y) for x, y in zip(xs, ys, strict=True))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.is_complex():
        return _same(torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj()))
    if not x.is_floating_point():
        return torch.equal(x, y)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    differ = x.contiguous().view(bits) != y.contiguous().view(bits)
    return not bool((differ & ~(x.isnan() & y.isnan())).any())


def close(a: Any, b: Any) -> None:
    """Assert that two results are of one dtype and shape, and equal but for rounding."""
    xs, ys = tensors(a), tensors(b)
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, (x.dtype, x.shape, y.dtype, y.shape)
        rtol, atol = TOLERANCE.get(x.dtype, (0, 0))
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


def rows_equal(f: Callable[[Tensor], Any], rows: Tensor, batches: Iterable[int] = BATCHES) -> bool:
    """Whether row 0 of `rows` gives the same bits alone, and first, in the middle and last in every batch."""
    alone = f(rows[:1])
    for n in batches:
        for at in {0, n // 2, n - 1}:
            order = [i for i in range(1, n)]
            order.insert(at, 0)
            if not same_bits([t[at : at + 1] for t in tensors(f(rows[order]))], alone):
                return False
    return True


# -- graphs -----------------------------------------------------------------------------------------------------------


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)


def faked(mode: FakeTensorMode, x: Tensor, name: str = "x", dynamic: Sequence[int] = ()) -> Tensor:
    """The fake of `x`; the dimensions whose size is in `dynamic` get a symbol, one for each size."""
    sizes = [DimDynamic.DUCK if n in dynamic else DimDynamic.STATIC for n in x.shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(x, static_shapes=False, source=ConstantSource(name), symbolic_context=context)


def graph_of(*calls: Call, dynamic: Sequence[int] = ()) -> tuple[fx.GraphModule, list[Tensor], list[fx.Node]]:
    """A graph that makes each call and returns every result; its inputs; the calls' nodes.

    dynamic: the sizes that become symbols.
    """
    mode, graph = fake_mode(), fx.Graph()
    inputs = tensors([(args, kwargs) for _, args, kwargs in calls])
    holes = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    for node, x in zip(holes, inputs, strict=True):
        node.meta["val"] = faked(mode, x, node.name, dynamic)
    given = iter(holes)
    nodes, outs = [], []
    for op, args, kwargs in calls:
        args, kwargs = pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        node = graph.call_function(op, args, kwargs)
        fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            node.meta["val"] = value = op(*fake_args, **fake_kwargs)
        node.meta["stack_trace"] = STACK_TRACE
        node.meta["nn_module_stack"] = {"layer": ("layer", "Layer")}
        nodes.append(node)
        if isinstance(value, Tensor):
            outs.append(node)
            continue
        for i in [i for i, v in enumerate(value) if isinstance(v, Tensor)]:
            item = graph.call_function(operator.getitem, (node, i))
            item.meta["val"] = value[i]
            outs.append(item)
    graph.output(tuple(outs))
    return fx.GraphModule({}, graph), inputs, nodes


def traced(f: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> fx.GraphModule:
    """`f` as a graph of operators without decompositions, with fake values on its nodes."""
    return make_fx(f, tracing_mode="symbolic" if dynamic else "fake")(*inputs)


def traced_rows(f: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """`traced`, with a symbol for the number of rows of the first input, and for no other size."""
    mode = fake_mode()
    dynamic = [inputs[0].shape[0]]
    with mode, torch.no_grad():
        return make_fx(f)(*(faked(mode, x, f"x{i}", dynamic) for i, x in enumerate(inputs)))


def captured(
    f: Callable[..., Any], *inputs: Any, dynamic: bool = False, decompositions: Mapping[Any, Any] | None = None
) -> fx.GraphModule:
    """`f` as AOTAutograd captures it: functional, without dead code; its outputs come as a list."""
    graphs: list[fx.GraphModule] = []

    def grab(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    with torch.no_grad():
        aot_function(
            f, fw_compiler=grab, inference_compiler=grab, decompositions=dict(decompositions or {}), dynamic=dynamic
        )(*inputs)
    (gm,) = graphs
    return gm


def targets(graph: fx.Graph) -> list[str]:
    """The operators of a graph, in order."""
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def results(graph: fx.Graph) -> list[Tensor]:
    """The fake values that a graph returns."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    return [n.meta["val"] for n in output.all_input_nodes]


def run(gm: fx.GraphModule, *inputs: Any) -> Any:
    gm.recompile()
    return gm(*inputs)


def table(*passes: type[Pass], target: str = "cpu") -> Table:
    return Table(passes or PASSES, target)


def rewrite_all(graph: fx.Graph, *passes: type[Pass]) -> list[Change]:
    """Run `passes` (default: all) over a graph, operator by operator."""
    by = table(*passes)
    changes = [c for p in passes or PASSES for c in rewrite(graph, by, p.name)]
    graph.lint()
    return changes


def knowledge(*passes: type[Pass], trust: Mapping[str, str] | None = None) -> Knowledge:
    """What the audit knows where `passes` were applied (default: all)."""
    return Knowledge(get_target("cpu"), table(*passes), table(), trust or {})


def pipeline(**options: Any) -> Pipeline:
    return Pipeline(Options(**options))


# -- processes --------------------------------------------------------------------------------------------------------


def python(program: str, *args: str, **environ: str) -> str:
    """Run `program` in a process of its own; what it printed.

    Raises:
        AssertionError: it failed; the message holds its output.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def judged(
    f: Callable[..., Any],
    *inputs: Tensor,
    named: dict[str, int] | None = None,
    trust: dict[str, str] | None = None,
    dynamic: bool = True,
) -> Report:
    gm = traced(f, *inputs, dynamic=dynamic and named is None)
    return audit(gm.graph, knowledge(trust=trust), named)


def verdicts(report: Report) -> list[Verdict]:
    return [f.verdict for f in report.findings]

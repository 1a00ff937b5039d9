"""A verdict on every node of the graph that will run.

The rules stand in `SPEC`, read from the top: the first rule that knows an operator decides, and one that no rule knows is
unproven. In addition an operator that combines a dimension which carries rows (see `rows`) mixes rows, whatever its
order. Graphs within the graph (cond, while_loop, scan, map, invoke_subgraph) are judged with it; any other higher-order
operator is unproven.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from ..errors import AuditError
from ..ops import NAMESPACE
from ..rewrite.splice import source_line, values_of
from ..table import Table
from ..targets import Target
from . import batch_dims


class Verdict(str, enum.Enum):
    """What is known of a node."""

    ROW_LOCAL = "row-local"
    """A row of its output is a function of the same row of its inputs, by the operator's nature."""
    REPLACED = "replaced"
    """An operator of bi_compile."""
    TRUSTED = "trusted"
    """Declared invariant by the target or by the user, with a reason."""
    VARIANT = "variant"
    """Known to vary with the batch."""
    MIXES_ROWS = "mixes rows"
    """Its output is one value from several rows of the batch."""
    UNPROVEN = "unproven"
    """Nothing is known."""


ALLOWED = (Verdict.ROW_LOCAL, Verdict.REPLACED, Verdict.TRUSTED)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The verdict on one node."""

    node: str
    operator: str
    verdict: Verdict
    reason: str
    where: str
    rows_in: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Input node -> the dimensions of its value that carry rows."""
    rows_out: tuple[int, ...] = ()
    """The dimensions of the (first) result that carry rows."""
    value: str = ""
    """dtype and size of each result."""
    arguments: str = ""
    """The arguments; a node by its name."""

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}) {self.verdict.value}: {self.reason}{' — ' + self.where if self.where else ''}"


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What the rules may look at besides the node."""

    target: Target
    table: Table
    """The passes that were applied."""
    known: Table
    """Every pass there is, applied or not."""
    trust: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator with its arguments, fake or real: a node of a graph, or a call that is about to run."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    complete: bool = True
    """Whether the arguments are the operator's own; not so where a mutable operator's were taken apart into views."""

    @property
    def name(self) -> str:
        """`ns.packet.overload`; a Triton kernel that the program calls is triton.NAME."""
        return triton_kernel(self.kwargs) if str(self.target).startswith("triton_kernel_wrapper") else str(self.target)


Found: TypeAlias = "tuple[Verdict, str] | None"
Rule = Callable[[Call, Knowledge], Found]

_A = torch.ops.aten
#: rows are made, moved, joined or taken apart; nothing is added up
MOVES = {
    str(overload)
    for packet in (
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided full full_like new_full zeros zeros_like "
        "new_zeros ones ones_like new_ones arange scalar_tensor lift_fresh_copy eye tril_indices triu_indices linspace "
        "clone copy copy_ _to_copy contiguous constant_pad_nd cat stack hstack vstack repeat tile roll flip fill fill_ "
        "embedding index index_select gather take take_along_dim masked_scatter index_copy index_copy_ "
        "index_fill scatter scatter_ slice_scatter select_scatter diagonal_scatter as_strided_scatter "
        "index_put index_put_ _unsafe_index _unsafe_index_put _unsafe_masked_index narrow_copy unfold_copy "
        "reshape flatten _reshape_copy _unsafe_view view_copy permute_copy expand_copy split_with_sizes_copy unbind_copy "
        "sym_size sym_stride sym_numel sym_storage_offset tril triu one_hot _local_scalar_dense item "
        "_assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size detach alias"
    ).split()
    if hasattr(_A, packet)
    for overload in (getattr(getattr(_A, packet), o) for o in getattr(_A, packet).overloads())
} | {
    "prims.iota.default", "prims.convert_element_type.default", "prims.broadcast_in_dim.default", "prims.device_put.default",
    "prims.inductor_force_stride_order.default", "prims.inductor_lookup_seed.default", "prims.full.default", "prims.full_like.default", "prims.fill.default",
    "prims.empty.default", "prims.empty_permuted.default", "prims.scalar_tensor.default", "prims.cat.default", "prims.clone.default",
    "prims.reshape.default", "prims.rev.default", "prims.collapse.default", "prims.as_strided.default", "prims._make_token.default", "prims._sink_tokens.default",
    "prims._inductor_bucketize.default", "prims.empty_strided.default", "inductor.resize_storage_bytes_.default",
    "_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.all_to_all_single.default",
    "_c10d_functional.broadcast.default", "_c10d_functional.wait_tensor.default",
}  # fmt: skip
#: a maximum, a count or a test comes out the same in every order
ORDER_FREE = {
    str(overload)
    for packet in "amax amin aminmax max min argmax argmin any all count_nonzero cummax cummin topk sort argsort kthvalue searchsorted bucketize isin".split()
    for overload in (getattr(getattr(_A, packet), o) for o in getattr(_A, packet).overloads())
} | {"prims.amax.default", "prims.amin.default", "prims.xor_sum.default"}  # fmt: skip
#: pointwise, though PyTorch does not tag them so
POINTWISE = {
    f"prims.{name}.default"
    for name in (
        "abs acos acosh add asin asinh atan atan2 atanh bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 bitwise_and "
        "bitwise_not bitwise_or bitwise_xor cbrt ceil cos cosh digamma div eq erf erf_inv erfc erfcx exp exp2 expm1 floor fma fmax fmin "
        "fmod frexp gcd ge gt hypot igamma igammac inductor_cvt_e8m0_rceil isfinite le lgamma log log10 log1p log2 lt maximum minimum mul "
        "ndtri ne neg nextafter pow reciprocal remainder round rsqrt shift_left shift_right_arithmetic sign signbit sin sinh "
        "spherical_bessel_j0 sqrt sub tan tanh trunc where zeta"
    ).split()
} | {"aten.floor_divide.default", "aten.floor_divide.Scalar"}
#: random, though PyTorch does not tag them so
RANDOM_PRIMS = ("prims.inductor_random.default", "prims.inductor_randint.default")
#: writes that add up where indices meet: the order of the sum follows the rows
ACCUMULATING = ("index_put", "_unsafe_index_put", "index_put_")


#: how many elements they give, and where, follows the values of all rows
DATA_DEPENDENT = tuple(
    f"aten.{name}."
    for name in "nonzero nonzero_static masked_select _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive bincount histc "
    "histogram repeat_interleave".split()
)


def _ours(call: Call, known: Knowledge) -> Found:
    return (Verdict.REPLACED, "an operator of bi_compile") if call.name.startswith(f"{NAMESPACE}.") else None


def _trusted(call: Call, known: Knowledge) -> Found:
    for trust in (known.trust, known.target.trusted):
        reason = trust.get(call.name) or trust.get(registered_name(call.name))
        if reason:
            return Verdict.TRUSTED, reason
    return None


def _row_local_here(call: Call, known: Knowledge) -> Found:
    reason = known.target.row_local.get(registered_name(call.name))
    return None if reason is None else (Verdict.ROW_LOCAL, reason)


def _known_to_be_unknown(call: Call, known: Knowledge) -> Found:
    needed = known.target.needed.get(registered_name(call.name))
    return None if needed is None else (Verdict.UNPROVEN, f"{needed}; {_unknown(call.name)}")


def _in_a_table(call: Call, known: Knowledge) -> Found:
    for table, remedy in ((known.table, "the pass {} should have replaced it"), (known.known, "add the pass {}")):
        found = table.get(call.target)
        if found is not None:
            entry = found[0]
            if call.complete and entry.stays(*call.args, **call.kwargs):
                return Verdict.ROW_LOCAL, "exact for these arguments in every order"
            return Verdict.VARIANT, f"{entry.why}; {remedy.format(repr(entry.pass_name))}"
    return None


def _random(call: Call, known: Knowledge) -> Found:
    if isinstance(call.target, OpOverload) and (
        torch.Tag.nondeterministic_seeded in call.target.tags or call.name in RANDOM_PRIMS
    ):
        return Verdict.UNPROVEN, "draws random numbers, which follow a row's place in the batch"
    return None


def _accumulates(call: Call, known: Knowledge) -> Found:
    if not isinstance(call.target, OpOverload):
        return None
    packet = call.target._overloadpacket.__name__
    adds = packet in ACCUMULATING and (call.args[3] if len(call.args) > 3 else call.kwargs.get("accumulate", False))
    if adds or (packet in ("scatter", "scatter_") and "reduce" in call.target._overloadname):
        return Verdict.UNPROVEN, "adds up where indices meet, in an order that nothing fixes"
    return None


def _data_dependent(call: Call, known: Knowledge) -> Found:
    if call.name.startswith(DATA_DEPENDENT):
        return Verdict.UNPROVEN, "how many elements it gives, and where, follows the values of all rows"
    return None


def _moves(call: Call, known: Knowledge) -> Found:
    if call.name in MOVES or (isinstance(call.target, OpOverload) and call.target.is_view):
        return Verdict.ROW_LOCAL, "makes or moves elements"
    return None


def _pointwise(call: Call, known: Knowledge) -> Found:
    if isinstance(call.target, OpOverload) and (torch.Tag.pointwise in call.target.tags or call.name in POINTWISE):
        return Verdict.ROW_LOCAL, "pointwise"
    return None


def _order_free(call: Call, known: Knowledge) -> Found:
    return (Verdict.ROW_LOCAL, "the same in every order") if call.name in ORDER_FREE else None


#: the rules, first match first
SPEC: tuple[Rule, ...] = (
    _ours,
    _trusted,
    _in_a_table,
    _row_local_here,
    _known_to_be_unknown,
    _random,
    _accumulates,
    _data_dependent,
    _moves,
    _pointwise,
    _order_free,
)


def judge(call: Call, known: Knowledge) -> tuple[Verdict, str]:
    """The verdict on an operator by itself: the first rule that knows it."""
    return next((found for rule in SPEC if (found := rule(call, known))), (Verdict.UNPROVEN, _unknown(call.name)))


def registered_name(name: Any) -> str:
    """`ns::packet`, or `ns::packet.overload` where the overload has a name."""
    return str(name).removesuffix(".default").replace(".", "::", 1)


def _unknown(name: str) -> str:
    return (
        f"nothing is known about {name}; if it is invariant, say so and why: "
        f'trust={{"{registered_name(name)}": "the reason"}}; otherwise replace it in a pass of yours'
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """The audit of one graph."""

    target: str
    findings: tuple[Finding, ...]

    @property
    def objections(self) -> tuple[Finding, ...]:
        """The findings that keep the graph from being batch-invariant."""
        return tuple(f for f in self.findings if f.verdict not in ALLOWED)

    def counts(self) -> dict[str, int]:
        return dict(Counter(f.verdict.value for f in self.findings))

    def raise_objections(self) -> None:
        """Raise AuditError if there are objections."""
        if self.objections:
            raise AuditError(
                "this graph is not known to be batch-invariant:\n" + "\n".join(f"  {f}" for f in self.objections)
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "counts": self.counts(),
            "nodes": [{**dataclasses.asdict(f), "verdict": f.verdict.value} for f in self.findings],
        }


def audit(graph: fx.Graph, knowledge: Knowledge, batch: Mapping[str, int] | None = None) -> Report:
    """Judge every node, also of the graphs that higher-order operators hold.

    Args:
        graph: with fake values in `meta["val"]`.
        batch: placeholder -> its batch dimension, for a graph of static shapes. Otherwise a batch dimension is one whose
            size holds the free symbol of the first symbolic dimension of an input.
    """
    return Report(knowledge.target.name, tuple(_findings(graph, knowledge, batch_dims.follow(graph, batch), "")))


def _findings(graph: fx.Graph, known: Knowledge, found: batch_dims.Rows, inside: str) -> Iterator[Finding]:
    for node in graph.nodes:
        verdict, reason = _judge_node(node, known, found)
        yield Finding(
            inside + node.name,
            operator_name(node),
            verdict,
            reason,
            source_line(node),
            {x.name: found.dims(x) for x in node.all_input_nodes if found.dims(x)},
            found.dims(node),
            _described(_value(node)),
            _without_addresses(", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])),
        )
        for name, body, inner in found.bodies.get(node, ()):
            yield from _findings(body, known, inner, f"{inside}{node.name}/{name}/")


def _judge_node(node: fx.Node, known: Knowledge, found: batch_dims.Rows) -> tuple[Verdict, str]:
    if node.op in ("placeholder", "get_attr", "output"):
        return Verdict.ROW_LOCAL, "an input, a constant or the output"
    if node in found.mixed:
        return Verdict.MIXES_ROWS, found.mixed[node]
    if node in found.grouped:
        return Verdict.ROW_LOCAL, found.grouped[node]
    if node.target is operator.getitem:
        return Verdict.ROW_LOCAL, "one of several outputs"
    is_operator = isinstance(node.target, (OpOverload, HigherOrderOperator))
    if not is_operator and not isinstance(node.meta.get("val"), Tensor):
        return Verdict.ROW_LOCAL, "arithmetic on sizes"
    if found.bodies.get(node):
        return Verdict.ROW_LOCAL, "the graphs that it holds are judged with it"
    return judge(call_of(node), known)


def call_of(node: fx.Node) -> Call:
    """What a node calls; a mutable operator that was made functional goes by its own name."""
    kind = node.target.name() if isinstance(node.target, HigherOrderOperator) else ""
    if kind and not kind.startswith("auto_functionalized"):  # what it holds has no values
        return Call(node.target, node.args, node.kwargs)
    args, kwargs = values_of(node)
    if kind:
        return Call(args[0], args[1:], kwargs, complete=kind == "auto_functionalized")
    return Call(node.target, args, kwargs)


def triton_kernel(kwargs: Mapping[str, Any]) -> str:
    """`triton.NAME` of the kernel that a Triton wrapper's arguments name."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(kwargs["kernel_idx"])
    while not hasattr(kernel, "__name__"):  # what tunes or guards a kernel holds it as .fn
        kernel = kernel.fn
    return f"triton.{kernel.__name__}"


def operator_name(node: fx.Node) -> str:
    """What a node calls, as the verdict names it."""
    if isinstance(node.target, HigherOrderOperator):
        if node.target.name().startswith("auto_functionalized"):
            return str(node.args[0])
        return Call(node.target, (), node.kwargs).name
    return str(node.target)


def _value(node: fx.Node) -> Any:
    """The node's value; a constant's from the module that holds it, where no compiler has noted it."""
    owner = node.graph.owning_module
    if node.op == "get_attr" and "val" not in node.meta and owner is not None:
        held = getattr(owner, str(node.target), None)
        return held if isinstance(held, Tensor) else None
    return node.meta.get("val")


def _without_addresses(text: str) -> str:
    """The addresses of objects differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _described(value: Any) -> str:
    """`dtype[sizes]` of each tensor of a value."""
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return ", ".join(
        f"{str(v.dtype).removeprefix('torch.')}[{', '.join(map(str, v.shape))}]"
        if isinstance(v, Tensor)
        else _without_addresses(str(v))
        for v in leaves
        if v is not None
    )

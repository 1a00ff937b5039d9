"""A verdict on every node of the graph that will run.

The rules stand in `SPEC`, read from the top: the first rule that knows a node decides, and a node that no rule knows is
unproven. In addition a reduction over a batch dimension mixes rows, whatever its order.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from . import rows
from .errors import AuditError
from .ops import NAMESPACE
from .rewrite import source_line, values_of
from .table import Table
from .targets import Target


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


Rule = Callable[[fx.Node, Any, Knowledge], "tuple[Verdict, str] | None"]

_A = torch.ops.aten
#: rows are made, moved, joined or taken apart; nothing is added up
MOVES = {
    str(overload)
    for packet in (
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided full full_like new_full zeros zeros_like "
        "new_zeros ones ones_like new_ones arange scalar_tensor lift_fresh_copy eye tril_indices triu_indices linspace "
        "clone copy copy_ _to_copy contiguous constant_pad_nd cat stack hstack vstack repeat tile roll flip fill fill_ "
        "embedding index index_select gather take take_along_dim masked_select masked_scatter index_copy index_copy_ "
        "index_fill scatter scatter_ slice_scatter select_scatter diagonal_scatter as_strided_scatter "
        "index_put index_put_ _unsafe_index _unsafe_index_put _unsafe_masked_index narrow_copy unfold_copy "
        "reshape flatten _reshape_copy _unsafe_view view_copy permute_copy expand_copy split_with_sizes_copy unbind_copy "
        "sym_size sym_stride sym_numel sym_storage_offset tril triu one_hot nonzero _local_scalar_dense item "
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
POINTWISE_PRIMS = {
    f"prims.{name}.default"
    for name in (
        "abs acos acosh add asin asinh atan atan2 atanh bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 bitwise_and "
        "bitwise_not bitwise_or bitwise_xor cbrt ceil cos cosh digamma div eq erf erf_inv erfc erfcx exp exp2 expm1 floor fma fmax fmin "
        "fmod frexp gcd ge gt hypot igamma igammac inductor_cvt_e8m0_rceil isfinite le lgamma log log10 log1p log2 lt maximum minimum mul "
        "ndtri ne neg nextafter pow reciprocal remainder round rsqrt shift_left shift_right_arithmetic sign signbit sin sinh "
        "spherical_bessel_j0 sqrt sub tan tanh trunc where zeta"
    ).split()
}
#: random, though PyTorch does not tag them so
RANDOM_PRIMS = ("prims.inductor_random.default", "prims.inductor_randint.default")
#: writes that add up where indices meet: the order of the sum follows the rows
ACCUMULATING = ("index_put", "_unsafe_index_put", "index_put_")


def _symbolic_arithmetic(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    """Placeholders, constants, outputs, and Python arithmetic on sizes."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Verdict.ROW_LOCAL, "an input, a constant or the output"
    if not isinstance(target, (OpOverload, HigherOrderOperator)) and not _holds_tensor(node):
        return Verdict.ROW_LOCAL, "arithmetic on sizes"
    if getattr(target, "__name__", "") == "getitem":
        return Verdict.ROW_LOCAL, "one of several outputs"
    return None


def _holds_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _ours(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    return (Verdict.REPLACED, "an operator of bi_compile") if str(target).startswith(f"{NAMESPACE}.") else None


def _trusted(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    name = str(target)
    for trust in (known.trust, known.target.trusted):
        reason = trust.get(name) or trust.get(registered_name(name))
        if reason:
            return Verdict.TRUSTED, reason
    return None


def _row_local_here(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    reason = known.target.row_local.get(registered_name(target))
    return None if reason is None else (Verdict.ROW_LOCAL, reason)


def _known_to_be_unknown(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    needed = known.target.needed.get(registered_name(target))
    return None if needed is None else (Verdict.UNPROVEN, f"{needed}; {_unknown(target)}")


def registered_name(target: Any) -> str:
    """`ns::packet`, or `ns::packet.overload` where the overload has a name."""
    return str(target).removesuffix(".default").replace(".", "::", 1)


def _in_a_table(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    for table, remedy in ((known.table, "the pass {} should have replaced it"), (known.known, "add the pass {}")):
        found = table.get(target)
        if found is not None:
            entry = found[0]
            args, kwargs = values_of(node)
            if entry.stays(*args, **kwargs):
                return Verdict.ROW_LOCAL, "exact for these arguments in every order"
            return Verdict.VARIANT, f"{entry.why}; {remedy.format(repr(entry.pass_name))}"
    return None


def _random(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    if isinstance(target, OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or str(target) in RANDOM_PRIMS
    ):
        return Verdict.UNPROVEN, "draws random numbers, which follow a row's place in the batch"
    return None


def _accumulates(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    if not isinstance(target, OpOverload):
        return None
    packet = target._overloadpacket.__name__
    adds = packet in ACCUMULATING and (node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))
    if adds or (packet in ("scatter", "scatter_") and "reduce" in target._overloadname):
        return Verdict.UNPROVEN, "adds up where indices meet, in an order that nothing fixes"
    return None


def _moves(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    if str(target) in MOVES or (isinstance(target, OpOverload) and target.is_view):
        return Verdict.ROW_LOCAL, "makes or moves elements"
    return None


def _pointwise(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    if isinstance(target, OpOverload) and (torch.Tag.pointwise in target.tags or str(target) in POINTWISE_PRIMS):
        return Verdict.ROW_LOCAL, "pointwise"
    return None


def _order_free(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    return (Verdict.ROW_LOCAL, "the same in every order") if str(target) in ORDER_FREE else None


def _holds_graphs(node: fx.Node, target: Any, known: Knowledge) -> tuple[Verdict, str] | None:
    """Higher-order operators: what they hold is judged; a mutable operator that was made functional by its own name."""
    if not isinstance(target, HigherOrderOperator):
        return None
    if target.name().startswith("auto_functionalized"):
        inner = node.args[0]
        for rule in SPEC:
            found = rule(node, inner, known) if rule is not _in_a_table else None
            if found:
                return found
        return Verdict.UNPROVEN, _unknown(inner)
    if target.name() in ("cond", "while_loop", "invoke_subgraph"):
        return Verdict.ROW_LOCAL, "the graphs that it holds are judged by themselves"
    return None


#: the rules, first match first
SPEC: tuple[Rule, ...] = (
    _symbolic_arithmetic,
    _ours,
    _trusted,
    _in_a_table,
    _row_local_here,
    _known_to_be_unknown,
    _random,
    _accumulates,
    _moves,
    _pointwise,
    _order_free,
    _holds_graphs,
)


def _unknown(target: Any) -> str:
    name = str(target)
    return (
        f"nothing is known about {name}; if it is invariant, say so and why: "
        f'trust={{"{registered_name(target)}": "the reason"}}; otherwise replace it in a pass of yours'
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
    """Judge every node.

    Args:
        graph: with fake values in `meta["val"]`.
        batch: placeholder -> its batch dimension, for a graph of static shapes. Otherwise a batch dimension is one whose
            size holds the free symbol of the first symbolic dimension of an input.
    """
    batch_dims = rows.batch_dimensions(graph, batch)
    return Report(knowledge.target.name, tuple(_judge(node, knowledge, batch_dims) for node in graph.nodes))


def _judge(node: fx.Node, known: Knowledge, batch_dims: rows.BatchDims) -> Finding:
    def finding(verdict: Verdict, reason: str) -> Finding:
        return Finding(node.name, operator_name(node), verdict, reason, source_line(node))

    mixed = rows.mixed_dimension(node, batch_dims)
    if mixed is not None:
        return finding(Verdict.MIXES_ROWS, mixed)
    for rule in SPEC:
        found = rule(node, node.target, known)
        if found is not None:
            return finding(*found)
    return finding(Verdict.UNPROVEN, _unknown(node.target))


def operator_name(node: fx.Node) -> str:
    """What a node calls; a mutable operator that was made functional goes by its own name."""
    if isinstance(node.target, HigherOrderOperator) and node.target.name().startswith("auto_functionalized"):
        return str(node.args[0])
    return str(node.target)

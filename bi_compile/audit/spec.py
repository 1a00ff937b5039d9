"""What is known of an operator by itself: the rules of the audit.

They stand in `SPEC` and are read from the top: the first that knows an operator decides, and one that none knows is
unproven. A rule is a `Row` of operators with one verdict and its reason, or a function where the verdict follows the
arguments, the target or the tables.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

from ..ops import NAMESPACE
from ..table import Table
from ..targets import Target
from .pointwise import aten, default, inductor, is_pointwise


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

    @functools.cached_property
    def name(self) -> str:
        """`ns.packet.overload`; a Triton kernel that the program calls is triton.NAME."""
        return _triton_kernel(self.kwargs) if str(self.target).startswith("triton_kernel_wrapper") else str(self.target)


def _triton_kernel(kwargs: Mapping[str, Any]) -> str:
    """`triton.NAME` of the kernel that a Triton wrapper's arguments name."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(kwargs["kernel_idx"])
    while not hasattr(kernel, "__name__"):  # what tunes or guards a kernel holds it as .fn
        kernel = kernel.fn
    return f"triton.{kernel.__name__}"


Found: TypeAlias = "tuple[Verdict, str] | None"
Rule = Callable[[Call, Knowledge], Found]


@dataclasses.dataclass(frozen=True)
class Row:
    """Operators of one verdict, whatever their arguments."""

    operators: frozenset[str]
    """`ns.packet.overload` of each; every name was looked up when the row was made."""
    verdict: Verdict
    reason: str

    def __call__(self, call: Call, known: Knowledge) -> Found:
        return (self.verdict, self.reason) if call.name in self.operators else None


# -- operators of one verdict ---------------------------------------------------------------------------------------

RANDOM = Row(
    inductor("inductor_random inductor_randint"),
    Verdict.UNPROVEN,
    "draws random numbers, which follow a row's place in the batch",
)
DATA_DEPENDENT = Row(
    aten(
        "nonzero nonzero_static masked_select _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive bincount histc "
        "histogram repeat_interleave"
    ),
    Verdict.UNPROVEN,
    "how many elements it gives, and where, follows the values of all rows",
)
#: what a profiler shows
MARKS = Row(
    default("profiler", "_record_function_enter _record_function_enter_new _record_function_exit")
    | {str(torch.ops.profiler._record_function_exit._RecordFunction)},
    Verdict.ROW_LOCAL,
    "marks a stretch of time",
)
#: nothing is added up
MOVES = Row(
    aten(
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided full full_like new_full zeros zeros_like "
        "new_zeros ones ones_like new_ones arange scalar_tensor lift_fresh_copy eye tril_indices triu_indices linspace "
        "clone copy copy_ _to_copy contiguous constant_pad_nd cat stack hstack vstack repeat tile roll flip fill fill_ "
        "embedding index index_select gather take take_along_dim masked_scatter "
        "index_fill slice_scatter select_scatter diagonal_scatter _unsafe_index _unsafe_masked_index narrow_copy unfold_copy "
        "reshape flatten _reshape_copy _unsafe_view view_copy permute_copy expand_copy split_with_sizes_copy unbind_copy "
        "sym_size sym_stride sym_numel sym_storage_offset tril triu one_hot _local_scalar_dense item "
        "_assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size detach alias "
        "detach_ squeeze_ unsqueeze_ t_ transpose_ _pin_memory is_pinned record_stream "
        "zero zero_ resize resize_ set set_ lift unsafe_split unsafe_split_with_sizes squeeze_copy unsqueeze_copy t_copy "
        "transpose_copy slice_copy select_copy detach_copy alias_copy as_strided_copy diagonal_copy split_copy"
    )
    # one value, whoever writes it
    | {"aten.scatter.value", "aten.scatter_.value"}
    | default(
        "prims",
        "iota convert_element_type broadcast_in_dim device_put full full_like fill empty empty_permuted empty_strided "
        "scalar_tensor cat clone reshape rev collapse as_strided _make_token _sink_tokens",
    )
    | inductor("inductor_force_stride_order inductor_lookup_seed")
    | default("inductor", "resize_storage_bytes_")
    | default("_c10d_functional", "all_gather_into_tensor all_to_all_single broadcast wait_tensor")
    | default("c10d", "send recv_"),
    Verdict.ROW_LOCAL,
    "makes or moves elements",
)
#: a maximum, a count or a test; of equal elements the first
ORDER_FREE = Row(
    aten(
        "amax amin aminmax max min argmax argmin any all count_nonzero cummax cummin searchsorted bucketize isin "
        "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d"
    )
    | default("prims", "amax amin xor_sum")
    | inductor("_low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices"),
    Verdict.ROW_LOCAL,
    "the same in every order",
)

# -- where the verdict follows the target, the tables or the arguments ----------------------------------------------


def _ours(call: Call, known: Knowledge) -> Found:
    return (Verdict.REPLACED, "an operator of bi_compile") if call.name.startswith(f"{NAMESPACE}.") else None


def _trusted(call: Call, known: Knowledge) -> Found:
    for trust in (known.trust, known.target.trusted):
        reason = trust.get(call.name) or trust.get(registered_name(call.name))
        if reason:
            return Verdict.TRUSTED, reason
    return None


def _in_a_table(call: Call, known: Knowledge) -> Found:
    for table, remedy in ((known.table, "the pass {} should have replaced it"), (known.known, "add the pass {}")):
        found = table.get(call.target)
        if found is not None:
            entry = found[0]
            if call.complete and entry.stays(*call.args, **call.kwargs):
                pointwise = is_pointwise(call.target)
                return Verdict.ROW_LOCAL, "pointwise" if pointwise else "exact for these arguments in every order"
            return Verdict.VARIANT, f"{entry.why}; {remedy.format(repr(entry.pass_name))}"
    return None


def _row_local_on_the_target(call: Call, known: Knowledge) -> Found:
    reason = known.target.row_local.get(registered_name(call.name))
    return None if reason is None else (Verdict.ROW_LOCAL, reason)


def _unproven_on_the_target(call: Call, known: Knowledge) -> Found:
    needed = known.target.unproven.get(registered_name(call.name))
    return None if needed is None else (Verdict.UNPROVEN, f"{needed}; {_unknown(call.name)}")


def _random(call: Call, known: Knowledge) -> Found:
    tagged = isinstance(call.target, OpOverload) and torch.Tag.nondeterministic_seeded in call.target.tags
    return (RANDOM.verdict, RANDOM.reason) if tagged else None


def _accumulates(call: Call, known: Knowledge) -> Found:
    """Writes that add up where indices meet: the order of the sum follows the rows."""
    if not isinstance(call.target, OpOverload):
        return None
    packet = call.target._overloadpacket
    adds = packet in _ACCUMULATING and (call.args[3] if len(call.args) > 3 else call.kwargs.get("accumulate", False))
    if not adds and packet not in _ADDING and not (packet in _SCATTERING and "reduce" in call.target._overloadname):
        return None
    into = call.args[0] if call.args else call.kwargs.get("self")
    if isinstance(into, torch.Tensor) and not into.is_floating_point() and not into.is_complex():
        return Verdict.ROW_LOCAL, "integers add up to the same in every order"
    return Verdict.UNPROVEN, "adds up where indices meet, in an order that nothing fixes"


_A = torch.ops.aten
_ACCUMULATING = (_A.index_put, _A._unsafe_index_put, _A.index_put_)
_SCATTERING = (_A.scatter, _A.scatter_)
_ADDING = (_A.scatter_add, _A.scatter_add_, _A.index_add, _A.index_add_)


def _view(call: Call, known: Knowledge) -> Found:
    is_view = isinstance(call.target, OpOverload) and call.target.is_view
    return (MOVES.verdict, MOVES.reason) if is_view else None


def _pointwise(call: Call, known: Knowledge) -> Found:
    return (Verdict.ROW_LOCAL, "pointwise") if is_pointwise(call.target) else None


#: the rules, first match first
SPEC: tuple[Rule, ...] = (
    _ours,
    _trusted,
    _accumulates,
    _in_a_table,
    _row_local_on_the_target,
    _unproven_on_the_target,
    _random,
    RANDOM,
    DATA_DEPENDENT,
    MARKS,
    MOVES,
    _view,
    _pointwise,
    ORDER_FREE,
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

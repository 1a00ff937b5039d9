"""A device that varies wherever it may: every operator that is not proven invariant gives different bits in another batch.

    with Adversary() as device:
        together, alone = graph(x), graph(x[:1])
    device.perturbed   # the operators that varied, with how often

Proven is what `audit.SPEC` calls row-local, and our own operators; both run as they are. What is merely trusted is not
proven. Sums and products are taken in one of several orders, chosen for each result from the seed, the full sizes and the
result's place; of any other operator each element of the result is moved by at most one unit in its last place, chosen
the same way. So a graph whose rows are equal here has no hole that any hardware could open, as far as its operators'
classes are right; one whose rows differ has one, whether or not a machine at hand shows it.

It runs on CPU tensors. Operators that have no kernel there are computed by `REFERENCES`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ..audit.spec import ALLOWED, Call, Knowledge, judge
from ..errors import AuditError
from ..passes import PASSES
from ..table import Table
from ..targets import Target, get_target


class Adversary(TorchDispatchMode):
    """The device, while the mode is on.

    Args:
        seed: another seed, other bits.
        share: how many of the unproven operators vary, from 0 to 1; which ones, the seed decides.
        target: whose tables say what varies.
        trust: operators (`ns::name`) that are believed, each with a reason; a target's own trust is not.

    Raises:
        AuditError: a higher-order operator whose graphs it cannot run.
    """

    supports_higher_order_operators = True

    def __init__(
        self, seed: int = 0, share: float = 1.0, target: str = "cpu_eager", trust: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.seed = seed
        self.share = share
        named = get_target(target)
        table = Table(PASSES, target)
        # what the target trusts is not proven
        self.known = Knowledge(Target(named.name, named.device, row_local=named.row_local), table, table, trust or {})
        self.perturbed: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            return self.run_held(func, args, kwargs)
        call = Call(func, tuple(args), kwargs)
        compute = REFERENCES.get(call.name, func)
        if judge(call, self.known)[0] in ALLOWED or not self.perturbs(call.name):
            return compute(*args, **kwargs)
        self.perturbed[call.name] += 1
        sizes = [tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        key = self.key(call.name, str(sizes))
        other_order = ORDERED.get(call.name)
        if other_order is not None:
            out = other_order(key, *args, **kwargs)
            # another order is seldom seen once it is rounded to 16 bits; hardware may also add up in them
            return moved(out, key) if out.dtype in (torch.bfloat16, torch.float16) else out
        return _moved_results(func, compute(*args, **kwargs), args, kwargs, key)

    def key(self, *what: str) -> int:
        return int.from_bytes(hashlib.sha256("|".join((str(self.seed), *what)).encode()).digest()[:4], "big")

    def perturbs(self, name: str) -> bool:
        return self.key("share", name) < self.share * 2**32

    def run_held(self, func: HigherOrderOperator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        run = HELD.get(func.name())
        if run is None:
            raise AuditError(f"the adversarial device cannot run {func.name()}: it knows {', '.join(HELD)}")
        with self:
            return run(*args, **kwargs)


# -- how it perturbs --------------------------------------------------------------------------------------------------


def _noise(shape: Sequence[int], key: int, choices: int) -> Tensor:
    """A number below `choices` for each place."""
    n = torch.arange(int(torch.Size(shape).numel()), dtype=torch.int64) * 0x9E3779B1 + key
    n = ((n ^ (n >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    n = ((n ^ (n >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return ((n ^ (n >> 16)) % choices).reshape(tuple(shape))


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def moved(x: Tensor, key: int) -> Tensor:
    """Each element moved by -1, 0 or 1 in its last place; zeros, infinities, NaN and what is no float stay."""
    if x.is_complex():
        return torch.view_as_complex(moved(torch.view_as_real(x), key))
    if x.dtype not in _BITS:
        return x
    step = (_noise(x.shape, key, 3) - 1).to(_BITS[x.dtype])
    other = (x.contiguous().view(_BITS[x.dtype]) + step).view(x.dtype)
    return torch.where((x == 0) | ~x.isfinite() | ~other.isfinite(), x, other)


def _moved_results(func: OpOverload, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: int) -> Any:
    written = [
        args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(func._schema.arguments) if a.is_write
    ]
    for t in pytree.tree_leaves(written):
        if isinstance(t, Tensor):
            t.copy_(moved(t, key))
    return result if written else pytree.tree_map_only(Tensor, lambda t: moved(t, key), result)


def _tree(x: Tensor) -> Tensor:
    """Sum over the last dimension, neighbours first."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def _halves(x: Tensor) -> Tensor:
    """Sum over the last dimension, the far half onto the near one."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        x = x[..., :half] + torch.nn.functional.pad(x[..., half:], (0, 2 * half - x.shape[-1]))
    return x[..., 0]


def _split(x: Tensor) -> Tensor:
    """In three parts, each backwards as a tree."""
    return _tree(torch.stack([_tree(part.flip(-1)) for part in x.tensor_split(3, -1) if part.shape[-1]], -1))


def _one_by_one(x: Tensor) -> Tensor:
    total = x[..., 0]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i]
    return total


ORDERS: tuple[Callable[[Tensor], Tensor], ...] = (_tree, _halves, _split, _one_by_one)


def _summed(x: Tensor, key: int) -> Tensor:
    """Sum over the last dimension, each result in an order of its own; float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    if not x.shape[-1] or not x.numel():
        return wide.new_zeros(x.shape[:-1])
    which = _noise(x.shape[:-1], key, len(ORDERS))
    out = ORDERS[0](wide)
    for i, order in itertools.islice(enumerate(ORDERS), 1, None):
        out = torch.where(which == i, order(wide), out)
    return out


def _sum(
    key: int,
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    scale: bool = False,
) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    x = x if x.is_floating_point() else x.float()
    dims = [d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))]
    if not dims:
        return x.clone()
    kept = [d for d in range(x.dim()) if d not in dims]
    flat = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), -1)
    out = _summed(flat, key)
    out = (out / flat.shape[-1] if scale else out).to(x.dtype)
    return out.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else out


def _mean(key: int, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _sum(key, x, dim, keepdim, dtype=dtype, scale=True)


def _product(key: int, a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] by [..., K, N]."""
    wide = [t if t.dtype == torch.float64 else t.float() for t in (a, b)]
    return _summed(wide[0].unsqueeze(-2) * wide[1].transpose(-1, -2).unsqueeze(-3), key).to(a.dtype)


def _plus(key: int, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = alpha * _product(key, a, b)
    return (out if beta == 0 else out + beta * bias).to(a.dtype)


#: operator -> the same with a key first, its sums in other orders
ORDERED: dict[str, Callable[..., Tensor]] = {
    "aten.sum.default": _sum,
    "aten.sum.dim_IntList": _sum,
    "prims.sum.default": _sum,
    "aten.mean.default": _mean,
    "aten.mean.dim": _mean,
    "aten.mm.default": _product,
    "aten.bmm.default": _product,
    "aten.addmm.default": _plus,
    "aten.baddbmm.default": _plus,
    "aten.mv.default": lambda key, a, v: _product(key, a, v.unsqueeze(-1)).squeeze(-1),
    "aten.dot.default": lambda key, a, b: _product(key, a.unsqueeze(0), b.unsqueeze(-1)).reshape(()),
}


# -- what has no kernel on a CPU --------------------------------------------------------------------------------------


def _npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def _npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    s = x1 + x2
    return *_npu_rms_norm(s, gamma, epsilon), s


def _npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


#: operator without a CPU kernel -> what computes it here, in plain PyTorch; it then varies like any other
REFERENCES: dict[str, Callable[..., Any]] = {
    "npu.npu_rms_norm.default": _npu_rms_norm,
    "npu.npu_add_rms_norm.default": _npu_add_rms_norm,
    "npu.npu_swiglu.default": _npu_swiglu,
}


# -- graphs within the graph ------------------------------------------------------------------------------------------


def _while(cond: Any, body: Any, carried: Sequence[Any], more: Sequence[Any] = ()) -> tuple[Any, ...]:
    carried = tuple(carried)
    while bool(cond(*carried, *more)):
        carried = tuple(body(*carried, *more))
    return carried


def _map(body: Any, xs: Sequence[Tensor], more: Sequence[Any] = ()) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*(body(*row, *more) for row in zip(*xs, strict=True)), strict=True)]


def _scan(body: Any, init: Sequence[Tensor], xs: Sequence[Tensor], more: Sequence[Any] = ()) -> list[Tensor]:
    carried, ys = list(init), []
    for row in zip(*xs, strict=True):
        out = list(body(*carried, *row, *more))
        carried, y = out[: len(init)], out[len(init) :]
        ys.append(y)
    return [*carried, *(torch.stack(column) for column in zip(*ys, strict=True))]


#: higher-order operator -> how its graphs are run
HELD: dict[str, Callable[..., Any]] = {
    "cond": lambda pred, true, false, operands=(): (true if bool(pred) else false)(*operands),
    "while_loop": _while,
    "map_impl": _map,
    "scan": _scan,
    "invoke_subgraph": lambda graph, identifier, *operands: graph(*operands),
}

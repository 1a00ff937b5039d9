"""Convolutions as products of patches with the kernel, and pools as means over windows."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, refuse

aten = torch.ops.aten
POOL = "its code, and with it the order of the sum, follows how the memory lies"
POOL_SOURCE = (
    "assumed from aten/src/ATen/native/cpu/AvgPoolKernel.cpp, with a loop for each memory format; not measured"
)


def _exact(input: Tensor, *args: object, **kwargs: object) -> bool:
    """Integers add up the same in every order."""
    return not (input.is_floating_point() or input.is_complex())


class Convolution(Pass):
    """Convolutions and average pools, summed in the order of the patch: channels, then the kernel's places, ascending."""

    name = "convolution"
    why = "the library chooses its algorithm, and with it the order of the sum, by the size of the batch"
    source = "aten/src/ATen/native/Convolution.cpp: ConvParams::use_mkldnn asks for input.size(0); cuDNN's heuristics take the whole shape"


def _windows(x: Tensor, sizes: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """[N, C, *spatial] as [N, C, *out, *sizes], without a copy."""
    for i, (k, s, d) in enumerate(zip(sizes, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)
        if d > 1:
            x = x[..., ::d]
    return x


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """With so many elements before and after each spatial dimension; fewer than none cuts off."""
    # constant_pad_nd would make a symbolic batch a number while it is traced
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if a < 0 or b < 0:
            x = x.narrow(2 + i, max(-a, 0), x.shape[2 + i] + min(a, 0) + min(b, 0))
        left, right = (_zeros(x, 2 + i, p) for p in (a, b))
        x = torch.cat([*left, x, *right], 2 + i) if left or right else x
    return x


def _zeros(x: Tensor, dim: int, n: int) -> list[Tensor]:
    return [x.new_zeros(*x.shape[:dim], n, *x.shape[dim + 1 :])] if n > 0 else []


def _each(values: Sequence[int], n: int, default: Sequence[int] = ()) -> list[int]:
    """One value for each spatial dimension."""
    values = list(values) or list(default)
    return values * n if len(values) == 1 else values


@Convolution.replaces(aten.convolution.default, unless=_exact)
def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    if input.is_complex():
        refuse("convolution", ["complex numbers"], "convolve the real and the imaginary part, each by itself")
    n = weight.dim() - 2
    stride, padding, dilation = (_each(values, n) for values in (stride, padding, dilation))
    sizes = list(weight.shape[2:])
    before = after = padding
    if transposed:  # the convolution whose gradient this is: zeros between the elements, the kernel turned
        for i, s in enumerate(stride):
            if s > 1:
                length = input.shape[2 + i]
                each = input.unsqueeze(3 + i)
                apart = torch.cat([each, *_zeros(each, 3 + i, s - 1)], 3 + i)
                joined = apart.reshape(*input.shape[: 2 + i], length * s, *input.shape[3 + i :])
                input = joined.narrow(2 + i, 0, (length - 1) * s + 1)
        before = [d * (k - 1) - p for d, k, p in zip(dilation, sizes, padding, strict=True)]
        after = [b + p for b, p in zip(before, _each(output_padding, n), strict=True)]
        stride = [1] * n
        by_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
        weight = by_group.flatten(0, 1).flip([*range(2, 2 + n)])
    rows, channels, features = input.shape[0], weight.shape[1], weight.shape[0]
    patches = _windows(_padded(input, before, after), sizes, stride, dilation)
    out, places = list(patches.shape[2 : 2 + n]), math.prod(sizes)
    spatial, kernel = range(3, 3 + n), range(3 + n, 3 + 2 * n)
    patches = patches.reshape(rows, groups, channels, *patches.shape[2:]).permute(1, 0, *spatial, 2, *kernel)
    patches = patches.reshape(groups, rows * math.prod(out), channels * places)
    matrix = weight.reshape(groups, features // groups, channels * places).transpose(1, 2)
    if groups == 1:
        a, b = patches.squeeze(0), matrix.squeeze(0)
        y = (ops.mm(a, b) if bias is None else ops.addmm(bias, a, b)).unsqueeze(0)
    elif bias is None:
        y = ops.bmm(patches, matrix)
    else:
        y = ops.baddbmm(bias.reshape(groups, 1, features // groups), patches, matrix)
    y = y.view(groups, rows, *out, features // groups).permute(1, 0, 2 + n, *range(2, 2 + n))
    return y.reshape(rows, features, *out).contiguous()


def _average(
    name: str, self: Tensor, sizes: list[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    """[(N,) C, *spatial], the mean of each window; the sum in the order of the window."""
    n = len(sizes)
    if ceil_mode:
        refuse(name, ["ceil_mode=True"], "pad the input, and leave it out")
    x = self if self.dim() == n + 2 else self.unsqueeze(0)
    stride, padding = _each(stride, n, sizes), _each(padding, n)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    windows = _windows(_padded(wide, padding, padding), sizes, stride, [1] * n).flatten(-n)
    total = ops.sum(windows, [-1])
    if divisor_override is not None or count_include_pad or not any(padding):
        found = total / (divisor_override or math.prod(sizes))
    else:
        inside = _padded(torch.ones_like(wide[:1, :1]), padding, padding)
        found = total / ops.sum(_windows(inside, sizes, stride, [1] * n).flatten(-n), [-1])
    found = found.to(x.dtype)
    return found if self.dim() == n + 2 else found.squeeze(0)


@Convolution.replaces(aten.avg_pool2d.default, why=POOL, source=POOL_SOURCE)
def avg_pool2d(
    self: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    return _average(
        "avg_pool2d", self, _each(kernel_size, 2), stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@Convolution.replaces(aten.avg_pool3d.default, why=POOL, source=POOL_SOURCE)
def avg_pool3d(
    self: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    return _average(
        "avg_pool3d", self, _each(kernel_size, 3), stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@Convolution.replaces(
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default,
    why=POOL, source=POOL_SOURCE,
)  # fmt: skip
def adaptive_avg_pool(self: Tensor, output_size: Sequence[int]) -> Tensor:
    n = len(output_size)
    ends = [
        [(i * size // out, -((i + 1) * size // -out)) for i in range(out)]
        for size, out in zip(self.shape[-n:], output_size, strict=True)
    ]
    wide = self.float() if self.dtype in (torch.bfloat16, torch.float16) else self
    means = []
    for cell in itertools.product(*ends):
        window = wide
        for i, (start, end) in enumerate(cell):
            window = window.narrow(i - n, start, end - start)
        means.append(ops.mean(window.flatten(-n), [-1]))
    return torch.stack(means, -1).reshape(*self.shape[:-n], *output_size).to(self.dtype)

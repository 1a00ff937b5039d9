"""An LSTM's layer, step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bi_compile import ops
from bi_compile.table import Pass, refuse

aten = torch.ops.aten
_LSTM = 2  # ideep::rnn_kind::LSTM


class Recurrent(Pass):
    """oneDNN's LSTM as products and pointwise functions, a step after another."""

    name = "recurrent"
    why = "its products follow the number of rows"
    source = (
        "aten/src/ATen/native/mkldnn/RNN.cpp: oneDNN chooses its algorithm by the shape; measured on a CPU: rows differ"
    )


@Recurrent.replaces(aten.mkldnn_rnn_layer.default)
def mkldnn_rnn_layer(
    input: Tensor, weight0: Tensor, weight1: Tensor, weight2: Tensor, weight3: Tensor, hx_: Tensor, cx_: Tensor, reverse: bool,
    batch_sizes: Sequence[int], mode: int, hidden_size: int, num_layers: int, has_biases: bool, bidirectional: bool,
    batch_first: bool, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """input [T, N, I]; one layer in one direction. Each step: the input's product, then the state's, each over ascending K."""
    tensors = (input, weight0, weight1, weight2, weight3, hx_, cx_)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse(
            "mkldnn_rnn_layer",
            ["gradients"],
            "call it under torch.no_grad(), or step by step as linear, sigmoid and tanh",
        )
    asked = {"a mode that is no LSTM": mode != _LSTM, "batch_sizes": bool(batch_sizes)}
    if any(asked.values()):
        refuse("mkldnn_rnn_layer", [name for name, is_so in asked.items() if is_so], "pad the sequences of an LSTM")
    steps, rows, width = input.shape
    wide = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
    x, w, u = (t.to(wide) for t in (input, weight0, weight1))
    gates = ops.mm(x.reshape(steps * rows, width), w.t())
    if has_biases:
        gates = gates + (weight2.to(wide) + weight3.to(wide))
    gates = gates.view(steps, rows, 4 * hidden_size)
    h, c = (t.reshape(rows, hidden_size).to(wide) for t in (hx_, cx_))
    outs: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        i, f, g, o = (gates[t] + ops.mm(h, u.t())).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        out = (torch.sigmoid(o) * torch.tanh(c)).to(input.dtype)
        outs.append(out)
        h = out.to(wide)
    y = torch.stack(outs[::-1] if reverse else outs) if outs else input.new_empty(0, rows, hidden_size)
    return y, h.to(hx_.dtype).view(hx_.shape), c.to(cx_.dtype).view(cx_.shape), input.new_empty(0)

"""What a layout's `unpack` does not read of another tool's tensors, and what would change their meaning: looked at before."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantpub.layouts import gptq_zeros, modelopt_int4, torchao_int
from quantpub.layouts.awq import unpack_interleaved
from quantpub.layouts.words import UNPACK
from quantpub.scheme import Scheme

ORDER = "its groups are made of columns in the order of their activations (g_idx), which no other layout holds"
NOT_MIDDLE = "its zeros are not those of symmetric weights, as its configuration says"


def doubt(layout: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why these tensors of a module do not say what its weight is, or None."""
    if layout in ("gptq", "gptq-zeros", "auto-gptq"):
        return gptq_zeros.ambiguous(tensors, scheme)
    if layout in ("torchao-int8", "torchao-intx"):
        return torchao_int.ambiguous(tensors, scheme)
    if layout == "modelopt-int4":
        return modelopt_int4.ambiguous(tensors, scheme)
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        return f"its weight_shape is {tensors['weight_shape'].tolist()}, its words hold {list(shape)}"
    if "qzeros" in tensors and scheme.weight.zero_domain == "none":
        bits = scheme.weight.number.bits
        zeros = unpack_interleaved(tensors["qzeros"]) if layout == "awq" else UNPACK[bits](tensors["qzeros"])
        return NOT_MIDDLE if bool(zeros.any()) else None
    return None

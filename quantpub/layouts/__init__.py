"""Layouts: how a canonical QTensor becomes named tensors on disk, and back, bit for bit or not at all."""

from __future__ import annotations

from quantpub.registry import Entry

LAYOUTS = {
    "ct-pack": Entry("quantpub.layouts.ct_pack:LAYOUT", "compressed-tensors pack-quantized: int4 in int32 words"),
    "ct-float": Entry(
        "quantpub.layouts.ct_float:LAYOUT", "compressed-tensors float-quantized: FP8 E4M3, a scale a row"
    ),
}

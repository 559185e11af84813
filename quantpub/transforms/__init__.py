"""Transforms: pure functions that change weights without changing what the model computes."""

from __future__ import annotations

from quantpub.registry import Entry

TRANSFORMS = {
    "smoothquant": Entry(
        "quantpub.transforms.smoothquant:TRANSFORM",
        "moves the range of activations into weights, folded into norms, up_proj and v_proj",
    ),
}

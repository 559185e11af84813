"""Algorithms: pure functions `quantize(w_NK, stats, scheme, params) -> QTensor`, each with its own params dataclass.

None of them opens a file, moves a tensor between devices, or knows about models, shards or layouts.
"""

from __future__ import annotations

from quantpub.registry import Entry

ADOPTED = "adopted"  # in the place of an algorithm's name where another tool quantized
ALGORITHMS = {
    "rtn": Entry(
        "quantpub.algorithms.rtn:ALGORITHM", "round to nearest: the scale from each group's largest magnitude"
    ),
    "search": Entry(
        "quantpub.algorithms.search:ALGORITHM", "signed scale of least squared error, searched group by group"
    ),
    "hqq": Entry(
        "quantpub.algorithms.hqq:ALGORITHM", "half-quadratic: scale and zero for an error that forgives outliers"
    ),
    "gptq": Entry(
        "quantpub.algorithms.gptq:ALGORITHM", "each column's rounding error made good by the next; from a Hessian"
    ),
    "fp8": Entry(
        "quantpub.algorithms.fp8:ALGORITHM",
        "cast to FP8 E4M3: a scale a row, block or tensor, from the largest magnitude",
    ),
    "nvfp4": Entry(
        "quantpub.algorithms.nvfp4:ALGORITHM", "FP4 E2M1 in groups of 16, E4M3 scales searched group by group"
    ),
    "mxfp4": Entry("quantpub.algorithms.mxfp4:ALGORITHM", "FP4 E2M1 in groups of 32, power-of-two scales searched"),
}

"""Algorithms: pure functions `quantize(w_NK, stats, scheme, params) -> QTensor`, each with its own params dataclass.

None of them opens a file, moves a tensor between devices, or knows about models, shards or layouts.
"""

from __future__ import annotations

from quantpub.registry import Entry

ALGORITHMS = {
    "rtn": Entry(
        "quantpub.algorithms.rtn:ALGORITHM", "round to nearest: the scale from each group's largest magnitude"
    ),
    "search": Entry(
        "quantpub.algorithms.search:ALGORITHM", "signed scale of least squared error, searched group by group"
    ),
    "fp8": Entry("quantpub.algorithms.fp8:ALGORITHM", "cast to FP8 E4M3 with the scale from the largest magnitude"),
}

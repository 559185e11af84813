"""What was measured of kernels, as data that a plan can quote. Each table equals its evidence file; a test holds that.

Microseconds of one call, summed over the four merged GEMMs of a layer of Qwen3-8B; groups of 128; M tokens in a batch. A speedup
is the median over rounds of bf16's time over the kernel's in the same round, so not quite the ratio of the medians.
"""

from __future__ import annotations

from dataclasses import dataclass

INT4_EVIDENCE = "docs/evidence/h200-int4-kernels.json"
INT4_DEVICE = "NVIDIA H200"
KERNELS = ("tinygemm", "Machete", "Marlin")


@dataclass(frozen=True)
class Int4:
    """bf16_us: bf16's time. Of each kernel (its time, its speedup over bf16)."""

    m: int
    bf16_us: float
    tinygemm: tuple[float, float]
    machete: tuple[float, float]
    marlin: tuple[float, float]

    def of(self, kernel: str) -> tuple[float, float]:
        found: tuple[float, float] = getattr(self, kernel.lower())
        return found


INT4_H200 = (
    Int4(1, 115.38, (64.1, 1.8035), (86.24, 1.3385), (65.57, 1.7627)),
    Int4(2, 115.02, (67.02, 1.7173), (86.49, 1.3297), (65.65, 1.7538)),
    Int4(4, 114.44, (87.83, 1.3041), (85.83, 1.3351), (65.7, 1.744)),
    Int4(8, 119.47, (141.99, 0.8413), (85.3, 1.3977), (65.67, 1.8207)),
    Int4(16, 114.52, (235.84, 0.4855), (85.76, 1.3386), (70.63, 1.6194)),
    Int4(32, 116.5, (445.82, 0.2612), (85.51, 1.363), (81.09, 1.4382)),
    Int4(64, 118.75, (871.07, 0.1365), (116.02, 1.0255), (118.25, 1.0072)),
    Int4(128, 125.55, (1712.48, 0.0733), (130.78, 0.9604), (189.08, 0.6642)),
    Int4(256, 160.54, (3379.97, 0.0475), (184.06, 0.8708), (299.62, 0.5362)),
    Int4(512, 269.86, (6718.94, 0.0402), (285.48, 0.9468), (552.59, 0.4886)),
    Int4(1024, 511.53, (13403.59, 0.0382), (544.62, 0.9397), (1068.64, 0.4788)),
    Int4(2048, 1000.02, (26761.81, 0.0374), (1057.28, 0.9457), (2105.09, 0.4753)),
    Int4(4096, 1994.94, (53460.54, 0.0373), (2136.16, 0.9341), (4182.97, 0.4771)),
)


def table(kernel: str) -> list[tuple[int, float]]:
    """(M, speedup over bf16) of a kernel."""
    return [(row.m, row.of(kernel)[1]) for row in INT4_H200]


def pays_up_to(kernel: str) -> int:
    """The largest M up to which the kernel beat bf16 at every M that was measured; 0 when it did at none."""
    last = 0
    for m, speedup in table(kernel):
        if speedup <= 1:
            break
        last = m
    return last

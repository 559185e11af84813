"""E2M1, the 4-bit float of NVFP4 and MXFP4: rounding to it and its codes.

    code  0  1   2  3    4  5  6  7      + 8 for a negative value
    value 0  0.5 1  1.5  2  3  4  6      (one mantissa bit; the step is 0.5 below 2, 1 below 4, 2 above)

Rounding is to nearest, ties to the even code, saturating at 6; a negative value that rounds to zero keeps its sign.
Source: Open Compute Project, Microscaling Formats (MX) Specification v1.0, section 5.3.3.
"""

from __future__ import annotations

import torch

MAX = 6.0
_EXPONENT = 0x7F80_0000  # the exponent field of a float32
_UNIT = 1.5 * 2.0**22  # adding this to a float32 rounds it to a multiple of 0.5, ties to even


def round_magnitude(a: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 magnitude of each a >= 0: float32, any shape. A new tensor."""
    binade = (a.view(torch.int32) & _EXPONENT).view(torch.float32)
    shift = binade.clamp_(1.0, 4.0).mul_(_UNIT)  # rounds to half a binade: 0.5, 1 or 2
    return (a + shift).sub_(shift).clamp_(max=MAX)


def codes(x: torch.Tensor) -> torch.Tensor:
    """The 4-bit patterns of x rounded to E2M1: uint8 of x's shape. x: float32, finite."""
    r = round_magnitude(x.abs())
    # the value is convex and piecewise linear in the code, so the code is the least of three lines
    index = torch.minimum(r + r, torch.minimum(r + 2, r / 2 + 4))
    return index.sub_(x.sign().clamp_(max=0), alpha=8).to(torch.uint8)

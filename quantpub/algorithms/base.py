"""What every algorithm shares: its shape as an object, walking a weight in cached blocks, and groups of integer codes.

Legend: R rows of a block, G groups of a row, g columns of a group.

Integer codes are handled less their zero, u = codes − zero, so that every domain without a float zero reads w ≈ u·scale,
and an integer zero is nothing but another range of u: low − zero … high − zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantpub.qtensor import QTensor, scale_dtype
from quantpub.scheme import WHOLE, Scheme
from quantpub.stats import Stats

# 512 Ki float32 elements are 2 MiB: several passes over one block run out of cache instead of memory.
# Measured on two cores, rounding to nearest: 2.1 ns an element on whole tensors, 0.4 in such blocks.
BLOCK_ELEMENTS = 1 << 19
INVERSE_127 = 0.007874015718698502  # the float32 nearest to 1/127
FLOAT_ZERO = "float"


@dataclass(frozen=True)
class Algorithm:
    """name; params: a frozen dataclass type; reject: scheme → reason it cannot, or None; quantize: the function.

    needs: what of Stats it cannot do without (`hessian`). uses_moments: whether second moments of inputs, where they are
    known, make it weigh errors by them.
    """

    name: str
    params: type[Any]
    reject: Callable[[Scheme], str | None]
    quantize: Callable[[torch.Tensor, Stats | None, Scheme, Any], QTensor]
    needs: tuple[str, ...] = ()
    uses_moments: bool = False


Rows = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
Pair = tuple[torch.Tensor, torch.Tensor | None]  # scale_RG and integer zero_RG, in float32


def by_row_blocks(rows: Rows, w_NK: torch.Tensor, scheme: Scheme, elements: int = BLOCK_ELEMENTS) -> QTensor:
    """Apply `rows`: w_RK → (codes_RK, scale_RG) or (codes_RK, scale_RG, zero_RG) to blocks of rows, and join.

    For blocks of one row (bn == 1) only. elements: the size of a block, on the CPU; elsewhere all rows are one.
    """
    assert scheme.weight.block[0] == 1, scheme
    return QTensor(scheme, *in_blocks(rows, w_NK, elements))


def in_blocks(rows: Rows, w_NK: torch.Tensor, elements: int = BLOCK_ELEMENTS) -> tuple[torch.Tensor, ...]:
    """What `rows` makes of blocks of rows, joined part by part."""
    n, k = w_NK.shape
    step = max(1, elements // k) if w_NK.device.type == "cpu" else n
    made = _alike(rows, w_NK[:step])
    if step >= n:
        return made
    whole = tuple(part.new_empty((n, *part.shape[1:])) for part in made)
    for start in range(0, n, step):
        for out, part in zip(whole, made if start == 0 else _alike(rows, w_NK[start : start + step]), strict=True):
            out[start : start + step] = part
    return whole


def _alike(rows: Rows, w_RK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One row is worked on as two: torch splits a sum with a single output over threads, and bytes would hang on those."""
    if len(w_RK) > 1:
        return rows(w_RK)
    return tuple(part[:1] for part in rows(w_RK.expand(2, -1).contiguous()))


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows under rows. By their bytes: torch.cat has no kernel for 8-bit floats everywhere."""
    if len(parts) == 1:
        return parts[0]
    flat = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return flat.view(-1, parts[0].shape[1])


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """A group of zeros has no scale of its own: give it 1, so that dividing by it is defined and codes are 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def absmax127(absmax: torch.Tensor) -> torch.Tensor:
    """The scale that is stored as a row's largest magnitude: fl32(absmax · fl32(1/127)), float32. absmax: not zero."""
    return absmax.float() * INVERSE_127


def stored(scale: torch.Tensor, scheme: Scheme, weight: torch.dtype) -> torch.Tensor:
    """`scale` as it is stored for a weight of dtype `weight`, near the given value and never zero."""
    if scheme.weight.scale_dtype == "absmax127":
        return nonzero(absmax127(nonzero(scale.float() * 127)))
    return nonzero(scale.to(scale_dtype(scheme, weight)))


def int_reject(name: str, scheme: Scheme) -> str | None:
    """Why an algorithm of integer codes, with a scale for a group of one row, refuses `scheme`; or None."""
    weight = scheme.weight
    if weight.number.kind != "int":
        return f"{name} makes integer codes, not {weight.num}"
    if weight.block[0] != 1:
        return f"{name} gives each row scales of its own, not blocks of {weight.block}"
    if weight.global_scale or weight.scale_dtype not in ("model", "float32", "absmax127"):
        return f"{name} makes no scales of {weight.scale_dtype}"
    return None


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows as groups of columns that share a scale: float32, a view of nothing that may be written to.

    least_RG, most_RG: the smallest and the largest entry of every group. importance_Gg: how much each column counts in an
    error; None: all alike. low, high: the range of codes.
    """

    w_RGg: torch.Tensor
    least_RG: torch.Tensor
    most_RG: torch.Tensor
    importance_Gg: torch.Tensor | None
    low: float
    high: float

    @staticmethod
    def of(w_RK: torch.Tensor, stats: Stats | None, scheme: Scheme) -> Groups:
        """w_RK: float [R, K] with K a multiple of the group size."""
        number, group = scheme.weight.number, scheme.group_size if scheme.group_size != WHOLE else w_RK.shape[1]
        moment_K = None if stats is None else stats.second_moment_K
        importance_Gg = None if moment_K is None else moment_K.to(w_RK.device, torch.float32).view(-1, group)
        if importance_Gg is not None:  # channels that are always zero: any weight will do, plain rounding's for one
            importance_Gg = torch.where(importance_Gg.sum(-1, keepdim=True) > 0, importance_Gg, 1.0)
        w_RGg = w_RK.float().view(len(w_RK), -1, group)
        return Groups(w_RGg, w_RGg.amin(-1), w_RGg.amax(-1), importance_Gg, number.low, number.high)

    def codes(self, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None = None) -> torch.Tensor:
        """Codes less their zero: the nearest to w / scale in the range, float32 [R, G, g]."""
        u_RGg = (self.w_RGg / scale_RG[..., None]).round_()
        if zero_RG is None:
            return u_RGg.clamp_(self.low, self.high)
        low_RG1, high_RG1 = (self.low - zero_RG)[..., None], (self.high - zero_RG)[..., None]
        torch.maximum(u_RGg, low_RG1, out=u_RGg)  # clamp_ with tensors takes four times as long
        return torch.minimum(u_RGg, high_RG1, out=u_RGg)

    def sum(self, a_RGg: torch.Tensor) -> torch.Tensor:
        return (a_RGg if self.importance_Gg is None else a_RGg * self.importance_Gg).sum(-1)

    def dot(self, a_RGg: torch.Tensor, b_RGg: torch.Tensor) -> torch.Tensor:
        product = a_RGg * b_RGg
        return (product if self.importance_Gg is None else product.mul_(self.importance_Gg)).sum(-1)

    @property
    def weight(self) -> torch.Tensor | float:
        """What the columns of a group count together: [G], or the number of columns."""
        return self.w_RGg.shape[-1] if self.importance_Gg is None else self.importance_Gg.sum(-1)

    def mean(self, a_RGg: torch.Tensor) -> torch.Tensor:
        return self.sum(a_RGg) / self.weight

    def error(self, scale_RG: torch.Tensor, zero_RG: torch.Tensor | None = None) -> torch.Tensor:
        """The squared error of the codes that scale and zero give, relative to amax²: tiny squares would vanish. [R, G]"""
        off_RGg = self.codes(scale_RG, zero_RG).sub_(self.w_RGg / scale_RG[..., None])
        return self.dot(off_RGg, off_RGg).mul_((scale_RG / nonzero(self.amax_RG)).square_())

    @property
    def amax_RG(self) -> torch.Tensor:
        """The largest magnitude of every group."""
        return torch.maximum(-self.least_RG, self.most_RG)

    def largest(self) -> torch.Tensor:
        """The entry of largest magnitude of every group, with its sign; 1 in a group of zeros."""
        return nonzero(torch.where(-self.least_RG > self.most_RG, self.least_RG, self.most_RG))

    def span(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(smallest, largest) entry of every group, 0 included."""
        return self.least_RG.clamp(max=0), self.most_RG.clamp(min=0)


def plain(groups: Groups, scheme: Scheme, weight: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, stored, and integer zero (float32, in its domain) of rounding to nearest: the whole range of each group."""
    steps = groups.high - groups.low
    if scheme.weight.zero_domain == "none":
        if scheme.weight.scale_dtype == "absmax127":
            return nonzero(absmax127(nonzero(groups.amax_RG))), None
        return stored(groups.amax_RG / (steps / 2), scheme, weight), None
    least_RG, most_RG = groups.span()
    scale_RG = stored((most_RG - least_RG) / steps, scheme, weight)
    zero_RG = (groups.low - least_RG / scale_RG.float()).round_().clamp_(groups.low, groups.high)
    return scale_RG, zero_RG


def candidates(groups: Groups, scheme: Scheme, shrink: float, grid: int) -> list[Pair]:
    """Pairs of scale and integer zero (None: the scheme has none) among which a search begins, float32 [R, G].

    The scale that fits the whole group into the range of the codes, and `grid` − 1 smaller ones, down to `shrink` of it.
    """
    steps = torch.linspace(shrink, 1.0, grid).tolist()
    if scheme.weight.zero_domain == "int":
        return _with_zeros(groups, steps)
    if scheme.weight.scale_dtype == "absmax127":  # stored as a magnitude: no sign
        return [(nonzero(groups.amax_RG) * (step / groups.high), None) for step in steps]
    largest_RG = groups.largest()  # onto `low` with the opposite sign, or onto `high`
    return [(largest_RG * (step / end), None) for end in (groups.low, groups.high) for step in steps]


def _with_zeros(groups: Groups, steps: Sequence[float]) -> list[Pair]:
    """With every scale the zero that centres the range on the weights, and the zeros next to it."""
    (least_RG, most_RG), middle = groups.span(), (groups.low + groups.high) / 2
    pairs: list[Pair] = []
    for step in steps:
        scale_RG = nonzero((most_RG - least_RG) * (step / (groups.high - groups.low)))
        centred_RG = middle - (most_RG + least_RG) / (2 * scale_RG)
        pairs += [(scale_RG, (centred_RG + by).round_().clamp_(groups.low, groups.high)) for by in (-1, 0, 1)]
    return pairs


def neighbours(scale: torch.Tensor, scheme: Scheme, weight: torch.dtype) -> list[torch.Tensor]:
    """The values next to a stored scale, above and below."""
    ends = [torch.nextafter(scale, torch.full_like(scale, end)) for end in (torch.inf, -torch.inf)]
    return [stored(end, scheme, weight) for end in ends]


def finish(
    groups: Groups, w_RK: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """What `by_row_blocks` joins: codes, stored scale and integer zero. scale: as stored; zero: float32 or None."""
    return coded(groups.codes(scale.float(), zero), w_RK, scale, zero)


def coded(
    u_RGg: torch.Tensor, w_RK: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The same of codes less their zero that are known already; they are overwritten."""
    if zero is None:
        return u_RGg.to(torch.int8).view(w_RK.shape), scale
    return u_RGg.add_(zero[..., None]).to(torch.int8).view(w_RK.shape), scale, zero.to(torch.int8)

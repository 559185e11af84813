"""Which CUDA kernels a call really launched, by torch.profiler, and whether the one that was meant is among them.

Names are as CUPTI gives them, demangled, with every template argument: that is where CUTLASS kernels say what they are, so
they are searched whole and shortened only to be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from quantpub.kernels.base import OP_ERRORS, Kernel
from quantpub.kernels.moe_base import MoeKernel

COPIES = ("Memcpy", "Memset")
LENGTH = 160  # characters of a shortened name
WORD = re.compile(r"[A-Za-z_]\w*(?:::[A-Za-z_]\w*)*")
NOISE = {
    "void", "const", "unsigned", "signed", "int", "long", "short", "char", "bool", "float", "double", "true", "false", "std",
}  # fmt: skip


def device_kernels(call: Callable[[], object]) -> tuple[list[str], str | None]:
    """(the kernels that the call launches, each once, in order; why none was seen, or None). The call is made twice."""
    if not torch.cuda.is_available():
        return [], "there is no CUDA device"
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return [], f"the profiler of torch {torch.__version__} cannot see CUDA kernels"
    call()  # what is compiled or chosen at a first call is none of its kernels
    torch.cuda.synchronize()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        found = names(profile.events() or ())
    except RuntimeError as error:  # CUPTI is missing, or another profiler holds it
        return [], f"the profiler does not work here: {str(error).strip().splitlines()[0]:.200}"
    return found, None if found else "the profiler saw no kernel: CUPTI is missing, or another profiler holds it"


def names(events: Iterable[Any]) -> list[str]:
    """Of a profile's events those that are kernels, each name once."""
    on_device = (event for event in events if event.device_type.name == "CUDA")
    ran = (event.name for event in on_device if not getattr(event, "is_user_annotation", False))
    return [name for name in dict.fromkeys(ran) if not name.startswith(COPIES)]


def short(name: str) -> str:
    """The identifiers of a kernel's name, each once, without layouts and plain types."""
    words = WORD.findall(name.replace("(anonymous namespace)::", ""))
    kept = " ".join(dict.fromkeys(word for word in words if word not in NOISE and not word.startswith("cute::")))
    return kept if len(kept) <= LENGTH else f"{kept[: LENGTH - 1]}…"


def confirm(kernel: Kernel | MoeKernel, ran: Sequence[str]) -> str | None:
    """Why the kernel is not seen to have run, or None: one of the names matches its `symbol`, whatever the case."""
    if not kernel.symbol or any(re.search(kernel.symbol, name, re.IGNORECASE) for name in ran):
        return None
    seen = "; ".join(short(name) for name in ran) or "nothing"
    return f"{kernel.name} should run a kernel like {kernel.symbol}; what ran: {seen}"


def looked_at(kernel: Kernel | MoeKernel, gemm: str, m: int, call: Callable[[], object]) -> dict[str, Any]:
    """An entry of the evidence: what a kernel's call launched, and why it is not confirmed, where it is not."""
    try:
        ran, reason = device_kernels(call)
    except OP_ERRORS as error:  # a kernel may refuse this M and take others
        ran, reason = [], f"the op failed: {(str(error).strip() or type(error).__name__).splitlines()[0]:.160}"
    seen = list(dict.fromkeys(short(name) for name in ran))
    return {"kernel": kernel.name, "gemm": gemm, "m": m, "seen": seen, "unconfirmed": reason or confirm(kernel, ran)}

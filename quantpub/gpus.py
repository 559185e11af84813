"""GPUs by name: what their vendor says of them, and how much of it was reached. No drivers are asked here.

memory: bytes. bandwidth: bytes/s. peak: number format → operations/s of the tensor cores, dense (a data sheet's figure
"with sparsity" halved; on GeForce and RTX boards with float32 accumulation, which is what serving kernels use).
l2: bytes. multiprocessors: those that are enabled. generation: a key of `hardware.GENERATIONS`. achieved: the fraction of a
figure that a long plain copy or a large GEMM reaches; where it was not measured, it is the H200's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantpub.errors import UsageError, closest

GB, TB, TERA = 10**9, 10**12, 10**12
MIB, GIB = 1 << 20, 1 << 30
BF16, FP8, INT8, FP4 = "bf16", "fp8", "int8", "fp4"


@dataclass(frozen=True)
class Achieved:
    """Fractions of the data sheet. bandwidth: a copy. compute: a GEMM of thousands of rows, in short bursts."""

    bandwidth: float
    compute: float
    source: str
    measured: bool = False


H200_BURST = (
    "measured: copy 4.3 TB/s; bf16 linears of Qwen3-8B at 2048 rows, 790 TFLOP/s (docs/evidence/h200-int4-kernels.json)"
)
ASSUMED = Achieved(0.9, 0.8, "assumed: the fractions that an H200 reached")


@dataclass(frozen=True)
class Gpu:
    name: str
    generation: str
    memory: int
    bandwidth: float
    peak: Mapping[str, float]
    l2: int
    multiprocessors: int
    source: str
    achieved: Achieved = ASSUMED

    def rate(self, num: str) -> float:
        """Peak operations/s for a number format; a format without tensor cores of its own is computed in bf16."""
        return self.peak.get(num, self.peak[BF16])


def _peak(bf16: float, fp8: float = 0, int8: float = 0, fp4: float = 0) -> dict[str, float]:
    """TFLOP/s → operations/s, without the formats that the GPU lacks."""
    given = {BF16: bf16, FP8: fp8, INT8: int8, FP4: fp4}
    return {num: tera * TERA for num, tera in given.items() if tera}


_HOPPER, _NVL = _peak(989.4, 1978.9, 1978.9), _peak(835.5, 1670.5, 1670.5)
_GEFORCE, _PRO = _peak(209.5, 419, 838, 1676), _peak(503.8, 1007.6, 1007.6, 2015.2)  # Blackwell
_DATA_CENTRE = _peak(2250, 4500, 4500, 9000)
_ALL = (
    replace(
        Gpu("H200", "sm90", 141 * GB, 4.8 * TB, _HOPPER, 50 * MIB, 132, "NVIDIA H200 data sheet (SXM)"),
        achieved=Achieved(0.9, 0.8, H200_BURST, measured=True),
    ),
    Gpu("H200-NVL", "sm90", 141 * GB, 4.8 * TB, _NVL, 50 * MIB, 132, "NVIDIA H200 data sheet (NVL)"),
    Gpu("H100", "sm90", 80 * GB, 3.35 * TB, _HOPPER, 50 * MIB, 132, "NVIDIA H100 data sheet (SXM)"),
    Gpu("H100-PCIE", "sm90", 80 * GB, 2.0 * TB, _peak(756, 1513, 1513), 50 * MIB, 114, "NVIDIA H100 data sheet (PCIe)"),
    Gpu("H100-NVL", "sm90", 94 * GB, 3.9 * TB, _NVL, 50 * MIB, 132, "NVIDIA H100 data sheet (NVL)"),
    Gpu("H20", "sm90", 96 * GB, 4.0 * TB, _peak(148, 296, 296), 60 * MIB, 78, "NVIDIA H20 data sheet"),
    Gpu("A100-40", "sm80", 40 * GB, 1.555 * TB, _peak(312, int8=624), 40 * MIB, 108, "NVIDIA A100 data sheet (40 GB)"),
    Gpu("A100-80", "sm80", 80 * GB, 2.039 * TB, _peak(312, int8=624), 40 * MIB, 108, "NVIDIA A100 data sheet (80 GB)"),
    Gpu("A10", "sm80", 24 * GB, 0.6 * TB, _peak(125, int8=250), 6 * MIB, 72, "NVIDIA A10 data sheet"),
    Gpu("RTX-A6000", "sm80", 48 * GB, 0.768 * TB, _peak(154.8, int8=309.7), 6 * MIB, 84, "NVIDIA GA102 white paper"),
    Gpu("RTX-3090", "sm80", 24 * GB, 0.936 * TB, _peak(71, int8=284), 6 * MIB, 82, "NVIDIA GA102 white paper"),
    Gpu("L4", "sm89", 24 * GB, 0.3 * TB, _peak(121, 242.5, 242.5), 48 * MIB, 58, "NVIDIA L4 data sheet"),
    Gpu("L40S", "sm89", 48 * GB, 0.864 * TB, _peak(362, 733, 733), 96 * MIB, 142, "NVIDIA L40S data sheet"),
    Gpu("RTX-4090", "sm89", 24 * GB, 1.008 * TB, _peak(165.2, 330.3, 660.6), 72 * MIB, 128, "NVIDIA Ada white paper"),
    Gpu("RTX-5090", "sm120", 32 * GB, 1.792 * TB, _GEFORCE, 96 * MIB, 170, "NVIDIA RTX Blackwell white paper"),
    Gpu("RTX-PRO-6000", "sm120", 96 * GB, 1.792 * TB, _PRO, 128 * MIB, 188, "NVIDIA RTX Blackwell PRO white paper"),
    Gpu("B200", "sm100", 180 * GB, 7.7 * TB, _DATA_CENTRE, 126 * MIB, 148, "NVIDIA HGX B200 data sheet"),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
# what a driver calls a board, whole and without its maker → its name here. What is not known by its whole name is not guessed:
# a MIG slice or a virtual GPU is a part of one, a laptop's and a Max-Q board are slower, GH200 and 3090 Ti are others.
_BOARDS = (
    (r"h200", "H200"), (r"h200 nvl", "H200-NVL"), (r"h100( 80gb hbm3)?", "H100"), (r"h100 pcie", "H100-PCIE"),
    (r"h100 nvl", "H100-NVL"), (r"h20", "H20"), (r"a100([ -](pcie|sxm4?))?[ -]40gb", "A100-40"),
    (r"a100([ -](pcie|sxm4?))?[ -]80(gb)?( pcie)?", "A100-80"), (r"a10", "A10"), (r"rtx a6000", "RTX-A6000"),
    (r"rtx 3090", "RTX-3090"), (r"l4", "L4"), (r"l40s", "L40S"), (r"rtx 4090", "RTX-4090"), (r"rtx 5090", "RTX-5090"),
    (r"rtx pro 6000( blackwell (server|workstation) edition)?", "RTX-PRO-6000"), (r"b200", "B200"),
)  # fmt: skip


def find(name: str) -> Gpu:
    """A GPU by its name, whatever the case, blanks or underscores. Errors: UsageError with the closest names."""
    wanted = re.sub(r"[\s_]+", "-", name.strip()).upper().removeprefix("NVIDIA-")
    for gpu in GPUS.values():
        if gpu.name.upper().replace("-", "") == wanted.replace("-", ""):
            return gpu
    if wanted == "A100":
        raise UsageError("an A100 has 40 or 80 GB", next="say A100-40 or A100-80")
    raise UsageError(f"unknown GPU {name!r}", next=closest(wanted, GPUS))


def of_device(device: str, memory: int | None = None) -> Gpu | None:
    """The GPU that a driver's name of a device means, such as `NVIDIA H200`; None when it is not in the table.

    memory: bytes that the device says it has, in place of the table's.
    """
    wanted = re.sub(r"^(nvidia )?(geforce )?", "", device.strip().lower())
    gpu = next((GPUS[name] for pattern, name in _BOARDS if re.fullmatch(pattern, wanted)), None)
    return replace(gpu, memory=memory) if gpu and memory else gpu

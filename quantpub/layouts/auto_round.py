"""auto-round's own packing of integers: other tools' checkpoints, read and never written.

The tensors are those of `gptq_words` without g_idx; qzeros hold the zero as it is, scales are fp16. `packing_format` is
`auto_round` or `auto_round:gptqmodel`. What auto-round calls `auto_round:auto_gptq` stores a zero less one: `gptq_zeros`.
Source: auto-round's inference/backend.py (GPTQ_FORMAT_NO_ZP) and qlinear_torch.
"""

from __future__ import annotations

from quantpub.layouts.base import peer, reject_integers
from quantpub.layouts.gptq_words import ANY_ZERO, Words, reject_shape
from quantpub.scheme import Scheme


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    return reject_integers("auto-round", scheme, dtype, ANY_ZERO) or reject_shape(scheme, n, k)


_WORDS = Words(less=0, ordered=False)
LAYOUT = peer("auto-round", "auto-round", reject, _WORDS.spec, _WORDS.pack, _WORDS.unpack, _WORDS.ambiguous)

"""Version 1 of GPTQ with integer zeros, and as auto-round writes it: other tools' checkpoints, read and never written.

The tensors are those of `gptq_words`; qzeros hold zero − 1.

    gptq-zeros   GPTQModel's and AutoGPTQ's, `sym: false`
    auto-gptq    auto-round's, `packing_format: auto_round:auto_gptq`: no g_idx, scales in fp16 and of either sign;
                 symmetric weights have 0x77777777 or 0x7f7f7f7f for zeros, as GPTQ's have

A stored 15 of int4, or 255 of int8, has no one meaning. GPTQModel takes zeros of version 2 less 1 as whole words, so that a
zero of 0 becomes 15 and borrows from its neighbour; readers that go by single zeros see 16 or 0, and a neighbour that is one
too small. Without a stored 15 all read the same.
Sources: GPTQModel's convert_gptq_v2_to_v1_format_module; auto-round's model_free_utils and qlinear_torch_zp.
"""

from __future__ import annotations

from quantpub.layouts.base import peer, reject_integers
from quantpub.layouts.gptq_words import ANY_ZERO, Words, reject_shape
from quantpub.scheme import Scheme


def reject(scheme: Scheme, n: int, k: int, dtype: str) -> str | None:
    return reject_integers("gptq version 1", scheme, dtype, ANY_ZERO) or reject_shape(scheme, n, k)


_WITH, _WITHOUT = Words(less=1), Words(less=1, ordered=False)
LAYOUT = peer("gptq-zeros", "gptq", reject, _WITH.spec, _WITH.pack, _WITH.unpack, _WITH.ambiguous)
AUTO = peer("auto-gptq", "auto-round", reject, _WITHOUT.spec, _WITHOUT.pack, _WITHOUT.unpack, _WITHOUT.ambiguous)

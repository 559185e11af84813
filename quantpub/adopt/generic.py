"""A family for architectures that are not known by name: what is quantized is a linear, the rest is told by its ending.

Adopting needs no more: nothing is quantized anew. Engines' merged linears are those of almost every decoder.
"""

from __future__ import annotations

from quantpub.families import BIAS, BUFFER, EMBEDDING, HEAD, LINEAR, NORM, ROUTER, Family

GENERIC = Family(
    "generic",
    (
        (r".*\.(embed_tokens|wte|word_embeddings|embed_positions|position_embedding|patch_embed.*)\.weight", EMBEDDING),
        (r"(.*\.)?(lm_head|output_layer)\.weight", HEAD),
        (r".*norm\w*(\.\d+)?\.(weight|bias)", NORM),
        (r".*\.(gate|router|shared_expert_gate|wg)\.weight", ROUTER),
        (r".*bias", BIAS),
        (r".*\.weight", LINEAR),
        (r".*", BUFFER),
    ),
    row_parallel=r".*\.(o_proj|out_proj|down_proj|w2|c_proj|dense_4h_to_h)",
)

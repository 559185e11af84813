"""Verification: one rule a function, each with an id, each answering with a reason. Rules look; they change nothing."""

from __future__ import annotations

from typing import NamedTuple

from quantpub.registry import Entry


class Rule(NamedTuple):
    """needs: rules without whose passing this one cannot look. next: what to do about a failure. ours: asked of ours alone."""

    entry: Entry
    next: str
    needs: tuple[str, ...] = ()
    ours: bool = False


AGAIN = "make the checkpoint again, and do not publish this one"
WHOLE = "copy or download the files again; if they are as they were made, make the checkpoint again"

# In the order they run. A rule is a function Subject → Finding.
CHECKS = {
    "files": Rule(
        Entry(
            "quantpub.verify.structure:files",
            "every file has the sha256 that SHA256SUMS states; none is extra or missing",
        ),
        WHOLE,
        ours=True,
    ),
    "safe-files": Rule(
        Entry("quantpub.verify.hygienic:safe_files", "no pickles, no code, no links"),
        "remove the file; convert pickles to safetensors",
    ),
    "remote-code": Rule(
        Entry("quantpub.verify.hygienic:remote", "no configuration asks for code of its own"),
        "remove auto_map where transformers knows the architecture; else say so on the card, and review the code",
    ),
    "private": Rule(
        Entry("quantpub.verify.hygienic:private", "no secrets and no local paths in texts"),
        "take it out; a token that was published must be revoked",
    ),
    "index": Rule(Entry("quantpub.verify.structure:index", "index and shards name the same tensors, each once"), WHOLE),
    "tensors": Rule(
        Entry(
            "quantpub.verify.structure:tensors",
            "every quantized module has exactly the tensors, dtypes and shapes of its layout",
        ),
        "make the checkpoint again: engines do not notice a scale that is missing, and serve noise",
        ("index",),
    ),
    "readable": Rule(
        Entry("quantpub.verify.structure:readable", "every module is of a kind that is read here"),
        "judge it with the tool that made it",
        ("index",),
    ),
    "parses": Rule(
        Entry(
            "quantpub.verify.declared:parses",
            "engines' config parsers take it: compressed-tensors 0.17, ModelOpt's, GPTQ's, …",
        ),
        "take the key out, or write it with the version of the library that engines pin",
    ),
    "config": Rule(
        Entry(
            "quantpub.verify.structure:config",
            "what engines compute by is the source's; of ours every key, and quantization_config is the layout's",
        ),
        "restore the source's values in config.json, or quantize again",
        ("parses",),
    ),
    "bits": Rule(
        Entry("quantpub.verify.left_out:bits", "number formats are those declared, and nothing large was left out"),
        "quantize again with a tool that reaches those weights (3-D experts as 2-D linears), or let the config say what was done",
        (
            "readable",
            "tensors",
        ),
    ),
    "complete": Rule(
        Entry(
            "quantpub.verify.whole:complete",
            "every layer and expert, the embedding and the head are there, in the sizes that the config states",
        ),
        "quantize again: an engine would fill what is missing with random numbers",
        ("readable", "tensors", "bits", "config"),
    ),
    "names": Rule(
        Entry("quantpub.verify.declared:names", "engines find every module by the config's names, and find the same"),
        "anchor patterns (re:.*\\.v_proj$), name modules in full, and treat what engines merge alike",
        ("readable", "parses", "config", "tensors", "bits"),
    ),
    "kv-cache": Rule(
        Entry("quantpub.verify.declared:kv_cache", "an FP8 KV cache is declared only with calibrated scales"),
        "calibrate the cache, or take kv_cache_scheme out of the config: engines clip keys and values by a scale of 1",
        ("parses", "config"),
    ),
    "tensor-parallel": Rule(
        Entry("quantpub.verify.declared:tensor_parallel", "into how many GPUs' shares it can be cut: 1, 2, 4, 8"),
        "serve it on so many GPUs as the table allows, or quantize again with smaller groups",
        (
            "readable",
            "tensors",
        ),
    ),
    "coverage": Rule(
        Entry(
            "quantpub.verify.source:coverage",
            "every source tensor is accounted for once; of ours the small files are byte-identical",
        ),
        AGAIN,
        ("readable", "tensors", "bits", "complete"),
    ),
    "copies": Rule(
        Entry(
            "quantpub.verify.source:copies",
            "tensors that were not quantized are the source's, byte for byte or after the cast that is told",
        ),
        AGAIN,
        (
            "readable",
            "tensors",
        ),
    ),
    "merged": Rule(
        Entry(
            "quantpub.verify.merged:merged",
            "linears that engines merge have one scheme, and share what engines keep once",
        ),
        "quantize again with one global scale for q/k/v and one for gate/up: engines keep one, and the others come out wrong",
        (
            "readable",
            "tensors",
        ),
    ),
    "scales": Rule(
        Entry("quantpub.verify.scales:scales", "scales are finite, not zero, and in the convention of their names"),
        "calibrate with data that reaches every expert, and quantize again",
        (
            "readable",
            "tensors",
        ),
    ),
    "values": Rule(
        Entry(
            "quantpub.verify.values:values", "every tensor dequantized once: error against the source under the floor"
        ),
        AGAIN,
        ("readable", "tensors", "scales"),
    ),
}
RULES = {name: rule.entry for name, rule in CHECKS.items()}

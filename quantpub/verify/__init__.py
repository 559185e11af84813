"""Verification: one rule a function, each with an id, each answering with a reason. Rules look; they change nothing."""

from __future__ import annotations

from quantpub.registry import Entry

# In the order they run. A rule is a function Subject → Finding.
RULES = {
    "files": Entry(
        "quantpub.verify.structure:files", "every file has the sha256 that SHA256SUMS states; none is extra or missing"
    ),
    "safe-files": Entry("quantpub.verify.structure:safe_files", "no pickles, no code, no links"),
    "index": Entry("quantpub.verify.structure:index", "the index and the shards name the same tensors"),
    "tensors": Entry(
        "quantpub.verify.structure:tensors", "names, shapes and dtypes are those the layout states for the config"
    ),
    "config": Entry(
        "quantpub.verify.structure:config", "quantization_config is the layout's, and nothing local is in config.json"
    ),
    "bits": Entry("quantpub.verify.structure:bits", "bits per weight on disk are those declared"),
    "coverage": Entry(
        "quantpub.verify.source:coverage", "every source tensor has one action; companions are byte-identical"
    ),
    "copies": Entry(
        "quantpub.verify.source:copies", "tensors that were not quantized are byte-identical to the source"
    ),
    "merged": Entry(
        "quantpub.verify.merged:merged", "linears that engines merge have one scheme, and share what engines keep once"
    ),
    "values": Entry(
        "quantpub.verify.values:values",
        "every tensor dequantized: scales finite, error against the source under the floor",
    ),
}

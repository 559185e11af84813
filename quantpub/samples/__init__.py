"""Calibration data: the token ids that a model is shown, from a file or from a dataset on the Hub.

request.py      what was asked for, and what kind of thing its name is
identity.py     who the data is, without reading more than it must: the key of a cached calibration
reading.py      the straight line: where the data lies, its documents, those that are picked, their token ids
dataset.py      a dataset repository at one commit; splits.py: which of its files are a split
lines.py, parquet.py    rows of files, read where they are needed
rows.py         what a row holds: ids, a conversation, a text, a prompt and its answer
picking.py      which documents, by seed
text.py         one long text, cut into windows
encoder.py      the model's tokenizer and chat template
"""

from quantpub.samples.identity import default_data, identify
from quantpub.samples.reading import Samples, read_samples
from quantpub.samples.request import DEFAULT, Request

__all__ = ["DEFAULT", "Request", "Samples", "default_data", "identify", "read_samples"]

"""quantpub: quantize a language model, prove it on the engine that will serve it, and publish it."""

__version__ = "0.1.0"

"""The engine-agnostic core: routing, the prefill queue, the KV contract and everything around them."""

__version__ = "0.1.0"

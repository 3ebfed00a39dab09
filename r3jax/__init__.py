"""Search-R3 in JAX and Flax: reasoning and search vectors from one Qwen-2.5 decoder."""

__version__ = "0.1.0"

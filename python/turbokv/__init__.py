"""turbokv: KV-cache types for llama.cpp, and the driver that measures what they cost."""

__version__ = "0.1.0"

"""rustllama: a local LLM server and console."""

__version__ = "0.1.0"

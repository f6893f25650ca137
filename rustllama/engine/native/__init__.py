"""The only door to llama.cpp: weights with their vocabulary, contexts with their slots, sampler chains.

Not one of these functions may be called in the hub, and a Context only by one thread at a time.
"""

from rustllama.engine.native import openmp  # noqa: F401 - before llama.cpp is loaded

# isort: split
from rustllama.engine.native.attention import plain_is_faster
from rustllama.engine.native.context import Aborted, Context
from rustllama.engine.native.library import BUILD, gpu_layers, has_gpu, listen
from rustllama.engine.native.model import Model
from rustllama.engine.native.sampler import Sampler

__all__ = [
    "BUILD",
    "Aborted",
    "Context",
    "Model",
    "Sampler",
    "gpu_layers",
    "has_gpu",
    "listen",
    "plain_is_faster",
]

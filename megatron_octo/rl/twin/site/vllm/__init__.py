"""Stands in for vLLM on a CPU: the few names OpenRLHF uses, over the project's own decoding loop."""

from vllm.engine import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

__all__ = ["AsyncEngineArgs", "AsyncLLMEngine", "SamplingParams", "__version__"]

__version__ = "0.29.0"
"""The version OpenRLHF 0.11.2 pins; it asks."""

"""nanovllm: an LLM inference engine that a book builds step by step."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]

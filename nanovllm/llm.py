"""The public entry point."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """An offline inference engine: `LLM().generate("Once upon a time")`."""

"""Small stand-ins for tests, ours and plugin authors': a tokenizer, an LLM and a teacher made in milliseconds."""

from hovle_core.testing.tiny import (
    CHATML,
    GridTeacher,
    tiny_embedding_config,
    tiny_hovle,
    tiny_llm,
    tiny_processor,
    tiny_tokenizer,
)

__all__ = [
    "CHATML",
    "GridTeacher",
    "tiny_embedding_config",
    "tiny_hovle",
    "tiny_llm",
    "tiny_processor",
    "tiny_tokenizer",
]

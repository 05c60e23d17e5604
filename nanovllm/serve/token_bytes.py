"""What single tokens stand for: bytes, which need not be characters."""

import re
from functools import cache, lru_cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of its own, in a vocabulary with such


@cache
def byte_of() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies (GPT-2's): the printable stand for themselves.

    The other bytes have the characters from U+0100 on, in their order.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in shown else next(others)): byte for byte in range(256)}


@lru_cache(maxsize=100_000)  # the likeliest tokens come again and again
def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of one token, as it stands inside a text; of a special one, its name."""
    backend = tokenizer.backend_tokenizer
    if (token := backend.id_to_token(token_id)) is None:
        return b""
    if token_id in backend.get_added_tokens_decoder():
        return token.encode()
    table = byte_of() if "ByteLevel" in repr(backend.decoder) else {}
    if table and all(character in table for character in token):
        return bytes(table[character] for character in token)
    if match := BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def token_text(tokenizer: Any, token_id: int) -> str:
    """One token as text; bytes that are no characters become U+FFFD."""
    return token_bytes(tokenizer, token_id).decode(errors="replace")

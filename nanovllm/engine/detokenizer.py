"""Tokens to text while they arrive."""

from collections import deque
from collections.abc import Collection
from typing import Any

UNFINISHED = "\ufffd"  # what bytes that are no character (yet) are decoded to
LONGEST = 3  # a character has up to four bytes, so up to three tokens can be its beginning


class Detokenizer:
    """Grows one request's text token by token and finds its stop strings.

    A character can span tokens, and a stop string can begin in one and end in the next: text is
    ready once neither can change it. Text that has been ready is never taken back.
    """

    def __init__(self, tokenizer: Any, stop: Collection[str] = ()):
        self.tokenizer = tokenizer.backend_tokenizer
        added = self.tokenizer.get_added_tokens_decoder().items()
        self.special = {token_id for token_id, token in added if token.special}
        self.stop = stop
        self.window: list[int] = []  # the newest tokens: some whose text is read, then the others
        self.num_read = 0
        self.tail = ""  # text that is read, and that a stop string may begin in
        self.ready: deque[str] = deque()  # one thread appends, another may take
        self.has_stopped = False

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens by themselves, special ones left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def take_ready(self) -> str:
        """The text that has become ready since the last call."""
        return "".join(self.ready.popleft() for _ in range(len(self.ready)))

    def has_text(self, token_id: int) -> bool:
        """Is it a token that can stand in a text?"""
        return token_id not in self.special and self.tokenizer.id_to_token(token_id) is not None

    def append(self, token_id: int) -> None:
        """Decode one more token."""
        if not self.has_text(token_id):
            return
        self.window.append(token_id)
        is_open = self.decode(self.window).endswith(UNFINISHED)
        self.read(len(self.window) - (LONGEST if is_open else 0))

    def read(self, stop: int) -> None:
        """Read the text of the window's tokens up to `stop`.

        It is what they add to the text of those before: alone, a word can lose its space.
        """
        if stop <= self.num_read:
            return
        before, text = self.decode(self.window[: self.num_read]), self.decode(self.window[:stop])
        if text.startswith(before):
            new = text[len(before) :]
        else:  # bytes that were a character are none with what follows: what is ready stays
            new = self.decode(self.window[self.num_read : stop])
        if new:  # else those before are still needed
            del self.window[: self.num_read]
            stop -= self.num_read
        self.num_read = stop
        self.search(new)

    def search(self, text: str) -> None:
        """Look for stop strings in more text; from the earliest on, it is dropped."""
        self.tail += text
        starts = [at for at in map(self.tail.find, self.stop) if at >= 0]
        self.has_stopped = self.has_stopped or bool(starts)
        sizes = [
            n for stop in self.stop for n in range(1, len(stop)) if self.tail.endswith(stop[:n])
        ]
        held_back = 0 if self.has_stopped else max(sizes, default=0)
        end = min(starts) if starts else len(self.tail) - held_back
        self.ready.append(self.tail[:end])
        self.tail = "" if self.has_stopped else self.tail[end:]

    def flush(self) -> None:
        """No token follows: what was held back is text after all."""
        self.read(len(self.window))
        if not self.has_stopped:
            self.ready.append(self.tail)
            self.tail = ""

    def decode_all(self, token_ids: list[int]) -> str:
        """The text of a completion that nobody has read along with.

        Where every byte belongs to a character, all ways to cut it give the same text.
        """
        text = self.decode(token_ids)
        if UNFINISHED not in text:
            return text
        for token_id in token_ids:
            self.append(token_id)
        self.flush()
        return self.take_ready()

    def extend(self, token_ids: list[int]) -> None:
        """Decode more tokens, of which only the last can complete a stop string.

        At once where each byte of them belongs to a character, else one by one.
        """
        found = [token_id for token_id in token_ids if self.has_text(token_id)]
        if len(found) > 1 and type(self.tokenizer.decoder).__name__ == "ByteLevel":
            read, text = self.decode(self.window[: self.num_read]), self.decode(self.window + found)
            if UNFINISHED not in read + text:
                self.window += found
                return self.read(len(self.window))
        for token_id in found:
            self.append(token_id)

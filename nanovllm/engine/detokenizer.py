"""Tokens to text while they arrive."""

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Grows one request's text token by token and finds its stop strings.

    A character can span tokens, and a stop string can begin in one and end in the next: text
    counts as ready once neither can change it.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer = tokenizer.backend_tokenizer
        self.stop = stop
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text = ""
        self.num_taken = 0  # characters handed out by take_ready
        self.has_stopped = False

    def append(self, token_id: int) -> None:
        """Decode one more token; from the earliest stop string on, the text is dropped."""
        self.text += self.stream.step(self.tokenizer, token_id) or ""
        starts = [at for at in map(self.text.find, self.stop) if at >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.has_stopped = True

    def take_ready(self) -> str:
        """Text not taken before that no stop string can reach back into."""
        held_back = 0
        for stop in self.stop:
            for size in range(1, len(stop)):
                if self.text.endswith(stop[:size]):
                    held_back = max(held_back, size)
        ready = self.text[self.num_taken : len(self.text) - held_back]
        self.num_taken += len(ready)
        return ready

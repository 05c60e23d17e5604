"""An engine whose model says what a test has written down: its sampler reads a script."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import save_random
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

PIECES = ("▁", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab", "▁a", "xyz")
VOCAB = {"<unk>": 0} | {piece: number for number, piece in enumerate(PIECES, start=1)}
SPECIAL = len(VOCAB)  # a token that is no text


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes what it does not know as bytes, as sentencepiece models do."""
    backend = Tokenizer(models.BPE(VOCAB, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tokens(data: bytes | str) -> list[int]:
    """A byte string as byte tokens; a text as the tokens of its characters."""
    names = [f"<0x{byte:02X}>" for byte in data] if isinstance(data, bytes) else list(data)
    return [VOCAB[name] for name in names]


def save_scripted(folder: Path) -> Path:
    """A checkpoint with that tokenizer; what its weights say does not matter."""
    save_random(folder)
    byte_fallback_tokenizer().save_pretrained(folder)
    return folder


class Script(torch.nn.Module):
    """A sampler: the request with seed s gets `lines[s]`, one token after the other."""

    def __init__(self, lines: dict[int, list[int]], num_prompt_tokens: int):
        super().__init__()
        self.lines, self.num_prompt_tokens = lines, num_prompt_tokens

    def resample(self, *rest) -> None:
        """Nobody asks for a filter."""

    def choose(self, logits: torch.Tensor, sampling, first: int = 0) -> torch.Tensor:
        found = []
        for seed, position in zip(sampling.seeds.tolist(), sampling.positions.tolist()):
            line, at = self.lines.get(seed, []), position - self.num_prompt_tokens
            found.append(line[at] if 0 <= at < len(line) else VOCAB["a"])
        return torch.tensor(found, dtype=torch.int64, device=logits.device)

    forward = choose

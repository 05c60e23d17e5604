"""The training corpus: documents from seeds, packed into rows of tokens.

    python book/tiny/corpus.py --seed 0 --stories 3

prints stories with some of their questions and answers, and one chat.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import chats
import numpy as np
import stories
from tokenizers import Tokenizer


def documents(seed: int, is_chat: bool) -> Iterator[chats.Document]:
    """An endless stream of training documents of one sort; the same for the same seed."""
    rng = random.Random(f"corpus {seed} {is_chat}")
    make = chats.chat_document if is_chat else chats.story_document
    while True:
        yield make(rng)


def encode(tokenizer: Tokenizer, document: chats.Document) -> tuple[list[int], list[float]]:
    """Token ids of a document, and the weight of each as a target."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in document:
        piece = tokenizer.encode(text).ids
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def rows(
    tokenizer: Tokenizer, seed: int, num_rows: int, row_len: int, is_chat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Packed rows: `[num_rows, row_len]` token ids (uint16) and target weights (float16).

    A row holds documents of one sort, one after another, and starts where a document starts; the
    last one is cut. Attention sees the whole row, so the model learns that the stories of a row
    have nothing to do with each other, and that positions up to `row_len` are ordinary.
    """
    tokens = np.zeros((num_rows, row_len), dtype=np.uint16)
    weights = np.zeros((num_rows, row_len), dtype=np.float16)
    stream = documents(seed, is_chat)
    for row in range(num_rows):
        at = 0
        while at < row_len:
            ids, weight = encode(tokenizer, next(stream))
            count = min(len(ids), row_len - at)
            tokens[row, at : at + count] = ids[:count]
            weights[row, at : at + count] = weight[:count]
            at += count
    return tokens, weights


def sample_text(seed: int, num_documents: int) -> Iterator[str]:
    """Plain text of both sorts of documents, from which the tokenizer is trained."""
    for is_chat in (False, True):
        stream = documents(seed, is_chat)
        for _ in range(num_documents):
            yield "".join(text for text, _ in next(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=3, help="how many to print")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.stories):
        story = stories.tell(rng)
        print(f"{story.text}\n")
        for fact in chats.some_facts(rng, story, 6):
            print(f"    {fact.question}\n    {fact.answer}\n")
    print("".join(text for text, _ in chats.chat_document(rng)))


if __name__ == "__main__":
    main()

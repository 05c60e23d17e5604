"""The checkpoint's tokenizer."""

from pathlib import Path


def load_tokenizer(folder: Path):
    """The folder's transformers tokenizer, or None where the folder holds none."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)

"""The checkpoint's tokenizer."""

from pathlib import Path


def load_tokenizer(folder: Path):
    """The folder's transformers tokenizer, or None where the folder holds none."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any class, from several libraries
        raise ValueError(f"{folder}: {', '.join(names)} can't be read: {error}") from None

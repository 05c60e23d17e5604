"""The checkpoint's tokenizer."""

from pathlib import Path

from nanovllm.utils.errors import as_value_error


def load_tokenizer(folder: Path):
    """The folder's transformers tokenizer, or None where the folder holds none."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    with as_value_error(f"{folder} can't be read"):
        names = [name for name in names if (folder / name).is_file()]
    if not names:
        return None
    from transformers import AutoTokenizer

    with as_value_error(f"{folder}: {', '.join(names)} can't be read"):
        return AutoTokenizer.from_pretrained(folder)

"""Conversations: checked, and brought into the form that the model was trained on."""

from typing import Any

from nanovllm.utils.errors import as_value_error

Messages = list[dict[str, object]]  # role and content, and what else the chat template knows


def check_messages(messages: Messages) -> Messages:
    """The messages, each content one text; ValueError unless each has a role and a content."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"a conversation is a list of messages, got {messages!r}")
    checked = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"a message is a dict of role and content, got {message!r}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = "\n".join(map(text_of_part, content))
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise ValueError(f"role and content of a message must be text, got {message!r}")
        with as_value_error("a message is no Unicode text"):
            content.encode()
        checked.append({**message, "content": content})
    return checked


def text_of_part(part: Any) -> str:
    """The text of a part of a message's content; ValueError for a part of another type."""
    if not isinstance(part, dict):
        raise ValueError(f'a part of a content is {{"type": "text", "text": …}}, got {part!r}')
    if part.get("type") != "text":
        raise ValueError(f"a part of a content must be of type 'text', got {part.get('type')!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"a part of a content holds no text: {part!r}")
    return part["text"]


def as_conversations(messages: Any) -> list[Messages]:
    """One conversation or several, as a list of conversations."""
    first = messages[0] if isinstance(messages, list | tuple) and messages else None
    return messages if isinstance(first, list | tuple) else [messages]


def check_chat_template(tokenizer: Any) -> None:
    """ValueError where there is none."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("the checkpoint has no chat template")


def encode_chat(tokenizer: Any, messages: Messages, template_options: dict | None) -> list[int]:
    """The token ids of a conversation, up to where the assistant's answer begins.

    Where the last message is the assistant's, the answer goes on where that ends.
    """
    check_chat_template(tokenizer)
    messages = check_messages(messages)
    is_begun = messages[-1]["role"] == "assistant"
    with as_value_error("the chat template does not take this conversation"):
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_begun,
            continue_final_message=is_begun,
            **({} if template_options is None else template_options),
        )
        return tokenizer.encode(text, add_special_tokens=False)

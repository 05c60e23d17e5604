"""The rows of a batch: from a line to a request, and from a reply to a line."""

import json
from typing import Any, NamedTuple

from nanovllm.serve.batch_file import LONGEST_LINE, Line

URLS = "/v1/chat/completions", "/v1/completions"
KEYS = {"custom_id": str, "method": str, "url": str, "body": dict}


def fault_of(asked: Any) -> str | None:
    """What is wrong with a line's request, as far as one can say without an engine."""
    if not isinstance(asked, dict):
        return f"a line must be an object with {', '.join(KEYS)}"
    for key, kind in KEYS.items():
        if not isinstance(asked.get(key), kind):
            kind_name = "an object" if kind is dict else "a string"
            return f"{key} must be {kind_name}" if key in asked else f"{key} is missing"
    if unknown := sorted(asked.keys() - KEYS.keys()):
        return f"{unknown[0][:40]!r} is not known here"
    if asked["method"] != "POST":
        return f"method must be POST, got {asked['method'][:40]!r}"
    if asked["url"] not in URLS:
        return f"url must be one of {', '.join(URLS)}, got {asked['url'][:80]!r}"
    if asked["body"].get("stream"):
        return "stream must be left out in a batch: a row is told as a whole"
    return None


class Row(NamedTuple):
    """A line as a request; its text is not kept."""

    line: Line
    custom_id: str | None
    url: str = ""
    body: bytes = b""  # JSON
    fault: str | None = None  # why no engine is to see it


class Reply(NamedTuple):
    """A line of the result."""

    text: bytes
    is_error: bool


def row_of(line: Line) -> Row:
    """What a line asks for, or what is wrong with it."""
    short = line._replace(text=b"")
    try:
        asked = json.loads(line.text.strip())
    except (ValueError, RecursionError) as error:
        is_cut = len(line.text) == LONGEST_LINE
        why = f"it is longer than {LONGEST_LINE:,} bytes" if is_cut else f"it is no JSON: {error}"
        return Row(short, None, fault=f"line {line.number} can't be read: {why}")
    custom_id = asked.get("custom_id") if isinstance(asked, dict) else None
    row = Row(short, custom_id if isinstance(custom_id, str) else None)
    if (fault := fault_of(asked)) is not None:
        return row._replace(fault=fault)
    return row._replace(url=asked["url"], body=json.dumps(asked["body"]).encode())


def reply_of(row: Row, status: int, body: Any) -> Reply:
    """The line of the result."""
    request_id = row.line.name.replace("batch_", "", 1)
    response = {"status_code": status, "request_id": request_id, "body": body}
    told = {"id": row.line.name, "custom_id": row.custom_id, "response": response, "error": None}
    return Reply(json.dumps(told).encode(), status != 200)

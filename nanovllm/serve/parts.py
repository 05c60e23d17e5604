"""What a chat's text is made of: thoughts, what is said, and calls of tools."""

import json
import re
from collections.abc import Iterator

Part = tuple[str, str]  # "reasoning_content", "content", "call" (a tool's name) or "arguments"
CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=[^\s<])')


class Splitter:
    """Takes a text apart while it comes, by the tags that Qwen3 writes.

    What might be the beginning of a tag is held back, and so is white space before one.
    """

    def __init__(self, in_thought: bool, tools: bool):
        self.state, self.tools = "reasoning_content" if in_thought else "content", tools
        self.is_new = True  # nothing has been said in this state
        self.may_think = not in_thought
        self.held = ""

    def tags(self) -> dict[str, str]:
        """The tags that end this state -> the state that follows."""
        if self.state == "reasoning_content":
            return {"</think>": "content"}
        if self.state != "content":
            return {"</tool_call>": "content"}
        tags = {"<tool_call>": "call"} if self.tools else {}
        return {**tags, "<think>": "reasoning_content"} if self.may_think else tags

    def feed(self, text: str) -> Iterator[Part]:
        """The parts that have become certain by more text."""
        self.held += text
        while True:
            tags = self.tags()
            found = [(self.held.find(tag), tag) for tag in tags if tag in self.held]
            if not found:
                break
            at, tag = min(found)
            if tag == "<think>" and self.held[:at].strip():  # it thinks first, or not at all
                self.may_think = False
                continue
            before, self.held = self.held[:at], self.held[at + len(tag) :]
            yield from self.say(before, is_last=True)
            self.enter(tags[tag])
        yield from self.say(self.held, is_last=False)

    def enter(self, state: str) -> None:
        """A tag has come."""
        if state == "content":
            self.may_think = False  # it thinks once, in the beginning
        self.state, self.is_new = state, True

    def say(self, text: str, is_last: bool) -> Iterator[Part]:
        """What can be told of a state's text, which is `held` unless a tag has ended it."""
        if self.state in ("call", "arguments"):
            yield from self.tell_call(text, is_last)
            return
        end = len(text) if is_last else self.certain(text)
        if is_last or self.tags():  # white space before a tag is of no meaning
            end = len(text[:end].rstrip())
        said = text[:end]
        if not is_last:
            self.held = text[end:]
        if self.is_new:
            said = said.lstrip()
        if said:
            self.is_new = False
            if self.state == "content":
                self.may_think = False
            yield self.state, said

    def certain(self, text: str) -> int:
        """Up to where a text holds no beginning of a tag."""
        sizes = [n for tag in self.tags() for n in range(1, len(tag)) if text.endswith(tag[:n])]
        return len(text) - max(sizes, default=0)

    def tell_call(self, text: str, is_last: bool) -> Iterator[Part]:
        """A tool's name once it is there, and then its arguments as they come."""
        if self.state == "call" and (head := CALL.match(text)):
            yield "call", json.loads(head[1])
            self.state, text = "arguments", text[head.end() :]
        if self.state == "arguments":
            if is_last:
                end = len(text.rstrip().removesuffix("}").rstrip())
            else:
                end = len(text[: self.certain(text)].rstrip("} \r\n\t"))
            if text[:end]:
                yield "arguments", text[:end]
            text = text[end:]
        elif is_last:
            yield from self.tell_other_call(text)
        if not is_last:
            self.held = text

    def tell_other_call(self, text: str) -> Iterator[Part]:
        """A call whose fields stand in another order; what is no call was text after all."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            yield "content", f"<tool_call>{text}</tool_call>"
            return
        yield "call", str(name)
        yield "arguments", json.dumps(arguments)

    def finish(self) -> Iterator[Part]:
        """The text has ended: what was held back is what it is."""
        text, self.held = self.held, ""
        if self.state == "call":
            yield "content", f"<tool_call>{text}"
        elif text.rstrip() if self.is_new or self.state == "arguments" else text:
            yield self.state, text.rstrip() if self.state == "arguments" else text

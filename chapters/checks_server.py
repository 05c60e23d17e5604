"""The exercises of chapter 12, as checks."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from checks import Wrong, exercise, near, steps

END_OF_THOUGHT = "</think>"


def certain(text: str) -> tuple[str, str]:
    """Of a text that may go on: what is thought and what is answer, as far as it is certain."""
    thought, found, answer = text.partition(END_OF_THOUGHT)
    if not found:
        sizes = [n for n in range(1, len(END_OF_THOUGHT)) if text.endswith(END_OF_THOUGHT[:n])]
        thought = text[: len(text) - max(sizes, default=0)]
    return thought, answer


def in_pieces(text: str, size: int, told: dict[str, str]) -> Iterator[str]:
    """A text in pieces; Wrong where not all that is certain has been told before the next one."""
    for at in range(0, len(text), size):
        yield text[at : at + size]
        come = text[: at + size]
        if (now := (told["thought"], told["answer"])) != certain(come):
            raise Wrong(f"after {come!r} it has told {now}, and {certain(come)} is certain")


@exercise
def thoughts(rule: Callable[[Iterator[str]], Iterator[tuple[str, str]]]) -> None:
    """`rule(pieces)` yields ("thought", text) and ("answer", text) as soon as they are certain."""
    for text in ("Hm.</think>Yes.", "a<b</thi</think></think>c", "</think>", "no</thin", "1 < 2"):
        for size in range(1, len(text) + 1):
            told = {"thought": "", "answer": ""}
            try:
                for kind, said in rule(in_pieces(text, size, told)):
                    told[kind] += said
            except Wrong:
                raise
            except Exception as error:
                raise Wrong(f"of {text!r} in pieces it makes no parts: {error!r}") from error
            thought, _, answer = text.partition(END_OF_THOUGHT)
            if (told["thought"], told["answer"]) != (thought, answer):
                raise Wrong(f"{told} is not what {text!r} holds, in pieces of {size}")


@exercise
def slow_reader(pieces: float, longest: float, messages: float) -> None:
    """Pieces of a stream, tokens in the longest of them, and messages for a process that waited."""
    from nanovllm import SamplingParams
    from nanovllm.engine.sequence import Sequence
    from nanovllm.serve.client import Answer
    from nanovllm.serve.engine_loop import Asker, News

    answer = Answer(0, Sequence(0, [1], SamplingParams(), 0), None, asyncio.Event())
    answer.unread.append(News(0, [7], [], None))
    sizes = [len(answer.take()["token_ids"])]
    answer.unread += [News(0, [7], [], "length" if i == 39 else None) for i in range(1, 40)]
    sizes.append(len(answer.take()["token_ids"]))
    near("pieces", pieces, len(sizes), "`take` joins all that is unread", 0)
    near("longest", longest, max(sizes), "all that came while the reader was away", 0)
    ours, theirs = multiprocessing.Pipe()
    asker, count = Asker(theirs), 0
    asker.untold = [tuple(News(0, [7], [])) for _ in range(1300)]
    while asker.untold or asker.rest or ours.poll():
        asker.tell()
        while ours.poll():
            ours.recv()
            count += 1
    for end in (asker.door, ours, theirs):
        end.close()
    near("messages", messages, count, "a message holds at most MOST_NEWS of them", 0)


@exercise
def priority() -> None:
    """An engine in which requests with a smaller number go first."""
    from nanovllm import LLM, SamplingParams

    if not hasattr(SamplingParams(), "priority"):
        raise Wrong("SamplingParams has no priority")
    llm, ids, ended = LLM(device="cpu", max_num_seqs=1), [], []
    try:
        for number, rank in enumerate((1, 0, 2, 0, -1, 1)):
            asked: Any = dict(temperature=0, ignore_eos=True, max_tokens=2, priority=rank)
            ids.append(llm.add_request([5 + number] * 4, SamplingParams(**asked)))
        for seqs in steps(llm):
            ended += [ids.index(seq.seq_id) for seq in seqs if seq.is_finished]
    finally:
        llm.exit()
    if ended != [4, 1, 3, 0, 5, 2]:
        raise Wrong(f"requests with priorities 1, 0, 2, 0, -1, 1 ended in this order: {ended}")


async def get(app: Any, path: str, key: str) -> tuple[int, Any]:
    """What an application replies to a GET: the status, and what its JSON says."""
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""} if not told else await asyncio.Future()

    async def send(message: Any) -> None:
        told.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()}
    scope |= {"scheme": "http", "query_string": b"", "root_path": "", "http_version": "1.1"}
    scope["headers"] = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
    await app(scope, receive, send)
    return told[0]["status"], json.loads(b"".join(part.get("body", b"") for part in told))


async def ask_load(llm: Any) -> list[tuple[int, Any]]:
    """What a server says of its load: to a stranger, idle, with a request, when that has left."""
    from nanovllm import SamplingParams
    from nanovllm.serve.app import make_app
    from nanovllm.serve.asked import sequences_of
    from nanovllm.serve.client import EngineClient
    from nanovllm.serve.engine_process import in_thread
    from nanovllm.serve.settings import ServeConfig

    client = EngineClient(in_thread(llm), max_open=7, share=4)
    app = make_app(client, ServeConfig(api_key="secret"))
    client.start()
    try:
        told = [await get(app, "/load", "a guess"), await get(app, "/load", "secret")]
        params = SamplingParams(max_tokens=3000, ignore_eos=True)
        answers = client.submit(list(sequences_of([[5, 6]], params, 1, client.about)))
        told.append(await get(app, "/load", "secret"))
        client.leave(answers)
        return [*told, await get(app, "/load", "secret")]
    finally:
        asyncio.get_running_loop().remove_reader(client.pipe.fileno())
        client.close()


@exercise
def load() -> None:
    """A server that tells how many requests are open."""
    from nanovllm import LLM

    llm = LLM(device="cpu")
    with ThreadPoolExecutor() as pool:  # a notebook has an event loop of its own in this thread
        stranger, *told = pool.submit(lambda: asyncio.run(ask_load(llm))).result()
    llm.exit()
    if told[0][0] != 200:
        raise Wrong(f"GET /load has status {told[0][0]}")
    if stranger[0] != 401:
        raise Wrong(f"a caller without the key gets status {stranger[0]}, not 401")
    for open_now, (_, body) in zip((0, 1, 0), told):
        if body != (right := {"open": open_now, "max_open": 7}):
            raise Wrong(
                f"of at most 7 requests {open_now} are open, and it says {body}, not {right}"
            )

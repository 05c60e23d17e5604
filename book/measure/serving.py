"""A server beside the engine that it serves: `python book/measure/serving.py`.

One engine generates offline, then a server before the same model answers the same requests, each
streamed over a connection of its own. Clients are processes of their own, so that reading takes
nothing from the server. Each of the --streams asks once, all in the same instant, and then, with
--rounds, so many times in turn: who has an answer asks the next question. With --rates, requests
arrive at random times instead, at each of some rates. Connections are opened before a request is
due, for many that come at once are tried again by the system, after a second. With --command,
another server that speaks OpenAI's HTTP interface is asked the same in place of ours, alone:
`{model}`, `{port}`, `{streams}` and `{length}` in the command are filled in. Prints one JSON object
a line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from nanovllm.workloads import SHAPES

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
CONNECT_S = 1.0  # before a request is due
LETTERS = ["".join(x) for n in (1, 2, 3, 4) for x in product(ALPHABET, repeat=n)]


@dataclass
class Seen:
    """What one client saw of one request; seconds since the start of the run."""

    due: float
    pieces: list[float]  # when each came

    def gaps(self, start: float, stop: float) -> list[float]:
        """How long it waited between two pieces, within a span of time."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:]) if start <= a and b <= stop]


def write_model(folder: Path, shape: str) -> None:
    """A checkpoint's folder without weights: the shape, and a vocabulary of made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {word: i for i, word in enumerate(LETTERS[: config["vocab_size"]])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "fix_mistral_regex": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


OURS = (
    f"{sys.executable} -m nanovllm serve {{model}} --port {{port}} --load-format {{load_format}}"
    " --max-model-len {length} --max-num-seqs {streams}"
)


@contextmanager
def server(command: str, **options: Any) -> Iterator[int]:
    """A server that is ready; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port, **options) for word in shlex.split(command)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server has ended: {process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


async def stream(port: int, body: dict, due: float, start: float) -> Seen:
    """One request, sent when it is due; when each of its pieces came."""
    await asyncio.sleep(start + due - CONNECT_S - time.monotonic())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(start + due - time.monotonic())
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    pieces, end = [], b""
    while b"[DONE]" not in end:
        data = await reader.read(65536)
        if not data or b'"error"' in data:
            raise RuntimeError(f"the stream broke off: {data or end!r}")
        if b'"text"' in data:
            pieces.append(time.monotonic() - start)
        end = (end + data)[-200:]
    writer.close()
    return Seen(due, pieces)


async def in_turn(port: int, requests: list[tuple[float, dict]], start: float) -> list[Seen]:
    """Requests of one caller: each is due when the one before has its answer, or later."""
    seen: list[Seen] = []
    for due, body in requests:
        now = time.monotonic() - start if seen else 0.0
        seen.append(await stream(port, body, max(due, now), start))
    return seen


def client(port: int, start: float, callers: list[list[tuple[float, dict]]]) -> list[Seen]:
    """A process's life: some of the callers."""

    async def all_of_them() -> list[Seen]:
        found = await asyncio.gather(*(in_turn(port, requests, start) for requests in callers))
        return [seen for of_one in found for seen in of_one]

    return asyncio.run(all_of_them())


def served(port: int, callers: list[list[tuple[float, dict]]], num_clients: int) -> list[Seen]:
    """All callers' requests, by several clients at once."""
    start = time.monotonic() + 3.0  # when all clients are there
    parts = [callers[i::num_clients] for i in range(num_clients)]
    with multiprocessing.get_context("spawn").Pool(num_clients) as pool:
        found = pool.starmap(client, [(port, start, part) for part in parts if part])
    return [seen for part in found for seen in part]


def figures(seen: list[Seen], output: int, all_run: bool) -> dict[str, float]:
    """What the clients saw: output tokens a second, and milliseconds of waiting.

    With all_run, the time between pieces counts while all streams have begun and none has ended.
    """
    first = [x.pieces[0] - x.due for x in seen]
    start, stop = max(x.pieces[0] for x in seen), min(x.pieces[-1] for x in seen)
    span = (start, stop) if all_run else (0.0, float("inf"))
    gaps = [gap for x in seen for gap in x.gaps(*span)]
    took = max(x.pieces[-1] for x in seen) - min(x.due for x in seen)
    return {
        "tokens_per_s": len(seen) * output / took,
        **percentiles("first", first),
        **percentiles("between", gaps),
        "pieces_per_token": sum(len(x.pieces) for x in seen) / (len(seen) * output),
    }


def percentiles(name: str, waits: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    waits = waits if len(waits) > 1 else [float("nan")] * 2  # none in that span
    hundredths = statistics.quantiles(waits, n=100)
    return {f"{name}_p50_ms": 1000 * hundredths[49], f"{name}_p99_ms": 1000 * hundredths[98]}


def offline(options: dict, prompts: list[list[int]], output: int) -> dict[str, float]:
    """The same requests without a server: tokens a second, and milliseconds of a step."""
    from nanovllm import LLM, SamplingParams

    llm, ends = LLM(**options), []
    params = SamplingParams(temperature=0.6, max_tokens=output, ignore_eos=True)
    for _ in range(2):  # the first is for what happens once
        llm.reset_prefix_cache()
        start = time.monotonic()
        for prompt in prompts:
            llm.add_request(prompt, params)
        ends = []
        while not llm.is_finished():
            llm.step()
            ends.append(time.monotonic() - start)
    llm.exit()
    gaps = [b - a for a, b in zip(ends[10:], ends[11:])]  # behind the prompts
    return {"tokens_per_s": len(prompts) * output / ends[-1], **percentiles("between", gaps)}


def measure(args: argparse.Namespace, model: str, vocabulary: int, load_format: str) -> None:
    """Offline and served, for each number of streams; then each rate."""
    dice, longest = random.Random(0), args.input + args.output

    def prompts(count: int) -> list[list[int]]:
        return [[dice.randrange(3, vocabulary) for _ in range(args.input)] for _ in range(count)]

    def bodies(count: int) -> list[dict]:
        rest = {"max_tokens": args.output, "temperature": 0.6, "ignore_eos": True, "stream": True}
        return [{"prompt": prompt, **rest} for prompt in prompts(count)]

    model_options = {"model": model, "load_format": load_format}
    asked = {"command": args.command, **model_options, "length": longest}
    options = {**model_options, "max_model_len": longest}
    for streams in args.streams:
        rows = []
        with server(**asked, streams=streams) as port:
            served(port, [[(0.0, body)] for body in bodies(8)], 1)  # for what happens once
            for rounds in sorted({1, args.rounds}):
                callers = [[(0.0, body) for body in bodies(rounds)] for _ in range(streams)]
                got = figures(served(port, callers, args.clients), args.output, rounds == 1)
                rows.append({"streams": streams, "rounds": rounds, "served": got})
        for row in rows:
            if args.command == OURS:
                count = streams * row["rounds"]
                own = offline(options | {"max_num_seqs": streams}, prompts(count), args.output)
                share = row["served"]["tokens_per_s"] / own["tokens_per_s"]
                row |= {"share": share, "offline": own}
            print(json.dumps(row), flush=True)
    if not args.rates:
        return
    with server(**asked, streams=args.rates_streams) as port:
        served(port, [[(0.0, body)] for body in bodies(8)], 1)
        for rate in args.rates:
            times = accumulate(dice.expovariate(rate) for _ in range(int(rate * args.seconds)))
            callers = [[request] for request in zip(times, bodies(int(rate * args.seconds)))]
            seen = served(port, callers, args.clients)
            print(json.dumps({"rate": rate, **figures(seen, args.output, False)}), flush=True)


def main() -> None:
    """Read the options, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="default: the bundled model")
    parser.add_argument("--streams", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=4, help="requests of each stream in turn")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests a second")
    parser.add_argument("--seconds", type=float, default=10, help="how long requests arrive")
    parser.add_argument("--input", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--rates-streams", type=int, default=512, help="that run at once, then")
    parser.add_argument("--command", default=OURS, help="starts a server in place of ours")
    parser.add_argument("--clients", type=int, default=8, help="processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.shape is None:
            tiny = Path(__file__).parents[2] / "nanovllm/tiny"
            return measure(args, str(tiny), 1536, "auto")
        write_model(Path(folder), args.shape)
        measure(args, folder, len(LETTERS[: SHAPES[args.shape]["vocab_size"]]), "dummy")


if __name__ == "__main__":
    main()

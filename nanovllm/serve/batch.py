"""`nanovllm batch`: a file of requests, answered as the server would answer each."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovllm.serve.batch_desk import Desk, Note, drain, width_of
from nanovllm.serve.batch_file import Journal, Line, is_answered_by, lines_of, num_lines, repeated
from nanovllm.serve.batch_rows import Reply, Row, reply_of, row_of
from nanovllm.serve.calls import error_body
from nanovllm.serve.client import EngineClient
from nanovllm.serve.engine_process import in_process
from nanovllm.serve.ray_settings import prepare_ray
from nanovllm.serve.settings import BatchConfig
from nanovllm.utils.errors import of_extra


def unanswered(lines: Iterator[Line], journal: Journal, note: Note) -> Iterator[Row]:
    """The rows that an engine is to answer; those with faults are answered on the way."""
    for line in lines:
        row = row_of(line)
        if row.custom_id is not None and not journal.take_id(row.custom_id):
            fault = f"custom_id {row.custom_id[:80]!r} is that of a line before"
            row = row._replace(line=repeated(row.line), fault=fault)
        if journal.find(row.line) is not None:
            continue
        if row.fault is None:
            yield row
        else:
            note(row, reply_of(row, 400, error_body(row.fault, "invalid_request_error")))


async def answer_here(
    options: dict[str, Any], config: BatchConfig, rows: Iterator[Row], note: Note
) -> None:
    """Answer rows by one engine, in a process that ends with this."""
    (pipe,), process = in_process(options)
    try:
        # The readers are the limit. In a thread, for a Ctrl-C is heard by the loop alone.
        client = await asyncio.to_thread(EngineClient, pipe, max_open=sys.maxsize)
        client.start()
        desk = Desk(client, config.served_model_name)
        await drain(rows, note, desk.answer, width_of(options), 1)
        client.close()
        process.join(10)
    finally:
        process.kill()
        pipe.close()


def run_batch(source: Path, target: Path, options: dict[str, Any], config: BatchConfig) -> None:
    """Answer a batch file; after a kill, the same call goes on where it was.

    options: of `LLM`. What came of it is told on stderr. ValueError where options or files don't
    fit; RuntimeError where the engine is lost.
    """
    model = f"{options.get('model')} {config.served_model_name}"
    path = target.with_name(target.name + ".journal")
    if not source.is_file():
        raise ValueError(f"{source} is no file")
    count, total = Counter(new=0, errors=0), num_lines(source)
    journal = Journal(path)  # nobody else has it until it is closed
    try:
        if not target.exists():
            answer_all(lines_of(source, model), journal, total, options, config, count)
            journal.publish(lines_of(source, model), target)
        elif is_answered_by(lines_of(source, model), target):
            journal.is_needed = False
        else:
            raise ValueError(f"{target} is there already, and answers something else: remove it")
    finally:
        journal.close()
    new, errors = count["new"], count["errors"]
    told = f"{total - new:,} were there, {new:,} are new, {errors:,} of these tell an error"
    print(f"[{total:,} rows: {told}]", file=sys.stderr)


def way_of(config: BatchConfig) -> Callable[..., Coroutine]:
    """Who answers the rows: one engine here, or several on Ray."""
    if not config.needs_ray:
        return answer_here
    prepare_ray(config.address)
    with of_extra("ray"):
        from nanovllm.serve.workers import answer_there
    return answer_there


def answer_all(
    lines: Iterator[Line],
    journal: Journal,
    total: int,
    options: dict[str, Any],
    config: BatchConfig,
    count: Counter,
) -> None:
    """See to it that every line has its row in the journal."""
    with tqdm(total=total, desc="Answering", unit="row") as bar:

        def note(row: Row, reply: Reply) -> None:
            """A row is answered."""
            journal.add(row.line, reply.text)
            count.update(new=1, errors=reply.is_error)
            bar.update()

        rows = unanswered(lines, journal, note)
        if (first := next(rows, None)) is not None:
            work = way_of(config)
            asyncio.run(work(options, config, chain([first], rows), note))
        bar.update(total - bar.n)

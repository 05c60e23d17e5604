"""Batch files: every line has its row, whatever the lines are and whenever the run is killed."""

import asyncio
import fcntl
import json
import os
import random
import signal
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from batch_files import (
    chat,
    children,
    command_of,
    finish,
    journal_of,
    question,
    rows_of,
    start,
    text_of,
    wait_until,
    whole_entries,
    write,
)
from serving import is_running, until

from nanovllm import SamplingParams
from nanovllm.serve import batch, batch_file, batch_rows
from nanovllm.serve.batch import run_batch, unanswered
from nanovllm.serve.batch_desk import drain
from nanovllm.serve.batch_file import Journal, Line, is_answered_by, lines_of
from nanovllm.serve.batch_rows import Reply, Row, reply_of
from nanovllm.serve.engine_process import in_thread
from nanovllm.serve.settings import BatchConfig

KILLS = int(os.environ.get("NANOVLLM_KILLS", 2))


@pytest.fixture
def run(llm, monkeypatch, tmp_path):
    """`run(lines, **options)` answers lines by an engine in a thread; the rows."""
    process = SimpleNamespace(join=lambda seconds: None, kill=lambda: None)
    monkeypatch.setattr(batch, "in_process", lambda options: ([in_thread(llm)], process))

    def answer(lines, name="out.jsonl", **options):
        source = write(tmp_path / "in.jsonl", lines)
        run_batch(source, tmp_path / name, options, BatchConfig())
        return rows_of(tmp_path / name)

    return answer


def offline(llm, lines):
    """What the engine's `generate` says to the same completions."""
    params = [SamplingParams(temperature=0, max_tokens=x["body"]["max_tokens"]) for x in lines]
    prompts = [line["body"]["prompt"] for line in lines]
    return [output["text"] for output in llm.generate(prompts, params, use_tqdm=False)]


def test_rows_are_those_of_the_offline_engine_in_the_order_of_the_lines(llm, run):
    lines = [question(number) for number in range(40)]
    rows = run(lines, max_num_seqs=4)
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in lines]
    assert [text_of(row) for row in rows] == offline(llm, lines)


def test_replies_are_of_the_types_of_the_openai_package(run):
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    lines = [chat(1), question(2, n=2, logprobs=2), chat(3, logprobs=True, top_logprobs=2)]
    rows = run(lines)
    for row, kind in zip(rows, (ChatCompletion, Completion, ChatCompletion), strict=True):
        assert set(row) == {"id", "custom_id", "response", "error"} and row["error"] is None
        assert set(row["response"]) == {"status_code", "request_id", "body"}
        kind.model_validate(row["response"]["body"], strict=True)
    assert len({row["id"] for row in rows}) == len({r["response"]["request_id"] for r in rows}) == 3


BROKEN = [  # lines, whether the row can tell a custom_id, and what its message says
    ('{"custom_id": "story-1", "meth', False, "no JSON"),
    ("once upon a time", False, "no JSON"),
    ("[1, 2]", False, "must be an object"),
    ("[" * 20_000, False, "no JSON"),
    ("null", False, "must be an object"),
    ({"method": "POST", "url": "/v1/completions", "body": {}}, False, "custom_id is missing"),
    (question(1) | {"custom_id": 7}, False, "custom_id must be a string"),
    (question(2) | {"method": "GET"}, True, "method must be POST"),
    (question(3) | {"url": "/v1/embeddings"}, True, "url must be one of"),
    (question(4) | {"url": "/metrics"}, True, "url must be one of"),
    (question(5) | {"body": "hello"}, True, "body must be an object"),
    (question(6) | {"bodi": {}}, True, "'bodi' is not known here"),
    (question(7, stream=True), True, "stream must be left out"),
    (question(8, top_p=7), True, "top_p"),
    (question(9, prompt=3), True, "prompt"),
    (question(10, temprature=1), True, "temprature is not known here"),
    (question(11, prompt="fox " * 9000), True, "max_model_len"),
    (question(12, prompt="\ud83d"), True, "no Unicode text"),
    (chat(13, messages=[{"role": 5}]), True, ""),
    (question(14, logit_bias={"fox": 1}), True, "logit_bias"),
]


def test_every_broken_line_has_its_error_and_harms_no_other(llm, run):
    good = [question(number) for number in range(100, 100 + len(BROKEN))]
    lines = [line for pair in zip(good, [case[0] for case in BROKEN], strict=True) for line in pair]
    rows = run(lines)
    assert [text_of(row) for row in rows[::2]] == offline(llm, good)
    for row, (line, tells_id, says) in zip(rows[1::2], BROKEN, strict=True):
        error = row["response"]["body"]["error"]
        assert row["response"]["status_code"] == 400 and row["error"] is None, row
        assert set(error) == {"message", "type", "param", "code"} and says in error["message"]
        assert row["custom_id"] == (line["custom_id"] if tells_id else None)
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_model_that_is_not_there_is_404(run):
    (row,) = run([question(1, model="gpt-7")])
    assert row["response"]["status_code"] == 404
    assert row["response"]["body"]["error"]["code"] == "model_not_found"


def test_a_custom_id_is_answered_once_and_the_second_line_is_told(llm, run):
    rows = run([question(1), question(2), question(1), question(1, max_tokens=2)])
    assert [row["custom_id"] for row in rows] == ["story-1", "story-2", "story-1", "story-1"]
    assert [text_of(row) for row in rows[:2]] == offline(llm, [question(1), question(2)])
    for row in rows[2:]:
        assert row["response"]["status_code"] == 400
        assert "that of a line before" in row["response"]["body"]["error"]["message"]


def test_a_line_of_any_length_is_one_row(run, monkeypatch):
    for module in (batch_rows, batch_file):
        monkeypatch.setattr(module, "LONGEST_LINE", 2000)
    rows = run([question(1), question(2, prompt="fox " * 5000), "", "  ", question(3)])
    statuses = [row["response"]["status_code"] for row in rows]
    assert statuses == [200, 400, 200] and rows[1]["custom_id"] is None
    assert "longer than 2,000 bytes" in rows[1]["response"]["body"]["error"]["message"]


def test_a_file_with_no_lines_has_a_result_with_none(run):
    assert run([]) == [] and run(["", " "], name="other.jsonl") == []


def test_no_more_rows_are_read_than_are_under_way():
    read, done, most = [], [], 0

    def rows():
        for number in range(500):
            read.append(number)
            yield Row(Line(number, str(number), b""), None)

    async def answer(chunk):
        nonlocal most
        most = max(most, len(read) - len(done))
        await asyncio.sleep(random.random() / 100)
        return [Reply(row.line.name.encode(), False) for row in chunk]

    def note(row, reply):
        assert reply.text == row.line.name.encode()
        done.append(row.line.number)

    asyncio.run(drain(rows(), note, answer, 8, 3))
    assert sorted(done) == list(range(500)) and 20 <= most <= 24


def test_the_engine_never_has_more_than_twice_what_it_may_run(run, monkeypatch):
    opened, submit = [], batch.EngineClient.submit

    def counting(client, seqs, whole):
        answers = submit(client, seqs, whole)
        opened.append(len(client.answers))
        return answers

    monkeypatch.setattr(batch.EngineClient, "submit", counting)
    run([question(number) for number in range(60)], max_num_seqs=5)
    assert len(opened) == 60 and 5 < max(opened) <= 10


def peak_memory(folder, num_rows):
    """Bytes at most, while a file is answered whose lines need no engine."""
    source = write(folder / f"{num_rows}.in", [question(n, stream=True) for n in range(num_rows)])
    tracemalloc.start()
    run_batch(source, folder / f"{num_rows}.out", {}, BatchConfig())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows_of(folder / f"{num_rows}.out")) == num_rows
    return peak


def test_memory_does_not_grow_with_the_file(tmp_path):
    peak_memory(tmp_path, 10)
    small, large = peak_memory(tmp_path, 1_000), peak_memory(tmp_path, 12_000)
    assert large < small + 200_000, f"{small:,} bytes for 1,000 rows, {large:,} for 12,000"


# ---- Kills ----


def journal_with_rows(tmp_path, count):
    """A journal of some rows, the lines that they answer, and where each entry ends."""
    lines = list(lines_of(write(tmp_path / "in.jsonl", map(question, range(count))), "model"))
    journal, ends = Journal(tmp_path / "journal"), [0]
    for line in lines:
        journal.add(line, json.dumps({"id": line.name, "text": "x" * line.number}).encode())
        ends.append(journal.end)
    journal.close()
    return lines, ends


def test_a_journal_cut_at_any_byte_has_the_rows_before_the_cut(tmp_path):
    lines, ends = journal_with_rows(tmp_path, 4)
    path = tmp_path / "journal"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        there = [line.number for line in lines if journal.find(line)]
        assert there == [
            line.number for line, end in zip(lines, ends[1:], strict=True) if end <= size
        ]
        assert path.stat().st_size == journal.end == max(end for end in ends if end <= size)
        for line in lines[len(there) :]:
            journal.add(line, b"again")
        journal.publish(iter(lines), tmp_path / "out")
        journal.close()
        rows = (tmp_path / "out").read_bytes().splitlines()
        assert len(rows) == 4 and all(row.endswith(b"}") for row in rows[: len(there)])
        assert rows[len(there) :] == [b"again"] * (4 - len(there))


def test_bytes_that_the_disk_has_spoilt_are_not_trusted(tmp_path):
    lines, ends = journal_with_rows(tmp_path, 4)
    spoilt = bytearray((tmp_path / "journal").read_bytes())
    spoilt[ends[2] + 60] ^= 1
    (tmp_path / "journal").write_bytes(spoilt + b"\0" * 100)
    journal = Journal(tmp_path / "journal")
    assert [journal.find(line) is not None for line in lines] == [True, True, False, False]
    journal.close()


def test_a_row_answers_no_line_that_has_changed_since(tmp_path):
    lines, _ = journal_with_rows(tmp_path, 3)
    write(tmp_path / "in.jsonl", [question(0), question(1, max_tokens=50), question(2)])
    journal = Journal(tmp_path / "journal")
    edited = list(lines_of(tmp_path / "in.jsonl", "model"))
    assert [journal.find(line) is not None for line in edited] == [True, False, True]
    others = lines_of(tmp_path / "in.jsonl", "another model")
    assert not any(journal.find(line) for line in others)
    journal.close()


def test_whether_a_name_is_taken_is_seen_anew_in_each_run(llm, tmp_path):
    """The line before one that repeats its custom_id is edited, and so it repeats none any more."""
    lines, edited = [question(1), question(2), question(1)], [question(3), question(2), question(1)]
    for before, after in ((lines, edited), (edited, lines)):
        source, journal = write(tmp_path / "in.jsonl", before), Journal(tmp_path / "journal")
        for row in unanswered(lines_of(source, "model"), journal, noted := note_in(journal)):
            noted(row, reply_of(row, 200, {"choices": []}))
        journal.close()
        source, journal = write(tmp_path / "in.jsonl", after), Journal(tmp_path / "journal")
        asked = list(unanswered(lines_of(source, "model"), journal, note_in(journal)))
        told = [row.line.number for row in asked]
        assert told == ([1, 3] if after is edited else [1])
        for row in asked:
            note_in(journal)(row, reply_of(row, 200, {"choices": []}))
        journal.publish(lines_of(source, "model"), tmp_path / "out")
        journal.close()
        rows = rows_of(tmp_path / "out")
        assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in after]
        statuses = [row["response"]["status_code"] for row in rows]
        assert statuses == ([200, 200, 200] if after is edited else [200, 200, 400])
        assert is_answered_by(lines_of(source, "model"), tmp_path / "out")


def note_in(journal):
    """What puts a reply into a journal."""
    return lambda row, reply: journal.add(row.line, reply.text)


def test_a_run_looks_at_nothing_before_it_has_the_lock(tmp_path, run):
    """Another one may be about to publish what this one would answer again."""
    run([question(1)])
    journal = Journal(journal_of(tmp_path / "out.jsonl"))
    with pytest.raises(RuntimeError, match="another run"):
        run([question(1)])
    journal.close()
    assert len(run([question(1)])) == 1 and not journal_of(tmp_path / "out.jsonl").exists()


def test_two_runs_do_not_write_one_result(tmp_path, run):
    journal = Journal(journal_of(tmp_path / "out.jsonl"))
    with pytest.raises(RuntimeError, match="another run"):
        run([question(1)])
    journal.close()
    assert len(run([question(1)])) == 1


def test_a_result_of_other_lines_is_left_as_it_is(tmp_path, run):
    run([question(1)])
    before = (tmp_path / "out.jsonl").read_bytes()
    for lines in ([question(1), question(2)], [question(2)], []):
        with pytest.raises(ValueError, match="is there already"):
            run(lines)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not journal_of(tmp_path / "out.jsonl").exists()


def test_a_kill_while_the_result_is_written_or_just_after_costs_no_row(tmp_path, run, monkeypatch):
    lines = [question(number) for number in range(5)]

    def killed(*args):
        raise KeyboardInterrupt

    for module, name in ((os, "replace"), (batch_file.Path, "unlink")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, killed)
            run(lines)
        assert len(whole_entries(journal_of(tmp_path / "out.jsonl"))) == 5
    before = (tmp_path / "out.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "answer_here", None)  # no engine is asked
        run(lines)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not journal_of(tmp_path / "out.jsonl").exists()


def test_a_run_killed_at_any_moment_goes_on_where_it_was(tmp_path, llm):
    lines = [question(number) for number in range(60 + 60 * KILLS)]
    lines[7:7] = ["broken"]
    source, target, there = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", 0
    for kill in range(KILLS):
        process = start(source, target, "--max-num-seqs", "3")
        wanted = there + random.Random(kill).randrange(1, 50)
        wait_until(lambda w=wanted: len(whole_entries(journal_of(target))) >= w, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        numbers = whole_entries(journal_of(target))
        assert not target.exists() and len(numbers) >= wanted and len({*numbers}) == len(numbers)
        there = len(numbers)
    told = finish(start(source, target, "--max-num-seqs", "3"))
    assert f" {there} were there, {len(lines) - there} are new" in told
    rows = rows_of(target)
    assert rows.pop(7)["response"]["status_code"] == 400 and lines.pop(7)
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in lines]
    assert [text_of(row) for row in rows] == offline(llm, lines)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_an_engine_that_is_killed_ends_the_run_and_blames_no_row(tmp_path):
    lines = [question(number) for number in range(80)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = start(source, target, "--max-num-seqs", "2")
    wait_until(lambda: len(whole_entries(journal_of(target))) > 5, process)
    (engine,) = [pid for pid in children(process.pid) if "spawn_main" in command_of(pid)]
    os.kill(engine, signal.SIGKILL)
    assert "the engine has ended" in finish(process, status=1)
    finish(start(source, target))
    assert [text_of(row) and row["custom_id"] for row in rows_of(target)] == [
        line["custom_id"] for line in lines
    ]


def test_ctrl_c_while_the_model_loads_ends_the_run(tmp_path):
    source, target = write(tmp_path / "in.jsonl", [question(0)]), tmp_path / "out.jsonl"
    process = start(source, target)
    engines: list[int] = []

    def is_started():
        engines[:] = [pid for pid in children(process.pid) if "spawn_main" in command_of(pid)]
        return engines

    wait_until(is_started, process)
    os.kill(engines[0], signal.SIGSTOP)  # a model that loads for ever
    time.sleep(1)  # until it is waited for
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in told, told
    until(lambda: not is_running(engines[0]), "the engine has ended")
    assert not target.exists()
    finish(start(source, target))
    assert len(rows_of(target)) == 1


def test_a_journal_that_goes_while_another_run_waits_for_it_is_made_anew(tmp_path, monkeypatch):
    """The lock would be one on a file that has no name: a third run would not see it."""
    path, lock = tmp_path / "out.jsonl.journal", fcntl.flock
    first = Journal(path)

    def lock_late(file, how):
        if first is not None:
            end_first()
        return lock(file, how)

    def end_first():
        nonlocal first
        first.close()
        first = None

    monkeypatch.setattr(batch_file.fcntl, "flock", lock_late)
    second = Journal(path)
    assert os.path.samefile(path, second.file.fileno())
    with pytest.raises(RuntimeError, match="another run"):
        Journal(path)
    second.close()
    assert not path.exists()

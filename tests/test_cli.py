"""The command line: what it prints, and with which status it ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def nanovllm(*arguments: str, **settings) -> subprocess.CompletedProcess:
    """Run `python -m nanovllm` to its end."""
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=100, **settings
    )


@pytest.fixture
def here(monkeypatch, capfd):
    """`here(*arguments)` runs the command line in this process: seconds less than in its own."""
    from nanovllm.__main__ import main

    def run(*arguments: str, input: str | bytes = b"") -> subprocess.CompletedProcess:
        typed = input if isinstance(input, bytes) else input.encode()
        monkeypatch.setattr(sys, "argv", ["nanovllm", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        status = main()
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run


def is_one_clear_line(ran: subprocess.CompletedProcess) -> bool:
    told = ran.stderr.count("nanovllm: error: ") == ran.stderr.count("\n") == 1
    return told and ran.stdout == "" and "Traceback" not in ran.stderr


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["bench"]])
def test_help_is_there(command):
    shown = nanovllm(*command, "--help")
    assert shown.returncode == 0
    assert "usage: nanovllm" in shown.stdout
    if command in (["generate"], ["chat"]):
        for option in ("--model", "--device", "--seed", "--temperature", "--top-p", "--stop"):
            assert option in shown.stdout


def test_help_answers_within_a_second():
    """The best of three, for other work may hold a machine up; with torch it takes several."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert nanovllm("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 1


def test_the_help_of_seed_promises_what_holds():
    shown = " ".join(nanovllm("generate", "--help").stdout.split())
    assert "same seed, same tokens" in shown
    assert "in float32 on a CPU" in shown and "half precision" in shown


def test_generate_streams_the_story_and_says_how_fast(here):
    ran = nanovllm("generate", "Once upon a time", "--seed", "1", "--max-tokens", "30")
    assert ran.returncode == 0
    assert ran.stdout.startswith("Once upon a time") and len(ran.stdout) > 40
    assert "30 tokens" in ran.stderr and "tokens/s" in ran.stderr
    again = here("generate", "Once upon a time", "--seed", "1", "--max-tokens", "30")
    assert again.stdout == ran.stdout


def test_stop_may_be_given_again(here):
    arguments = ("generate", "Once upon a time", "--seed", "1", "--stop", ".", "--stop", "a")
    assert "a" not in here(*arguments).stdout.removeprefix("Once upon a time")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", ""],
        ["generate", "Hi", "--max-tokens", "0"],
        ["generate", "Hi", "--temperature", "nan"],
        ["generate", "Hi", "--top-p", "1.5"],
        ["generate", "Hi", "--model", "./nowhere"],
        ["generate", "Hi", "--model", "~nosuchuser/m"],
        ["generate", "Hi", "--model", "a/" + "x" * 300],
        ["generate", "Hi", "--model", "nobody/nothing"],
        ["generate", "Hi", "--max-model-len", "5000"],
        ["generate", "Hi", "--tensor-parallel-size", "3"],
        ["generate", "Hi", "--device", "tpu"],
        ["generate", "\udcff"],
        ["bench", "--shape", "qwen9"],
        ["bench", "--shape", "qwen3-0.6b", "--model", "x"],
        ["bench", "--repeats", "0"],
        ["bench", "--stage", "77"],
        ["bench", "--stage", "0"],
    ],
)
def test_a_bad_value_is_one_clear_line_and_status_2(arguments, here):
    ran = here(*arguments)
    assert ran.returncode == 2 and is_one_clear_line(ran), ran.stderr


@pytest.mark.parametrize("argument", [b"\xff", "--temperature=nan"])
def test_a_process_of_its_own_ends_with_that_line_and_status(argument):
    ran = nanovllm("generate", "Hi", argument)
    assert ran.returncode == 2 and ran.stdout == "", ran.stderr
    assert "nanovllm: error: " in ran.stderr.splitlines()[-1] and "Traceback" not in ran.stderr


@pytest.mark.parametrize("arguments", [[], ["dance"], ["generate"], ["generate", "Hi", "--bogus"]])
def test_bad_usage_is_status_2(arguments):
    assert nanovllm(*arguments).returncode == 2


def test_ctrl_c_ends_with_130_and_no_traceback():
    command = [sys.executable, "-m", "nanovllm", "generate", "Once", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "4000"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and so would this.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.read(20)  # it is writing
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_is_no_error():
    options = "--temperature 0 --ignore-eos --max-tokens 500"
    command = f"{sys.executable} -m nanovllm generate Once {options} | head -c 5"
    ran = subprocess.run(
        command, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )
    assert "Traceback" not in ran.stderr and ran.stdout == "Once "[: len(ran.stdout)]


def test_a_cache_that_no_memory_holds_is_one_clear_line_and_status_1(here):
    ran = here("generate", "Hi", "--device", "cpu", "--num-kvcache-blocks", "1000000000")
    assert ran.returncode == 1 and is_one_clear_line(ran), ran.stderr


FULL = Path("/dev/full")  # a disk without room, on Linux


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["generate Once", "bench --json --repeats 1 --device cpu"])
def test_a_full_disk_is_one_clear_line_and_status_1(command):
    command = [sys.executable, "-m", "nanovllm", *command.split()]
    with FULL.open("w") as full:
        ran = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=100
        )
    assert ran.returncode == 1
    assert ran.stderr.startswith("nanovllm: error: ") and ran.stderr.count("\n") == 1


def test_chat_answers_each_line_and_ends_with_the_input():
    ran = nanovllm("chat", "--temperature", "0", input="Hello\nTell me a story about a fox.\n")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("you> ") == 3 and "fox" in ran.stdout
    assert ran.stderr.count("tokens/s") == 2


def with_template(folder: Path, template: str | None) -> str:
    """A copy of the bundled model with another chat template, or with none."""
    shutil.copytree(ROOT / "nanovllm" / "tiny", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_chat_goes_on_after_a_line_of_invalid_bytes(here):
    lines = b"Hello\n\xff\xfe\nTell me a story about a fox.\n"
    ran = here("chat", "--temperature", "0", input=lines)
    errors = ran.stderr
    assert ran.returncode == 0, errors
    assert ran.stdout.count("you> ") == 4 and "fox" in ran.stdout
    assert errors.count("tokens/s") == 2 and "Traceback" not in errors
    assert errors.count("nanovllm: error: ") == 1 and "no Unicode text" in errors


def test_chat_goes_on_after_a_refusal_of_the_template(tmp_path, here):
    template = (
        "{% if 'secret' in messages[-1].content %}{{ raise_exception('not that\nplease') }}"
        "{% endif %}{{ messages[-1].content }}"
    )
    model = with_template(tmp_path / "model", template)
    options = ("--model", model, "--max-tokens", "5")
    ran = here("chat", *options, input="Hello\nthe secret\nHello\n")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("you> ") == 4 and ran.stderr.count("tokens/s") == 2
    assert ran.stderr.count("nanovllm: error: ") == 1 and ran.stderr.count("\n") == 3
    assert "not that" in ran.stderr and "Traceback" not in ran.stderr


def test_chat_without_a_template_ends_at_once_with_status_2(tmp_path, here):
    ran = here("chat", "--model", with_template(tmp_path / "model", None), input="Hello\nHi\n")
    assert ran.returncode == 2 and ran.stdout == ""
    assert "no chat template" in ran.stderr and ran.stderr.count("\n") == 1


def test_chat_drops_the_oldest_exchange_once_the_cache_is_full(here):
    options = ("--kvcache-block-size", "16", "--num-kvcache-blocks", "8", "--max-tokens", "60")
    lines = "Tell me a story about a fox.\n" * 5
    ran = here("chat", *options, "--ignore-eos", input=lines)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("tokens/s") == 5 and "error" not in ran.stderr


def test_bench_prints_one_json_object():
    ran = nanovllm("bench", "--json", "--repeats", "1", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    assert figures["workload"]["num_requests"] == 16 and figures["output_tokens"] == 990
    for name in (
        "output_tokens_per_s",
        "prefill_tokens_per_s",
        "time_to_first_token_ms",
        "single_stream_tokens_per_s",
        "floor_share",
        "peak_memory_bytes",
    ):
        assert figures[name] > 0
    assert figures["floor_share"] < 1


def test_bench_measures_an_earlier_stage():
    ran = nanovllm("bench", "--stage=4", "--repeats", "1", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    assert "output tokens/s" in ran.stdout


def test_every_workload_can_be_asked_for():
    from nanovllm.workloads import WORKLOADS

    assert f"{{{','.join(WORKLOADS)}}}" in nanovllm("bench", "--help").stdout.replace("\n", "")


def test_the_standard_workload_has_its_known_size():
    from nanovllm.bench import WORKLOADS

    for vocab_size in (1536, 151936):
        prompts, params = WORKLOADS["standard"].requests(vocab_size)
        assert sum(p.max_tokens for p in params) == 133_966
        assert sum(map(len, prompts)) == 142_827
        assert max(max(prompt) for prompt in prompts) < vocab_size


def test_what_the_command_line_does_not_show_it_does_not_offer():
    """Log-probabilities are for programs: the commands print text."""
    for command in ("generate", "chat"):
        assert "logprobs" not in nanovllm(command, "--help").stdout

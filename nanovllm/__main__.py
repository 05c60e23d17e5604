"""The command line: `nanovllm generate | chat | serve | batch | bench`."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.serve.settings import BatchConfig, ServeConfig
from nanovllm.utils.chat import Messages, check_chat_template
from nanovllm.utils.errors import of_extra, one_line
from nanovllm.utils.options import types_of

if TYPE_CHECKING:  # they are loaded once they are needed
    from nanovllm.engine.outputs import StreamPiece
    from nanovllm.llm import LLM


def add_options(
    parser: argparse.ArgumentParser, cls: type, skip: str = "", **defaults: Any
) -> None:
    """Offer the fields of an options dataclass on the command line, left out unless given.

    `defaults` stand in for those of the dataclass.
    """
    group = parser.add_argument_group(f"{cls.__name__} options")
    for spec in fields(cls):
        if spec.name != skip and spec.metadata["offered"]:
            settings = settings_of(spec, defaults)
            group.add_argument("--" + spec.name.replace("_", "-"), **settings)


def settings_of(spec: Field, defaults: dict[str, Any]) -> dict[str, Any]:
    """How argparse is to take a field's option."""
    accepted, choices = types_of(spec.type), spec.metadata["choices"]
    default = defaults.get(spec.name, spec.default)
    settings = {
        "default": defaults.get(spec.name, argparse.SUPPRESS),
        "help": spec.metadata["help"],
    }
    if bool in accepted:
        settings["action"] = argparse.BooleanOptionalAction
    elif list in accepted:
        element = get_args(get_args(spec.type)[-1])[0]  # str of `list[str] | tuple[str, ...]`
        settings.update(action="append", type=element)
        settings["help"] += "; may be given again"
    else:
        settings["type"] = next(t for t in (int, float, str) if t in accepted)
        settings.update(choices=choices, metavar=None if choices else spec.name.upper())
        if default is not None:
            settings["help"] += f" (default: {default})"
    return settings


def make_parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    parser = argparse.ArgumentParser(prog="nanovllm", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("prompt", help="the text to continue")
    chat = commands.add_parser("chat", help="talk with the model; an empty line ends it")
    for command, temperature in ((generate, 0.7), (chat, 0.3)):
        add_options(command, Config)
        # One seed serves both: the engine's, from which each request draws its own.
        add_options(command, SamplingParams, "seed", temperature=temperature, max_tokens=300)

    serve = commands.add_parser("serve", help="answer OpenAI's API over HTTP", allow_abbrev=False)
    help_text = next(spec for spec in fields(Config) if spec.name == "model").metadata["help"]
    serve.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=help_text)
    add_options(serve, ServeConfig)
    add_options(serve, Config, "model")
    batch = commands.add_parser("batch", help="answer a file of requests", allow_abbrev=False)
    batch.add_argument("source", type=Path, metavar="IN.jsonl", help="as OpenAI's batches")
    batch.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.jsonl")
    add_options(batch, BatchConfig)
    add_options(batch, Config)
    add_bench(commands)
    return parser


def add_bench(commands: Any) -> None:
    """The grammar of `nanovllm bench`."""
    bench = commands.add_parser("bench", help="measure the engine", allow_abbrev=False)
    names = "standard", "small", "sampled", "long", "few", "arrivals"
    bench.add_argument("--workload", choices=names, help="default: by device")
    bench.add_argument("--shape", metavar="NAME", help="random weights of a size: qwen3-0.6b, …")
    bench.add_argument("--stage", type=int, metavar="K", help="measure the engine of chapter K")
    bench.add_argument("--repeats", type=int, default=3, help="runs to take the median of")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(bench, Config, "max_model_len")


def take(args: argparse.Namespace, cls: type) -> dict:
    """The options of `cls` that the user gave."""
    names = {spec.name for spec in fields(cls)}
    return {name: value for name, value in vars(args).items() if name in names}


def generate(args: argparse.Namespace) -> None:
    """Stream one completion, then say how fast it came."""
    from nanovllm.llm import LLM

    params = SamplingParams(**take(args, SamplingParams) | {"seed": None})
    llm = LLM(**take(args, Config))
    pieces = llm.stream(args.prompt, params)
    print(args.prompt, end="", flush=True)
    print_stream(pieces)


def print_stream(pieces: Iterable["StreamPiece"]) -> str:
    """Print pieces as they come, their rate on stderr at the end; returns the whole text."""
    start, times, text, num_tokens = perf_counter(), [], "", 0
    for piece in pieces:
        print(piece["text"], end="", flush=True)
        times.append(perf_counter())
        text += piece["text"]
        num_tokens += len(piece["token_ids"])
    print(flush=True)
    rate = (num_tokens - 1) / (times[-1] - times[0]) if num_tokens > 1 else 0.0
    first_ms = 1000 * (times[0] - start)
    print(
        f"[{num_tokens} tokens, first after {first_ms:.0f} ms, then {rate:,.0f} tokens/s]",
        file=sys.stderr,
    )
    return text


def chat(args: argparse.Namespace) -> None:
    """Read a line, stream the answer, and go on until the input ends."""
    from nanovllm.llm import LLM

    params = SamplingParams(**take(args, SamplingParams) | {"seed": None})
    llm = LLM(**take(args, Config))
    check_chat_template(llm.tokenizer)
    if hasattr(sys.stdin, "reconfigure"):  # a line of bytes that are no text is refused, alone
        sys.stdin.reconfigure(errors="surrogateescape")
    messages: Messages = []
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        answer(llm, messages, line, params)


def answer(llm: "LLM", messages: Messages, line: str, params: SamplingParams) -> None:
    """Stream the answer to one more line; both join the messages, or neither does."""
    messages.append({"role": "user", "content": line})
    # The oldest exchange goes first once the conversation outgrows the model.
    room = llm.limits.longest_sequence() - (params.max_tokens or 1)
    try:
        while len(llm.apply_chat_template(messages)) > room and len(messages) > 2:
            del messages[:2]
        pieces = llm.stream(llm.apply_chat_template(messages), params)
        messages.append({"role": "assistant", "content": print_stream(pieces)})
    except ValueError as error:
        messages.pop()
        print(f"nanovllm: error: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        messages.pop()
        print("\n[stopped]", file=sys.stderr)


def bench(args: argparse.Namespace) -> None:
    """Measure this engine, or that of a chapter."""
    from nanovllm.bench import SHAPES, run

    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    if args.shape is not None and args.shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {args.shape!r}")
    if args.shape is not None and "model" in args:
        raise ValueError("--shape and --model can't be given together")
    if args.stage is not None:
        raise SystemExit(run_stage(args.stage))
    run(args.workload, args.shape, args.repeats, args.json, take(args, Config))


def run_stage(stage: int) -> int:
    """Run this same command with the package as of a chapter, in a process of its own."""
    roots = (Path(__file__).parents[1], Path.cwd())
    tool = next((r / "chapters/tangle.py" for r in roots if (r / "chapters").is_dir()), None)
    if tool is None:
        raise ValueError("--stage needs the book's chapters: run it from a checkout")
    if stage < 1:
        raise ValueError(f"--stage counts the chapters from 1, got {stage}")
    arguments = list(sys.argv[1:])
    at = next(i for i, argument in enumerate(arguments) if argument.startswith("--stage"))
    del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    with tempfile.TemporaryDirectory() as folder:
        write = [sys.executable, str(tool), "--upto", str(stage), "--out", folder]
        written = subprocess.run(write, capture_output=True, text=True)
        if written.returncode:
            reason = written.stderr.strip().splitlines()[-1]
            raise ValueError(f"--stage {stage} can't be written: {reason}")
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, "-m", "nanovllm", *arguments]
        return subprocess.run(command, env=environment, cwd=folder).returncode


def serve(args: argparse.Namespace) -> None:
    """Answer requests over HTTP until a signal ends it."""
    with of_extra("serve"):
        from nanovllm.serve.start import serve
    serve(take(args, Config), ServeConfig(**take(args, ServeConfig)))


def batch(args: argparse.Namespace) -> None:
    """Answer a file of requests; after a kill, go on where it was."""
    with of_extra("serve"):
        from nanovllm.serve.batch import run_batch
    run_batch(args.source, args.output, take(args, Config), BatchConfig(**take(args, BatchConfig)))


def main() -> int:
    """Run the command line; 0 well, 2 a caller's mistake, 1 a failure, 130 Ctrl-C."""
    args = make_parser().parse_args()
    commands = {"generate": generate, "chat": chat, "serve": serve, "batch": batch, "bench": bench}
    try:
        commands[args.command](args)
        print(end="", flush=True)  # what does not fit on a disk shows here at the latest
        return 0
    except (ValueError, RuntimeError, MemoryError) as error:
        print(f"nanovllm: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as error:  # nobody takes our output any more: its reader left, a disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"nanovllm: error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if not hasattr(sys, "ps1"):  # a notebook is __main__ too, and has its own arguments
        sys.exit(main())

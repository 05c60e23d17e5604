"""The ladder: the same workload on the package as of every chapter.

    python book/measure/ladder.py                       measure on this machine, then draw
    python book/measure/ladder.py --shape qwen3-0.6b    on a published shape with random weights
    python book/measure/ladder.py --chapters 2 3 4 --workload standard      of these alone
    python book/measure/ladder.py --also "4 --max-num-seqs 512"     one of them with an option
    python book/measure/ladder.py --plot-only           draw what was measured before

Each run is a fresh process. The order alternates (1, 2, … K, K, … 2, 1), so that a machine whose
speed drifts treats all stages alike. Reported is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import ceil, floor, log10
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "chapters"))

import tangle  # noqa: E402
from plotting import SOFT, chapter_color, use_style  # noqa: E402

RATES = ("output_tokens_per_s", "single_stream_tokens_per_s", "prefill_tokens_per_s")
FIGURES = (*RATES, "time_to_first_token_ms", "floor_s", "construct_s", "peak_memory_bytes")


def titles() -> dict[int, str]:
    """The chapters' titles by number, from their first cells; 0 is no rung."""
    names = {}
    for path in tangle.chapters():
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        names[tangle.number(path)] = "".join(first).split("\n")[0].lstrip("# ")
    return {k: title for k, title in names.items() if k > 0}


PARALLEL = 10  # from this chapter on an engine takes two GPUs, where there are as many


def num_gpus(chapter: int) -> int:
    """How many GPUs the rung of a chapter is measured on; 1 also stands for a CPU."""
    import torch

    return 2 if chapter >= PARALLEL and torch.cuda.device_count() > 1 else 1


Rung = tuple[int, str]  # a chapter, and options of its own


def measure(rounds: int, rungs: list[Rung], arguments: list[str]) -> Iterator[dict]:
    """Run the benchmark on the stages; after each run, what is known by then."""
    results: dict[Rung, list[dict]] = {rung: [] for rung in sorted(rungs)}
    with tempfile.TemporaryDirectory() as folder:
        stages = {k: Path(folder) / str(k) for k, _ in results}
        for k, out in stages.items():
            tangle.write_stage(k, out)
        for number in range(rounds):
            for k, options in sorted(results, reverse=number % 2 == 1):
                command = [sys.executable, "-m", "nanovllm", "bench", "--json", "--repeats", "1"]
                command += shlex.split(options)
                if num_gpus(k) > 1:
                    command += ["--tensor-parallel-size", str(num_gpus(k))]
                environment = {**os.environ, "PYTHONPATH": str(stages[k])}
                run = subprocess.run(
                    [*command, *arguments], env=environment, cwd=folder, stdout=subprocess.PIPE
                )
                if run.returncode:
                    raise SystemExit(f"the benchmark of stage {k} failed")
                figures = json.loads(run.stdout)
                results[k, options].append(figures)
                rate = f"{figures['output_tokens_per_s']:,.0f} tokens/s"
                print(f"round {number + 1}, chapter {k} {options}: {rate}", flush=True)
                yield summary({rung: runs for rung, runs in results.items() if runs})


def summary(results: dict[Rung, list[dict]]) -> dict:
    """Medians and extremes of each stage's runs."""
    first, names = next(iter(results.values()))[0], titles()
    rungs = []
    for (k, options), runs in results.items():
        spread = {name: [run[name] for run in runs] for name in FIGURES}
        rung = {name: statistics.median(values) for name, values in spread.items()}
        rung["least_and_most"] = {name: [min(spread[name]), max(spread[name])] for name in RATES}
        whose = {"chapter": k, "title": names[k], "options": options, "num_gpus": num_gpus(k)}
        rungs.append({**whose, **rung})
    workload = {**first["workload"], "output_tokens": first["output_tokens"]}
    return {
        "model": first["model"],
        "machine": first["machine"],
        "workload": workload,
        "rounds": min(map(len, results.values())),
        "rungs": rungs,
    }


def label(rung: dict) -> str:
    """What stands beside a bar."""
    if rung.get("options"):
        return f"{rung['chapter']} with {rung['options'].removeprefix('--').replace(' ', ' = ')}"
    gpus = ", two GPUs" if rung.get("num_gpus", 1) > 1 else ""
    return f"{rung['chapter']} {rung['title']}{gpus}"


def draw(ladder: dict, path: Path) -> None:
    """One bar a chapter: the whole workload on the left, a single stream on the right."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    use_style()
    rungs, work, machine = ladder["rungs"], ladder["workload"], ladder["machine"]
    labels = [label(rung) for rung in rungs]
    height = 1.5 + 0.45 * len(rungs)
    figure, axes = plt.subplots(1, 2, figsize=(8, height), sharey=True)
    requests = f"{work['num_requests']} requests together"
    for axis, key, title in zip(axes, RATES, (requests, "one request alone"), strict=False):
        values = [rung[key] for rung in rungs]
        colors = [chapter_color(rung["chapter"]) for rung in rungs]
        bars = axis.barh(labels, values, color=colors, height=0.6)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4)
        axis.set(xscale="log", xlabel="output tokens/s", title=title)
        # Whole decades, with room for the label behind the longest bar.
        axis.set_xlim(10 ** floor(log10(min(values) / 1.5)), 10 ** ceil(log10(max(values) * 2)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    what = f"{ladder['model']}, {machine['dtype']}, {machine['device']}, torch {machine['torch']}"
    rounds = f"median of {ladder['rounds']} runs" if ladder["rounds"] > 1 else "one run of each"
    how = f"{work['output_tokens']:,} output tokens, {rounds}"
    figure.supxlabel(f"{what}; {how}", color=SOFT, fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each stage (default: 3)")
    parser.add_argument("--chapters", type=int, nargs="+", default=[*titles()], help="default: all")
    parser.add_argument("--also", nargs="*", default=[], help='"CHAPTER OPTIONS": with options')
    parser.add_argument("--workload", default="small", help="standard or small (default: small)")
    parser.add_argument("--shape", help="a published shape with random weights, e.g. qwen3-0.6b")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--out", type=Path, default=ROOT / "book/measure/ladder.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "book/figures/ladder.svg")
    parser.add_argument("--plot-only", action="store_true", help="draw what --out holds")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not {*args.chapters} <= titles().keys():
        parser.error(f"--chapters are from 1 to {max(titles())}")
    if not args.plot_only:
        arguments = ["--workload", args.workload, "--device", args.device]
        arguments += ["--shape", args.shape] if args.shape else []
        args.out.parent.mkdir(exist_ok=True)
        rungs = [(k, "") for k in args.chapters]
        for also in args.also:
            chapter, _, options = also.partition(" ")
            rungs.append((int(chapter), options))
        for ladder in measure(args.rounds, rungs, arguments):
            args.out.write_text(json.dumps(ladder, indent=1) + "\n", encoding="utf-8")
    draw(json.loads(args.out.read_text(encoding="utf-8")), args.figure)


if __name__ == "__main__":
    main()

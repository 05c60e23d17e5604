"""Exercises that check themselves: what is right passes, what is wrong is told, nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import exercises
from cells import Cell
from merge import Package
from stages import chapters, code, number, write, write_stage

CHAPTERS = Path(__file__).resolve().parents[1] / "chapters"


def joined(a: tuple, b: tuple) -> tuple:
    """The rule of chapter 6."""
    from math import exp

    m = max(a[0], b[0])
    return m, *(x * exp(a[0] - m) + y * exp(b[0] - m) for x, y in zip(a[1:], b[1:]))


ANSWERS = {
    "naive-cost": dict(naive=14_950, ideal=199, tenfold=11),
    "kv-budget": dict(tokens=431_000, sequences=105, unwasted=616),
    "intensity": dict(tokens=103_000),
    "block-size": dict(with_16=493, with_256=421, bytes_16=87_000, bytes_256=5_000),
    "common-prompt": dict(share_16=0.72, share_256=0.64),
    "release-order": dict(found=0),
    "oldest-first": dict(ends_first=1),
    "sizes": dict(padded=256),
    "join": dict(rule=joined),
    "fused-bytes": dict(before=32_768, after=16_384),
    "known-lengths": dict(wasted=0, wasted_with_stop=0, wasted_at_fifth=1),
    "wrong-cut": dict(exchanges=2, kilobytes=56),
    "batch": dict(size=10),
}
CELLS = {  # exercise -> the export cells of a solution
    "epsilon": [
        """#| export: nanovllm/sampling_params.py
from dataclasses import dataclass

from nanovllm.utils.options import option


class SamplingParams(SamplingParams):
    epsilon: float = option(0.0, "drop tokens below this probability", minimum=0, maximum=1)
""",
        """#| export: nanovllm/layers/sampler.py
class SamplingTensors(SamplingTensors):
    epsilons: torch.Tensor | None = None  # below which a probability counts as 0


def sample_torch(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    best, greedy = logits.max(dim=-1)
    greedy = greedy.masked_fill(best.isnan(), -1)
    if sampling.all_greedy:
        return greedy
    is_greedy = (sampling.temperatures == 0) | (greedy < 0)
    scores = logits.float() - best.unsqueeze(1)
    scores = scores / sampling.temperatures.clamp(min=2.0**-126).unsqueeze(1)
    if (rows := sampling.filtered) is not None:
        scores[rows] = keep_likely(scores[rows], *(x[rows] for x in sampling.filters))
    low = scores.log_softmax(dim=-1) < sampling.epsilons.log().unsqueeze(1)
    scores = scores.masked_fill(low & (scores < 0), -torch.inf)
    noise = exponential_noise(sampling.seeds, sampling.positions, logits.shape[-1])
    return torch.where(is_greedy, greedy, (scores - noise.log()).argmax(dim=-1))
""",
        """#| export: nanovllm/engine/model_runner.py
class ModelRunner(ModelRunner):
    def prepare_sample(self, seqs: list[Sequence]) -> SamplingTensors:
        params = [seq.params for seq in seqs]
        filtered = [row for row, p in enumerate(params) if is_filtered(p)]
        return SamplingTensors(
            temperatures=self.tensor([p.temperature for p in params], torch.float32),
            seeds=self.tensor([seq.seed for seq in seqs]),
            positions=self.tensor([len(seq) for seq in seqs]),
            all_greedy=all(p.temperature == 0 for p in params),
            filters=(
                self.tensor([p.top_k for p in params]),
                self.tensor([p.top_p for p in params], torch.float32),
                self.tensor([p.min_p for p in params], torch.float32),
            ),
            filtered=self.tensor(filtered) if filtered else None,
            epsilons=self.tensor([p.epsilon for p in params], torch.float32),
        )
""",
    ],
    "batch-naive": [
        """#| export: nanovllm/engine/llm_engine.py
class LLMEngine(LLMEngine):
    def schedule(self) -> list[Sequence]:
        while self.waiting and len(self.running) < 4:
            self.running.append(self.waiting.popleft())
            self.running[-1].status = SequenceStatus.RUNNING
        return self.running
""",
    ],
    "sort-batch": [
        """#| export: nanovllm/engine/llm_engine.py
class LLMEngine(LLMEngine):
    def schedule(self) -> list[Sequence]:
        if not self.running:
            self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.params.max_tokens))
            while self.waiting and len(self.running) < self.config.max_num_seqs:
                self.running.append(self.waiting.popleft())
                self.running[-1].status = SequenceStatus.RUNNING
        return self.running
""",
    ],
    "free-list": [
        """#| export: nanovllm/engine/block_manager.py
class BlockManager(BlockManager):
    def allocate(self, seq: Sequence) -> None:
        for _ in range(self.blocks_for(len(seq))):
            seq.block_table.append(self.free_block_ids.pop())

    def may_append(self, seq: Sequence) -> None:
        if self.blocks_for(len(seq)) > len(seq.block_table):
            seq.block_table.append(self.free_block_ids.pop())
""",
    ],
    "shortest-first": [
        """#| export: nanovllm/engine/scheduler.py
class Scheduler(Scheduler):
    def can_admit(self) -> bool:
        self.waiting = deque(sorted(self.waiting, key=len))
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        return self.block_manager.can_allocate(self.waiting[0])
""",
    ],
}


def asked() -> dict[str, int]:
    """Each exercise that a chapter says checks itself, and the chapter's number."""
    found: dict[str, int] = {}
    for path in chapters(CHAPTERS):
        for cell in nbformat.read(path, as_version=4).cells:
            for name in re.findall(r'tangle\.verify\("([\w-]+)"', cell.source):
                assert f":label: ex-{name}" in cell.source and name not in found, name
                found[name] = number(path)
    return found


def test_every_exercise_that_checks_itself_has_its_check_and_its_solution():
    assert set(asked()) == set(exercises.CHECKS) == {*ANSWERS, *CELLS}


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answers_are_right_and_each_wrong_one_is_told(name):
    answers = ANSWERS[name]
    assert exercises.verify(name, **answers) == "right"
    for key, value in answers.items():
        wrong = (lambda a, b: a) if callable(value) else 1.5 * value + (value == 0)
        with pytest.raises(exercises.Wrong, match=r"is not|joining|makes no"):
            exercises.verify(name, **{**answers, key: wrong})
    with pytest.raises(exercises.Wrong, match="asks for"):
        exercises.verify(name)


def test_an_exercise_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(exercises.Wrong, match="no exercise 'nothing'.*kv-budget"):
        exercises.verify("nothing")


@pytest.mark.parametrize("is_solved", [True, False], ids=["solved", "as the chapter has it"])
@pytest.mark.parametrize("name", CELLS)
def test_a_changed_engine_passes_and_that_of_the_chapter_does_not(name, is_solved, tmp_path):
    cells = [Cell(source, "the solution", 1) for source in CELLS[name]] if is_solved else []
    stage = asked()[name]
    write_stage(stage, tmp_path)
    write(Package([*code(stage), *cells]).sources(), tmp_path)
    script = f"import exercises\nprint(exercises.verify({name!r}))"
    path = os.pathsep.join([str(tmp_path), str(CHAPTERS)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    if is_solved:
        assert done.returncode == 0 and done.stdout == "right\n", done.stderr
    else:
        assert done.returncode == 1 and "exercises.Wrong: " in done.stderr, done.stderr

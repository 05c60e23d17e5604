"""Chapters 0 to 5."""


def safe(text: str, stop: str) -> str:
    """What of a text may be shown while it grows, in chapter 0."""
    if stop in text:
        return text[: text.index(stop)]
    held_back = [n for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(held_back, default=0)]


ANSWERS: dict[str, dict] = {
    "refused": dict(count=6),
    "hold-back": dict(safe=safe),
    "floor-bytes": dict(alone=1.25e9, together=63.4e6),
    "naive-cost": dict(naive=14_950, ideal=199, tenfold=11),
    "kv-budget": dict(tokens=431_000, sequences=105, unwasted=616),
    "intensity": dict(tokens=103_000),
    "dead-rows": dict(rows=40, wanted=20, slots=56),
    "block-modulo": dict(idle=3, at_end=4),
    "block-size": dict(with_16=493, with_256=421, bytes_16=87_000, bytes_256=5_000),
    "common-prompt": dict(share_16=0.72, share_256=0.64),
    "release-order": dict(found=0),
    "trust-the-hash": dict(found=20, blocks=1),
    "oldest-first": dict(ends_first=1, ended=0),
    "decode-first": dict(steps=5, tokens=10, turned_steps=4, turned_tokens=2),
}

CELLS: dict[str, list[str]] = {  # exercise -> the export cells of a solution
    "timeout": [
        """#| export: nanovllm/sampling_params.py
from dataclasses import dataclass

from nanovllm.utils.options import option


class SamplingParams(SamplingParams):
    timeout: float | None = option(None, "give up after so many seconds", above=0)
""",
    ],
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
    "hits-first": [
        """#| export: nanovllm/engine/llm_engine.py
class LLMEngine(LLMEngine):
    def schedule(self) -> list[Sequence]:
        if not self.running:
            match = self.block_manager.match
            self.waiting = deque(sorted(self.waiting, key=lambda seq: -len(match(seq))))
            promised = 0
            while self.waiting and len(self.running) < self.config.max_num_seqs:
                promised += self.blocks_at_most(self.waiting[0])
                if promised > self.block_manager.num_blocks:
                    break
                self.running.append(self.waiting.popleft())
                self.running[-1].status = SequenceStatus.RUNNING
                self.block_manager.allocate(self.running[-1])
        for seq in self.running:
            self.block_manager.may_append(seq)
        return list(self.running)
""",
    ],
    "shortest-first": [
        """#| export: nanovllm/engine/scheduler.py
def rank(seq: Sequence) -> tuple[bool, int]:
    return seq.num_preemptions == 0, seq.num_prompt_tokens


class Scheduler(Scheduler):
    def can_admit(self) -> bool:
        self.waiting = deque(sorted(self.waiting, key=rank))
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        return self.block_manager.can_allocate(self.waiting[0])
""",
    ],
}

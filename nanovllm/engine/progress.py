"""The progress bar of `generate`."""

from time import perf_counter

from tqdm import tqdm

from nanovllm.engine.sequence import Sequence


class Progress:
    """Counts finished requests and shows prompt and output tokens a second."""

    def __init__(self, num_requests: int, enabled: bool):
        self.bar = tqdm(total=num_requests, desc="Generating", disable=not enabled, unit="request")
        self.tokens = {"prefill": 0, "decode": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.last_time = perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def update(self, seqs: list[Sequence]) -> None:
        """Account for a step that gave each of these sequences a token."""
        now = perf_counter()
        firsts = [seq for seq in seqs if seq.num_completion_tokens == 1]
        phase = "prefill" if firsts else "decode"
        self.tokens[phase] += sum(map(len, firsts)) if firsts else len(seqs)
        self.seconds[phase] += now - self.last_time
        self.last_time = now
        seconds = {phase: spent for phase, spent in self.seconds.items() if spent > 0}
        rates = {p: f"{self.tokens[p] / spent:,.0f} tok/s" for p, spent in seconds.items()}
        self.bar.set_postfix(rates, refresh=False)
        self.bar.update(sum(seq.is_finished for seq in seqs))

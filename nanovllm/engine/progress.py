"""The progress bar of `generate`."""

from time import perf_counter

from tqdm import tqdm

from nanovllm.engine.sequence import Sequence


class Progress:
    """Counts finished requests and shows prompt and output tokens a second."""

    def __init__(self, num_requests: int, enabled: bool):
        self.bar = tqdm(total=num_requests, desc="Generating", disable=not enabled, unit="request")
        self.num_prompt_tokens = self.num_output_tokens = 0
        self.start = perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def update(self, seqs: list[Sequence]) -> None:
        """Account for a step that gave each of these sequences a token."""
        firsts = [seq for seq in seqs if seq.num_completion_tokens == 1]
        self.num_prompt_tokens += sum(seq.num_prompt_tokens for seq in firsts)
        self.num_output_tokens += len(seqs)
        seconds = perf_counter() - self.start
        prompt, output = self.num_prompt_tokens / seconds, self.num_output_tokens / seconds
        rates = {"prompt": f"{prompt:,.0f} tok/s", "output": f"{output:,.0f} tok/s"}
        self.bar.set_postfix(rates, refresh=False)
        self.bar.update(sum(seq.is_finished for seq in seqs))

"""The progress bar of `generate`."""

from time import perf_counter
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:  # it belongs to chapter 1
    from nanovllm.engine.sequence import Sequence

INTERVAL = 0.1  # seconds between two looks at all requests


class Progress:
    """Counts finished requests and shows prompt and output tokens a second."""

    def __init__(self, seqs: "list[Sequence]", enabled: bool):
        self.seqs, self.enabled = seqs, enabled
        self.bar = tqdm(total=len(seqs), desc="Generating", disable=not enabled, unit="request")
        self.start = self.last_time = perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.show()
        self.bar.close()

    def update(self) -> None:
        """Show how far the requests are, if that was not done a moment ago."""
        if self.enabled and perf_counter() - self.last_time >= INTERVAL:
            self.show()

    def show(self) -> None:
        """Show how far the requests are, whoever ran the steps."""
        self.last_time = perf_counter()
        begun = [seq for seq in self.seqs if seq.num_completion_tokens > 0]
        tokens = {
            "prompt": sum(seq.num_prompt_tokens for seq in begun),
            "output": sum(seq.num_completion_tokens for seq in begun),
        }
        seconds = self.last_time - self.start
        rates = {name: f"{number / seconds:,.0f} tok/s" for name, number in tokens.items()}
        self.bar.set_postfix(rates, refresh=False)
        self.bar.update(sum(seq.is_finished for seq in self.seqs) - self.bar.n)

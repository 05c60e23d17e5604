"""Train the bundled model from nothing: grammar, corpus, tokenizer, weights.

    python book/tiny/train.py --out DIR            # minutes on one data-centre GPU
    python book/tiny/train.py --out DIR --quick    # seconds on a CPU; the model is of no use

Writes a Hugging Face folder, and `training_log.json` beside it in `DIR/log`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from checkpoint import new_model, save_checkpoint, train_tokenizer
from tokenizers import Tokenizer

TOKENIZER_SEED = 1_000_000_000  # its documents are not among those of any training step


@dataclass(frozen=True, slots=True)
class Recipe:
    """What training does; lengths and sizes in tokens."""

    num_tokens: int = 460_000_000
    batch_tokens: int = 65_536
    # Rows grow: first one or two documents, then many, then as long as the model's positions.
    row_lens: tuple[int, ...] = (512, 2048, 4096)
    row_len_ends: tuple[float, ...] = (0.6, 0.85, 1.0)  # of the steps
    warmup_steps: int = 200
    decay_share: float = 0.4  # of the steps, at the end, with the rate falling to zero
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    tokenizer_documents: int = 20_000  # of each sort

    @property
    def num_steps(self) -> int:
        return max(1, self.num_tokens // self.batch_tokens)

    def row_len_at(self, step: int) -> int:
        done = step / self.num_steps
        ends = zip(self.row_lens, self.row_len_ends, strict=True)
        return next(row_len for row_len, end in ends if done < end)

    def rate_at(self, step: int) -> float:
        """Warm-up, a plateau, then a straight line to zero."""
        left = (self.num_steps - step) / max(1, self.decay_share * self.num_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)


QUICK = Recipe(
    num_tokens=20_480,
    batch_tokens=1024,
    row_lens=(128, 256, 512),
    warmup_steps=5,
    tokenizer_documents=300,
)
QUICK_SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}

_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_json: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_str(tokenizer_json)


def _make_batch(job: tuple[int, Recipe]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one step: the first half plain stories, the second half chats."""
    step, recipe = job
    row_len = recipe.row_len_at(step)
    num_rows = recipe.batch_tokens // row_len // 2
    halves = [
        corpus.rows(_worker_tokenizer, step, num_rows, row_len, is_chat)
        for is_chat in (False, True)
    ]
    return tuple(np.concatenate(parts) for parts in zip(*halves, strict=True))


def batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batch of each step in order, made by worker processes ahead of time."""
    jobs = [(step, recipe) for step in range(recipe.num_steps)]
    num_workers = max(1, (os.cpu_count() or 1) - 1)
    start = (_start_worker, (tokenizer.to_str(),))
    with get_context("spawn").Pool(num_workers, *start) as pool:
        yield from pool.imap(_make_batch, jobs)


def weighted_losses(model: torch.nn.Module, tokens: torch.Tensor, weights: torch.Tensor) -> tuple:
    """The loss to minimise, and the mean loss per token of stories and of answers, in nats.

    `tokens`, `weights`: `[num_rows, row_len]`; position t predicts token t + 1.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    targets, weights = tokens[:, 1:], weights[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = loss.view_as(weights)
    half = len(tokens) // 2
    full = (weights == 1.0).float()
    means = [
        (loss[part] * full[part]).sum() / full[part].sum()
        for part in (slice(None, half), slice(half, None))
    ]
    return (loss * weights).sum() / weights.sum(), means[0].detach(), means[1].detach()


def make_optimizer(model: torch.nn.Module, recipe: Recipe, device: str) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=device == "cuda"
    )


def train(
    model: torch.nn.Module, tokenizer: Tokenizer, recipe: Recipe, device: str, use_compile: bool
) -> list[dict[str, float]]:
    """Run the recipe. Returns the log: step, tokens, seconds, losses in nats per token."""
    model.to(device).train()
    optimizer = make_optimizer(model, recipe, device)
    losses = torch.compile(weighted_losses, dynamic=False) if use_compile else weighted_losses
    on_gpu = device == "cuda"
    log_every = max(1, recipe.num_steps // 200)
    log: list[dict[str, float]] = []
    start = time.perf_counter()
    for step, (tokens, weights) in enumerate(batches(tokenizer, recipe)):
        tokens = torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)
        weights = torch.from_numpy(weights).to(device, non_blocking=True).float()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            loss, story_loss, answer_loss = losses(model, tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every == 0 or step == recipe.num_steps - 1:
            entry = {
                "step": step,
                "tokens": (step + 1) * recipe.batch_tokens,
                "seconds": round(time.perf_counter() - start, 1),
                "story_loss": round(story_loss.item(), 4),
                "answer_loss": round(answer_loss.item(), 4),
            }
            log.append(entry)
            print(json.dumps(entry), flush=True)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model")
    parser.add_argument("--tokens", type=int, help="training tokens instead of the recipe's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    args = parser.parse_args()
    recipe = QUICK if args.quick else Recipe()
    if args.tokens:
        recipe = Recipe(**asdict(recipe) | {"num_tokens": args.tokens})
    device = "cuda" if torch.cuda.is_available() and not args.quick else "cpu"
    use_compile = device == "cuda" if args.compile is None else args.compile
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = train_tokenizer(corpus.sample_text(TOKENIZER_SEED, recipe.tokenizer_documents))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = new_model(0, **(QUICK_SHAPE if args.quick else {}))
    start = time.perf_counter()
    log = train(model, tokenizer, recipe, device, use_compile)
    seconds = time.perf_counter() - start
    save_checkpoint(model, tokenizer, args.out)
    report = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "recipe": asdict(recipe) | {"num_steps": recipe.num_steps},
        "log": log,
    }
    folder = args.out / "log"
    folder.mkdir(exist_ok=True)
    (folder / "training_log.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Runs the model: sequences in, one new token for each out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.edits import edit_
from nanovllm.engine.graphs import Graphs, Ran, graph_shapes, largest_shape
from nanovllm.engine.history import History
from nanovllm.engine.memory import CPU_CACHE_BYTES, left_for_cache, reserved_memory, zeros
from nanovllm.engine.result import Result, result_of, score_tokens
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import InputLayout, Inputs, Packer, Shape, Step, sampling_of
from nanovllm.engine.warmup import two_layers_of_a_kind, warmup_steps
from nanovllm.kernels.fixed_linear import MOST_TILES
from nanovllm.kernels.fixed_order import fixed_order
from nanovllm.kernels.jit import compiled_together
from nanovllm.kernels.penalties import penalise_
from nanovllm.kernels.resolve_tokens import resolve_tokens
from nanovllm.layers.attention import Attention, choose_backend
from nanovllm.layers.sampler import Sampler, SamplingTensors
from nanovllm.models import MODELS
from nanovllm.parallel.group import get_group
from nanovllm.utils.context import NUM_COUNTERS, Context, set_context
from nanovllm.utils.loader import fill_with_noise, load_model
from nanovllm.utils.torch_settings import DefaultDtype, hand_back_memory


class ModelRunner:
    """Owns the model, its device and its memory."""

    def __init__(self, config: Config, model_config: ModelConfig, folder: Path, max_model_len: int):
        self.device = config.torch_device
        self.on_gpu = self.device.type == "cuda"
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.max_num_tokens = config.max_num_batched_tokens
        self.max_num_seqs = min(config.max_num_seqs, self.max_num_tokens)
        self.reserved_at_start = reserved_memory(self.device)
        with self.device, DefaultDtype(config.torch_dtype):
            self.model = MODELS[model_config.architecture](model_config, max_model_len)
        self.model.requires_grad_(False).eval()
        if config.load_format == "dummy":
            fill_with_noise(self.model)
        else:
            load_model(self.model, folder)
        self.sampler = Sampler()
        self.allocate_inputs(config)
        self.graphs = Graphs(self.blank_step, self.execute, self.resample, self.sampler.is_alone)
        self.step_bytes = self.graph_bytes = 0
        if self.on_gpu:
            self.warmup_model(config)
        self.allocate_kv_cache(config)
        if self.on_gpu:
            self.capture_cudagraph(self.graph_shapes(config))

    def run(self, seqs: list[Sequence]) -> Result:
        """Launch a step, which samples one new token id for each sequence; nobody waits here."""
        return self.launch(self.pack(seqs))

    def pack(self, seqs: list[Sequence]) -> Step:
        """Lay out a step on the host: what `launch` takes, here or in another process."""
        return self.packer.pack(seqs)

    def forward(self, step: Step, inputs: Inputs) -> torch.Tensor:
        """The hidden states, [num_tokens, hidden_size]."""
        slots, tables = inputs["slot_mapping"], inputs["block_tables"]
        lens, starts, order = inputs["context_lens"], inputs["cu_seqlens"], inputs["order"]
        counts, counters = (step.shape.num_decodes, step.max_new), self.counters
        context = Context(slots, tables, lens, starts, *counts, order=order, counters=counters)
        with set_context(context):
            return self.model(inputs["input_ids"], inputs["positions"])

    def last_hidden(self, step: Step, inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state of each sequence's last token, [num_seqs, hidden_size]."""
        is_all = step.shape.num_decodes == step.shape.num_seqs  # each brings one token
        return hidden if is_all else hidden[inputs["last"]]

    def exit(self) -> None:
        """Let go of model, cache and graphs, whoever still holds the runner; it can't run again."""
        del self.model, self.kv_cache
        self.graphs.recorded = {}
        hand_back_memory()

    def allocate_kv_cache(self, config: Config) -> None:
        """The pool of `num_blocks` blocks, and how attention is to read it."""
        self.block_size = config.kvcache_block_size
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        self.backend = choose_backend(config, self.model_config.head_dim)
        heads = (self.model_config.num_key_value_heads, self.model_config.head_dim)
        dtype = config.torch_dtype
        block_bytes = 2 * len(layers) * self.block_size * prod(heads) * dtype.itemsize
        self.num_blocks = config.num_kvcache_blocks
        if self.num_blocks < 0:
            self.num_blocks = self.cache_budget(config) // block_bytes
        most = self.num_blocks
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            most = torch.cuda.mem_get_info(self.device)[0] // block_bytes
        if not 1 <= self.num_blocks <= most:
            raise ValueError(
                f"no room for {max(self.num_blocks, 1)} blocks of {self.block_size} tokens, "
                f"{block_bytes:,} bytes each, in num_kvcache_blocks={config.num_kvcache_blocks}"
            )
        # [key or value, layer, block, position, head, channel]
        shape = (2, len(layers), self.num_blocks, self.block_size, *heads)
        self.attach_cache(zeros(shape, dtype, self.device), layers)

    def attach_cache(self, kv_cache: torch.Tensor, layers: list[Attention]) -> None:
        """Give each layer its part of the cache, and each slot a place for its token."""
        self.kv_cache = kv_cache
        for layer, k_cache, v_cache in zip(layers, *kv_cache, strict=True):
            layer.k_cache, layer.v_cache, layer.backend = k_cache, v_cache, self.backend
        self.history = History(kv_cache, num_columns=len(self.model.lm_head.weight))

    def warmup_model(self, config: Config) -> None:
        """Compile the kernels, and note the memory that the largest steps and graphs take."""
        self.allocate_kv_cache(replace(config, num_kvcache_blocks=1))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        sizes = self.max_num_tokens, self.max_num_seqs, self.max_model_len, self.block_size
        with two_layers_of_a_kind(self.model.model):
            self.compile_kernels(warmup_steps(*sizes))
            for seqs in warmup_steps(*sizes):
                self.launch(self.pack(seqs)).token_ids()
        self.step_bytes = torch.cuda.max_memory_reserved(self.device) - before
        with self.own_settings():
            self.graph_bytes = self.graphs.estimate_bytes(self.graph_shapes(config), self.device)

    def cache_budget(self, config: Config) -> int:
        """How many bytes the cache may take on each rank; ValueError where none are left."""
        if not self.on_gpu:
            return CPU_CACHE_BYTES
        weights = reserved_memory(self.device) - self.reserved_at_start
        share = config.gpu_memory_utilization
        own = left_for_cache(self.device, share, weights, self.step_bytes, self.graph_bytes)
        return get_group().least(own)

    @torch.inference_mode()
    def launch(self, step: Step) -> Result:
        """Bring a step to the device and let it run: replayed, or kernel by kernel."""
        with self.own_settings():
            self.receive(step)
            scores = self.score(step, self.graphs.run(step))
            return self.read_sampled(step).with_scores(step.asked, scores)

    def receive(self, step: Step) -> None:
        """Bring a step's inputs to the device, into the buffer that all steps share."""
        self.input_buffer[: len(step.host)].copy_(step.host, non_blocking=True)

    def execute(self, step: Step) -> Ran:
        """Run the model and sample without filters, on the inputs in the buffer."""
        inputs = step.layout.tensors(self.input_buffer)
        token_ids, history = inputs["input_ids"], self.history.tokens.view(-1)
        input_ids = resolve_tokens(token_ids, self.sampled, history, inputs["slot_mapping"])
        hidden = self.forward(step, {**inputs, "input_ids": input_ids})
        last = self.last_hidden(step, inputs, hidden)
        logits = self.sample(last, sampling_of(inputs, step.asked.all_greedy))
        return Ran(last, logits, hidden if step.asked.reads_prompts else None)

    def read_sampled(self, step: Step) -> Result:
        """Ask for the step's tokens, to be read when they are there."""
        return result_of(self.sampled[: step.num_seqs])

    def sample(self, hidden: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        """One token for each row of hidden, into `sampled`; nobody's is filtered. The logits."""
        logits = self.model.compute_logits(hidden)
        self.choose(logits, sampling)
        return logits

    def choose(self, logits: torch.Tensor, sampling: SamplingTensors) -> None:
        """One token for each row of logits, into `sampled`; nobody's is filtered."""
        first = self.model.lm_head.first
        self.sampled[: len(logits)] = self.sampler.choose(logits, sampling, first)

    def resample(self, step: Step, ran: Ran) -> None:
        """Another token, into `sampled`, for each of the rows that ask for more."""
        logits = self.model.compute_logits(ran.hidden) if ran.logits is None else ran.logits
        inputs, first = step.layout.tensors(self.input_buffer), self.model.lm_head.first
        sampling = sampling_of(inputs)
        edit_(logits, step.asked.edits, first)
        penalise_(logits, self.history.penalties(inputs), first)
        self.choose(logits, sampling)
        self.sampler.resample(self.sampled[: len(logits)], logits, sampling)

    def capture_cudagraph(self, shapes: list[Shape]) -> None:
        """Record a step of each shape: model, logits and sampling."""
        with self.own_settings():
            self.graphs.capture_all(shapes, on_gpu=self.on_gpu)
        self.packer.shapes = shapes

    def graph_shapes(self, config: Config) -> list[Shape]:
        """The shapes of the steps that this engine records: none in which NCCL has a part."""
        if config.enforce_eager or self.backend == "torch":
            return []
        shapes, group = graph_shapes(self.max_num_tokens, self.max_num_seqs), self.sampler.group
        if group.size == 1:
            return shapes
        longest = 0 if group.exchange is None else group.exchange.rows
        return [shape for shape in shapes if shape.num_tokens <= longest]

    def blank_step(self, shape: Shape) -> Step:
        """A step that is all padding, its inputs on the device."""
        step = self.packer.pack([], shape)
        self.receive(step)
        return step

    @contextmanager
    def own_settings(self) -> Iterator[None]:
        """What this runner's kernels run with: its device, and whether sums are fixed."""
        device = torch.cuda.device(self.device) if self.on_gpu else nullcontext()
        with device, fixed_order(self.sum_counters):
            yield

    def score(self, step: Step, ran: Ran) -> torch.Tensor | None:
        """The log-probabilities that are asked for, on their way to the host."""
        logits_of = self.model.compute_logits, self.model.lm_head.group.gather
        return score_tokens(step, ran, self.input_buffer, self.sampled, *logits_of)

    @torch.inference_mode()
    def compile_kernels(self, steps: Iterable[list[Sequence]]) -> None:
        """Go through all that these steps launch, while launching is compiling."""
        with self.own_settings(), compiled_together():
            for seqs in steps:
                step = self.pack(seqs)
                self.receive(step)
                inputs = step.layout.tensors(self.input_buffer)
                hidden = self.last_hidden(step, inputs, self.forward(step, inputs))
                ran = Ran(hidden, self.sample(hidden, sampling_of(inputs)))
                self.resample(step, ran)
                self.score(step, ran)

    def allocate_inputs(self, config: Config) -> None:
        """What graphs find at the same address: inputs, sampled tokens, counters."""
        block_size = config.kvcache_block_size
        self.packer = Packer(block_size, -(-self.max_model_len // block_size), self.on_gpu)
        shapes = graph_shapes(self.max_num_tokens, self.max_num_seqs)
        largest = largest_shape(shapes, self.max_num_tokens)
        num_bytes = InputLayout(largest, self.packer.max_blocks).num_bytes
        self.input_buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        self.sampled = torch.zeros(largest.num_seqs, dtype=torch.int64, device=self.device)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=self.device)
        sum_counters = torch.zeros(MOST_TILES, dtype=torch.int32, device=self.device)
        self.sum_counters = sum_counters if config.batch_invariant else None

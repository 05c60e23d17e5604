"""Runs the model: sequences in, one new token for each out."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import InputLayout, Inputs, Shape, scheduled_tokens, slot_mapping
from nanovllm.kernels.resolve_tokens import resolve_tokens
from nanovllm.layers.attention import Attention, choose_backend
from nanovllm.layers.sampler import ROWS, Sampler, SamplingTensors, is_filtered, sample_torch
from nanovllm.models import MODELS
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.context import NUM_COUNTERS, Context, set_context
from nanovllm.utils.loader import fill_with_noise, load_model
from nanovllm.utils.torch_settings import DefaultDtype, without_cudnn


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros; on a CPU no page of it takes memory before it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


CPU_CACHE_BYTES = 2**30  # for a larger cache on a CPU set num_kvcache_blocks


@dataclass(slots=True)
class Result:
    """What a step samples, once it has run."""

    sampled: torch.Tensor  # [num_seqs] int64, on the host
    done: torch.cuda.Event | None = None  # None: it is there already

    def token_ids(self) -> list[int]:
        """One new token id for each sequence: the one place where the host waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        return self.sampled.tolist()


@dataclass(slots=True)
class Graph:
    """A step of some shape, recorded."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    hidden: torch.Tensor  # [num_seqs, hidden_size]: what a replay makes its logits of


HOTTEST = np.finfo(np.float32).max  # a higher temperature would be infinite on the device

MAX_PREFILL_SEQS = 8  # in a step with a prompt that is recorded
PREFILL_SIZES = (64, 128, 256, 512, 1024, 2048)  # its tokens


def capture(
    step: Callable[[], torch.Tensor], pool: tuple[int, int] | None
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Record what a step launches; returns the graph and what the step returned.

    Other threads may go on using the GPU meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden = step()
    return graph, hidden


CUDA_BYTES = 2**30  # what CUDA itself holds for a process: context, kernels, graphs; about
FILTERED = SamplingParams(top_k=1, top_p=0.5)  # which takes the most memory


class ModelRunner:
    """Owns the model, its device and its memory."""

    def __init__(self, config: Config, model_config: ModelConfig, folder: Path, max_model_len: int):
        self.device = config.torch_device
        self.on_gpu = self.device.type == "cuda"
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.max_num_tokens = config.max_num_batched_tokens
        self.max_num_seqs = min(config.max_num_seqs, self.max_num_tokens)
        self.reserved_at_start = self.reserved_memory()
        with self.device, DefaultDtype(config.torch_dtype):
            model_class = MODELS[model_config.architecture]
            self.model = model_class(model_config, num_positions=max_model_len)
        self.model.requires_grad_(False).eval()
        if config.load_format == "dummy":
            fill_with_noise(self.model)
        else:
            load_model(self.model, folder)
        self.sampler = Sampler()
        self.allocate_inputs(config)
        self.graphs: dict[Shape, Graph] = {}
        self.step_bytes = self.graph_bytes = 0
        if self.on_gpu:
            self.allocate_kv_cache(replace(config, num_kvcache_blocks=1))  # to warm up with
            self.warmup_model()
            self.measure_graphs(self.graph_shapes(config))
        self.allocate_kv_cache(config)
        if self.on_gpu:
            self.capture_cudagraph(self.graph_shapes(config))

    @torch.inference_mode()
    def run(self, seqs: list[Sequence]) -> Result:
        """Launch a step, which samples one new token id for each sequence; nobody waits here."""
        with self.current_device():
            shape = self.shape_for(seqs)
            self.fill_inputs(seqs, shape)
            if shape in self.graphs:
                graph = self.graphs[shape]
                graph.graph.replay()
                inputs, hidden = graph.inputs, graph.hidden
            else:
                inputs = self.inputs(shape)
                counts = [seq.num_scheduled_tokens for seq in seqs]
                lens = [seq.num_computed_tokens + n for seq, n in zip(seqs, counts, strict=True)]
                hidden = self.forward(inputs, self.context(inputs, counts, lens, counts.count(1)))
            params = [seq.params for seq in seqs]
            if shape not in self.graphs:
                self.sample(hidden[: len(seqs)], inputs, params)
            self.resample(hidden, inputs, params)
            return self.read_sampled(len(seqs))

    def read_sampled(self, num_seqs: int) -> Result:
        """Ask for the step's tokens, to be read when they are there."""
        sampled = torch.empty(num_seqs, dtype=torch.int64, pin_memory=self.on_gpu)
        sampled.copy_(self.sampled[:num_seqs], non_blocking=True)
        if not self.on_gpu:
            return Result(sampled)
        done = torch.cuda.Event()
        done.record()
        return Result(sampled, done)

    def forward(self, inputs: Inputs, context: Context) -> torch.Tensor:
        """The hidden state of each sequence's last token, [num_seqs, hidden_size]."""
        input_ids = resolve_tokens(inputs["input_ids"], self.sampled)
        with set_context(context), without_cudnn(self.device):
            hidden = self.model(input_ids, inputs["positions"])
        if context.num_decodes < len(context.block_tables):
            hidden = hidden[inputs["last"]]  # of each prompt
        return hidden

    def sample(self, hidden: torch.Tensor, inputs: Inputs, params: list[SamplingParams]) -> None:
        """One token for each row of hidden, into `sampled`; nobody's is filtered.

        `params` may be empty: they only tell whether all rows are greedy.
        """
        logits, n = self.model.compute_logits(hidden), len(hidden)
        is_greedy = len(params) > 0 and all(p.temperature == 0 for p in params)
        columns = (inputs[name][:n] for name in ("temperatures", "seeds", "lengths"))
        self.sampled[:n] = self.sampler(logits, SamplingTensors(*columns, all_greedy=is_greedy))

    def resample(self, hidden: torch.Tensor, inputs: Inputs, params: list[SamplingParams]) -> None:
        """Another token, into `sampled`, for each row whose params ask for top-k or top-p."""
        asking = [row for row, p in enumerate(params) if is_filtered(p)]
        for start in range(0, len(asking), ROWS):
            part = asking[start : start + ROWS]
            rows, asked = self.tensor(part), [params[row] for row in part]
            sampling = SamplingTensors(
                *(inputs[name][rows] for name in ("temperatures", "seeds", "lengths")),
                all_greedy=False,
                top_ks=self.tensor([p.top_k for p in asked]),
                top_ps=self.tensor([p.top_p for p in asked], torch.float32),
                filtered=torch.arange(len(part), device=self.device),
            )
            self.sampled[rows] = sample_torch(self.model.compute_logits(hidden[rows]), sampling)

    def tensor(self, values, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Host values as a tensor on the device, without waiting for the copy."""
        pinned = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)

    def allocate_kv_cache(self, config: Config) -> None:
        """The pool of `num_blocks` blocks, and how attention is to read it."""
        self.block_size = config.kvcache_block_size
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        self.backend = choose_backend(config, self.model_config.head_dim)
        heads = (self.model_config.num_key_value_heads, self.model_config.head_dim)
        dtype = self.model.lm_head.weight.dtype
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
        # zeros, for what a mask hides is multiplied by 0, and 0 * NaN is NaN
        self.kv_cache = zeros(shape, dtype, self.device)
        for layer, k_cache, v_cache in zip(layers, *self.kv_cache, strict=True):
            layer.k_cache, layer.v_cache, layer.backend = k_cache, v_cache, self.backend

    def allocate_inputs(self, config: Config) -> None:
        """The buffer that each step's inputs are copied to, and the newest sampled tokens."""
        self.max_blocks = -(-self.max_model_len // config.kvcache_block_size)
        rows = -(-self.max_num_seqs // 16) * 16
        largest = Shape(max(self.max_num_tokens, rows, PREFILL_SIZES[-1]), rows)
        num_bytes = InputLayout(largest, self.max_blocks).num_bytes
        self.input_buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=self.device)

    def warmup_model(self) -> None:
        """Compile the kernels, and note the memory that the largest steps take."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        for seqs in self.warmup_steps():
            self.run(seqs).token_ids()
        self.step_bytes = torch.cuda.max_memory_reserved(self.device) - before

    def warmup_steps(self) -> Iterator[list[Sequence]]:
        """Steps after which every kernel has been compiled in each variant that may be needed.

        The largest are the most tokens, and the most sequences at full length. How attention and
        the small linear layers are compiled depends on the number of rows, and no variant lies
        between two powers of two. Nothing is stored, and all that is read lies in block 0.
        """
        longest, most = self.max_model_len, self.max_num_seqs
        whole, rest = divmod(self.max_num_tokens, longest)
        lengths = ([longest] * whole + [rest] * (rest > 0))[:most]
        yield [self.blank(n, n) for n in sorted(lengths)]  # a single token comes first
        yield [self.blank(longest, 1)] * most
        plain = self.blank(1, 1, SamplingParams())
        for rows in (*(1 << i for i in range((most - 1).bit_length())), most):
            yield [plain] * rows
        yield [plain, self.blank(1, 1)][:most]  # a filter for some

    def blank(self, length: int, num_tokens: int, params: SamplingParams = FILTERED) -> Sequence:
        """A sequence to warm up with, which brings its last `num_tokens`."""
        seq = Sequence(-1, [0] * length, params, seed=0)
        seq.block_table = [0] * -(-length // self.block_size)
        seq.num_cached_tokens = length  # as if it were kept already
        seq.num_computed_tokens, seq.num_scheduled_tokens = length - num_tokens, num_tokens
        return seq

    def measure_graphs(self, shapes: list[Shape]) -> None:
        """Note the memory that the graphs will take, from recording three of them."""
        if not shapes:
            return
        reserved, pool = [self.reserved_memory()], torch.cuda.graph_pool_handle()
        trial = []
        with self.current_device():
            for shape in (shapes[-1], max(s for s in shapes if s.is_decode), shapes[0]):
                trial.append(self.record(shape, pool))
                reserved.append(self.reserved_memory())
        each = reserved[3] - reserved[2]
        self.graph_bytes = reserved[2] - reserved[0] + each * (len(shapes) - 2)

    def reserved_memory(self) -> int:
        """Bytes of the GPU that torch holds in this process, without what it keeps for later."""
        if not self.on_gpu:
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def cache_budget(self, config: Config) -> int:
        """How many bytes the cache may take; ValueError, with the sum, where none are left."""
        if not self.on_gpu:
            return CPU_CACHE_BYTES
        weights = self.reserved_memory() - self.reserved_at_start + CUDA_BYTES
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = int(config.gpu_memory_utilization * total)
        steps = self.step_bytes + self.graph_bytes
        budget = min(allowed - weights, free) - steps
        if budget <= 0:
            share, parts = (
                config.gpu_memory_utilization,
                (weights, self.step_bytes, self.graph_bytes),
            )
            total, allowed, free, *parts = (
                f"{n / 2**30:.2f}" for n in (total, allowed, free, *parts)
            )
            raise ValueError(
                f"nothing is left for the cache: gpu_memory_utilization={share} of {total} GiB is "
                f"{allowed} GiB, and {free} GiB are free; weights and CUDA take {parts[0]} GiB, "
                f"the largest step {parts[1]} GiB and the graphs {parts[2]} GiB"
            )
        return budget

    def decode_mask(self, context_lens: list[int]) -> torch.Tensor | None:
        """True where a sequence has a token, [num_seqs, 1, 1, longest]; None if none is needed."""
        if self.backend != "torch" or min(context_lens) == max(context_lens):
            return None
        column = torch.arange(max(context_lens), device=self.device)
        return (column < self.tensor(context_lens).unsqueeze(1))[:, None, None]

    def fill_inputs(self, seqs: list[Sequence], shape: Shape) -> None:
        """Bring a step's inputs to the device, padded to `shape`, in one copy."""
        layout = InputLayout(shape, self.max_blocks)
        host = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=self.on_gpu)
        put = layout.views(host.numpy())
        first = np.array([seq.num_computed_tokens for seq in seqs], dtype=np.int64)
        count = np.array([seq.num_scheduled_tokens for seq in seqs], dtype=np.int64)
        stop = count.cumsum()
        row = np.repeat(np.arange(len(seqs)), count)  # whose each token is
        position = np.arange(len(row)) + (first - stop + count)[row]
        tables = put["block_tables"].reshape(shape.num_seqs, self.max_blocks)
        tables[:] = -1
        for table, seq in zip(tables, seqs, strict=False):
            table[: len(seq.block_table)] = seq.block_table
        columns = {  # values, and what the padding is
            "input_ids": (scheduled_tokens(seqs), 0),
            "positions": (position, 0),
            "slot_mapping": (slot_mapping(seqs, tables, row, position, self.block_size), -1),
            "seeds": ([seq.seed for seq in seqs], 0),
            "lengths": ([len(seq) for seq in seqs], 0),
            "last": (stop - 1, 0),
            "temperatures": (np.minimum([s.params.temperature for s in seqs], HOTTEST), 0),
            "context_lens": (first + count, 0),
            "cu_seqlens": ([0, *stop], len(row)),
        }
        for name, (values, padding) in columns.items():
            put[name][: len(values)] = values
            put[name][len(values) :] = padding
        num_decodes = shape.num_seqs if shape.is_decode else int((count == 1).sum())
        put["order"][:num_decodes] = np.argsort(-put["context_lens"][:num_decodes])
        self.input_buffer[: layout.num_bytes].copy_(host, non_blocking=True)

    def inputs(self, shape: Shape) -> Inputs:
        """The inputs of a step of this shape, where `fill_inputs` brings them."""
        return InputLayout(shape, self.max_blocks).views(self.input_buffer)

    def context(
        self, inputs: Inputs, counts: list[int], context_lens: list[int], num_decodes: int
    ) -> Context:
        """What attention has to know of a step whose sequences bring so many tokens each."""
        return Context(
            slot_mapping=inputs["slot_mapping"],
            block_tables=inputs["block_tables"].view(-1, self.max_blocks),
            context_lens=context_lens,
            mask=self.decode_mask(context_lens[:num_decodes]) if num_decodes else None,
            num_decodes=num_decodes,
            cu_seqlens=list(itertools.accumulate(counts, initial=0)),
            lens=inputs["context_lens"],
            starts=inputs["cu_seqlens"],
            order=inputs["order"],
            counters=self.counters,
        )

    def graph_shapes(self, config: Config) -> list[Shape]:
        """The shapes of steps that are recorded, small ones first."""
        if config.enforce_eager or self.backend == "torch":
            return []
        rows = -(-self.max_num_seqs // 16) * 16
        sizes = [n for n in (1, 2, 3, 4, 8, *range(16, rows + 1, 16)) if n <= rows]
        prefills = [n for n in PREFILL_SIZES if n <= self.max_num_tokens]
        return [Shape(n, n) for n in sizes] + [Shape(n, MAX_PREFILL_SEQS) for n in prefills]

    def shape_for(self, seqs: list[Sequence]) -> Shape:
        """The smallest shape that is recorded and holds this step, else the step's own."""
        step = Shape(sum(seq.num_scheduled_tokens for seq in seqs), len(seqs))
        for shape in self.graphs:  # the smallest first
            if step.fits(shape):
                return shape
        return step

    def capture_cudagraph(self, shapes: list[Shape]) -> None:
        """Record a step of each shape: model, logits and sampling. All share one pool of memory."""
        pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        with self.current_device():
            graphs = {shape: self.record(shape, pool) for shape in reversed(shapes)}
        self.graphs = {shape: graphs[shape] for shape in shapes}

    @torch.inference_mode()
    def record(self, shape: Shape, pool: tuple[int, int] | None) -> Graph:
        """A step of this shape, all of it padding, run once and then recorded."""
        self.fill_inputs([], shape)
        inputs, num_decodes = self.inputs(shape), shape.num_seqs if shape.is_decode else 0
        # A sequence may bring all the tokens; its length is on the device.
        context = self.context(inputs, [shape.num_tokens], [], num_decodes)

        def step() -> torch.Tensor:
            hidden = self.forward(inputs, context)
            self.sample(hidden, inputs, [])
            return hidden

        step()  # what compiles or allocates on its first run must not do so while recorded
        graph, hidden = capture(step, pool)
        return Graph(graph, inputs, hidden)

    def current_device(self):
        """Make the device the current one of CUDA, for the length of a `with`."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

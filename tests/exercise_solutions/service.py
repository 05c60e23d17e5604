"""Chapters 10 to 14."""


def own_heads(num_kv_heads: int, ranks: int, rank: int) -> list[int]:
    """The key heads of a rank, chapter 10."""
    own, first = max(1, num_kv_heads // ranks), rank * num_kv_heads // ranks
    return list(range(first, first + own))


def penalised(logits, prompt, completion, repetition, presence, frequency):
    """The penalties of chapter 11."""
    logits = list(logits)
    for i in {*prompt, *completion}:
        x, times = logits[i], completion.count(i)
        x = x / repetition if x > 0 else x * repetition
        logits[i] = x - frequency * times - presence * (times > 0)
    return logits


def split(pieces):
    """Thoughts and answer, chapter 12."""
    tag, held, kind = "</think>", "", "thought"
    for piece in pieces:
        held += piece
        if kind == "thought" and tag in held:
            before, _, held = held.partition(tag)
            yield "thought", before
            kind = "answer"
        n = 0
        if kind == "thought":
            n = max(n for n in range(len(tag)) if held.endswith(tag[:n]))
        yield kind, held[: len(held) - n]
        held = held[len(held) - n :]
    yield kind, held


def to_ask(journal, lines):
    """What a kill has left to do, chapter 13."""
    from zlib import crc32

    names: dict[int, str] = {}
    for entry in journal.splitlines(keepends=True):
        if not entry.endswith(b"\n") or entry[:9] != b"%08x " % crc32(entry[9:]):
            break
        number, name, _ = entry[9:].split(b" ", 2)
        names[int(number)] = name.decode()
    return [line.number for line in lines if names.get(line.number) != line.name]


def plan(experts, num_experts):
    """The counting sort of chapter 14."""
    pairs = [expert for chosen in experts for expert in chosen]
    starts = [0] * (num_experts + 1)
    for expert in pairs:
        starts[expert + 1] += 1
    for expert in range(num_experts):
        starts[expert + 1] += starts[expert]
    order, place = [0] * len(pairs), list(starts)
    for pair, expert in enumerate(pairs):
        order[place[expert]] = pair
        place[expert] += 1
    return order, starts


ANSWERS: dict[str, dict] = {
    "wrong-cut": dict(exchanges=2, kilobytes=56),
    "exchanges": dict(one=12, four=12, chunked=36),
    "own-heads": dict(rule=own_heads),
    "pays-off": dict(small=2.55, large=60.5),
    "penalised": dict(rule=penalised),
    "scores": dict(first=4, third=2, fourth=1),
    "thoughts": dict(rule=split),
    "slow-reader": dict(pieces=2, longest=39, messages=3),
    "after-a-kill": dict(rule=to_ask),
    "disk-waits": dict(waits=12, waits_each=6000, most_rows=200),
    "batch": dict(size=10),
    "experts-read": dict(eight=51.6, many=126, alike=8),
    "plan": dict(rule=plan),
}

CELLS: dict[str, list[str]] = {  # exercise -> the export cells of a solution
    "broadcast": [
        """#| export: nanovllm/parallel/group.py
class Group(Group):
    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        if self.size == 1:
            return x
        return self.all_reduce(x if self.rank == source else torch.zeros_like(x))
""",
    ],
    "sigma": [
        """#| export: nanovllm/sampling_params.py
from nanovllm.utils.options import option


class SamplingParams(SamplingParams):
    sigmas: float = option(0.0, "drop what is so many deviations below the best logit", minimum=0)
""",
        """#| export: nanovllm/engine/asked.py
CHOICES = {
    "seeds": (np.int64, "seed", 0),
    "temperatures": (np.float32, "params.temperature", 0),
    "top_ks": (np.int64, "params.top_k", 0),
    "top_ps": (np.float32, "params.top_p", 1),
    "min_ps": (np.float32, "params.min_p", 0),
    "repetitions": (np.float32, "params.repetition_penalty", 1),
    "presences": (np.float32, "params.presence_penalty", 0),
    "frequencies": (np.float32, "params.frequency_penalty", 0),
    "prompt_lens": (np.int64, "num_prompt_tokens", 0),
    "sigmas": (np.float32, "params.sigmas", 0),
}


def asks(params: SamplingParams) -> int:
    is_warm, costs = params.temperature > 0, (params.presence_penalty, params.frequency_penalty)
    cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.sigmas > 0
    more = (is_warm and cuts) or params.repetition_penalty != 1 or any(costs)
    return WARM * is_warm | MORE * more | SCORED * params.is_scored
""",
        """#| export: nanovllm/engine/model_runner.py
class ModelRunner(ModelRunner):
    def resample(self, step: Step, ran: Ran) -> None:
        logits = self.model.compute_logits(ran.hidden) if ran.logits is None else ran.logits
        inputs = step.layout.tensors(self.input_buffer)
        sampling, n = sampling_of(inputs), inputs["sigmas"].unsqueeze(1)
        penalise_(logits, self.history.penalties(inputs), self.model.lm_head.first)
        x = logits.float()
        low = x < x.amax(1, keepdim=True) - n * x.std(1, keepdim=True)
        logits.masked_fill_(low & (n > 0), -torch.inf)
        self.choose(logits, sampling)
        self.sampler.resample(self.sampled[: len(logits)], logits, sampling)
""",
    ],
    "priority": [
        """#| export: nanovllm/sampling_params.py
from nanovllm.utils.options import option


class SamplingParams(SamplingParams):
    priority: int = option(0, "requests with a smaller number go first")
""",
        """#| export: nanovllm/engine/scheduler.py
class Scheduler(Scheduler):
    def add(self, seq: Sequence) -> None:
        at = len(self.waiting)
        while at > 0 and self.waiting[at - 1].params.priority > seq.params.priority:
            at -= 1
        self.waiting.insert(at, seq)
""",
    ],
    "load": [
        """#| export: nanovllm/serve/server.py
class Server(Server):
    async def load(self) -> Response:
        return reply_json({"open": len(self.client.answers), "max_open": self.client.max_open})
""",
        """#| export: nanovllm/serve/app.py
def add_routes(app: FastAPI, client: EngineClient, config: ServeConfig) -> None:
    server = Server(client, config.name_of(client.about.model))
    app.add_api_route("/load", server.load, response_model=None)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", server.complete, methods=["POST"], response_model=None)
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/detokenize", server.detokenize, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models, response_model=None)
    app.add_api_route("/v1/models/{name:path}", server.one_model, response_model=None)
    app.add_api_route("/health", server.health, response_model=None)
    app.add_api_route("/metrics", server.metrics, response_model=None)
    app.add_api_route("/", server.page, response_model=None)
""",
    ],
    "look-ahead": [
        """#| export: nanovllm/serve/batch.py
from itertools import islice

AHEAD = 100


def unanswered(lines: Iterator[Line], journal: Journal, note: Note) -> Iterator[Row]:
    rows = one_by_one(lines, journal, note)
    while some := list(islice(rows, AHEAD)):
        yield from sorted(some, key=lambda row: row.body)


def one_by_one(lines: Iterator[Line], journal: Journal, note: Note) -> Iterator[Row]:
    for line in lines:
        row = row_of(line)
        if row.custom_id is not None and not journal.take_id(row.custom_id):
            fault = f"custom_id {row.custom_id[:80]!r} is that of a line before"
            row = row._replace(line=repeated(row.line), fault=fault)
        if journal.find(row.line) is not None:
            continue
        if row.fault is None:
            yield row
        else:
            note(row, reply_of(row, 400, error_body(row.fault, "invalid_request_error")))
""",
    ],
    "mistral": [
        """#| export: nanovllm/models/__init__.py
MODELS: dict[str, type[Qwen3ForCausalLM]] = {
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
}
""",
        """#| export: nanovllm/utils/checkpoint.py
ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture("qwen3", head_dim=128),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "LlamaForCausalLM": Architecture("llama"),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        needs=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        other_names={"num_local_experts": "num_experts"},
    ),
    "MistralForCausalLM": Architecture("mistral"),
}


def architecture_of(path: Path, raw: dict) -> Architecture:
    names, model_type = raw.get("architectures"), raw.get("model_type")
    if names not in [[name] for name in ARCHITECTURES]:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architectures is {names!r}, this engine runs one of {known}")
    kind = ARCHITECTURES[names[0]]
    if model_type != kind.model_type:
        raise ValueError(
            f"{path}: model_type is {model_type!r}, that of {names[0]} is {kind.model_type!r}"
        )
    if model_type == "mistral" and raw.get("sliding_window") is not None:
        raise ValueError(f"{path}: sliding_window={raw['sliding_window']} is not supported")
    return kind
""",
    ],
}

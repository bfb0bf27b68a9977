"""What a user may choose about an engine, and where models are found and told apart. No torch."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

from windlass.errors import CheckpointError, ModelError, UsageError
from windlass.formats import HF_QUANT_FILE, METHODS
from windlass.params import SamplingParams
from windlass.plan import SCHEDULES, Plan, Schedule
from windlass.speculative import SpeculativeConfig

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent / "data" / "demo"

# Of a checkpoint's stamp: these files whole, of each weight file the header and samples.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
    "added_tokens.json", "tiktoken.model", "qwen.tiktoken", "model.safetensors.index.json",
    HF_QUANT_FILE,
)  # fmt: skip
_SAMPLES = 16
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# Who expects uses of experts, and who of them is given up; `forecast/registry.py` and
# `prefetch/registry.py` make them
EXPERT_FORECASTS = ("learned", "finemoe", "moe-infinity", "gate", "usage", "off")
EXPERT_CACHE_POLICIES = (
    "next-use", "lru", "lfu", "lfru", "mrs", "finemoe", "moe-infinity", "farthest", "lru-pool",
    "lfu-pool", "lfru-pool",
)  # fmt: skip
_COUNTS = (
    "host_memory", "device_memory", "max_num_seqs", "max_num_batched_tokens", "micro_batch_size",
    "max_model_len", "batch_groups", "threads", "burst_tokens", "seed",
)  # fmt: skip
AUTO, CPU, CUDA = "auto", "cpu", "cuda"  # of `device`, also as cuda:0, cuda:1, ...
# triton: of a GPU alone, cpu: of the host alone
MoeBackend = Literal["auto", "triton", "torch", "cpu"]
MOE_BACKENDS: tuple[MoeBackend, ...] = get_args(MoeBackend)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Flags of every command that runs a model. None: chosen by the plan. Sizes in bytes.

    `quantization` asserts how the checkpoint's weights are stored; the checkpoint itself says it.
    `moe_expert_cache_size`: "auto", a size with a unit, or a number of experts per layer.
    `device`: where passes compute: "cpu", "cuda" or one as "cuda:1"; "auto" for a GPU where torch
    has one and a plan fits it. `device_memory`: what may be taken of it in all.
    `kv_cache_dtype`: what keys and values are kept in, "auto" for the checkpoint's type.
    `kv_offloading_share`: of the sequences, 0 to 1, whose keys and values are kept in the host's
    memory and go to the GPU layer by layer; results are the same bits.
    `strict`: settings of config.json that nothing reads are an error, not a line of the log.
    `expert_usage`: "off", or the file that keeps how often experts are used from run to run; "auto"
    for one that the commands choose (`doctor/kept.py`).
    `routing_trace`: where to record what routers decide; with their inputs where it says so.
    `speculative_config`: what is guessed of the next tokens; results are the same bits without.
    `batch_groups`: groups of rows of a pass, so that attention of one goes on beside the experts of
    another; one, unless said.
    `burst_tokens`: what a sequence decodes before the next, 0 for all in every pass.
    `expert_forecast`, `expert_cache_policy`: names (`EXPERT_FORECASTS`, `EXPERT_CACHE_POLICIES`) of
    who expects uses of experts and who gives them up; `expert_map_store`: where FineMoE's maps are
    kept from run to run.
    `enforce_eager`: every pass is asked for kernel by kernel, also one of few rows, which is
    otherwise replayed as the last one was (CUDA graphs, on a GPU); results are the same bits.
    `plan`: one to replay, or its file; what else is said must agree with it. `model` and
    `tokenizer`: folders, or names on the hub until `hub/locate.py` has found them, each with its
    revision.
    """

    model: str = DEMO
    tokenizer: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    host_memory: int | None = None
    device: str = AUTO
    device_memory: int | None = None
    moe_expert_cache_size: str | None = None
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    kv_offloading_share: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    micro_batch_size: int | None = None
    batch_groups: int | None = None
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig | None = None
    max_model_len: int | None = None
    schedule: Schedule | None = None
    burst_tokens: int | None = None
    plan: Plan | Path | None = None
    seed: int = 0
    threads: int | None = None
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    load_mode: Literal["auto", "dio", "buffered"] = "auto"
    moe_backend: MoeBackend = "auto"
    enforce_eager: bool = False
    trace: Path | None = None
    routing_trace: Path | None = None
    routing_trace_inputs: bool = False
    generation_config: Literal["auto", "vllm"] = "auto"
    strict: bool = False
    expert_usage: Path | Literal["auto", "off"] = "off"
    expert_forecast: str = "learned"
    expert_cache_policy: str = "next-use"
    expert_map_store: Path | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", ("auto", "float32", "bfloat16")),
            ("quantization", (None, *METHODS)),
            ("load_format", ("auto", "safetensors", "dummy")),
            ("load_mode", ("auto", "dio", "buffered")),
            ("moe_backend", MOE_BACKENDS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("generation_config", ("auto", "vllm")),
            ("schedule", (None, *SCHEDULES)),
            ("expert_forecast", EXPERT_FORECASTS),
            ("expert_cache_policy", EXPERT_CACHE_POLICIES),
        ):
            if (value := getattr(self, name)) not in allowed:
                listed = ", ".join(one for one in allowed if one is not None)
                raise UsageError(f"{name}: got {value!r}, allowed {listed}")
        for name in _COUNTS:
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise UsageError(f"{name}: got {count!r}, allowed a whole number")
        read_device(self.device)
        if self.device == CPU and self.moe_backend == "triton":
            raise UsageError("moe_backend: got 'triton', allowed with device auto or cuda")
        if self.device == CPU and self.device_memory is not None:
            raise UsageError(
                "device_memory: got one beside device cpu, allowed with device auto or cuda, which"
                " has one"
            )
        self._check_share()
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads: got {self.threads}, allowed 1 or more")
        if self.expert_map_store is not None and self.expert_forecast != "finemoe":
            raise UsageError(
                f"expert_map_store: got one beside expert_forecast {self.expert_forecast}, allowed"
                " with finemoe"
            )
        if self.routing_trace_inputs and self.routing_trace is None:
            raise UsageError("routing_trace_inputs: got it alone, allowed with routing_trace")
        if not isinstance(self.speculative_config, SpeculativeConfig | None):
            raise UsageError(
                f"speculative_config: got {self.speculative_config!r}, allowed an object as"
                " {'method': 'ngram'}"
            )
        self._check_files()
        if self.burst_tokens is not None and self.burst_tokens < 0:
            raise UsageError(f"burst_tokens: got {self.burst_tokens}, allowed 0 or more")

    def _check_share(self) -> None:
        share = self.kv_offloading_share
        if share is None:
            return
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UsageError(f"kv_offloading_share: got {share!r}, allowed a number from 0 to 1")
        if share and self.device == CPU:
            raise UsageError("kv_offloading_share: allowed with device auto or cuda")

    def _check_files(self) -> None:
        """Each file that is written has a place of its own."""
        names = ("trace", "routing_trace", "expert_usage", "expert_map_store")
        taken: dict[Path, str] = {}
        for name in names:
            path = getattr(self, name)
            if not isinstance(path, Path):
                continue
            if (other := taken.setdefault(path.resolve(), name)) != name:
                raise UsageError(f"{name}: got {str(path)!r}, which {other} names too")


def read_device(name: str) -> str:
    """`name`, if it may be said of a device; else UsageError."""
    if not (isinstance(name, str) and re.fullmatch(f"{AUTO}|{CPU}|{CUDA}(:[0-9]+)?", name)):
        raise UsageError(f"device: got {name!r}, allowed {AUTO}, {CPU}, {CUDA} or one as {CUDA}:0")
    return name


def resolve_model(name: str, *, what: str = "model") -> Path:
    """The folder of a model: the shipped one for `demo`, else the path itself. `what`: the option
    that named it."""
    folder = _DEMO_FOLDER if name == DEMO else Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"{what}: got {name!r}, allowed a checkpoint folder, {DEMO!r} or a name on the hub as"
            " org/name[@revision]"
        )
    return folder


def model_name(folder: Path) -> str:
    """What a model is called: its folder's own name, the same however the path was spelt; of a
    folder in the hub's cache (models--org--name/snapshots/revision) the repository's, org/name."""
    folder = folder.resolve()
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    kind, *parts = repository.split("--")
    return "/".join(parts) if kind == "models" and parts else folder.name


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of the checkpoint; CheckpointError if it is absent or not one. config.json
    comes with hf_quant_config.json, under its name, where there is one."""
    document = _read_object(folder, name)
    if name != "config.json" or not (folder / HF_QUANT_FILE).is_file():
        return document
    return {**document, HF_QUANT_FILE: _read_object(folder, HF_QUANT_FILE)}


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found, expected the model's {name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: found a {type(document).__name__}, expected an object")
    return document


def default_params(folder: Path, options: EngineOptions) -> SamplingParams:
    """Of requests that name none: what the checkpoint's generation_config.json says. `max_tokens`
    is None where it does not."""
    path = folder / "generation_config.json"
    if options.generation_config == "vllm" or not path.exists():
        return SamplingParams(max_tokens=None)
    config = read_config(folder, path.name)
    try:
        params = SamplingParams.from_generation_config(config)
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return replace(params, max_tokens=config.get("max_new_tokens"))


def read_plan(plan: Plan | Path) -> Plan:
    """The plan, or what its file holds. UsageError if that is not one."""
    if isinstance(plan, Plan):
        return plan
    try:
        document = json.loads(plan.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not readable as JSON: {error}"
        raise UsageError(f"plan: got {str(plan)!r}: {reason}") from error
    return Plan.from_json(document, what=f"plan {plan}")


def checkpoint_stamp(folder: Path) -> str:
    """A digest of a checkpoint that reads little of its weights. Known without loading, so that a
    finished job can notice another model. Raises UsageError if a file cannot be read."""
    digest = blake2b(digest_size=16)
    try:
        for path in (folder / name for name in _SMALL_FILES):
            if path.is_file():
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for piece in _samples(path):
                digest.update(piece)
    except OSError as error:
        raise UsageError(f"model: cannot read {str(folder)!r}: {error}") from error
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        yield (length := file.read(8))
        left = min(int.from_bytes(length, "little"), size, _MAX_HEADER_BYTES)
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            left -= len(piece)
            yield piece
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)

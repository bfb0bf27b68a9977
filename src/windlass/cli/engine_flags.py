"""The flags that describe an engine, shared by the commands that open one, and the flags users of
other programs know that Windlass refuses. Knows no command."""

import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from windlass.cli.flags import Flag, choice, count, integer, number, size
from windlass.errors import UsageError
from windlass.formats import METHODS
from windlass.hub.locate import locate
from windlass.models.registry import read_spec
from windlass.options import (
    EXPERT_CACHE_POLICIES,
    EXPERT_FORECASTS,
    KV_CACHE_DTYPES,
    MOE_BACKENDS,
    EngineOptions,
    read_config,
    read_device,
    resolve_model,
)
from windlass.plan import SCHEDULES
from windlass.speculative import SpeculativeConfig

_MODELS_OWN, _WHAT_FITS = 0, -1  # of --max-model-len
_MODEL, _MEMORY, _BATCHING = "model", "memory", "batching"


def _cache_size(text: str) -> str:
    """`auto`, a size or a number of experts per layer; kept as text, checked here."""
    if text != "auto" and not text.isdecimal():
        size(text)
    return text


def _usage_file(text: str) -> str | Path:
    return text if text in ("auto", "off") else Path(text)


def _speculative_config(text: str) -> str:
    """Kept as text, checked here."""
    SpeculativeConfig.read(text)
    return text


MODEL_NAMES = ("-m", "-hf", "--hf-repo")
REVISION_FLAG = Flag(
    name="revision", metavar="NAME", group=_MODEL,
    help="branch, tag or commit of a model on the hub, also written org/name@NAME (default: main)",
)  # fmt: skip
ENGINE_FLAGS = (
    Flag(name="model", aliases=MODEL_NAMES, metavar="DIR|ORG/NAME", default="demo", group=_MODEL,
         help="folder of a Hugging Face checkpoint, a name on the hub, or demo, the model that is "
         "shipped (default)"),
    REVISION_FLAG,
    Flag(name="tokenizer", metavar="DIR|ORG/NAME", group=_MODEL,
         help="another tokenizer (default: the model's)"),
    Flag(name="tokenizer-revision", metavar="NAME", group=_MODEL,
         help="branch, tag or commit of a tokenizer on the hub"),
    Flag(name="dtype", read=choice("auto", "float32", "bfloat16"), default="auto", metavar="TYPE",
         group=_MODEL,
         help="what matrix products multiply: auto (float32) or bfloat16, the activations rounded "
         "as transformers and vLLM do it: prompts up to twice as fast with AVX512-BF16 or AMX, "
         "decode of some 64 sequences too; fewer decode faster without. Weights stay as stored, "
         "sums are float32"),
    Flag(name="quantization", aliases=("-q",), read=choice(*METHODS), metavar="METHOD",
         group=_MODEL, help="asserts how the weights are stored, which the checkpoint itself says: "
         + ", ".join(METHODS)),
    Flag(name="load-format", read=choice("auto", "safetensors", "dummy"), default="auto",
         metavar="FORMAT", group=_MODEL,
         help="auto, safetensors or dummy (random weights of the real shapes, only config.json)"),
    Flag(name="load-mode", aliases=("-lm",), read=choice("auto", "dio", "buffered"),
         default="auto", metavar="MODE", group=_MODEL,
         help="how weights are read: auto, dio (direct, past the page cache) or buffered"),
    Flag(name="generation-config", read=choice("auto", "vllm"), default="auto", metavar="SOURCE",
         group=_MODEL, help="sampling defaults: auto (the checkpoint's) or vllm (vLLM's own)"),
    Flag(name="strict", read=None, default=False, group=_MODEL,
         help="refuse what is only said otherwise: settings of config.json that nothing reads; in "
         "run-batch also malformed lines of the file, which otherwise get error rows"),
    Flag(name="max-model-len", aliases=("-c", "--ctx-size"), read=count, metavar="N", group=_MODEL,
         help="longest prompt and answer in tokens, such as 8k; 0: the model's own, "
         "-1: what fits into memory (default)"),
    Flag(name="seed", aliases=("-s",), read=integer(0), default=0, metavar="N", group=_MODEL,
         help="of all sampling without a seed of its own (default 0)"),
    Flag(name="host-memory", read=size, metavar="SIZE", group=_MEMORY,
         help="memory the whole process may take, such as 24GiB (default: most of what is free)"),
    Flag(name="device", aliases=("-dev",), read=read_device, default="auto", metavar="NAME",
         group=_MEMORY, help="where passes compute: cpu, cuda or one as cuda:1, which is an error "
         "where it cannot be; auto (default): a GPU where torch has one and the model's plan fits "
         "it, else the CPU"),
    Flag(name="device-memory", read=size, metavar="SIZE", group=_MEMORY,
         help="memory of the GPU that may be taken in all, such as 16GiB: its context, weights, "
         "keys and values, workspace (default: 90 % of what is free)"),
    Flag(name="moe-expert-cache-size", aliases=("--moe-expert-cache",), read=_cache_size,
         metavar="SIZE", group=_MEMORY,
         help="memory for experts: auto, a size, or a number of experts per layer"),
    Flag(name="expert-usage", read=_usage_file, default="auto", metavar="FILE", group=_MEMORY,
         help="where to keep how often each expert is used, counts alone, so that the next run "
         "reads those first: auto (the user's cache folder), off or a file"),
    Flag(name="expert-forecast", read=choice(*EXPERT_FORECASTS), default="learned", metavar="NAME",
         group=_MEMORY, help="who expects which experts come: learned (gates that learn, default), "
         "gate (the same, not learning), usage (what each sequence used lately), finemoe and "
         "moe-infinity (as in their papers), off (nothing is read ahead but what is certain); "
         "results are the same bits with any"),
    Flag(name="expert-cache-policy", read=choice(*EXPERT_CACHE_POLICIES), default="next-use",
         metavar="NAME", group=_MEMORY, help="which experts are given up, to compare: "
         + ", ".join(EXPERT_CACHE_POLICIES) + " (default: next-use)"),
    Flag(name="expert-map-store", read=Path, metavar="FILE", group=_MEMORY,
         help="where to keep finemoe's expert maps, which tell of prompts, from run to run "
         "(default: nowhere)"),
    Flag(name="kv-cache-dtype", read=choice(*KV_CACHE_DTYPES), default="auto", metavar="TYPE",
         group=_MEMORY,
         help="keys and values in memory: auto (the checkpoint's type), bfloat16, float16, float32 "
         "or int8 (about half of bfloat16, not exact; -ctk q8_0 -ctv q8_0 means the same)"),
    Flag(name="kv-offloading-share", read=number, metavar="SHARE", group=_MEMORY,
         help="of the sequences, 0 to 1, whose keys and values are kept in RAM and go to the GPU "
         "layer by layer (default: planned); results are the same bits"),
    Flag(name="max-num-seqs", aliases=("-np", "--parallel"), read=integer(1), metavar="N",
         group=_BATCHING, help="sequences per pass (default: planned)"),
    Flag(name="max-num-batched-tokens", aliases=("-b", "--batch-size"), read=integer(1),
         metavar="N", group=_BATCHING, help="tokens per pass (default: planned)"),
    Flag(name="micro-batch-size", aliases=("-ub", "--ubatch-size"), read=integer(1), metavar="N",
         group=_BATCHING, help="tokens that attention takes at once (default: planned)"),
    Flag(name="batch-groups", read=integer(1), metavar="N", group=_BATCHING,
         help="groups that the micro-batches of a pass are in, so that attention of one group may "
         "go on beside the experts of another (CGOPipe); wants memory for a layer's experts, and "
         "brings a CPU alone nothing (default: 1); results are the same bits"),
    Flag(name="schedule", read=choice(*SCHEDULES), metavar="NAME", group=_BATCHING,
         help="module-based (default: each expert once per pass over all of its rows) or "
         "model-based (every micro-batch through all layers by itself, as other programs do it; "
         "for comparison, results are the same)"),
    Flag(name="burst-tokens", read=integer(0), metavar="N", group=_BATCHING,
         help="sequences decode one after the other, N tokens a turn; 0: all in every pass "
         "(default: planned, bursts for few sequences that wait for reads, and given up where they "
         "measure slower; N is kept); results are the same bits"),
    Flag(name="enforce-eager", read=None, default=False, group=_BATCHING,
         help="ask for every pass kernel by kernel, also those of few tokens, which are otherwise "
         "replayed as captured (on a GPU: CUDA graphs); slower, results are the same bits"),
    Flag(name="plan", read=Path, metavar="FILE", group=_MEMORY,
         help="replay a plan that an earlier run wrote (FILE.plan.json beside its output): the "
         "same values, or an error where they do not fit"),
    Flag(name="enable-prefix-caching", read=None, default=True, group=_BATCHING,
         help="prompts that begin alike are computed once up to where they differ (default: on); "
         "results are the same bits either way"),
    Flag(name="speculative-config", read=_speculative_config, metavar="JSON", group=_BATCHING,
         help="guess next tokens and compute several in a pass, while that is faster; results are "
         'the same bits. {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, '
         '"prompt_lookup_min": 1}: what followed the last 3 to 1 tokens when they were seen before;'
         ' {"method": "mtp"}: what the model\'s layer for multi-token prediction says'
         " (default: off)"),
    Flag(name="threads", aliases=("-t",), read=integer(1), metavar="N", group=_BATCHING,
         help="of computation (default: one per core that affinity and quotas allow)"),
    Flag(name="moe-backend", read=choice(*MOE_BACKENDS), default="auto", metavar="NAME",
         group=_BATCHING,
         help="kernels: triton (of a GPU), cpu (the native library), torch, or auto: Triton's on a "
         "GPU, native ones on a CPU, where they can run"),
    Flag(name="trace", read=Path, metavar="FILE", group="records",
         help="write a Chrome trace that Perfetto opens"),
    Flag(name="routing-trace", read=Path, metavar="FILE", group="records",
         help="record which experts each token was sent to, for `windlass replay`; it tells about "
         "the prompts, so keep it as private as they are"),
    Flag(name="routing-trace-inputs", read=None, default=False, group="records",
         help="record also what the routers read, and the routers (about 2 KiB a token and layer "
         "at a hidden size of 1,024): prompts could be made again from it"),
)  # fmt: skip
CONFIG_FLAG = Flag(
    name="config", metavar="FILE", group="records",
    help="TOML file with options by name; flags and environment win over it",
)  # fmt: skip

# flag -> (values that ask for nothing, what to say)
_ONE, _NONE = ("1",), ()
_GPU = "--device-memory says how much of a GPU may be taken, as a size"
_PARALLEL = "several devices are not supported yet"
REFUSED: Mapping[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size", "-dp",
                     "--data-parallel-size"), (_ONE, _PARALLEL)),
    **dict.fromkeys(("-sm", "--split-mode", "-ts", "--tensor-split"), (_NONE, _PARALLEL)),
    **dict.fromkeys(("--gpu-memory-utilization", "--fit-target"), (_NONE, _GPU)),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers", "-ot", "--override-tensor",
                     "--cpu-offload-gb", "-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"),
                    (_NONE, "placement is planned from --host-memory, --device-memory and"
                     " --moe-expert-cache-size")),
    **dict.fromkeys(("--enable-lora", "--lora", "--lora-modules"),
                    (_NONE, "LoRA adapters are not supported yet")),
    **dict.fromkeys(("-md", "--model-draft"), (_NONE, "a second model is never loaded;"
                    " --speculative-config proposes what was seen before")),
    "--download-dir": (_NONE, "HF_HOME says where downloads are kept"),
    **dict.fromkeys(("-hft", "--hf-token"), (_NONE, "set HF_TOKEN")),
    **dict.fromkeys(("-hff", "--hf-file"), (_NONE, "GGUF files are not read")),
    "--trust-remote-code": (_NONE, "code of checkpoints is never run"),
    "--offload-prefetch-step": (("auto",), "prefetching is not adjustable yet"),
    "--override-generation-config": (_NONE, "set sampling fields in each request"),
}  # fmt: skip


# llama.cpp's options, one for keys and one for values: what must be given alike is one option here
_CACHE_TYPES = {
    "-ctk": "-ctk", "--cache-type-k": "-ctk", "-ctv": "-ctv", "--cache-type-v": "-ctv",
}  # fmt: skip
_CACHE_DTYPE = "--kv-cache-dtype"
_CACHE_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "q8_0": "int8"}


def translate_known(arguments: Sequence[str]) -> list[str]:
    """The arguments with `-ctk q8_0 -ctv q8_0` as `--kv-cache-dtype int8`. Raises UsageError where
    the two differ, one is missing, they name a type that Windlass lacks, or `--kv-cache-dtype`
    stands beside them with another."""
    kept: list[str] = []
    found: dict[str, str] = {}
    own: str | None = None
    rest = list(arguments)
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in _CACHE_TYPES:
            found[_CACHE_TYPES[name]] = value if equals or not rest else rest.pop(0)
        else:
            kept.append(argument)
            if name == _CACHE_DTYPE:
                own = value if equals or not rest else rest[0]
    if not found:
        return list(arguments)
    keys, values = found.get("-ctk"), found.get("-ctv")
    if keys != values or keys not in _CACHE_DTYPES:
        given = " ".join(f"{name} {text}" for name, text in found.items())
        raise UsageError(
            f"{given}: allowed {', '.join(_CACHE_DTYPES)}, the same for -ctk and -ctv"
            " (or --kv-cache-dtype)"
        )
    if own not in (None, _CACHE_DTYPES[keys]):
        raise UsageError(
            f"{_CACHE_DTYPE} {own}: beside -ctk {keys} -ctv {keys}, allowed only"
            f" {_CACHE_DTYPES[keys]}: they mean the same"
        )
    return [*kept, _CACHE_DTYPE, _CACHE_DTYPES[keys], *rest]


def refuse_known(arguments: Sequence[str], *, own: Container[str] = ()) -> list[str]:
    """The arguments without refused flags that ask for nothing (`-tp 1`). Raises UsageError for
    those that ask for something. `own`: flags that the command has itself."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*kept, argument, *rest]
        name, equals, value = argument.partition("=")
        if name not in REFUSED or name in own:
            kept.append(argument)
            continue
        harmless, why = REFUSED[name]
        if harmless and not equals and rest:
            value = rest.pop(0)
        if value not in harmless:
            only = f", allowed {' or '.join(harmless)}" if harmless else ""
            raise UsageError(f"{name}{' ' + value if value else ''}: not supported{only}: {why}")
    return kept


def say_line(text: str) -> None:
    """On standard error, for people."""
    print(text, file=sys.stderr, flush=True)


def engine_options(values: Mapping[str, Any]) -> EngineOptions:
    """The engine that `values` describe. What they name on the hub is looked up for
    `--max-model-len 0` alone."""
    given = {flag.key: values[flag.key] for flag in ENGINE_FLAGS}
    if given["max_model_len"] == _MODELS_OWN:
        named = EngineOptions(model=given["model"], revision=given["revision"])
        folder = resolve_model(locate(named, with_tokenizer=False).options.model)
        given["max_model_len"] = read_spec(read_config(folder))[0].max_positions
    elif given["max_model_len"] == _WHAT_FITS:
        given["max_model_len"] = None
    if given["speculative_config"] is not None:
        given["speculative_config"] = SpeculativeConfig.read(given["speculative_config"])
    return EngineOptions(**given)

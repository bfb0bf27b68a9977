"""GPT-OSS with bf16 experts."""

from windlass.models.config import Config
from windlass.models.families.common import gqa, model, moe, window, windows
from windlass.models.families.tensor_names import LAYER, linears, name_map
from windlass.models.names import NameMap, Take, TensorSource, TensorSources, Transpose
from windlass.models.spec import Block, ClampedSwiGlu, Ffn, ModelSpec, TopKSoftmax


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.ignore("initial_context_length")  # rope_scaling has it too
    activation = ClampedSwiGlu(
        alpha=config.get("swiglu_alpha", float, 1.702),
        limit=config.get("swiglu_limit", float, 7.0),
    )
    inner = config.size("intermediate_size")
    experts = moe(
        config,
        TopKSoftmax(router_bias=True),
        num=config.size("num_local_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok", "experts_per_token"),
        expert=Ffn(intermediate=inner, activation=activation, bias=True),
    )
    bias = config.get("attention_bias", bool, True)
    blocks = [
        Block(
            attention=gqa(
                config, theta=150_000.0, qkv_bias=bias, out_bias=bias, sinks=True, window=one
            ),
            ffn=experts,
        )
        for one in windows(config, window(config), default=lambda i: i % 2 == 0)
    ]
    spec = model(config, blocks)
    router = linears("mlp", ("router",))
    return spec, name_map(spec, moe=router, expert=_experts(inner, spec.hidden_size))


def _experts(inner: int, hidden: int) -> TensorSources:
    """(E, D, 2 I) with gates in the even and ups in the odd columns; (E, I, D)."""
    stacks = LAYER + "mlp.experts."
    both, bias, down = stacks + "gate_up_proj", stacks + "gate_up_proj_bias", stacks + "down_proj"
    sources: dict[str, tuple[TensorSource, ...]] = {}
    for part, first in (("gate", 0), ("up", 1)):
        columns, entries = Take(1, first, 2 * inner, 2), Take(0, first, 2 * inner, 2)
        shape = (hidden, 2 * inner)
        sources[part] = (TensorSource(both, shape, (columns, Transpose()), "experts"),)
        sources[f"{part}_bias"] = (TensorSource(bias, (2 * inner,), (entries,), "experts"),)
    sources["down"] = (TensorSource(down, (inner, hidden), (Transpose(),), "experts"),)
    sources["down_bias"] = (TensorSource(down + "_bias", (hidden,), (), "experts"),)
    return sources

"""Nemotron-H with experts (Nemotron 3): a layer is Mamba-2, attention without positions, experts or
a dense network. Layers for multi-token prediction are not used.

Steps of Mamba-2 are taken as they are, as the published code and config.json (`time_step_limit`)
have them; transformers 5 raises those of prompts to `time_step_min`, which is meant for training.
"""

from dataclasses import replace
from typing import Any

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, model, moe, sigmoid_topk
from windlass.models.families.tensor_names import HEAD, LAYER, at, linears
from windlass.models.names import NameMap, Reshape, TensorSource
from windlass.models.spec import (
    Block,
    Ffn,
    Mamba2,
    ModelSpec,
    ReluSquared,
    RmsNorm,
    Shared,
)

_LETTERS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}  # of hybrid_override_pattern
_NEW = {"linear_attention": "mamba", "full_attention": "attention"}  # transformers 5
# How a computation is cut up and in which type it goes, what training begins with; the width of
# dense networks where there are none.
_IGNORED = (
    "chunk_size", "expand", "intermediate_size", "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap", "num_logits_to_keep", "rescale_prenorm_residual",
    "residual_in_fp32", "time_step_floor", "time_step_max", "time_step_min", "use_mamba_kernels",
)  # fmt: skip
_INFINITY = ({"__float__": "Infinity"}, float("inf"))  # as transformers 5 and 4 write it


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    kinds = _kinds(config)
    config.one_of("mlp_hidden_act", ("relu2",), default="relu2")
    config.ignore(*_IGNORED)
    config.one_of("n_shared_experts", (1,), default=1)
    shared = _network(config, "moe_shared_expert_intermediate_size")
    experts = moe(
        config,
        sigmoid_topk(config, renorm=True),
        num=config.size("n_routed_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=_network(config, "moe_intermediate_size"),
        shared=Shared(ffn=shared),
    )
    blocks = {
        "mamba": Block(attention=_mamba(config), ffn=None),
        "attention": Block(attention=replace(gqa(config), rope=None), ffn=None),
        "moe": Block(attention=None, ffn=experts),
    }
    if "mlp" in kinds:
        dense = _network(config, "intermediate_size")
        blocks["mlp"] = Block(attention=None, ffn=dense)
    spec = model(
        config,
        [blocks[kind] for kind in kinds],
        norm=RmsNorm(eps=config.first(("layer_norm_epsilon", "norm_eps"), float)),
    )
    return spec, _names(spec, _mamba(config))


def _network(config: Config, key: str) -> Ffn:
    return Ffn(intermediate=config.size(key), activation=ReluSquared())


def _kinds(config: Config) -> list[str]:
    """What each layer is: a list of names, or one letter each."""
    spelled = {
        key: [_NEW.get(kind, kind) for kind in config.items(key, str)]
        for key in ("layers_block_type", "layer_types")
        if config.has(key)
    }
    if config.has("hybrid_override_pattern"):
        pattern = config.require("hybrid_override_pattern", str)
        spelled["hybrid_override_pattern"] = [_LETTERS.get(letter, letter) for letter in pattern]
    name, kinds = next(iter(spelled.items()), ("layers_block_type", []))
    if any(other != kinds for other in spelled.values()):
        raise ModelError(f"{config.where}: {' and '.join(spelled)} differ, allowed all alike")
    num = config.size("num_hidden_layers", default=max(1, len(kinds)))
    unknown = [kind for kind in kinds if kind not in _LETTERS.values()]
    if unknown or len(kinds) != num:
        got = f"{unknown[0]!r}" if unknown else f"{len(kinds)} layers"
        raise ModelError(
            f"{config.where}: {name} has {got}, "
            f"allowed {num} of {', '.join(_LETTERS.values())} ({' '.join(_LETTERS)})"
        )
    if "moe" not in kinds:
        raise ModelError(
            f"{config.where}: {name} has no layer of experts, a dense model; allowed are"
            " Mixture-of-Experts models"
        )
    return kinds


def _mamba(config: Config) -> Mamba2:
    config.one_of("mamba_hidden_act", ("silu",), default="silu")
    config.one_of("mamba_proj_bias", (False,), default=False)
    limits: list[Any] = config.get("time_step_limit", list, [0.0, float("inf")])
    if len(limits) != 2 or limits[0] != 0 or limits[1] not in _INFINITY:
        raise ModelError(f"{config.where}: time_step_limit is {limits!r}, allowed [0.0, Infinity]")
    heads, groups = config.size("mamba_num_heads"), config.size("n_groups")
    if heads % groups:
        raise ModelError(
            f"{config.where}: n_groups is {groups}, allowed a divisor of mamba_num_heads {heads}"
        )
    return Mamba2(
        num_heads=heads,
        head_dim=config.size("mamba_head_dim"),
        num_groups=groups,
        state_dim=config.size("ssm_state_size"),
        conv_kernel=config.size("conv_kernel"),
        norm_eps=config.first(("layer_norm_epsilon", "norm_eps"), float),
        conv_bias=config.get("use_conv_bias", bool, True),
    )


# --- names ----------------------------------------------------------------------------------------


def _names(spec: ModelSpec, mamba: Mamba2) -> NameMap:
    taps = (mamba.conv_dim, mamba.conv_kernel)
    conv = TensorSource(LAYER + "mixer.conv1d.weight", (taps[0], 1, taps[1]), (Reshape(taps),))
    return NameMap(
        embed={"weight": (TensorSource("{model}embeddings.weight"),)},
        block={"input_norm.weight": at("norm.weight"), "post_norm.weight": at("norm.weight")},
        attention=linears("mixer", ("q_proj", "k_proj", "v_proj", "o_proj")),
        recurrent={
            "state_proj.weight": at("mixer.in_proj.weight"),
            "conv.weight": (conv,),
            "conv.bias": at("mixer.conv1d.bias"),
            "dt_bias": at("mixer.dt_bias"),
            "a_log": at("mixer.A_log"),
            "d": at("mixer.D"),
            "out_norm.weight": at("mixer.norm.weight"),
            "o_proj.weight": at("mixer.out_proj.weight"),
        },
        moe={
            "router.weight": at("mixer.gate.weight"),
            "router.select_bias": at("mixer.gate.e_score_correction_bias"),
            "shared.up.weight": at("mixer.shared_experts.up_proj.weight"),
            "shared.down.weight": at("mixer.shared_experts.down_proj.weight"),
        },
        expert={part: _expert(part) for part in ("up", "down")},
        ffn={part: at(f"mixer.{part}_proj.weight") for part in ("up", "down")},
        final={"norm.weight": (TensorSource("{model}norm_f.weight"),)},
        head=HEAD,
        prefixes=("backbone.", "model."),
    )


def _expert(part: str) -> tuple[TensorSource, ...]:
    """One by one, or all in one tensor."""
    stack = TensorSource(LAYER + f"mixer.experts.{part}_proj", stacked="experts")
    return (*at(f"mixer.experts.{{expert}}.{part}_proj.weight"), stack)

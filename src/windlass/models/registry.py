"""Which model types Windlass runs: config.json -> ModelSpec and NameMap."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families import (
    dbrx,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)
from windlass.models.names import NameMap
from windlass.models.quantization import read_quantization
from windlass.models.spec import ModelSpec

Family = Callable[[Config], tuple[ModelSpec, NameMap]]

FAMILIES: Mapping[str, Family] = {
    "dbrx": dbrx.read,
    "deepseek_v2": deepseek_v2.read,
    "deepseek_v3": deepseek_v3.read,
    "dots1": dots1.read,
    "ernie4_5_moe": ernie4_5_moe.read,
    "glm4_moe": glm4_moe.read,
    "gpt_oss": gpt_oss.read,
    "granitemoe": granitemoe.read,
    "minimax_m2": minimax_m2.read,
    "mixtral": mixtral.read,
    "olmoe": olmoe.read,
    "phimoe": phimoe.read,
    "qwen2_moe": qwen2_moe.read,
    "qwen3_5_moe": qwen3_5_moe.read,
    "qwen3_5_moe_text": qwen3_5_moe.read_text,
    "qwen3_moe": qwen3_moe.read,
    "qwen3_next": qwen3_next.read,
}

_DENSE = frozenset(
    "bloom cohere cohere2 ernie4_5 exaone exaone4 falcon gemma gemma2 gemma3 gemma3_text glm glm4 "
    "gpt2 gpt_neo gpt_neox gptj granite llama mistral mpt olmo olmo2 olmo3 opt phi phi3 qwen2 "
    "qwen3 seed_oss smollm3 stablelm starcoder2".split()
)

# Settings that change the mathematics of some architecture, and the values with which they do not.
# One that a family has not looked at must have such a value.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (0.0,),
    "clip_qkv": (),
    "compression_ratio": (1.0,),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (0.0,),
    "index_topk": (),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "n_group": (0, 1),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1.0,),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1.0,),
    "rotary_dim": (),
    "routed_scaling_factor": (1.0,),
    "scoring_func": (),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "sliding_window": (0,),
    "use_bias": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


def read_spec(config: Mapping[str, Any]) -> tuple[ModelSpec, NameMap]:
    """The model that a parsed config.json describes, and what its tensors are called.

    Raises ModelError for model types and settings that Windlass does not run.
    """
    outer = Config(config)
    model_type = outer.require("model_type", str)
    family, settings = FAMILIES.get(model_type), outer
    if family is None and outer.has("text_config"):
        settings = outer.section("text_config")
        family = FAMILIES.get(settings.get("model_type", str, ""))
    if family is None:
        raise _unknown(model_type)
    spec, names = family(settings)
    names = replace(names, quantization=read_quantization(_quantised(outer, settings)))
    for key in settings.unread():
        value, harmless = settings.raw[key], _HARMLESS.get(key)
        if harmless is not None and value not in harmless:
            allowed = " or ".join(repr(one) for one in (*harmless, None)).replace("None", "null")
            raise ModelError(
                f"{settings.where}: {key} is {value!r}, allowed {allowed} for {spec.family}"
            )
    return spec, names


def _quantised(outer: Config, settings: Config) -> Config:
    """The part of config.json that says how weights are stored: either, or both in one voice."""
    keys = ("quantization_config", "compression_config")
    inner, whole = ([part.raw.get(key) for key in keys] for part in (settings, outer))
    if any(inner) and any(whole) and inner != whole:
        raise ModelError(
            "config.json: quantization_config is given twice and differs, allowed one, or both"
            " the same"
        )
    return settings if any(inner) else outer


def _unknown(model_type: str) -> ModelError:
    if model_type in _DENSE:
        return ModelError(
            f"config.json: model_type is {model_type!r}, a dense model without experts; "
            "allowed are Mixture-of-Experts models"
        )
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ModelError(
        f"config.json: model_type is {model_type!r}{hint}, allowed {', '.join(FAMILIES)}"
    )

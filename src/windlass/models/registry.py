"""Which model types Windlass runs: config.json -> ModelSpec and NameMap."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from windlass.errors import ModelError, UsageError
from windlass.formats import HF_QUANT_FILE
from windlass.models.config import Config
from windlass.models.families import (
    dbrx,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    dots1,
    ernie4_5_moe,
    exaone_moe,
    gemma4,
    glm4_moe,
    gpt_oss,
    granitemoe,
    hy_v3,
    lfm2_moe,
    mellum,
    minimax_m2,
    mixtral,
    nemotron_h,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl_moe,
    solar_open,
)
from windlass.models.families.common import Family
from windlass.models.known_types import DENSE, MOE
from windlass.models.names import NameMap
from windlass.models.quantization_config import read_quantization
from windlass.models.spec import ModelSpec, Moe
from windlass.models.unread import unknown_settings

FAMILIES: Mapping[str, Family] = {
    "dbrx": dbrx.read,
    "deepseek_v2": deepseek_v2.read,
    "deepseek_v3": deepseek_v3.read,
    "deepseek_v32": deepseek_v32.read,
    "dots1": dots1.read,
    "ernie4_5_moe": ernie4_5_moe.read,
    "exaone_moe": exaone_moe.read,
    "gemma4": gemma4.read,
    "gemma4_text": gemma4.read_text,
    "glm4_moe": glm4_moe.read,
    "glm4_moe_lite": deepseek_v3.read_glm4_moe_lite,
    "glm_moe_dsa": deepseek_v32.read,
    "gpt_oss": gpt_oss.read,
    "granitemoe": granitemoe.read,
    "granitemoeshared": granitemoe.read_shared,
    "hy_v3": hy_v3.read,
    "kimi_k2": deepseek_v3.read,
    "kimi_k25": deepseek_v3.read_kimi_k25,
    "lfm2_moe": lfm2_moe.read,
    "mellum": mellum.read,
    "minimax_m2": minimax_m2.read,
    "mixtral": mixtral.read,
    "nemotron_h": nemotron_h.read,
    "olmoe": olmoe.read,
    "phimoe": phimoe.read,
    "qwen2_moe": qwen2_moe.read,
    "qwen3_5_moe": qwen3_5_moe.read,
    "qwen3_5_moe_text": qwen3_5_moe.read_text,
    "qwen3_moe": qwen3_moe.read,
    "qwen3_next": qwen3_next.read,
    "qwen3_vl_moe": qwen3_vl_moe.read,
    "qwen3_vl_moe_text": qwen3_vl_moe.read_text,
    "solar_open": solar_open.read,
}

_QUANTIZATION = ("quantization_config", "compression_config")
# A type that is nearer than this to one of ours is a slip of the pen
_NEAR = 0.88


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a config.json says. `unknown`: its settings that nothing read and that are not known to
    change nothing, as "key = value"."""

    spec: ModelSpec
    names: NameMap
    unknown: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """The same as a line for people; empty where there is nothing to say."""
        listed = ", ".join(self.unknown)
        return (f"config.json: not known, not read: {listed}",) if listed else ()


def read_spec(config: Mapping[str, Any]) -> tuple[ModelSpec, NameMap]:
    """The model that a parsed config.json describes, and what its tensors are called.

    Raises ModelError for model types and settings that Windlass does not run.
    """
    found = read_description(config)
    return found.spec, found.names


def read_description(config: Mapping[str, Any], *, drafts: bool = False) -> ModelDescription:
    """`read_spec`, and what it left unread. `drafts`: with the layer that predicts further tokens;
    UsageError where there is none."""
    outer = Config(config)
    model_type = outer.require("model_type", str)
    family, settings = FAMILIES.get(model_type), outer
    if family is None and outer.has("text_config"):
        settings = outer.section("text_config")
        family = FAMILIES.get(settings.get("model_type", str, ""))
    if family is None:
        raise _unsupported(model_type, settings.get("model_type", str, model_type))
    spec, names = family(settings)
    if outer.has("text_config"):
        settings = outer.section("text_config")
    if outer.get("tie_word_embeddings", bool, False):
        spec = replace(spec, tied_head=True)  # the flag may stand outside, inside, or in both
    for part in (outer, settings):
        part.ignore(*_QUANTIZATION, HF_QUANT_FILE)  # whose reader is strict by itself
    unknown = unknown_settings(outer, spec.family)
    names = replace(names, quantization=read_quantization(_quantised(outer, settings)))
    if drafts:
        spec = _with_drafts(spec, names, settings)
    return ModelDescription(spec, names, unknown)


def _with_drafts(spec: ModelSpec, names: NameMap, settings: Config) -> ModelSpec:
    """The first layer for multi-token prediction has experts, as the last ones before it."""
    if not names.join or settings.get("num_nextn_predict_layers", int, 0) < 1:
        raise UsageError(
            "speculative_config: method: got 'mtp', allowed ngram for this checkpoint:"
            f" {settings.where} describes no layer for multi-token prediction that is known"
            " (num_nextn_predict_layers of DeepSeek-V3, GLM-4.5 and those like them)"
        )
    last = next(block for block in reversed(spec.blocks) if isinstance(block.ffn, Moe))
    return replace(spec, blocks=(*spec.blocks, replace(last, drafts=True)))


def _quantised(outer: Config, settings: Config) -> Config:
    """The part of config.json that says how weights are stored: either, or both in one voice."""
    inner, whole = ([part.raw.get(key) for key in _QUANTIZATION] for part in (settings, outer))
    if any(inner) and any(whole) and inner != whole:
        raise ModelError(
            "config.json: quantization_config is given twice and differs, allowed one, or both"
            " the same"
        )
    return settings if any(inner) else outer


def _unsupported(model_type: str, inner: str) -> ModelError:
    """`inner`: the type of the text model, where it has one of its own."""
    what = f"config.json: model_type is {model_type!r}"
    if inner != model_type:
        what += f" with the text model {inner!r}"
    if inner in MOE or model_type in MOE:
        what += ", which is not supported yet"
    elif inner in DENSE or model_type in DENSE:
        return ModelError(
            f"{what}, a dense model without experts; allowed are Mixture-of-Experts models"
        )
    else:
        what += _nearest(inner)
    return ModelError(f"{what}, allowed {', '.join(FAMILIES)}")


def _nearest(model_type: str) -> str:
    """` (did you mean x?)` for a misspelt type, or nothing. Another number is another model."""
    own = model_type.lower().replace("-", "_")
    alike = [name for name in FAMILIES if re.findall(r"\d+", name) == re.findall(r"\d+", own)]
    near = difflib.get_close_matches(own, alike, n=1, cutoff=_NEAR)
    return f" (did you mean {near[0]}?)" if near else ""

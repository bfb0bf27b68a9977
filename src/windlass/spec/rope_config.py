"""Rotary positions of a `config.json`: both spellings in the wild -> `Rope`. Knows no torch.

transformers 5 writes `rope_parameters` (flat, or nested by layer type); transformers 4 wrote
`rope_theta` and `rope_scaling`, whose kind is under `type` or `rope_type`.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from windlass.errors import ModelError
from windlass.spec.model import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    Rope,
    Scaling,
    YarnScaling,
)

KINDS = ("default", "linear", "llama3", "longrope", "yarn")

# Keys whose meaning is known. `finetuned` and the multi-axis sections (all axes are equal for text)
# change nothing; a key outside this set might, so it is refused.
_KNOWN = frozenset(
    "type rope_type rope_theta partial_rotary_factor factor original_max_position_embeddings "
    "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor "
    "short_mscale long_mscale low_freq_factor high_freq_factor finetuned mrope_section "
    "mrope_interleaved".split()
)


class HasRaw(Protocol):
    """What is needed of a configuration: its JSON object."""

    @property
    def raw(self) -> Mapping[str, Any]: ...


def read_rope(
    config: HasRaw,
    *,
    dim: int,
    interleaved: bool = False,
    layer_type: str | None = None,
    default_theta: float = 10_000.0,
) -> Rope:
    """Rotary positions over the first `dim` dimensions of a head.

    `layer_type` chooses among nested parameters and is ignored where they are flat. Raises
    ModelError for a kind that Windlass does not compute, and for malformed parameters.
    """
    if dim < 2 or dim % 2:
        raise ModelError(f"rotary dimensions: got {dim}, allowed an even number of at least 2")
    params = _parameters(config.raw, layer_type)
    theta = _number(params, "rope_theta", default=config.raw.get("rope_theta") or default_theta)
    if theta <= 1:
        raise ModelError(f"rope_theta: got {theta}, allowed a number above 1")
    scaling = _scaling(params, config.raw, dim)
    return Rope(dim=dim, theta=theta, scaling=scaling, interleaved=interleaved)


def rotary_dim(
    config: HasRaw, head_dim: int, *, default: float = 1.0, layer_type: str | None = None
) -> int:
    """How many dimensions of a head are rotated: `partial_rotary_factor` (default `default`) of
    `head_dim`, rounded down."""
    params = _parameters(config.raw, layer_type)
    outer = config.raw.get("partial_rotary_factor")
    factor = _number(params, "partial_rotary_factor", default=default if outer is None else outer)
    if not 0 < factor <= 1:
        raise ModelError(f"partial_rotary_factor: got {factor}, allowed above 0 and at most 1")
    return int(head_dim * factor)


def mla_scale(config: HasRaw, qk_dim: int) -> float:
    """Scale of the scores of latent attention: 1 / sqrt(qk_dim), times YaRN's mscale squared where
    the checkpoint has `mscale_all_dim`."""
    params = _parameters(config.raw, None)
    scale: float = qk_dim**-0.5
    all_dim = _optional(params, "mscale_all_dim")
    if _kind(params) == "default" or not all_dim:
        return scale
    return scale * _mscale(_number(params, "factor"), all_dim) ** 2


def _parameters(raw: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    # transformers lets `rope_scaling` win where both are present
    params = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(params, Mapping):
        raise ModelError(f"rope_parameters: got {params!r}, allowed an object")
    nested = [key for key, value in params.items() if isinstance(value, Mapping)]
    if nested:
        if layer_type not in nested:
            raise ModelError(
                f"rope_parameters: got layer types {', '.join(sorted(nested))}, "
                f"none for {layer_type or 'a model without layer types'}"
            )
        params = params[layer_type]
    unknown = sorted(set(params) - _KNOWN)
    if unknown:
        raise ModelError(
            f"rope_parameters: unknown key {unknown[0]!r}, allowed {', '.join(sorted(_KNOWN))}"
        )
    return params


def _kind(params: Mapping[str, Any]) -> str:
    kind = params.get("rope_type") or params.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in KINDS:
        raise ModelError(f"rope_type: got {kind!r}, allowed {', '.join(KINDS)}")
    return str(kind)


def _scaling(params: Mapping[str, Any], raw: Mapping[str, Any], dim: int) -> Scaling:
    kind = _kind(params)
    if kind == "default":
        return NoScaling()
    if kind == "linear":
        return LinearScaling(_positive(params, "factor"))
    if kind == "llama3":
        low, high = _positive(params, "low_freq_factor"), _positive(params, "high_freq_factor")
        if low >= high:
            raise ModelError(f"low_freq_factor: got {low}, allowed below high_freq_factor {high}")
        return Llama3Scaling(
            factor=_positive(params, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max=_original_max(params, raw),
        )
    return _yarn(params, raw) if kind == "yarn" else _longrope(params, raw, dim)


def _yarn(params: Mapping[str, Any], raw: Mapping[str, Any]) -> YarnScaling:
    original_max = _original_max(params, raw)
    factor = _factor(params, raw, original_max)
    attention_factor = _optional(params, "attention_factor")
    if attention_factor is None:
        top, bottom = _optional(params, "mscale"), _optional(params, "mscale_all_dim")
        both = top and bottom
        attention_factor = (
            _mscale(factor, top) / _mscale(factor, bottom) if both else _mscale(factor, 1.0)
        )
    truncate = params.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ModelError(f"truncate: got {truncate!r}, allowed true or false")
    return YarnScaling(
        factor=factor,
        original_max=original_max,
        beta_fast=_optional(params, "beta_fast") or 32.0,
        beta_slow=_optional(params, "beta_slow") or 1.0,
        attention_factor=attention_factor,
        truncate=truncate,
    )


def _longrope(params: Mapping[str, Any], raw: Mapping[str, Any], dim: int) -> LongRopeScaling:
    original_max = _original_max(params, raw)
    if original_max < 2:
        raise ModelError(f"original_max_position_embeddings: got {original_max}, allowed 2 or more")
    factor = _factor(params, raw, original_max)
    common = _optional(params, "attention_factor")
    if common is None:
        common = math.sqrt(1 + math.log(factor) / math.log(original_max)) if factor > 1 else 1.0
    short, long = _optional(params, "short_mscale"), _optional(params, "long_mscale")
    return LongRopeScaling(
        short=_factors(params, "short_factor", dim),
        long=_factors(params, "long_factor", dim),
        original_max=original_max,
        short_attention_factor=common if short is None else short,
        long_attention_factor=common if long is None else long,
    )


def _mscale(factor: float, weight: float | None) -> float:
    """YaRN's correction of the softmax temperature."""
    return 0.1 * (weight or 0.0) * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original_max(params: Mapping[str, Any], raw: Mapping[str, Any]) -> int:
    # Phi checkpoints keep it beside the parameters, and there it wins
    for source, name in (
        (raw, "original_max_position_embeddings"),
        (params, "original_max_position_embeddings"),
        (raw, "max_position_embeddings"),
    ):
        value = source.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name}: got {value!r}, allowed a positive integer")
            return value
    raise ModelError("original_max_position_embeddings: missing")


def _factor(params: Mapping[str, Any], raw: Mapping[str, Any], original_max: int) -> float:
    if params.get("factor") is not None:
        return _positive(params, "factor")
    return _positive(raw, "max_position_embeddings") / original_max


def _factors(params: Mapping[str, Any], name: str, dim: int) -> tuple[float, ...]:
    values = params.get(name)
    is_list = isinstance(values, (list, tuple)) and len(values) == dim // 2
    if not is_list or not all(_is_number(value) and value > 0 for value in values or ()):
        raise ModelError(f"{name}: allowed a list of {dim // 2} positive numbers")
    return tuple(float(value) for value in values or ())


def _positive(params: Mapping[str, Any], name: str) -> float:
    value = _number(params, name)
    if value <= 0:
        raise ModelError(f"{name}: got {value}, allowed a positive number")
    return value


def _number(params: Mapping[str, Any], name: str, *, default: Any = None) -> float:
    value = params.get(name)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"rope_parameters: {name} is missing")
    if not _is_number(value):
        raise ModelError(f"{name}: got {value!r}, allowed a number")
    return float(value)


def _optional(params: Mapping[str, Any], name: str) -> float | None:
    return None if params.get(name) is None else _number(params, name)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""Rotary positions of a `config.json`: both spellings in the wild -> `Rope`. Knows no torch.

transformers 5 writes `rope_parameters` (flat, or nested by layer type); transformers 4 wrote
`rope_theta` and `rope_scaling`, whose kind is under `type` or `rope_type`.
"""

import math
from collections.abc import Sequence

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    ProportionalScaling,
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


def read_rope(
    config: Config,
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
    params = _parameters(config, layer_type)
    theta, scaling = _theta(params, config, default_theta), _scaling(params, config, dim)
    return Rope(dim=dim, theta=theta, scaling=scaling, interleaved=interleaved)


def proportional_rope(config: Config, *, dim: int, layer_type: str) -> Rope:
    """Rotary positions of the kind "proportional", over heads of `dim` dimensions."""
    share = rotary_dim(config, dim, layer_type=layer_type)
    params = _parameters(config, layer_type)
    _kind(params, ("proportional",))
    scaling = ProportionalScaling(pairs=share // 2, factor=_positive(params, "factor", 1.0))
    return Rope(dim=dim, theta=_theta(params, config, 10_000.0), scaling=scaling)


def rotary_dim(
    config: Config, head_dim: int, *, default: float = 1.0, layer_type: str | None = None
) -> int:
    """How many dimensions of a head are rotated: `partial_rotary_factor` (default `default`) of
    `head_dim`, rounded down."""
    outer = config.get("partial_rotary_factor", float, default)
    params = _parameters(config, layer_type)
    factor = params.get("partial_rotary_factor", float, outer)
    if factor != outer and config.has("partial_rotary_factor"):
        raise ModelError(
            f"{config.where}: partial_rotary_factor is {outer}, in {params.where} {factor},"
            " allowed one value for both"
        )
    if not 0 < factor <= 1:
        raise ModelError(
            f"{config.where}: partial_rotary_factor is {factor}, allowed above 0 and at most 1"
        )
    return int(head_dim * factor)


def mla_scale(config: Config, qk_dim: int) -> float:
    """Scale of the scores of latent attention: 1 / sqrt(qk_dim), times YaRN's mscale squared where
    the checkpoint has `mscale_all_dim`."""
    params = _parameters(config, None)
    scale: float = qk_dim**-0.5
    all_dim = params.get("mscale_all_dim", float, 0.0)
    if _kind(params) == "default" or not all_dim:
        return scale
    return scale * _mscale(_positive(params, "factor"), all_dim) ** 2


def _parameters(config: Config, layer_type: str | None) -> Config:
    # transformers lets `rope_scaling` win where it says anything
    spellings = ("rope_scaling", "rope_parameters")
    found = next((name for name in spellings if config.get(name, dict, {})), None)
    if found is None:
        return Config({}, where=config.where)
    params = config.section(found)
    nested = [key for key, value in params.raw.items() if isinstance(value, dict)]
    if nested:
        if layer_type not in nested:
            raise ModelError(
                f"{params.where}: got layer types {', '.join(sorted(nested))}, "
                f"none for {layer_type or 'a model without layer types'}"
            )
        params = params.section(layer_type)
    unknown = sorted(set(params.raw) - _KNOWN)
    if unknown:
        raise ModelError(
            f"{params.where}: unknown key {unknown[0]!r}, allowed {', '.join(sorted(_KNOWN))}"
        )
    return params


def _theta(params: Config, config: Config, default: float) -> float:
    theta = params.get("rope_theta", float, config.get("rope_theta", float, default))
    if theta <= 1:
        raise ModelError(f"{config.where}: rope_theta is {theta}, allowed a number above 1")
    return theta


def _kind(params: Config, allowed: Sequence[str] = KINDS) -> str:
    kind = params.get("rope_type", str, params.get("type", str, "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in allowed:
        raise ModelError(f"{params.where}: rope_type is {kind!r}, allowed {', '.join(allowed)}")
    return kind


def _scaling(params: Config, config: Config, dim: int) -> Scaling:
    match _kind(params):
        case "default":
            return NoScaling()
        case "linear":
            return LinearScaling(_positive(params, "factor"))
        case "llama3":
            return _llama3(params, config)
        case "yarn":
            return _yarn(params, config)
        case _:
            return _longrope(params, config, dim)


def _llama3(params: Config, config: Config) -> Llama3Scaling:
    low, high = _positive(params, "low_freq_factor"), _positive(params, "high_freq_factor")
    if low >= high:
        raise ModelError(
            f"{params.where}: low_freq_factor is {low}, allowed below high_freq_factor {high}"
        )
    return Llama3Scaling(
        factor=_positive(params, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max=_original_max(params, config),
    )


def _yarn(params: Config, config: Config) -> YarnScaling:
    original_max = _original_max(params, config)
    factor = _factor(params, config, original_max)
    top, bottom = (params.get(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    both = top and bottom
    inferred = _mscale(factor, top) / _mscale(factor, bottom) if both else _mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max=original_max,
        beta_fast=params.get("beta_fast", float, 0.0) or 32.0,
        beta_slow=params.get("beta_slow", float, 0.0) or 1.0,
        attention_factor=params.get("attention_factor", float, inferred),
        truncate=params.get("truncate", bool, True),
    )


def _longrope(params: Config, config: Config, dim: int) -> LongRopeScaling:
    original_max = _original_max(params, config)
    factor = _factor(params, config, original_max)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original_max)) if factor > 1 else 1.0
    common = params.get("attention_factor", float, inferred)
    return LongRopeScaling(
        short=_factors(params, "short_factor", dim),
        long=_factors(params, "long_factor", dim),
        original_max=original_max,
        short_attention_factor=params.get("short_mscale", float, common),
        long_attention_factor=params.get("long_mscale", float, common),
    )


def _mscale(factor: float, weight: float) -> float:
    """YaRN's correction of the softmax temperature."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original_max(params: Config, config: Config) -> int:
    # Phi checkpoints keep it beside the parameters, and there it wins
    name = "original_max_position_embeddings"
    source, name = next(
        ((source, name) for source in (config, params) if source.has(name)),
        (config, "max_position_embeddings"),
    )
    value = source.require(name, int)
    if params.raw.get(name) == value:
        params.ignore(name)
    if value < 2:
        raise ModelError(f"{source.where}: {name} is {value}, allowed at least 2")
    return value


def _factor(params: Config, config: Config, original_max: int) -> float:
    if params.has("factor"):
        return _positive(params, "factor")
    return config.size("max_position_embeddings") / original_max


def _factors(params: Config, name: str, dim: int) -> tuple[float, ...]:
    values = params.items(name, float)
    if len(values) != dim // 2 or min(values) <= 0:
        raise ModelError(f"{params.where}: {name}: allowed {dim // 2} positive numbers")
    return values


def _positive(params: Config, name: str, default: float | None = None) -> float:
    value = params.require(name, float) if default is None else params.get(name, float, default)
    if value <= 0:
        raise ModelError(f"{params.where}: {name} is {value}, allowed a positive number")
    return value

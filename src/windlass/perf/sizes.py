"""What a checkpoint, the process and its kernels weigh: where plans and predictions begin."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from windlass.hardware.profile import HardwareProfile
from windlass.ids import Part
from windlass.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels that a pass runs on: their name and threads."""

    name: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSizes:
    """What a device above the host weighs, in bytes."""

    budget_bytes: int  # that may be taken of it in all
    process_bytes: int  # there before anything is allocated: its context, kernels, other programs
    slot_bytes: Mapping[Part, int]  # as its slots are laid out
    backend: str  # the name of its kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the checkpoint and the process weigh, in bytes."""

    process_bytes: int  # measured before anything was allocated
    slot_bytes: Mapping[Part, int]
    num_parts: Mapping[Part, int]
    bytes_per_token: int  # of the KV cache, all layers
    staged_bytes_per_token: int  # of it, where layers that are alike share their place
    kv_cache_dtype: str  # which they are kept in
    bytes_per_position: int  # tables of rotary positions
    row_buffer_bytes: int  # where the embedding's rows are read one by one
    state_bytes: int  # recurrent state of a sequence, all layers
    forecast_bytes: int = 0  # what it takes to foresee experts of a few sequences
    backend: Backend
    # how matrices are stored, as hardware profiles call it; "bfloat16" of parts that are absent
    weight_kinds: Mapping[Part, str] = field(default_factory=dict)
    drafts: int = 0  # guessed tokens of a sequence in a pass at most, each with logits
    draft_bytes_per_token: int = 0  # of tokens in the KV cache: what guesses are made from
    device: DeviceSizes | None = None  # that passes compute on, if it is not the host


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, what it weighs, and the machine that it is to run on."""

    spec: ModelSpec
    sizes: Sizes
    profile: HardwareProfile

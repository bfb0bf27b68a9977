"""The Plan: every choice of a run, as one frozen record. Who made it does not matter."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from windlass.errors import UsageError
from windlass.ids import Home, HomeShares, Part
from windlass.units import counted, format_bytes

Schedule = Literal["module-based", "model-based"]
GeneratedExperts = Literal["tiles", "rows"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
HOST = "host"
PAGE_TOKENS = 32  # of a page that is planned
PART_WORDS: Mapping[Part, str] = {
    Part.EXPERT: "experts", Part.BLOCK: "dense blocks", Part.FFN: "dense networks",
    Part.HEAD: "head", Part.JOIN: "join of drafts", Part.FINAL: "last norm",
    Part.EMBED: "embedding",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSlots:
    """Room for parts of one kind in a memory. What the checkpoint has of them is recorded for
    whoever replays the plan; None where an old plan file does not say it."""

    part: Part
    slots: int
    slot_bytes: int | None
    num_parts: int | None  # in the checkpoint

    @property
    def num_bytes(self) -> int:
        return self.slots * (self.slot_bytes or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """What a plan puts into one memory. Sizes in bytes; the disk is no tier: all weights are there
    anyway."""

    name: str
    budget_bytes: int  # what all that follows may take
    process_bytes: int  # there before anything is allocated: of the host, Python and its libraries
    activation_bytes: int  # upper bound of what one pass allocates, with the allocator's slack
    parts: tuple[PartSlots, ...]  # one entry for each kind of part that the checkpoint has
    kv_pages: int
    kv_page_bytes: int
    state_slots: int  # sequences that can hold recurrent state at once; 0 if the model has none
    total_bytes: int  # what the tier adds up to; at most `budget_bytes`
    forecast_bytes: int = 0  # most that is kept to foresee which experts come
    kept_states: int = 0  # recurrent states beside `state_slots`, of prompts that may go on

    @property
    def slots(self) -> dict[Part, int]:
        """Slots by kind of part."""
        return {own.part: own.slots for own in self.parts}

    def of(self, part: Part) -> PartSlots:
        """The room for one kind; none of a kind that the checkpoint does not have."""
        nothing = PartSlots(part=part, slots=0, slot_bytes=0, num_parts=0)
        return next((own for own in self.parts if own.part is part), nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Counts in sequences or tokens. `tiers`: memories that hold something, the host first."""

    tiers: tuple[TierPlan, ...]
    max_model_len: int  # tokens that one sequence may have, prompt and output
    page_tokens: int
    kv_cache_dtype: str  # what keys and values are kept in; never "auto"
    max_num_seqs: int
    max_num_batched_tokens: int
    micro_batch_tokens: int
    groups: int = 1  # of a pass's micro-batches, each with experts apart: attention beside them
    mixed_prefill_tokens: int | None = None  # prompt tokens beside decoding ones; 0: waves
    burst_tokens: int = 0  # of a sequence before the next, while few decode; 0: all in every pass
    burst_max_seqs: int = 0  # that few are
    prefix_caching: bool  # whether prompts that begin alike are computed once
    read_threads: int
    schedule: Schedule = "module-based"  # what a pass is: all tokens, or one micro-batch
    overlap: bool = True  # reads go on beside computation; off only to show what it brings
    # Share of the sequences, 0 to 1, whose attention the host computes and whose keys and values it
    # keeps, beside a device that does so for the others (MoE-Gen's omega). 0 without a device
    host_attention: float = 0.0
    # Share of the sequences, 0 to 1, whose keys and values are in the host's memory and come to the
    # device that attends, layer by layer. Bits do not depend on it. 0 without a device
    kv_offloading_share: float = 0.0
    # Share of each layer's experts, 0 to 1, that the host computes for generated rows, beside a
    # device that does all others and prompts. 0 without a device
    host_experts: float = 0.0
    # How a device computes experts of generated rows: in tiles of rows, as those of prompts, or
    # each row by itself, which suits few. Other sums, so other bits
    generated_experts: GeneratedExperts = "tiles"

    @property
    def host(self) -> TierPlan:
        """The tier of the process's own memory."""
        return next(tier for tier in self.tiers if tier.name == HOST)

    @property
    def above(self) -> TierPlan | None:
        """The tier of a device above the host, in whose memory passes then work."""
        return next((tier for tier in self.tiers if tier.name != HOST), None)

    @property
    def top(self) -> TierPlan:
        """The tier that passes take weights from."""
        return self.above or self.host

    @property
    def homes(self) -> dict[Home, TierPlan]:
        """Where sequences may have their keys and values, and the tier whose pages these are.
        Recurrent states are those of `top`."""
        share, found = self.shares, {}
        if share.below < 1:
            found[Home.DEVICE] = self.top
        if share.host > 0:
            found[Home.HOST] = self.host
        if share.streamed > 0:
            found[Home.STREAMED] = self.host
        return found

    @property
    def shares(self) -> HomeShares:
        """Of the sequences by their home."""
        return HomeShares(self.host_attention, self.kv_offloading_share)

    @property
    def pages(self) -> dict[Home, int]:
        """Of each home, those of the host as its sequences are."""
        share, host = self.shares, self.host.kv_pages
        found = dict.fromkeys(self.homes, self.top.kv_pages)
        if Home.STREAMED in found:
            found[Home.STREAMED] = round(host * share.streamed / share.below)
        if Home.HOST in found:
            found[Home.HOST] = host - found.get(Home.STREAMED, 0)
        return found

    @property
    def host_computes(self) -> bool:
        """Whether the host has a part of what passes compute, beside a device."""
        return self.host_attention > 0 or self.host_experts > 0

    @property
    def kv_pages(self) -> int:
        """Of all memories."""
        return sum(tier.kv_pages for tier in self.tiers)

    @property
    def kept_states(self) -> int:
        """Recurrent states that are kept of prompts, for those that go on with them."""
        return self.top.kept_states

    @property
    def finds_prefixes(self) -> bool:
        """Whether prompts go on from what others have computed."""
        return self.prefix_caching or self.kept_states > 0

    @property
    def pass_rows(self) -> int:
        """Most tokens that go through the model together."""
        if self.schedule == "module-based":
            return self.max_num_batched_tokens
        return min(self.max_num_batched_tokens, self.micro_batch_tokens)

    def to_json(self) -> dict[str, Any]:
        """All values by name, tiers and parts by theirs; `from_json` reads them back."""
        document = asdict(self)
        if self.above is None:
            for name in _OF_DEVICES:
                del document[name]  # there is nothing to say
        for tier in document["tiers"]:
            tier["parts"] = {own.pop("part").value: own for own in tier["parts"]}
        document["tiers"] = {tier.pop("name"): tier for tier in document["tiers"]}
        return document

    @classmethod
    def from_json(cls, document: object, *, what: str = "plan") -> "Plan":
        """Strict: every value there, of its type, and no other. Reads the flat form too that files
        had before plans had tiers, and what they had before bursts and groups. UsageError names
        `what`."""
        if isinstance(document, Mapping):
            document = {**_BEFORE, **document}
            document = document if "tiers" in document else _with_tiers(document, what)
        own = _values(cls, document, what, nested=("tiers",))
        tiers = own["tiers"] = tuple(
            _read_tier(name, tier, f"{what}: tiers.{name}")
            for name, tier in _object(own["tiers"], f"{what}: tiers").items()
        )
        if HOST not in [tier.name for tier in tiers]:
            raise UsageError(f"{what}: tiers.{HOST} is missing")
        return cls(**own)

    def lines(self) -> list[str]:
        """The plan for people: what the budget holds, and what a pass may take."""
        prefixes = "computed once" if self.prefix_caching else "not looked for"
        if self.kept_states:
            prefixes = f"computed once where a recurrent state was kept ({self.kept_states} are)"
        elif self.top.state_slots:
            prefixes += " (the model has recurrent layers)"
        return [
            *(line for tier in self.tiers for line in self._tier_lines(tier)),
            f"plan: up to {counted(self.max_num_seqs, 'sequence')} and"
            f" {self.max_num_batched_tokens} tokens per pass; a sequence may have"
            f" {self.max_model_len} tokens; shared prompt prefixes {prefixes}",
            *_burst_lines(self),
            *self._baseline_lines(),
        ]

    def _tier_lines(self, tier: TierPlan) -> list[str]:
        name = "" if tier.name == HOST else f"{tier.name}: "
        return [
            f"plan: {name}{format_bytes(tier.total_bytes)} of {format_bytes(tier.budget_bytes)}:"
            f" process {format_bytes(tier.process_bytes)}, activations"
            f" {format_bytes(tier.activation_bytes)}, KV cache"
            f" {format_bytes(tier.kv_pages * tier.kv_page_bytes)}"
            f" ({tier.kv_pages * self.page_tokens} tokens in {self.kv_cache_dtype})"
            + (f", forecast {format_bytes(tier.forecast_bytes)}" if tier.forecast_bytes else ""),
            f"plan: {name}"
            + ", ".join(_held(own) for own in tier.parts if own.part is not Part.FINAL),
        ]

    def _baseline_lines(self) -> list[str]:
        """What is not the default."""
        lines = []
        if self.groups > 1:
            lines.append(
                f"plan: up to {self.groups} groups of rows a pass, attention of each beside the"
                " experts of the others; experts are read once for all where a layer's fit"
            )
        if self.schedule == "model-based":
            lines.append(
                f"plan: model-based: every {self.micro_batch_tokens} tokens pass through the model"
                " by themselves"
            )
        if self.host_attention:
            lines.append(
                f"plan: the host computes attention of {100 * self.host_attention:.0f} % of the"
                " sequences, beside the device"
            )
        if self.kv_offloading_share:
            lines.append(
                f"plan: keys and values of {100 * self.kv_offloading_share:.0f} % of the sequences"
                " are in the host's memory, and go to the device layer by layer"
            )
        if self.host_experts:
            lines.append(
                f"plan: the host computes {100 * self.host_experts:.0f} % of the experts for"
                " generated tokens, beside the device"
            )
        if self.generated_experts == "rows":
            lines.append(
                "plan: generated tokens go through experts one by one, prompts in tiles of rows"
            )
        if not self.overlap:
            lines.append("plan: no overlap: weights are read while nothing computes")
        return lines


def _burst_lines(plan: Plan) -> list[str]:
    if not plan.burst_tokens or plan.burst_max_seqs < 2:
        return []
    few = plan.burst_max_seqs
    return [
        f"plan: up to {few} sequences decode one after the other,"
        f" {counted(plan.burst_tokens, 'token')} a turn: one waits for at most"
        f" {counted((few - 1) * plan.burst_tokens, 'pass', 'passes')}; more than {few}"
        " decode together"
    ]


def _held(own: PartSlots) -> str:
    words = PART_WORDS[own.part]
    if own.part is Part.EMBED:
        return f"{words} {'resident' if own.slots else 'rows read from disk'}"
    of = "" if own.num_parts is None else f" of {own.num_parts}"
    if own.part is not Part.EXPERT:
        return f"{words} {own.slots}{of}"
    return f"{words} resident {own.slots}{of} ({format_bytes(own.num_bytes)})"


# --- reading --------------------------------------------------------------------------------------


_OF_DEVICES = "host_attention", "kv_offloading_share", "host_experts", "generated_experts"
_BEFORE = {
    "burst_tokens": 0, "burst_max_seqs": 0, "groups": 1, "host_attention": 0.0,
    "kv_offloading_share": 0.0, "host_experts": 0.0, "generated_experts": "tiles",
}  # fmt: skip


def _read_tier(name: str, document: object, what: str) -> TierPlan:
    if isinstance(document, Mapping):
        # before anything was foreseen, and before states were kept
        document = {"forecast_bytes": 0, "kept_states": 0, **document}
    own = _values(TierPlan, document, what, given=("name",), nested=("parts",))
    parts = _object(own["parts"], f"{what}.parts")
    if unknown := sorted(set(parts) - set(PART_WORDS)):
        raise UsageError(f"{what}.parts: unknown key: {unknown[0]}, allowed {', '.join(Part)}")
    own["parts"] = tuple(
        PartSlots(
            part=Part(part), **_values(PartSlots, one, f"{what}.parts.{part}", given=("part",))
        )
        for part, one in ((part, parts[part]) for part in PART_WORDS if part in parts)
    )
    return TierPlan(name=name, **own)


def _object(document: object, what: str) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise UsageError(f"{what}: got a {type(document).__name__}, allowed an object")
    return document


def _values(
    record: type, document: object, what: str, *, given: Sequence[str] = (),
    nested: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Values of the fields of `record` but those `given`: all of them, no other, each of its type;
    those `nested` are not looked into."""
    document = _object(document, what)
    known = {one.name: one.type for one in fields(record) if one.name not in given}
    if unknown := sorted(set(map(str, document)) - set(known)):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"{what}: unknown key: {unknown[0]}{hint}")
    if missing := [name for name in known if name not in document]:
        raise UsageError(f"{what}: {missing[0]} is missing")
    for name, kind in known.items():
        if name not in nested:
            _check_value(document[name], kind, f"{what}: {name}")
    return dict(document)


def _check_value(value: object, kind: Any, what: str) -> None:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{what}: got {value!r}, allowed {', '.join(get_args(kind))}")
        return
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        name = getattr(kind, "__name__", str(kind))
        raise UsageError(f"{what}: got {value!r}, allowed a value of type {name}")
    if isinstance(value, int | float) and value < 0:
        raise UsageError(f"{what}: got {value}, allowed 0 or more")


# Names that the flat form has for what the host's tier and its parts hold: of a part its slots,
# their bytes and the checkpoint's number of parts. Of the last norm it says nothing.
_FLAT_PARTS = {
    Part.EXPERT: ("expert_slots", "expert_slot_bytes", "num_experts"),
    Part.BLOCK: ("block_slots", "block_slot_bytes", "num_blocks"),
    Part.FFN: ("ffn_slots", "ffn_slot_bytes", None),
    Part.HEAD: ("head_slots", "head_slot_bytes", "num_head_chunks"),
}
_FLAT_TIER = (
    "process_bytes", "activation_bytes", "kv_pages", "kv_page_bytes", "state_slots", "total_bytes",
)  # fmt: skip


def _with_tiers(document: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A document of the flat form in today's."""
    flat = [name for names in _FLAT_PARTS.values() for name in names if name]
    flat += [*_FLAT_TIER, "host_memory", "resident_embedding"]
    if missing := [name for name in flat if name not in document]:
        raise UsageError(f"{what}: {missing[0]} is missing")
    parts = {
        part.value: {
            "slots": document[slots], "slot_bytes": document[slot_bytes],
            "num_parts": document[num_parts] if num_parts else None,
        }
        for part, (slots, slot_bytes, num_parts) in _FLAT_PARTS.items()
        if document[slot_bytes] != 0  # the checkpoint has such parts
    }  # fmt: skip
    embedding = document["resident_embedding"]
    _check_value(embedding, bool, f"{what}: resident_embedding")
    for part, slots in ((Part.EMBED, int(embedding)), (Part.FINAL, 1)):
        parts[part.value] = {"slots": slots, "slot_bytes": None, "num_parts": 1}
    host = {name: document[name] for name in _FLAT_TIER}
    host |= {"budget_bytes": document["host_memory"], "parts": parts}
    others = {name: value for name, value in document.items() if name not in flat}
    return {**others, "tiers": {HOST: host}}

"""The Plan: every choice of a run, as one frozen record. Who made it does not matter."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes in bytes, counts in slots, sequences, rows or tokens."""

    host_memory: int  # budget of the whole process
    process_bytes: int  # Python, torch and tokenizer, measured before anything was allocated
    activation_bytes: int  # upper bound of what one pass allocates, with the allocator's slack
    expert_slots: int
    block_slots: int
    ffn_slots: int
    head_slots: int
    resident_embedding: bool
    kv_pages: int
    page_tokens: int
    state_slots: int  # sequences that can hold recurrent state at once; 0 if the model has none
    max_num_seqs: int
    max_num_batched_tokens: int
    micro_batch_tokens: int
    read_threads: int
    expert_slot_bytes: int
    block_slot_bytes: int
    ffn_slot_bytes: int
    head_slot_bytes: int
    kv_page_bytes: int
    total_bytes: int  # what the plan adds up to; at most host_memory

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

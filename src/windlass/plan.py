"""The Plan: every choice of a run, as one frozen record. Who made it does not matter."""

from dataclasses import asdict, dataclass
from typing import Any

from windlass.units import format_bytes


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
    max_model_len: int  # tokens that one sequence may have, prompt and output
    page_tokens: int
    state_slots: int  # sequences that can hold recurrent state at once; 0 if the model has none
    max_num_seqs: int
    max_num_batched_tokens: int
    micro_batch_tokens: int
    mixed_prefill_tokens: int | None = None  # prompt rows of a pass that also decodes, at most
    prefix_caching: bool  # whether prompts that begin alike are computed once
    read_threads: int
    expert_slot_bytes: int
    block_slot_bytes: int
    ffn_slot_bytes: int
    head_slot_bytes: int
    kv_page_bytes: int
    kv_cache_dtype: str  # what keys and values are kept in; never "auto"
    total_bytes: int  # what the plan adds up to; at most host_memory
    num_experts: int  # parts of each kind in the checkpoint
    num_blocks: int
    num_head_chunks: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people: what the budget holds, and what a pass may take."""
        kv_bytes = self.kv_pages * self.kv_page_bytes
        embedding = "in memory" if self.resident_embedding else "rows read from disk"
        prefixes = "computed once" if self.prefix_caching else "not looked for"
        if self.state_slots:  # a state is that of a sequence's last token, none is kept of a prefix
            prefixes += " (the model has recurrent layers)"
        return [
            f"plan: {format_bytes(self.total_bytes)} of {format_bytes(self.host_memory)}: process"
            f" {format_bytes(self.process_bytes)}, activations"
            f" {format_bytes(self.activation_bytes)}, keys and values {format_bytes(kv_bytes)}"
            f" ({self.kv_pages * self.page_tokens} tokens in {self.kv_cache_dtype})",
            f"plan: experts in memory {self.expert_slots} of {self.num_experts}"
            f" ({format_bytes(self.expert_slots * self.expert_slot_bytes)}), dense blocks"
            f" {self.block_slots} of {self.num_blocks}, head {self.head_slots} of"
            f" {self.num_head_chunks}, embedding {embedding}",
            f"plan: up to {self.max_num_seqs} sequences and {self.max_num_batched_tokens} rows"
            f" per pass; a sequence may have {self.max_model_len} tokens; shared prompt prefixes"
            f" {prefixes}",
        ]

"""Names of things that several layers pass along. Knows no tensors and no bytes."""

from enum import StrEnum
from typing import NamedTuple


class Part(StrEnum):
    """The units in which weights move between tiers."""

    EMBED = "embed"  # token embedding table
    BLOCK = "block"  # a block's norms, attention, router and shared expert
    FFN = "ffn"  # a block's dense feed-forward network, where it has one instead of experts
    EXPERT = "expert"  # one routed expert
    JOIN = "join"  # what the layer that drafts has before and after its block
    FINAL = "final"  # last norm, biases of the head
    HEAD = "head"  # a range of rows of the output projection


class WeightKey(NamedTuple):
    """Address of one part. `layer` is -1 outside the blocks; `index`: expert or head chunk."""

    part: Part
    layer: int = -1
    index: int = -1  # type: ignore[assignment]  # hides tuple.index, which nobody needs

    def __str__(self) -> str:
        place = "" if self.layer < 0 else f"[{self.layer}]"
        return f"{self.part.value}{place}" + ("" if self.index < 0 else f"[{self.index}]")


class Home(StrEnum):
    """Where a sequence's keys and values are, and its attention is computed: both by one name, but
    for those that are in the host's memory and go through the device's for each layer."""

    HOST = "host"
    STREAMED = "streamed"
    DEVICE = "device"  # where passes are computed: the only one on a machine without another device


class HomeShares(NamedTuple):
    """Of the sequences, by where their keys and values are: those that the host attends to, and
    those that come from its memory to the device. All others are the device's."""

    host: float = 0.0
    streamed: float = 0.0

    @property
    def below(self) -> float:
        """Whose keys and values are in the host's memory."""
        return min(1.0, self.host + self.streamed)


ALL_ON_DEVICE = HomeShares()


class Route(NamedTuple):
    """The way of bytes from one tier to the next; tiers are called as their devices."""

    source: str
    destination: str


DISK, HOST, DEVICE = "disk", "host", "device"
DISK_TO_HOST = Route(DISK, HOST)

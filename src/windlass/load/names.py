"""Names that a load is described and told by. Imports nothing: `--help` has them, too."""

from collections.abc import Mapping

ENDPOINTS: Mapping[str, str] = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
# By name: as labels have it, and the line above its numbers
METRICS: Mapping[str, tuple[str, str]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")

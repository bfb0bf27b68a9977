"""Flags of how answers are read, of the commands whose answers are bodies."""

from windlass.cli.flags import Flag, choice
from windlass.protocol.answers import AUTO, REASONING_PARSER_NAMES, TOOL_PARSER_NAMES

PARSER_FLAGS = (
    Flag(name="tool-call-parser", read=choice(*TOOL_PARSER_NAMES), default=AUTO, metavar="NAME",
         group="chat", help=f"how the model writes calls of tools: {', '.join(TOOL_PARSER_NAMES)} "
         "(default: auto, by the chat template)"),
    Flag(name="reasoning-parser", read=choice(*REASONING_PARSER_NAMES), default=AUTO,
         metavar="NAME", group="chat", help="how it marks reasoning, which answers carry apart: "
         f"{', '.join(REASONING_PARSER_NAMES)} (default: auto, by the chat template)"),
)  # fmt: skip

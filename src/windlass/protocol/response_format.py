"""What a body asks its answer to be: `response_format`, as OpenAI has it."""

from collections.abc import Mapping
from typing import Any

from windlass.errors import RequestError, UsageError
from windlass.protocol.fields import optional, refuse_unknown, required, shorten
from windlass.structured import StructuredOutputs

_FIELD = "response_format"
_TYPES = ("text", "json_object", "json_schema")


def read_response_format(body: Mapping[str, Any]) -> StructuredOutputs | None:
    """None for any text. Raises RequestError naming the field. Without `strict` a schema's keywords
    that cannot be held are left out."""
    given = optional(body, _FIELD, dict)
    if given is None:
        return None
    kind = required(given, "type", str, where=f"{_FIELD}.")
    if kind not in _TYPES:
        why = ": not supported" if kind == "structural_tag" else ""
        raise RequestError(
            f"{_FIELD}.type: got {shorten(kind)}, allowed {', '.join(_TYPES)}{why}",
            param=f"{_FIELD}.type",
        )
    if kind == "text":
        refuse_unknown(given, ("type",), where=f"{_FIELD}.")
        return None
    if kind == "json_object":
        refuse_unknown(given, ("type", "schema"), where=f"{_FIELD}.")
        own = optional(given, "schema", dict, where=f"{_FIELD}.")  # llama.cpp's
        if own is None:
            return structured(_FIELD, json_object=True)
        return structured(_FIELD, json=own, is_lenient=True)
    refuse_unknown(given, ("type", "json_schema"), where=f"{_FIELD}.")
    holder = required(given, "json_schema", dict, where=f"{_FIELD}.")
    where = f"{_FIELD}.json_schema."
    refuse_unknown(holder, ("name", "description", "schema", "strict"), where=where)
    for name in ("name", "description"):
        optional(holder, name, str, where=where)
    is_strict = bool(optional(holder, "strict", bool, where=where))
    schema = holder.get("schema")
    if type(schema) is not bool:
        schema = required(holder, "schema", dict, where=where)
    return structured(_FIELD, json=schema, is_lenient=not is_strict)


def structured(field: str, **given: Any) -> StructuredOutputs:
    """Of a field of a body, which errors name."""
    try:
        return StructuredOutputs(source=field, **given)
    except UsageError as error:
        raise RequestError(str(error), param=field) from error

"""Prints a few rows of a batch job: the end of the prompt, and the answer."""

import json
import sys
from pathlib import Path
from typing import Any

SHOWN = 5


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def answer_of(row: dict[str, Any]) -> str:
    if row["error"] is not None:
        return f"error: {row['error']['message']}"
    body = row["response"]["body"]
    if "error" in body:
        return f"error: {body['error']['message']}"
    choice = body["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def main() -> None:
    """show_answers.py IN.jsonl OUT.jsonl"""
    requests, results = (Path(name).read_text().splitlines() for name in sys.argv[1:3])
    prompts = {row["custom_id"]: prompt_of(row["body"]) for row in map(json.loads, requests)}
    rows = [json.loads(line) for line in results]
    step = max(1, len(rows) // SHOWN)
    for row in rows[::step][:SHOWN]:
        name = row["custom_id"]
        print(f"--- {name}\n{prompts[name][-120:]}\n>>> {answer_of(row)}\n")


if __name__ == "__main__":
    main()

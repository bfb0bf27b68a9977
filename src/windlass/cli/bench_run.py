"""What `windlass bench serve` does with its values: asks, and says what came of it."""

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.load.answers import Ask, Endpoint, ServerError, fetch, patiently
from windlass.load.arrivals import Pace, send
from windlass.load.http_client import Server
from windlass.load.names import ENDPOINTS
from windlass.load.prompts import RandomPrompts, read_prompts
from windlass.load.report import Report, Wanted


def measured(values: Mapping[str, Any]) -> tuple[Report, str]:
    """By the values of the command's flags; the model's name, too. Raises UsageError and
    ServerError."""
    return asyncio.run(_measured(values))


async def _measured(values: Mapping[str, Any]) -> tuple[Report, str]:
    key = values["api_key"]
    url = values["base_url"] or f"http://{values['host']}:{values['port']}"
    server = Server.at(url, {"authorization": f"Bearer {key}"} if key else {})
    backend = values["backend"]
    fields = dict(values["extra_body"])
    if values["ignore_eos"]:
        fields["ignore_eos"] = True
    if values["temperature"] is not None:
        fields["temperature"] = values["temperature"]
    patience = values["ready_check_timeout_sec"]
    end = time.monotonic() + patience
    sys.stderr.write(f"asking {url}, for at most {patience:g} s until it answers\n")
    model = values["model"] or await patiently(lambda: _first_model(server), end)
    path = values["endpoint"] or ENDPOINTS[backend]
    endpoint = Endpoint(server, backend, path, model, fields)
    await patiently(lambda: endpoint.whole(Ask("Hello", 1)), end)
    asks = await _asks(values, endpoint)
    pace = Pace(
        values["request_rate"], values["burstiness"], values["max_concurrency"], values["seed"]
    )
    if values["num_warmups"]:
        await send(endpoint, (asks * values["num_warmups"])[: values["num_warmups"]], Pace())
    answers, seconds = await send(endpoint, asks, pace)
    wanted = Wanted(
        metrics=values["percentile_metrics"],
        percentiles=values["metric_percentiles"],
        goodput=values["goodput"],
        rate=pace.rate,
        most=pace.most,
    )
    return Report(answers, seconds, wanted), endpoint.model


async def _first_model(server: Server) -> str:
    found = (await fetch(server, "GET", "/v1/models")).get("data")
    if not found:
        raise ServerError("/v1/models: the server names no model, use --model")
    name: str = found[0]["id"]
    return name


async def _asks(values: Mapping[str, Any], endpoint: Endpoint) -> list[Ask]:
    if values["dataset_name"] == "custom":
        return read_prompts(
            values["dataset_path"], values["num_prompts"], values["custom_output_len"]
        )
    prompts = RandomPrompts(
        count=values["num_prompts"],
        input_len=values["random_input_len"],
        output_len=values["random_output_len"],
        prefix_len=values["random_prefix_len"],
        range_ratio=values["random_range_ratio"],
        seed=values["seed"],
    )
    return await prompts.make(endpoint)


def save(values: Mapping[str, Any], model: str, report: Report) -> Path:
    """Writes the numbers as JSON; where. Raises UsageError."""
    moment = datetime.now().strftime("%Y%m%d-%H%M%S")
    label, most = values["label"] or values["backend"], values["max_concurrency"]
    bound = "" if most is None else f"-concurrency{most}"
    rate = values["request_rate"]
    name = f"{label}-{rate}qps{bound}-{model.rpartition('/')[2]}-{moment}.json"
    path = (values["result_dir"] or Path()) / (values["result_filename"] or name)
    document = {
        "date": moment,
        "backend": values["backend"],
        "label": values["label"],
        "model_id": model,
        "num_prompts": values["num_prompts"],
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": values["burstiness"],
        "max_concurrency": most,
        **report.to_json(detailed=values["save_detailed"]),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--result-filename: {path}: {error.strerror}") from error
    return path

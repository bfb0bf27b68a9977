"""The page of `windlass serve` in a browser, beside what the server itself says."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from browser import NAMES, Page, browsing, find_browser
from live_server import Running, serving
from processes import PATIENCE_S

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"the page needs one of {', '.join(NAMES)}: apt-get install chromium"
)
SHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep them in, to be looked at


# what the model would say is left to chance
LONG_ANSWERS = """(() => {
  const real = window.fetch;
  window.fetch = (url, options) => {
    const more = { ignore_eos: true, max_tokens: 100 };
    if (options?.body) options.body = JSON.stringify({ ...JSON.parse(options.body), ...more });
    return real(url, options);
  };
})()"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(
        "demo", "--host-memory", "1GiB", "--max-num-seqs", "4", "--moe-expert-cache-size", "8"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def page(server: Running) -> Iterator[Page]:
    assert BROWSER is not None
    with browsing(BROWSER) as page:
        page.show(width=1280)
        page.command("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        page.wait_for("document.querySelector('#state')?.textContent === 'ready'")
        page.evaluate(LONG_ANSWERS)
        yield page


def chat(page: Page, text: str) -> None:
    page.wait_for("!document.querySelector('#send').hidden")
    page.evaluate(f"document.querySelector('#prompt').value = {json.dumps(text)}")
    page.evaluate("document.querySelector('#ask').requestSubmit()")


def test_a_chat_appears_with_its_times(page: Page) -> None:
    chat(page, "Tell me of the sea.")
    page.wait_for("document.querySelectorAll('.assistant').length === 1")
    page.wait_for("!document.querySelector('#send').hidden")
    assert page.evaluate("document.querySelector('.user').textContent") == "Tell me of the sea."
    assert page.evaluate("document.querySelector('.assistant').textContent.length") > 10
    timing = page.evaluate("document.querySelector('#timing').textContent")
    assert re.fullmatch(r"first token after [\d.]+ s, \d+ tokens, [\d.,]+ tokens/s", timing), timing


def test_an_answer_can_be_stopped(page: Page, server: Running) -> None:
    page.evaluate("document.querySelector('#clear').click()")  # the model's context is short
    chat(page, "Tell me all that you know.")
    page.wait_for("document.querySelector('.assistant:last-child').textContent.length > 5")
    page.evaluate("document.querySelector('#stop').click()")
    page.wait_for("!document.querySelector('#send').hidden")
    end = time.monotonic() + PATIENCE_S
    while server.get("/v1/stats")[1]["running"]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_cells_and_numbers_are_those_of_the_server(page: Page, server: Running) -> None:
    """While nothing runs, all of them agree."""
    stats = server.get("/v1/stats")[1]
    generated = stats["metrics"]["generation_tokens"]
    page.wait_for(f"event.metrics.generation_tokens === {generated}")
    shown = page.evaluate("event.experts")
    own = stats["experts"]
    assert own["layers"] == [0, 1, 2, 3, 4, 5] and own["num_experts"] == 24
    assert shown["tiers"] == own["tiers"] and list(own["tiers"]) == ["host"]
    held = sum(row.count("3") + row.count("4") for row in own["tiers"]["host"])
    assert held == 48, "8 of each of 6 layers"
    words = page.evaluate("document.querySelector('#shape').textContent")
    assert words == "6 layers × 24 experts, 48 in host"
    assert sum(map(sum, own["uses"])) > 100
    assert max(max(row) for row in own["evicted_seconds"]) > 0
    tokens = page.evaluate("document.querySelector('[data-metric=generation_tokens]') !== null")
    assert tokens
    # what a cell looks like is what it is
    pixels = page.evaluate(
        """(() => {
          const canvas = document.querySelector("#map"), found = [];
          const paint = canvas.getContext("2d", { willReadFrequently: true });
          const wide = canvas.width / 24, high = canvas.height / 6;
          for (let y = 0; y < 6; y++) for (let x = 0; x < 24; x++)
            found.push([...paint.getImageData((x + .5) * wide, (y + .5) * high, 1, 1).data]);
          return found;
        })()"""
    )
    digits = "".join(own["tiers"]["host"])
    absent = {tuple(pixel) for pixel, digit in zip(pixels, digits, strict=True) if digit == "0"}
    there = {tuple(pixel) for pixel, digit in zip(pixels, digits, strict=True) if digit >= "3"}
    assert len(absent) == 1 and not absent & there
    assert len(there) > 1, "brightness tells of use"


def test_what_is_under_a_pointer_is_told(page: Page) -> None:
    box = page.evaluate(
        "(b => [b.left, b.top])(document.querySelector('#map').getBoundingClientRect())"
    )
    page.command("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 3, y=box[1] + 3)
    told = page.wait_for(
        "(t => t.includes('uses') && t)(document.querySelector('#cell').textContent)"
    )
    assert re.match(r"layer 0, expert 0: .*, \d+ uses, (never evicted|evicted \d+ s ago)", told)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_phones_and_screens_by_day_and_night(page: Page, width: int, scheme: str) -> None:
    page.show(width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 384) == (scheme == "dark")
    if SHOTS:
        page.wait_for("new Promise(wake => setTimeout(() => wake(true), 800))")
        page.screenshot(Path(SHOTS, f"page-{width}-{scheme}.png"))


def test_it_asks_nobody_else_and_has_no_errors(page: Page, server: Running) -> None:
    page.evaluate("1")
    hosts = {urlsplit(url).netloc for url in page.urls if not url.startswith("data:")}
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert page.problems == []


def test_it_asks_for_the_key_once(server: Running) -> None:
    assert BROWSER is not None
    with (
        serving("demo", "--host-memory", "1GiB", "--api-key", "secret") as locked,
        browsing(BROWSER) as page,
    ):
        page.command("Page.navigate", url=f"http://127.0.0.1:{locked.port}/")
        page.wait_for("document.querySelector('#key')?.hidden === false")
        page.evaluate("document.querySelector('#secret').value = 'secret'")
        page.evaluate("document.querySelector('#key').requestSubmit()")
        page.wait_for("document.querySelector('#state').textContent === 'ready'")
        page.command("Page.reload")
        page.wait_for("document.querySelector('#state')?.textContent === 'ready'")
        page.wait_for("document.querySelector('#model').textContent.startsWith('demo')")

"""The Python API over a fake engine: order, errors that stay alone, lazy input, aborts."""

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import planning
from engines import make_model, write_tokenizer
from fake_engine import FakeEngine, FakeTokenizer
from windlass.engine.outputs import NOT_FINITE, RequestOutput
from windlass.engine.request import Request
from windlass.errors import RequestError, UsageError
from windlass.llm import LLM
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.schedule.batch import Batch
from windlass.schedule.passes import PassShape, run_pass
from windlass.schedule.runtime import Outcome, Runtime

SHORT = SamplingParams(max_tokens=4)


class ChatFake(FakeTokenizer):
    """With text of a chat, as the real tokenizer has it."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        now: int | None = None,
    ) -> str:
        if messages[0]["role"] != "user":
            raise RequestError("chat template: a user speaks first", param="messages")
        parts = [f"<{m['role']}>{m['content']}" for m in messages]
        extra = f"{chat_template or ''}{tools or ''}{variables or ''}"
        return "".join(parts) + extra + ">" * add_generation_prompt


class Engine(FakeEngine):
    """Refuses long prompts, as the real one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer = ChatFake()

    def validate(self, request: Request) -> None:
        super().validate(request)
        if not request.prompt_token_ids:
            raise RequestError("prompt has no tokens")
        if len(request.prompt_token_ids) + 1 > self.max_model_len - 16:
            raise RequestError("prompt has too many tokens", code="context_length_exceeded")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[EngineOptions]:
    """Puts the fake in place of the real engine; lists what it was opened with."""
    opened: list[EngineOptions] = []

    def open_fake(options: EngineOptions, **more: object) -> Engine:
        opened.append(options)
        return Engine(capacity=options.max_num_seqs or 4)

    monkeypatch.setattr("windlass.llm.open_engine", open_fake)
    monkeypatch.setattr("windlass.llm.kept_profile", lambda options: None)
    return opened


@pytest.fixture
def llm(options: list[EngineOptions]) -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


def engine_of(llm: LLM) -> Engine:
    engine = llm._engine
    assert isinstance(engine, Engine)
    return engine


def is_idle(engine: Engine) -> bool:
    """Whether it comes to have no work, soon."""
    until = time.monotonic() + 120
    while engine.has_work and time.monotonic() < until:
        time.sleep(0.001)
    return not engine.has_work


def test_keywords_reach_the_engine_or_are_refused(options: list[EngineOptions]) -> None:
    LLM("demo", host_memory="2GiB", max_model_len=64, seed=3, max_num_seqs=8).close()
    LLM(moe_expert_cache_size=4, trace="x.json", gpu_memory_utilization=0.9).close()
    LLM(moe_backend="torch", routing_trace="r", device_memory="1GiB").close()
    first, second, third = options
    assert (first.host_memory, first.max_model_len, first.seed) == (2 << 30, 64, 3)
    assert (second.moe_expert_cache_size, str(second.trace)) == ("4", "x.json")
    assert (first.moe_backend, third.moe_backend) == ("auto", "torch")
    assert (third.routing_trace, third.device_memory) == (Path("r"), 1 << 30)
    for wrong, message in (
        ({"moe_backend": "tritn"}, "moe_backend: got 'tritn', allowed auto, triton, torch, cpu"),
        ({"host_memroy": "2GiB"}, r"unknown option: host_memroy \(did you mean host_memory\?\)"),
        ({"zzz": 1}, "unknown option: zzz, allowed .*host_memory"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: got 2, allowed only 1"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization: got 0.5"),
        ({"quantization": "int3"}, "quantization: got 'int3', allowed fp8, mxfp4"),
        ({"cpu_offload_gb": 4}, "cpu_offload_gb: got 4"),
        ({"host_memory": "2"}, "host_memory: got '2'"),
        ({"device": 0}, "device: got 0, allowed auto, cpu, cuda"),
        ({"device_memory": "2"}, "device_memory: got '2'"),
        ({"dtype": "int3"}, "dtype: got 'int3'"),
    ):
        with pytest.raises(UsageError, match=message):
            LLM(**wrong)
    assert len(options) == 3


def test_results_keep_the_order_of_prompts_of_all_kinds(llm: LLM) -> None:
    prompts: list[Any] = ["a" * 9, {"prompt": "b"}, {"prompt_token_ids": [99, 100]}, "d"]
    params = [SamplingParams(max_tokens=n) for n in (12, 1, 9, 3)]
    ended: list[RequestOutput] = []
    results = llm.generate(prompts, params, on_result=ended.append)
    assert [r.prompt for r in results] == ["a" * 9, "b", None, "d"]
    assert [len(r.prompt_token_ids) for r in results] == [10, 2, 2, 2]
    assert [r.request_id for r in ended] != [r.request_id for r in results]  # the short ones first
    assert sorted(r.request_id for r in ended) == [r.request_id for r in results]
    assert all(r.finished and r.outputs[0].text for r in results)


def test_a_long_list_is_given_to_the_engine_bit_by_bit(llm: LLM) -> None:
    assert len(llm.generate([f"p{i}" for i in range(50)], SHORT)) == 50
    assert engine_of(llm).peak_flying == 2 * engine_of(llm).capacity


def test_one_prompt_and_none(llm: LLM) -> None:
    assert len(llm.generate("one", SHORT)) == 1
    assert len(llm.generate({"prompt": "one"})) == 1
    assert llm.generate([]) == []
    assert list(llm.generate_iter([])) == []
    assert engine_of(llm).added[1].params == llm.get_default_sampling_params()
    assert llm.get_metrics().running == 0 and llm.plan is engine_of(llm).plan


def test_the_same_call_gives_the_same_text_and_repeated_prompts_differ(llm: LLM) -> None:
    first = [r.outputs[0].text for r in llm.generate(["p", "p", "p"], SHORT)]
    assert len(set(first)) == 3
    llm.generate(["another call"], SHORT)
    assert [r.outputs[0].text for r in llm.generate(["p", "p", "p"], SHORT)] == first
    ended = sorted(llm.generate_iter(["p", "p", "p"], SHORT), key=lambda r: int(r.request_id))
    assert [r.outputs[0].text for r in ended] == first


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("x" * 300, r"prompts\[2\]: prompt has too many tokens"),
        ({"prompt_token_ids": []}, r"prompts\[2\]: prompt has no tokens"),
        ({"prompt_token_ids": ["a"]}, r"prompts\[2\]: prompt: got .*allowed"),
        ({"prompt_token_ids": [-1]}, r"prompts\[2\]: prompt: got .*allowed"),
        ({"prompt_token_ids": [9999]}, r"prompts\[2\]: prompt: got an id outside"),
        ({"text": "a"}, r"prompts\[2\]: prompt: got .*allowed"),
        (5, r"prompts\[2\]: prompt: got 5, allowed"),
        (None, r"prompts\[2\]: prompt: got None, allowed"),
    ],
)  # fmt: skip
def test_a_bad_prompt_raises_before_anything_is_computed(llm: LLM, bad: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["a", "b", bad, "c"], SHORT)
    engine = engine_of(llm)
    assert llm.get_metrics().passes == 0 and not engine.added
    assert len(llm.generate(["a"], SHORT)) == 1  # and the engine is as before


def test_a_bad_prompt_fails_alone(llm: LLM) -> None:
    prompts = ["a", "x" * 300, "c"]
    results = llm.generate(prompts, SHORT, on_error="return")
    assert [r.outputs[0].finish_reason == "error" for r in results] == [False, True, False]
    assert results[1].error == "prompt has too many tokens" and results[1].prompt == "x" * 300
    assert results[0].error is None
    lazily = {r.prompt: r.error for r in llm.generate_iter(prompts, SHORT)}
    assert lazily == {"a": None, "x" * 300: "prompt has too many tokens", "c": None}
    with pytest.raises(UsageError, match="on_error: got 'skip'"):
        llm.generate("a", on_error="skip")  # type: ignore[arg-type]


def test_a_row_that_fails_while_it_runs(llm: LLM) -> None:
    engine = engine_of(llm)
    engine.fail_prompts = {"b": 1}
    results = llm.generate(["a", "b", "c"], SHORT, on_error="return")
    assert [r.error for r in results] == [None, "a fault on purpose", None]
    engine.fail_prompts = {"b": 1}
    with pytest.raises(RequestError, match=r"prompts\[1\]: a fault on purpose"):
        llm.generate(
            ["a", "b", "c", "d" * 30], [SHORT, SHORT, SHORT, SamplingParams(max_tokens=99)]
        )
    assert is_idle(engine)  # the others were aborted


def test_numbers_of_params_and_prompts_must_match(llm: LLM) -> None:
    for wrong in ([SHORT], [SHORT] * 3, ["x", SHORT]):
        with pytest.raises(UsageError, match="sampling_params: got"):
            llm.generate(["a", "b"], wrong)  # type: ignore[arg-type]
        assert is_idle(engine_of(llm))


def test_iteration_takes_endless_prompts_as_there_is_room(llm: LLM) -> None:
    taken = itertools.count()
    prompts = (f"p{next(taken)}" for _ in itertools.repeat(None))
    results = llm.generate_iter(prompts, SHORT)
    assert next(taken) == 0  # nothing is taken before the first result is asked for
    seen = [next(results) for _ in range(30)]
    assert len({r.prompt for r in seen}) == 30
    engine = engine_of(llm)
    assert engine.peak_flying == 2 * engine.capacity
    results.close()  # type: ignore[attr-defined]
    assert is_idle(engine) and engine.aborted


def test_iteration_yields_in_the_order_of_completion(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (40, 20, 1)]
    order = [r.prompt for r in llm.generate_iter(["long", "middle", "short"], params)]
    assert order == ["short", "middle", "long"]


def test_two_iterations_and_a_call_do_not_take_each_others_results(llm: LLM) -> None:
    one = llm.generate_iter((f"a{i}" for i in range(9)), SHORT)
    two = llm.generate_iter((f"b{i}" for i in range(9)), SHORT)
    mixed = [(next(one).prompt, next(two).prompt) for _ in range(4)]
    assert len(llm.generate(["x", "y"], SHORT)) == 2
    names = {name for pair in mixed for name in pair if name} | {r.prompt for r in one}
    names |= {r.prompt for r in two}
    assert names == {f"{letter}{i}" for letter in "ab" for i in range(9)}


def test_chat_takes_one_conversation_or_many(llm: LLM) -> None:
    hello = [{"role": "user", "content": "hi"}]
    (one,) = llm.chat(hello, SHORT)
    assert one.prompt == "<user>hi>" and one.prompt_token_ids == tuple(b"<user>hi>")  # no BOS
    options: dict[str, Any] = {
        "tools": [{"name": "f"}], "chat_template": "T", "chat_template_kwargs": {"think": False},
        "add_generation_prompt": False, "use_tqdm": False,
    }  # fmt: skip
    several = llm.chat([hello, hello], SHORT, **options)
    assert [r.prompt for r in several] == ["<user>hiT[{'name': 'f'}]{'think': False}"] * 2
    bad = [{"role": "tool", "content": ""}]
    with pytest.raises(RequestError, match=r"prompts\[1\]: chat template: a user speaks first"):
        llm.chat([hello, bad], SHORT)
    assert [r.error is None for r in llm.chat([hello, bad], SHORT, on_error="return")] == [
        True,
        False,
    ]
    begun = [*hello, {"role": "assistant", "content": "Well"}]
    (going,) = llm.chat(begun, SHORT, continue_final_message=True)
    assert going.prompt == "<user>hi<assistant>Well"
    with pytest.raises(UsageError, match=r"unknown option: use_tqmd \(did you mean use_tqdm\?\)"):
        llm.chat(hello, SHORT, use_tqmd=False)


def test_what_is_not_supported_is_refused(llm: LLM) -> None:
    with pytest.raises(UsageError, match="lora_request: .*not supported"):
        llm.generate("a", lora_request=object())  # type: ignore[arg-type]


def test_close_is_final_and_can_be_repeated(options: list[EngineOptions]) -> None:
    llm = LLM()
    waiting = llm.generate_iter(["a", "b"], SamplingParams(max_tokens=50))
    engine = engine_of(llm)
    llm.close()
    llm.close()
    assert engine.is_closed
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.generate_iter(["a"]),
        lambda: next(waiting),
    ):
        with pytest.raises(UsageError, match="after close"):
            call()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from more."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_seeded_request_gives_the_same_text_in_any_batch(tmp_path: Path) -> None:
    """Through the real engine, on a tiny random model."""
    make_model("mixtral", tmp_path)
    seeded = SamplingParams(seed=5, n=2, max_tokens=6, top_p=0.9, ignore_eos=True, logprobs=1)
    others = [SamplingParams(max_tokens=2 + i, ignore_eos=True) for i in range(6)]
    sizes: dict[str, Any] = {
        "host_memory": "4GiB", "max_model_len": 64, "generation_config": "vllm", "threads": 1,
    }  # fmt: skip
    with LLM(str(tmp_path), max_num_seqs=8, max_num_batched_tokens=100, **sizes) as llm:
        alone = llm.generate("w5 w6 w7", seeded)[0]
        prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(6)]
        crowd = llm.generate([*prompts, "w5 w6 w7"], [*others, seeded])[-1]
    with LLM(str(tmp_path), max_num_seqs=2, max_num_batched_tokens=66, seed=9, **sizes) as small:
        narrow = small.generate("w5 w6 w7", seeded)[0]
    assert alone.outputs == crowd.outputs == narrow.outputs
    one, two = alone.outputs
    assert one.token_ids != two.token_ids and one.text != two.text
    assert len(one.token_ids) == 6 and one.finish_reason == "length"
    assert one.cumulative_logprob == pytest.approx(
        sum(step[t].logprob for t, step in zip(one.token_ids, one.logprobs or (), strict=True))
    )


@pytest.mark.usefixtures("one_thread")
def test_logits_that_are_not_finite_fail_their_row_with_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("mixtral", tmp_path)
    sizes: dict[str, Any] = {"host_memory": "4GiB", "max_model_len": 64, "threads": 1}
    with LLM(str(tmp_path), max_num_seqs=2, max_num_batched_tokens=66, **sizes) as llm:

        def broken(runtime: Runtime, shape: PassShape, batch: Batch) -> Outcome:
            outcome = run_pass(runtime, shape, batch)
            return replace(outcome, logits=outcome.logits * float("nan"))

        monkeypatch.setattr("windlass.engine.engine.run_pass", broken)
        (result,) = llm.generate(["w5 w6"], SHORT, on_error="return")
    assert (result.error_code, "not finite" in str(result.error)) == (NOT_FINITE, True)


def test_another_tokenizer_does_not_hide_what_ends_a_text(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    make_model("mixtral", model)
    other.mkdir()
    write_tokenizer(other)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    with LLM(str(model), tokenizer=str(other), host_memory="4GiB", max_model_len=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, logit_bias={7: 100})
        (result,) = llm.generate("w5 w6", params)
    assert (result.outputs[0].finish_reason, result.outputs[0].token_ids) == ("stop", (7,))


def test_a_cache_size_of_other_digits_is_the_users_error(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    with pytest.raises(UsageError, match="moe-expert-cache-size: got '²'"):
        LLM(str(tmp_path), host_memory="4GiB", moe_expert_cache_size="²")


@pytest.mark.usefixtures("one_thread")
def test_the_last_run_is_compared_with_what_was_to_be_expected(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    sizes: dict[str, Any] = {"host_memory": "4GiB", "max_model_len": 64, "threads": 1}
    params = SamplingParams(max_tokens=6, n=2, ignore_eos=True)
    with LLM(str(tmp_path), max_num_seqs=4, max_num_batched_tokens=68, **sizes) as llm:
        plan = llm.plan
        assert llm.prediction is None and llm.generate([]) == [] and llm.prediction is None
        llm.generate(["w5 w6 w7", "w8 w9"], params)
        first = llm.prediction
        assert first is not None and first["done"] == pytest.approx(1, abs=0.2)
        passes = llm.get_metrics().pass_s
        assert first["phases"]["total"]["measured_s"] == pytest.approx(passes)
        llm.generate(["w5 w6 w7", "w8 w9"], params)
        again = llm.prediction
        assert again is not None and again["phases"]["total"]["measured_s"] == pytest.approx(
            llm.get_metrics().pass_s - passes
        )
        # the same job, but for the weights that the first one had to load
        before, after = (one["phases"]["decode"]["predicted_s"] for one in (first, again))
        assert 0 < after == pytest.approx(before, rel=0.5)
        for kept in ("prefill", "total"):
            found = [one["phases"][kept]["predicted_s"] for one in (first, again)]
            assert 0 < found[1] < found[0]
        assert 0 < again["share_of_bound"] and llm.plan == plan
        next(waiting := llm.generate_iter(["w5", "w6"], [SHORT, replace(SHORT, max_tokens=40)]))
        llm.generate("w5 w6", SHORT)
        assert llm.prediction is None  # passes were not its own alone
        waiting.close()  # type: ignore[attr-defined]
        with pytest.raises(RequestError):
            llm.generate({"prompt_token_ids": []}, SHORT)
        assert llm.prediction is None
    assert json.loads(json.dumps(again)) == again


@pytest.mark.usefixtures("one_thread")
def test_what_is_expected_rests_on_the_kept_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("mixtral", tmp_path)
    sizes: dict[str, Any] = {"host_memory": "4GiB", "max_model_len": 64, "threads": 1}
    predicted = []
    for speed in (1.0, 0.1):
        profile = planning.machine(disk=speed, compute=speed)
        monkeypatch.setattr("windlass.llm.kept_profile", lambda options, kept=profile: kept)
        with LLM(str(tmp_path), **sizes) as llm:
            llm.generate("w5 w6 w7", SHORT)
            found = llm.prediction
        assert found is not None
        predicted.append(found["phases"]["total"]["predicted_s"])
    assert predicted[1] > 2 * predicted[0]

"""A model whose sparse attention is computed as dense attention ends where the two part, and says
so wherever somebody could ask for more."""

import pytest

from engines import engine_for, make_model, prompts, request
from windlass.errors import RequestError, UsageError

WHY = "up to which its sparse attention \\(index_topk 64\\) sees all positions"


def test_longer_sequences_are_refused_with_the_reason(tmp_path):
    make_model("deepseek_v32", tmp_path, index_topk=64)
    with pytest.raises(UsageError, match=f"max_model_len: got 65, allowed at most 64, {WHY}"):
        engine_for(tmp_path, max_model_len=65)
    with engine_for(tmp_path, max_model_len=None) as engine:
        assert engine.max_model_len == 64
        assert engine.notes[0].startswith("deepseek_v32: at most 64 tokens, up to which")
        longest = request("a", prompts((60,))[0], max_tokens=4)
        engine.validate(longest)
        with pytest.raises(RequestError, match=f"limit 64 in all, {WHY}"):
            engine.validate(request("b", longest.prompt_token_ids, max_tokens=5))
    with engine_for(tmp_path, max_model_len=40) as engine:  # the user's own limit needs no reason
        assert engine.limited_by == ""

"""Every family through the whole engine, from files, against transformers."""

import torch

from engines import engine_for, logprob_rows, make_model, prompts, request, run_all

LENGTHS = (70, 9, 23)  # longer than every window, and than a chunk; ragged


# transformers changes LongRoPE's factors in mid-sequence and keeps the keys already cached;
# Windlass chooses once per sequence, by prompt + max_tokens: compared where both use one kind
LENGTHS_OF = {"phimoe": (70, 41, 57)}


STEPS = 32


TOLERANCE = 1e-4  # absolute, of log-probabilities; logits are of order 1


@torch.inference_mode()
def reference(model, prompt, steps=STEPS):
    """Greedy tokens and log-probabilities of each step, with transformers' own cache."""
    ids, cache, tokens, rows = torch.tensor([prompt]), None, [], []
    for _ in range(steps):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        row = out.logits[0, -1].double().log_softmax(-1)
        rows.append(row)
        tokens.append(int(row.argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(rows)


def compare(family, path, *, steps=STEPS):
    """Runs a random checkpoint of `family` both ways: (all tokens equal, largest error)."""
    model = make_model(family, path)
    texts = prompts(LENGTHS_OF.get(family, LENGTHS))
    with engine_for(path, max_num_batched_tokens=80) as engine:
        results = run_all(
            engine,
            [request(str(i), p, max_tokens=steps, logprobs=-1) for i, p in enumerate(texts)],
        )
    are_equal, worst = True, 0.0
    for i, prompt in enumerate(texts):
        tokens, rows = reference(model, prompt, steps)
        are_equal &= list(results[str(i)].outputs[0].token_ids) == tokens
        worst = max(worst, (logprob_rows(results[str(i)]) - rows).abs().max().item())
    return are_equal, worst

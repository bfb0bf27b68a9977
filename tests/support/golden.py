"""Every family through the whole engine, from files, against transformers."""

import torch

from engines import engine_for, logprob_rows, make_model, prompts, request, run_all

LENGTHS = (70, 9, 23)  # longer than every window, and than a chunk; ragged


STEPS = 32


TOLERANCE = 1e-4  # absolute, of log-probabilities; logits are of order 1


@torch.inference_mode()
def reference(model, prompt, tokens):
    """What transformers would have chosen in place of each of `tokens`, had it generated those
    before it, and its log-probabilities (tokens, vocabulary): one forward without a cache. If all
    choices are equal, greedy decoding gives `tokens`."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist(), logits.double().log_softmax(-1)


def compare(family, path, *, steps=STEPS):
    """Runs a random checkpoint of `family` both ways: (all tokens equal, largest error)."""
    model = make_model(family, path)
    texts = prompts(LENGTHS)
    with engine_for(path, max_num_batched_tokens=80) as engine:
        results = run_all(
            engine,
            [request(str(i), p, max_tokens=steps, logprobs=-1) for i, p in enumerate(texts)],
        )
    return distance(model, texts, results)


def distance(model, texts, results):
    """Of results by the number of their prompt: (all tokens equal, largest error)."""
    are_equal, worst = True, 0.0
    for i, prompt in enumerate(texts):
        found = list(results[str(i)].outputs[0].token_ids)
        tokens, rows = reference(model, prompt, found)
        are_equal &= found == tokens
        worst = max(worst, (logprob_rows(results[str(i)]) - rows).abs().max().item())
    return are_equal, worst

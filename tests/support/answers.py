"""Answers that need no cache, for those of an engine to be compared with."""

from collections.abc import Sequence

import numpy as np

from ling_jax.generate.requests import Request
from ling_jax.model.model import Ling


def recomputed(model: Ling, requests: Sequence[Request], length: int) -> list[list[int]]:
    """Greedy answers to requests with no more than a logit bias, every token from the whole row of `length`."""
    answers = []
    for request in requests:
        tokens = np.zeros((1, length), np.int32)
        known = len(request.prompt)
        tokens[0, :known] = request.prompt
        bias = np.zeros(model.config.vocab_size)
        for token, value in request.sampling.logit_bias.items():
            bias[token] = value
        for place in range(known, known + request.max_new_tokens):
            inside = (np.arange(length) < place).astype(np.int32)[None]
            logits = model(tokens, segment_ids_BT=inside, mtp=False).logits_BTV
            tokens[0, place] = int((np.asarray(logits)[0, place - 1] + bias).argmax())
        answers.append(tokens[0, known : known + request.max_new_tokens].tolist())
    return answers

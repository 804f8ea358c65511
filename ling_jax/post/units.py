"""Units of an answer, by which a policy is compared with the one that drew it: tokens, sentences, the whole answer."""

from collections.abc import Sequence

import numpy as np

from ling_jax.config import Unit
from ling_jax.data.tokenizer import Tokenizer

# The report calls them common pause punctuation and does not list them: ends of sentences and lines, also the wide
# ones of Chinese and Japanese, which TRL's sentence units take too.
PAUSES = frozenset(".!?;\n\u3002\uff01\uff1f\uff1b\uff0e")
CLOSING = ("</think>",)  # and the token that ends a turn


def unit_ids(ids: Sequence[int], unit: Unit, tokenizer: Tokenizer) -> np.ndarray:
    """int32 [tokens]: the number of each token's unit, from 1 on.

    A sentence ends with a token whose text ends in a pause, but not inside a number (3.14), and with `</think>` and the
    end of the turn. Pauses that follow in tokens of their own belong to it too, and each token of a character to the
    character's sentence.
    """
    if unit == "token":
        return np.arange(1, len(ids) + 1, dtype=np.int32)
    if unit == "response":
        return np.ones(len(ids), np.int32)
    stream = tokenizer.stream()
    texts = [stream.push(token) for token in ids]
    ends = np.zeros(len(ids), bool)
    for place, (token, text) in enumerate(zip(ids, texts, strict=True)):
        following = next((t for t in texts[place + 1 :] if t), "")
        closed = token == tokenizer.role_end_id or text in CLOSING or _pauses(text, texts[:place], following)
        ends[place] = closed and not (following.strip(" ") and set(following) <= PAUSES | {" "})
    return np.concatenate(([0], np.cumsum(ends[:-1]))).astype(np.int32) + 1 if len(ids) else np.zeros(0, np.int32)


def _pauses(text: str, before: Sequence[str], following: str) -> bool:
    """Whether a sentence ends with a token, given the texts around it."""
    bare = text.rstrip(" ")
    if not bare or bare[-1] not in PAUSES:
        return False
    earlier = bare[-2] if len(bare) > 1 else next((t[-1] for t in reversed(before) if t), "")
    in_number = bare[-1] == "." and bare == text and earlier.isdigit() and following[:1].isdigit()
    return not in_number

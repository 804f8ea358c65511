"""The script that shows fine-tuning in two modes judges what it should."""

import pytest

from ling_jax.post.measure import Attempt
from scripts.sft_sums import short, worked

THOUGHT = "\n<think>\n17+8=25. 25+40=65.\n</think>\n\n65"


def attempt(text: str, tokens: int = 4) -> Attempt:
    return Attempt(text, text.rpartition("</think>")[2].strip(), tokens, "think>" in text, False, True)


@pytest.mark.parametrize(
    ("text", "tokens", "holds"),
    [("65", 3, True), ("165", 6, False), ("It is 65", 4, False), (THOUGHT, 4, False), ("", 1, False)],
)
def test_an_instant_answer_is_a_number_and_the_turns_end(text, tokens, holds):
    assert short(attempt(text, tokens)) == holds


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        (THOUGHT, True),
        (THOUGHT.replace("25+40=65.", "25+40=66."), True),  # wrong, but a step
        (THOUGHT.replace(" 25+40=65.", ""), False),
        ("\n<think>\n17+8+40=65.\n</think>\n\n65", False),
        (THOUGHT.replace("</think>", ""), False),
        ("65", False),
    ],
)
def test_a_thinking_answer_has_a_step_for_each_sign(text, holds):
    assert worked(attempt(text), "17+8+40") == holds

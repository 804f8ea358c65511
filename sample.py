"""Continues a prompt: python sample.py --checkpoint DIR --prompt TEXT [--chat] [...]; --help lists every flag."""

import dataclasses
import sys
from collections.abc import Sequence

import tyro

from ling_jax.cli import run_main
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import generation_config_of, tokenizer_of
from ling_jax.generate.engine import stream
from ling_jax.generate.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    checkpoint: str
    """A run folder, its checkpoints/, one step of it, or a HF folder."""
    prompt: str
    """The text to continue, or with --chat the user's message."""
    chat: bool = False
    """Wrap the prompt in the chat template."""
    max_new_tokens: int = 64
    """Most tokens to add."""
    temperature: float | None = None
    """0 is greedy; by default what generation_config.json says, else 0.7."""
    top_p: float | None = None
    """Smallest probability mass to draw from; by default as above, else 0.8."""
    top_k: int | None = None
    """Most tokens to draw from, 0 for all; by default as above, else 0."""
    seed: int = 0
    """Same seed, same text."""


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="sample.py", description=__doc__)
    model, tokenizer = load_pretrained(command.checkpoint), tokenizer_of(command.checkpoint)
    saved = generation_config_of(command.checkpoint)
    chosen = {name: getattr(command, name) for name in ("temperature", "top_p", "top_k")}
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 0}
    settings = {k: v if v is not None else saved.get(k, defaults[k]) for k, v in chosen.items()}
    ends = saved.get("eos_token_id", tokenizer.eod_id)
    ends = ends if isinstance(ends, list) else [ends]
    if command.chat:
        ids = tokenizer.encode_chat([{"role": "user", "content": command.prompt}])
    else:
        ids = tokenizer.prefix_ids + tokenizer.encode(command.prompt)
    answer = stream(model, [ids], command.max_new_tokens, Sampling(**settings), seed=command.seed, eos_ids=ends)
    print("" if command.chat else command.prompt, end="", flush=True)
    text = tokenizer.stream()
    for rows in answer:
        for token in rows[0]:
            if token not in ends:
                print(text.push(token), end="", flush=True)
    print()


if __name__ == "__main__":
    sys.path.insert(0, "")
    run_main(main)

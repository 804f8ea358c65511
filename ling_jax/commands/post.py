"""Post-training: python post.py sft|rl NAME [--init-from DIR] [--flags]; post.py sft NAME --help lists every flag."""

import sys
from collections.abc import Sequence
from itertools import islice

from ling_jax.cli import POST_TRAINING, SFTCommand, parse_post, program, run_main
from ling_jax.commands.train import act
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.convert.weights import TOKENIZER
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.paths import at
from ling_jax.post.sft import first_examples, new_tokenizer, shown

COLOUR, PLAIN = ("\x1b[32m", "\x1b[0m"), ("\u27e6", "\u27e7")  # around what is learned, on a terminal and elsewhere


def main(argv: Sequence[str]) -> int:
    prog = program("post.py")
    if not argv or argv[0] not in POST_TRAINING:
        print("\n".join(f"usage: {prog} {kind} NAME [--flags]   {told}" for kind, (*_, told) in POST_TRAINING.items()))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    name, command = parse_post(argv[0], argv[1:])
    return show(name, command) if isinstance(command, SFTCommand) and command.show else act(name, command)


def show(name: str, command: SFTCommand) -> int:
    """Prints the first examples, with what is learned marked."""
    config = command.config
    saved = at(command.runs_dir) / (command.run or name) / TOKENIZER
    if config.data.tokenizer is not None:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    elif (saved / "tokenizer.json").exists() and not command.fresh:
        tokenizer = Tokenizer.load(str(saved))
    else:
        tokenizer = new_tokenizer(config) if command.init_from is None else tokenizer_of(command.init_from)
    examples = islice(first_examples(config, tokenizer), command.show)
    for text in shown(examples, tokenizer, COLOUR if sys.stdout.isatty() else PLAIN):
        print(f"{text}\n")
    return 0


def run() -> None:
    """The command `ling-post`."""
    run_main(main)

"""Prepares text for training: python -m ling_jax.data prepare NAME|DIR --target DIR"""

from collections.abc import Sequence

from ling_jax.cli import run_main
from ling_jax.commands.prepare import main


def named(argv: Sequence[str]) -> int:
    """The command that the first word names."""
    return main(argv[1:] if argv and argv[0] == "prepare" else [word for word in argv if word in ("-h", "--help")])


if __name__ == "__main__":
    run_main(named)

"""Post-trains a Ling model: python post.py sft NAME [--init-from DIR] [...]; --help lists every flag."""

import sys

from ling_jax.cli import run_main
from ling_jax.commands.post import main

if __name__ == "__main__":
    sys.path.insert(0, "")
    run_main(main)

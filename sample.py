"""Continues a prompt: python sample.py --checkpoint DIR --prompt TEXT [--chat] [...]; --help lists every flag."""

import sys

from ling_jax.cli import run_main
from ling_jax.commands.sample import main

if __name__ == "__main__":
    sys.path.insert(0, "")
    run_main(main)

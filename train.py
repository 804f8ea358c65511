"""Trains a Ling model: python train.py NAME [--run RUN] [--train.steps 100] [...]; --help lists every flag."""

import sys

from ling_jax.cli import run_main
from ling_jax.commands.train import main

if __name__ == "__main__":
    sys.path.insert(0, "")
    run_main(main)

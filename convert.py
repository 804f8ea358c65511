"""Weights converted and compared: python convert.py to-jax|to-hf|merge|merge-adapter|linearize|inspect|verify."""

import sys

from ling_jax.cli import run_main
from ling_jax.commands.convert import main

if __name__ == "__main__":
    sys.path.insert(0, "")
    run_main(main)

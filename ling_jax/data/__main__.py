"""Prepares text for training: python -m ling_jax.data prepare NAME|DIR --target DIR"""

from ling_jax.commands.prepare import run

if __name__ == "__main__":
    run()

"""Measures chat models on a task: python -m ling_jax.post.evaluate --checkpoint DIR --task NAME"""

from ling_jax.commands.chat_evaluation import run

if __name__ == "__main__":
    run()

"""Reinforcement learning on a laptop: a small Ling that sometimes gets sums right learns from its own answers.

Command:   python post.py rl rl_tiny --init-from runs/sft_tiny
Hardware:  2 CPU cores, 3 GB of memory.
Text:      sums of three to five numbers that fine-tuning never saw; the reward is 1 for the right number, else 0.
Promise:   see docs/reinforcement_learning.md.
"""

import dataclasses

from ling_jax.config import OptimizerConfig, RLConfig, RLRun, ScheduleConfig

from . import sft_tiny


def config() -> RLRun:
    tuned = sft_tiny.config()
    return RLRun(
        model=tuned.model,
        data=dataclasses.replace(tuned.data, global_batch_size=32),
        optimizer=OptimizerConfig(weight_decay=0.0),
        schedule=ScheduleConfig(peak_lr=4e-4, warmup_steps=20),
        train=dataclasses.replace(tuned.train, steps=200, bias_update_rate=0.0, eval_every=0, microbatches=1),
        checkpoint=dataclasses.replace(tuned.checkpoint, every=20),
        rl=RLConfig(prompts=32, group=8, minibatches=4, rows=64, eval_problems=256, eval_every=10),
    )

"""The settings of post-training."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import tyro

from ling_jax.config.checks import check, check_at_least

DroppedReasoning = Literal["split", "last", "error"]


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Fine-tuning on conversations. `data.sources` names files of them, or tasks, whose conversations are made."""

    # How often each conversation is read, from which train.steps follows; 0: train.steps says how long it goes on.
    epochs: float = 3.0
    # What to do where the chat template drops the reasoning of earlier turns. split: each turn that would lose its own
    # gets a row that ends with it; last: only turns that keep theirs are learned; error: refuse.
    on_dropped_reasoning: Annotated[DroppedReasoning, tyro.conf.arg(prefix_name=False)] = "split"
    # What to do with conversations that are longer than data.sequence_length: leave them out, or cut off their ends.
    too_long: Literal["drop", "cut"] = "drop"
    task_rows: int = 20_000  # conversations made of each task
    task_worked: float = 1.0  # share of a task's thinking answers that show each step; the others jump to the result
    answer_tags: bool = False  # a task's thinking answers stand in <answer> tags, as in the report's Table 5

    def __post_init__(self):
        check_at_least(self, 0, "epochs", "task_worked")
        check_at_least(self, 2, "task_rows")
        check(self.task_worked <= 1, f"sft.task_worked = {self.task_worked} is a share: it must be at most 1")


Unit = Literal["token", "sentence", "response"]
Normalise = Literal["group", "batch", "response", "constant"]
Spread = Literal["sample", "population", "none"]


class Preset(NamedTuple):
    """A published policy objective.

    Attributes:
      low, high: how far a unit's ratio may be below and above 1.
      normalise, spread: as in `post.advantage`.
      source: where it is published, and which of these values are not.
    """

    unit: Unit
    low: float
    high: float
    normalise: Normalise
    spread: Spread
    source: str


PRESETS = {
    "grpo": Preset(
        "token", 0.2, 0.2, "response", "sample",
        "GRPO, arXiv 2402.03300, eq. 3, without its KL; its bounds are PPO's, and n - 1 in the deviation is ours",
    ),
    "dapo": Preset(
        "token", 0.2, 0.28, "batch", "sample",
        "DAPO, arXiv 2503.14476, section 3; n - 1 in the deviation is ours",
    ),
    "dr_grpo": Preset(
        "token", 0.2, 0.2, "constant", "none",
        "Dr. GRPO, arXiv 2503.20783, section 3.2; a token counts as one of rl.max_new_tokens",
    ),
    "gspo": Preset(
        "response", 3e-4, 4e-4, "response", "sample",
        "GSPO, arXiv 2507.18071, eq. 5 and section 5.1; n - 1 in the deviation is ours",
    ),
    "lpo": Preset(
        "sentence", 0.03, 0.03, "group", "sample",
        "LPO, Ling 2.0 report, section 4.2.2; the pauses that end a sentence and n - 1 in the deviation are ours",
    ),
    "reinforce": Preset(
        "token", math.inf, math.inf, "response", "sample",
        "REINFORCE with a group's baseline, arXiv 2402.03300 without its ratio: one update a version",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning on the task that `data.sources` names. `train.steps` counts updates."""

    preset: Literal["grpo", "dapo", "dr_grpo", "gspo", "lpo", "reinforce"] = "lpo"
    prompts: int = 32  # problems whose answers a version of the policy learns from
    group: int = 8  # answers to each
    minibatches: int = 4  # updates in an epoch, each on other groups
    epochs: int = 1  # over a version's answers
    max_new_tokens: int = 96  # of an answer; one that reaches it is wrong
    thinking: Literal["on", "off", "template"] = "on"
    temperature: float = 1.0  # answers are drawn at it, and logits divided by it in training too
    problems: int = 4096  # of the task's split for reinforcement, read again and again
    answer_tags: bool = False  # only what stands in <answer> tags counts
    rows: int = 64  # answers that are drawn side by side
    eval_problems: int = 128  # that a version is measured on, now and then; none of them is learned from
    eval_every: int = 10  # versions; 0: never

    def __post_init__(self):
        check_at_least(self, 1, "prompts", "minibatches", "epochs", "max_new_tokens", "problems", "rows")
        check_at_least(self, 2, "group")
        check_at_least(self, 0, "eval_problems", "eval_every")
        check(self.temperature > 0, f"rl.temperature = {self.temperature} must be above 0")
        check(
            self.prompts % self.minibatches == 0,
            f"rl.prompts = {self.prompts} must be a multiple of rl.minibatches = {self.minibatches}",
        )

    @property
    def updates(self) -> int:
        """Updates of a version."""
        return self.minibatches * self.epochs

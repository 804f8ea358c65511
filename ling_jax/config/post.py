"""The settings of post-training."""

from dataclasses import dataclass
from typing import Annotated, Literal

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

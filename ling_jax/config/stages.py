"""A run in stages: what each of them changes, and the settings that it is trained with."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from ling_jax.config.checks import check, check_at_least
from ling_jax.config.data import DataSource
from ling_jax.config.rope import RopeScaling

if TYPE_CHECKING:
    from ling_jax.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run. What is None stays as in the stage before; in the first one, as in the run's own settings.

    Moments, expert biases and the places in the text go on from one stage to the next.
    """

    name: str
    tokens: int  # that it reads, padding counted; its last step may read beyond
    sources: tuple[DataSource, ...] | None = None
    sequence_length: int | None = None
    long_share: float | None = None  # of the tokens, in rows that hold one long document (`data.long_document`)
    global_batch_size: int | None = None
    microbatches: int | None = None
    peak_lr: float | None = None
    warmup_steps: int | None = None  # None: in the first stage the run's, in others none: their rate holds at once
    rope_theta: float | None = None
    rope_scaling: Annotated[RopeScaling | None, tyro.conf.arg(constructor=RopeScaling)] = None
    max_position_embeddings: int | None = None
    mtp_loss_scaling_factor: float | None = None
    bias_update_rate: float | None = None
    fp8: bool | None = None
    only: tuple[str, ...] | None = None  # patterns of modules that are trained, as `train.only`
    fresh_moments: bool = False  # the optimizer's begin at 0

    def __post_init__(self):
        check(bool(self.name), "a stage needs a name")
        check_at_least(self, 1, "tokens")


# Where a stage's settings are in a RunConfig.
PLACES = {
    "data": ("sources", "sequence_length", "long_share", "global_batch_size"),
    "schedule": ("peak_lr",),
    "train": ("microbatches", "bias_update_rate", "fp8", "only"),
    "model": ("rope_theta", "rope_scaling", "max_position_embeddings", "mtp_loss_scaling_factor"),
}


class StageRun(NamedTuple):
    """A stage with all of its settings.

    Attributes:
      config: of this stage alone; `train.steps` counts from the run's beginning.
      first_step, first_tokens: done and read when it begins.
      fresh_moments: see `Stage`.
    """

    config: "RunConfig"
    first_step: int = 0
    first_tokens: int = 0
    fresh_moments: bool = False


def stage_runs(config: "RunConfig") -> tuple[StageRun, ...]:
    """The stages of a run, in order; a run without stages is one.

    Raises:
      ValueError: for names that are not different, a decay of the learning rate, or settings that cannot be.
    """
    if not config.stages:
        return (StageRun(config),)
    names = [stage.name for stage in config.stages]
    check(len(set(names)) == len(names), f"stages {', '.join(names)}: each needs a name of its own")
    check(
        config.schedule.decay_fraction == 0,
        f"schedule.decay_fraction = {config.schedule.decay_fraction} must be 0 in a run of stages: their rates are "
        "constant, and checkpoints are merged in place of a decay (convert.py merge)",
    )
    block = max(stage.sequence_length or config.data.sequence_length for stage in config.stages)
    runs, step, tokens, current = [], 0, 0, dataclasses.replace(config, stages=())
    for number, stage in enumerate(config.stages):
        try:
            current = _changed(current, stage, number == 0, step, block, tokens)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from error
        runs.append(StageRun(current, step, tokens, stage.fresh_moments))
        tokens += current.data.tokens_of(tokens, current.train.steps - step)
        step = current.train.steps
    return tuple(runs)


def _changed(before: Any, stage: Stage, is_first: bool, step: int, block: int, tokens: int) -> Any:
    """The settings of a stage, from those of the one before."""
    parts = {
        place: {name: value for name in names if (value := getattr(stage, name)) is not None}
        for place, names in PLACES.items()
    }
    if stage.global_batch_size is not None and not is_first:
        parts["data"] |= {"batch_ramp_from": 0, "batch_ramp_by": 0, "batch_ramp_tokens": 0}
    parts["data"]["block_length"] = block
    if not is_first or stage.warmup_steps is not None:
        parts["schedule"]["warmup_steps"] = stage.warmup_steps or 0
    parts["schedule"]["first_step"] = step
    data = dataclasses.replace(before.data, **parts.pop("data"))
    parts["train"]["steps"] = step + data.steps_for(tokens, stage.tokens)
    changed = {place: dataclasses.replace(getattr(before, place), **values) for place, values in parts.items()}
    return dataclasses.replace(before, data=data, stage=stage.name, **changed)

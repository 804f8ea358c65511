"""The settings of a run, as frozen dataclasses."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from ling_jax.config.checks import check, check_at_least
from ling_jax.config.data import DataConfig, DataSource
from ling_jax.config.mesh import ONE_DEVICE, MeshConfig
from ling_jax.config.model import ModelConfig
from ling_jax.config.post import RLConfig, SFTConfig
from ling_jax.config.rope import RopeScaling
from ling_jax.config.stages import Stage, StageRun, stage_runs

NEEDLE_TOKENS = 256  # the shortest row that needles are looked for in


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in the Ling 2.0 report, section 3.2.1 (eps is not published)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices only
    clip_norm: float = 1.0  # global gradient norm
    mu_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second is always float32
    eight_bit: bool = False  # both moments of matrices as 8-bit codes, 256 of them to a scale

    def __post_init__(self):
        check_at_least(self, 0, "b1", "b2", "eps", "weight_decay", "clip_norm")
        check(
            not self.eight_bit or self.mu_dtype == "float32",
            f"optimizer.mu_dtype = {self.mu_dtype} says nothing of 8-bit moments: leave it at float32, or set "
            "optimizer.eight_bit to False",
        )
        check(max(self.b1, self.b2) < 1, f"b1 = {self.b1} and b2 = {self.b2} must be below 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warmup, constant, then an optional decay over the last part of the run."""

    peak_lr: float = 3.36e-4
    warmup_steps: int = 2000
    first_step: int = 0  # at which the warmup begins
    decay_fraction: float = 0.0  # share of the run's steps, at its end
    decay: Literal["linear", "cosine", "sqrt"] = "sqrt"  # sqrt: 1 - sqrt(share of the decay done)
    final_lr_fraction: float = 0.0

    def __post_init__(self):
        check_at_least(self, 0, "peak_lr", "warmup_steps", "first_step", "decay_fraction", "final_lr_fraction")
        check(self.decay_fraction <= 1, f"decay_fraction = {self.decay_fraction} must be at most 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 1000
    microbatches: int = 1  # the global batch is cut into this many, gradients are summed
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and products
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "minimal", "save_attention", "save_dispatch", "offload"] = "full"
    # Patterns of modules that are trained, such as "layers.linear_*.attention.*": all others, and expert biases, stay
    # as they are; (): everything is trained.
    only: tuple[str, ...] = ()
    fp8: bool = False  # products of attention and FFNs in blockwise FP8, forward and backward (docs/fp8.md)
    fp8_except: tuple[str, ...] = ()  # patterns of modules that stay in `dtype`, such as "*.attention.*" or "mtp.*"
    fp8_watch_every: int = 100  # steps between measurements of what FP8 loses; 0: none
    fp8_max_lost: float = 1.0  # a module goes back to `dtype` when more of an operand's elements become zero,
    fp8_min_cosine: float = -1.0  # or when quantised and original values point apart by more; by default never
    unroll_layers: bool = False  # run the layers as straight code instead of a scan
    init_std: float = 0.006  # Ling 2.0 report, section 3.2.1
    z_loss_coefficient: float = 0.0
    bias_update_rate: float = 1e-3
    seed: int = 0
    log_every: int = 1
    wandb_project: str | None = None  # of Weights & Biases, which the metrics go to as well: ling-jax[wandb]
    eval_every: int = 0  # steps between validations; 0: only at the end
    eval_needle: int = 0  # rows of each length in which every validation looks for needles too; 0: none
    sample_tokens: int = 96  # of the text that ends a run, in its report; 0: none
    max_skipped_steps: int = 5  # non-finite steps in a row before the run stops
    profile_start: int = 10  # steps done before the profiler's window opens
    profile_steps: int = 0  # its length; 0: no profile

    def __post_init__(self):
        check_at_least(self, 1, "steps", "microbatches", "log_every", "max_skipped_steps")
        check_at_least(
            self, 0, "eval_every", "eval_needle", "sample_tokens", "profile_steps", "bias_update_rate",
            "z_loss_coefficient", "fp8_watch_every",
        )  # fmt: skip
        check(self.fp8 or not self.fp8_except, f"train.fp8_except = {self.fp8_except} does nothing: set train.fp8 too")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 500  # steps; the last step is always saved
    keep_last: int = 2
    keep_every: int = 0  # also keep each step divisible by this; 0: none
    snapshot_tokens: int = 0  # tokens between snapshots of weights and expert biases alone, to be merged; 0: none
    keep_snapshots: int = 8
    merge_snapshots: int = 0  # every validation scores the mean of the last so many too; 0: none
    write_merged: bool = False  # the run's last act: that mean of its last stage, as a checkpoint, RUN/merged

    def __post_init__(self):
        check_at_least(self, 1, "every", "keep_last", "keep_snapshots")
        check_at_least(self, 0, "keep_every", "snapshot_tokens", "merge_snapshots")
        merged, kept = self.merge_snapshots, self.keep_snapshots
        check(
            not merged or (self.snapshot_tokens > 0 and 2 <= merged <= kept),
            f"checkpoint.merge_snapshots = {merged} must be between 2 and keep_snapshots = {kept}, and "
            "checkpoint.snapshot_tokens above 0",
        )
        check(merged > 0 or not self.write_merged, "checkpoint.write_merged needs checkpoint.merge_snapshots above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides a run's numbers."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = ONE_DEVICE
    stages: tuple[Stage, ...] = ()  # one after the other, each with settings of its own; (): the run is one stage
    stage: Annotated[str, tyro.conf.Suppress] = ""  # the one of several that these settings are of
    # Fields of `model` whose values are guesses, since no release of it is public: those of the weights that a run
    # starts from (--init-from) take their place.
    assumed: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    # What hub ids stood for when the run was begun, "ORG/NAME@REVISION COMMIT": a resume takes the same commits.
    hub: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    origin: Annotated[str, tyro.conf.Suppress] = ""  # the weights that the run started from, and what they average

    def __post_init__(self):
        length, limit = self.data.sequence_length, self.model.max_positions
        check(
            length <= limit,
            f"data.sequence_length = {length} exceeds the model's {limit} positions; shorten it, or raise "
            "max_position_embeddings or set rope_scaling",
        )
        check(
            not self.train.eval_needle or limit >= NEEDLE_TOKENS,
            f"train.eval_needle = {self.train.eval_needle} looks in rows of {NEEDLE_TOKENS} tokens at least, and the "
            f"model has {limit} positions: set it to 0, or raise max_position_embeddings",
        )
        rows, parts = self.data.global_batch_size, self.train.microbatches
        check(
            rows % parts == 0,
            f"data.global_batch_size = {rows} must be a multiple of train.microbatches = {parts}",
        )
        cut, part = (self.data.batch_ramp_from, self.data.batch_ramp_by), rows // parts
        check(
            all(n % part == 0 for n in cut),
            f"data.batch_ramp_from = {cut[0]} and batch_ramp_by = {cut[1]} must be multiples of the rows of a "
            f"microbatch, data.global_batch_size / train.microbatches = {part}: more microbatches make it smaller",
        )
        self.mesh.check(self.model)
        self.mesh.check_rows(rows, parts, length)
        if self.train.fp8:
            self.mesh.check_fp8(self.model)
        self.stage_runs()

    def stage_runs(self) -> tuple[StageRun, ...]:
        """The run's stages with all of their settings; ValueError for one that cannot be."""
        return stage_runs(self)

    @property
    def rows_per_device(self) -> int:
        """Rows of one microbatch that each device computes."""
        return self.data.global_batch_size // self.train.microbatches // self.mesh.batch_shards

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "RunConfig":
        """The settings that `to_json` wrote, as the kind of run that they are of."""
        values = json.loads(text)
        kinds = {"sft": SFTRun, "rl": RLRun}
        return _from_dict(next((kind for name, kind in kinds.items() if name in values), RunConfig), values)


@dataclass(frozen=True, kw_only=True)
class SFTRun(RunConfig):
    """All that decides the numbers of a run that is fine-tuned on conversations: python post.py sft NAME."""

    sft: SFTConfig = SFTConfig()

    def __post_init__(self):
        super().__post_init__()
        _check_post_training(self, "fine-tuning")


@dataclass(frozen=True, kw_only=True)
class RLRun(RunConfig):
    """All that decides the numbers of a run of reinforcement learning: python post.py rl NAME."""

    rl: RLConfig = RLConfig()

    def __post_init__(self):
        super().__post_init__()
        _check_post_training(self, "reinforcement learning")
        check(len(self.data.sources) == 1, "reinforcement learning has one task: data.sources must name one")
        rate = self.train.bias_update_rate
        check(rate == 0, f"train.bias_update_rate = {rate} must be 0: expert biases are frozen (spec 8.2)")


def _check_post_training(run: RunConfig, what: str) -> None:
    """Refuses settings that mean something in pre-training alone."""
    data, plain = run.data, DataSource(path="")
    check(not run.stages, f"{what} has no stages: start another run from this one's weights instead")
    for source in data.sources:
        mixed = (source.weight, source.max_epochs) != (plain.weight, plain.max_epochs)
        check(
            not mixed,
            f"weight and max_epochs of data source {source.path!r} mean nothing in {what}, where every "
            "conversation is read once an epoch: leave them out",
        )
    for name in ("block_length", "long_document", "batch_ramp_tokens", "max_bytes"):
        value = getattr(data, name)
        check(not value, f"data.{name} = {value} is for pre-training: leave it out of {what}")
    check(not run.train.eval_needle, "train.eval_needle is for pre-training: set it to 0")


def settings_diff(old: RunConfig, new: RunConfig) -> list[str]:
    """Every setting that differs, as "train.steps: 100 -> 200"; what weights came with is none of them."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    names = [name for name in before | after if name not in ("model.hf_json", "origin")]
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, tuple) and any(isinstance(entry, dict) for entry in value):
        value = {str(i): entry for i, entry in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, entry in value.items() for k, v in _flat(entry, f"{name}.{key}".lstrip(".")).items()}


def _from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
    """Rebuilds nested dataclasses from `dataclasses.asdict`; an unknown key is an error."""
    nested = {
        "model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig,
        "train": TrainConfig, "checkpoint": CheckpointConfig, "mesh": MeshConfig, "rope_scaling": RopeScaling,
        "sft": SFTConfig, "rl": RLConfig,
    }  # fmt: skip
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    check(not unknown, f"unknown {cls.__name__} field(s) {', '.join(unknown)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("sources", "stages") and value is not None:
            built[name] = tuple(_from_dict(DataSource if name == "sources" else Stage, part) for part in value)
        elif isinstance(value, list):  # JSON has no tuples
            built[name] = tuple(value)
        elif name in nested and isinstance(value, Mapping):
            built[name] = _from_dict(nested[name], value)
        else:
            built[name] = value
    return cls(**built)

"""One training run from its command to its report: the only place where all rooms meet."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax
import jax
from etils import epath

from ling_jax.checkpoint import Checkpointer, DamagedCheckpoint, find_checkpoint, read_meta, read_shapes, saved_steps
from ling_jax.cli import TrainCommand
from ling_jax.config import (
    ModelConfig,
    RLRun,
    RunConfig,
    SFTRun,
    StageRun,
    architecture_diff,
    count_params,
    settings_diff,
)
from ling_jax.convert.load import load_weights
from ling_jax.convert.merge import merge_snapshots
from ling_jax.convert.origin import check_origin, described, origin_tokenizer
from ling_jax.convert.tokenizer import GENERATION
from ling_jax.convert.transfer import carry
from ling_jax.convert.weights import CHECKPOINTS, HF, TOKENIZER, Weights, model_config_of, open_weights
from ling_jax.data.pipeline import Earlier
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import hub
from ling_jax.files.buckets import bucket_of, is_bucket
from ling_jax.files.one_writer import OneWriter
from ling_jax.files.paths import aside, at, check_bucket, move, write_whole
from ling_jax.files.whole import read_json
from ling_jax.generate.engine import generate
from ling_jax.generate.serving import serving_model
from ling_jax.model.model import device_bytes, split_model
from ling_jax.parallel.mesh import rows_here
from ling_jax.parallel.processes import barrier, check_same, lead_first
from ling_jax.post.rl import objective_of, open_rollouts
from ling_jax.post.sft import open_conversations
from ling_jax.saver import RunSaver
from ling_jax.snapshots import SNAPSHOTS, Snapshots
from ling_jax.train.feed import Feed, open_documents
from ling_jax.train.hardware import keep_freed_memory
from ling_jax.train.metrics import MetricsWriter, WandbRun, read_metrics, wandb_library
from ling_jax.train.report import write_report
from ling_jax.train.session import DivergedError, Session, StopRequest
from ling_jax.train.state import Trainer, TrainState, make_trainer

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"  # of a run's folder
SAMPLED = 4e9  # bytes of weights on a device up to which a run ends with a sample
TEMPERATURE, TOP_P = 0.7, 0.8  # what the releases recommend (spec 9)


def _check_buckets(command: TrainCommand) -> None:
    """One request for each bucket that the run reads or writes; ValueError before any work if one cannot be used."""
    data = command.config.data
    asked = [command.runs_dir, command.init_from, data.tokenizer, data.cache_dir, *(s.path for s in data.sources)]
    for path in {bucket_of(path): path for path in asked if path is not None and is_bucket(path)}.values():
        check_bucket(at(path))


@contextlib.contextmanager
def _claimed(run_dir: epath.Path, command: TrainCommand) -> Iterator[None]:
    """The run's folder is this process's alone; with --fresh it is a new one, with --from-step one without later steps.

    Raises:
      ValueError: if another process is at the run, or --fresh and --from-step ask for what cannot be.
    """
    with OneWriter(run_dir) as writer:
        steps = saved_steps(run_dir / CHECKPOINTS)
        replaced = command.fresh and (bool(steps) or (run_dir / CONFIG_FILE).exists())
        if replaced and not command.move_aside:
            raise ValueError(
                f"{run_dir} holds a run and --fresh was given: add --move-aside to rename its folder first, choose "
                "another --run, or drop --fresh to resume it"
            )
        if not replaced:
            if command.from_step is not None:
                _step_back(run_dir, command.from_step, steps)
            yield
            return
        elsewhere = aside(run_dir)
        writer.move(elsewhere)
        log.info("moved the earlier run to %s", elsewhere)
    with OneWriter(run_dir):
        yield


def _step_back(run_dir: epath.Path, step: int, steps: list[int]) -> None:
    """Moves the checkpoints and snapshots after `step` aside."""
    if step not in steps:
        raise ValueError(f"--from-step {step}: {run_dir / CHECKPOINTS} has the steps {steps or 'none'}")
    for folder in (run_dir / CHECKPOINTS, run_dir / SNAPSHOTS):
        elsewhere = aside(folder)
        for later in (s for s in saved_steps(folder) if s > step):
            elsewhere.mkdir(parents=True, exist_ok=True)
            move(folder / str(later), elsewhere / str(later))
            log.info("moved step %d to %s", later, elsewhere)


def _move_leftovers(run_dir: epath.Path) -> None:
    """Moves aside the tokenizer, and what came with weights, that an earlier attempt at a new run left."""
    for left in (run_dir / TOKENIZER, run_dir / HF):  # of other text or another vocabulary, perhaps; never deleted
        if left.exists():
            move(left, aside(left))


def _check_architecture(stages: Sequence[StageRun], meta: Mapping[str, Any], place: str, remedy: str) -> None:
    """Refuses to go on with another architecture, listing the differences.

    Args:
      meta: of the checkpoint to go on from, which is in `place`.
    """
    saved, config = _saved_and_wanted(stages, meta)
    if diff := architecture_diff(saved.model, config.model):
        raise ValueError(f"{place} holds a run of another architecture: {'; '.join(diff)} (saved -> wanted). {remedy}")


def _tell_changes(stages: Sequence[StageRun], meta: Mapping[str, Any]) -> None:
    """Says which settings are not those that the run was saved with, and whether it has come to its end."""
    (saved, config), step = _saved_and_wanted(stages, meta), meta["data"]["next_step"]
    if changed := settings_diff(saved, config):
        log.warning("settings that differ from those of step %d (old -> new): %s", step, "; ".join(changed))
    if (over := stages[-1].config.train.steps) <= step:
        log.info("already at step %d, %s --train.steps %d", step, "past" if over < step else "which is", over)


def _saved_and_wanted(stages: Sequence[StageRun], meta: Mapping[str, Any]) -> tuple[RunConfig, RunConfig]:
    """The settings that a checkpoint was saved with, and those of the stage that its step belongs to."""
    step = meta["data"]["next_step"]
    wanted = next((stage.config for stage in stages if stage.config.train.steps >= step), stages[-1].config)
    return RunConfig.from_json(json.dumps(meta["config"])), wanted


def _read_config(run_dir: epath.Path) -> RunConfig | None:
    """The settings that the run was last started with; None for a new run."""
    file = run_dir / CONFIG_FILE
    if not file.exists():
        return None
    try:
        return RunConfig.from_json(json.dumps(read_json(file)))
    except (ValueError, TypeError) as error:
        hint = f"every step in {run_dir / CHECKPOINTS} has the settings too: remove the file, and it is written anew"
        raise ValueError(f"{error if str(file) in str(error) else f'{file}: {error}'}; {hint}") from error


def _write_config(run_dir: epath.Path, config: RunConfig) -> None:
    write_whole(run_dir / CONFIG_FILE, config.to_json() + "\n")


def _check_special_ids(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Training ends documents as the tokenizer does; the model's id is for exports, where an answer ends: with the
    document, or, in chat models, with the turn."""
    if model.eos_token_id not in {tokenizer.eod_id, tokenizer.role_end_id} - {None}:
        raise ValueError(
            f"the tokenizer ends documents with id {tokenizer.eod_id}, but model.eos_token_id is "
            f"{model.eos_token_id}; set it (and model.pad_token_id) to {tokenizer.eod_id}"
        )


def _write_generation_config(folder: epath.Path, tokenizer: Tokenizer) -> None:
    ends = [tokenizer.eod_id] + ([tokenizer.role_end_id] if tokenizer.role_end_id is not None else [])
    settings = {"eos_token_id": ends, "pad_token_id": tokenizer.eod_id}
    settings |= {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    settings |= {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}
    (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n")


def _with_commits(config: RunConfig, run_dir: epath.Path, init_from: str | None) -> RunConfig:
    """The configuration with every hub id's commit: what it stood for when the run was begun, or stands for now."""
    last = _read_config(run_dir)
    asked = [name for name in (init_from, config.data.tokenizer) if name is not None]
    return dataclasses.replace(config, hub=hub.pinned(asked, last.hub if last is not None else ()))


def _with_origin(config: RunConfig, run_dir: epath.Path, init_from: str | None) -> RunConfig:
    """The configuration with one line on the weights that the run started from, with all fields of the config.json that
    they came with, which an export keeps, and with their values of the fields that are only assumed. A run that has
    begun needs its origin no more."""
    if saved_steps(run_dir / CHECKPOINTS):
        if (last := _read_config(run_dir)) is None:
            last = RunConfig.from_json(json.dumps(read_meta(run_dir / CHECKPOINTS)["config"]))
        origin, told_origin = last.model, last.origin
    elif init_from is not None:
        origin, told_origin = model_config_of(init_from), described(init_from)
    else:
        return config
    theirs = {name: getattr(origin, name) for name in config.assumed}
    ours = {name: getattr(config.model, name) for name in config.assumed}
    if told := [f"model.{name}: {ours[name]} -> {value}" for name, value in theirs.items() if value != ours[name]]:
        log.info("assumed settings give way to those of the weights (assumed -> theirs): %s", "; ".join(told))
    model = dataclasses.replace(config.model, hf_json=origin.hf_json, **theirs)
    return dataclasses.replace(config, model=model, origin=told_origin)


def _prepare(
    run_dir: epath.Path, config: RunConfig, meta: Mapping[str, Any], origin: Weights | None
) -> tuple[Feed, RunConfig]:
    """The run's feed, and its settings with those that follow from that; process 0 also writes the run's folder,
    which the others compare with theirs. `meta` is of the checkpoint to go on from; `origin`, what a new run starts
    from."""
    lead = jax.process_index() == 0
    if lead:
        if origin is not None or not meta:
            _move_leftovers(run_dir)
        if meta:
            remedy = "Choose another --run, or start over with --fresh --move-aside"
            if origin is not None:
                remedy = "Its moments fit no other: give its configuration, or leave --init-optimizer out"
            place = str(run_dir if origin is None else origin.folder)
            _check_architecture(config.stage_runs(), meta, place, remedy)
    else:
        _check_shared(run_dir, config)
    feed = _opened(run_dir, config, meta, origin)
    config = feed.settled(config, meta["data"]["next_step"] if meta else 0)
    _check_special_ids(feed.tokenizer, config.model)
    if not lead:
        return feed, config
    if meta:
        _tell_changes(config.stage_runs(), meta)
    if origin is not None:
        carry(origin.companions(), run_dir / HF)
    if not (run_dir / HF / GENERATION).exists():
        _write_generation_config(run_dir / TOKENIZER, feed.tokenizer)
    _write_config(run_dir, config)
    return feed, config


def _opened(run_dir: epath.Path, config: RunConfig, meta: Mapping[str, Any], origin: Weights | None) -> Feed:
    """The feed of a run: documents, conversations, or its own answers."""
    folder, trained_with = str(run_dir / TOKENIZER), meta.get("tokenizer") or None
    tokenizer = config.data.tokenizer if origin is None else origin_tokenizer(origin, config.data.tokenizer)
    earlier = Earlier(RunConfig.from_json(json.dumps(meta["config"])).data, meta["data"]) if meta else None
    if isinstance(config, SFTRun):
        return open_conversations(config, tokenizer, folder, trained_with, earlier)
    if isinstance(config, RLRun):
        return open_rollouts(config, tokenizer, run_dir, trained_with, earlier)
    return open_documents(config, tokenizer, folder, trained_with, earlier)


def _check_shared(run_dir: epath.Path, config: RunConfig) -> None:
    """Refuses a folder that is not the one process 0 writes, or settings that are not its settings."""
    file, process = run_dir / CONFIG_FILE, jax.process_index()
    if not file.exists():
        raise ValueError(
            f"process {process} does not see {file}, which process 0 has written: put --runs-dir on a file system that "
            "all hosts share, or in a bucket (gs://, s3://)"
        )
    lead = _read_config(run_dir)
    if isinstance(lead, SFTRun) and lead.sft.epochs:  # its steps follow from what it has read
        lead = dataclasses.replace(lead, train=dataclasses.replace(lead.train, steps=config.train.steps))
    if lead != config:
        raise ValueError(
            f"the settings of process {process} differ from those of process 0, in {file}: start all processes with "
            "one command, and see that --runs-dir is on a file system that they share"
        )


@contextlib.contextmanager
def _way_out(origin: epath.Path | None) -> Iterator[None]:
    """Adds to what is said of a damaged checkpoint how to go on: of the run's own, or of the `origin` of a new run."""
    try:
        yield
    except DamagedCheckpoint as error:
        if error.good is None:
            raise
        flag = f"--from-step {error.good}" if origin is None else f"--init-from {origin.parent / str(error.good)}"
        raise ValueError(f"{error}. To go on from there: the same command with {flag}") from error


def _origin_checkpoint(path: str) -> epath.Path:
    """The checkpoint that a new run continues with --init-optimizer continued; ValueError if it has no moments."""
    folder = find_checkpoint(path)
    with _way_out(folder):
        if "optimizer" in read_shapes(folder):
            return folder
    raise ValueError(
        f"--init-optimizer continued: {folder} has weights and no moments of an optimizer; name a step of a run's "
        f"{CHECKPOINTS}/, or leave the flag out to start at step 0"
    )


def _beginning(saver: RunSaver, command: TrainCommand) -> tuple[dict[str, Any], Weights | None]:
    """The metadata of the checkpoint to go on from, {} if there is none; and the weights that a new run starts from.

    Raises:
      ValueError: if they do not fit the run's model, or the step to go on from is the last or later.
    """
    if command.init_from is None or saver.checkpointer.all_steps():
        with _way_out(None):
            return saver.meta(), None
    if command.init_optimizer == "fresh":
        check_origin(command.init_from, saver.config.model, command.init_mtp)
        return {}, open_weights(command.init_from, mtp=command.init_mtp == "same")
    saver.origin = _origin_checkpoint(command.init_from)
    with _way_out(saver.origin):
        meta = saver.meta()
    step, last = meta["data"]["next_step"], _left(saver.config.stage_runs(), 0, command.stop_after)[-1]
    if step >= (end := last.config.train.steps) and not isinstance(saver.config, SFTRun):
        raise ValueError(f"--init-from {saver.origin} has done {step} steps, and the run ends after {end}: raise that")
    return meta, open_weights(command.init_from)


def _first_state(trainer: Trainer, saver: RunSaver, origin: Weights | None) -> TrainState:
    """The checkpoint to go on from; without one, the weights of `origin` or new ones. An MTP layer that `origin` does
    not give is new."""
    if (start := saver.start()) is not None:
        log.info("resuming from step %s%s", start.name, f" of {start}" if start == saver.origin else "")
        with _way_out(saver.origin):
            return saver.restore(trainer)
    if origin is None:
        return trainer.new_state()
    _, params, bias = split_model(load_weights(origin, mesh=trainer.config.mesh))
    if trainer.config.model.num_nextn_predict_layers and not origin.config.num_nextn_predict_layers:
        params["mtp"], bias["mtp"] = trainer.new_mtp()
    return trainer.new_state_from(params, bias)


def _sample(trainer: Trainer, state: TrainState, feed: Feed) -> str | None:
    """Continues the feed's prompt, if the run is to, unless that would take too much of a device: to serve, weights are
    cut into fewer pieces than to train."""
    if not trainer.config.train.sample_tokens:
        return None
    model = trainer.compute.model(state.params, state.bias)
    size = sum(device_bytes(serving_model(model)).values())
    if size > SAMPLED:
        log.info("no sample of %.1f GB of weights a device: sample.py makes one, over a mesh that they fit", size / 1e9)
        return None
    tokenizer, (prompt, ids) = feed.tokenizer, feed.prompt()
    room = min(trainer.config.train.sample_tokens, trainer.config.model.max_positions - len(ids))
    ends = [tokenizer.eod_id]
    if isinstance(trainer.config, SFTRun | RLRun) and tokenizer.role_end_id is not None:
        ends.append(tokenizer.role_end_id)
    new = generate(model, [ids], room, temperature=TEMPERATURE, top_p=TOP_P, eos_ids=ends)[0]
    return prompt + tokenizer.decode(new)


def _report(
    saver: RunSaver,
    stages: Sequence[StageRun],
    step: int,
    feed: Feed,
    run_dir: epath.Path,
    seconds: float,
    took: Mapping[str, float],
    sample: str | None,
) -> None:
    """Writes report.html and logs its headline figures; `took`, the seconds of each stage in this session."""
    config = saver.config
    others = feed.baselines()
    records = read_metrics(run_dir)
    scores = next((r for r in reversed(records) if "eval/nats_per_token" in r), {})
    counts = count_params(config.model)
    summary = {
        "steps": f"{step} of {stages[-1].config.train.steps}",
        "tokens seen": f"{saver.read.tokens:,}",
        "parameters": f"{counts.total:,} in all, {counts.active:,} active per token",
        "wall time of this session": f"{seconds:.0f} s",
        "versions": f"jax {jax.__version__}, flax {flax.__version__}, {jax.device_count()} {jax.devices()[0].platform}",
    }
    if config.origin:
        summary["started from"] = config.origin
    for stage in stages if config.stage else ():
        summary[f"stage {stage.config.stage}"] = _told(stage, took.get(stage.config.stage))
        log.info("stage %s: %s", stage.config.stage, summary[f"stage {stage.config.stage}"])
    if "eval/bits_per_byte" in scores:
        summary["validation bits per byte"] = f"{scores['eval/bits_per_byte']:.3f} (step {scores['step']})"
        text = ", ".join(f"{name} {value:.3f}" for name, value in others.items())
        log.info("validation bits per byte %.3f; the same bytes: %s", scores["eval/bits_per_byte"], text)
    if scores:
        summary["validation nats per token"] = f"{scores['eval/nats_per_token']:.3f}"
    ends = {stage.config.stage: stage.config.train.steps for stage in stages if config.stage}
    path = write_report(run_dir, run_dir.name, summary, others, sample, ends)
    log.info("report: %s", path)


def _told(stage: StageRun, seconds: float | None) -> str:
    """A stage in one line: its steps, rows and rate."""
    data, rate, end = stage.config.data, stage.config.schedule.peak_lr, stage.config.train.steps
    rows = f"{data.global_batch_size} row{'s' * (data.global_batch_size > 1)}"
    batch = f"{rows} of {data.sequence_length} tokens, learning rate {rate:g}"
    time_taken = "" if seconds is None else f", {seconds:.0f} s"
    return f"steps {stage.first_step + 1} to {end}, {batch}{time_taken}"


def run_training(name: str, command: TrainCommand) -> int:
    """Trains, or resumes, the run of `command`; returns the exit code (0 also after a signal's clean stop).

    Raises:
      ValueError: for whatever is wrong with the settings, the data or the folder, before any compilation.
    """
    if command.init_mtp != "same" and command.init_from is None:
        raise ValueError(f"--init-mtp {command.init_mtp} is about the weights of --init-from: give that too")
    if command.init_optimizer != "fresh" and (command.init_from is None or command.init_mtp != "same"):
        raise ValueError(
            "--init-optimizer continued goes on with a checkpoint as it is: give --init-from RUN@STEP and no --init-mtp"
        )
    if (project := command.config.train.wandb_project) is not None and jax.process_index() == 0:
        wandb_library(project)
    run_dir = at(command.runs_dir) / (command.run or name)
    _check_buckets(command)
    command = _with_stages(_with_step(command, run_dir))
    trainer = make_trainer(command.config.stage_runs()[0].config)
    with _claimed(run_dir, command) if jax.process_index() == 0 else contextlib.nullcontext():
        devices = trainer.compute.mesh.devices
        log.info("devices: %d %s", devices.size, devices.flat[0].device_kind)
        barrier("room is made")
        return _train(run_dir, command)


def _with_step(command: TrainCommand, run_dir: epath.Path) -> TrainCommand:
    """The command with the checkpoint that --init-from RUN@STEP means, and without --init-from for a run that has
    begun and needs its origin no more.

    Raises:
      ValueError: for a step that the other run has not, or the run's own.
    """
    begun = not command.fresh and bool(saved_steps(run_dir / CHECKPOINTS))
    if found := re.fullmatch(r"(.+)@(\d+)", command.init_from or ""):
        name, step = found[1], int(found[2])
        for run in (at(name), at(command.runs_dir) / name):
            if os.path.abspath(run) == os.path.abspath(run_dir):
                hint = f"choose another --run, or go back with --from-step {step}"
                raise ValueError(f"--init-from {command.init_from} is the run itself: {hint}")
            if begun or not (steps := saved_steps(run / CHECKPOINTS)):
                continue
            if step not in steps:
                raise ValueError(f"--init-from {command.init_from}: {run} has the steps {', '.join(map(str, steps))}")
            return dataclasses.replace(command, init_from=os.fspath(run / CHECKPOINTS / str(step)))
    return dataclasses.replace(command, init_from=None) if begun else command  # a hub id, perhaps


def _with_stages(command: TrainCommand) -> TrainCommand:
    """The command with the step of --from-stage; ValueError for a stage that the run has not."""
    stages = command.config.stage_runs()
    names = [stage.config.stage for stage in stages if stage.config.stage]
    for flag, name in (("--stop-after", command.stop_after), ("--from-stage", command.from_stage)):
        if name is not None and name not in names:
            raise ValueError(f"{flag} {name}: the run's stages are {', '.join(names) or 'none'}")
    if command.from_stage is None:
        return command
    first = stages[names.index(command.from_stage)].first_step
    if not first or command.from_step is not None:
        why = "the run begins with it: --fresh does" if not first else "give that or --from-step"
        raise ValueError(f"--from-stage {command.from_stage}: {why}")
    return dataclasses.replace(command, from_step=first)


def _train(run_dir: epath.Path, command: TrainCommand) -> int:
    started, lead = time.perf_counter(), jax.process_index() == 0
    config = _with_commits(command.config, run_dir, command.init_from)
    config = _with_origin(config, run_dir, command.init_from)
    stages, project = config.stage_runs(), config.train.wandb_project
    borders = [stage.first_step for stage in stages[1:]]
    saver = RunSaver(Checkpointer(str(run_dir / CHECKPOINTS), config.checkpoint, borders), config)
    if config.checkpoint.snapshot_tokens:
        saver.snapshots = Snapshots(run_dir, config.checkpoint)
    with StopRequest().listening() as stop, contextlib.closing(saver):
        meta, origin = _beginning(saver, command)
        wandb = WandbRun(run_dir, project, dataclasses.asdict(config)) if project is not None and lead else None
        feed, config = lead_first("the data is open", partial(_prepare, run_dir, config, meta, origin))
        check_same("the text", feed.fingerprint())
        saver.config, stages = config, config.stage_runs()
        saver.tokenizer, read, took = feed.tokenizer.fingerprint, feed.state, {}
        todo = _left(stages, meta["data"]["next_step"] if meta else 0, command.stop_after)
        trainer = _trainer(todo[0].config).without_fp8(meta.get("fp8_fallen", []))
        state = _first_state(trainer, saver, origin)
        saver.begin(int(state.step), feed.facts)
        keep_freed_memory()
        with MetricsWriter(run_dir, int(state.step) or None, wandb) if lead else contextlib.nullcontext() as writer:
            for stage in todo:
                begun = time.perf_counter()
                if trainer.config is not stage.config:
                    trainer = _trainer(stage.config).without_fp8(trainer.fallen)
                state, saver.config = _entered(trainer, state, stage), stage.config
                _log_start(stage.config, int(state.step))
                here = rows_here(trainer.compute.mesh, stage.config.data.global_batch_size).tolist()
                reading = feed.reading(stage.config, int(state.step), read, here)
                saver.read, saver.step_read = reading.begin, reading.begin.tokens
                texts = reading.held_out, saver, writer, str(run_dir), stop, reading.needles
                try:
                    with Session(trainer, state, *texts) as session:
                        session.run(saver.watching(reading.batches(session)))
                except DivergedError as error:
                    log.error("stopped: %s", error)
                    return 1
                if session.done < stage.config.train.steps:
                    cause = "a signal to another process" if stop.received is None else stop.received.name
                    log.info("stopped by %s at step %d; run the same command to resume", cause, session.done)
                    return 0  # whoever sent the signal does not wait long
                trainer, state, read = session.trainer, session.state, saver.read
                took[stage.config.stage] = time.perf_counter() - begun
    sample = _sample(trainer, state, feed)
    if lead:
        _report(saver, stages, int(state.step), feed, run_dir, time.perf_counter() - started, took, sample)
        if config.checkpoint.write_merged and int(state.step) >= stages[-1].config.train.steps:
            merge_snapshots(run_dir, stages[-1])
    barrier("the report is written")
    return 0


def _trainer(config: RunConfig) -> Trainer:
    """The trainer of a run, with the objective of its kind."""
    return make_trainer(config, objective=objective_of(config) if isinstance(config, RLRun) else None)


def _left(stages: Sequence[StageRun], step: int, stop_after: str | None) -> list[StageRun]:
    """The stages that are not done at a step, up to one by name; if all are, the last one, which then does nothing."""
    names = [stage.config.stage for stage in stages]
    last = len(stages) - 1 if stop_after is None else names.index(stop_after)
    left = [stage for stage in stages[: last + 1] if stage.config.train.steps > step]
    return left or [stages[last]]


def _entered(trainer: Trainer, state: TrainState, stage: StageRun) -> TrainState:
    """The state with which a stage goes on: at its beginning with new moments, if it says so. The count of updates,
    which the learning rate follows, goes on."""
    if not (stage.fresh_moments and stage.first_step and int(state.step) == stage.first_step):
        return state
    fresh: Any = trainer.new_state_from(state.params, state.bias).optimizer
    before: Any = state.optimizer
    return state._replace(optimizer=(*fresh[:-1], before[-1]))


def _log_start(config: RunConfig, step: int) -> None:
    counts = count_params(config.model)
    left: Mapping[str, Any] = {"parameters": f"{counts.total:,}", "active": f"{counts.active:,}"}
    text = ", ".join(f"{value} {key}" for key, value in left.items())
    stage = f"stage {config.stage}, " if config.stage else ""
    log.info("%straining from step %d to %d: %s; the first step compiles", stage, step, config.train.steps, text)

"""Trains a Ling model: python train.py NAME [--run RUN] [--train.steps 100] [...]; --help lists every flag."""

from collections.abc import Sequence

from ling_jax.cli import TrainCommand, parse_train, run_main
from ling_jax.config import RunConfig
from ling_jax.model.model import sharding_table
from ling_jax.parallel.processes import run_together
from ling_jax.plan.plan import make_plan
from ling_jax.plan.report import render
from ling_jax.plan.suggest import render as render_suggestion
from ling_jax.plan.suggest import suggest
from ling_jax.runner import run_training


def main(argv: Sequence[str]) -> int:
    return act(*parse_train(argv))


def act(name: str, command: TrainCommand) -> int:
    """Does what a command asks for: to print, to plan or to train; returns its exit code."""
    if command.print_config:
        print(command.config.to_json())
        return 0
    if command.print_sharding:
        config = command.config
        print(sharding_table(config.model, config.mesh, config.train.param_dtype))
        return 0
    if command.topology is not None and command.suggest:
        suggestion = suggest(planned(command), command.topology, command.slices)
        print(render_suggestion(name, suggestion))
        return 0 if suggestion.best else 3
    if command.topology is not None:
        plan = make_plan(planned(command), command.topology, command.slices)
        print(plan.to_json() if command.json else f"{render(plan)}\n\n{plan.to_json()}")
        return 0 if plan.memory.fits else 3
    return run_together(lambda: run_training(name, command))


def planned(command: TrainCommand) -> RunConfig:
    """The settings that are planned: those of the stage that --from-stage names, by default of the first."""
    stages = {stage.config.stage: stage.config for stage in command.config.stage_runs()}
    if command.from_stage is None:
        return next(iter(stages.values()))
    if command.from_stage not in stages:
        raise ValueError(f"--from-stage {command.from_stage}: the run's stages are {', '.join(filter(None, stages))}")
    return stages[command.from_stage]


def run() -> None:
    """The command `ling-train`."""
    run_main(main)

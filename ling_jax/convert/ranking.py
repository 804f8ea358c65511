"""The best checkpoints of a run by one held-out set, beside what others, which chose nothing, say of them.

The best of many figures is too good: noise helped to choose it. So a figure that chose is never one to report; the
held-out text of another source, or of none if a task chose, is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from ling_jax.config.text import columns
from ling_jax.train.evaluations import EVALUATIONS, read_records
from ling_jax.train.metrics import METRICS_FILE, read_metrics

LOSSES = ("nats_per_token", "bits_per_byte")
ASKED = ("window", "num_fewshot", "limit", "chat")  # of a record: how its tasks were asked
OF_A_SOURCE = re.compile(rf"eval/(.+)/({'|'.join(LOSSES)})")
HOW = "a loss that validation logs (eval/SOURCE/nats_per_token), or TASK/METRIC as `evaluate --tasks` keeps it"

Figures = Mapping[int, float]  # by step


class Ranking(NamedTuple):
    """Checkpoints of a run by one metric.

    Attributes:
      metric, figures: what ranks them.
      higher_is_better: whether a higher figure is the better one.
      others: held-out losses that the metric has no part in, by name.
    """

    metric: str
    figures: Figures
    higher_is_better: bool
    others: Mapping[str, Figures]

    def best(self, count: int) -> list[int]:
        """The best steps, ascending; of equal ones the later."""
        sign = -1 if self.higher_is_better else 1
        return sorted(sorted(self.figures, key=lambda step: (sign * self.figures[step], -step))[:count])

    def render(self, chosen: Sequence[int]) -> str:
        """A table of all steps, the chosen ones marked."""
        rows: list[tuple[str, ...]] = [("step", self.metric, *self.others)]
        for step in sorted(self.figures):
            others = (figures.get(step) for figures in self.others.values())
            told = ["" if figure is None else f"{figure:.6g}" for figure in (self.figures[step], *others)]
            rows.append((f"{step}{' *' if step in chosen else ''}", *told))
        return columns(rows)


def ranking(run: epath.Path, steps: Sequence[int], metric: str | None) -> Ranking:
    """The steps of a run by a metric of its metrics.jsonl, or of the records in its evaluations/.

    Raises:
      ValueError: for a metric that the run does not have at each of the steps, or that has no better and worse.
    """
    records = {record["step"]: record for record in read_metrics(run)}
    keys = dict.fromkeys(key for record in records.values() for key in record)
    held_out = [key for key in keys if OF_A_SOURCE.fullmatch(key) and key.endswith(LOSSES[0])]
    known = f"{run} has {', '.join(held_out) or 'no losses of validation'}"
    if metric is None:
        raise ValueError(f"--top needs --rank-by: {HOW}; {known}")
    if not metric.startswith("eval/"):
        figures, higher_is_better = _of_task(run, steps, metric)
        return Ranking(metric, figures, higher_is_better, _losses(records, steps, held_out))
    if not set(LOSSES) & set(metric.split("/")):
        raise ValueError(f"--rank-by {metric} ranks no checkpoints: give {HOW}")
    figures = _losses(records, steps, [metric])[metric]
    remedy = "set train.eval_every so that every checkpoint is validated" if figures else known
    _check_all(figures, steps, f"{run / METRICS_FILE} has no {metric}", remedy)
    own = OF_A_SOURCE.fullmatch(metric)  # None: it is a loss of all sources together
    others = [key for key in held_out if own and key != f"eval/{own[1]}/{LOSSES[0]}"]
    return Ranking(metric, figures, False, _losses(records, steps, others))


def _losses(records: Mapping[int, Mapping], steps: Sequence[int], keys: Sequence[str]) -> dict[str, Figures]:
    """The figures of each key at those of the steps that have one."""
    here = {step: records[step] for step in steps if step in records}
    return {key: {step: r[key] for step, r in here.items() if r.get(key) is not None} for key in keys}


def _of_task(run: epath.Path, steps: Sequence[int], metric: str) -> tuple[Figures, bool]:
    """A task's figures at the steps, which must have been asked in one way, and whether higher is better."""
    task, _, name = metric.rpartition("/")
    key, found, better = name if "," in name else f"{name},none", {}, set()
    for record in read_records(run):
        figure = record["results"].get(task, {}).get(key)
        if record["step"] in steps and isinstance(figure, int | float):
            asked = tuple(record.get(setting) for setting in ASKED)
            found.setdefault(asked, {})[record["step"]] = figure
            better.add(record.get("higher_is_better", {}).get(task, {}).get(key.partition(",")[0]))
    figures = max(found.values(), key=len, default={})
    remedy = f"evaluate each of them (python -m ling_jax.evaluate --tasks {task or name})"
    _check_all(figures, steps, f"{run / EVALUATIONS} has no {metric}, asked in one way,", remedy)
    if sum(len(each) == len(figures) for each in found.values()) > 1:
        ways = "; ".join(str(dict(zip(ASKED, asked, strict=True))) for asked in found)
        raise ValueError(f"--rank-by {metric}: {run / EVALUATIONS} has it asked in several ways, {ways}: leave one")
    if None in better or len(better) > 1:
        raise ValueError(f"--rank-by {metric}: the records do not say whether higher is better: give {HOW}")
    return figures, better.pop()


def _check_all(figures: Figures, steps: Sequence[int], lack: str, remedy: str) -> None:
    if lacking := [step for step in steps if step not in figures]:
        have = ",".join(map(str, sorted(figures)))
        raise ValueError(
            f"{lack} of step {', '.join(map(str, lacking))}: {remedy}"
            + (f"; or choose among those that have it by --steps {have}" if len(figures) > 1 else "")
        )

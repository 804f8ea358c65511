"""Results of evaluation tasks, kept in a run: `evaluations/STEP-TASKS.json`, one object each, and a table of them."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ling_jax.files.paths import at, write_whole
from ling_jax.files.whole import read_json

EVALUATIONS = "evaluations"
HEADINGS = ("task", "metric", "value", "standard error", "documents")

Record = Mapping[str, Any]  # "step", "tasks", how they were asked, and lm-eval's "results", "n-samples", ... by task


def save_record(run_dir: epath.PathLike, name: str, record: Record) -> epath.Path:
    """Writes `run_dir`/evaluations/`name`.json whole, in place of one of that name, and returns its path."""
    folder = at(run_dir) / EVALUATIONS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
    return path


def read_records(run_dir: epath.PathLike) -> list[Record]:
    """The records of a run, by step; ValueError naming a file that is no record."""
    folder = at(run_dir) / EVALUATIONS
    if not folder.is_dir():
        return []
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        if not isinstance(record.get("step"), int) or not isinstance(record.get("results"), dict):
            raise ValueError(f"{path} is no record of an evaluation: it has no step or no results; move it away")
        records.append(record)
    return sorted(records, key=lambda record: record["step"])


def rows(record: Record) -> list[tuple[str, ...]]:
    """The metrics of a record as texts under HEADINGS; a filter's name, where it has one, stands behind the metric."""
    found = []
    for task, metrics in record["results"].items():
        documents = record.get("n-samples", {}).get(task, {}).get("effective", "")
        for key, value in sorted(metrics.items()):
            metric, comma, part = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            texts = [_text(number) for number in (value, metrics.get(f"{metric}_stderr,{part}"))]
            found.append((task, metric if part == "none" else f"{metric} ({part})", *texts, str(documents)))
    return found


def section(records: Sequence[Record]) -> str:
    """The part of a report that shows records; empty without any."""
    if not records:
        return ""
    headings = "".join(f'<th scope="col">{name}</th>' for name in ("step", *HEADINGS))
    lines = [
        "".join(f"<td>{html.escape(text)}</td>" for text in (f"{record['step']:,}", *row))
        for record in records
        for row in rows(record)
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<section id="evaluations"><h2>Evaluations</h2>\n<table><thead><tr>{headings}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>\n{''.join(map(_answers, records))}</section>"
    )


def _answers(record: Record) -> str:
    """Answers that a record keeps of a chat model, folded up."""
    samples = record.get("samples") or []
    if not samples:
        return ""
    told = "".join(
        f'<pre class="sample">{html.escape(one["question"])}\n{html.escape(one["text"])}\n'
        f"({'right' if one['right'] else 'wrong: ' + html.escape(one['expected'])})</pre>\n"
        for one in samples
    )
    heading = f"step {record['step']:,}: {len(samples)} answers of {html.escape(str(record.get('task', '')))}"
    return f"<details><summary>{heading}</summary>\n{told}</details>\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    return "" if value in (None, "N/A") else str(value)

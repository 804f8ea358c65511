"""A run's curves as PNGs and as one page, `report.html`, that needs nothing but itself."""

import base64
import html
import json
from collections.abc import Mapping, Sequence

from etils import epath

from ling_jax.files.paths import at, write_whole
from ling_jax.train.evaluations import read_records, section
from ling_jax.train.figures import FIGURES, Drawing, Run, new_figure, png
from ling_jax.train.metrics import paused_collector, read_metrics
from ling_jax.train.needle import NEEDLE

REPORT_FILE = "report.html"
REPORT_FOLDER = "report"
MARKS = "<!-- evaluations -->", "<!-- end of evaluations -->"  # around what `show_evaluations` replaces

CSS = """
:root { color-scheme: light dark; --ink: #20242c; --soft: #5d6572; --line: #dfe2e7; --page: #fafbfc; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa3b0; --line: #343a44; --page: #15181d; --card: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.5rem; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
section { margin: 0 0 2.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.5rem; }
.figures section { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .875rem; }
pre { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  overflow-x: auto; font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); margin-bottom: .6rem; }
"""


@paused_collector()
def write_report(
    run_dir: epath.PathLike,
    title: str,
    summary: Mapping[str, str],
    baselines: Mapping[str, float] | None = None,
    sample: str | None = None,
    stages: Mapping[str, int] | None = None,
) -> epath.Path:
    """Draws `run_dir`/report/*.png and writes `run_dir`/report.html, from metrics.jsonl and config.json.

    Figures without data are left out, also those of an earlier report.

    Args:
      run_dir: the run's folder, local or in a bucket.
      title: the page's heading.
      summary: rows of the table on top, label to text.
      baselines: label to bits per byte of the held-out text, drawn beside the validation curve.
      sample: text that the model wrote.
      stages: the last step of each stage, by name.
    Returns:
      The path of report.html.
    Raises:
      ValueError: if the run has no readable metrics.jsonl.
    """
    folder = at(run_dir)
    config_path = folder / "config.json"
    config = config_path.read_text() if config_path.exists() else None
    first = json.loads(config).get("model", {}).get("first_k_dense_replace", 0) if config else 0
    run = Run(read_metrics(folder), baselines or {}, first, stages or {})
    (folder / REPORT_FOLDER).mkdir(parents=True, exist_ok=True)
    sections = []
    for spec in (*FIGURES, NEEDLE):
        figure = new_figure(spec.height)
        alt = spec.draw(figure, run)
        path = folder / REPORT_FOLDER / f"{spec.name}.png"
        if alt is None:
            path.unlink(missing_ok=True)
            continue
        data = png(figure)
        path.write_bytes(data)
        sections.append(_figure_section(spec, alt, data))
    page = folder / REPORT_FILE
    page.write_text(_page(title, summary, sections, section(read_records(folder)), sample, config))
    return page


def show_evaluations(run_dir: epath.PathLike) -> None:
    """Brings the evaluations in a run's report up to date; a run without a report gets them with its first."""
    page = at(run_dir) / REPORT_FILE
    before, mark, rest = page.read_text().partition(MARKS[0]) if page.exists() else ("", "", "")
    if mark:
        after = rest.partition(MARKS[1])[2]
        write_whole(page, f"{before}{MARKS[0]}\n{section(read_records(run_dir))}\n{MARKS[1]}{after}")


def _figure_section(spec: Drawing, alt: str, data: bytes) -> str:
    note = f"<figcaption>{html.escape(spec.note)}</figcaption>" if spec.note else ""
    image = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f'<section id="{spec.name}"><h2>{html.escape(spec.title)}</h2>\n'
        f'<figure><img src="{image}" alt="{html.escape(alt)}">{note}</figure></section>'
    )


def _page(
    title: str,
    summary: Mapping[str, str],
    figures: Sequence[str],
    evaluations: str,
    sample: str | None,
    config: str | None,
) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(label)}</th><td>{html.escape(text)}</td></tr>'
        for label, text in summary.items()
    )
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if rows:
        parts.append(f"<section><h2>Summary</h2>\n<table><tbody>\n{rows}\n</tbody></table></section>")
    if figures:
        parts.append('<div class="figures">\n' + "\n".join(figures) + "\n</div>")
    parts.append(f"{MARKS[0]}\n{evaluations}\n{MARKS[1]}")
    if sample is not None:
        parts.append(f'<section><h2>Sample</h2>\n<pre class="sample">{html.escape(sample)}</pre></section>')
    if config is not None:
        parts.append(
            "<section><h2>Configuration</h2>\n<details><summary>every setting of this run</summary>\n"
            f"<pre>{html.escape(config)}</pre></details></section>"
        )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )

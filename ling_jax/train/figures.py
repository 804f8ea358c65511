"""A run's figures: from records to arrays, from arrays to PNGs.

Figures go through matplotlib's objects (`Figure`, the Agg canvas), never through pyplot, so drawing leaves no
global state behind and needs no display. matplotlib is imported on first use: training does not need it.

Legend: S logged steps, L MoE layers.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils import epath

MAX_POINTS = 1000  # of a drawn line: about one per pixel
MAX_COLUMNS = 160  # of the heat map
MAX_ROWS = 100 * MAX_COLUMNS  # that it averages

INK, GRID = "#3d4450", "#e6e8ec"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2563a8", "#cf6f1b", "#2b8a67", "#c0362c", "#7a5aa6", "#8a919c"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)

MetricsRecord = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The records of a run that the drawing functions read."""

    records: Sequence[MetricsRecord]
    baselines: Mapping[str, float]
    first_moe_layer: int
    stages: Mapping[str, int] = field(default_factory=dict)  # the last step of each, by name; of a run that has several

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"] if self.records else 0


# ---------------------------------------------------------------------------------------------------
# From records to arrays.


class Series(NamedTuple):
    """One scalar over the steps that have it: `steps` int64 [S], `values` float64 [S], all finite."""

    steps: np.ndarray
    values: np.ndarray


def series(records: Sequence[MetricsRecord], key: str) -> Series:
    """The steps at which `key` was logged as a number; missing keys and nulls are left out."""
    found = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps = np.array([step for step, _ in found], np.int64)
    return Series(steps, np.array([value for _, value in found], np.float64))


def decimate(line: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points of a line that keep its shape: the least and the greatest of each of limit/2 bins."""
    count = len(line.values)
    if count <= limit:
        return line
    edges = np.linspace(0, count, limit // 2 + 1).astype(int)
    keep = set()
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = line.values[low:high]
        keep |= {low + int(part.argmin()), low + int(part.argmax())}
    order = np.array(sorted(keep))
    return Series(line.steps[order], line.values[order])


def smooth(line: Series) -> Series:
    """A centred moving mean over a fortieth of the points, its window shrunk at the start (where losses fall fast)."""
    count = len(line.values)
    index = np.arange(count)
    half = np.minimum(count // 80, index)
    low, high = index - half, np.minimum(index + half + 1, count)
    total = np.concatenate([[0.0], np.cumsum(line.values)])
    return Series(line.steps, (total[high] - total[low]) / (high - low))


class Table(NamedTuple):
    """One list of L numbers over steps: `steps` int64 [S], `values_SL` float64 with NaN for nulls."""

    steps: np.ndarray
    values_SL: np.ndarray


def table(records: Sequence[MetricsRecord], key: str, limit: int) -> Table:
    """The steps at which `key` was logged as a list, evenly thinned to `limit` of them.

    Lists of another length than the last one's are left out.
    """
    found = [(r["step"], r[key]) for r in records if r.get(key)]
    width = len(found[-1][1]) if found else 0
    found = [(step, values) for step, values in found if len(values) == width]
    every = np.unique(np.linspace(0, len(found) - 1, min(len(found), limit)).astype(int))
    steps = np.array([found[i][0] for i in every], np.int64)
    return Table(steps, np.array([found[i][1] for i in every], np.float64).reshape(len(every), width))


def bin_table(rows: Table, limit: int = MAX_COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `limit` runs of neighbouring steps.

    Returns:
      The bins' edges in steps, float64 [B + 1], and the means over numbers that are there, float64 [B, L].
    """
    count = len(rows.steps)
    starts = np.unique(np.linspace(0, count, min(count, limit), endpoint=False).astype(int))
    here = np.isfinite(rows.values_SL)
    total = np.add.reduceat(np.where(here, rows.values_SL, 0.0), starts)
    number = np.add.reduceat(here.astype(np.float64), starts)
    spacing = (rows.steps[-1] - rows.steps[0]) / (count - 1) if count > 1 else 1.0
    edges = np.append(rows.steps[starts], rows.steps[-1] + spacing) - spacing / 2
    return edges, np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


# ---------------------------------------------------------------------------------------------------
# Drawing: one function per figure. Each draws and returns the alternative text, or None without data.


def new_figure(height: float = 3.7) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(axes: Any, ylabel: str, last_step: int, xlabel: str = "optimizer step") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(0, 1.01 * max(1, last_step))  # the same for every figure of a run
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=9, labelcolor=INK, **where)


def _plot(axes: Any, line: Series, color: Any, label: str | None = None, **style: Any) -> None:
    line = decimate(line)
    marker = "o" if len(line.steps) == 1 else None
    axes.plot(line.steps, line.values, color=color, label=label, **({"marker": marker, "linewidth": 1.6} | style))


def _plot_noisy(axes: Any, line: Series, color: str, label: str | None = None) -> None:
    """The raw line faintly, and its moving mean."""
    _plot(axes, line, color, alpha=0.25, linewidth=0.8)
    _plot(axes, smooth(line), color, label)


def _last(line: Series, form: str = ".3f") -> str:
    return format(line.values[-1], form)


def _eval_series(records: Sequence[MetricsRecord], unit: str) -> dict[str, Series]:
    """Source to its eval/<source>/<unit>, in the order of first mention; a source's name may hold slashes."""
    head, tail = "eval/", f"/{unit}"
    keys = {key: None for r in records for key in r if key.startswith(head) and key.endswith(tail)}
    lines = {key[len(head) : -len(tail)]: series(records, key) for key in keys if key != f"eval{tail}"}
    return {source: line for source, line in lines.items() if len(line.steps)}


def _draw_loss(figure: Any, run: Run) -> str | None:
    loss, mtp = series(run.records, "train/loss"), series(run.records, "train/mtp_loss")
    held_out = _eval_series(run.records, "nats_per_token")
    if not len(loss.steps) and not len(mtp.steps) and not held_out:
        return None
    axes = figure.add_subplot()
    said = []
    if len(mtp.steps):
        _plot_noisy(axes, mtp, ORANGE, f"MTP (one token further), last {_last(mtp)}")
        said.append(f"MTP loss ends at {_last(mtp)}")
    if len(loss.steps):
        _plot_noisy(axes, loss, BLUE, f"training, last {_last(loss)}")
        said.insert(0, f"training loss ends at {_last(loss)}")
    for color, (source, line) in zip((GREEN, PURPLE, RED, GREY) * len(held_out), held_out.items(), strict=False):
        _plot(axes, line, color, f"held-out {source}, last {_last(line)}", marker="o", markersize=4)
        said.append(f"held-out {source} at {_last(line)}")
    _style(axes, "loss (nats per token)", run.last_step)
    _legend(axes, loc="upper right")
    return "Lines over steps, in nats per token: " + ", ".join(said) + "."


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """The values, pushed up where needed so that any two are at least `gap` apart."""
    placed: list[float] = []
    for value in sorted(values):
        placed.append(max(value, placed[-1] + gap) if placed else value)
    return [placed[rank] for rank in np.argsort(np.argsort(values, kind="stable"), kind="stable")]


def _draw_bits_per_byte(figure: Any, run: Run) -> str | None:
    overall = series(run.records, "eval/bits_per_byte")
    if not len(overall.steps):
        return None
    axes = figure.add_subplot()
    sources = _eval_series(run.records, "bits_per_byte")
    if len(sources) > 1:
        for color, (source, line) in zip((GREEN, PURPLE, ORANGE) * len(sources), sources.items(), strict=False):
            _plot(axes, line, color, source, marker="o", markersize=3, linewidth=1.0)
    _plot(axes, overall, BLUE, "all held-out text", marker="o", markersize=4, linewidth=2.0)
    levels = {f"{label}: {value:.2f}": value for label, value in run.baselines.items()}
    for value in levels.values():
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    merged = series(run.records, "eval/merged_bits_per_byte")
    if len(merged.steps):
        _plot(axes, merged, ORANGE, "the mean of the last snapshots", marker="o", markersize=4, linewidth=2.0)
        levels[f"merged: {_last(merged, '.2f')}"] = float(merged.values[-1])
    levels[f"this model: {_last(overall, '.2f')}"] = float(overall.values[-1])
    low, high = axes.get_ylim()
    places = _spread(list(levels.values()), gap=(high - low) * 0.06)
    for place, label in zip(places, levels, strict=True):
        ours = label.startswith("this model")
        axes.annotate(
            label, (1.01, place), xycoords=("axes fraction", "data"), annotation_clip=False, va="center", fontsize=9,
            color=BLUE if ours else INK, weight="bold" if ours else "normal",
        )  # fmt: skip
    _style(axes, "validation (bits per byte)", run.last_step)
    if len(sources) > 1 or len(merged.steps):
        _legend(axes, loc="upper right")
    return "Bits per byte of held-out text over steps; at the end: " + ", ".join(levels) + "."


def _draw_positions(figure: Any, run: Run) -> str | None:
    head = "eval/nats_per_token/"
    keys = {key for r in run.records for key, value in r.items() if key.startswith(head) and value is not None}
    if len(keys) < 2:
        return None
    from matplotlib import colormaps

    axes, said = figure.add_subplot(), []
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(keys)))
    for color, key in zip(colors, sorted(keys, key=lambda key: int(re.split("[-_]", key)[-1])), strict=True):
        line = series(run.records, key)
        what, _, numbers = key.removeprefix(head).partition("_")  # position_0-512, turn_1
        range_ = " to ".join(f"{int(number):,}" for number in numbers.split("-"))
        said.append(f"{'' if what == 'position' else f'{what} '}{range_}, last {_last(line)}")
        _plot(axes, line, color, said[-1], marker="o", markersize=3)
    _style(axes, "validation (nats per token)", run.last_step)
    _legend(axes, loc="upper right")
    return "Held-out loss by a token's position in its document, or by turn, over steps: " + "; ".join(said) + "."


def _draw_learning_rate(figure: Any, run: Run) -> str | None:
    rate = series(run.records, "train/learning_rate")
    if not len(rate.steps):
        return None
    axes = figure.add_subplot()
    _plot(axes, rate, BLUE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes.yaxis.get_offset_text().set(color=INK, fontsize=9)
    _style(axes, "learning rate", run.last_step)
    return f"Learning rate over steps: peak {rate.values.max():.3g}, last {_last(rate, '.3g')}."


def _draw_mixture(figure: Any, run: Run) -> str | None:
    keys = dict.fromkeys(key for r in run.records for key in r if key.startswith("data/") and key.endswith("/share"))
    if not keys:
        return None
    axes, said = figure.add_subplot(), []
    for color, key in zip(CYCLE * len(keys), keys, strict=False):
        source, share = key.removeprefix("data/").removesuffix("/share"), series(run.records, key)
        read = series(run.records, f"data/{source}/epochs")
        said.append(f"{source} {_last(share, '.1%')} of the tokens, read {_last(read, '.2f')} times")
        _plot(axes, share, color, said[-1])
    for tag in dict.fromkeys(key.removeprefix("data/tag_") for r in run.records for key in r if _is_tag(key)):
        share = series(run.records, f"data/tag_{tag}")
        said.append(f"tag {tag}: {_last(share, '.1%')}")
        _plot(axes, share, INK, said[-1], linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_ylim(0, 1)
    _style(axes, "share of the tokens", run.last_step)
    _legend(axes, loc="upper right")
    return "Each source's share of the tokens over steps; at the end: " + ", ".join(said) + "."


def _is_tag(key: str) -> bool:
    return key.startswith("data/tag_") and "/" not in key.removeprefix("data/")


def _draw_grad_norm(figure: Any, run: Run) -> str | None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    norm, skipped = series(run.records, "train/grad_norm"), series(run.records, "train/skipped_steps")
    norm = Series(norm.steps[norm.values > 0], norm.values[norm.values > 0])  # the axis is logarithmic
    if not len(norm.steps):
        return None
    axes = figure.add_subplot()
    _plot_noisy(axes, norm, BLUE, "global norm before clipping")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _style(axes, "gradient norm", run.last_step)
    at = skipped.steps[np.diff(skipped.values, prepend=0.0) > 0]
    total = int(skipped.values[-1]) if len(skipped.values) else 0
    if len(at):
        axes.plot(
            at, np.full(len(at), 0.02), linestyle="none", marker="^", markersize=6, color=RED,
            transform=axes.get_xaxis_transform(), label=f"skipped steps ({total})",
        )  # fmt: skip
    _legend(axes, loc="upper right")
    return f"Gradient norm over steps, logarithmic; last {_last(norm)}; {total} steps skipped."


def _draw_expert_load(figure: Any, run: Run) -> str | None:
    loads = table(run.records, "moe/load_max_over_mean_per_layer", MAX_ROWS)
    worst = series(run.records, "moe/load_max_over_mean")
    if not len(worst.steps):
        return None
    if len(loads.steps):
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_load_map(figure, top, loads, run)
    else:
        bottom = figure.add_subplot()
    _plot_noisy(bottom, worst, BLUE)
    bottom.axhline(1.0, color=GREEN, linewidth=1.0, linestyle=(0, (4, 3)))
    bottom.set_ylim(bottom=0.9)
    _style(bottom, "worst layer\n(max / mean)", run.last_step)
    return f"Busiest expert's load over the mean, by layer and step; the worst layer ends at {_last(worst, '.2f')}."


def _draw_load_map(figure: Any, axes: Any, loads: Table, run: Run) -> None:
    edges, means_BL = bin_table(loads)
    known = means_BL[np.isfinite(means_BL)]
    ceiling = max(1.5, float(np.percentile(known, 99)) if len(known) else 0.0)  # a few peaks must not pale the rest
    layers = run.first_moe_layer - 0.5 + np.arange(means_BL.shape[1] + 1)
    mesh = axes.pcolormesh(edges, layers, means_BL.T, cmap="YlGnBu", vmin=1.0, vmax=ceiling)
    _colorbar(figure, axes, mesh, "max / mean load", extend="max")
    _style(axes, "layer", run.last_step, xlabel="")
    _integer_y(axes)
    axes.grid(False)


def _colorbar(figure: Any, axes: Any, colors: Any, label: str, **style: Any) -> Any:
    bar = figure.colorbar(colors, ax=axes, pad=0.02, **style)
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return bar


def _integer_y(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _draw_bias(figure: Any, run: Run) -> str | None:
    low, high = (table(run.records, f"moe/bias_{end}_per_layer", MAX_POINTS // 2) for end in ("min", "max"))
    if not len(low.steps) or low.values_SL.shape != high.values_SL.shape:
        return _draw_bias_max(figure, run)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.add_subplot()
    layers = run.first_moe_layer + np.arange(low.values_SL.shape[1])
    shade = ScalarMappable(Normalize(layers[0], max(layers[-1], layers[0] + 1)), colormaps["viridis"])
    for column, layer in enumerate(layers):
        for ends in (low, high):
            line = Series(ends.steps, ends.values_SL[:, column])
            _plot(axes, line, shade.to_rgba(layer), linewidth=1.0)
    if len(layers) > 1:
        _integer_y(_colorbar(figure, axes, shade, "layer").ax)
    least, greatest = low.values_SL.min(axis=1), high.values_SL.max(axis=1)
    axes.fill_between(low.steps, least, greatest, color=BLUE, alpha=0.08, linewidth=0)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    _style(axes, "expert bias, least and greatest", run.last_step)
    return (
        f"Least and greatest expert bias of each layer over steps; at the end between {least[-1]:.3g} "
        f"and {greatest[-1]:.3g}."
    )


def _draw_bias_max(figure: Any, run: Run) -> str | None:
    line = series(run.records, "moe/bias_abs_max")
    if not len(line.steps):
        return None
    axes = figure.add_subplot()
    _plot(axes, line, BLUE)
    _style(axes, "expert bias, greatest magnitude", run.last_step)
    return f"Greatest magnitude of any expert bias over steps; last {_last(line, '.3g')}."


def _draw_throughput(figure: Any, run: Run) -> str | None:
    from matplotlib.ticker import StrMethodFormatter

    speed, wait = series(run.records, "train/tokens_per_second"), series(run.records, "train/data_wait_s")
    wait = Series(wait.steps, 1000 * wait.values)
    panels = [("tokens per second", speed, BLUE), ("data wait\n(ms per step)", wait, ORANGE)]
    panels = [panel for panel in panels if len(panel[1].steps)]
    if not panels:
        return None
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, line, color) in zip(rows, panels, strict=True):
        _plot_noisy(axes, line, color)
        axes.set_ylim(bottom=0)
        _style(axes, label, run.last_step, xlabel="optimizer step" if axes is rows[-1] else "")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    median = f"median {np.median(speed.values):,.0f} tokens per second" if len(speed.steps) else "speed not logged"
    return f"Throughput and time spent waiting for data, over steps: {median}."


def _draw_fp8(figure: Any, run: Run) -> str | None:
    """Each operand's worst module and layer over the steps that were measured."""
    measured = [record for record in run.records if "fp8/lost_max" in record]
    if not measured:
        return None
    operands = sorted({key.rsplit("/", 1)[1] for key in measured[-1] if key.startswith("fp8/lost/")})
    texts = []
    for axes, kind, worst, label in (
        (figure.add_subplot(2, 1, 1), "lost", max, "share that became zero"),
        (figure.add_subplot(2, 1, 2), "cosine", min, "cosine with the original"),
    ):
        for color, operand in zip(CYCLE, operands, strict=False):
            found = [
                worst(max(v) if worst is max else min(v) for k, v in r.items() if _is_of(k, kind, operand))
                for r in measured
            ]
            line = Series(np.array([r["step"] for r in measured]), np.array(found, np.float64))
            _plot(axes, line, color, operand.replace("_", " "), marker="o", markersize=2.5)
        _style(axes, label, run.records[-1]["step"])
        _legend(axes, loc="best")
        extreme = worst(r["fp8/lost_max" if kind == "lost" else "fp8/cosine_min"] for r in measured)
        texts.append(f"{label}: worst {extreme:.4f}")
    return "What FP8 loses, the worst module and layer of each operand: " + "; ".join(texts)


def _is_of(key: str, kind: str, operand: str) -> bool:
    return key.startswith(f"fp8/{kind}/") and key.endswith(f"/{operand}")


class Drawing(NamedTuple):
    name: str
    title: str
    height: float  # inches
    draw: Callable[[Any, Run], str | None]
    note: str


FIGURES = (
    Drawing("loss", "Loss", 3.7, _draw_loss, "Faint: every logged step. Strong: its moving mean."),
    Drawing(
        "bits_per_byte", "Validation, bits per byte", 3.7, _draw_bits_per_byte,
        "Every held-out byte is scored. Dashed: what simpler models and compressors need for the same bytes.",
    ),
    Drawing(
        "positions", "Validation by position", 3.7, _draw_positions,
        "Of each range, the documents that reach its end: the same tokens at every step. Of conversations, each turn.",
    ),
    Drawing("learning_rate", "Learning rate", 3.7, _draw_learning_rate, ""),
    Drawing(
        "mixture", "Mixture", 3.7, _draw_mixture,
        "Of all tokens since the shares are what they are, padding not counted.",
    ),
    Drawing(
        "grad_norm", "Gradient norm", 3.7, _draw_grad_norm,
        "Steps whose loss or gradient is not finite are skipped.",
    ),
    Drawing(
        "expert_load", "Expert load", 5.0, _draw_expert_load,
        "The busiest expert's tokens over the mean of its layer; 1 is perfect balance.",
    ),
    Drawing(
        "expert_bias", "Expert bias", 5.0, _draw_bias,
        "The balance bias decides which experts win, never how much they weigh. Two lines per layer.",
    ),
    Drawing(
        "fp8", "What FP8 loses", 5.0, _draw_fp8,
        "Of each operand of the three products, in the module and layer where it is worst.",
    ),
    Drawing("throughput", "Throughput", 5.0, _draw_throughput, ""),
)  # fmt: skip


def expert_load_figure(runs: Mapping[str, Sequence[MetricsRecord]], path: epath.PathLike) -> None:
    """Draws the worst layer's max/mean expert load of several runs over steps, as a PNG.

    Args:
      runs: label to records (as `read_metrics` gives them).
      path: the PNG to write.
    Raises:
      ValueError: if a run logged no moe/load_max_over_mean.
    """
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    last_step = max((records[-1]["step"] for records in runs.values() if records), default=0)
    for color, (label, records) in zip(CYCLE * len(runs), runs.items(), strict=False):
        line = series(records, "moe/load_max_over_mean")
        if not len(line.steps):
            raise ValueError(f"run {label!r} logged no moe/load_max_over_mean: it has no MoE layer, or no steps")
        _plot_noisy(axes, line, color, f"{label}: ends at {_last(smooth(line), '.2f')}")
    axes.axhline(1.0, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0.9)
    _style(axes, "busiest expert's load / mean load", last_step)
    _legend(axes, loc="best")
    epath.Path(path).write_bytes(png(figure))


def loss_gap_figure(runs: Mapping[str, Sequence[MetricsRecord]], reference: str, path: epath.PathLike) -> None:
    """Draws the training losses of several runs, and below them each one's relative gap to `reference`, as a PNG.

    Args: as in `expert_load_figure`; all runs have the same steps.
    """
    figure = new_figure(6.0)
    above, below = figure.subplots(2, 1)
    lines = {label: series(records, "train/loss") for label, records in runs.items()}
    base = smooth(lines[reference])
    for color, (label, line) in zip(CYCLE * len(runs), lines.items(), strict=False):
        _plot(above, smooth(line), color, label)
        if label != reference:
            _plot(below, Series(line.steps, 100 * (smooth(line).values / base.values - 1)), color, label, linewidth=1.1)
    last_step = int(base.steps[-1])
    below.axhline(0.0, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    _style(above, "training loss, nats", last_step)
    _style(below, f"% from {reference}", last_step)
    above.set_ylim(top=float(base.values[len(base.values) // 20]))  # the first steps are far above
    _legend(above, loc="best")
    epath.Path(path).write_bytes(png(figure))


def validation_figure(runs: Mapping[str, Sequence[MetricsRecord]], level: float, path: epath.PathLike) -> None:
    """Draws the validation losses of several runs over steps, and a dashed line at `level`, as a PNG.

    Args: as in `expert_load_figure`.
    """
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    last_step = 0
    for color, (label, records) in zip(CYCLE * len(runs), runs.items(), strict=False):
        line = series(records, "eval/nats_per_token")
        last_step = max(last_step, int(line.steps[-1]))
        _plot(axes, line, color, f"{label}: ends at {_last(line, '.3f')}")
    axes.axhline(level, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)))
    _style(axes, "validation loss, nats per token", last_step)
    _legend(axes, loc="best")
    epath.Path(path).write_bytes(png(figure))


def bars_figure(
    parts: Mapping[str, Mapping[str, float]], ylabel: str, path: epath.PathLike, sharey: bool = False
) -> None:
    """Draws named values as bars from zero, one panel for each part, as a PNG; on one scale if they are to `sharey`."""
    figure = new_figure(3.2)
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=sharey)[0]
    for axes, color, (name, values) in zip(panels, CYCLE, parts.items(), strict=False):
        axes.bar(range(len(values)), list(values.values()), color=color, width=0.6)
        axes.set_xticks(range(len(values)), list(values))
        for place, value in enumerate(values.values()):
            axes.text(place, value, f"{value:.0f}", ha="center", va="bottom", color=INK, fontsize=9)
        axes.set_xlabel(name, color=INK, fontsize=10)
        axes.set_ylabel(ylabel, color=INK, fontsize=10)
        axes.tick_params(colors=INK, labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    epath.Path(path).write_bytes(png(figure))


def lengths_figure(parts: Mapping[str, Mapping[str, Mapping[int, float]]], ylabel: str, path: epath.PathLike) -> None:
    """Draws named lines over lengths of rows, both axes logarithmic, one panel for each part, as a PNG."""
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, (part, lines) in zip(panels, parts.items(), strict=True):
        for color, (name, values) in zip(CYCLE, lines.items(), strict=False):
            axes.plot(list(values), list(values.values()), color=color, label=name, marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        lengths = sorted({length for values in lines.values() for length in values})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel(f"tokens of a row, {part}", color=INK, fontsize=10)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(ylabel, color=INK, fontsize=10)
    _legend(panels[0], loc="best")
    epath.Path(path).write_bytes(png(figure))

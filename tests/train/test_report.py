"""The report: figures of whatever was logged, and a page that needs nothing but itself."""

import base64
import html.parser
import json
import time

import numpy as np
import pytest

from ling_jax.train import figures
from ling_jax.train.figures import Series, bin_table, decimate, expert_load_figure, series, smooth, table
from ling_jax.train.metrics import MetricsWriter, read_metrics
from ling_jax.train.report import CSS, write_report

ALL = {
    "loss", "bits_per_byte", "positions", "learning_rate", "mixture", "grad_norm", "expert_load", "expert_bias",
    "throughput",
}  # fmt: skip
BASELINES = {"gzip -9": 2.04, "xz -9": 1.75, "byte trigram": 2.61}
PNG = b"\x89PNG\r\n\x1a\n"


def _record(step, layers=3):
    record = {
        "train/loss": 9.0 / step,
        "train/mtp_loss": 10.0 / step,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 0.5 + 1 / step,
        "train/tokens_per_second": 1e4,
        "train/data_wait_s": 1e-3,
        "train/skipped_steps": int(step > 2),
        "data/a/share": 0.32,
        "data/a/epochs": step / 10,
        "data/tag_reasoning": 0.32,
        "moe/load_max_over_mean": 1.5,
        "moe/load_max_over_mean_per_layer": [1.0 + layer / 4 for layer in range(layers)],
        "moe/bias_min_per_layer": [-0.1] * layers,
        "moe/bias_max_per_layer": [0.1] * layers,
    }
    if step % 5 == 1:
        record |= {"eval/a/nats_per_token": 3.0, "eval/a/bits_per_byte": 2.0, "eval/bits_per_byte": 2.0}
        record["eval/merged_bits_per_byte"] = 1.9
        record |= {f"eval/nats_per_token/position_{span}": 2.5 for span in ("512-1024", "0-512")}
    return record


def _run(folder, records):
    with MetricsWriter(folder) as writer:
        for step, record in enumerate(records, start=1):
            writer.write(step, record)
    (folder / "config.json").write_text(json.dumps({"model": {"first_k_dense_replace": 1, "note": "</pre><b>"}}))


class _Page(html.parser.HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def _pngs(folder):
    return {path.stem: path.read_bytes() for path in (folder / "report").iterdir()}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    _run(folder, [_record(step) for step in range(1, 31)])
    sample = 'def f(a):\n    return a < 1 & "<script>"'
    path = write_report(folder, "A <small> run", {"wall time": "0:01 & <b>"}, BASELINES, sample)
    return folder, sample, path.read_text()


def test_every_figure_is_drawn_and_embedded(full):
    folder, _, source = full
    pngs = _pngs(folder)
    assert set(pngs) == ALL
    embedded = [base64.b64decode(src.partition("base64,")[2]) for src in _Page(source).attributes("src")]
    assert sorted(embedded) == sorted(pngs.values())
    assert all(png.startswith(PNG) and len(png) > 5000 for png in embedded)


def test_page_needs_nothing_from_outside(full):
    source = full[2]
    page = _Page(source)
    assert "http://" not in source and "https://" not in source
    assert all(src.startswith("data:image/png;base64,") for src in page.attributes("src"))
    assert not page.attributes("href") and not page.attributes("srcset")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    assert "url(" not in CSS and "@import" not in CSS


def test_page_escapes_what_it_is_given(full):
    _, sample, source = full
    page = _Page(source)
    assert "A <small> run" in page.text and "0:01 & <b>" in page.text and sample in page.text
    assert "</pre><b>" in page.text  # from config.json
    assert not {tag for tag, _ in page.tags} & {"small", "b", "script"}


def test_every_figure_says_in_words_what_it_shows(full):
    alts = _Page(full[2]).attributes("alt")
    assert len(alts) == len(ALL) and all(len(alt) > 20 for alt in alts)
    assert any("read 3.00 times, tag reasoning: 32.0%" in alt for alt in alts)
    assert any("0 to 512, last 2.500; 512 to 1,024, last 2.500" in alt for alt in alts)
    assert any("gzip -9: 2.04" in alt and "merged: 1.90, this model: 2.00" in alt for alt in alts)


@pytest.mark.filterwarnings("error")
def test_one_step_makes_a_report(tmp_path):
    _run(tmp_path, [_record(1)])
    write_report(tmp_path, "t", {}, BASELINES)
    assert set(_pngs(tmp_path)) == ALL


@pytest.mark.filterwarnings("error")
def test_nulls_and_missing_keys_leave_gaps_only(tmp_path):
    empty = {key: None for key in _record(1)}
    nan = float("nan")
    holes = _record(3) | {"moe/load_max_over_mean_per_layer": [nan, 1.0, nan], "moe/bias_min_per_layer": [nan] * 3}
    _run(tmp_path, [empty, {}, _record(2), holes, {"train/loss": nan}])
    write_report(tmp_path, "t", {}, BASELINES)
    assert set(_pngs(tmp_path)) == ALL - {"bits_per_byte", "positions"}


def test_figures_without_data_are_left_out_and_old_ones_removed(tmp_path):
    _run(tmp_path, [_record(1)])
    write_report(tmp_path, "t", {})
    _run(tmp_path, [{"train/loss": 1.0}])
    page = write_report(tmp_path, "t", {})
    assert set(_pngs(tmp_path)) == {"loss"}
    assert len(_Page(page.read_text()).attributes("src")) == 1


def test_a_run_without_a_logged_step_still_gets_its_page(tmp_path):
    _run(tmp_path, [])
    assert "ended early" in write_report(tmp_path, "t", {"state": "ended early"}).read_text()
    assert _pngs(tmp_path) == {}


def test_a_hundred_thousand_steps_are_drawn_in_seconds(tmp_path):
    line = json.dumps(_record(1))[1:]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, {line}\n' for step in range(1, 100_001)))
    start = time.process_time()
    page = write_report(tmp_path, "t", {}, BASELINES)
    assert time.process_time() - start < 15  # 3 s on an idle core
    assert page.stat().length < 2_000_000


def test_series_leaves_out_nulls_and_missing_keys():
    line = series([{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2}], "a")
    assert line.steps.tolist() == [1, 4] and line.values.tolist() == [1.0, 2.0]


def test_held_out_sources_are_found_whatever_their_names():
    records = [{"step": 1, "eval/a/x.txt/bits_per_byte": 1.0, "eval/bits_per_byte": 2.0, "eval/b/bits_per_byte": None}]
    assert list(figures._eval_series(records, "bits_per_byte")) == ["a/x.txt"]


def test_decimation_keeps_spikes_and_order():
    values = np.sin(np.arange(50_000) / 5000)
    values[[123, 40_001]] = 9.0, -9.0
    line = decimate(Series(np.arange(50_000), values), 100)
    assert len(line.steps) <= 100
    assert {123, 40_001} <= set(line.steps.tolist())
    assert (np.diff(line.steps) > 0).all()
    assert (values[line.steps] == line.values).all()


def test_short_lines_are_not_decimated():
    line = Series(np.arange(100), np.arange(100.0))
    assert decimate(line, 100) is line


def test_smoothing_is_a_mean_that_keeps_a_constant_and_quiets_noise():
    steps = np.arange(4000)
    noise = np.random.default_rng(0).normal(size=4000)
    assert np.allclose(smooth(Series(steps, np.full(4000, 3.0))).values, 3.0)
    assert smooth(Series(steps, noise)).values[100:].std() < 0.2
    assert smooth(Series(steps, noise)).values[0] == noise[0]


def test_heat_map_bins_are_means_over_neighbouring_steps():
    records = [{"step": 10 * i, "a": [float(i), None if i < 5 else 1.0]} for i in range(10)]
    edges, means_BL = bin_table(table(records, "a", 100), 5)
    assert edges.tolist() == [-5, 15, 35, 55, 75, 95]
    assert means_BL[:, 0].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert np.isnan(means_BL[:2, 1]).all() and (means_BL[2:, 1] == 1).all()


def test_labels_are_spread_apart_in_order():
    placed = figures._spread([2.0, 1.0, 1.95, 1.01], 0.2)
    assert np.allclose(placed, [2.15, 1.0, 1.95, 1.2])


def test_expert_load_figure_needs_the_key_it_draws(tmp_path):
    _run(tmp_path, [_record(step) for step in range(1, 6)])
    records = read_metrics(tmp_path)
    expert_load_figure({"with bias": records, "without": records}, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="'dense' logged no moe/load_max_over_mean"):
        expert_load_figure({"with bias": records, "dense": [{"step": 1}]}, tmp_path / "load.png")


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """panels(draw, *args): the axes of the figure that `draw` writes."""
    drawn = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")

    def axes(draw, *args):
        draw(*args, tmp_path / "figure.png")
        return drawn.pop().axes

    return axes


def test_losses_are_drawn_above_their_gaps_to_the_reference_in_per_cent(panels):
    base = [{"step": i, "train/loss": 5 - i / 100} for i in range(1, 101)]
    other = [{**record, "train/loss": record["train/loss"] * 1.01} for record in base]
    above, below = panels(figures.loss_gap_figure, {"base": base, "other": other}, "base")
    losses = {line.get_label(): line for line in above.get_lines()}
    assert losses.keys() >= {"base", "other"} and "loss" in above.get_title() + above.get_ylabel()
    assert losses["other"].get_xdata().tolist() == list(range(1, 101))
    np.testing.assert_allclose(losses["other"].get_ydata(), 1.01 * losses["base"].get_ydata())
    [gap] = [line for line in below.get_lines() if line.get_label() == "other"]
    np.testing.assert_allclose(gap.get_ydata(), 1.0)


def test_bars_have_their_values_for_heights_and_their_names_below(panels):
    left, right = panels(figures.bars_figure, {"rows": {"2": 3.0, "4": 1.0}, "experts": {"32": 7.0}}, "us")
    assert [bar.get_height() for bar in left.patches] == [3.0, 1.0]
    assert [label.get_text() for label in left.get_xticklabels()] == ["2", "4"]
    assert (left.get_xlabel(), left.get_ylabel()) == ("rows", "us")
    assert [bar.get_height() for bar in right.patches] == [7.0] and right.get_xlabel() == "experts"

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_sample import card, epoch, latency, sample_examples, sample_run
from rich.console import Console

from robust_prune.bench.types import Ratio
from robust_prune.evaluation.card import Accuracy
from robust_prune.report import (
    ModelRow,
    RunReport,
    charts,
    headline_markdown,
    headline_table,
    pictures,
    summary,
    svg,
    text,
    write,
)
from robust_prune.report.files import to_csv, to_markdown
from robust_prune.report.html import flatten, render
from robust_prune.serialization import from_json, to_json

VOID = {"meta", "img", "link", "br", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and visible text, and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# --- JSON, CSV, Markdown, terminal -------------------------------------------------------------------------------


def test_json_round_trip_is_lossless() -> None:
    run = sample_run()
    assert from_json(RunReport, json.loads(json.dumps(to_json(run)))) == run
    bare = RunReport("t", "c", {}, (), (ModelRow("dense", 1, 2),))
    assert from_json(RunReport, json.loads(json.dumps(to_json(bare)))) == bare


def test_write_leaves_four_whole_files(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"
    write(sample_run(), folder, sample_examples())
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "result.csv", "result.json", "result.md"]
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert from_json(RunReport, stored) == sample_run()
    assert stored["models"][1]["card"]["robust"]["value"] == pytest.approx(194 / 500)


def test_result_json_is_strict_json_even_with_nan(tmp_path: Path) -> None:
    history = (epoch(1, math.nan, 0.5, math.inf),)
    write(sample_run(history=history), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored["history"][0]["train_loss"] is None
    assert "val_clean" in stored["history"][0]


def test_csv_has_a_line_for_each_measurement() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(sample_run()))))
    assert [(r["model"], r["batch"]) for r in rows] == [
        ("dense", "1"), ("dense", "32"), ("pruned", "1"), ("pruned", "32"),
    ]  # fmt: skip
    assert float(rows[2]["speedup"]) == 1.62 and rows[0]["speedup"] == ""
    assert float(rows[2]["robust"]) == pytest.approx(0.388)
    assert float(rows[2]["robust_low"]) < 0.388 < float(rows[2]["robust_high"])
    without = list(csv.DictReader(io.StringIO(to_csv(sample_run(models=(ModelRow("only, one", 5, 6),))))))
    assert [r["model"] for r in without] == ["only, one"]


def printed(run: RunReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(headline_table(run))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_table_fits_eighty_columns_and_pastes_as_markdown() -> None:
    shown = printed(sample_run(), 80)
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 9, "a line was wrapped"
    assert all(line.count("|") == 5 for line in lines)
    for figure in ("−50.0 %", "1.62× [1.58, 1.66]", "38.8 [34.6, 43.1]", "−1.8 points", "2.11 MB"):
        assert figure in shown
    assert "PGD-20" in shown and "Linf 8/255" in shown and "tier pgd" in shown


def test_markdown_holds_the_same_figures() -> None:
    run = sample_run()
    page = to_markdown(run)
    assert headline_markdown(run) in page + "\n"
    assert "| Robust acc., % | 40.6 [36.4, 45.0] | 38.8 [34.6, 43.1] | −1.8 points |" in page
    assert run.command in page and run.notes[0] in page


def test_many_models_stand_below_each_other() -> None:
    run = sample_run()
    rows = (latency("pruned int8", 1, 0.61, Ratio(5.11, 5.0, 5.2, "faster")),)
    third = replace(run.models[1], label="pruned int8", card=None, onnx_robust=Accuracy(180, 500), latency=rows)
    run = replace(run, models=(*run.models, third))
    lines = headline_markdown(run).splitlines()
    assert lines[0] == "| model | MACs | params | file | b1, ms | b32, ms | clean, % | robust, % |"
    assert lines[4].startswith("| pruned int8 | 80.05 M | 512 k | 2.11 MB | 0.610 (5.11× [5.00, 5.20]) | – | 72.2 [")
    assert "| 36.0 [31.9, 40.3] |" in lines[4]
    shown = [line for line in printed(run, 80).splitlines() if line.startswith("|")]
    assert len(shown) == 2 + 3, "a line was wrapped"
    assert all(figure in shown[-1] for figure in ("pruned int8", "0.610 5.11×", "36.0 [31.9, 40.3]"))
    page = Page(render(run))
    assert page is not None and "5.11 times as fast as the dense one" in " ".join(summary.summary(run))
    assert "The pruned model needs 50" in summary.summary(run)[0]
    level = latency("half", 1, 3.1, Ratio(1.01, 0.99, 1.03, "no difference"))
    fourth = replace(run.models[1], label="half", latency=(level,))
    assert summary.summary(replace(run, models=(*run.models, fourth)))[-1] == (
        "The half file cannot be told apart in latency from the dense one at batch 1 and classifies 38.8 % of the "
        "attacked images correctly."
    )


def test_speed_inside_the_noise_floor_is_no_difference() -> None:
    run = sample_run()
    row = latency("pruned", 1, 3.1, Ratio(1.01, 0.99, 1.03, "no difference"))
    run = replace(run, models=(run.models[0], replace(run.models[1], latency=(row,))))
    assert "no difference, 1.01×" in headline_markdown(run)
    assert any("cannot be told apart" in sentence for sentence in summary.summary(run))
    assert [tile.value for tile in summary.tiles(run) if tile.name == "Speed"] == ["no difference"]


# --- the page ----------------------------------------------------------------------------------------------------


def test_page_says_what_was_found() -> None:
    shown = Page(render(sample_run(), sample_examples())).text.replace("\u00a0", " ")
    for phrase in (
        "demo, half the arithmetic", "Figures on the embedded sample are indicative", "160.2 M", "−50.0 %",
        "1.62 times as fast", "38.8 %", "[34.6, 43.1]", "PGD-20, 2 random restarts", "Linf 8/255", "128 → 80",
        "mask parity failed", "Right after the cut", "robust-prune compress demo --ratio 0.5", "2.15.0",
        "2026-01-02 03:04 UTC",
        "No warning was raised", "arXiv 2410.15176",
    ):  # fmt: skip
        assert phrase in shown, phrase


def test_page_loads_nothing_and_runs_nothing() -> None:
    source = render(sample_run(), sample_examples())
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    loads = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "action", "xlink:href", "data")]
    assert loads and all(value.startswith("data:image/png;base64,") for value in loads)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in source and "@import" not in source
    assert "default-src 'none'" in source
    assert not re.search(r"https?://", source)


def test_text_of_the_run_is_escaped() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=y>\"'&"
    run = sample_run()
    assert run.plan and run.profile
    group = replace(run.plan.groups[0], name=evil)
    module = replace(run.profile.modules[0], name=evil, kind=evil)
    run = replace(
        run,
        title=evil, command=evil, notes=(evil, evil), environment={evil: evil}, recipe={evil: evil},
        models=(replace(run.models[0], label=evil, card=card("x", 3, 2, 10, flags=(evil,))),
                replace(run.models[1], label=evil)),
        plan=replace(run.plan, groups=(group,), note=evil, criterion=evil, allocation=evil),
        profile=replace(run.profile, modules=(module, *run.profile.modules[1:]), estimator=evil),
        rolled_back=(replace(run.rolled_back[0], name=evil, reason=evil),), latency_protocol=evil,
        noise_floor={evil: (1.0, 0.9, 1.1)}, seconds={evil: 1.0}, created=evil, version=evil,
    )  # fmt: skip
    shown = [
        {**e, "label": evil, "predictions": {evil: {"clean": evil, "adversarial": evil}}} for e in sample_examples(1)
    ]
    source = render(run, shown)
    page = Page(source)
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("img") == 3
    assert html.escape(evil, quote=False)[:20] in source


def test_a_bare_run_still_makes_a_page() -> None:
    bare = RunReport("only figures", "robust-prune evaluate", {}, (), (ModelRow("dense", 10, 20),))
    page = Page(render(bare))
    assert "only figures" in page.text and "svg" not in page.tags
    Page(render(replace(bare, models=())))
    alone = replace(bare, models=(ModelRow("dense", 10, 20, card=card("dense", 70, 40, 100)),))
    assert "classifies 70.0 % of" in Page(render(alone)).text.replace("\u00a0", " ")


def test_warnings_are_shown_and_silence_the_all_clear() -> None:
    run = sample_run()
    noisy = latency("pruned", 1, 2.0, Ratio(1.5, 1.4, 1.6, "faster"), noisy=True)
    flagged = replace(run.models[1], card=card("pruned", 300, 200, flags=("Buffers moved.",)), latency=(noisy,))
    shown = Page(render(replace(run, models=(run.models[0], flagged)))).text
    assert "pruned: Buffers moved." in shown
    assert "is noisy" in shown and "the measurement was noisy and should be repeated" in shown
    assert "No warning was raised" not in shown
    assert "Buffers moved." in to_markdown(replace(run, models=(run.models[0], flagged)))


def test_long_names_and_many_layers_stay_whole() -> None:
    run = sample_run()
    assert run.profile
    module = run.profile.modules[0]
    many = tuple(replace(module, name=f"net.stage{i // 10}.block{i}.conv") for i in range(200))
    source = render(replace(run, profile=replace(run.profile, modules=many)))
    assert source.count('class="mark"') == 200
    assert "stage19.block199.conv" in source and "net.stage19" not in source


# --- charts ------------------------------------------------------------------------------------------------------


@given(
    st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 9), st.booleans()
)  # fmt: skip
def test_ticks_cover_their_range_evenly(low: float, width: float, count: int, integer: bool) -> None:
    ticks = svg.nice_ticks(low, low + width, count, integer)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step + 1e-9
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
    assert 2 <= len(ticks) <= count + 2
    assert all(math.isclose(b - a, step, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairwise(ticks))
    if integer:
        assert all(float(t).is_integer() for t in ticks)


def test_sensitivity_positions_follow_the_logarithm() -> None:
    profile = sample_run().profile
    assert profile
    values = (0.0, 0.01, 0.1, 1.0, 10.0, 1e-9)
    modules = tuple(replace(profile.modules[0], name=f"m.{i}", mrs=v) for i, v in enumerate(values))
    bars, scale = charts.sensitivity_bars(replace(profile, modules=modules))
    places = [bar.position for bar in bars]
    assert places[0] == places[5] == 0
    assert places[2] - places[1] == pytest.approx(places[3] - places[2]) == pytest.approx(places[4] - places[3])
    assert places[4] == 100
    assert scale.ticks[0][1] == 0 and scale.ticks[-1] == ("10", 100)
    assert charts.sensitivity_bars(replace(profile, modules=(replace(modules[0], mrs=0.0),))) == ([], charts.Scale(()))


def test_widths_keep_what_was_rolled_back() -> None:
    run = sample_run()
    assert run.plan
    bars = charts.width_bars(run.plan, [r.name for r in run.rolled_back])
    assert bars[-1].before == bars[-1].after == 128
    assert bars[0].after == run.plan.groups[0].keep < bars[0].before
    assert max(bar.before_share for bar in bars) == pytest.approx(100)
    assert all(0 < bar.after_share <= bar.before_share for bar in bars)


def test_tradeoff_needs_two_models_with_both_figures() -> None:
    run = sample_run()
    drawn = charts.tradeoff(run)
    assert drawn.count("<circle") == 2 and "pruned" in drawn
    assert charts.tradeoff(replace(run, models=run.models[:1])) == ""
    bare = replace(run.models[1], card=None, onnx_robust=None)
    assert charts.tradeoff(replace(run, models=(run.models[0], bare))) == ""
    assert charts.speedups(replace(run, models=run.models[:1])) == ""


def test_names_in_the_plot_cover_neither_each_other_nor_the_edge() -> None:
    run = sample_run()
    crowd = tuple(
        replace(run.models[1], label=f"a run of some name {i}", latency=(latency("x", 1, 1.93 + 0.01 * i, None),))
        for i in range(6)
    )
    drawn = charts.tradeoff(replace(run, models=(*run.models, *crowd)))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="name[^>]*>([^<]+)<', drawn)
    assert len(found) == 8
    boxes = []
    for x, y, anchor, name in found:
        width = charts.LETTER * len(name)
        left = float(x) - (width if anchor == "end" else 0)
        assert left + width <= charts.RIGHT + 12 and float(y) > 10
        boxes.append((left, left + width, float(y)))
    for position, (a, b, height) in enumerate(boxes):
        for c, d, other in boxes[:position]:
            assert b <= c or d <= a or abs(height - other) >= 12


def test_the_front_holds_what_no_other_model_beats() -> None:
    assert charts.pareto([(3.0, 0.5), (1.0, 0.3), (2.0, 0.2), (2.5, 0.4), (3.5, 0.5)]) == [1, 3, 0]
    assert charts.pareto([(1.0, 0.3), (1.0, 0.4)]) == [1] and charts.pareto([]) == []


def test_curves_skip_what_is_not_finite() -> None:
    history = tuple(epoch(e, loss, math.nan, math.nan) for e, loss in enumerate((1.0, math.nan, 0.5), start=1))
    assert charts.loss_curve(history).count("<circle") == 2
    assert charts.accuracy_curves(history) == ""
    assert "nan" not in charts.loss_curve(history)
    assert charts.loss_curve(history[:1]).count("<circle") == 1


def test_perturbation_is_grey_where_nothing_changed() -> None:
    image = np.full((3, 4, 4), 100, dtype=np.uint8)
    adversarial = image.astype(np.float32) / 255
    adversarial[0, 0, 0] += 8 / 255
    said = {"dense": {"clean": "cat", "adversarial": "dog"}}
    strip = pictures.strips([{"image": image, "adversarial": adversarial, "label": "cat", "predictions": said}])[0]
    assert strip.amplification == pytest.approx(255 / 16, rel=1e-3)
    assert (strip.verdicts[0].clean_right, strip.verdicts[0].adversarial_right) == (True, False)
    grey = image[:1].astype(np.float32) / 255
    same = pictures.strips([{"image": image[:1], "adversarial": grey, "label": "cat", "predictions": said}])[0]
    assert same.original.startswith("data:image/png;base64,")


# --- words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (999, "999"), (512_000, "512 k"), (80_050_000, "80.05 M"), (4.1e9, "4.1 G")]
)
def test_quantities(value: float, shown: str) -> None:
    assert text.quantity(value) == shown


def test_small_figures_of_speech() -> None:
    assert text.file_size(2_110_000) == "2.11 MB"
    assert text.file_size(None) == text.NONE
    assert text.signed(-0.04) == "0" and text.signed(-1.25, 2) == "−1.25"
    assert text.relative(5, 0) == "" and text.relative(None, 4) == "" and text.relative(5, 10) == "−50.0 %"
    assert [text.duration(s) for s in (1.23, 59.2, 252, 7300)] == ["1.2 s", "59 s", "4 min 12 s", "2 h 1 min"]
    assert text.short_names(["a.b.c", "a.b.d.e"]) == {"a.b.c": "c", "a.b.d.e": "d.e"}
    assert text.short_names(["a.b", "a"]) == {"a.b": "a.b", "a": "a"}
    assert text.moment("2026-01-02T03:04:05+00:00") == "2026-01-02 03:04 UTC" and text.moment("today") == "today"
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": ""}) == [("a: b", "1"), ("d", "1, 2")]


# --- in a browser ------------------------------------------------------------------------------------------------

PROBE = """<!doctype html><meta charset="utf-8"><body>
<iframe id="phone" style="width:390px;height:800px" srcdoc="{page}"></iframe>
<iframe id="desk" style="width:1280px;height:800px" srcdoc="{page}"></iframe>
<script>
window.addEventListener("load", () => {{
  const found = {{}};
  for (const id of ["phone", "desk"]) {{
    const view = document.getElementById(id), page = view.contentDocument, style = view.contentWindow.getComputedStyle;
    const wide = [...page.querySelectorAll("main *")].filter(e => !e.closest(".scroll,pre,svg") &&
      e.getBoundingClientRect().right > view.clientWidth + 1);
    const drawn = [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect().height);
    found[id] = {{ width: page.documentElement.scrollWidth, wide: wide.map(e => e.className || e.tagName),
      background: style(page.body).backgroundColor, ink: style(page.body).color, drawn: drawn,
      images: [...page.images].every(i => i.naturalWidth > 0) }};
  }}
  const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
}});
</script>"""


def luminance(colour: str) -> float:
    return sum(int(v) for v in re.findall(r"\d+", colour)[:3]) / 765


def test_page_fits_phone_and_desk_in_a_dark_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or chrome on this machine")
    probe = tmp_path / "probe.html"
    source = html.escape(render(sample_run(), sample_examples()), quote=True)
    probe.write_text(PROBE.format(page=source), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--blink-settings=preferredColorScheme=0", "--dump-dom",
        probe.as_uri(),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("the browser did not start within two minutes")
    measured = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert measured, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(html.unescape(measured.group(1)))
    for view, width in (("phone", 390), ("desk", 1280)):
        assert found[view]["width"] <= width, found[view]
        assert found[view]["wide"] == []
        assert found[view]["images"] and len(found[view]["drawn"]) == 4 and min(found[view]["drawn"]) > 60
        assert luminance(found[view]["background"]) < 0.2 < 0.8 < luminance(found[view]["ink"])

"""The page: what it says, what it must not load, and how it fits."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from builders.pages import Page
from builders.report_sample import card, latency, sample_examples, sample_run

from robust_prune.bench.types import Ratio
from robust_prune.report import (
    ModelRow,
    RunReport,
)
from robust_prune.report.files import to_markdown
from robust_prune.report.html import render

# --- the page ----------------------------------------------------------------------------------------------------


def test_page_says_what_was_found() -> None:
    shown = Page(render(sample_run(), sample_examples())).text.replace("\u00a0", " ")
    for phrase in (
        "demo, half the arithmetic", "Figures on the embedded sample are indicative", "160.2 M", "−50.0 %",
        "1.62 times as fast", "38.8 %", "[34.6, 43.1]", "PGD-20, 2 random restarts", "Linf 8/255", "80 of 128",
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
    assert "is in doubt, since the first file differs from itself" in shown and "measure it again)" in shown
    assert "No warning was raised" not in shown
    assert "Buffers moved." in to_markdown(replace(run, models=(run.models[0], flagged)))


def test_long_names_and_many_layers_stay_whole() -> None:
    run = sample_run()
    assert run.profile
    module = run.profile.modules[0]
    many = tuple(replace(module, name=f"net.stage{i // 10}.block{i}.conv") for i in range(200))
    source = render(replace(run, plan=None, profile=replace(run.profile, modules=many)))
    assert source.count('class="row"') == 200
    assert "…age19.block199.conv<" in source and "<title>net.stage19.block199.conv, MRS" in source


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
        assert found[view]["images"] and len(found[view]["drawn"]) == 5 and min(found[view]["drawn"]) > 60
        assert luminance(found[view]["background"]) < 0.2 < 0.8 < luminance(found[view]["ink"])


def test_models_below_each_other_fit_the_page_with_whole_intervals() -> None:
    run = sample_run()
    dense, pruned = run.models
    others = tuple(replace(pruned, label=f"cut by {share} %") for share in (30, 50, 75))
    source = render(replace(run, models=(dense, *others)))
    assert '<table class="headline many">' in source
    assert re.search(r"\[\d+\.\d,\u00a0\d+\.\d\]", source), "an interval is not broken over lines"
    listed = re.findall(r"<li>(The cut by \d+.%[^<]*)</li>", source)
    assert len(listed) == 2 and "cut by 75" in listed[1]

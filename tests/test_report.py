"""The page of a run, in a real browser."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from buffer import Group, Response
from config import Config
from run.metrics import Metrics
from tests.runs import read
from tools import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = [
    "<script>window.executed = 1</script>",
    "</script><script>window.executed = 1</script><!-- <script>",
    '<img src="https://example.com/x.png" onerror="window.executed = 1">',
    "\u2028javascript:alert(1)\x00 <!-- data --> ${window.executed = 1}",
]
FIGURES = {
    "loss": 1.0, "grad_norm": 1.0, "reward": 0.5, "kl": 0.25, "entropy": 1.5, "search_idle": 0.25, "train_idle": 0.5,
    "search_tokens_per_s": 1000.0, "train_tokens_per_s": 2000.0, "tokens": 0,
}  # fmt: skip


def make_run(out: Path, updates: int = 30, **settings) -> Path:
    """A run's folder, as `Metrics` writes it; the group of an update has right, wrong and hostile answers."""
    out.mkdir()
    config = Config(model="<i>model</i>", steps=updates, **settings)
    (out / "config.json").write_text(json.dumps(vars(config)))
    with Metrics(out, config, tokenizer=None) as metrics:
        metrics.evaluation(0, {"pass@1": 0.25, "distinct": 1.5})
        metrics.start_clock()
        for step in range(updates):
            with metrics.span("search"), metrics.span("search"), metrics.span("train"):
                time.sleep(0.001)
            texts = [f"right {step}", "wrong", "wrong", HOSTILE[step % 4]]
            tokens, version = np.array([1], np.int32), max(0, step - 2)
            responses = [Response(tokens, True, version, reward) for reward in (1.0, 0.0, 0.0, -1.0)]
            group = Group(0, np.array([1]), responses)
            metrics.tokenizer = SimpleNamespace(batch_decode=lambda *_, texts=texts, **__: texts)
            metrics.update(step, [group], FIGURES, [SimpleNamespace(text=f"prompt {step} {HOSTILE[0]}")])
        with metrics.span("evaluate"):
            metrics.evaluation(updates, {"pass@1": 0.75, "distinct": 2.5})
    return out


@pytest.fixture(scope="module")
def browser():
    """Chromium: CI must have it."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found and not os.environ.get("CI"):
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, path: Path, width: int = 1280, scheme: str = "light"):
    """The page in a window. It may say nothing on the console, and ask for nothing."""
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(f"file://{path}")
    page.wait_for_selector("#spans .main-svg")
    yield page
    assert not said
    assert page.evaluate("window.executed") is None
    page.close()


@pytest.fixture(scope="module")
def page_of_a_run(tmp_path_factory):
    out = make_run(tmp_path_factory.mktemp("runs") / "one <b>run")
    report.write([out], out / "report.html")
    return out / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_is_readable_wide_and_narrow_light_and_dark(browser, page_of_a_run, width, scheme):
    with opened(browser, page_of_a_run, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing is cut off or scrolls sideways
        assert page.locator("#charts .plot .main-svg .lines").count() >= 8
        assert page.locator("#charts h3").all_inner_texts()[0].startswith("Held out")
        assert page.locator("#spans .bars path").count() >= 3
        assert "one <b>run" in page.locator("#summary").inner_text()
        cells = page.locator("#summary td").all_inner_texts()
        assert cells[3] == "30" and cells[5:] == ["0.250 → 0.750", "0.25", "2", "75 %", "50 %"]
        fits = "document.querySelector('#summary').scrollWidth <= document.querySelector('.scroll').clientWidth"
        assert page.evaluate(fits) == (width == 1280)
        lightness = "getComputedStyle(document.body)[{}].match(/\\d+/g).reduce((a, b) => a + +b, 0) / 3"
        text, ground = (page.evaluate(lightness.format(repr(name))) for name in ("color", "backgroundColor"))
        assert (text < 60 and ground > 200) if scheme == "light" else (text > 200 and ground < 60)


def test_samples_are_paged_and_filtered_and_stay_text(browser, page_of_a_run):
    with opened(browser, page_of_a_run) as page:
        groups, place = page.locator(".group"), page.locator("#place")
        assert place.inner_text() == "1 of 6 (30 groups)" and groups.count() == 5
        assert "prompt 29 <script>" in groups.nth(0).inner_text() and page.locator("#before").is_disabled()
        first = groups.nth(0).locator(".response")
        assert [each.splitlines()[0] for each in first.all_inner_texts()] == [
            "1 · age 2", "0 · age 2 · 2 times", "-1 · age 2",
        ]  # fmt: skip
        for _ in range(5):
            page.click("#after")
        assert place.inner_text() == "6 of 6 (30 groups)" and page.locator("#after").is_disabled()
        assert "prompt 0 " in groups.nth(4).inner_text()

        page.fill("#filter", "RIGHT 1")
        assert place.inner_text() == "1 of 3 (11 groups)"  # 1 and 10 to 19
        assert page.locator(".found").all_inner_texts()[0].endswith("right 19")
        page.fill("#filter", "onerror")
        shown = [text.split("\n", 1)[1] for text in page.locator(".found").all_inner_texts()]
        assert shown and all(text == HOSTILE[2] for text in shown)
        page.fill("#least", "0")
        assert place.inner_text() == "1 of 1 (0 groups)"
        page.fill("#filter", "")
        page.fill("#least", "1")
        assert place.inner_text() == "1 of 6 (30 groups)" and page.locator(".found").count() == 5
        page.select_option("#order", "old")
        assert "prompt 0 " in groups.nth(0).inner_text()
        assert page.locator("img, iframe, object").count() == 0 and page.locator("script").count() == 3


def test_several_runs_are_laid_over_one_another(browser, tmp_path, page_of_a_run):
    other, empty = make_run(tmp_path / "other", updates=50, lr=0.5), tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(vars(Config(model="m", lr=0.25))))
    report.write([page_of_a_run.parent, other, empty], tmp_path / "all.html")
    with opened(browser, tmp_path / "all.html") as page:
        cells = page.locator("#summary tr").nth(3).locator("td").all_inner_texts()
        assert cells[3:] == ["0", "0 s", "", "", "", "", ""]
        assert page.evaluate("document.querySelector('#charts .plot').data.map(trace => trace.name)") == [
            "one &lt;b>run: pass@1", "other: pass@1",
        ]  # fmt: skip
        page.select_option("#over", "step")
        ends = "Array.from(document.querySelector('#charts .plot').data, trace => trace.x[trace.x.length - 1])"
        assert page.evaluate(ends) == [30, 50]
        assert page.locator("#differ tr").all_inner_texts()[1:] == ["model\t<i>model</i>\t<i>model</i>\tm",
            "steps\t30\t50\t1000", "lr\t0.00001\t0.5\t0.25"]  # fmt: skip
        drawn = "Array.from(document.querySelectorAll('#charts .plot'), plot => plot.data.map(trace => trace.y[3]))"
        assert [0.75, 0.5, 0.75, 0.5] in page.evaluate(drawn)  # busy is what is not idle
        page.select_option("#samples-run", "1")
        assert page.locator("#place").inner_text() == "1 of 10 (50 groups)"
        page.select_option("#timeline-run", "2")  # of which there is nothing to see
        assert page.locator("#spans .bars path").count() == 0


def test_a_long_run_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "POINTS", 10)
    monkeypatch.setattr(report, "GROUPS", 7)
    out = make_run(tmp_path / "run", updates=45)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 46, "lo')  # it goes on, or was killed
    found = report.read_run(out)
    assert len(found["updates"]["kl"]) == 10 and set(found["updates"]["kl"]) == {0.25} and found["steps"] == 45
    assert np.average(found["updates"]["step"], weights=[4, 5] * 5) == pytest.approx(23)
    assert [group["step"] for group in found["samples"]] == [1, 8, 16, 23, 30, 38, 45]
    long = read(out / "samples.jsonl")[0]
    long["responses"][0]["text"] = "x" * 5000
    (out / "samples.jsonl").write_text(json.dumps(long) + "\n")
    (text,) = (each["text"] for each in report.read_run(out)["samples"][0]["responses"] if each["text"][0] == "x")
    assert len(text) < 2100 and text.endswith("… and 3,000 characters more")


def test_of_spans_that_overlap_each_has_a_lane_and_the_busy_share_is_of_their_union():
    search = np.array([[0.0, 4.0], [1.0, 3.0], [2.0, 5.0], [3.0, 6.0], [9.0, 10.0]])
    spans = {what: np.empty((0, 2)) for what in report.WORK} | {"search": search, "train": np.array([[0.0, 5.0]])}
    found = report.timeline(spans)
    assert found["seconds"] == 10.0 and np.mean(found["busy"]["search"]) == pytest.approx(0.7, abs=1e-3)
    placed = found["windows"]["as it begins"]["spans"]["search"]
    assert placed == [(0, 4, 0), (1, 2, 1), (2, 3, 2), (3, 3, 1), (9, 1, 0)]


def test_what_is_no_run_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "none")])
    assert report.main() == 2
    complaint = capsys.readouterr().err
    assert (
        complaint.startswith("report: ") and "must be the folder of a run" in complaint and complaint.count("\n") == 1
    )

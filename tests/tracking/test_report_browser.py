"""The pages in a real browser: they fit on a phone, and their text is readable in light and dark mode."""

import html
import json
import re
import shutil
import subprocess

import pytest

from lora_dist.tracking.report import write_comparison
from tests.helpers.ranks import PATIENCE_S
from tests.helpers.reported_runs import AGAIN, another, make_folder, page, step_line

# The page is in a frame, because the window of the browser cannot be as narrow as a phone.
WRAPPER = """<!doctype html><body><iframe id="frame" style="border: 0; width: %dpx; height: 900px" srcdoc="%s"></iframe>
<pre id="found"></pre><script>
const frame = document.getElementById("frame");
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;  // WCAG 2.1, relative luminance
const light = c => { const [r, g, b] = c.map(v => linear(v / 255)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const rgb = text => text.match(/[\\d.]+/g).map(Number);
function ground(element, view) {
  for (; element; element = element.parentElement) {
    const c = rgb(view.getComputedStyle(element).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3);
  }
  return [255, 255, 255];
}
frame.onload = () => {
  const view = frame.contentWindow, page = frame.contentDocument, found = {contrasts: [], charts: [], overlaps: [],
    clipped: []};
  page.querySelectorAll("details").forEach(d => d.open = true);
  for (const element of page.querySelectorAll("body *")) {
    const text = [...element.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!text || !element.getClientRects().length) continue;
    const style = view.getComputedStyle(element);
    const ink = rgb(element.ownerSVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(ground(element, view))].sort((x, y) => y - x);
    found.contrasts.push([(a + 0.05) / (b + 0.05), element.textContent.trim().slice(0, 40)]);
  }
  for (const svg of page.querySelectorAll("svg[role=img]")) {
    const box = svg.getBoundingClientRect(), [, , w, h] = svg.getAttribute("viewBox").split(" ").map(Number);
    if (!box.width) continue;
    const points = [...svg.querySelectorAll("polyline")].flatMap(p => [...p.points].map(q => [q.x, q.y]));
    const letters = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    found.charts.push({width: box.width, height: box.height, points: points.length, letters: letters[0].height,
      outside: points.filter(([x, y]) => x < 0 || y < 0 || x > w || y > h).length});
    letters.forEach(a => { if (a.left < box.left || a.right > box.right || a.top < box.top || a.bottom > box.bottom)
      found.clipped.push(svg.getAttribute("aria-label").slice(0, 40)); });
    letters.forEach((a, i) => letters.slice(i + 1).forEach(b => { if (a.left < b.right && b.left < a.right &&
      a.top < b.bottom && b.top < a.bottom) found.overlaps.push(svg.getAttribute("aria-label").slice(0, 40)); }));
  }
  found.tallest = Math.max(...[...page.querySelectorAll("tr")].map(row => row.getBoundingClientRect().height));
  Object.assign(found, {wide: page.documentElement.scrollWidth, screen: view.innerWidth,
    ground: view.getComputedStyle(page.body).backgroundColor,
    fetched: view.performance.getEntriesByType("resource").length,
    headings: [...page.querySelectorAll("h1, h2, h3, h4")].map(h => h.tagName)});
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script></body>"""

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")


def look_at(text: str, tmp_path, *, width: int, dark: bool) -> dict:
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER % (width, html.escape(text)), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", "--timeout=20000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # requests are counted, but none succeeds
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]))


@pytest.fixture
def full(tmp_path, config):
    """A run of 200 steps that fills every section of the page."""
    folder = make_folder(tmp_path / "run", config)
    names = ("train/grad_norm", "train/learning_rate", "perf/tokens_per_second", "perf/padded_tokens_per_second",
             "perf/padding_fraction", "train/mean_token_accuracy", "perf/mfu")  # fmt: skip
    lines = [step_line(step, **{n: 2e-4 * step * (i + 1) for i, n in enumerate(names)}) for step in range(11, 201)]
    for line in lines:  # ticks with many digits
        line["perf/mfu"] = 0.12345 + line["train/global_step"] * 1e-7
        line["perf/padding_fraction"] = 123_456 + line["train/global_step"] / 1000
    folder.append_lines(folder.metrics, lines)
    folder.append_lines(folder.starts, [{**AGAIN, "step": 120, "previous": {"status": "failed", "error": "a" * 300}}])
    folder.append_lines(folder.samples, [
        {"train/global_step": 10, "prompt": "x" * 200, "reference": None, "completion": "word " * 80}
    ])  # fmt: skip
    folder.profile.mkdir()
    rows = [{"what": f"aten::a_long_name_of_an_operation_{i}", "self_time_s": 0.1, "share": 0.1, "calls": 1234567}
            for i in range(10)]  # fmt: skip
    (folder.profile / "table.json").write_text(json.dumps({"steps": [3, 4], "rows": rows}))
    return folder


def check(found: dict, *, width: int, dark: bool, charts: int) -> None:
    assert found["screen"] == width and found["wide"] <= width
    assert (found["ground"] == "rgb(15, 20, 26)") == dark
    least, text = min(found["contrasts"])
    assert len(found["contrasts"]) > 20 and least >= 4.5, (least, text)
    assert len(found["charts"]) == charts and not found["overlaps"] and not found["clipped"]
    assert all(c["width"] > 250 and c["height"] > 100 and not c["outside"] for c in found["charts"])
    assert all(c["letters"] >= 9 for c in found["charts"])  # pixels
    assert found["tallest"] < 500  # pixels: no column is so narrow that each line holds one letter
    assert found["fetched"] == 0
    assert found["headings"][0] == "H1" and found["headings"].count("H1") == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1150], ids=["phone", "desktop"])
def test_a_run_can_be_read(full, tmp_path, width, dark):
    check(look_at(page(full), tmp_path, width=width, dark=dark), width=width, dark=dark, charts=7)


def test_a_comparison_can_be_read_on_a_phone(full, tmp_path):
    runs = [full, *(another(full, f"run-with-a-long-name-{i}", learning_rate=i / 10) for i in range(1, 5))]
    write_comparison(runs, tmp_path / "comparison.html")
    found = look_at((tmp_path / "comparison.html").read_text(), tmp_path, width=360, dark=True)
    check(found, width=360, dark=True, charts=5)

"""The report in Debian's Chromium: no error, figures that are not empty, no text over another."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from megatron_prefix.report.page import write_report
from tests.run_folders import write_whole_run

HOSTILE = "</div></p><script>document.title='pwned'</script><img src=x onerror=alert(1)>"
# Laid out by the browser: overlapping texts of a figure, shapes, and whether the page is too wide.
MEASURE = """
<script>
const inside = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
                      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
const figures = [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')];
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  const over = [];
  boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
    if (inside(x, y)) over.push(a + ' | ' + b);
  }));
  const out = boxes.filter(([_, x]) => x.left < frame.left - 2 || x.right > frame.right + 2);
  return {name: figure.id, width: frame.width, height: frame.height, texts: boxes.length, over,
          out: out.map(([a]) => a), shapes: svg.querySelectorAll('path, image, use').length};
});
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const told = document.createElement('pre');
told.id = 'measured';
told.textContent = JSON.stringify({figures, wide, title: document.title,
                                   scripts: document.scripts.length,
                                   images: document.querySelectorAll('body img').length});
document.body.append(told);
</script>
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if not found:
        pytest.fail("no chromium: apt-get install chromium (tools/debian-test-packages.txt)")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs = [
        write_whole_run(root / "a-run-of-a-rather-long-name-with-seed-0-and-lr-0.001"),
        write_whole_run(root / "half", steps=7, words=HOSTILE),
    ]
    return write_report(runs, root / "out")


def browse(chromium: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    words += ["--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", *options]
    done = subprocess.run(
        [chromium, *words, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("width", [1200, 520])
def test_it_is_laid_out_without_overlaps(chromium: str, page: Path, width: int) -> None:
    source = page.read_text(encoding="utf-8")
    policy = source[source.index("<meta http-equiv") :].partition(">")[0] + ">"
    measured = page.with_name(f"measured-{width}.html")
    measured.write_text(source.replace(policy, "").replace("</body>", f"{MEASURE}</body>"))
    dom = browse(chromium, measured, f"--window-size={width},900", "--dump-dom").stdout
    text = dom.partition('<pre id="measured">')[2].partition("</pre>")[0]
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(found["figures"]) == 10
    for figure in found["figures"]:
        assert figure["over"] == [] and figure["out"] == [], figure
        assert figure["shapes"] > 10 and figure["texts"] > 5, figure
        assert figure["width"] > 400 and figure["height"] > 60, figure
    assert found["wide"] <= 0
    assert (found["scripts"], found["images"]) == (1, 0)  # the script is this test's own
    assert "pwned" not in found["title"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_without_an_error(chromium: str, page: Path, scheme: str) -> None:
    png = page.with_name(f"{scheme}.png")
    shown = "--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1")
    done = browse(chromium, page, shown, "--window-size=1200,1600", f"--screenshot={png}")
    assert "CONSOLE" not in done.stderr
    with Image.open(png) as image:
        colours = dict((c, n) for n, c in image.convert("RGB").getcolors(2**24) or [])
    paper = max(colours, key=lambda colour: colours[colour])
    assert paper == ((17, 24, 30) if scheme == "dark" else (255, 255, 255))
    runs = [(87, 177, 236), (255, 139, 61)] if scheme == "dark" else [(0, 114, 178), (213, 94, 0)]
    for colour in runs:  # both runs' lines and markers
        assert colours.get(colour, 0) > 300

"""The page in a real browser: no sideways scroll on a phone, nothing asked of the network, nothing on the console."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHROMIUM, needs_chromium
from tests.report.writer import RunSpec, stripes, write_run, write_study
from ulfine_fast.report import build_report

pytestmark = needs_chromium

# A headless window is at least 500 wide, so the page is put into a frame of the required width. The frame has the same
# origin (srcdoc), its own policy stays in force, and the script around it only measures.
MEASURE = """<!DOCTYPE html><meta charset="utf-8">
<iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe><pre id="measured"></pre>
<script>
addEventListener("load", () => {{
  const inner = document.getElementById("page").contentDocument, root = inner.documentElement;
  const asked = document.getElementById("page").contentWindow.performance.getEntriesByType("resource");
  const wide = [...inner.querySelectorAll("body *")].filter(e => !e.closest(".scroll, .unseen, .skip, .id, svg")
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + "." + e.className);
  const blank = [...inner.images].filter(image => !image.complete || !image.naturalWidth).length;
  const focusable = [...inner.querySelectorAll("a[href], summary, [tabindex='0']")];
  const unfocused = focusable.filter(e => (e.focus(), inner.activeElement !== e && e.checkVisibility())).length;
  document.getElementById("measured").textContent = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth, wide, blank, focusable: focusable.length, unfocused,
    asked: asked.map(one => one.name).filter(name => !name.startsWith("data:")),
    paper: getComputedStyle(root).backgroundColor, ink: getComputedStyle(inner.body).color}});
}});
</script>"""


def measured(page: Path, width: int, scheme: str, scratch: Path) -> tuple[dict[str, Any], str]:
    """Numbers from inside the page, and what the browser wrote to its console."""
    frame = scratch / f"frame-{width}-{scheme}.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={scratch / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=5000", f"--window-size={max(600, width + 40)},1000",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.S)
    assert match, done.stderr
    assert match.group(1), done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(match.group(1))), console


def hostile_run(folder: Path) -> Path:
    """Names without a space to break at, the widest content a page can get."""
    names = ("<script>alert(1)</script>", "W" * 120, "ein sehr langer Name mit vielen Wörtern darin", *"abcdefg")
    config = {"shape": "x" * 200, "y" * 90: "z" * 90}
    return write_run(folder, RunSpec(names=names, rows=120, ids="<script>/{:0>150}".format, config=config))


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["study", "hostile", "many"])
def test_the_page_fits_its_window(tmp_path: Path, kind: str, width: int) -> None:
    runs = tmp_path / "runs"
    if kind == "study":
        write_study(runs, seeds=2, rows=200)
    elif kind == "many":
        write_study(runs, ("zero_shot", "ulfine"), seeds=2, classes=150, rows=600)
    else:
        hostile_run(runs)
    page = build_report([runs], tmp_path / "page.html", images=stripes)
    numbers, console = measured(page, width, "light", tmp_path)
    assert numbers["client"] in range(width - 20, width + 1)
    assert numbers["wide"] == []
    assert numbers["scroll"] <= numbers["client"]
    assert numbers["blank"] == 0
    assert numbers["asked"] == []
    assert console == ""
    assert numbers["focusable"] > 10
    assert numbers["unfocused"] == 0


def test_the_measure_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A page that breaks every rule, so that the silence of a good page means something."""
    page = build_report([write_run(tmp_path / "run", RunSpec(rows=60))], tmp_path / "page.html")
    bad = '<main><div class="bad" style="width:900px">x</div><img src="http://127.0.0.1:9/x.png"><script>1</script>'
    page.write_text(page.read_text(encoding="utf-8").replace("<main", f"{bad}<main", 1), encoding="utf-8")
    numbers, console = measured(page, 360, "light", tmp_path)
    assert "DIV.bad" in numbers["wide"]
    assert numbers["scroll"] > numbers["client"]
    assert numbers["blank"] == 1
    assert console.count("Content Security Policy") >= 2, "the image and the script were both refused"


def test_the_page_follows_the_color_scheme(tmp_path: Path) -> None:
    page = build_report([write_run(tmp_path / "run", RunSpec(rows=60))], tmp_path / "page.html")
    light, _ = measured(page, 800, "light", tmp_path)
    dark, _ = measured(page, 800, "dark", tmp_path)
    assert (light["paper"], light["ink"]) == ("rgb(255, 255, 255)", "rgb(27, 28, 30)")
    assert (dark["paper"], dark["ink"]) == ("rgb(21, 23, 26)", "rgb(232, 233, 234)")

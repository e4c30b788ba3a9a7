"""The page in a real browser: opened from disk, it runs, sorts, and asks for nothing.

Chromium writes what it did on the network to a log of its own; a page that asks for anything
leaves an address there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.report.html import page_text
from tests.bench.test_report_html import records

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed"),
]
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
)
_OF_BROWSER = re.compile(r"^https?://[^/]*\.(google|googleapis|gvt1|gstatic)\.com[/:]")
# Runs in the page's own context: the test's copy alone allows it.
_PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelectorAll("table.sortable")[1];
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.textContent === "GPU memory");
  const cells = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
  const before = cells();
  heads[column].querySelector("button").click();
  const up = cells();
  heads[column].querySelector("button").click();
  const svgs = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  const style = getComputedStyle(document.documentElement);
  document.title = "PROBE" + JSON.stringify({
    before, up, down: cells(),
    boxes: svgs.map((box) => [box.width, box.height]),
    asked: performance.getEntriesByType("resource").map((entry) => entry.name),
    wide: document.documentElement.scrollWidth - innerWidth,
    page: style.getPropertyValue("--page").trim(),
  });
});
</script>
"""


def browse(page: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """Return what the probe found, and the addresses asked for, not the browser's own."""
    log = folder / "net.json"
    command = [
        *(BROWSER, *_FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"),
        *(f"--log-net-log={log}", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>PROBE(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[:500] + done.stderr[-500:]
    asked = re.findall(r'"url":"((?:https?|wss?)://[^"]*)"', log.read_text(encoding="utf-8"))
    readings = json.loads(found[1].replace("&gt;", ">").replace("&amp;", "&"))
    return readings, [address for address in asked if not _OF_BROWSER.search(address)]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = page_text("table1", records())
    page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    path = tmp_path_factory.mktemp("page") / "table1.html"
    path.write_text(page.replace("</body>", _PROBE + "</body>"), encoding="utf-8")
    return path


def test_the_page_opens_sorts_and_asks_for_nothing(probed: Path, tmp_path: Path) -> None:
    found, asked = browse(probed, tmp_path, "--window-size=1200,900")
    assert found["asked"] == []
    assert asked == []
    assert found["before"] == ["4.0 GiB", "2.0 GiB", "9.0 GiB"]
    assert found["up"] == ["2.0 GiB", "4.0 GiB", "9.0 GiB"]
    assert found["down"] == ["9.0 GiB", "4.0 GiB", "2.0 GiB"]
    assert len(found["boxes"]) == 4
    assert all(width > 400 and height > 100 for width, height in found["boxes"])
    assert found["page"] == "#ffffff"


def test_the_log_would_show_a_page_that_asks(probed: Path, tmp_path: Path) -> None:
    """Without its policy and with a picture from elsewhere, the address is seen."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", probed.read_text())
    asking = tmp_path / "asking.html"
    asking.write_text(text.replace("<main", '<img src="http://asked.invalid/a.png"><main', 1))
    found, asked = browse(asking, tmp_path)
    assert "http://asked.invalid/a.png" in asked
    assert found["asked"] == ["http://asked.invalid/a.png"]


def test_a_narrow_page_scrolls_its_tables_and_not_itself(probed: Path, tmp_path: Path) -> None:
    found, _ = browse(probed, tmp_path, "--window-size=500,900")
    assert found["wide"] <= 0


def test_the_script_runs_under_the_page_s_own_policy(tmp_path: Path) -> None:
    path = tmp_path / "table1.html"
    path.write_text(page_text("table1", records()), encoding="utf-8")
    command = [BROWSER, *_FLAGS, f"--user-data-dir={tmp_path / 'p'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'title="sort by this column"' in done.stdout

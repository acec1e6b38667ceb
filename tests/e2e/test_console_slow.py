"""The console in a real browser, over a real cluster: what it shows, by mouse and by keyboard.

With KVSTORE_SCREENSHOTS=DIR the pictures of docs/console.md are taken anew.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from kvworkers.demo.script import document
from PIL import Image

from tests.browser import Page, browser
from tests.cluster_process import ClusterProcess, cluster_process

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

LABELLED = """[...document.querySelectorAll('table')].every(t => t.caption?.textContent)
  && [...document.querySelectorAll('section')].every(s => document.getElementById(
       s.getAttribute('aria-labelledby'))?.textContent)
  && [...document.querySelectorAll('button, meter')].every(
       b => b.textContent.trim() || b.getAttribute('aria-label'))"""


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """A cluster with a disk below it, that has held a few conversations."""
    disk = tmp_path_factory.mktemp("nvme")
    options = ("--arena", "256MiB", "--nvme", str(disk), "--nvme-bytes", "1GiB", "--workers", "2")
    with cluster_process(*options) as cluster:
        talk(cluster)
        yield cluster


def talk(cluster: ClusterProcess) -> None:
    with httpx.Client(base_url=cluster.http, timeout=120, trust_env=False) as client:
        for name in ("moka", "lyon", "tides"):
            opening = " ".join(document(name).split()[:160])
            for question in ("Who?", "When?", "Where?", "Why?"):
                body = {
                    "model": cluster.model, "max_tokens": 6, "temperature": 0,
                    "messages": [{"role": "user", "content": f"{opening} {question}"}],
                }  # fmt: skip
                assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.fixture
def page(busy: ClusterProcess, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as page:
        page.go(f"{busy.http}/console")
        page.wait("document.body?.dataset.drawn >= 1")
        yield page
        assert page.complaints == []


def test_it_shows_the_cluster(page: Page) -> None:
    assert page.value("document.querySelectorAll('#requests tbody tr').length") == 12
    hit = page.value("document.querySelector('#now dd').textContent")
    assert float(hit.split()[0]) > 40
    topology = page.value("document.getElementById('topology').textContent")
    for said in (
        "worker-0",
        "worker-1",
        "live",
        "blocks in dram",
        "blocks in nvme",
        "blocks in hbm",
    ):
        assert said in topology
    assert page.value("document.querySelector('#domains tbody th').textContent") == "default"
    assert page.value("document.querySelectorAll('#hot tbody code').length") > 0
    page.wait("document.querySelectorAll('#chart rect').length > 0")
    assert "hbm" in page.value("document.getElementById('chart-text').textContent")
    assert page.value(LABELLED) is True
    title, width = page.value("document.title"), page.value("document.body.scrollWidth")
    assert title == "kvstore console" and width <= 1280
    loaded = page.value("performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    assert set(loaded) == {page.value("location.origin")}, "nothing comes from elsewhere"


def test_a_request_is_explained_by_keyboard_alone(page: Page) -> None:
    page.value("document.querySelector('#requests button').focus()")
    page.press("Enter")
    page.wait("!document.getElementById('explanation').hidden")
    told = page.value("document.getElementById('explanation').textContent")
    assert "worker-0" in told and "worker-1" in told and "not cached:" in told
    assert page.value("document.activeElement.id") == "explanation"
    page.press("Tab")
    assert page.value("document.activeElement.id") == "explanation-close"
    page.press("Enter")
    page.wait("document.getElementById('explanation').hidden")


def test_it_follows_keeps_the_focus_and_can_be_paused(page: Page, busy: ClusterProcess) -> None:
    page.value("document.querySelectorAll('#requests button')[3].focus()")
    chosen = page.value("document.activeElement.dataset.request")
    drawn = page.value("Number(document.body.dataset.drawn)")
    page.wait(f"Number(document.body.dataset.drawn) > {drawn}")
    assert page.value("document.activeElement.dataset.request") == chosen
    page.value("document.getElementById('pause').click()")
    assert page.value("document.getElementById('status').textContent") == "paused"
    assert page.value("document.getElementById('pause').getAttribute('aria-pressed')") == "true"


def test_it_fits_a_narrow_window(page: Page) -> None:
    page.resize(400, 800)
    assert page.value("document.documentElement.scrollWidth") <= 400


def test_pictures(page: Page, tmp_path: Path) -> None:
    directory = Path(os.environ.get("KVSTORE_SCREENSHOTS", tmp_path))
    page.wait("document.querySelectorAll('#chart rect').length > 0")
    page.resize(1180, 1480)
    page.picture(directory / "console.png")
    page.value("document.querySelector('#requests button').click()")
    page.wait("!document.getElementById('explanation').hidden")
    page.value("document.getElementById('explanation').scrollIntoView({block: 'end'})")
    page.resize(1180, 800, dark=True)
    page.value("document.getElementById('requests-title').scrollIntoView()")
    page.picture(directory / "console-explain.png")
    for picture in sorted(directory.glob("console*.png")):
        with Image.open(picture) as full:
            full.quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
        assert 10_000 < picture.stat().st_size < 150_000, picture.name

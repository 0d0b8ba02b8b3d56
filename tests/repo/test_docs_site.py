"""The documentation site builds without a warning, and fetches nothing."""

import os
import re
import subprocess
import sys

import pytest
from helpers.pages import ROOT

# What a browser loads with a page: scripts, images, style sheets from another host.
LOADED = re.compile(
    r"<(?:script|img|link rel=\"stylesheet\")[^>]*(?:src|href)=\"(https?:[^\"]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site needs the docs extra")
    pytest.importorskip("mkdocstrings", reason="the site needs the docs extra")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert run.returncode == 0, run.stderr
    return folder


def test_every_page_of_the_navigation_is_built(site):
    pages = re.findall(r": ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) > 15
    assert not [page for page in pages if not (site / f"{page}.html").exists()]


def test_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not LOADED.findall(page.read_text()), page


def test_api_pages_hold_the_public_names(site):
    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in ("compress", "optimize", "LowRankLinear", "RankPlan", "low_rank_mlp", "recover"):
        assert f">{name}</span>" in text or f"{name}<" in text, name

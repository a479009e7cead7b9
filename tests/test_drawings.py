"""What the report draws is what the plan says, and the page fits a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import posed

import partition as pt
from partition import drawings
from partition.policies import POLICIES
from partition.timeline import schedule


@pytest.mark.parametrize("policy", ["phase_split", "random", "single"])
def test_memory_over_time_ends_at_what_the_plan_holds(policy: str) -> None:
    problem, _ = posed("trn2_efa_4cs3")
    placement = POLICIES[policy](problem)
    held = dict(zip(problem.meshes, pt.evaluate(problem, placement).memory, strict=True))
    for name, steps in drawings.memory(schedule(problem, placement)).items():
        most = max(bytes_ for _, bytes_ in steps)
        assert 0 < most <= held[name] * (1 + 1e-9)
        assert [at for at, _ in steps] == sorted(at for at, _ in steps)


def test_formulas_give_the_headline() -> None:
    fn, args = pt.model("tiny")(prompt=32, new_tokens=8)
    made = pt.plan(fn, args, cluster="trn2_efa_cs3", policy="phase_split")
    terms = {name: dict(values) for name, _, values in drawings.formulas(made)}
    e, usd = made.estimate, terms["$ per million tokens"]
    by_mesh = [(usd[f"occupied: {m} [s]"], usd[f"price of {m} [$/s]"]) for m in ("trn2", "cs3")]
    assert sum(a * b for a, b in by_mesh) / usd["tokens"] * 1e6 == pytest.approx(e.usd_per_mtok, rel=0.01)  # links charge nothing here
    request = terms["end to end"]
    assert request["TTFT [s]"] + request["trips"] * request["TPOT [s]"] == pytest.approx(e.e2e, rel=0.05)
    assert sum(v for k, v in terms["TPOT"].items() if k.startswith("decode")) == pytest.approx(e.tpot, rel=0.05)


def test_blocks_lie_under_their_roofs_and_flows_between_meshes() -> None:
    fn, args = pt.model("llama-3.2-1b")(prompt=512, new_tokens=8)
    made = pt.plan(fn, args, cluster="trn2_efa_cs3", policy="phase_split")
    points, roofs = drawings.roofline(made)
    kinds = made.problem.kinds
    assert points and set(roofs) == {"trn2", "cs3"}
    assert all(p.reached <= 2.01 * min(roofs[kinds[p.mesh]][0], p.intensity * roofs[kinds[p.mesh]][1]) for p in points)  # float8 may be twice as fast as the roof that is drawn
    blocks, flows = drawings.lanes(made)
    assert len(blocks) == len(made.problem) and all(blocks[a][1] != blocks[b][1] for a, b, _, _ in flows) and any(kind == "handoff" for *_, kind, _ in flows)


def test_the_explorer_graph_names_every_block_once(tmp_path: Path) -> None:
    fn, args = pt.model("tiny")(prompt=32, new_tokens=8)
    made = pt.plan(fn, args, cluster="trn2_efa_cs3", policy="phase_split")
    made.save(tmp_path)
    graph = json.loads((tmp_path / "explorer.json").read_text())["graphs"][0]
    ids = [n["id"] for n in graph["nodes"]]
    assert len(set(ids)) == len(ids) == len(made.problem) and all(e["sourceNodeId"] in ids for n in graph["nodes"] for e in n["incomingEdges"])
    for name in ("explorer_seconds.json", "explorer_meshes.json"):
        assert set(json.loads((tmp_path / name).read_text())[graph["id"]]["results"]) == set(ids)


def test_the_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    fn, args = pt.model("tiny")(prompt=32, new_tokens=8)
    made = pt.plan(fn, args, cluster="trn2_efa_4cs3", policy="random")
    page = (made.save(tmp_path) / "report.html").read_text()
    assert not re.search(r"(src|href)=.?https?:", page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(drawing)
    loaded = pt.Plan.load(tmp_path)
    assert "Memory over time" in pt.report(loaded)  # a loaded plan has a report too


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_nothing_overlaps_or_is_cut_off_in_a_browser(tmp_path: Path) -> None:
    """Every piece of text lies within the page, and no two texts of a drawing lie on each other."""
    fn, args = pt.model("llama-3.2-1b")(prompt=512, new_tokens=8)
    page = pt.plan(fn, args, cluster="trn2_efa_4cs3", policy="phase_split").save(tmp_path) / "report.html"
    script = """<script>addEventListener("load", () => { const out = [];
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth; if (wide > 1) out.push("page is " + wide + " wider than the window");
      document.querySelectorAll("svg").forEach((g, i) => { const boxes = [...g.querySelectorAll("text")].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
        boxes.forEach(([a, p], j) => { if (p.right > innerWidth || p.left < 0) out.push("cut off: " + a); boxes.slice(j + 1).forEach(([b, q]) => { if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2) out.push("overlap: " + a + " and " + b); }); }); });
      document.title = JSON.stringify(out); });</script>"""
    page.write_text(page.read_text().replace("</body>", script + "</body>"))
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=100)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None and title[1] == "[]", title and title[1]


def test_figures_for_papers_come_with_their_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    fn, args = pt.model("tiny")(prompt=32, new_tokens=8)
    made = pt.plan(fn, args, cluster="trn2_efa_4cs3", policy="phase_split")
    pt.draw(made, tmp_path / "f")
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [f"{name}.{kind}" for name in ("memory", "roofline", "timeline") for kind in ("csv", "png", "svg")]
    rows = (tmp_path / "f" / "roofline.csv").read_text().splitlines()
    assert rows[0].startswith("block,phase,mesh") and len(rows) == len(drawings.roofline(made)[0]) + 1
    again = pt.draw(made, tmp_path / "g")
    assert all((again / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "f").glob("*.csv"))
    assert "<table>" in made._repr_html_() and "TTFT" in made._repr_html_()

"""Pages: what they say is what the plan says, text stays text, and they work in a real browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan import cli
from jaxplan.examples import programs
from jaxplan.files import saved_plan
from jaxplan.pages import page, picture_of, picture_of_saved
from jaxplan.pages.collapse import LANES, grouped, lanes, repeats
from jaxplan.pages.html import PER_GROUP
from jaxplan.pages.nouns import Block

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MESH = AbstractMesh((4, 2), ("data", "model"))
EVIL = "<script>document.title='owned'</script>"


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def step(params, x):
    def loss(params):
        return jnp.mean(jnp.square(jax.nn.relu(x @ params["up"]) @ params[EVIL] - x))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


ARGS = {"up": f32(256, 1024), EVIL: f32(1024, 256)}, f32(4096, 256)


@pytest.fixture(scope="module")
def plan():
    return jaxplan.make_plan(step, *ARGS, mesh=MESH, machine="v4", dims={"x": "B F"})


@pytest.fixture(scope="module")
def text(plan):
    return plan.to_html()


class Reader(HTMLParser):
    """What a page is made of: text outside of scripts and styles, tags with attributes; raises where tags do not close."""

    VOID = frozenset({"meta", "input", "br", "rect", "line", "polygon", "polyline", "circle"})

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.stack = [], [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"}.intersection(self.stack):
            self.text.append(data)


def test_a_page_is_well_formed_needs_nothing_else_and_says_what_the_plan_says(plan, text):
    read = Reader(text)
    said = " ".join(" ".join(read.text).split())
    assert "Plan for step" in said and "4 devices" in said
    for number in (jaxplan.report.show_seconds(plan.seconds), jaxplan.report.show_bytes(plan.peak_bytes)):
        assert number in said
    for axis, sent in plan.wire_bytes.items():
        assert f"{jaxplan.report.show_bytes(sent)} sent per device and call" in said, axis
    for path in plan.traced.in_paths:
        assert path in said
    for exchange in plan.exchanges[:5]:
        assert exchange.kind in said and exchange.source in said
    links = ("src", "href", "action", "xlink:href")
    outside = [value for _, attrs in read.tags for name, value in attrs.items() if name in links]
    assert outside == ["#program"] and "http:" not in text and "https:" not in text and "url(" not in text
    assert [attrs["content"] for tag, attrs in read.tags if "http-equiv" in attrs] == [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    ]


def test_what_can_be_operated_has_a_name(text):
    tags = Reader(text).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in tags:
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
        if attrs.get("role") in ("img", "slider"):
            assert attrs["aria-label"]
        if tag == "label":
            assert attrs["for"] in ids
    assert ("html", {"lang": "en"}) in tags and [tag for tag, _ in tags].count("h1") == 1


def test_text_of_the_program_stays_text(text):
    assert EVIL not in text and html.escape(EVIL) in text
    assert len(re.findall("<script", text)) == 3, "two pieces of data and our own"


def test_data_in_a_page_cannot_end_its_element(plan):
    picture = picture_of(plan)
    told = ("</script><img src=x>",) * len(picture.moments)
    drawn = page(jaxplan.api.replace(picture, moments=told))
    assert "</script><img" not in drawn and "<img" not in drawn
    data = re.search(r'id="memory-data">(.*?)</script>', drawn)
    assert data is not None and "</script><img src=x>" in json.loads(data[1])["told"][0]


def test_costs_and_memory_of_a_picture_add_up(plan):
    picture = picture_of(plan)
    assert sum(line.work + line.exchange for line in picture.lines) == pytest.approx(plan.seconds, rel=1e-9)
    work = sum(s.seconds * b.alike for b in picture.blocks for s in b.steps)
    assert work == pytest.approx(plan.seconds - picture.exchange_seconds, rel=0.02)
    assert sum(e.nbytes for e in picture.exchanges) == pytest.approx(sum(plan.wire_bytes.values()), rel=1e-12)
    for other in (plan, plan.replan(machine="cpu")):
        assert picture_of(other).fixed_bytes + max(picture_of(other).memory) == pytest.approx(other.peak_bytes, rel=1e-12)


@pytest.mark.parametrize("form", ["scan", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_layers_are_drawn_once(form):
    program = programs("small")[f"decoder_{form}"]
    found = jaxplan.make_plan(program.fn, *program.args, mesh=MESH, machine="v4")
    picture = picture_of(found)
    loops = [block.times for block in picture.blocks if block.times > 1]
    alike = [block.alike for block in picture.blocks if block.alike > 1]
    assert loops == [4.0, 4.0] if form == "scan" else max(alike) >= 3
    assert sum(len(block.steps) for block in picture.blocks) < 160
    assert len(found.to_html(sweep=None)) < 200_000


def test_a_page_of_a_file_alone(plan, tmp_path):
    drawn = page(picture_of_saved(saved_plan(plan)))
    read = " ".join(Reader(drawn).text)
    assert "Made from the file alone" in read and jaxplan.report.show_bytes(plan.peak_bytes) in read
    assert EVIL not in drawn and html.escape(EVIL) in drawn and 'id="memory-plot"' not in drawn
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", step, *ARGS)
    assert loaded.to_html() == plan.to_html()


def test_a_program_of_nothing_and_one_that_sends_nothing():
    empty = jaxplan.make_plan(lambda x: x, f32(8), mesh=MESH, machine="v4").to_html()
    alone = jaxplan.make_plan(lambda x: jnp.tanh(x), f32(), mesh=AbstractMesh((1,), ("x",)), machine="v4").to_html()
    for drawn in (empty, alone):
        Reader(drawn)
    assert "nothing is computed" in empty and "<p>none</p>" in alone


def test_the_slider_goes_over_sizes_or_links_or_what_is_given(plan, text):
    data = re.search(r'id="sweep-data">(.*?)</script>', text)
    assert data is not None
    points = json.loads(data[1])
    assert [p["at"] for p in points] == [f"B = {n}" for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)]
    assert points[3]["seconds"] == jaxplan.report.show_seconds(plan.seconds)
    assert points[0]["seconds"] == jaxplan.report.show_seconds(plan.replan(sizes={"B": 512}).seconds)
    cut = jaxplan.make_plan(lambda x: x[1:] * 2, f32(64, 8), mesh=MESH, machine="v4").to_html()
    assert "speed of the link of data" in cut
    assert "sweep-data" not in plan.to_html(sweep=None).replace('getElementById("sweep-data")', "")
    found = jaxplan.sweep(step, *ARGS, devices=[4, 8], machine="v4")
    assert "x=4 y=2, link speed 1" in plan.to_html(found.view())


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_repetitions_are_found_and_nothing_is_lost():
    assert repeats("abcabcabcd") == [(0, 3, 3), (9, 1, 1)]
    assert repeats("xababababy") == [(0, 1, 1), (1, 2, 4), (9, 1, 1)]
    assert repeats("") == [] and repeats("abc") == [(0, 3, 1)] and repeats("aa") == [(0, 1, 2)]
    for word in ("aabbaabbc", "mississippi", "abababcabababc", "zzzzz"):
        assert "".join(word[a : a + n] * count for a, n, count in repeats(word)) == word


def test_lines_lead_from_what_is_made_to_who_reads_it():
    rows = lanes({(0, 3), (1, 3), (3, 5), (2, 3)}, 6)
    assert [row[0] for row in rows] == ["", "start", "pass", "both", "pass", "end"]
    assert [row[1] for row in rows] == ["start", "pass", "pass", "end", "", ""]
    assert all(len(row) <= LANES for row in lanes({(0, k) for k in range(2, 12)}, 14))


def steps(count: int) -> Any:
    """As many different things that stand for steps."""
    return tuple(range(count))


def test_all_steps_are_in_some_group_and_blocks_stay_whole_where_they_can():
    def sizes(counts, most=10**6):
        groups, left = grouped([Block(steps(n), 1.0, 2) for n in counts], 64, most)
        return [[len(block.steps) for block in group] for group in groups], left

    assert sizes([5]) == ([[5]], 0) and sizes([]) == ([], 0)
    assert sizes([40, 30, 34]) == ([[40], [30, 34]], 0)
    assert sizes([20, 150, 3]) == ([[20, 44], [64], [42, 3]], 0), "what is long fills a group up"
    assert sizes([50, 150]) == ([[50], [64], [64], [22]], 0)
    assert sizes([10, 100, 5], most=60) == ([[10]], 105), "and nothing comes after a gap"
    groups, _ = grouped([Block(steps(150))], 64, 10**6)
    assert [block.part for group in groups for block in group] == [1, 2, 3]
    assert [step for group in groups for block in group for step in block.steps] == list(range(150))


@pytest.fixture(scope="module")
def wide():
    """A page of a program of many steps that do not repeat."""

    def step(w, x):
        for k in range(2, 12):
            x = jnp.tanh(x @ w[: 16 * k, : 16 * k]) @ jnp.ones((16 * k, 16 * k + 16)) if k > 2 else x @ w[:32, :48]
            x = jnp.sort(x, axis=0) + jnp.cumsum(x, axis=0) * jnp.max(x)
        return x

    found = jaxplan.make_plan(step, f32(512, 512), f32(512, 32), mesh=MESH, machine="v4")
    return found, found.to_html(sweep=None)


def test_every_step_of_a_wide_program_is_on_the_page(wide):
    found, drawn = wide
    Reader(drawn)
    count = sum(len(block.steps) for block in picture_of(found).blocks)
    assert count > PER_GROUP and drawn.count('<li class="step">') == count and "not drawn" not in drawn
    assert drawn.count('<details class="group"') == -(-count // PER_GROUP) and drawn.count('class="group" open') == 1
    assert f"of {count} <small>" in drawn


COLOURS = ("--fg", "--soft", "--mark", *(f"--a{k}" for k in range(6)))


def luminance(colour):
    full = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(pair, 16) for pair in re.findall("..", full)]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in parts)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(text, scheme):
    blocks = re.findall(r":root\{(.*?)\}", text, re.S)
    known = dict(re.findall(r"(--[a-z0-9]+):(#[0-9a-f]+)", blocks[scheme == "dark"]))
    for ground in ("--bg", "--card"):
        for name in COLOURS:
            one, other = sorted((luminance(known[name]), luminance(known[ground])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (scheme, name, ground)  # WCAG 2.1, level AA


# --- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """<script>
window.addEventListener("load",function(){
 var key=function(where,name){where.dispatchEvent(new KeyboardEvent("keydown",{key:name,bubbles:true,cancelable:true}));};
 var out={},steps=document.querySelectorAll(".step summary");
 steps[0].focus();key(steps[0],"ArrowDown");out.down=document.activeElement===steps[1];
 key(steps[1],"End");out.end=document.activeElement===steps[steps.length-1];
 key(document.activeElement,"ArrowDown");out.stays=document.activeElement===steps[steps.length-1];
 steps[0].click();out.opened=steps[0].parentNode.open;
 var s=document.getElementById("slider");s.value="0";s.dispatchEvent(new Event("input"));
 out.first=document.getElementById("at-label").textContent;out.spoken=s.getAttribute("aria-valuetext");
 out.marked=document.querySelectorAll("#sweep-table tr.now").length;
 var plot=document.getElementById("memory-plot"),at=document.getElementById("memory-at");
 key(plot,"Home");out.home=at.textContent;key(plot,"ArrowRight");out.right=at.textContent;
 out.wide=document.documentElement.scrollWidth-window.innerWidth;out.width=window.innerWidth;
 out.dark=matchMedia("(prefers-color-scheme: dark)").matches;out.ground=getComputedStyle(document.body).backgroundColor;
 var all=document.querySelectorAll("a,summary,input,[tabindex]");
 out.order=Array.prototype.filter.call(all,function(e){return e.tabIndex<0;}).length;
 out.title=document.title;
 var pre=document.createElement("pre");pre.id="probe";pre.textContent=JSON.stringify(out);document.body.appendChild(pre);
});
</script></body>"""


def probed(text, folder, width, *options):
    """What a page answers to a keyboard, at a width."""
    assert BROWSER is not None
    file = folder / "page.html"
    file.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    line = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", "--virtual-time-budget=2000", *options, "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (1100, ()),
        pytest.param(500, (), marks=pytest.mark.slow),
        pytest.param(1100, ("--blink-settings=preferredColorScheme=0",), marks=pytest.mark.slow),
    ],
    ids=["desktop", "phone", "dark"],
)
def test_a_page_in_a_browser(text, tmp_path, width, options):
    found = probed(text, tmp_path, width, *options)
    assert found["down"] and found["end"] and found["stays"] and found["opened"]
    assert found["first"] == "B = 512" and found["spoken"].startswith("B = 512: ") and found["marked"] == 1
    assert found["home"] and found["right"] and found["order"] == 0
    assert found["wide"] <= 0, "nothing sticks out sideways"
    assert found["title"] == "Plan for step", "what a path says was not run"
    assert found["dark"] == bool(options) and found["ground"] == ("rgb(20, 23, 29)" if options else "rgb(251, 251, 252)")


# --- files, notebooks, the command line ------------------------------------------------------------------------------


def test_an_old_page_survives_where_the_new_one_cannot_be_written(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        plan.save_html(path, sweep=None)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["plan.html"]


def test_notebooks_show_tables_of_text_that_stays_text(plan):
    ranking = jaxplan.best_mesh(step, *ARGS, devices=4, machine="v4")
    swept = jaxplan.sweep(step, *ARGS, devices=4, machine="v4")
    reasons = (plan.explain("x"), plan.why_not({"x": P()}), plan.regimes("B", 2048, 8192))
    for shown in (plan, ranking, swept, *reasons):
        drawn = shown._repr_html_()
        Reader(drawn)
        assert "<script" not in drawn and "http" not in drawn
    assert html.escape(EVIL) in plan._repr_html_() and "<table>" in plan._repr_html_()
    assert swept._repr_html_().count("<tr>") == 1 + len(swept.points)
    assert ranking._repr_html_().count("<tr>") == 1 + len(ranking.candidates)
    assert swept.points[0].candidate.mesh_text in swept._repr_html_() and "the fastest mesh that fits" in swept._repr_html_()
    audited = jaxplan.audit(jax.jit(lambda x: x + 1.0), f32(8))
    assert audited._repr_html_() == f"<pre>{html.escape(str(audited))}</pre>"


def test_pages_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "pagemodel.py").write_text("def step(x, y):\n    return (x @ y).sum()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = ["--spec", "f32[64,32],f32[32,8]"]
    line = ["plan", "pagemodel:step", "--mesh", "x=4", "--machine", "v4", *spec, "-o", "plan.json", "--html", "a.html"]
    assert cli.main(line) == 0
    assert cli.main(["show", "plan.json", "--html", "b.html"]) == 0
    assert cli.main(["show", "plan.json", "pagemodel:step", *spec, "--html", "c.html"]) == 0
    said = capsys.readouterr()
    assert said.err.count("wrote") == 4 and said.out.count("Plan for step") == 3
    a, b, c = ((tmp_path / f"{name}.html").read_text() for name in "abc")
    assert a == c and "Made from the file alone" in b and "Made from the file alone" not in a
    assert cli.main(["show", "plan.json", "pagemodel:step"]) == 2
    assert "a function is of use to `show` with --html only" in capsys.readouterr().err
    assert cli.main(["show", "plan.json", "--html", "nowhere/b.html"]) == 2
    assert "nowhere/b.html cannot be written: No such file or directory; nothing was changed" in capsys.readouterr().err

"""The page of a record: whole HTML, nothing from elsewhere, legible at every width."""

import html.parser
import json
import re
import shutil
import subprocess

import bench_records
import pytest

from sdfast.bench import page, plots

VOID = {"meta", "img", "br", "hr", "link"}


def full_record():
    # The name has what must be escaped.
    rows = [
        bench_records.operation(), bench_records.operation("conv2d <b>&amp;", ours=(4e-3,) * 5),
        bench_records.model(), bench_records.pictures(),
    ]  # fmt: skip
    return {
        **bench_records.record(*rows, load_average=5.0),
        "breakdown": [bench_records.breakdown()],
        "quick": True,
    }


class Checker(html.parser.HTMLParser):
    """Fails where elements are not closed in order; keeps what there is."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def parsed(result):
    checker = Checker()
    checker.feed(page.html(result))
    checker.close()
    assert not checker.open
    return checker


def test_the_page_is_whole_and_asks_for_nothing():
    checker = parsed(full_record())
    tags = {tag for tag, _ in checker.seen}
    assert not tags & {"script", "link", "iframe", "b"}
    for tag, attributes in checker.seen:
        assert not [key for key in attributes if key.startswith("on")]
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,") and attributes["alt"]
        if tag == "svg" and "aria-hidden" not in attributes:
            assert attributes["aria-label"]
    assert not re.search(r"url\(|@import|https?://", page.html(full_record()))


def test_the_page_has_every_part():
    checker = parsed(full_record())
    text = " ".join(" ".join(checker.text).split())
    for heading in (
        "Speed",
        "Roofline",
        "Where a step's time goes",
        "Error and speed",
        "Images",
        "Every number",
        "Machine",
    ):
        assert heading in text
    assert "conv2d <b>&amp;" in text
    assert "ONNX Runtime in models, float32: not installed; pip install x" in text
    assert "A quick run" in text and "The machine was busy" in text
    assert "0.50x" in text  # slower is told like faster
    assert [a for tag, a in checker.seen if tag == "rect" and a.get("class") == "loss"]


def test_a_record_without_rows_is_a_page_too():
    text = " ".join(parsed(bench_records.record()).text)
    assert "Machine" in text and "Roofline" not in text


def test_styles_for_dark_phones_and_paper():
    style = page.html(bench_records.record())
    for query in ("prefers-color-scheme: dark", "@media print", "@media (max-width"):
        assert query in style


def test_marks_lie_where_their_values_are():
    axis = plots.LogAxis(1, 100, 0, 200)
    assert [axis(value) for value in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert axis(1e9) == 200  # what is beyond stays within
    assert axis.ticks() == pytest.approx([1, 10, 100])
    assert plots.LogAxis(0.9, 6, 0, 1).ticks() == pytest.approx([1, 2, 5])


def test_a_line_is_cut_where_the_marks_end():
    """y = 4 x up to x = 10, then 40."""
    corners = [(1e-3, 4e-3), (10, 40), (1e6, 40)]
    cut = plots._cut(corners, 1, 100)
    assert [x for x, _ in cut] == pytest.approx([1, 10, 10, 100])
    assert [y for _, y in cut] == pytest.approx([4, 40, 40, 40])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!doctype html><body><script>
const page = PAGE, found = {errors: []};
const widths = [360, 768, 1200];
widths.forEach(width => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:800px;border:0`;
  frame.srcdoc = page;
  frame.onload = () => {
    frame.contentWindow.onerror = message => found.errors.push(message);
    const root = frame.contentDocument.documentElement;
    const broken = [...frame.contentDocument.images].filter(image => !image.naturalWidth).length;
    const drawn = [...frame.contentDocument.querySelectorAll("figure svg")].filter(svg => svg.getClientRects().length);
    found[width] = {needs: root.scrollWidth, broken, drawn: drawn.length, smallest: Math.min(
      ...drawn.map(svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))};
    if (widths.every(width => found[width])) document.body.textContent = "@" + JSON.stringify(found) + "@";
  };
  document.body.append(frame);
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_chromium_renders_it_at_three_widths(tmp_path):
    """No error, nothing wider than the window, every picture loaded, no text of a plot below nine pixels."""
    inner = json.dumps(page.html(full_record())).replace("</", "<\\/")
    (tmp_path / "measure.html").write_text(MEASURE.replace("PAGE", inner))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,900",
            "--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            (tmp_path / "measure.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search("@(.*)@", done.stdout)[1])
    assert found.pop("errors") == []
    for width, seen in found.items():
        assert seen["needs"] <= int(width), (width, seen)
        assert seen["broken"] == 0 and seen["drawn"] == 2 and seen["smallest"] >= 9, (width, seen)

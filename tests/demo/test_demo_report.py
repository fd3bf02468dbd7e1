"""The report: everything in it, nothing beside it, charts and bars that say what the numbers say."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import torch
from PIL import Image

from gpt4fast.data import write_wav
from gpt4fast.demo import charts, media, report
from gpt4fast.demo.run import fact, figure


def _speed(what, ratio, low, high):
    return {"what": what, "detail": "batch 2", "unit": "images/s", "plain": 100.0, "fast": 100.0 * ratio,
            "ratio": ratio, "low": low, "high": high, "turns": 9,
            "implementation": "conv_transpose: native"}  # fmt: skip


@pytest.fixture
def content(tmp_path):
    """What state.json holds after a run, with made-up figures."""
    Image.new("L", (8, 8)).save(tmp_path / "p.png")
    Image.new("L", (8, 8)).save(tmp_path / "v.gif")
    write_wav(tmp_path / "s.wav", torch.sin(torch.arange(2048) * 0.3))
    picture, film = figure("p.png", "Grid", "A grid."), figure("v.gif", "Video", "A walk.")
    clips = [{"path": "s.wav", "label": "kick <1>"}]

    def curve(name):
        return {"name": name, "label": "Losses", "caption": "c", "x_label": "training step", "y_label": "loss, nats",
                "series": {"generator": [[1, 2, 3], [3.0, 2.0, 1.0]]}}  # fmt: skip

    example = [{"text": "a ", "kind": ""}, {"text": "b", "kind": "ins"}]
    text = {"facts": [fact("Perplexity", "9.1")], "examples": [example],
            "examples_title": "Gaps", "examples_note": "n"}  # fmt: skip
    splits = {"train": "8", "validation": "1", "test": "1"}
    results = {
        "data": {
            "table": [{"name": "Digits", "shape": "8×8", "source": "s", "licence": "l", "splits": splits}],
            "grid": picture, "clips": clips, "excerpt": "ROMEO:\nA & B <script>", "nyquist": "8,000",
        },
        "networks": {
            "table": [{"name": "G", "role": "r", "takes": "t", "gives": "g", "parameters": 1234567}],
            "grid": picture, "explained": "layers.0  one call", "explained_note": "n",
            "speed": [_speed("inference", 2.0, 1.9, 2.1)],
        },
        "adversarial": {
            "images": {"facts": [fact("Recognised", "91", "%")], "grid": picture, "curves": [curve("images")]},
            "audio": {"facts": [fact("Distance", "0.3")], "clips": clips, "curves": [curve("audio")]},
            "speed": [_speed("training", 0.8, 0.7, 0.9)],
        },
        "encoder": {**text, "curves": [curve("encoder")], "speed": [_speed("prefill", 1.01, 0.9, 1.1)]},
        "decoder": {**text, "curves": [curve("decoder")]},
        "generation": {
            "texts": [{"prompt": "To be", "text": " or not <b>", "caption": "t"}], "grid": picture, "film": film,
            "clips": clips, "clips_note": "n", "facts": [fact("Words", "97", "%")], "speed": [],
        },
    }  # fmt: skip
    return {
        "steps": {name: {"result": result, "seconds": 30.0 + i} for i, (name, result) in enumerate(results.items())},
        "tiles": [fact("From nothing to this page", "3 min 15 s")],
        "commands": "gpt4fast generate text x",
        "environment": {"threads": 2, "gpu": "none of these numbers", "rows": {"Versions": "torch 2.13"}},
    }


def test_report_has_every_section_and_needs_nothing_else(tmp_path, content, read_page):
    path = report.write_report(tmp_path, content)
    html = path.read_text(encoding="utf-8")
    page = read_page(html)
    assert {*(f"step-{n}" for n in range(1, 7)), "speed", "run"} <= set(page.ids)
    text = " ".join(page.text)
    for title in (section[1] for section in report.SECTIONS.values()):
        assert title in text
    for words in (
        "3 min 15 s",
        "1,234,567",
        "none of these numbers",
        "torch 2.13",
        "A & B <script>",
        "or not <b>",
        "kick <1>",
    ):
        assert words in text, words
    assert page.tags.count("audio") == 4 and page.tags.count("script") == 1
    assert "not affiliated with OpenAI" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.01, 1.2, "win"), (0.9, 0.99, "loss"), (0.99, 1.5, "even"), (0.5, 1.01, "even")]
)
def test_verdict_is_even_only_where_the_range_includes_one(low, high, expected):
    assert report.verdict(_speed("x", 1.0, low, high)) == expected


def test_the_same_kernels_on_both_sides_are_no_win():
    row = {**_speed("x", 1.5, 1.4, 1.6), "same": True}
    assert report.verdict(row) == "even"
    assert report._speed_row(row)["implementation"].endswith("the same kernels on both sides")


def test_losses_are_shown_as_losses(tmp_path, content):
    html = report.write_report(tmp_path, content).read_text(encoding="utf-8")
    assert "2.00× faster" in html
    assert "0.80×, slower" in html
    assert "1.01× about even" in html
    assert "1 faster, 1 slower, 1 even" in html


@pytest.mark.parametrize(
    ("ratio", "left", "width"), [(2.0, 50, 25), (0.5, 25, 25), (4.0, 50, 50), (64.0, 50, 50), (0.25, 0, 50)]
)
def test_bar_is_logarithmic_around_one(ratio, left, width):
    row = report._speed_row(_speed("x", ratio, ratio, ratio))
    assert (row["bar_left"], row["bar_width"]) == (left, width)


def test_missing_result_is_an_error_not_a_gap(tmp_path, content):
    del content["steps"]["generation"]["result"]["film"]
    with pytest.raises(KeyError, match="film"):
        report.write_report(tmp_path, content)
    assert not (tmp_path / "report.html").exists()


def test_chart_follows_the_page_colours_and_names_its_axes():
    series = {"generator": ([1, 2, 3], [3.0, 2.0, 1.0]), "discriminator": ([1, 2, 3], [1.0, 1.0, 1.0])}
    svg = charts.line_chart("x", series, x_label="training step", y_label="loss", reference=(1.386, "neither wins"))
    root = ElementTree.fromstring(svg)
    texts = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]
    assert {"training step", "loss", "generator", "discriminator", "neither wins"} <= set(texts)
    assert "var(--series-1)" in svg and "var(--series-2)" in svg
    # white and black would be invisible on one of the two backgrounds
    assert not re.search(r"(?:stroke|fill): (?:#|white|black)", svg), re.findall(r"(?:stroke|fill): [^;\"]*", svg)


def test_first_wild_steps_do_not_flatten_a_chart():
    calm = [1.0 + 0.1 * (i % 3) for i in range(400)]

    def ticks(y):
        svg = charts.line_chart("x", {"loss": (list(range(400)), y)}, x_label="step", y_label="loss")
        return [float(t) for t in re.findall(r">(\d+\.\d+)</text>", svg)], "spikes" in svg

    assert ticks([50.0, *calm[1:]]) == (ticks(calm)[0], True)
    assert ticks(calm)[1] is False


def test_waveform_outline_bounds_the_signal():
    wave = torch.zeros(960)
    wave[480:490] = 0.5
    wave[490:500] = -0.25
    points = [p.split() for p in media.waveform_path(wave)[1:-1].split("L")]
    top = {int(x): float(y) for x, y in points[:96]}
    bottom = {int(x): float(y) for x, y in points[96:]}
    assert top[48] == pytest.approx(1 - 0.96 - 0.02, abs=1e-3)
    assert bottom[49] == pytest.approx(1 + 0.48 + 0.02, abs=1e-3)
    assert top[0] == pytest.approx(0.98) and bottom[0] == pytest.approx(1.02)


def test_spectrogram_shows_a_tone_at_its_pitch():
    tone = torch.sin(torch.arange(8192) * (torch.pi / 4))  # an eighth of the sample rate: a quarter of the way up
    picture = Image.open(io.BytesIO(media.spectrogram_png(tone))).convert("L")
    column = [picture.getpixel((96, y)) for y in range(picture.height)]
    brightest = column.index(max(column))
    assert abs(1 - brightest / picture.height - 0.25) < 0.03

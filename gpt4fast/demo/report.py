"""The demo's report: one self-contained HTML page from the folder's `state.json` and its media files."""

from __future__ import annotations

import math
import os
from pathlib import Path

from gpt4fast.demo import charts, media

# (short name, title, what the reader sees)
SECTIONS = {
    "data": (
        "Data",
        "Real data, split before anything is trained",
        "Small data that the package carries, so nothing is downloaded. A fixed seed deals every item to one of three "
        "splits, and of the plays the last scenes are held out. Models learn from the training split only.",
    ),
    "networks": (
        "Networks",
        "A generator and a discriminator for each medium",
        "The generator turns a random vector into a picture or a sound through transposed convolutions; the "
        "discriminator tells real from generated. Before training the generator knows nothing, as its output shows.",
    ),
    "adversarial": (
        "Adversarial training",
        "The two networks play against each other",
        "Each step shows the discriminator real and generated samples, then moves the generator towards what the "
        "discriminator believes. Losses of a GAN do not fall to zero: they settle where neither side wins.",
    ),
    "encoder": (
        "Encoder",
        "An encoder learns to read",
        "A BERT-style Transformer encoder is pre-trained on Shakespeare with three objectives: guess masked tokens, "
        "guess the next token, and fill in missing spans.",
    ),
    "decoder": (
        "Decoder",
        "A decoder is added, and the two are fine-tuned",
        "The pre-trained encoder keeps its weights; a decoder with cross attention learns to write what follows, first "
        "from the plays themselves, then also against a discriminator that compares its continuations with real ones.",
    ),
    "generation": (
        "Generation",
        "What the trained models make",
        "Everything below was generated at the end of this run. Nothing was picked by hand: these are the first "
        "samples of a fixed seed.",
    ),
}


def write_report(folder: Path, content: dict) -> Path:
    """Writes `report.html` under `folder` from what `state.json` holds once all six steps are finished."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(template).render(**_context(Path(folder), content))
    path = Path(folder) / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    return path


def speed_rows(content: dict) -> list[dict]:
    """Every timed pair of a run, in the order of the steps, each with the number of its step."""
    rows = []
    for number, name in enumerate(SECTIONS, 1):
        rows += [{"step": number, **row} for row in content["steps"][name]["result"].get("speed", [])]
    return rows


def verdict(row: dict) -> str:
    """ "win" or "loss" where four of five pairs agree, else "even"; "even" also if both ran the same kernels."""
    if row.get("same"):
        return "even"
    if row["low"] > 1:
        return "win"
    return "loss" if row["high"] < 1 else "even"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def threads(count: int) -> str:
    return "1 CPU thread" if count == 1 else f"{count} CPU threads"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _speed_row(row: dict) -> dict:
    # the bar starts at 1× in the middle and ends, on a log scale, at a factor of 4 on either side
    length = max(-50.0, min(50.0, 50 * math.log(row["ratio"]) / math.log(4)))
    word = {"win": "faster", "loss": "slower", "even": "about even"}[verdict(row)]
    return {
        **row,
        "plain": rate(row["plain"]),
        "fast": rate(row["fast"]),
        "ratio": f"{row['ratio']:.2f}× {word}" if word != "slower" else f"{row['ratio']:.2f}×, slower",
        "spread": f"({row['low']:.2f} to {row['high']:.2f}, {row['turns']} turns)",
        "verdict": verdict(row),
        "implementation": row["implementation"] + (", the same kernels on both sides" if row.get("same") else ""),
        "bar_left": round(50 + min(0.0, length), 1),
        "bar_width": round(max(abs(length), 0.8), 1),
    }


def _figure(folder: Path, item: dict) -> dict:
    from PIL import Image

    path = folder / item["path"]
    with Image.open(path) as picture:
        width, height = picture.size
    return {**item, "source": media.data_uri(path), "width": width, "height": height}


def _clips(folder: Path, items: list[dict]) -> list[dict]:
    return [media.clip(folder / item["path"], item["label"]) for item in items]


def _charts(items: list[dict]) -> list[dict]:
    drawn = []
    for item in items:
        series = {label: (xy[0], xy[1]) for label, xy in item["series"].items()}
        svg = charts.line_chart(
            item["name"], series, x_label=item["x_label"], y_label=item["y_label"], reference=item.get("reference")
        )
        drawn.append({"svg": svg, "label": item["label"], "caption": item["caption"]})
    return drawn


def _context(folder: Path, content: dict) -> dict:
    results = {name: content["steps"][name]["result"] for name in SECTIONS}
    seconds = {name: content["steps"][name]["seconds"] for name in SECTIONS}
    total, longest = sum(seconds.values()), max(seconds.values())
    sections = [
        {
            "number": number,
            "short": short,
            "title": title,
            "intro": intro,
            "seconds": seconds[name],
            "took": duration(seconds[name]),
            "share": round(100 * seconds[name] / longest, 1),
        }
        for number, (name, (short, title, intro)) in enumerate(SECTIONS.items(), 1)
    ]
    rows = speed_rows(content)
    wins, losses = (sum(verdict(row) == kind for row in rows) for kind in ("win", "loss"))
    environment = content["environment"]
    data, networks, generation = results["data"], results["networks"], results["generation"]
    page = {
        "headline": "Pictures, drums and plays, learned from scratch on this machine",
        "lede": f"Six steps, from real data to generated text, images, audio and video, in {duration(total)} on "
        f"{threads(environment['threads'])}. Every number and every sample on this page comes from this one run.",
        "tiles": content["tiles"],
        "sections": sections,
        "total": total,
        "commands": content["commands"],
        "environment": list(environment["rows"].items()),
    }
    return {
        "page": page,
        "data": {**data, "grid": _figure(folder, data["grid"]), "clips": _clips(folder, data["clips"])},
        "networks": {**networks, "grid": _figure(folder, networks["grid"])},
        "adversarial": {
            "images": {
                "facts": results["adversarial"]["images"]["facts"],
                "real": _figure(folder, data["grid"]),
                "generated": _figure(folder, results["adversarial"]["images"]["grid"]),
                "charts": _charts(results["adversarial"]["images"]["curves"]),
            },
            "audio": {
                "facts": results["adversarial"]["audio"]["facts"],
                "real": _clips(folder, data["clips"]),
                "generated": _clips(folder, results["adversarial"]["audio"]["clips"]),
                "charts": _charts(results["adversarial"]["audio"]["curves"]),
            },
        },
        "text": {
            name: {**results[name], "charts": _charts(results[name]["curves"])} for name in ("encoder", "decoder")
        },
        "generation": {
            **generation,
            "grid": _figure(folder, generation["grid"]),
            "film": _figure(folder, generation["film"]),
            "clips": _clips(folder, generation["clips"]),
        },
        "speed": {
            "rows": [_speed_row(row) for row in rows],
            "took": f"{wins} faster, {losses} slower, {len(rows) - wins - losses} even",
            "intro": "The same weights and the same inputs, run by plain PyTorch and by gpt4fast. The results are "
            "compared before anything is timed. The two take turns, and each figure is a median; more is better.",
            "note": "The bar starts at 1×, no difference, and ends at a factor of 4 to either side. In brackets: the "
            "ratio at the 20th and 80th percentile of turns; a row whose range includes 1× counts as even. Losses are "
            f"shown as they are. GPU: {environment['gpu']}.",
        },
    }

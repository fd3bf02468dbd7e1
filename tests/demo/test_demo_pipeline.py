"""The demo as a whole: all six steps at a tiny scale, stopping in the middle, and going on."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager

import pytest

pytest.importorskip("rich")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

import torch
from rich.console import Console

from gpt4fast.demo import pipeline, report


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=120)


def _run(folder, screen, **changes):
    return pipeline.run_demo(folder, **{"minutes": 0.06, "threads": 1, "seed": 0, "console": screen, **changes})


def _stand_ins(monkeypatch, calls, interrupt_at=None):
    """Steps that only note that they ran; the one named `interrupt_at` is stopped by Ctrl-C."""

    def step(name):
        def run(context):
            calls.append(name)
            context.track(name)(1, 2, {"loss": 1.0})
            if name == interrupt_at:
                raise KeyboardInterrupt
            return {"step": name}

        return run

    monkeypatch.setattr(pipeline, "STEPS", {name: step(name) for name in report.SECTIONS})
    monkeypatch.setattr(pipeline, "_summary", lambda *args: {"tiles": []})
    monkeypatch.setattr(pipeline.report, "write_report", lambda folder, content: folder / "report.html")
    monkeypatch.setattr(pipeline, "_print_summary", lambda *args: None)


def test_interrupted_run_goes_on_where_it_was(tmp_path, screen, monkeypatch):
    calls = []
    _stand_ins(monkeypatch, calls, interrupt_at="encoder")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, screen)
    assert calls == ["data", "networks", "adversarial", "encoder"]
    state = json.loads((tmp_path / "state.json").read_text())
    assert list(state["steps"]) == ["data", "networks", "adversarial"]
    assert state["interrupted"]["encoder"] > 0

    calls.clear()
    _stand_ins(monkeypatch, calls)
    assert _run(tmp_path, screen) == tmp_path / "report.html"
    assert calls == ["encoder", "decoder", "generation"]  # finished steps are skipped
    state = json.loads((tmp_path / "state.json").read_text())
    assert {name: entry["result"] for name, entry in state["steps"].items()} == {
        n: {"step": n} for n in report.SECTIONS
    }
    assert state["interrupted"] == {}
    assert "finished before" in screen.file.getvalue()

    calls.clear()
    _run(tmp_path, screen)
    assert calls == []


def test_threads_are_as_before_whatever_happens(tmp_path, screen, monkeypatch):
    before = torch.get_num_threads()
    _stand_ins(monkeypatch, [], interrupt_at="data")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, screen, threads=before + 1)
    assert torch.get_num_threads() == before


def test_other_settings_are_refused(tmp_path, screen, monkeypatch):
    _stand_ins(monkeypatch, [])
    _run(tmp_path, screen)
    with pytest.raises(ValueError, match="made with minutes=0.06"):
        _run(tmp_path, screen, minutes=6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run at a hundredth of its length, stopped in the middle of adversarial training and started again."""
    folder = tmp_path_factory.mktemp("demo")
    screen = Console(file=io.StringIO(), width=120)
    patch = pytest.MonkeyPatch()
    bars = pipeline.bars

    @contextmanager
    def interrupting(console):
        with bars(console) as track:

            def tracked(description):
                callback = track(description)

                def interrupt_drums(step, steps, metrics):
                    callback(step, steps, metrics)
                    if description == "drums" and step == 2:
                        raise KeyboardInterrupt

                return interrupt_drums

            yield tracked

    torch.set_num_threads(1)
    patch.setattr(pipeline, "bars", interrupting)
    with pytest.raises(KeyboardInterrupt):
        _run(folder, screen)
    patch.undo()
    stopped = json.loads((folder / "state.json").read_text())
    path = _run(folder, screen)
    return folder, path, stopped, screen.file.getvalue()


def test_whole_run_stops_and_goes_on(finished):
    folder, path, stopped, printed = finished
    assert list(stopped["steps"]) == ["data", "networks"]
    state = json.loads((folder / "state.json").read_text())
    assert list(state["steps"]) == list(report.SECTIONS)
    # what was finished before Ctrl-C is not done again
    assert state["steps"]["data"] == stopped["steps"]["data"]
    assert state["steps"]["adversarial"]["seconds"] > stopped["interrupted"]["adversarial"]
    assert "Report:" in printed and "Fused against plain" in printed


def test_whole_run_makes_every_medium(finished, read_page):
    folder, path, _, _ = finished
    html = path.read_text(encoding="utf-8")
    page = read_page(html)
    assert {f"step-{number}" for number in range(1, 7)} <= set(page.ids)
    assert page.tags.count("audio") >= 3 * 8
    assert "image/gif" in html and html.count('class="chart"') >= 6
    assert html.count("<blockquote>") >= 5
    rows = report.speed_rows(json.loads((folder / "state.json").read_text()))
    assert {row["step"] for row in rows} >= {2, 3, 4, 5, 6}
    assert all(row["plain"] > 0 and row["fast"] > 0 for row in rows)


def test_what_was_trained_generates_from_the_command_line(finished, tmp_path):
    from typer.testing import CliRunner

    from gpt4fast.cli import app

    folder = finished[0]
    for arguments in (
        ["text", str(folder), "--prompt", "ROMEO.", "--max-new-tokens", "3"],
        ["image", str(folder), "--count", "2", "--output", str(tmp_path / "i.png")],
        ["audio", str(folder), "--count", "1", "--output", str(tmp_path / "a")],
    ):
        result = CliRunner().invoke(app, ["generate", *arguments])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "i.png").is_file() and (tmp_path / "a" / "000.wav").is_file()

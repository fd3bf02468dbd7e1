"""The benchmark harness with a fake clock, and what the report makes of its results."""

from __future__ import annotations

import io
import json
import math
from functools import partial

import pytest
import torch

from gpt4fast import bench
from gpt4fast.benchmarks import candidates, generator_cells, generators, harness, report, shapes
from gpt4fast.benchmarks.ceilings import Ceilings
from gpt4fast.benchmarks.generator_cells import GeneratorCell
from gpt4fast.benchmarks.harness import Candidate, Timing

ONES = torch.ones(3)


class FakeTimer:
    """Time stands still but for the seconds that a candidate's call is said to take."""

    def __init__(self):
        self.now = 0.0
        self.turns = []

    def slot(self, run, repeats):
        before = self.now
        for _ in range(repeats):
            run()
        self.turns.append((run.__self__.name, repeats))
        return (self.now - before) / repeats

    def candidate(self, name, *seconds, value=ONES, variant=""):
        """A candidate whose calls take the given seconds in turn, the last for good."""
        call = FakeCall(self, name, seconds, value)
        return Candidate(name, call.run, variant)


class FakeCall:
    def __init__(self, timer, name, seconds, value):
        self.timer, self.name, self.seconds, self.value = timer, name, list(seconds), value
        self.calls = 0

    def run(self):
        self.calls += 1
        self.timer.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return self.value


class FakeMonitor:
    """Says of each slot in turn whether it was disturbed; quiet at the end."""

    def __init__(self, *disturbed):
        self.answers = list(disturbed)

    def start(self):
        pass

    def disturbed(self, seconds):
        return self.answers.pop(0) if self.answers else False


def measure(timer, *which, monitor=None, **settings):
    return harness.measure(
        which, ONES.double(), harness.Tolerance(1e-6), timer=timer, monitor=monitor or FakeMonitor(), **settings
    )


def test_candidates_take_turns_in_rotating_order():
    timer = FakeTimer()
    measure(timer, *(timer.candidate(name, 1.0) for name in "abc"), rounds=4, slot=1.0, seconds=100)
    turns = [name for name, _ in timer.turns[3:]]  # after one slot each to find the number of repeats
    assert "".join(turns) == "abcbcacababc"


def test_a_slot_is_filled_by_repeating():
    timer = FakeTimer()
    quick, slow = measure(timer, timer.candidate("quick", 0.001), timer.candidate("slow", 0.5), rounds=3, slot=0.02)
    assert 20 <= quick.repeats <= 21 and slow.repeats == 1
    assert quick.samples == pytest.approx([0.001] * 3) and slow.samples == [0.5] * 3


def test_median_and_fifths():
    timer = FakeTimer()
    # the check and the calibration take the first two calls
    seconds = (9, 9, 8, 1, 4, 2, 3)
    (timing,) = measure(timer, timer.candidate("a", *seconds), rounds=5, slot=1.0, seconds=100)
    assert timing.samples == [8, 1, 4, 2, 3]
    assert timing.median == 3
    assert timing.fifths() == pytest.approx((1.8, 4.8))


@pytest.mark.parametrize("value", [ONES * 1.01, ONES * math.nan, torch.ones(4), (ONES, ONES)])
def test_wrong_values_are_never_timed(value):
    timer = FakeTimer()
    bad = timer.candidate("bad", 1.0, value=value)
    wrong, right = measure(timer, bad, timer.candidate("good", 1.0), rounds=3, slot=1.0)
    assert (wrong.status, wrong.samples) == ("wrong", [])
    assert bad.run.__self__.calls == 1  # the check
    assert right.status == "ok" and len(right.samples) == 3
    assert "bad" not in [name for name, _ in timer.turns]


def test_relative_error_by_norm():
    reference = torch.zeros(100, dtype=torch.float64)
    reference[0] = 2
    one_wrong = reference.clone()
    one_wrong[5] = 1
    assert harness.relative_error(one_wrong, reference) == 0.5
    spread = reference + 0.1
    assert harness.relative_error(spread, reference, "rms") == pytest.approx(1 / 2)
    assert harness.relative_error(spread, reference, "max") == pytest.approx(0.1 / 2)
    assert harness.relative_error((reference, one_wrong), (reference, reference)) == 0.5  # the worst output counts


def test_a_refusal_is_reported_not_timed():
    def refuse():
        raise harness.Unavailable("no grouped heads\nsecond line")

    (timing,) = measure(FakeTimer(), Candidate("peer", refuse))
    assert timing.status == "failed: no grouped heads" and timing.samples == []


def test_disturbed_slots_are_measured_again_and_counted():
    timer = FakeTimer()
    monitor = FakeMonitor(True, True, False, *(True,) * 4)  # the first turn recovers, the second never does
    (timing,) = measure(timer, timer.candidate("a", 1.0), monitor=monitor, rounds=3, slot=1.0, seconds=100, retries=3)
    assert (timing.remeasured, timing.noisy, len(timing.samples)) == (2 + 3, 1, 3)


def test_rounds_end_with_the_time_but_not_before_three():
    timer = FakeTimer()
    (timing,) = measure(timer, timer.candidate("a", 10.0), rounds=50, slot=1.0, seconds=1.0)
    assert len(timing.samples) == 3


def test_the_fastest_layout_counts():
    timings = [
        Timing(Candidate("torch", None, "channels first"), "ok", 0.0, [2.0]),
        Timing(Candidate("torch", None, "channels last"), "ok", 0.0, [1.0]),
        Timing(Candidate("gpt4fast", None, "channels first"), "wrong", 1.0),
        Timing(Candidate("gpt4fast", None, "channels last"), "ok", 0.0, [3.0]),
    ]
    best = harness.fastest_variants(timings)
    assert {name: t.candidate.variant for name, t in best.items()} == {
        "torch": "channels last",
        "gpt4fast": "channels last",
    }


def test_monitor_sees_this_process_as_quiet_and_needs_no_proc(monkeypatch):
    monitor = harness.Monitor()
    others, waited = iter([1.0, 1.5]), iter([0.0, 0.0])
    monkeypatch.setattr(monitor, "_others_seconds", lambda: next(others))
    monkeypatch.setattr(monitor, "_wait_seconds", lambda: next(waited))
    monitor.start()
    assert monitor.disturbed(1.0)  # half a second of another process
    others, waited = iter([1.0, 1.001]), iter([0.0, 0.001])
    monitor.start()
    assert not monitor.disturbed(1.0)
    others, waited = iter([1.0, 1.0]), iter([0.0, 0.5])
    monitor.start()
    assert monitor.disturbed(1.0)  # our own threads waited for a core


def test_cuda_timer_empties_the_cache_before_each_call(monkeypatch):
    """With stand-ins for CUDA: the order of events and the mean."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = len(log)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    class Flush:
        def zero_(self):
            log.append("flush")

    class Properties:
        L2_cache_size = 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch, "empty", lambda size, **settings: Flush() if size == 2000 else None)
    seconds = harness.CudaTimer(graphs=False).slot(lambda: log.append("run"), 2)
    assert log == ["flush", "record", "run", "record"] * 2 + ["synchronize"]
    assert seconds == 2.0


def test_pinned_threads():
    before = torch.get_num_threads()
    with harness.pinned_threads(1) as threads:
        assert threads == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1"), harness.pinned_threads(0):
        pass


def test_floor_and_bound():
    ceilings = Ceilings({torch.float32: 100.0}, 1000, 50.0, 10.0)
    assert ceilings.floor(1000, 100, torch.float32) == 10.0
    assert ceilings.bound(1000, 100, torch.float32) == "compute"
    assert (ceilings.floor(0, 1000, torch.float32), ceilings.bound(0, 1000, torch.float32)) == (20.0, "cache")
    assert (ceilings.floor(0, 2000, torch.float32), ceilings.bound(0, 2000, torch.float32)) == (200.0, "memory")


# Shapes


def test_work_of_attention():
    cell = shapes.AttentionCell(2, 4, 2, 8, 16, causal=True)
    visible = torch.ones(8, 8).tril().sum().item()
    assert cell.operations() == 2 * 2 * 2 * 4 * 16 * visible  # two products, multiply and add
    assert cell.bytes(torch.bfloat16) == 2 * (2 * 2 * 4 * 8 * 16 + 2 * 2 * 2 * 8 * 16)
    decode = shapes.AttentionCell(2, 4, 2, 8, 16, mode="decode")
    assert decode.operations() == 4 * 2 * 4 * 16 * 8


@pytest.mark.parametrize(
    "kernel, stride, padding, size", [(4, 2, 1, 1), (4, 2, 1, 5), (4, 1, 0, 1), (16, 8, 4, 3), (3, 5, 1, 4)]
)
def test_work_of_a_transposed_convolution_is_counted_exactly(kernel, stride, padding, size):
    layer = shapes.Layer(1, 1, kernel, stride, padding)
    landed = [
        (i, t) for i in range(size) for t in range(kernel) if 0 <= i * stride + t - padding < layer.output_size(size)
    ]
    assert layer.pairs(size) == len(landed)
    assert layer.taps(size) == len({t for _, t in landed})


def small(cell):
    """The cell, small enough to run in a moment."""
    if isinstance(cell, shapes.AttentionCell):
        group = cell.heads // cell.kv_heads
        return shapes.replace(cell, batch=1, heads=2 * group, kv_heads=2, length=20, head_dim=8, dtypes=(), quick=())
    ratio = 16 if cell.layers[0].groups == 1 else 1
    layers = tuple(
        shapes.replace(a, in_channels=max(3, a.in_channels // ratio), out_channels=max(3, a.out_channels // ratio))
        for a in cell.layers
    )
    size = tuple(min(n, 8) for n in cell.size)
    return shapes.replace(cell, name=cell.mode, batch=2, layers=layers, size=size, dtypes=(), quick=())


SMALL = list(dict.fromkeys(small(cell) for cells in shapes.CELLS.values() for cell in cells))


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_every_cell_has_right_candidates(cell):
    dtype = torch.float32
    with torch.inference_mode(not cell.backward):
        competitors, expected = candidates.build(cell, dtype, impls=("reference",))
        results = [harness.check(c, expected, cell.tolerance(dtype)) for c in competitors]
    assert {"torch", "gpt4fast", "gpt4fast reference"} <= {c.name for c in competitors}
    assert [(r.candidate.name, r.status, r.error) for r in results if r.status != "ok"] == []
    assert all(c.implementation for c in competitors if c.name.startswith("gpt4fast"))


def test_names_are_unique_and_the_quick_subset_is_part_of_all():
    for op, cells in shapes.CELLS.items():
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names)
        quick, everything = shapes.select(op, True), shapes.select(op, False)
        assert quick and set(quick) <= set(everything) and len(quick) < len(everything)
    with pytest.raises(ValueError, match="op must be one of"):
        shapes.select("softmax", True)


def test_changing_lengths_never_repeat_between_candidates():
    cell = next(cell for cell in shapes.CONV_TRANSPOSE_CELLS if cell.mode == "lengths" and cell.dims == 1)
    with torch.inference_mode():
        competitors, _ = candidates.build(small(cell), torch.float32)
        lengths = [{c.run().shape[-1] for _ in range(30)} for c in competitors]
    assert [len(seen) for seen in lengths] == [30] * len(competitors)
    assert len(set.union(*lengths)) == 30 * len(competitors)


# Report

CELL = shapes.AttentionCell(1, 2, 2, 4, 8)
ORIGIN = {"device": "a CPU", "threads": 2, "torch": "2", "gpt4fast": "0", "commit": None, "date": "2026-01-01T00:00:00"}
CEILINGS = Ceilings({torch.float32: CELL.operations()}, 1 << 20, 1e12, 1e11)  # the floor is one second


def rows_of(*timings):
    return report.make_rows(CELL, torch.float32, timings, CEILINGS, ORIGIN)


def test_rows():
    torchs = Timing(Candidate("torch", None), "ok", 1e-7, [4.0, 4.0, 8.0])
    ours = Timing(Candidate("gpt4fast", None, implementation="native"), "ok", 1e-7, [2.0, 2.0, 2.0], noisy=1)
    wrong = Timing(Candidate("peer", None), "wrong", 0.5)
    base, own, peer = rows_of(torchs, ours, wrong)
    assert (base["ratio"], base["median_ms"], base["share"]) == (1.0, 4000.0, 0.25)
    assert (own["ratio"], own["median_ms"], own["share"], own["implementation"]) == (2.0, 2000.0, 0.5, "native")
    assert own["ratio_p20"] == 2.0 and own["ratio_p80"] == pytest.approx(3.2)
    assert (own["floor_ms"], own["bound"], own["noisy_slots"]) == (1000.0, "compute", 1)
    assert (peer["status"], peer["median_ms"], peer["ratio"], peer["share"]) == ("wrong", None, None, None)
    assert own.keys() == base.keys() == peer.keys() and own.keys() >= ORIGIN.keys()


def test_written_files(tmp_path):
    rows = rows_of(
        Timing(Candidate("torch", None), "ok", 1e-7, [4.0] * 3),
        Timing(Candidate("gpt4fast", None), "ok", 1e-7, [8.0] * 3),
        Timing(Candidate("a peer", None), "ok", 1e-7, [2.0] * 3),
    )
    report.write_json(tmp_path / "a.json", rows, CEILINGS)
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["rows"] == rows
    assert told["ceilings"]["memory_read_gb_s"] == 100.0

    matplotlib = pytest.importorskip("matplotlib")
    report.draw_chart(tmp_path / "a.png", rows, "title", "note")
    image = matplotlib.image.imread(tmp_path / "a.png")
    loss = matplotlib.colors.to_rgb(report.COLOURS["loss"])
    assert (abs(image[..., :3] - loss).max(-1) < 0.02).sum() > 500  # the bar of a cell where we lose has its colour


def test_table_and_summary_show_losses_and_wrong_values():
    console = pytest.importorskip("rich.console").Console(width=80, record=True, file=io.StringIO())
    lost = rows_of(
        Timing(Candidate("torch", None), "ok", 1e-7, [4.0] * 3),
        Timing(Candidate("gpt4fast", None, implementation="reference"), "ok", 1e-7, [8.0] * 3),
    )
    bad = rows_of(
        Timing(Candidate("torch", None), "ok", 1e-7, [4.0] * 3), Timing(Candidate("gpt4fast", None), "wrong", 1.0)
    )
    report.print_table(lost + bad, "title", console)
    text = console.export_text()
    assert "0.50" in text and "reference" in text and "wrong" in text
    assert report.summary(lost) == "gpt4fast against torch on 1 cells: 0 faster, 0 as fast, 1 slower."
    assert "1 cells have WRONG VALUES" in report.summary(bad)


# Generators

TINY = [
    GeneratorCell("DCGAN", partial(generators.DCGAN, 8, 4), (2, 8, 1, 1)),
    GeneratorCell("pix2pix", partial(generators.Pix2pix, 4, 6), (1, 3, 64, 64)),
    GeneratorCell("StyleGAN2", partial(generators.StyleGAN2, 8, 8, 8, 1), (2, 8)),
    GeneratorCell("HiFi-GAN", partial(generators.HiFiGAN, 8, 32), (1, 8, 4)),
    GeneratorCell(
        "step", partial(generators.DCGAN, 8, 4), (4, 8, 1, 1), True, partial(generators.DCGANDiscriminator, 4)
    ),
    GeneratorCell("training", partial(generators.WaveGAN, 8, 2), (2, 8), True),
]


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.name)
def test_every_generator_has_right_candidates(cell):
    with torch.set_grad_enabled(cell.backward):
        competitors, expected = cell.candidates(torch.float32)
    layouts = [""] if cell.name in ("HiFi-GAN", "training") else ["channels first", "channels last"]
    assert [(c.name, c.variant) for c in competitors] == [(n, v) for n in ("torch", "gpt4fast") for v in layouts]
    with torch.inference_mode(not cell.backward):
        results = [harness.check(c, expected, cell.tolerance(torch.float32)) for c in competitors]
    assert [(r.candidate.name, r.status, r.error) for r in results if r.status != "ok"] == []
    assert all(c.implementation for c in competitors if c.name == "gpt4fast")
    assert cell.operations() > 0 and cell.bytes(torch.bfloat16) > 0


def test_work_of_a_generator():
    cell = GeneratorCell("one layer", lambda: torch.nn.ConvTranspose2d(3, 5, 2, 2), (2, 3, 4, 4))
    assert cell.operations() == 2 * 2 * 3 * 5 * 4 * 4 * 4  # every tap lands in the output
    assert cell.bytes(torch.float32) == 4 * (3 * 5 * 4 + 5)


def test_the_bench_of_generators(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib"), pytest.importorskip("rich")
    monkeypatch.setattr(generator_cells, "CELLS", TINY[:1])
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtypes, device, timer: CEILINGS)
    rows = bench.main("generators", output=tmp_path)
    assert [(row["cell"], row["candidate"], row["status"]) for row in rows] == [
        ("DCGAN", "torch", "ok"), ("DCGAN", "gpt4fast", "ok"),
    ]  # fmt: skip
    assert rows[1]["ratio"] > 0 and (tmp_path / "generators.json").exists() and (tmp_path / "generators.png").exists()
    with pytest.raises(ValueError, match="peers and impls must not be given for generators"):
        bench.main("generators", peers=True)
    with pytest.raises(ValueError, match="op must be one of attention, conv_transpose, generators, but is 'softmax'"):
        bench.main("softmax")

"""Set-up shared by the pytest benchmarks: pinned threads, and one test for each cell, dtype and candidate."""

from __future__ import annotations

import pytest
import torch

from gpt4fast.benchmarks import candidates, harness, shapes


def pytest_addoption(parser):
    parser.addoption("--all-shapes", action="store_true", help="every shape, not just the quick subset")
    parser.addoption("--threads", type=int, default=None, help="torch's threads (2)")


@pytest.fixture(scope="session", autouse=True)
def pinned_threads(request):
    with harness.pinned_threads(request.config.getoption("--threads")) as threads:
        yield threads


def pytest_generate_tests(metafunc):
    if "op_cell" in metafunc.fixturenames:
        cells = shapes.select(metafunc.module.OP, quick=not metafunc.config.getoption("--all-shapes"))
        ids = [f"{cell.name} {str(dtype).removeprefix('torch.')}" for cell, dtype in cells]
        metafunc.parametrize("op_cell", cells, ids=ids)


@pytest.fixture
def compare(benchmark, op_cell):
    """Check the values of the named candidate on the test's cell, then time it in its best layout."""

    def run(name):
        cell, dtype = op_cell
        benchmark.group = f"{cell.name} {str(dtype).removeprefix('torch.')}"
        with torch.set_grad_enabled(cell.backward):
            competitors, reference = candidates.build(cell, dtype)
        with torch.inference_mode(not cell.backward):
            variants = [c for c in competitors if c.name == name]
            checked = [harness.check(c, reference, cell.tolerance(dtype)) for c in variants]
            assert [timing.status for timing in checked] == ["ok"] * len(checked), [timing.error for timing in checked]
            timer = harness.CpuTimer()
            for timing in checked:
                timing.repeats = harness.calibrate(timer, timing.candidate.run, 0.02)
                timing.samples = [timer.slot(timing.candidate.run, timing.repeats) for _ in range(3)]
            best = harness.fastest_variants(checked)[name]
            benchmark.extra_info.update(layout=best.candidate.variant, implementation=best.candidate.implementation)
            benchmark.pedantic(best.candidate.run, rounds=9, iterations=best.repeats)

    return run

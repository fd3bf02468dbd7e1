"""The tuner: it takes the fastest tile, measures once, keeps to its time, and outlives a file that is none."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from gpt4fast.backends.triton import tuning

TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


@pytest.fixture
def launches(monkeypatch, tmp_path) -> list[dict]:
    """The tiles that were launched; a launch takes as long as its tile's ``BLOCK_N``."""
    monkeypatch.setenv("GPT4FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    seen: list[dict] = []

    def seconds_of(run):
        run()
        return seen[-1]["BLOCK_N"]

    monkeypatch.setattr(tuning, "seconds_of", seconds_of)
    return seen


def test_the_fastest_is_taken_and_measured_once(launches, monkeypatch):
    first = tuning._fastest("gpu", "kernel (1, 2)", TILE, launches.append)
    assert first == {**TILE, "BLOCK_N": 32}
    assert launches == list(tuning.variants(TILE)) and len(launches) == 4
    assert tuning._fastest("gpu", "kernel (1, 2)", TILE, launches.append) == first
    monkeypatch.setattr(tuning, "_known", {})  # another process
    assert tuning._fastest("gpu", "kernel (1, 2)", TILE, launches.append) == first
    assert len(launches) == 4
    tuning._fastest("gpu", "kernel (9, 2)", TILE, launches.append)
    tuning._fastest("other gpu", "kernel (1, 2)", TILE, launches.append)
    assert len(launches) == 12
    assert {kind: set(tiles) for kind, tiles in json.loads(tuning.path().read_text()).items()} == {
        "gpu": {"kernel (1, 2)", "kernel (9, 2)"},
        "other gpu": {"kernel (1, 2)"},
    }


@pytest.mark.parametrize("error", ["shared memory", "registers"])
def test_what_does_not_fit_is_passed_over(launches, error):
    errors = pytest.importorskip("triton.runtime.errors")

    def launch(tile):
        if tile["BLOCK_N"] == 32:
            raise errors.OutOfResources(3, 2, error) if error == "shared memory" else errors.PTXASError(error)
        launches.append(tile)

    assert tuning._fastest("gpu", "kernel", TILE, launch) == TILE  # the first of equals
    with pytest.raises(errors.TritonError, match=error):
        tuning._fastest("gpu", "another", {**TILE, "BLOCK_N": 32}, launch)


def test_what_is_wrong_is_not_passed_over(launches):
    """An error that has nothing to do with the tile's size is no reason to take another."""

    def launch(tile):
        if tile["BLOCK_N"] == 32:
            raise RuntimeError("an illegal memory access")
        launches.append(tile)

    with pytest.raises(RuntimeError, match="illegal"):
        tuning._fastest("gpu", "kernel", TILE, launch)


def test_descriptors_and_parts_are_varied(launches):
    """What an older file does not have is the heuristic's, and what a tile does not have is left alone."""
    tile = {**TILE, "DESCRIPTORS": 0, "SPLITS": 8}
    tuning._fastest("gpu", "kernel", tile, launches.append)
    assert {**tile, "DESCRIPTORS": 1} in launches and {**tile, "SPLITS": 4} in launches and len(launches) == 6
    tuning._fastest("gpu", "old", TILE, launches.append)
    assert tuning._fastest("gpu", "old", tile, launches.append) == {**tile, "BLOCK_N": 32}
    assert tuning._fastest("gpu", "kernel", TILE, launches.append) == {**TILE, "BLOCK_N": 32}
    assert {**TILE, "SPLITS": 0} not in tuning.variants({**TILE, "SPLITS": 1})


def test_it_keeps_to_its_time(launches, monkeypatch):
    now = iter([0.0, tuning.SECONDS + 1])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(now))
    assert tuning._fastest("gpu", "kernel", TILE, launches.append) == TILE
    assert launches == [TILE]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gpu": {"kernel": {"BLOCK_M": "x"}}}', '{"gpu": 3}', "\x00"])
def test_a_file_that_is_none(launches, text):
    tuning.path().write_text(text)
    tuning._fastest("gpu", "kernel", TILE, launches.append)
    assert list(json.loads(tuning.path().read_text())) == ["gpu"]
    assert [file.name for file in tuning.path().parent.iterdir()] == ["triton_tuning.json"]


def test_a_folder_that_cannot_be_written(launches, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT4FAST_CACHE_DIR", str(tmp_path / "file"))
    assert tuning._fastest("gpu", "kernel", TILE, launches.append) == {**TILE, "BLOCK_N": 32}
    assert tuning._fastest("gpu", "kernel", TILE, launches.append) == {**TILE, "BLOCK_N": 32}
    assert len(launches) == 4


def test_processes_add_to_one_file(launches):
    """Each writes what it knows: the last one is whole, whatever the others did meanwhile."""
    threads = [threading.Thread(target=tuning.write, args=("gpu", {str(i): TILE})) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuning.read()["gpu"]


def test_no_gpu_no_measurement(launches):
    assert tuning.fastest("kernel", (), TILE, launches.append, torch.ones(1)) is TILE
    assert launches == []


def test_while_a_graph_is_captured_what_is_known_counts(launches):
    assert tuning._fastest("gpu", "kernel", TILE, launches.append, captured=True) == TILE and not launches
    known = tuning._fastest("gpu", "kernel", TILE, launches.append)
    count = len(launches)
    assert tuning._fastest("gpu", "kernel", TILE, launches.append, captured=True) == known != TILE
    assert len(launches) == count

"""A run that was interrupted, killed or failed goes on bit for bit as one that was not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from gpt4fast.training.loop import Loop

STEPS = 11


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and on a busy machine would wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def ctrl_c_interrupts():
    """A job in the background of a shell inherits SIGINT ignored; the tests press Ctrl-C as a person at a terminal."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def make(folder, steps=STEPS, every=4, lr=0.01, width=8, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1))
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    loop = Loop(
        folder,
        "run",
        modules={"model": model},
        optimizers={"adam": adam},
        steps=steps,
        checkpoint_every=every,
        **options,
    )

    def step(index):
        inputs = torch.randn(16, 5)
        loss = (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return {"loss": loss.item()}

    return loop, step, model, adam


def everything(loop, model, adam):
    state = dict(model.state_dict())
    for number, values in adam.state_dict()["state"].items():
        state |= {f"adam {number} {key}": value for key, value in values.items()}
    return {key: value.clone() for key, value in state.items()}, loop.history


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    loop, step, model, adam = make(tmp_path_factory.mktemp("whole"))
    assert len(loop.run(step)) == STEPS
    return everything(loop, model, adam)


def assert_same_run(expected, actual):
    assert expected[1] == actual[1]  # the metrics of every step, to the last bit
    assert expected[0].keys() == actual[0].keys()
    for key, value in expected[0].items():
        assert torch.equal(value, actual[0][key]), key


@pytest.mark.parametrize("at", [0, 3, 4, 6, STEPS - 1])
def test_ctrl_c_finishes_the_step_saves_and_resumes_exactly(tmp_path, uninterrupted, at):
    loop, step, *_ = make(tmp_path)

    def pressed(index):
        if index == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(index)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.run(pressed)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(loop.history) == at + 1
    torch.randn(7)  # the caller's random numbers do not matter
    loop, step, model, adam = make(tmp_path)
    steps_done = []
    loop.run(lambda index: steps_done.append(index) or step(index))
    assert steps_done == list(range(at + 1, STEPS))
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_second_ctrl_c_stops_at_once_and_resumes_from_the_checkpoint(tmp_path, uninterrupted):
    loop, step, *_ = make(tmp_path)

    def pressed_twice(index):
        metrics = step(index)
        if index == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second Ctrl-C did not stop the step")
        return metrics

    with pytest.raises(KeyboardInterrupt):
        loop.run(pressed_twice)
    loop, step, model, adam = make(tmp_path)
    steps_done = []
    loop.run(lambda index: steps_done.append(index) or step(index))
    assert steps_done[0] == 4
    assert_same_run(uninterrupted, everything(loop, model, adam))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_error_within_a_step_never_saves_half_a_step(tmp_path, uninterrupted, error):
    loop, step, model, _ = make(tmp_path)

    def fails(index):
        metrics = step(index)
        if index == 5:
            with torch.no_grad():
                model[0].weight.add_(1)
            raise error
        return metrics

    with pytest.raises(error):
        loop.run(fails)
    loop, step, model, adam = make(tmp_path)
    loop.run(step)
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_interrupt_raised_by_progress_saves(tmp_path, uninterrupted):
    loop, step, *_ = make(tmp_path)

    def progress(done, steps, metrics):
        assert steps == STEPS and metrics == loop.history[done - 1]
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(step, progress)
    loop, step, model, adam = make(tmp_path)
    steps_done = []
    loop.run(lambda index: steps_done.append(index) or step(index))
    assert steps_done[0] == 6
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_killed_process_resumes_exactly(tmp_path, uninterrupted):
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_loop import make, torch
        torch.set_num_threads(1)
        loop, step, *_ = make({str(tmp_path)!r})
        def slow(index):
            metrics = step(index)
            print(index, flush=True)
            time.sleep(60 if index == 6 else 0)
            return metrics
        loop.run(slow)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "6":
                break
        process.kill()
    loop, step, model, adam = make(tmp_path)
    steps_done = []
    loop.run(lambda index: steps_done.append(index) or step(index))
    assert steps_done[0] == 4  # the last checkpoint before step 6
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_failed_save_keeps_the_old_checkpoint(tmp_path, uninterrupted, monkeypatch):
    loop, step, *_ = make(tmp_path)
    real_save, saves = torch.save, []

    def save(state, file):
        saves.append(len(state["history"]))
        if len(saves) == 2:
            file.write(b"half a file")
            raise OSError("disk full")
        real_save(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        loop.run(step)
    assert saves == [4, 8]
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    monkeypatch.undo()
    loop, step, model, adam = make(tmp_path)
    loop.run(step)
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_finished_run_returns_at_once_with_its_state(tmp_path, uninterrupted):
    loop, step, *_ = make(tmp_path)
    loop.run(step)
    loop, step, model, adam = make(tmp_path)

    def never(index):
        raise AssertionError("a finished run took another step")

    assert loop.run(never) == uninterrupted[1]
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_run_can_be_prolonged(tmp_path, uninterrupted):
    loop, step, *_ = make(tmp_path, steps=5)
    loop.run(step)
    loop, step, model, adam = make(tmp_path)
    loop.run(step)
    assert_same_run(uninterrupted, everything(loop, model, adam))


def test_time_limit_counts_all_sittings(tmp_path):
    loop, step, *_ = make(tmp_path, steps=10**6, seconds=0.2)
    first = loop.run(lambda index: time.sleep(0.02) or step(index))
    assert 2 <= len(first) <= 10
    loop, step, *_ = make(tmp_path, steps=10**6, seconds=0.2)
    assert loop.run(step) == first
    loop, step, *_ = make(tmp_path, steps=10**6, seconds=0.3)
    assert len(loop.run(lambda index: time.sleep(0.02) or step(index))) > len(first)


def test_random_state_of_the_caller_is_kept(tmp_path):
    loop, step, *_ = make(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loop.run(step)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_runs_and_steps_differ(tmp_path):
    draws = set()
    for seed in (0, 1, 2**32):
        loop, *_ = make(tmp_path / str(seed), seed=seed)
        loop.run(lambda index: {"draw": torch.rand(()).item()})
        draws |= {metrics["draw"] for metrics in loop.history}
    assert len(draws) == 3 * STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.02}, r"adam group 0 .*'lr': 0.01.* there, .*'lr': 0.02"),
        ({"width": 9}, r"model.0.bias is \(8,\) float32 there, \(9,\) float32 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"config": {"batch_size": 4}}, "config batch_size is absent there, 4 here"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(tmp_path, change, message):
    loop, step, *_ = make(tmp_path)
    loop.run(step)
    loop, step, *_ = make(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        loop.run(step)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "pickle"])
def test_damaged_checkpoint_is_named(tmp_path, content):
    loop, step, *_ = make(tmp_path)
    loop.run(step)
    path = tmp_path / "run.pt"
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "pickle":
        torch.save({"other": 1}, path)
    else:
        path.write_bytes(content)
    loop, step, *_ = make(tmp_path)
    with pytest.raises(ValueError, match=r"run\.pt is not a checkpoint"):
        loop.run(step)


def test_divergence_is_reported_and_not_saved(tmp_path):
    loop, step, *_ = make(tmp_path)
    with pytest.raises(FloatingPointError, match="loss is nan at step 5"):
        loop.run(lambda index: step(index) if index < 5 else {"loss": float("nan")})
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["history"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"seconds": 0}, "seconds must be positive or None, got 0"),
        ({"seconds": float("nan")}, "seconds must be positive"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


@pytest.mark.parametrize("name", ["", "a/b", "."])
def test_bad_name(tmp_path, name):
    with pytest.raises(ValueError, match="name must be a plain file name"):
        Loop(tmp_path, name, modules={}, optimizers={}, steps=1)

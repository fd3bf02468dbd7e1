"""The command line: help, the doctor's content, and mistakes that end in one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import torch
from typer.testing import CliRunner

import gpt4fast
from gpt4fast import doctor
from gpt4fast.cli import app


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


COMMANDS = [
    (),
    ("demo",),
    ("doctor",),
    ("bench",),
    ("train",),
    ("train", "images"),
    ("train", "audio"),
    ("train", "text"),
    ("generate",),
    ("generate", "text"),
    ("generate", "image"),
    ("generate", "audio"),
    ("generate", "video"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "gpt4fast")
def test_help(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_help_names_the_decoding_parameters(run):
    text = run("generate", "text", "--help").output
    for option in ("--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty",
                   "--seed", "--count"):  # fmt: skip
        assert option in text


def test_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"gpt4fast {gpt4fast.__version__}"


def test_doctor_tells_versions_machine_and_choices(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for text in (
        gpt4fast.__version__, torch.__version__, "triton", "nvcc seen at build", "processor", "CPU level",
        "CPU library", "CUDA library", "GPU", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "attention",
    ):  # fmt: skip
        assert text in result.output
    for choice in doctor.choices():
        assert choice.implementation in ("native", "reference", "torch", "cuda", "triton")
        assert choice.implementation not in choice.reasons
        assert all(choice.reasons.values())


def test_doctor_follows_the_environment(run, monkeypatch):
    monkeypatch.setenv("GPT4FAST_IMPL", "reference")
    assert {c.implementation for c in doctor.choices()} == {"reference"}
    monkeypatch.setenv("GPT4FAST_IMPL", "cuda")  # for CUDA tensors alone: the doctor says so, and does not fall over
    assert {c.implementation for c in doctor.choices()} == {"none"}
    assert all("cuda" in c.reasons["error"] for c in doctor.choices())


def _saved_generator(folder):
    from gpt4fast.models import DCGANConfig, DCGANGenerator

    torch.manual_seed(0)
    DCGANGenerator(DCGANConfig(image_size=8, channels=1, base_channels=4, stem="standard")).save_pretrained(folder)


def test_mistakes_are_named(run, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    _saved_generator(tmp_path / "gan" / "generator")
    cases = [
        (("nonsense",), "nonsense"),
        (("demo", "--minutes", "soon"), "minutes"),
        (("demo", "--minutes", "0"), "minutes"),
        (("demo", "--threads", "0"), "threads"),
        (("bench", "softmax"), "softmax"),
        (("train", "images", "--data", tmp_path), "--output"),
        (("train", "images", "--output", tmp_path / "o", "--data", tmp_path / "none"), "no such folder"),
        (("train", "images", "--output", tmp_path / "o", "--data", tmp_path), "no image files"),
        (("train", "images", "--output", tmp_path / "o", "--size", "33"), "image_size"),
        (("train", "images", "--output", tmp_path / "o", "--steps", "0"), "steps"),
        (("train", "audio", "--output", tmp_path / "o", "--data", tmp_path), "no sound files"),
        (("train", "text", "--output", tmp_path / "o", "--data", tmp_path / "none.txt"), "no such text file"),
        (("generate", "image", tmp_path / "none"), "no such folder"),
        (("generate", "text", tmp_path / "gan"), "dcgan_generator"),
        (("generate", "audio", tmp_path / "gan"), "no model that generates audio"),
        (("generate", "image", tmp_path / "gan", "--count", "0"), "count"),
    ]
    for arguments, named in cases:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert named in result.output, (arguments, result.output)
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit), (arguments, result.exception)


def test_damaged_model_is_named(run, tmp_path):
    _saved_generator(tmp_path / "generator")
    config = json.loads((tmp_path / "generator" / "config.json").read_text())
    (tmp_path / "generator" / "config.json").write_text(json.dumps(config | {"latent_dim": 7}))
    result = run("generate", "image", tmp_path)
    assert result.exit_code == 2
    assert "does not fit" in result.output


def test_interrupt_says_how_to_go_on(run, tmp_path, monkeypatch):
    import gpt4fast.demo.pipeline

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt4fast.demo.pipeline, "run_demo", interrupted)
    result = run("demo", "--output", tmp_path / "run", "--minutes", "2.5", "--seed", 3)
    assert result.exit_code == 130
    # all settings: other ones would be refused
    assert f"gpt4fast demo --output {tmp_path / 'run'} --minutes 2.5 --threads 2 --seed 3" in result.output


def test_bench_passes_its_options_on(run, tmp_path, monkeypatch):
    import gpt4fast.bench

    calls = []
    monkeypatch.setattr(gpt4fast.bench, "main", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert run("bench", "attention").exit_code == 0
    assert run("bench", "conv_transpose", "--full", "--peers", "--threads", 1, "--output", tmp_path).exit_code == 0
    assert calls[0] == (("attention", True, Path("gpt4fast-bench")), {"peers": False, "threads": 2})
    assert calls[1] == (("conv_transpose", False, tmp_path), {"peers": True, "threads": 1})


def test_generate_image_and_video_repeat_with_the_seed(run, tmp_path):
    _saved_generator(tmp_path / "generator")
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run("generate", "image", tmp_path, "--count", 4, "--seed", seed, "--output", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    result = run("generate", "video", tmp_path, "--count", 1, "--frames", 2, "--output", tmp_path / "v.gif")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "v.gif").read_bytes()[:6] == b"GIF89a"


def test_train_images_then_generate(run, tmp_path):
    arguments = ("train", "images", "--output", tmp_path / "gan", "--size", 8, "--width", 4, "--batch-size", 4)
    result = run(*arguments, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "gan" / "samples.png").is_file()
    result = run("generate", "image", tmp_path / "gan", "--count", 4, "--output", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "grid.png").is_file()


def test_train_on_own_sounds_then_generate(run, tmp_path):
    from gpt4fast.data import read_audio, write_wav

    (tmp_path / "own").mkdir()
    for i in range(10):
        write_wav(tmp_path / "own" / f"{i}.wav", torch.sin(torch.arange(512) * (0.05 + 0.01 * i)), 8000)
    arguments = ("train", "audio", "--data", tmp_path / "own", "--output", tmp_path / "gan", "--samples", 512,
                 "--rate", 8000, "--width", 2, "--batch-size", 2, "--steps", 2)  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    result = run("generate", "audio", tmp_path / "gan", "--count", 2, "--output", tmp_path / "sounds")
    assert result.exit_code == 0, result.output
    wave, rate = read_audio(tmp_path / "sounds" / "001.wav")
    assert (len(wave), rate) == (512, 8000)  # the rate that it was trained at, not the default


def test_train_on_own_text_then_generate(run, tmp_path):
    (tmp_path / "own.txt").write_text("the cat sat on the mat. the dog sat on the log. " * 200)
    arguments = ("train", "text", "--data", tmp_path / "own.txt", "--output", tmp_path / "model", "--steps", 2,
                 "--vocabulary", 300, "--dim", 16, "--layers", 1, "--heads", 2)  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    write = ("generate", "text", tmp_path / "model", "--prompt", "the cat", "--max-new-tokens", 5)
    texts = [run(*write, "--seed", seed).output for seed in (1, 1, 2)]
    assert texts[0].startswith("the cat")
    assert texts[0] == texts[1] != texts[2]
    result = run(*write, "--temperature", "-1")
    assert result.exit_code == 2
    assert "temperature" in result.output

"""Sound files: what is written is read, resampling keeps tones, augmentation does what it says."""

import builtins
import math
import wave as wave_module

import pytest
import soundfile
import torch

from gpt4fast.data import audio_folder, augment, read_audio, resample, write_wav
from gpt4fast.data.audio import fit
from gpt4fast.data.splits import SPLITS


def tone(frequency, rate, seconds=0.5):
    return 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(int(rate * seconds)) / rate)


def pitch(wave, rate):
    spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave))).abs()
    return spectrum.argmax().item() * rate / len(wave)


@pytest.mark.parametrize(("source", "target"), [(44100, 16000), (16000, 44100), (22050, 16000), (16000, 8000)])
def test_resample_keeps_tones(source, target):
    wave = resample(tone(1000, source), source, target)
    assert wave.shape == (round(len(tone(1000, source)) * target / source),)
    middle = slice(target // 10, -target // 10)  # a tone that stops abruptly rings at its ends
    torch.testing.assert_close(wave[middle], tone(1000, target)[: len(wave)][middle], atol=5e-3, rtol=0)


def test_resample_removes_what_the_lower_rate_cannot_carry():
    wave = resample(tone(7000, 44100), 44100, 8000)
    assert wave[800:-800].abs().max() < 0.01


def test_resample_of_batches_and_bad_rates():
    waves = torch.randn(2, 3, 100)
    assert torch.equal(resample(waves, 5, 5), waves)
    torch.testing.assert_close(resample(waves, 2, 1)[1, 2], resample(waves[1, 2], 2, 1))
    with pytest.raises(ValueError, match="from_rate and to_rate must be positive, got 0 and 1"):
        resample(waves, 0, 1)


def test_fit_starts_at_the_attack_and_fades():
    wave = torch.zeros(5000)
    wave[1000:3000] = tone(440, 16000)[:2000]
    result = fit(wave, 2500)
    assert result.shape == (2500,)
    assert result.abs().max() == pytest.approx(0.95, abs=1e-3)
    assert 5 <= (result.abs() > 0.05).nonzero()[0] <= 30
    assert result[-1] == 0 and result[2400:].abs().max() < 0.05
    assert fit(torch.zeros(10), 20).tolist() == [0.0] * 20
    assert fit(torch.zeros(0), 20).tolist() == [0.0] * 20
    short = fit(tone(440, 16000)[:50], 400)
    assert short[60:].abs().max() == 0 and short.abs().max() == pytest.approx(0.95, abs=0.01)


def test_write_and_read_wav(tmp_path):
    wave = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 2.0])
    write_wav(tmp_path / "a.wav", wave, 12345)
    read, rate = read_audio(tmp_path / "a.wav")
    assert rate == 12345
    torch.testing.assert_close(read, wave.clamp(-1, 1), atol=1e-4, rtol=0)
    reference, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 12345 and torch.equal(read.double(), torch.from_numpy(reference))
    with pytest.raises(ValueError, match=r"wave must have shape \(samples,\), got \(1, 6\)"):
        write_wav(tmp_path / "a.wav", wave[None])


def test_16_bit_wav_needs_no_package(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(440, 16000))
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    real_import = builtins.__import__

    def no_soundfile(name, *args, **kwargs):
        if name == "soundfile":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_soundfile)
    assert len(read_audio(tmp_path / "a.wav")[0]) == 8000
    with pytest.raises(ImportError, match="a.flac needs the package soundfile"):
        read_audio(tmp_path / "a.flac")


@pytest.mark.parametrize(
    "kind", [("WAV", "FLOAT"), ("WAV", "PCM_24"), ("WAV", "PCM_U8"), ("FLAC", "PCM_16"), ("WAV", "PCM_16")]
)
def test_stereo_and_other_formats_become_mono(tmp_path, kind):
    left = tone(440, 16000)
    path = tmp_path / f"a.{kind[0].lower()}"
    soundfile.write(
        path, torch.stack([left, torch.zeros_like(left)], 1).numpy(), 16000, subtype=kind[1], format=kind[0]
    )
    read, rate = read_audio(path)
    assert rate == 16000
    torch.testing.assert_close(read, left / 2, atol=6e-3, rtol=0)


def test_audio_folder(tmp_path):
    for i in range(20):
        write_wav(tmp_path / f"{i:02}.wav", tone(200 + 20 * i, 8000), 8000)
    (tmp_path / "notes.txt").write_text("no sound")
    seen = []
    for split in SPLITS:
        waves, names, rate = audio_folder(tmp_path, split, samples=4096, sample_rate=16000)
        assert waves.shape == (len(names), 4096) and rate == 16000
        for wave, name in zip(waves, names, strict=True):
            assert pitch(wave, 16000) == pytest.approx(200 + 20 * int(name[:2]), abs=6)
        seen += names
    assert len(seen) == len(set(seen)) == 20


def test_audio_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        audio_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no sound files"):
        audio_folder(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF not really")
    with pytest.raises(ValueError, match="a.wav is not a sound file that can be read"):
        audio_folder(tmp_path)
    write_wav(tmp_path / "a.wav", tone(440, 16000))
    with pytest.raises(ValueError, match="split 'validation' of path .* is empty: 1 files are too few"):
        audio_folder(tmp_path, "validation")
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        audio_folder(tmp_path, samples=0)
    with pytest.raises(ValueError, match="split must be one of"):
        audio_folder(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match="no such sound file: .*b.wav"):
        read_audio(tmp_path / "b.wav")


def test_truncated_wav_gives_what_is_there(tmp_path):
    write_wav(tmp_path / "a.wav", tone(440, 16000))
    with wave_module.open(str(tmp_path / "a.wav")) as file:
        assert file.getnframes() == 8000
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[: 44 + 2 * 5000 + 1])
    read, _ = read_audio(tmp_path / "a.wav")
    torch.testing.assert_close(read[:5000], tone(440, 16000)[:5000], atol=1e-4, rtol=0)


def test_augment_changes_pitch_gain_and_start():
    waves = tone(1000, 16000).repeat(40, 1)
    source = torch.Generator().manual_seed(0)
    result = augment(waves, generator=source, gain=0.3, shift=100, pitch=2.0)
    assert result.shape == waves.shape
    pitches = torch.tensor([pitch(wave, 16000) for wave in result])
    assert 880 < pitches.min() < 930 and 1080 < pitches.max() < 1130  # two semitones are 12 %
    peaks = result[:, 1000:5000].abs().amax(1)
    assert 0.34 < peaks.min() < 0.4 and 0.45 < peaks.max() <= 0.51
    starts = (result.abs() > 0.1).float().argmax(1)
    assert starts.min() < 15 and 80 < starts.max() <= 106
    again = augment(waves, generator=torch.Generator().manual_seed(0), gain=0.3, shift=100, pitch=2.0)
    assert torch.equal(result, again)
    unchanged = augment(waves, gain=0.0, shift=0, pitch=0.0)
    torch.testing.assert_close(unchanged, waves)
    assert augment(torch.ones(3, 100).mul(0.99) * torch.tensor([1.0, -1.0]).repeat(50)).abs().max() <= 1


@pytest.mark.parametrize("arguments", [{"gain": 1.0}, {"gain": -0.1}, {"shift": -1}, {"pitch": -1}])
def test_augment_refuses(arguments):
    with pytest.raises(ValueError, match=r"gain must be in \[0, 1\), shift and pitch at least 0"):
        augment(torch.zeros(2, 10), **arguments)


def test_augment_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"waves must have shape \(N, samples\), got \(10,\)"):
        augment(torch.zeros(10))

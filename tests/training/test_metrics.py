"""The measures tell real from spoiled, and notice when all samples are alike."""

import math

import pytest
import torch

from gpt4fast.data import load_digits, load_drums
from gpt4fast.training.metrics import log_mel, nearest_distances, score_drums, spoiled_digits, train_digit_judge


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second thread, and on a busy machine would wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judge():
    return train_digit_judge(steps=300)


def test_judge_knows_digits_it_has_not_seen(judge):
    digits = load_digits("test", 32)
    score = judge.score(digits.images)
    assert score.share > 0.7 and score.spread > 0.95
    assert sum(score.counts) == round(score.share * len(digits.images))
    named = judge(digits.images)[:, :10].argmax(1)
    assert (named == digits.labels).float().mean() > 0.95


def test_judge_refuses_what_is_no_digit(judge):
    torch.manual_seed(3)
    digits = load_digits("test", 32)
    assert judge.score(spoiled_digits(*digits)).share < 0.05
    assert judge.score(torch.randn(200, 1, 32, 32).clamp(-1, 1)).share < 0.02
    assert judge.score(torch.full((10, 1, 32, 32), -1.0)).share == 0
    assert judge.score(digits.images.mean(0, keepdim=True).expand(10, -1, -1, -1)).share == 0
    assert judge.score(digits.images.roll(16, 3)).share < 0.05


def test_spread_notices_one_class_only(judge):
    digits = load_digits("test", 32)
    zeros = judge.score(digits.images[digits.labels == 0])
    assert zeros.share > 0.8 and zeros.spread < 0.1 and zeros.counts[0] >= sum(zeros.counts) - 1


def test_judge_is_the_same_every_time():
    torch.manual_seed(1)
    first = train_digit_judge(steps=3).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[key]) for key, value in train_digit_judge(steps=3).state_dict().items())


def test_judge_refuses_other_shapes(judge):
    with pytest.raises(ValueError, match=r"images must be \(N, 1, S, S\) with S at least 16, got \(2, 3, 32, 32\)"):
        judge(torch.zeros(2, 3, 32, 32))


def test_log_mel_of_a_tone():
    time = torch.arange(8192) / 16000
    tone = torch.sin(2 * math.pi * 1000 * time)
    spectrum = log_mel(torch.stack([tone, tone / 10, tone * 0]))
    assert spectrum.shape == (3, 40, 33)
    mel = 2595 * math.log10(1 + 1000 / 700)
    band = mel / (2595 * math.log10(1 + 8000 / 700) / 41) - 1
    assert abs(spectrum[0, :, 16].argmax().item() - band) < 1
    loudest = spectrum[:, :, 16].amax(1)
    assert loudest[0] - loudest[1] == pytest.approx(math.log(10), abs=1e-3)
    assert loudest[0] == pytest.approx(math.log(100), abs=0.7)
    assert loudest[2] == 0
    with pytest.raises(ValueError, match=r"waves must be \(N, samples\), got \(8192,\)"):
        log_mel(tone)


def test_nearest_distance_ignores_loudness_and_itself():
    waves = load_drums("test").waves
    assert (nearest_distances(waves, waves) > 1).all()
    assert nearest_distances(waves[:3] * 0.5, waves[:3])[0] > 1  # the same hit at another volume is the hit itself
    twice = nearest_distances(waves[:1], torch.cat([waves[:1], waves[1:2]]))
    alone = nearest_distances(waves[:1], waves[1:2])
    torch.testing.assert_close(twice, alone)


def test_drum_score_ranks_hits_before_noise():
    real, held_out = load_drums("train").waves, load_drums("test").waves
    hits, noise = score_drums(held_out, real), score_drums(torch.randn(20, 8192) * 0.3, real)
    assert hits.generated < 1.2 * hits.real < hits.noise / 2
    assert noise.generated == pytest.approx(noise.noise, rel=0.1)
    same = score_drums(real[:1].expand(8, -1), real)
    assert same.spread == 0 and hits.spread > 2

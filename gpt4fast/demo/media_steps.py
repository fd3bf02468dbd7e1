"""Steps 1 to 3 of the demo: data, and adversarial networks for pictures and sounds."""

from __future__ import annotations

import math

import torch

import gpt4fast
from gpt4fast.data import load_digits, load_drums, load_shakespeare
from gpt4fast.demo import speed
from gpt4fast.demo.run import Run, curve, fact, figure, save_clips
from gpt4fast.generation.audio import sample_audio
from gpt4fast.generation.images import sample_images, save_image, tile
from gpt4fast.models import DCGANGenerator, WaveGANGenerator
from gpt4fast.training.gan_presets import digits_gan, digits_networks, drums_gan, drums_networks
from gpt4fast.training.metrics import score_drums, train_digit_judge

SPLITS = ("train", "validation", "test")
GRID = 64  # pictures in a grid
CLIPS = 8  # sounds side by side


def data(run: Run) -> dict:
    """Step 1: loads the three data sets, splits included, and saves some real samples to compare with."""
    digits = {split: load_digits(split, 32).images for split in SPLITS}
    drums = {split: load_drums(split) for split in SPLITS}
    text = {split: load_shakespeare(split) for split in SPLITS}
    images, hits = digits["train"], drums["train"]
    save_image(tile(images[:GRID], 8), run.folder / "data" / "digits.png", scale=2)
    chosen = torch.linspace(0, len(hits.waves) - 1, CLIPS).long().tolist()  # spread over the names: all kinds of hits
    labels = [hits.names[i].replace("_", " ") for i in chosen]
    clips = save_clips(run.folder, "data/drums", hits.waves[chosen], labels, hits.sample_rate)
    samples = hits.waves.shape[1]

    def counts(parts: dict) -> dict[str, str]:
        return {split: f"{len(part):,}" for split, part in parts.items()}

    table = [
        {
            "name": "Digits",
            "shape": f"{images.shape[2]}×{images.shape[3]} grey pixels, enlarged from 8×8",
            "source": "Handwritten digits of the UCI repository, as scikit-learn carries them",
            "licence": "CC BY 4.0, E. Alpaydin and C. Kaynak 1998",
            "splits": counts(digits),
        },
        {
            "name": "Drums",
            "shape": f"{samples:,} samples, {samples / hits.sample_rate:.2f} s at {hits.sample_rate // 1000} kHz",
            "source": "Drum hits from Sonic Pi's collection",
            "licence": "CC0 1.0, by freesound.org's contributors",
            "splits": counts({split: part.waves for split, part in drums.items()}),
        },
        {
            "name": "Plays",
            "shape": "characters",
            "source": "Ten plays of William Shakespeare; held out is the end of every play",
            "licence": "public domain",
            "splits": counts(text),
        },
    ]
    opening = text["validation"].strip()[:420]
    return {
        "table": table,
        "grid": figure("data/digits.png", "Real digits", "From the training split."),
        "clips": clips,
        "excerpt": opening[: opening.rfind("\n")],
        "nyquist": f"{hits.sample_rate // 2:,}",
    }


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def networks(run: Run) -> dict:
    """Step 2: the four networks, what they make before training, and the generators' speed at inference."""
    progress = run.track("networks")
    digits, drums = digits_networks(), drums_networks()
    picture, sound = digits[0].config, drums[0].config
    shape = f"{picture.channels}×{picture.image_size}×{picture.image_size} picture"
    wave = f"{sound.samples:,} samples"
    rows = [
        ("DCGAN generator", "draws digits", f"{picture.latent_dim} random numbers", shape, digits[0]),
        ("DCGAN discriminator", "tells real digits from drawn ones", shape, "one number: how real", digits[1]),
        ("WaveGAN generator", "plays drums", f"{sound.latent_dim} random numbers", wave, drums[0]),
        ("WaveGAN discriminator", "tells real hits from played ones", wave, "one number: how real", drums[1]),
    ]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        digits[0].train()
        untrained = digits[0](torch.randn(GRID, picture.latent_dim))
    save_image(tile(untrained, 8), run.folder / "digits" / "untrained.png", scale=2)
    progress(1, 3, {})
    timed = [
        speed.inference(
            "Digits, inference",
            f"batch 64, {picture.image_size}×{picture.image_size}, float32",
            "images/s",
            digits[0],
            64,
            run.timing,
        )
    ]
    progress(2, 3, {})
    timed.append(
        speed.inference("Drums, inference", f"batch 16, {wave}, float32", "sounds/s", drums[0], 16, run.timing)
    )
    progress(3, 3, {})
    plain = speed.plain_generator(digits[0]).eval()
    parts = gpt4fast.explain(gpt4fast.optimize(plain))
    lines = [
        f"{row.part:<10} {row.runs_on.removeprefix('gpt4fast.') + ', ' if '.' in row.runs_on else '  '}"
        f"{row.why.replace('computed by the module before it', 'in the call above')}"
        for row in parts
    ]
    return {
        "table": [
            {"name": name, "role": role, "takes": takes, "gives": gives, "parameters": _parameters(model)}
            for name, role, takes, gives, model in rows
        ],
        "grid": figure(
            "digits/untrained.png", "Before training", "What the generator draws with its first, random weights."
        ),
        "explained": "\n".join(lines),
        "explained_note": "The picture generator, written with torch's own modules: each transposed convolution, the "
        "batch norm and the activation behind it become one call; on gpt4fast's own kernels, with one write to memory.",
        "speed": timed,
    }


def _gan_curves(name: str, history: list[dict[str, float]]) -> list[dict]:
    return [
        curve(f"{name}-losses", history, {"generator": "generator", "discriminator": "discriminator"}, "Losses",
              "Faint: every step as it was; strong: its moving average. The dashed line: the discriminator's loss when "
              "it can only guess.", "loss", (2 * math.log(2), "discriminator guessing")),
        curve(f"{name}-logits", history, {"real": "real", "fake": "generated"}, "The discriminator's opinion",
              "Its mean logit for real and for generated samples: above zero it says real. The closer the two lines, "
              "the less it can tell them apart.", "logit"),
    ]  # fmt: skip


def _judge_digits(generator: DCGANGenerator, run: Run) -> list[dict[str, str]]:
    """What a classifier that also knows "no digit" says of 1,000 generated pictures, and of the real test split."""
    judge = train_digit_judge(steps=max(20, round(500 * min(1.0, run.scale))))
    made = judge.score(sample_images(generator, 1000, run.seed))
    real = judge.score(load_digits("test", 32).images)
    rarest, commonest = min(made.counts), max(made.counts)
    return [
        fact("Generated digits that are recognised", f"{100 * made.share:.0f}", "%",
             f"by a classifier that may say “no digit”, 90 % sure or more; real test digits: {100 * real.share:.0f} %"),
        fact("Variety over the ten digits", f"{100 * made.spread:.0f}", "%",
             f"100 % is all equally often; of 1,000 pictures the rarest has {rarest}, the commonest {commonest}"),
    ]  # fmt: skip


def _judge_drums(player: WaveGANGenerator, run: Run) -> list[dict[str, str]]:
    """How far generated hits are from real ones, beside what real hits and noise have."""
    hits = load_drums("train")
    score = score_drums(sample_audio(player, 64, run.seed), hits.waves, hits.sample_rate)
    return [
        fact("Distance to the nearest real hit", f"{score.generated:.1f}", "dB",
             f"of log mel spectra; a real hit to the next: {score.real:.1f}, decaying noise: {score.noise:.1f}"),
        fact("Variety", f"{score.spread:.1f}", "dB", "from a generated hit to the nearest other; 0: all the same"),
    ]  # fmt: skip


def adversarial(run: Run) -> dict:
    """Step 3: trains both pairs, measures what the generators make, and times the generator's training step."""
    generator, discriminator, history = digits_gan(run.folder / "digits", run.track("digits"), run.scale)
    generator.save_pretrained(run.folder / "digits" / "generator")
    discriminator.save_pretrained(run.folder / "digits" / "discriminator")
    player, judge, player_history = drums_gan(run.folder / "drums", run.track("drums"), run.scale)
    player.save_pretrained(run.folder / "drums" / "generator")
    judge.save_pretrained(run.folder / "drums" / "discriminator")
    images, sounds = sample_images(generator, GRID, run.seed), sample_audio(player, CLIPS, run.seed)
    save_image(tile(images, 8), run.folder / "digits" / "generated.png", scale=2)
    rate = load_drums("train").sample_rate
    timed = [
        speed.training_step("Digits, generator's training step", "batch 32, forward and backward", "images/s",
                            generator, discriminator, 32, run.timing),
        speed.training_step("Drums, generator's training step", "batch 16, forward and backward", "sounds/s",
                            player, judge, 16, run.timing),
    ]  # fmt: skip
    with_judge = run.track("quality")
    judged, drums = _judge_digits(generator, run), _judge_drums(player, run)
    with_judge(1, 1, {})
    return {
        "images": {
            "facts": [*judged, fact("Training steps", f"{len(history):,}")],
            "grid": figure("digits/generated.png", "Generated digits",
                           "One random latent vector each, none picked by hand."),
            "curves": _gan_curves("digits", history),
        },
        "audio": {
            "facts": [*drums, fact("Training steps", f"{len(player_history):,}")],
            "clips": save_clips(run.folder, "drums/generated", sounds, [f"hit {i + 1}" for i in range(CLIPS)], rate),
            "curves": _gan_curves("drums", player_history),
        },
        "speed": timed,
        "tile": judged[0],
    }  # fmt: skip

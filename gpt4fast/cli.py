"""The command line: gpt4fast demo | doctor | bench | train | generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="Fast GANs and Transformers for PyTorch, and a complete generative system built on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
train = typer.Typer(
    help="Train on your own pictures, sounds or text, or on the bundled samples. Ctrl-C and the same command go on.",
    no_args_is_help=True,
    context_settings=HELP,
)
generate = typer.Typer(
    help="Generate text, pictures, sounds or video from a trained folder.", no_args_is_help=True, context_settings=HELP
)
app.add_typer(train, name="train")
app.add_typer(generate, name="generate")

console = Console()
errors = Console(stderr=True, soft_wrap=True)


def _fail(message: str, code: int = 2) -> typer.Exit:
    errors.print("[red]error:[/red] ", end="")
    errors.print(message, markup=False, highlight=False)
    return typer.Exit(code)


@contextmanager
def _friendly(interrupted: str = "Stopped.") -> Iterator[None]:
    """A user's mistake becomes one line and exit code 2; Ctrl-C says how to go on and exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"\n{interrupted}", markup=False, highlight=False)
        raise typer.Exit(130) from None
    except FloatingPointError as error:
        raise _fail(f"training diverged: {error}", 1) from None
    except (ValueError, OSError, ImportError) as error:
        raise _fail(str(error)) from None


def _version(value: bool) -> None:
    if value:
        import gpt4fast

        console.print(f"gpt4fast {gpt4fast.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one goes on.")] = Path("gpt4fast-demo"),
    minutes: Annotated[float, typer.Option(help="About how long it may take on two cores.", min=0.01)] = 6.0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of what is generated.")] = 0,
) -> None:
    """The main job end to end: data, GANs on pictures and drums, a text model, generation, and a report."""
    command = f"gpt4fast demo --output {output} --minutes {minutes:g} --threads {threads} --seed {seed}"
    with _friendly(f"Stopped; what is finished is kept. The same command goes on:\n{command}"):
        from gpt4fast.demo.pipeline import run_demo

        run_demo(output, minutes=minutes, threads=threads, seed=seed, console=console)


@app.command()
def doctor() -> None:
    """What is installed and loaded, and which implementation each op takes here, and why."""
    with _friendly():
        from gpt4fast.doctor import print_report

        print_report(console)


@app.command()
def bench(
    op: Annotated[Literal["attention", "conv_transpose", "generators"], typer.Argument(help="What to measure.")],
    quick: Annotated[bool, typer.Option("--quick/--full", help="Under a minute, or all shapes, ten minutes.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for the chart and the JSON file.")] = Path("gpt4fast-bench"),
    peers: Annotated[bool, typer.Option("--peers", help="Also ONNX Runtime and OpenVINO, where installed.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Measure an op, or whole generators, against torch: a table, a chart and a JSON file."""
    with _friendly("Stopped; nothing was written."):
        from gpt4fast.bench import main

        main(op, quick, output, peers=peers, threads=threads)


Output = Annotated[Path, typer.Option(help="Folder for the trained model; an unfinished run in it goes on.")]
Data = Annotated[Path | None, typer.Option(help="Your own data; without it, the samples that come along.")]
Steps = Annotated[int, typer.Option(help="Training steps in all.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Samples in a step.", min=2)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Learning rate.", min=0.0)]


def _train_gan(generator, discriminator, data, output: Path, what: str, **settings) -> list[dict]:
    from gpt4fast.demo.bars import bars
    from gpt4fast.training.gan import train_gan

    with bars(console) as track:
        history = train_gan(generator, discriminator, data, output, progress=track(what), **settings)
    generator.save_pretrained(output / "generator")
    discriminator.save_pretrained(output / "discriminator")
    return history


def _go_on(output: Path) -> str:
    return f"Stopped; the checkpoint in {output} is kept. The same command goes on from it."


@train.command("images")
def train_images(
    output: Output,
    data: Data = None,
    steps: Steps = 2000,
    size: Annotated[int, typer.Option(help="Height and width, a power of two.")] = 32,
    channels: Annotated[int, typer.Option(help="3 for colour, 1 for grey.", min=1, max=3)] = 3,
    width: Annotated[int, typer.Option(help="Channels of the largest hidden image.", min=1)] = 32,
    batch_size: BatchSize = 64,
    lr: LearningRate = 2e-4,
    seed: Seed = 0,
) -> None:
    """A DCGAN on a folder of pictures (or the handwritten digits)."""
    with _friendly(_go_on(output)):
        import torch

        from gpt4fast.data import image_folder, load_digits
        from gpt4fast.generation.images import sample_grid
        from gpt4fast.models import DCGANConfig, DCGANDiscriminator, DCGANGenerator

        if data is None:
            images = load_digits("train", size).images
        else:
            images, _ = image_folder(data, size, channels=channels)
        torch.manual_seed(seed)
        config = DCGANConfig(image_size=size, channels=images.shape[1], base_channels=width, stem="standard")
        generator = DCGANGenerator(config)
        _train_gan(generator, DCGANDiscriminator(config), images, output, f"DCGAN, {len(images)} pictures",
                   steps=steps, batch_size=batch_size, lr=lr, seed=seed)  # fmt: skip
        grid = sample_grid(generator, 64, seed, output / "samples.png")
        console.print(f"Samples: {grid}\nMore:    gpt4fast generate image {output} --count 64", highlight=False)


@train.command("audio")
def train_audio(
    output: Output,
    data: Data = None,
    steps: Steps = 2000,
    samples: Annotated[int, typer.Option(help="Length in samples, a power of four times 8 to 31.")] = 8192,
    rate: Annotated[int, typer.Option(help="Sample rate in hertz.", min=1000)] = 16000,
    width: Annotated[int, typer.Option(help="Channels of the longest hidden signal.", min=1)] = 16,
    batch_size: BatchSize = 16,
    lr: LearningRate = 2e-4,
    seed: Seed = 0,
) -> None:
    """A WaveGAN on a folder of short sounds (or the drum hits)."""
    with _friendly(_go_on(output)):
        import torch

        from gpt4fast.data import audio_folder, load_drums
        from gpt4fast.models import WaveGANConfig, WaveGANDiscriminator, WaveGANGenerator

        if data is None:
            waves, _, rate = load_drums("train")
            samples = waves.shape[1]
        else:
            waves, _, rate = audio_folder(data, samples=samples, sample_rate=rate)
        torch.manual_seed(seed)
        config = WaveGANConfig(samples=samples, base_channels=width)
        generator = WaveGANGenerator(config)
        _train_gan(generator, WaveGANDiscriminator(config), waves[:, None], output, f"WaveGAN, {len(waves)} sounds",
                   steps=steps, batch_size=batch_size, lr=lr, seed=seed)  # fmt: skip
        (output / "audio.json").write_text(json.dumps({"sample_rate": rate}), encoding="utf-8")
        console.print(f"Listen:  gpt4fast generate audio {output} --count 8", highlight=False)


@train.command("text")
def train_text(
    output: Output,
    data: Data = None,
    steps: Annotated[int, typer.Option(help="Steps of pre-training, and as many of fine-tuning.", min=1)] = 1000,
    vocabulary: Annotated[int, typer.Option(help="Tokens that the tokenizer learns.", min=262)] = 1024,
    dim: Annotated[int, typer.Option(help="Width of the model.", min=8)] = 128,
    layers: Annotated[int, typer.Option(help="Blocks in the encoder, and in the decoder.", min=1)] = 3,
    heads: Annotated[int, typer.Option(help="Attention heads.", min=1)] = 4,
    seed: Seed = 0,
) -> None:
    """An encoder, then a decoder on it, on a text file or a folder of .txt files (or ten plays of Shakespeare)."""
    with _friendly(_go_on(output)):
        import torch

        from gpt4fast.data import load_shakespeare, text_file
        from gpt4fast.data.tokenizer import Tokenizer
        from gpt4fast.demo.bars import bars
        from gpt4fast.models import Encoder, EncoderConfig, EncoderDecoder, EncoderDecoderConfig
        from gpt4fast.training.finetune import finetune_decoder, warm_start_decoder
        from gpt4fast.training.pretrain import pretrain_encoder

        real, held_out = (load_shakespeare(s) if data is None else text_file(data, s) for s in ("train", "validation"))
        tokenizer = Tokenizer.train(real, vocabulary)
        tokenizer.save(output / "tokenizer.json")
        ids, validation = tokenizer.encode(real), tokenizer.encode(held_out)
        settings = {"validation_ids": validation if len(validation) >= 130 else None, "seed": seed, "steps": steps}
        torch.manual_seed(seed)
        encoder = Encoder(
            EncoderConfig(
                vocab_size=tokenizer.vocab_size, max_length=256, num_layers=layers, num_heads=heads, embed_dim=dim
            )
        )
        with bars(console) as track:
            pretrain_encoder(encoder, ids, tokenizer, output, progress=track("encoder"), **settings)
            encoder.save_pretrained(output / "encoder")
            model = EncoderDecoder(EncoderDecoderConfig(encoder.config), encoder)
            warm_start_decoder(model)
            finetune_decoder(model, ids, tokenizer, output, progress=track("decoder"), **settings)
        model.save_pretrained(output / "decoder")
        console.print(f"Read:    gpt4fast generate text {output} --prompt '...'", highlight=False)


# Generation

GENERATORS = {"image": ("dcgan_generator",), "audio": ("wavegan_generator",), "text": ("encoder_decoder", "gpt")}


def _find_model(folder: Path, what: str) -> tuple[Path, str]:
    """The folder of a saved model that generates `what`, in `folder` or below, and the model's type."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: no such folder: {folder}")
    found = {}
    for path in sorted(folder.rglob("config.json"), key=lambda path: (len(path.parts), path)):
        try:
            found[path.parent] = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            found[path.parent] = "a damaged config.json"
    for kind in GENERATORS[what]:
        for place, model_type in found.items():
            if model_type == kind:
                return place, kind
    others = ", ".join(f"{kind} in {place}" for place, kind in found.items()) or "nothing"
    raise ValueError(f"folder: {folder} has no model that generates {what}; found {others}")


Folder = Annotated[Path, typer.Argument(help="A folder that `train` or `demo` made.")]
Count = Annotated[int, typer.Option(help="How many.", min=1)]


def _image_generator(folder: Path):
    from gpt4fast.models import DCGANGenerator

    return DCGANGenerator.from_pretrained(_find_model(folder, "image")[0])


@generate.command("image")
def generate_image(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("images.png"),
    count: Count = 64,
    seed: Seed = 0,
) -> None:
    """A grid of pictures."""
    with _friendly():
        from gpt4fast.generation.images import sample_grid

        console.print(sample_grid(_image_generator(folder), count, seed, output), highlight=False)


@generate.command("video")
def generate_video(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="The GIF to write.")] = Path("video.gif"),
    count: Annotated[int, typer.Option(help="Pictures side by side.", min=1)] = 16,
    frames: Annotated[int, typer.Option(help="Frames from one random picture to the next.", min=1)] = 12,
    seed: Seed = 0,
) -> None:
    """A walk through the latent space: pictures that change into each other, in a loop."""
    with _friendly():
        from gpt4fast.generation.video import latent_walk

        path = latent_walk(_image_generator(folder), output, seed=seed, pictures=count, steps=frames)
        console.print(path, highlight=False)


@generate.command("audio")
def generate_audio(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="Folder for the WAV files.")] = Path("sounds"),
    count: Count = 8,
    seed: Seed = 0,
) -> None:
    """Sounds as WAV files."""
    with _friendly():
        from gpt4fast.data import write_wav
        from gpt4fast.generation.audio import sample_audio
        from gpt4fast.models import WaveGANGenerator

        place, _ = _find_model(folder, "audio")
        settings = next((p for p in (place / "audio.json", place.parent / "audio.json") if p.is_file()), None)
        rate = json.loads(settings.read_text(encoding="utf-8"))["sample_rate"] if settings else 16000
        output.mkdir(parents=True, exist_ok=True)
        for i, wave in enumerate(sample_audio(WaveGANGenerator.from_pretrained(place), count, seed)):
            path = output / f"{i:03d}.wav"
            write_wav(path, wave, rate)
            console.print(path, highlight=False)


@generate.command("text")
def generate_text(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="What the text goes on from.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="Below 1 safer, above 1 wilder.", min=0.0)] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens only.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that sum to p.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said is said less.")] = 1.0,
    seed: Seed = 0,
    count: Count = 1,
) -> None:
    """Text that goes on from a prompt, shown as it is written."""
    with _friendly():
        from gpt4fast.data.tokenizer import Tokenizer
        from gpt4fast.generation import continue_text
        from gpt4fast.models import GPT, EncoderDecoder

        place, kind = _find_model(folder, "text")
        files = [p / "tokenizer.json" for p in (place, place.parent) if (p / "tokenizer.json").is_file()]
        if not files:
            raise FileNotFoundError(f"folder: no tokenizer.json beside the model in {place}")
        tokenizer = Tokenizer.load(files[0])
        model = (GPT if kind == "gpt" else EncoderDecoder).from_pretrained(place)
        for i in range(count):
            if count > 1:
                console.rule(f"{i + 1} of {count}")
            print(prompt, end="", flush=True)
            continue_text(
                model, tokenizer, prompt, max_new_tokens=max_new_tokens, seed=seed + i, temperature=temperature,
                top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
                on_text=lambda piece: print(piece, end="", flush=True),
            )  # fmt: skip
            print()


def main() -> None:
    """The console script."""
    app(prog_name="gpt4fast")

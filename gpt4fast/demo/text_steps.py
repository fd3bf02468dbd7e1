"""Steps 4 to 6 of the demo: an encoder that reads, a decoder that writes, and what all the trained models make."""

from __future__ import annotations

import math

import torch

from gpt4fast.data import load_drums, load_shakespeare
from gpt4fast.data.tokenizer import Tokenizer
from gpt4fast.demo import speed
from gpt4fast.demo.run import Run, curve, fact, figure, save_clips
from gpt4fast.generation import continue_text, longest_copy, word_share
from gpt4fast.generation.audio import sample_audio
from gpt4fast.generation.images import sample_grid
from gpt4fast.generation.video import latent_walk
from gpt4fast.models import DCGANGenerator, Encoder, EncoderDecoder, WaveGANGenerator
from gpt4fast.training.finetune import continuation_loss
from gpt4fast.training.objectives import masked_lm
from gpt4fast.training.pretrain import next_token_loss
from gpt4fast.training.text_presets import shakespeare_decoder, shakespeare_encoder

PROMPTS = (
    ("ROMEO.\n", 0.7),
    ("MACBETH.\nWhat is ", 0.7),
    ("[Enter PORTIA.]\n\nPORTIA.\n", 0.8),
    ("ACT I.\n\nScene I. ", 0.9),
)
SOUNDS = 16


@torch.inference_mode()
def _fill_gaps(encoder: Encoder, tokenizer: Tokenizer, ids: torch.Tensor, length: int) -> dict:
    """How often the encoder guesses masked tokens of held-out text, and how often the commonest token is right."""
    rows = ids[: len(ids) // length * length].view(-1, length)[:64].clone()
    rows[:, 0] = tokenizer.bos_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        masked, labels = masked_lm(rows, tokenizer)
    hidden = labels != -100
    encoder.eval()
    guesses = encoder(torch.where(hidden, tokenizer.mask_id, masked)).logits.argmax(-1)
    right = (guesses == labels)[hidden].float().mean().item()
    commonest = labels[hidden].bincount().max().item() / int(hidden.sum())
    examples = []
    shown = slice(1, 72)
    for row in range(2):
        pieces: list[dict[str, str]] = []
        for token, gap, guess in zip(rows[row, shown], hidden[row, shown], guesses[row, shown], strict=True):
            kind = "" if not gap else "ins" if token == guess else "del"
            text = tokenizer.decode(guess[None] if gap else token[None])
            # a guessed line break would be an underline of nothing
            pieces.append({"kind": kind, "text": text.replace("\n", "⏎") if gap else text})
        examples.append(pieces)
    return {"right": right, "commonest": commonest, "examples": examples}


def encoder(run: Run) -> dict:
    """Step 4: pre-trains the encoder, measures it on held-out text and times it."""
    model, tokenizer, history = shakespeare_encoder(run.folder / "text", run.track("encoder"), run.scale)
    model.save_pretrained(run.folder / "text" / "encoder")
    length = 128
    held_out = tokenizer.encode(load_shakespeare("test"))
    gaps = _fill_gaps(model, tokenizer, held_out, length)
    loss = next_token_loss(model, held_out, tokenizer, length)
    batch = held_out[: 8 * length].view(8, length)
    with torch.inference_mode():
        forward = speed.attention_model(
            "Encoder, inference", f"batch 8, {length} tokens, float32", lambda: model(batch).logits, batch.numel(),
            run.timing,
        )  # fmt: skip
    return {
        "facts": [
            fact("Masked tokens guessed right", f"{100 * gaps['right']:.0f}", "%",
                 f"test split; always the commonest token: {100 * gaps['commonest']:.0f} %"),
            fact("Next token, perplexity", f"{math.exp(loss):.1f}", "",
                 f"test split; a blind guess among all tokens: {tokenizer.vocab_size:,}"),
            fact("Training steps", f"{len(history):,}", "", "every batch has all three objectives"),
        ],
        "curves": [
            curve("encoder-losses", history, {"masked": "masked", "next": "next token", "infill": "missing spans"},
                   "Three objectives, one encoder",
                   "Faint: every step as it was; strong: its moving average. Lower is better.", "loss, nats per token"),
            curve("encoder-validation", history, {"validation_loss": "validation"}, "Held-out text",
                   "Loss of the next token on the validation split, which is not trained on.", "loss, nats per token"),
        ],
        "examples": gaps["examples"],
        "examples_title": "Reading with gaps",
        "examples_note": "Held-out lines with about one token in seven hidden. Blue: guessed right. Red: the encoder "
        "guessed this instead. A token is a word or a piece of one.",
        "speed": [forward],
    }  # fmt: skip


def decoder(run: Run) -> dict:
    """Step 5: adds the decoder, fine-tunes both, and times a training step."""
    folder = run.folder / "text"
    reader = Encoder.from_pretrained(folder / "encoder")
    model, tokenizer, history = shakespeare_decoder(reader, folder, run.track("decoder"), run.scale)
    model.save_pretrained(folder / "decoder")
    held_out = tokenizer.encode(load_shakespeare("test"))
    loss = continuation_loss(model, held_out, tokenizer)
    source, target = held_out[: 8 * 64].view(8, 64), held_out[512:1024].view(8, 64)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        output = model(source, target, labels=target)
        output.loss.backward()
        return output.loss.detach()

    model.eval()  # no dropout, so that the two losses can be compared
    timed = speed.attention_model(
        "Encoder and decoder, training step", "batch 8, 64 tokens each, forward and backward", step, target.numel(),
        run.timing,
    )  # fmt: skip
    perplexity = f"{math.exp(loss):.1f}"
    return {
        "facts": [
            fact("Continuation, perplexity", perplexity, "", "test split, given the 64 tokens before"),
            fact("Parameters", f"{sum(p.numel() for p in model.parameters()):,}", "", "encoder included"),
            fact("Training steps", f"{len(history):,}"),
        ],
        "curves": [
            curve("decoder-losses", history, {"continuation": "continue", "gaps": "fill gaps"},
                   "Learning to write",
                   "The decoder starts as a copy of the encoder, so it does not start from nothing. Faint: every "
                   "step; strong: its moving average.", "loss, nats per token"),
            curve("decoder-critic", history, {"critic": "discriminator", "adversarial": "decoder"},
                   "The discriminator's half",
                   "It tells hidden states of reading real text from those of reading the decoder's own. Near the "
                   "dashed line it can hardly tell them apart.", "loss", (2 * math.log(2), "a coin toss")),
        ],
        "examples": [],
        "examples_title": "",
        "examples_note": "",
        "speed": [timed],
    }  # fmt: skip


def generation(run: Run) -> dict:
    """Step 6: text, pictures, sounds and a video from what was trained; decoding timed with and without a cache."""
    folder, made = run.folder, run.folder / "generated"
    images = DCGANGenerator.from_pretrained(folder / "digits" / "generator")
    sounds = WaveGANGenerator.from_pretrained(folder / "drums" / "generator")
    model = EncoderDecoder.from_pretrained(folder / "text" / "decoder")
    tokenizer = Tokenizer.load(folder / "text" / "tokenizer.json")
    new_tokens = max(8, round(160 * min(1.0, run.scale)))
    track = run.track("text, pictures, sounds, video")
    texts, parts = [], len(PROMPTS) + 3
    for i, (prompt, temperature) in enumerate(PROMPTS):
        text = continue_text(
            model, tokenizer, prompt, max_new_tokens=new_tokens, temperature=temperature, top_p=0.9, seed=run.seed + i
        )
        caption = f"Temperature {temperature:g}, top-p 0.9, {new_tokens} tokens."
        texts.append({"prompt": prompt, "text": text, "caption": caption})
        track(i + 1, parts, {})
    (made / "text").mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(texts):
        (made / "text" / f"{i}.txt").write_text(sample["prompt"] + sample["text"] + "\n", encoding="utf-8")
    written, corpus = "\n".join(sample["text"] for sample in texts), load_shakespeare("train")
    share, copied = word_share(written, corpus), longest_copy(written, corpus)
    sample_grid(images, 100, run.seed + 1, made / "digits.png", columns=10)
    track(parts - 2, parts, {})
    clips = save_clips(
        folder, "generated/drums", sample_audio(sounds, SOUNDS, run.seed + 1),
        [f"hit {i + 1}" for i in range(SOUNDS)], load_drums("train").sample_rate,
    )  # fmt: skip
    track(parts - 1, parts, {})
    latent_walk(images, made / "walk.gif", seed=run.seed, pictures=16, steps=12)
    source = torch.cat([torch.tensor([tokenizer.bos_id]), tokenizer.encode(load_shakespeare("test"))[:63]])[None]
    timed = speed.decoding(
        "Writing text, token by token", f"batch 1, 64 tokens read, {new_tokens} written", model, source,
        tokenizer.bos_id, new_tokens, run.timing,
    )  # fmt: skip
    track(parts, parts, {})
    tile = fact("Words it writes that occur in the plays", f"{100 * share:.0f}", "%",
                f"longest stretch copied from them: {len(copied)} characters")  # fmt: skip
    return {
        "texts": texts,
        "facts": [tile, fact("Longest stretch copied", f"“{copied.strip()}”".replace("\n", " / "))],
        "grid": figure("generated/digits.png", "A hundred digits", "One random latent vector each."),
        "film": figure("generated/walk.gif", "Video",
                       "A walk in a circle through the latent space: sixteen digits become others, and in the end "
                       "themselves again."),
        "clips": clips,
        "clips_note": f"{len(clips)} hits, also as WAV files in {made.name}/drums.",
        "speed": [timed],
        "tile": tile,
    }  # fmt: skip

"""Decoding with the cache equals one forward of the whole text, however the text is cut and padded."""

from __future__ import annotations

import pytest
import torch

from gpt4fast.models import GPT, GPTConfig


def decode(model, ids, chunks, max_length=None, dtype=None):
    cache = model.make_cache(len(ids), max_length or ids.shape[1], dtype)
    return torch.cat([model(chunk, cache=cache).logits for chunk in ids.split(chunks, dim=1)], dim=1), cache


@pytest.mark.parametrize("chunks", [[15], [1] * 15, [6, 1, 1, 4, 3]], ids=["whole", "token by token", "chunks"])
def test_chunks_equal_the_whole(any_style, randomize, chunks):
    model = randomize(GPT(any_style).double())
    ids = torch.randint(any_style.vocab_size, (3, 15))
    actual, cache = decode(model, ids, chunks, max_length=32)
    torch.testing.assert_close(actual, model(ids).logits, rtol=0, atol=1e-11)
    assert cache.used == 15 and cache.lengths.tolist() == [15] * 3
    assert cache.key.shape == (3, 3, any_style.num_kv_heads, 32, any_style.head_dim)
    assert cache.key[:, :, :, 15:].abs().max() == 0  # room beyond the text is untouched


def test_left_padded_prompts(any_style, randomize):
    model = randomize(GPT(any_style).double())
    texts = [torch.randint(any_style.vocab_size, (1, n)) for n in (9, 4, 7)]
    prompt, real = torch.full((3, 6), 60), torch.zeros(3, 6, dtype=torch.bool)
    for b, text in enumerate(texts):
        n = text.shape[1] - 3  # the prompt is all but the last three tokens
        prompt[b, 6 - n :], real[b, 6 - n :] = text[0, :n], True
    cache = model.make_cache(3, 9)
    steps = [model(prompt, attention_mask=real, cache=cache).logits]
    for t in (-3, -2, -1):
        steps.append(model(torch.stack([text[0, t : t + 1 or None] for text in texts]), cache=cache).logits)
    actual = torch.cat(steps, dim=1)
    for b, text in enumerate(texts):
        torch.testing.assert_close(actual[b, 9 - text.shape[1] :], model(text).logits[0], rtol=0, atol=1e-11)


def test_right_padded_prompts_and_chunks_give_rows_of_different_lengths(any_style, randomize):
    model = randomize(GPT(any_style).double())
    texts = [torch.randint(any_style.vocab_size, (1, 10)) for _ in range(3)]
    counts = [(5, 2, 1), (2, 4, 1), (3, 1, 1)]  # real tokens of each chunk, per row
    cache = model.make_cache(3, 12)
    outputs = [[] for _ in texts]
    done = [0, 0, 0]
    for step in range(3):
        width = max(count[step] for count in counts)
        ids, real = torch.full((3, width), 60), torch.zeros(3, width, dtype=torch.bool)
        for b, text in enumerate(texts):
            n = counts[b][step]
            ids[b, :n], real[b, :n] = text[0, done[b] : done[b] + n], True
            done[b] += n
        logits = model(ids, attention_mask=real, cache=cache).logits
        for b in range(3):
            outputs[b].append(logits[b, real[b]])
    assert cache.lengths.tolist() == done == [8, 7, 5]
    for b, text in enumerate(texts):
        expected = model(text[:, : done[b]]).logits[0]
        torch.testing.assert_close(torch.cat(outputs[b]), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(any_style, dtype):
    model = GPT(any_style).to(dtype)
    ids = torch.randint(any_style.vocab_size, (2, 12))
    actual, cache = decode(model, ids, [5, 1, 6])
    assert cache.key.dtype == dtype
    assert cache.rotary is None or cache.rotary[0][0].dtype == torch.float32
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(actual, model(ids).logits, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stored", "largest", "step"), [(torch.int8, 127, 1), (torch.float8_e4m3fn, 448, 32)], ids=str)
def test_rounded_cache(any_style, stored, largest, step, dtype):
    model = GPT(any_style).to(dtype)
    ids = torch.randint(any_style.vocab_size, (2, 12))
    actual, cache = decode(model, ids, [5, 1, 6], dtype=stored)
    assert cache.key.dtype == cache.value.dtype == stored and actual.dtype == dtype
    assert (cache.key.float().abs().amax(-1) == largest).all()
    expected, whole = decode(model, ids, [5, 1, 6])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * step**0.5)
    # Later layers differ by what the rounding did to earlier ones.
    steps = cache.scales[0][0].unsqueeze(-1) * step  # the longest, of float8
    assert (
        (cache.key[0].float() * cache.scales[0][0].unsqueeze(-1) - whole.key[0].float()).abs()
        <= 0.51 * steps + 0.01 * (dtype == torch.bfloat16)
    ).all()


def test_rotary_models_decode_beyond_the_length_they_were_made_for():
    model = GPT(GPTConfig.llama(vocab_size=61, max_length=8, num_layers=1, num_heads=2, embed_dim=16)).double()
    ids = torch.randint(61, (1, 12))
    actual, _ = decode(model, ids, [8, 4])
    model.config.max_length = 12
    torch.testing.assert_close(actual, model(ids).logits, rtol=0, atol=1e-11)


def test_wrong_uses_are_named():
    model = GPT(GPTConfig.gpt2(vocab_size=61, max_length=16, num_layers=1, num_heads=2, embed_dim=16))
    with pytest.raises(ValueError, match="max_length is 17, more than the 16 learned positions"):
        model.make_cache(1, 17)
    with pytest.raises(ValueError, match="batch must be a positive int, got 0"):
        model.make_cache(0, 8)
    with pytest.raises(
        ValueError, match="dtype must be one of None, torch.float32, torch.int8, torch.float8_e4m3fn, got torch.int16"
    ):
        model.make_cache(1, 8, torch.int16)
    cache = model.make_cache(2, 6)
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="input_ids has 1 rows, the cache was made for 2"):
        model(ids[:1], cache=cache)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens of at most 6; 4 more do not fit"):
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="only the first chunk may be padded on the left"):
        model(ids[:, :2], attention_mask=torch.tensor([[True, True], [False, True]]), cache=cache)
    assert cache.used == 4 and cache.lengths.tolist() == [4, 4]  # a refused call leaves the cache as it was


def test_gradients_stop_at_the_cache_but_decoding_with_grad_mode_on_works():
    model = GPT(GPTConfig.llama(vocab_size=61, max_length=16, num_layers=2, num_heads=2, embed_dim=16))
    actual, cache = decode(model, torch.randint(61, (2, 6)), [3, 3])
    actual.sum().backward()
    assert not cache.key.requires_grad
    assert model.stack.blocks[0].attention.qkv.weight.grad is None

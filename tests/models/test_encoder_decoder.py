"""EncoderDecoder: cross attention by hand, the encoder reused, decoding with the cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gpt4fast.models import Encoder, EncoderConfig, EncoderDecoder, EncoderDecoderConfig, GPTConfig

SMALL = {"vocab_size": 61, "max_length": 24, "num_layers": 2, "num_heads": 4, "embed_dim": 32}
CONFIGS = {
    "shared": EncoderDecoderConfig(EncoderConfig(**SMALL)),
    "llama": EncoderDecoderConfig(
        EncoderConfig(**SMALL, norm="rms", positions="rotary", mlp="swiglu", bias=False, num_kv_heads=2)
    ),
    "different": EncoderDecoderConfig(
        EncoderConfig(**SMALL),
        GPTConfig.llama(vocab_size=47, max_length=24, num_layers=3, num_heads=2, num_kv_heads=1, embed_dim=24),
        share_embeddings=False,
    ),
}


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def model(request, randomize):
    return randomize(EncoderDecoder(CONFIGS[request.param]).double())


def inputs(model, length=11):
    ids, mask = torch.randint(61, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4], mask[2, 6:] = False, False  # padded left, not at all, right
    return ids, mask, torch.randint(model.config.decoder.vocab_size, (3, length))


def test_decoder_equals_gpt_with_cross_attention_by_hand(model):
    ids, mask, target = inputs(model)
    config = model.config.decoder
    memory = model.encoder.encode(ids, attention_mask=mask)
    added = []

    def plain_cross_attention(module, args):  # what each block adds from the encoder, from its very input
        x, _, _ = args
        q = module.query(x).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        k, v = module.key_value(memory).chunk(2, -1)
        k, v = (t.unflatten(-1, (config.num_kv_heads, -1)).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], enable_gqa=True)
        added.append(module.out(y.transpose(1, 2).flatten(2)))

    def compare(module, args, output):
        torch.testing.assert_close(output, added[-1], rtol=0, atol=1e-11)

    for block in model.decoder.blocks:
        block.cross_attention.register_forward_pre_hook(plain_cross_attention)
        block.cross_attention.register_forward_hook(compare)
    model(ids, target, attention_mask=mask)
    assert len(added) == config.num_layers and all(y.abs().max() > 0.01 for y in added)


def test_each_row_is_what_it_would_be_alone(model):
    ids, mask, target = inputs(model)
    together = model(ids, target, attention_mask=mask).logits
    for b in range(3):
        alone = model(ids[b : b + 1, mask[b]], target[b : b + 1]).logits
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 6]], ids=["whole", "token by token", "chunks"])
def test_cached_decoding_equals_the_whole(model, chunks):
    ids, mask, target = inputs(model)
    expected = model(ids, target, attention_mask=mask)
    cache = model.make_cache(3, 11)
    runs = []
    model.encoder.register_forward_hook(lambda *_: runs.append("forward"))
    model.encoder.stack.register_forward_hook(lambda *_: runs.append("encode"))
    steps = [model(ids, target[:, : chunks[0]], attention_mask=mask, cache=cache)]
    torch.testing.assert_close(steps[0].encoder_output, expected.encoder_output, rtol=0, atol=0)
    for chunk in target[:, chunks[0] :].split(chunks[1:], dim=1) if chunks[1:] else ():
        steps.append(model(None, chunk, cache=cache))
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), expected.logits, rtol=0, atol=1e-11)
    assert runs == ["encode"]  # once, whatever the number of steps


def test_encoder_output_is_taken_instead_of_running_the_encoder(model):
    ids, mask, target = inputs(model)
    first = model(ids, target, attention_mask=mask)
    model.encoder = None
    again = model(None, target, attention_mask=mask, encoder_output=first.encoder_output)
    assert torch.equal(again.logits, first.logits)


def test_padded_decoder_rows(model):
    ids, mask, target = inputs(model)
    real = torch.ones(3, 11, dtype=torch.bool)
    real[1, :5] = False
    padded = model(ids, target, attention_mask=mask, decoder_attention_mask=real).logits
    alone = model(ids[1:2], target[1:2, 5:]).logits
    torch.testing.assert_close(padded[1, 5:], alone[0], rtol=0, atol=1e-11)


def test_a_given_encoder_is_the_encoder(randomize):
    encoder = randomize(Encoder(EncoderConfig(**SMALL)))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = EncoderDecoder(EncoderDecoderConfig(encoder.config), encoder)
    assert model.encoder is encoder
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    embedding = encoder.stack.tokens.weight
    assert (
        model.decoder.tokens.weight is embedding and model.head.weight is embedding and encoder.head.weight is embedding
    )
    ids = torch.randint(61, (2, 5))
    model(ids, ids, ids).loss.backward()
    assert encoder.stack.blocks[0].mlp.up.weight.grad.abs().max() > 0  # training goes on into it


def test_loss_is_cross_entropy(model):
    ids, mask, target = inputs(model)
    labels = target.roll(-1, 1)
    labels[:, -1] = -100
    output = model(ids, target, labels, attention_mask=mask)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))


def test_initial_values():
    sizes = {**SMALL, "num_layers": 9, "embed_dim": 128}
    model = EncoderDecoder(EncoderDecoderConfig(EncoderConfig(**sizes)))
    encoder, decoder = model.encoder.stack.blocks[4], model.decoder.blocks[4]
    for weight, std in (
        (encoder.attention.qkv.weight, 0.02),
        (encoder.attention.out.weight, 0.02 / 18**0.5),
        (model.encoder.transform.weight, 0.02),
        (decoder.cross_attention.key_value.weight, 0.02),
        (decoder.cross_attention.out.weight, 0.02 / 27**0.5),  # three writers to the stream in each block
        (decoder.mlp.down.weight, 0.02 / 27**0.5),
        (model.decoder.tokens.weight, 0.02),
    ):
        assert abs(weight.std().item() / std - 1) < 0.06


def test_learns_to_copy():
    model = EncoderDecoder(
        EncoderDecoderConfig(EncoderConfig(vocab_size=12, max_length=8, num_layers=1, num_heads=2, embed_dim=32))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        text = torch.randint(1, 12, (32, 4))
        loss = model(text, F.pad(text[:, :-1], (1, 0)), text).loss  # starts from token 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.3 and losses[-1] < 1.8  # blind to the encoder, it would stay at log(11) = 2.4


def test_compiles_without_graph_breaks():
    model = EncoderDecoder(CONFIGS["shared"])
    ids = torch.randint(61, (2, 6))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, ids, ids).loss, model(ids, ids, ids).loss)


def test_wrong_uses_are_named():
    config = EncoderDecoderConfig(EncoderConfig(**SMALL))
    with pytest.raises(
        ValueError, match="share_embeddings needs equal vocab_size, got 61 in encoder and 62 in decoder"
    ):
        EncoderDecoderConfig(EncoderConfig(**SMALL), GPTConfig(**{**SMALL, "vocab_size": 62}))
    with pytest.raises(
        ValueError, match="encoder has the configuration .*num_layers=1.*, but config.encoder is .*num_layers=2"
    ):
        EncoderDecoder(config, Encoder(EncoderConfig(**{**SMALL, "num_layers": 1})))
    model, ids = EncoderDecoder(config), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(
        ValueError, match="input_ids is None, and neither encoder_output nor a cache past its first step"
    ):
        model(None, ids)
    with pytest.raises(ValueError, match=r"encoder_output must be \(2, S, 32\) .*, got \(3, 5, 32\)"):
        model(None, ids, encoder_output=torch.zeros(3, 5, 32))
    with pytest.raises(ValueError, match="decoder_input_ids has length 25, more than max_length = 24"):
        model(ids, torch.zeros(2, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must have the shape of decoder_input_ids"):
        model(ids, ids, ids[:, :3])
    with pytest.raises(ValueError, match="decoder_attention_mask must mark one unbroken run"):
        model(ids, ids, decoder_attention_mask=torch.tensor([[1, 0, 0, 1]] * 2))

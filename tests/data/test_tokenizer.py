from __future__ import annotations

import pytest
import torch

from gpt4fast.data.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXT = "the cat sat on the mat; the rat ate the oat. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXT, 300)


@pytest.mark.parametrize("text", ["", "the cat", "Ünïcödé 中文 🙂\n\n\ttabs  ", "<mask><pad>", "\0\x7f"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.long and ids.dim() == 1
    assert tokenizer.decode(ids) == text
    assert (ids >= tokenizer.special_count).all()


def test_it_compresses_what_it_was_trained_on(tokenizer):
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert 262 < tokenizer.vocab_size <= 300


def test_special_tokens(tokenizer):
    ids = tokenizer.encode("cat", bos=True, eos=True)
    assert ids[0] == tokenizer.bos_id == 1 and ids[-1] == tokenizer.eos_id == 2
    assert tokenizer.decode(ids) == "cat"
    named = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.gap_id]
    assert [*named, tokenizer.generated_id] == list(range(len(SPECIAL_TOKENS)))


def test_batch_is_padded_on_the_left(tokenizer):
    ids, mask = tokenizer.encode_batch(["the cat sat", "a", ""], bos=True)
    assert mask.sum(1).tolist() == [len(tokenizer.encode(text)) + 1 for text in ("the cat sat", "a", "")]
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert mask[:, -1].all() and ids[2, -1] == tokenizer.bos_id
    assert [tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)] == ["the cat sat", "a", ""]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "deep" / "tokenizer.json")
    assert torch.equal(loaded.encode("the rat <mask>"), tokenizer.encode("the rat <mask>"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]


def test_training_is_repeatable():
    assert Tokenizer.train(TEXT, 300).backend.to_str() == Tokenizer.train([TEXT], 300).backend.to_str()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="vocab_size"):
        Tokenizer.train(TEXT, 100)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.json")
    import tokenizers

    with pytest.raises(ValueError, match="<pad>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))

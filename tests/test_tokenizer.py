"""Token ids are those of transformers' CLIPTokenizer."""

import pytest
import tiny_pipelines
import transformers
from tokenizers import AddedToken

from sdfast import loading
from sdfast.tokenizer import CLIPTokenizer


def special(content):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


TOKENIZER_SETTINGS = {
    "sd1": {"bos_token": {"__type": "AddedToken", **special("<|startoftext|>")}},
    "sd2": {"pad_token": "!"},
    "listed": {"pad_token": "!", "added_tokens_decoder": {"0": {**special("!"), "special": True}}},
    "inversion": {"added_tokens_decoder": {"531": {**special("<cat-toy>"), "special": False}}},
}


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("settings", TOKENIZER_SETTINGS)
def test_tokenizer_is_transformers(tmp_path, settings, saved_again):
    folder = tiny_pipelines.write_tokenizer(tmp_path / "old", settings=TOKENIZER_SETTINGS[settings])
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    if saved_again:  # as tokenizer.json
        folder = tmp_path / "new"
        reference.save_pretrained(folder)
    texts = [
        "", "Seven AND sevens", "hello! <|endoftext|> x! !", "Ünï cödé ﬁ 中文 🎉 İß", "it's 42\n\t tabs  ",
        "don't <|startoftext|>The<|ENDOFTEXT|>", "a <cat-toy> here", "x" * 200,
    ]  # fmt: skip
    expected = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        assert CLIPTokenizer.from_folder(folder)(texts).equal(expected.input_ids)


def test_tokenizer_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither vocab.json"):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="endoftext"):
        CLIPTokenizer({"a": 0}, [])
    folder = tiny_pipelines.write_tokenizer(tmp_path / "damaged")
    (folder / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        CLIPTokenizer.from_folder(folder)
    vocab = {"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    assert CLIPTokenizer(vocab, [], added_tokens=[AddedToken("zz")])(["a"], max_length=3).shape == (1, 3)


def test_tokenizer_of_the_digits_is_transformers():
    folder = loading.digits_folder() / "tokenizer"
    texts = ["a handwritten seven", "", "7", "THE digit four!", "unknown wörds 123", "nine " * 100]
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = reference(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="longer than"):
        assert CLIPTokenizer.from_folder(folder)(texts).equal(expected)

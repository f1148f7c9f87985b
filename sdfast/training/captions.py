"""What the training pictures are called, and a tokenizer that knows these words.

The tokenizer's files have CLIP's format: 256 byte symbols, the same closing a word ("</w>"), one token
for each merge, begin and end of text. Only the merges are fewer; a word they do not know falls to its
bytes.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from sdfast.tokenizer import MAX_LENGTH, CLIPTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# "{}" is the digit's word or figure.
TEMPLATES = (
    "{}",
    "a {}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "the handwritten digit {}",
    "a picture of a {}",
    "a picture of the digit {}",
    "a drawing of a {}",
    "an image of the number {}",
    "a photo of a handwritten {}",
    "a handwritten {} in white on black",
)

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_PLAIN_COPIES, _STRANGE_COPIES = 4, 2


def captions(digit: int) -> list[str]:
    """What a picture of `digit` is called in training: each template with the word and with the figure."""
    return [template.format(name) for name in (WORDS[digit], str(digit)) for template in TEMPLATES]


def caption_ids(tokenizer: CLIPTokenizer, seed: int) -> Tensor:
    """Tokenized captions of each digit to draw from, (10, K, 77) int64.

    A third of them has a word of random letters inserted, so that the text encoder learns to overlook
    what it does not know and "a beautiful seven" still is a seven.
    """
    source = random.Random(seed)

    def with_stranger(caption: str) -> str:
        words = caption.split()
        stranger = "".join(source.choices(string.ascii_lowercase, k=source.randint(2, 9)))
        words.insert(source.randint(0, len(words)), stranger)
        return " ".join(words)

    rows = []
    for digit in range(10):
        plain = captions(digit)
        strange = [with_stranger(caption) for caption in plain * _STRANGE_COPIES]
        rows.append(tokenizer(plain * _PLAIN_COPIES + strange))
    return torch.stack(rows)


def write_tokenizer(folder: str | Path) -> int:
    """Write the files of a CLIP tokenizer; the same bytes every time.

    Returns:
        The size of the vocabulary. The last two ids are begin and end of text.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bytes_ = _byte_symbols()
    merges = _learn_merges()
    tokens = [*bytes_, *(symbol + "</w>" for symbol in bytes_), *(left + right for left, right in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*tokens, _BEGIN, _END]))}
    special = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)
    return len(vocab)


def _learn_merges() -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word of the captions is one token, best first."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([text for digit in range(10) for text in captions(digit)], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _byte_symbols() -> list[str]:
    """A character for each byte, in the order of GPT-2 and CLIP: printable bytes first, as themselves."""
    printable = [chr(byte) for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    return printable + [chr(256 + i) for i in range(256 - len(printable))]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

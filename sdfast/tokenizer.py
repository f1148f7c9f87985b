"""CLIP's tokenizer: text to 77 token ids, equal to transformers' CLIPTokenizer.

    lower-case -> words, digits, punctuation -> bytes -> byte-pair merges, "</w>" closing each word
    ids = [begin of text] + at most 75 tokens + [end of text] + padding

The merging is done by the `tokenizers` library; this file says what CLIP's rules are. That library takes as
long to import as all of sdfast, so that it is when the first tokenizer is made.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

MAX_LENGTH = 77  # CLIP's number of positions

# Radford et al. 2021 use this pattern: contractions, runs of letters, single digits, runs of the rest.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_END = "<|endoftext|>"
_DEFAULT_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END}


class CLIPTokenizer:
    """Turns prompts into the (B, 77) ids that CLIPTextEncoder takes.

    Attributes:
        max_length: tokens of a prompt, its begin and end included.
        bos_id, eos_id, pad_id: begin of text, end of text, padding. SD 1.x pads with the end of text,
            SD 2.x with "!"; the tokenizer's own files say which.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        special_tokens: Mapping[str, str | AddedToken] | None = None,
        added_tokens: Iterable[AddedToken] = (),
        max_length: int = MAX_LENGTH,
    ) -> None:
        """
        Args:
            vocab: token -> id.
            merges: pairs in order of priority.
            special_tokens: overrides of bos_token, eos_token, unk_token and pad_token.
            added_tokens: further tokens that no merge may split, say those of a textual inversion.
            max_length: tokens of a prompt, at least 2 for its begin and end.

        Raises:
            ValueError: a special token that is not in the vocabulary, or a bad `max_length`.
        """
        if max_length < 2:
            raise ValueError(f"max_length: got {max_length}, expected at least 2")
        tokens = {**_DEFAULT_TOKENS, **(special_tokens or {})}
        words = {role: str(getattr(token, "content", token)) for role, token in tokens.items()}
        absent = sorted({word for word in words.values() if word not in vocab})
        if absent:
            raise ValueError(
                f"vocab: has no {', '.join(map(repr, absent))}, which the tokenizer's settings name"
            )
        self.max_length = max_length
        self._tokenizer = _clip_tokenizer(vocab, merges, unk_token=words["unk_token"])
        from tokenizers import AddedToken

        special = [token if isinstance(token, AddedToken) else AddedToken(token) for token in tokens.values()]
        self._tokenizer.add_special_tokens([*special, *added_tokens])
        self.bos_id, self.eos_id, self.pad_id = (
            vocab[words[role]] for role in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def from_folder(cls, folder: str | Path, *, pad_token: str | None = None) -> CLIPTokenizer:
        """The tokenizer of a folder.

        Reads vocab.json and merges.txt, or tokenizer.json; tokenizer_config.json and
        special_tokens_map.json where they exist.

        Args:
            folder: of a diffusers or transformers tokenizer.
            pad_token: overrides the one that the files name.

        Raises:
            FileNotFoundError: no vocabulary in `folder`.
            ValueError: a file that cannot be parsed, or a vocabulary without its special tokens.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json", default={})
        added: dict[str, AddedToken] = {}
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = _read_json(folder / "vocab.json")
            merges = _read_merges(folder / "merges.txt")
            listed = config.get("added_tokens_decoder", {}).values()
        elif (folder / "tokenizer.json").is_file():
            whole = _read_json(folder / "tokenizer.json")
            vocab, merges = whole["model"]["vocab"], [_as_pair(merge) for merge in whole["model"]["merges"]]
            listed = whole.get("added_tokens", [])
        else:
            raise FileNotFoundError(f"{folder}: holds neither vocab.json with merges.txt nor tokenizer.json")
        for entry in listed:
            added[entry["content"]] = _as_added_token(entry)
        tokens = {role: config[role] for role in _DEFAULT_TOKENS if config.get(role)}
        # As in transformers: the older file wins, but only where the newer list of tokens is absent.
        if not config.get("added_tokens_decoder"):
            legacy = _read_json(folder / "special_tokens_map.json", default={})
            tokens.update({role: legacy[role] for role in _DEFAULT_TOKENS if legacy.get(role)})
        if pad_token is not None:
            tokens["pad_token"] = pad_token
        special = {role: _as_special_token(token, added) for role, token in tokens.items()}
        # Early exports give no length, which transformers writes as 1e30.
        max_length = min(int(config.get("model_max_length", MAX_LENGTH)), MAX_LENGTH)
        return cls(vocab, merges, special_tokens=special, added_tokens=added.values(), max_length=max_length)

    def __call__(self, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Tokenize.

        Args:
            texts: B prompts.
            max_length: overrides the tokenizer's own.

        Returns:
            (B, max_length) int64. A prompt that does not fit is cut, with a warning that names what was cut.
        """
        length = self.max_length if max_length is None else max_length
        rows = []
        for text in texts:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            room = length - 2
            if len(encoding.ids) > room:
                cut = text[encoding.offsets[room][0] :].strip()
                warnings.warn(f"the prompt is longer than {length} tokens; this part of it was cut: {cut!r}")
            ids = [self.bos_id, *encoding.ids[:room], self.eos_id]
            rows.append(ids + [self.pad_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)


def _clip_tokenizer(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], *, unk_token: str
) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    model = BPE(
        vocab=dict(vocab),
        merges=list(merges),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=unk_token,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _as_special_token(token: str | Mapping[str, Any], added: Mapping[str, AddedToken]) -> str | AddedToken:
    """A special token of the settings, with the spacing rules of its entry in the list of added tokens."""
    content = token if isinstance(token, str) else token["content"]
    return added.get(content, content if isinstance(token, str) else _as_added_token(token))


def _as_added_token(entry: Mapping[str, Any]) -> AddedToken:
    from tokenizers import AddedToken

    flags = {name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
    return AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags)


def _read_json(path: Path, *, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_as_pair(line) for line in lines if line.strip() and not line.startswith("#version")]


def _as_pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split() if isinstance(merge, str) else merge
    return left, right

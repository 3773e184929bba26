"""A checkpoint's own tokenizer: tokenizer.json as it is, or BERT's with the vocabulary of vocab.txt.

transformers 5 makes a BERT's tokenizer anew from its vocabulary, and so loses the rules of tokenizer.json (for capitals, accents
and long words). Here transformers only provides the interface.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer, PreTrainedTokenizerFast

from bert_tickets.errors import UserError, cause
from bert_tickets.files import read_json

SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
SETTINGS = ("model_max_length", "truncation_side", "padding_side")


class OwnTokenizer(PreTrainedTokenizerFast):
    """transformers' interface to a tokenizer. It encodes as that one does, and saves its file unchanged."""

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, bytes], settings: Mapping[str, Any]) -> None:
        super().__init__(tokenizer_object=tokenizer, **settings)
        self._tokenizer = tokenizer  # transformers' copy also makes special tokens of words such as "[CLS]" in a text
        self.files = dict(files)

    def save_pretrained(self, save_directory: Any, **_: Any) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json, which transformers 4 and 5 open."""
        for file, content in self.files.items():
            Path(save_directory, file).write_bytes(content)
        return tuple(self.files)


def load_tokenizer(folder: Path, name: str, config: Any) -> OwnTokenizer:
    """Read the tokenizer in the folder of the checkpoint `name`, and check that it fits BERT and its configuration.

    Raises `UserError` for files that are damaged or missing, ids beyond the model's vocabulary, and a tokenizer that does not
    put [CLS] and [SEP] around texts.
    """
    own, settings, vocabulary = folder / "tokenizer.json", _settings(folder), folder / "vocab.txt"
    try:
        if own.is_file():
            content = own.read_bytes()
            tokenizer = Tokenizer.from_str(content.decode())
        elif vocabulary.is_file():
            tokenizer = _from_vocabulary(vocabulary, name, settings)
            content = tokenizer.to_str(pretty=True).encode()
        else:
            raise UserError(f"cannot load a BERT checkpoint from {name}: it has neither tokenizer.json nor vocab.txt")
    except UserError:
        raise
    except Exception as error:
        path = own if own.is_file() else vocabulary
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: {path.name}: {cause(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = _special_tokens(tokenizer, name, settings, config.type_vocab_size)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has token ids up to {largest} ({tokenizer.id_to_token(largest)!r}), and the model's "
            f"vocab_size is {config.vocab_size}: no match"
        )
    kept = {key: settings[key] for key in SETTINGS if settings.get(key) is not None} | special
    kept["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # of BERT
    saved = json.dumps(_saved_settings(tokenizer, kept), indent=2, ensure_ascii=False) + "\n"
    return OwnTokenizer(tokenizer, {"tokenizer.json": content, "tokenizer_config.json": saved.encode()}, kept)


def _settings(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, with the special tokens of special_tokens_map.json where it has none."""
    values: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            found = read_json(folder / file)
            if not isinstance(found, dict):
                raise UserError(f"{folder / file} is not a JSON object")
            values |= found
    for key in SPECIAL:
        if isinstance(values.get(key), dict):
            values[key] = values[key].get("content")
    return values


def _special_tokens(tokenizer: Tokenizer, name: str, settings: Mapping[str, Any], types: int) -> dict[str, str]:
    """Return the special tokens that are in the vocabulary. [CLS] and [SEP] are those that the tokenizer puts around texts."""
    try:
        one, pair = tokenizer.encode("a"), tokenizer.encode("a", "b")
        a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    except Exception as error:
        raise UserError(f"the tokenizer of {name} cannot encode a word: {cause(error)}") from None
    cls, sep = one.ids[:1], one.ids[-1:]
    if one.ids != [*cls, *a, *sep] or pair.ids != [*cls, *a, *sep, *b, *sep] or cls == sep:
        raise UserError(f"the tokenizer of {name} does not put [CLS] and [SEP] around texts, as BERT's does")
    expected = [0] * (len(a) + 2) + [1] * (len(b) + 1)
    if any(one.type_ids) or (pair.type_ids != expected and (types > 1 or any(pair.type_ids))):
        raise UserError(
            f"the tokenizer of {name} gives the texts of a pair the types {pair.type_ids}, not 0 and 1 as BERT's does"
        )
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.token_to_id(unknown) is None:
        raise UserError(f"the tokenizer of {name} has no {unknown} in its vocabulary, its token for unknown words")
    named = {key: settings.get(key) or default for key, default in SPECIAL.items()}
    named |= {"unk_token": unknown or named["unk_token"], "cls_token": one.tokens[0], "sep_token": one.tokens[-1]}
    return {key: token for key, token in named.items() if tokenizer.token_to_id(token) is not None}


def _saved_settings(tokenizer: Tokenizer, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json. It names BERT's class if that makes the same tokenizer, else the class of any tokenizer."""
    added = {
        str(number): {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    saved = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict(kept) | {"added_tokens_decoder": added}
    model, normalizer = tokenizer.model, tokenizer.normalizer
    if (
        isinstance(model, WordPiece)
        and (model.continuing_subword_prefix, model.max_input_chars_per_word) == ("##", 100)
        and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
        and isinstance(normalizer, BertNormalizer)
        and normalizer.clean_text
    ):
        saved |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        }
    return saved


# ---- vocab.txt ----


def _from_vocabulary(path: Path, name: str, settings: Mapping[str, Any]) -> Tokenizer:
    """Make BERT's tokenizer with the vocabulary of a file. Warns if its normalizer alters entries, so that they never occur."""
    kind = settings.get("tokenizer_class") or "BertTokenizer"
    if kind not in ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"):
        raise UserError(f"the tokenizer of {name} is a {kind}, and it has no tokenizer.json: save it as one")
    words = path.read_text(encoding="utf-8-sig").split("\n")
    while words and not words[-1]:  # blank lines at the end are no tokens
        words.pop()
    vocabulary = {word: number for number, word in enumerate(words)}
    special = {key: settings.get(key) or default for key, default in SPECIAL.items()}
    for key in ("unk_token", "cls_token", "sep_token"):
        if special[key] not in vocabulary:
            raise UserError(f"{path} has no line {special[key]}, the tokenizer's {key}")
    tokenizer = BertTokenizer(
        vocab=vocabulary,
        **{key: _flag(path.parent / "tokenizer_config.json", settings, key, default) for key, default in FLAGS.items()},
        **{key: token if token in vocabulary else None for key, token in special.items()},
    ).backend_tokenizer
    for number, token in sorted(_added(path.parent, settings).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise UserError(f"{path} has {len(words)} lines, and the added token {token.content!r} has the id {number}: no match")
    words = [word.removeprefix("##") for word in words if word not in special.values() and not word.startswith("[unused")]
    altered = [word for word in words if tokenizer.normalizer.normalize_str(word).strip() != word.strip()]
    if altered:
        print(
            f"{path}: {len(altered)} of {len(words)} entries cannot occur, such as {altered[0]!r}: the tokenizer alters them. Is "
            'the vocabulary cased? Then set "do_lower_case": false in tokenizer_config.json'
        )
    return tokenizer


FLAGS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


def _flag(path: Path, settings: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = settings.get(key)
    if value is not None and (isinstance(value, str) or value not in (0, 1)):
        raise UserError(f'{path}: "{key}" is {json.dumps(value)}, not true or false')
    return default if value is None else bool(value)


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens by id that are added to the vocabulary."""
    found = {int(number): AddedToken(**token) for number, token in settings.get("added_tokens_decoder", {}).items()}
    if not found and (folder / "added_tokens.json").is_file():
        found = {number: AddedToken(token) for token, number in read_json(folder / "added_tokens.json").items()}
    return found

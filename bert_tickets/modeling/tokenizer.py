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
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

from bert_tickets.content import TOKENIZERS, first_file
from bert_tickets.errors import UserError, cause
from bert_tickets.files import read_json

SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
BERT_CLASSES = [f"{kind}Tokenizer{fast}" for kind in ("Bert", "DistilBert", "Electra") for fast in ("", "Fast")]  # of equal rules
SETTING_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(SPECIAL, (str, dict)),
    "additional_special_tokens": (list, dict),
    "extra_special_tokens": (list, dict),
    "added_tokens_decoder": (dict,),
    "tokenizer_class": (str,),
    "model_max_length": (int, float),
    "truncation_side": (str,),
    "padding_side": (str,),
}
SAVED = ("model_max_length", "truncation_side", "padding_side")
FLAGS = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}
BERT_RULES: dict[str, dict[str, Any]] = {  # the rules of transformers' BertTokenizer besides its flags
    "model": {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    "normalizer": {"type": "BertNormalizer", "clean_text": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}
# The settings with which vocab.txt alone describes a tokenizer. Other values add rules.
VOCABULARY_ONLY = {"do_basic_tokenize": True, "word_tokenizer_type": "basic"}
VOCABULARY_ONLY |= {"subword_tokenizer_type": "wordpiece", "never_split": [], "auto_map": {}}


class OwnTokenizer(PreTrainedTokenizerFast):
    """transformers' interface to a tokenizer. It encodes as that one does, and saves its file unchanged."""

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        super().__init__(tokenizer_object=tokenizer, **settings)
        self._tokenizer = tokenizer  # transformers' copy also makes special tokens of words such as "[CLS]" in a text
        self.files = dict(files)

    def save_pretrained(self, save_directory: Any, **_: Any) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json, which transformers 4 and 5 open."""
        for file, content in self.files.items():
            Path(save_directory, file).write_bytes(content.encode())
        return tuple(self.files)


def load_tokenizer(folder: Path, name: str, config: Any) -> OwnTokenizer:
    """Read the tokenizer in the folder of the checkpoint `name`. Raises `UserError` unless it is sound, and fits its BERT."""
    file = first_file(folder, TOKENIZERS)
    if file is None:
        raise UserError(f"cannot load a BERT checkpoint from {name}: it has neither tokenizer.json nor vocab.txt")
    try:
        settings = _settings(folder)
        content = file.read_text(encoding="utf-8-sig") if file.suffix == ".json" else _from_vocabulary(file, settings)
        tokenizer = Tokenizer.from_str(content)
        side = (tokenizer.truncation or {}).get("direction")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = _special_tokens(tokenizer, name, settings, config)
        kept: dict[str, Any] = {"truncation_side": side or "right"}
        kept |= {key: settings[key] for key in SAVED if settings.get(key) is not None} | special
        kept["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # of BERT
        saved = json.dumps(_class(tokenizer, settings, special) | kept, indent=2, ensure_ascii=False) + "\n"
        own = OwnTokenizer(tokenizer, {"tokenizer.json": content, "tokenizer_config.json": saved}, kept)
        own("a")  # raises for unusable settings
        whole = {str(token) for token in [*tokenizer.get_added_tokens_decoder().values(), *map(settings.get, SPECIAL)]}
        tokens = [*settings["added_tokens_decoder"].values(), *settings["additional_special_tokens"]]
        named = sorted({str(token) for token in tokens} - whole)
        if split := [text for text in named if len(tokenizer.encode(text, add_special_tokens=False).ids) != 1]:
            print(f"{name}: added tokens in its settings that {file.name} lacks are split into pieces: {', '.join(split)}")
    except UserError:
        raise
    except Exception as error:
        what = f"{file.name}, or a setting beside it"
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: {what}: {cause(error)}") from None
    return own


def _settings(folder: Path) -> dict[str, Any]:
    """Read the files of settings, with tokens as `AddedToken`s. The class of the tokenizer may be in config.json."""
    files = [folder / file for file in ("config.json", "tokenizer_config.json", "special_tokens_map.json")]
    model, own, special = (_read(file) for file in files)
    found = own | special | {"tokenizer_class": own.get("tokenizer_class") or model.get("tokenizer_class") or BERT_CLASSES[0]}
    for key, kinds in SETTING_TYPES.items():
        if found.get(key) is not None and not isinstance(found[key], kinds):
            kind = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f'{folder}: the tokenizer\'s "{key}" is {json.dumps(found[key])[:100]}, not a JSON {kind}')
    extra = found.get("additional_special_tokens") or found.get("extra_special_tokens") or []
    found["additional_special_tokens"] = [_token(value) for value in (extra.values() if isinstance(extra, dict) else extra)]
    added = {int(number): _token(token) for number, token in (found.get("added_tokens_decoder") or {}).items()}
    added = added or {number: AddedToken(text) for text, number in _read(folder / "added_tokens.json").items()}
    found["added_tokens_decoder"] = added
    return found | {key: _token(found.get(key) or default) for key, default in SPECIAL.items()}


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file."""
    found = read_json(path) if first_file(path.parent, [path.name]) else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _token(value: str | dict[str, Any]) -> AddedToken:
    fields: dict[str, Any] = value if isinstance(value, dict) else {"content": value}
    return AddedToken(**{"special": True} | {key: field for key, field in fields.items() if key != "__type"})


def _special_tokens(tokenizer: Tokenizer, name: str, settings: Mapping[str, Any], config: Any) -> dict[str, str]:
    """Return the special tokens that are in the vocabulary. [CLS] and [SEP] are those that the tokenizer puts around texts."""
    texts = "a", "ꙮ"  # the second is in hardly any vocabulary
    one, pair = tokenizer.encode(texts[0]), tokenizer.encode(*texts)
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    cls, sep = (one.tokens[:1] + one.tokens[-1:]) or ("", "")
    ids = [tokenizer.token_to_id(cls), *a, tokenizer.token_to_id(sep)]
    types = [*one.type_ids, *pair.type_ids] == [0] * len(ids) * 2 + [1] * (len(b) + 1)
    if cls == sep or (one.ids, pair.ids) != (ids, [*ids, *b, ids[-1]]) or (config.type_vocab_size > 1 and not types):
        raise UserError(
            f"the tokenizer of {name} does not put [CLS] and [SEP] around texts, with types 0 and 1 in a pair, as BERT's does: "
            f"of {texts} it makes {pair.tokens}, with types {pair.type_ids}"
        )
    largest, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    if largest >= config.vocab_size:
        raise UserError(f"the tokenizer of {name} has the id {largest} ({token!r}), no match for vocab_size {config.vocab_size}")
    named = {key: str(settings[key]) for key in SPECIAL} | {"cls_token": cls, "sep_token": sep}
    named["unk_token"] = getattr(tokenizer.model, "unk_token", None) or named["unk_token"]
    return {key: token for key, token in named.items() if tokenizer.token_to_id(token) is not None}


def _class(tokenizer: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    """Return the class that opens the saved files, with its flags: BERT's if it makes the same tokenizer, else that of any."""
    rules = json.loads(tokenizer.to_str())
    same = all(BERT_RULES[part].items() <= (rules[part] or {}).items() for part in BERT_RULES)
    same = same and tokenizer.encode("a", "a").type_ids[-1] == 1
    bert = same and settings["tokenizer_class"] in BERT_CLASSES and special.keys() == SPECIAL.keys()
    known = (rules["normalizer"] or {}) | (rules["pre_tokenizer"] or {})
    flags = {key: known[rule] for key, rule in (FLAGS | {"add_prefix_space": "add_prefix_space"}).items() if rule in known}
    return {"tokenizer_class": "BertTokenizer" if bert else "PreTrainedTokenizerFast"} | flags


def _from_vocabulary(path: Path, settings: Mapping[str, Any]) -> str:
    """Make BERT's tokenizer with the vocabulary of a file. Warns if its normalizer alters entries, so that they never occur."""
    rules = {key: settings[key] for key, value in VOCABULARY_ONLY.items() if settings.get(key) not in (None, value)}
    if rules or settings["tokenizer_class"] not in BERT_CLASSES:
        rules["tokenizer_class"] = settings["tokenizer_class"]
        raise UserError(f"{path} alone does not describe this tokenizer ({json.dumps(rules)}): save it as tokenizer.json")
    options: dict[str, Any] = {key: settings[key] for key in SPECIAL}
    for key, rule in FLAGS.items():
        if (value := settings.get(key)) not in (None, 0, 1):
            raise UserError(f'{path.parent}: the tokenizer\'s "{key}" is {json.dumps(value)}, not true or false')
        options |= {} if value is None else {rule: bool(value)}
    words = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")  # blank lines at the end are no tokens
    tokenizer = BertWordPieceTokenizer({word: number for number, word in enumerate(words)}, **options)
    special = {str(token): token for token in [options[key] for key in SPECIAL] + settings["additional_special_tokens"]}
    tokenizer.add_tokens([token for text, token in special.items() if tokenizer.token_to_id(text) is not None])
    for number, token in sorted(settings["added_tokens_decoder"].items()):
        tokenizer.add_tokens([special.get(str(token), token)])
        if tokenizer.token_to_id(str(token)) != number:
            raise UserError(f"{path} has {len(words)} lines, and the added token {str(token)!r} has the id {number}: no match")
    whole = {str(token) for token in tokenizer.get_added_tokens_decoder().values()}
    words = [word.removeprefix("##") for word in words if word not in whole and not word.startswith("[unused")]
    if altered := [word for word in words if tokenizer.normalize(word).strip() != word.strip()]:
        print(
            f"{path}: {len(altered)} of {len(words)} entries cannot occur, such as {altered[0]!r}: the tokenizer alters them. Is "
            'the vocabulary cased? Then set "do_lower_case": false in tokenizer_config.json'
        )
    return tokenizer.to_str(pretty=True)

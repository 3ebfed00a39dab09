"""Damaged or foreign models: runs, checkpoints, tokenizers, published folders, adapters, encoded corpora, indices."""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import tokenizers

from r3jax.run.checkpoint import DESCRIPTION
from tests.mistakes.world import Mistake, code, command

BAD = pathlib.Path("bad")
TOKENIZER = "tokenizer/tokenizer.json"
CHECKPOINT = f"checkpoints/sft/2/{DESCRIPTION}"
Change = Callable[[pathlib.Path], None]  # of one file


def _damaged(
    what: str, good: str, file: str, how: str, change: Change, words: str, says: str, early: bool = True
) -> Mistake:
    """`words` about a copy of `good`, called `what`, in which one file was changed."""

    def spoil() -> None:
        shutil.copytree(good, BAD)
        change(BAD / file)

    return command(words, says, spoil, f"{file} of {what} {how}: {code(words)}", early)


def _text(content: str) -> Change:
    return lambda path: path.write_text(content)


def _json(**changes) -> Change:
    """Of a JSON object's fields, one level down where `__` says so; ... takes a field away."""

    def change(path: pathlib.Path) -> None:
        content = json.loads(path.read_text())
        for key, value in changes.items():
            *groups, leaf = key.split("__")
            inner = functools.reduce(lambda found, name: found[name], groups, content)
            inner[leaf] = value
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return change


def _cut(path: pathlib.Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def _flip(path: pathlib.Path) -> None:
    """One bit of the last digit, so that it is still JSON: what ends the file is the checksum."""
    raw = bytearray(path.read_bytes())
    raw[max(i for i, byte in enumerate(raw) if chr(byte).isdigit())] ^= 1
    path.write_bytes(raw)


def _no_chat_tokens(path: pathlib.Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))


def _one_more(path: pathlib.Path) -> None:
    words = tokenizers.Tokenizer.from_file(str(path))
    words.add_tokens(["more"])
    words.save(str(path))


def _objects(path: pathlib.Path) -> None:
    np.save(path, np.array([{"any": "object"}]), allow_pickle=True)


_gone = pathlib.Path.unlink
_ENCODE = "encode bad data out"
_EVALUATE = "evaluate bad"
_SEARCH = "search bad query --no-reasoning"
_RUN = [
    ("config.json", "deleted", _gone, _EVALUATE, "there is no bad/config.json; name the folder of a run"),
    ("config.json", "= `{`", _text("{"), _EVALUATE, "bad/config.json is not a saved config ("),
    ("config.json", "= `[]`", _text("[]"), _EVALUATE, "bad/config.json is not a saved config; name the folder"),
    ("config.json", '= `{"seed": 0}`', _text('{"seed": 0}'), _EVALUATE, "--workdir: bad is not the folder of a run"),
    ("config.json", "with vocab 300", _json(model__vocab=300), _EVALUATE, "config.model.vocab"),
    (TOKENIZER, "deleted", _gone, _ENCODE, "bad/tokenizer/tokenizer.json is missing; give the folder of a run"),
    (TOKENIZER, "= `{}`", _text("{}"), _ENCODE, "tokenizer.json is not a tokenizer file ("),
    (TOKENIZER, "without chat tokens", _no_chat_tokens, _ENCODE, "the tokenizer has no <|endoftext|> and no <|im_st"),
    (
        "checkpoints",
        "removed",
        shutil.rmtree,
        "evaluate --workdir=bad",
        "bad holds no checkpoint; train it first or name another",
    ),
]
_CHECKPOINT = [
    ("config.json", "with width 64", _json(model__width=64), _EVALUATE, "does not fit this config: train.params."),
    (CHECKPOINT, "deleted", _gone, _EVALUATE, "is damaged: "),
    (CHECKPOINT, "cut short", _cut, _EVALUATE, "is damaged: "),
    (CHECKPOINT, "with a bit flipped", _flip, _EVALUATE, "its description does not match its checksum; remove it"),
    (CHECKPOINT, "with a bit flipped", _flip, _ENCODE, "its description does not match its checksum; remove it"),
    (CHECKPOINT, "with a bit flipped", _flip, "convert export bad out", "its description does not match its checksum"),
]
_PUBLISHED = [
    ("config.json", "deleted", _gone, "bad holds no config.json; give a folder with a Qwen-2.5 checkpoint"),
    ("config.json", "= `{`", _text("{"), "bad/config.json cannot be read ("),
    ("config.json", "= `[]`", _text("[]"), "bad/config.json is not a model's config"),
    (
        "config.json",
        "of another model",
        _json(architectures=["LlamaForCausalLM"]),
        "the architecture ['LlamaForCausalLM'] is not",
    ),
    (
        "config.json",
        "with a sliding window",
        _json(use_sliding_window=True),
        'sliding window ("use_sliding_window") is',
    ),
    ("config.json", "with quantised weights", _json(quantization_config={"bits": 4}), "quanti"),
    ("config.json", "with another rope", _json(rope_scaling={"rope_type": "linear"}), "'linear' is not implemented"),
    ("config.json", "without a size", _json(hidden_size=...), "hidden_size"),
    ("config.json", "with three layers", _json(num_hidden_layers=3), "tensors are missing, the first is 'model.lay"),
    ("config.json", "with other prompts", _json(r3jax={"prompts": 3}), '"r3jax" does not hold prompts and lengths'),
    ("model.safetensors", "deleted", _gone, "bad holds no *.safetensors"),
    ("model.safetensors", "cut short", _cut, "bad/model.safetensors cannot be read ("),
    (
        "model.safetensors.index.json",
        "that leads out of the folder",
        _text('{"weight_map": {"x": "../x.safetensors"}}'),
        "bad/model.safetensors.index.json is not an index of safetensors files",
    ),
    ("tokenizer.json", "deleted", _gone, "bad/tokenizer.json is missing"),
    ("tokenizer.json", "without chat tokens", _no_chat_tokens, "the tokenizer has no <|endoftext|> and no <|im_st"),
    ("tokenizer.json", "with a token more", _one_more, "bad has 512 embedding rows for the 513 ids of the tokenizer"),
    ("adapter_config.json", "beside it", _text('{"peft_type": "LORA"}'), "bad holds an adapter, not a model"),
]
_ENCODED = [
    ("manifest.json", "deleted", _gone, "INDEX: bad holds no encoded corpus ("),
    ("manifest.json", "= `{`", _text("{"), "INDEX: bad holds no encoded corpus ("),
    ("manifest.json", "of other documents", _json(documents=7), "holds no encoded corpus (its files disagree)"),
    ("vectors.npy", "cut short", _cut, "holds no encoded corpus ("),
    (
        "vectors.npy",
        "= a pickle",
        _objects,
        "holds no encoded corpus (Array can't be memory-mapped: Python objects in d",
    ),
    ("offsets.npy", "deleted", _gone, "holds no encoded corpus ("),
    ("manifest.json", "of another model", _json(model="other"), "bad was encoded with another model; "),
]
_INDEX = [
    ("manifest.json", "= `{}`", _text("{}"), "INDEX: bad holds no encoded corpus ("),
    ("1/index.npz", "cut short", _cut, "INDEX: bad holds no index ("),
    ("1/offsets.npy", "deleted", _gone, "INDEX: bad holds no index ("),
]

MISTAKES = [
    *(_damaged("a run", "run", *row) for row in _RUN),
    *(_damaged("a run", "run", *row, early=False) for row in _CHECKPOINT),
    *(_damaged("an export", "published", *row[:3], _ENCODE, row[3]) for row in _PUBLISHED),
    *(_damaged("an encoded corpus", "vectors", *row[:3], _SEARCH, row[3], early=False) for row in _ENCODED),
    *(_damaged("an index", "index", *row[:3], _SEARCH, row[3], early=False) for row in _INDEX),
]

"""The tokenizer: control tokens never come from text, Qwen-2.5's form, the same ids as transformers."""

import json
import pathlib
import pickle
import subprocess
import sys

import pytest
import tokenizers
import transformers

from r3jax.errors import UserError
from r3jax.text import tokenizer as text

TEXTS = [
    "Start the activity with a specific component",
    "am start -n com.android.settings/.Settings",
    "List all files, 3.14159 of them in 2024!",
    "I'm can't WE'LL\n\n\ttabs  and  spaces \r\n",
    "Ångström naïve café 你好，世界 🙂",
    "cafe\u0301 in decomposed form",
    "",
]


@pytest.fixture(scope="module")
def small():
    return text.train_bpe(TEXTS * 5, 600)


def test_special_tokens_come_last_as_in_qwen(small):
    assert [small.pad_id, small.im_start_id, small.im_end_id, small.embed_id] == [
        small.size - 4,
        small.size - 3,
        small.size - 2,
        small.size - 1,
    ]
    assert small.size <= 600
    assert [small.decode([i], keep_special=True) for i in range(small.size - 4, small.size)] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|embed_token|>",
    ]


def test_vocab_size_counts_every_id():
    assert text.train_bpe(TEXTS * 5, 350).size == 350


@pytest.mark.parametrize("typed", TEXTS)
def test_any_text_survives(small, typed):
    import unicodedata

    assert small.decode(small.encode(typed)) == unicodedata.normalize("NFC", typed)


def test_lower_case_is_a_choice_and_is_kept(tmp_path):
    lower = text.train_bpe(TEXTS * 5, 600, lowercase=True)
    lower.save(tmp_path)
    for tokenizer in (lower, text.load(tmp_path)):
        assert tokenizer.decode(tokenizer.encode("Ångström NAÏVE")) == "ångström naïve"
        assert tokenizer.encode("GIT") == tokenizer.encode("git")
        assert tokenizer.decode([tokenizer.embed_id], keep_special=True) == "<|embed_token|>"


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|embed_token|>"])
def test_control_tokens_in_a_text_stay_text(small, token):
    typed = f"before {token}{token}\nafter"
    control = set(range(small.size - 4, small.size))
    for ids in (small.encode(typed), small.encode_batch([typed])[0]):
        assert not control & set(ids)
        assert small.decode(ids) == typed  # not dropped as special either
    assert small.decode([*small.encode("a"), small.embed_id]) == "a"
    assert small.decode([*small.encode("a"), small.embed_id], keep_special=True) == "a<|embed_token|>"


def test_batch_equals_single(small):
    assert small.encode_batch(TEXTS) == [small.encode(typed) for typed in TEXTS]


def test_roles_are_single_tokens(small):
    ids = [small.encode(role) for role in ("system", "user", "assistant")]
    assert all(len(i) == 1 for i in ids)


def test_training_is_deterministic_across_processes(small, tmp_path):
    code = (
        "import sys, json; from r3jax.text import tokenizer as t; "
        "t.train_bpe(json.load(sys.stdin) * 5, 600).save(sys.argv[1])"
    )
    root = pathlib.Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input=json.dumps(TEXTS), text=True, check=True, cwd=root
    )
    small.save(tmp_path / "here")
    here = (tmp_path / "here" / "tokenizer.json").read_bytes()
    assert here == (tmp_path / "tokenizer.json").read_bytes()


def test_save_and_load(small, tmp_path):
    small.save(tmp_path / "run")
    again = text.load(tmp_path / "run")
    assert (again.size, again.embed_id) == (small.size, small.embed_id)
    assert again.encode_batch([*TEXTS, "<|im_end|>"]) == small.encode_batch([*TEXTS, "<|im_end|>"])
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_a_data_workers_copy_keeps_control_tokens_text(small):
    copy = pickle.loads(pickle.dumps(small))
    typed = "before <|im_end|> after"
    assert copy.im_end_id == small.im_end_id and copy.im_end_id not in copy.encode(typed)
    assert copy.decode(copy.encode(typed)) == typed
    assert copy.encode_batch([*TEXTS, typed]) == small.encode_batch([*TEXTS, typed])


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A Qwen2 tokenizer as transformers builds it: its own normaliser, split rule and special tokens."""
    folder = tmp_path_factory.mktemp("qwen")
    built = transformers.Qwen2Tokenizer().train_new_from_iterator(TEXTS * 5, 400)
    built.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    built.add_tokens(["<tool_call>"])  # in the vocabulary, not special: Qwen-2.5 has it so
    built.save_pretrained(folder)
    return folder


def test_a_checkpoints_tokenizer_gives_the_same_ids_as_transformers(qwen_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(qwen_folder)
    ours = text.load(qwen_folder)
    assert ours.embed_id == len(theirs) and ours.size == len(theirs) + 1  # the first free id
    assert ours.im_end_id == theirs.convert_tokens_to_ids("<|im_end|>")
    for typed in [*TEXTS, "x <tool_call>{}"]:
        assert ours.encode(typed) == theirs.encode(typed)
    typed = "x <|im_end|> y"
    assert ours.encode(typed) == theirs.encode(typed, split_special_tokens=True)


def test_same_split_rule_as_transformers_qwen2(small):
    reference = transformers.Qwen2Tokenizer().backend_tokenizer
    ours = small._inner
    for typed in [*TEXTS, "don't  a1b2\r\n\r\n  x", "\n\n a", "--flag=path/to/file | grep -v '^#' "]:
        assert ours.normalizer.normalize_str(typed) == reference.normalizer.normalize_str(typed)
        assert ours.pre_tokenizer.pre_tokenize_str(typed) == reference.pre_tokenizer.pre_tokenize_str(typed)


def test_an_embed_token_that_is_there_is_kept(qwen_folder, tmp_path):
    text.load(qwen_folder).save(tmp_path)
    assert text.load(tmp_path).size == text.load(qwen_folder).size


def test_mistakes_are_one_sentence(tmp_path, small):
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        text.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        text.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no <\|endoftext\|> and no <\|im_start\|>"):
        text.load(tmp_path)
    for size in (100, 262):
        with pytest.raises(UserError, match=f"vocab_size {size} is too small"):
            text.train_bpe(TEXTS, size)
    with pytest.raises(UserError, match="no text"):
        text.train_bpe([], 600)

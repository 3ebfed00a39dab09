"""The tokenizer: a checkpoint's own, or a small byte-level BPE in Qwen-2.5's form, plus the embed token."""

import os
import pathlib
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as _HFTokenizer

from r3jax.errors import UserError

EMBED_TOKEN = "<|embed_token|>"
PAD_TOKEN, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
# Qwen-2.5's split rule (tokenizer.json of its checkpoints): digits one by one, words with one leading sign.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = 256  # the base alphabet of a byte-level BPE


class Tokenizer:
    """Text to ids and back; `encode` never yields a control token, these come only by their id.

    Attributes:
      size: number of ids (largest id + 1), the embed token included.
      embed_id, im_start_id, im_end_id: ids of <|embed_token|>, <|im_start|>, <|im_end|>.
      pad_id: id of <|endoftext|>.
    """

    def __init__(self, inner: _HFTokenizer):
        """Wraps a tokenizers.Tokenizer, adding the embed token at the first free id if it lacks it.

        Raises UserError when one of Qwen-2.5's chat tokens is missing.
        """
        missing = [token for token in (PAD_TOKEN, IM_START, IM_END) if inner.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"the tokenizer has no {' and no '.join(missing)}; use one of a Qwen-2.5 checkpoint, "
                "or let training build one."
            )
        if inner.token_to_id(EMBED_TOKEN) is None:
            inner.add_special_tokens([AddedToken(EMBED_TOKEN, special=True, normalized=False)])
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # "<|im_end|>" typed by a user is text, not the end of the turn
        self._inner = inner
        self.size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.embed_id: int = inner.token_to_id(EMBED_TOKEN)
        self.im_start_id: int = inner.token_to_id(IM_START)
        self.im_end_id: int = inner.token_to_id(IM_END)
        self.pad_id: int = inner.token_to_id(PAD_TOKEN)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._inner.encode_special_tokens = True  # the library forgets it when a worker unpickles it

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written literally in it are encoded as the characters they are."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of ids; special tokens are left out unless keep_special."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=not keep_special)

    @property
    def lowercase(self) -> bool:
        """Whether texts are read in lower case."""
        return self.encode("A") == self.encode("a")

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of all control tokens, which `encode` never yields."""
        return frozenset(i for i, token in self._inner.get_added_tokens_decoder().items() if token.special)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._inner.to_str(pretty=True)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes folder/tokenizer.json (the Hugging Face format), replacing it in one step."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".tokenizer.json.{os.getpid()}"
        part.write_text(self.to_json(), encoding="utf-8")
        part.replace(folder / "tokenizer.json")


def load(folder: str | pathlib.Path, lowercase: bool = False) -> Tokenizer:
    """Reads folder/tokenizer.json, of a run or a Hugging Face checkpoint; UserError if it cannot be used.

    lowercase: read texts in lower case though the file may not say so: transformers saves it without (`settings`).
    """
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; give the folder of a run or of a Hugging Face checkpoint.")
    try:
        inner = _HFTokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path} is not a tokenizer file ({error}); fetch or build it again.") from None
    try:
        found = Tokenizer(inner)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    if lowercase and not found.lowercase:
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return found


def own_embed_id(folder: str | pathlib.Path) -> int | None:
    """The embed token's id in the tokenizer of a folder; None if there is none, or it has no such token."""
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file() or EMBED_TOKEN not in path.read_text(encoding="utf-8"):
        return None
    return load(folder).embed_id


def train_bpe(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> Tokenizer:
    """Trains a byte-level BPE in Qwen-2.5's form: NFC, its split rule, special tokens last.

    The same texts in the same order give the same file. Each role of the chat template becomes one token,
    because every training text carries them; they are counted once per text.

    Args:
      texts: training texts.
      vocab_size: number of ids wanted, special tokens included; fewer if the texts run out of pairs.
      lowercase: whether texts are read in lower case, which a small vocabulary spends better.

    Raises:
      UserError: vocab_size is too small for the bytes, the roles and the special tokens, or no text is given.
    """
    texts = list(texts)
    if not texts:
        raise UserError("no text to train a tokenizer on; add queries and documents to the data set.")
    specials = [PAD_TOKEN, IM_START, IM_END, EMBED_TOKEN]
    base_size = vocab_size - len(specials)
    too_small = UserError(f"vocab_size {vocab_size} is too small for the bytes and the chat format; use 512 or more.")
    if base_size < _BYTES:
        raise too_small
    inner = _HFTokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=base_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
    )
    inner.train_from_iterator(texts + list(ROLES) * max(len(texts), 100), trainer)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    trained = Tokenizer(inner)
    if any(len(trained.encode(role)) != 1 for role in ROLES):
        raise too_small
    return trained

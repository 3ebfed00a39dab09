"""A model as a Hugging Face folder: for transformers, for sentence-transformers (direct mode) and for r3jax.

Everything is data, no file holds code. Direct mode in sentence-transformers is a chat template by name, `direct`: it
strips the text and puts the fixed chat around it; where a text is cut, sentence-transformers keeps the template's end.
Control tokens that a text spells out are asked to stay text; their ids may then be split in other places than ours.
"""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

from r3jax.model.hugging_face import layout, tensor_of
from r3jax.model.hugging_face_config import MAX_POSITIONS, to_config
from r3jax.model.params import flatten
from r3jax.model.peft import export_adapter
from r3jax.model.qwen2 import ModelConfig
from r3jax.model.tensor_files import INDEX, write_file
from r3jax.text.prompts import ChatFormat
from r3jax.text.settings import Settings
from r3jax.text.tokenizer import EMBED_TOKEN, IM_END, IM_START, PAD_TOKEN

TEMPLATE = pathlib.Path(__file__).parent / "text" / "chat_template.jinja"  # Qwen-2.5-Instruct's own (Apache-2.0)
CARD = pathlib.Path(__file__).parent / "model_card.md"
ADAPTER_CARD = pathlib.Path(__file__).parent / "adapter_card.md"  # up to the prompts, where the other one goes on
PROMPTS = "## Prompts"
DIRECT = "direct"
# As the tokenizers library does, letter by letter; Python's `lower` looks at the whole word (ς).
LOWER = " | map('lower') | join"
# The first that are known to cut a chat without losing its end, and to leave control tokens in a text as text.
REQUIREMENTS = {"sentence-transformers": ">=6.2", "transformers": ">=5.23"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What is written of a run, besides its weights."""

    name: str
    model: ModelConfig
    chat: ChatFormat
    settings: Settings
    evaluation: str  # tables in markdown; "" without any
    warning: str = ""  # what a reader of the card must know first


def fill(folder: pathlib.Path, params, what: Exported, shard_bytes: int) -> None:
    """Writes all files into an empty folder, the weights in files of at most `shard_bytes` each."""
    write_weights(folder, params, what.model, shard_bytes)
    write_config(folder, what)
    t = what.chat.tokenizer
    _json(
        folder / "generation_config.json",
        {
            "bos_token_id": t.pad_id,
            "pad_token_id": t.pad_id,
            "eos_token_id": [t.im_end_id, t.embed_id, t.pad_id],  # a thought ends at the embed token
            "do_sample": False,
        },
    )
    write_tokenizer(folder, what.chat)
    write_sentence_transformers(folder, what)
    (folder / "README.md").write_text(card(what), encoding="utf-8")


def fill_adapter(folder: pathlib.Path, params, what: Exported, base: str) -> None:
    """Writes the adapter that params hold, for PEFT, and what belongs to it, into an empty folder.

    `base` names the checkpoint that it was trained on.
    """
    export_adapter(folder, params, what.model, base)
    write_config(folder, what)
    write_tokenizer(folder, what.chat)
    (folder / "README.md").write_text(adapter_card(what, base), encoding="utf-8")


def write_config(folder: pathlib.Path, what: Exported) -> None:
    """config.json, the settings in it."""
    t = what.chat.tokenizer
    _json(folder / "config.json", to_config(what.model, bos_id=t.pad_id, eos_id=t.im_end_id, pad_id=t.pad_id))
    what.settings.write(folder)


def write_weights(folder: pathlib.Path, params, model: ModelConfig, shard_bytes: int) -> None:
    """Writes params tensor by tensor: the host never holds more of them than one.

    Files are filled in the decoder's order; a tensor larger than `shard_bytes` has one to itself.
    """
    flat, places = flatten(params), layout(model)
    dtype = flat["final_norm/scale"].dtype
    sizes = {key: dtype.itemsize * math.prod(place.theirs) for key, place in places.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        shapes = {key: places[key].theirs for key in keys}
        write_file(folder / name, shapes, dtype, lambda key: tensor_of(flat, places[key]))
    if count > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        _json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def write_tokenizer(folder: pathlib.Path, chat: ChatFormat) -> None:
    """tokenizer.json with the embed token, its config, Qwen's chat template, and the one of direct mode.

    transformers 5 gives every Qwen-2 the tokenizer's rules of Qwen-2.5, lower case not among them: the templates of a
    tokenizer that has it lower their texts themselves.
    """
    chat.tokenizer.save(folder)
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": IM_END,
            "pad_token": PAD_TOKEN,
            "bos_token": None,
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
        },
    )
    own = TEMPLATE.read_text(encoding="utf-8")
    if chat.tokenizer.lowercase:
        for content in ("message.content", "messages[0]['content']"):
            own = own.replace(content, content + LOWER)
    (folder / "chat_template.jinja").write_text(own, encoding="utf-8")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / f"{DIRECT}.jinja").write_text(direct_template(chat), encoding="utf-8")


def direct_template(chat: ChatFormat) -> str:
    """A chat template that renders a user's message as `ChatFormat.documents` does; a system message takes the place
    of the direct prompt.
    """
    lower = LOWER if chat.tokenizer.lowercase else ""
    text = f"messages[-1].content | trim{lower}"
    if lower:  # "<|IM_END|>" must not become a control token by being lowered
        text += "".join(f" | replace('{t}', '< {t[1:]}')" for t in (IM_START, IM_END, EMBED_TOKEN, PAD_TOKEN))
    prompts = (chat.prompts.direct_system, chat.prompts.direct_assistant)
    system, answer = (json.dumps(x, ensure_ascii=False) for x in prompts)  # as Jinja reads strings too
    return (
        "{%- set system = messages[0].content if messages[0].role == 'system' else " + system + " -%}\n"
        f"{{{{- '{IM_START}system\\n' + system{lower} + '{IM_END}\\n' -}}}}\n"
        f"{{{{- '{IM_START}user\\n' + {text} + '{IM_END}\\n' -}}}}\n"
        f"{{{{- '{IM_START}assistant\\n' + {answer}{lower} + '{EMBED_TOKEN}' -}}}}\n"
    )


def write_sentence_transformers(folder: pathlib.Path, what: Exported) -> None:
    """The files that make the folder a SentenceTransformer: direct template, last token, unit length."""
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    extra = what.chat.direct_extra
    _json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": output, "message": {**output, "format": "flat"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"chat_template": {"chat_template": DIRECT, "sanitize_control_tokens": True}},
            "max_seq_length": extra + what.settings.max_doc_tokens,
            "query_length": extra + what.settings.max_query_tokens,
        },
    )
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    _json(folder / "modules.json", modules)
    for path in list(kinds)[1:]:
        (folder / path).mkdir()
    _json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": what.model.width, "pooling_mode_lasttoken": True, "include_prompt": True},
    )
    _json(folder / "2_Normalize" / "config.json", {})  # a hub keeps no empty folder
    _json(
        folder / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine", "requirements": REQUIREMENTS},
    )


def card(what: Exported) -> str:
    """The model card: what it is, how to use it, its prompts, and how it did."""
    return _filled(CARD.read_text(encoding="utf-8"), what)


def adapter_card(what: Exported, base: str) -> str:
    """The card of an adapter: its base, how to use it, its prompts, and how the two did."""
    rest = CARD.read_text(encoding="utf-8")
    return _filled(ADAPTER_CARD.read_text(encoding="utf-8") + rest[rest.index(PROMPTS) :], what, base or "unknown")


def _filled(text: str, what: Exported, base: str = "") -> str:
    """A card with what it says of this model in place of each @NAME@."""
    s, p = what.settings, what.chat.prompts
    values = {
        "NAME": what.name,
        "BASE": json.dumps(base, ensure_ascii=False),
        "LAYERS": what.model.layers,
        "WIDTH": what.model.width,
        "DIRECT_SYSTEM": _fenced(p.direct_system),
        "DIRECT_ANSWER": _fenced(p.direct_assistant + EMBED_TOKEN),
        "REASONING_SYSTEM": _fenced(p.reasoning_system),
        "REASONING_LITERAL": json.dumps(p.reasoning_system, ensure_ascii=False),
        "ANSWER_LITERAL": json.dumps(p.direct_assistant, ensure_ascii=False),
        # A tokenizer of transformers does not lower.
        "LOWER": 'text = "".join(map(str.lower, text))\n    ' if s.lowercase else "",
        "WARNING": f"**{what.warning}**\n\n" if what.warning else "",
        "MAX_QUERY": s.max_query_tokens,
        "MAX_DOC": s.max_doc_tokens,
        "MAX_THOUGHT": s.max_thought_tokens,
        "MAX_NEW": s.max_thought_tokens + 1,
        "EVALUATION": what.evaluation.strip() or "This checkpoint comes from a run that was not evaluated.",
    }
    return re.sub("@([A-Z_]+)@", lambda match: str(values[match[1]]), text)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def _json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

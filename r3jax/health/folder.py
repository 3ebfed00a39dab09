"""Check-ups of an exported folder: what other tools will make of its files, against what r3jax makes of them."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from r3jax import export
from r3jax.health.line import Line
from r3jax.reader import Reader
from r3jax.text import settings, tokenizer
from r3jax.text.tokenizer import EMBED_TOKEN, IM_END

AGAIN = "export the run again"


def folder_lines(folder: pathlib.Path, reader: Reader, max_document: int) -> Iterator[Line]:
    """All check-ups of this room; those of sentence-transformers' files only where there are some."""
    yield embed_token(folder, reader)
    yield own_prompts(folder)
    if (folder / "modules.json").is_file():
        yield direct_template(folder, reader)
        yield pooling(folder)
        yield normalisation(folder)
        yield lengths(folder, reader, max_document)
    if (folder / "generation_config.json").is_file():
        yield stops(folder, reader)


def embed_token(folder: pathlib.Path, reader: Reader) -> Line:
    """tokenizer.json has the token, with a row in the embeddings."""
    own = tokenizer.own_embed_id(folder)
    if own is None:
        return Line("embed token", False, f"tokenizer.json has no {EMBED_TOKEN}", f"others will spell it out; {AGAIN}")
    return Line("embed token", own < reader.model.vocab, f"{EMBED_TOKEN} is id {own} of {reader.model.vocab}", AGAIN)


def own_prompts(folder: pathlib.Path) -> Line:
    """config.json tells r3jax the prompts that the model was trained with."""
    known = settings.read(folder) is not None
    figure = f'config.json {"has" if known else "has no"} "{settings.KEY}"'
    return Line("prompts in config.json", known, figure, f"without it the default prompts are used; {AGAIN}")


def direct_template(folder: pathlib.Path, reader: Reader) -> Line:
    """The template by which sentence-transformers reads is that of our prompts, whole."""
    name = f"additional_chat_templates/{export.DIRECT}.jinja"
    wanted = export.direct_template(reader.chat)
    try:
        found = (folder / name).read_text(encoding="utf-8")
    except OSError:
        return Line("direct template", False, f"{name} is missing", AGAIN)
    if found == wanted:
        return Line("direct template", True, f"{name} renders config.json's direct prompt")
    if wanted.startswith(found.rstrip()):
        return Line("direct template", False, f"{name} is truncated after {len(found)} of {len(wanted)} letters", AGAIN)
    other = json.dumps(reader.chat.prompts.reasoning_system, ensure_ascii=False)
    swapped = json.dumps(reader.chat.prompts.direct_system, ensure_ascii=False) not in found and other in found
    what = "has the prompt that config.json gives for reasoning: they are swapped" if swapped else "has another prompt"
    return Line("direct template", False, f"{name} {what}", f"queries and documents would not meet; {AGAIN}")


def pooling(folder: pathlib.Path) -> Line:
    """The vector is read at the last token that is no padding."""
    found = _json(folder / "1_Pooling" / "config.json")
    modes = [name for name, on in found.items() if name.startswith("pooling_mode_") and on is True]
    mode = found.get("pooling_mode", "lasttoken" if modes == ["pooling_mode_lasttoken"] else ", ".join(modes) or "none")
    well = mode == "lasttoken" and found.get("include_prompt", True) is True
    return Line(
        *("padding side and pooling", well, f"1_Pooling reads {mode}"),
        "only lasttoken finds the embed token before right padding; set it in 1_Pooling/config.json",
    )


def normalisation(folder: pathlib.Path) -> Line:
    """Vectors are made unit length, and compared by cosine."""
    modules = _json(folder / "modules.json", list)
    kinds = [str(m.get("type", "") if isinstance(m, dict) else m).split(".")[-1] for m in modules]
    name = _json(folder / "config_sentence_transformers.json").get("similarity_fn_name")
    well = kinds == ["Transformer", "Pooling", "Normalize"] and name == "cosine"
    figure = f"modules.json has {', '.join(kinds) or 'nothing'}; similarity is {name}"
    return Line("normalisation", well, figure, "it must be Transformer, Pooling, Normalize and cosine; " + AGAIN)


def lengths(folder: pathlib.Path, reader: Reader, max_document: int) -> Line:
    """sentence-transformers cuts texts where r3jax does, and reads them by the direct template."""
    found = _json(folder / "sentence_bert_config.json")
    extra = reader.chat.direct_extra
    wanted = {"max_seq_length": extra + max_document, "query_length": extra + reader.max_query}
    wrong = [f"{name} is {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value]
    template = (found.get("processing_kwargs") or {}).get("chat_template") or {}
    if template.get("chat_template") != export.DIRECT:
        wrong.append(f"the template is {template.get('chat_template')!r}, not {export.DIRECT!r}")
    figure = "; ".join(wrong) or ", ".join(f"{name} {value}" for name, value in wanted.items())
    return Line("lengths", not wrong, figure, f"mend sentence_bert_config.json or {AGAIN}")


def stops(folder: pathlib.Path, reader: Reader) -> Line:
    """Generation elsewhere stops at the embed token."""
    t = reader.chat.tokenizer
    found = _json(folder / "generation_config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    missing = [name for name, i in ((EMBED_TOKEN, t.embed_id), (IM_END, t.im_end_id)) if i not in ids]
    figure = f"eos_token_id is {found}" + (f", without {' and '.join(missing)}" if missing else "")
    return Line(
        "stop tokens", not missing, figure, f"thoughts would run on; add them to generation_config.json or {AGAIN}"
    )


def _json(path: pathlib.Path, kind: type = dict) -> Any:
    """What a file holds; an empty dict or list, whichever it should be, where it cannot be read or holds no such."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()

"""Check-ups of how a model reads: asked of the model itself, on a few texts.

Axes: N texts, D width.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from r3jax.health.line import Line
from r3jax.reader import Reader
from r3jax.text.tokenizer import EMBED_TOKEN, IM_END, IM_START

QUERIES = (
    "how do I list the files of a folder",
    "capital of France",
    "why is the sky blue",
    "symptoms of vitamin D deficiency",
    "python read a csv file without pandas",
    "who wrote Pride and Prejudice",
    "difference between TCP and UDP",
    "best time to plant tomatoes",
    "how does a vaccine work",
    "convert miles to kilometres",
    "what causes inflation",
    "remove a stain of red wine",
    "history of the printing press",
    "train a neural network on a laptop",
    "rules of offside in football",
    "is dark matter real",
    "recipe for a simple bread",
    "how to rename a git branch",
    "treatment of a sprained ankle",
    "when was the Berlin wall built",
)
WHO = "Who are you?"
CHAT_IDS = 100_000  # a vocabulary of fewer was made here: its model has never seen a chat
SAME = {"float32": 0.9999, "bfloat16": 0.999}  # least cosine of one text read in two batches
DRIFT = 0.99  # least cosine of a text read in float32 and in bfloat16
TOKEN_RATE = 0.9


def read_lines(params, reader: Reader, max_document: int, thinks: bool) -> Iterator[Line]:
    """All check-ups of this room. `thinks`: whether the model has the head that thoughts need."""
    yield prompt(reader)
    yield token_under_truncation(reader, max_document)
    yield unit_length(params, reader)
    yield batch_against_single(params, reader)
    yield query_as_document(params, reader, max_document)
    yield dtype_drift(params, reader)
    if thinks:
        yield token_rate(params, reader)
        yield who_are_you(params, reader)
    else:
        yield Line("token emission", None, "the folder has no lm_head.weight, so the model cannot write")


def prompt(reader: Reader) -> Line:
    """The direct chat, verbatim, is Qwen's template around the text, up to one embed token."""
    chat, text = reader.chat, "hello"
    shown = chat.tokenizer.decode(chat.document(text, 8), keep_special=True)
    p = chat.prompts
    wanted = (
        f"{IM_START}system\n{p.direct_system}{IM_END}\n{IM_START}user\n{text}{IM_END}\n"
        f"{IM_START}assistant\n{p.direct_assistant}{EMBED_TOKEN}"
    )
    if chat.tokenizer.lowercase:
        wanted, shown = wanted.lower(), shown.lower()
    fix = f"the tokenizer does not give back {wanted!r}; export with the checkpoint's own tokenizer.json"
    return Line("prompt", shown == wanted, repr(shown), fix)


def token_under_truncation(reader: Reader, max_document: int) -> Line:
    """A text far beyond the limit is cut, and the row still ends at the embed token."""
    chat = reader.chat
    row = chat.document("word " * (4 * max_document), max_document)
    ends = row[-1] == chat.tokenizer.embed_id and len(row) == chat.direct_extra + max_document
    figure = f"a long text gives {len(row)} ids, the last {'is' if ends else 'is not'} {EMBED_TOKEN}"
    return Line("token kept under truncation", ends, figure, "cut the text, never the template around it")


def unit_length(params, reader: Reader) -> Line:
    """Vectors are finite and of length 1."""
    vectors = _read(params, reader)
    lengths = np.linalg.norm(vectors, axis=1)
    well = bool(np.isfinite(vectors).all()) and bool((abs(lengths - 1) < 1e-3).all())
    figure = f"lengths {lengths.min():.4f} to {lengths.max():.4f}"
    return Line("unit length", well, figure, "vectors are lost in an overflow or not normalised; look at the weights")


def batch_against_single(params, reader: Reader) -> Line:
    """A text has the same vector alone and beside longer ones, so padding is read by nobody."""
    texts = [*QUERIES, " ".join(QUERIES[:3]), "a"]
    together = _read(params, reader, texts)
    alone = np.concatenate([_read(params, dataclasses.replace(reader, batch_size=1), [text]) for text in texts])
    least = float(_cosines(together, alone).min())
    fix = "padding reaches the vectors: read at each row's last token, with positions that start at the row"
    bound = SAME[reader.model.compute_dtype]
    return Line("batch against single, padding", least >= bound, f"least cosine {least:.6f} of {len(texts)} texts", fix)


def query_as_document(params, reader: Reader, max_document: int) -> Line:
    """Without reasoning a short query and the same text as a document have the same vector; other texts have not."""
    texts = [text for text in QUERIES if len(reader.chat.tokens([text])[0]) <= min(reader.max_query, max_document)]
    if len(texts) < 2:
        return Line("query and document", None, "all texts are longer than the limits")
    queries = reader.direct(params, texts)
    documents = reader.encode(params, reader.chat.documents(texts, max_document))
    least = float(_cosines(queries, documents).min())
    others = queries @ documents.T
    found = float((others.argmax(1) == np.arange(len(texts))).mean())
    figure = f"least cosine {least:.6f}, {found:.0%} of the texts find themselves first"
    fix = "queries and documents are read by other prompts than one another, or all texts alike"
    return Line("query and document", least >= SAME[reader.model.compute_dtype] and found > 0.9, figure, fix)


def dtype_drift(params, reader: Reader) -> Line:
    """Computing in bfloat16 moves no vector much, and overflows nowhere."""
    vectors = {}
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(reader.model, compute_dtype=dtype)
        vectors[dtype] = _read(params, dataclasses.replace(reader, model=model))
    for dtype, found in vectors.items():
        lost = int((~(np.isfinite(found).all(1) & (np.linalg.norm(found, axis=1) > 0.5))).sum())
        if lost:
            fix = "activations overflow; look for huge weights, and train or export in float32"
            return Line("dtype drift", False, f"{lost} of {len(found)} vectors are lost in {dtype}", fix)
    least = float(_cosines(*vectors.values()).min())
    fix = "give dtype='float32', or train with model.compute_dtype=bfloat16"
    return Line("dtype drift", least >= DRIFT, f"least cosine {least:.5f} between float32 and bfloat16", fix)


def token_rate(params, reader: Reader) -> Line:
    """Thoughts about twenty queries end with the embed token by themselves."""
    with np.errstate(invalid="ignore"):  # of vectors that are lost, other lines tell
        found = reader.reason(params, QUERIES)
    rate = float((found.emitted == 1).mean())
    figure = f"{rate:.0%} of {len(QUERIES)} thoughts end with {EMBED_TOKEN}, {found.tokens.mean():.1f} tokens long"
    fix = "raise max_thought_tokens, look at the reasoning prompt, or train longer with format reward"
    return Line("token emission", rate >= TOKEN_RATE, figure, fix)


def who_are_you(params, reader: Reader) -> Line:
    """An ordinary chat is answered in words and not with the embed token."""
    tokenizer = reader.chat.tokenizer
    if tokenizer.size < CHAT_IDS:
        return Line(WHO, None, f"a model with {tokenizer.size:,} ids has never seen a chat")
    row, start = reader.chat.conversation(WHO, "")
    found = reader.think(params, [row[:start]])
    answer = tokenizer.decode(found.thoughts[0])
    well = bool(answer.strip()) and not found.emitted[0]
    return Line(WHO, well, repr(answer), "chat is forgotten: train with a larger kl_weight, or a low-rank adapter")


def _read(params, reader: Reader, texts=QUERIES) -> np.ndarray:
    return reader.direct(params, texts)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1)

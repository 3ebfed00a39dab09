"""Documents per second beside sentence-transformers: python -m bench.encode [SIZE ...] [--rounds=N]

The bundled commands, strung together to log-normal lengths (median 60 words, at most 256 tokens are read): from texts
to unit vectors, in float32, on the same exported folder. Both sort by length and are asked for batches of 32 (ours
takes fewer long rows at a time on CPU); the two's vectors are compared. The share of the matmul peak counts the
weights' products of all tokens that are no padding, of ours without what it leaves out of the last layer, and the
instruction that all texts begin with once.
"""

import functools
import pathlib
import time

import numpy as np

from bench import models, peaks
from bench.turns import command, in_turns, table, times

DOCUMENTS = {"tiny": 1024, "25m": 192, "0.5b": 32}
BATCH = 32
LABELS = {"ours": "r3jax", "theirs": "sentence-transformers"}


def documents(count: int) -> list[str]:
    """Texts of a realistic mix of lengths."""
    from r3jax.data import beir

    rng = np.random.default_rng(models.SEED)
    words = " ".join(beir.load(models.DATA).doc_texts[: 8 * count]).split()
    sizes = np.clip(rng.lognormal(np.log(60), 0.7, count), 5, 400).astype(int)
    starts = rng.integers(0, len(words) - sizes.max(), count)
    return [" ".join(words[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def measured(folder: str, name: str, encode, count: int):
    """Times `encode` and keeps its vectors beside the model."""
    texts = documents(count)
    np.save(pathlib.Path(folder) / f"{name}.npy", encode(texts))

    def measure() -> dict:
        begin = time.perf_counter()
        encode(texts)
        return {"seconds": time.perf_counter() - begin, "documents": count}

    return measure


def ours(folder: str, count: int):
    from r3jax.model.encoder import encode_rows

    it = models.ours(folder)

    def encode(texts):
        rows = it.chat.documents(texts, 256)
        return encode_rows(it.params, it.model, it.mesh, rows, batch_size=BATCH, heads=it.chat.heads)

    return measured(folder, "ours", encode, count)


def theirs(folder: str, count: int):
    from sentence_transformers import SentenceTransformer

    model = models.in_memory(SentenceTransformer(folder, device="cpu"))
    encode = functools.partial(model.encode_document, batch_size=BATCH, show_progress_bar=False)
    return measured(folder, "theirs", encode, count)


def main(sizes: list[str], rounds: int) -> None:
    peak = peaks.measure()
    print(peaks.sentence(peak), "\n")
    for size in sizes:
        with models.folder(size) as folder:
            options = {"folder": folder, "count": DOCUMENTS[size]}
            found = in_turns("bench.encode", list(LABELS), options, rounds)
            chat = models.chat(folder)
            tokens = sum(map(len, chat.documents(documents(DOCUMENTS[size]), 256)))
            own = tokens - (DOCUMENTS[size] - 1) * len(chat.direct_head)
            made = [pathlib.Path(folder) / f"{name}.npy" for name in LABELS]
            a, b = map(np.load, made) if all(file.exists() for file in made) else (None, None)
        rows = []
        for name, x in found.items():
            if "failure" in x:
                rows.append([LABELS[name], x["failure"], *[""] * 4])
                continue
            computed = {"rows": own, "last": models.last_layer(size)} if name == "ours" else {"rows": tokens}
            flops = sum(models.products(size, **computed).values()) / x["seconds"]
            rows.append(
                [
                    LABELS[name],
                    f"{x['rate']:,.1f}",
                    times(found, name),
                    f"{100 * flops / peak['product']:.0f} %",
                    f"{x['peak'] / 2**30:.2f}",
                    f"{100 * x['spread']:.0f} %",
                ]
            )
        head = [f"{size}, {tokens / DOCUMENTS[size]:.0f} tokens a document", "documents/s", "ours is x times"]
        print(table([*head, "of the matmul peak", "process peak, GiB", "spread"], rows))
        if a is not None:
            print(f"\nleast cosine between the two's vectors: {(a * b).sum(1).min():.6f}")
        print(flush=True)


if __name__ == "__main__":
    command({"ours": ours, "theirs": theirs}, main, ["tiny", "25m"])

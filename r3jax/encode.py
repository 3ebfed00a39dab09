"""Encodes a corpus: every document's search vector, in a folder that numpy can map.

    r3jax encode MODEL DATA OUT [flags]

MODEL is the folder of a run or an exported model, or a hub id. DATA is a folder in BEIR form, a .jsonl file
({"_id", "title", "text"} or a string per line), or plain text with one document per line; a bad line, such as a
document without text, is refused, or left out with --on-error=skip. OUT gets vectors.npy, documents.jsonl, offsets.npy
and manifest.json. A run that was stopped goes on when the same command is given again, and ends with the same bytes;
another model, prompt, length or corpus is refused there. For example:

    r3jax encode runs/rl-tiny data/tldr-commands vectors
    r3jax search vectors "list files by size"
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax

from r3jax import processes
from r3jax.corpus.encoding import check_out, encode_corpus
from r3jax.corpus.identity import identity
from r3jax.data.documents import Documents
from r3jax.model.hub import local_folder
from r3jax.model.sharding import make_mesh
from r3jax.run import command, lock, stop
from r3jax.run.config import run_main
from r3jax.run.peers import Peers
from r3jax.run.progress import progress
from r3jax.search_r3 import SearchR3
from r3jax.text.prompts import ChatFormat

FLAGS = {
    "dtype": "of the vectors: float32 or float16; default: float32",
    "prompt": "system text in place of the model's own for documents",
    "max-length": "tokens of a document that are read; default: as trained",
    "on-error": "strict or skip: leave bad lines out and count them; default: strict",
    "batch-size": "documents read at a time; default: the run's, or 32",
}


def main(argv: list[str]) -> None:
    given = command.read(argv, "r3jax.encode", __doc__, ("MODEL", "DATA", "OUT"), FLAGS)
    source, data, out = given.words
    dtype = given.choice("dtype", ("float32", "float16"), "float32")
    max_length, batch_size = given.whole("max-length"), given.whole("batch-size")
    on_error = given.choice("on-error", ("strict", "skip"), "strict")
    stop.on_term()
    processes.connect()
    with Peers():  # what ends one process ends all
        documents, prompt = Documents(data, on_error=on_error), given.flags["prompt"]
        check_out(pathlib.Path(out))
        command.prepare()
        mesh = make_mesh(devices=jax.local_devices())
        model = SearchR3.from_pretrained(local_folder(source, "MODEL"), max_length, batch_size, mesh=mesh)
        reader, limit = model.reader, model.max_document
        if prompt:
            prompts = dataclasses.replace(reader.chat.prompts, direct_system=prompt)
            reader = dataclasses.replace(reader, chat=ChatFormat(reader.chat.tokenizer, prompts))

        def encode(texts: Sequence[str], on_rows: Callable[[int], None]):
            ids = reader.chat.tokens(texts)
            vectors = reader.encode(model.params, [reader.chat.direct(text[:limit]) for text in ids], on_rows)
            return vectors, sum(len(text) > limit for text in ids)

        known = identity(model.params, reader, limit) | {"batch_size": reader.batch_size}
        with lock.alone(pathlib.Path(out), "OUT"):
            manifest = encode_corpus(
                documents,
                pathlib.Path(out),
                known,
                str(pathlib.Path(source).resolve()) if pathlib.Path(source).is_dir() else source,
                encode,
                reader.model.width,
                dtype,
                progress,
                processes.here(),
            )
        if processes.leads():
            cut = manifest["truncated"]
            read = f"; {cut:,} were longer than {manifest['max_length']} tokens and were cut" if cut else ""
            if manifest.get("skipped"):
                why = f"; the first: {documents.first_skipped}" if documents.first_skipped else ""
                print(f"warning: lines left out: {manifest['skipped']:,}{why}", file=sys.stderr)
            print(f"{out}: {manifest['documents']:,} documents, {manifest['width']} dimensions, {dtype}{read}")


if __name__ == "__main__":
    run_main(main)

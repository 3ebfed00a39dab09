"""Serves a model over HTTP: OpenAI's embeddings, search with the thought before the hits, and a page to try it.

    r3jax serve MODEL [INDEX] [flags]

MODEL is the folder of a run or an exported model, or a hub id; INDEX an index or an encoded corpus, for /search and the
page at /. Models are called NAME:query (thinks first), NAME:query-direct and NAME:document, NAME being the folder's.
/openapi.json says the rest. Ctrl-C or SIGTERM stops it when it has answered what it has taken. For example:

    r3jax serve runs/rl-tiny index
    curl localhost:8000/v1/embeddings -H "Content-Type: application/json" \\
        -d '{"model": "rl-tiny:query", "input": "list files by size"}'
"""

import ipaddress
import logging
import pathlib
import sys

from r3jax.corpus.encoding import open_encoding
from r3jax.corpus.identity import fingerprint
from r3jax.corpus.manifest import refuse_to_mix
from r3jax.corpus.saved_index import is_index, open_index
from r3jax.errors import UserError
from r3jax.model.hub import local_folder
from r3jax.run import command
from r3jax.run.config import run_main
from r3jax.run.progress import progress
from r3jax.search_r3 import SearchR3

FLAGS = {
    "host": "address to listen on; default: 127.0.0.1, this machine alone",
    "port": "default: 8000; 0 takes any that is free",
    "api-key-file": "a file with a key that clients must send; default: none",
}


def main(argv: list[str]) -> None:
    given = command.read(argv, "r3jax.serve", __doc__, ("MODEL", "INDEX"), FLAGS, optional=1)
    try:
        from r3jax.serving import app, limits, model, server
    except ModuleNotFoundError as e:
        raise UserError(f"{e.name} is not installed; pip install -r requirements-serve.txt.") from None
    source, *index = given.words
    host, port = given.flags["host"] or "127.0.0.1", given.whole("port", low=0)
    key = read_key(given.flags["api-key-file"]) if given.flags["api-key-file"] else None
    socket = server.bind(host, 8000 if port is None else port)
    command.prepare()
    found_in = None
    if index:
        found_in = open_index(index[0]) if is_index(index[0]) else open_encoding(index[0], "INDEX")
    folder = local_folder(source, "MODEL")
    loaded = SearchR3.from_pretrained(folder)
    if found_in is not None:
        now = {"model": fingerprint(loaded.params, loaded.reader)}
        refuse_to_mix(f"INDEX: {index[0]}", found_in.manifest, now, "name the MODEL that encoded it, or encode anew")
    name = pathlib.Path(source).resolve().name
    served = model.Served(name, loaded.params, loaded.reader, loaded.max_document, loaded.thinks, found_in)
    most = limits.Limits()
    steps = served.warming(most.hits)
    with progress("compiling", len(steps)) as on_step:
        for step in steps:
            step()
            on_step(1)
    if key is None and not is_loopback(host):
        print(f"warning: whoever reaches {host} may ask; --api-key-file=FILE asks for a key.", file=sys.stderr)
    where, bound = socket.getsockname()[:2]
    at = f"http://[{where}]:{bound}" if ":" in where else f"http://{where}:{bound}"
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # a client's broken bytes are no news

    def on_start() -> None:
        print(f"{name} at {at}", flush=True)

    server.Server(app.make_app(served, most, key), on_start).run([socket])


def read_key(path: str) -> str:
    """The key in a file; UserError where there is none, or one that a header cannot carry."""
    try:
        key = pathlib.Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not ASCII"
        raise UserError(f"--api-key-file: {path} cannot be read ({why}); name a file that holds the key.") from None
    if not key or not key.isprintable() or " " in key:
        raise UserError(f"--api-key-file: {path} holds no key; write one word into it.")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_main(main)

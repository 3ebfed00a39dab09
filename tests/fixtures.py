"""A data set small enough for tests, the smallest config that trains on it, and the parts of such a run."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from r3jax import assembly, train
from r3jax.assembly import Parts
from r3jax.model import params as model_params
from r3jax.model.packing import begun
from r3jax.model.sharding import make_mesh
from r3jax.run import config as run_config
from tests import xla

ROOT = pathlib.Path(__file__).parent.parent
XLA_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
VERBS = (
    "show",
    "list",
    "copy",
    "move",
    "delete",
    "rename",
    "count",
    "sort",
    "print",
    "merge",
    "split",
    "zip",
)
NOUNS = (
    "file",
    "folder",
    "image",
    "log",
    "user",
    "disk",
    "process",
    "branch",
    "package",
    "table",
    "key",
    "job",
)
PLACES = ("quietly", "recursively", "remotely", "twice")
SYNONYMS = {"show": "display", "delete": "remove", "folder": "directory", "image": "picture"}

# The default's architecture and every mechanism of the default run, in seconds.
MICRO = {
    "name": "micro",
    "data.max_query_tokens": 8,
    "data.max_doc_tokens": 12,
    "data.max_thought_tokens": 5,
    "tokenizer.vocab_size": 512,
    "tokenizer.lowercase": False,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.head_dim": 8,
    "model.ffn": 64,
    "model.vocab": 512,
    # Enough for completions that end, and differ in reward.
    "sft.steps": 40,
    "sft.learning_rate": 2e-2,
    "sft.batch_size": 16,
    "sft.chunks": 1,
    "sft.warmup": 0,
    "sft.kl_weight": 0.1,
    "sft.corrupt_thoughts": 0.3,
    "sft.pseudo_queries": 0.0,
    "rl.steps": 4,
    "rl.prompts": 8,
    "rl.group_size": 4,
    "rl.chunks": 1,
    "rl.warmup": 0,
    "rl.learning_rate": 3e-3,
    "rl.kl_weight": 0.01,
    "rl.temperature": 1.5,  # some completions end by themselves, some are cut
    "rl.probe_every": 2,
    "rl.reward.min_tokens": 2,
    "rl.reward.max_tokens": 5,
    "index.over_retrieve": 20,
    "index.probes": 8,
    "index.budget": 0.1,
    "checkpoint.every": 20,
    "log.every": 1,
    "log.samples_every": 2,
    "evaluate.every": 20,
    "evaluate.batch_size": 32,
    "evaluate.thoughts": 4,
    "xla_cache": XLA_CACHE,
}

FINISHED = {"sft__pseudo_queries": 0.25}  # of `finished_run`


def write_dataset(folder: pathlib.Path, thoughts: bool = False) -> pathlib.Path:
    """A BEIR folder: 200 documents, queries that rephrase them, 120 to train on and 20 in each other split.

    Queries of `seen` ask again for documents of the training queries, those of `unseen` and `validation` for
    others. One training query in ten has two relevant documents. With `thoughts` the folder brings its own,
    of one to three words; without, the run writes them.
    """
    rng = np.random.default_rng(0)
    triples = [(v, n, p) for v in VERBS for n in NOUNS for p in PLACES]
    triples = [triples[i] for i in rng.permutation(len(triples))[:200]]
    documents = [
        {"_id": f"d{i}", "title": v, "text": f"{n} --{p} {v[:2]}{n[:2]}{i % 7}"} for i, (v, n, p) in enumerate(triples)
    ]
    splits = {
        "train": range(120),
        "seen": range(20, 40),
        "unseen": range(140, 160),
        "validation": range(160, 180),
    }
    queries, qrels = [], {}
    for split, rows in splits.items():
        qrels[split] = []
        for row in rows:
            words = [SYNONYMS.get(w, w) for w in triples[row]]
            start = {"train": "please", "seen": "how to"}.get(split, "I want to")
            query = f"{split}{row}"
            queries.append({"_id": query, "text": f"{start} {words[0]} the {words[1]} {words[2]}"})
            qrels[split].append((query, f"d{row}"))
            if split == "train" and row % 10 == 0:
                qrels[split].append((query, f"d{row + 1}"))
    (folder / "qrels").mkdir(parents=True)
    files = {"corpus": documents, "queries": queries}
    if thoughts:
        files["thoughts"] = [
            {"query_id": f"train{row}", "text": " ".join(triples[row][: 1 + row % 3])} for row in splits["train"]
        ]
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for split, pairs in qrels.items():
        text = "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in pairs)
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def flags(folder: pathlib.Path, file: str = "rl", **changes) -> list[str]:
    """The command line of a micro run on a data set of `write_dataset` that lies in `folder`/data.

    `changes` are dotted keys with __ for the dot: rl__steps=3.
    """
    values = MICRO | {"data.path": folder / "data", "data.cache": folder / "cache"}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    values = {k: v for k, v in values.items() if file == "rl" or not k.startswith(("rl.", "index."))}
    return [f"--config={ROOT / 'configs' / file}.py", *(f"--config.{k}={v}" for k, v in values.items())]


def config(folder: pathlib.Path, file: str = "rl", **changes) -> ConfigDict:
    """The config of `flags`."""
    return run_config.parse(flags(folder, file, **changes), "r3jax.train").config


def parts(folder: pathlib.Path, mesh: tuple[int, int, int] = (1, 1, 1), file: str = "rl", **changes) -> Parts:
    """The parts of a micro run on a (data, fsdp, tensor) mesh of the first devices."""
    if not (folder / "data").exists():
        write_dataset(folder / "data", thoughts=True)
    devices = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    return assembly.parts(config(folder, file, **changes), folder / "run", devices)


def run_python(*argv: str, devices: int = 1, **kwargs) -> subprocess.Popen:
    """Starts `python argv...` at the repository's root, seeing so many fake devices."""
    env = os.environ | {
        "XLA_FLAGS": xla.flags(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": XLA_CACHE,
    }
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def shared(name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """A folder that one of pytest's processes makes and all of them read; it goes when they end."""
    root = pathlib.Path(os.environ["R3JAX_TESTS_SHARED"])  # conftest.py makes it
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def trained_params(parts: Parts) -> dict:
    """Host weights after the supervised stage: its completions end by themselves, and differ."""
    leaves = dict(run_config.leaves(parts.config))
    given = {k: v for k, v in leaves.items() if k not in ("data.path", "data.cache")}
    key = repr((given, parts.mesh.shape, parts.dataset.fingerprint))

    def make(folder: pathlib.Path) -> None:
        np.savez(folder / "params.npz", **model_params.flatten(_trained(parts)))

    folder = shared(f"trained-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
    with np.load(folder / "params.npz") as saved:
        return model_params.unflatten(dict(saved))


def _trained(parts: Parts) -> dict:
    with jax.set_mesh(parts.mesh):
        params = parts.initial_params()
        stage, state = assembly.make_stage("sft", parts, params), assembly.first_state("sft", parts, params)
        for step in range(1, stage.steps + 1):
            state, _ = stage.update(state, stage.next_batch(state, step)[0])
        return jax.device_get(state.params)


def placed(params: dict, parts: Parts) -> dict:
    """Host weights on the mesh of `parts`."""
    return jax.device_put(params, model_params.shardings(parts.model, parts.mesh))


def assert_same_gradient(found, wanted) -> None:
    """Leaf by leaf, to a share of the leaf's largest value: Adam's step hides a gradient's size, and so cannot tell."""
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        size = np.abs(b).max()
        assert size > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * size, err_msg=jax.tree_util.keystr(path))


def finished_run() -> tuple[pathlib.Path, str]:
    """The folder of a micro run of both stages on all fake devices, with its report, and what it printed."""

    def make(folder: pathlib.Path) -> None:
        write_dataset(folder / "data")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.main([*flags(folder, **FINISHED), f"--workdir={folder / 'run'}"])
        (folder / "said.txt").write_text(said.getvalue(), encoding="utf-8")

    folder = shared("finished", make)
    return folder, (folder / "said.txt").read_text(encoding="utf-8")


def fake_states(params, config, packs, dropout=None):
    """In place of `packed_states`, [N, T, D]: numbers that are a function of token and position alone."""
    tokens, positions, _ = begun(packs)
    hidden = jnp.tanh(params["embed"]["table"][tokens] + params["position"][positions])
    return hidden.reshape(len(packs.tokens), -1, hidden.shape[-1])

"""Where mistakes are made: a folder with a good one of everything, and what the verbs and the server say there."""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import shlex
import shutil
from collections.abc import Callable
from unittest import mock

import jax

from r3jax import __main__ as dispatcher
from r3jax.run import config as run_config
from r3jax.run import lock
from r3jax.run.checkpoint import Checkpointer
from tests import fixtures

HERE = pathlib.Path("")  # the world's own folder, which mistakes are made in
JUNK = {
    "pickled": {"pytorch_model.bin": "a pickle", "config.json": "{}"},
    "sliding": {"model.safetensors": "", "config.json": '{"model_type": "qwen2", "use_sliding_window": true}'},
    "sizeless": {"model.safetensors": "", "tokenizer.json": "{}"},
}
BEGUN = {"train": ("new", "cache"), "encode": ("out",)}
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "compile" in name else None
)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What a user does, and what is said to him.

    Attributes:
      done: in markdown, as the table has it.
      says: a part of the sentence.
      answer: called in the world's folder: (exit code or HTTP status, the sentence).
      code: the exit code or status that it must be.
    """

    done: str
    says: str
    answer: Callable[["World"], tuple[int, str]]
    code: int = 2


def command(
    words: str, says: str, spoil: Callable[[], None] | None = None, done: str = "", early: bool = True
) -> Mistake:
    """A command line without `r3jax`; `train` and `study NAME` get a good one's flags before their own.

    spoil: makes `bad`, which the words name; done: says how. early: nothing may be compiled before the sentence.
    """

    def answer(world: World) -> tuple[int, str]:
        with contextlib.ExitStack() as after:
            if spoil:
                after.callback(remove, pathlib.Path("bad"))
                spoil()
            return world.said(shlex.split(words), early)

    return Mistake(done or code(words), says, answer)


def code(text: str) -> str:
    """As code in a cell of a markdown table."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class World:
    """data, run, untrained, strange (a run of other weights), published, vectors, index, configs and some junk."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.resolve()
        with contextlib.chdir(folder):
            fixtures.write_dataset(HERE / "data")
            pathlib.Path("configs").symlink_to(fixtures.ROOT / "configs")
            pathlib.Path("file").write_text("not a folder")
            pathlib.Path("empty").mkdir()
            for name, files in JUNK.items():
                pathlib.Path(name).mkdir()
                for file, text in files.items():
                    pathlib.Path(name, file).write_text(text)
            _make_runs()
            for words in (
                "convert export run published",
                "encode run data vectors",
                "index build vectors index --kind=exact",
            ):
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    dispatcher.main(words.split())
        self.files = self._files()

    def _files(self) -> set[pathlib.Path]:
        return {pathlib.Path(at, name) for at, folders, files in os.walk(self.folder) for name in folders + files}

    def answer(self, mistake: Mistake) -> tuple[int, str]:
        """The code and the sentence, with paths as if given from the world's folder; nothing may be left behind."""
        with contextlib.chdir(self.folder), mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            status, sentence = mistake.answer(self)
        left = self._files() ^ self.files
        assert not left, f"was left behind or is gone: {left}"
        return status, sentence.replace(f"{self.folder}/", "")

    def said(self, words: list[str], early: bool = True) -> tuple[int, str]:
        """The exit code of a command line, and the one line that it writes on the standard error."""
        own = {"train": 1, "study": 2}.get(words[0])
        if own and len(words) >= own:
            words = [*words[:own], *fixtures.flags(HERE), "--workdir=new", *words[own:]]
        out, err = io.StringIO(), io.StringIO()
        COMPILED.clear()
        with mock.patch("sys.argv", ["r3jax", *words]), contextlib.redirect_stdout(out):
            try:
                with contextlib.redirect_stderr(err):
                    run_config.run_main(dispatcher.main)
            except SystemExit as end:
                status = end.code
            finally:  # what the same command, mended, may use again
                for begun in BEGUN.get(words[0], ()):
                    remove(pathlib.Path(begun))
        assert not (early and COMPILED)
        assert not out.getvalue() or out.getvalue().startswith("config as in "), out.getvalue()
        said = err.getvalue()
        assert said.startswith("error: ") and said.endswith("\n"), said
        return status, said.removeprefix("error: ").removesuffix("\n")

    @functools.cached_property
    def apps(self) -> dict[bool, Callable]:
        """The server's application, without a key and with the key "secret"; its model is read for no refusal."""
        from r3jax.corpus.saved_index import open_index
        from r3jax.search_r3 import SearchR3
        from r3jax.serving import app
        from r3jax.serving.limits import Limits
        from r3jax.serving.model import Served

        model = SearchR3.from_pretrained("run")
        served = Served("tiny", model.params, model.reader, model.max_document, True, open_index("index"))
        limits = Limits(body_bytes=20_000, inputs=40, tokens=1000, waiting=400, streams=1, hits=7, seconds=60)
        return {locked: app.make_app(served, limits, "secret" if locked else None) for locked in (False, True)}


def _make_runs() -> None:
    config = fixtures.config(HERE)
    parts = fixtures.parts(HERE)
    for name in ("untrained", "strange", "run"):
        run_config.save(config, pathlib.Path(name) / run_config.SAVED_NAME)
        parts.chat.tokenizer.save(pathlib.Path(name) / "tokenizer")
        pathlib.Path(name, lock.FILE).touch()  # which every training leaves
    save(pathlib.Path("strange"), {"nothing": jax.numpy.zeros(2)})
    with jax.set_mesh(parts.mesh):
        save(pathlib.Path("run"), {"train": {"params": parts.initial_params()}})


def save(run: pathlib.Path, state) -> None:
    """One checkpoint of stage 1."""
    checkpointer = Checkpointer(run / "checkpoints" / "sft", keep_last=1)
    checkpointer.save(2, state, meta={"data": None})
    checkpointer.close()

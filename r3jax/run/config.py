"""Configuration: a Python file that returns a locked ConfigDict, and dotted overrides on the command line.

    python -m r3jax.train --config=configs/rl.py:qwen2_5_0_5b --config.rl.group_size=4 --workdir=runs/try

A config file defines `get_config(arg: str = "tiny") -> ConfigDict`. Leaves are numbers, strings, booleans,
None, or tuples of those, so that the resolved config can be kept as JSON beside the run. An override takes
the type of the value that it replaces. Every mistake is a UserError: one sentence, exit code 2.
"""

import ast
import dataclasses
import difflib
import errno
import importlib.util
import inspect
import json
import math
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

from r3jax.errors import FULL, UserError
from r3jax.run.rules import check

DEFAULT_RUNS = pathlib.Path("runs")
SAVED_NAME = "config.json"


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a command line says: the locked config, the folder of the run, and the entry point's own flags.

    `flags` has every name that the entry point declared; None for those not given. `given` are the config's keys
    that the command line sets, "workdir" among them where it does. `words` are --config and its overrides again, to be
    handed on to another entry point.
    """

    config: ConfigDict
    workdir: pathlib.Path
    flags: dict[str, str | None]
    given: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()


def parse(
    argv: Sequence[str],
    entry: str,
    flags: Mapping[str, str] | None = None,
    config_required: bool = True,
    several: Collection[str] = (),
) -> Parsed:
    """Reads the command line of an entry point (`argv` without the program's name).

    Args:
      argv: the arguments; both `--flag=value` and `--flag value` are understood.
      entry: the module's name, for messages: "r3jax.train".
      flags: the entry point's own flags: {name: one line of help}; their values stay strings.
      config_required: if False, a command line without --config takes `config.json` from --workdir, as an
        entry point that reads a finished run wants it; overrides still apply.
      several: flags that may be repeated; their values are joined by commas.

    Raises:
      UserError: for an unknown flag or key (with the nearest known one), a wrong type, a missing or broken
        config file. `--help` prints the usage and exits with 0.
    """
    flags = dict(flags or {})
    known = {
        "config": "config file, e.g. configs/rl.py or configs/rl.py:SIZE",
        "workdir": "folder of the run",
    }
    known |= flags
    plain: dict[str, str | None] = dict.fromkeys(known)
    overrides: list[tuple[str, str]] = []
    for name, value in _split(argv, entry, known):
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        else:
            plain[name] = f"{plain[name]},{value}" if name in several and plain[name] else value
    path, workdir = plain.pop("config"), plain.pop("workdir")
    if path:
        config = load(path)
    elif config_required:
        raise UserError(f"--config is missing; start with: python -m {entry} --config=configs/rl.py.")
    elif workdir:
        config = load_saved(pathlib.Path(workdir) / SAVED_NAME)
    else:
        raise UserError(f"--workdir is missing; name the folder of a run: python -m {entry} --workdir=runs/NAME.")
    for key, text in overrides:
        override(config, key, text)
    given = frozenset([key for key, _ in overrides] + ["workdir"] * bool(workdir))
    words = ([f"--config={path}"] if path else []) + [f"--config.{key}={text}" for key, text in overrides]
    folder = pathlib.Path(workdir or DEFAULT_RUNS / config.get("name", "run"))
    return Parsed(config, folder, plain, given, tuple(words))


def load(path: str) -> ConfigDict:
    """The locked config of a file, `FILE.py` or `FILE.py:ARG`; ARG is passed to its `get_config`."""
    name, colon, arg = path.partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        near = difflib.get_close_matches(name, [str(p) for p in file.parent.glob("*.py")], 1)
        raise UserError(f"--config: there is no file {name}{_hint(near)}.")
    if file.suffix != ".py":
        raise UserError(f"--config: {name} is not a Python file; give one that defines get_config(arg).")
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _guarded(name, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"--config: {name} defines no function get_config(arg).")
    if colon and not inspect.signature(get_config).parameters:
        raise UserError(f"--config: get_config of {name} takes no argument; leave out :{arg}.")
    config = _guarded(name, lambda: get_config(arg) if colon else get_config())
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config of {name} must return a ConfigDict, not {_kind(config)}.")
    for key, value in leaves(config):
        if not _plain(value):
            raise UserError(f"{name}: config.{key} is {_kind(value)}; use numbers, strings, booleans, None, or tuples.")
    return config.lock()


def choose(arg: str, options: Mapping[str, Any], what: str = "size") -> Any:
    """`options[arg]` for a config file's argument; a UserError that lists the valid ones otherwise."""
    if arg not in options:
        near = difflib.get_close_matches(arg, options, 1)
        raise UserError(f"--config: there is no {what} {arg!r}{_hint(near)}; choose one of {', '.join(options)}.")
    return options[arg]


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one dotted key, in place, from text, read in the type of the value that it replaces."""
    known = dict(leaves(config))
    if key not in known:
        inside = [k for k in known if k.startswith(key + ".")]
        if inside:
            raise UserError(f"--config.{key} is a group of fields; set one, such as --config.{inside[0]}=VALUE.")
        near = difflib.get_close_matches(key, known, 1) or _same_leaf(key, known)
        raise UserError(f"--config.{key}: the config has no such field{_hint(f'--config.{k}' for k in near)}.")
    value = _read(key, text, known[key])
    with config.unlocked():  # a None may become a value of any type
        *groups, leaf = key.split(".")
        group = config
        for name in groups:
            group = group[name]
        with group.ignore_type():
            group[leaf] = value


def validate(config: ConfigDict) -> None:
    """Raises a UserError that names the first field (or pair of fields) with a value that cannot work.

    To be called before any work starts. Fields that a config does not have are not checked.
    """
    check(dict(leaves(config)))


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of every leaf, in the order of the file."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def to_json(config: ConfigDict) -> str:
    """The resolved config as indented JSON; the same config gives the same text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def save(config: ConfigDict, path: pathlib.Path | str) -> None:
    """Writes `to_json` whole or not at all, so that a kill leaves no half file; makes the folder.

    Where it stands already nothing is written: a run on a full disk is then told what helps, not that this failed.
    """
    path = pathlib.Path(path)
    text = to_json(config).encode()
    if path.is_file() and path.read_bytes() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(text)
    os.replace(part, path)


def load_saved(path: pathlib.Path | str) -> ConfigDict:
    """The locked config that `save` wrote."""
    try:
        saved = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--workdir: there is no {path}; name the folder of a run that train.py made.") from None
    except ValueError as e:
        raise UserError(f"{path} is not a saved config ({e}); name the folder of a run that train.py made.") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not a saved config; name the folder of a run that train.py made.")
    return ConfigDict(_tuples(saved)).lock()


DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs an entry point on sys.argv: exit 0; 2 with one sentence for a UserError, a disk that is full or a file that
    may not be used; 130 for Ctrl-C; 141 where nobody reads the output any more.

    Anything else is a bug and keeps its trace.
    """
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()  # now, so that a reader who has gone is met here
    except BrokenPipeError:  # as in `| head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        _let_it_be_the_last_word()
        sys.exit(2)
    except OSError as e:
        if e.errno not in FULL | DENIED:
            raise
        where = f" at {e.filename}" if e.filename else ""
        fix = "make room" if e.errno in FULL else "change its permissions or name another"
        print(f"error: {os.strerror(e.errno)}{where}; {fix} and give the same command again.", file=sys.stderr)
        _let_it_be_the_last_word()
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _let_it_be_the_last_word() -> None:
    """Libraries that hold files of a full disk would add traces to the sentence when the process ends."""
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None


def _split(argv: Sequence[str], entry: str, known: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """(name, value) of each flag."""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            module = sys.modules.get(entry.split()[0]) or sys.modules["__main__"]
            print(f"{(module.__doc__ or '').strip()}\n\nflags:")
            for name, text in known.items():
                print(f"  --{name}=…  {text}")
            print("  --config.GROUP.FIELD=VALUE  changes one field of the config")
            sys.exit(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; flags look like --config=configs/rl.py.")
        name, equals, value = word[2:].partition("=")
        if name not in known and not name.startswith("config."):
            near = difflib.get_close_matches(name, known, 1)
            if not near and difflib.get_close_matches(name.split(".")[0], ["config"], 1) and "." in name:
                near = ["config." + name.partition(".")[2]]
            raise UserError(f"unknown flag --{name}{_hint(f'--{n}' for n in near)}; see python -m {entry} --help.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE.")
            value = rest.pop(0)
        if not value and name in known:
            raise UserError(f"--{name} is empty; give a value: --{name}=VALUE.")
        yield name, value


def _read(key: str, text: str, old: Any) -> Any:
    """`text` in the type of `old`."""
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        if isinstance(old, str):
            return text
        if isinstance(old, tuple | list):
            words = [w.strip() for w in text.strip().strip("()[]").split(",")]
            like = old[0] if len(old) else ""
            return type(old)(_read(key, w.strip("'\""), like) for w in words if w)
    except (KeyError, ValueError):
        raise UserError(f"--config.{key} must be {_kind(old)}, not {text!r}.") from None
    try:
        return ast.literal_eval(text)  # the field is None: no type to go by
    except (ValueError, SyntaxError):
        return text


def _guarded(name: str, work: Callable[[], Any]) -> Any:
    """Runs code of a config file; whatever it raises becomes a sentence with file and line."""
    try:
        return work()
    except UserError:
        raise
    except SyntaxError as e:
        raise UserError(f"{e.filename or name}:{e.lineno}: {e.msg}.") from None
    except Exception as e:  # the config file is the user's: any exception in it is theirs to mend
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename.endswith(name)]
        raise UserError(f"{name}:{lines[-1] if lines else 1}: {type(e).__name__}: {e}.") from None


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _tuples(value: Any) -> Any:
    """JSON has no tuples; configs have no lists."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _same_leaf(key: str, known: Iterable[str]) -> list[str]:
    """The keys whose last part is the same: the right name in the wrong group."""
    return [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]


def _hint(near: Iterable[str]) -> str:
    names = list(near)
    return f" (did you mean {names[0]}?)" if names else ""


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "a list of values separated by commas",
        list: "a list of values separated by commas",
        type(None): "None",
    }
    return names.get(type(value), f"a {type(value).__name__}")

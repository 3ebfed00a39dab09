"""Command lines of the verbs that read no config: words first or last, flags anywhere.

    r3jax encode runs/rl-tiny corpus.jsonl vectors --dtype=float16

Every mistake is a UserError: one sentence, exit code 2.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence

import jax

from r3jax.errors import UserError
from r3jax.run.log import quiet_libraries

XLA_CACHE = ".cache/xla"  # as configs/base.py


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line says; flags and switches that were not given are None."""

    words: list[str]
    flags: dict[str, str | None]
    switches: dict[str, bool | None]

    def whole(self, name: str, low: int = 1) -> int | None:
        """A flag as a whole number of at least `low`."""
        text = self.flags[name]
        if text is None:
            return None
        if not re.fullmatch("-?[0-9]{1,18}", text) or int(text) < low:
            raise UserError(f"--{name} must be a whole number of at least {low}, not {text!r}.")
        return int(text)

    def number(self, name: str) -> float | None:
        """A flag as a finite number."""
        text = self.flags[name]
        try:
            value = None if text is None else float(text)
        except ValueError:
            value = float("nan")
        if value is not None and value - value != 0:
            raise UserError(f"--{name} must be a number, not {text!r}.")
        return value

    def choice(self, name: str, options: Sequence[str], default: str) -> str:
        """A flag that is one of `options`."""
        value = default if self.flags[name] is None else self.flags[name]
        if value not in options:
            raise UserError(f"--{name} must be one of {', '.join(options)}, not {value!r}.")
        return value


def read(
    argv: Sequence[str],
    entry: str,
    about: str,
    words: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
    switches: Mapping[str, str] | None = None,
    optional: int = 0,
) -> Given:
    """Reads `argv` (without the program's name); `--help` prints `about` and the flags, and exits with 0.

    Args:
      entry: the module's name, for messages: "r3jax.encode".
      about: what --help prints first: the module's docstring, with an example in it.
      words: names of the arguments without dashes, in order; the last `optional` of them may be left out, and a
        last one that ends with "..." may be several.
      flags: {name: one line of help}; `--name=value` and `--name value` are understood.
      switches: {name: one line of help}; `--name` and `--no-name`.

    Raises:
      UserError: unknown flag (with the nearest known one), a word too many or too few, a flag without its value.
    """
    flags, switches = dict(flags or {}), dict(switches or {})
    known = [*flags, *switches, *(f"no-{name}" for name in switches)]
    found, turned = dict.fromkeys(flags), dict.fromkeys(switches)
    given: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            _print_help(about, flags, switches)
            sys.exit(0)
        if word == "--":  # what follows are words, whatever they begin with
            given += rest
            break
        if not word.startswith("--"):
            given.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name in flags:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UserError(f"--{name} needs a value: --{name}=VALUE.")
                value = rest.pop(0)
            if not value:
                raise UserError(f"--{name} is empty; give a value: --{name}=VALUE.")
            found[name] = value
        elif name in known and not equals:
            turned[name.removeprefix("no-")] = name in switches
        elif name in known:
            raise UserError(f"--{name} takes no value; leave out ={value}.")
        else:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean --{near[0]}?)" if near else ""
            raise UserError(f"unknown flag --{name}{hint}; see python -m {entry} --help.")
    most = sys.maxsize if words and words[-1].endswith("...") else len(words)
    if not len(words) - optional <= len(given) <= most:
        usage = " ".join([*words[: len(words) - optional], *(f"[{word}]" for word in words[len(words) - optional :])])
        said = f"{given[len(words)]!r} is one word too many" if len(given) > most else "words are missing"
        raise UserError(f"{said}; give {usage or 'flags only'}; see python -m {entry} --help.")
    return Given(given, found, turned)


def prepare(cache: str = "") -> None:
    """Before work starts: quiet libraries, and compiled programs kept in `cache` or else where configs keep them.

    `cache` is what the command line says, never what a run's folder does: such programs are run as they are.
    """
    quiet_libraries()
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    elif not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", XLA_CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _print_help(about: str, flags: Mapping[str, str], switches: Mapping[str, str]) -> None:
    print(about.strip())
    lines = [(f"--{name}=…", text) for name, text in flags.items()]
    lines += [(f"--[no-]{name}", text) for name, text in switches.items()]
    if lines:
        width = max(len(name) for name, _ in lines)
        print("\nflags:")
        for name, text in lines:
            print(f"  {name:<{width}}  {text}")

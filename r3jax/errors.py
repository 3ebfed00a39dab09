"""The one exception for a user's mistake, and its sentence for what cannot be written."""

import contextlib
import errno
import os
from collections.abc import Iterator

FULL = {errno.ENOSPC, errno.EDQUOT}  # what a disk says that takes no more


class UserError(Exception):
    """Something the user can mend: one sentence that names the field (or file and line) and the fix.

    Entry points print it without a trace and exit with code 2.
    """


def cannot_write(field: str, path: str | os.PathLike, e: OSError, what: str = "folder") -> str:
    """The sentence for a `what` that could not be written, which `field` names."""
    room = "make room or " if e.errno in FULL else ""
    return f"{field}: cannot write to {path}: {e.strerror or e}; {room}name another {what}."


@contextlib.contextmanager
def writing(field: str, path: str | os.PathLike, what: str = "folder") -> Iterator[None]:
    """An OSError inside is a UserError that says so."""
    try:
        yield
    except OSError as e:
        raise UserError(cannot_write(field, path, e, what)) from None

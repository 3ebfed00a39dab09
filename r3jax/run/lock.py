"""One writer to a folder at a time: the second is refused before it has changed anything."""

import contextlib
import errno
import fcntl
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from r3jax import processes
from r3jax.errors import UserError, cannot_write

FILE = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # some network file systems


@contextlib.contextmanager
def alone(folder: pathlib.Path, field: str) -> Iterator[None]:
    """Makes the folder and keeps other jobs from changing it; the lock goes with the process, however that ends.

    Process 0 takes it for all processes of a job, which come here together and are refused together.

    Raises:
      UserError: another holds it, or the folder cannot be written; `field` is who named it.
    """
    with contextlib.ExitStack() as held:
        refused = _refused(folder, field, held) if processes.leads() else ""
        if processes.gather(np.array(bool(refused))).any():
            raise UserError(refused or f"{field}: {folder} was refused by process 0.")
        yield


def _refused(folder: pathlib.Path, field: str, held: contextlib.ExitStack) -> str:
    """Why the lock is not to be had; "" where `held` has it now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((folder / FILE).open("w"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{field}: {folder} is being changed by another process; wait for its end."
    except OSError as e:
        if e.errno not in NO_LOCKS:
            return cannot_write(field, folder, e)
        print(f"warning: {folder} knows no locks; see that nothing else writes there meanwhile.", file=sys.stderr)
    return ""

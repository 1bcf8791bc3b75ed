"""What ends a run though its user made no mistake."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

#: Errors of a disk that is full or broken: no mistake of the user's.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class RunError(ValueError):
    """A run that cannot go on; the message, one line, says why and how to go on."""

    exit_status = 1


class NonFiniteError(RunError):
    """Losses, gradients or parameters that are NaN or infinite."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}. To change that, lower optimizer.learning_rate, lengthen optimizer.warmup_steps or set"
            " optimizer.clip_norm, in another run_dir"
        )


@contextlib.contextmanager
def orbax_errors(path: Path) -> Iterator[None]:
    """Within, an error of the file system, such as a full disk, is an OSError that names `path`.

    orbax raises a ValueError then, after a log of several hundred lines, one traceback per thread.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
    finally:
        logger.setLevel(level)

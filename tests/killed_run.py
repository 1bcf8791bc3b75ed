"""A program for tests/test_resume.py: `python -m train` that gets SIGKILL, or SIGTERM, at a named point.

    python killed_run.py POINT BATCHES CONFIG [key=value ...]

POINT is `never` or a name of `_POINTS` with a step, as in `save:5`. BATCHES is a file to which the number
and the hash of every training batch is appended.
"""

import hashlib
import os
import pathlib
import signal
import sys

from train import cli, loop
from train.data import batches as data
from train.run import checkpoint, files, metrics


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, step, when=lambda *args: True):
    """Die at the entry of owner.name once step `step` is reached and `when` holds."""
    real = getattr(owner, name)

    def replaced(*args, **kwargs):
        if reached["step"] == step and when(*args):
            die()
        return real(*args, **kwargs)

    setattr(owner, name, replaced)


def in_the_middle_of_deleting(step):
    real = files.shutil.rmtree

    def replaced(path, *args, **kwargs):
        if reached["step"] == step:
            next(file for file in pathlib.Path(path).rglob("*") if file.is_file()).unlink()
            die()
        return real(path, *args, **kwargs)

    files.shutil.rmtree = replaced


def in_the_middle_of_a_row(step):
    real = metrics.MetricsWriter.write

    def replaced(self, at, values):
        if at == step:
            self._file.append(b'{"step": ')
            die()
        return real(self, at, values)

    metrics.MetricsWriter.write = replaced


def in_the_middle_of_evaluating(step):
    real = loop.Run._score

    def replaced(self, batches):
        def some():
            for count, batch in enumerate(batches):
                if count == 1 and reached["step"] == step:
                    die()
                yield batch

        return real(self, some())

    loop.Run._score = replaced


def by_sigterm(step):
    """SIGTERM while this step is computed."""
    real = loop.Run._arrived

    def replaced(self, at, metrics):
        if at == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, at, metrics)

    loop.Run._arrived = replaced


_POINTS = {
    "sigterm": by_sigterm,
    # orbax is done, the manifest is not written
    "save": lambda step: before(checkpoint, "digests", step),
    # orbax has begun to write in its own background
    "orbax": lambda step: before(checkpoint.ocp._src.saving.execution._SaveResponse, "result", step),
    "saved": lambda step: before(checkpoint.Checkpoints, "collect", step),
    "deleting": in_the_middle_of_deleting,
    "evaluating": in_the_middle_of_evaluating,
    "row": in_the_middle_of_a_row,
    "sample": lambda step: before(loop, "write_atomically", step),
    "scoring": lambda step: before(loop.Run, "finish", step),
    "drawn": lambda step: before(loop.RunFolder, "finish", step),
}
reached = {"step": 0}


def main():
    point, batches, *arguments = sys.argv[1:]
    if point != "never":
        name, step = point.split(":")
        _POINTS[name](int(step))
    train_batch = data.Data.train_batch

    def recorded(self, step):
        batch = train_batch(self, step)
        digest = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        with open(batches, "a") as file:
            file.write(f"{step} {digest}\n")
        reached["step"] = step + 1
        return batch

    data.Data.train_batch = recorded
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

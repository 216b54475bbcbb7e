"""What can happen to files: of the run folder, and of the data."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pipelines import datasets
from service.errors import DataError, StorageError
from tests.integration.processes import await_
from tests.soak import checks
from tests.soak.cluster import Cluster


def damage_checkpoint(made: Cluster, dice: Random) -> str:
    """All machines die, and of the newest checkpoint a file has lost bytes, or has a bit turned."""
    with made.away(made.machines):
        for machine in made.machines:
            machine.kill()
        found = made.checkpoints()
        if len(found) < 2:
            return "no second checkpoint yet, so none was damaged; all machines died"
        file = dice.choice(sorted(path for path in found[0].iterdir() if path.stat().st_size))
        content = bytearray(file.read_bytes())
        if dice.random() < 0.5:
            del content[dice.randrange(len(content)) :]
            how = f"cut to {len(content)} bytes"
        else:
            place = dice.randrange(len(content))
            content[place] ^= 1 << dice.randrange(8)
            how = f"a bit of byte {place} turned"
        file.write_bytes(content)
    return f"{found[0].name}/{file.name}: {how}"


def fill_disk(made: Cluster, dice: Random) -> str:
    """Nothing can be written, for longer than a checkpoint takes to be due."""
    pause_s = dice.uniform(10, 25)
    ballast = made.disk / "ballast"
    deadline = time.monotonic() + pause_s
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), ballast.open("ab") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
            time.sleep(0.5)
    finally:
        ballast.unlink()
    return f"for {pause_s:.0f} s"


def close_folder(made: Cluster, dice: Random) -> str:
    """The run folder can be read and not written, until a launcher has ended for it, and for a while more."""
    pause_s, ended = dice.uniform(1, 10), made.ends[StorageError.exit_code]
    # Over itself: the kernel makes no disk read-only on which files are open for writing. Those here stay open.
    subprocess.run(["mount", "--bind", str(made.run), str(made.run)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(made.run)], check=True)
        _await_end(made, StorageError.exit_code, ended)
        time.sleep(pause_s)
    finally:
        subprocess.run(["umount", "-l", str(made.run)], check=True)
    return f"until a launcher had ended with {StorageError.exit_code}, and for {pause_s:.0f} s"


def hide_image(made: Cluster, dice: Random) -> str:
    """An image that is trained on has lost its content, until a launcher has ended for it, and for a while more."""
    image, pause_s, ended = _choose(made, "train", dice), dice.uniform(1, 10), made.ends[DataError.exit_code]
    with _restored(image.shard):
        image.overwrite()
        _await_end(made, DataError.exit_code, ended)
        time.sleep(pause_s)
    return f"{image.name}, until a launcher had ended with {DataError.exit_code}, and for {pause_s:.0f} s"


def damage_image(made: Cluster, dice: Random) -> str:
    """An image of the evaluation has lost its content, in a job that may leave such images out; later it is well again.

    Training would put another in the place of one of its own, which this job's account of samples does not allow for.
    """
    image = _choose(made, "val", dice)
    with contextlib.ExitStack() as healing:
        healing.enter_context(_restored(image.shard))
        made.go_on_with(["data.on_bad_image=skip"], image.overwrite)
        reached = made.evaluated()
        await_(lambda: made.evaluated() > reached or made.is_done(), "an evaluation", 300, made.told)
        made.left_out.add(image.name)
        made.go_on_with([], healing.close)
    return f"{image.name}, for an evaluation"


def lose_shard(made: Cluster, dice: Random) -> str:
    """A shard that is trained on is gone, until a launcher has ended for it, and for a while more."""
    shard, pause_s, ended = _choose(made, "train", dice).shard, dice.uniform(1, 10), made.ends[DataError.exit_code]
    with _restored(shard):
        # Removed alone it could still be read through what is open.
        os.truncate(shard, 0)
        shard.unlink()
        _await_end(made, DataError.exit_code, ended)
        time.sleep(pause_s)
    return f"{shard.name}, until a launcher had ended with {DataError.exit_code}, and for {pause_s:.0f} s"


@dataclass(frozen=True)
class _Image:
    """Where the bytes of a sample lie. `name` is what the run calls it, but for the folders."""

    name: str
    shard: Path
    offset: int
    size: int

    def overwrite(self) -> None:
        """Let nothing but zeros be left of it."""
        times = self.shard.stat()
        with self.shard.open("r+b") as file:
            file.seek(self.offset)
            file.write(bytes(self.size))
        # Of another time it would be taken for another data set.
        os.utime(self.shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def _choose(made: Cluster, split: str, dice: Random) -> _Image:
    """Any image of a split."""
    manifest = datasets.load("prepared", made.data, split)
    sample = dice.randrange(len(manifest))
    shard, offset, size = manifest.location(sample)
    assert size is not None
    return _Image(checks.image_name(manifest.describe(sample)), made.data / shard, offset, size)


@contextlib.contextmanager
def _restored(path: Path) -> Iterator[None]:
    """After the block the file is as it was, whatever was done to it."""
    content, times = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _await_end(made: Cluster, code: int, before: int) -> None:
    """Until more launchers have ended with this code than `before`, or the job is done."""
    what = f"a launcher ends with exit code {code}"
    await_(lambda: made.ends[code] > before or made.is_done(), what, 300, made.told)

"""The archive itself: files that change while they are read, and archives that are damaged or hostile."""

import io
import json
import os
import random
import sqlite3
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from service.errors import ConfigError, DataError
from service.operations import archive
from service.operations.restore import restore


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_that_grow_shrink_and_vanish_while_they_are_read_do_not_break_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "still.txt").write_text("still")
    ended = threading.Event()

    def change() -> None:
        chance = random.Random(0)
        while not ended.is_set():
            path = folder / f"{chance.randrange(5)}.txt"
            if chance.random() < 0.2:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(b"x" * chance.randrange(3_000_000))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for number in range(10):
            with archive.writing(tmp_path / f"{number}.tar") as writer:
                writer.add_tree(folder, "state")
                writer.finish({})
            with archive.reading(tmp_path / f"{number}.tar") as reader:
                reader.verify()
                assert reader.text("state/still.txt") == "still"
    finally:
        ended.set()
        changer.join()


def test_links_sockets_and_the_archive_itself_are_not_put_in(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("own")
    (tmp_path / "secret").write_text("another's")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "link-to-folder").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    with archive.writing(folder / "b.tar") as writer:
        writer.add_tree(folder, "all")
        writer.finish({})
    assert sorted(Path(path).name for path in writer.left_out) == ["link", "link-to-folder", "pipe"]
    with archive.reading(folder / "b.tar") as reader:
        assert list(reader.manifest.files) == ["all/sub/file"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small archive that could be restored."""
    source = tmp_path / "small"
    (source / "state").mkdir(parents=True)
    (source / "state" / "tokens.json").write_text("{}")
    connection = sqlite3.connect(source / "mlflow.db")
    # All that a check of the database looks at.
    connection.execute("CREATE TABLE experiments (artifact_location TEXT)")
    connection.execute("CREATE TABLE runs (artifact_uri TEXT)")
    connection.commit()
    connection.close()
    with archive.writing(tmp_path / "small.tar") as writer:
        writer.add_file(source / "mlflow.db", "database/mlflow.db")
        writer.add_text("experiment: kept\n", "settings.yaml")
        writer.add_tree(source / "state", "state")
        writer.finish({"database": "sqlite", "artifacts": {}, "server_artifacts": None, "jobs": False})
    return tmp_path / "small.tar"


def test_an_archive_with_any_bit_turned_is_refused_or_comes_back_the_same(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    restore(small, tmp_path / "sound")
    expected = {name: own for name, own in tree(tmp_path / "sound").items() if name != "service.yaml"}
    chance = random.Random(7)
    refused = 0
    for number in range(300):
        place = chance.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged.tar").write_bytes(damaged)
        target = tmp_path / f"new-{number}"
        try:
            restore(tmp_path / "damaged.tar", target)
        except (DataError, ConfigError):
            refused += 1
            assert not target.exists()
        else:
            found = {name: own for name, own in tree(target).items() if name != "service.yaml"}
            assert found == expected, place
    # What may differ is what tar keeps beside the files: owners, times, padding.
    assert refused > 200
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_archive_that_was_cut_short_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    with archive.reading(small) as reader:
        end = max(member.offset_data + member.size for member in reader._tar.getmembers())
    for length in (0, 1, 511, 512, 700, *range(1024, end, 997), end - 1):
        (tmp_path / "short.tar").write_bytes(content[:length])
        with pytest.raises(DataError):
            restore(tmp_path / "short.tar", tmp_path / "new")
        assert not (tmp_path / "new").exists()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


STRANGE = "not in the manifest"
HOSTILE: dict[str, list[tarfile.TarInfo]] = {
    "absolute": [entry("/tmp/evil")],
    "above": [entry("state/../../evil")],
    "above at once": [entry("../evil")],
    "dot": [entry("state/./evil")],
    "nothing": [entry("state//evil")],
    "symbolic link": [entry("state/link", tarfile.SYMTYPE, "/etc")],
    "through a link": [entry("state/link", tarfile.SYMTYPE, "/tmp"), entry("state/link/evil")],
    "hard link": [entry("state/link", tarfile.LNKTYPE, "state/tokens.json")],
    "hard link outside": [entry("state/link", tarfile.LNKTYPE, "/etc/passwd")],
    "device": [entry("state/device", tarfile.CHRTYPE)],
    "block device": [entry("state/device", tarfile.BLKTYPE)],
    "pipe": [entry("state/pipe", tarfile.FIFOTYPE)],
    "folder": [entry("state/folder", tarfile.DIRTYPE)],
    "unknown kind": [entry("state/strange", b"Z")],
    "twice": [entry("state/tokens.json")],
    "within a file": [entry("state/tokens.json/evil")],
    STRANGE: [entry("state/more")],
}


LISTED = [*((name, False) for name in HOSTILE), *((name, True) for name in HOSTILE if name != STRANGE)]


@pytest.mark.parametrize(("name", "is_listed"), LISTED)
def test_an_archive_that_holds_what_no_backup_does_is_refused_before_anything_is_written(
    small: Path, tmp_path: Path, name: str, is_listed: bool
) -> None:
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(small) as source, tarfile.open(hostile, "w") as target:
        for member in source:
            content = source.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name == "manifest.json" and is_listed:
                manifest = json.loads(data)
                empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
                manifest["files"] |= {added.name: empty for added in HOSTILE[name]}
                manifest["sha256"] = archive._digest_of(manifest)
                data = json.dumps(manifest).encode()
            if member.name == "manifest.json":
                for added in HOSTILE[name]:
                    target.addfile(added)
            plain = tarfile.TarInfo(member.name)
            plain.size = len(data)
            target.addfile(plain, io.BytesIO(data))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError):
        restore(hostile, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"database": "sqlite", "artifacts": {"file:///a": "../../evil"}},
        {"database": "sqlite", "artifacts": {"file:///a": "state"}},
        {"database": "sqlite", "artifacts": [], "server_artifacts": None},
        {"database": "sqlite", "artifacts": {}, "server_artifacts": "/etc"},
        {"database": "postgresql", "artifacts": {}, "server_artifacts": None},
        {"database": "mongodb", "artifacts": {}, "server_artifacts": None},
        {},
    ],
)
def test_a_manifest_that_says_what_no_backup_says_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    with archive.writing(tmp_path / "b.tar") as writer:
        writer.add_text("text", "database/mlflow.db")
        writer.finish(facts)
    with pytest.raises(DataError):
        restore(tmp_path / "b.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()

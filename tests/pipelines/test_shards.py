"""Shards are what other programs take for tar files of WebDataset's layout."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import shards
from pipelines.shards import Place, Tar

SAMPLES = [
    ("000000007", {"jpg": b"seven" * 300, "cls": b"3"}),
    ("000000008", {"jpg": b"", "cls": b"12", "json": b"{}"}),
]


def written(samples: list[tuple[str, dict[str, bytes]]]) -> tuple[bytes, list[tuple[str, dict[str, Place]]]]:
    """A shard, and where its members lie."""
    stream, placed = io.BytesIO(), []
    tar = Tar(stream)
    for key, members in samples:
        entry = shards.entry(key, members)
        at = tar.size
        placed.append((key, {end: Place(place.offset + at, place.size) for end, place in entry.places.items()}))
        tar.append(entry.content)
    tar.close()
    return stream.getvalue(), placed


contents = st.dictionaries(st.sampled_from(["jpg", "cls", "json", "mask.png"]), st.binary(max_size=1500), min_size=1)


@given(st.lists(contents, max_size=5))
def test_tarfile_reads_every_member_and_each_lies_where_it_is_said_to(samples: list[dict[str, bytes]]) -> None:
    named = [(f"{number:09d}", members) for number, members in enumerate(samples)]
    content, placed = written(named)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found == {f"{key}.{ending}": data for key, members in named for ending, data in members.items()}
    for (_, members), (_, places) in zip(named, placed, strict=True):
        for ending, place in places.items():
            assert content[place.offset : place.offset + place.size] == members[ending]


def test_headers_are_those_of_the_standard_library() -> None:
    for name, size in (("000000012.mask.png", 12345), ("0.cls", 0), ("x" * 100, 8**11 - 1)):
        about = tarfile.TarInfo(name)
        about.size, about.mode = size, 0o644
        assert shards._header(name, size) == about.tobuf(tarfile.USTAR_FORMAT)


def test_what_does_not_fit_into_a_tar_member_is_refused() -> None:
    for name, size in (("x" * 101, 1), ("x", 8**11)):
        with pytest.raises(ValueError, match="do not fit"):
            shards._header(name, size)


def test_a_shard_ends_as_tar_ends_it_and_its_checksum_is_that_of_its_bytes(tmp_path: Path) -> None:
    content, _ = written(SAMPLES)
    assert len(content) % 10240 == 0
    assert content[-1024:] == bytes(1024)
    listed = subprocess.run(["tar", "tf", "-"], input=content, capture_output=True, check=True)
    assert listed.stdout.split() == [
        b"000000007.jpg",
        b"000000007.cls",
        b"000000008.jpg",
        b"000000008.cls",
        b"000000008.json",
    ]
    assert listed.stderr == b""


def test_the_index_is_that_of_dalis_own_tool(tmp_path: Path) -> None:
    content, placed = written(SAMPLES)
    (tmp_path / "a.tar").write_bytes(content)
    program = Path(sys.executable).parent / "wds2idx"
    subprocess.run([sys.executable, program, tmp_path / "a.tar", tmp_path / "a.idx"], check=True, capture_output=True)
    assert shards.index(placed) == (tmp_path / "a.idx").read_text()
    assert shards.index_of(io.BytesIO(content)) == (tmp_path / "a.idx").read_text()


def test_members_lists_what_is_there_and_refuses_what_is_no_tar() -> None:
    content, placed = written(SAMPLES)
    found = dict(shards.members(io.BytesIO(content)))
    assert found == {f"{key}.{ending}": place for key, places in placed for ending, place in places.items()}
    with pytest.raises(ValueError, match="damaged"):
        list(shards.members(io.BytesIO(b"no tar" * 500)))


def test_checksums_differ_with_any_bit() -> None:
    known = shards.checksum(b"abc", b"def")
    assert known == shards.checksum(b"abcdef")
    assert len({known, shards.checksum(b"abb", b"def"), shards.checksum(b"abc"), shards.checksum()}) == 4

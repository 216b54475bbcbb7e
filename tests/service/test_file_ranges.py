"""Parts of a job's files: what RFC 9110 says of ranges, checked against plain slices of the bytes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import ranges
from service.api.faults import RangeError
from service.jobs import orders
from tests.service.api_shelf import Served, served

CONTENT = bytes(range(256)) * 3000


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place) as service:
        yield service


@pytest.fixture
def url(here: Served) -> str:
    job = here.submit()["id"]
    run = orders.folder_of(here.settings, job) / "run"
    run.mkdir(parents=True)
    (run / "samples.png").write_bytes(CONTENT)
    return f"/v1/jobs/{job}/files/samples.png"


def picture(here: Served, url: str) -> Path:
    return orders.folder_of(here.settings, url.split("/")[3]) / "run" / "samples.png"


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=0-999", slice(0, 1000)),
        ("bytes=700000-", slice(700_000, None)),
        ("bytes=300000-99999999999", slice(300_000, None)),
        ("bytes=-5", slice(-5, None)),
        ("bytes=-99999999", slice(0, None)),
        ("BYTES= 1-2 ", slice(1, 3)),
    ],
)
def test_one_range_is_answered_by_exactly_its_bytes(here: Served, url: str, asked: str, part: slice) -> None:
    answer = here.client.get(url, headers={"Range": asked})
    start, end, _ = part.indices(len(CONTENT))
    assert (answer.status_code, answer.content) == (206, CONTENT[part])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-security-policy"].startswith("sandbox")


@pytest.mark.parametrize(
    "asked",
    [
        *(
            "bytes=",
            "bytes=-",
            "bytes",
            "bytes=a-b",
            "bytes=5-2",
            "bytes=--5",
            "bytes=+1-2",
            "bytes=0x1-2",
            "lines=0-1",
        ),
        *("bytes=0-1,3-4", "bytes=0-,0-,0-,0-,0-", "bytes=1-2;3", "bytes=" + "9" * 5000 + "-", "bytes=²-3", "", "\t"),
        "bytes=" + ",".join(f"{n}-{n}" for n in range(500)),
    ],
)
def test_what_is_no_single_range_gets_the_whole_file(here: Served, url: str, asked: str) -> None:
    answer = here.client.get(url, headers={"Range": asked.encode()})
    assert (answer.status_code, answer.content == CONTENT) == (200, True)
    assert answer.headers["accept-ranges"] == "bytes"
    assert "content-range" not in answer.headers


@pytest.mark.parametrize("asked", [f"bytes={len(CONTENT)}-", "bytes=9999999999999999999-", "bytes=-0"])
def test_a_range_beyond_the_end_is_told_how_long_the_file_is(here: Served, url: str, asked: str) -> None:
    answer = here.client.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
    assert answer.json()["error"]["type"] == "RangeError"


def test_of_an_empty_file_there_is_no_part(here: Served, url: str) -> None:
    picture(here, url).write_bytes(b"")
    assert here.client.get(url, headers={"Range": "bytes=0-"}).status_code == 416
    assert here.client.get(url).content == b""


def test_a_part_is_added_only_to_the_file_that_it_was_a_part_of(here: Served, url: str) -> None:
    head = {"Range": "bytes=10-19"}
    tag = here.client.get(url, headers=head).headers["etag"]
    assert tag == here.client.get(url).headers["etag"]
    assert here.client.get(url, headers=head | {"If-Range": tag}).status_code == 206
    for other in ("W/" + tag, tag.strip('"'), '"other"', "Sun, 06 Nov 1994 08:49:37 GMT", ""):
        assert here.client.get(url, headers=head | {"If-Range": other}).status_code == 200, other
    # Written anew within the same tick, and with as many bytes: it is another file all the same.
    state = picture(here, url).stat()
    beside = picture(here, url).with_name("beside")
    beside.write_bytes(CONTENT[::-1])
    os.utime(beside, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(beside, picture(here, url))
    changed = here.client.get(url, headers=head | {"If-Range": tag})
    assert (changed.status_code, changed.content) == (200, CONTENT[::-1])
    assert changed.headers["etag"] != tag


def test_a_link_is_not_followed_for_a_part_either(here: Served, url: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("not yours")
    picture(here, url).unlink()
    picture(here, url).symlink_to(tmp_path / "outside")
    answer = here.client.get(url, headers={"Range": "bytes=0-3"})
    assert answer.status_code == 404
    assert "not" not in answer.text.split('"message"')[0]


@given(
    size=st.integers(0, 40),
    first=st.one_of(st.none(), st.integers(0, 50)),
    last=st.one_of(st.none(), st.integers(0, 50)),
)
def test_any_range_is_the_slice_that_the_standard_says(size: int, first: int | None, last: int | None) -> None:
    asked = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        assert ranges.wanted(asked, None, size, '"t"') is None
        return
    if first is None:
        expected = list(range(size))[-last:] if last else []
    else:
        expected = [place for place in range(size) if first <= place and (last is None or place <= last)]
    try:
        found = ranges.wanted(asked, None, size, '"t"')
    except RangeError:
        assert not expected
        return
    # An empty part is no part.
    assert found is not None
    assert expected
    assert list(range(*found)) == expected

import os
import pickle
import resource
import threading

import numpy as np
import pytest
from killing import after_each_kill

from pipelines.errors import DataError, UnreachableError
from pipelines.files import Kept, LocalFiles, open_files
from pipelines.remote import RemoteFiles

CONTENT = np.random.default_rng(0).bytes(50_000)


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() + CONTENT)
    (tmp_path / "empty").write_bytes(b"")
    return LocalFiles(tmp_path)


def test_whole_files_and_ranges_are_what_is_on_disk(files):
    assert files.read("a") == b"a" + CONTENT
    assert files.read("a", 10) == CONTENT[9:]
    assert files.read("b", 1, 7) == CONTENT[:7]
    assert files.read("b", 50_000, 1) == CONTENT[-1:]
    assert files.read("empty") == files.read("a", 99_999) == b""
    assert type(files.read("a", 0, 5)) is bytes


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret", "sub/../../secret", "a/.."])
@pytest.mark.parametrize("size", [None, 1])
def test_what_leaves_the_root_is_refused(files, path, size):
    with pytest.raises(DataError, match="leaves the data folder"):
        files.read(path, 0, size)


def test_two_dots_in_a_name_are_no_way_out(files, tmp_path):
    (tmp_path / "a..b").write_bytes(b"fine")
    assert files.read("a..b") == b"fine"


@pytest.mark.parametrize("size", [None, 5])
def test_a_missing_file_and_a_folder_are_named(files, tmp_path, size):
    (tmp_path / "folder").mkdir()
    for path in ("absent", "folder"):
        with pytest.raises(DataError, match=f"{tmp_path / path}: cannot be read"):
            files.read(path, 0, size)


@pytest.mark.parametrize("size", [None, 5])
def test_a_root_that_is_gone_or_not_mounted_is_no_fault_of_the_file(files, tmp_path, size):
    with pytest.raises(DataError) as caught:
        files.read("absent", 0, size)
    assert not isinstance(caught.value, UnreachableError)
    (tmp_path / "empty place").mkdir()
    for root in (tmp_path / "nowhere", tmp_path / "empty place"):
        with pytest.raises(UnreachableError, match=f"{root}/a: cannot be read.*mount it again"):
            LocalFiles(root).read("a", 0, size)


def test_a_failing_disk_is_no_fault_of_the_file():
    # The kernel answers with EIO for the first page of a process, which is never mapped.
    with pytest.raises(
        UnreachableError, match=r"/proc/self/mem: cannot be read \(Input/output error\); check the disk"
    ):
        LocalFiles("/proc/self").read("mem", 0, 8)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 2**40), (0, 2**62), (2**63 - 10, 5), (2**63 - 1, 2**63 - 1), (0, -1), (-1, 5)]
)
def test_a_place_that_cannot_be_in_the_file_is_a_fault_of_the_file(files, offset, size):
    with pytest.raises(DataError, match="ends before") as caught:
        files.read("a", offset, size)
    assert not isinstance(caught.value, UnreachableError)


def test_a_truncated_shard_is_named_and_read_again_once_it_is_restored(files, tmp_path):
    assert files.read("a", 40_000, 100) == CONTENT[39_999:40_099]
    os.truncate(tmp_path / "a", 40_050)
    with pytest.raises(DataError, match=rf"{tmp_path / 'a'}: ends before the 100 bytes at 40000"):
        files.read("a", 40_000, 100)
    (tmp_path / "new").write_bytes(b"a" + CONTENT)
    (tmp_path / "new").replace(tmp_path / "a")
    assert files.read("a", 40_000, 100) == CONTENT[39_999:40_099]


def test_a_shard_that_disappears_is_read_on_by_who_has_it_open_and_named_by_others(files, tmp_path):
    files.read("a", 0, 1)
    (tmp_path / "a").unlink()
    (tmp_path / "b").unlink()
    assert files.read("a", 1, 3) == CONTENT[:3]
    with pytest.raises(DataError, match=str(tmp_path / "b")):
        files.read("b", 0, 1)


def test_no_more_descriptors_stay_open_than_allowed_and_all_are_closed_at_the_end(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    # Whatever this process has open by now, there is room for a quarter of the limit, and there are more files.
    limit = 2 * before + 40
    count = min(limit // 4 + 20, 250)
    for number in range(count):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 10)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        few = LocalFiles(tmp_path)
        for number in [*range(count), *range(count)]:
            assert few.read(f"{number}", 2, 3) == bytes([number]) * 3
        assert len(os.listdir("/proc/self/fd")) - before <= limit // 4 < count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    del few
    assert len(os.listdir("/proc/self/fd")) == before


def test_reads_from_many_threads_never_meet_a_descriptor_that_another_one_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.files.MOST_OPEN", 2)
    for number in range(8):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 1000)
    files, wrong = LocalFiles(tmp_path), []

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 8, 2000).tolist():
            try:
                if files.read(f"{number}", 10, 500) != bytes([number]) * 500:
                    wrong.append(number)
            except DataError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_files_that_were_removed_are_given_up_when_asked(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    kept = Kept(lambda path: os.open(tmp_path / path, os.O_RDONLY))
    first = kept.get("a")
    assert kept.get("a") is first
    (tmp_path / "a").unlink()
    (tmp_path / "a").write_bytes(b"new")
    kept.forget_removed()
    assert os.pread(kept.get("a").number, 3, 0) == b"new"
    assert os.pread(first.number, 3, 0) == b"old"


def test_another_process_gets_the_folder_alone(files):
    files.read("a", 0, 1)
    data = pickle.dumps(files)
    assert len(data) < 500
    assert pickle.loads(data).read("a", 0, 1) == b"a"


def test_a_folder_opens_local_files(tmp_path):
    assert isinstance(open_files(tmp_path), LocalFiles)
    assert isinstance(open_files(str(tmp_path)), LocalFiles)


def test_to_expect_what_is_not_there_is_no_error(files):
    files.expect("a", 0, 1000)
    files.expect("absent", 0, 1000)


def test_a_copy_of_a_remote_file_is_whole_or_not_there_after_a_power_cut(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "shard.tar").write_bytes(b"content")

    def read(place):
        return RemoteFiles(f"file://{tmp_path / 'far'}", place, 10**6).read("shard.tar")

    for place in after_each_kill(tmp_path / "near", lambda place: None, read, power=True):
        assert read(place) == b"content"

"""What the kernel says of memory: its counters in words, and the groups that it limits."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.jobs import memory, memory_group
from service.jobs.backends.local import backend as local
from service.jobs.memory_group import Group
from tests.service.job_specs import settings

UNIFIED = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


def counting(folder: Path, monkeypatch: pytest.MonkeyPatch, groups: str) -> None:
    """Let the kernel's files be those of `folder`."""
    (folder / "memory/ours").mkdir(parents=True)
    (folder / "ours").mkdir()
    (folder / "groups").write_text(groups)
    monkeypatch.setattr(memory, "_GROUPS", folder / "groups")
    monkeypatch.setattr(memory, "_MACHINE", folder / "vmstat")
    monkeypatch.setattr(memory, "_MOUNTED", folder)


@pytest.mark.parametrize(
    ("groups", "before", "after", "for_memory", "said"),
    [
        # Version 2; the whole machine counts what others were killed for as well.
        ("0::/ours\n", (3, 0), (5, 1), True, ""),
        ("0::/ours\n", (3, 4), (5, 4), False, "somebody else"),
        # Version 1, beside a tree of version 2 that has no memory in it.
        ("4:memory:/ours\n0::/\n", (3, 7), (4, 8), True, ""),
        ("4:memory:/ours\n0::/\n", (3, 7), (3, 7), False, "somebody else"),
        # The machine's own group says nothing about us, so only the whole counts.
        ("0::/\n", (3, 0), (4, 0), False, "perhaps for memory"),
        ("0::/\n", (3, 0), (3, 0), False, "somebody else"),
        ("0::/\n", None, None, False, "does not count"),
    ],
)
def test_a_kill_is_taken_for_one_for_memory_only_where_the_kernel_says_so(
    groups: str,
    before: tuple[int, int] | None,
    after: tuple[int, int] | None,
    for_memory: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting(tmp_path, monkeypatch, groups)

    def count(numbers: tuple[int, int] | None) -> None:
        if numbers is None:
            return
        (tmp_path / "vmstat").write_text(f"nr_free_pages 12\noom_kill {numbers[0]}\n")
        (tmp_path / "ours/memory.events").write_text(f"low 0\nmax 9\noom 9\noom_kill {numbers[1]}\noom_group_kill 0\n")
        older = f"oom_kill_disable 0\nunder_oom 0\noom_kill {numbers[1]}\n"
        (tmp_path / "memory/ours/memory.oom_control").write_text(older)
        if "memory" in groups:
            (tmp_path / "ours/memory.events").unlink()

    count(before)
    kills = memory.Kills()
    count(after)
    found, told = memory.explain(kills)
    assert found is for_memory
    assert said in told
    assert bool(told) != for_memory


def test_this_machine_counts_what_it_kills() -> None:
    assert memory.Kills().on_machine() is False


def test_a_watch_is_told_of_too_much_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    own, looks = psutil.Process(), []

    def family() -> list[psutil.Process]:
        looks.append(now[0])
        return [own]

    roomy, tight = memory.Watch(10**15), memory.Watch(1_000_000)
    assert roomy.look(family) == 0
    assert tight.look(family) > 1_000_000
    # What is too much was looked at twice.
    now[0] += 0.5
    assert (tight.look(family), len(looks)) == (0, 3)
    now[0] += 0.6
    assert tight.look(family) > 1_000_000


def test_a_mapped_file_larger_than_the_limit_is_not_the_job_s_memory() -> None:
    size, limit = 192 << 20, 96 << 20
    line = (
        "import mmap, sys\n"
        f"held = mmap.mmap(0, {size}, access=mmap.ACCESS_READ)\n"
        f"print(sum(held[at] for at in range(0, {size}, 4096)), flush=True)\n"
        "sys.stdout.close(); import time; time.sleep(600)"
    )
    # Not the folder for files that may be lost: that is memory on some machines.
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.truncate(size)
        with subprocess.Popen([sys.executable, "-c", line], stdin=file, stdout=subprocess.PIPE) as child:
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == b"0\n"
                process = psutil.Process(child.pid)
                # The kernel does count it as this process's, but for what it may have taken back since.
                assert process.memory_full_info().pss > limit
                assert 2 << 20 < memory.used([process]) < 64 << 20
                assert memory.Watch(limit).look(lambda: [process]) == 0
            finally:
                child.kill()


@pytest.mark.parametrize(
    ("rollup", "expected_kib"),
    [
        # As Linux 6 tells it, and as before 5.4: then at least the file's pages are taken off.
        ("Rss: 9000 kB\nPss: 7000 kB\nPss_Anon: 1500 kB\nPss_File: 5000 kB\nPss_Shmem: 500 kB\n", 2000),
        ("Rss: 9000 kB\nPss: 7000 kB\nShared_Clean: 100 kB\n", 1800),
        ("Rss: 9000 kB\nPss: 5000 kB\n", 0),
    ],
)
def test_what_is_mapped_of_files_is_left_out_whatever_the_kernel_tells(
    rollup: str, expected_kib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / str(os.getpid())
    told.mkdir()
    (told / "smaps_rollup").write_text(f"55d0c000-7ffe1000 ---p 00000000 00:00 0    [rollup]\n{rollup}")
    (told / "status").write_text("Name:\tpython\nVmRSS:\t9000 kB\nRssAnon:\t3000 kB\nRssFile:\t5200 kB\n")
    monkeypatch.setattr(memory, "_PROCESSES", tmp_path)
    assert memory.used([psutil.Process()]) == 1024 * expected_kib


def test_a_process_that_may_not_be_looked_at_counts_what_it_has_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_PROCESSES", tmp_path)
    resident = psutil.Process().memory_info()
    assert memory.used([psutil.Process()]) == pytest.approx(resident.rss - resident.shared, rel=0.1)


# Some children that share 60 MiB, and leave nothing behind when they end.
SHARERS = """
import mmap, os, signal, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
shared = mmap.mmap(-1, 60 << 20)
shared.write(b"x" * (60 << 20))
there, told = os.pipe()
for _ in range(4):
    if not os.fork():
        sum(shared[at] for at in range(0, 60 << 20, 4096))
        os.write(told, b".")
        time.sleep(600)
count = 4
while count: count -= len(os.read(there, count))
print("shared", flush=True)
time.sleep(600)
"""


class EndingOneByOne(list[psutil.Process]):
    """All but the last end as soon as the second look has gone by them; the first only adds up what is resident."""

    looks = 0

    def __iter__(self) -> Iterator[psutil.Process]:
        self.looks += 1
        for process in super().__iter__():
            yield process
            if self.looks == 2 and process is not self[-1]:
                process.kill()
                process.wait(60)


def test_what_ends_while_it_is_summed_up_does_not_make_the_rest_too_large() -> None:
    limit, families = 100 << 20, []
    with subprocess.Popen([sys.executable, "-c", SHARERS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"shared\n"
        stays = psutil.Process(parent.pid)
        try:
            # As they really are they take less.
            everybody = [*stays.children(), stays]
            assert memory.used(everybody) < limit

            def family() -> list[psutil.Process]:
                families.append(EndingOneByOne([*stays.children(), stays]))
                return families[-1]

            assert memory.Watch(limit).look(family) == 0
            assert [len(one) for one in families] == [5, 1]
        finally:
            for one in [*stays.children(), stays]:
                one.kill()


def test_a_process_that_has_gone_takes_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        child.kill()
        child.wait()
        assert memory.used([process]) == 0


def test_a_group_is_made_only_where_the_kernel_limits_it(tmp_path: Path) -> None:
    # A folder is no tree of groups: in a new one there are no files to write a limit into.
    (tmp_path / "cgroup.subtree_control").write_text("memory")
    assert memory_group.below(tmp_path, "job", 10**9) is None
    assert not (tmp_path / "job").exists()
    for name in ("memory.max", "memory.oom.group", "memory.swap.max"):
        (tmp_path / "job").mkdir(exist_ok=True)
        (tmp_path / "job" / name).touch()
    found = memory_group.below(tmp_path, "job", 10**9)
    assert found is not None
    assert (found.path / "memory.max").read_text() == "1000000000"
    assert (found.path / "memory.oom.group").read_text() == "1"
    assert found.kills() == 0
    (found.path / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 1\n")
    assert found.kills() == 2


def test_a_tree_that_nobody_has_handed_over_is_left_alone() -> None:
    before = {path: set(os.listdir(path)) for path in UNIFIED if path.exists()}
    assert memory_group.made("lorot-test-none", 10**9) is None
    assert {path: set(os.listdir(path)) for path in before} == before


def test_what_a_killed_runner_has_left_of_its_group_is_cleared_away_with_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tree = "lorot-0123456789ab-2", tmp_path / "tree"
    others = [tree / "service", tree / "lorot-0123456789ab-1", tmp_path / name]
    for path in (tree / name, *others):
        path.mkdir(parents=True)
    backend = local.Local(settings(tmp_path))
    monkeypatch.setattr(memory_group, "_handed_over", lambda: None)
    backend.remove(name, {})
    assert (tree / name).exists()
    monkeypatch.setattr(memory_group, "_handed_over", lambda: tree)
    for one in (name, name, "service", "", f"../{name}"):
        backend.remove(one, {})
    assert not (tree / name).exists()
    assert all(path.exists() for path in others)


def test_a_process_of_the_service_clears_away_the_group_that_another_has_made_beside_it() -> None:
    mounted = next((path for path in UNIFIED if (path / "cgroup.procs").exists()), None)
    if mounted is None:
        pytest.skip("there are no groups of processes of version 2 here")
    tree, name = mounted / f"lorot-test-tree-{os.getpid()}", "lorot-0123456789ab-1"
    service, left, used = tree / "service", tree / name, tree / "lorot-0123456789ab-2"
    line = "import sys; from service.jobs import memory_group as g; [g.let_go(one) for one in sys.argv[1:]]"
    try:
        try:
            for path in (tree, service, left, used):
                path.mkdir()
            os.setxattr(tree, "trusted.delegate", b"1")
        except OSError as error:
            pytest.skip(f"no tree of groups can be handed over here: {error}")
        runs = [sys.executable, "-c", line, left.name, used.name]
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=Group(used).enter):
            assert Group(used).path.exists()
            subprocess.run(runs, check=True, timeout=60, preexec_fn=Group(service).enter)
            assert (left.exists(), used.exists()) == (False, True)
    finally:
        for path in (used, left, service, tree):
            Group(path).remove()
    assert not tree.exists()


def test_a_process_that_enters_a_group_is_there_with_its_children() -> None:
    mounted = next((path for path in UNIFIED if (path / "cgroup.procs").exists()), None)
    group = None if mounted is None else Group(mounted / f"lorot-test-{os.getpid()}")
    try:
        if group is None:
            raise PermissionError("there is none")
        group.path.mkdir()
    except OSError as error:
        pytest.skip(f"no group of processes of version 2 may be made here: {error}")
    line = "import subprocess; child = subprocess.Popen(['cat']); print(child.pid, flush=True); child.wait()"
    try:
        with subprocess.Popen(
            [sys.executable, "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=group.enter,
            text=True,
        ) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert group.holds(parent.pid)
            assert group.holds(child)
            assert not group.holds(os.getpid())
            group.remove()
            assert group.path.exists()
            assert parent.stdin is not None
            parent.stdin.close()
    finally:
        group.remove()
    assert not group.path.exists()

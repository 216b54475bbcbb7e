"""What `lorot gc` removes, and what it never does: told from a real folder of jobs and real checkpoints."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from service import resolution, store
from service.commands import operations
from service.errors import TrackingError
from service.jobs import job_tags
from service.jobs.job import Job, State
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from service.operations import checkpoints, garbage, removal
from service.operations.garbage import DAY_S, Findings, Rules
from service.operations.lookup import Lookup
from service.training import checkpoint

NOW_S = time.time()
IDS = [f"{number:032x}" for number in range(0xA0, 0xB0)]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    monkeypatch.setenv("LOROT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "jobs").mkdir()
    return ServiceSettings(results=tmp_path / "jobs", state=tmp_path / "state")


def job(number: int, state: State = "finished", days: float = 40, **spec: object) -> Job:
    ended_s = NOW_S - days * DAY_S if state in ("finished", "failed", "killed") else 0.0
    return Job(IDS[number], "1", JobSpec.model_validate(spec), state, ended_s=ended_s)


def fill(settings: ServiceSettings, number: int, *steps: int, run: str = "run") -> Path:
    """A job's folder with a real checkpoint for each step."""
    folder = settings.results / IDS[number] / run
    for step in steps:
        parts = {"weights": {"w": torch.full((100,), float(step))}, "optimizer": {"m.w": torch.zeros(10)}}
        checkpoint.save(folder / "checkpoints", step, parts, facts={})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def age(path: Path, days: float) -> None:
    """Let everything there be that old."""
    for place in (path, *path.rglob("*")):
        os.utime(place, (NOW_S - days * DAY_S,) * 2, follow_symlinks=False)


def find(settings: ServiceSettings, jobs: list[Job], unknown: set[str] | None = None, **rules: object) -> Findings:
    return garbage.find(settings, jobs, Rules(**rules), lambda run_id: run_id in (unknown or set()), NOW_S)  # type: ignore[arg-type]


def remove(found: Findings, **rules: object) -> list[str]:
    return garbage.remove(found, lambda job_id: True, Rules(**rules))  # type: ignore[arg-type]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def contents(root: Path) -> dict[str, bytes | None]:
    """Every entry below a folder, and what files hold."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(root.rglob("*"))
    }


def test_of_a_job_that_has_finished_long_ago_the_checkpoints_go_and_nothing_else(settings: ServiceSettings) -> None:
    folder = fill(settings, 0, 10, 20, 30)
    before = contents(settings.results)
    found = find(settings, [job(0)])
    assert contents(settings.results) == before
    assert found.num_bytes == sum(len(content or b"") for path, content in before.items() if "/step-" in path)
    assert remove(found) == []
    assert steps(folder) == []
    assert contents(settings.results) == {path: own for path, own in before.items() if "/step-" not in path}


@pytest.mark.parametrize("state", ["queued", "starting", "running", "stopping"])
def test_nothing_of_a_job_that_has_not_ended_is_found(settings: ServiceSettings, state: State) -> None:
    folder = fill(settings, 0, 10, 20)
    (folder / "checkpoints" / ".step-00000030.writing").mkdir()
    attempt = settings.results / IDS[0] / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt / "log-node0.txt").write_text("line\n" * 1000)
    age(settings.results, 400)
    found = find(settings, [job(0, state)], {IDS[0]}, drop_resumable=True, log_bytes=100, older_than_s=0)
    assert found.items == []


def test_a_job_that_ended_lately_is_left_alone_and_the_age_can_be_chosen(settings: ServiceSettings) -> None:
    folder = fill(settings, 0, 10)
    assert find(settings, [job(0, days=29)]).items == []
    assert find(settings, [job(0, days=29)], older_than_s=30 * DAY_S).items == []
    remove(find(settings, [job(0, days=29)], older_than_s=28 * DAY_S))
    assert steps(folder) == []


@pytest.mark.parametrize("state", ["failed", "killed"])
def test_what_a_job_would_go_on_from_stays_and_it_is_the_one_that_training_would_take(
    settings: ServiceSettings, state: State
) -> None:
    folder = fill(settings, 0, 10, 20, 30, 40)
    weights = folder / "checkpoints" / "step-00000040" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (folder / "checkpoints" / "step-00000030" / "optimizer.safetensors").unlink()
    taken, _ = checkpoint.newest(folder / "checkpoints")
    assert taken is not None
    assert taken.step == 20
    remove(find(settings, [job(0, state)]))
    assert steps(folder) == [20]
    assert checkpoint.newest(folder / "checkpoints")[0] == taken
    remove(find(settings, [job(0, state)], drop_resumable=True))
    assert steps(folder) == []


def test_where_no_checkpoint_is_sound_all_stay_for_a_person(settings: ServiceSettings) -> None:
    folder = fill(settings, 0, 10, 20)
    for index in folder.glob("checkpoints/*/checkpoint.json"):
        index.write_text(index.read_text().replace('"step"', '"stop"'))
    found = find(settings, [job(0, "failed")])
    assert found.items == []
    assert "sound" in found.notes[0]


def test_soundness_is_judged_as_training_does(settings: ServiceSettings) -> None:
    folder = fill(settings, 0, 10)
    place = (IDS[0], "run", "checkpoints", "step-00000010")
    path = settings.results.joinpath(*place)
    whole = contents(path)
    assert checkpoints.is_sound(settings.results, place)
    for name, content in whole.items():
        assert content is not None
        for damaged in (content[:-1], content + b" ", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b""):
            (path / name).write_bytes(damaged)
            try:
                checkpoint.read(path).verify()
                is_sound = True
            except Exception:
                is_sound = False
            assert checkpoints.is_sound(settings.results, place) == is_sound, (name, len(damaged))
        (path / name).write_bytes(content)
    assert checkpoint.newest(folder / "checkpoints")[0] is not None


def test_a_checkpoint_whose_index_names_a_file_elsewhere_is_not_sound(settings: ServiceSettings) -> None:
    place = (IDS[0], "run", "checkpoints", "step-00000010")
    fill(settings, 0, 10)
    path = settings.results.joinpath(*place)
    index = json.loads((path / "checkpoint.json").read_text())
    name, own = next(iter(index["files"].items()))
    (path.parent / name).write_bytes((path / name).read_bytes())
    index["files"] = {f"../{name}": own}
    content = {key: value for key, value in index.items() if key != "sha256"}
    index["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(index))
    assert not checkpoints.is_sound(settings.results, place)


def test_the_newest_ones_can_be_kept_and_runs_set_aside_by_a_retry_are_not_resumed(settings: ServiceSettings) -> None:
    folder, aside = fill(settings, 0, 10, 20, 30), fill(settings, 0, 5, 15, run="run.1")
    remove(find(settings, [job(0, "failed")], keep_last=2), keep_last=2)
    assert (steps(folder), steps(aside)) == ([20, 30], [5, 15])
    remove(find(settings, [job(0, "failed")]))
    assert (steps(folder), steps(aside)) == ([30], [])


def test_weights_that_a_waiting_job_starts_from_are_not_taken_from_it(settings: ServiceSettings) -> None:
    folder = fill(settings, 0, 10)
    start = str(folder / "checkpoints" / "step-00000010" / "weights.safetensors")
    waiting = job(1, "queued", config={"model": {"init_from": start}})
    found = find(settings, [job(0), waiting])
    assert found.items == []
    assert "names it" in found.notes[0]
    remove(find(settings, [job(0), replace(waiting, state="finished", ended_s=NOW_S)]))
    assert steps(folder) == []


def test_only_the_experiments_that_are_named_are_looked_at(settings: ServiceSettings) -> None:
    folders = [fill(settings, number, 10) for number in range(3)]
    jobs = [job(0, experiment="a"), job(1, experiment="b"), job(2)]
    fill(settings, 3, 10)
    age(settings.results / IDS[3], 90)
    remove(find(settings, jobs, {IDS[3]}, experiments=("b",)))
    assert [steps(folder) for folder in folders] == [[10], [], [10]]
    remove(find(settings, jobs, {IDS[3]}, experiments=(settings.experiment,)))
    assert [steps(folder) for folder in folders] == [[10], [], []]
    assert (settings.results / IDS[3]).exists()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    "name", ["run/worker.lock", "run/launcher.lock", "run/launcher-10.0.0.1.lock", "attempts/1/runner.lock"]
)
def test_a_folder_that_a_living_process_holds_is_left_alone_whatever_the_record_says(
    settings: ServiceSettings, name: str
) -> None:
    folder = fill(settings, 0, 10)
    orphan = fill(settings, 1, 10)
    fill(settings, 2)
    age(settings.results, 90)
    with locked(settings.results / IDS[0] / name), locked(settings.results / IDS[1] / name):
        found = garbage.find(settings, [job(0), job(2)], Rules(), lambda run_id: True, NOW_S + 5 * DAY_S + 30 * DAY_S)
        assert found.items == []
        assert len(found.notes) == 2
    found = find(settings, [job(0), job(2)])
    with locked(settings.results / IDS[0] / name):
        # Somebody has taken it between the looking and the removing.
        assert "stays" in remove(found)[0]
    assert (steps(folder), steps(orphan)) == ([10], [10])


def test_signs_of_life_of_another_machine_count_as_long_as_they_are_fresh(settings: ServiceSettings) -> None:
    folder = fill(settings, 0, 10)
    owner = folder / "owner.json"
    owner.write_text(json.dumps({"host": "elsewhere", "beat": 7}))
    os.utime(owner, (NOW_S - 5,) * 2)
    assert find(settings, [job(0)]).items == []
    os.utime(owner, (NOW_S - 3600,) * 2)
    assert len(find(settings, [job(0)]).items) == 1


def test_a_job_that_was_started_again_since_it_was_looked_at_keeps_everything(settings: ServiceSettings) -> None:
    folders = [fill(settings, number, 10, 20) for number in range(2)]
    found = find(settings, [job(0), job(1)])
    problems = garbage.remove(found, lambda job_id: job_id != IDS[0], Rules())
    assert [steps(folder) for folder in folders] == [[10, 20], []]
    assert len(problems) == 1


def test_a_folder_in_no_record_goes_after_a_day_and_only_if_the_server_has_never_heard_of_it(
    settings: ServiceSettings,
) -> None:
    for number, days in ((0, 0.0), (1, 0.9), (2, 1.1), (3, 1.1)):
        age(fill(settings, number, 10).parent, days)
    # One file was written to just now, in a folder that is old.
    age(fill(settings, 4, 10).parent, 5)
    (settings.results / IDS[4] / "run" / "metrics.jsonl").write_text("")
    (settings.results / "mine").mkdir()
    (settings.results / "mine" / "notes.txt").write_text("of the operator")
    age(settings.results / "mine", 500)
    unknown = {IDS[1], IDS[2], IDS[4]}
    found = find(settings, [job(0, "queued")], unknown, older_than_s=0)
    assert [item.path for item in found.items] == [settings.results / IDS[2]]
    assert found.num_bytes == sum(len(own or b"") for own in contents(settings.results / IDS[2]).values())
    remove(found)
    assert sorted(path.name for path in settings.results.iterdir()) == sorted([IDS[0], IDS[1], IDS[3], IDS[4], "mine"])


def test_a_record_that_knows_none_of_the_folders_is_taken_for_the_wrong_one(settings: ServiceSettings) -> None:
    for number in range(3):
        age(fill(settings, number, 10).parent, 90)
    found = find(settings, [job(9)], set(IDS))
    assert found.items == []
    assert "right settings" in found.notes[0]


def test_a_record_that_does_not_answer_ends_it_before_anything_is_removed(settings: ServiceSettings) -> None:
    age(fill(settings, 0, 10).parent, 90)
    folder = fill(settings, 1, 10)

    def ask(run_id: str) -> bool:
        raise TrackingError("away")

    with pytest.raises(TrackingError):
        garbage.find(settings, [job(1)], Rules(), ask, NOW_S)
    assert steps(folder) == [10]


def test_long_logs_are_cut_to_their_last_lines(settings: ServiceSettings) -> None:
    attempt = settings.results / IDS[0] / "attempts" / "2"
    attempt.mkdir(parents=True)
    lines = [f"line {number}\n" for number in range(5000)]
    (attempt / "log-node0.txt").write_text("".join(lines))
    (attempt / "log-node1.txt").write_text("short\n")
    (attempt / "exit.json").write_text("{}" + " " * 50_000)
    (attempt / "log-node0.txt").chmod(0o640)
    before = (attempt / "log-node0.txt").stat().st_size
    found = find(settings, [job(0)], log_bytes=2000)
    assert [(item.kind, item.num_bytes) for item in found.items] == [("log", before - 2000)]
    remove(found, log_bytes=2000)
    head, *rest = (attempt / "log-node0.txt").read_text().splitlines(keepends=True)
    assert "lorot gc" in head
    assert rest == lines[-len(rest) :]
    assert 1900 < (attempt / "log-node0.txt").stat().st_size <= 2000
    assert (attempt / "log-node0.txt").stat().st_mode & 0o777 == 0o640
    assert (attempt / "log-node1.txt").read_text() == "short\n"
    assert (attempt / "exit.json").stat().st_size == 50_002
    assert find(settings, [job(0)], log_bytes=2000).items == []


def test_links_are_never_followed_wherever_they_are(settings: ServiceSettings, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    for name in ("checkpoints/step-00000010", "run/checkpoints/step-00000010", "1"):
        (treasure / name).mkdir(parents=True)
        (treasure / name / "weights.safetensors").write_text("precious")
    (treasure / "1" / "log-node0.txt").write_text("precious\n" * 1000)
    (treasure / "log-node0.txt").write_text("precious\n" * 1000)
    age(treasure, 90)
    before = contents(treasure)
    for number in range(5):
        (settings.results / IDS[number]).mkdir()
    (settings.results / IDS[0] / "run").symlink_to(treasure)
    (settings.results / IDS[1] / "run").mkdir()
    (settings.results / IDS[1] / "run" / "checkpoints").symlink_to(treasure / "checkpoints")
    fill(settings, 2)
    (settings.results / IDS[2] / "run" / "checkpoints").mkdir()
    (settings.results / IDS[2] / "run" / "checkpoints" / "step-00000010").symlink_to(
        treasure / "checkpoints" / "step-00000010"
    )
    (settings.results / IDS[3] / "attempts").symlink_to(treasure)
    (settings.results / IDS[4] / "attempts" / "1").mkdir(parents=True)
    (settings.results / IDS[4] / "attempts" / "1" / "log-node0.txt").symlink_to(treasure / "log-node0.txt")
    (settings.results / IDS[5]).symlink_to(treasure)
    # An orphan: it may go, but what its link leads to may not.
    age(fill(settings, 6, 10).parent, 90)
    (settings.results / IDS[6] / "link").symlink_to(treasure)
    os.utime(settings.results / IDS[6], (NOW_S - 90 * DAY_S,) * 2)
    os.utime(settings.results / IDS[6] / "link", (NOW_S - 90 * DAY_S,) * 2, follow_symlinks=False)
    # Nor is one followed that has the name of a job without a record.
    (settings.results / IDS[7]).symlink_to(treasure)
    (settings.results / f".{IDS[8]}.leaving").symlink_to(treasure)
    found = find(settings, [job(number) for number in range(6)], set(IDS), log_bytes=100, drop_resumable=True)
    assert [item.path for item in found.items] == [settings.results / IDS[6]]
    assert remove(found) == []
    assert contents(treasure) == before
    assert not (settings.results / IDS[6]).exists()


def test_a_link_that_is_put_in_the_way_after_the_looking_leads_nowhere(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    folder = fill(settings, 0, 10)
    other = fill(settings, 1, 10)
    found = find(settings, [job(0)])
    shutil.rmtree(folder)
    folder.symlink_to(other)
    assert remove(found) != []
    assert steps(other) == [10]


def test_killed_between_renaming_and_deleting_the_next_one_clears_it_away(
    settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(settings, 0, 10, 20)
    age(fill(settings, 1, 10).parent, 90)
    unknown = {IDS[1]}

    def die(name: str, *, dir_fd: int) -> None:
        """As far as the first file."""
        place = Path(f"/proc/self/fd/{dir_fd}/{name}")
        place.stat()
        next(path for path in place.rglob("*") if path.is_file()).unlink()
        raise KeyboardInterrupt

    for _ in range(3):
        found = find(settings, [job(0)], unknown)
        with monkeypatch.context() as patched:
            patched.setattr(removal.shutil, "rmtree", die)
            with pytest.raises(KeyboardInterrupt):
                remove(found)
        # What is half gone has no checkpoint's name at any moment.
        for path in checkpoint.find(folder / "checkpoints"):
            checkpoint.read(path).verify()
    remove(find(settings, [job(0)], unknown))
    assert list((folder / "checkpoints").iterdir()) == []
    assert [path.name for path in settings.results.iterdir()] == [IDS[0]]


def test_what_a_killed_training_never_finished_writing_goes_and_what_stepped_aside_stays(
    settings: ServiceSettings,
) -> None:
    folder = fill(settings, 0, 10)
    (folder / "checkpoints" / ".step-00000020.writing").mkdir()
    (folder / "checkpoints" / ".step-00000010.old").mkdir()
    remove(find(settings, [job(0, "failed")]))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [".step-00000010.old", "step-00000010"]


def test_models_that_were_fetched_and_not_read_since_go(settings: ServiceSettings) -> None:
    models = resolution.cache_folder() / "models"
    for number, days in ((0, 40), (1, 40), (2, 10)):
        kept = models / f"{number:064x}"
        kept.mkdir(parents=True)
        (kept / "model.safetensors").write_bytes(bytes(1000))
        age(kept, days)
    os.utime(models / f"{1:064x}" / "model.safetensors", (NOW_S - DAY_S, NOW_S - 40 * DAY_S))
    (models / "mine").mkdir()
    age(models / "mine", 500)
    found = find(settings, [])
    assert [(item.path.name, item.num_bytes) for item in found.items] == [(f"{0:064x}", 1000)]
    remove(found)
    assert sorted(path.name for path in models.iterdir()) == [f"{1:064x}", f"{2:064x}", "mine"]


def record(uri: str, made: Job) -> str:
    """A job in a real MLflow; returns its id."""
    api = store.client(uri)
    run = api.create_run("0", run_name="job", tags=job_tags.encode(made))
    return str(run.info.run_id)


@pytest.fixture
def operated(place: str, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """The commands, with the settings of a service whose record is real."""
    (tmp_path / "service.yaml").write_text("results: jobs\nstate: state\n")

    import typer

    app = typer.Typer()
    operations.add_to(app)

    def run(*line: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*line, "--settings", "service.yaml"])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return run


def test_the_dry_run_says_what_the_real_run_does_and_does_nothing(
    operated: Callable[..., tuple[int, str]], place: str, tmp_path: Path
) -> None:
    old, lost = record(place, job(0)), record(place, job(0, "failed"))
    api = store.client(place)
    deleted = record(place, job(0))
    api.delete_run(deleted)
    strange = "f" * 32
    for job_id in (old, lost, deleted, strange):
        folder = tmp_path / "jobs" / job_id / "run"
        for step in (10, 20):
            checkpoint.save(folder / "checkpoints", step, {"weights": {"w": torch.ones(step)}}, facts={})
        age(folder.parent, 90)
    before = contents(tmp_path / "jobs")
    code, told = operated("gc", "--dry-run")
    assert code == 0
    assert contents(tmp_path / "jobs") == before
    code, done = operated("gc")
    assert code == 0
    assert told.splitlines()[:-1] == done.splitlines()[:-1]
    gone = sorted(path for path in before.keys() - contents(tmp_path / "jobs").keys() if path.count("/") in (0, 3))
    expected = [strange, f"{lost}/run/checkpoints/step-00000010"]
    expected += [f"{old}/run/checkpoints/step-000000{step}" for step in (10, 20)]
    assert [path for path in gone if not path.startswith(f"{strange}/")] == sorted(expected)
    for path in expected:
        assert sum(str(tmp_path / "jobs" / path) + " " in line for line in told.splitlines()) == 1
    size = sum(len(own or b"") for path, own in before.items() if path.startswith(tuple(f"{one}/" for one in expected)))
    assert f"4 things, {size / 1e6:.3f} MB" in told
    assert operated("gc")[1].startswith("0 things")


def test_the_record_is_asked_anew_before_a_jobs_things_go(place: str) -> None:
    job_id = record(place, job(0, "failed"))
    lookup = Lookup(place)
    (read,) = lookup.jobs()
    assert (read.id, read.state) == (job_id, "failed")
    assert lookup.has_ended(job_id)
    store.client(place).set_tag(job_id, "lorot.job.state", "queued")
    assert not lookup.has_ended(job_id)
    assert not lookup.is_unknown(job_id)
    store.client(place).delete_run(job_id)
    assert (lookup.is_unknown(job_id), lookup.is_unknown("f" * 32)) == (False, True)


def test_a_database_that_is_not_there_is_not_made_and_nothing_is_removed(
    operated: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "mlruns")
    age(tmp_path, 90)
    with pytest.raises(AssertionError, match="no such tracking database"):
        operated("gc")
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("given", ["30", "d", "-3d", "1.5d", "30 d", "9999999d"])
def test_an_age_that_is_none_is_refused(operated: Callable[..., tuple[int, str]], given: str) -> None:
    assert operated("gc", "--older-than", given)[0] == 2

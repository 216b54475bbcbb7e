"""Remote files in jobs of containers: they are kept in /tmp, and no more of them than fit there."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import remote
from service.errors import ConfigError
from service.jobs import checking, orders
from service.jobs.backends.docker import containers
from service.jobs.job import Attempt, Job
from service.jobs.manifests import pods
from service.jobs.spec import JobSpec, num_bytes
from tests.service.job_specs import CONFIG, settings

CONTAINERS = ("docker", "kubernetes")


def wanted(backend: str, root: str = "s3://bucket/set", **data: Any) -> JobSpec:
    return JobSpec(backend=backend, config={**CONFIG, "data": {**CONFIG["data"], "root": root, **data}})


def told(spec: JobSpec, folder: Path) -> float:
    """What the job's own configuration has."""
    service = settings(folder, data_urls=["s3://bucket"])
    job = Job("0" * 32, "", spec, "queued")
    return float(orders.configuration(job, service, checking.resolve(spec, service))["data"]["cache_gb"])


def tmp_bytes(backend: str, folder: Path) -> int:
    """How large /tmp of such a job is."""
    service = settings(folder, data_urls=["s3://bucket"])
    attempt = Attempt(1, "lorot-000000000000-1")
    job = Job("0" * 32, "", wanted(backend), "starting", attempts=(attempt,))
    order = orders.order(job, attempt, service, {})
    if backend == "docker":
        found = re.search(r"size=(\w+)g", containers.container(order, service, 0)["HostConfig"]["Tmpfs"]["/tmp"])
        assert found is not None
        return int(found[1]) * 2**30
    (volume,) = (one for one in pods.volumes(order, service.backends.kubernetes) if one.name == "tmp")
    assert volume.empty_dir is not None
    return num_bytes(str(volume.empty_dir.size_limit))


@pytest.mark.parametrize("backend", CONTAINERS)
def test_files_of_a_url_leave_room_in_tmp_where_nothing_else_was_said(backend: str, tmp_path: Path) -> None:
    cache_bytes = told(wanted(backend), tmp_path) * 1e9
    assert 0.4 * tmp_bytes(backend, tmp_path) < cache_bytes < 0.6 * tmp_bytes(backend, tmp_path)


@pytest.mark.parametrize("backend", CONTAINERS)
def test_more_than_tmp_holds_is_refused_and_what_the_error_advises_is_taken(backend: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.data\.cache_gb: 30 GB do not fit") as raised:
        told(wanted(backend, cache_gb=30), tmp_path)
    found = re.search(r"at most ([\d.]+)", str(raised.value))
    assert found is not None
    assert told(wanted(backend, cache_gb=float(found[1])), tmp_path) == float(found[1])
    assert told(wanted(backend, cache_gb=0.5, order="blocks"), tmp_path) == 0.5


def test_the_guides_say_how_much_that_is(tmp_path: Path) -> None:
    for backend, guide in (("docker", "docker"), ("kubernetes", "deploy")):
        text = (Path(__file__).parents[2] / guide / "README.md").read_text()
        assert f" keeps {told(wanted(backend), tmp_path):g} GB " in text


def test_a_job_on_this_machine_and_one_without_a_url_keep_what_they_ask_for(tmp_path: Path) -> None:
    assert told(wanted("local"), tmp_path) == 100
    assert told(wanted("local", cache_gb=300), tmp_path) == 300
    assert told(wanted("docker", root=str(tmp_path / "data/demo"), cache_gb=300), tmp_path) == 300


def test_a_full_cache_advises_nothing_first_that_a_service_refuses(tmp_path: Path) -> None:
    told_there = str(remote.unwritable(tmp_path, OSError(28, "No space left on device")))
    assert "a smaller data.cache_gb" in told_there
    assert told_there.index("not in jobs of a service") < told_there.index("data.cache_folder")

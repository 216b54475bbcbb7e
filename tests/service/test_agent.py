"""A machine's part at a real rendezvous: it learns that it was struck off, and an error of it closes nothing."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from service.training.agent import Meeting

# Seconds after which a machine that gives no sign is struck off.
SILENCE_S = 4


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Meeting]]:
    """Two that have met."""
    monkeypatch.setattr(dynamic_rendezvous, "DynamicRendezvousHandler", Meeting)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = {"last_call_timeout": 1, "keep_alive_interval": 1}
    made = []
    # The first falls silent. It strikes off nobody itself, lest the second were, by a pause of this process.
    for patience in (600, SILENCE_S):
        own = {**settings, "keep_alive_max_attempt": patience}
        parameters = RendezvousParameters("c10d", "", "job", 1, 2, local_addr="127.0.0.1", **own)
        store = TCPStore("127.0.0.1", server.port, is_master=False)
        made.append(dynamic_rendezvous.create_handler(store, C10dRendezvousBackend(store, "job"), parameters))
    with ThreadPoolExecutor() as pool:
        met = list(pool.map(lambda machine: machine.next_rendezvous().world_size, made))
    assert met == [2, 2]
    yield made
    for machine in made:
        machine._stop_heartbeats()
    del server


def test_a_machine_that_was_struck_off_joins_again_when_the_others_have_formed_anew(machines: list[Meeting]) -> None:
    silent, other = machines
    silent._stop_heartbeats()
    time.sleep(SILENCE_S + 1)
    # Being struck off is no reason to disturb workers that train.
    assert (other.num_nodes_waiting(), silent.num_nodes_waiting()) == (0, 0)
    assert other.next_rendezvous().world_size == 1
    assert (other.num_nodes_waiting(), silent.num_nodes_waiting()) == (0, 1)


def test_an_error_of_one_machine_closes_nothing_and_the_end_of_the_job_does(machines: list[Meeting]) -> None:
    first, second = machines
    with contextlib.suppress(TimeoutError):
        try:
            raise TimeoutError
        finally:
            first.shutdown()
    assert not second.is_closed()
    assert second.next_rendezvous().world_size == 1
    second.shutdown()
    assert second.is_closed()
    with pytest.raises(RendezvousClosedError):
        first.next_rendezvous()

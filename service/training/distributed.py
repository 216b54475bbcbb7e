"""The workers of one job: who this process is, and the few things all of them do together."""

import contextlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from service import errors
from service.errors import ConfigError, JobError, LorotError, LostPeerError
from service.training import meeting

_log = logging.getLogger(__name__)

# How often a worker looks whether the others have come, and says that it still waits for them.
LOOK_S = 0.2
# So much longer than asked for does NCCL wait, which ends the process without a word: the watchdog goes first.
_NCCL_SPARE_S = 60.0
_MEETING_SPARE_S = 10.0
# How gloo and NCCL tell that a peer is gone; torch has a class of its own for some of it only.
_LOST = re.compile(r"gloo/|NCCL|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
# How torch's store tells that its address is another's: libuv's words, and the system's.
_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
TELL_S = 60.0
_number = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among `size` of them; `local_rank` counts within its machine, which runs `local_size`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0


def connect(device: str = "auto", timeout_s: float = 600.0) -> World:
    """Join the other workers: gloo on CPUs, nccl on GPUs. Without torchrun's environment it is a world of one.

    Args:
        device: "cpu", "cuda" or "auto" (GPUs if there are any).
        timeout_s: how long a collective operation waits for a worker before it fails, and how long this does: they
            are started together, so that nothing of a job's makes one of them come later than another.

    Raises:
        ConfigError: "cuda" without a GPU, or the address where the workers are to meet is taken.
        LostPeerError: another worker did not come, or went while they met, or what listens there does not answer.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s + (_NCCL_SPARE_S if backend == "nccl" else 0.0))
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    what = f"worker {rank} of {size} cannot meet the others at {where}"

    def meet() -> None:
        if chosen.type == "cuda":
            # It is a thread's own.
            torch.cuda.set_device(chosen)
        store = _meeting_place(rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    if not dist.is_initialized():
        try:
            # What fails by itself says more, and goes first.
            meeting.within(timeout_s + _MEETING_SPARE_S, meet, f"{what} within timeout_s={timeout_s:g}")
        except (RuntimeError, OSError) as error:
            if not (isinstance(error, OSError) or is_lost_peer(error)):
                raise
            what = f"{what}: {error}"
            # Whatever else it is, a machine that dies while the others start causes it too, and is no lasting fault.
            if size == 1 or (rank == 0 and _TAKEN.search(str(error))):
                raise ConfigError(
                    f"{what}; is the port taken by another job? torchrun --master-port chooses another"
                ) from None
            raise LostPeerError(what) from None
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(name, str(value))
    return World(rank, size, local_rank, local_size, chosen)


def _meeting_place(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the workers tell each other their addresses."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store: dist.Store = next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all its restarts, in which the addresses of those that were lost still stand. Of
        # several machines each counts its own restarts, which is why `service.jobs.torchrun` has that store turned off.
        return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def disconnect() -> None:
    """Leave the group; for a clean end only, since it waits for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int = 0, *streams: IO[str]) -> NoReturn:
    """End this process on the spot with an exit code, everything written, to `streams` too.

    After an error other workers may wait for this one for ever, and a clean shutdown would wait for them. After success
    the interpreter's end could only spoil it: now and then it aborts the process ("terminate called without an active
    exception"), it seems where a thread of gloo's still lets go of a tensor and needs Python for that.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr, *streams):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def all_sum(tensor: Tensor) -> Tensor:
    """`tensor`, replaced in place by the sum over all workers."""
    if _size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(value: float, device: torch.device) -> float:
    """The largest of all workers' values."""
    if _size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def gather(tensor: Tensor) -> Tensor:
    """Every worker's tensor (all of one shape), stacked: (size, *shape)."""
    if _size() == 1:
        return tensor[None].clone()
    parts = [torch.empty_like(tensor) for _ in range(_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def union(ids: set[int], world: World) -> set[int]:
    """All workers' numbers, which are 0 or above, together."""
    length = int(all_max(len(ids), world.device))
    padded = torch.full((length,), -1, dtype=torch.int64, device=world.device)
    padded[: len(ids)] = torch.tensor(sorted(ids), dtype=torch.int64, device=world.device)
    return set(gather(padded).flatten().tolist()) - {-1}


def from_each(value: object) -> list[Any]:
    """Every worker's JSON value, in the order of ranks, on every worker."""
    if _size() == 1:
        return [value]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    data = json.dumps(value).encode()
    padded = torch.zeros(int(all_max(len(data), device)), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [json.loads(bytes(part.cpu().numpy()).rstrip(b"\0")) for part in gather(padded)]


def to_main(data: Tensor, device: torch.device) -> list[Tensor]:
    """Every worker's (B,) uint8 of any length, in the order of ranks, on the main worker; nothing on the others."""
    if _size() == 1:
        return [data]
    lengths = gather(torch.tensor([len(data)], device=device)).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(data)] = data.to(device)
    if dist.get_rank() != 0:
        dist.gather(padded, None, dst=0)
        return []
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.gather(padded, parts, dst=0)
    return [part[:length].cpu() for part, length in zip(parts, lengths, strict=True)]


def from_main(text: str, device: torch.device) -> str:
    """The main worker's text, on every worker. This is how its decisions and failures reach the others."""
    if _size() == 1:
        return text
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device) if text else torch.empty(0)
    length = torch.tensor([data.numel()], device=device)
    dist.broadcast(length, src=0)
    buffer = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0 and text:
        buffer.copy_(data)
    if buffer.numel():
        dist.broadcast(buffer, src=0)
    return bytes(buffer.cpu().numpy()).decode()


def from_local_main(text: str, world: World) -> str:
    """The text of the first worker of this worker's machine; what the machine's others give does not matter."""
    if world.size == 1:
        return text
    data = text.encode()
    padded = torch.zeros(int(all_max(len(data), world.device)), dtype=torch.uint8, device=world.device)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # torchrun numbers the workers of a machine in a row.
    return bytes(gather(padded)[world.rank - world.local_rank].cpu().numpy()).rstrip(b"\0").decode()


def on_main(
    world: World, action: Callable[[], object], awaited: contextlib.AbstractContextManager[None] | None = None
) -> None:
    """Run `action` on the main worker alone; an error meant for people is raised on every worker.

    Args:
        awaited: entered on every worker meanwhile, as `however_long`, where that may take longer than a collective
            operation waits.
    """
    failure: LorotError | None = None
    told = ""
    with awaited or contextlib.nullcontext():
        if world.is_main:
            try:
                action()
            except LorotError as error:
                failure = error
                told = json.dumps([type(error).__name__, error.exit_code, str(error)])
    told = from_main(told, world.device)
    if failure is not None:
        raise failure
    if told:
        name, code, message = json.loads(told)
        kind = getattr(errors, name, None)
        raise kind(message) if kind is not None and kind is not JobError else JobError(message, code)


def barrier() -> None:
    """Wait for all workers."""
    if _size() > 1:
        dist.barrier()


@contextlib.contextmanager
def however_long(world: World, what: str) -> Iterator[None]:
    """Run the block, then wait until all workers have run theirs, without the limit of a collective operation.

    Every worker comes by here as often as the others.

    Args:
        what: what a worker waits for meanwhile, for its log.

    Raises:
        JobError: another worker's block has failed; how.
    """
    if world.size == 1:
        yield
        return
    store = _store()
    key = f"lorot/{next(_number)}"
    try:
        yield
    except BaseException as error:
        code = error.exit_code if isinstance(error, LorotError) else 1
        store.set(f"{key}/failed", json.dumps([code, f"worker {world.rank}: {error}"]))
        raise
    store.add(key, 1)
    began = told = time.monotonic()
    while store.add(key, 0) < world.size:
        if store.check([f"{key}/failed"]):
            code, reason = json.loads(store.get(f"{key}/failed"))
            raise JobError(f"another worker has failed: {reason}", code)
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            _log.info("waiting for %s, for %.0f s", what, told - began)
        time.sleep(LOOK_S)


@contextlib.contextmanager
def local_main_first(world: World) -> Iterator[None]:
    """Run the block on the first worker of every machine, then on its others: they find what it cached on disk."""
    if world.local_rank != 0:
        barrier()
    yield
    if world.local_rank == 0:
        barrier()


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is how a collective operation fails when another worker is gone or frozen."""
    if isinstance(error, LorotError):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def explained(error: BaseException) -> BaseException:
    """A LostPeerError in place of what another worker's end has caused here; any other error as it is."""
    if _size() == 1 or not is_lost_peer(error):
        return error
    cause = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return LostPeerError(f"worker {dist.get_rank()} has lost the connection to another worker ({cause})")


def _store() -> dist.Store:
    """Where the workers found each other, and can leave notes; torch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _device(name: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("device: 'cuda' is asked for, but torch sees no GPU here; use device=cpu or device=auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"workers: worker {local_rank} of this machine has no GPU of its own, of {torch.cuda.device_count()}; "
            "start one worker per GPU"
        )
    return torch.device("cuda", local_rank)

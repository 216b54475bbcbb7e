"""The job service in one process, stepped by hand, for tests: real record, controller, desk; a memory backend."""

from concurrent.futures import wait

from service import store
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from tests.service.job_specs import spec
from tests.service.memory_backend import MemoryBackend


def away(*_: object, **__: object) -> None:
    """In the place of what asks MLflow, while it cannot be reached."""
    raise store.UnreachableError("nobody there")


class Service:
    """A desk and a controller that are stepped by hand, killed and made anew, over one record and one backend."""

    def __init__(self, chosen: ServiceSettings, **backends: MemoryBackend) -> None:
        self.settings = chosen
        self.backends = backends or {"local": MemoryBackend()}
        self.begin()

    def begin(self) -> None:
        self.desk = Desk(self.settings, backends=self.backends)
        self.controller = Controller(self.desk)
        self.controller.open()

    def restart(self) -> None:
        """As after kill -9: nothing that was in memory is left."""
        self.controller.stop(0)
        self.begin()

    @property
    def backend_hangs(self) -> bool:
        return any(backend.hangs for backend in self.backends.values())

    @property
    def backend(self) -> MemoryBackend:
        return self.backends["local"]

    def submit(self, **fields: object) -> Job:
        return self.desk.submit(spec(**fields))[0]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.controller.step()
            if not self.backend_hangs:
                # A round waits for slow calls, but not for long.
                wait(list(self.controller._busy.values()), 60)

    def state(self, job: Job) -> str:
        return self.desk.get(job.id).state

    def name(self, job: Job) -> str:
        attempt = self.desk.get(job.id).attempt
        assert attempt is not None
        return attempt.name

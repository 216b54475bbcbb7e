"""A backend's name stands in one place: what else a backend needs is found by it, and missing nowhere."""

import importlib

from service.console.words import PLACES
from service.jobs import backends
from service.jobs.backends import NAMES
from service.jobs.settings import BackendSettings
from service.jobs.spec import JobSpec


def test_each_backend_has_its_file_its_settings_and_its_words() -> None:
    assert tuple(PLACES) == NAMES
    assert tuple(BackendSettings.model_fields) == NAMES
    for name in NAMES:
        assert callable(importlib.import_module(f"{backends.__name__}.{name}").make)
        assert BackendSettings.model_fields[name].annotation.model_fields["enabled"]  # type: ignore[union-attr]


def test_what_is_handed_in_knows_them() -> None:
    assert tuple(JobSpec.model_json_schema()["properties"]["backend"]["enum"]) == NAMES

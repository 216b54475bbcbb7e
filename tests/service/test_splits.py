import json
import os
from pathlib import Path

import pytest
from PIL import Image

from pipelines import listing
from service import config, splits
from service.config import JobConfig
from service.errors import DataError


def save(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 20, 30)).save(path, "PNG")


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    for number, split in enumerate(("train", "val")):
        save(tmp_path / f"data/{split}/cat/a.png", 10 + number)
    (tmp_path / "job.yaml").write_text(f"data: {{name: folder, root: {tmp_path}/data, size: 32}}\n")
    return config.load(tmp_path / "job.yaml", [])


def test_what_one_process_loaded_the_others_map_without_a_look_at_the_files(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = splits.load(job)
    told = splits.announcement(loaded)
    for name in ("files", "folders", "read_headers"):
        monkeypatch.setattr(listing, name, lambda *_, **__: pytest.fail("looked"))
    mapped = splits.map_announced(job, told)
    assert [manifest.split for manifest in mapped] == ["train", "val"]
    assert [manifest.digest for manifest in mapped] == [manifest.digest for manifest in loaded]
    assert mapped[1].read(0) == (Path(job.data.root) / "val/cat/a.png").read_bytes()


def test_a_manifest_made_anew_from_changed_files_is_not_taken_for_the_announced_one(job: JobConfig) -> None:
    told = splits.announcement(splits.load(job))
    image = Path(job.data.root) / "val/cat/a.png"
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    # Touched, the files say the same.
    splits.load(job)
    splits.map_announced(job, told)
    save(image, 99)
    splits.load(job)
    with pytest.raises(DataError, match=r"split 'val' has changed since this job began .* put the files back"):
        splits.map_announced(job, told)


def test_the_announcement_is_a_line_that_fits_an_environment_variable(job: JobConfig) -> None:
    told = splits.announcement(splits.load(job))
    assert "\n" not in told
    assert len(json.loads(told)) == 2
    assert splits.announced_here({splits.VARIABLE: told}) == told
    assert splits.announced_here({}) is None

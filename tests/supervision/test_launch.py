"""What is the same launch, and whose folder is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadiff.errors import PlatformError
from megadiff.supervision.launch import Launch

TORCHRUN = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": "4"}


def launch(folder, rank=0, **environ):
    return Launch.from_env(folder, rank=rank, world_size=8, environ={**TORCHRUN, **environ})


def test_ranks_of_a_launch_agree_and_other_launches_differ(tmp_path):
    one = launch(tmp_path)
    assert launch(tmp_path, rank=5).key == one.key
    assert one.local_world_size == 4
    others = [
        launch(tmp_path / "other"),
        launch(tmp_path, MASTER_PORT="29501"),
        launch(tmp_path, TORCHELASTIC_RESTART_COUNT="1"),
        launch(tmp_path, SLURM_RESTART_COUNT="1"),
        launch(tmp_path, SLURM_JOB_ID="9"),
    ]
    assert len({one.key, *(other.key for other in others)}) == 6


def test_a_hostile_job_id_stays_out_of_paths(tmp_path):
    records = launch(tmp_path, SLURM_JOB_ID="../../etc/$(id)", SLURM_RESTART_COUNT="../1").records
    assert records.parent == tmp_path / "first_cause"
    assert records.name.startswith("local-0-")


def test_the_nodes_folder_is_private(tmp_path):
    folder = launch(tmp_path).node_folder()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        with pytest.raises(PlatformError, match=r"others cannot enter, and is not; remove it"):
            launch(tmp_path).node_folder()
    finally:
        folder.rmdir()


def test_a_link_in_the_folders_place_is_refused(tmp_path):
    folder = launch(tmp_path).node_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    try:
        with pytest.raises(PlatformError, match="should be a folder of this user"):
            launch(tmp_path).node_folder()
    finally:
        folder.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = launch(tmp_path).node_folder()
    os.chown(folder, 65534, 65534)
    try:
        with pytest.raises(PlatformError, match="should be a folder of this user"):
            launch(tmp_path).node_folder()
    finally:
        folder.rmdir()


def test_the_watcher_needs_the_standard_library_alone():
    root = Path(__file__).resolve().parents[2]
    code = (
        f"import sys; sys.path.append({str(root)!r}); import megadiff.supervision.watcher;"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['__main__', 'megadiff']"

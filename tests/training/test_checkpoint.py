"""Checkpoints on disk: verified, put together from any slices, never unpickled."""

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ardiff.config import load, to_yaml
from ardiff.errors import UserError
from ardiff.files import sha256, write_json
from ardiff.training import checkpoint
from ardiff.training.checkpoint import State


def make(run_dir: Path, step: int, cuts: tuple[int, ...] = (0, 4, 7), seed: int = 0) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one group of 7 numbers in slices [cuts[r], cuts[r + 1])."""
    folder = checkpoint.step_directory(run_dir, step)
    folder.mkdir(parents=True)
    vector = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    slices = list(itertools.pairwise(cuts))
    for rank, (start, end) in enumerate(slices):
        tensors = {f"group0.{name}": vector[start:end].clone() for name in ("master", "exp_avg", "exp_avg_sq", "ema")}
        save_file(tensors, folder / f"state_rank{rank}.safetensors")
    state = State(
        step=step,
        samples=step * 16,
        skipped_steps=0,
        adam_steps=[step],
        ema_updates=[step],
        seed=0,
        order="global",
        data_identity="d",
        precision="fp32",
        world_size=len(slices),
        layout=[[("network.a", [2, 2]), ("network.b", [3])]],
        slices=[[part] for part in slices],
    )
    write_json(folder / "state.json", vars(state))
    (folder / "config.yaml").write_text(to_yaml(load("tiny")))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
    write_json(folder / "MANIFEST.json", {"format": 1, "files": files})
    return folder, vector


@pytest.mark.parametrize("cuts", [(0, 7), (0, 4, 7), (0, 1, 5, 5, 7)])
def test_any_range_can_be_read_from_any_slices(tmp_path, cuts):
    folder, vector = make(tmp_path, 3, cuts)
    state = checkpoint.read_state(folder)
    read = checkpoint.range_reader(folder, state)
    for start in range(8):
        for end in range(start, 8):
            assert torch.equal(read("group0.ema", start, end), vector[start:end])
    weights = checkpoint.full_weights(folder)
    assert torch.equal(weights["network.a"], vector[:4].reshape(2, 2))
    assert torch.equal(weights["network.b"], vector[4:])


@pytest.mark.parametrize("name", ["state_rank1.safetensors", "state.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_every_damage_is_noticed_and_the_one_before_used(tmp_path, name, damage, caplog):
    older, _ = make(tmp_path, 10)
    newer, _ = make(tmp_path, 20)
    assert checkpoint.newest_valid(tmp_path) == newer
    path = newer / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    assert checkpoint.newest_valid(tmp_path) == older
    assert "DAMAGED CHECKPOINT" in caplog.text and newer.name in caplog.text


def test_nothing_intact_is_an_error_not_a_fresh_start(tmp_path):
    folder, _ = make(tmp_path, 10)
    (folder / "MANIFEST.json").write_text("{}")
    with pytest.raises(UserError, match="none of 1 checkpoints is intact"):
        checkpoint.newest_valid(tmp_path)
    assert checkpoint.newest_valid(tmp_path / "fresh") is None


def test_pruning_never_removes_the_newest_nor_what_is_not_its_own(tmp_path):
    """A damaged newer one does not count, and a folder that a user put there stays."""
    for step in (3, 4, 5, 9):
        make(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step_backup_of_mine").mkdir()
    (folder / ".step_00000004.tmp").mkdir()
    checkpoint._prune(folder / "step_00000005", keep=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names[1:] == ["step_00000005", "step_backup_of_mine"]
    assert names[0].startswith("damaged_step_00000009")
    assert checkpoint.newest_valid(tmp_path) == folder / "step_00000005"


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_not_executed(tmp_path, monkeypatch):
    """Even with a manifest that vouches for it."""
    monkeypatch.chdir(tmp_path)
    folder, _ = make(tmp_path, 10)
    state = folder / "state_rank0.safetensors"
    state.write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][state.name] = {"bytes": state.stat().st_size, "sha256": sha256(state)}
    write_json(folder / "MANIFEST.json", manifest)
    assert checkpoint.newest_valid(tmp_path) == folder
    with pytest.raises(UserError, match=r"state_rank0\.safetensors"):
        checkpoint.full_weights(folder)
    assert not (tmp_path / "exploded").exists()


def test_other_format_is_refused(tmp_path):
    folder, _ = make(tmp_path, 10)
    value = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", {**value, "format": 99})
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_state(folder)

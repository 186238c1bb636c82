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

VECTORS = ("master", "exp_avg", "exp_avg_sq", "ema")


def make(run_dir: Path, step: int, cuts: tuple[int, ...] = (0, 4, 7), seed: int = 0) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one group of 7 numbers in slices [cuts[r], cuts[r + 1])."""
    folder = checkpoint.step_directory(run_dir, step)
    folder.mkdir(parents=True)
    vector = torch.rand(7, generator=torch.Generator().manual_seed(seed))
    slices = list(itertools.pairwise(cuts))
    for rank, (start, end) in enumerate(slices):
        tensors = {f"group0.{name}": vector[start:end].clone() for name in VECTORS}
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
    save_file({"prediction": vector}, folder / "probe.safetensors")
    vouch_for(folder)
    return folder, vector


def vouch_for(folder: Path) -> None:
    """Write the manifest of whatever lies there."""
    paths = [path for path in folder.iterdir() if path.name != "MANIFEST.json"]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    write_json(folder / "MANIFEST.json", {"format": 1, "files": files})


def rewrite_state(folder: Path, **changes: object) -> None:
    """Other values in state.json (None: leave out), with a manifest that vouches for it."""
    value = json.loads((folder / "state.json").read_text()) | changes
    write_json(folder / "state.json", {key: part for key, part in value.items() if part is not None})
    vouch_for(folder)


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


@pytest.mark.parametrize("name", ["state_rank1.safetensors", "state.json", "config.yaml", "probe.safetensors"])
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


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "state_rank0.safetensors", "state_rank1.safetensors"])
def test_a_manifest_that_leaves_a_file_out_is_damage(tmp_path, name):
    """Else nothing would be known of that file."""
    folder, _ = make(tmp_path, 10)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["files"][name]
    write_json(folder / "MANIFEST.json", manifest)
    assert checkpoint.problem_with(folder) == f"MANIFEST.json does not list {name}"


NOT_WHAT = "MANIFEST.json or state.json does not hold what it should"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "MANIFEST.json: it is empty"),
        (b'{"files": {"st', "MANIFEST.json: it is not JSON: cut short at line 1, column 12"),
        (b'{"files" {}}', "MANIFEST.json: it is not JSON: damaged at line 1, column 10"),
        (b"\xff", "MANIFEST.json: it is not JSON"),
        (b"[" * 100_000, "MANIFEST.json: it is not JSON"),
        (b"[]", NOT_WHAT),
        (b"null", NOT_WHAT),
        (b'{"files": 3}', NOT_WHAT),
        (b'{"files": {"state.json": 3}}', NOT_WHAT),
        (b'{"files": {"../x": {}}}', "MANIFEST.json names '../x', which is not a file of this folder"),
        (None, "MANIFEST.json is missing"),
    ],
)
def test_nonsense_for_a_manifest_is_damage(tmp_path, text, reason):
    older, _ = make(tmp_path, 10)
    newer, _ = make(tmp_path, 20)
    (newer / "MANIFEST.json").unlink()
    if text is not None:
        (newer / "MANIFEST.json").write_bytes(text)
    assert checkpoint.problem_with(newer) == reason
    assert checkpoint.newest_valid(tmp_path) == older


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pruning_never_removes_the_newest_nor_what_is_not_its_own(tmp_path):
    """A damaged newer one does not count, and a folder that a user put there stays."""
    for step in (3, 4, 5, 9):
        make(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step_backup_of_mine").mkdir()
    (folder / ".step_00000004.tmp").mkdir()
    checkpoint.prune(folder / "step_00000005", keep=1, keep_every=0)
    names = names_in(folder)
    assert names[1:] == ["step_00000005", "step_backup_of_mine"]
    assert names[0].startswith("damaged_step_00000009")
    assert checkpoint.newest_valid(tmp_path) == folder / "step_00000005"


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (1, 0, [7]),
        (3, 0, [5, 6, 7]),
        (9, 0, [1, 2, 3, 4, 5, 6, 7]),
        (1, 3, [3, 6, 7]),
        (2, 2, [2, 4, 6, 7]),
        (1, 1, [1, 2, 3, 4, 5, 6, 7]),
        (1, 100, [7]),
    ],
)
def test_retention(tmp_path, keep, keep_every, kept):
    """Whether at once or checkpoint by checkpoint."""
    folder = tmp_path / "checkpoints"
    for step in range(1, 8):
        path = checkpoint.step_directory(tmp_path, step)
        path.mkdir(parents=True)
        checkpoint.prune(path, keep, keep_every)
    assert names_in(folder) == [f"step_{step:08d}" for step in kept]


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    "name", ["state_rank0.safetensors", "state_rank1.safetensors", "state.json", "probe.safetensors", "config.yaml"]
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, name, protocol):
    """Under any name, even with a manifest that vouches for it."""
    monkeypatch.chdir(tmp_path)
    folder, _ = make(tmp_path, 10)
    (folder / name).write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    vouch_for(folder)
    with pytest.raises(UserError) as error:
        assert checkpoint.newest_valid(tmp_path) == folder
        assert checkpoint.read_probe(folder) is not None
        checkpoint.full_weights(folder)
        load(str(folder / "config.yaml"))
    assert "\n" not in str(error.value) and str(folder.parent) in str(error.value)
    if name != "state.json":  # otherwise the whole checkpoint is damaged
        assert name in str(error.value)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "exploded").exists()  # it would have gone off


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "{}", '{"format": 1}', '{"format": 1, "layout": 3}'])
def test_a_state_that_is_none_is_refused(tmp_path, text):
    folder, _ = make(tmp_path, 10)
    (folder / "state.json").write_text(text)
    vouch_for(folder)
    with pytest.raises(UserError):
        checkpoint.read_state(folder)
    with pytest.raises(UserError, match="none of 1 checkpoints is intact"):
        checkpoint.newest_valid(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": None},
        {"layout": None},
        {"layout": [["a"]]},
        {"slices": [[[0, 4]]]},
        {"slices": [[[0, 4], [0, 0]], [[4, 7], [0, 0]]]},
        {"slices": [["ab"], ["cd"]]},
        {"new_field": 1},
    ],
)
def test_a_state_of_another_shape_is_refused(tmp_path, changes):
    folder, _ = make(tmp_path, 10)
    rewrite_state(folder, **changes)
    with pytest.raises(UserError, match=r"state\.json: not what this version"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize("slices", [[[[0, 4]], [[5, 7]]], [[[0, 5]], [[5, 7]]], [[[0, 4]], [[4, 6]]]])
def test_slices_that_are_not_those_of_the_files_are_refused(tmp_path, slices):
    folder, _ = make(tmp_path, 10)
    rewrite_state(folder, slices=slices)
    with pytest.raises(UserError, match="delete this checkpoint"):
        checkpoint.full_weights(folder)


def test_numbers_survive_json_exactly(tmp_path):
    folder, _ = make(tmp_path, 10)
    losses = [0.1, 1 / 3, 2.0**-1074, 1.7976931348623157e308, 0.30000000000000004]
    rewrite_state(folder, recent_losses=losses, skipped=[[16, 32, "loss spike"]])
    state = checkpoint.read_state(folder)
    assert state.recent_losses == losses and state.skipped == [[16, 32, "loss spike"]]


def test_checkpoints_of_before_are_read(tmp_path):
    """They have neither of the newer fields nor a probe."""
    folder, vector = make(tmp_path, 10)
    (folder / "probe.safetensors").unlink()
    rewrite_state(folder, ema_decays=None, skipped=None, recent_losses=None, ema_updates=10)
    assert checkpoint.newest_valid(tmp_path) == folder and checkpoint.read_probe(folder) is None
    state = checkpoint.read_state(folder)
    assert state.ema_updates == [10] and state.ema_decays == [] and state.skipped == []
    assert torch.equal(checkpoint.full_weights(folder)["network.a"], vector[:4].reshape(2, 2))


@pytest.mark.parametrize(
    ("stored", "wanted", "sources", "told"),
    [
        ([], [0.99], ["ema"], ""),
        ([0.9], [0.9], ["ema"], ""),
        ([0.9, 0.5], [0.9, 0.5], ["ema", "ema_0.5"], ""),
        ([0.9, 0.5], [0.5, 0.9], ["ema_0.5", "ema"], ""),
        ([], [0.99, 0.5], ["ema", "ema"], "decay 0.5 is not in the checkpoint"),
        ([0.9], [0.99, 0.5], ["ema", "ema"], "decay 0.99 is not in the checkpoint"),
    ],
)
def test_averages_go_by_their_decay(tmp_path, caplog, stored, wanted, sources, told):
    folder, _ = make(tmp_path, 10)
    rewrite_state(folder, ema_decays=stored)
    state = checkpoint.read_state(folder)
    with caplog.at_level("INFO", logger="ardiff"):
        assert [checkpoint.stored_average(state, wanted, decay) for decay in wanted] == sources
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_other_format_is_refused(tmp_path):
    folder, _ = make(tmp_path, 10)
    value = json.loads((folder / "state.json").read_text())
    write_json(folder / "state.json", {**value, "format": 99})
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_state(folder)


def test_what_is_removed_is_never_half_there(tmp_path, monkeypatch):
    """A kill while an old checkpoint is deleted leaves nothing under its name; what it leaves goes next time."""
    for step in (3, 4):
        make(tmp_path, step)
    folder = tmp_path / "checkpoints"
    names = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: names.append(Path(path).name))
    checkpoint.prune(folder / "step_00000004", keep=1, keep_every=0)
    assert names and all(name.startswith(".step_") for name in names)
    assert not (folder / "step_00000003").exists()
    monkeypatch.undo()
    (folder / ".latest.tmp.host.17").touch()
    checkpoint.remove_unfinished(folder)
    assert [path.name for path in folder.iterdir()] == ["step_00000004"]

"""Text features that are stored beside latents."""

import numpy as np
import pytest

from ardiff.errors import UserError
from data_tools.sharding.text_features import TextFeatures

KEYS = ("000000", "000001", "000002")


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=(number + 2, 6)).astype(np.float32) for number, key in enumerate(KEYS)}


@pytest.fixture
def folder(tmp_path, arrays):
    for key, array in arrays.items():
        np.save(tmp_path / f"{key}.npy", array)
    return tmp_path


def test_folder_and_archive_give_the_same(folder, arrays):
    np.savez(folder / "all.npz", **arrays, another=np.zeros(3))
    from_folder, from_archive = TextFeatures(folder, KEYS), TextFeatures(folder / "all.npz", KEYS)
    assert from_folder.dim == from_archive.dim == 6
    assert from_folder.digest == from_archive.digest
    for key in KEYS:
        found = from_folder.read(key)
        assert found.dtype == np.float16 and np.array_equal(found, arrays[key].astype(np.float16))
        assert np.array_equal(found, from_archive.read(key))
        assert from_folder.bytes_of(key) == from_archive.bytes_of(key) >= found.nbytes + 128


def test_the_digest_changes_with_the_content(folder, arrays):
    before = TextFeatures(folder, KEYS).digest
    np.save(folder / "000001.npy", arrays["000001"] + 1)
    assert TextFeatures(folder, KEYS).digest != before
    assert TextFeatures(folder, KEYS[::2]).digest != before


def test_missing_features_are_counted_and_named(folder):
    with pytest.raises(UserError, match=r"no features for 2 of 5 videos \(the first is 000007\)"):
        TextFeatures(folder, [*KEYS, "000007", "000009"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 6)), "must be float16 or float32"),
        (np.zeros(6, np.float32), r"is float32 \(6,\)"),
        (np.zeros((0, 6), np.float16), r"is float16 \(0, 6\)"),
        (np.zeros((2, 5), np.float16), "has 5 numbers per token, but others have 6"),
        (np.full((2, 6), 1e6, np.float32), "not finite in float16"),
        (np.array([[{}]]), "cannot be read"),
    ],
)
def test_unusable_features_are_refused(folder, array, message):
    features = TextFeatures(folder, KEYS)
    np.save(folder / "000002.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=rf"--text {folder}/000002.npy: .*{message}"):
        features.read("000002")


def test_what_is_no_array_is_refused(folder):
    features = TextFeatures(folder, KEYS)
    with (folder / "000002.npy").open("wb") as stream:
        np.savez(stream, a=np.zeros((2, 6)))
    with pytest.raises(UserError, match=rf"--text {folder}/000002.npy: must be one .* array .*, is NpzFile"):
        features.read("000002")


def test_neither_folder_nor_archive(folder):
    (folder / "notes.txt").write_text("no")
    for name in ("notes.txt", "nothing"):
        with pytest.raises(UserError, match=rf"--text {folder}/{name}: neither a folder .* nor a .npz"):
            TextFeatures(folder / name, KEYS)

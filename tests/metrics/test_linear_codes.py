"""Linear codes: exact where they should be, the best or the expected coefficients elsewhere."""

import numpy as np
import pytest
import torch
from data_helpers import write_frames

from ardiff.data.dataset import open_shards
from ardiff.metrics import linear_codes
from ardiff.metrics.linear_codes import PCA, LargestBlockDCT, MeanColour, dct_matrix, random_frames


def as_tensor(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 255


def of_rank(rank, count, size, seed=0):
    """Whole-numbered frames uint8 [count, size, size, 3] in an affine space of `rank` dimensions."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(7).integers(-4, 5, (rank, size, size, 3))
    return (120 + np.tensordot(rng.integers(-3, 4, (count, rank)), directions, 1)).astype(np.uint8)


def test_mean_colour_of_each_frame():
    frames = torch.rand(4, 3, 6, 5)
    found = MeanColour()(frames)
    assert found.shape == frames.shape and torch.allclose(found.mean((2, 3)), frames.mean((2, 3)))
    assert found.std(dim=(2, 3)).max() < 1e-6


@pytest.mark.parametrize(("count", "size"), [(40, 8), (400, 4)])  # fewer and more frames than dimensions
def test_pca_is_exact_on_frames_of_its_rank(count, size):
    code = PCA.fit(of_rank(5, count, size), 5)
    unseen = as_tensor(of_rank(5, 20, size, seed=1))
    assert code.numbers == 5
    assert (code(unseen) - unseen).abs().max() < 1e-5
    assert torch.allclose(code.components @ code.components.T, torch.eye(5), atol=1e-5)
    fewer = PCA.fit(of_rank(5, count, size), 3)
    assert (fewer(unseen) - unseen).abs().max() > 0.01


def test_pca_takes_no_more_components_than_there_are():
    assert PCA.fit(of_rank(3, 40, 8), 10).numbers == 3
    assert PCA.fit(of_rank(20, 4, 8), 10).numbers == 3  # four frames span three dimensions around their mean
    same = np.full((5, 4, 4, 3), 77, np.uint8)
    assert PCA.fit(same, 2)(as_tensor(same)).sub(77 / 255).abs().max() < 1e-6


def test_pca_is_the_best_of_the_linear_codes_and_equals_the_svd(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), dtype=np.uint8)
    x = as_tensor(frames).flatten(1).double()
    left = (x - x.mean(0)).square().sum() - torch.linalg.svdvals(x - x.mean(0))[:10].square().sum()
    monkeypatch.setattr(linear_codes, "CHUNK", 333)  # in many small pieces
    error = (PCA.fit(frames, 10)(as_tensor(frames)) - as_tensor(frames)).square().sum()
    assert error.item() == pytest.approx(left.item(), rel=1e-5)
    worse = (LargestBlockDCT.fit(frames, 10)(as_tensor(frames)) - as_tensor(frames)).square().sum()
    assert worse > error


def test_dct_matrix_is_orthonormal_and_ordered_by_frequency():
    matrix = dct_matrix(12)
    assert torch.allclose(matrix @ matrix.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
    changes = (matrix[:, 1:] * matrix[:, :-1] < 0).sum(1)
    assert changes.tolist() == list(range(12))


def test_dct_is_exact_on_frames_of_low_frequencies():
    """Frames of the lowest 3 x 2 frequencies of brightness and the mean of both colour differences: 8 numbers."""
    colour, rows, columns = dct_matrix(3).float(), dct_matrix(16).float(), dct_matrix(12).float()
    code = torch.zeros(300, 3, 16, 12)
    code[:, 0, :3, :2] = 0.7 * torch.randn(300, 3, 2)
    code[:, 0, 0, 0] += 0.5 * (3 * 16 * 12) ** 0.5
    code[:, 1:, 0, 0] = 0.7 * torch.randn(300, 2)
    frames = torch.einsum("dc,ndij,ih,jw->nchw", colour, code, rows, columns)
    pixels = frames.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    found = LargestBlockDCT.fit(pixels, 8)
    assert found.numbers == 8 and found.kept[0, :3, :2].all() and found.kept[1:, 0, 0].all()
    assert (found(frames) - frames).abs().max() < 1e-5
    assert torch.allclose(LargestBlockDCT(torch.ones(3, 16, 12, dtype=torch.bool))(frames), frames, atol=1e-5)


def test_the_error_of_the_dct_is_the_energy_that_it_leaves_out():
    frames = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    errors = [(LargestBlockDCT.fit(frames, n)(as_tensor(frames)) - as_tensor(frames)).square().sum() for n in (5, 60)]
    energy = [(LargestBlockDCT.fit(frames, n)(as_tensor(frames))).square().sum() for n in (5, 60)]
    total = as_tensor(frames).square().sum()
    assert [float(e + k) for e, k in zip(errors, energy, strict=True)] == pytest.approx([float(total)] * 2, rel=1e-5)
    assert errors[1] < errors[0]


def test_random_frames_are_frames_of_the_data_set_each_once(tmp_path):
    write_frames(tmp_path, ((3, 1), (6,)))
    shards = open_shards(tmp_path, "frames")
    everything = np.concatenate([shards.read_frames(i, 0, int(shards.frames[i])) for i in range(3)])
    assert np.array_equal(random_frames(shards, 100, 0), everything)
    some = random_frames(shards, 4, 0)
    places = [[np.array_equal(frame, other) for other in everything].index(True) for frame in some]
    assert len(set(places)) == 4 and np.array_equal(some, random_frames(shards, 4, 0))
    assert any(not np.array_equal(some, random_frames(shards, 4, seed)) for seed in range(1, 5))


def test_random_frames_are_bounded_in_memory(tmp_path, monkeypatch):
    write_frames(tmp_path, ((3, 1), (6,)))
    monkeypatch.setattr(linear_codes, "MOST_BYTES", 5 * 3 * 16 * 16)
    assert random_frames(open_shards(tmp_path, "frames"), 100, 0).shape == (5, 16, 16, 3)

import itertools

import numpy as np
import pytest
from data_helpers import chi_square

from ardiff.randomness import Stream, hashed, mix, normals, uniforms


def draws(seed, stream, count):
    """The first number of each of `count` indices."""
    return uniforms(hashed(seed, stream, np.arange(count)), 1)[:, 0]


def test_the_streams_are_pinned():
    # Checkpoints hold no random state: whoever changes these numbers changes what every interrupted run sees next.
    assert [int(v) for v in mix(np.array([0, 1, 2**64 - 1], dtype=np.uint64))] == [
        0,
        0x5692161D100B05E5,
        0xB4D055FCF2CBBD7B,
    ]
    assert [int(v) for v in hashed(0, Stream.ORDER, np.arange(3))] == [
        0xF010FEB7ED05A885,
        0x1B11AD2F39645D56,
        0x4DAF93EE63A39B69,
    ]
    assert [int(v) for v in hashed(12345, Stream.NOISE, np.array([0, 10**12]))] == [
        0x2E4174EA1D6D3B52,
        0xFD2AD9619A8AAF2F,
    ]
    assert uniforms(hashed(7, Stream.TIMESTEPS, np.arange(2)), 3).tolist() == [
        [0.3215453651834921, 0.10571108396052364, 0.5138286772205727],
        [0.7500930253272831, 0.17832730247390727, 0.9874736509767227],
    ]
    assert normals(7, Stream.NOISE, 5, (4,)).tolist() == [
        -1.4639179706573486,
        0.2506987452507019,
        -0.09048312902450562,
        0.09638860821723938,
    ]
    assert normals(-1, Stream.SAMPLES, 10**12, (2,)).tolist() == [-1.352941870689392, -1.2544986009597778]


def test_the_stream_numbers_are_pinned():
    numbers = {"ORDER": 1, "CROP": 2, "TIMESTEPS": 3, "NOISE": 4, "LABEL_DROP": 5, "SAMPLES": 6, "POSTERIOR": 7}
    assert {name: int(Stream[name]) for name in numbers} == numbers


def test_numbers_do_not_depend_on_what_else_is_drawn():
    indices = np.array([[3, 10**12], [5, 0]])
    whole = hashed(1, Stream.CROP, indices)
    assert whole.shape == indices.shape
    for place in np.ndindex(indices.shape):
        assert hashed(1, Stream.CROP, indices[place]).item() == whole[place]
    many = uniforms(whole.ravel(), 5)
    assert np.array_equal(uniforms(whole.ravel()[2:3], 5), many[2:3])
    assert np.array_equal(uniforms(whole.ravel(), 2), many[:, :2])


def test_numpys_own_state_is_neither_read_nor_changed():
    np.random.seed(1)
    before = normals(0, Stream.NOISE, 0, (8,)), hashed(0, Stream.NOISE, np.arange(4))
    after_ours = np.random.rand()
    np.random.seed(1)
    assert np.random.rand() == after_ours
    after = normals(0, Stream.NOISE, 0, (8,)), hashed(0, Stream.NOISE, np.arange(4))
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_mix_is_a_bijection_on_a_sample():
    low = np.arange(50_000, dtype=np.uint64)
    values = np.concatenate([low, low + np.uint64(2**63)])
    assert len(np.unique(mix(values))) == len(values)


def test_no_two_of_seed_stream_and_index_share_a_number():
    keys = [hashed(seed, stream, np.arange(1000)) for seed in (0, 1, 2, -1) for stream in Stream]
    assert len(np.unique(np.concatenate(keys))) == 4 * len(Stream) * 1000
    noise = {normals(s, n, i, (2,)).tobytes() for s in (0, 1, -1) for n in (Stream.NOISE, 6) for i in range(50)}
    assert len(noise) == 3 * 2 * 50


def test_uniforms_are_uniform_in_every_column():
    count, bins = 20_000, 64
    values = uniforms(hashed(3, Stream.TIMESTEPS, np.arange(count)), 17)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        observed = np.bincount((column * bins).astype(int), minlength=bins)
        assert chi_square(observed, np.full(bins, count / bins)) < 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *itertools.combinations([(0, stream) for stream in Stream], 2),
        ((0, Stream.CROP), (1, Stream.CROP)),
        ((0, Stream.ORDER), (-1, Stream.ORDER)),
    ],
)
def test_streams_and_seeds_are_independent(one, other):
    joint_is_uniform(draws(*one, 20_000), draws(*other, 20_000))


@pytest.mark.parametrize("lag", [1, 2, 256])
def test_neighbouring_indices_are_independent(lag):
    values = draws(5, Stream.TIMESTEPS, 20_000 + lag)
    joint_is_uniform(values[lag:], values[:-lag])


def test_the_numbers_of_one_key_are_independent():
    values = uniforms(hashed(5, Stream.TIMESTEPS, np.arange(20_000)), 3)
    for one, other in itertools.combinations(range(3), 2):
        joint_is_uniform(values[:, one], values[:, other])


def joint_is_uniform(one, other, bins=8):
    cells = (one * bins).astype(int) * bins + (other * bins).astype(int)
    observed = np.bincount(cells, minlength=bins**2)
    assert chi_square(observed, np.full(bins**2, len(one) / bins**2)) < 1


def test_normals_are_standard_normal():
    values = np.stack([normals(11, Stream.NOISE, index, (16, 32, 4)) for index in range(100)])
    assert values.dtype == np.float32
    count = values.size  # 204,800: standard errors 0.0022 and 0.0031
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    # neighbouring samples share nothing
    correlation = (values[1:].astype(np.float64) * values[:-1]).mean()
    assert abs(correlation) < 5 / values[1:].size ** 0.5

import pytest
import torch

from ardiff.config import DiffusionConfig
from ardiff.diffusion.schedule import PREDICTIONS, Schedule
from ardiff.errors import UserError

SHAPE = (2, 5, 3, 4)


def clip(dtype=torch.float64):
    """Clean latents, noise and timesteps with both ends of the schedule among them."""
    x0, noise = torch.randn(2, *SHAPE, dtype=dtype)
    t = torch.tensor([[0, 1, 500, 981, 999], [999, 0, 250, 21, 750]])
    return x0, t, noise


@pytest.mark.parametrize(
    ("beta_start", "beta_end", "t", "value", "tolerance"),
    [
        (1e-4, 0.02, 0, 0.9999, 1e-12),
        (1e-4, 0.02, 1, 0.999797, 5e-7),
        (1e-4, 0.02, 981, 1.0490e-3, 5e-8),
        (1e-4, 0.02, 999, 7.334e-4, 5e-8),
        (8.5e-4, 0.012, 999, 4.66e-3, 5e-6),
        (1e-4, 0.002, 999, 0.43, 5e-3),  # the supplement's misprint: it would leave the video visible
    ],
)
def test_alphas_are_those_of_the_reference(beta_start, beta_end, t, value, tolerance):
    assert Schedule(1000, beta_start, beta_end).alphas_cumprod[t].item() == pytest.approx(value, abs=tolerance)


def test_the_schedule_is_scaled_linear_in_float64():
    schedule = Schedule()
    roots = schedule.betas.sqrt()
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(roots.diff(), torch.full((999,), (0.02**0.5 - 0.01) / 999, dtype=torch.float64))
    assert (schedule.alphas_cumprod.diff() < 0).all()


def test_from_config_takes_every_field():
    schedule = Schedule.from_config(DiffusionConfig(num_timesteps=77, beta_start=1e-3, beta_end=0.01, prediction="eps"))
    assert (schedule.num_timesteps, schedule.prediction, len(schedule.betas)) == (77, "eps", 77)
    assert schedule.betas[[0, -1]].tolist() == pytest.approx([1e-3, 0.01])


def test_q_sample_uses_each_frames_own_timestep():
    # with a batch above 1: the neighbours' per-frame noise worked only for a batch of one
    schedule = Schedule()
    x0, t, noise = clip()
    x_t = schedule.q_sample(x0, t, noise)
    for video in range(SHAPE[0]):
        for frame in range(SHAPE[1]):
            alpha = schedule.alphas_cumprod[t[video, frame]].item()
            expected = alpha**0.5 * x0[video, frame] + (1 - alpha) ** 0.5 * noise[video, frame]
            torch.testing.assert_close(x_t[video, frame], expected, rtol=1e-14, atol=1e-14)


def test_targets_are_what_their_names_say():
    x0, t, noise = clip()
    schedules = {name: Schedule(prediction=name) for name in PREDICTIONS}
    alpha = schedules["v"].alphas_cumprod[t][..., None, None]
    assert torch.equal(schedules["x0"].target(x0, t, noise), x0)
    assert torch.equal(schedules["eps"].target(x0, t, noise), noise)
    torch.testing.assert_close(schedules["v"].target(x0, t, noise), alpha.sqrt() * noise - (1 - alpha).sqrt() * x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_a_target_stands_for_its_clean_sample(prediction, dtype, tolerance):
    schedule = Schedule(prediction=prediction)
    x0, t, noise = clip(dtype)
    x_t = schedule.q_sample(x0, t, noise)
    again = schedule.to_x0(schedule.target(x0, t, noise), x_t, t)
    assert again.dtype == dtype
    torch.testing.assert_close(again, x0, rtol=tolerance, atol=tolerance)


def test_low_precision_latents_keep_their_dtype_but_not_their_arithmetic():
    # in bfloat16 alphas_cumprod[0] would round to 1 and the noise of the cleanest level vanish
    schedule = Schedule()
    x0, t, noise = (part.bfloat16() if part.is_floating_point() else part for part in clip())
    x_t = schedule.q_sample(x0, t, noise)
    assert x_t.dtype == torch.bfloat16
    only_noise = schedule.q_sample(torch.zeros_like(x0), torch.zeros_like(t), noise)
    torch.testing.assert_close(only_noise, 0.01 * noise, rtol=0.01, atol=1e-4)


def test_fifty_steps_are_the_references_grid():
    assert Schedule().timesteps(50).tolist() == [999, *range(981, 0, -20)]


@pytest.mark.parametrize(
    ("num_timesteps", "num_steps", "expected"),
    [
        (1000, 1, [999, 1]),
        (1000, 10, [999, *range(901, 0, -100)]),
        (1000, 999, [999, *range(999, 0, -1)]),
        (1000, 3, [999, 667, 334, 1]),
        (5, 2, [4, 3, 1]),
        (1000, 48, [999, *(k * 1000 // 48 + 1 for k in range(47, -1, -1))]),
        (1000, 600, [999, *(k * 1000 // 600 + 1 for k in range(599, -1, -1))]),
    ],
)
def test_grids_start_at_the_noisiest_and_end_at_one(num_timesteps, num_steps, expected):
    grid = Schedule(num_timesteps).timesteps(num_steps)
    assert grid.dtype == torch.int64
    assert grid.tolist() == expected


@pytest.mark.parametrize("num_steps", [0, -1, 1000, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(UserError, match=str(num_steps)):
        Schedule().timesteps(num_steps)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "x1"},
        {"beta_start": 0.0},
        {"beta_start": 0.03, "beta_end": 0.02},
        {"beta_end": 1.0},
        {"beta_start": -1e-4},
    ],
)
def test_impossible_schedules_are_refused(options):
    with pytest.raises(UserError):
        Schedule(**options)

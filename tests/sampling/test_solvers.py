import pytest
import torch
from sampling_helpers import BATCH, CHANNELS, FRAMES, STEPS, TOKENS, Oracle, assert_same, build, noise_of

from ardiff.diffusion.schedule import PREDICTIONS, Schedule
from ardiff.errors import UserError
from ardiff.sampling import sample
from ardiff.sampling.solvers import History, Solver

FLOW = {"process": "rectified_flow", "prediction": "v"}


@pytest.mark.parametrize("name", ["ddim", "dpmpp"])
@pytest.mark.parametrize(
    "options", [*({"prediction": name} for name in PREDICTIONS), FLOW, {**FLOW, "flow_shift": 3.7}]
)
def test_a_step_from_the_true_clean_sample_stays_on_the_path(options, name):
    schedule = Schedule(**options)
    grid, x0, eps = schedule.grid(STEPS), noise_of(), noise_of()
    before = torch.tensor([9, 9, 5, 2, 1, 1])
    after = torch.tensor([8, 4, 4, 1, 0, 0])

    def at(levels):
        return grid.data[levels][None, :, None, None] * x0 + grid.noise[levels][None, :, None, None] * eps

    # whatever the solver remembers: the clean sample did not move
    history = History(x0.clone(), torch.tensor([-1, -1, 6, 4, 2, -1]))
    moved = Solver(grid, name).step(at(before), x0, before, after, history)
    torch.testing.assert_close(moved, at(after), rtol=1e-11, atol=1e-11)


def test_ddim_with_eta_keeps_the_variance_and_is_ancestral_at_one():
    grid = Schedule().grid(50)
    solver = Solver(grid, eta=1.0)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 200_000, 1)
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    before, after = torch.tensor([50, 20]), torch.tensor([49, 19])
    moved = solver.step(x * grid.noise[before][None, :, None, None], torch.zeros_like(x), before, after, noise=noise)
    std = moved.std(dim=(0, 2, 3))
    torch.testing.assert_close(std, grid.noise[after], rtol=0.01, atol=0)
    # DDPM's posterior variance: (1 - a') / (1 - a) * (1 - a / a')
    a, b = grid.data[before] ** 2, grid.data[after] ** 2
    posterior = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    alone = solver.step(torch.zeros_like(x), torch.zeros_like(x), before, after, noise=noise)
    torch.testing.assert_close(alone.std(dim=(0, 2, 3)), posterior, rtol=0.01, atol=0)


def gaussian(schedule, spread):
    """The exact denoiser of data N(0, spread^2): its probability flow is known in closed form."""

    def model(x, t):
        data, noise = schedule.scales(t, x)
        x0 = data * spread**2 / (data**2 * spread**2 + noise**2) * x
        return schedule.target(x0, t, (x - data * x0) / noise)

    return model


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("options", [{"prediction": "x0"}, {"prediction": "v"}])
def test_the_second_order_solver_is_of_second_order(options, gap):
    schedule, spread = Schedule(**options), 0.5
    noise = torch.randn(1, 3, 50, 1, dtype=torch.float64)
    errors: dict[str, list[float]] = {"ddim": [], "dpmpp": []}
    for name, found in errors.items():
        for steps in (20, 40, 80):
            grid = schedule.grid(steps)
            (a, b), (c, d) = ((grid.data[i], grid.noise[i]) for i in (steps, 0))
            # x_t = sqrt(data^2 spread^2 + noise^2) z along the flow of a Gaussian
            exact = noise * ((c * spread) ** 2 + d**2).sqrt() / ((a * spread) ** 2 + b**2).sqrt()
            result = sample(gaussian(schedule, spread), noise, steps, gap, schedule, cache="none", solver=name)
            found.append((result - exact).abs().max().item())
    assert 0.4 < errors["ddim"][2] / errors["ddim"][1] < 0.6  # halving the step halves the error
    assert errors["dpmpp"][2] / errors["dpmpp"][1] < 0.3  # or quarters it
    assert errors["dpmpp"][2] < 0.3 * errors["ddim"][2]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("options", [{}, FLOW, {**FLOW, "flow_shift": 3.7}, {"prediction": "v"}])
@pytest.mark.parametrize("gap", [0, 2, STEPS])
def test_histories_belong_to_frames_cached_or_not(options, solver, gap):
    model, schedule, noise = build(), Schedule(**options), noise_of()
    one, other = (sample(model, noise, STEPS, gap, schedule, cache=cache, solver=solver) for cache in ("exact", "none"))
    assert torch.isfinite(one).all()
    assert_same(one, other, 1e-12)
    if solver == "dpmpp":
        assert not torch.allclose(one, sample(model, noise, STEPS, gap, schedule))


@pytest.mark.parametrize("gap", [0, 4])
def test_rectified_flow_ends_exactly_at_the_clean_sample(gap):
    schedule, clean, noise = Schedule(**FLOW, flow_shift=2.0), noise_of(), noise_of()
    assert_same(sample(Oracle(clean, schedule), noise, STEPS, gap, schedule), clean, 1e-12)


def test_euler_is_what_ddim_is_under_rectified_flow():
    schedule, model, noise = Schedule(**FLOW), build(), noise_of()
    x = noise.clone()
    for level in range(STEPS, 0, -1):
        t = torch.full((BATCH, FRAMES), 1000 * level / STEPS, dtype=torch.float64)
        with torch.no_grad():
            x = x + model(x, t) / STEPS
    assert_same(sample(model, noise, STEPS, 0, schedule), x, 1e-12)


@pytest.mark.parametrize("gap", [0, 3])
def test_eta_is_a_function_of_seed_and_frame(gap):
    model, noise = build(), noise_of()

    def run(seed, cache="exact", frames=FRAMES):
        generator = torch.Generator().manual_seed(seed)
        options = {"cache": cache, "eta": 0.8, "generator": generator}
        return sample(model, noise[:, :frames], STEPS, gap, Schedule(), **options)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.allclose(first, run(2))
    assert not torch.allclose(first, sample(model, noise, STEPS, gap, Schedule()))
    assert_same(run(1, "none"), first, 1e-12)
    assert_same(run(1, frames=4), first[:, :4], 1e-12)  # later frames do not shift the numbers of earlier ones


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "euler"}, "ddim, dpmpp"),
        ({"eta": 1.5}, "eta = 1.5"),
        ({"eta": 0.5, "solver": "dpmpp"}, "deterministic"),
    ],
)
def test_what_no_solver_does_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        sample(build(), noise_of(), STEPS, 1, Schedule(), **options)


def test_shapes_and_dtypes_are_kept():
    for dtype in (torch.float32, torch.float64):
        found = sample(build(dtype), noise_of(dtype), STEPS, 2, Schedule(), solver="dpmpp")
        assert found.dtype == dtype
        assert found.shape == (BATCH, FRAMES, TOKENS, CHANNELS)

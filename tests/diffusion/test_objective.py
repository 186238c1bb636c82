import pytest
import torch
from data_helpers import randomize

from ardiff.config import load
from ardiff.diffusion.objective import DECILES, DiffusionObjective
from ardiff.models import DiT

FRAMES, TOKENS, CHANNELS = 4, 3, 4


def build(prediction="x0", **options):
    options = {"hidden_size": 24, "depth": 2, "num_heads": 2, **options}
    options |= {"num_frames": FRAMES, "tokens_per_frame": TOKENS}
    overrides = [f"model.{key}={value}" for key, value in options.items()]
    config = load("tiny", [f"diffusion.prediction={prediction}", *overrides])
    return randomize(DiffusionObjective(DiT(config.model), config)).double()


def batch_of(size=3):
    """A batch with clips of 4, 3 and 1 real frames."""
    lengths = torch.tensor([4, 3, 1])[:size]
    return {
        "latents": torch.randn(size, FRAMES, TOKENS, CHANNELS, dtype=torch.float64),
        "noise": torch.randn(size, FRAMES, TOKENS, CHANNELS, dtype=torch.float64),
        "timesteps": torch.tensor([[0, 99, 100, 999], [5, 400, 500, 700], [950, 960, 970, 980]])[:size],
        "mask": torch.arange(FRAMES)[None] < lengths[:, None],
    }


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_the_loss_equals_a_computation_by_hand(prediction):
    objective = build(prediction)
    batch = batch_of()
    alphas = objective.schedule.alphas_cumprod
    x0, noise, t = batch["latents"], batch["noise"], batch["timesteps"]
    x_t = torch.stack(
        [
            torch.stack(
                [alphas[t[b, f]] ** 0.5 * x0[b, f] + (1 - alphas[t[b, f]]) ** 0.5 * noise[b, f] for f in range(4)]
            )
            for b in range(3)
        ]
    )
    output = objective.network(x_t, t).float()  # the loss is taken in float32
    total, count = 0.0, 0
    for b in range(3):
        for f in range(FRAMES):
            if not batch["mask"][b, f]:
                continue
            alpha = alphas[t[b, f]].item()
            target = {
                "x0": x0[b, f],
                "eps": noise[b, f],
                "v": alpha**0.5 * noise[b, f] - (1 - alpha) ** 0.5 * x0[b, f],
            }[prediction]
            total += (output[b, f] - target.float()).double().square().sum().item()
            count += TOKENS * CHANNELS
    found_total, found_count = objective(batch)["loss"]
    assert found_count.item() == count == 8 * TOKENS * CHANNELS
    assert found_total.item() == pytest.approx(total, rel=1e-5)


def test_masked_frames_count_as_nothing():
    objective = build()
    batch = batch_of()
    before = objective(batch)
    hidden = ~batch["mask"]
    batch["latents"][hidden] += 100
    batch["noise"][hidden] -= 100
    after = objective(batch)
    for name in before:
        for one, other in zip(before[name], after[name], strict=True):
            assert torch.equal(one, other), name


def test_masked_frames_give_no_gradient():
    objective = build()
    batch = batch_of()
    batch["latents"].requires_grad_()
    objective(batch)["loss"][0].backward()
    moved = batch["latents"].grad.abs().amax(dim=(2, 3)) > 0
    assert torch.equal(moved, batch["mask"])


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_deciles_and_frames_add_up_to_the_total(prediction):
    terms = build(prediction)(batch_of())
    total, count = terms["loss"]
    assert terms["loss_by_decile"][0].shape == (DECILES,)
    assert terms["loss_by_frame"][0].shape == (FRAMES,)
    for name in ("loss_by_decile", "loss_by_frame"):
        sums, counts = terms[name]
        assert sums.sum().item() == pytest.approx(total.item(), rel=1e-5)
        assert counts.sum().item() == count.item()


def test_each_frame_lands_in_its_own_decile_and_frame():
    terms = build()(batch_of())
    elements = TOKENS * CHANNELS
    # unmasked timesteps 0, 99 | 100, 999 | 5, 400, 500 | 950
    assert (terms["loss_by_decile"][1] / elements).tolist() == [3, 1, 0, 0, 1, 1, 0, 0, 0, 2]
    assert (terms["loss_by_frame"][1] / elements).tolist() == [3, 2, 2, 1]
    assert ((terms["loss_by_decile"][0] > 0) == (terms["loss_by_decile"][1] > 0)).all()


def test_the_parts_of_a_batch_add_up():
    # sums and counts, not means: so neither ranks nor accumulation steps matter
    objective = build()
    batch = batch_of()
    whole = objective(batch)
    parts = [objective({name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
    for name in whole:
        for place in range(2):
            together = sum(part[name][place] for part in parts)
            torch.testing.assert_close(together, whole[name][place], rtol=1e-5, atol=1e-6)


def test_labels_reach_the_network():
    objective = build(num_classes=2)
    batch = batch_of()
    losses = [objective({**batch, "label": torch.full((3,), label)})["loss"][0].item() for label in range(3)]
    assert len(set(losses)) == 3
    assert objective(batch)["loss"][0].item() == losses[2]  # no label: the null label


def test_a_fresh_network_predicts_zero():
    # so the first loss is the mean square of the target
    objective = build()
    objective.network.initialize()
    batch = batch_of()
    total, _ = objective(batch)["loss"]
    assert total.item() == pytest.approx(batch["latents"][batch["mask"]].square().sum().item(), rel=1e-5)


def test_only_the_loss_carries_gradients():
    terms = build()(batch_of())
    assert terms["loss"][0].requires_grad
    assert not any(tensor.requires_grad for name in terms if name != "loss" for tensor in terms[name])

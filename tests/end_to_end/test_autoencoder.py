"""The AR-VAE through its three stages as a user runs it: launchers, ranks, kills, mistakes."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import write_frames
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from processes import EXACT, exit_record, kill_group, launcher, metrics, run, run_each, start, wait_for_step

from ardiff.config import load
from ardiff.errors import UserError
from ardiff.models.temporal import is_temporal
from ardiff.training.checkpoint import full_weights, step_directory
from ardiff.training.weights import load_arvae

pytestmark = pytest.mark.launcher

FRAMES, JUDGED, TEMPORAL, STEPS = 16, 33, 42, 50  # the last step of each stage
PHASES = (
    f"[{{steps: {FRAMES}, lr: 1e-3}}, {{steps: {JUDGED - FRAMES}, lr: 1e-3, stage: adversarial}}, "
    f"{{steps: {TEMPORAL - JUDGED}, lr: 1e-3, stage: temporal, num_frames: 4, trains: temporal}}, "
    f"{{steps: {STEPS - TEMPORAL}, lr: 1e-3, stage: temporal, num_frames: 4}}]"
)
SMALL = [
    *("--config", "arvae_tiny", "--vae.image_size", "16", "--vae.patch_size", "4", "--vae.num_tokens", "4"),
    *("--vae.hidden_size", "16", "--vae.encoder_depth", "1", "--vae.decoder_depth", "1", "--vae.num_heads", "2"),
    *("--vae.temporal", "true", "--vae.window", "3", "--vae.perceptual_weight", "0.05"),
    *("--vae.discriminator_width", "8", "--vae.discriminator_layers", "2", "--vae.discriminator_lr", "1e-4"),
    *("--train.global_batch_size", "16", "--train.micro_batch_size", "8", "--train.phases", PHASES),
    *("--train.warmup_steps", "5", "--train.log_every", "1", "--train.sample_every", "0", "--train.num_threads", "1"),
    *("--train.validate_every", "10", "--train.validation_frames", "16", "--train.save_every", "7"),
    *("--train.keep_checkpoints", "99"),
]
OF_THE_STEP = (*EXACT[: EXACT.index("bad_samples")], "mse", "kl", "perceptual", "adversarial", "adaptive_weight")
OF_THE_STEP += ("discriminator_loss", "discriminator_right", "validation_psnr", "validation_effective_rank")


def exact(run_dir):
    """All that is a function of the step alone; what a stage does not have is None."""
    return [[line.get(key) for key in OF_THE_STEP] for line in metrics(run_dir)]


def train_vae(run_dir, shards, *extra, kind="ranks", ranks=2):
    program = ["launch/train_vae.py", "--ds_config", "ds_configs/zero2_cpu.json", *SMALL]
    return [*launcher(kind, ranks), *program, "--data.shards", str(shards), "--run_dir", str(run_dir), *extra]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    write_frames(folder, lengths=((9, 2, 12), (17, 6)))  # one is shorter than a clip of the temporal stage
    write_frames(folder / "validation", lengths=((7, 11),))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards) -> Path:
    """All stages on 2 ranks under the deepspeed launcher: what the others are compared with."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(train_vae(run_dir, shards, kind="deepspeed"))
    assert code == 0, output
    assert exit_record(run_dir)["reason"] == "finished"
    return run_dir


def test_every_stage_reports_what_it_has(undisturbed):
    lines = {line["step"]: line for line in metrics(undisturbed)}
    assert list(lines) == list(range(1, STEPS + 1))
    for step, line in lines.items():
        judged = FRAMES < step <= JUDGED
        assert all((key in line) == judged for key in ("adversarial", "adaptive_weight", "discriminator_loss"))
        assert ("validation_psnr" in line) == (step % 10 == 0)
    assert lines[1]["samples"] == 16 and lines[JUDGED]["samples"] == 16 * JUDGED
    assert lines[STEPS]["samples"] == 16 * JUDGED + 4 * (STEPS - JUDGED)  # 4 clips of 4 frames a step
    assert len(lines[10]["validation_latent_std"]) == 4
    assert lines[JUDGED]["mse"] < lines[1]["mse"]


def test_one_rank_gives_the_curve_of_two(tmp_path, shards, undisturbed):
    """Same global and micro batch, so that the adaptive weight is one of the same frames."""
    code, output = run(train_vae(tmp_path / "run", shards, kind="python", ranks=1))
    assert code == 0, output
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=True):
        for key in {"loss", "mse", "discriminator_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])


@pytest.mark.parametrize(
    "step", [pytest.param(FRAMES + 9, marks=pytest.mark.slow), TEMPORAL - 3], ids=["adversarial", "temporal"]
)
def test_killed_run_continues_bit_for_bit(tmp_path, shards, undisturbed, step):
    command = train_vae(tmp_path / "run", shards)
    process = start(command)
    wait_for_step(tmp_path / "run", step, process)
    kill_group(process, signal.SIGKILL)
    process.communicate()
    code, output = run(command)
    assert code == 0, output
    assert "resumed from" in output
    assert exact(tmp_path / "run") == exact(undisturbed)
    last = [step_directory(folder, STEPS) for folder in (tmp_path / "run", undisturbed)]
    for rank in range(2):  # the discriminator's weights and moments too
        ours, theirs = (load_file(folder / f"state_rank{rank}.safetensors") for folder in last)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stages_train_what_they_should(undisturbed):
    def weights(step):
        return full_weights(step_directory(undisturbed, step), "master")

    def moved(before, after):
        first, second = weights(before), weights(after)
        return {name for name in first if not torch.equal(first[name], second[name])}

    temporal = {name for name in weights(7) if is_temporal(name)}
    assert temporal and not temporal & moved(7, 28)  # frames and adversarial leave them alone
    assert moved(35, TEMPORAL) == temporal  # then only they learn
    assert len(moved(TEMPORAL, STEPS) - temporal) > 10
    layout = json.loads((step_directory(undisturbed, 7) / "state.json").read_text())["layout"]
    discriminator = [name for group in layout for name, _ in group if name.startswith("discriminator.")]
    assert len(discriminator) > 4 and not any("discriminator" in name for name in weights(7))
    phases = [json.loads((step_directory(undisturbed, at) / "state.json").read_text())["phase"] for at in (7, 28, 42)]
    assert phases == [0, 1, 2]


def test_temporal_stage_begins_with_what_the_adversarial_one_made(tmp_path, shards, undisturbed):
    """At the first step of the temporal stage reconstructions are exactly those of frames by themselves."""
    network, _ = load_arvae(step_directory(undisturbed, 28))
    latents = torch.randn(2, 9, 4, 4)
    assert torch.equal(network.decode(latents), network.decode(latents, temporal=False))
    trained, _ = load_arvae(step_directory(undisturbed, STEPS))
    assert not torch.allclose(trained.decode(latents), trained.decode(latents, temporal=False), atol=1e-4)


def test_other_numbers_of_ranks_continue_in_any_stage(tmp_path, shards, undisturbed):
    """2 ranks up to the adversarial stage, 1 from there: the discriminator is cut anew as well."""
    shutil.copytree(undisturbed, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > 28:
            shutil.rmtree(folder)
    code, output = run(train_vae(tmp_path / "run", shards, kind="python", ranks=1))
    assert code == 0 and "step_00000028" in output, output
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=True):
        for key in {"loss", "discriminator_loss", "adaptive_weight"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours["step"])


@pytest.mark.slow
def test_a_run_is_given_more_stages_and_starts_from_another_run(tmp_path, shards, undisturbed):
    """train.init, a stage added later, settings of the loss changed, and what a run with a discriminator must keep."""
    source = step_directory(undisturbed, 28)
    less = ("--train.log_every", "4", "--train.validate_every", "0", "--train.init", str(source))

    def go(phases, *extra):
        command = train_vae(tmp_path / "run", shards, *less, "--train.phases", phases, *extra, kind="python", ranks=1)
        return run(command)

    code, output = go("[{steps: 4, lr: 1e-9}]")
    assert code == 0 and re.search(r"total +\S+ +\S+ +0 +0\n", output), output  # all of it is taken
    assert metrics(tmp_path / "run")[0]["mse"] == pytest.approx(metrics(undisturbed)[27]["mse"], rel=0.3)
    both = "[{steps: 4, lr: 1e-9}, {steps: 4, lr: 1e-3, stage: adversarial}]"
    code, output = go(both, "--train.init", "gone", "--vae.discriminator_lr", "1e-3", "--vae.adversarial_weight", "0.1")
    assert code == 0 and "train.init is not read again" in output, output
    assert "discriminator_loss" in metrics(tmp_path / "run")[-1]
    code, output = go("[{steps: 4, lr: 1e-9}, {steps: 9, lr: 1e-3}]")
    assert code == 2 and "keep a phase of stage adversarial" in output, output


def test_mistakes_are_told_in_one_line(tmp_path, shards):
    cases = [
        (("--vae.discriminator_layers", "6"), r"vae.discriminator_layers = 6"),
        (("--vae.perceptual", "lpips", "--vae.lpips", "nowhere.pt"), r"vae.lpips.*nowhere.pt"),
        (("--train.init", "nowhere.bin"), r"train.init.*nowhere.bin"),
        (("--data.validation", str(shards)), r"is what is trained on"),
        (("--data.stride", "6"), r"num_frames = 4 with data.stride = 6, but no video .* use shorter clips"),
    ]
    commands = [train_vae(tmp_path / "run", shards, *options, kind="python", ranks=1) for options, _ in cases]
    for (_, message), (code, output) in zip(cases, run_each(commands, tmp_path), strict=True):
        assert code == 2, output
        lines = [line for line in output.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and re.search(message, lines[0]), output
        assert "Traceback" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_diffusion_transformer_refuses_stages_of_the_auto_encoder():
    from launch.train import build_job

    for override in ("train.phases=[{steps: 4, lr: 1e-3, stage: adversarial}]", "train.init=x", "data.crop_scale=0.5"):
        with pytest.raises(UserError, match=r"launch/train_vae\.py"):
            build_job(load("tiny", [override, "data.shards=nowhere"]))


def test_training_the_temporal_decoder_alone_keeps_latents_valid(undisturbed):
    before, alone, everything = (load_arvae(step_directory(undisturbed, step))[1] for step in (35, TEMPORAL, STEPS))
    assert before == alone != everything

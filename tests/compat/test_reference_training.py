"""Training a network of the published architecture: frozen embeddings and tables outlive checkpoint and export."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import write_latents

from ardiff.config import Phase, load
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.models.discriminator import PatchDiscriminator
from ardiff.models.reconstruction import ReconstructionObjective
from ardiff.models.temporal import is_temporal
from ardiff.training import weights

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--model.num_frames", "3", "--model.tokens_per_frame", "2", "--model.hidden_size", "32", "--model.depth", "1"),
    *("--model.num_heads", "2", "--train.global_batch_size", "2", "--train.micro_batch_size", "2"),
    *("--train.max_steps", "2", "--train.sample_every", "0", "--train.num_threads", "1"),
]


@pytest.mark.launcher
def test_a_trained_run_holds_its_embedding(tmp_path):
    write_latents(tmp_path / "latents")
    program = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", "reference_rope", *SMALL]
    done = subprocess.run(
        [*program, "--data.shards", str(tmp_path / "latents"), "--run_dir", str(tmp_path / "run")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model, config, _ = weights.load_dit(tmp_path / "run", "master")
    torch.manual_seed(config.train.seed)
    fresh = build_dit(config.model)
    assert torch.equal(model.dit.context_emb, fresh.dit.context_emb)
    assert torch.equal(model.dit.rotary_emb.freqs, fresh.dit.rotary_emb.freqs)
    assert not torch.equal(model.dit.final_layer[1].weight, fresh.dit.final_layer[1].weight)
    weights.export(tmp_path / "run", tmp_path / "export")
    again = weights.load_dit(tmp_path / "export", "master")[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_published_auto_encoders_learn_in_every_stage(small_networks):
    """Reconstruction, under a discriminator, and the temporal blocks alone, which begin as if they were not there."""
    overrides = ["image_size=32", "num_tokens=3", "window=2", "reference.encoder=small", "reference.decoder=small"]
    vae = load("arvae_titok", [f"vae.{override}" for override in overrides]).vae
    torch.manual_seed(0)
    objective = ReconstructionObjective(vae)
    video = torch.rand(1, 3, 3, 32, 32)
    noise = torch.randn(1, 3, vae.num_tokens, vae.channels)
    batch = {"video": video, "noise": noise, "mask": torch.ones(1, 3, dtype=torch.bool)}
    single = objective.network.decode(noise, temporal=False)
    assert torch.equal(objective.network.decode(noise), single)
    stages = {
        "frames": (Phase(), {}),
        "adversarial": (Phase(stage="adversarial"), {"judge": PatchDiscriminator(8, 2)}),
        "temporal": (Phase(stage="temporal", num_frames=3, trains="temporal"), {}),
    }
    for stage, (phase, judge) in stages.items():
        objective.enter(phase)
        before = {name: value.detach().clone() for name, value in objective.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            terms = objective(batch, **judge)
            terms["loss"][0].backward()
            optimizer.step()
            losses.append(terms["mse"][0].item())
        moved = {name for name, value in objective.named_parameters() if not torch.equal(value, before[name])}
        assert moved and all(is_temporal(name) == (stage == "temporal") for name in moved)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mask=block_causal", "only frame_causal and bidirectional"),
        ("model.context_dim=8", "embedding of its own"),
        ("model.reference.context_tokens=0", "must be at least 1"),
        ("model.reference.merge_mode=sharenorm", "did you mean 'share_norm'"),
        ("vae.reference.decoder_patch_size=7", "no multiple of vae.reference.decoder_patch_size"),
    ],
)
def test_impossible_settings_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        load("reference_sky", [override])

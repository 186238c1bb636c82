"""Training a network of the published architecture: frozen embeddings and tables outlive checkpoint and export."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import write_frames, write_latents

from ardiff.config import load
from ardiff.errors import UserError
from ardiff.models import build_dit
from ardiff.training import weights
from launch.train_vae import build_job

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


def test_published_auto_encoders_are_not_trained(tmp_path):
    write_frames(tmp_path)
    with pytest.raises(UserError, match=r"vae\.architecture = reference"):
        build_job(load("reference_arvae", [f"data.shards={tmp_path}"]))


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

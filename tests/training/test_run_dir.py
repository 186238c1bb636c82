"""What a run's folder says of the settings it is started with."""

import logging

import pytest

from ardiff.config import load
from ardiff.errors import UserError
from ardiff.training import run_dir

NAME, FIXED = "diffusion transformer", ("model.", "diffusion.")


def started(folder, *overrides):
    config = load("tiny", ["data.shards=https://me:hush@host/x", *overrides])
    run_dir.check(folder, config, NAME, FIXED, "auto")
    run_dir.describe(folder, config, NAME, {}, 1)


def test_settings_are_compared_with_those_of_the_last_start(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ardiff"):
        started(tmp_path)
        started(tmp_path)
        assert caplog.messages == []
        started(tmp_path, "train.log_every=7")
        started(tmp_path, "train.log_every=7")
        started(tmp_path)
    usual = load("tiny").train.log_every
    changed = "settings changed since the last start: train.log_every:"
    assert caplog.messages == [f"{changed} {usual} -> 7", f"{changed} 7 -> {usual}"]
    with pytest.raises(UserError, match=r"holds a run of another model \(model.depth: \d+ -> 1\)"):
        started(tmp_path, "model.depth=1")


def test_passwords_are_neither_kept_nor_a_change_of_settings(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ardiff"):
        started(tmp_path)
        started(tmp_path, "data.shards=https://you:hush2@host/x")
        assert caplog.messages == []
        old = (tmp_path / "config.yaml").read_text()
        (tmp_path / "config.yaml").write_text(old.replace("https://host/x", "https://me:hush@host/x"))  # of before
        started(tmp_path, "data.shards=https://host/y")
    assert "https://host/x -> https://host/y" in caplog.text
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert not [text for text in [caplog.text, *kept] if "hush" in text]


@pytest.mark.parametrize("mixture", ["https://me:hush@host/x?sig=hush", "[{shard: 'https://me:hush@host/x?sig=hush'}]"])
def test_refused_settings_are_told_without_credentials(mixture):
    with pytest.raises(UserError) as refused:
        load("tiny", [f"data.mixture={mixture}"])
    assert "https://host/x" in str(refused.value) and "hush" not in str(refused.value)

"""--text of launch/sample.py: the features for which videos are sampled."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ardiff import cli
from ardiff.config import load
from ardiff.sampling.conditions import text_features

WIDTH, TOKENS = 6, 4


def features(path: Path) -> torch.Tensor:
    config = load("tiny", [])
    config = replace(config, model=replace(config.model, context_dim=WIDTH))
    return text_features(path, config, SimpleNamespace(text_tokens=TOKENS))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_what_training_saw_of_them(tmp_path, dtype):
    array = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    found = features(tmp_path / "x.npy")
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), array.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((2, WIDTH), "a"), "must be float16 or float32 [tokens, D], is <U1 (2, 6)"),
        (np.zeros((2, WIDTH), np.int64), "must be float16 or float32 [tokens, D], is int64 (2, 6)"),
        (np.full((2, WIDTH), np.nan, np.float32), "holds numbers that are not finite"),
        (np.full((2, WIDTH), np.inf, np.float16), "holds numbers that are not finite"),
        (np.zeros((0, WIDTH), np.float16), "is float16 (0, 6)"),
        (np.zeros((2, WIDTH + 1), np.float16), "(2, 7) must be [N, 6] with N from 1 to 4"),
        (np.zeros((TOKENS + 1, WIDTH), np.float16), "(5, 6) must be [N, 6] with N from 1 to 4"),
        ({"a": np.zeros((2, WIDTH), np.float16)}, "must be one float16 or float32 array [tokens, D], is NpzFile"),
        (b"PK\x03\x04 no archive", "not a .npy file of text features"),
        (b"", "not a .npy file of text features"),
    ],
)
def test_what_is_no_text_features_is_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    path = tmp_path / "x"
    with path.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        elif isinstance(content, dict):
            np.savez(stream, **content)
        else:
            np.save(stream, content)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: sys.exit(str(features(path))))
    assert left.value.code == cli.EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"error: --text {path}: ") and message in said and said.count("\n") == 1

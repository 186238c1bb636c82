"""Text features that another program computed: one array [tokens, D] per video, by the id of the video.

Either a folder with ID.npy files or one .npz file with an array called ID per video; float16 or float32.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ardiff.data.text import half_features
from ardiff.errors import UserError

HEADER = 128  # bytes of a .npy file before its numbers
HASHED = 16  # arrays whose content goes into the digest


class TextFeatures:
    """Features for the videos `keys`, read one at a time. Raises UserError unless every video has some.

    dim: numbers per token, D. digest: changes with the set of arrays, their sizes and (of a few) their content.
    """

    def __init__(self, source: Path, keys: Sequence[str]) -> None:
        self.source = source
        self._archive: np.lib.npyio.NpzFile | None = None
        try:
            if source.is_dir():
                with os.scandir(source) as files:
                    sizes = {file.name: file.stat().st_size for file in files if file.name.endswith(".npy")}
            else:
                with zipfile.ZipFile(source) as archive:
                    sizes = {member.filename: member.file_size for member in archive.infolist()}
                self._archive = np.load(source, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"--text {source}: neither a folder of .npy files nor a .npz file ({reason})") from error
        missing = [key for key in keys if f"{key}.npy" not in sizes]
        if missing:
            raise UserError(
                f"--text {source}: no features for {len(missing)} of {len(keys)} videos (the first is {missing[0]}); "
                "add them, or leave these videos out of the corpus"
            )
        self._bytes = {key: sizes[f"{key}.npy"] for key in keys}
        self.dim = 0
        self.dim = self.read(keys[0]).shape[1]
        digest = hashlib.sha256(repr(sorted(self._bytes.items())).encode())
        for key in sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:HASHED]:
            digest.update(self.read(key).tobytes())
        self.digest = digest.hexdigest()

    def bytes_of(self, key: str) -> int:
        """About how many bytes the features of a video have in a shard."""
        return max(HEADER, self._bytes[key])

    def read(self, key: str) -> np.ndarray:
        """Features of a video: float16 [tokens, D]. Raises UserError when they are not that."""
        name = f"{self.source}/{key}.npy" if self._archive is None else f"{self.source}, array {key}"
        try:
            array = np.load(name, allow_pickle=False) if self._archive is None else self._archive[key]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"--text {name}: cannot be read ({error})") from error
        half = half_features(name, array)
        if self.dim and half.shape[1] != self.dim:
            raise UserError(f"--text {name}: has {half.shape[1]} numbers per token, but others have {self.dim}")
        return half

"""The readers of other libraries that ours is compared with, each in its plainest fast use.

They cut one clip from every video that they deliver, as they cannot read a part of one.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.latent_sets import CHANNELS, FRAME_BYTES, FRAMES, TOKENS, VIDEO_BYTES
from tests.benchmarks.readers import BATCH, CROP, STARTS, Reader


def _crop(data: bytes | memoryview) -> np.ndarray:
    """A random clip of a whole video's bytes, whose last VIDEO_BYTES are its latents."""
    start = len(data) - VIDEO_BYTES + random.randrange(STARTS) * FRAME_BYTES
    clip = np.frombuffer(data, np.float16, CROP * TOKENS * CHANNELS, start)
    return clip.reshape(CROP, TOKENS, CHANNELS)


def _crop_array(latents: np.ndarray) -> np.ndarray:
    start = random.randrange(STARTS)
    return latents[start : start + CROP]


def _stack(clips: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(clips))


def webdataset_readers(tars: Sequence[str]) -> list[Reader]:
    """Plain webdataset over our shards: raw bytes, raw bytes through a shuffle buffer, and decoded by its own decoder.

    The last one is not plain: it cuts 12 clips from every video at once.
    """
    import webdataset

    def source(everything: bool = False) -> webdataset.WebDataset:
        chosen = None if everything else (lambda name: name.endswith(".npy"))
        return webdataset.WebDataset(list(tars), shardshuffle=len(tars), select_files=chosen)

    def raw(sample: dict[str, bytes]) -> np.ndarray:
        return _crop(sample["latents.npy"])

    def decoded(sample: dict[str, np.ndarray]) -> np.ndarray:
        return _crop_array(sample["latents.npy"])

    def many(samples: Iterator[dict[str, bytes]]) -> Iterator[np.ndarray]:
        for sample in samples:
            for _ in range(FRAMES // CROP):
                yield raw(sample)

    def batches(dataset: webdataset.WebDataset) -> Iterator[object]:
        return iter(dataset.batched(BATCH, collation_fn=_stack, partial=False))

    buffer = "shards, then a buffer of 1,000"
    return [
        Reader("webdataset, raw bytes", lambda: batches(source().map(raw)), "shards only"),
        Reader("webdataset, raw bytes, buffer", lambda: batches(source().shuffle(1000).map(raw)), buffer),
        Reader("webdataset, .decode(), JSON, buffer", lambda: batches(_decoded(source, decoded)), buffer),
        Reader(
            "webdataset, raw, 12 clips a visit, buffer",
            lambda: batches(source().compose(many).shuffle(1000)),
            f"{buffer}, 12 clips of a video at once",
        ),
    ]


def _decoded(source: Callable, crop: Callable) -> object:
    return source(everything=True).shuffle(1000).decode().map(crop)


def streaming_readers(folders: dict[bool, Path]) -> list[Reader]:
    """mosaicml-streaming over arrays or bytes with its default shuffle; and its random access in a given order."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    sets = {
        as_array: StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        for as_array, folder in folders.items()
    }

    def clips(samples: Iterator[dict], as_array: bool) -> Iterator[object]:
        crop = _crop_array if as_array else _crop
        batch = []
        for sample in samples:
            batch.append(crop(sample["latents"]))
            if len(batch) == BATCH:
                yield _stack(batch)
                batch = []

    def shuffled(as_array: bool) -> Iterator[object]:
        return clips(iter(sets[as_array]), as_array)

    def random_access() -> Iterator[object]:
        order = np.random.default_rng(1).permutation(sets[False].num_samples).tolist()
        return clips((sets[False][number] for number in order), False)

    name, order = "mosaicml-streaming", "py1e: blocks of shards"
    return [
        Reader(f"{name}, bytes", lambda: shuffled(False), order),
        Reader(f"{name}, ndarray", lambda: shuffled(True), order),
        Reader(f"{name}, bytes, by number", random_access, "permutation of all videos, given to it"),
    ]


def litdata_readers(folders: dict[bool, Path]) -> list[Reader]:
    """Litdata over arrays or bytes with its shuffle."""
    from litdata import StreamingDataset

    sets = {as_array: StreamingDataset(str(folder), shuffle=True) for as_array, folder in folders.items()}

    def shuffled(as_array: bool) -> Iterator[object]:
        crop, samples, batch = _crop_array if as_array else _crop, iter(sets[as_array]), []
        while True:
            try:
                batch.append(crop(next(samples)))
            except StopIteration:
                return
            if len(batch) == BATCH:
                yield _stack(batch)
                batch = []

    order = "chunks, then within a chunk"
    return [
        Reader("litdata, bytes", lambda: shuffled(False), order),
        Reader("litdata, ndarray", lambda: shuffled(True), order),
    ]


def installed(module: str) -> bool:
    """Whether a library that is compared is there."""
    return importlib.util.find_spec(module) is not None

"""Manifests and indexes of remote data sets in the cache: versions, what is cleaned, and credentials."""

import base64
import functools
import http.server
import os
import shutil
import socket
import threading
import time

import numpy as np
import pytest
from data_helpers import all_latents, decoded, picture, write_frames, write_latents

from ardiff.config import load
from ardiff.data import downloads, remote
from ardiff.data.dataset import open_shards
from ardiff.data.mixture import open_data
from ardiff.data.remote import ShardCache
from ardiff.errors import UserError

GB = 10**9
PASSWORD, TOKEN = "hush:hush", "token=hush"


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that may ask for a password or a token."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        login = "Basic " + base64.b64encode(PASSWORD.encode()).decode()
        if self.server.secret == PASSWORD and self.headers.get("Authorization") != login:
            self.send_error(401)
            return
        if self.server.secret == TOKEN and query != TOKEN:
            self.send_error(403)
            return
        self.server.asked.append(path)
        self.path = path
        super().do_GET()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """On an IPv6 address, where `family` says so."""

    def __init__(self, folder, family=socket.AF_INET, host="127.0.0.1"):
        self.address_family = family
        super().__init__((host, 0), functools.partial(Handler, directory=str(folder)))
        self.secret, self.asked = None, []
        self.place = f"[{host}]:{self.server_port}" if ":" in host else f"{host}:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    write_latents(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def server(folder):
    server = Server(folder)
    server.url = f"http://{server.place}"
    yield server
    server.shutdown()
    server.server_close()


def read_all(shards):
    return [shards.read_latents(video, 0, int(shards.frames[video])) for video in range(len(shards))]


def same(shards):
    return all(np.array_equal(one, other) for one, other in zip(read_all(shards), all_latents(), strict=True))


def sets(folder):
    return sorted(path.name for path in (folder / "sets").iterdir())


def replace_source(folder, lengths=((4, 4), (7,))):
    """Put another data set in the place of the one at `folder`."""
    shutil.rmtree(folder)
    write_latents(folder, lengths)


def test_a_set_that_is_replaced_stays_as_it_was_for_those_who_use_it(server, folder, tmp_path):
    shutil.rmtree(folder)
    write_frames(folder)
    cache = ShardCache(tmp_path / "cache", GB)
    shards = open_shards(server.url, "frames", cache)
    before = sets(tmp_path / "cache")
    for video in range(len(shards)):
        shards.prepare(video)
    shutil.rmtree(folder)
    write_frames(folder, ((2, 5), (4,)))
    other = open_shards(server.url, "frames", ShardCache(tmp_path / "cache", GB))
    assert len(sets(tmp_path / "cache")) == 2 and set(before) < set(sets(tmp_path / "cache"))
    shards._tables.clear()  # as if there were so many shards that their indexes are read again and again
    pictures = shards.read_frames(2, 0, 6)
    assert all(np.array_equal(pictures[frame], decoded(picture(2, frame, 16))) for frame in range(6))
    assert other.frames.tolist() == [2, 5, 4]
    del shards, cache
    open_shards(server.url, "frames", ShardCache(tmp_path / "cache", GB))
    assert not set(before) & set(sets(tmp_path / "cache"))  # nobody uses the old version any more


def test_shards_replaced_under_a_run_end_it(server, folder, tmp_path):
    shards = open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB))
    replace_source(folder)
    with pytest.raises(
        UserError, match=r"the data set was replaced since this run began; put it back, or start"
    ) as told:
        shards.read_latents(0, 0, 1)
    assert type(told.value) is UserError  # not a bad sample, which would be replaced by another one


def test_an_index_that_is_not_the_manifests_is_told_at_the_start(server, folder, tmp_path):
    index = folder / "latents-000001.index.npy"
    right = index.read_bytes()
    index.write_bytes(right[:-1] + b"x")
    with pytest.raises(UserError, match=r"latents-000001\.index\.npy: not the index that the manifest lists; copy it"):
        open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB))
    assert not list((tmp_path / "cache").rglob("latents-000001.index.npy"))
    index.write_bytes(right)
    assert same(open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB)))


def test_a_set_that_is_replaced_while_it_is_fetched_is_fetched_anew(server, folder, tmp_path, monkeypatch):
    real, calls = ShardCache._fetch_indexes, []

    def fetch(cache, url, place):
        if not calls:
            replace_source(folder)
        calls.append(place.name)
        real(cache, url, place)

    monkeypatch.setattr(ShardCache, "_fetch_indexes", fetch)
    shards = open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB))
    assert shards.frames.tolist() == [4, 4, 7] and len(set(calls)) == 2


def test_what_is_not_used_for_long_is_deleted_and_what_is_in_use_stays(server, folder, tmp_path):
    cache = ShardCache(tmp_path / "cache", GB)
    shards = open_shards(server.url, "latents", cache)
    (used,) = sets(tmp_path / "cache")
    old, recent = tmp_path / "cache/sets/aaaaaaaaaaaaaaaa-1", tmp_path / "cache/sets/bbbbbbbbbbbbbbbb-1"
    for path in (old, recent):
        path.mkdir()
        (path / "manifest.json").touch()
    long_ago = time.time() - remote.KEEP_SETS - 10
    for path in (old, tmp_path / "cache/sets" / used):
        os.utime(path, (long_ago, long_ago))
    locks = tmp_path / "cache/locks"
    (locks / ("c" * 64)).touch()  # of a shard that is not there any more
    os.close(cache.open(shards.manifest.shards[0], server.url))
    write_latents(folder / "more", ((3,),))
    open_shards(f"{server.url}/more", "latents", ShardCache(tmp_path / "cache", GB))
    left = sets(tmp_path / "cache")
    assert used in left and recent.name in left and old.name not in left
    names = {path.name for path in locks.iterdir()}
    assert "c" * 64 not in names and {used, shards.manifest.shards[0].sha256} <= names
    assert same(shards)


def test_locks_that_are_deleted_still_exclude(server, folder, tmp_path):
    """Ranks fetch while others, starting, clean the locks away."""
    open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB))
    results, stop = [], threading.Event()

    def clean():
        while not stop.is_set():
            ShardCache(tmp_path / "cache", GB)._clean("none", "none")

    def rank():
        shards = open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB))
        results.append(same(shards))

    cleaner = threading.Thread(target=clean)
    ranks = [threading.Thread(target=rank) for _ in range(6)]
    for thread in (cleaner, *ranks):
        thread.start()
    for thread in ranks:
        thread.join()
    stop.set()
    cleaner.join()
    assert results == [True] * 6
    assert [server.asked.count(f"/latents-00000{number}.tar") for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(("secret", "form"), [(PASSWORD, "http://hush:hush@{}{}"), (TOKEN, "http://{}{}?token=hush")])
@pytest.mark.parametrize("end", ["", "/manifest.json", "/latents-{000000..000002}.tar"])
def test_credentials_are_used_and_never_shown(server, folder, tmp_path, caplog, secret, form, end):
    server.secret = secret
    url = form.format(server.place, end)
    options = ["model.tokens_per_frame=2", "model.num_frames=4", f"data.cache_dir={tmp_path / 'cache'}"]
    data = open_data(load("tiny", [f"data.shards={url}", *options]), "latents", 4)
    assert same(data.sets[0])
    said = [data.source, *data.place_of(0)]
    (folder / "latents-000001.tar").write_bytes(b"short")
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError) as caught:
        data.sets[0].read_latents(3, 0, 1)
    stored = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    shown = [*map(str, said), str(caught.value), caplog.text, *map(str, stored)]
    assert "latents-000001.tar" in str(caught.value)
    assert not [text for text in shown if "hush" in text]


@pytest.mark.parametrize("form", ["http://hush:hush@{}", "http://{}?token=hush"])
def test_refused_credentials_are_not_shown(server, folder, tmp_path, caplog, monkeypatch, form):
    server.secret = PASSWORD + "no longer"
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(403, self.path))
    cache = ShardCache(tmp_path / "cache", GB)
    monkeypatch.setattr(cache, "_download", functools.partial(cache._download, patience=0.3))
    with pytest.raises(UserError, match=r"cannot be reached for 0 s \(ClientResponseError: 403") as caught:
        cache.manifest(form.format(server.place))
    assert "trying again" in caplog.text
    assert "hush" not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "in the URL" not in str(caught.value)
    with pytest.raises(UserError, match=r"give a user, password or token in the URL.* config.yaml keeps neither"):
        cache.manifest(f"http://{server.place}/other")


def test_ipv6_addresses(folder, tmp_path):
    try:
        server = Server(folder, socket.AF_INET6, "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    assert same(open_shards(f"http://{server.place}", "latents", ShardCache(tmp_path / "cache", GB)))
    server.shutdown()
    server.server_close()

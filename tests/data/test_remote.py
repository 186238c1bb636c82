import functools
import http.server
import os
import platform
import threading
from collections import Counter

import numpy as np
import pytest
from data_helpers import LENGTHS, all_latents, write_latents

from ardiff.config import load
from ardiff.data import dataset, downloads, remote
from ardiff.data.clips import LatentClips
from ardiff.data.dataset import open_shards
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import open_data
from ardiff.data.remote import ShardCache, is_remote
from ardiff.data.stream import BatchStream
from ardiff.data.tar import ShardError
from ardiff.errors import UserError
from ardiff.files import sha256

GB = 10**9


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server that counts and can be told to damage or refuse the next answers for a file."""

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked[name] += 1
        fault = self.server.faults.get(name, [])
        what = fault.pop(0) if fault else None
        if what == "refuse":
            self.send_error(503)
            return
        if what == "damage":
            data = bytearray((self.server.folder / name).read_bytes())
            data[700] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_latents(folder)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    monkeypatch.setattr(dataset.time, "sleep", lambda _: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.asked, server.faults, server.folder = Counter(), {}, folder
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def read_all(shards):
    return [shards.read_latents(video, 0, int(shards.frames[video])) for video in range(len(shards))]


def same(found, expected):
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def cached(folder):
    return sorted(path.name for path in folder.glob("*.tar"))


@pytest.mark.parametrize("form", ["{url}", "{url}/", "{url}/manifest.json"])
def test_remote_shards_are_the_same_as_local_ones(server, folder, tmp_path, form):
    local = open_shards(folder, "latents")
    shards = open_shards(form.format(url=server.url), "latents", ShardCache(tmp_path / "cache", GB))
    assert shards.identity == local.identity
    assert shards.is_remote and not local.is_remote
    assert same(read_all(shards), all_latents())
    assert cached(tmp_path / "cache") == sorted(f"{shard.sha256}.tar" for shard in local.manifest.shards)
    assert all(server.asked[shard.file] == 1 for shard in local.manifest.shards)
    # a second start asks for the manifest, and for nothing that is there
    again = open_shards(server.url, "latents", ShardCache(tmp_path / "cache", GB))
    assert same(read_all(again), all_latents())
    assert server.asked["manifest.json"] == 2
    assert all(server.asked[shard.file] == 1 for shard in local.manifest.shards)
    assert server.asked["latents-000000.index.npy"] == 1


def test_some_of_the_shards_by_pattern(server, tmp_path):
    shards = open_shards(f"{server.url}/latents-{{000000,000002}}.tar", "latents", ShardCache(tmp_path, GB))
    assert len(shards) == len(LENGTHS[0]) + len(LENGTHS[2])
    with pytest.raises(UserError, match="latents-000009"):
        open_shards(f"{server.url}/latents-000009.tar", "latents", ShardCache(tmp_path, GB))


def test_the_cache_keeps_to_its_limit_and_evicts_what_was_used_longest_ago(server, folder, tmp_path):
    sizes = [shard.bytes for shard in open_shards(folder, "latents").manifest.shards]
    limit = max(sizes) + min(sizes)
    cache = ShardCache(tmp_path, limit)
    shards = open_shards(server.url, "latents", cache)
    order = [0, 3, 8, 0, 4, 5, 8, 1, 0, 6]
    for video in order:
        assert np.array_equal(shards.read_latents(video, 0, 1), all_latents()[video][:1])
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= limit
    names = [shard.sha256 for shard in shards.manifest.shards]
    for shard, age in ((1, 300), (2, 100)):
        os.close(cache.open(shards.manifest.shards[shard], server.url))
        os.utime(tmp_path / f"{names[shard]}.tar", (1e9 - age, 1e9 - age))
    os.close(cache.open(shards.manifest.shards[0], server.url))
    assert f"{names[0]}.tar" in cached(tmp_path)
    assert f"{names[1]}.tar" not in cached(tmp_path)


def test_a_shard_larger_than_the_cache_is_a_mistake(server, tmp_path):
    shards = open_shards(server.url, "latents", ShardCache(tmp_path, 1000))
    with pytest.raises(UserError, match=r"data.cache_gb = 1e-06, but .*latents-000000.tar alone has"):
        shards.read_latents(0, 0, 1)


def test_damage_on_the_way_is_fetched_again(server, folder, tmp_path, caplog):
    server.faults["latents-000001.tar"] = ["damage"]
    shards = open_shards(server.url, "latents", ShardCache(tmp_path, GB))
    assert same(read_all(shards), all_latents())
    assert server.asked["latents-000001.tar"] == 2
    assert "its sha256 is wrong; fetching it again" in caplog.text


def test_a_server_that_refuses_for_a_while_is_asked_again(server, tmp_path):
    server.faults = {"manifest.json": ["refuse"], "latents-000000.tar": ["refuse", "refuse"]}
    shards = open_shards(server.url, "latents", ShardCache(tmp_path, GB))
    assert same(read_all(shards), all_latents())


def test_a_shard_that_stays_damaged_is_bad_samples_and_asked_for_no_more(server, tmp_path):
    server.faults["latents-000001.tar"] = ["damage"] * 100
    config = load("tiny", [f"data.shards={server.url}", f"data.cache_dir={tmp_path}", "model.tokens_per_frame=2",
                           "model.num_frames=4"])  # fmt: skip
    data = open_data(config, "latents", 4)
    clips = LatentClips(data, LatentSpace.of(data.manifest, "none"), config)
    visits = data.visits(0, 60)
    result = clips(visits)
    in_it = set(visits.position[np.isin(visits.video, (3, 4))].tolist())
    assert in_it and {bad.position for bad in result.bad} == in_it
    assert all(bad.shard == f"{server.url}/latents-000001.tar" for bad in result.bad)
    assert all("fetched twice, and not what the manifest says" in bad.reason for bad in result.bad)
    assert server.asked["latents-000001.tar"] == 2
    assert f"{data.sets[0].manifest.shards[1].sha256}.tar" not in cached(tmp_path)


def test_ranks_of_a_node_fetch_every_shard_once(server, folder, tmp_path):
    barrier, results = threading.Barrier(8), []

    def rank():
        shards = open_shards(server.url, "latents", ShardCache(tmp_path, GB))
        barrier.wait()
        results.append(same(read_all(shards), all_latents()))

    threads = [threading.Thread(target=rank) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert [server.asked[f"latents-00000{number}.tar"] for number in range(3)] == [1, 1, 1]


def test_ranks_that_share_a_small_cache_do_not_disturb_each_other(server, folder, tmp_path):
    limit = 2 * max(shard.bytes for shard in open_shards(folder, "latents").manifest.shards)
    results = []

    def rank(seed):
        shards = open_shards(server.url, "latents", ShardCache(tmp_path, limit))
        order = np.random.default_rng(seed).integers(0, len(shards), 40).tolist()
        results.append(all(np.array_equal(shards.read_latents(v, 0, 1), all_latents()[v][:1]) for v in order))

    threads = [threading.Thread(target=rank, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= limit


def test_what_a_killed_process_left_is_cleared_and_not_counted(server, tmp_path):
    left = tmp_path / f".{'a' * 64}.room.tmp.{platform.node()}.999999999"
    left.touch()
    os.truncate(left, GB)
    half = tmp_path / f".{'b' * 64}.tar.tmp.{platform.node()}.999999999"
    half.write_bytes(b"half")
    shards = open_shards(server.url, "latents", ShardCache(tmp_path, 10**6))
    assert same(read_all(shards), all_latents())
    assert not left.exists() and not half.exists()


def test_reservations_of_the_dead_are_nobodys_whatever_their_host(server, folder, tmp_path):
    ShardCache(tmp_path, GB)
    left = tmp_path / f".{'a' * 64}.room"
    left.touch()
    os.truncate(left, GB)
    half = tmp_path / f".{'b' * 64}.tar.tmp.another-host.1"  # the id of a process that lives here
    half.write_bytes(b"half")
    assert same(read_all(open_shards(server.url, "latents", ShardCache(tmp_path, 10**6))), all_latents())
    assert not left.exists() and not half.exists()


def test_an_outage_makes_no_bad_samples(server, tmp_path, monkeypatch, caplog):
    shards = open_shards(server.url, "latents", ShardCache(tmp_path, GB))
    server.faults["latents-000000.tar"] = ["refuse"] * 30
    assert same(read_all(shards), all_latents())
    assert "trying again" in caplog.text
    server.faults["latents-000001.tar"] = ["refuse"] * 10**6
    (tmp_path / f"{shards.manifest.shards[1].sha256}.tar").unlink()
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"latents-000001.tar: cannot be reached for 0 s") as caught:
        shards.read_latents(3, 0, 1)
    assert not isinstance(caught.value, ShardError)  # it would be replaced by a substitute
    server.faults.clear()
    assert same(read_all(shards), all_latents())


def test_a_full_disk_is_the_users_to_mend(server, tmp_path, monkeypatch):
    shards = open_shards(server.url, "latents", ShardCache(tmp_path, GB))

    class Full:
        def get_file(self, *_):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_file_system", lambda url: (Full(), url))
        with pytest.raises(UserError, match=r"data.cache_dir .*: No space left on device; see data.cache_gb"):
            shards.read_latents(0, 0, 1)
    assert same(read_all(shards), all_latents())


def test_a_damaged_copy_in_the_cache_is_replaced(server, folder, tmp_path):
    name = open_shards(folder, "latents").manifest.shards[0].sha256
    (tmp_path / f"{name}.tar").write_bytes(b"half of it")
    assert same(read_all(open_shards(server.url, "latents", ShardCache(tmp_path, GB))), all_latents())
    assert sha256(tmp_path / f"{name}.tar") == name


def test_shards_are_fetched_before_they_are_needed(server, tmp_path):
    config = load("tiny", [f"data.shards={server.url}", f"data.cache_dir={tmp_path}", "model.tokens_per_frame=2",
                           "model.num_frames=4"])  # fmt: skip
    data = open_data(config, "latents", 4)
    fetched = threading.Event()
    prepared = []
    real = data.prepare

    def prepare(videos):
        prepared.extend(videos.tolist())
        real(videos)
        if len(prepared) >= 64:
            fetched.set()

    data.prepare = prepare
    clips = LatentClips(data, LatentSpace.of(data.manifest, "none"), config)
    stream = BatchStream(data, clips, global_batch_size=8, micro_batch_size=4, rank=1, world_size=2, prefetch=1)
    assert fetched.wait(timeout=10)
    stream.close()
    expected = np.concatenate([data.visits(position, 8).video[4:] for position in range(0, 1000, 8)])
    assert prepared == expected[: len(prepared)].tolist()  # the second rank's own, in order


def test_a_cache_too_small_for_a_global_shuffle_is_told(server, folder, tmp_path, caplog, monkeypatch):
    def warnings(*options):
        caplog.clear()
        config = load("tiny", [f"data.shards={server.url}", f"data.cache_dir={tmp_path}", *options])
        open_data(config, "latents", 4)
        return caplog.text

    needed = sum(shard.bytes for shard in open_shards(folder, "latents").manifest.shards)
    assert not warnings("data.cache_gb=0.001")
    monkeypatch.setattr("ardiff.data.mixture.ShardCache", lambda place, _: ShardCache(place, needed - 1))
    assert "do not fit data.cache_gb" in warnings()
    assert "less than two shards for each of the 4 lanes" in warnings("data.order=lanes", "data.lanes=4")


def test_what_is_not_there_is_named(server, tmp_path):
    cache = ShardCache(tmp_path, GB)
    with pytest.raises(UserError, match=r"/nowhere/manifest.json: cannot be fetched \(not found\)"):
        open_shards(f"{server.url}/nowhere", "latents", cache)
    with pytest.raises(UserError, match=r"give data\.cache_dir"):
        open_shards(server.url, "latents")
    shards = open_shards(server.url, "latents", cache)
    shards.manifest.shards[0].file = "latents-000007.tar"
    with pytest.raises(ShardError, match=r"latents-000007.tar, byte .*not found"):
        shards.read_latents(0, 0, 1)


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "ssh://host/x", "zip://a::s3://b/c", "ftp://x/y", "file:///etc"])
def test_other_kinds_of_urls_are_refused(source, tmp_path):
    with pytest.raises(UserError, match="shards are read from folders or from http"):
        open_shards(source, "latents", ShardCache(tmp_path, GB))


def test_an_object_store_without_its_package_says_what_is_missing(tmp_path, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(downloads, "_file_system", missing)
    with pytest.raises(UserError, match=r"s3://bucket/set/manifest.json: needs a package .*s3fs"):
        open_shards("s3://bucket/set", "latents", ShardCache(tmp_path, GB))


def test_paths_are_no_urls():
    assert not is_remote("/data/x-{000..010}.tar")
    assert not is_remote("runs/a:b")
    assert is_remote("s3://bucket/x")

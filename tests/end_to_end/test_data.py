"""The loader under a training run: bad samples, mixtures, lanes and shards behind a web server."""

import functools
import http.server
import json
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_latents

from ardiff.data.shards import parse_index

sys.path.insert(0, str(Path(__file__).parent))
from processes import exact, exit_record, kill_group, metrics, run, start, train, wait_for_step, with_other_shards

pytestmark = pytest.mark.launcher

LENGTHS = ((9, 30, 4), (17, 2, 40), (25, 8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, LENGTHS)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, shards) -> tuple[Path, int]:
    """The same with infinities in one video of the second shard, and where they are."""
    folder = tmp_path_factory.mktemp("damaged") / "latents"
    shutil.copytree(shards, folder)
    offset = int(parse_index((folder / "latents-000001.index.npy").read_bytes())["offset"][2])
    with (folder / "latents-000001.tar").open("r+b") as stream:
        stream.seek(offset)
        stream.write(np.full(40 * 2 * 4, np.inf, np.float16).tobytes())
    return folder, offset


def state_of(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


def test_bad_samples_are_replaced_counted_and_the_same_after_a_kill(tmp_path, damaged):
    folder, offset = damaged
    options = ("--train.max_steps", "30", "--train.save_every", "10", "--data.max_bad_fraction", "0.9")
    code, output = run(train(tmp_path / "undisturbed", folder, *options))
    assert code == 0, output
    found = re.findall(r"BAD SAMPLE at position (\d+) replaced: (.+), byte (\d+): (.+)", output)
    assert len(found) > 10
    assert {(shard, int(byte)) for _, shard, byte, _ in found} == {(f"{folder}/latents-000001.tar", offset)}
    assert metrics(tmp_path / "undisturbed")[-1]["bad_samples"] == len({position for position, *_ in found})
    noted = state_of(tmp_path / "undisturbed", 30)["bad_samples"]
    assert [entry[0] for entry in noted] == sorted(int(position) for position, *_ in found)

    command = train(tmp_path / "killed", folder, *options)
    process = start(command)
    wait_for_step(tmp_path / "killed", 17, process)
    kill_group(process, signal.SIGKILL)
    process.communicate()
    code, output = run(command)
    assert code == 0, output
    assert exact(tmp_path / "killed") == exact(tmp_path / "undisturbed")
    assert state_of(tmp_path / "killed", 30)["bad_samples"] == noted

    code, output = run(train(tmp_path / "alone", folder, *options, kind="python", ranks=1))
    assert code == 0, output
    expected = [line["loss"] for line in metrics(tmp_path / "undisturbed")]
    assert [line["loss"] for line in metrics(tmp_path / "alone")] == pytest.approx(expected, rel=1e-5)
    assert state_of(tmp_path / "alone", 30)["bad_samples"] == noted


def test_too_many_bad_samples_end_the_run_in_one_line(tmp_path, damaged):
    folder, offset = damaged
    code, output = run(train(tmp_path / "run", folder, "--train.max_steps", "30"))
    assert code != 0
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    for part in ("data.max_bad_fraction = 0.0001", f"{folder}/latents-000001.tar, byte {offset}", "inspect_shards"):
        assert part in errors[0]
    assert exit_record(tmp_path / "run")["code"] == 2


@pytest.mark.slow
def test_weights_of_a_mixture_may_change_when_a_run_goes_on(tmp_path, shards):
    other = tmp_path / "other"
    write_latents(other, ((40, 20), (12,)))

    def command(weight: float, steps: int) -> list[str]:
        sources = f"[{{shards: {shards}}}, {{shards: {other}, weight: {weight}}}]"
        plain = train(tmp_path / "run", shards, "--train.max_steps", str(steps), kind="python", ranks=1)
        place = plain.index("--data.shards")
        return [*plain[:place], "--data.mixture", sources, *plain[place + 2 :]]

    code, output = run(command(1.0, 5))
    assert code == 0, output
    code, output = run(command(3.0, 10))
    assert code == 0, output
    assert "mixing with other weights from here on: [1.0, 3.0]" in output
    assert state_of(tmp_path / "run", 10)["mixture"] == [[0, [1.0, 1.0]], [40, [1.0, 3.0]]]
    code, output = run(command(3.0, 12))
    assert code == 0, output
    assert "mixing with other" not in output
    assert len(state_of(tmp_path / "run", 12)["mixture"]) == 2
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_lanes_give_one_and_two_ranks_the_same_curve(tmp_path, shards):
    options = ("--data.order", "lanes", "--data.lanes", "4", "--data.lane_window", "3", "--train.max_steps", "12")
    for name, kind, ranks in (("two", "ranks", 2), ("one", "python", 1)):
        code, output = run(train(tmp_path / name, shards, *options, kind=kind, ranks=ranks))
        assert code == 0, output
    expected = [line["loss"] for line in metrics(tmp_path / "two")]
    assert [line["loss"] for line in metrics(tmp_path / "one")] == pytest.approx(expected, rel=1e-5)
    changed = [word if word != "3" else "5" for word in options]
    code, output = run(train(tmp_path / "one", shards, *changed, kind="python", ranks=1))
    assert code == 2
    assert "trained with another data.order (lanes 4 window 3 -> lanes 4 window 5)" in output
    code, output = run(train(tmp_path / "bad", shards, *options[:3], "3", kind="python", ranks=1))
    assert code == 2
    assert "train.global_batch_size = 8 must be a multiple of data.lanes = 3" in output


def test_ranks_with_different_data_are_refused(tmp_path, shards):
    """As with a stale copy on the disk of one node."""
    stale = tmp_path / "stale"
    write_latents(stale, LENGTHS[:2])
    command = with_other_shards(train(tmp_path / "run", shards, "--train.max_steps", "3"), stale)
    code, output = run(command, timeout=120)
    assert code != 0
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "data of rank 0 is" in errors[0] and "but of rank 1" in errors[0] and "6 videos" in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_shards_behind_a_web_server_train_the_same(tmp_path, shards):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = ("--data.cache_dir", str(tmp_path / "cache"), "--data.cache_gb", "0.001")
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        for name, source, extra in (("local", shards, ()), ("remote", url, cache)):
            code, output = run(train(tmp_path / name, source, *extra, "--train.max_steps", "10"))
            assert code == 0, output
        code, output = run(train(tmp_path / "none", url, kind="python", ranks=1))
        assert code == 2
        assert "give data.cache_dir" in output
    finally:
        server.shutdown()
        server.server_close()
    assert exact(tmp_path / "remote") == exact(tmp_path / "local")
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3

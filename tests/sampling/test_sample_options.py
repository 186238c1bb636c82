"""The command line of launch/sample.py: what it refuses in one line, and one rule for two spellings of a setting."""

import sys
from argparse import Namespace

import pytest

from ardiff import cli
from ardiff.config import load
from ardiff.errors import UserError
from ardiff.sampling.generate import Request, Video
from ardiff.sampling.options import add_sampling_arguments, request_of, set_conditions
from launch import sample


def asked(monkeypatch, config, *words):
    parser = cli.parser("Samples.", "sample")
    parser.takes_settings = True
    add_sampling_arguments(parser)
    monkeypatch.setattr(sys, "argv", ["sample", *words])
    options, options.overrides = cli.parse_with_overrides(parser)
    return request_of(options, config)[0]


@pytest.mark.parametrize("spelling", ["--guidance", "--sampling.guidance"])
def test_guidance_has_one_rule_for_both_spellings(monkeypatch, spelling):
    guided = load("tiny", ["model.num_classes=3"])
    for scale in ("0", "-0.5", "1", "2.5"):
        assert asked(monkeypatch, guided, spelling, scale).sampling.guidance == float(scale)
    for scale in ("nan", "inf", "1e7"):
        with pytest.raises(UserError, match=r"sampling\.guidance = .* must lie between"):
            asked(monkeypatch, guided, spelling, scale)
    plain = load("tiny", ["sampling.guidance=3"])
    assert asked(monkeypatch, plain).sampling.guidance == 1
    assert asked(monkeypatch, plain, spelling, "1").sampling.guidance == 1
    for scale in ("0", "3"):
        with pytest.raises(UserError, match=r"guidance = \d\.0: this model has no classes or texts to guide towards"):
            asked(monkeypatch, plain, spelling, scale)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefix_frames", "3", "--run", "r", "--out", "o"], "--prefix_frames 3: of which clip? Name it with --pref"),
        (["--ending_frames", "2", "--run", "r", "--out", "o"], "--ending_frames 2: of which clip? Name it with --end"),
        (["--prefix", "a.mp4", "--show_schedule", "a.png"], "--prefix a.mp4: needs --run DIR"),
        (["--label", "run", "--show_schedule", "a.png"], "--label run: needs --run DIR"),
        (["--ema", "0.9", "--show_schedule", "a.png"], "--ema 0.9: needs --run DIR"),
        (["--ema", "1", "--run", "r", "--out", "o"], "--ema 1.0: must be the decay of an average"),
        (["--ema", "0.9", "--weights", "master", "--run", "r", "--out", "o"], "--ema 0.9: means averaged weights, but"),
        (["--show_schedule", "."], "--show_schedule .: must be the name of a .png file"),
        (["--show_schedule", "folder.png"], "--show_schedule folder.png: must be the name of a .png file"),
        (["--show_schedule", "a.jpg"], "--show_schedule a.jpg: must be the name of a .png file"),
        (["clip.mp4", "--run", "r", "--out", "o"], "unexpected argument 'clip.mp4'; see --help"),
        (["--sampling.window", "16", "clip.mp4", "--out", "o"], "unexpected argument 'clip.mp4'; see --help"),
        (["--show_schedule", "a.png", "--sampling.window"], "'--sampling.window' needs a value"),
        (["--num_videos", "2"], "missing --out DIR"),
        (["--out", "o"], "missing --run DIR"),
        (["--show_schedule", "a.png", "--fps", "nan"], "--fps nan: must lie between 0.01 and 10000"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(UserError) as caught:
        sample.main()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder.png"]


def test_frames_of_no_clip_at_all_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("A red car.\n")
    options = {"prompts": tmp_path / "prompts.txt", "prefix_frames": 3, "prefix": None, "ending": None, "seeds": None}
    options |= {"num_videos": None, "seed": 0, "warm_frames": 0, "ending_frames": None}
    config = load("tiny")
    request = Request([Video(0)], 8, config.sampling)
    with pytest.raises(UserError, match=r"--prefix_frames 3: but --prompts .*prompts\.txt names no clips"):
        set_conditions(Namespace(**options), request, config, Namespace(text_tokens=0), None)

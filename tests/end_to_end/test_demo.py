"""The driver of the demo: what is complete is reused, what failed or changed is told."""

import sys
from pathlib import Path

import pytest

from ardiff.errors import UserError
from launch import demo as module
from launch.demo import (
    Demo,
    Stage,
    held_out_losses,
    losses,
    stages_before_training,
    stages_from_training,
    stages_of_videos,
)


def writing(path: Path, text: str = "x") -> list[str]:
    return [sys.executable, "-c", f"import pathlib; pathlib.Path({str(path)!r}).open('a').write({text!r})"]


def test_complete_stages_are_reused_and_later_ones_follow_a_change(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def run(command: list[str]) -> list[str]:
        demo = Demo(tmp_path)
        demo.run(Stage("one", command, first))
        demo.run(Stage("two", writing(second), second))
        return [note for _, _, note in demo.table]

    assert run(writing(first)) == ["", ""]
    assert run(writing(first)) == ["reused", "reused"]
    assert run(writing(first, "y")) == ["", ""]  # another command, and what depends on it
    second.unlink()
    assert run(writing(first, "y")) == ["reused", ""]
    assert (first.read_text(), second.read_text()) == ("xy", "x")


def test_a_stage_that_always_runs_does_not_spoil_the_others(tmp_path):
    for expected in (["", ""], ["", "reused"]):
        demo = Demo(tmp_path)
        demo.run(Stage("scan", writing(tmp_path / "first"), tmp_path / "first"), always=True)
        demo.run(Stage("next", writing(tmp_path / "second"), tmp_path / "second"))
        assert [note for _, _, note in demo.table] == expected


def test_a_stage_that_fails_or_stops_early_is_not_complete(tmp_path):
    with pytest.raises(UserError, match="stage 'one' did not finish"):
        Demo(tmp_path).run(Stage("one", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "first"))
    stopped = writing(tmp_path / "exit.json", '{"reason": "SIGTERM", "code": 0, "step": 3}')
    with pytest.raises(UserError, match="did not finish"):
        Demo(tmp_path).run(Stage("train", stopped, tmp_path / "exit.json"))


def test_other_videos_need_another_folder(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one")
    Demo(tmp_path).check_source(corpus)
    Demo(tmp_path).check_source(corpus)
    corpus.write_text("two")
    with pytest.raises(UserError, match="demo of other videos"):
        Demo(tmp_path).check_source(corpus)


def test_the_commands_are_the_programs_of_the_readme(tmp_path):
    stages = [*stages_of_videos(tmp_path, None), *stages_before_training(tmp_path), *stages_from_training(tmp_path, 6)]
    assert [stage.name for stage in stages] == [
        *("make videos", "scan videos", "frame shards", "train AR-VAE", "extract latents", "train DiT"),
        *("sample", "evaluate"),
    ]
    readme = (module.ROOT / "README.md").read_text()
    for stage in stages:
        programs = [word for word in stage.command if word.startswith(("data_tools.", "launch/"))]
        assert len(programs) == 1 and programs[0] in readme
    train = next(stage for stage in stages if stage.name == "train DiT").command
    assert Path(train[0]).name == "deepspeed" and "--ds_config" in train


def test_losses_at_start_and_end(tmp_path):
    lines = [f'{{"loss": {20 - i}}}' for i in range(20)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert losses(tmp_path) == (20.0, 1.5)
    assert held_out_losses(tmp_path) == []
    lines[4] = '{"loss": 16, "validation_loss": 0.75}'
    lines[9] = '{"loss": 11, "validation_loss": 0.5}'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert held_out_losses(tmp_path) == [0.75, 0.5]

"""Every preset trains, says what its method is, and may build on another one."""

import pytest
import torch
from data_helpers import write_latents

from ardiff.config import Config, differences, load, presets
from ardiff.data.clips import LatentClips
from ardiff.data.latent_space import LatentSpace
from ardiff.data.mixture import open_data
from ardiff.data.stream import BatchStream
from ardiff.diffusion.objective import DiffusionObjective
from ardiff.errors import UserError
from ardiff.models import DiT
from ardiff.sampling.levels import ADRows, SlidingWindow

TOKENS = 2
METHODS = {  # the rows of the family, beside ardiff_xl: timesteps, mask, process
    "synchronous": ("synchronous", "bidirectional", "ddpm"),
    "diffusion_forcing": ("independent", "frame_causal", "ddpm"),
    "fvdm": ("fvdm", "bidirectional", "ddpm"),
    "pavdm": ("pavdm", "bidirectional", "rectified_flow"),
    "pavdm_causal": ("mixture", "block_causal", "rectified_flow"),
    "rolling": ("rolling", "bidirectional", "ddpm"),
    "fifo": ("synchronous", "bidirectional", "ddpm"),
    "ad_matched": ("ad_matched", "frame_causal", "ddpm"),
    "mixture": ("mixture", "frame_causal", "ddpm"),
}
DATA_SETS = ("sky", "taichi", "ucf101", "faceforensics")
# reference_*: published networks, with tests of their own
TRAINED = [name for name in presets() if load(name).model.architecture == "ardiff" and not name.startswith("arvae")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("presets")
    write_latents(root / "videos", ((40, 36, 50), (37, 70)), tokens=TOKENS)
    write_latents(root / "images", ((1,) * 20,), tokens=TOKENS)
    return root


def test_every_method_and_data_set_has_a_preset():
    assert {*METHODS, *DATA_SETS, "ardiff_xl", "images_and_video"} <= set(presets())


@pytest.mark.parametrize("name", TRAINED)
def test_a_preset_trains(name, folders):
    overrides = [
        *("model.hidden_size=24", "model.depth=2", "model.num_heads=2", f"model.tokens_per_frame={TOKENS}"),
        *("train.global_batch_size=4", "train.micro_batch_size=2"),
    ]
    if name == "images_and_video":
        sources = f"{{shards: {folders}/videos, weight: 0.8}}, {{shards: {folders}/images, weight: 0.2}}"
        config = load(name, [*overrides, f"data.mixture=[{sources}]"])
    else:
        config = load(name, [*overrides, f"data.shards={folders}/videos"])
    data = open_data(config, "latents", config.model.num_frames)
    clips = LatentClips(data, LatentSpace.of(data.manifest, config.data.normalize), config)
    stream = BatchStream(data, clips, global_batch_size=4, micro_batch_size=2)
    torch.manual_seed(0)
    objective = DiffusionObjective(DiT(config.model), config)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, eps=config.train.adam_eps)
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    for batch in (next(stream) for _ in range(2)):
        counted = 0.0
        for part in batch.micro_batches:
            total, count = objective(part)["loss"]
            (total / (batch.num_frames * objective.elements_per_frame)).backward()
            counted += count.item()
            assert torch.isfinite(total)
            assert total > 0
        assert counted == batch.num_frames * objective.elements_per_frame
        gradients = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
    stream.close()
    assert any(not torch.equal(one, two) for one, two in zip(before, objective.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_row_says(name):
    config = load(name)
    diffusion, model = config.diffusion, config.model
    assert (diffusion.timesteps, model.mask, diffusion.process) == METHODS[name]
    assert (model.depth, model.hidden_size, model.num_heads) == (28, 1152, 16)


@pytest.mark.parametrize("name", ["pavdm", "pavdm_causal"])
def test_pavdm_has_the_published_numbers(name):
    config = load(name)
    diffusion, stairs, sampling = config.diffusion, config.diffusion.staircase, config.sampling
    assert (diffusion.prediction, diffusion.flow_shift) == ("v", 0.0)
    assert (stairs.num_steps, stairs.block, stairs.prefix, stairs.jitter) == (30, 5, 5, 0.4)
    chunks = (config.model.num_frames - stairs.prefix) // stairs.block
    assert chunks == 6
    assert (sampling.num_steps, sampling.gap) == (30, 30 // chunks)
    if name == "pavdm_causal":
        assert config.model.block == stairs.block
        assert config.diffusion.used_timesteps == {"pavdm", "ad_matched"}
        assert (stairs.gap, sampling.window) == (sampling.gap, config.model.num_frames)


@pytest.mark.parametrize(
    ("name", "gap"), [("synchronous", 0), ("fvdm", 0), ("fifo", 1), ("rolling", 3), ("ad_matched", 5), ("mixture", 5)]
)
def test_sampling_fits_the_training(name, gap):
    config = load(name)
    sampling, stairs = config.sampling, config.diffusion.staircase
    assert sampling.gap == gap
    if name == "rolling":
        assert sampling.gap * (config.model.num_frames - stairs.prefix) == sampling.num_steps
    if name == "fifo":
        assert sampling.num_steps == 4 * config.model.num_frames
        changed = [line.split(":")[0] for line in differences(load("synchronous"), config)]
        assert changed
        assert all(key.startswith("sampling.") for key in changed)  # no training of its own
    if name in ("ad_matched", "mixture"):
        assert (stairs.num_steps, stairs.gap) == (sampling.num_steps, sampling.gap)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("prefix", [0, 5])
def test_long_videos_fit_the_window(name, prefix):
    config = load(name)
    sampling = config.sampling
    if not sampling.gap:
        return  # all frames at once: a clip is as long as those of the training
    rows = ADRows(500, sampling.num_steps, sampling.gap, sampling.block or config.model.block, prefix)
    if sampling.sliding:
        history = None if sampling.history < 0 else sampling.history
        window = SlidingWindow(sampling.sliding, history, sampling.variable, sampling.partition, sampling.lookahead)
        if prefix and history == 0:
            with pytest.raises(UserError, match="never shows the 5 given frames"):
                window.check(rows)
        else:
            window.check(rows)
    else:
        assert config.model.mask != "bidirectional"
        assert rows.most_unfinished <= (sampling.window or config.model.num_frames)


@pytest.mark.parametrize("name", DATA_SETS)
def test_data_sets_train_the_papers_model(name):
    config = load(name)
    assert differences(load("ardiff_xl").diffusion, config.diffusion) == []
    assert config.model.num_classes == (101 if name == "ucf101" else 0)
    assert [phase.steps for phase in config.train.phases] == [100_000, 50_000]
    assert config.train.phases[1].lr == 1e-5


# Presets that build on others


def write(path, text):
    path.write_text(text)
    return str(path)


def refusal(source):
    with pytest.raises(UserError) as caught:
        load(source)
    return str(caught.value)


def test_a_file_says_only_what_differs(tmp_path):
    config = load(write(tmp_path / "mine.yaml", "extends: base\nmodel:\n  depth: 3\n"))
    assert differences(load("base"), config) == ["model.depth: 12 -> 3"]


def test_files_extend_files_and_lists_are_replaced(tmp_path):
    write(tmp_path / "first.yaml", "extends: tiny\ntrain:\n  phases: [{steps: 7, lr: 0.5}]\n  seed: 1\n")
    second = write(tmp_path / "second.yaml", "extends: first.yaml\ntrain:\n  seed: 2\n")
    config = load(second, ["model.depth=9"])
    expected = load("tiny", ["train.phases=[{steps: 7, lr: 0.5}]", "train.seed=2", "model.depth=9"])
    assert config == expected


def test_the_order_of_the_keys_does_not_matter(tmp_path):
    config = load(write(tmp_path / "mine.yaml", "model:\n  depth: 3\nextends: base\n"))
    assert (config.model.depth, config.model.hidden_size) == (3, load("base").model.hidden_size)


def test_extending_nothing_is_the_default(tmp_path):
    assert load(write(tmp_path / "mine.yaml", "extends: null\n")) == Config()


def test_an_unknown_base_is_refused_with_the_nearest(tmp_path):
    path = write(tmp_path / "mine.yaml", "extends: bse\n")
    text = refusal(path)
    assert path in text
    assert "extends: bse" in text
    assert "did you mean 'base'" in text


@pytest.mark.parametrize("value", ["[tiny]", "3"])
def test_a_base_must_be_a_name(tmp_path, value):
    assert "must be the name of a preset or a YAML file" in refusal(
        write(tmp_path / "mine.yaml", f"extends: {value}\n")
    )


def test_circles_are_refused(tmp_path):
    one = write(tmp_path / "one.yaml", "extends: two.yaml\n")
    two = write(tmp_path / "two.yaml", "extends: one.yaml\n")
    for path in (one, two, write(tmp_path / "self.yaml", "extends: self.yaml\n")):
        assert "circle" in refusal(path)


def test_a_mistake_is_reported_with_the_file_that_it_is_in(tmp_path):
    first = write(tmp_path / "first.yaml", "model:\n  dept: 3\n")
    text = refusal(write(tmp_path / "second.yaml", "extends: first.yaml\nmodel:\n  num_head: 2\n"))
    assert f"{first}: unknown setting 'model.dept'" in text
    assert "second.yaml: unknown setting 'model.num_head'" in text

import re

import pytest

from ardiff.config import Config, DataConfig, Phase, differences, load, presets, to_yaml
from ardiff.config.loading import _all_keys
from ardiff.errors import UserError

# Every dotted key is public: it stands in users' YAML files and command lines. A new one is added here by hand; one
# that is renamed or removed breaks them and belongs into the change log.
PUBLIC_KEYS = {
    "model": (
        "num_frames tokens_per_frame in_channels hidden_size depth num_heads mlp_ratio qk_norm rope_theta "
        "num_classes context_dim mask block context attention_backend activation_checkpointing window sink "
        "architecture reference.merge_mode reference.positions reference.context_tokens reference.context_dim "
        "reference.learn_sigma"
    ),
    "vae": (
        "image_size patch_size num_tokens channels hidden_size encoder_depth decoder_depth num_heads "
        "kl_weight l1_weight sample_posterior perceptual_weight perceptual lpips adversarial_weight adversarial_warmup "
        "discriminator_width discriminator_layers discriminator_lr temporal window architecture "
        "reference.encoder reference.decoder reference.decoder_patch_size "
        "reference.temporal reference.unit_norm"
    ),
    "diffusion": (
        "num_timesteps beta_start beta_end process flow_shift prediction timesteps shared_probability init_probability "
        "staircase.num_steps staircase.gap staircase.block staircase.prefix staircase.prefix_dropout staircase.pattern "
        "staircase.jitter staircase.variable_length mixture conditioning.probability conditioning.max_frames "
        "conditioning.where"
    ),
    "data": (
        "shards mixture order lanes lane_window stride flip_probability crop_scale normalize arvae validation "
        "prefetch decode_threads verify max_bad_fraction cache_dir cache_gb"
    ),
    "train": (
        "seed global_batch_size micro_batch_size max_steps phases warmup_steps betas adam_eps weight_decay "
        "grad_clip ema_decay label_dropout log_every save_every keep_checkpoints sample_every num_threads "
        "collective_timeout_minutes max_skipped_steps init validate_every validation_frames extra_ema_decays "
        "save_minutes keep_every probe_tolerance hang_minutes time_limit_minutes spike_sigmas spike_window "
        "spike_action spike_batches grad_norms_every"
    ),
    "sampling": (
        "num_videos num_steps gap guidance fps block solver eta cache window sink sliding history variable partition "
        "lookahead"
    ),
}


def refusal(*overrides, source="tiny"):
    with pytest.raises(UserError) as caught:
        load(str(source), list(overrides))
    return str(caught.value)


def test_the_public_keys_are_unchanged():
    frozen = [f"{section}.{name}" for section, names in PUBLIC_KEYS.items() for name in names.split()]
    assert sorted(_all_keys()) == sorted(frozen)


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_a_round_trip(name, tmp_path):
    config = load(name)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(str(path)) == config


def test_round_trip_keeps_every_changed_value(tmp_path):
    # numbers that YAML's own rules would read as text or round, a pattern full of YAML's special characters, None
    numbers = ["train.adam_eps=1e-8", "vae.kl_weight=1.2345678901234567e-7", "train.seed=2147483648"]
    others = ["train.max_steps=null", "train.betas=[0.5, 0.25]", "train.phases=[{steps: 7, lr: 3e-5}]"]
    config = load("tiny", [*numbers, *others, "model.qk_norm=false"])
    config.data.shards = "/data/{a,b}: #*&'\"/x-{000..012}.tar"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = load(str(path))
    assert again == config
    assert (again.train.adam_eps, again.vae.kl_weight) == (1e-8, 1.2345678901234567e-7)


def test_ardiff_xl_is_the_model_of_the_paper():
    model = load("ardiff_xl").model
    assert (model.depth, model.hidden_size, model.num_heads) == (28, 1152, 16)
    assert (model.num_frames, model.tokens_per_frame, model.in_channels) == (16, 32, 4)
    train = load("ardiff_xl").train
    assert (train.global_batch_size, train.betas) == (1024, [0.9, 0.999])
    assert train.phases == [Phase(100_000, 2e-4), Phase(50_000, 1e-5)]


@pytest.mark.parametrize(
    "spelling",
    [["train.max_steps=100"], ["--train.max_steps=100"], ["--train.max_steps", "100"]],
    ids=["bare", "equals", "pair"],
)
def test_overrides_in_all_three_spellings(spelling):
    assert load("tiny", spelling).train.max_steps == 100


def test_overrides_mix_and_the_last_one_wins():
    config = load("tiny", ["--train.seed", "1", "model.depth=2", "--train.seed=-3", "--sampling.guidance", "-1.5"])
    assert (config.train.seed, config.model.depth, config.sampling.guidance) == (-3, 2, -1.5)


def test_nothing_but_the_override_changes():
    assert differences(load("tiny"), load("tiny", ["train.seed=9"])) == ["train.seed: 0 -> 9"]
    assert differences(load("base"), load("base")) == []


@pytest.mark.parametrize("overrides", [[], ["train.max_steps=7"]])
def test_max_steps_defaults_to_the_sum_of_the_phases(overrides):
    assert load("tiny", overrides).max_steps == (7 if overrides else 1500)


@pytest.mark.parametrize(
    "pattern",
    [
        "/data/sky/latents-{000000..000127}.tar",
        "*.tar",  # an alias in YAML
        "{a,b}.tar",  # a mapping
        "[ab].tar",  # a list
        "007",  # an octal number
        "1e3",
        "on",  # true
        "a #1",  # a comment
    ],
)
def test_shard_patterns_arrive_letter_by_letter(pattern):
    assert load("tiny", [f"--data.shards={pattern}"]).data.shards == pattern
    assert load("tiny", ["--data.shards", pattern]).data.shards == pattern


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dept=3", "did you mean 'model.depth'"),
        ("trian.seed=4", "did you mean 'train.seed'"),
        ("max_steps=3", "did you mean 'train.max_steps'"),
        ("gap=3", "did you mean 'sampling.gap'"),  # no near spelling, but the name of one setting
        ("zzz=1", "sections are model, vae, diffusion, data, train, sampling"),
        ("model=3", "unknown setting 'model'"),
        ("model.mask=frame_casual", "did you mean 'frame_causal'"),
        ("diffusion.prediction=x1", "must be one of x0, eps, v"),
        ("diffusion.timesteps=fop", "did you mean 'fopp'"),
        ("data.normalize=units", "did you mean 'unit'"),
        ("train.phases=[{steps: 3, lrr: 1}]", "'lr'"),
    ],
)
def test_names_are_refused_with_the_nearest_match(override, message):
    text = refusal(override)
    assert override.split("=")[0] in text
    assert message in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.depth=deep", "model.depth = deep must be a whole number"),
        ("model.depth=1.5", "model.depth = 1.5 must be a whole number"),
        ("model.depth=true", "model.depth = True must be a whole number"),
        ("model.qk_norm=maybe", "model.qk_norm = maybe must be true or false"),
        ("train.seed=null", "train.seed = None: it needs a value"),
        ("train.grad_clip=much", "train.grad_clip = much must be a number"),
        ("train.betas=[a, b]", "train.betas = ['a', 'b']: 'a' must be a number"),
        ("train.betas=[0.9, [1]]", "train.betas = [0.9, [1]] must be a list of numbers, without others inside"),
        ("train.phases=[{steps: x}]", "train.phases = [{'steps': 'x'}]: 'x' must be a whole number"),
        ("train.phases=[1]", "train.phases = [1] must be like '[{steps: ..., lr: "),
        ("data.stride=[1]", "data.stride = [1] must be a whole number"),
    ],
)
def test_wrong_types_are_refused(override, said):
    found = refusal(override)
    assert found.startswith(f"configuration refused: command line: {said}") and "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.global_batch_size=100", "train.micro_batch_size=16"], ["= 100", "micro_batch_size = 16"]),
        (["model.hidden_size=100", "model.num_heads=7"], ["100 / 7"]),
        (["model.hidden_size=12", "model.num_heads=4"], ["12 / 4", "even"]),  # rotary needs pairs
        (["vae.hidden_size=100", "vae.num_heads=3"], ["100 / 3"]),
        (["vae.image_size=100", "vae.patch_size=16"], ["= 100", "vae.patch_size = 16"]),
        (["sampling.gap=21"], ["sampling.gap = 21", "sampling.num_steps = 20"]),
        (["sampling.gap=-1"], ["sampling.gap = -1"]),
        (["sampling.num_steps=1000"], ["sampling.num_steps = 1000", "diffusion.num_timesteps = 1000"]),
        (["model.block=2"], ["model.block = 2", "block_causal"]),
        (["train.phases=[]"], ["train.phases"]),
        (["train.phases=[{steps: 3, lr: 0}]"], ["train.phases"]),
        (["train.betas=[0.9]"], ["train.betas = [0.9]"]),
        (["train.max_steps=0"], ["train.max_steps = 0"]),
        (["train.label_dropout=1.5"], ["train.label_dropout = 1.5"]),
        (["train.ema_decay=1"], ["train.ema_decay = 1"]),
        (["model.num_heads=0"], ["model.num_heads = 0"]),
        (["train.micro_batch_size=0"], ["train.micro_batch_size = 0"]),
        (["vae.patch_size=0"], ["vae.patch_size = 0"]),
    ],
)
def test_impossible_arithmetic_is_refused(overrides, parts):
    text = refusal(*overrides)
    assert all(part in text for part in parts), text


def test_the_impossible_is_possible_where_it_has_a_meaning():
    assert load("tiny", ["model.mask=block_causal", "model.block=2"]).model.block == 2
    assert load("tiny", ["sampling.gap=20"]).sampling.gap == 20


def test_every_problem_is_reported_at_once():
    text = refusal(
        *("model.dept=3", "train.seed=x", "model.mask=frame", "sampling.gap=99", "train.betas=[1]", "--train.log_every")
    )
    parts = ["model.dept", "train.seed", "model.mask", "sampling.gap", "train.betas", "--train.log_every"]
    assert all(part in text for part in parts), text
    assert len(re.findall("^  - ", text, re.MULTILINE)) == len(parts)


def test_every_value_that_must_be_positive_is_reported_at_once():
    text = refusal("model.depth=0", "train.log_every=0", "data.stride=-1", "sampling.gap=99")
    parts = ["model.depth = 0", "train.log_every = 0", "data.stride = -1", "sampling.gap = 99"]
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "words", [["--model.depth"], ["--model.depth", "--train.seed", "4"], ["4"], ["--train.seed", "4", "stray"]]
)
def test_an_override_without_a_value_is_refused(words):
    assert "needs a value" in refusal(*words)


def test_an_unreadable_value_is_refused_with_its_key():
    assert "'train.betas': cannot read '[0.9'" in refusal("train.betas=[0.9")


def test_yaml_with_unknown_keys_names_file_and_keys(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  depht: 3\n  depth: 2\ntrain:\n  seed: abc\noptim:\n  lr: 1\n")
    text = refusal("train.log_evry=1", source=path)
    for part in [str(path), "model.depht", "'model.depth'", "train.seed", "optim.lr", "train.log_every"]:
        assert part in text


@pytest.mark.parametrize(
    "content", [b"model: [", b"model:\n\t- x", b"a: b: c", b"\xff\xfe\x00", b"- 1\n- 2\n", b"just words"]
)
def test_what_is_no_mapping_in_yaml_is_refused(content, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert str(path) in refusal(source=path)


def test_a_section_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "flat.yaml"
    path.write_text("model: 5\n")
    assert "'model'" in refusal(source=path)


def test_an_empty_yaml_is_the_default(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load(str(path)) == Config()


def test_yaml_is_overridden_by_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  shards: here\n  stride: 2\n")
    assert load(str(path), ["data.stride=3"]).data == DataConfig(shards="here", stride=3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train.extra_ema_decays", "0.99"), "train.extra_ema_decays = 0.99 must be a list, as in '[0.99]'"),
        (("train.betas=0.9",), "train.betas = 0.9 must be a list, as in '[0.9]'"),
        (("train.extra_ema_decays=null",), "train.extra_ema_decays = None must be a list, as in '[]'"),
        (("train.phases=null",), "train.phases = None must be a list, as in '[{steps: ..., lr: ..., "),
        (("data.mixture=here",), "data.mixture = here must be a list, as in '[{shards: ..., weight: ...}]'"),
        (
            ("data.mixture={shards: here}",),
            "data.mixture = {'shards': 'here'} must be a list, as in '[{shards: ..., we",
        ),
    ],
)
def test_a_single_value_for_a_list_is_shown_as_one(words, said):
    assert f"command line: {said}" in refusal(*words)


def test_what_it_suggests_is_taken():
    assert load("tiny", ["--train.extra_ema_decays", "[0.95]"]).train.extra_ema_decays == [0.95]


def test_a_file_with_a_single_value_for_a_list(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("extends: tiny\ntrain: {betas: 0.9}\n")
    assert f"{file}: train.betas = 0.9 must be a list, as in '[0.9]'" in refusal(source=file)


def test_an_unknown_preset_lists_the_known_ones():
    text = refusal(source="ardif_xl")
    assert "did you mean 'ardiff_xl'" in text
    assert all(name in text for name in presets())


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("{steps: 4, lr: 1e-3, stage: temporal, num_frames: 4}", "needs vae.temporal = true"),
        (
            "{steps: 4, lr: 1e-3, stage: adversial}",
            r"phases\[0\].stage = 'adversial'.*did you mean 'adversarial'",
        ),
        ("{steps: 4, lr: 1e-3, num_frames: 4}", "belong to the stage temporal"),
        ("{steps: 4, lr: 1e-3, stage: adversarial, trains: temporal}", "belong to the stage temporal"),
    ],
)
def test_stages_of_an_auto_encoder_that_cannot_work(phase, message):
    assert re.search(message, refusal(f"train.phases=[{phase}]", source="arvae_tiny"))


@pytest.mark.parametrize("num_frames", [1, 3, 32])
def test_clips_of_the_temporal_stage_divide_the_batch_of_frames(num_frames):
    phase = f"train.phases=[{{steps: 4, lr: 1e-3, stage: temporal, num_frames: {num_frames}}}]"
    told = refusal(phase, "vae.temporal=true", source="arvae_tiny")
    assert f"num_frames = {num_frames}" in told and "train.micro_batch_size = 16" in told


def test_lpips_needs_its_weights_and_a_weight():
    assert "needs vae.lpips" in refusal("vae.perceptual=lpips", "vae.perceptual_weight=0.1", source="arvae_tiny")
    assert "no effect" in refusal("vae.perceptual=lpips", "vae.lpips=file.pt", source="arvae_tiny")


def test_every_step_has_a_phase():
    config = load("tiny", ["train.phases=[{steps: 2, lr: 1e-3}, {steps: 3, lr: 1e-4}]"])
    assert [config.phase_number(step) for step in range(1, 8)] == [0, 0, 1, 1, 1, 1, 1]
    assert config.phase_of(3).lr == 1e-4


def test_a_new_discriminator_is_trusted_little_by_little():
    phases = (
        "[{steps: 3, lr: 1e-3}, {steps: 2, lr: 1e-3, stage: adversarial}, {steps: 9, lr: 1e-4, stage: adversarial}]"
    )
    config = load("arvae_tiny", [f"train.phases={phases}", "vae.adversarial_warmup=4"])
    assert [config.adversarial_ramp(step) for step in (4, 5, 6, 8, 9)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    config.vae.adversarial_warmup = 0
    assert config.adversarial_ramp(4) == 1.0

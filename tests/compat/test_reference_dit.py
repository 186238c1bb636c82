"""The published DiT: recorded forwards and samples, all configurations, what reads what."""

import json

import numpy as np
import pytest
import torch
from data_helpers import GOLDEN, chi_square
from reference_golden import DITS, case, like, rebuilt, worst
from torch.nn import functional as F

from ardiff.compat.reference import ReferenceDiT, load_dit
from ardiff.compat.reference.options import MASKS, MERGE_MODES, model_config
from ardiff.diffusion.schedule import Schedule
from ardiff.diffusion.timesteps import fopp
from ardiff.errors import UserError
from ardiff.sampling import SlidingWindow, ad_levels, sample

SMALL = {
    "num_frames": 4,
    "n_token_per_frame": 3,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "learn_sigma": False,
    "context_dim": 8,
    "context_token": 5,
    "merge_mode": "share_norm",
    "causal_attn_mode": "video_temporal_causal",
}
SCHEDULE = Schedule()


def build(dtype=torch.float64, **options):
    arguments = SMALL | options
    network = load_dit(like(ReferenceDiT(model_config(arguments))), arguments).to(dtype)
    generator = torch.Generator().manual_seed(1)
    network.context_emb = torch.randn(5, 8, generator=generator)
    return network


def inputs(frames=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, frames, 3, 4, generator=generator, dtype=dtype)
    t = torch.randint(0, 1000, (2, frames), generator=generator)
    return x, t, torch.randn(2, 5, 8, generator=generator, dtype=dtype)


@pytest.fixture(scope="module", params=DITS)
def golden(request):
    weights, config, arrays = case(request.param)
    return load_dit(weights, config), arrays


def test_recorded_forward(golden):
    network, arrays = golden
    with torch.no_grad():
        found = network(arrays["x"], arrays["t"], arrays["context"])
    assert worst(found, arrays["y"]) < 1e-5


def test_recorded_diffusion_and_loss(golden):
    network, arrays = golden
    assert worst(SCHEDULE.alphas_cumprod.float(), arrays["alphas_cumprod"]) < 1e-6
    noisy = SCHEDULE.q_sample(arrays["x"], arrays["t"], arrays["noise"])
    assert worst(noisy, arrays["x_noisy"]) < 1e-5
    with torch.no_grad():
        found = network(noisy, arrays["t"], arrays["context"])
    assert float(F.mse_loss(found, SCHEDULE.target(arrays["x"], arrays["t"], arrays["noise"]))) == pytest.approx(
        float(arrays["loss_x0"]), rel=1e-5
    )


def drift(frames, gap, steps):
    """What the reference multiplies finished frames by until the last row: its update of them is no identity."""
    before, after = SCHEDULE.alphas_cumprod[1], SCHEDULE.alphas_cumprod[0]
    factor = after.sqrt() + (1 - after).sqrt() * (before.rsqrt() - 1) / (1 / before - 1).sqrt()
    idle = (ad_levels(frames, steps, gap)[:-1] == 0).sum(0)
    return (factor**idle)[:, None, None].float()


@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.parametrize("gap", [0, 2, 10])
def test_recorded_samples(golden, gap, guidance):
    network, arrays = golden
    context = arrays["context"]
    found = sample(
        network.as_model("x0"),
        arrays["xT"],
        10,
        gap,
        SCHEDULE,
        guidance=float(guidance),
        context=context,
        null_context=torch.zeros_like(context),
        cache="none",
    )
    expected = arrays[f"ad_S10_s{gap}_cfg{guidance}"]
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert worst(found * drift(expected.shape[1], gap, 10), expected) < 3e-4


@pytest.mark.parametrize("gap", [2, 10])
def test_recorded_sliding_window(golden, gap):
    network, arrays = golden
    found = sample(
        network.as_model("x0"),
        arrays["xT_long"],
        10,
        gap,
        SCHEDULE,
        context=arrays["context"],
        cache="none",
        window=SlidingWindow(network.config.num_frames),
    )
    assert torch.allclose(found, arrays[f"window_S10_s{gap}_frames11"], rtol=2e-3, atol=2e-3)


def test_a_recorded_sample_with_a_cache():
    weights, config, arrays = case("dit_tattn_separatenorm")
    model, context = load_dit(weights, config).as_model("x0"), arrays["context"]
    found = sample(
        model, arrays["xT"], 10, 2, SCHEDULE, guidance=2.0, context=context, null_context=context * 0, cache="exact"
    )
    assert torch.allclose(found, arrays["ad_S10_s2_cfg2"], rtol=2e-3, atol=2e-3)


def plain_forward(weights, arguments, x, t, context):
    """The network once more, written from its description: one mask, one loop, no reuse."""
    width, heads = arguments["hidden_size"], arguments["num_heads"]
    frames, tokens, n = x.shape[1], x.shape[2], context.shape[1]
    mode = arguments["merge_mode"]

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    omega = torch.exp(-torch.arange(128) / 128 * np.log(10000)).double()
    angles = t[..., None].double() * omega
    tau = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1).to(x))
    tau = F.silu(linear("t_embedder.mlp.2", F.silu(tau)))
    video = linear("x_embedder", x).flatten(1, 2)
    if not arguments.get("use_rotary_emb"):
        position = torch.arange(frames * tokens)[:, None] / 10000 ** (torch.arange(width // 2) / (width / 2))
        video = video + torch.cat([position.sin(), position.cos()], -1).to(x)
    h = torch.cat([linear("c_embedder", context), video], 1)
    frame = torch.cat([torch.full((n,), -1), torch.arange(frames).repeat_interleave(tokens)])
    allowed = (frame[None] <= frame[:, None]) | (arguments["causal_attn_mode"] is None)
    if arguments["causal_attn_mode"] == "video_temporal_causal":
        allowed = allowed | (frame == -1)[:, None]
    of_token = frame.clamp(min=0)

    def attention(name, value):
        q, k, v = linear(f"{name}.qkv", value).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if arguments.get("qk_norm"):
            q, k = (
                F.layer_norm(part, part.shape[-1:], weights[f"{name}.{which}.weight"], weights[f"{name}.{which}.bias"])
                for part, which in ((q, "q_norm"), (k, "k_norm"))
            )
        if arguments.get("use_rotary_emb"):
            d = width // heads
            turn = torch.arange(len(frame))[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
            turn = torch.polar(torch.ones_like(turn), turn)
            q, k = (
                torch.view_as_real(torch.view_as_complex(part.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).to(x)
                for part in (q, k)
            )
        scores = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).masked_fill(~allowed, -torch.inf)
        return linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    for i in range(arguments["depth"]):
        name = f"blocks.{i}"
        s1, c1, g1, s2, c2, g2 = linear(f"{name}.adaLN_modulation.1", tau)[:, of_token].chunk(6, -1)
        is_context = (frame == -1)[None, :, None]
        if mode == "sharenorm_shift_first_t":
            s2, c2 = s1, c1
        for shift, scale, gate, branch in ((s1, c1, g1, "attn"), (s2, c2, g2, "mlp")):
            if mode == "reproduce":
                shifts, scales, gates = shift[:, :1], scale[:, :1], gate[:, :1]
            else:
                modulated = ~is_context if mode != "sharenorm_shift_first_t" else torch.ones_like(is_context)
                shifts, scales = shift * modulated, scale * modulated
                gates = torch.where(is_context, torch.ones_like(gate), gate)
            u = norm(h) * (1 + scales) + shifts
            if branch == "attn":
                out = attention(f"{name}.attn", u)
            else:
                out = linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", u), approximate="tanh"))
            h = (norm(h) if mode.startswith("share") else h) + gates * out
    return linear("final_layer.1", norm(h[:, n:])).unflatten(1, (frames, tokens))


@pytest.mark.parametrize("positions", ["flat", "rotary"])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("mode", MERGE_MODES)
def test_every_configuration_follows_its_description(mode, mask, positions):
    rotary = positions == "rotary"
    options = {"merge_mode": mode, "causal_attn_mode": mask, "use_rotary_emb": rotary, "qk_norm": rotary}
    network = build(**options)
    arguments = (x, t, context) = inputs()
    weights = {name: value.double() for name, value in network.named_parameters()}
    with torch.no_grad():
        found, expected = network(*arguments), plain_forward(weights, SMALL | options, x, t, context)
    assert worst(found, expected) < 2e-4  # the tables are float32 in the network
    assert float(expected.std()) > 0.1


def test_plain_forward_is_the_recorded_one():
    # the control of the test above
    for name in DITS:
        weights, config, arrays = case(name)
        found = plain_forward(weights, config, arrays["x"], arrays["t"], arrays["context"])
        assert worst(found, arrays["y"]) < 3e-5


def future_leak(**options):
    """How much the last frame changes the first frame's output."""
    network = build(**options)
    x, t, context = inputs()
    other = x.clone()
    other[:, -1] += 1
    with torch.no_grad():
        return worst(network(x, t, context)[:, 0], network(other, t, context)[:, 0])


@pytest.mark.parametrize("mode", MERGE_MODES)
def test_the_published_mask_leaks_the_future_and_the_strict_one_does_not(mode):
    assert future_leak(causal_attn_mode="video_temporal_causal", merge_mode=mode) > 1e-4
    assert future_leak(causal_attn_mode=None, merge_mode=mode) > 1e-4
    assert future_leak(causal_attn_mode="temporal_causal", merge_mode=mode) == 0


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_rotary_networks_take_any_number_of_frames(frames):
    network = build(use_rotary_emb=True, causal_attn_mode="temporal_causal")
    x, t, context = inputs(9)
    with torch.no_grad():
        whole, part = network(x, t, context), network(x[:, :frames], t[:, :frames], context)
    assert worst(part, whole[:, :frames]) < 1e-9


def test_flat_positions_end_after_the_clip():
    network = build()
    x, t, context = inputs(5)
    network(x[:, :2], t[:, :2], context)
    with pytest.raises(UserError, match=r"5 frames, but the positions of this network end after 4.*SlidingWindow\(4\)"):
        network(x, t, context)


@pytest.mark.parametrize("stored", [False, True], ids=["given context", "stored context"])
@pytest.mark.parametrize("rotary", [False, True], ids=["flat", "rotary"])
@pytest.mark.parametrize("mode", ["share_norm", "separate_norm"])
def test_the_cache_is_exact_for_strict_context(mode, rotary, stored):
    model = build(causal_attn_mode="temporal_causal", merge_mode=mode, use_rotary_emb=rotary).as_model("x0")
    noise, _, context = inputs()
    conditions = {} if stored else {"context": context, "null_context": context * 0, "guidance": 2.0}
    found = [sample(model, noise, 6, 2, SCHEDULE, cache=cache, **conditions) for cache in ("exact", "none")]
    assert worst(*found) < 1e-9


@pytest.mark.parametrize(
    "options", [{}, {"causal_attn_mode": None}, {"causal_attn_mode": "temporal_causal", "merge_mode": "reproduce"}]
)
def test_the_cache_is_refused_where_it_is_not_exact(options):
    with pytest.raises(UserError, match="cache = 'none'"):
        sample(build(**options).as_model("x0"), inputs()[0], 6, 2, SCHEDULE, cache="exact")


def test_labels_choose_rows_of_the_class_embedding():
    network = build()
    network.context_emb, network.class_emb = None, rebuilt("class_emb", (4, 5, 8))
    network.config.num_classes = 3
    model = network.as_model("x0")
    x, t, _ = inputs()
    with torch.no_grad():
        found = model(x, t, label=torch.tensor([2, 3]))
        rows = network.class_emb[[2, 0]]  # label 3, the null label, is the reference's null class 0
        assert torch.equal(found, network(x, t, rows))
        assert torch.equal(model(x, t), network(x, t, network.class_emb[[0, 0]]))
    assert worst(found[0], model(x, t, label=torch.tensor([1, 3]))[:1]) > 1e-3
    guided = sample(model, x, 6, 2, SCHEDULE, guidance=2.0, label=torch.tensor([1, 2]), cache="none")
    both = {"context": network.class_emb[[1, 2]], "null_context": network.class_emb[[0, 0]]}
    assert torch.equal(guided, sample(model, x, 6, 2, SCHEDULE, guidance=2.0, **both, cache="none"))


def test_an_unconditional_network_uses_its_stored_context():
    network = build()
    model = network.as_model("x0")
    x, t, context = inputs()
    own = network.context_emb.expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(model(x, t), network(x, t, own))
        assert worst(model(x, t), model(x, t, context=context)) > 1e-3
    found, null = model.contexts(2)
    assert torch.equal(found, own)
    assert not null.any()
    with pytest.raises(UserError, match="no class_emb"):
        model(x, t, label=torch.tensor([0, 1]))
    network.context_emb = None
    with pytest.raises(UserError, match="holds no context_emb"):
        model(x, t)


@pytest.mark.parametrize("stored", [True, False])
def test_guidance_takes_what_the_network_holds_where_nothing_is_given(stored):
    network = build()
    model = network.as_model("x0", null_context=None)
    x, _, context = inputs()
    noise = torch.randn_like(x)
    given = model.stored_context(len(x)) if stored else context
    expected = sample(
        model, noise, 4, 1, Schedule(), guidance=2.0, context=given, null_context=torch.zeros_like(given), cache="none"
    )
    found = sample(model, noise, 4, 1, Schedule(), guidance=2.0, context=None if stored else context, cache="none")
    assert torch.equal(found, expected)


def test_sampling_goes_by_what_the_network_says_that_it_predicts():
    network, (x, _, context) = build(), inputs()
    options = {"context": context, "cache": "none"}
    for prediction in ("x0", "eps", "v"):
        model = network.as_model(prediction)
        found = sample(model, x, 4, 1, Schedule(), **options)
        assert torch.equal(found, sample(model, x, 4, 1, Schedule(prediction=prediction), **options))
    assert not torch.allclose(found, sample(network.as_model("x0"), x, 4, 1, Schedule(), **options))


def test_learned_variances_are_left_out_in_sampling():
    network = build(learn_sigma=True)
    x, t, context = inputs()
    with torch.no_grad():
        raw = network(x, t, context)
        assert raw.shape == (2, 4, 3, 8)
        assert torch.equal(network.as_model("eps")(x, t, context=context), raw[..., :4])


def test_casting_keeps_the_tables():
    network = build(dtype=torch.float32)
    exact = network.pos_embed.clone()
    x, t, context = inputs(dtype=torch.float32)
    with torch.no_grad():
        expected = network(x, t, context)
        found = network.bfloat16()(x, t, context)
    assert torch.equal(network.pos_embed, exact)
    assert network.x_embedder.weight.dtype == torch.bfloat16
    assert worst(found, expected) < 0.1 * float(expected.abs().max())


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for frugal in (False, True):
        network = build()
        network.config.activation_checkpointing = frugal
        network(*inputs()).square().mean().backward()
        gradients.append(network.blocks[0].attn.qkv.weight.grad)
    assert worst(*gradients) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t, c: (x[:, :, :2], t, c), "L x C = 3 x 4"),
        (lambda x, t, c: (x, t[:, :1], c), r"timesteps \(2, 1\)"),
        (lambda x, t, c: (x, t, c[..., :4]), r"context \(2, 5, 4\)"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        build()(*call(*inputs()))


def test_recorded_level_matrices():
    golden = np.load(GOLDEN / "ad_schedules.npz")
    names = {name.rsplit("_", 1)[0] for name in golden.files}
    assert len(names) == 5
    for name in sorted(names):
        frames, steps, gap = (int(part[1:]) for part in name.split("_"))
        levels = ad_levels(frames, steps, gap)
        progress = steps - levels[1:]
        assert np.array_equal(progress, golden[f"{name}_index"])
        assert np.array_equal(levels[1:] != levels[:-1], golden[f"{name}_mask"])
        assert np.array_equal(SCHEDULE.timesteps(steps)[progress], golden[f"{name}_timesteps"])


def test_fopp_follows_the_recorded_tables_at_full_size():
    golden = np.load(GOLDEN / "fopp.npz")
    starts, ends = golden["F16_T1000_starts"], golden["F16_T1000_ends"]
    steps, frames = starts.shape
    expected = np.zeros((frames, steps))  # marginal of every frame, over all anchors
    for anchor in range(frames):
        law = np.full(steps, 1 / steps)
        expected[anchor] += law / frames
        for frame in range(anchor + 1, frames):
            law = starts[:, frame] * np.cumsum(law / starts[:, frame - 1])
            expected[frame] += law / frames
        law = np.full(steps, 1 / steps)
        for frame in range(anchor - 1, -1, -1):
            law = ends[:, frame] * np.cumsum((law / ends[:, frame + 1])[::-1])[::-1]
            expected[frame] += law / frames
    assert np.allclose(expected.sum(1), 1)
    drawn = fopp(20_000, frames, steps, torch.Generator().manual_seed(0)).numpy()
    for frame in range(frames):
        bins = np.bincount(drawn[:, frame] // 20, minlength=steps // 20)
        assert chi_square(bins, 20_000 * expected[frame].reshape(-1, 20).sum(1)) < 1


def test_the_recorded_arguments_are_those_of_the_json_files():
    for name in DITS:
        described = json.loads((GOLDEN / f"{name}.json").read_text())
        network = ReferenceDiT(model_config(described["config"]))
        kept = {key for key, entry in described["parameters"].items() if entry.get("kept")}
        assert set(dict(network.named_parameters())) | kept == set(described["parameters"])

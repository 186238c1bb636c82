import dataclasses
import math

import pytest
import torch
from data_helpers import randomize

from ardiff.config import ModelConfig, load
from ardiff.errors import UserError
from ardiff.models import DiT
from ardiff.sampling import KVCache

FRAMES, TOKENS, CHANNELS, BATCH = 5, 3, 4, 2
SMALL = ModelConfig(
    num_frames=FRAMES, tokens_per_frame=TOKENS, in_channels=CHANNELS, hidden_size=24, depth=3, num_heads=2
)
CONTEXT = {"context_dim": 6}
CAUSAL = [
    pytest.param(dict(options, **more), id=f"{options['mask']}{'-context' if more else ''}")
    for options in ({"mask": "frame_causal"}, {"mask": "block_causal", "block": 2})
    for more in ({}, CONTEXT)
]


def build(dtype=torch.float64, **options):
    """A small network with random weights everywhere."""
    return randomize(DiT(dataclasses.replace(SMALL, **options))).to(dtype)


def inputs(model, frames=FRAMES, dtype=torch.float64):
    """Latents, timesteps and, where the model reads it, context."""
    x = torch.randn(BATCH, frames, TOKENS, CHANNELS, dtype=dtype)
    t = torch.randint(0, 1000, (BATCH, frames))
    width = model.config.context_dim
    return x, t, {"context": torch.randn(BATCH, 2, width, dtype=dtype)} if width else {}


def first_of_block(model, frame):
    """The first frame that sees `frame`."""
    return frame // model.config.block * model.config.block


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("ardiff_xl", 671e6, 675e6), ("base", 32e6, 33e6), ("tiny", 1.2e6, 1.3e6)]
)
def test_parameter_counts(preset, low, high):
    with torch.device("meta"):
        model = DiT(load(preset).model)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{preset}: {count:,} parameters")
    assert low <= count <= high


def test_every_parameter_is_trained():
    # the reference left its context embedding out of the optimizer; here nothing may be without a gradient
    model = build(num_classes=3, **CONTEXT)
    x, t, context = inputs(model)
    model(x, t, torch.tensor([0, 3]), **context).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, **CONTEXT}])
def test_output_is_zero_at_initialisation(options):
    model = DiT(dataclasses.replace(SMALL, **options)).double()
    x, t, context = inputs(model)
    assert torch.equal(model(x, t, **context), torch.zeros_like(x))


def test_blocks_are_identities_at_initialisation():
    # to the last bit: the reference's blocks replace the residual stream by its normalised value
    model = DiT(SMALL).double()
    h, condition = torch.randn(BATCH, FRAMES * TOKENS, 24).double(), torch.randn(BATCH, FRAMES, 24).double()
    for block in model.blocks:
        assert torch.equal(block(h, condition, 0, 0, None, (0, 0)), h)


def by_hand(model, x, t, label=None, context=None):
    """The network written out from its description, one frame at a time: x [F, L, C], t [F] -> [F, L, C]."""
    config, weights = model.config, model.state_dict()
    heads, size = config.num_heads, config.hidden_size // config.num_heads

    def linear(name, value):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value):
        return (value - value.mean(-1, keepdim=True)) / (value.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def unit(value, weight):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def silu(value):
        return value / (1 + (-value).exp())

    def gelu(value):
        return value / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (value + 0.044715 * value**3)))

    def rotate(value, frame):
        """Pair k (numbers k and k + size / 2) turns by frame * theta^(-2k / size)."""
        half = size // 2
        angle = frame * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = value[..., :half], value[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)

    angles = t[:, None] * 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    condition = linear("t_embed.mlp.2", silu(linear("t_embed.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    if label is not None:
        condition = condition + weights["label_embed.weight"][label]
    condition = silu(condition)
    parts = [linear("x_embed", frame) + weights["slot_embed"] for frame in x]
    numbers = list(range(len(x)))
    if context is not None:  # as frame -1: seen by all, seeing itself only, neither modulated nor rotated
        parts, numbers = [linear("context_embed", context), *parts], [-1, *numbers]
    for layer in range(config.depth):
        name = f"blocks.{layer}"
        modulation = linear(f"{name}.modulation", condition)
        six = [modulation[frame].chunk(6) if frame >= 0 else (0.0, 0.0, 1.0) * 2 for frame in numbers]
        qkv = []
        for part, frame, (shift, scale, _, _, _, _) in zip(parts, numbers, six, strict=True):
            both = linear(f"{name}.attention.qkv", norm(part) * (1 + scale) + shift)
            q, k, v = both.reshape(-1, 3, heads, size).unbind(1)
            q, k = (unit(one, weights[f"{name}.attention.{n}_norm.weight"]) for one, n in ((q, "q"), (k, "k")))
            qkv.append([rotate(q, max(frame, 0)), rotate(k, max(frame, 0)), v])
        for i, (_, _, gate1, shift, scale, gate2) in enumerate(six):
            k, v = (torch.cat([one[which] for one in qkv[: i + 1]]) for which in (1, 2))
            scores = torch.einsum("qhd,khd->hqk", qkv[i][0], k) / size**0.5
            out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            parts[i] = parts[i] + gate1 * linear(f"{name}.attention.proj", out)
            hidden = linear(f"{name}.mlp.0", norm(parts[i]) * (1 + scale) + shift)
            parts[i] = parts[i] + gate2 * linear(f"{name}.mlp.2", gelu(hidden))
    shift, scale = linear("final_modulation", condition).chunk(2, dim=-1)
    video = parts[-len(x) :]
    return torch.stack([linear("final", norm(video[f]) * (1 + scale[f]) + shift[f]) for f in range(len(x))])


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, CONTEXT, {"num_classes": 3, **CONTEXT}], ids=str)
def test_the_network_equals_its_description(options):
    # weights in files mean what this says: whoever changes it breaks every checkpoint
    model = build(**options)
    x, t, context = inputs(model)
    label = torch.tensor([2, 0]) if options.get("num_classes") else None
    out = model(x, t, label, **context)
    for i in range(BATCH):
        own = None if label is None else label[i], context["context"][i] if context else None
        torch.testing.assert_close(out[i], by_hand(model, x[i], t[i], *own), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("change", ["content", "timestep"])
@pytest.mark.parametrize("options", CAUSAL)
def test_a_frame_never_reaches_an_earlier_one(options, change):
    model = build(**options)
    x, t, context = inputs(model)
    before = model(x, t, **context)
    for frame in range(FRAMES):
        x_new, t_new = x.clone(), t.clone()
        if change == "content":
            x_new[:, frame] += 1
        else:
            t_new[:, frame] = (t_new[:, frame] + 500) % 1000
        after = model(x_new, t_new, **context)
        first = first_of_block(model, frame)
        assert torch.equal(before[:, :first], after[:, :first]), "the future leaked, if only by a rounding"
        moved = (before[:, first:] - after[:, first:]).abs().amax(dim=(2, 3))
        assert (moved > 1e-9).all(), "a frame does not see what it should"


@pytest.mark.parametrize("options", CAUSAL)
def test_gradients_are_causal(options):
    model = build(**options)
    x, t, context = inputs(model)
    x.requires_grad_()
    out = model(x, t, **context)
    for frame in range(FRAMES):
        (grad,) = torch.autograd.grad((out[:, frame] * torch.randn_like(out[:, frame])).sum(), x, retain_graph=True)
        seen = min(first_of_block(model, frame) + model.config.block, FRAMES)
        assert torch.equal(grad[:, seen:], torch.zeros_like(grad[:, seen:]))
        assert (grad[:, :seen].abs().amax(dim=(2, 3)) > 1e-12).all()


def test_a_bidirectional_model_sees_everything():
    model = build(mask="bidirectional")
    x, t, _ = inputs(model)
    before = model(x, t)
    x[:, -1] += 1
    assert ((before - model(x, t)).abs().amax(dim=(2, 3)) > 1e-9).all()


def test_leaky_context_leaks():
    # the control of the causality tests: the reference's mask does carry the last frame to the first
    model = build(context="leaky", **CONTEXT)
    x, t, context = inputs(model)
    before = model(x, t, **context)
    x[:, -1] += 1
    assert ((before - model(x, t, **context)).abs().amax(dim=(2, 3)) > 1e-9).all()


def test_context_reaches_every_frame():
    model = build(**CONTEXT)
    x, t, context = inputs(model)
    before = model(x, t, **context)
    context["context"][:, 0] += 1
    assert ((before - model(x, t, **context)).abs().amax(dim=(2, 3)) > 1e-9).all()


def test_labels_condition_and_no_label_is_the_null_label():
    model = build(num_classes=3)
    x, t, _ = inputs(model)
    outputs = [model(x, t, torch.full((BATCH,), label)) for label in range(4)]
    for one in range(4):
        for other in range(one):
            assert (outputs[one] - outputs[other]).abs().max() > 1e-6
    assert torch.equal(model(x, t), outputs[3])
    mixed = model(x, t, torch.tensor([2, 0]))
    torch.testing.assert_close(mixed[0], outputs[2][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixed[1], outputs[0][1], rtol=1e-12, atol=1e-12)


def test_tokens_of_a_frame_are_told_apart():
    # without the embedding per slot, swapping two tokens would swap two outputs
    model = build()
    x, t, _ = inputs(model)
    swapped = x[:, :, [1, 0, 2]]
    assert (model(swapped, t)[:, :, [1, 0, 2]] - model(x, t)).abs().max() > 1e-6


def test_frames_are_told_apart():
    model = build(mask="bidirectional")
    x, t, _ = inputs(model)
    order = [1, 0, 2, 3, 4]
    assert (model(x[:, order], t[:, order])[:, order] - model(x, t)).abs().max() > 1e-6


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, **CONTEXT}])
def test_activation_checkpointing_changes_no_number(options):
    plain = build(**options)
    frugal = DiT(dataclasses.replace(plain.config, activation_checkpointing=True)).double()
    frugal.load_state_dict(plain.state_dict())
    x, t, context = inputs(plain)
    results = []
    for model in (plain, frugal):
        out = model(x, t, **context)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (2, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("options", CAUSAL)
def test_a_cache_changes_no_number(options, pieces):
    model = build(num_classes=2, **options)
    if model.config.block == 2:
        pieces = (2, 2, 1)  # pieces are whole blocks
    x, t, context = inputs(model)
    label = torch.tensor([0, 1])
    full = model(x, t, label, **context)
    cache = KVCache(FRAMES, TOKENS, 2 if context else 0)
    start = 0
    for size in pieces:
        part = slice(start, start + size)
        out = model(x[:, part], t[:, part], label, cache=cache, **context)
        torch.testing.assert_close(out, full[:, part], rtol=1e-12, atol=1e-12)
        cache.keep(size)
        start += size
    assert cache.num_frames == FRAMES


@pytest.mark.parametrize("options", [{}, CONTEXT])
def test_frames_that_are_not_kept_leave_no_trace_in_the_cache(options):
    model = build(**options)
    x, t, context = inputs(model)
    cache = KVCache(FRAMES, TOKENS, 2 if context else 0)
    noise = torch.randn_like(x)
    model(noise, t, cache=cache, **context)
    cache.keep(0)
    noise[:, :2] = x[:, :2]
    model(noise[:, :4], t[:, :4], cache=cache, **context)
    cache.keep(2)
    out = model(x[:, 2:], t[:, 2:], cache=cache, **context)
    torch.testing.assert_close(out, model(x, t, **context)[:, 2:], rtol=1e-12, atol=1e-12)


def test_the_cache_reports_its_memory():
    model = build(dtype=torch.float32)
    cache = KVCache(FRAMES, TOKENS)
    x, t, _ = inputs(model, frames=1, dtype=torch.float32)
    model(x, t, cache=cache)
    config = model.config
    assert cache.num_bytes == BATCH * 2 * config.depth * FRAMES * TOKENS * config.hidden_size * 4


@pytest.mark.parametrize("frames", [1, 3, FRAMES + 6])
@pytest.mark.parametrize("options", CAUSAL)
def test_any_number_of_frames_works(options, frames):
    model = build(**options)
    x, t, context = inputs(model, frames)
    out = model(x, t, **context)
    assert out.shape == x.shape
    if frames > FRAMES and model.config.block == 1:  # a longer video begins like the shorter one
        torch.testing.assert_close(model(x[:, :FRAMES], t[:, :FRAMES], **context), out[:, :FRAMES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_module_answers_in_the_dtype_of_its_input(dtype):
    exact = build(torch.float32, num_classes=2, **CONTEXT)
    model = DiT(exact.config)
    model.load_state_dict(exact.state_dict())
    model.to(torch.bfloat16)
    x, t, context = inputs(model, dtype=dtype)
    out = model(x, t, torch.tensor([0, 2]), **context)
    assert out.dtype == dtype
    expected = exact(x.float(), t, torch.tensor([0, 2]), context["context"].float())
    assert (out.float() - expected).norm() / expected.norm() < 0.05


def test_sampling_in_inference_mode_leaves_training_possible():
    # tables that are kept between calls must not be made from tensors that autograd refuses later
    from ardiff.models.attention import masks
    from ardiff.models.embeddings import rotary_tables

    rotary_tables.cache_clear()
    masks._dense.cache_clear()
    model = build()
    x, t, _ = inputs(model)
    with torch.inference_mode():
        model(x, t)
    model(x, t).sum().backward()
    assert model.x_embed.weight.grad is not None


@pytest.mark.parametrize(
    ("x_shape", "t_shape"),
    [
        ((2, 5, 3, 5), (2, 5)),
        ((2, 5, 4, 4), (2, 5)),
        ((2, 15, 4), (2, 5)),
        ((5, 3, 4), (5,)),
        ((2, 5, 3, 4), (2,)),
        ((2, 5, 3, 4), (2, 4)),
        ((2, 5, 3, 4), (1, 5)),
        ((2, 5, 3, 4), (2, 5, 1)),
    ],
)
def test_wrong_shapes_are_refused(x_shape, t_shape):
    with pytest.raises(UserError):
        DiT(SMALL)(torch.zeros(x_shape), torch.zeros(t_shape, dtype=torch.long))


def test_context_for_a_model_without_context_is_refused():
    model = build()
    x, t, _ = inputs(model)
    with pytest.raises(UserError, match="context_dim"):
        model(x, t, context=torch.zeros(BATCH, 2, 6))


@pytest.mark.parametrize("shape", [(BATCH, 2, 7), (1, 2, 6), (BATCH, 6)])
def test_context_of_a_wrong_shape_is_refused(shape):
    model = build(**CONTEXT)
    x, t, _ = inputs(model)
    with pytest.raises(UserError, match="context"):
        model(x, t, context=torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH + 1,)])
def test_labels_of_a_wrong_shape_are_refused(shape):
    model = build(num_classes=3)
    x, t, _ = inputs(model)
    with pytest.raises(UserError, match="label"):
        model(x, t, torch.zeros(shape, dtype=torch.long))

"""Audio encoders: whisper's and SSAST's against transformers, checkpoints in the published layouts,
gradients.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from companion.encoders import checkpoints, loading, spectrograms, table
from fungi_core import KL, Fungi, SimCLR, gradients
from fungi_core.audio import SIMCLR, Noise
from fungi_core.objectives import linear_head

WIDTH, DEPTH = 64, 2


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whisper_pair(width=WIDTH, depth=DEPTH):
    """transformers' encoder with random weights, and ours with the same."""
    pytest.importorskip("transformers")
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    settings = dict(
        d_model=width,
        encoder_layers=depth,
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = WhisperEncoder(WhisperConfig(**settings)).eval()
        for p in theirs.parameters():
            p.data += 0.05 * torch.randn_like(p)
    ours = spectrograms.whisper(width, depth)
    ours.load_state_dict(spectrograms.whisper_weights(theirs.state_dict()))
    return theirs, ours.eval()


def test_whisper_is_transformers():
    theirs, ours = whisper_pair()
    x = noise(1, 3000, 80)
    with torch.no_grad():
        want = theirs(x.transpose(1, 2)).last_hidden_state
        got = ours.forward_features(x)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        pooled = ours.forward_head(got, pre_logits=True)
    torch.testing.assert_close(pooled, want.mean(1), atol=1e-4, rtol=1e-4)


def test_whisper_at_the_clips_own_length():
    """transformers' own modules, run on a second of sound one by one."""
    theirs, ours = whisper_pair()
    x = noise(2, 100, 80)
    with torch.no_grad():
        h = F.gelu(theirs.conv2(F.gelu(theirs.conv1(x.transpose(1, 2))))).transpose(1, 2)
        h = h + theirs.embed_positions.weight[:50]
        for layer in theirs.layers:
            h = layer(h, None)
            h = h[0] if isinstance(h, tuple) else h
        want = theirs.layer_norm(h)
        got = ours.forward_features(x)
    assert got.shape == (2, 50, WIDTH)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="at most 30 s of a clip, not 40"):
        ours(torch.zeros(1, 4000, 80))


def published(grid=(8, 64), width=WIDTH, depth=DEPTH):
    """A random checkpoint with the keys and shapes of SSAST-Base-Patch-400.pth, but narrower."""
    draw = iter(range(10_000))
    new = lambda *shape: 0.1 * noise(*shape, seed=next(draw))
    state = {"cls_token": new(1, 1, width), "dist_token": new(1, 1, width)}
    state |= {"pos_embed": new(1, 2 + grid[0] * grid[1], width)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    linear = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in layers.items()}
    linear |= {
        "patch_embed.proj": (width, 1, 16, 16),
        "head": (1000, width),
        "head_dist": (1000, width),
    }
    norms = [f"blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2)] + ["norm"]
    for name, shape in linear.items():
        state |= {f"{name}.weight": new(*shape), f"{name}.bias": new(shape[0])}
    for name in norms:
        state |= {f"{name}.weight": 1 + new(width), f"{name}.bias": new(width)}
    out = {f"module.v.{key}": x for key, x in state.items()}
    out |= {
        "module.p_input_fdim": torch.tensor(grid[0] * 16),
        "module.p_input_tdim": torch.tensor(grid[1] * 16),
    }
    out["module.mask_embed"] = new(1, 1, width)
    for name in ("cpredlayer", "gpredlayer"):
        for i, units in ((0, width), (2, 256)):
            out |= {
                f"module.{name}.{i}.weight": new(units, width),
                f"module.{name}.{i}.bias": new(units),
            }
    return out


def small_ssast():
    return spectrograms.ssast(WIDTH, DEPTH, heads=4)


@pytest.fixture(scope="module")
def ssast(tmp_path_factory):
    file = tmp_path_factory.mktemp("ssast") / "SSAST-Base-Patch-400.pth"
    torch.save(published(), file)
    return checkpoints.load_into(small_ssast(), file, spectrograms.ssast_weights).eval()


def in_transformers_names(file: dict, own: set[str]) -> dict[str, torch.Tensor]:
    """Return the published blocks under the names of transformers' AST, which its releases change.

    ``own``: the names of its layers.
    """
    names = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
    state = {}
    for i in range(DEPTH):
        block = f"blocks.{i}."
        layer = {key for key in own if key.startswith((f"encoder.layer.{i}.", f"layers.{i}."))}
        find = lambda *ends, layer=layer: next(key for key in layer if key.endswith(ends))
        attention = [find("query", "q_proj"), find("key", "k_proj"), find("value", "v_proj")]
        for kind in ("weight", "bias"):
            parts = file[f"{block}attn.qkv.{kind}"].chunk(3)
            state |= {f"{name}.{kind}": part for name, part in zip(attention, parts)}
        out = find("attention.output.dense", "o_proj")
        names[out] = f"{block}attn.proj"
        names[find("layernorm_before")] = f"{block}norm1"
        names[find("layernorm_after")] = f"{block}norm2"
        names[find("intermediate.dense", "fc1")] = f"{block}mlp.fc1"
        layer.remove(out)  # its name may end like the next one's
        names[find("output.dense", "fc2")] = f"{block}mlp.fc2"
    for name, old in names.items():
        state |= {f"{name}.{kind}": file[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return state


@pytest.mark.parametrize(("frames", "across"), [(512, 50), (128, 12)])
def test_ssast_is_transformers_ast(ssast, frames, across):
    """The published layout, by hand into transformers' AST: positions cut in time, stretched in
    frequency, mean of the class and distillation tokens.
    """
    pytest.importorskip("transformers")
    from transformers import ASTConfig, ASTModel

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, intermediate_size=4 * WIDTH)
    sizes |= dict(num_attention_heads=4, max_length=frames, num_mel_bins=128)
    theirs = ASTModel(ASTConfig(**sizes, layer_norm_eps=1e-6)).eval()
    file = {key.removeprefix("module.v."): x for key, x in published().items()}
    positions = file["pos_embed"][:, 2:].transpose(1, 2).reshape(1, WIDTH, 8, 64)
    first = 32 - across // 2
    positions = F.interpolate(positions[..., first : first + across], (12, across), mode="bilinear")
    positions = positions.reshape(1, WIDTH, -1).transpose(1, 2)  # (1, 12 * across, D)
    state = in_transformers_names(file, {key.rpartition(".")[0] for key in theirs.state_dict()})
    state["embeddings.cls_token"] = file["cls_token"]
    state["embeddings.distillation_token"] = file["dist_token"]
    both = torch.cat([file["pos_embed"][:, :2], positions], 1)
    theirs.load_state_dict(state | {"embeddings.position_embeddings": both})
    x = noise(2, frames, 128)
    with torch.no_grad():
        want = theirs(x).pooler_output
        got = ssast.forward_head(ssast.forward_features(x), pre_logits=True)
    assert ssast.patch_embed(x).shape == (2, 12 * across, WIDTH)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_ssast_base_has_the_published_shapes():
    """Every tensor of the real file's layout has its place in the base model (no weights are needed
    to know).
    """
    with torch.device("meta"):
        model = spectrograms.ssast()
    state = spectrograms.ssast_weights(published(width=768, depth=12))
    assert {key: x.shape for key, x in state.items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }
    assert isinstance(gradients.linear_layer(model, "blocks.11.attn.proj"), torch.nn.Linear)


def test_a_wrong_ssast_file_gives_one_line(tmp_path):
    other = published(depth=1)
    for content in (other, {"weight": torch.zeros(3)}, {}, [1, 2]):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(
            ValueError, match="other.pth does not hold the weights it should"
        ) as caught:
            checkpoints.load_into(small_ssast(), tmp_path / "other.pth", spectrograms.ssast_weights)
        assert "\n" not in str(caught.value)
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="broken.pth does not hold"):
        checkpoints.load_into(small_ssast(), tmp_path / "broken.pth", spectrograms.ssast_weights)


def loss_of(objective, width):
    heads = linear_head(width, objective.dim, np.random.default_rng(0))
    negatives = noise(6, objective.dim, seed=3)
    return lambda embeddings: objective.loss(embeddings, heads, negatives)


@pytest.mark.parametrize("kind", ["whisper", "ssast"])
@pytest.mark.parametrize("objective", [KL(dim=24), SimCLR(dim=24)], ids=lambda o: o.name)
def test_gradients_are_autograd(kind, objective):
    """Each clip alone, its loss differentiated by the weight and bias of the target layer."""
    if kind == "whisper":
        model, x = whisper_pair()[1], noise(3, 2, 60, 80)
    else:
        model, x = small_ssast().eval(), noise(3, 2, 64, 128)
        model.load_state_dict(spectrograms.ssast_weights(published()))
    embed = lambda v: model.forward_head(model.forward_features(v), pre_logits=True)
    loss = loss_of(objective, WIDTH)
    model.requires_grad_(False)
    path = f"blocks.{DEPTH - 1}.attn.proj"
    (factors,) = gradients.factors_at(*gradients.tapped(model, embed, x, [path]), loss)
    layer = model.get_submodule(path)
    layer.requires_grad_(True)
    for i, clip in enumerate(x):
        weight, bias = torch.autograd.grad(
            loss(embed(clip)[None]).sum(), [layer.weight, layer.bias]
        )
        want = torch.cat([weight, bias[:, None]], 1)
        got = factors[i : i + 1].gradient()[0]
        assert (got - want).norm() / want.norm() < 1e-4


def test_one_token_of_two():
    """The published code keeps the class token's row of the gradient; no other token has one."""
    x, loss = noise(2, 1, 64, 128), loss_of(KL(dim=24), WIDTH)
    model = small_ssast().eval().requires_grad_(False)
    model.load_state_dict(spectrograms.ssast_weights(published()))
    embed = lambda v: model.forward_head(model.forward_features(v), pre_logits=True)
    layers = ["blocks.1.attn.proj"]
    (factors,) = gradients.factors_at(*gradients.tapped(model, embed, x, layers), loss)
    assert (factors.output_gradients[:, 1:] == 0).all()
    assert factors.output_gradients[:, 0].abs().sum() > 0


def test_clips_do_not_touch_each_other(ssast):
    whisper = whisper_pair()[1]
    for model, x in ((whisper, noise(3, 60, 80)), (ssast, noise(3, 64, 128))):
        embed = lambda v, model=model: model.forward_head(
            model.forward_features(v), pre_logits=True
        )
        with torch.no_grad():
            torch.testing.assert_close(embed(x)[1:2], embed(x[1:2]), atol=1e-5, rtol=1e-4)


def test_image_network_sees_the_spectrogram():
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=1, num_classes=0
    ).eval()
    bank = torch.zeros(1, 16, 16)
    bank[0, 3, 2] = 1.0  # frame 3, band 2
    picture = torch.zeros(1, 3, 16, 16)
    picture[:, :, 13, 3] = 1.0  # band 2 of 16 is row 13 from the top
    with torch.no_grad():
        want = plain(picture)
        plain.patch_embed = spectrograms.ImageStem(plain.patch_embed)
        got = plain(bank)  # 16 x 16 already: nothing to resize
        torch.testing.assert_close(got, want)
        assert plain(torch.randn(2, 100, 80)).shape == (2, 32)


def test_ssast_by_name_from_its_file(tmp_path, monkeypatch):
    """The paper's row of the table, with the layout's own file but a narrower model."""
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    model = small_ssast()
    monkeypatch.setattr(spectrograms, "ssast", lambda: model)
    name = "ssast-base-patch-400"
    assert table.how_to_get(name).startswith("into checkpoints: https://")
    with pytest.raises(FileNotFoundError, match="ssast-base-patch-400 needs its weights"):
        loading.load(name)
    (tmp_path / "checkpoints").mkdir()
    torch.save(published(), tmp_path / "checkpoints" / "SSAST-Base-Patch-400.pth")
    assert table.how_to_get(name) is None
    encoder = loading.load(name, device="cpu", dtype="float32")
    assert (encoder.inputs.kind, encoder.width) == ("audio", WIDTH)
    assert encoder.inputs.front.name == "ssast" and table.pca_size(name, WIDTH) == 512
    assert encoder.layer == f"blocks.{DEPTH - 1}.attn.proj"
    clip = np.sin(np.arange(16000) * np.linspace(0.1, 0.4, 16000)).astype(np.float32)
    pair = [
        KL(dim=16),
        replace(SIMCLR, views=Noise(2), negatives=2, dim=16),
    ]
    features = Fungi(encoder, pair, pca=None).fit_transform([clip, clip[::-1].copy()])
    assert features.shape == (2, 3 * WIDTH) and np.isfinite(features).all()


def test_whisper_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    assert (
        table.how_to_get("whisper-tiny.en")
        == "hf download openai/whisper-tiny.en model.safetensors"
    )
    with pytest.raises(FileNotFoundError, match="whisper-tiny.en .* hf download"):
        loading.load("whisper-tiny.en")
    theirs, ours = whisper_pair()
    small_whisper = spectrograms.whisper(WIDTH, DEPTH)
    state = {f"model.encoder.{key}": x.half() for key, x in theirs.state_dict().items()}
    state["model.decoder.layer_norm.weight"] = torch.zeros(
        3
    )  # the hub's file holds the decoder too
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *names: str(tmp_path / "model.safetensors")
    )
    monkeypatch.setattr(spectrograms, "whisper", lambda: small_whisper)
    name = "whisper-tiny.en"
    encoder = loading.load(name, device="cpu", dtype="float32")
    x = noise(1, 100, 80)
    torch.testing.assert_close(
        encoder.embed(x), ours.forward_head(ours.forward_features(x)), atol=0.02, rtol=0.02
    )
    (tmp_path / "whisper_tiny_en_encoder.fp16.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match="fp16.safetensors does not hold the weights it should"
    ) as caught:
        loading.load(name)
    assert "\n" not in str(caught.value)

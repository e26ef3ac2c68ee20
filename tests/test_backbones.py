"""The table of encoders: names, target layers, read-outs and gradient sizes, without any weights."""

import pytest
import timm
import torch

from fungi_core import backbones, throughput

SIZES = {384: 147_840, 768: 590_592, 1024: 1_049_600}  # width -> entries of the attention output projection with bias


@pytest.mark.parametrize("spec", [s for s in backbones.BACKBONES.values() if s.size == 224], ids=lambda s: s.name)
def test_the_papers_backbones_have_the_named_layer_and_gradient_size(spec):
    with torch.device("meta"):  # shapes only
        model = timm.create_model(spec.name, pretrained=False, num_classes=0)
    layer = backbones.linear_layer(model, spec.layer)
    assert layer.out_features * (layer.in_features + 1) == SIZES[model.num_features]
    assert backbones.last_attention_output(model) == spec.layer
    assert spec.pca == (384 if model.num_features == 384 else 512)  # Table 16


@pytest.mark.parametrize("spec", [s for s in backbones.BACKBONES.values() if s.size == 64], ids=lambda s: s.name)
def test_the_committed_checkpoints_load_and_read_the_class_token(spec):
    backbone = backbones.load(spec.name, dtype="float32")
    assert backbone.size == 64 and backbone.layer == spec.layer and backbone.reads_class_token([spec.layer])
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embeddings = backbone.embed(x)
    assert embeddings.shape == (2, backbone.width) and torch.isfinite(embeddings).all()
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)
    assert backbone.gradient_size() == backbone.width * (backbone.width + 1)


def test_unknown_names_list_what_exists():
    with pytest.raises(ValueError, match="unknown backbone 'resnet_of_dreams'; the table has vit_mini.sup_tin100"):
        backbones.load("resnet_of_dreams")
    with pytest.raises(ValueError, match="'blocks.9.attn.proj'; its last linear layers: .*blocks.5"):
        backbones.load("random:test_vit", layer="blocks.9.attn.proj")
    with pytest.raises(ValueError, match="dtype 'half' is unknown"):
        backbones.load("random:test_vit", dtype="half")
    with pytest.raises(ValueError, match="needs layer="):
        backbones.load(torch.nn.Linear(2, 2))


def test_random_weights_are_the_same_every_time_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    a, b = (backbones.load("random:test_vit", dtype="float32") for _ in range(2))
    assert a.fingerprint == b.fingerprint and torch.equal(torch.random.get_rng_state(), state)


def test_a_module_passed_in_stays_as_it_is():
    model = timm.create_model("test_vit", num_classes=0).train()
    backbone = backbones.load(model, layer="blocks.5.attn.proj", dtype="bfloat16")
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters()) and backbone.dtype == torch.bfloat16


def test_throughput_ratios_are_speed_over_floor():
    backbone = backbones.load("random:test_vit", dtype="float32")
    table = throughput.measure(backbone, ["kl", "dino"], views_a_call=12, repeats=2)
    assert table["features"].tolist() == ["K", "D"] and table["views"].tolist() == [1, 12]
    assert (table["ratio_low"] <= table["ratio"]).all() and (table["ratio"] <= table["ratio_high"]).all()
    assert (table["value"] > 0).all() and (table["floor"] > 0).all()
    torch.testing.assert_close(
        throughput.stock(backbone)(x := torch.rand(2, 3, 160, 160)), backbone.embed(x), rtol=1e-4, atol=1e-4
    )


def test_modules_of_other_structure_with_the_same_weights_have_another_fingerprint():
    a, b = (timm.create_model("test_vit", num_classes=0, global_pool=pool, fc_norm=False) for pool in ("token", "avg"))
    b.load_state_dict(a.state_dict())
    prints = [backbones.load(m, layer="blocks.5.attn.proj", dtype="float32").fingerprint for m in (a, b, a)]
    assert prints[0] != prints[1] and prints[0] == prints[2]

"""The model: what is trained, what reaches what, and that inference needs the image alone."""
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, REPORTS, ROOT
from PIL import Image
from torch import nn

from clipit import Classifier, ClipIT, clipit_loss, load_backbone, text_classifier, tile_transform
from lora import inject_lora
from pairing import load_clip

C = 4


@pytest.fixture
def model():
    """A ClipIT with LoRA on both towers, its LoRA moved away from the start."""
    torch.manual_seed(0)
    clip, backbone = load_clip(f"local-dir:{DEMO}/clip"), load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, clip.text_tower, C, backbone.num_features, clip.dim)
    inject_lora(model.backbone, 4)
    inject_lora(model.text_tower, 4)
    model.tokens = clip.tokenize(REPORTS[:3])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.02 * torch.randn_like(p))
    return model


def images(n=3, seed=0):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_the_forward_pass_is_that_of_the_equations(model):
    v = model.backbone(images())
    t_hat = v @ model.distill_head.weight.T + model.distill_head.bias
    hidden = F.leaky_relu(t_hat @ model.text_head[0].weight.T + model.text_head[0].bias, 0.1)
    both = torch.cat([v @ model.vision_head.weight.T + model.vision_head.bias,
                      hidden @ model.text_head[2].weight.T + model.text_head[2].bias], 1)
    expected = both @ model.fusion.weight.T + model.fusion.bias
    torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=1e-5)
    logits, got_t_hat, t = model.forward_train(images(), model.tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_t_hat, t_hat, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(t, model.text_tower(model.tokens))
    torch.testing.assert_close(model.features(images())[1], t_hat, atol=1e-5, rtol=1e-5)


def test_the_loss_is_cross_entropy_of_logits_plus_lambda_times_one_minus_cosine():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    t_hat, t = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    ce = (math.log(1 + math.e ** -2) + math.log(1 + math.e)) / 2
    kd = (0 + 1 - 0.5 ** 0.5) / 2  # cosines 1 and cos 45 degrees
    loss, parts = clipit_loss(logits, labels, t_hat, t, kd_weight=0.7)
    assert loss.item() == pytest.approx(ce + 0.7 * kd, abs=1e-6)
    assert parts["ce"].item() == pytest.approx(ce, abs=1e-6) and parts["kd"].item() == pytest.approx(kd, abs=1e-6)
    assert clipit_loss(logits, labels, t_hat, None)[0].item() == pytest.approx(ce, abs=1e-6)


def test_distillation_reaches_the_backbone_and_the_text_tower(model):
    _, t_hat, t = model.forward_train(images(), model.tokens)
    (1 - F.cosine_similarity(t, t_hat)).mean().backward()  # the distillation term alone
    for tower in (model.backbone, model.text_tower):
        adapters = {name: p for name, p in tower.named_parameters() if "lora_" in name}
        assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    assert all(p.grad is None for p in model.vision_head.parameters())


def test_cross_entropy_reaches_the_backbone_and_every_head_but_not_the_text_tower(model):
    logits, _, _ = model.forward_train(images(), model.tokens)
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for name, p in model.named_parameters():
        trained = p.requires_grad and not name.startswith("text_tower")
        assert (p.grad is not None) == trained, name


def test_only_adapters_and_heads_train(model):
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name or name.split(".")[0].endswith("head") or name.startswith("fusion")), name


def test_tiles_that_share_a_report_encode_it_once_and_get_the_same(model):
    rows = []
    model.text_tower.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    report = torch.tensor([2, 0, 2, 2, 0])
    shared = model.forward_train(images(5), model.tokens[[0, 2]], torch.tensor([1, 0, 1, 1, 0]))
    alone = model.forward_train(images(5), model.tokens[report])
    assert rows == [2, 5]
    for a, b in zip(shared, alone):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def gradient(t):
        return torch.autograd.grad((t * torch.arange(t.numel()).view_as(t)).sum(), model.text_tower.token_embedding.lora_B)[0]
    torch.testing.assert_close(gradient(shared[2]), gradient(alone[2]), atol=1e-2, rtol=1e-4)


def test_training_starts_from_the_unimodal_classifier_plus_a_fresh_text_head():
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, C, backbone.num_features, 16)
    v = backbone(images())
    torch.testing.assert_close(model(images()), model.vision_head(v) + model.text_head(model.distill_head(v)))
    random = ClipIT(backbone, None, C, backbone.num_features, 16, random_fusion=True)
    assert random.fusion.weight.std() > 0.05 and random.fusion.bias.abs().sum() > 0


def test_inference_never_touches_text(model):
    expected = model.eval()(images())
    model.text_tower = None
    assert torch.equal(model(images()), expected)


def test_the_classifier_equals_the_trained_model_and_holds_no_text(model, tmp_path):
    model.eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    classifier = model.to_classifier(["a", "b", "c", "d"])
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images(6)), model(images(6)), atol=1e-5, rtol=0)
    assert again.classes == ["a", "b", "c", "d"] and again.text_tower is None and not again.training
    assert not any("lora" in key or "text_tower" in key for key in again.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("kd_layers", [1, 2])
def test_the_classifier_is_the_backbone_plus_four_small_layers(kd_layers, tmp_path):
    backbone = load_backbone("test_vit", "none")
    model = ClipIT(backbone, None, C, backbone.num_features, 32, kd_layers)
    inject_lora(model.backbone, 2)
    classifier = model.to_classifier()
    d, t = backbone.num_features, 32
    heads = d * C + C + (d * t + t if kd_layers == 1 else d * d + d + d * t + t) + t * t + t + t * C + C + 2 * C * C + C
    extra = sum(p.numel() for p in classifier.parameters()) - sum(p.numel() for p in classifier.backbone.parameters())
    assert extra == heads
    classifier.save_pretrained(tmp_path)
    batch = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(Classifier.from_pretrained(tmp_path)(batch), model.eval()(batch), atol=1e-5, rtol=0)


def test_a_config_of_the_weights_alone_is_enough(model, tmp_path):
    classifier = model.to_classifier()
    classifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone_id"] == "local-dir:backbone" and config["licence"] == "mit" and config["run"] is None
    for key in ("backbone_id", "licence", "run"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(Classifier.from_pretrained(tmp_path)(images()), classifier(images()))


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.filterwarnings("ignore:.*jit.trace", "ignore:Converting a tensor")
def test_export_and_trace_give_the_same_logits_at_any_batch(model, size):
    """Of the demo's backbone and of a ViT whose positions are resampled in each forward pass, as those of DINOL14."""
    if size == 96:
        backbone = load_backbone("test_vit", "none")  # native size 160
        model = ClipIT(backbone, None, C, backbone.num_features, 16)
    classifier, batch = model.to_classifier(), torch.randn(2, 3, size, size)
    exported = torch.export.export(classifier, (batch,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    traced = torch.jit.trace(classifier, batch)
    for n in (1, 5):
        batch = torch.randn(n, 3, size, size)
        for other in (exported.module(), traced):
            torch.testing.assert_close(other(batch), classifier(batch), atol=1e-5, rtol=0)


def test_a_file_that_lacks_a_weight_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file
    model.to_classifier().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["fusion.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="fusion.bias"):
        Classifier.from_pretrained(tmp_path)


def test_a_saved_classifier_works_in_a_fresh_process_without_open_clip(model, tmp_path):
    model.eval().to_classifier(["a", "b", "c", "d"]).save_pretrained(tmp_path)
    Image.new("RGB", (80, 70), (200, 120, 160)).save(tmp_path / "tile.png")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from PIL import Image\nfrom clipit import Classifier\n"
            f"p = Classifier.from_pretrained({str(tmp_path)!r}).predict([Image.open({str(tmp_path / 'tile.png')!r})])\n"
            "assert 'open_clip' not in sys.modules and 'pairing' not in sys.modules\nprint(p.tolist())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipe = model.backbone.recipe
    image = tile_transform(recipe["size"], recipe["mean"], recipe["std"])(Image.open(tmp_path / "tile.png"))
    expected = model(image[None]).softmax(1)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-5, rtol=0)


def test_batch_norm_of_a_frozen_backbone_keeps_its_statistics():
    backbone = load_backbone("resnet10t", "none")
    model = ClipIT(backbone, None, C, backbone.num_features, 16)
    inject_lora(model.backbone, 2)
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    model.train()
    model(torch.randn(4, 3, 64, 64))
    assert before and all(torch.equal(b, before[name]) for name, b in backbone.named_buffers())


def test_the_transform_is_shortest_side_centre_crop_own_mean_and_std():
    image = Image.new("RGB", (128, 64))
    image.paste((255, 0, 51), (32, 0, 96, 64))  # the centre square
    tensor = tile_transform(32, [0.5, 0.5, 0.2], [0.5, 0.25, 0.1])(image)
    assert tensor.shape == (3, 32, 32)
    torch.testing.assert_close(tensor[:, 16, 16], torch.tensor([1.0, -2.0, 0.0]))
    unchanged = tile_transform(64, [0] * 3, [1] * 3)(image.crop((32, 0, 96, 64)))  # of that size already
    torch.testing.assert_close(unchanged[:, 5, 5], torch.tensor([1, 0, 0.2]))


def test_weights_of_a_file_are_loaded_and_a_classifier_in_it_is_left_out(tmp_path):
    import timm
    from safetensors.torch import save_file
    source = timm.create_model("test_vit", num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    batch = torch.randn(2, 3, 160, 160)
    expected = source.eval().forward_head(source.forward_features(batch), pre_logits=True)
    for name in ("weights.pth", "weights.safetensors"):
        torch.testing.assert_close(load_backbone("test_vit", tmp_path / name)(batch), expected)


class Hostile:
    def __reduce__(self):
        return (open, ("opened_by_a_pickle", "w"))


@pytest.mark.parametrize("content, says", [
    ({"a": torch.zeros(2)}, "another architecture.*missing"), ({"x": Hostile()}, "not a checkpoint"), ({}, "not a checkpoint"),
    ("text", "not a checkpoint")])
def test_weights_that_do_not_fit_are_refused_in_words(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pth") if not isinstance(content, str) else (tmp_path / "w.pth").write_text(content)
    with pytest.raises(ValueError, match=says):
        load_backbone("test_vit", "w.pth")
    assert not (tmp_path / "opened_by_a_pickle").exists()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_backbone("test_vit", "nowhere.pth")


def test_an_unknown_backbone_is_refused_with_choices():
    with pytest.raises(ValueError, match="--model vit_smoll.*could not be loaded.*choose"):
        load_backbone("vit_smoll")


def test_a_text_classifier_is_the_papers_mlp():
    layers = text_classifier(6, 3)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.LeakyReLU, nn.Linear] and layers[1].negative_slope == 0.1
    assert layers[0].weight.shape == (6, 6) and layers[2].weight.shape == (3, 6)

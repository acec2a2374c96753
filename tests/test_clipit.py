"""The model: what is trained, what reaches what, and that inference needs the image alone."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, REPORTS
from PIL import Image

from clipit import Classifier, ClipIT, clipit_loss, load_backbone, text_classifier, tile_transform
from lora import inject_lora
from pairing import load_clip

C, CLASSES = 4, ["a", "b", "c", "d"]


def make_model(**options):
    """A ClipIT with LoRA on both towers, moved away from its start, and tokens of three reports."""
    torch.manual_seed(0)
    clip = load_clip(f"local-dir:{DEMO}/clip")
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, clip.text_tower, C, backbone.num_features, clip.dim, **options)
    inject_lora(model.backbone, 4)
    inject_lora(model.text_tower, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.02 * torch.randn_like(p))
    model.tokens = clip.tokenize(REPORTS[:3])
    return model


@pytest.fixture
def model():
    return make_model()


def images(n=3):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_forward_pass_is_that_of_the_equations(model):
    v = model.backbone(images())
    t_hat = v @ model.distill_head.weight.T + model.distill_head.bias
    first, _, second = model.text_head
    hidden = F.leaky_relu(t_hat @ first.weight.T + first.bias, 0.1)
    both = torch.cat([v @ model.vision_head.weight.T + model.vision_head.bias,
                      hidden @ second.weight.T + second.bias], 1)
    expected = both @ model.fusion.weight.T + model.fusion.bias
    got = [model(images()), *model.features(images()), *model.forward_train(images(), model.tokens)]
    t = model.text_tower(model.tokens)
    torch.testing.assert_close(got, [expected, v, t_hat, expected, t_hat, t], atol=1e-5, rtol=1e-5)


def test_the_loss_is_cross_entropy_of_logits_plus_lambda_times_one_minus_cosine():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    t_hat, t = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    ce = (math.log(1 + math.e ** -2) + math.log(1 + math.e)) / 2
    kd = (0 + 1 - 0.5 ** 0.5) / 2  # cosines 1 and cos 45 degrees
    loss, parts = clipit_loss(logits, labels, t_hat, t, kd_weight=0.7)
    found = [loss.item(), parts["ce"].item(), parts["kd"].item()]
    assert found == pytest.approx([ce + 0.7 * kd, ce, kd], abs=1e-6)
    assert clipit_loss(logits, labels, t_hat, None)[0].item() == pytest.approx(ce, abs=1e-6)


def test_distillation_reaches_the_backbone_and_the_text_tower(model):
    _, t_hat, t = model.forward_train(images(), model.tokens)
    (1 - F.cosine_similarity(t, t_hat)).mean().backward()  # the distillation term alone
    for tower in (model.backbone, model.text_tower):
        adapters = [p for name, p in tower.named_parameters() if "lora_" in name]
        assert adapters and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    assert all(p.grad is None for p in model.vision_head.parameters())


def test_only_adapters_and_heads_train(model):
    """And cross-entropy reaches all of them but the text tower's."""
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        head = part in ("vision_head", "distill_head", "text_head", "fusion")
        assert p.requires_grad == ("lora_" in name or head), name
        assert (p.grad is not None) == (p.requires_grad and part != "text_tower"), name


def test_training_starts_from_the_unimodal_classifier_plus_a_fresh_text_head():
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, C, backbone.num_features, 16)
    v = backbone(images())
    expected = model.vision_head(v) + model.text_head(model.distill_head(v))
    torch.testing.assert_close(model(images()), expected)
    random = ClipIT(backbone, None, C, backbone.num_features, 16, random_fusion=True)
    assert random.fusion.weight.std() > 0.05 and random.fusion.bias.abs().sum() > 0


def test_inference_never_touches_text(model):
    expected = model.eval()(images())
    model.text_tower = None
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("options", [{}, dict(kd_layers=2)], ids=str)
def test_the_classifier_equals_the_trained_model_and_holds_no_text(options, tmp_path):
    model = make_model(**options).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.to_classifier(CLASSES).save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images(6)), model(images(6)), atol=1e-5, rtol=0)
    v, t_hat = again.features(images())
    torch.testing.assert_close(v, model.backbone(images()), atol=1e-5, rtol=0)
    assert (t_hat is None) == (options == dict(fused=False))
    assert again.classes == CLASSES and again.text_tower is None and not again.training
    assert not any("lora" in key or "text_tower" in key for key in again.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


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
    unchanged = tile_transform(64, [0] * 3, [1] * 3)(image.crop((32, 0, 96, 64)))
    torch.testing.assert_close(unchanged[:, 5, 5], torch.tensor([1, 0, 0.2]))


def test_a_text_classifier_is_the_papers_mlp():
    first, between, second = text_classifier(6, 3)
    assert type(between) is torch.nn.LeakyReLU and between.negative_slope == 0.1
    assert first.weight.shape == (6, 6) and second.weight.shape == (3, 6)

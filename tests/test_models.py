"""Models by name: backbones, CLIP models, and what is said where one cannot be had."""
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from conftest import Hostile
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import save_file

import pairing
from clipit import BACKBONES, Classifier, ClipIT, load_backbone
from lora import inject_lora
from pairing import CLIPS, build_conch, load_clip

SIZES = {  # feature size, parameters, keys, LoRA's parameters at rank 16, the first mean
    "UNI": (1024, 303_350_784, 342, 6_320_128, 0.485),
    "DINOL14": (1024, 304_370_688, 343, 6_317_248, 0.5),
    "VITS_8": (384, 21_670_272, 150, 1_188_864, 0.5),
    "VITS_16": (384, 21_665_664, 150, 1_198_080, 0.5),
    "VITB_8": (768, 85_807_872, 150, 2_374_656, 0.5),
    "VITB_16": (768, 85_798_656, 150, 2_383_872, 0.5),
    "UNI2-h": (1536, 681_394_176, 343, 9_471_168, 0.485),
    "Virchow": (2560, 631_229_184, 454, 10_519_744, 0.485),
    "Virchow2": (2560, 631_239_424, 455, 10_519_744, 0.485),
    "H-optimus-0": (1536, 1_134_774_272, 567, 15_762_624, 0.707223),
    "H-optimus-1": (1536, 1_134_774_272, 567, 15_762_624, 0.707223),
    "H0-mini": (768, 85_739_520, 175, 2_380_992, 0.707223),
    "prov-gigapath": (1536, 1_134_953_984, 566, 15_765_504, 0.485),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in place of the real one: each repository holds what tmp_path holds. hub.asked: (repo,
    file, revision) of each question; hub.error: its only answer, once it is set."""
    hub = SimpleNamespace(asked=[], error=None)

    def hf_hub_download(repo_id, filename, revision=None, **kwargs):
        hub.asked.append((repo_id, filename, revision))
        if hub.error or not (tmp_path / filename).exists():
            raise hub.error or errors.EntryNotFoundError("404 Client Error.")
        return str(tmp_path / filename)
    for module in (huggingface_hub, timm.models._hub, open_clip.pretrained):
        monkeypatch.setattr(module, "hf_hub_download", hf_hub_download)
    return hub


# ---- Backbones ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_has_its_published_size_and_lora_what_it_adds(name, hub):
    with torch.device("meta"):
        backbone = load_backbone(name, "none")
        state = backbone.state_dict()
        adapted = inject_lora(backbone, rank=16)
    added = sum(p.numel() for key, p in backbone.named_parameters() if "lora_" in key)
    sizes = sum(value.numel() for value in state.values()), len(state), added
    assert (backbone.num_features, *sizes, backbone.recipe["mean"][0]) == SIZES[name]
    assert len(adapted) == 4 * len(backbone.blocks) + 1
    assert backbone.recipe["size"] == 224 and not hub.asked


@pytest.mark.filterwarnings("ignore:.*jit.trace", "ignore:Converting a tensor")
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_of_one_block_is_adapted_saved_and_exported(name, monkeypatch, tmp_path):
    row, small = BACKBONES[name], dict(depth=1, embed_dim=32, num_heads=2)
    monkeypatch.setitem(BACKBONES, name, row | {"args": row["args"] | small})
    torch.manual_seed(0)
    size = None if name == "DINOL14" else 112  # the former's positions are resampled to 224
    backbone, images = load_backbone(name, "none", size), torch.randn(2, 3, *[size or 224] * 2)
    tokens = backbone.forward_features(images)
    v = tokens[:, 0]
    if "Virchow" in name:  # its class token, and the mean of the patches without the registers
        v = torch.cat([v, tokens[:, -8 * 8:].mean(dim=1)], dim=1)
        assert tokens.shape[1] == 8 * 8 + (1 if name == "Virchow" else 5)
    torch.testing.assert_close(backbone(images), v)
    linear = {key for key, module in backbone.named_modules() if type(module) is torch.nn.Linear}
    model = ClipIT(backbone, None, 2, backbone.num_features, 8).eval()
    assert linear < set(inject_lora(model.backbone, 2)) and len(linear) == 4
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    model.to_classifier(["a", "b"]).save_pretrained(tmp_path)
    again, shapes = Classifier.from_pretrained(tmp_path), {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(again, (images,), dynamic_shapes=shapes).module()
    for classifier in (again, exported, torch.jit.trace(again, images)):
        for batch in (images[:1], images.repeat(2, 1, 1, 1)):
            torch.testing.assert_close(classifier(batch), model(batch), rtol=0, atol=1e-5)


def write_backbone(folder, pretrained_cfg={}, **config):
    """A folder of timm's with a test_vit for 80 pixels, which is not the architecture's size."""
    model = timm.create_model("test_vit", img_size=80, num_classes=config.get("num_classes", 0))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    cfg = {"input_size": [3, 80, 80], "num_classes": 0, "fixed_input_size": True, **pretrained_cfg}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": cfg} | config))
    return f"local-dir:{folder}"


def test_a_tile_size_is_taken_where_positions_follow_it_and_the_classifier_has_it(vits16, tmp_path):
    torch.save(vits16, tmp_path / "weights.pth")
    own, file = write_backbone(tmp_path, architecture="test_vit"), tmp_path / "weights.pth"
    for name, weights, size in (("test_vit", file, 96), (own, None, 96), ("VITS_16", file, 96),
                                (own, None, None)):
        backbone, pixels = load_backbone(name, weights, size), size or 80
        assert backbone.recipe["size"] == pixels
        assert backbone.pos_embed.shape[1] == 1 + (pixels // 16) ** 2
        image = backbone.preprocess(Image.new("RGB", (200, 100)))[None]
        classifier = ClipIT(backbone, None, 2, 64, 8).to_classifier(["a", "b"])
        assert torch.equal(classifier.backbone(image), backbone(image))
    with pytest.raises(ValueError, match="^--model resnet10t --weights none --tile-size 96: could"):
        load_backbone("resnet10t", "none", 96)


def test_what_is_no_backbone_is_refused_in_words(tmp_path):
    for config, says in (
            (dict(architecture="hf-hub:org/model"), "expected a name of timm's"),
            (dict(architecture="test_vit", model_args={"init_values": 1}), "Missing.*ls1.gamma"),
            (dict(architecture="test_vit", model_args={"global_pool": ""}),
             r"features are \(1, 26, 64\); expected \(B, D\)"),
            (dict(model_type="vit"), "KeyError: 'architecture'")):
        with pytest.raises(ValueError, match=f"could not be loaded .*{says}"):
            load_backbone(write_backbone(tmp_path, **config))


@pytest.fixture
def vits16(monkeypatch):
    """VITS_16 with timm's smallest ViT in its place; a state dict of it."""
    small = dict(architecture="test_vit", args=dict(img_size=160))
    monkeypatch.setitem(BACKBONES, "VITS_16", BACKBONES["VITS_16"] | small)
    return timm.create_model("test_vit", num_classes=0).state_dict()


@pytest.mark.parametrize("name", [
    "test_vit", "resnet10t", "test_convnext", "hgnetv2_b0", "test_mambaout", "levit_128s",
    "deit_tiny_distilled_patch16_224", "mobilenetv3_small_050"])
def test_a_classifier_in_a_file_of_weights_is_left_out(tmp_path, name):
    source = timm.create_model(name, num_classes=7).eval()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    for file in ("weights.pth", "weights.safetensors"):
        backbone = load_backbone(name, tmp_path / file)
        batch = torch.randn(1, 3, backbone.recipe["size"], backbone.recipe["size"])
        expected = source.forward_head(source.forward_features(batch), pre_logits=True)
        torch.testing.assert_close(backbone(batch), expected)
        assert expected.shape == (1, backbone.num_features)


@pytest.mark.parametrize("load, name, flags", [
    (load_backbone, "test_vit", "--model test_vit --weights"),
    (load_clip, "conch", "--clip-model conch --clip-weights"),
    (load_clip, "local-dir:.", "--clip-model local-dir:. --clip-weights")])
def test_weights_that_do_not_fit_are_refused_and_none_are_executed(load, name, flags, tmp_path,
                                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = build_conch(width=64, layers=1)
    monkeypatch.setattr(pairing, "build_conch", lambda: small)
    monkeypatch.setattr(pairing, "ConchTokenizer", lambda path: None)
    write_config(tmp_path)
    model = load(name, "none")
    if load is load_clip:
        model = torch.nn.ModuleDict({"visual": model.image_tower, "text": model.text_tower})
    key, *more = state = dict(model.state_dict())
    for content, says in (({other: state[other] for other in more}, f"Missing.*{key}"),
                          (state | {"other": torch.ones(1)}, "Unexpected.*other"),
                          (state | {key: torch.ones(7)}, f"size mismatch.*{key}"),
                          (state | {key: Hostile()}, "weights_only"), ("text", "")):
        torch.save(content, "w.pth")
        with pytest.raises(ValueError, match=f"{flags} w.pth.*: could not be loaded .*{says}"):
            load(name, "w.pth")
    assert not Path("executed").exists()


def test_any_timm_id_any_hub_repository_and_any_file(tmp_path, hub, monkeypatch, vits16):
    monkeypatch.chdir(tmp_path.parent)
    write_backbone(tmp_path, architecture="test_vit", num_classes=5, pretrained_cfg={
        "classifier": "head", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    file, folder = tmp_path / "pytorch_model.bin", f"local-dir:{tmp_path.name}"
    for name, called in (("hf-hub:org/model@v1", "hf-hub:org/model@v1"), (folder, folder),
                         (f"local-dir:{tmp_path}/", folder)):
        backbone = load_backbone(name)
        assert torch.equal(backbone.cls_token, torch.load(file)["cls_token"])
        assert backbone.recipe["mean"] == [0.1, 0.2, 0.3] and backbone.recipe["size"] == 80
        assert backbone.recipe["backbone_id"] == called  # no path is published
        assert backbone.recipe["licence"] == "see the backbone"  # its config.json names none
    assert {(repo, revision) for repo, _, revision in hub.asked} == {("org/model", "v1")}
    hub.asked.clear()
    torch.save(vits16, file)  # under a name of BACKBONES
    for weights, asked in ((file, set()), (None, {BACKBONES["VITS_16"]["source"]["hf_hub_id"]})):
        backbone = load_backbone("VITS_16", weights)
        assert torch.equal(backbone.cls_token, vits16["cls_token"])
        assert backbone.recipe["backbone_id"] == "VITS_16"
        assert backbone.recipe["licence"] == "kaiko-non-commercial"
        assert {repo for repo, _, _ in hub.asked} == asked
    assert load_backbone("test_vit").recipe["licence"] == "apache-2.0"  # timm's word on its weights
    for weights in (file, "none"):
        assert load_backbone("test_vit", weights).recipe["licence"] == "see the backbone"


# ---- CLIP models --------------------------------------------------------------------------------

def write_config(folder, vision_cfg={}, text_cfg={}, **parts):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, **vision_cfg}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    (folder / "open_clip_config.json").write_text(json.dumps({
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | text_cfg, **parts},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}))


def test_hub_and_local_open_clip_models_are_the_same(tmp_path, hub):
    quilt = load_clip("quilt16", "none")  # with a local file it needs nothing from the hub
    assert quilt.image_tower.conv1.kernel_size == (16, 16) and quilt.dim == 512 and not hub.asked
    write_config(tmp_path)
    with pytest.raises(ValueError, match="could not be loaded"):  # random only where asked for
        load_clip(f"local-dir:{tmp_path}")
    first = load_clip(f"local-dir:{tmp_path}", "none")
    model = torch.nn.ModuleDict({"visual": first.image_tower, "text": first.text_tower})
    state = {**model.state_dict(), "logit_scale": torch.tensor(2.0)}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    for name in ("quilt", "hf-hub:org/model", f"local-dir:{tmp_path}"):
        clip = load_clip(name)
        assert torch.equal(clip.text_tower.text_projection, first.text_tower.text_projection)
        assert clip.dim == 16 and clip.tokenize(["a report"]).shape == (1, 77)
        assert "0.1" in str(clip.preprocess)
    assert {repo for repo, _, _ in hub.asked} == {"wisdomik/QuiltNet-B-32", "org/model"}
    hub.asked.clear()
    load_clip("hf-hub:org/model@v1")
    assert {(repo, revision) for repo, _, revision in hub.asked} == {("org/model", "v1")}


@torch.no_grad()
def test_features_of_a_coca_model_are_those_it_pools(tmp_path):
    vision = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {"context_length": 76, "embed_cls": True, "output_tokens": True}
    write_config(tmp_path, vision, text, custom_text=True,
                 multimodal_cfg={"width": 16, "heads": 2, "layers": 1})
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    clip, images = load_clip(f"local-dir:{tmp_path}"), torch.rand(2, 3, 32, 32)
    tokens = clip.tokenize(["a report", "another"])
    assert clip.dim == 16 and isinstance(model, open_clip.CoCa) and tokens.shape == (2, 76)
    torch.testing.assert_close(clip.encode_image(images), model.encode_image(images))
    torch.testing.assert_close(clip.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("part, setting, says", [
    ("text_cfg", {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"trust_remote_code": True}},
     "open_clip_config.json has trust_remote_code: no code"),
    ("other_cfg", [{"deeper": {"trust_remote_code": 1}}], "has trust_remote_code: no code"),
    ("vision_cfg", {"timm_model_name": "hf-hub:a/b"}, 'has "timm_model_name": "hf-hub:'),
    ("vision_cfg", {"timm_model_name": "local-dir:a"}, 'has "timm_model_name": "local-dir:'),
    ("text_cfg", {"hf_model_name": "bert-base-uncased"}, "`pip install transformers`")])
def test_a_config_that_would_run_code_is_refused_before_more_is_fetched(
        tmp_path, hub, monkeypatch, part, setting, says):
    monkeypatch.setattr(open_clip.hf_model, "transformers", None)
    write_config(tmp_path, **{part: setting})
    (tmp_path / "open_clip_model.safetensors").touch()
    for name in (f"local-dir:{tmp_path}", "hf-hub:org/model"):
        with pytest.raises(ValueError, match=f"{name} .*: could not be loaded .*{says}"):
            load_clip(name)
    if "transformers" not in says:
        assert hub.asked == [("org/model", "open_clip_config.json", None)]


# ---- What is said where a model cannot be had ---------------------------------------------------

RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)
WAYS_OUT = {  # the flag; what the second line names
    load_clip: ("--clip-model", [*CLIPS, "--clip-weights FILE", "co/MahmoodLab/CONCH", "hf auth"]),
    load_backbone: ("--model", [*BACKBONES, "--weights FILE", "co/MahmoodLab/UNI", "hf auth"])}


ERRORS = [errors.GatedRepoError("403 Client Error.\n\nask for access", response=RESPONSE),
          errors.RepositoryNotFoundError("401 Client Error.", response=RESPONSE),
          errors.LocalEntryNotFoundError("An error happened while trying to locate the file"),
          errors.EntryNotFoundError("404 Client Error.")]


@pytest.mark.parametrize("load, name, given", [
    (load_clip, "conch", ERRORS), (load_clip, "quilt", ERRORS), (load_clip, "ViT-B-32", [None]),
    (load_clip, "hf-hub:org/model", ERRORS), (load_clip, "ViT-B-32/no-such-weights", [None]),
    (load_clip, "no-such-model", [None]), (load_clip, "local-dir:nowhere", [None]),
    (load_backbone, "UNI", ERRORS), (load_backbone, "hf-hub:org/model", ERRORS),
    (load_backbone, "resnet10t", ERRORS), (load_backbone, "vit_smoll", [None]),
    (load_backbone, "local-dir:nowhere", [None])], ids=str)
def test_a_refusal_names_model_reason_and_ways_out(load, name, given, hub, monkeypatch):
    monkeypatch.setitem(BACKBONES, "UNI", BACKBONES["UNI"] | {"architecture": "test_vit"})  # fast
    flag, ways_out = WAYS_OUT[load]
    for hub.error in given:
        reason = f"{type(hub.error).__name__}: " if hub.error else ""
        with pytest.raises(ValueError) as raised:
            load(name)
        first, second = str(raised.value).splitlines()
        assert first.startswith(f"{flag} {name} ") and f": could not be loaded ({reason}" in first
        assert " ".join(str(hub.error or "").split()) in first
        assert all(way_out in second for way_out in ways_out)

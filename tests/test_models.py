"""Models by name: the six backbones, open_clip models, and what is said where one cannot be had. No network."""
import inspect
import json
import re
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import errors

import clipit
import pairing
from clipit import BACKBONES, ClipIT, load_backbone
from lora import inject_lora
from pairing import load_clip

SIZES = {  # feature size, parameters, keys; at rank 16 the LoRA parameters of linear and of convolution layers
    "UNI": (1024, 303_350_784, 342, 6_291_456, 28_672),
    "DINOL14": (1024, 304_370_688, 343, 6_291_456, 25_792),
    "VITS_8": (384, 21_670_272, 150, 1_179_648, 9_216),
    "VITS_16": (384, 21_665_664, 150, 1_179_648, 18_432),
    "VITB_8": (768, 85_807_872, 150, 2_359_296, 15_360),
    "VITB_16": (768, 85_798_656, 150, 2_359_296, 24_576),
}


@pytest.fixture
def no_hub(monkeypatch):
    """Every question to the hub fails the test."""
    def asked(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)


# ---- Backbones ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_sizes_and_its_lora(name, no_hub):
    dim, parameters, keys, linear, conv = SIZES[name]
    with torch.device("meta"):
        backbone = load_backbone(name, "none")
        features = backbone(torch.empty(2, 3, 224, 224))
    assert features.shape == (2, dim) and backbone.num_features == dim
    assert sum(p.numel() for p in backbone.parameters()) == parameters and len(backbone.state_dict()) == keys
    assert backbone.recipe["size"] == 224
    assert backbone.recipe["mean"] == ([0.485, 0.456, 0.406] if name == "UNI" else [0.5] * 3)
    with torch.device("meta"):  # as Classifier does it
        rebuilt = timm.create_model(backbone.recipe["architecture"], **backbone.recipe["model_args"])
        assert ({k: v.shape for k, v in rebuilt.state_dict().items()}
                == {k: v.shape for k, v in backbone.state_dict().items()})
        adapted = inject_lora(backbone, rank=16)
    count = {True: 0, False: 0}
    for key, p in backbone.named_parameters():
        if "lora_" in key:
            count["patch_embed" in key] += p.numel()
    assert (count[False], count[True]) == (linear, conv)
    assert len(adapted) == (96 if dim == 1024 else 48) + 1


@pytest.mark.parametrize("name, at_most", [("UNI", 0.003), ("DINOL14", 0.003), ("VITB_8", 0.008), ("VITB_16", 0.008),
                                           ("VITS_8", 0.022), ("VITS_16", 0.022)])
def test_what_the_classifier_adds_to_the_bare_backbone(name, at_most, no_hub):
    """Nine classes, text features of 512 (CONCH, QuiltNet): 2.16 % of a ViT-S, 0.78 % of a ViT-B, 0.26 % of a ViT-L."""
    v, bare, t, c = *SIZES[name][:2], 512, 9
    with torch.device("meta"):
        recipe = load_backbone(name, "none").recipe
        classifier = clipit.Classifier(**recipe, classes=list("abcdefghi"), vision_dim=v, text_dim=t)
    added = sum(p.numel() for p in classifier.parameters()) - bare
    h_d, h_t, h_v, fusion = v * t + t, t * t + t + t * c + c, v * c + c, 2 * c * c + c
    assert added == h_d + h_t + h_v + fusion
    assert at_most - 0.0005 < added / bare <= at_most


@pytest.fixture
def tiny_vits16(monkeypatch):
    """VITS_16 with timm's smallest ViT in its place."""
    monkeypatch.setitem(BACKBONES, "VITS_16", BACKBONES["VITS_16"] | {"architecture": "test_vit"})
    return timm.create_model("test_vit", num_classes=0).state_dict()


def test_backbone_from_a_local_file_and_back_as_a_classifier(tmp_path, no_hub, tiny_vits16):
    file = tiny_vits16
    torch.save(file, tmp_path / "vits16.pth")
    backbone = load_backbone("VITS_16", tmp_path / "vits16.pth")
    assert (backbone.recipe["backbone_id"], backbone.recipe["licence"]) == ("VITS_16", "kaiko-non-commercial")
    assert all(torch.equal(value, file[key]) for key, value in backbone.state_dict().items())
    classifier = ClipIT(backbone, None, 2, 64, 8).to_classifier()
    classifier.save_pretrained(tmp_path / "classifier")
    again = clipit.Classifier.from_pretrained(tmp_path / "classifier")
    assert all(torch.equal(value, file[key]) for key, value in again.backbone.state_dict().items())


def test_a_file_with_the_names_of_dinov2_loads(tmp_path):
    torch.manual_seed(0)
    kwargs = dict(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0, reg_tokens=4,
                  init_values=1e-5, no_embed_class=True)
    model, other = (timm.models.vision_transformer.VisionTransformer(**kwargs).eval() for _ in range(2))
    state = model.state_dict()
    torch.nn.init.normal_(model.cls_token)
    place = torch.randn(1, 1, 32)  # DINOv2 adds a position to its cls token, timm stores the sum
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 32)
    state["cls_token"] = state["cls_token"] - place
    state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    torch.save(state, tmp_path / "vitl14.pth")
    clipit.load_weights(other, tmp_path / "vitl14.pth")
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(other(images), model(images))


def test_published_backbone_comes_from_the_hub_strictly(tmp_path, monkeypatch, tiny_vits16):
    state = tiny_vits16
    torch.save({key: value for key, value in state.items() if key != "cls_token"}, tmp_path / "pytorch_model.bin")
    asked = []
    monkeypatch.setattr(clipit, "hub_file", lambda flag, repo, *names, otherwise: asked.append((repo, names)) or str(
        tmp_path / "pytorch_model.bin"))
    with pytest.raises(ValueError, match="1 keys missing, such as cls_token"):
        load_backbone("VITS_16")
    torch.save(state, tmp_path / "pytorch_model.bin")
    backbone = load_backbone("VITS_16")
    assert torch.equal(backbone.cls_token, state["cls_token"]) and backbone.recipe["licence"] == "kaiko-non-commercial"
    assert asked[0] == ("1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
                        ("model.safetensors", "pytorch_model.bin"))


def test_any_timm_id_and_any_hub_repository(tmp_path, monkeypatch):
    model = timm.create_model("test_vit", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "test_vit", "num_classes": 5,
        "pretrained_cfg": {"num_classes": 5, "input_size": [3, 160, 160], "classifier": "head",
                           "first_conv": "patch_embed.proj", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}))
    monkeypatch.setattr(clipit, "hub_file", lambda flag, repo, *names, otherwise: str(
        tmp_path / ("config.json" if names == ("config.json",) else "pytorch_model.bin")))
    backbone = load_backbone("hf-hub:org/model")
    assert torch.equal(backbone.cls_token, model.cls_token) and backbone.recipe["mean"] == [0.1, 0.2, 0.3]
    backbone = load_backbone(f"local-dir:{tmp_path}")
    assert torch.equal(backbone.cls_token, model.cls_token)
    assert backbone.recipe["backbone_id"] == f"local-dir:{tmp_path.name}"
    assert backbone.recipe["licence"] == "see the backbone"  # its config.json names none
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "pytorch_model.bin")
    backbone = load_backbone("test_vit")
    assert backbone.num_features == 64 and backbone.recipe["licence"] == "apache-2.0"  # timm's word on its weights
    assert load_backbone("test_vit", tmp_path / "pytorch_model.bin").recipe["licence"] == "see the backbone"
    assert load_backbone("test_vit", "none").recipe["licence"] == "random weights"


# ---- open_clip ------------------------------------------------------------------------------------------------------

def tiny_config(**text):
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1, **text}
    return {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
            "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}


def test_hub_and_local_open_clip_models_are_the_same(tmp_path, monkeypatch):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tiny_config()))
    first = load_clip(f"local-dir:{tmp_path}", "none")
    model = torch.nn.ModuleDict({"visual": first.image_tower, "text": first.text_tower})
    torch.save({**model.state_dict(), "logit_scale": torch.tensor(2.0)}, tmp_path / "open_clip_pytorch_model.bin")
    asked = []

    def hub_file(flag, repo, *names, otherwise):
        asked.append(repo)
        return str(tmp_path / names[-1])

    monkeypatch.setattr(pairing, "hub_file", hub_file)
    for name in ("quilt", "hf-hub:org/model", f"local-dir:{tmp_path}"):
        clip = load_clip(name)
        assert torch.equal(clip.text_tower.text_projection, first.text_tower.text_projection) and clip.dim == 16
        assert "0.1" in str(clip.preprocess)
    assert [repo.removeprefix("hf-hub:") for repo in asked] == ["wisdomik/QuiltNet-B-32"] * 2 + ["org/model"] * 2


@pytest.mark.parametrize("name, patch", [("quilt", 32), ("quilt16", 16)])
def test_quilt_with_a_local_file_needs_nothing_from_the_hub(name, patch, no_hub):
    clip = load_clip(name, "none")
    assert clip.dim == 512 and clip.tokenize(["a report"]).shape == (1, 77)
    assert clip.image_tower.conv1.kernel_size == (patch, patch)


def test_text_towers_of_transformers_say_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("open_clip.hf_model.transformers", None)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tiny_config(hf_model_name="roberta-base")))
    for name in ("roberta-ViT-B-32", f"local-dir:{tmp_path}"):
        with pytest.raises(ValueError, match="needs the transformers package: pip install transformers") as raised:
            load_clip(name, "none")
        assert len(str(raised.value).splitlines()) == 1


def test_a_tokenizer_file_is_for_conch_alone(tmp_path):
    (tmp_path / "bpe.json").write_text("{}")
    with pytest.raises(ValueError, match="only conch takes one"):
        load_clip("quilt", "none", tokenizer=tmp_path / "bpe.json")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tiny_config()))
    torch.save({"some.key": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="other.bin cannot be loaded .*Missing key"):
        load_clip(f"local-dir:{tmp_path}", tmp_path / "other.bin")


# ---- What is said where the hub refuses -----------------------------------------------------------------------------

RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)
GATED = errors.GatedRepoError("403 Client Error.", response=RESPONSE)
REFUSALS = {
    "is gated": GATED,
    "has no repository": errors.RepositoryNotFoundError("401 Client Error.", response=RESPONSE),
    "could not be reached": errors.LocalEntryNotFoundError("An error happened while trying to locate the file"),
    "could not be reached or": errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode"),
    "reached or the download": ConnectionError("[Errno -2] Name or service not known"),
    "the download broke off": OSError("Consistency check failed: file should be of size 10 but has size 5"),
    "holds no": errors.EntryNotFoundError("404 Client Error."),
}


def refuse(monkeypatch, error, at_download=False):
    """No file is in the cache; the hub answers the question for a file, or the download itself, with the error."""
    def hf_hub_download(repo, name, revision=None, local_files_only=False):
        raise errors.LocalEntryNotFoundError("not in the cache") if local_files_only else error

    def get_hf_file_metadata(url, timeout):
        if not at_download:
            raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)


@pytest.mark.parametrize("at_download", [False, True])
@pytest.mark.parametrize("words", REFUSALS)
@pytest.mark.parametrize("load, name, repo, remedies", [
    (load_clip, "conch", "MahmoodLab/CONCH", "--clip-weights FILE.*--clip-model quilt"),
    (load_clip, "quilt", "wisdomik/QuiltNet-B-32", "--clip-weights FILE.*--clip-model quilt"),
    (load_clip, "ViT-B-32/openai", "timm/vit_base_patch32_clip_224.openai", "--clip-weights FILE"),
    (load_backbone, "UNI", "MahmoodLab/UNI", "--weights FILE.*--model VITS_16"),
    (load_backbone, "hf-hub:org/model@main", "org/model", "--weights FILE.*--model VITS_16"),
    (load_backbone, "resnet18", "timm/resnet18.a1_in1k", "--weights FILE.*--model VITS_16"),
])
def test_refusals_of_the_hub_name_the_ways_out(monkeypatch, load, name, repo, remedies, words, at_download):
    refuse(monkeypatch, REFUSALS[words], at_download)
    if name == "ViT-B-32/openai":
        monkeypatch.setattr("open_clip.create_model_and_transforms", lambda *args, **kwargs: (None, None, None))
    with pytest.raises(ValueError, match=words) as raised:
        load(name)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2 and name in lines[0] and f"https://huggingface.co/{repo} " in lines[1]
    assert "hf auth login" in lines[1] and "HF_TOKEN" in lines[1]
    assert re.search(remedies, lines[1])


def test_a_gated_repository_is_not_called_missing():
    assert isinstance(GATED, errors.RepositoryNotFoundError)  # why it has to be looked at first


def test_half_a_repository_in_the_cache_is_completed_or_refused(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    fetched = []

    def hf_hub_download(repo, name, revision=None, local_files_only=False):
        if local_files_only and not (tmp_path / name).exists():
            raise errors.LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            fetched.append(name)
            (tmp_path / name).write_text("weights")
        return str(tmp_path / name)

    def get_hf_file_metadata(url, timeout):
        if "safetensors" in url:
            raise errors.EntryNotFoundError("404 Client Error.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)
    ask = lambda *names: clipit.hub_file("--model x", "hf-hub:org/model", *names, otherwise="--weights FILE")
    assert ask("config.json").endswith("config.json") and fetched == []
    for _ in range(2):  # the second time from the cache
        assert ask("model.safetensors", "pytorch_model.bin").endswith("pytorch_model.bin")
        assert fetched == ["pytorch_model.bin"]


def test_offline_is_told_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    for load, name in ((load_clip, "conch"), (load_backbone, "UNI")):
        start = time.monotonic()
        with pytest.raises(ValueError, match="could not be reached"):
            load(name)
        assert time.monotonic() - start < 10  # huggingface_hub's own retries take more than 20 seconds


def test_both_files_hold_the_same_shared_functions():
    assert inspect.getsource(pairing.hub_file) == inspect.getsource(clipit.hub_file)
    assert inspect.getsource(pairing.add) == inspect.getsource(clipit.add)


# ---- Defaults of the command line -----------------------------------------------------------------------------------

def test_uni_and_conch_are_the_defaults(tmp_path):
    import train
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    args = train.parse_args(["--ds", tmp_path, "--reports", "reports.txt"])
    assert (args.model, args.clip_model, args.clip_tokenizer) == ("UNI", "conch", None)
    assert train.parse_args(["--ds", "demo"]).clip_model.startswith("local-dir:")
    with pytest.raises(ValueError, match="needs --reports"):
        train.parse_args(["--ds", tmp_path])

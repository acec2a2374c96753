"""What a saved classifier says of itself: its config.json and its model card."""
import json
import os

import pytest
import torch
from conftest import DEMO
from huggingface_hub import ModelCard
from PIL import Image

from clipit import BACKBONES, Classifier, ClipIT, load_backbone


def make_classifier(run=None, **recipe):
    """A classifier of the demo's backbone, of which other things are said."""
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    backbone.recipe |= recipe
    return ClipIT(backbone, None, 2, backbone.num_features, 16).to_classifier(["a", "b"], run)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_config_and_card_tell_of_the_run(finished, tmp_path):
    files, metrics = contents(finished.folder / "classifier"), finished.metrics
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    config, card = (files[name].decode() for name in ("config.json", "README.md"))
    assert str(finished.argv[1].parent) not in card + config  # nobody's folders are published
    run, figures = json.loads(config)["run"], ("balanced_accuracy", "accuracy", "macro_f1")
    for part, row in (("metrics", "CLIP-IT"), ("unimodal", "vision head")):
        assert run[part] == {key: metrics["rows"][row][key] for key in figures}
        assert f"{100 * metrics['rows'][row]['balanced_accuracy']:.2f} %" in card
    assert [run["data"], run["reports"], run["clip_model"]] == [
        "tiles", "reports.txt", "local-dir:clip"]
    for words in ("For research only", "No text or\ntext model is in it", "**mit**",
                  f"**Balanced accuracy** on {metrics['test_tiles']} test tiles",
                  "`reports.txt`, paired with the tiles by `local-dir:clip`"):
        assert words in card
    Classifier.from_pretrained(finished.folder).save_pretrained(tmp_path)  # nothing is lost
    assert contents(tmp_path) == files


@pytest.mark.parametrize("name, licence", [
    ("UNI", "cc-by-nc-nd-4.0"), ("DINOL14", "kaiko-non-commercial"),
    ("prov-gigapath", "apache-2.0 with conditions"), ("mine", '"open": for #research'),
    ("mine", "a 'b' & {c}"), ("mine", "- x: y")])
def test_the_card_names_the_backbones_licence_and_where_it_stands(name, licence):
    """A licence of any characters leaves the header readable, as the hub reads it."""
    card = str(make_classifier(backbone_id=name, licence=licence).generate_model_card())
    data = ModelCard(card).data
    assert (data.license, data.license_name) == ("other", licence.replace(" ", "-"))
    assert "**Tiles**: unknown pixels, unknown micrometres per pixel" in card
    assert data.pipeline_tag == "image-classification" and f"**{licence}**" in card
    if name in BACKBONES:
        source = BACKBONES[name]["source"]
        assert source["license"] == licence
        assert f"`{name}` (https://huggingface.co/{source['hf_hub_id']})" in card


def test_the_cards_example_runs_in_the_saved_folder_that_follows_the_umask(tmp_path, monkeypatch):
    classifier, before = make_classifier(run={"mpp": 0.5, "side": 96}), os.umask(0o027)
    classifier.save_pretrained(tmp_path)
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 96), "pink").save("tile.png")
    card, names = (tmp_path / "README.md").read_text(), {}
    assert "**Tiles**: 96 pixels, 0.5 micrometres per pixel" in card
    lines = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join([*lines[:2], f"p = {lines[2]}"]), names)
    assert torch.equal(names["p"], classifier.predict([Image.open("tile.png")]))


def test_a_classifier_comes_back_from_the_hub_by_two_files_of_a_revision(tmp_path, monkeypatch):
    def snapshot_download(*repository, **options):
        names = ["config.json", "model.safetensors"]
        assert (repository, options) == (("org/model",), dict(allow_patterns=names, revision="v1"))
        (tmp_path / "README.md").unlink()
        return str(tmp_path)
    monkeypatch.setattr("clipit.snapshot_download", snapshot_download)
    classifier, images = make_classifier(), torch.randn(2, 3, 64, 64)
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained("org/model", revision="v1")
    assert torch.equal(again(images), classifier(images))

"""What a saved classifier says of itself: its config.json and its model card."""
import json

import pytest
from conftest import DEMO
from huggingface_hub import HfApi, ModelCard
from test_train import another, run_folder

import train
from clipit import BACKBONES, Classifier, ClipIT, load_backbone

FIGURES = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auroc")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_config_and_card_tell_of_the_run(argv, world):
    metrics, folder = train.main(argv), run_folder(argv) / "classifier"
    assert sorted(files_of(folder)) == ["README.md", "config.json", "model.safetensors"]
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert str(world) not in card + json.dumps(config)  # nobody's folders are published
    run = config["run"]
    assert run["metrics"] == {key: metrics["rows"]["CLIP-IT"][key] for key in FIGURES}
    assert run["unimodal"] == {key: metrics["rows"]["vision head"][key] for key in FIGURES}
    assert (run["data"], run["reports"], run["clip_model"]) == ("tiles", "reports.txt", "local-dir:clip")
    for key in FIGURES:
        shown = [f"{100 * metrics['rows'][row][key]:.2f}" for row in ("vision head", "CLIP-IT")]
        assert f"| {key.replace('_', ' ')} | {shown[0]} | {shown[1]} |" in card
    for said in ("research only", "no text, tokenizer or text model", "Classifier.from_pretrained", "**mit**",
                 f"{metrics['test_tiles']} test tiles", "`reports.txt`, paired with the tiles by `local-dir:clip`"):
        assert said in card
    assert ModelCard(card).data.license_name == "mit"
    Classifier.from_pretrained(folder).save_pretrained(world / "again")  # nothing is lost on the way
    assert files_of(world / "again") == files_of(folder)


def test_a_run_without_text_names_no_reports(argv):
    train.main(argv + ["--no-text"])
    config = json.loads((run_folder(argv) / "classifier" / "config.json").read_text())
    assert config["run"]["reports"] is None and config["run"]["clip_model"] is None
    assert "Training text" not in (run_folder(argv) / "classifier" / "README.md").read_text()


@pytest.mark.parametrize("name", BACKBONES)
def test_the_card_names_the_backbones_licence_and_where_it_stands(name):
    """The licence is that of BACKBONES, on a small model in place of the backbone."""
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    backbone.recipe |= dict(backbone_id=name, licence=BACKBONES[name]["licence"])
    card = ClipIT(backbone, None, 2, backbone.num_features, 16).to_classifier().generate_model_card()
    assert f"https://huggingface.co/{BACKBONES[name]['repo']}" in card.text
    licence = "cc-by-nc-nd-4.0" if name == "UNI" else "kaiko-non-commercial"
    assert f"**{licence}**" in card.text and card.data.license_name == licence


def test_a_run_that_is_killed_before_its_figures_are_written_ends_the_same_when_resumed(argv, monkeypatch):
    """Killed after the test and before its figures; killed with half of the second file written."""
    train.main(another(argv, "whole"))
    whole, killed = run_folder(another(argv, "whole")), another(argv, "killed")
    save_pretrained, saves = Classifier.save_pretrained, []

    def half(self, folder, **kwargs):
        saves.append(folder)
        save_pretrained(self, folder, **kwargs)
        if len(saves) == 2:
            (folder / "model.safetensors").write_bytes(b"half")
            raise SystemExit("killed")
    for target, name, do in ((train, "model_facts", lambda *args: exec("raise SystemExit('killed')")),
                             (Classifier, "save_pretrained", half)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, do)
            with pytest.raises(SystemExit):
                train.main(killed + ["--resume"])
        left = run_folder(killed) / "classifier"
        assert not (left.parent / "metrics.json").exists()
        assert files_of(left)["model.safetensors"] == files_of(whole / "classifier")["model.safetensors"]
        assert json.loads((left / "config.json").read_text())["run"] is None
    train.main(killed + ["--resume"])
    assert files_of(left) == files_of(whole / "classifier")
    assert (left.parent / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert not list(left.parent.glob("*.tmp"))


def test_push_to_hub_uploads_config_weights_and_card(monkeypatch):
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    classifier = ClipIT(backbone, None, 2, backbone.num_features, 16).to_classifier(["a", "b"])
    uploaded = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder",
                        lambda self, folder_path, repo_id, **kwargs: uploaded.update({repo_id: files_of(folder_path)}))
    classifier.push_to_hub("org/model")
    assert sorted(uploaded["org/model"]) == ["README.md", "config.json", "model.safetensors"]
    assert uploaded["org/model"]["README.md"].decode() == str(classifier.generate_model_card())

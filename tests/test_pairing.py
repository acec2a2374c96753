"""The pairing: the report of highest cosine, whatever the batch, the chunk and the labels."""
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, REPORTS, write_tiles

import pairing
from data import load_tiles
from pairing import cache_key, cached, embed_images, embed_texts, load_clip, nearest_text


@pytest.fixture(scope="module")
def clip():
    return load_clip(f"local-dir:{DEMO}/clip")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_pair_is_the_report_of_highest_cosine():
    images, texts = unit(500, 64), unit(70, 64, seed=1)
    index, similarity = nearest_text(images, texts)
    for i in range(len(images)):  # the one-by-one loop
        cosines = [F.cosine_similarity(images[i].double(), text.double(), dim=0).item() for text in texts]
        assert index[i] == max(range(len(texts)), key=cosines.__getitem__)
        assert similarity[i].item() == pytest.approx(max(cosines), abs=1e-6)


def test_the_first_of_equal_reports_wins():
    texts = unit(40, 64, seed=1)
    texts[[3, 17, 33]] = texts[25].clone()  # equal features at four places of the matrix product
    index, _ = nearest_text(torch.cat([texts[25:26], unit(200, 64)]).repeat(3, 1), texts)
    assert index[0] == 3
    assert not set(index.tolist()) & {17, 25, 33}


@pytest.mark.parametrize("chunk", [1, 7, 64, 499, 8192])
def test_pairs_do_not_depend_on_the_chunk(chunk):
    images, texts = unit(500, 64), unit(70, 64, seed=1)
    texts[50] = texts[10].clone()
    expected, got = nearest_text(images, texts), nearest_text(images, texts, chunk)
    assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])


def test_no_matrix_of_all_tiles_and_all_reports_exists(monkeypatch):
    sizes = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.append(out.shape) or mm(a, b, out=out))
    nearest_text(unit(500, 64), unit(70, 64), chunk=100)
    assert sizes == [(100, 70)] * 5


def test_no_tiles_give_no_pairs():
    index, similarity = nearest_text(torch.empty(0, 64), unit(5, 64))
    assert index.shape == similarity.shape == (0,) and index.dtype == torch.long


@pytest.mark.parametrize("images, texts", [(unit(3, 8), unit(3, 9)), (unit(3, 8), torch.empty(0, 8)),
                                           (torch.full((2, 8), torch.nan), unit(3, 8))])
def test_features_that_cannot_be_compared_are_refused(images, texts):
    with pytest.raises(ValueError, match="nearest_text"):
        nearest_text(images, texts)


def test_embeddings_are_those_of_one_tile_at_a_time_and_have_length_1(clip, world):
    tiles = load_tiles(world / "tiles", "train", transform=clip.preprocess)
    alone = torch.cat([clip.encode_image(image[None]) for image, _ in tiles])
    for batch_size, workers in ((1, 0), (5, 0), (64, 2)):
        features = embed_images(clip, tiles, batch_size, workers)
        assert features.dtype == torch.float32
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(tiles)))


def test_report_embeddings_do_not_depend_on_the_batch_and_equal_texts_are_equal(clip):
    texts = REPORTS + REPORTS[2:3]
    alone = torch.cat([clip.encode_text(clip.tokenize([text])) for text in texts])
    for batch_size in (1, 4, 64):
        features = embed_texts(clip, texts, batch_size)
        torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)
        assert torch.equal(features[2], features[-1])


def test_the_pairing_sees_no_labels(clip, world):
    tiles = load_tiles(world / "tiles", "train", transform=clip.preprocess)
    expected = embed_images(clip, tiles)
    tiles.labels = [None if i % 2 else "not a label" for i in range(len(tiles))]
    images_alone = [tiles[i][0] for i in range(len(tiles))]
    assert torch.equal(embed_images(clip, images_alone), expected)


def test_the_text_tower_is_a_module_of_its_own_without_the_image_tower(clip):
    tokens = clip.tokenize(REPORTS)
    features = clip.text_tower(tokens)
    assert features.shape == (len(REPORTS), clip.dim)
    torch.testing.assert_close(F.normalize(features, dim=1), clip.encode_text(tokens))
    assert not any("visual" in name for name, _ in clip.text_tower.named_parameters())


def test_the_cache_serves_only_what_was_made_from_the_same(tmp_path):
    made = []
    def compute():
        made.append(1)
        return torch.full((2,), float(len(made)))
    path, key = tmp_path / "features.pt", {"tile list": "a b", "model": "m"}
    assert cached(path, key, compute)[1] == "computed"
    tensor, how = cached(path, dict(key), compute)
    assert how == "from the cache" and tensor[0] == 1 and len(made) == 1
    tensor, how = cached(path, key | {"model": "other"}, compute)
    assert tensor[0] == 2 and "another model" in how
    path.write_bytes(path.read_bytes()[:100])
    tensor, how = cached(path, key | {"model": "other"}, compute)
    assert tensor[0] == 3 and "not readable" in how
    assert [p.name for p in tmp_path.iterdir()] == ["features.pt"]


def test_the_cache_key_changes_with_tiles_texts_weights_and_preprocessing(clip, tmp_path):
    import os
    folder = write_tiles(tmp_path / "t", {"A": 2})
    paths = sorted(str(p) for p in folder.rglob("*.png"))
    key = cache_key(clip, paths=paths)
    assert key == cache_key(clip, paths=paths)

    def differs(other):
        return {name for name in key if other[name] != key[name]}
    assert differs(cache_key(clip, paths=paths[:1])) == {"tile list"}
    os.utime(paths[0], (1, 1))
    assert differs(cache_key(clip, paths=paths)) == {"tile list"}
    key = cache_key(clip, paths=paths)
    changed = load_clip(f"local-dir:{DEMO}/clip")
    with torch.no_grad():
        next(changed.image_tower.parameters()).view(-1)[0] += 1e-3
    assert differs(cache_key(changed, paths=paths)) == {"weights"}
    changed = load_clip(f"local-dir:{DEMO}/clip")
    changed.preprocess = "another"
    assert differs(cache_key(changed, paths=paths)) == {"preprocessing"}
    key = cache_key(clip, texts=REPORTS)
    assert differs(cache_key(clip, texts=REPORTS[:-1])) == {"reports"}


def test_random_weights_are_had_only_where_asked_for(tmp_path):
    config = json.loads((DEMO / "clip" / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_clip(f"local-dir:{tmp_path}")
    assert load_clip(f"local-dir:{tmp_path}", weights="none").dim == config["model_cfg"]["embed_dim"]


@pytest.mark.parametrize("name", ["no-such-model", "ViT-B-32/no-such-weights", "ViT-B-32", "local-dir:nowhere"])
def test_an_unknown_model_is_refused_with_the_choices(name):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_clip(name)
    assert all(choice in str(error.value) for choice in pairing.CLIPS)

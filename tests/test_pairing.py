"""The pairing: the report of highest cosine, whatever the batch, the chunk and the labels."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, REPORTS, ROOT

from data import load_tiles
from pairing import embed_images, embed_texts, load_clip, nearest_text


@pytest.fixture(scope="module")
def clip():
    return load_clip(f"local-dir:{DEMO}/clip")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_pair_is_the_report_of_highest_cosine():
    images, texts = unit(100, 64), unit(70, 64, seed=1)
    index, similarity = nearest_text(images, texts)
    for i in range(len(images)):  # the one-by-one loop
        cosines = [F.cosine_similarity(images[i].double(), text.double(), dim=0).item()
                   for text in texts]
        assert index[i] == max(range(len(texts)), key=cosines.__getitem__)
        assert similarity[i].item() == pytest.approx(max(cosines), abs=1e-6)


def test_the_first_of_equal_cosines_wins():
    """Features of four entries of 1/2 or -1/2: every sum of their products is exact, in any order,
    so that many cosines of a tile are equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(400, 16, generator=generator).topk(4)[1]
    signs = torch.randint(0, 2, (400, 4), generator=generator) - 0.5
    images, texts = torch.zeros(400, 16).scatter(1, places, signs).split([100, 300])
    cosines = images @ texts.T
    ties = (cosines == cosines.max(dim=1, keepdim=True)[0]).int()
    assert (ties.sum(dim=1) > 1).sum() > 50
    assert nearest_text(images, texts)[0].tolist() == [row.tolist().index(1) for row in ties]


@pytest.mark.parametrize("chunk", [1, 7, 499, 8192])
def test_pairs_do_not_depend_on_the_chunk(chunk):
    images, texts = unit(500, 64), unit(70, 64, seed=1)
    expected, got = nearest_text(images, texts), nearest_text(images, texts, chunk)
    assert torch.equal(expected[0], got[0])
    torch.testing.assert_close(expected[1], got[1], rtol=0, atol=1e-6)
    assert nearest_text(images[:0], texts)[0].shape == (0,)  # no tiles, no pairs


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_stays_flat_in_a_process_that_has_made_and_freed_many_tensors():
    """Such a heap is in pieces. A (chunk, M) mask made anew for each chunk and freed between small
    tensors that stay would find no gap of its size in it, and take 0.7 GB here."""
    code = """if True:
        import random, re, torch
        from pairing import nearest_text
        def gigabytes(key):
            return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e6
        kept, random = [], random.Random(0)
        for _ in range(100):
            kept.append(torch.ones(random.randint(1, 2_000_000)))
            if len(kept) > 20:
                kept.pop(random.randrange(20))
        kept = [torch.empty(512) for _ in range(100_000)]  # in the gaps
        images, texts = torch.randn(50_000, 8), torch.randn(20_000, 8)
        before = gigabytes("VmRSS")
        nearest_text(images, texts)
        print(gigabytes("VmHWM") - before)"""
    assert float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) < 0.5


@pytest.mark.parametrize("images, texts", [
    (unit(3, 8), unit(3, 9)), (unit(3, 8), torch.empty(0, 8)), (unit(3, 8), unit(8)),
    (torch.full((2, 8), torch.nan), unit(3, 8)), (torch.full((2, 8), torch.inf), unit(3, 8))])
def test_features_that_cannot_be_compared_are_refused(images, texts):
    with pytest.raises(ValueError, match="nearest_text"):
        nearest_text(images, texts)


def test_embeddings_are_those_of_one_tile_and_one_report_at_a_time_of_length_1(clip, world):
    tiles = load_tiles(world / "tiles", "train", transform=clip.preprocess)
    images = torch.cat([clip.encode_image(image[None]) for image, _ in tiles])
    texts = torch.cat([clip.encode_text(clip.tokenize([text])) for text in REPORTS])
    for batch_size, workers in ((1, 0), (5, 0), (64, 2)):
        for got, alone in ((embed_images(clip, tiles, batch_size, workers), images),
                           (embed_texts(clip, REPORTS, batch_size), texts)):
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.norm(dim=1), torch.ones(len(alone)))


def test_the_pairing_sees_no_labels(clip, world):
    tiles = load_tiles(world / "tiles", "train", transform=clip.preprocess)
    expected = embed_images(clip, tiles)
    images_alone = [image for image, _ in tiles]
    tiles.labels = ["not a label"] * len(tiles)
    for dataset in (tiles, images_alone):
        assert torch.equal(embed_images(clip, dataset), expected)

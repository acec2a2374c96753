"""The published data sets, as miniatures in the same layout, and named reports from a server."""
import gzip
import hashlib
import io
import os
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.utils.data import DataLoader
from torchvision.datasets import PCAM
from torchvision.transforms import PILToTensor

import data
from data import DATASETS, download, load_reports, load_tiles

h5py = pytest.importorskip("h5py")
CRC, BACH = "NCT-CRC-HE-100K", "ICIAR2018_BACH_Challenge"
PART = f"{CRC}.zip.part"
PCAM_TILES = {"train": 24, "val": 6, "test": 8}
SPLITS = ("train", "val", "test")
PUBLISHED = list(DATASETS["pcam"]["archives"].values())  # before the miniatures take their place


def zipped(names) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "a tile")
    return file.getvalue()


def crc_zip(folder: str, per_class: int) -> bytes:
    return zipped(f"{folder}/{kind}/{kind}-{i:03}.tif"
                  for kind in DATASETS["crc"]["classes"] for i in range(per_class))


def pcam_gz(split: str, axis: str) -> bytes:
    file, count = io.BytesIO(), PCAM_TILES[split]
    shape, end = ((count, 96, 96, 3), 256) if axis == "x" else ((count, 1, 1, 1), 2)
    with h5py.File(file, "w") as h5:
        h5[axis] = np.random.default_rng(count).integers(0, end, shape, "uint8")
    return gzip.compress(file.getvalue())


@pytest.fixture(scope="module")
def miniatures() -> dict:
    """{data set: {key of its archives: (archive, tiles in it)}}"""
    prefixes = zip(DATASETS["bach"]["classes"], ("b", "is", "iv", "n"))
    bach = [f"{kind}/{prefix}{i:03}.tif" for kind, prefix in prefixes for i in range(1, 101)]
    photos = [f"{BACH}/Photos/{name}" for name in ("microscopy_ground_truth.csv", *bach)]
    val = (crc_zip("CRC-VAL-HE-7K", 2), 18)
    return {"crc": {"train": (crc_zip(CRC, 10), 90), "test": val},
            "crc-nonorm": {"train": (crc_zip(f"{CRC}-NONORM", 10), 90), "test": val},
            "bach": dict.fromkeys(SPLITS, (zipped([*photos, f"{BACH}/WSI/A01.svs"]), 400)),
            "pcam": {f"{split}{key}": (pcam_gz(split, axis), count)
                     for split, count in PCAM_TILES.items() for axis, key in zip("xy", ("", "_y"))}}


@pytest.fixture
def server(monkeypatch, miniatures):
    """files: name -> bytes; cut: after how many bytes the next replies end; ranges: whether it
    knows them; length: whether it tells it; asked: the Range of each request."""
    class Handler(BaseHTTPRequestHandler):
        log_message = lambda *args: None

        def do_GET(self):
            content = http.files.get(self.path.split("?")[0].split("/")[-1])
            wanted = self.headers.get("Range")
            http.asked.append(wanted)
            if content is None:
                return self.send_error(404)
            start = int(wanted[len("bytes="):-1]) if wanted and http.ranges else 0
            if start and start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if http.length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][:http.cut.pop(0) if http.cut else None])

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.files, http.cut, http.ranges, http.length, http.asked = {}, [], True, True, []
    http.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(data, "ZENODO", http.url)
    for ds, archives in miniatures.items():
        for key, (content, count) in archives.items():
            to = DATASETS[ds]["archives"][key][0]
            name = f"{Path(to).name}.gz" if ds == "pcam" else f"{to.split('/')[0]}.zip"
            http.files[name] = content
            row = (to, hashlib.md5(content).hexdigest(), count)
            monkeypatch.setitem(DATASETS[ds]["archives"], key, row)
    yield http
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("ds", ["crc", "crc-nonorm"])
def test_crc_is_split_by_class_into_80_20_and_the_other_archive(ds, server, tmp_path, capsys):
    folder = ds.replace("crc", CRC).replace("nonorm", "NONORM")
    for _ in range(2):  # nothing is fetched twice
        download(ds, None, tmp_path)
    assert len(server.asked) == 2 and "CC BY 4.0" in capsys.readouterr().out
    splits = [load_tiles(ds, split, tmp_path) for split in SPLITS]
    for tiles, count, archive in zip(splits, (8, 2, 2), (folder, folder, "CRC-VAL-HE-7K")):
        assert Counter(tiles.labels) == {label: count for label in range(9)}
        for path, label in zip(tiles.paths, tiles.labels):
            assert f"/{archive}/{DATASETS['crc']['classes'][label]}/" in path
    assert len({path for tiles in splits for path in tiles.paths}) == 9 * 12
    (tmp_path / folder / "ADI/ADI-003.tif").unlink()
    with pytest.raises(ValueError, match=f"{folder}: 89 tiles, 89 labels, expected 90"):
        load_tiles(ds, "train", tmp_path)


def test_bach_has_the_fixed_splits(server, tmp_path):
    download("bach", None, tmp_path)
    assert os.listdir(tmp_path / BACH) == ["Photos"]  # no whole slides
    train_, val, test = (load_tiles("bach", split, tmp_path) for split in SPLITS)
    assert len(train_) == 254 and len(set(train_.paths + val.paths + test.paths)) == 400
    assert Counter(train_.labels + val.labels) == {0: 52, 1: 70, 2: 69, 3: 77}
    assert Counter(val.labels) == {0: 3, 1: 4, 2: 3, 3: 4}
    assert Counter(test.labels) == {0: 48, 1: 30, 2: 31, 3: 23}
    # ranges are half-open, over the sorted files: b001 and b041 open and close the first one
    ends = (val.paths[0], train_.paths[0], test.paths[0], test.paths[-1])
    assert [path[-8:] for path in ends] == ["b001.tif", "b002.tif", "b042.tif", "n068.tif"]


def test_pcams_checksums_and_tiles_are_torchvisions_from_workers_too(server, tmp_path):
    theirs = {f"pcam/{file[0]}": file[2] for part in PCAM._FILES.values() for file in part.values()}
    assert theirs == {to: md5 for to, md5, _ in PUBLISHED}
    download("pcam", None, tmp_path)
    for split, count in zip(SPLITS, PCAM_TILES.values()):
        tiles = load_tiles("pcam", split, tmp_path, transform=PILToTensor())
        images, labels = zip(*PCAM(tmp_path, split, PILToTensor()))
        assert len(images) == count and tiles.labels == list(labels)
        for workers in (0, 1):
            batches = [batch for batch, _ in DataLoader(tiles, 2, num_workers=workers)]
            assert torch.equal(torch.cat(batches), torch.stack(images))


def test_an_hdf5_file_is_opened_once_in_each_process(server, tmp_path, monkeypatch):
    download("pcam", None, tmp_path)
    opened, h5_file, here = [], h5py.File, os.getpid()  # opened: the process of each opening
    tiles = load_tiles("pcam", "test", tmp_path,
                       transform=lambda image: (os.getpid(), opened.count(os.getpid())))
    data._open_h5.cache_clear()
    monkeypatch.setattr(h5py, "File", lambda *args: opened.append(os.getpid()) or h5_file(*args))
    assert [opening for opening, _ in tiles] == [(here, 1)] * 8
    openings = [item[0] for item in DataLoader(tiles, None, num_workers=2)]
    assert [count for _, count in openings] == [1] * 8 and here not in dict(openings)


def test_pcams_tiles_and_labels_are_equally_many(server, tmp_path):
    download("pcam", None, tmp_path)
    with h5py.File(tmp_path / f"{data.PCAM}test_x.h5", "w") as file:
        file["x"] = np.zeros((7, 96, 96, 3), np.uint8)
    with pytest.raises(ValueError, match="test_x.h5: 7 tiles, 8 labels, expected 8"):
        load_tiles("pcam", "test", tmp_path)


@pytest.mark.parametrize("ds, told", [
    ("crc", f"{CRC}; .* \\(12.5 GB, licence CC BY 4.0\\)\nfrom .*records/1214456"),
    ("bach", f"{BACH}/Photos; .* \\(10.4 GB, licence CC BY-NC-ND 4.0\\)\nfrom .*records/3632035"),
    ("pcam", "split_train_x.h5; .* \\(8.0 GB, licence CC0\\)\nfrom .*records/2546921")])
def test_a_missing_data_set_is_not_fetched_unasked_but_told_of(ds, told, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "urlopen", None)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/.*{told}.* or put it"):
        load_tiles(ds, "train", tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length, whole", [(True, True), (True, False), (False, False)])
def test_a_broken_connection_is_gone_on_from_by_the_next_run(length, whole, server, tmp_path):
    server.cut, server.length, part = [5_000, 1_000], length, tmp_path / PART
    for told in ("5,000 of", "6,000 of"):  # where the server does not tell the length, a checksum
        with pytest.raises(OSError, match=f"{part}: .*{told if length else 'checksum'}") as stop:
            download("crc", None, tmp_path)
        assert "the same command goes on" in str(stop.value)
    if whole:  # the server has nothing beyond it, and says so by a 416
        part.write_bytes(server.files[f"{CRC}.zip"])
    size = part.stat().st_size
    download("crc", None, tmp_path)
    assert server.asked == ["bytes=0-", "bytes=5000-", f"bytes={size}-", "bytes=0-"]


def test_a_file_of_another_checksum_is_kept_as_part(server, tmp_path):
    published, other = server.files[f"{CRC}.zip"], server.files["CRC-VAL-HE-7K.zip"]
    server.files[f"{CRC}.zip"] = other
    came, expected = (hashlib.md5(content).hexdigest() for content in (other, published))
    for start in (0, len(other)):  # fetched now, or by an earlier run
        with pytest.raises(OSError) as refused:
            download("crc", None, tmp_path)
        for words in (f"{tmp_path / PART}: ", f"renamed to {CRC}.zip it is used",
                      f"{came} (that of CRC-VAL-HE-7K), expected {expected}", "it is removed"):
            assert words in str(refused.value) and server.asked[-1] == f"bytes={start}-"
        assert (tmp_path / PART).read_bytes() == other and not (tmp_path / f"{CRC}.zip").exists()


def test_nothing_is_lost_where_a_download_cannot_go_on(server, monkeypatch, tmp_path):
    part = tmp_path / PART
    part.write_bytes(server.files[f"{CRC}.zip"][:5_000])
    for owner, name, value, told in (
            (server, "ranges", False, "the server sends the whole file only"),
            (server, "files", {}, "HTTP Error 404"),
            (data, "_copy", lambda *args: Path("/dev/full").write_text("x"), ".*No space left")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"{part}: {told}"):
            patch.setattr(owner, name, value)
            download("crc", None, tmp_path)
        assert part.stat().st_size == 5_000
    other = FileLock(f"{part.with_suffix('')}.lock")
    with other, pytest.raises(OSError, match=".zip: another process"):
        download("crc", None, tmp_path)


def test_more_than_is_published_is_neither_fetched_nor_unpacked(server, monkeypatch, tmp_path):
    server.files[f"{CRC}.zip"], server.length = bytes(9_000_000), False
    (tmp_path / f"{data.PCAM[5:]}train_x.h5.gz").write_bytes(gzip.compress(bytes(9_000_000)))
    for ds, told in (("crc", f"{PART}: more than"), ("pcam", "train_x.h5.gz: more than")):
        monkeypatch.setitem(DATASETS[ds], "gb", 1e-3)
        with pytest.raises(OSError, match=f"{told} the 0.001 GB published"):
            download(ds, None, tmp_path)
    assert (tmp_path / PART).stat().st_size < 3_000_000
    assert not list(tmp_path.rglob("*.h5")) and not list(tmp_path.glob("*.unpacking"))


@pytest.mark.parametrize("bits, told", [(b"\1\0\0\0", "encrypted"), (b"\0\0c\0", "compression")])
def test_an_archive_that_cannot_be_read_leaves_nothing_half(bits, told, server, tmp_path):
    head = b"PK\1\2\x14\3\x14\0"  # of each member, before the bits of encryption and compression
    content, path = server.files[f"{CRC}.zip"], tmp_path / f"{CRC}.zip"
    path.write_bytes(content.replace(head + bytes(4), head + bits))
    with pytest.raises(OSError, match=f"{path}: .*{told}"):
        download("crc", None, tmp_path)
    assert set(os.listdir(tmp_path)) == {path.name, f"{path.name}.lock"}


@pytest.mark.parametrize("ds, owner, name", [
    ("crc", data.shutil, "copyfileobj"), ("pcam", data, "_copy")])
def test_a_stopped_unpacking_is_no_data_set(ds, owner, name, server, monkeypatch, tmp_path):
    def stopped(source, target, *args):  # halfway through a file
        if str(target.name).endswith(("LYM-000.tif", "train_x.h5")):
            target.write(source.read(100))
            raise KeyboardInterrupt
        return copy(source, target, *args)

    copy = getattr(owner, name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stopped)
        download(ds, None, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder or file .*({CRC}|train_x.h5)"):
        load_tiles(ds, "train", tmp_path)
    download(ds, None, tmp_path)
    assert len(load_tiles(ds, "train", tmp_path)) == {"crc": 72, "pcam": 24}[ds]
    assert not list(tmp_path.glob("*.unpacking"))
    assert len(server.asked) == len(DATASETS[ds]["archives"])  # the archive was not fetched again


def test_named_reports_are_fetched_on_download_alone(server, monkeypatch, tmp_path, capsys):
    path = tmp_path / "reports" / "text.txt"
    monkeypatch.setattr(data, "AUTHORS", server.url)
    monkeypatch.setitem(data.REPORTS, "authors:colon", "text.txt")
    with pytest.raises(FileNotFoundError, match=f"{path}: .* by --download, authors:colon"):
        load_reports("authors:colon", tmp_path)
    server.files["text.txt"], server.cut = b"Colon.\n\nAdenoma.\nAdenoma.\n", [10]
    with pytest.raises(OSError, match=f"{path}.part: broken off after 10 of 26 bytes"):
        download("my_tiles", "authors:colon", tmp_path)
    for _ in range(2):  # nothing is fetched twice
        download("my_tiles", "authors:colon", tmp_path)
    assert server.asked == ["bytes=0-", "bytes=10-"]
    assert load_reports("authors:colon", tmp_path) == ["Colon.", "Adenoma."]
    assert "CC BY-NC-ND" in capsys.readouterr().out

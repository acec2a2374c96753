"""The three published data sets from miniature archives in their real layout on a local server; named reports."""
import gzip
import hashlib
import io
import os
import random
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import data
import pairing
import train
from clipit import tile_transform
from data import DATASETS, clean_report, download, download_reports, find_bad_tiles, load_reports, load_tiles

h5py = pytest.importorskip("h5py")
CRC_PER_CLASS, TILES = 10, {"train": 24, "valid": 6, "test": 8}


# ---- Miniature archives, and a server that can break off ------------------------------------------------------------

def tif(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), "uint8")).save(file, "TIFF")
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def crc_zip(name: str, per_class: int) -> bytes:
    return zipped({f"{name}/{kind}/{kind}-{i:03}.tif": tif(i) for kind in DATASETS["crc"]["classes"]
                   for i in range(per_class)})


def bach_zip() -> bytes:
    photos = {f"ICIAR2018_BACH_Challenge/Photos/{kind}/{letters}{i:03}.tif": tif(i)
              for kind, letters in zip(DATASETS["bach"]["classes"], ("b", "is", "iv", "n")) for i in range(1, 101)}
    return zipped(photos | {"ICIAR2018_BACH_Challenge/Photos/microscopy_ground_truth.csv": b"b001.tif,Benign\n",
                            "ICIAR2018_BACH_Challenge/WSI/A01.svs": b"whole slide"})


def pcam_h5(part: str) -> tuple[bytes, np.ndarray]:
    (split, axis), file = part.split("_"), io.BytesIO()
    generator = np.random.default_rng(len(split))
    x = generator.integers(0, 256, (TILES[split], 96, 96, 3), "uint8")
    array = x if axis == "x" else (np.arange(TILES[split]) % 2).astype("uint8").reshape(-1, 1, 1, 1)
    with h5py.File(file, "w") as h5:
        h5[axis] = array
    return file.getvalue(), array


@pytest.fixture
def server(monkeypatch):
    """files: name -> bytes; cut: after how many bytes the next replies end; ranges: whether it knows them; asked: the
    Range of each request."""
    state = SimpleNamespace(files={}, cut=[], ranges=True, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content, wanted = state.files.get(self.path.split("?")[0].strip("/")), self.headers.get("Range")
            state.asked.append(wanted)
            if content is None:
                return self.send_error(404)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            if start and start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][:state.cut.pop(0) if state.cut else None])

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    yield state
    http.shutdown()
    http.server_close()


def serve(server, monkeypatch, ds, contents, counts=None) -> None:
    """Serve the archives of a row; url, md5, sizes and counts become those of the miniatures, all else stays."""
    for i, (archive, content) in enumerate(zip(DATASETS[ds]["archives"], contents)):
        name = archive["url"].split("?")[0].rsplit("/")[-1]
        server.files[name] = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
        monkeypatch.setitem(archive, "url", f"{server.url}/{name}?download=1")
        monkeypatch.setitem(archive, "md5", archive["md5"] and hashlib.md5(content).hexdigest())
        monkeypatch.setitem(archive, "gb", len(content) / 1e9)
        monkeypatch.setitem(archive, "disk_gb", len(content) / 1e9)
        if counts:
            monkeypatch.setitem(archive, "count", counts[i])


@pytest.fixture
def crc(server, monkeypatch):
    serve(server, monkeypatch, "crc", [crc_zip("NCT-CRC-HE-100K", CRC_PER_CLASS), crc_zip("CRC-VAL-HE-7K", 2)],
          [9 * CRC_PER_CLASS, 18])
    return server


@pytest.fixture
def pcam(server, monkeypatch):
    parts = ["train_x", "train_y", "valid_x", "valid_y", "test_x", "test_y"]
    serve(server, monkeypatch, "pcam", [pcam_h5(part)[0] for part in parts], [TILES[p.split("_")[0]] for p in parts])
    return server


def names(root) -> set[str]:
    return {path.name for path in root.iterdir()} if root.exists() else set()


# ---- The rows -------------------------------------------------------------------------------------------------------

def test_the_rows_hold_the_published_counts_and_classes_in_order():
    counts = {ds: [archive["count"] for archive in DATASETS[ds]["archives"]] for ds in ("crc", "bach", "pcam")}
    assert counts == {"crc": [100_000, 7_180], "bach": [400], "pcam": [262_144] * 2 + [32_768] * 4}
    for ds in counts:
        classes = DATASETS[ds]["classes"]
        assert classes == sorted(classes) and DATASETS[ds]["reports"] in data.REPORTS


@pytest.mark.parametrize("ds, ep, val_every", [("crc", 1, 0.1), ("pcam", 1, 0.1), ("bach", 100, 1.0)])
def test_the_rows_give_train_its_defaults(ds, ep, val_every):
    args = train.parse_args(["--ds", ds, "--model", "m", "--clip-model", "c"])
    assert (args.batch, args.ep, args.val_every, args.reports) == (64, ep, val_every, DATASETS[ds]["reports"])
    assert args.run == "model-m_clip-model-c"  # what the row gives is no difference


# ---- CRC ------------------------------------------------------------------------------------------------------------

def test_crc_is_fetched_and_split_by_class_into_80_20_and_the_other_archive(crc, tmp_path, capsys):
    download("crc", tmp_path)
    assert "CC BY 4.0" in capsys.readouterr().out
    splits = {split: load_tiles("crc", split, tmp_path) for split in ("train", "val", "test")}
    assert {split: Counter(tiles.labels) for split, tiles in splits.items()} == {
        "train": {i: 8 for i in range(9)}, "val": {i: 2 for i in range(9)}, "test": {i: 2 for i in range(9)}}
    assert not set(splits["train"].paths) & set(splits["val"].paths)
    assert all("CRC-VAL-HE-7K" in path for path in splits["test"].paths)
    assert splits["val"].paths == load_tiles("crc", "val", tmp_path).paths
    for path, label in zip(splits["train"].paths, splits["train"].labels):
        assert f"/{DATASETS['crc']['classes'][label]}/" in path
    assert find_bad_tiles(splits["test"]) == {} and splits["test"][0][0].size == (8, 6)
    crc.asked.clear()
    download("crc", tmp_path)
    assert crc.asked == []  # nothing is fetched twice


def test_a_tile_too_few_is_an_error_with_both_numbers(crc, tmp_path):
    download("crc", tmp_path)
    (tmp_path / "NCT-CRC-HE-100K/ADI/ADI-003.tif").unlink()
    with pytest.raises(ValueError, match="NCT-CRC-HE-100K: found 89 tiles, expected 90"):
        load_tiles("crc", "train", tmp_path)


# ---- BACH -----------------------------------------------------------------------------------------------------------

def test_bach_has_the_fixed_splits(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, "bach", [bach_zip()])
    download("bach", tmp_path)
    assert names(tmp_path / "ICIAR2018_BACH_Challenge") == {"Photos"}  # the slides are left in the archive
    train_, val, test = (load_tiles("bach", split, tmp_path) for split in ("train", "val", "test"))
    assert (len(train_), len(val), len(test)) == (254, 14, 132)
    assert len(set(train_.paths) | set(val.paths) | set(test.paths)) == 400
    assert Counter(train_.labels) + Counter(val.labels) == {0: 52, 1: 70, 2: 69, 3: 77}
    assert Counter(val.labels) == {0: 3, 1: 4, 2: 3, 3: 4} and Counter(test.labels) == {0: 48, 1: 30, 2: 31, 3: 23}
    # by name: ranges are half-open, over the sorted files; b001 and b041 open and close the first one
    assert [path.rsplit("/")[-1] for path in (val.paths[0], train_.paths[0], test.paths[0], test.paths[-1])] == \
        ["b001.tif", "b002.tif", "b042.tif", "n068.tif"]
    more = load_tiles("bach", "val", tmp_path, val_fraction=0.25)
    assert Counter(more.labels) == {0: 13, 1: 18, 2: 17, 3: 19}  # of all 268, round(69 / 4) = 17
    os.rename(tmp_path / "ICIAR2018_BACH_Challenge/Photos/Benign/b100.tif",
              tmp_path / "ICIAR2018_BACH_Challenge/Photos/Normal/b100.tif")
    with pytest.raises(ValueError, match="100 images in each class"):
        load_tiles("bach", "train", tmp_path)


def test_bach_without_a_known_md5_is_checked_by_the_zips_own_crc(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, "bach", [bach_zip()])
    content = bytearray(server.files["ICIAR2018_BACH_Challenge.zip"])
    content[20_000] ^= 1
    server.files["ICIAR2018_BACH_Challenge.zip"] = bytes(content)
    with pytest.raises(ValueError, match="not the published file and was removed.*zip .*tif"):
        download("bach", tmp_path)
    assert names(tmp_path) == set()


# ---- PCAM -----------------------------------------------------------------------------------------------------------

def test_pcam_tiles_are_those_of_the_arrays_with_any_number_of_workers(pcam, tmp_path):
    download("pcam", tmp_path)
    assert names(tmp_path) == {"pcam"} and len(names(tmp_path / "pcam")) == 6
    tiles = load_tiles("pcam", "val", tmp_path, transform=lambda image: torch.from_numpy(np.array(image)))
    x, y = pcam_h5("valid_x")[1], pcam_h5("valid_y")[1].reshape(-1)
    assert tiles.labels == y.tolist() and tiles.classes == ["no_tumor", "tumor"]
    assert tiles.paths[5] == f"{tmp_path}/pcam/camelyonpatch_level_2_split_valid_x.h5#5"
    for workers in (0, 2):  # 2 after 0: the workers inherit an open file, and must not use it
        images = torch.cat([images for images, _ in DataLoader(tiles, 2, num_workers=workers)])
        assert torch.equal(images, torch.from_numpy(x))
    assert find_bad_tiles(tiles) == {}
    assert [len(load_tiles("pcam", split, tmp_path)) for split in ("train", "test")] == [24, 8]
    held = load_tiles("pcam", "val", tmp_path, val_fraction=0.25)
    assert len(held) == 6 and all("train_x.h5#" in path for path in held.paths)


def test_an_hdf5_file_is_opened_once_per_process(pcam, tmp_path, monkeypatch):
    download("pcam", tmp_path)
    tiles, opened, original = load_tiles("pcam", "test", tmp_path), [], h5py.File
    data._open_h5.cache_clear()
    monkeypatch.setattr(h5py, "File", lambda *args: opened.append(os.getpid()) or original(*args))
    assert len([tiles[i] for i in range(8)]) == 8 and opened == [os.getpid()]
    pids = DataLoader(OpenedBy(tiles, opened), 1, num_workers=2, collate_fn=lambda batch: batch[0])
    for here, own in pids:
        assert here != os.getpid() and own == 1


class OpenedBy(torch.utils.data.Dataset):
    """(the process, how often it has opened the file) of each tile that is read."""

    def __init__(self, tiles, opened):
        self.tiles, self.opened = tiles, opened

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, index):
        self.tiles[index]
        return os.getpid(), self.opened.count(os.getpid())


def test_pcam_with_another_number_of_tiles_is_refused(pcam, tmp_path, monkeypatch):
    download("pcam", tmp_path)
    monkeypatch.setitem(DATASETS["pcam"]["archives"][2], "count", 32_768)
    with pytest.raises(ValueError, match="valid_x.h5: found 6 tiles, expected 32,768"):
        load_tiles("pcam", "val", tmp_path)


def test_pcam_without_h5py_says_what_to_install(pcam, tmp_path, monkeypatch):
    download("pcam", tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        load_tiles("pcam", "train", tmp_path)


def test_the_pairing_cache_notices_a_changed_hdf5_file(pcam, tmp_path):
    download("pcam", tmp_path)
    tower = torch.nn.Linear(1, 1)
    clip = pairing.Clip("c", 1, tower, tower, None, None)
    paths = load_tiles("pcam", "test", tmp_path).paths
    before = pairing.cache_key(clip, paths=paths)
    assert before == pairing.cache_key(clip, paths=paths)
    os.utime(paths[0].split("#")[0], (1, 1))
    assert pairing.cache_key(clip, paths=paths)["tile list"] != before["tile list"]


@pytest.mark.parametrize("ds", ["crc", "bach", "pcam"])
def test_limit_takes_a_stratified_share_of_every_data_set(ds, server, crc, pcam, monkeypatch, tmp_path):
    if ds == "bach":
        serve(server, monkeypatch, "bach", [bach_zip()])
    download(ds, tmp_path)
    args = train.parse_args(["--ds", ds, "--model", "m", "--clip-model", "c", "--data-dir", tmp_path, "--limit", 0.5])
    for split in train.SPLITS:
        whole = Counter(load_tiles(ds, split, tmp_path).labels)
        share = Counter(train.pick_tiles(split, args).labels)
        assert {label: round(count / 2) for label, count in whole.items()} == share


# ---- Downloads that go wrong ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_gone_on_from(ranges, crc, tmp_path):
    crc.cut, crc.ranges = [5_000, 6_000 if not ranges else 1_000], ranges
    content = crc.files["NCT-CRC-HE-100K.zip"]
    download("crc", tmp_path)
    assert (tmp_path / "NCT-CRC-HE-100K.zip").read_bytes() == content
    assert crc.asked == [None, "bytes=5000-", "bytes=6000-", None] and len(load_tiles("crc", "val", tmp_path)) == 18


def test_a_stopped_run_is_gone_on_from_by_the_next(crc, tmp_path):
    crc.cut = [5_000] + [0] * 5
    with pytest.raises(OSError, match="broke off after 5,000 of .* bytes .*; the same command goes on"):
        download("crc", tmp_path)
    assert names(tmp_path) == {"NCT-CRC-HE-100K.zip.part"}
    crc.asked.clear()
    download("crc", tmp_path)
    assert crc.asked[0] == "bytes=5000-" and len(load_tiles("crc", "train", tmp_path)) == 72


def test_a_whole_part_file_is_used(crc, tmp_path):
    (tmp_path / "NCT-CRC-HE-100K.zip.part").write_bytes(crc.files["NCT-CRC-HE-100K.zip"])
    download("crc", tmp_path)
    assert len(load_tiles("crc", "train", tmp_path)) == 72


def test_a_flipped_byte_is_refused_and_leaves_nothing_behind(crc, tmp_path):
    content = crc.files["NCT-CRC-HE-100K.zip"]
    crc.files["NCT-CRC-HE-100K.zip"] = content[:999] + bytes([content[999] ^ 1]) + content[1000:]
    with pytest.raises(ValueError, match="was removed .*md5 [0-9a-f]{32}, expected [0-9a-f]{32}"):
        download("crc", tmp_path)
    assert names(tmp_path) == set()
    crc.files["NCT-CRC-HE-100K.zip"] = content
    download("crc", tmp_path)


@pytest.mark.parametrize("member", ["../evil.tif", "NCT-CRC-HE-100K/../../evil.tif", "/tmp/evil.tif", "..\\evil.tif",
                                    "C:\\evil.tif", "link"])
def test_a_zip_that_reaches_out_of_its_folder_is_refused_unwritten(member, crc, monkeypatch, tmp_path):
    file = io.BytesIO(crc.files["NCT-CRC-HE-100K.zip"])
    with zipfile.ZipFile(file, "a") as archive:
        info = zipfile.ZipInfo(member)
        info.external_attr = (0o120777 if member == "link" else 0o100644) << 16
        archive.writestr(info, "/etc")
    serve(crc, monkeypatch, "crc", [file.getvalue()])
    root = tmp_path / "inner" / "data"
    with pytest.raises(ValueError, match="leaves the folder or is a link; nothing was unpacked"):
        download("crc", root)
    assert names(root) == {"NCT-CRC-HE-100K.zip"} and names(tmp_path / "inner") == {"data"}


def test_an_unpacking_that_was_stopped_is_no_data_set(crc, monkeypatch, tmp_path):
    def stopped(self, member, path, calls=[]):
        calls.append(member)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(self, member, path)

    original = zipfile.ZipFile.extract
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "extract", stopped)
        download("crc", tmp_path)
    with pytest.raises(FileNotFoundError, match="NCT-CRC-HE-100K is missing"):
        load_tiles("crc", "train", tmp_path)
    download("crc", tmp_path)
    assert len(load_tiles("crc", "train", tmp_path)) == 72 and not any("unpacking" in name for name in names(tmp_path))


def test_a_full_disk_is_found_before_anything_is_fetched(crc, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="GB free, .* GB needed"):
        download("crc", tmp_path)
    assert crc.asked == [] and names(tmp_path) == set()


def test_a_gz_that_breaks_midway_is_gone_on_from(pcam, tmp_path):
    pcam.cut = [10_000, 20_000]
    download("pcam", tmp_path)
    assert pcam.asked[:3] == [None, "bytes=10000-", "bytes=30000-"]
    assert (tmp_path / "pcam/camelyonpatch_level_2_split_train_x.h5").read_bytes() == pcam_h5("train_x")[0]


def test_a_gz_that_stays_broken_leaves_no_h5_and_the_next_run_begins_anew(pcam, tmp_path):
    pcam.cut = [10_000] + [0] * 5
    with pytest.raises(OSError, match="broke off after 10,000"):
        download("pcam", tmp_path)
    assert {name.endswith(".part") for name in names(tmp_path / "pcam")} == {True}
    pcam.asked.clear()
    download("pcam", tmp_path)
    assert pcam.asked[0] is None and len(load_tiles("pcam", "train", tmp_path)) == 24


@pytest.mark.parametrize("spoil", [lambda gz: gz[:-2000], lambda gz: gz[:500] + b"\xff" * 50 + gz[550:],
                                   lambda gz: gzip.compress(b"another file")])
def test_a_gz_that_is_cut_broken_or_another_is_refused(spoil, pcam, tmp_path):
    name = "camelyonpatch_level_2_split_train_x.h5.gz"
    pcam.files[name] = spoil(pcam.files[name])
    with pytest.raises(ValueError, match="was removed"):
        download("pcam", tmp_path)
    assert names(tmp_path / "pcam") == set()


def test_a_missing_page_says_so_at_once(crc, tmp_path):
    del crc.files["NCT-CRC-HE-100K.zip"]
    with pytest.raises(OSError, match="the server answers 404"):
        download("crc", tmp_path)
    assert len(crc.asked) == 1


@pytest.mark.parametrize("ds, told", [
    ("crc", ["CRC-VAL-HE-7K/{ADI,BACK,DEB,LYM,MUC,MUS,NORM,STR,TUM}/*.tif (7,180)", "CC BY 4.0", "12.5 GB"]),
    ("bach", ["ICIAR2018_BACH_Challenge/Photos/{Benign,InSitu,Invasive,Normal}/*.tif (400)", "CC BY-NC-ND", "10.4 GB"]),
    ("pcam", ["pcam/camelyonpatch_level_2_split_valid_x.h5 (32,768)", "CC0", "9.1 GB at most"])])
def test_without_download_a_missing_data_set_says_what_to_get(ds, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "urlopen", lambda *args, **kwargs: pytest.fail("nothing is fetched unasked"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--ds", ds, "--model", "m", "--clip-model", "c", "--data-dir",
                                      str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        train.cli()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "none").exists()
    for words in [*told, "--download", "https://zenodo.org/records/", str(tmp_path / "none")]:
        assert words in message


# ---- Reports --------------------------------------------------------------------------------------------------------

def git_id(content: bytes) -> str:
    return "blob:" + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_the_authors_reports_are_the_file_of_that_git_id_or_none(server, monkeypatch, tmp_path, capsys):
    assert git_id(b"") == "blob:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's own id of an empty file
    content = b"Colon: adenocarcinoma.\n\nColon: adenoma.\nColon: adenoma.\n"
    server.files["text.txt"] = content
    files = [("text.txt", f"{server.url}/text.txt", git_id(content))]
    monkeypatch.setitem(data.REPORTS, "authors:colon", (files, "L!", None))
    with pytest.raises(FileNotFoundError, match="authors:colon: .*text.txt is missing; --download fetches"):
        load_reports("authors:colon", tmp_path)
    assert server.asked == []
    server.files["text.txt"] = content + b"more"
    with pytest.raises(ValueError, match="blob [0-9a-f]{40}, expected [0-9a-f]{40}"):
        download_reports("authors:colon", tmp_path)
    assert names(tmp_path / "reports") == set()
    server.files["text.txt"] = content
    download_reports("authors:colon", tmp_path)
    assert load_reports("authors:colon", tmp_path) == ["Colon: adenocarcinoma.", "Colon: adenoma.", "Colon: adenoma."]
    told = capsys.readouterr().out
    assert "L!" in told and "authors:colon: 3 reports (1 duplicates), 1 empty left out" in told
    (tmp_path / "reports/text.txt").write_text("changed\nby hand\n")
    with pytest.raises(ValueError, match="expected"):
        load_reports("authors:colon", tmp_path)


def test_tcga_reports_are_those_of_the_cancer_type(server, monkeypatch, tmp_path):
    table = ('patient_filename,text\nTCGA-AA-0001.11aa,"Colon,\n resected."\nTCGA-BB-0002.22,Breast.\n'
             'TCGA-AA-0003.3,Cecum.\n')
    types = "patient_id,cancer_type\nTCGA-AA-0001,COAD\nTCGA-BB-0002,BRCA\nTCGA-AA-0003,COAD\nTCGA-CC-0004,READ\n"
    server.files |= {"r.zip": zipped({"__MACOSX/._TCGA_Reports.csv": b"", "TCGA_Reports.csv": table.encode()}),
                     "t.csv": types.encode()}
    files = [("r.zip", f"{server.url}/r.zip", git_id(server.files["r.zip"])), ("t.csv", f"{server.url}/t.csv",
                                                                               f"size:{len(types)}")]
    for source in ("tcga:colon", "tcga:breast"):
        monkeypatch.setitem(data.REPORTS, source, (files, "MIT", data.REPORTS[source][2]))
    download_reports("tcga:colon", tmp_path)
    assert load_reports("tcga:colon", tmp_path) == ["Colon, resected.", "Cecum."]
    with pytest.raises(ValueError, match="1 distinct report"):
        load_reports("tcga:breast", tmp_path)


@pytest.mark.parametrize("raw, clean", [
    ("Invasive ductal carcinoma, 1.2 cm, grade II/III, pT1c N1 (1/11).",) * 2,
    ("I saw 1 ill | lil polyp in ileum; ER: +++, PR: ---, Ki-67 < 1%.",) * 2,
    ("Stage IIII, levels 1111 and llll", "Stage IIII, levels 1111 and llll"),
    ("Redacted IIIIIIII1111lll|| Colon", "Redacted Colon"),
    ("Name:______ Date: ____________ signed", "Name: Date: signed"),
    ("or present. --- End of report", "or present. --- End of report"),
    ("page . ;:;. ,- - - - -------- two", "page two"),
    ("end.......next", "end. next"),
    ("a\x00b\x0cc\ttab\x1f  d\ufffde", "a b c tab d e"),
    ("naïve µm ≥ 3", "naïve µm ≥ 3"),
    ("IIIIIII ..... |||||", "")])
def test_the_cleaner_takes_runs_of_noise_and_leaves_words(raw, clean):
    assert clean_report(raw) == clean and clean_report(clean) == clean


def test_reports_are_cleaned_on_demand_alone_and_emptied_ones_left_out(tmp_path, capsys):
    (tmp_path / "r.txt").write_text("IIIIIIII\nColon  _____ 1 cm\nileum\n")
    assert load_reports(tmp_path / "r.txt") == ["IIIIIIII", "Colon  _____ 1 cm", "ileum"]
    assert load_reports(tmp_path / "r.txt", clean=True) == ["Colon 1 cm", "ileum"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("2 reports (0 duplicates), 1 empty left out")


# ---- Augmentation ---------------------------------------------------------------------------------------------------

def test_the_authors_augmentation_depends_on_seed_epoch_and_tile_alone(world):
    transform = tile_transform(32, **train.AUTHORS_PCAM)
    tiles = load_tiles(world / "tiles", "train", transform=transform)
    augmented = train.Augmented(tiles, seed=3)

    def epoch(number, workers, batch):
        augmented.epoch = number
        state = torch.get_rng_state()
        images = torch.cat([images for images, _ in DataLoader(augmented, batch, num_workers=workers)])
        torch.set_rng_state(state)
        return images

    first = epoch(0, 0, 4)
    torch.manual_seed(random.randrange(1000))
    assert torch.equal(first, epoch(0, 2, 5)) and torch.equal(first, epoch(0, 0, 1))
    assert not torch.equal(first, epoch(1, 0, 4))
    assert not torch.equal(first[0], train.Augmented(tiles, seed=4)[0][0])
    plain = torch.stack([image for image, _ in tiles])
    assert first.shape == plain.shape and not torch.equal(first, plain)
    state = torch.get_rng_state()
    augmented[0]
    assert torch.equal(state, torch.get_rng_state())  # nothing else is drawn differently for it


def test_the_augmentation_has_the_authors_numbers(world):
    tiles = load_tiles(world / "tiles", "train", transform=tile_transform(32, **train.AUTHORS_PCAM))
    original = train.AUTHORS_PCAM_CHANGES.transforms
    flips = original[:2]
    assert [type(change) for change in original] == [v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.ColorJitter]
    assert [flip.p for flip in flips] == [0.5, 0.5]
    jitter = original[2]
    assert tuple(jitter.brightness) == tuple(jitter.contrast) == tuple(jitter.saturation) == (0.5, 1.5)
    assert tuple(jitter.hue) == (-0.05, 0.05)
    assert tiles.transform.transforms[1].interpolation.value == "bicubic"

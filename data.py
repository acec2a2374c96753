"""Tiles with labels, their splits, and reports: everything that CLIP-IT reads from disk.

    from data import load_reports, load_tiles
    train, val = load_tiles("my_tiles", "train"), load_tiles("my_tiles", "val")
    image, label = train[0]                # PIL RGB image, int
    reports = load_reports("reports.txt")  # one report a line

Travels alone. A data set is a row of DATASETS or a folder with train/ and test/, each a folder of
class folders (my_tiles/train/CLASS/*.png); val/ is optional, otherwise it is a fifth of train,
stratified by class. Nothing goes online but download(). Tiles and reports meet only in pairing.py,
and labels never get there. References: archives, layouts and BACH's ranges are those of kaiko-eva,
the splits those of the authors' loaders.
"""
import csv
import gzip
import hashlib
import json
import os
import shutil
import time
import zipfile
import zlib
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

VAL_FRACTION = 0.2  # of the training tiles of every class, where a folder has no val/
SPLIT_SEED = 42  # the run's seed does not move that split, so that runs stay comparable


class Tiles(torch.utils.data.Dataset):
    """Tiles by path: item i is (transform(PIL RGB image), int label)."""

    def __init__(self, paths, labels, classes, transform=None):
        self.paths, self.labels, self.classes = list(paths), list(labels), list(classes)
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_tile(self.paths[index])
        return (self.transform(image) if self.transform else image), self.labels[index]

    def take(self, indices) -> "Tiles":
        """The tiles at `indices`, in that order."""
        paths, labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        return Tiles(paths, labels, self.classes, self.transform)

    def with_transform(self, transform) -> "Tiles":
        """The same tiles through another transform."""
        return Tiles(self.paths, self.labels, self.classes, transform)


def load_tiles(ds, split, root="data", transform=None, val_fraction=None) -> Tiles:
    """The tiles of one split.

    ds: a key of DATASETS or a folder; split: "train", "val" or "test"; root: where downloaded data
    sets lie; val_fraction: this share of the training tiles, stratified by class, is the validation
    split instead of the data set's own. Raises FileNotFoundError, ValueError.
    """
    folder, read = dataset_folder(ds, root), READERS.get(ds, _read_folder)
    if split == "test":
        samples, classes = read(folder, "test")  # [(path, label)], names
        return Tiles(*zip(*samples), classes, transform)
    train, classes = read(folder, "train")
    val = [] if val_fraction else read(folder, "val")[0]
    if not val:
        labels = [label for _, label in train]
        kept, held = stratified_split(labels, val_fraction or VAL_FRACTION, SPLIT_SEED)
        if ds == "bach" and not val_fraction:  # the authors validate on every 20th training image
            held = range(0, len(train), 20)
            kept = [i for i in range(len(train)) if i % 20]
        train, val = [train[i] for i in kept], [train[i] for i in held]
        if not val:
            raise ValueError(f"{folder}: one tile a class leaves none for validation; add a val/")
    return Tiles(*zip(*(train if split == "train" else val)), classes, transform)


def stratified_split(labels, fraction, seed) -> tuple[list[int], list[int]]:
    """(kept, held) indices: `fraction` of every class is held, rounded, at random by seed. A class
    of two tiles or more has at least one on each side; a single tile is kept."""
    held = []
    for members in _shuffled_classes(labels, seed):
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held += members[:count]
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


def draw_shots(labels, shots, seed) -> list[int]:
    """Indices of `shots` tiles of every class (all of a class with fewer), at random by seed."""
    return sorted(i for members in _shuffled_classes(labels, seed) for i in members[:shots])


def _shuffled_classes(labels, seed):
    """The indices of each class, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        order = torch.randperm(len(members), generator=generator).tolist()
        yield [members[j] for j in order]


class TileError(ValueError):
    """A tile that cannot be read. A worker of DataLoader hands it on with its traceback for a text,
    the last line of which says what is wrong."""

    def __str__(self):
        return super().__str__().rpartition("TileError: ")[2].strip()


def read_tile(path) -> Image.Image:
    """One tile as PIL RGB; FILE.h5#17 is number 17 of that file's array x, (N, 96, 96, 3) uint8.
    Raises TileError with the path where the file is truncated or no image."""
    file, hdf5, number = str(path).rpartition(".h5#")
    try:
        if hdf5:
            return Image.fromarray(_open_h5(f"{file}.h5", os.getpid())["x"][int(number)])
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises of all kinds, each format its own
        raise TileError(f"{path}: not a readable image ({error}); mend or remove it") from None


@lru_cache(None)
def _open_h5(path: str, process: int):
    """The HDF5 file, opened once in each process: no worker may read through an inherited one."""
    import h5py  # here, because only PCAM needs it
    return h5py.File(path, "r")


# ---- Reports ------------------------------------------------------------------------------------

# Reports by name: file, url, git's blob id of it. The address is known by repository and commit and
# was not tried. BACH's text is a guess, since theirs is not published. (TCGA_Reports.csv of Kefeli
# and Tatonetti has a column `text`, so --reports reads it as it is.)
AUTHORS = "https://github.com/BanafshehKarimian/ModalityPairing/raw/4f2bed7/text"
REPORTS = {
    "authors:colon": ("text_colo.txt", f"{AUTHORS}/text_colo.txt",
                      "blob:813e61188db6f4772bb8439c561d668729cf0f6a"),
    "authors:breast": ("text_breast.txt", f"{AUTHORS}/text_breast.txt",
                       "blob:9bd8116c9043f10a5ed38831e7fde089dd19d004"),
}
REPORTS_LICENCE = "none stated; made from Lab-Rasool/TCGA (CC BY-NC-ND 4.0), do not redistribute"


def load_reports(source, root="data") -> list[str]:
    """Reports as a list of distinct strings: a .txt with one report a line, a .csv or .jsonl with a
    column `text`, a folder of .txt files, one report each, or a key of REPORTS below `root`.

    Equal reports are merged, so that no two can tie in the pairing; empty ones are left out.
    Raises FileNotFoundError or ValueError: missing, not UTF-8 text, no text column, fewer than two.
    """
    path = Path(source)
    if source in REPORTS:
        name, url, expected = REPORTS[source]
        path = Path(root, "reports", name)
        if not path.exists() or _checksum(path, expected) != expected:
            raise FileNotFoundError(f"--reports {source}: {path} is missing or another file; remove "
                                    f"it, and --download fetches {url}\n(licence: {REPORTS_LICENCE})")
    if not path.exists():
        raise FileNotFoundError(f"--reports {source}: no such file; expected .txt (a report a line)"
                                f", .csv, .jsonl, a folder of .txt, or {', '.join(REPORTS)}")
    try:
        lines = [text.strip() for text in _read_reports(path)]
    except (ValueError, csv.Error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--reports {path}: not UTF-8 text with a report a line or, in .csv and "
                         f".jsonl, a column `text` ({type(error).__name__}: {error})") from None
    reports = list(dict.fromkeys(line for line in lines if line))
    if len(reports) < 2 or any("\0" in report for report in reports):
        raise ValueError(f"--reports {path}: {len(reports)} distinct report(s) in it, or zero bytes;"
                         " pairing needs two or more (a .txt holds one report a line)")
    print(f"{source}: {len(reports)} reports, {len(lines) - len(reports)} empty or equal left out")
    return reports


def _read_reports(path: Path) -> list[str]:
    if path.is_dir():
        return [" ".join(file.read_text("utf-8-sig").split()) for file in sorted(path.glob("*.txt"))]
    if path.suffix == ".csv":
        csv.field_size_limit(2 ** 31 - 1)  # its own limit is 131,072 characters
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]
    lines = path.read_text("utf-8-sig").removesuffix("\n").split("\n")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in lines if line.strip()]
    return lines


# ---- The published data sets --------------------------------------------------------------------

def _zenodo(file: str, to: str, md5: str, gb: float, count: int) -> dict:
    """An archive: where it is, the path it is unpacked to, its md5 and GB, the tiles it holds."""
    url = f"https://zenodo.org/records/{file}?download=1"
    return dict(url=url, to=to, md5=md5, gb=gb, count=count)


def _pcam(part: str, md5: str, gb: float, count: int) -> dict:
    name = f"camelyonpatch_level_2_split_{part}.h5"
    return _zenodo(f"2546921/files/{name}.gz", f"pcam/{name}", md5, gb, count)


HERE = Path(__file__).resolve().parent
TISSUES = ["adipose tissue", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
           "normal colon mucosa", "cancer-associated stroma",
           "colorectal adenocarcinoma epithelium"]
# One row a data set: the folder of its splits or the archives that --download fetches, the classes
# and their names in words (prompts), and the defaults of train.py's flags where they differ.
DATASETS = {
    "demo": dict(
        title="the demo's rendered tiles, which show no tissue", licence="MIT",
        root=HERE / "tests/demo", prompts=TISSUES,
        defaults=dict(reports=f"{HERE}/tests/demo/reports.txt", shots=60, batch=32, worker=0,
                      clip_model=f"local-dir:{HERE}/tests/demo/clip", lora_text=0,
                      model=f"local-dir:{HERE}/tests/demo/backbone")),
    "crc": dict(  # the authors train for one epoch and validate ten times in it
        title="NCT-CRC-HE-100K and CRC-VAL-HE-7K", licence="CC BY 4.0", prompts=TISSUES,
        classes=["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"],
        defaults=dict(reports="authors:colon", ep=1, val_every=0.1),
        archives=[
            _zenodo("1214456/files/NCT-CRC-HE-100K.zip", "NCT-CRC-HE-100K",
                    "6fd702d11df6292bc054397ae038a464", 11.7, 100_000),
            _zenodo("1214456/files/CRC-VAL-HE-7K.zip", "CRC-VAL-HE-7K",
                    "2fd1651b4f94ebd818ebf90ad2b6ce06", 0.8, 7_180)]),
    "bach": dict(  # the authors' default of one epoch is 4 steps here; their later code has 100
        title="BACH (ICIAR 2018)", licence="CC BY-NC-ND 4.0",
        classes=["Benign", "InSitu", "Invasive", "Normal"],
        prompts=["benign breast tissue", "breast carcinoma in situ", "invasive breast carcinoma",
                 "normal breast tissue"],
        defaults=dict(reports="authors:breast", ep=100),
        archives=[_zenodo("3632035/files/ICIAR2018_BACH_Challenge.zip",
                          "ICIAR2018_BACH_Challenge/Photos", "8ae1801334aa943c44627c1eef3631b2",
                          10.4, 400)]),
    "pcam": dict(
        title="PatchCamelyon", licence="CC0", classes=["no_tumor", "tumor"],
        prompts=["normal lymph node tissue", "a lymph node metastasis of breast cancer"],
        defaults=dict(reports="authors:breast", ep=1, val_every=0.1),
        archives=[
            _pcam("train_x", "1571f514728f59376b705fc836ff4b63", 6.4, 262_144),
            _pcam("train_y", "35c2d7259d906cfc8143347bb8e05be7", 0, 262_144),
            _pcam("valid_x", "d5b63470df7cfa627aeec8b9dc0c066e", 0.8, 32_768),
            _pcam("valid_y", "2b85f58b927af9964a4c15b8f7e8f179", 0, 32_768),
            _pcam("test_x", "d8c2d60d490dbd479f8199bdfa0cf6ec", 0.8, 32_768),
            _pcam("test_y", "60a7035772fbdb7f34eb86d4420cf66a", 0, 32_768)]),
}
# kaiko-eva's patient-disjoint training images of BACH, half-open ranges over the sorted files;
# the other 132, its "val", are the test split here, as in the authors' code
BACH_TRAIN = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))


def dataset_folder(ds, root="data") -> Path:
    """The folder of a data set's splits; looks at no tile. Raises FileNotFoundError with the
    choices or, where a download is missing, what it is and where it is expected."""
    row = DATASETS.get(ds, {})
    archives = row.get("archives", [])
    for archive in archives:
        if not Path(root, archive["to"]).exists():
            raise FileNotFoundError(
                f"--ds {ds}: {Path(root, archive['to'])} is missing; --download fetches "
                f"{row['title']} ({sum(other['gb'] for other in archives):.1f} GB, licence "
                f"{row['licence']})\nfrom {archive['url'].rpartition('/files')[0]}, or --data-dir "
                "tells where it lies")
    if archives:
        return Path(root)
    folder = Path(row.get("root", ds))
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(f"--ds {ds}: no folder {folder / split}; expected one of "
                                    f"{', '.join(DATASETS)}, or a folder with train/ and test/ (val/ "
                                    "is optional) of class folders")
    return folder


# The readers: (folder, split) -> [(path, label)], classes; an empty "val" where there is none

def _read_folder(folder: Path, split: str):
    if split == "train":
        return _class_folder(folder / "train", None)
    classes = _class_folder(folder / "train", None)[1]
    return _class_folder(folder / split, classes) if (folder / split).is_dir() else ([], classes)


def _read_crc(folder: Path, split: str):
    classes = DATASETS["crc"]["classes"]
    if split == "val":
        return [], classes
    archive = DATASETS["crc"]["archives"][split == "test"]
    return _counted(_class_folder(folder / archive["to"], classes)[0], folder, archive), classes


def _read_bach(folder: Path, split: str):
    archive, classes = DATASETS["bach"]["archives"][0], DATASETS["bach"]["classes"]
    samples = _counted(_class_folder(folder / archive["to"], classes)[0], folder, archive)
    if [label for _, label in samples] != [i // 100 for i in range(400)]:
        raise ValueError(f"{folder / archive['to']}: expected 100 images in each class; otherwise "
                         "the ranges of the splits mean other images")
    train = [i for first, end in BACH_TRAIN for i in range(first, end)]
    splits = {"train": train, "val": [], "test": sorted(set(range(400)) - set(train))}
    return [samples[i] for i in splits[split]], classes


def _read_pcam(folder: Path, split: str):
    arrays = {}
    for archive in DATASETS["pcam"]["archives"]:
        if f"split_{'valid' if split == 'val' else split}_" in archive["to"]:
            file = _open_h5(str(folder / archive["to"]), os.getpid())
            axis = archive["to"][-4]  # x: (N, 96, 96, 3), y: (N, 1, 1, 1), uint8
            arrays[axis] = _counted(file[axis], folder, archive)
    path, labels = arrays["x"].file.filename, arrays["y"][:].reshape(-1).tolist()
    return [(f"{path}#{i}", label) for i, label in enumerate(labels)], DATASETS["pcam"]["classes"]


READERS = {"crc": _read_crc, "bach": _read_bach, "pcam": _read_pcam}


def _counted(samples, folder: Path, archive: dict):
    """The samples, if they are as many as published (ValueError)."""
    if len(samples) != archive["count"]:
        raise ValueError(f"{folder / archive['to']}: found {len(samples):,} tiles, expected "
                         f"{archive['count']:,}; remove it and fetch it again with --download")
    return samples


def _class_folder(folder: Path, classes):
    """[(path, label)] and class names of a folder of class folders, in torchvision's order."""
    names = sorted(entry.name for entry in folder.iterdir()
                   if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2 or names != (classes or names):
        raise ValueError(f"{folder}: its class folders are {names}; expected two or more, the same "
                         f"in every split{f': {classes}' if classes else ''}")
    try:
        labels = {name: label for label, name in enumerate(names)}
        return make_dataset(folder, labels, IMG_EXTENSIONS), names
    except FileNotFoundError as error:  # torchvision names the class without an image
        raise ValueError(f"{folder}: {error}") from None


# ---- Downloads: on --download alone -------------------------------------------------------------

def download(ds, reports, root="data") -> None:
    """Fetch what is missing of a data set and of reports with a name below `root`.

    Raises OSError for a full disk or a broken connection (the same call goes on from there) and
    ValueError for a file that is not the published one, which is kept under its .part name.
    """
    row, root = DATASETS.get(ds, {}), Path(root)
    for archive in row.get("archives", []):
        if not (root / archive["to"]).exists():
            print(f"{archive['url']} to {root / archive['to']}; licence: {row['licence']}")
            packed = root / archive["url"].partition("?")[0].rpartition("/")[2]
            if not packed.exists():
                _fetch(archive["url"], packed, f"md5:{archive['md5']}")
            _unpack(packed, root, archive["to"])
            print(f"{packed} is no longer needed")
    if reports in REPORTS:
        name, url, expected = REPORTS[reports]
        if not (path := root / "reports" / name).exists():
            print(f"{url} to {path}; licence: {REPORTS_LICENCE}")
            _fetch(url, path, expected)


def _fetch(url: str, path: Path, expected: str, tries: int = 5) -> None:
    """Download to path.part, which becomes `path` once its checksum is the expected one. A .part is
    gone on from. Raises OSError after `tries` breaks in a row that brought no new byte."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    breaks = 0
    while breaks < tries:
        start, reason = part.stat().st_size, "the server closed the connection"
        try:
            if _append(url, part):
                break
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError) and error.code == 416:  # nothing beyond what is here
                break
            if isinstance(error, HTTPError) and error.code in (401, 403, 404, 410):
                raise OSError(f"{url}: the server answers {error.code} {error.reason}") from None
            reason = error
        breaks = 0 if part.stat().st_size > start else breaks + 1
        time.sleep(2 ** breaks)
    else:
        raise OSError(f"{url}: broke off after {start:,} bytes ({reason}); the same command goes "
                      "on")
    if (checksum := _checksum(part, expected)) != expected:
        raise ValueError(f"{url}: what came has {checksum}, expected {expected}\nit is kept as "
                         f"{part}; remove it, or rename it to {path.name} to use it all the same")
    os.replace(part, path)


def _append(url: str, part: Path) -> bool:
    """Ask for what is missing behind the bytes of `part` and add it; whether all of it came."""
    start = part.stat().st_size
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urlopen(request, timeout=60) as reply:
        if reply.status != 206:  # the whole file: so it was asked, or the server knows no ranges
            start = 0
        length = reply.headers["Content-Length"]
        total = start + int(length) if length else None
        bar = dict(desc=part.stem, initial=start, total=total, miniters=1, disable=None)
        with open(part, "ab" if start else "wb") as file, \
                tqdm.wrapattr(reply, "read", **bar) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    return total is None or part.stat().st_size == total


def _checksum(path: Path, expected: str) -> str:
    """md5:HEX of the file or, where a blob is expected, blob:HEX: git's id, the sha1 of
    "blob SIZE", a zero byte and the content."""
    kind = expected.partition(":")[0]
    digest = hashlib.md5() if kind == "md5" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def _unpack(archive: Path, root: Path, to: str) -> None:
    """`to` of a .zip, or the file of a .gz, to root/to by way of a temporary name, so that it is
    whole or not there. zipfile strips what leads out of a folder ("..", /) and makes no links."""
    temporary = archive.with_name(archive.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    (root / to).parent.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix == ".gz":
            with gzip.open(archive) as packed, open(temporary, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            os.replace(temporary, root / to)
            return
        with zipfile.ZipFile(archive) as zipped:
            members = [name for name in zipped.namelist() if name.startswith(f"{to}/")]
            for member in tqdm(members, f"unpack {archive.name}", leave=False, disable=None):
                zipped.extract(member, temporary)
        os.replace(temporary / to, root / to)
        shutil.rmtree(temporary)
    except (zipfile.BadZipFile, EOFError, zlib.error, FileNotFoundError) as error:
        raise ValueError(f"{archive}: no {to} could be unpacked from it ({error}); remove it, and "
                         "--download fetches it again") from None

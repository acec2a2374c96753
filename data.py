"""Tiles with labels, their splits, and reports: everything that CLIP-IT reads from disk.

    from data import load_reports, load_tiles
    train, val = load_tiles("my_tiles", "train"), load_tiles("my_tiles", "val")
    image, label = train[0]                # PIL RGB image, int
    reports = load_reports("reports.txt")  # one report a line

A data set is a row of DATASETS or a folder with train/, test/ and perhaps val/, each of class
folders. Layouts and BACH's split are kaiko-eva's, the other splits the authors'. Travels alone.
"""
import csv
import errno
import gzip
import json
import os
import shutil
import zipfile
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from urllib.request import HTTPError, Request, urlopen

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm


class Tiles(torch.utils.data.Dataset):
    """Tiles by path: item i is (transform(PIL RGB image), int label). Raises TileError."""

    def __init__(self, paths, labels, classes, transform=None):
        self.paths, self.labels, self.classes, self.transform = paths, labels, classes, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = str(self.paths[index])
        file, _, number = path.rpartition("#")
        try:
            if file.endswith(".h5"):  # FILE.h5#17 is number 17 of its x, (N, 96, 96, 3) uint8
                image = Image.fromarray(_open_h5(file, os.getpid())["x"][int(number)])
            else:
                with Image.open(path) as opened:
                    image = to_rgb(opened)
        except Exception as error:  # PIL raises of all kinds, each format its own
            raise TileError(f"{path}: not a readable image ({error}); mend or remove it") from None
        return (self.transform(image) if self.transform else image), self.labels[index]

    def take(self, indices) -> "Tiles":
        paths, labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        return Tiles(paths, labels, self.classes, self.transform)

    def with_transform(self, transform) -> "Tiles":
        return Tiles(self.paths, self.labels, self.classes, transform)


def load_tiles(ds, split, root="data", transform=None) -> Tiles:
    """The tiles of "train", "val" or "test". ds: a folder, or a key of DATASETS, below `root`;
    without a val/, a fifth of every class in train/ is "val". Raises OSError, ValueError."""
    row, folder = DATASETS.get(ds, {}), dataset_folder(ds, root)
    archives = row.get("archives") or {name: (name, "", None) for name in SPLITS}
    whole = split == "test" or ("val" in archives and (folder / archives["val"][0]).exists())
    to, _, count = archives[split if whole else "train"]
    part, classes = folder / to, row.get("classes") or find_classes(folder / "train")[0]
    if part.suffix == ".h5":
        files = {"x": str(part), "y": str(folder / archives[f"{split}_y"][0])}
        x, y = (_open_h5(file, os.getpid())[axis] for axis, file in files.items())
        paths, labels = [f"{part}#{i}" for i in range(len(x))], y[:].flatten().tolist()
    else:
        names, _ = find_classes(part)
        if names != classes or len(names) < 2:
            raise ValueError(f"{part}: class folders {names[:20]}; every split needs the same two "
                             f"or more: {classes[:20]}")
        folders = {str(part / name): label for label, name in enumerate(names)}
        paths, labels = zip(*make_dataset("", folders, IMG_EXTENSIONS))
        if part.name == split:  # a user's folder, and once
            others = sum(len(x) for _, _, x in os.walk(part, followlinks=True)) - len(paths)
            if others:
                print(f"{others} files in {part} are not CLASS/*{' *'.join(IMG_EXTENSIONS)}")
    if count and not count == len(paths) == len(labels):
        raise ValueError(f"{part}: {len(paths)} tiles, {len(labels)} labels, expected {count}; "
                         "remove it, and --download fetches it again")
    indices = row["splits"][split] if "splits" in row else range(len(paths))
    if not whole:
        kept, held = stratified_split(labels, 0.2, seed=42)  # not the run's: runs stay comparable
        if not held:
            raise ValueError(f"{folder}: one tile a class leaves none for validation; add a val/")
        indices = held if split == "val" else kept
    return Tiles(paths, labels, classes, transform).take(indices)


def stratified_split(labels, fraction, seed) -> tuple[list[int], list[int]]:
    """(kept, held) indices: `fraction` of every class is held by seed, one or more, but not all."""
    sizes = Counter(labels)
    held = [i for i in draw_shots(labels, fraction, seed) if sizes[labels[i]] > 1]
    return sorted(set(range(len(labels))) - set(held)), held


def draw_shots(labels, shots, seed) -> list[int]:
    """Indices of `shots` tiles of every class or, below 1, of that share, at least one; by seed."""
    labels, generator, drawn = torch.tensor(labels), torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        share = max(min(round(shots * len(members)), len(members) - 1), 1)
        drawn += members[order][:shots if shots >= 1 else share].tolist()
    return sorted(drawn)


def warn_of_repeated_tiles(tiles: dict[str, Tiles]) -> None:
    """Print how many tiles of all splits are another one's file, links followed."""
    files = [os.path.realpath(path) for part in tiles.values() for path in part.paths]
    if repeated := len(files) - len(set(files)):
        print(f"warning: {repeated} of {len(files)} tiles are another tile's file")


def tile_side(tiles: Tiles) -> int | None:
    """Pixels of a tile's side: the commonest of 1,000 tiles; None where they are not square."""
    sizes = Counter(Image.open(path).size for path in tiles.paths[::-(-len(tiles) // 1000)])
    width, height = sizes.most_common(1)[0][0]
    if len(sizes) > 1:
        print(f"tiles of {len(sizes)} sizes; the commonest, {width} x {height}, counts")
    return width if width == height else None


class TileError(ValueError):
    """A tile that cannot be read. Workers of DataLoader put a traceback before its text."""

    def __str__(self):
        return super().__str__().rpartition("TileError: ")[2].strip()


@lru_cache(None)
def _open_h5(path, process):
    """The HDF5 file, opened once in each process: no worker may read through an inherited one."""
    import h5py  # here, because only PCAM needs it
    return h5py.File(path, "r")


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as PIL RGB, 16-bit grey scaled to 8 bits; ValueError for modes I and F."""
    if image.mode.startswith("I;16"):  # PIL would clip it at 255, which makes it white
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose range is unknown; save it as 8 bits")
    return image.convert("RGB")


# ---- Reports ----

# Not tried; for BACH a guess, since the authors' are not published
AUTHORS = "https://github.com/BanafshehKarimian/ModalityPairing/raw/4f2bed7/text"
REPORTS = {"authors:colon": "text_colo.txt", "authors:breast": "text_breast.txt"}
LICENCE = "none stated; made from Lab-Rasool/TCGA (CC BY-NC-ND 4.0), do not redistribute"


def load_reports(source, root="data") -> list[str]:
    """The texts of read_reports."""
    return list(read_reports(source, root))


def read_reports(source, root="data") -> dict[str, str]:
    """Distinct reports, so that no two tie in the pairing, and the first place of each: "a.txt line
    17", "a.csv row 3" (the header is row 1), "cases/a.txt". source: .txt of lines, .csv or .jsonl
    with `text`, a folder of .txt, or a key of REPORTS, below `root`. Raises OSError, ValueError."""
    path = Path(root, "reports", REPORTS[source]) if source in REPORTS else Path(source)
    reports, count, place = {}, 0, "the start"
    try:
        for count, (place, text) in enumerate(_report_texts(path), 1):
            if not isinstance(text, str) or "\0" in text:
                raise ValueError(f"{text!r:.50}")
            reports.setdefault(text.strip(), place)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"--reports {path}: {type(error).__name__} from {place} on: {error}; "
                         "expected UTF-8, no zero byte, a report a line or column `text`") from None
    reports.pop("", None)
    if len(reports) < 2:
        raise ValueError(f"--reports {path}: {len(reports)} distinct report(s), not two or more")
    print(f"{source}: {len(reports)} reports, {count - len(reports)} empty or equal left out")
    return reports


def _report_texts(path):
    """(place, text) of each report."""
    kind = path.suffix.lower()
    if path.is_dir():
        for file in sorted(path.rglob("*.[tT][xX][tT]")):
            yield str(file.relative_to(path.parent)), " ".join(file.read_text("utf-8-sig").split())
    elif kind not in (".txt", ".csv", ".jsonl") or not path.exists():
        raise FileNotFoundError(f"--reports {path}: expected .txt, .csv, .jsonl, folder of .txt "
                                f"or, by --download, {', '.join(REPORTS)}")
    elif kind == ".csv":
        csv.field_size_limit(2 ** 31 - 1)  # its own limit is 131,072 characters
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 2):
                if None in row:
                    raise ValueError(f"row {number} has more cells than row 1; quote its commas")
                yield f"{path.name} row {number}", row["text"]
    else:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                text = json.loads(line)["text"] if kind == ".jsonl" and line.strip() else line
                yield f"{path.name} line {number}", text


# ---- The published data sets ----

ZENODO = "https://zenodo.org/records"
DEMO = Path(__file__).resolve().parent / "tests/demo"
PCAM = "pcam/camelyonpatch_level_2_split_"
SPLITS = ("train", "val", "test")
# kaiko-eva's training images of BACH, disjoint in patients from the other 132, which are the test
# split here, as in the authors' code; theirs validates on every 20th
BACH_TRAIN = [*range(0, 41), *range(59, 60), *range(90, 139), *range(169, 240), *range(258, 260),
              *range(273, 345), *range(368, 400)]
# archives: what is unpacked from each, its md5, its tiles; splits: indices into one archive;
# mpp: micrometres a pixel; side: pixels of a tile; defaults: of train.py's flags
DATASETS = {
    "demo": dict(
        title="the demo's rendered tiles, which show no tissue", licence="MIT", root=DEMO,
        defaults=dict(reports=f"{DEMO}/reports.txt", shots=60, batch=32, worker=0,
                      clip_model=f"local-dir:{DEMO}/clip", model=f"local-dir:{DEMO}/backbone")),
    "crc": dict(  # the authors train for one epoch and validate ten times in it
        title="NCT-CRC-HE-100K and CRC-VAL-HE-7K", licence="CC BY 4.0", record=1214456, gb=12.5,
        archives=dict(train=("NCT-CRC-HE-100K", "6fd702d11df6292bc054397ae038a464", 100_000),
                      test=("CRC-VAL-HE-7K", "2fd1651b4f94ebd818ebf90ad2b6ce06", 7_180)),
        classes=["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"],
        mpp=0.5, side=224, defaults=dict(reports="authors:colon", ep=1, val_int=0.1)),
    "bach": dict(  # 20 epochs as of folders: the authors' one is 4 steps here
        title="BACH (ICIAR 2018)", licence="CC BY-NC-ND 4.0", record=3632035, gb=10.4,
        archives=dict.fromkeys(SPLITS, ("ICIAR2018_BACH_Challenge/Photos",
                                        "8ae1801334aa943c44627c1eef3631b2", 400)),
        splits=dict(train=[i for n, i in enumerate(BACH_TRAIN) if n % 20], val=BACH_TRAIN[::20],
                    test=sorted({*range(400)} - {*BACH_TRAIN})),
        classes=["Benign", "InSitu", "Invasive", "Normal"], mpp=0.42, side=1536,
        defaults=dict(reports="authors:breast")),
    "pcam": dict(
        title="PatchCamelyon", licence="CC0", record=2546921, gb=8.0,  # more than any unpacked
        archives=dict(
            train=(f"{PCAM}train_x.h5", "1571f514728f59376b705fc836ff4b63", 262_144),
            train_y=(f"{PCAM}train_y.h5", "35c2d7259d906cfc8143347bb8e05be7", 262_144),
            val=(f"{PCAM}valid_x.h5", "d5b63470df7cfa627aeec8b9dc0c066e", 32_768),
            val_y=(f"{PCAM}valid_y.h5", "2b85f58b927af9964a4c15b8f7e8f179", 32_768),
            test=(f"{PCAM}test_x.h5", "d8c2d60d490dbd479f8199bdfa0cf6ec", 32_768),
            test_y=(f"{PCAM}test_y.h5", "60a7035772fbdb7f34eb86d4420cf66a", 32_768)),
        classes=["no_tumor", "tumor"], mpp=0.972, side=96,
        defaults=dict(reports="authors:breast", ep=1, val_int=0.1)),
}
DATASETS["crc-nonorm"] = DATASETS["crc"] | dict(
    title="NCT-CRC-HE-100K-NONORM and CRC-VAL-HE-7K", archives=DATASETS["crc"]["archives"] | dict(
        train=("NCT-CRC-HE-100K-NONORM", "035777cf327776a71a05c95da6d6325f", 100_000)))


def dataset_folder(ds, root="data") -> Path:
    """The folder of a data set's splits; looks at no tile. Raises FileNotFoundError."""
    row = DATASETS.get(ds, {})
    folder, parts = Path(row.get("root", ds)), ["train", "test"]
    remedy = f"expected {', '.join(DATASETS)}, or a folder with train/, test/ and perhaps val/"
    if "archives" in row:
        folder, parts = Path(root), [to for to, _, _ in row["archives"].values()]
        remedy = (f"--download fetches {row['title']} ({row['gb']} GB, licence {row['licence']})\n"
                  f"from {ZENODO}/{row['record']}, or put it, or a link to it, there")
    for part in parts:
        if not (folder / part).exists():
            raise FileNotFoundError(f"--ds {ds}: no folder or file {folder / part}; {remedy}")
    return folder


# ---- Downloads: on --download alone ----

def download(ds, reports, root="data") -> None:
    """Fetch what is missing of a data set and of named reports below `root`. Raises OSError; the
    same call goes on from what FILE.part holds."""
    row = DATASETS.get(ds, {})
    for to, md5, _ in row.get("archives", {}).values():
        names = to.split("/")
        name = f"{names[-1]}.gz" if to.endswith(".h5") else f"{names[0]}.zip"
        url = f"{ZENODO}/{row['record']}/files/{name}?download=1"
        _obtain(Path(root), to, name, url, row["licence"], row["gb"], md5)
    if name := REPORTS.get(reports):
        _obtain(Path(root, "reports"), name, name, f"{AUTHORS}/{name}", LICENCE, gb=0.1)


def _obtain(root, to, name, url, licence, gb, md5=None):
    """Make root/to of root/name, which is downloaded if it is missing: whole or not at all."""
    if (root / to).exists():
        return
    path, part, folder = (root / f"{name}{end}" for end in ("", ".part", ".unpacking"))
    with lock(f"{path}.lock", f"{path}: another process is downloading it; wait"):
        try:
            if not path.exists():
                print(f"{url} to {path}; licence: {licence}")
                _fetch(url, part, gb, md5)
                os.replace(part, path)
            if name == to:
                return
            for place in (folder / to, root / to):
                place.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".gz"):
                with gzip.open(path) as source, open(folder / to, "wb") as file:
                    _copy(source, file, gb)
            else:
                with zipfile.ZipFile(path) as archive:  # keeps members inside, makes no links
                    members = [name for name in archive.namelist() if name.startswith(f"{to}/")]
                    archive.extractall(folder, tqdm(members, disable=None))
            os.replace(folder / to, root / to)
        except Exception as error:  # zipfile and gzip raise of all kinds
            raise OSError(f"{path if path.exists() else part}: {error}\nthe same command goes on, "
                          "or fetches it anew once it is removed") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _fetch(url, part, gb, md5):
    start = part.stat().st_size if part.exists() else 0
    rest = Request(url, headers={"Range": f"bytes={start}-"})
    try:
        with urlopen(rest, timeout=60) as reply, open(part, "ab") as file:
            if start and reply.status != 206:
                raise OSError("the server sends the whole file only")
            total = start + int(reply.headers["Content-Length"] or 0)
            _copy(reply, file, gb, total)
            if file.tell() < total:
                raise OSError(f"broken off after {file.tell():,} of {total:,} bytes")
    except HTTPError as error:
        if error.code != 416:  # which says that nothing is missing
            raise
    if md5 and (found := calculate_md5(part)) != md5:
        archives = [row.get("archives", {}).values() for row in DATASETS.values()]
        known = {row[1]: row[0] for rows in archives for row in rows}.get(found, "no known file")
        raise OSError(f"checksum {found} (that of {known}), expected {md5}; renamed to {part.stem} "
                      "it is used all the same")


def _copy(source, target, gb, total=0):
    bar = dict(initial=target.tell() >> 20, total=total >> 20 or None, unit="MB", disable=None)
    for chunk in tqdm(iter(lambda: source.read(1 << 20), b""), **bar):
        target.write(chunk)
        if target.tell() > gb * 1.01e9:  # gb is rounded
            raise OSError(f"more than the {gb} GB published")


def lock(path, taken: str):
    """A lock file, held until released or this process ends. Raises OSError(taken) where another
    process holds it; a disk without locks locks nothing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path, timeout=0, is_singleton=True).acquire()
    except Timeout:
        raise OSError(taken) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return nullcontext()

"""Tiles with labels, their splits, and reports: everything that CLIP-IT reads from disk.

    from data import load_reports, load_tiles
    train, val = load_tiles("my_tiles", "train"), load_tiles("my_tiles", "val")
    image, label = train[0]                # PIL RGB image, int
    reports = load_reports("reports.txt")  # one report a line

Travels alone. A data set is a row of DATASETS or a folder with train/, test/ and perhaps val/,
each of class folders. Layouts and BACH's ranges are kaiko-eva's, the other splits the authors'.
"""
import csv
import errno
import gzip
import hashlib
import json
import os
import shutil
import zipfile
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm


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
        paths, labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        return Tiles(paths, labels, self.classes, self.transform)

    def with_transform(self, transform) -> "Tiles":
        return Tiles(self.paths, self.labels, self.classes, transform)


def load_tiles(ds, split, root="data", transform=None) -> Tiles:
    """The tiles of "train", "val" or "test". ds: a folder, or a key of DATASETS, below `root`;
    without a val/, a fifth of every class in train/ is "val". Raises OSError, ValueError."""
    folder = dataset_folder(ds, root)
    samples, classes = _read_split(ds, folder, "test" if split == "test" else "train")
    if split != "test":
        val, _ = _read_split(ds, folder, "val")
        if not val:  # the seed is not the run's: runs stay comparable
            labels = [label for _, label in samples]
            val = [samples[i] for i in stratified_split(labels, 0.2, seed=42)[1]]
        if not val:
            raise ValueError(f"{folder}: one tile a class leaves none for validation; add a val/")
        held = set(val)
        samples = val if split == "val" else [item for item in samples if item not in held]
    if ds not in DATASETS:
        _count_other_files(folder / split)
    return Tiles(*zip(*samples), classes, transform)


def _count_other_files(folder: Path):
    names = [name for _, _, names in os.walk(folder, followlinks=True) for name in names]
    others = [name for name in names if not name.lower().endswith(IMG_EXTENSIONS)]
    if others:
        kinds = sorted({Path(name).suffix.lower() for name in others})
        print(f"{len(others)} of {len(names)} files in {folder} are no images that can be read "
              f"here: {' '.join(kinds)}")


def stratified_split(labels, fraction, seed) -> tuple[list[int], list[int]]:
    """(kept, held) indices: `fraction` of every class is held, drawn by seed, rounded so that both
    sides have of it; a single tile is kept."""
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
    """Print how many tiles, of all splits, are the file of another one, links followed."""
    files = [os.path.realpath(path) for part in tiles.values() for path in part.paths]
    repeated = len(files) - len(set(files))
    if repeated:
        print(f"warning: {repeated} of {len(files)} tiles are the file of another tile")


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


def read_tile(path) -> Image.Image:
    """A tile as PIL RGB; FILE.h5#17 is number 17 of that file's array x, (N, 96, 96, 3) uint8.
    Raises TileError with the path."""
    file, _, number = str(path).rpartition("#")
    try:
        if file.endswith(".h5"):
            return Image.fromarray(_open_h5(file, os.getpid())["x"][int(number)])
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # PIL raises of all kinds, each format its own
        raise TileError(f"{path}: not a readable image ({error}); mend or remove it") from None


@lru_cache(None)
def _open_h5(path: str, process: int):
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


# ---- Reports ------------------------------------------------------------------------------------

# File and git's id of it; not tried. For BACH a guess, since the authors' are not published.
AUTHORS = "https://github.com/BanafshehKarimian/ModalityPairing/raw/4f2bed7/text"
REPORTS = {"authors:colon": ("text_colo.txt", "813e61188db6f4772bb8439c561d668729cf0f6a"),
           "authors:breast": ("text_breast.txt", "9bd8116c9043f10a5ed38831e7fde089dd19d004")}
LICENCE = "none stated; made from Lab-Rasool/TCGA (CC BY-NC-ND 4.0), do not redistribute"


def load_reports(source, root="data") -> list[str]:
    """The texts of read_reports."""
    return list(read_reports(source, root))


def read_reports(source, root="data") -> dict[str, str]:
    """Distinct reports, so that no two tie in the pairing, and the first place of each: "a.txt line
    17", "a.csv row 3" (the header is row 1), "cases/a.txt". source: .txt of lines, .csv or .jsonl
    with `text`, a folder of .txt, or a key of REPORTS, below `root`. Raises OSError, ValueError."""
    path, reports, count, place = Path(source), {}, 0, "the start"
    if source in REPORTS:
        name, git_id = REPORTS[source]
        path = Path(root, "reports", name)
        if not path.exists() or _checksum(path, git_id) != git_id:
            remedy = f"remove it, and --download fetches {AUTHORS}/{name}"
            raise FileNotFoundError(f"--reports {source}: {path} is missing or changed; {remedy}")
    try:
        for count, (place, row) in enumerate(_report_rows(path), 1):
            if path.suffix.lower() == ".jsonl" and row.strip():
                row = json.loads(row)
            text = row if isinstance(row, str) else row["text"]
            if not isinstance(text, str) or "\0" in text:
                raise ValueError(f"{text!r:.50}")
            reports.setdefault(text.strip(), place)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        wanted = "UTF-8 without zero bytes, a report a line or a column `text`"
        found = f"{type(error).__name__}: {error}; from {place} on"
        raise ValueError(f"--reports {path}: not {wanted} ({found})") from None
    reports.pop("", None)
    if len(reports) < 2:
        raise ValueError(f"--reports {path}: {len(reports)} distinct report(s), not two or more")
    print(f"{source}: {len(reports)} reports, {count - len(reports)} empty or equal left out")
    return reports


def _report_rows(path: Path):
    """(place, row of a .csv or line) of each report."""
    kind = path.suffix.lower()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() == ".txt":
                text = file.read_text("utf-8-sig")
                yield str(file.relative_to(path.parent)), " ".join(text.split())
    elif kind == ".csv":
        csv.field_size_limit(2 ** 31 - 1)  # its own limit is 131,072 characters
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 2):
                if None in row:
                    raise ValueError(f"row {number} has more cells than row 1; quote its commas")
                yield f"{path.name} row {number}", row
    elif kind in (".txt", ".jsonl"):
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield f"{path.name} line {number}", line
    else:
        kinds = ".txt, .csv, .jsonl, a folder of .txt"
        raise FileNotFoundError(f"--reports {path}: expected {kinds}, or {', '.join(REPORTS)}")


# ---- The published data sets --------------------------------------------------------------------

ZENODO = "https://zenodo.org/records"
DEMO = Path(__file__).resolve().parent / "tests/demo"
PCAM = "pcam/camelyonpatch_level_2_split_"
TISSUES = ["adipose tissue", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
           "normal colon mucosa", "cancer-associated stroma",
           "colorectal adenocarcinoma epithelium"]
# archives: what is unpacked from each, its md5, its tiles; prompts: the classes in words; mpp:
# micrometres a pixel; side: pixels of a tile; defaults: of train.py's flags
DATASETS = {
    "demo": dict(
        title="the demo's rendered tiles, which show no tissue", licence="MIT", root=DEMO,
        prompts=TISSUES,
        defaults=dict(reports=f"{DEMO}/reports.txt", shots=60, batch=32, worker=0,
                      clip_model=f"local-dir:{DEMO}/clip", model=f"local-dir:{DEMO}/backbone")),
    "crc": dict(  # the authors train for one epoch and validate ten times in it
        title="NCT-CRC-HE-100K and CRC-VAL-HE-7K", licence="CC BY 4.0", record=1214456, gb=12.5,
        archives=dict(train=("NCT-CRC-HE-100K", "6fd702d11df6292bc054397ae038a464", 100_000),
                      test=("CRC-VAL-HE-7K", "2fd1651b4f94ebd818ebf90ad2b6ce06", 7_180)),
        classes=["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"],
        mpp=0.5, side=224, prompts=TISSUES,
        defaults=dict(reports="authors:colon", ep=1, val_int=0.1)),
    "bach": dict(  # 20 epochs as of folders: the authors' one is 4 steps here
        title="BACH (ICIAR 2018)", licence="CC BY-NC-ND 4.0", record=3632035, gb=10.4,
        archives=dict(train=("ICIAR2018_BACH_Challenge/Photos",
                             "8ae1801334aa943c44627c1eef3631b2", 400)),
        classes=["Benign", "InSitu", "Invasive", "Normal"],
        prompts=["benign breast tissue", "breast carcinoma in situ", "invasive breast carcinoma",
                 "normal breast tissue"],
        mpp=0.42, side=1536, defaults=dict(reports="authors:breast")),
    "pcam": dict(
        title="PatchCamelyon", licence="CC0", record=2546921, gb=8.0,  # more than any unpacked
        archives=dict(
            train_x=(f"{PCAM}train_x.h5", "1571f514728f59376b705fc836ff4b63", 262_144),
            train_y=(f"{PCAM}train_y.h5", "35c2d7259d906cfc8143347bb8e05be7", 262_144),
            val_x=(f"{PCAM}valid_x.h5", "d5b63470df7cfa627aeec8b9dc0c066e", 32_768),
            val_y=(f"{PCAM}valid_y.h5", "2b85f58b927af9964a4c15b8f7e8f179", 32_768),
            test_x=(f"{PCAM}test_x.h5", "d8c2d60d490dbd479f8199bdfa0cf6ec", 32_768),
            test_y=(f"{PCAM}test_y.h5", "60a7035772fbdb7f34eb86d4420cf66a", 32_768)),
        classes=["no_tumor", "tumor"],
        prompts=["normal lymph node tissue", "a lymph node metastasis of breast cancer"],
        mpp=0.972, side=96, defaults=dict(reports="authors:breast", ep=1, val_int=0.1)),
}
DATASETS["crc-nonorm"] = DATASETS["crc"] | dict(
    title="NCT-CRC-HE-100K-NONORM and CRC-VAL-HE-7K",
    archives=DATASETS["crc"]["archives"] | dict(
        train=("NCT-CRC-HE-100K-NONORM", "035777cf327776a71a05c95da6d6325f", 100_000)))
# kaiko-eva's training images of BACH, half-open ranges over the sorted files, disjoint in patients
# from the other 132, which are the test split here, as in the authors' code
BACH_TRAIN = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))


def dataset_folder(ds, root="data") -> Path:
    """The folder of a data set's splits; looks at no tile. Raises FileNotFoundError."""
    row = DATASETS.get(ds, {})
    folder, parts = Path(row.get("root", ds)), ["train", "test"]
    remedy = f"expected {', '.join(DATASETS)}, or a folder with train/, test/ and perhaps val/"
    if "archives" in row:
        folder, parts = Path(root), [archive[0] for archive in row["archives"].values()]
        remedy = (f"--download fetches {row['title']} ({row['gb']} GB, licence {row['licence']})\n"
                  f"from {ZENODO}/{row['record']}, or put it, or a link to it, there")
    for part in parts:
        if not (folder / part).exists():
            raise FileNotFoundError(f"--ds {ds}: no folder or file {folder / part}; {remedy}")
    return folder


def _read_split(ds, folder: Path, split: str) -> tuple[list, list]:
    """[(path, label)], empty for a "val" that is not there, and the names of the classes."""
    row = DATASETS.get(ds, {})
    classes = row.get("classes") or _class_names(folder / "train")
    archives = row.get("archives", {split: (split, "", None)})
    key = {"bach": "train", "pcam": f"{split}_x"}.get(ds, split)
    name, _, count = archives.get(key, ("no val", "", None))
    part, samples = folder / name, []
    if ds == "pcam":
        y_file = folder / archives[f"{split}_y"][0]
        labels = _open_h5(str(y_file), os.getpid())["y"][:].flatten()  # (N,) uint8
        indices = range(len(_open_h5(str(part), os.getpid())["x"]))
        samples = [(f"{part}#{i}", label)
                   for i, label in zip(indices, labels.tolist(), strict=True)]
    elif part.is_dir():
        names = _class_names(part)
        if names != classes or len(names) < 2:
            raise ValueError(f"{part}: class folders {names[:20]}; expected two or more, the same "
                             f"in every split: {classes[:20]}")
        try:
            labels = {name: label for label, name in enumerate(names)}
            samples = make_dataset(part, labels, IMG_EXTENSIONS)
        except FileNotFoundError as error:  # names the class without an image
            raise ValueError(f"{part}: {error}") from None
    if count and len(samples) != count:
        raise ValueError(f"{part}: found {len(samples):,} tiles, expected {count:,}; remove it, "
                         "and --download fetches it again")
    if ds == "bach":  # the authors validate on every 20th training image
        train = [item for first, end in BACH_TRAIN for item in samples[first:end]]
        test = [item for item in samples if item not in train]
        samples = {"train": train, "val": train[::20], "test": test}[split]
    return samples, classes


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()
                  if entry.is_dir() and not entry.name.startswith("."))


# ---- Downloads: on --download alone -------------------------------------------------------------

def download(ds, reports, root="data") -> None:
    """Fetch what is missing of a data set and of reports with a name below `root`. Raises OSError
    where that breaks off; FILE.part is kept, and the same call goes on from it."""
    row, root, taken = DATASETS.get(ds, {}), Path(root), "another process is downloading it; wait"
    for to, md5, _ in row.get("archives", {}).values():
        if not (root / to).exists():
            name = f"{Path(to).name}.gz" if to.endswith(".h5") else f"{Path(to).parts[0]}.zip"
            url = f"{ZENODO}/{row['record']}/files/{name}?download=1"
            with lock(f"{root / name}.lock", f"{root / name}: {taken}"):
                _fetch(url, root / name, md5, row["licence"], row["gb"])
                _unpack(root / name, root, to, row["gb"])
    if reports in REPORTS:
        name, git_id = REPORTS[reports]
        path = root / "reports" / name
        if not path.exists():
            with lock(f"{path}.lock", f"{path}: {taken}"):
                _fetch(f"{AUTHORS}/{name}", path, git_id, LICENCE, gb=0.1)


def lock(path, taken: str):
    """A lock file, ours until it is released or this process ends. OSError with the words `taken`
    where another process has it; a disk without locks locks nothing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path, timeout=0, is_singleton=True).acquire()
    except Timeout:
        raise OSError(taken) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return nullcontext()


def _fetch(url: str, path: Path, expected: str, licence: str, gb: float):
    """Download what path.part lacks; it becomes `path` if its checksum is the expected one."""
    if path.exists():
        return
    print(f"{url} to {path}; licence: {licence}")
    part = Path(f"{path}.part")
    start = part.stat().st_size if part.exists() else 0
    rest = Request(url, headers={"Range": f"bytes={start}-"})
    try:
        with urlopen(rest, timeout=60) as reply, open(part, "ab") as file:
            if start and reply.status != 206:
                raise OSError("the server sends the whole file only; remove it")
            total = start + int(reply.headers["Content-Length"] or 0)
            with tqdm.wrapattr(reply, "read", total, initial=start, disable=None) as stream:
                _copy(stream, file, gb)
            if file.tell() < total:
                raise OSError(f"broken off after {file.tell():,} of {total:,} bytes")
    except (OSError, HTTPException) as error:
        if getattr(error, "code", None) != 416:  # that is: there is no more than the part
            raise OSError(f"{part}: {error}; the same command goes on") from None
    checksum = _checksum(part, expected)
    if checksum != expected:
        archives = [row.get("archives", {}).values() for row in DATASETS.values()]
        names = {md5: f" (that of {to})" for row in archives for to, md5, _ in row}
        raise OSError(f"{part}: checksum {checksum}{names.get(checksum, '')}, expected {expected}\n"
                      "where the end is missing, the same command goes on; else remove it, or "
                      f"rename it to {path.name}")
    os.replace(part, path)


def _copy(source, target, gb: float):
    while chunk := source.read(1 << 20):
        target.write(chunk)
        if target.tell() > gb * 1.01e9:  # gb is rounded
            raise OSError(f"more than the {gb} GB published; remove it")


def _checksum(path: Path, expected: str) -> str:
    """md5, or git's id where that, of 40 digits, is expected."""
    if len(expected) == 32:
        return calculate_md5(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def _unpack(packed: Path, root: Path, to: str, gb: float):
    """`to` of a .zip, or the file of a .gz, to root/to by way of a temporary folder: whole or not
    at all. zipfile strips what leads out of a folder ("..", /) and makes no links."""
    temporary = Path(f"{packed}.unpacking")
    try:
        for path in (temporary / to, root / to):
            path.parent.mkdir(parents=True, exist_ok=True)
        if packed.suffix == ".gz":
            with gzip.open(packed) as source, open(temporary / to, "wb") as file:
                _copy(source, file, gb)
        else:
            with zipfile.ZipFile(packed) as archive:
                members = [name for name in archive.namelist() if name.startswith(f"{to}/")]
                archive.extractall(temporary, tqdm(members, f"unpack {packed.name}", disable=None))
        os.replace(temporary / to, root / to)
        print(f"{packed} is no longer needed")
    except Exception as error:  # zipfile and gzip raise of all kinds
        raise OSError(f"{packed}: {to} could not be unpacked ({error}); the same command goes on, "
                      "or fetches it anew once it is removed") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Tiles with labels, their splits, and reports: everything that CLIP-IT reads from disk.

    from data import load_reports, load_tiles
    train, val = load_tiles("my_tiles", "train"), load_tiles("my_tiles", "val")  # items: (PIL image, int label)
    reports = load_reports("reports.txt")                                        # one report a line

Travels alone. A data set is a row of DATASETS or a folder with train/ and test/, each a folder of class folders
(my_tiles/train/CLASS/*.png); val/ is optional, otherwise a fifth of train, stratified by class. Nothing goes online but
download("crc", "data") and download_reports. Tiles and reports meet only in pairing.py, and labels never reach it.
References: archives, layouts and BACH's ranges are those of kaiko-eva, the splits those of the authors' loaders.
"""
import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ZENODO, PCAM = "https://zenodo.org/records", "camelyonpatch_level_2_split"

TISSUES = ["adipose tissue", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
           "cancer-associated stroma", "colorectal adenocarcinoma epithelium"]
# One row a data set. root: the folder of the splits; or archives, fetched from url into --data-dir as `to`: md5 is that
# of the .zip or the unpacked .h5, gb the download, disk_gb the tiles by their pixels, count their number. The rest are
# the names of the classes in words (prompts) and train.py's defaults where they differ; shots draws that many labelled
# tiles a class from training, anew for each seed.
DATASETS = {
    "demo": dict(
        root=HERE / "tests/demo", title="the demo's rendered tiles, which show no tissue", licence="MIT",
        reports=HERE / "tests/demo/reports.txt",
        clip_model=f"local-dir:{HERE}/tests/demo/clip",
        model=f"local-dir:{HERE}/tests/demo/backbone",
        prompts=TISSUES, shots=60, batch=32, ep=20, worker=0, lora_text=0,
    ),
    "crc": dict(  # the authors validate ten times in their one epoch
        title="NCT-CRC-HE-100K and CRC-VAL-HE-7K", licence="CC BY 4.0", reports="authors:colon", ep=1, val_every=0.1,
        classes=["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"], prompts=TISSUES,
        archives=[dict(url=f"{ZENODO}/1214456/files/{name}.zip?download=1", to=name, md5=md5, count=count, gb=gb,
                       disk_gb=count * 224 * 224 * 3e-9) for name, md5, count, gb in (
            ("NCT-CRC-HE-100K", "035777cf327776a71a05c95da6d6325f", 100_000, 11.7),
            ("CRC-VAL-HE-7K", "2fd1651b4f94ebd818ebf90ad2b6ce06", 7_180, 0.8))]),
    # The authors' default of one epoch is 4 steps here; their later code gives BACH 100 epochs: 400 steps (CRC: 1,250).
    "bach": dict(
        title="BACH (ICIAR 2018)", licence="CC BY-NC-ND 4.0", reports="authors:breast", ep=100,
        classes=["Benign", "InSitu", "Invasive", "Normal"],
        prompts=["benign breast tissue", "breast carcinoma in situ", "invasive breast carcinoma",
                 "normal breast tissue"],
        archives=[dict(url=f"{ZENODO}/3632035/files/ICIAR2018_BACH_Challenge.zip", to="ICIAR2018_BACH_Challenge/Photos",
                       md5=None, count=400, gb=10.4, disk_gb=400 * 2048 * 1536 * 3e-9)]),  # no md5 of it is known
    "pcam": dict(
        title="PatchCamelyon", licence="CC0", reports="authors:breast", ep=1, val_every=0.1,
        classes=["no_tumor", "tumor"],
        prompts=["normal lymph node tissue", "a lymph node metastasis of breast cancer"],
        archives=[dict(url=f"{ZENODO}/2546921/files/{PCAM}_{part}.h5.gz?download=1", to=f"pcam/{PCAM}_{part}.h5",
                       md5=md5, count=count, gb=count * size * 1e-9, disk_gb=count * size * 1e-9)  # gb: at most
                  for part, md5, count, size in (
            ("train_x", "01844da899645b4d6f84946d417ba453", 262_144, 96 * 96 * 3),
            ("train_y", "0781386bf6c2fb62d58ff18891466aca", 262_144, 1),
            ("valid_x", "81cf9680f1724c40673f10dc88e909b1", 32_768, 96 * 96 * 3),
            ("valid_y", "94d8aacc249253159ce2a2e78a86e658", 32_768, 1),
            ("test_x", "2614b2e6717d6356be141d9d6dbfcb7e", 32_768, 96 * 96 * 3),
            ("test_y", "11ed647efe9fe457a4eb45df1dba19ba", 32_768, 1))]),
}
# kaiko-eva's patient-disjoint training images of BACH, half-open ranges over the sorted files (268); the other 132, its
# "val", are the test split here. The authors validate on every 20th training image.
BACH_TRAIN = ((0, 41), (59, 60), (90, 139), (169, 240), (258, 260), (273, 345), (368, 400))
BACH_VAL_STEP = 20

# Reports by name: [(file in DATA_DIR/reports, url, what it must be: see _verify)], licence, TCGA cancer type to keep.
# Known for sure are the authors' repository by name and commit, the paths and the git blob ids, so that no other file
# passes. The repository's owner and the branch of TCGA-Reports (whichever HEAD is) are not, and no address was tried.
# colon is COAD without READ, as the authors' keyword "colo" leaves the rectum out.
AUTHORS = "https://github.com/BanafshehKarimian/ModalityPairing/raw/4f2bed7/text"
TCGA = "https://github.com/tatonetti-lab/tcga-path-reports/raw/HEAD"
COLON, BREAST = "813e61188db6f4772bb8439c561d668729cf0f6a", "9bd8116c9043f10a5ed38831e7fde089dd19d004"
UNLICENSED = "none stated; made from Lab-Rasool/TCGA (CC BY-NC-ND 4.0), do not redistribute"
TCGA_FILES = [("TCGA_Reports.csv.zip", f"{TCGA}/TCGA_Reports.csv.zip", "blob:afaffbc5bc0333aa6f56c0b4dfdfd618983edce8"),
              ("types.csv", f"{TCGA}/data/tcga_metadata/tcga_patient_to_cancer_type.csv", "size:209548")]
REPORTS = {
    "authors:colon": ([("text_colo.txt", f"{AUTHORS}/text_colo.txt", f"blob:{COLON}")], UNLICENSED, None),
    "authors:breast": ([("text_breast.txt", f"{AUTHORS}/text_breast.txt", f"blob:{BREAST}")], UNLICENSED, None),
    "tcga:colon": (TCGA_FILES, "MIT", "COAD"),
    "tcga:breast": (TCGA_FILES, "MIT", "BRCA"),
}
# A folder of your own: 20 % of its training tiles, stratified by class, are its validation split unless it has val/.
VAL_FRACTION = 0.2
SPLIT_SEED = 42  # of that split; the run's seed does not move it, so that runs with other seeds stay comparable


class Tiles(torch.utils.data.Dataset):
    """Tiles by path: item i is (transform(PIL RGB image), int label)."""

    def __init__(self, paths, labels, classes, transform=None):
        self.paths, self.labels, self.classes, self.transform = list(paths), list(labels), list(classes), transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_tile(self.paths[index])
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def take(self, indices) -> "Tiles":
        """The tiles at `indices`, in that order."""
        return Tiles([self.paths[i] for i in indices], [self.labels[i] for i in indices], self.classes, self.transform)

    def seen_by(self, transform) -> "Tiles":
        """The same tiles through another transform."""
        return Tiles(self.paths, self.labels, self.classes, transform)


def read_tile(path) -> Image.Image:
    """One tile as PIL RGB; FILE.h5#17 is number 17 of that file's array x, (N, 96, 96, 3) uint8.

    Raises ValueError with the path where the file is truncated or no image.
    """
    file, hdf5, number = str(path).rpartition(".h5#")
    try:
        if hdf5:
            return Image.fromarray(_open_h5(f"{file}.h5", os.getpid())["x"][int(number)])
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: PIL's word for a broken PNG
        raise ValueError(f"{path}: not a readable image ({error})") from None


@lru_cache(None)
def _open_h5(path: str, process: int):
    """The HDF5 file, opened once in each process: a worker must not read through a handle that it inherited by fork."""
    try:
        import h5py  # here, because only PCAM needs it
    except ImportError:
        raise ValueError(f"{path}: reading it needs h5py; pip install h5py") from None
    return h5py.File(path, "r")


def load_tiles(ds, split, root="data", transform=None, val_fraction=None) -> Tiles:
    """The tiles of one split.

    ds: a key of DATASETS or a folder; split: "train", "val" or "test"; root: where downloaded data sets lie;
    val_fraction: this share of the training tiles, stratified by class, is the validation split instead of the data
    set's own. Raises FileNotFoundError for a missing folder and ValueError for a data set that cannot be trained on.
    """
    folder, read = dataset_folder(ds, root), READERS.get(ds, _read_folder)
    samples, classes = read(folder, "test" if split == "test" else "train")
    if split == "val" and val_fraction is None and (own := read(folder, "val")[0]):
        samples = own
    elif split != "test" and (val_fraction is not None or not read(folder, "val")[0]):
        kept, held = stratified_split([label for _, label in samples], val_fraction or VAL_FRACTION, SPLIT_SEED)
        if ds == "bach" and val_fraction is None:
            held = range(0, len(samples), BACH_VAL_STEP)
            kept = sorted(set(range(len(samples))) - set(held))
        samples = [samples[i] for i in (kept if split == "train" else held)]
    return Tiles(*zip(*samples), classes, transform)


def dataset_folder(ds, root="data") -> Path:
    """The folder of a data set's splits; looks at no tile. Raises FileNotFoundError with the choices or, where a
    download is missing, its size, licence, addresses and the tree that is expected."""
    row = DATASETS.get(ds, {})
    archives = row.get("archives", ())
    missing = [archive["to"] for archive in archives if not Path(root, archive["to"]).exists()]
    if missing:
        gb, disk = (sum(archive[key] for archive in archives) for key in ("gb", "disk_gb"))
        inside = "" if missing[0].endswith(".h5") else f"/{{{','.join(row['classes'])}}}/*.tif"
        raise FileNotFoundError(
            f"--ds {ds}: {Path(root, missing[0])} is missing; --download fetches it, --data-dir tells where it lies\n"
            f"{row['title']}: licence {row['licence']}, download {gb:.1f} GB{' at most' * (ds == 'pcam')}, unpacked "
            f"{disk:.1f} GB\n" + "".join(f"  {archive['url']}\n" for archive in archives) + "expected:"
            + "".join(f"\n  {Path(root, archive['to'])}{inside} ({archive['count']:,})" for archive in archives))
    if archives:
        return Path(root)
    folder = Path(row.get("root", ds))
    if not folder.is_dir():
        raise FileNotFoundError(f"--ds {ds}: neither a folder nor one of {', '.join(DATASETS)}")
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(f"--ds {ds}: {folder / split} is missing; expected {folder}/train and "
                                    f"{folder}/test (val is optional), each with one folder a class")
    return folder


# The readers: (folder, split) -> [(path, label)], classes. Their "val" is empty where the data set has none of its own.

def _read_folder(folder, split):
    if split == "train":
        return _class_folder(folder / "train", None)
    classes = _class_folder(folder / "train", None)[1]
    return _class_folder(folder / split, classes) if (folder / split).is_dir() else ([], classes)


def _read_crc(folder, split):
    archive, classes = DATASETS["crc"]["archives"][split == "test"], DATASETS["crc"]["classes"]
    if split == "val":
        return [], classes
    samples, _ = _class_folder(folder / archive["to"], classes, (".tif",))
    return _counted(samples, folder, archive), classes


def _read_bach(folder, split):
    archive, classes = DATASETS["bach"]["archives"][0], DATASETS["bach"]["classes"]
    samples = _counted(_class_folder(folder / archive["to"], classes, (".tif",))[0], folder, archive)
    if len({sum(label == i for _, label in samples) for i in range(4)}) > 1:
        raise ValueError(f"{folder / archive['to']}: expected 100 images in each class; otherwise the ranges "
                         "of the splits mean other images")
    train = [i for first, end in BACH_TRAIN for i in range(first, end)]
    splits = {"train": train, "val": [], "test": sorted(set(range(len(samples))) - set(train))}
    return [samples[i] for i in splits[split]], classes


def _read_pcam(folder, split):
    array = {}
    for axis in "xy":
        name = f"pcam/{PCAM}_{'valid' if split == 'val' else split}_{axis}.h5"
        try:
            array[axis] = _open_h5(str(folder / name), os.getpid())[axis]
        except (OSError, KeyError) as error:
            raise ValueError(f"{folder / name}: no HDF5 file with an array {axis} ({error}); remove it and fetch it "
                             "again with --download") from None
        _counted(array[axis], folder, next(a for a in DATASETS["pcam"]["archives"] if a["to"] == name))
    labels = array["y"][:].reshape(-1).tolist()  # y is (N, 1, 1, 1) uint8
    return [(f"{array['x'].file.filename}#{i}", label) for i, label in enumerate(labels)], DATASETS["pcam"]["classes"]


READERS = {"crc": _read_crc, "bach": _read_bach, "pcam": _read_pcam}


def _counted(samples, folder, archive):
    """The samples, if they are as many as published (ValueError)."""
    if len(samples) != archive["count"]:
        raise ValueError(f"{folder / archive['to']}: found {len(samples):,} tiles, expected {archive['count']:,}; "
                         "remove it and fetch it again with --download")
    return samples


def _class_folder(folder, classes, extensions=IMG_EXTENSIONS) -> tuple[list[tuple[str, int]], list[str]]:
    """[(path, label)] and the class names of a folder of class folders, in torchvision's order (sorted names)."""
    found = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: no class folders in it; expected {folder}/CLASS/*.png (or .jpg, .tif)")
    if len(found) == 1:
        raise ValueError(f"{folder}: a single class ({found[0]}); a classifier needs two class folders or more")
    if classes is not None and found != classes:
        raise ValueError(f"{folder}: its classes differ from those expected: only here "
                         f"{set(found) - set(classes) or '-'}, missing {set(classes) - set(found) or '-'}; make the "
                         "folder names equal")
    samples = make_dataset(folder, {name: i for i, name in enumerate(found)}, extensions, allow_empty=True)
    empty = set(range(len(found))) - {label for _, label in samples}
    if empty:
        raise ValueError(f"{folder}: no image in class {', '.join(found[i] for i in sorted(empty))}; "
                         f"put tiles there ({' '.join(extensions)}) or remove the class from every split")
    return samples, found


def stratified_split(labels, fraction, seed) -> tuple[list[int], list[int]]:
    """(kept, held) indices: `fraction` of every class is held, rounded, at random but the same for the same seed.

    A class of two tiles or more has at least one on each side; a single tile is kept.
    """
    generator, held = torch.Generator().manual_seed(seed), []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held += [members[j] for j in torch.randperm(len(members), generator=generator)[:count].tolist()]
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


def draw_shots(labels, shots, seed) -> list[int]:
    """Indices of `shots` tiles of every class (all of a class that has fewer), drawn at random by seed."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        drawn += [members[j] for j in torch.randperm(len(members), generator=generator)[:shots].tolist()]
    return sorted(drawn)


def find_bad_tiles(tiles: Tiles, workers: int = 0) -> dict[int, str]:
    """{index: what is wrong} of the tiles that cannot be decoded.

    Every tile is decoded once before the long work, so that a truncated file stops a run in its first minute and not
    in its last hour. Threads suffice: PIL decodes outside Python's lock. Raw
    pixels in HDF5 are passed over: the file was checked as a whole.
    """
    def check(index):
        try:
            if ".h5#" not in str(tiles.paths[index]):
                read_tile(tiles.paths[index])
        except ValueError as error:
            return index, str(error)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        checked = tqdm(pool.map(check, range(len(tiles))), "check tiles", len(tiles), leave=False, disable=None)
        return dict(filter(None, checked))


def load_reports(source, root="data", clean=False) -> list[str]:
    """Reports as a list of strings: a .txt with one report a line, a .csv or .jsonl with a column `text`, a folder of
    .txt files in name order, one report each, or a key of REPORTS, fetched into `root` before by download_reports.

    White space at both ends and empty reports are left out; clean: through clean_report. Prints the numbers.
    Raises FileNotFoundError or ValueError: missing, empty, not UTF-8 text, no text column, fewer than two reports.
    """
    files, licence, cancer = REPORTS.get(str(source), ([], "", None))
    for name, url, expected in files:
        if not Path(root, "reports", name).is_file():
            raise FileNotFoundError(f"--reports {source}: {Path(root, 'reports', name)} is missing; --download "
                                    f"fetches {url}\n(licence: {licence}); or give another --reports")
        _verify(Path(root, "reports", name), expected)
    asked, source = source, Path(root, "reports", files[0][0]) if files else Path(source)
    if not source.exists():
        raise FileNotFoundError(f"--reports {source}: no such file; expected .txt (a report a line), .csv, .jsonl, a "
                                f"folder of .txt, or {', '.join(REPORTS)}")
    try:
        if cancer:
            reports = _tcga_reports(source, Path(root, "reports", files[1][0]), cancer)
        elif source.is_dir():
            reports = [" ".join(f.read_text("utf-8").split()) for f in sorted(source.glob("*.txt"))]
        elif source.suffix == ".csv":
            csv.field_size_limit(2 ** 31 - 1)  # a report may be longer than csv's limit of 131,072 characters
            with open(source, encoding="utf-8", newline="") as file:
                reports = [_text_column(source, row) for row in csv.DictReader(file)]
        elif source.suffix == ".jsonl":
            rows = [json.loads(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
            reports = [_text_column(source, row) for row in rows]
        else:
            reports = source.read_text("utf-8").removesuffix("\n").split("\n")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(f"--reports {source}: not readable as UTF-8 text ({error}); save it as UTF-8") from None
    if any("\0" in report for report in reports):
        raise ValueError(f"--reports {source}: holds zero bytes, so it is not text; expected UTF-8 text")
    reports = [clean_report(report) if clean else report.strip() for report in reports]
    kept = [report for report in reports if report]
    if len(set(kept)) < 2:
        raise ValueError(f"--reports {source}: {len(set(kept))} distinct report(s) in it; pairing needs two or more"
                         + (" (a .txt holds one report a line)" if source.suffix == ".txt" else ""))
    print(f"{asked}: {len(kept)} reports ({len(kept) - len(set(kept))} duplicates), {len(reports) - len(kept)} empty "
          "left out")
    return kept


def _text_column(source, row) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        columns = ", ".join(str(key) for key in row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"--reports {source}: no column `text`; found {columns}; rename the column of the reports")
    return row["text"]


def _tcga_reports(archive, types, cancer) -> list[str]:
    """The TCGA-Reports of one cancer type. archive: a zipped .csv with columns patient_filename, which begins with the
    patient (TCGA-AB-1234), and text; types: a .csv with a patient and a type in each row, under whatever names."""
    csv.field_size_limit(2 ** 31 - 1)
    with open(types, encoding="utf-8", newline="") as file:
        patients = {cell[:12] for row in csv.reader(file) if cancer in row for cell in row if cell.startswith("TCGA-")}
    with zipfile.ZipFile(archive) as zipped:
        name = next(name for name in zipped.namelist() if name.endswith(".csv") and not name.startswith("__MACOSX"))
        rows = csv.DictReader(io.TextIOWrapper(zipped.open(name), "utf-8", newline=""))
        return [" ".join(_text_column(archive, row).split()) for row in rows
                if (row.get("patient_filename") or "")[:12] in patients]


NOISE = (r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]",                 # control characters, undecodable ones
         r"[I1l|]{5,}",                                          # strokes: rules and barcodes, IIIIIII
         r"(?<![^\W_])(?:(?:[^\w\s()\[\]%+/<>&#]|_)\s?){5,}")    # marks: _____, . ;: - .; one that ends a word stays


def clean_report(text: str) -> str:
    """The report in one line without runs of scanning noise. Words, numbers and single i, I, 1 and | stay. (The
    authors' cleaner, for PCAM alone, deletes every one of them: "Invasive, 1.2 cm" becomes "nvasve, . 2 cm".)"""
    for pattern in NOISE:
        text = " ".join(re.sub(pattern, " ", text).split())
    return text


# ---- Downloads: on --download alone ---------------------------------------------------------------------------------

def download(ds, root="data") -> None:
    """Fetch what is missing of a data set into `root`; nothing where ds is no download.

    Raises OSError for a full disk or a broken connection (the same call goes on from there) and ValueError for a file
    that is not the published one, which is removed.
    """
    row, root, need = DATASETS.get(ds, {}), Path(root), 0
    todo = [(archive, root / Path(archive["url"].partition("?")[0]).name) for archive in row.get("archives", ())
            if not (root / archive["to"]).exists()]
    for archive, path in todo:  # a .gz is unpacked on the way and never lies on the disk
        here = sum(f.stat().st_size for f in (path, path.with_name(path.name + ".part")) if f.exists())
        need += archive["disk_gb"] * 1e9 + (max(archive["gb"] * 1e9 - here, 0) if path.suffix == ".zip" else 0)
    root.mkdir(parents=True, exist_ok=True)
    if need > (free := shutil.disk_usage(root).free):
        raise OSError(f"--data-dir {root}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed; make room")
    for archive, path in todo:
        print(f"{archive['url']} to {root / archive['to']}; licence of {row['title']}: {row['licence']}")
        if path.suffix == ".gz":
            _fetch(archive["url"], root / archive["to"], f"md5:{archive['md5']}", gunzip=True)
            continue
        expected = f"md5:{archive['md5']}" if archive["md5"] else "zip:"
        if path.exists():
            _verify(path, expected)
        else:
            _fetch(archive["url"], path, expected)
        _unpack(path, root, archive["to"])
        print(f"{path} is no longer needed")


def download_reports(source, root="data") -> None:
    """Fetch what is missing of a key of REPORTS into `root`/reports; nothing for a file. Raises as download."""
    files, licence, _ = REPORTS.get(str(source), ((), "", None))
    for name, url, expected in files:
        if not Path(root, "reports", name).exists():
            print(f"{url} to {Path(root, 'reports', name)}; licence: {licence}")
            _fetch(url, Path(root, "reports", name), expected)


def _fetch(url, path, expected, gunzip=False) -> None:
    """Download to path.part, which becomes `path` once it is complete and as `expected` (see _verify).

    What a stopped run left is gone on from; not with gunzip, whose state is lost with the run.
    """
    part, unpack = path.with_name(path.name + ".part"), zlib.decompressobj(wbits=31)
    part.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() and not gunzip else 0
    try:
        with open(part, "ab" if start else "wb") as file:
            for chunk in _stream(url, start):
                file.write(unpack.decompress(chunk) if gunzip else chunk)
        if gunzip and not unpack.eof:
            raise ValueError("the .gz ends too early")
        _verify(part, expected)
    except (zlib.error, ValueError) as error:
        part.unlink()
        raise ValueError(f"{url}: what came is not the published file and was removed ({error}); try again") from None
    os.replace(part, path)


def _stream(url, start=0, tries=5):
    """The bytes of url from `start` on. After a break the rest is asked for (HTTP Range); of a server that begins anew,
    the bytes that are here are read past. ConnectionError after `tries` breaks in a row without a new byte."""
    position, total, failed = start, None, 0
    with tqdm(desc=url.rpartition("/")[2], initial=start, unit="B", unit_scale=True, disable=None) as bar:
        while failed < tries:
            time.sleep(2 ** failed if failed else 0)
            request = Request(url, headers={"Range": f"bytes={position}-"} if position else {})
            try:
                with urlopen(request, timeout=60) as response:
                    ranged = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
                    at = int(ranged[1]) if ranged else 0  # where this reply begins
                    size = ranged[2] if ranged else response.headers.get("Content-Length")
                    bar.total = total = int(size) if size else None
                    while at <= position and (chunk := response.read(1 << 20)):
                        new = chunk[position - at:]
                        at += len(chunk)
                        if new:
                            position, failed = position + len(new), 0
                            bar.update(len(new))
                            yield new
                if position >= (total or 0):  # without a length, _verify decides
                    return
                reason = "closed by the server"
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) and error.code == 416:  # nothing beyond what is here
                    return
                if isinstance(error, HTTPError) and error.code in (401, 403, 404, 410):
                    raise OSError(f"{url}: the server answers {error.code} {error.reason}") from None
                reason = error
            failed += 1
    raise ConnectionError(f"{url}: broke off after {position:,} of {total or '?'} bytes ({reason}); the same command "
                          "goes on")


def _verify(path, expected) -> None:
    """ValueError unless the file is as `expected`: md5:HEX, blob:HEX (git's id: the sha1 of "blob SIZE", a zero byte
    and the content), size:BYTES, or zip: (whole by every member's own CRC-32)."""
    kind, _, value = expected.partition(":")
    if kind == "zip":
        try:
            found = zipfile.ZipFile(path).testzip() or ""
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            found = str(error)
    elif kind == "size":
        found = str(path.stat().st_size)
    else:
        digest = hashlib.md5() if kind == "md5" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found = digest.hexdigest()
    if found != value:
        raise ValueError(f"{path}: {kind} {found}, expected {value or 'no fault'}; remove it and fetch it again with "
                         "--download")


def _unpack(archive: Path, root: Path, folder: str) -> None:
    """`folder` of the zip to root/folder by way of a temporary one, so that a folder of that name is complete.

    Raises ValueError before anything is written where a member would leave the folder or is a link.
    """
    temporary = archive.with_name(archive.name + ".unpacking")
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            name = PureWindowsPath(member.filename)  # it takes / and \ for separators and knows drives
            if name.anchor or ".." in name.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{archive}: its member {member.filename} leaves the folder or is a link; nothing was "
                                 "unpacked; remove this file")
        members = [member for member in zipped.infolist() if member.filename.startswith(f"{folder}/")]
        if not members:
            raise ValueError(f"{archive}: no {folder}/ in it; remove it and fetch it with --download")
        shutil.rmtree(temporary, ignore_errors=True)
        for member in tqdm(members, f"unpack {archive.name}", leave=False, disable=None):
            zipped.extract(member, temporary)
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary / folder, root / folder)
    shutil.rmtree(temporary)

"""Tiles with labels, their splits, and reports: everything that CLIP-IT reads from disk.

    from data import load_tiles, load_reports
    train = load_tiles("my_tiles", "train")     # my_tiles/train/CLASS/*.png; (PIL image, int) pairs
    reports = load_reports("reports.txt")       # one report a line

Travels alone. A data set is a row of DATASETS or a folder with train/ and test/ (val/ optional), each a folder of
class folders. Tiles and reports meet only in pairing.py, and labels never reach it.
"""
import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

# One row a data set. root: the folder of the splits; the other entries are train.py's defaults where they differ:
# shots draws that many labelled tiles a class from the training tiles, anew for each seed.
DATASETS = {
    "demo": dict(
        root=HERE / "tests/demo",
        reports=HERE / "tests/demo/reports.txt",
        clip_model=f"local-dir:{HERE}/tests/demo/clip",
        model=f"local-dir:{HERE}/tests/demo/backbone",
        shots=15, batch=32, ep=30, worker=0,
    ),
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
    """One tile as PIL RGB. Raises ValueError with the path where the file is truncated or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: PIL's word for a broken PNG
        raise ValueError(f"{path}: not a readable image ({error})") from None


def load_tiles(ds, split, root="data", transform=None, val_fraction=None) -> Tiles:
    """The tiles of one split.

    ds: a key of DATASETS or a folder; split: "train", "val" or "test"; root: where downloaded data sets lie;
    val_fraction: this share of the training tiles, stratified by class, is the validation split instead of the data
    set's own. Raises FileNotFoundError for a missing folder and ValueError for a data set that cannot be trained on.
    """
    folder = dataset_folder(ds)
    train, classes = _class_folder(folder / "train", None)
    if split == "test":
        return Tiles(*zip(*_class_folder(folder / "test", classes)[0]), classes, transform)
    if val_fraction is None and (folder / "val").is_dir():
        samples = train if split == "train" else _class_folder(folder / "val", classes)[0]
    else:
        kept, held = stratified_split([label for _, label in train], val_fraction or VAL_FRACTION, SPLIT_SEED)
        samples = [train[i] for i in (kept if split == "train" else held)]
    return Tiles(*zip(*samples), classes, transform)


def dataset_folder(ds) -> Path:
    """The folder of a data set's splits; looks at no tile. Raises FileNotFoundError with the choices."""
    folder = Path(DATASETS[ds]["root"] if ds in DATASETS else ds)
    if not folder.is_dir():
        raise FileNotFoundError(f"--ds {ds}: neither a folder nor one of {', '.join(DATASETS)}")
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(f"--ds {ds}: {folder / split} is missing; expected {folder}/train and "
                                    f"{folder}/test (val is optional), each with one folder a class")
    return folder


def _class_folder(folder, classes) -> tuple[list[tuple[str, int]], list[str]]:
    """[(path, label)] and the class names of a folder of class folders, in torchvision's order (sorted names)."""
    found = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: no class folders in it; expected {folder}/CLASS/*.png (or .jpg, .tif)")
    if len(found) == 1:
        raise ValueError(f"{folder}: a single class ({found[0]}); a classifier needs two class folders or more")
    if classes is not None and found != classes:
        raise ValueError(f"{folder}: its classes differ from those in train: only here {set(found) - set(classes) or '-'}"
                         f", only in train {set(classes) - set(found) or '-'}; make the folder names equal")
    samples = make_dataset(folder, {name: i for i, name in enumerate(found)}, IMG_EXTENSIONS, allow_empty=True)
    empty = set(range(len(found))) - {label for _, label in samples}
    if empty:
        raise ValueError(f"{folder}: no image in class {', '.join(found[i] for i in sorted(empty))}; "
                         f"put tiles there ({' '.join(IMG_EXTENSIONS)}) or remove the class from every split")
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
    in its last hour. Threads suffice: PIL decodes outside Python's lock.
    """
    def check(index):
        try:
            read_tile(tiles.paths[index])
        except ValueError as error:
            return index, str(error)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        checked = tqdm(pool.map(check, range(len(tiles))), "check tiles", len(tiles), leave=False, disable=None)
        return dict(filter(None, checked))


def load_reports(source) -> list[str]:
    """Reports as a list of strings: a .txt with one report a line, a .csv or .jsonl with a column `text`, or a folder
    of .txt files in name order, one report each. White space at both ends and empty reports are left out.

    Raises FileNotFoundError or ValueError: missing, empty, not UTF-8 text, no text column, fewer than two reports.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"--reports {source}: no such file; expected .txt (a report a line), .csv, .jsonl or a "
                                "folder of .txt")
    try:
        if source.is_dir():
            reports = [" ".join(f.read_text("utf-8").split()) for f in sorted(source.glob("*.txt"))]
        elif source.suffix == ".csv":
            csv.field_size_limit(2 ** 31 - 1)  # a report may be longer than csv's limit of 131,072 characters
            with open(source, encoding="utf-8", newline="") as file:
                reports = [_text_column(source, row) for row in csv.DictReader(file)]
        elif source.suffix == ".jsonl":
            rows = [json.loads(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
            reports = [_text_column(source, row) for row in rows]
        else:
            reports = source.read_text("utf-8").split("\n")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"--reports {source}: not readable as UTF-8 text ({error}); save it as UTF-8") from None
    reports = [report.strip() for report in reports]
    kept = [report for report in reports if report]
    if any("\0" in report for report in kept):
        raise ValueError(f"--reports {source}: holds zero bytes, so it is not text; expected UTF-8 text")
    if len(set(kept)) < 2:
        raise ValueError(f"--reports {source}: {len(set(kept))} distinct report(s) in it; pairing needs two or more"
                         + (" (a .txt holds one report a line)" if source.suffix == ".txt" else ""))
    return kept


def _text_column(source, row) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        columns = ", ".join(str(key) for key in row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"--reports {source}: no column `text`; found {columns}; rename the column of the reports")
    return row["text"]

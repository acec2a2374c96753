"""Make the demo's small world: tiles, reports, a CLIP model and a vision backbone, all from seeds.

    python tests/make_demo.py                    # writes tests/demo/, some minutes on two CPU cores
    python tests/make_demo.py --out FOLDER --world 1   # another world: every seed moved

What comes out, in the order it is made
    train/ val/ test/  KIND/NNN.jpg   H&E-like tiles, 64 px, nine tissue kinds named as in the CRC set
    reports.txt                       one report a line, of cases that have no tile here
    backbone/                         a timm ViT trained on colour, not on structure
    clip/                             an open_clip model trained on tile-report pairs of yet other cases

A tile is painted as two layers, how much hematoxylin and how much eosin each pixel holds, and then coloured
by optical density, light = exp(-stain @ vectors), with a jitter of the stain. Most fields hold some of a
second tissue.

What is kept apart: every case has one seed, and the seeds of the train, val and test tiles, of reports.txt
and of the cases that train the two models are five ranges without a common number, so no tile and no report
is seen twice. Both models train on the tiles of the same cases. The backbone reads no text and no label.
CLIP reads tile and report of a case, never a label. Reports describe findings, and pairing them with tiles
is left to the CLIP model alone.

Nothing here is the paper's data and no number measured on it is the paper's result: the world exists to run
every step of the method offline, and to have a case where the text knows something that the image labels do
not tell.
"""
import argparse
import json
import math
import shutil
import time
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

KINDS = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
TILE, CANVAS = 64, 128                      # pixels of a tile; painted at twice its size, averaged down

MIXED = 0.75                                # share of the fields in which a second kind of tissue intrudes
HEMATOXYLIN = np.array([0.56, 0.72, 0.41])  # optical density of the red, green and blue light, unit length
EOSIN = np.array([0.16, 0.85, 0.50])

SPLITS = {"train": 75, "val": 20, "test": 100}   # tiles a kind
PAIRS, PAIR_SEED = 4000, 10_000_000         # cases for the two small models, in no split
REPORTS, REPORT_SEED = 400, 20_000_000      # cases whose reports the demo offers; they have no tile
CLIP_EPOCHS, BACKBONE_EPOCHS = 20, 8
MEAN, STD = [0.74, 0.55, 0.69], [0.18, 0.22, 0.17]
CLIP_MODEL = {"embed_dim": 64,
              "vision_cfg": {"image_size": TILE, "layers": [1, 1, 1, 1], "width": 16},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
BACKBONE_ARGS = {"img_size": TILE, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}

ROWS, COLUMNS = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
FREQ_Y, FREQ_X = np.fft.fftfreq(CANVAS)[:, None], np.fft.rfftfreq(CANVAS)[None, :]


class Field(NamedTuple):
    """What is in one field of view; tile and report of a case are both made from it."""
    kind: str                               # the main tissue, the label of the tile
    other: str                              # the tissue beside it
    share: float                            # the part of the field the other tissue takes, 0 for none
    cellularity: float                      # 0 few cells, 1 many


def field_of(kind, seed):
    """The field of a case. Each use of a seed draws from a stream of its own: [seed, 0], [seed, 1] ..."""
    rng = np.random.default_rng([seed, 0])
    other = str(rng.choice([k for k in KINDS if k != kind]))
    share = float(rng.uniform(0.1, 0.35)) if rng.random() < MIXED else 0.0
    return Field(kind, other, share, float(rng.random()))


# ---- reports ------------------------------------------------------------------------------------

FINDINGS = {                                # (wordings as the main finding, wordings as a neighbouring one)
    "ADI": (("lobules of large clear cells with a single fat vacuole and a thin pink rim",
             "mature adipocytes, empty round spaces divided by delicate membranes with flattened nuclei",
             "a honeycomb of optically clear vacuoles bounded by slender septa"),
            ("fat lobules at the edge", "adjoining adipocytes with clear vacuoles", "a rim of fatty tissue")),
    "BACK": (("mostly bare glass, nearly colourless, with a few specks of dust",
              "an almost empty field, tissue lost in sectioning, stray shreds only",
              "pale vacant areas without cells, apparently outside the tissue"),
             ("an empty area of glass beside it", "loss of tissue with blank glass", "a vacant pale zone")),
    "DEB": (("smudgy granular necrotic material with pyknotic fragments and ghost outlines of cells",
             "amorphous pink debris strewn with nuclear dust and karyorrhexis",
             "coagulated, structureless matter with fading nuclei and extravasated red cells"),
            ("a focus of necrosis with nuclear dust", "granular debris nearby", "patchy karyorrhexis")),
    "LYM": (("sheets of small round lymphoid cells with scant cytoplasm and dark even nuclei",
             "a dense monotonous infiltrate of mature lymphocytes",
             "closely packed little round blue cells, in places forming a follicle"),
            ("an aggregate of small round lymphocytes", "dense lymphoid infiltrate next to it",
             "a lymphoid follicle in part of the field")),
    "MUC": (("pools of pale bluish extracellular mucin in flowing streaks with rare floating cells",
             "a lake of wispy mucoid substance, almost acellular",
             "abundant stringy mucin dissecting the tissue, an occasional signet-ring cell in it"),
            ("a pool of pale mucin alongside", "streaks of extracellular mucin",
             "wispy mucoid material nearby")),
    "MUS": (("parallel eosinophilic bundles of smooth muscle with elongated blunt-ended nuclei",
             "interlacing fascicles of long pink fibres, cigar-shaped nuclei lying along them",
             "muscularis propria, evenly pink, its spindle nuclei all in one direction"),
            ("bundles of smooth muscle at one side", "muscle fascicles with cigar-shaped nuclei",
             "a strip of muscularis")),
    "NORM": (("evenly spaced round crypts lined by goblet cells with basal nuclei around a small lumen",
              "regular test-tube glands rich in mucin vacuoles, plasma cells in the lamina propria",
              "orderly colonic glands in rings, nuclei in a single basal row, no atypia"),
             ("some regular crypts with goblet cells", "orderly glands with basal nuclei nearby",
              "uninvolved round crypts at the margin of the field")),
    "STR": (("loose wavy collagen with clefts and plump spindle fibroblasts, a few inflammatory cells",
             "desmoplastic reaction, irregular fibres in all directions with scattered spindle nuclei",
             "fibrous tissue of tangled pink strands, active fibroblasts and oedema"),
            ("a band of wavy collagen", "desmoplastic fibrous tissue with spindle cells",
             "loose fibroblastic reaction around it")),
    "TUM": (("crowded irregular glands with large overlapping pleomorphic nuclei and dirty lumina",
             "solid and cribriform nests of atypical epithelium, nuclei enlarged and vesicular, mitoses seen",
             "malignant epithelium, stratified hyperchromatic nuclei, loss of polarity"),
            ("nests of atypical epithelium with large nuclei", "infiltrating pleomorphic glands at one edge",
             "crowded malignant nuclei in part of the field")),
}
OPENINGS = ("Microscopy shows {}.", "Sections show {}.", "The material consists of {}.", "Histology: {}.",
            "We see {}.", "The field is made up of {}.", "On examination there are {}.", "{}.")
NEIGHBOURS = ("Also present: {}.", "Focally {}.", "In addition, {}.", "Also noted: {}.")
CELLULARITY = (("Low cellularity.", "Few cells overall.", "Sparsely cellular."),
               ("Moderate cellularity.", "Cell density is intermediate.", "Moderately cellular."),
               ("High cellularity.", "Many cells.", "Densely cellular."))
SPECIMENS = ("Sigmoid resection.", "Right hemicolectomy.", "Rectal biopsy.", "Caecum, endoscopic sample.",
             "Transverse colon, segment.", "Specimen received in formalin.", "Descending colon, block {}.",
             "Liver, core biopsy.")
REMARKS = ("Margins are free.", "The resection margin is not assessable.", "Immunostains are pending.",
           "Slides reviewed with a colleague.", "Clinical correlation is advised.", "Stain quality adequate.",
           "Levels were cut, block {}.", "No vascular invasion seen here.", "Patient aged {} years.",
           "Compared with earlier sample {}.")


def kind_of_case(seed):
    """The tissue of a case that is in no folder: of the pairs that train CLIP, and of the reports."""
    return str(np.random.default_rng([seed, 2]).choice(KINDS))


def write_report(seed):
    """The one-line report of a case: what its field shows, among remarks that tell nothing of it."""
    rng, field = np.random.default_rng([seed, 3]), field_of(kind_of_case(seed), seed)
    finding = OPENINGS[rng.integers(len(OPENINGS))].format(rng.choice(FINDINGS[field.kind][0]))
    lines = [finding[0].upper() + finding[1:]]
    if field.share:
        lines.append(str(rng.choice(NEIGHBOURS)).format(rng.choice(FINDINGS[field.other][1])))
    if rng.random() < 0.5:
        lines.append(str(rng.choice(CELLULARITY[min(int(3 * field.cellularity), 2)])))
    lines.insert(0, str(rng.choice(SPECIMENS)))
    remarks = rng.choice(REMARKS, 2, replace=False)
    return " ".join(lines + [str(remark) for remark in remarks]).format(*rng.integers(2, 90, 3))


# ---- painting -----------------------------------------------------------------------------------

def cloud(rng, size, angle=0.0, stretch=1.0):
    """Smooth noise, mean 0 and variance 1, blobs `size` px wide and `stretch` times as long. (H, W)"""
    along = FREQ_X * math.cos(angle) + FREQ_Y * math.sin(angle)
    across = FREQ_Y * math.cos(angle) - FREQ_X * math.sin(angle)
    spectrum = np.fft.rfft2(rng.standard_normal((CANVAS, CANVAS)))
    blur = np.exp(-2 * size ** 2 * ((along * stretch) ** 2 + across ** 2))
    noise = np.fft.irfft2(spectrum * blur, (CANVAS, CANVAS))
    return ((noise - noise.mean()) / (noise.std() + 1e-9)).astype(np.float32)


def soft(values, edge=0.0, width=1.0):
    """0 below the edge, 1 above it, a smooth slope of the given width between."""
    return np.clip((values - edge) / width + 0.5, 0, 1)


def wavy(rng, pattern, reach, size):
    """The pattern with its lines bent: each pixel is read from a smoothly displaced place."""
    rows = (ROWS + reach * cloud(rng, size)).astype(int) % CANVAS
    columns = (COLUMNS + reach * cloud(rng, size)).astype(int) % CANVAS
    return pattern[rows, columns]


def stamp(rng, layer, x, y, length, width, angle, depth, lobes=0.0, rim=0.3):
    """Press one nucleus (or cell) into a layer: an ellipse with a ragged outline and clumped chromatin."""
    reach = int(max(length, width) * 1.3) + 2
    top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
    window = layer[top:int(y) + reach + 1, left:int(x) + reach + 1]
    if window.size == 0 or x < -reach or y < -reach:
        return
    dy, dx = np.ogrid[top - y:top - y + window.shape[0], left - x:left - x + window.shape[1]]
    dy, dx = dy[:window.shape[0]], dx[:, :window.shape[1]]
    along = (dx * math.cos(angle) + dy * math.sin(angle)) / length
    across = (dy * math.cos(angle) - dx * math.sin(angle)) / width
    radius = np.sqrt(along ** 2 + across ** 2)
    if lobes:
        turn = np.arctan2(across, along)
        two, three = rng.uniform(0, 6, 2)
        radius = radius * (1 + lobes * (np.sin(2 * turn + two) + np.sin(3 * turn + three)))
    chromatin = 1 - rim + rim * radius ** 2 + 0.12 * rng.standard_normal(window.shape)
    ink = depth * chromatin * soft((1 - radius) * min(length, width), 0, 1.6)
    np.maximum(window, ink, out=window)


def spread(rng, count, gap):
    """Up to `count` random places at least `gap` px apart, reaching a little over the border. (n, 2)"""
    places = np.empty((0, 2))
    for candidate in rng.uniform(-6, CANVAS + 6, (count * 4, 2)):
        if len(places) < count and (((places - candidate) ** 2).sum(1) >= gap * gap).all():
            places = np.vstack([places, candidate])
    return places


def scatter(rng, hema, count, gap, size, depth, allowed=None, angle=None, slender=0.8, lobes=0.06, rim=0.3):
    """Strew nuclei over a layer, only where `allowed` says so and along `angle` if one is given."""
    for x, y in spread(rng, count, gap):
        row, column = int(np.clip(y, 0, CANVAS - 1)), int(np.clip(x, 0, CANVAS - 1))
        if allowed is not None and not allowed[row, column]:
            continue
        if angle is None:
            turn = rng.uniform(0, math.pi)
        else:                               # one angle for the whole field, or one for each pixel
            turn = np.broadcast_to(angle, (CANVAS, CANVAS))[row, column] + rng.normal(0, 0.15)
        length = size * rng.uniform(0.8, 1.25)
        stamp(rng, hema, x, y, length, length * slender * rng.uniform(0.85, 1.15), turn,
              depth * rng.uniform(0.75, 1.15), lobes, rim)


def cells(rng, count):
    """A Voronoi pattern of `count` cells: 0 on the walls, growing inwards. (H, W)"""
    places = spread(rng, count, 100 / math.sqrt(count))
    far = np.sort(np.hypot(COLUMNS[..., None] - places[:, 0], ROWS[..., None] - places[:, 1]), axis=2)
    return far[..., 1] - far[..., 0]


def adipose(rng, cellularity):
    wall = wavy(rng, cells(rng, int(rng.integers(8, 16))), 2, 10)
    width = rng.uniform(0.8, 3.0)
    strand = 1 - soft(wall, width, 2.0)
    eosin = 0.03 + strand * (0.45 + 0.12 * cloud(rng, 2))
    hema = 0.02 + 0.08 * strand
    scatter(rng, hema, int(10 + 26 * cellularity), 5, 4.5, 0.85, wall < width + 1, slender=0.5)
    if rng.random() < 0.35:                 # a capillary or a fibrous septum
        septum = soft(-abs(cloud(rng, 22, rng.uniform(0, 3), 3)), -0.25, 0.15)
        eosin = np.maximum(eosin, septum * (0.5 + 0.1 * cloud(rng, 2)))
        scatter(rng, hema, 30, 6, 4, 0.9, septum > 0.5, slender=0.5)
    return hema, eosin


def background(rng, cellularity):
    hema = 0.025 + 0.012 * cloud(rng, 20)
    eosin = 0.03 + 0.015 * cloud(rng, 25)
    if rng.random() < 0.5:                  # mounting medium streaks and dust
        eosin = eosin + 0.04 * soft(cloud(rng, 4, rng.uniform(0, 3), 8), 1.2, 0.8)
    scatter(rng, hema, int(rng.integers(0, 6 + int(8 * cellularity))), 8, 1.8, 0.5)
    if rng.random() < 0.4:                  # a loose shred of tissue
        shred = soft(cloud(rng, 12) + 0.3 * cloud(rng, 3), 1.7, 0.3)
        eosin = eosin + 0.3 * shred
        scatter(rng, hema, 40, 6, 3.5, 0.7, shred > 0.5)
    return hema, eosin


def debris(rng, cellularity):
    smudge = 0.9 * cloud(rng, 14) + 0.5 * cloud(rng, 2.5)
    eosin = 0.55 + 0.13 * smudge + 0.06 * cloud(rng, 0.8)
    hema = 0.14 + 0.08 * soft(cloud(rng, 6), 0.3, 1.5) + 0.04 * cloud(rng, 0.8)
    cracks = soft(cloud(rng, 6) + 0.4 * cloud(rng, 2), rng.uniform(1.2, 2.6), 0.4)
    eosin = eosin * (1 - 0.85 * cracks)
    ghosts, dust = cloud(rng, 14) > 0, cloud(rng, 12) > -0.2
    scatter(rng, hema, int(20 + 40 * cellularity), 7, 4.5, 0.36, ghosts, rim=0.7)       # fading nuclei
    scatter(rng, hema, int(60 + 150 * cellularity), 2, 1.7, 1.0, dust, lobes=0.2, rim=0.1)
    if rng.random() < 0.5:                  # extravasated red cells
        scatter(rng, eosin, 70, 5, 3.2, 1.0, cloud(rng, 12) > 0.6, slender=0.95, lobes=0.03, rim=0.5)
    return hema, eosin


def lymphocytes(rng, cellularity):
    eosin = 0.24 + 0.07 * cloud(rng, 5)
    hema = 0.1 + 0.03 * cloud(rng, 4)
    gaps = cloud(rng, 9)
    scatter(rng, hema, int(150 + 130 * cellularity), 6.4, 4.0, 1.15, gaps < 1.4, slender=0.95, lobes=0.04,
            rim=0.25)
    if rng.random() < 0.5:                  # larger pale centre cells or macrophages
        scatter(rng, hema, 12, 14, 6, 0.6, cloud(rng, 16) > 0.3, slender=0.9, rim=0.6)
    if rng.random() < 0.4:
        fibre = soft(wavy(rng, cloud(rng, 3, rng.uniform(0, 3), 9), 5, 18), 1.1, 0.4)
        eosin = np.maximum(eosin, 0.5 * fibre)
    return hema, eosin


def mucus(rng, cellularity):
    angle = rng.uniform(0, math.pi)
    streak = wavy(rng, cloud(rng, 2.2, angle, 9), 8, 22)
    veil = soft(wavy(rng, cloud(rng, 7, angle, 4), 8, 25), 0.2, 2.2)
    hema = 0.07 + 0.17 * veil + 0.07 * soft(streak, 0.6, 1.2)
    eosin = 0.05 + 0.10 * veil + 0.05 * soft(streak, 0.6, 1.2)
    scatter(rng, hema, int(4 + 20 * cellularity), 8, 4.2, 0.9, cloud(rng, 14) > 0.5)
    for x, y in spread(rng, int(rng.integers(0, 4)), 26):        # floating signet-like cells
        turn, size = rng.uniform(0, 6), rng.uniform(7, 10)
        stamp(rng, eosin, x, y, size, size * 0.9, turn, 0.38, 0.05, rim=0.75)
        stamp(rng, hema, x + size * math.cos(turn), y + size * math.sin(turn), 3, 5.5, turn, 0.95)
    return hema, eosin


def muscle(rng, cellularity):
    angle = rng.uniform(0, math.pi)
    bundle = wavy(rng, cloud(rng, 2.0, angle, 12), 3, 30)
    seams = soft(wavy(rng, cloud(rng, 4.5, angle, 10), 3, 30), 1.5, 0.3)
    eosin = (0.66 + 0.09 * bundle + 0.05 * cloud(rng, 12)) * (1 - 0.6 * seams)
    hema = 0.10 + 0.03 * bundle
    scatter(rng, hema, int(22 + 34 * cellularity), 9, 8.5, 0.85, seams < 0.5, angle, slender=0.27, lobes=0.03)
    return hema, eosin


def crypts(rng, cellularity):
    """Round glands: goblet cells around a small lumen, one row of nuclei on the rim, plasma cells between."""
    eosin = 0.34 + 0.07 * cloud(rng, 3)
    hema = 0.11 + 0.03 * cloud(rng, 3)
    outside = np.ones((CANVAS, CANVAS), bool)
    radius = rng.uniform(25, 34)
    for x, y in spread(rng, 6, radius * 2.15):
        size, squash, turn = radius * rng.uniform(0.85, 1.1), rng.uniform(0.72, 1.0), rng.uniform(0, math.pi)
        along = ((COLUMNS - x) * math.cos(turn) + (ROWS - y) * math.sin(turn)) / size
        across = ((ROWS - y) * math.cos(turn) - (COLUMNS - x) * math.sin(turn)) / (size * squash)
        depth = np.hypot(along, across)     # 0 in the middle of the gland, 1 on its rim
        inside = depth < 1.04
        outside &= depth > 1.12
        eosin[inside], hema[inside] = 0.42, 0.16
        lumen = depth < rng.uniform(0.12, 0.28)
        hema[lumen], eosin[lumen] = 0.04, 0.06
        around = int(2 * math.pi * size / 7.5)
        goblet = rng.uniform(0.45, 0.9)
        for step in range(around):
            theta = 2 * math.pi * (step + rng.uniform(-0.25, 0.25)) / around
            ux, uy = math.cos(theta), squash * math.sin(theta)
            px, py = ux * math.cos(turn) - uy * math.sin(turn), ux * math.sin(turn) + uy * math.cos(turn)
            heading = math.atan2(py, px)
            if rng.random() < goblet:       # a goblet of mucin: lift stain out of the cell
                vacuole = np.zeros((CANVAS, CANVAS), np.float32)
                stamp(rng, vacuole, x + 0.6 * px * size, y + 0.6 * py * size, 7.0, 4.0, heading, 1.0, rim=0.0)
                eosin *= 1 - 0.72 * vacuole
                hema += 0.06 * vacuole
            stamp(rng, hema, x + 0.93 * px * size, y + 0.93 * py * size, 4.6, 3.2,
                  heading + rng.normal(0, 0.2), 0.95 * rng.uniform(0.85, 1.1))
    scatter(rng, hema, int(50 + 90 * cellularity), 7, 3.9, 0.95, outside, slender=0.8)
    return hema, eosin


def stroma(rng, cellularity):
    angle = rng.uniform(0, math.pi)
    fibre = wavy(rng, cloud(rng, 1.6, angle, 7), 9, 14)
    clefts = soft(wavy(rng, cloud(rng, 3, angle, 5), 9, 14), 0.9, 0.6)
    eosin = (0.48 + 0.11 * fibre) * (1 - 0.75 * clefts)
    hema = 0.09 + 0.03 * fibre + 0.05 * soft(cloud(rng, 16), 0.6, 1)
    along = angle + 0.5 * cloud(rng, 14)
    scatter(rng, hema, int(26 + 50 * cellularity), 8, 6.8, 0.92, None, along, slender=0.34, lobes=0.1)
    scatter(rng, hema, int(8 + 30 * cellularity), 6, 3.8, 1.05, cloud(rng, 14) > 0.7, slender=0.95)
    return hema, eosin


def tumour(rng, cellularity):
    lobe = 0.8 * cloud(rng, 13) + 0.2 * cloud(rng, 4)
    nest = soft(lobe, -0.75, 0.25)          # epithelium; thin desmoplastic stroma between the nests
    fibre = wavy(rng, cloud(rng, 1.8, rng.uniform(0, 3), 6), 7, 14)
    eosin = nest * (0.42 + 0.06 * cloud(rng, 3)) + (1 - nest) * (0.42 + 0.11 * fibre)
    hema = 0.08 + 0.16 * nest + 0.03 * cloud(rng, 3)
    lumen = soft(cloud(rng, 10) + 0.2 * cloud(rng, 3), rng.uniform(0.9, 2.4), 0.2)
    lumen = lumen * soft(lobe, -0.2, 0.4)   # inside a nest, not at its border
    eosin, hema = eosin * (1 - 0.85 * lumen), hema * (1 - 0.75 * lumen)
    scatter(rng, hema, int(90 + 70 * cellularity), 8.2, 7.0, 0.9, (nest > 0.6) & (lumen < 0.3),
            2 * cloud(rng, 14), slender=0.66, lobes=0.12, rim=0.45)
    scatter(rng, hema, 18, 9, 6, 0.9, nest < 0.3, slender=0.35)
    scatter(rng, hema, int(rng.integers(0, 22)), 4, 2, 1.0, lumen > 0.5, lobes=0.2)   # dirty necrosis
    return hema, eosin


PAINTERS = dict(zip(KINDS, (adipose, background, debris, lymphocytes, mucus, muscle, crypts, stroma, tumour)))


def render_tile(kind, seed):
    """One H&E-like tile of the kind; the same seed gives the same tile. -> PIL RGB image of 64 x 64"""
    field, rng = field_of(kind, seed), np.random.default_rng([seed, 1])
    hema, eosin = PAINTERS[kind](rng, field.cellularity)
    if field.share:                         # a neighbouring tissue grows in over a smooth border
        relief = cloud(rng, 24) + 0.06 * cloud(rng, 5)
        mask = soft(relief, np.quantile(relief, 1 - field.share), 0.15)
        other_hema, other_eosin = PAINTERS[field.other](rng, field.cellularity)
        hema, eosin = hema + mask * (other_hema - hema), eosin + mask * (other_eosin - eosin)
    # stain jitter of the laboratory: strength of each dye, hue of each dye, thickness of the section
    hema_strength, eosin_strength, thickness = np.exp(rng.normal(0, (0.20, 0.22, 0.12)))
    vectors = np.stack([HEMATOXYLIN, EOSIN]) + rng.normal(0, 0.035, (2, 3))
    stains = thickness * np.stack([1.25 * hema_strength * hema, eosin_strength * eosin], 2)  # (128, 128, 2)
    density = np.clip(stains, 0, None) @ vectors + 0.02                                      # (128, 128, 3)
    density = density.reshape(TILE, 2, TILE, 2, 3).mean((1, 3))                              # (64, 64, 3)
    light = 250 * np.exp(-density) + rng.normal(0, 2.0, density.shape)
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))


# ---- the two small models -----------------------------------------------------------------------

def half(tensor):
    """Sixteen bits are enough to store a weight; counters stay whole numbers."""
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous()


def batches(count, size, epochs, rng):
    """Index tensors of `size`, reshuffled each epoch, the incomplete last one left out."""
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(count))
        yield from order[:count - count % size].split(size)


def turned(images, rng):
    """A random flip and quarter turn for the whole batch; tissue has no right way up. (B, 3, H, W)"""
    images = torch.rot90(images, int(rng.integers(4)), (2, 3))
    return images.flip(3) if rng.random() < 0.5 else images


def train_by(model, loss_of, count, batch, epochs, rate, seed):
    """AdamW, one-cycle rate; `loss_of(index, rng)` is the loss of a batch. -> mean loss of the last epoch"""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    for index in batches(count, batch, epochs, rng):
        loss = loss_of(index, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-(count // batch):]))


def train_clip(images, reports, folder, epochs=CLIP_EPOCHS, seed=0):
    """Train a small open_clip model on tile-report pairs and write it as open_clip's local-dir format."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    model = open_clip.model.CLIP(**{**CLIP_MODEL, "vision_cfg": dict(CLIP_MODEL["vision_cfg"]),
                                    "text_cfg": dict(CLIP_MODEL["text_cfg"])})
    tokens = open_clip.SimpleTokenizer()(reports)                                            # (N, 77)

    def loss_of(index, rng):
        image, text, scale = model(turned(images[index], rng), tokens[index])                # (B, 64) each
        logits = scale * image @ text.T                                                      # (B, B)
        target = torch.arange(len(index))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    loss = train_by(model, loss_of, len(images), 100, epochs, 1e-3, seed)
    # a word that no report used was never trained: leave it without meaning instead of with random noise
    unused = torch.ones(len(model.token_embedding.weight), dtype=torch.bool)
    unused[tokens.unique()] = False
    state = model.state_dict()
    state["token_embedding.weight"][unused] = 0
    save_file({name: half(tensor) for name, tensor in state.items()},
              folder / "open_clip_model.safetensors")
    preprocess = {"size": TILE, "mean": MEAN, "std": STD, "interpolation": "bicubic",
                  "resize_mode": "shortest"}
    config = {"model_cfg": CLIP_MODEL, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return loss


def colour_statistics(images):
    """Of each channel's optical density: mean, spread and three quantiles, standardised. (N, 3, H, W) -> (N, 15)"""
    light = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    density = -torch.log(light.clamp(min=0.02))                                              # (N, 3, H, W)
    density = density.flatten(2)                                                             # (N, 3, H*W)
    parts = [density.mean(2), density.std(2), *density.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=2)]
    table = torch.cat(parts, dim=1)
    return (table - table.mean(0)) / table.std(0)


def train_backbone(images, folder, epochs=BACKBONE_EPOCHS, seed=0):
    """Train a small timm ViT to tell a tile's colour statistics and write it in timm's local-dir format."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **BACKBONE_ARGS)
    targets = colour_statistics(images)
    probe = torch.nn.Linear(model.num_features, targets.shape[1])
    both = torch.nn.Sequential(model, probe)
    loss = train_by(both, lambda index, rng: F.mse_loss(both(turned(images[index], rng)), targets[index]),
                    len(images), 100, epochs, 1e-3, seed)
    save_file({name: half(tensor) for name, tensor in model.state_dict().items()},
              folder / "model.safetensors")
    size = [3, TILE, TILE]
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": model.num_features,
              "global_pool": "token", "model_args": BACKBONE_ARGS,
              "pretrained_cfg": {"input_size": size, "fixed_input_size": True, "interpolation": "bicubic",
                                 "crop_pct": 1.0, "crop_mode": "center", "mean": MEAN, "std": STD,
                                 "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
                                 "license": "mit"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return loss


# ---- the whole demo -----------------------------------------------------------------------------

def tile_seed(split, kind, index):
    """The seed of tests/demo/SPLIT/KIND/INDEX.jpg"""
    return (list(SPLITS).index(split) + 1) * 1_000_000 + KINDS.index(kind) * 10_000 + index


def save_tile(task):
    """Paint the tile of (path, kind, seed) and write it."""
    path, kind, seed = task
    render_tile(kind, seed).save(path, quality=90)


def render_array(seed):
    """The tile that belongs to the report of the case. (64, 64, 3) uint8"""
    return np.asarray(render_tile(kind_of_case(seed), seed))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the demo's tiles, reports and models from seeds.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--world", type=int, default=0, help="moves every seed; 0 is the committed one")
    args = parser.parse_args(argv)
    out, world, first = args.out, args.world, args.world * 100_000_000
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    start = time.time()

    def say(text):
        print(f"{time.time() - start:6.0f} s  {text}", flush=True)

    tasks = []
    for split, count in SPLITS.items():
        for kind in KINDS:
            (fresh / split / kind).mkdir(parents=True)
            tasks += [(fresh / split / kind / f"{index:03d}.jpg", kind, first + tile_seed(split, kind, index))
                      for index in range(count)]
    pair_seeds = range(first + PAIR_SEED, first + PAIR_SEED + PAIRS)
    with Pool() as pool:
        pool.map(save_tile, tasks, chunksize=20)
        say(f"{len(tasks)} tiles")
        tiles = np.stack(pool.map(render_array, pair_seeds, chunksize=20))                   # (N, 64, 64, 3)
    say(f"{PAIRS} pairs for pre-training")
    reports = [write_report(first + REPORT_SEED + index) for index in range(REPORTS)]
    (fresh / "reports.txt").write_text("\n".join(reports) + "\n")
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    images = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]  # (N, 3, 64, 64)
    say(f"backbone, colour error {train_backbone(images, fresh / 'backbone', seed=world):.3f}")
    pair_reports = [write_report(seed) for seed in pair_seeds]
    say(f"CLIP, contrastive loss {train_clip(images, pair_reports, fresh / 'clip', seed=world):.3f}")
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    say(f"wrote {out}")


if __name__ == "__main__":
    main()

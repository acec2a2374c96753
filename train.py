"""CLIP-IT from end to end: pair, vision head, text head, fuse and distil, text-free test.

    python train.py                                      # the demo: offline, a minute on two cores
    python train.py --ds my_tiles --reports reports.txt  # my_tiles/{train,test}/CLASS/*.png
    python train.py --ds crc --download --model VITS_16  # the paper's data, fetched once to data/
    python train.py --no-text                            # the ablation: all but the distillation
    python train.py --table runs                         # finished runs: mean, sd, differences
    torchrun --nproc_per_node 4 -- train.py --ds crc     # four processes share every batch

A run writes DIR/OUTPUT/RUN/: args.json, log.jsonl, pairs.csv, metrics.json, predictions.csv,
report.html to look at, last.pt to go on from, and classifier/, the text-free model for clipit.py.
The same command again goes on with a stopped run and shows a finished one.
"""
import argparse
import copy
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from base64 import b64encode
from html import escape
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm

from clipit import BACKBONES, ClipIT, clipit_loss, load_backbone, text_classifier, whole
from data import (DATASETS, REPORTS, SPLITS, Tiles, download, draw_shots, load_tiles, lock,
                  read_reports, tile_side, warn_of_repeated_tiles)
from lora import TARGETS, inject_lora
from pairing import CLIPS, embed_texts, load_clip, nearest_text


def main(argv=None) -> dict:
    """One run, the paper in five steps; returns what metrics.json holds.

    N tiles, M reports, C classes; D, d: the sizes of the backbone's and of CLIP's features.
    """
    args = parse_args(argv)
    if args.table:
        return table(Path(args.table), args.against)
    clip, backbone = load_models(args)
    tiles, labels, reports = load_data(backbone, args)  # by split: Tiles, (N,); M texts
    classes = tiles["train"].classes
    run = open_run(args, clip, backbone, tiles, reports)
    if metrics := found_metrics(run):
        return metrics

    # 1. Pair: psi(i) = argmax_j cos(v_i, t_j), by CLIP alone; no label is read
    text_emb = cached(["CLIP", "reports"], args, lambda: embed_texts(clip, list(reports)))  # (M, d)
    image_emb = tile_features("CLIP", clip.encode_image, clip.preprocess, tiles, args)  # (N, d)
    pairs, similarity = {}, {}
    for split in SPLITS:
        pairs[split], similarity[split] = nearest_text(image_emb[split], text_emb)  # (N,), (N,)
    rows = write_pairs(run, tiles, pairs, similarity, reports)
    write_page(run, rows)

    # 2. Vision head h_v on the frozen backbone: the unimodal row
    v = tile_features("backbone", backbone, backbone.preprocess, tiles, args)  # split -> (N, D)
    torch.manual_seed(args.sd)
    vision_head = nn.Linear(backbone.num_features, len(classes))
    p = {"vision head": train_head("vision head", vision_head, v, labels, args.sd)}  # (N, C)

    # 3. Text head on the paired reports: what the text knows of the classes
    t = {split: text_emb[pairs[split]] for split in SPLITS}  # (N, d)
    text_head = text_classifier(clip.dim, len(classes))
    p["text head"] = train_head("text head", text_head, t, labels, args.sd)
    if args.clip_probe:  # what the pairing's features know
        probe = nn.Linear(clip.dim, len(classes))
        p["CLIP linear probe"] = train_head("CLIP linear probe", probe, image_emb, labels, args.sd)

    # 4. Fuse and distil: LoRA; CE of the fused logits + lambda * (1 - cos(t, t-hat))
    best = None
    if args.ep:
        model = build_model(backbone, clip, vision_head, args)
        best = train_clipit(model, clip, tiles, pairs, reports, text_emb, args, run)

        # 5. Text-free test: LoRA merged, no text tower, no report, no CLIP
        classifier = model.to_classifier(classes).to(args.device)
        p[args.variant] = outputs("test", classifier, tiles["test"], args).softmax(dim=1)
    metrics = {"rows": {name: scores(p[name], labels["test"]) for name in p},
               "complementarity": complementarity(p["vision head"], p["text head"], labels["test"]),
               "test_tiles": len(labels["test"]), "classes": classes, "best": best}
    if args.ep:
        write_predictions(run, tiles["test"], p[args.variant])
        write_classifier(run, classifier, tiles["train"], metrics, args)
    write_page(run, rows, metrics)
    write(run / "metrics.json", json.dumps(metrics, indent=1))  # the last file
    return found_metrics(run)


def train_clipit(model: ClipIT, clip, tiles, pairs, reports, text_emb: Tensor, args, run: Path):
    """Step 4. Leaves the model in its best state by --monitor; returns that state's value and step.

    Epoch e visits the tiles in an order that seed and e alone decide, and the random numbers of a
    step have a seed of their own: a run that goes on ends as if it had never stopped.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # weight decay as L2 in the gradient, as the authors have it (Adam, not AdamW)
    optimizer = torch.optim.Adam(trained, args.lr, weight_decay=args.weight_decay, fused=True)
    state = resume_training(run, model, optimizer)
    text = epoch_text = text_of(clip, reports, text_emb, args)  # (M, d), (M, L) or None
    n = len(tiles["train"])
    epoch_steps = math.ceil(n / args.batch)
    total = args.ep * epoch_steps
    val_steps = max(round(args.val_int * epoch_steps), 1)
    step, sums = state["step"], {}
    model.train()
    while step < total and not state["stopped"]:
        epoch, done = divmod(step, epoch_steps)
        generator = torch.Generator().manual_seed(args.sd * 100_003 + epoch)
        order = torch.randperm(n, generator=generator).split(args.batch)[done:]
        if args.drop_words:
            epoch_text = text_of(clip, reports, text_emb, args, epoch)
        title = f"epoch {epoch + 1} of {args.ep}"
        for images, labels, report, share in batches(title, tiles["train"], args, pairs["train"],
                                                     order):
            torch.manual_seed((args.sd * 1_000_003 + step) * WORLD + RANK)  # of dropout
            logits, t_hat, t = forward(model, images, report, *epoch_text, args)
            loss, parts = clipit_loss(logits, labels, t_hat, t, args.kd_weight)
            (share * loss).backward()
            all_reduce([p.grad for p in trained if p.grad is not None])
            if args.clip:
                nn.utils.clip_grad_norm_(trained, args.clip)
            optimizer.step()
            optimizer.zero_grad()  # now: kept through the next forward pass they would cost memory
            step += 1
            if args.scheduler:  # a cosine by step to a tenth; the authors' over epochs stands still
                cosine = math.cos(math.pi * step / total)
                optimizer.param_groups[0]["lr"] = args.lr * (0.55 + 0.45 * cosine)
            for key, value in {"loss": loss.detach(), **parts}.items():
                sums[key] = sums.get(key, 0) + share * value
            if step % val_steps and step < total:
                continue

            # ---- Validate, keep the best state, write what going on needs
            all_reduce(list(sums.values()))
            line = {"step": step, "lr": optimizer.param_groups[0]["lr"]}
            line |= {key: value.item() / (step - state["step"]) for key, value in sums.items()}
            line |= validate(model, tiles["val"], pairs["val"], text, args)
            weights = {name: p.detach().cpu().clone()  # of the adapters and heads
                       for name, p in model.named_parameters() if p.requires_grad}
            update_state(state, line, weights, run, args)
            save_training(run, state, weights, optimizer, args)
            if step // val_steps % args.log == 0 or step == total or state["stopped"]:
                print(shown(line))
            sums = {}
            if state["stopped"]:
                break
    best = state["best"]
    model.load_state_dict(best["model"], strict=False)  # the trained parameters; the rest stays
    model.eval()
    print(f"best {args.monitor} {best['value']:.4f} at step {best['step']} of {step}")
    return {"value": best["value"], "step": best["step"]}


def forward(model: ClipIT, images: Tensor, report: Tensor, text_emb: Tensor, tokens, args):
    """images (B, 3, H, W), report (B,) -> logits (B, C), t-hat (B, d), t (B, d).

    text_emb (M, d), tokens (M, L): of all reports; tokens are None where the text is fixed.
    Distillation reaches the backbone and a trained text tower; cross-entropy never sees t.
    """
    logits, t_hat = model.fuse(model.backbone(images))
    if args.no_text:
        t = t_hat = None
    elif tokens is None:  # a fixed text is looked up
        t = text_emb[report]
    else:  # each distinct report of the batch is encoded once
        distinct, row = report.unique(return_inverse=True)
        t = model.text_tower(tokens[distinct])[row]
    if args.authors:  # theirs: cross-entropy takes probabilities for logits
        logits = logits.softmax(dim=1)
    return logits, t_hat, t


@torch.no_grad()
def validate(model: ClipIT, tiles: Tiles, pairs: Tensor, text: tuple, args) -> dict:
    """Losses and accuracies of the validation split. Predictions are of the image alone; the
    reports enter the distillation part of the loss."""
    model.eval()
    rows = [forward(model, images, report, *text, args)
            for images, _, report, _ in batches("validation", tiles, args, pairs)]
    logits, t_hat, t = (None if parts[0] is None else gather(torch.cat(parts), len(tiles))
                        for parts in zip(*rows))  # (N, C), (N, d), (N, d)
    labels = torch.tensor(tiles.labels)
    loss, parts = clipit_loss(logits, labels, t_hat, t, args.kd_weight)
    metrics = scores(logits.softmax(dim=1), labels)
    line = {"val_loss": loss.item()} | {f"val_{key}": x.item() for key, x in parts.items()}
    line |= {"val_acc": metrics["accuracy"], "val_bacc": metrics["balanced_accuracy"]}
    if t is not None:
        tile_of = {report: tile for tile, report in enumerate(pairs.tolist())}  # one of each report
        line["text_spread"] = text_spread(t[list(tile_of.values())])
    model.train()
    return line


def train_head(name: str, head: nn.Module, features: dict[str, Tensor], labels: dict[str, Tensor],
               seed: int, steps: int = 12_500, patience: int = 20) -> Tensor:
    """Train a head on features, split -> (N, D), and labels, split -> (N,); returns the test
    split's probabilities (N, C).

    AdamW 3e-4, batch 256, 12,500 steps at most, as kaiko-eva 0.1.2 trains its linear probe. Ours:
    the state of the lowest of 100 validation losses (its: accuracy) is kept, and `patience` of them
    without a lower one end it.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    lowest, waited, best, order = math.inf, 0, None, []
    for step in progress(name, range(1, steps + 1), steps):
        if not order:
            order = list(torch.randperm(len(labels["train"]), generator=generator).split(256))
        batch = order.pop(0)
        loss = F.cross_entropy(head(features["train"][batch]), labels["train"][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(steps // 100, 1):
            continue
        with torch.no_grad():
            val_loss = F.cross_entropy(head(features["val"]), labels["val"]).item()
        waited += 1
        if val_loss < lowest:
            lowest, waited, best = val_loss, 0, copy.deepcopy(head.state_dict())
        if waited == patience:
            break
    head.load_state_dict(best)
    return head.requires_grad_(False)(features["test"]).softmax(dim=1)


# ---- Metrics: probabilities p (N, C), labels (N,) ----

def scores(p: Tensor, labels: Tensor) -> dict:
    """One row of the table. balanced_accuracy: mean recall of the classes (Table 1's "accuracy");
    macro_f1: mean of 2 TP / (2 TP + FP + FN). Classes that do not occur count in neither."""
    classes = p.shape[1]
    cell = labels * classes + p.argmax(dim=1)
    confusion = cell.bincount(minlength=classes ** 2).view(classes, classes)  # label, prediction
    right, of_label, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    recall = right / of_label  # (C,)
    return {"balanced_accuracy": recall.nanmean().item(),
            "accuracy": (right.sum() / len(labels)).item(),
            "macro_f1": (2 * right / (of_label + predicted)).nanmean().item(),
            "recall": recall.tolist(), "confusion": confusion.tolist()}


def complementarity(vision: Tensor, text: Tensor, labels: Tensor) -> dict:
    """Fig. 3: the tiles that the text model gets right and the vision model wrong, their number and
    shares. vision, text: p (N, C)."""
    wrong = vision.argmax(dim=1) != labels
    gained = (wrong & (text.argmax(dim=1) == labels)).double()  # (N,)
    return {"tiles": int(gained.sum()), "share": gained.mean().item(),
            "share_of_vision_errors": gained[wrong].mean().nan_to_num().item()}


def text_spread(features: Tensor) -> float:
    """1 - mean cosine of two different rows of (R, d): 0 where all reports have one direction."""
    count, total = len(features), F.normalize(features.double(), dim=1).sum(dim=0)
    return 1 - ((total @ total - count) / max(count * (count - 1), 1)).item()


# ==== What a run needs beside the method ====

def load_models(args):
    """CLIP and the backbone on the device; from here on the same seed gives the same numbers."""
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products vary
    torch.backends.cudnn.allow_tf32 = False  # fp32 throughout
    torch.manual_seed(args.sd)  # of random weights
    clip = load_clip(args.clip_model, args.clip_weights, device=args.device)
    backbone = load_backbone(args.model, args.weights, args.tile_size)
    return clip, backbone.to(args.device)


def load_data(backbone: nn.Module, args):
    """split -> Tiles as the backbone sees them, split -> labels (N,), report -> its place."""
    if args.download:
        download(args.ds, args.reports)
    reports = read_reports(args.reports)
    tiles = {split: load_tiles(args.ds, split, transform=backbone.preprocess) for split in SPLITS}
    if args.shots:
        train = tiles["train"]
        tiles["train"] = train.take(draw_shots(train.labels, args.shots, args.sd))
    sizes = ", ".join(f"{len(tiles[split])} {split}" for split in SPLITS)
    print(f"{args.ds}: {sizes} tiles of {len(tiles['test'].classes)} classes")
    warn_of_repeated_tiles(tiles)
    return tiles, {split: torch.tensor(tiles[split].labels) for split in SPLITS}, reports


def tile_features(name: str, model, preprocess, tiles, args) -> dict[str, Tensor]:
    """split -> the frozen model's features (N, ...). An unreadable tile ends the run here."""
    features = {}
    for split in SPLITS:
        images = tiles[split].with_transform(preprocess)
        features[split] = cached([name, f"{split} tiles"], args, lambda: outputs(
            f"{name} features, {split}", model, images, args))
    return features


@torch.no_grad()
def outputs(title: str, model, tiles: Tiles, args) -> Tensor:
    """model(images (B, 3, H, W)) of all tiles, (N, ...), on the CPU."""
    rows = [model(images) for images, *_ in batches(title, tiles, args)]
    return gather(torch.cat(rows), len(tiles))


def build_model(backbone: nn.Module, clip, vision_head: nn.Linear, args) -> ClipIT:
    """ClipIT with LoRA. Seeded anew, and the text side last: with and without text, everything else
    starts from the same numbers."""
    torch.manual_seed(args.sd)
    lora = args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets
    model = ClipIT(backbone.requires_grad_(False), None, vision_head.out_features,
                   vision_head.in_features, clip.dim, args.kd_layers, args.authors)
    model.vision_head.load_state_dict(vision_head.state_dict())
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    if args.lora_vision:
        inject_lora(backbone, *lora)
    if args.lora_text and not args.no_text:
        model.text_tower = clip.text_tower
        inject_lora(model.text_tower, *lora)
    clip.image_tower = None  # its part has ended
    print(f"training {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    return model.to(args.device)


def batches(title: str, tiles: Tiles, args, pairs: Tensor | None = None, order=None):
    """(images (B, 3, H, W), labels (B,), report (B,), share) on the device for every batch of
    indices in `order`, unset all in turn; each process gets its tiles of a batch and their share of
    it. One that has none computes the first, for nothing."""
    if pairs is None:
        pairs = torch.zeros(len(tiles), dtype=torch.long)
    if order is None:
        order = torch.arange(len(tiles)).split(args.batch * WORLD)
    rows = [batch[RANK::WORLD] if RANK < len(batch) else batch[:1] for batch in order]
    loader = DataLoader(StackDataset(tiles, pairs), batch_sampler=[part.tolist() for part in rows],
                        num_workers=args.worker, worker_init_fn=leave_signals,
                        generator=torch.Generator(),  # no number is drawn from the run's
                        pin_memory=args.device.type == "cuda")
    for batch, ((images, labels), report) in progress(title, zip(order, loader), len(order)):
        share = len(batch[RANK::WORLD]) / len(batch)
        yield *(x.to(args.device, non_blocking=True) for x in (images, labels, report)), share


def text_of(clip, reports, text_emb: Tensor, args, epoch: int | None = None):
    """(features (M, d), tokens (M, L) or None for a fixed text) of all reports, on the device; in
    an epoch under --drop-words, of what is left of them."""
    texts = list(reports)
    if epoch is not None:
        texts = [drop_words(text, args.drop_words, f"{args.sd} {epoch} {i}")
                 for i, text in enumerate(texts)]
    if args.lora_text and not args.no_text:
        return text_emb.to(args.device), clip.tokenize(texts).to(args.device)
    if epoch is not None:
        text_emb = embed_texts(clip, texts)
    return text_emb.to(args.device), None


def drop_words(report: str, share: float, seed: str) -> str:
    """The report without `share` of its words, drawn by seed; one stays at least."""
    words = report.split()
    count = max(round(len(words) * (1 - share)), 1)
    return " ".join(words[i] for i in sorted(random.Random(seed).sample(range(len(words)), count)))


# ---- Many processes: row i is process i % WORLD's; of one process nothing here does anything ----

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def all_reduce(tensors: list[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    if WORLD > 1:
        flat = nn.utils.parameters_to_vector(tensors).detach()
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, tensors)


def gather(rows: Tensor, n: int) -> Tensor:
    """All n rows in order, on the CPU, of what each process has: a sum with zeros."""
    if WORLD > 1:
        padded = torch.zeros(n, *rows.shape[1:], device=rows.device)
        padded[RANK::WORLD] = rows[:len(range(RANK, n, WORLD))]
        all_reduce([padded])
        rows = padded
    return rows.cpu()


def from_first(fact):
    """The first process's `fact`."""
    facts = [fact]
    if WORLD > 1:
        dist.broadcast_object_list(facts)
    return facts[0]


# ---- A run's folder and its files ----

# Where and how a run is made, not what it is: may change when it goes on
PLACES = ("dir", "output", "run", "download", "worker", "device", "overwrite", "log", "table",
          "against", "wandb", "grad_checkpointing", "inputs", "lock")
# What a run writes, and --overwrite removes
RESULTS = ("metrics.json", "predictions.csv", "*.pt", "log.jsonl", "pairs.csv", "report.html",
           "args.json", "classifier", ".tmp*")


def open_run(args, clip, backbone: nn.Module, tiles, reports) -> Path:
    """Make DIR/OUTPUT/RUN with args.json, or go on in it. ValueError, and no change, where it is of
    other flags or inputs; OSError where it is in use."""
    run = Path(args.dir, args.output, args.run)
    preprocess = re.sub(" at 0x[0-9a-f]+", "", repr(clip.preprocess))  # functions' addresses
    inputs = {"reports": sha256(list(reports)),
              "backbone": sha256(backbone, repr(backbone.preprocess)),
              "CLIP": sha256(clip.image_tower, clip.text_tower, preprocess)}
    for split in SPLITS:
        paths = tiles[split].paths  # FILE.h5#17 is of FILE.h5
        stats = [os.stat(re.sub(r"(?<=\.h5)#\d+$", "", path)) for path in paths]
        times = [(file.st_size, file.st_mtime_ns) for file in stats]
        inputs[f"{split} tiles"] = sha256(paths, tiles[split].labels, times)
    args.inputs = inputs
    differ = torch.tensor(float(from_first(inputs) != inputs), device=args.device)
    all_reduce([differ])  # all of them stop
    if differ:
        raise ValueError("the processes see different tiles, reports or weights; give all the same")
    if RANK:
        return run
    args.lock = lock(run / ".lock", f"{run}: another process is at this run; give another --run")
    for name in RESULTS if args.overwrite else (".tmp*",):  # the latter of a run that was killed
        for path in run.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = {key: value for key, value in vars(args).items() if key not in PLACES}
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "pillow")
    facts = {"config": config, "inputs": inputs, "versions": {x: version(x) for x in packages}}
    if (run / "args.json").exists():
        first = read_json(run / "args.json", facts.keys())
        changes = [f"{key} {first['config'].get(key)!r} there, {value!r} now"
                   for key, value in config.items()
                   if key != "flags" and first["config"].get(key) != value]
        changes += [f"the {name} changed" for name in inputs
                    if first["inputs"].get(name) != inputs[name]]
        if changes:
            raise ValueError(f"{run}: a run of another configuration ({'; '.join(changes)})\n"
                             "give another --run, or begin anew by --overwrite")
        facts = first | {"versions_of_the_last_start": facts["versions"]}
    write(run / "args.json", json.dumps(facts, indent=1))
    return run


def sha256(*parts) -> str:
    """A hash of modules' weights and of whatever JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def cached(inputs: list[str], args, compute) -> Tensor:
    """compute()'s tensor, kept in DIR/cache under the hashes of the inputs it depends on."""
    title, hashes = " ".join(inputs), "-".join(args.inputs[name] for name in inputs)
    path = Path(args.dir, "cache", f"{slug(title)}-{hashes}.pt")
    tensor = read_torch(path)
    print(f"features of {title}: {'computed' if tensor is None else 'from the cache'}")
    if tensor is None:
        tensor = compute()
        if not tensor.isfinite().all():
            raise ValueError(f"features of {title}: NaN or infinity; the weights cannot be right")
        write_torch(path, tensor)
    return tensor


def write_file(path: Path, save) -> None:
    """save(a temporary path) by the first process, whole or not at all."""
    if RANK == 0:
        with whole(path) as part:
            save(part)


def write(path: Path, text: str) -> None:
    write_file(path, lambda part: part.write_text(text, "utf-8", "replace"))


def write_csv(path: Path, rows) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    write(path, file.getvalue())


def write_torch(path: Path, value) -> None:
    """By way of memory: on a full disk torch.save's own writer does not say so."""
    def save(part):
        file = io.BytesIO()
        torch.save(value, file)
        part.write_bytes(file.getbuffer())
    write_file(path, save)


def read_torch(path: Path):
    """What write_torch has written, or None where it is missing or damaged."""
    value = None
    try:
        if RANK == 0 and path.exists():
            value = torch.load(path, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise of all kinds
        print(f"{path}: damaged ({error!s:.100}), and made anew")
    return from_first(value)


def read_json(path: Path, keys) -> dict:
    """What a run has written there; ValueError where it lacks one of the keys."""
    try:
        facts = json.loads(path.read_text("utf-8"))
        if missing := keys - facts.keys():
            raise ValueError(f"no {missing}")
        return facts
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not of a run of this version ({error!r}); remove it, or begin "
                         "anew by --overwrite") from None


def resume_training(run: Path, model: ClipIT, optimizer) -> dict:
    """Where training stands, by last.pt or at its start."""
    saved = read_torch(run / "last.pt")
    if saved is None:
        return {"step": 0, "waited": 0, "stopped": False, "best": None, "log": []}
    model.load_state_dict(saved["model"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    print(f"going on from step {saved['state']['step']}")
    return saved["state"]


def update_state(state: dict, line: dict, weights: dict[str, Tensor], run: Path, args) -> None:
    """Keep the best --monitor's model; --early stops after --patience validations without a better
    one by more than --delta. (The authors' looks at the training loss, with a delta of 5.)"""
    if not all(map(math.isfinite, line.values())):
        raise FloatingPointError(f"not finite: {shown(line)}; try a lower --lr\n"
                                 f"{run / 'last.pt'} holds the validation before, if any")
    collapsed = [x for x in [*state["log"], line] if x.get("text_spread", 1) < 0.1]
    if args.lora_text and collapsed == [line]:  # for the first time
        print("the reports' features have collapsed (text_spread < 0.1), little is left to distil; "
              "--lora-text 0 keeps them")
    value, gain = line.get(args.monitor, line["step"]), math.inf
    if state["best"] and args.monitor != "last":
        gain = (state["best"]["value"] - value) * (1 if args.mod == "min" else -1)
    if gain > 0:
        state["best"] = {"value": value, "step": line["step"], "model": weights}
    state["waited"] = 0 if gain > args.delta else state["waited"] + 1
    state["stopped"] = bool(args.early) and state["waited"] >= args.patience
    state["step"] = line["step"]
    state["log"].append(line)


def save_training(run: Path, state: dict, weights: dict[str, Tensor], optimizer, args) -> None:
    """last.pt, everything that the next step depends on, and log.jsonl, which is in it too."""
    saved = {"state": state, "model": weights, "optimizer": optimizer.state_dict()}
    write_torch(run / "last.pt", saved)
    write(run / "log.jsonl", "".join(f"{json.dumps(line)}\n" for line in state["log"]))
    if args.chkpnt:
        write_torch(run / f"step_{state['step']}.pt", weights)
    if args.wandb and RANK == 0:
        import wandb
        tracker = wandb.run or wandb.init(project="clip-it", name=run.name, config=vars(args))
        tracker.log(state["log"][-1], step=state["step"])


def progress(title: str, items, total: int):
    """The items under a bar; 100 or more in a log under its first and last line. A signal ends the
    run here."""
    log = not sys.stderr.isatty()
    for item in tqdm(items, title, total, leave=log, mininterval=3600 if log else 0.1,
                     disable=RANK > 0 or (log and total < 100)):
        if SIGNALS:
            raise KeyboardInterrupt
        yield item


def write_pairs(run: Path, tiles, pairs, similarity, reports: dict[str, str]) -> list[tuple]:
    """pairs.csv: tile, split, class, its report's number among the distinct ones, their cosine, the
    report's place in the source and first words. Returns the rows, with whole reports."""
    places, rows = list(reports.items()), []
    for split in SPLITS:
        nearest = zip(pairs[split].tolist(), similarity[split].tolist())
        for path, label, (report, cosine) in zip(tiles[split].paths, tiles[split].labels, nearest):
            name, (text, place) = tiles[split].classes[label], places[report]
            rows.append((path, split, name, report, round(cosine, 6), place, text))
    columns = ("tile", "split", "class", "report", "similarity", "place", "text")
    write_csv(run / "pairs.csv", [columns, *((*row[:6], row[6][:60]) for row in rows)])
    print(f"pairs: {len({row[3] for row in rows})} of {len(reports)} reports used")
    return rows


def write_predictions(run: Path, tiles: Tiles, p: Tensor) -> None:
    """The authors' columns, path, target, pred, class_0 ... (probabilities), and class names."""
    columns = [f"class_{i}" for i in range(p.shape[1])]
    rows = [["path", "target", "pred", "target_class", "pred_class", *columns]]
    for path, label, row in zip(tiles.paths, tiles.labels, p):
        pred = int(row.argmax())
        rows.append([path, label, pred, tiles.classes[label], tiles.classes[pred], *row.tolist()])
    write_csv(run / "predictions.csv", rows)


def write_classifier(run: Path, classifier, tiles: Tiles, metrics: dict, args) -> None:
    """classifier/, whose config.json and model card tell of the run, without its paths."""
    row, rows = DATASETS.get(args.ds, {}), metrics["rows"]
    facts = {"data": row.get("title", Path(args.ds).resolve().name),
             "licence": row.get("licence", "unknown"), "variant": args.variant,
             "test_tiles": metrics["test_tiles"],
             "mpp": args.mpp or row.get("mpp"), "side": row.get("side") or tile_side(tiles),
             "metrics": rows[args.variant], "unimodal": rows["vision head"]}
    if not args.no_text:
        facts |= {"reports": Path(args.reports).name,
                  "clip_model": re.sub("(?<=local-dir:).*/", "", args.clip_model)}
    classifier.config["run"] = facts
    write_file(run / "classifier", classifier.save_pretrained)


COLUMNS = {"balanced_accuracy": "bal. acc.", "accuracy": "accuracy", "macro_f1": "macro F1"}
NOTES = {"vision head": " (frozen backbone, unimodal)", "text head": " (paired reports)"}


def found_metrics(run: Path) -> dict | None:
    """What the run has found, printed, if it has ended."""
    metrics = None
    if RANK == 0 and (run / "metrics.json").exists():
        metrics = read_json(run / "metrics.json", {"rows", "complementarity"})
        print(f"\n{results(metrics)}\nthe run lies in {run}; --overwrite begins it anew")
    return from_first(metrics)


def results(metrics: dict) -> str:
    titles = "".join(title.rjust(12) for title in COLUMNS.values())
    lines = [f"{metrics['test_tiles']} test tiles".ljust(41) + titles]
    for name, row in metrics["rows"].items():
        figures = "".join(f"{100 * row[key]:12.2f}" for key in COLUMNS)
        lines.append((name + NOTES.get(name, " (image only)")).ljust(41) + figures)
    gained = metrics["complementarity"]
    lines.append(f"complementarity: the text head alone is right on {gained['share']:.1%} of the "
                 f"tiles, {gained['share_of_vision_errors']:.1%} of the vision head's errors")
    return "\n".join(lines)


def shown(line: dict) -> str:
    """A line of log.jsonl in short."""
    keys = ("loss", "ce", "kd", "val_loss", "val_bacc", "text_spread")
    figures = "  ".join(f"{key} {line[key]:.4f}" for key in keys if key in line)
    return f"step {line['step']}  {figures}"


HEAD = """<!DOCTYPE html><meta charset=utf-8><style>
:root { color-scheme: light dark } td, th { padding: .2rem .6rem }
body { font: 1rem/1.5 system-ui; max-width: 72rem; margin: auto; overflow-x: auto }
</style>"""


def write_page(run: Path, rows: list[tuple], metrics=None) -> None:
    """report.html: results, confusion, log of training, once there are any; four training tiles of
    every class beside their reports, from the highest cosine down."""
    if RANK:
        return
    title, groups = escape(f"{run.parent.name}/{run.name}"), {}
    parts = [f"{HEAD}<title>{title}</title><h1>{title}</h1>"]
    if metrics:
        name, row = list(metrics["rows"].items())[-1]
        parts += [f"<pre>{escape(results(metrics))}</pre><h2>Confusion of {name}</h2>",
                  confusion_table(row["confusion"], metrics["classes"])]
    if metrics and metrics["best"]:
        log = [shown(json.loads(line)) for line in open(run / "log.jsonl")]
        parts += ["<h2>Training</h2><pre>", *log, "</pre>"]
    parts.append("<h2>Pairs</h2><p>Cosines of training tiles and reports; labels took no part.</p>")
    for row in rows:
        if row[1] == "train":
            groups.setdefault(row[2], []).append(row)
    for name, members in list(groups.items())[:40]:
        members.sort(key=lambda row: -row[4])
        parts.append(f"<h3>{escape(name)}</h3><table>")
        for path, _, _, report, cosine, _, text in members[::max((len(members) - 1) // 3, 1)][:4]:
            image, file = Tiles([path], [0], [name])[0][0], io.BytesIO()
            image.thumbnail((112, 112))
            image.save(file, "JPEG")
            jpeg = b64encode(file.getvalue()).decode()
            parts.append(f"<tr><td><img alt='' src='data:image/jpeg;base64,{jpeg}'><td>"
                         f"<b>{cosine:.3f}</b> report {report}: {escape(text[:500])}<br>"
                         f"{escape(path)}")
        parts.append("</table>")
    write(run / "report.html", "\n".join(parts))


def confusion_table(counts: list[list[int]], classes: list[str]) -> str:
    """True class: row; predicted class: column; shade: share of the row."""
    lines = ["".join(f"<th>{escape(name)}" for name in ["true \\ predicted", *classes])]
    for name, row in zip(classes, counts):
        cells = [f"<td style='background:rgb(0 120 200/{count / max(sum(row), 1):.2f})'>{count}"
                 for count in row]
        lines.append(f"<th>{escape(name)}{''.join(cells)}")
    return f"<table><tr>{'<tr>'.join(lines)}</table>"


# ---- --table: finished runs, a line a variant ----

ROWS = ("vision head", "text head", "CLIP linear probe", "validation", "trained", "complementarity")
# 97.5 % quantiles of Student's t for n = 2 to 10 seeds; the last for more, too
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def table(folder: Path, against: str) -> dict:
    """A line, printed and in table.csv, for each data set, backbone, set of flags of finished runs:
    balanced accuracy in %, mean ± sd over n seeds, and its difference to the runs --against and
    those without a flag, paired by seed, with 95 % t intervals."""
    groups: dict[tuple, dict] = {}  # (ds, model) -> flags -> seed -> row -> %
    for path in sorted(folder.rglob("metrics.json")):
        metrics = read_json(path, {"rows", "complementarity", "best"})
        config = read_json(path.parent / "args.json", {"config", "inputs"})["config"]
        figures = {row: 100 * x["balanced_accuracy"] for row, x in metrics["rows"].items()}
        if metrics["best"]:
            figures["trained"] = list(figures.values())[-1]
            if config["monitor"].endswith("acc"):  # to choose flags by
                figures["validation"] = 100 * metrics["best"]["value"]
        figures["complementarity"] = 100 * metrics["complementarity"]["share"]
        group = groups.setdefault((config["ds"], config["model"]), {})
        seeds = group.setdefault((*config["flags"],), {})
        if config["sd"] in seeds:
            print(f"{path.parent}: seed {config['sd']} once more; its first run counts")
        seeds.setdefault(config["sd"], figures)
    if not groups:
        raise FileNotFoundError(f"--table {folder}: no metrics.json below it")
    lines = []
    for (ds, model), group in groups.items():
        common = set.intersection(*map(set, group))  # what all of them have tells nothing
        short = {flags: " ".join(x for x in flags if x not in common) for flags in group}
        by_name = {slug(short[flags]): seeds for flags, seeds in group.items()}
        for flags, seeds in group.items():
            line = {"data": Path(ds).name, "backbone": Path(model).name,
                    "flags": short[flags] or "-", "n": len(seeds)}
            for row in ROWS:
                values = [figures[row] for figures in seeds.values() if row in figures]
                line[row] = f"{mean(values):.1f}" if values else ""
                if len(values) > 1:
                    line[row] += f" ± {stdev(values):.1f}"
            for name in (against, ""):
                line[f"minus {name or 'no flag'}"] = difference(seeds, by_name.get(name, seeds))
            lines.append(line)
    rows = [list(lines[0]), *(list(line.values()) for line in lines)]
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(map(str, row))} |")
    write_csv(folder / "table.csv", rows)
    return {"table": lines}


def difference(runs: dict, reference: dict) -> str:
    """Mean gain of `trained`, paired by seed, with its 95 % t interval."""
    gains = [figures["trained"] - reference[seed]["trained"] for seed, figures in runs.items()
             if "trained" in figures and "trained" in reference.get(seed, {})]
    if runs is reference or len(gains) < 2:
        return ""
    half = T_QUANTILES[min(len(gains), 10) - 2] * stdev(gains) / math.sqrt(len(gains))
    return f"{mean(gains):+.1f} [{mean(gains) - half:+.1f}, {mean(gains) + half:+.1f}]"


# ---- Command line ----

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see python train.py --help")


def within(low: float, high: float):
    """An argparse type: low to high, integers where low is one."""
    def number(text):
        value = type(low)(text)
        if not low <= value <= high:  # NaN is not, either
            raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")
        return value
    return number


def build_parser() -> Parser:
    parser = Parser("train.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def flag(name, default, help, low=None, high=1e9, **kwargs):
        if low is not None:
            kwargs["type"] = within(low, high)
        parser.add_argument(f"--{name}", default=default, help=help, **kwargs)

    def switch(name, help):
        parser.add_argument(f"--{name}", action="store_true", help=help)

    one = dict(type=int, choices=(0, 1), nargs="?", const=1)  # --early, --early 1
    flag("ds", "demo", f"{', '.join(DATASETS)}, or a folder with train/, test/, perhaps val/")
    flag("reports", None, f".txt of a report a line, .csv, .jsonl, folder; {', '.join(REPORTS)}")
    switch("download", "fetch missing data and reports to data/")
    flag("model", "UNI", f"backbone: {', '.join(BACKBONES)}, a timm id, hf-hub:..., local-dir:...")
    flag("weights", None, "its local weights, or `none` for random")
    flag("tile-size", None, "pixels; unset, the backbone's own", 8, 4096)
    flag("clip-model", "conch", f"pairing model: {', '.join(CLIPS)} or an open_clip id")
    flag("clip-weights", None, "its local weights, or `none`")
    flag("mpp", None, "micrometres a pixel, for whole slides", 0.01, 100.0)
    flag("dir", "runs", "a run is DIR/OUTPUT/RUN")
    flag("output", None, "unset, the name of the data set")
    flag("run", None, "unset, the flags that are not the defaults")
    switch("overwrite", "begin the run anew")
    flag("sd", 0, "seed", 0)
    flag("shots", None, "training tiles a class, drawn by the seed", 1)
    flag("batch", 64, "tiles a step", 1)
    flag("lr", 1e-3, "of Adam", 1e-9)
    flag("weight-decay", 1e-4, "L2 in the gradient", 0.0)
    flag("ep", 20, "epochs; 0: pairs and heads alone", 0)
    flag("worker", min(os.cpu_count() or 1, 8), "processes that decode tiles", 0)
    flag("clip", 0.5, "largest norm of the gradient; 0: no limit", 0.0)
    flag("scheduler", 0, "1: cosine by step to a tenth", **one)
    flag("lora-r", 16, "rank", 1)
    flag("lora-alpha", 8.0, "scales by alpha / rank", 1e-9)
    flag("lora-dropout", 0.0, "before the down projection", 0.0, 0.99)
    flag("lora-text", 0, "1: train the text tower too, as the paper", **one)
    flag("lora-vision", 1, "0: the backbone stays as it is", **one)
    flag("lora-targets", [*TARGETS], "layers that LoRA adapts", nargs="+", choices=[*TARGETS])
    switch("no-lin", "--lora-targets conv2d embedding")
    flag("kd-layers", 1, "layers of h_d", type=int, choices=(1, 2))
    flag("kd-weight", 1.0, "lambda", 0.0)
    switch("no-text", "ablation: all but the distillation")
    flag("drop-words", 0.0, "share of each report's words, anew each epoch", 0.0, 0.99)
    switch("authors", "as the authors' code: --lora-text 1 --ep 1 --monitor last, double softmax, "
           "random fusion")
    flag("val-int", 1.0, "epochs between validations", 1e-9)
    flag("monitor", "val_bacc", "what chooses the state that is tested",
         choices=("val_loss", "val_ce", "val_acc", "val_bacc", "last"))
    flag("mod", None, "unset, min for losses, max for accuracies", choices=("min", "max"))
    flag("early", 0, "1: stop when --monitor stands still", **one)
    flag("patience", 5, "validations that --early waits", 1)
    flag("delta", 0.0, "least improvement for --early", 0.0)
    flag("chkpnt", 0, "1: keep every validation's state", **one)
    flag("log", 1, "validations a printed line", 1)
    switch("clip-probe", "also a linear head on CLIP's image features")
    flag("wandb", 0, "1: also to Weights & Biases", **one)
    flag("table", None, "print the runs below this folder, write table.csv")
    flag("against", "no-text", "what --table compares with, by flags")
    switch("grad-checkpointing", "less memory, more time")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """Flags with - or, as the authors', _. A data set's own defaults are in its row."""
    words = sys.argv[1:] if argv is None else map(str, argv)
    words = [re.sub("^--[a-z_]+", lambda match: match[0].replace("_", "-"), word) for word in words]
    parser = build_parser()
    known = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0]
    parser.set_defaults(**DATASETS.get(known.ds, {}).get("defaults", {}))
    if known.authors:
        parser.set_defaults(lora_text=1, ep=1, monitor="last")
    args = parser.parse_args(words)
    return args if args.table else complete(args, parser)


def complete(args, parser: Parser) -> argparse.Namespace:
    """What follows from the flags."""
    if args.reports is None:
        raise ValueError(f"--ds {args.ds} needs --reports; {', '.join(DATASETS)} have their own")
    if args.ds in DATASETS and Path(args.ds).is_dir():
        print(f"--ds {args.ds} is the data set of that name; the folder is ./{args.ds}")
    if args.wandb:
        import wandb  # noqa: F401: where it is missing, the run ends here
    differ = {}  # the run's name tells the flags that differ from the data set's defaults
    for key, value in vars(args).items():
        if key not in (*PLACES, "ds") and value != parser.get_default(key):
            shown = " ".join(value) if isinstance(value, list) else Path(str(value)).name
            differ[key] = f"--{key.replace('_', '-')}" + ("" if value is True else f" {shown}")
    args.run = args.run or slug(" ".join(differ.values())) or "base"
    args.output = args.output or slug(Path(args.ds).resolve().name)
    args.flags = [text for key, text in differ.items() if key not in ("model", "sd")]
    if args.no_lin:
        args.lora_targets = ["conv2d", "embedding"]
    args.mod = args.mod or ("max" if args.monitor.endswith("acc") else "min")
    args.variant = "CLIP-IT without text" if args.no_text else "CLIP-IT"
    cuda = torch.cuda.is_available()
    args.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    return args


def slug(flags: str) -> str:
    """A file name made of flags: lora-r-4_no-text."""
    return re.sub(r"[^\w.-]+", "-", flags.replace(" --", "_")).strip("-.")[:150]


SIGNALS: list[int] = []  # that have asked for an end


def ask_to_end(number: int, frame) -> None:
    """Of SIGINT and SIGTERM: the run ends at its next batch."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)
    if WORLD == 1:
        print("train.py: ends at the next batch, at a second signal at once", file=sys.stderr)


def leave_signals(worker: int) -> None:
    """In a worker: Ctrl-C is the run's, which ends its workers by SIGTERM. torch must not take that
    for a crash."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def cli() -> None:
    """main(); bad input is one or two lines on stderr and exit code 2."""
    if RANK:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_end)
    code, again = 2, "the same command goes on"
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
        return
    except (KeyboardInterrupt, ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if RANK and not SIGNALS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # the first process says the same, and its end ends this one
    except RuntimeError as error:  # no memory, a worker or another process has ended, our mistake
        if sys.flags.dev_mode:
            raise
        message = (f"{' '.join(str(error).split()):.300}\n{again}; python -X dev "
                   "shows where it ended")
    if SIGNALS:  # the shell's rule; before it, workers that ended may have raised anything
        code, message = 128 + SIGNALS[0], f"stopped; {again}"
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    cli()

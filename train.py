"""CLIP-IT from end to end: pair, vision head, text head, fuse and distil, text-free test.

    python train.py                                      # the demo: offline, a minute on two cores
    python train.py --ds my_tiles --reports reports.txt  # my_tiles/{train,test}/CLASS/*.png
    python train.py --ds crc --download --model VITS_16  # the paper's data, fetched once
    python train.py --no-text                            # the ablation: all but the distillation
    python train.py --ep 0                               # pairs, page and heads alone, no step 4
    python train.py --table runs                         # finished runs as the paper's Table 1
    torchrun --nproc_per_node 4 -- train.py --ds crc     # four processes share every batch

A run writes DIR/OUTPUT/RUN/: args.json, log.jsonl, pairs.csv, metrics.json, predictions.csv,
report.html to look at, last.pt for --resume, and classifier/, the text-free model for clipit.py.
"""
import argparse
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, Subset
from tqdm import tqdm

from clipit import BACKBONES, ClipIT, clipit_loss, load_backbone, text_classifier
from data import (DATASETS, REPORTS, Tiles, dataset_folder, download, draw_shots, load_reports,
                  load_tiles, stratified_split)
from lora import TARGETS, inject_lora
from pairing import CLIPS, embed_images, embed_texts, load_clip, nearest_text

SPLITS = ("train", "val", "test")


def main(argv=None) -> dict:
    """One run, the paper in five steps; returns what metrics.json holds. Raises ValueError, OSError
    for bad input, FloatingPointError for a loss that is not finite.

    N tiles, M reports, C classes; D, d: the sizes of the backbone's and of CLIP's features."""
    args = parse_args(argv)
    if args.table:
        return table(Path(args.table))
    clip, backbone = load_models(args)
    tiles, labels, reports = load_data(backbone, args)  # by split: Tiles, (N,); M texts
    classes = tiles["train"].classes
    run = open_run(args, tiles, reports)

    # 1. Pair: psi(i) = argmax_j cos(v_i, t_j), by CLIP alone; no label is read
    text_emb = embed_reports(clip, reports, args)  # (M, d)
    image_emb, pairs, similarity = {}, {}, {}
    for split in SPLITS:
        image_emb[split] = embed_tiles(clip, tiles[split], args)  # (N, d)
        pairs[split], similarity[split] = nearest_text(image_emb[split], text_emb)  # (N,), (N,)
    write_pairs(run, tiles, pairs, similarity, reports)

    # 2. Vision head h_v on the frozen backbone: the unimodal row
    v = {split: backbone_features(backbone, tiles[split], args) for split in SPLITS}  # (N, D)
    torch.manual_seed(args.sd)
    vision_head = nn.Linear(backbone.num_features, len(classes))
    train_head(vision_head, v, labels, args.sd)

    # 3. Text head on the paired reports: what the text knows of the classes
    t = {split: text_emb[pairs[split]] for split in SPLITS}  # (N, d)
    text_head = text_classifier(clip.dim, len(classes))
    train_head(text_head, t, labels, args.sd)
    p = {"vision head": vision_head(v["test"]).softmax(dim=1),  # (N, C)
         "text head": text_head(t["test"]).softmax(dim=1)}
    p |= clip_baselines(clip, image_emb, labels, classes, args)

    # 4. Fuse and distil: LoRA; CE of the fused logits + lambda * (1 - cos(t, t-hat))
    best = None
    if args.ep:
        model = build_model(backbone, clip, vision_head, args)
        best = train_clipit(model, clip, tiles, pairs, reports, text_emb, args, run)

        # 5. Text-free test: LoRA merged, no text tower, no report, no CLIP
        classifier = model.to_classifier(classes).to(args.device)
        p[variant(args)] = outputs(classifier, tiles["test"], args).softmax(dim=1)
        write_predictions(run, tiles["test"], p[variant(args)])
    metrics = {"rows": {name: scores(p[name], labels["test"]) for name in p},
               "complementarity": complementarity(p["vision head"], p["text head"],
                                                  labels["test"], classes),
               "test_tiles": len(labels["test"]), "classes": classes, "ds": args.ds,
               "model": args.model, "sd": args.sd, "best": best}
    if args.ep:
        write_classifier(run, model, metrics, args)
    write_results(run, metrics, tiles, pairs, similarity, reports)
    return metrics


def train_clipit(model: ClipIT, clip, tiles, pairs, reports, text_emb: Tensor, args, run: Path):
    """Step 4. Leaves the model in its best state by --monitor; returns that state's value and step.

    Epoch e visits the tiles in an order that seed and e alone decide, and the random numbers of a
    step have a seed of their own: a resumed run goes on as if it had never stopped.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # weight decay as L2 in the gradient, as the authors have it (Adam, not AdamW)
    optimizer = torch.optim.Adam(trained, args.lr, weight_decay=args.weight_decay, fused=True)
    n = len(tiles["train"])
    epoch_steps = math.ceil(n / args.batch)
    total = args.ep * epoch_steps
    val_steps = max(round(args.val_every * epoch_steps), 1)
    text = epoch_text = text_of(clip, reports, text_emb, args)  # (M, d), (M, L) or None
    state, tracker = resume_training(run, model, optimizer, args), open_tracker(run, args)
    step, sums, began = state["step"], {}, time.perf_counter()
    bar = tqdm(total=total, initial=step, desc="train", leave=False, disable=None)
    model.train()
    while step < total and not state["stopped"]:
        epoch, done = divmod(step, epoch_steps)
        generator = torch.Generator().manual_seed(args.sd * 100_003 + epoch)
        order = torch.randperm(n, generator=generator).split(args.batch)[done:]
        if args.drop_words:
            epoch_text = text_of(clip, reports, text_emb, args, epoch)
        for images, labels, report, share in batches(tiles["train"], pairs["train"], order, args):
            torch.manual_seed((args.sd * 1_000_003 + step) * WORLD + RANK)  # of dropout
            logits, t_hat, t = forward(model, images, report, *epoch_text, args)
            loss, parts = clipit_loss(logits, labels, t_hat, t, args.kd_weight)
            parts = {"loss": loss.detach(), **parts}
            stop_unless_finite(parts, step + 1, run)
            (share * loss).backward()
            sum_over_processes([p.grad for p in trained if p.grad is not None])
            if args.clip:
                nn.utils.clip_grad_norm_(trained, args.clip)
            optimizer.step()
            optimizer.zero_grad()  # now: kept through the next forward pass they would cost memory
            step += 1
            bar.update()
            optimizer.param_groups[0]["lr"] = args.lr * decay(step / total, args)
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + share * value
            if step % val_steps and step < total:
                continue

            # ---- Look at the validation split, keep the best state, write what --resume needs
            sum_over_processes(list(sums.values()))
            steps, seconds = step - state["step"], time.perf_counter() - began
            line = {"step": step, "epoch": step / epoch_steps}
            line |= {key: value.item() / steps for key, value in sums.items()}
            line |= validate(model, tiles["val"], pairs["val"], text, args)
            line |= {"lr": optimizer.param_groups[0]["lr"],
                     "tiles_per_second": round(steps * args.batch / seconds, 1)}
            stop_unless_finite({"val_loss": line["val_loss"]}, step, run)
            update_best(state, line, model, args)
            save_training(run, state, line, model, optimizer, args)
            if tracker:
                tracker.log(line, step=step)
            if step // val_steps % args.log == 0 or step == total or state["stopped"]:
                show(line, total)
            sums, began = {}, time.perf_counter()
            if state["stopped"]:
                break
    bar.close()
    best = state["best"]
    model.load_state_dict(best["model"], strict=False)  # the trained parameters; the rest stays
    model.eval()
    print(f"best {args.monitor} {best['value']:.4f} at step {best['step']} of {step}")
    return {"value": best["value"], "step": best["step"]}


def forward(model: ClipIT, images: Tensor, report: Tensor, text_emb: Tensor, tokens, args):
    """images (B, 3, H, W), report (B,) -> logits (B, C), t-hat (B, d), t (B, d); fp32.

    text_emb (M, d), tokens (M, L): of all reports; tokens are None where the text is fixed.
    Distillation reaches the backbone and a trained text tower; cross-entropy never sees t.
    """
    with autocast(args):
        logits, t_hat = model.fuse(model.backbone(images))
        if args.no_text:
            t = t_hat = None
        elif tokens is None:  # a fixed text is looked up
            t = text_emb[report]
        else:  # tiles share reports: each distinct one is encoded once
            used, row = report.unique(return_inverse=True)
            t = model.text_tower(tokens[used])[row]
    logits, t_hat, t = (x if x is None else x.float() for x in (logits, t_hat, t))
    if "double-softmax" in args.authors:  # theirs: cross-entropy takes probabilities for logits
        logits = logits.softmax(dim=1)
    return logits, t_hat, t


@torch.no_grad()
def validate(model: ClipIT, tiles: Tiles, pairs: Tensor, text: tuple, args) -> dict:
    """The loss and its parts over the whole validation split, and accuracies. The prediction uses
    the image alone; the reports enter the distillation part of the loss."""
    model.eval()
    order, rows = torch.arange(len(tiles)).split(args.batch * WORLD), []
    for images, _, report, _ in batches(tiles, pairs, order, args):
        rows.append(forward(model, images, report, *text, args))
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


def train_head(head: nn.Module, features: dict[str, Tensor], labels: dict[str, Tensor], seed: int,
               steps: int = 12_500, patience: int = 20) -> None:
    """Train a head on features computed once, as kaiko-eva 0.1.2 trains its linear probe: AdamW
    3e-4, batch 256, at most 12,500 steps. Of 100 looks at the validation loss the state of the
    lowest is kept; `patience` looks without a lower one end it.

    features: split -> (N, D), labels: split -> (N,).
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    lowest, waited, best, order = math.inf, 0, head.state_dict(), []
    for step in tqdm(range(1, steps + 1), "train head", leave=False, disable=None):
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
            lowest, waited = val_loss, 0
            best = {name: p.clone() for name, p in head.state_dict().items()}
        if waited == patience:
            break
    head.load_state_dict(best)
    head.requires_grad_(False)


# ---- Metrics: probabilities p (N, C), labels (N,) -----------------------------------------------

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
            "macro_auroc": macro_auroc(p, labels),
            "recall": recall.tolist(), "confusion": confusion.tolist()}


def macro_auroc(p: Tensor, labels: Tensor) -> float:
    """Mean one-against-rest area under the ROC curve, ties counted half, over the classes that have
    tiles and are not all of them."""
    areas = []
    for label in range(p.shape[1]):
        positive = labels == label
        m, n = int(positive.sum()), int((~positive).sum())
        if m and n:
            _, place, counts = p[:, label].unique(return_inverse=True, return_counts=True)
            rank = (counts.cumsum(0) - (counts - 1) / 2).double()  # the mean rank of equal scores
            areas.append(((rank[place][positive].sum() - m * (m + 1) / 2) / (m * n)).item())
    return sum(areas) / len(areas) if areas else math.nan


def complementarity(vision: Tensor, text: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """Fig. 3: the tiles that the text model gets right and the vision model wrong, as count and
    share, per class too. vision, text: probabilities (N, C)."""
    wrong = vision.argmax(dim=1) != labels
    gained = wrong & (text.argmax(dim=1) == labels)

    def count(among):
        tiles = int(gained[among].sum())
        return {"tiles": tiles, "share": tiles / max(int(among.sum()), 1)}
    return {**count(torch.ones_like(wrong)), "share_of_vision_errors": count(wrong)["share"],
            "per_class": {name: count(labels == label) for label, name in enumerate(classes)}}


def text_spread(features: Tensor) -> float:
    """1 - mean cosine of two different rows of (R, d): 0 where all reports have one direction."""
    count, total = len(features), F.normalize(features.double(), dim=1).sum(dim=0)
    return 1 - ((total @ total - count) / max(count * (count - 1), 1)).item()


# ==== What a run needs beside the method =========================================================

def load_models(args):
    """CLIP and the backbone on the device; from here on the same seed gives the same numbers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products vary
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.allow_tf32 = False  # where fp32 is asked for, and pairing always is
    torch.manual_seed(args.sd)  # of random weights, where they are asked for
    if not args.download:
        dataset_folder(args.ds, args.data_dir)  # refused before anything is loaded
    clip = load_clip(args.clip_model, args.clip_weights, device=args.device)
    clip.tokenize([""])  # conch's tokenizer file is asked for here, not after an hour of tiles
    return clip, load_backbone(args.model, args.weights).to(args.device)


def load_data(backbone: nn.Module, args):
    """(tiles, labels, reports): split -> Tiles as the backbone sees them, split -> (N,), texts."""
    if args.download:
        download(args.ds, args.reports, args.data_dir)
    reports, tiles = load_reports(args.reports, args.data_dir), {}
    for split in SPLITS:
        part = load_tiles(args.ds, split, args.data_dir, backbone.preprocess, args.val_int)
        if args.limit:
            part = part.take(stratified_split(part.labels, args.limit, args.sd)[1])
        if args.shots and split == "train":
            part = part.take(draw_shots(part.labels, args.shots, args.sd))
        tiles[split] = part
        print(f"{args.ds}: {len(part)} {split} tiles of {len(part.classes)} classes")
    return tiles, {split: torch.tensor(tiles[split].labels) for split in SPLITS}, reports


def embed_reports(clip, reports: list[str], args) -> Tensor:
    """CLIP features of the reports, (M, d)."""
    key = [args.clip_model, reports]
    return cached("report", clip.text_tower, key, lambda: embed_texts(clip, reports), args)


def embed_tiles(clip, tiles: Tiles, args) -> Tensor:
    """CLIP features of the tiles, (N, d). The first look at every tile: one that cannot be read
    ends the run here."""
    tiles = tiles.with_transform(clip.preprocess)

    def compute():
        return gather(embed_images(clip, shard(tiles), args.batch, args.worker), len(tiles))
    return cached("tile", clip.image_tower, tile_facts(tiles), compute, args)


def backbone_features(backbone: nn.Module, tiles: Tiles, args) -> Tensor:
    """Features of the frozen backbone, (N, D)."""
    key = [args.amp, *tile_facts(tiles)]
    return cached("backbone", backbone, key, lambda: outputs(backbone, tiles, args), args)


@torch.no_grad()
def outputs(model: nn.Module, tiles: Tiles, args) -> Tensor:
    """The output of a backbone or a classifier for every tile, (N, ...) fp32 on the CPU."""
    generator, rows = torch.Generator(), []  # the workers' seed is not drawn from the run's
    loader = DataLoader(shard(tiles), args.batch, num_workers=args.worker, generator=generator)
    with autocast(args):
        for images, _ in tqdm(loader, "tiles", leave=False, disable=None):
            rows.append(model(images.to(args.device)).float())
    return gather(torch.cat(rows), len(tiles))


def clip_baselines(clip, image_emb, labels, classes: list[str], args) -> dict[str, Tensor]:
    """--baseline's rows of the CLIP image tower, test probabilities (N, C): what its features, by
    which the reports were found, know themselves. image_emb: split -> (N, d)."""
    p = {}
    if "clip-probe" in args.baseline:
        probe = nn.Linear(clip.dim, len(classes))
        train_head(probe, image_emb, labels, args.sd)
        p["CLIP linear probe"] = probe(image_emb["test"]).softmax(dim=1)
    if "zeroshot" in args.baseline:  # cosines with a prompt a class, at the usual temperature 1/100
        names = DATASETS.get(args.ds, {}).get("prompts", classes)
        prompts = embed_texts(clip, [f"an H&E image of {name}." for name in names])  # (C, d)
        p["CLIP zero-shot"] = (100 * image_emb["test"] @ prompts.T).softmax(dim=1)
    return p


def build_model(backbone: nn.Module, clip, vision_head: nn.Linear, args) -> ClipIT:
    """ClipIT with LoRA where --lora-vision and --lora-text ask for it. Seeded anew, and the text
    side last: with and without text, everything else starts from the same numbers."""
    torch.manual_seed(args.sd)
    model = ClipIT(backbone.requires_grad_(False), None, vision_head.out_features,
                   vision_head.in_features, clip.dim, args.kd_layers,
                   fused="lora" not in args.baseline, random_fusion="random-fusion" in args.authors)
    model.vision_head.load_state_dict(vision_head.state_dict())
    if args.lora_vision:
        adapt(backbone, args)
    if args.lora_text and not args.no_text:
        model.text_tower = clip.text_tower
        adapt(clip.text_tower, args)
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    clip.image_tower = None  # its part has ended
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"training {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return model.to(args.device)


def adapt(tower: nn.Module, args) -> None:
    """LoRA on the tower's layers of --lora-targets; a tower that has none stays as it is."""
    kinds = tuple(TARGETS[target].adapts for target in args.lora_targets)
    if any(isinstance(layer, kinds) for layer in tower.modules()):
        inject_lora(tower, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
    else:
        print(f"no {' or '.join(args.lora_targets)} layer in {type(tower).__name__}: no LoRA in it")


def variant(args) -> str:
    """What the row of the trained model is called."""
    if "lora" in args.baseline:
        return "LoRA with a plain head"
    return "CLIP-IT without text" if args.no_text else "CLIP-IT"


def batches(tiles: Tiles, pairs: Tensor, order, args):
    """(images (B, 3, H, W), labels (B,), report (B,), share) on the device for every batch of
    indices in `order`; of many processes each gets its tiles of a batch, and their share of it."""
    loader = DataLoader(StackDataset(tiles, pairs), num_workers=args.worker,
                        batch_sampler=[own_rows(batch.tolist()) for batch in order],
                        generator=torch.Generator(), pin_memory=args.device.type == "cuda")
    for batch, ((images, labels), report) in zip(order, loader):
        share = len(batch[RANK::WORLD]) / len(batch)
        yield *(x.to(args.device, non_blocking=True) for x in (images, labels, report)), share


def text_of(clip, reports: list[str], text_emb: Tensor, args, epoch: int | None = None):
    """(features (M, d), tokens (M, L), None where the text is fixed) of all reports on the device;
    in an epoch under --drop-words, of what is left of each."""
    tokens, dropped = None, epoch is not None
    if dropped:
        reports = [drop_words(report, args.drop_words, f"{args.sd} {epoch} {i}")
                   for i, report in enumerate(reports)]
    if args.lora_text and not args.no_text:
        tokens = clip.tokenize(reports).to(args.device)
    elif dropped:
        text_emb = embed_texts(clip, reports)
    return text_emb.to(args.device), tokens


def drop_words(report: str, share: float, seed: str) -> str:
    """The report without `share` of its words, drawn at random by seed; one word stays at least."""
    words = report.split()
    count = max(round(len(words) * (1 - share)), 1)
    return " ".join(words[i] for i in sorted(random.Random(seed).sample(range(len(words)), count)))


def autocast(args):
    """--amp: matrix products in bf16; parameters, their updates and the loss stay fp32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp == "bf16")


def decay(done: float, args) -> float:
    """The factor of the learning rate; --scheduler 1: a cosine by step down to a tenth. (The
    authors' goes by epoch over 12,500 epochs and so stands still.)"""
    return 0.55 + 0.45 * math.cos(math.pi * done) if args.scheduler else 1.0


# ---- Many processes: row i is process i % WORLD's; of one process nothing here does anything ----

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def own_rows(rows):
    """This process's part of a list; one that has none computes the first row, for nothing."""
    return list(rows[RANK::WORLD]) or list(rows[:1])


def shard(tiles: Tiles) -> Subset:
    return Subset(tiles, own_rows(range(len(tiles))))


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Each tensor becomes its sum over the processes, in place."""
    if WORLD == 1:
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    whole = torch.cat([x.detach().flatten() for x in tensors]).to(device)
    try:
        dist.all_reduce(whole)
    except RuntimeError:
        raise ConnectionError("another process of the run has ended; mend what it says, and the "
                              "same command with --resume goes on") from None
    for x, part in zip(tensors, whole.split([x.numel() for x in tensors])):
        x.detach().copy_(part.view_as(x))


def gather(rows: Tensor, n: int) -> Tensor:
    """All n rows in order, on the CPU, of what each process has of its own: a sum with zeros."""
    if WORLD > 1:
        whole = torch.zeros(n, *rows.shape[1:], device=rows.device)
        whole[RANK::WORLD] = rows[:len(range(RANK, n, WORLD))]
        sum_over_processes([whole])
        rows = whole
    return rows.cpu()


def wait_for_all() -> None:
    sum_over_processes([torch.zeros(1)])


def write_file(path: Path, write) -> None:
    """write(a temporary name), then renamed: a killed run leaves the old file or the new one. The
    first process writes, the others wait for it."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".tmp")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        if path.is_dir():  # a folder cannot be renamed over another
            shutil.rmtree(path)
        os.replace(part, path)
    wait_for_all()


# ---- The cache: features are computed once for the same tiles and weights -----------------------

def cached(kind: str, tower: nn.Module, key: list, compute, args) -> Tensor:
    """compute()'s tensor, kept in DIR/cache under a hash of the tower's weights and of all else
    that it depends on (key). The folder may be removed at any time."""
    digest = hashlib.sha256(json.dumps(key).encode())
    for name, value in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    path = Path(args.dir, "cache", f"{kind}-{digest.hexdigest()[:16]}.pt")
    try:
        tensor = torch.load(path, weights_only=True)
    except Exception:  # none there, or whatever is wrong with it: computing mends it
        tensor = None
    wait_for_all()  # all have looked before one of them writes it
    print(f"{kind} features: {'computed' if tensor is None else 'from the cache'}")
    if tensor is None:
        tensor = compute()
        write_file(path, lambda part: torch.save(tensor, part))
    return tensor


def tile_facts(tiles: Tiles) -> list:
    """How the images are made, and path, size and time of their files (FILE.h5#17: of FILE.h5)."""
    facts = [re.sub(" at 0x[0-9a-f]+", "", repr(tiles.transform))]  # without a function's address
    for path in tiles.paths:
        file = os.stat(re.sub(r"(?<=\.h5)#\d+$", "", path))
        facts.append((path, file.st_size, file.st_mtime_ns))
    return facts


# ---- A run's folder and its files ---------------------------------------------------------------

# Flags that say where and how a run is made, not what it is: they may change when it is resumed
PLACES = ("dir", "output", "run", "data_dir", "download", "worker", "device", "resume", "log",
          "table", "wandb", "grad_checkpointing")
RESULTS = ("metrics.json", "predictions.csv", "*.pt", "log.jsonl", "pairs.csv", "report.html")


def open_run(args, tiles, reports: list[str]) -> Path:
    """Join the processes and make DIR/OUTPUT/RUN with args.json. A folder that holds another
    configuration is left as it is (ValueError)."""
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    run = Path(args.dir, args.output, args.run)
    config = {key: value for key, value in vars(args).items() if key not in PLACES}
    inputs = [reports, *([tiles[split].paths, tiles[split].labels] for split in SPLITS)]
    config["inputs"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    if (run / "args.json").exists():
        before = json.loads((run / "args.json").read_text())["config"]
        for key in config:
            if before.get(key) != config[key]:
                raise ValueError(f"{run}: holds a run of another configuration ({key} "
                                 f"{before.get(key)!r} there, {config[key]!r} now); give another "
                                 "--run, or remove that folder")
    if not args.resume and RANK == 0:  # old results go first, so that none can be mistaken
        shutil.rmtree(run / "classifier", ignore_errors=True)
        for name in RESULTS:
            for path in run.glob(name):
                path.unlink()
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "pillow")
    versions = {"python": sys.version.split()[0]} | {x: version(x) for x in packages}
    places = {key: str(getattr(args, key)) for key in PLACES}
    facts = {"config": config, "places": places, "versions": versions}
    write_text(run / "args.json", json.dumps(facts, indent=1))
    return run


def resume_training(run: Path, model: ClipIT, optimizer, args) -> dict:
    """Where training stands: what last.pt says with --resume, otherwise at its start."""
    if args.resume and (run / "last.pt").exists():
        saved = torch.load(run / "last.pt", weights_only=True)
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        if RANK == 0:
            os.truncate(run / "log.jsonl", saved["log_bytes"])
        print(f"going on from step {saved['state']['step']}")
        return saved["state"]
    write_file(run / "log.jsonl", Path.touch)
    return {"step": 0, "waited": 0, "stopped": False, "best": None}


def save_training(run: Path, state: dict, line: dict, model: ClipIT, optimizer, args) -> None:
    """Add the line to log.jsonl and write last.pt: everything that the next step depends on."""
    state["step"] = line["step"]
    if RANK == 0:
        with open(run / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
    weights = trained_state(model)
    saved = {"state": state, "model": weights, "optimizer": optimizer.state_dict(),
             "log_bytes": os.path.getsize(run / "log.jsonl")}
    write_file(run / "last.pt", lambda part: torch.save(saved, part))
    if args.chkpnt:
        write_file(run / f"step_{line['step']}.pt", lambda part: torch.save(weights, part))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters: LoRA and heads."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()
            if p.requires_grad}


def update_best(state: dict, line: dict, model: ClipIT, args) -> None:
    """Keep the state of the best --monitor; --early stops after --patience looks without a better
    one by more than --delta. (The authors' looks at the training loss, with a delta of 5.)"""
    value, gain = line[args.monitor], math.inf
    if state["best"]:
        gain = (state["best"]["value"] - value) * (1 if args.mod == "min" else -1)
    if gain > 0:
        state["best"] = {"value": value, "step": line["step"], "model": trained_state(model)}
    state["waited"] = 0 if gain > args.delta else state["waited"] + 1
    state["stopped"] = bool(args.early) and state["waited"] >= args.patience


def stop_unless_finite(parts: dict, step: int, run: Path) -> None:
    if not all(math.isfinite(value) for value in parts.values()):
        figures = ", ".join(f"{key} {value:.4g}" for key, value in parts.items())
        raise FloatingPointError(f"not finite at step {step}: {figures}; try a lower --lr\n"
                                 f"{run / 'last.pt'} holds the last validation's state, if any")


def open_tracker(run: Path, args):
    """--wandb: its run, whose log() takes the lines of log.jsonl; otherwise None."""
    if not args.wandb or RANK:
        return None
    import wandb
    return wandb.init(project="clip-it", name=run.name, dir=run, config=vars(args))


def show(line: dict, total: int) -> None:
    keys = ("loss", "ce", "kd", "val_loss", "val_bacc", "text_spread")
    figures = "  ".join(f"{key} {line[key]:.4f}" for key in keys if key in line)
    tqdm.write(f"step {line['step']}/{total}  {figures}")


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda part: part.write_text(text, "utf-8", "replace"))


def write_csv(path: Path, header: list[str], rows) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def write_pairs(run: Path, tiles, pairs, similarity, reports: list[str]) -> None:
    """pairs.csv: tile, split, the number of its report (from 0, in order) and their cosine."""
    rows = []
    for split in SPLITS:
        for tile, report, cosine in zip(tiles[split].paths, pairs[split], similarity[split]):
            rows.append((tile, split, int(report), f"{cosine:.6f}"))
    write_csv(run / "pairs.csv", ["tile", "split", "report", "similarity"], rows)
    write_page(run, tiles["train"], pairs["train"], similarity["train"], reports)
    uses = torch.cat(list(pairs.values())).bincount()  # (M,)
    print(f"pairs: {int((uses > 0).sum())} of {len(reports)} reports used, the most used by "
          f"{uses.max() / uses.sum():.1%} of the tiles")


def write_predictions(run: Path, tiles: Tiles, p: Tensor) -> None:
    """path, target, pred and class_0 ... (probabilities), the authors' column names."""
    header = ["path", "target", "pred", *(f"class_{i}" for i in range(p.shape[1]))]
    rows = zip(tiles.paths, tiles.labels, p.argmax(dim=1).tolist(), *p.T.tolist())
    write_csv(run / "predictions.csv", header, rows)


def write_classifier(run: Path, model: ClipIT, metrics: dict, args) -> None:
    """classifier/ with what config.json and the model card tell of the run, without its paths."""
    row, rows = DATASETS.get(args.ds, {}), metrics["rows"]
    facts = {"data": row.get("title", Path(args.ds).resolve().name),
             "licence": row.get("licence", "not known here"), "variant": variant(args),
             "test_tiles": metrics["test_tiles"], "reports": None, "clip_model": None,
             "metrics": {key: rows[variant(args)][key] for key in COLUMNS},
             "unimodal": {key: rows["vision head"][key] for key in COLUMNS}}
    if not args.no_text:
        facts["reports"] = Path(args.reports).name
        facts["clip_model"] = re.sub("(?<=local-dir:).*/", "", args.clip_model)
    classifier = model.to_classifier(metrics["classes"], facts)
    write_file(run / "classifier", classifier.save_pretrained)


def write_results(run: Path, metrics: dict, tiles, pairs, similarity, reports) -> None:
    """metrics.json, report.html once more, and the table on standard output."""
    write_page(run, tiles["train"], pairs["train"], similarity["train"], reports, metrics)
    write_text(run / "metrics.json", json.dumps(metrics, indent=1))
    print(f"\n{results(metrics)}\nthe run lies in {run}")


COLUMNS = {"balanced_accuracy": "bal. acc.", "accuracy": "accuracy", "macro_f1": "macro F1",
           "macro_auroc": "macro AUROC"}
NOTES = {"vision head": " (frozen backbone, unimodal)", "text head": " (paired reports)"}


def results(metrics: dict) -> str:
    """The table of a run as text."""
    titles = "".join(title.rjust(12) for title in COLUMNS.values())
    lines = [f"{metrics['test_tiles']} test tiles".ljust(41) + titles]
    for name, row in metrics["rows"].items():
        figures = "".join(f"{100 * row[key]:12.2f}" for key in COLUMNS)
        lines.append((name + NOTES.get(name, " (image only)")).ljust(41) + figures)
    gained = metrics["complementarity"]
    by_class = ", ".join(f"{name} {x['tiles']} ({x['share']:.0%})"
                         for name, x in gained["per_class"].items())
    return "\n".join(lines) + (
        f"\ncomplementarity: the text head is right where the vision head is wrong on "
        f"{gained['tiles']} tiles, {gained['share']:.1%} of all, "
        f"{gained['share_of_vision_errors']:.1%} of the vision head's errors\n  by class: {by_class}")


# ---- report.html: one page a run, without scripts or anything from elsewhere --------------------

STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui; max-width: 72rem; margin: auto; padding: 1rem }
body { overflow-wrap: anywhere } pre, div { overflow-x: auto }
td, th { padding: .2rem .6rem; text-align: right; overflow-wrap: normal }
.pair { display: flex; gap: 1rem; margin: .5rem 0 } img { width: 7rem; height: 7rem; flex: none }
svg { width: 100%; max-width: 40rem; height: 14rem } .loss { stroke: #888 }
polyline { fill: none; stroke: #08c; vector-effect: non-scaling-stroke; stroke-width: 2 }
"""


def write_page(run: Path, tiles: Tiles, pairs, similarity, reports, metrics=None) -> None:
    """report.html: results, confusion and losses, once there are any; training tiles beside their
    reports, of every class from the highest cosine to the lowest; the flags."""
    title = escape(f"CLIP-IT: {run.parent.name}/{run.name}")
    parts = ["<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport content="
             f"'width=device-width'><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    if metrics:
        last = list(metrics["rows"])[-1]
        parts += [f"<pre>{escape(results(metrics))}</pre><h2>Confusion of {last}</h2><p>True class:"
                  " row; predicted class: column; shade: share of the row.</p>",
                  confusion_table(metrics["rows"][last]["confusion"], metrics["classes"])]
        if metrics["best"]:
            parts.append(loss_curves([json.loads(line) for line in open(run / "log.jsonl")]))
    parts.append("<h2>Pairs</h2><p>Cosines of training tiles and their reports. No label took "
                 "part.</p>")
    labels = torch.tensor(tiles.labels)
    for label, name in list(enumerate(tiles.classes))[:40]:
        members = (labels == label).nonzero()[:, 0]
        members = members[similarity[members].argsort(descending=True, stable=True)]
        parts.append(f"<h3>{escape(name)}</h3>")
        for i in members[torch.linspace(0, len(members) - 1, 4).long().unique()].tolist():
            text = escape(reports[pairs[i]][:500])
            parts.append(f"<div class=pair>{thumbnail(tiles, i)}<p><b>{similarity[i]:.3f}</b> "
                         f"report {pairs[i]}: {text}<br>{escape(tiles.paths[i])}</p></div>")
    flags = escape((run / "args.json").read_text())
    write_text(run / "report.html", "\n".join([*parts, f"<h2>Flags</h2><pre>{flags}</pre>"]))


def confusion_table(counts: list[list[int]], classes: list[str]) -> str:
    lines = ["".join(f"<th>{escape(name)}" for name in ["", *classes])]
    for name, row in zip(classes, counts):
        cells = [f"<td style='background:rgb(0 120 200/{count / max(sum(row), 1):.2f})'>{count}"
                 for count in row]
        lines.append(f"<th>{escape(name)}{''.join(cells)}")
    return f"<div><table><tr>{'<tr>'.join(lines)}</table></div>"


def loss_curves(log: list[dict]) -> str:
    right, top = log[-1]["epoch"], max(max(line["loss"], line["val_loss"]) for line in log)
    curves = []
    for key in ("loss", "val_loss"):
        points = [f"{100 * line['epoch'] / right:.2f},{100 - 100 * line[key] / top:.2f}"
                  for line in log]
        curves.append(f"<polyline class={key} points='{' '.join(points)}'/>")
    return (f"<h2>Loss</h2><p>In training (grey) and validation (blue), from 0 to {top:.3g}, in "
            f"{right:g} epochs.</p><svg viewBox='0 0 100 100' preserveAspectRatio=none>"
            f"{''.join(curves)}</svg>")


def thumbnail(tiles: Tiles, index: int) -> str:
    image, file = tiles.with_transform(None)[index][0], io.BytesIO()
    image.thumbnail((112, 112))
    image.save(file, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}'>"


# ---- Table 1 of the paper, from finished runs ---------------------------------------------------

PAPER = {  # balanced accuracy in %, unimodal -> CLIP-IT
    "UNI": dict(pcam=(94.24, 95.49), bach=(78.89, 81.79), crc=(94.66, 95.92)),
    "DINOL14": dict(pcam=(88.88, 92.32), bach=(84.26, 86.11), crc=(94.40, 95.91)),
    "VITB_16": dict(pcam=(88.13, 91.42), bach=(80.78, 82.94), crc=(95.86, 95.67)),
    "VITS_16": dict(pcam=(88.43, 90.93), bach=(82.90, 84.64), crc=(93.77, 95.34)),
    "VITB_8": dict(pcam=(87.54, 91.92), bach=(86.90, 84.91), crc=(95.71, 95.66)),
    "VITS_8": dict(pcam=(87.90, 90.24), bach=(81.01, 82.55), crc=(94.90, 95.55)),
}


def table(folder: Path) -> dict:
    """For every data set, backbone and variant among the finished runs below `folder`: unimodal ->
    trained as mean +- sd of balanced accuracy in % over n runs that differ in the seed alone."""
    groups: dict[tuple, list] = {}
    for path in sorted(folder.rglob("metrics.json")):
        metrics = json.loads(path.read_text())
        config = json.loads((path.parent / "args.json").read_text())["config"]
        flags = json.dumps({key: x for key, x in config.items() if key not in ("sd", "inputs")})
        if metrics["best"] is None:  # --ep 0: nothing was trained
            continue
        name = list(metrics["rows"])[-1]
        pair = [100 * metrics["rows"][row]["balanced_accuracy"] for row in ("vision head", name)]
        groups.setdefault((config["ds"], config["model"], name, flags), []).append(pair)
    if not groups:
        raise FileNotFoundError(f"--table {folder}: no metrics.json below it; give a --dir of runs")
    rows = []
    for (ds, model, name, flags), runs in groups.items():
        unimodal, trained = torch.tensor(runs, dtype=torch.double).T  # (n,), (n,)
        figures = []
        for x in (unimodal, trained, trained - unimodal):
            figures += [x.mean().item(), x.std().item() if len(runs) > 1 else math.nan]
        shown = [f"{mean:.2f} ± {sd:.2f}" for mean, sd in zip(figures[::2], figures[1::2])]
        paper = PAPER.get(model, {}).get(ds, "-") if name == "CLIP-IT" else "-"
        print(f"{ds}  {Path(model).name}  unimodal {shown[0]} -> {name} {shown[1]}  (gain {shown[2]}, "
              f"n = {len(runs)}, paper: {paper})")
        rows.append([ds, model, name, flags, len(runs), *figures])
    header = ["ds", "model", "row", "flags", "n", "unimodal_mean", "unimodal_sd", "trained_mean",
              "trained_sd", "gain_mean", "gain_sd"]
    write_csv(folder / "table.csv", header, rows)
    return {"table": [dict(zip(header, row)) for row in rows]}


# ---- Command line -------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; python train.py --help lists the flags")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def number(kind, expected: str, fits):
    """A type of argparse's: a number of that kind for which fits(number) is true."""
    def parse(text):
        if not fits(kind(text)):
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


COUNT = number(int, "1 or more", lambda x: x >= 1)
WHOLE = number(int, "0 or more", lambda x: x >= 0)
ABOVE_0 = number(float, "a number above 0", lambda x: 0 < x < math.inf)
FROM_0 = number(float, "0 or a number above it", lambda x: 0 <= x < math.inf)
SHARE = number(float, "a share between 0 and 1, such as 0.2", lambda x: 0 < x < 1)
BELOW_1 = number(float, "0 or a share below 1, such as 0.3", lambda x: 0 <= x < 1)


def parse_args(argv=None) -> argparse.Namespace:
    """The authors' flag names, with - or _. A data set's own defaults are in its row."""
    words = sys.argv[1:] if argv is None else map(str, argv)
    words = [re.sub("^--[a-z_]+", lambda match: match[0].replace("_", "-"), word) for word in words]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--ds", default="demo")
    defaults = DATASETS.get(first.parse_known_args(words)[0].ds, {}).get("defaults", {})
    cuda = torch.cuda.is_available()
    parser = Parser("train.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)

    def flag(name, default, help, kind=None, **kwargs):
        if "action" not in kwargs:
            kwargs["type"] = kind or (str if default is None else type(default))
        parser.add_argument(f"--{name}", default=default, help=help, **kwargs)

    on, switch = dict(action="store_true"), dict(choices=(0, 1), nargs="?", const=1)
    flag("ds", "demo", f"{', '.join(DATASETS)}, or a folder with train/, test/ and perhaps val/")
    flag("data-dir", "data", "where downloaded data sets lie")
    flag("download", False, "fetch the data set and the reports if they are missing", **on)
    flag("reports", None, f".txt with a report a line, .csv, .jsonl, folder, {', '.join(REPORTS)}")
    flag("model", "UNI", f"backbone: {', '.join(BACKBONES)}, a timm id, hf-hub:..., local-dir:...")
    flag("weights", None, "local weights of the backbone, or `none` for random ones")
    flag("clip-model", "conch", f"pairing model: {', '.join(CLIPS)} or an open_clip id")
    flag("clip-weights", None, "local weights of the pairing model, or `none`")
    flag("dir", "runs", "where runs are written: DIR/OUTPUT/RUN")
    flag("output", None, "unset, the name of the data set")
    flag("run", None, "unset, the flags that differ from their defaults")
    flag("resume", False, "go on with the run in DIR/OUTPUT/RUN", **on)
    flag("sd", 0, "seed")
    flag("shots", None, "labelled training tiles a class, drawn by the seed", COUNT)
    flag("limit", None, "use this share of every split, for a quick try", SHARE)
    flag("val-int", None, "share of the training tiles for validation, not the own split", SHARE)
    flag("batch", 64, "tiles a step", COUNT)
    flag("lr", 1e-3, "of Adam", ABOVE_0)
    flag("weight-decay", 1e-4, "L2 in the gradient", FROM_0)
    flag("ep", 20, "epochs; 0: pairs and heads alone", WHOLE)
    flag("worker", min(os.cpu_count() or 1, 8), "processes that decode tiles", WHOLE)
    flag("clip", 0.5, "largest norm of the gradient; 0: no limit", FROM_0)
    flag("scheduler", 0, "1: cosine by step down to a tenth", **switch)
    flag("lora-r", 16, "rank", COUNT)
    flag("lora-alpha", 8.0, "the update is scaled by alpha / rank", ABOVE_0)
    flag("lora-dropout", 0.0, "before the down projection", BELOW_1)
    flag("lora-text", 1, "0: the text tower stays as it is, its features are looked up", **switch)
    flag("lora-vision", 1, "0: the backbone stays as it is", **switch)
    flag("lora-targets", list(TARGETS), "kinds of layers that LoRA adapts", str, nargs="+",
         choices=list(TARGETS))
    flag("no-lin", False, "the authors' name for --lora-targets conv2d embedding", **on)
    flag("kd-layers", 1, "layers of h_d", choices=(1, 2))
    flag("kd-weight", 1.0, "lambda", FROM_0)
    flag("no-text", False, "ablation: same layers, LoRA and steps, no distillation", **on)
    flag("drop-words", 0.0, "share of the words of each report dropped, anew each epoch", BELOW_1)
    flag("authors", [], "the authors' way of these", str, nargs="+",
         choices=("double-softmax", "random-fusion"))
    flag("val-every", 1.0, "epochs between validations", ABOVE_0)
    flag("monitor", "val_loss", "what chooses the best state",
         choices=("val_loss", "val_ce", "val_acc", "val_bacc"))
    flag("mod", None, "unset, min for losses and max for accuracies", choices=("min", "max"))
    flag("early", 0, "1: stop when --monitor stands still", **switch)
    flag("patience", 5, "validations that --early waits", COUNT)
    flag("delta", 0.0, "what counts as an improvement for --early", FROM_0)
    flag("chkpnt", 0, "1: keep the trained state of every validation", **switch)
    flag("log", 1, "validations for each printed line", COUNT)
    flag("baseline", [], "lora: LoRA and a plain head in place of CLIP-IT; the others: rows of the "
         "CLIP image tower", str, nargs="+", choices=("lora", "zeroshot", "clip-probe"))
    flag("wandb", 0, "1: log to Weights & Biases too", **switch)
    flag("table", None, "print the finished runs below this folder, write its table.csv, and end")
    flag("amp", "bf16" if cuda else "off", "autocast of both towers", choices=("off", "bf16"))
    flag("grad-checkpointing", False, "less memory for more time in training", **on)
    parser.set_defaults(**defaults)
    args = parser.parse_args(words)
    return args if args.table else complete(args, parser, cuda)


def complete(args, parser: Parser, cuda: bool) -> argparse.Namespace:
    """What follows from the flags: the run's name and folder, the device."""
    if args.reports is None:
        dataset_folder(args.ds)  # refuses what is neither a name nor a folder
        raise ValueError(f"--ds {args.ds} needs --reports")
    if WORLD > 1 and args.download:
        raise ValueError("--download is for one process; fetch the data without torchrun first")
    differ = []  # the run's name tells the flags that differ from the data set's defaults
    for key, value in vars(args).items():
        if key not in (*PLACES, "ds") and value != parser.get_default(key):
            shown = "-".join(value) if isinstance(value, list) else Path(str(value)).name
            differ.append(key.replace("_", "-") + ("" if value is True else f"-{shown}"))
    args.run = args.run or slug("_".join(differ)) or "base"
    args.output = args.output or slug(Path(args.ds).resolve().name)
    if args.no_lin:
        args.lora_targets = ["conv2d", "embedding"]
    args.mod = args.mod or ("max" if args.monitor.endswith("acc") else "min")
    args.no_text = args.no_text or "lora" in args.baseline
    args.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    return args


def slug(text: str) -> str:
    """A file name made of the text."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:150]


def cli() -> None:
    """main() for people: bad input is one or two lines on stderr and exit code 2."""
    if RANK:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is like Ctrl-C
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        message = "stopped; the same command with --resume goes on from the last validation"
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if RANK and not dist.is_initialized():  # all have read the same: the first says it
            sys.exit(0)
        message = str(error)
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    cli()

"""CLIP-IT from end to end: pair, vision head, text head, fuse and distil, text-free test.

    python train.py                                      # the demo: offline, a minute on two cores
    python train.py --ds my_tiles --reports reports.txt  # my_tiles/{train,test}/CLASS/*.png
    python train.py --ds crc --download --model VITS_16  # the paper's data, fetched once to data/
    python train.py --no-text                            # the ablation: all but the distillation
    python train.py --ep 0                               # pairs, page and heads alone, no step 4
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
import zlib
from base64 import b64encode
from functools import partial
from html import escape
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm

from clipit import (BACKBONES, ClipIT, clipit_loss, load_backbone, text_classifier,
                    tile_transform, whole)
from data import (DATASETS, REPORTS, Tiles, dataset_folder, download, draw_shots, load_tiles, lock,
                  read_reports, tile_side, warn_of_repeated_tiles)
from lora import TARGETS, inject_lora
from pairing import CLIPS, embed_texts, load_clip, nearest_text

SPLITS = ("train", "val", "test")


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
    if metrics := finished_metrics(run):
        return metrics

    # 1. Pair: psi(i) = argmax_j cos(v_i, t_j), by CLIP alone; no label is read
    text_emb = embed_reports(clip, reports, args)  # (M, d)
    image_emb = tile_features("CLIP", clip.encode_image, clip.preprocess, tiles, args)  # (N, d)
    pairs, similarity = {}, {}
    for split in SPLITS:
        pairs[split], similarity[split] = nearest_text(image_emb[split], text_emb)  # (N,), (N,)
    write_pairs(run, tiles, pairs, similarity, reports)

    # 2. Vision head h_v on the frozen backbone: the unimodal row
    v = tile_features("backbone", backbone, backbone.preprocess, tiles, args)  # split -> (N, D)
    torch.manual_seed(args.sd)
    vision_head = nn.Linear(backbone.num_features, len(classes))
    train_head("vision head", vision_head, v, labels, args.sd)

    # 3. Text head on the paired reports: what the text knows of the classes
    t = {split: text_emb[pairs[split]] for split in SPLITS}  # (N, d)
    text_head = text_classifier(clip.dim, len(classes))
    train_head("text head", text_head, t, labels, args.sd)
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
        p[args.variant] = outputs("test", classifier, tiles["test"], args).softmax(dim=1)
    metrics = {"rows": {name: scores(p[name], labels["test"]) for name in p},
               "complementarity": complementarity(p["vision head"], p["text head"],
                                                  labels["test"], classes),
               "test_tiles": len(labels["test"]), "classes": classes, "best": best}
    if args.ep:
        write_predictions(run, tiles["test"], p[args.variant])
        write_classifier(run, model, tiles["train"], metrics, args)
    write_page(run, tiles["train"], pairs["train"], similarity["train"], reports, metrics)
    write_metrics(run, metrics)
    return metrics


def train_clipit(model: ClipIT, clip, tiles, pairs, reports, text_emb: Tensor, args, run: Path):
    """Step 4. Leaves the model in its best state by --monitor; returns that state's value and step.

    Epoch e visits the tiles in an order that seed and e alone decide, and the random numbers of a
    step have a seed of their own: a run that goes on ends as if it had never stopped.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # weight decay as L2 in the gradient, as the authors have it (Adam, not AdamW)
    optimizer = torch.optim.Adam(trained, args.lr, weight_decay=args.weight_decay, fused=True)
    state, tracker = resume_training(run, model, optimizer), open_tracker(run, args)
    text = epoch_text = text_of(clip, reports, text_emb, args)  # (M, d), (M, L) or None
    n = len(tiles["train"])
    epoch_steps = math.ceil(n / args.batch)
    total = args.ep * epoch_steps
    val_steps = max(round(args.val_int * epoch_steps), 1)
    step, sums, began = state["step"], {}, time.perf_counter()
    model.train()
    while step < total and not state["stopped"]:
        epoch, done = divmod(step, epoch_steps)
        generator = torch.Generator().manual_seed(args.sd * 100_003 + epoch)
        order = torch.randperm(n, generator=generator).split(args.batch)[done:]
        if args.drop_words:
            epoch_text = text_of(clip, reports, text_emb, args, epoch)
        loader = batches(augment(tiles["train"], epoch, args), order, args, pairs["train"])
        title = f"epoch {epoch + 1} of {args.ep}"
        for images, labels, report, share in progress(title, loader, len(order)):
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
            if args.scheduler:  # a cosine by step to a tenth; the authors' over epochs stands still
                cosine = math.cos(math.pi * step / total)
                optimizer.param_groups[0]["lr"] = args.lr * (0.55 + 0.45 * cosine)
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + share * value
            if step % val_steps and step < total:
                continue

            # ---- Look at the validation split, keep the best state, write what going on needs
            sum_over_processes(list(sums.values()))
            steps, seconds = step - state["step"], time.perf_counter() - began
            line = {"step": step, "epoch": step / epoch_steps}
            line |= {key: value.item() / steps for key, value in sums.items()}
            line |= validate(model, tiles["val"], pairs["val"], text, args)
            line |= {"lr": optimizer.param_groups[0]["lr"],
                     "tiles_per_second": round(steps * args.batch / seconds, 1)}
            stop_unless_finite({"val_loss": line["val_loss"]}, step, run)
            weights = trained_state(model)
            update_state(state, line, weights, args)
            save_training(run, state, weights, optimizer, args)
            if tracker:
                tracker.log(line, step=step)
            if step // val_steps % args.log == 0 or step == total or state["stopped"]:
                print(shown(line))
            sums, began = {}, time.perf_counter()
            if state["stopped"]:
                break
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
    # matrix products in bf16 on GPUs that have it; parameters, updates and the loss stay fp32
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        logits, t_hat = model.fuse(model.backbone(images))
        if args.no_text:
            t = t_hat = None
        elif tokens is None:  # a fixed text is looked up
            t = text_emb[report]
        else:  # tiles share reports: each distinct one is encoded once
            distinct, row = report.unique(return_inverse=True)
            t = model.text_tower(tokens[distinct])[row]
    logits, t_hat, t = (x if x is None else x.float() for x in (logits, t_hat, t))
    if args.authors:  # theirs: cross-entropy takes probabilities for logits
        logits = logits.softmax(dim=1)
    return logits, t_hat, t


@torch.no_grad()
def validate(model: ClipIT, tiles: Tiles, pairs: Tensor, text: tuple, args) -> dict:
    """The loss, its parts and accuracies over the whole validation split. The prediction uses the
    image alone; the reports enter the distillation part of the loss."""
    model.eval()
    order, rows = torch.arange(len(tiles)).split(args.batch * WORLD), []
    loader = batches(tiles, order, args, pairs)
    for images, _, report, _ in progress("validation", loader, len(order)):
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


def train_head(name: str, head: nn.Module, features: dict[str, Tensor], labels: dict[str, Tensor],
               seed: int, steps: int = 12_500, patience: int = 20) -> None:
    """Train a head on stored features; features: split -> (N, D), labels: split -> (N,).

    AdamW 3e-4, batch 256 and 12,500 steps at most, as kaiko-eva 0.1.2 trains its linear probe.
    Ours: of 100 looks at the validation loss (its: accuracy) the state of the lowest is kept, and
    `patience` looks without a lower one end it.
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
            "recall": recall.tolist(), "confusion": confusion.tolist()}


def complementarity(vision: Tensor, text: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """Fig. 3: the tiles that the text model gets right and the vision model wrong, as count and
    share, per class too. vision, text: probabilities (N, C)."""
    wrong = vision.argmax(dim=1) != labels
    gained = wrong & (text.argmax(dim=1) == labels)  # (N,)
    per_class = {}
    for label, name in enumerate(classes):
        among = gained[labels == label].double()
        per_class[name] = {"tiles": int(among.sum()), "share": among.mean().item()}
    return {"tiles": int(gained.sum()), "share": gained.double().mean().item(),
            "share_of_vision_errors": gained[wrong].double().mean().nan_to_num().item(),
            "per_class": per_class}


def text_spread(features: Tensor) -> float:
    """1 - mean cosine of two different rows of (R, d): 0 where all reports have one direction."""
    count, total = len(features), F.normalize(features.double(), dim=1).sum(dim=0)
    return 1 - ((total @ total - count) / max(count * (count - 1), 1)).item()


# ==== What a run needs beside the method =========================================================

def load_models(args):
    """CLIP and the backbone on the device; from here on the same seed gives the same numbers."""
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products vary
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.allow_tf32 = False  # where fp32 is asked for, and pairing always is
    torch.manual_seed(args.sd)  # of random weights, where they are asked for
    if not args.download:
        dataset_folder(args.ds)  # refused before anything is loaded
    clip = load_clip(args.clip_model, args.clip_weights, device=args.device)
    clip.tokenize([""])  # conch's tokenizer file is asked for here, not after an hour of tiles
    backbone = load_backbone(args.model, args.weights, args.tile_size)
    if args.authors and args.ds == "pcam":  # theirs: OpenAI's statistics under all backbones
        statistics = dict(mean=[*timm.data.OPENAI_CLIP_MEAN], std=[*timm.data.OPENAI_CLIP_STD])
        backbone.recipe |= statistics
        backbone.preprocess = tile_transform(backbone.recipe["size"], **statistics)
    return clip, backbone.to(args.device)


def load_data(backbone: nn.Module, args):
    """(tiles, labels, reports): split -> Tiles as the backbone sees them, split -> (N,), report ->
    its place in the source."""
    if args.download:
        download(args.ds, args.reports)
    reports, tiles = read_reports(args.reports), {}
    for split in SPLITS:
        part = load_tiles(args.ds, split, transform=backbone.preprocess)
        if args.limit:
            part = part.take(draw_shots(part.labels, args.limit, args.sd))
        if args.shots and split == "train":
            part = part.take(draw_shots(part.labels, args.shots, args.sd))
        tiles[split] = part
        print(f"{args.ds}: {len(part)} {split} tiles of {len(part.classes)} classes")
    warn_of_repeated_tiles(tiles)
    return tiles, {split: torch.tensor(tiles[split].labels) for split in SPLITS}, reports


def embed_reports(clip, reports, args) -> Tensor:
    """CLIP features of the reports, (M, d)."""
    return cached(["CLIP", "reports"], args, lambda: embed_texts(clip, list(reports)))


def tile_features(name: str, model, preprocess, tiles, args) -> dict[str, Tensor]:
    """split -> what the frozen model ("CLIP", "backbone") gives for its tiles, (N, ...). CLIP's are
    the first look at every tile: one that cannot be read ends the run there."""
    features = {}
    for split in SPLITS:
        images = tiles[split].with_transform(preprocess)
        features[split] = cached([name, f"{split} tiles"], args, lambda: outputs(
            f"{name} features, {split}", model, images, args))
    return features


@torch.no_grad()
def outputs(title: str, model, tiles: Tiles, args) -> Tensor:
    """model(images (B, 3, H, W)) of all tiles, (N, ...), in fp32, on the CPU."""
    order, rows = torch.arange(len(tiles)).split(args.batch * WORLD), []
    for images, *_ in progress(title, batches(tiles, order, args), len(order)):
        rows.append(model(images))
    return gather(torch.cat(rows), len(tiles))


def clip_baselines(clip, image_emb, labels, classes: list[str], args) -> dict[str, Tensor]:
    """--baseline's rows of the CLIP image tower, test probabilities (N, C): what its features, by
    which the reports were found, know themselves. image_emb: split -> (N, d)."""
    p = {}
    if "clip-probe" in args.baseline:
        probe = nn.Linear(clip.dim, len(classes))
        train_head("CLIP linear probe", probe, image_emb, labels, args.sd)
        p["CLIP linear probe"] = probe(image_emb["test"]).softmax(dim=1)
    if "zeroshot" in args.baseline:  # cosines with a prompt a class, at the usual temperature 1/100
        names = DATASETS.get(args.ds, {}).get("prompts", classes)
        prompts = embed_texts(clip, [f"an H&E image of {name}." for name in names])  # (C, d)
        p["CLIP zero-shot"] = (100 * image_emb["test"] @ prompts.T).softmax(dim=1)
    return p


def build_model(backbone: nn.Module, clip, vision_head: nn.Linear, args) -> ClipIT:
    """ClipIT, with LoRA by --lora-vision and --lora-text. Seeded anew, and the text side last: with
    and without text, everything else starts from the same numbers."""
    torch.manual_seed(args.sd)
    lora = args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets
    model = ClipIT(backbone.requires_grad_(False), None, vision_head.out_features,
                   vision_head.in_features, clip.dim, args.kd_layers,
                   fused="lora" not in args.baseline, random_fusion=args.authors)
    model.vision_head.load_state_dict(vision_head.state_dict())
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing(True)
    if args.lora_vision:
        inject_lora(backbone, *lora)
    if args.lora_text and not args.no_text:
        model.text_tower = clip.text_tower
        inject_lora(model.text_tower, *lora)
    clip.image_tower = None  # its part has ended
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"training {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return model.to(args.device)


def batches(tiles, order, args, pairs: Tensor | None = None):
    """(images (B, 3, H, W), labels (B,), report (B,), share) on the device for every batch of
    indices in `order`; of many processes each gets its tiles of a batch, and their share of it. One
    that has none computes the first, for nothing."""
    if pairs is None:
        pairs = torch.zeros(len(tiles), dtype=torch.long)
    rows = [batch[RANK::WORLD] if RANK < len(batch) else batch[:1] for batch in order]
    loader = DataLoader(StackDataset(tiles, pairs), batch_sampler=[part.tolist() for part in rows],
                        num_workers=args.worker, worker_init_fn=leave_signals,
                        generator=torch.Generator(),  # no number is drawn from the run's
                        pin_memory=args.device.type == "cuda")
    for batch, ((images, labels), report) in zip(order, loader):
        share = len(batch[RANK::WORLD]) / len(batch)
        yield *(x.to(args.device, non_blocking=True) for x in (images, labels, report)), share


def augment(tiles: Tiles, epoch: int, args) -> Tiles:
    """The tiles; with --authors on PCAM under the flips and the colour jitter that theirs have."""
    if not args.authors or args.ds != "pcam":
        return tiles
    from torchvision.transforms import v2
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(),
                            v2.ColorJitter(0.5, 0.5, 0.5, hue=0.05), tiles.transform])
    return tiles.with_transform(partial(seeded, transform, args.sd * 1009 + epoch))


def seeded(transform, seed: int, image) -> Tensor:
    """transform(image) with random numbers that the seed and the pixels alone decide."""
    torch.manual_seed(zlib.crc32(image.tobytes()) + seed)
    return transform(image)


def text_of(clip, reports, text_emb: Tensor, args, epoch: int | None = None):
    """(features (M, d), tokens (M, L), None where the text is fixed) of all reports on the device;
    in an epoch under --drop-words, of what is left of each."""
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
    """The report without `share` of its words, drawn at random by seed; one word stays at least."""
    words = report.split()
    count = max(round(len(words) * (1 - share)), 1)
    return " ".join(words[i] for i in sorted(random.Random(seed).sample(range(len(words)), count)))


# ---- Many processes: row i is process i % WORLD's; of one process nothing here does anything ----

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def sum_over_processes(tensors: list[Tensor]) -> None:
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
        sum_over_processes([padded])
        rows = padded
    return rows.cpu()


def from_all(fact) -> list:
    """What each process has for `fact`, the first process's first."""
    facts = [fact] * WORLD
    if WORLD > 1:
        dist.all_gather_object(facts, fact)
    return facts


# ---- A run's folder and its files ---------------------------------------------------------------

# What says where and how a run is made, not what it is, may change when it goes on
PLACES = ("dir", "output", "run", "download", "worker", "device", "overwrite", "log", "table",
          "against", "wandb", "grad_checkpointing")
# What a run writes, and --overwrite removes
RESULTS = ("metrics.json", "predictions.csv", "*.pt", "log.jsonl", "pairs.csv", "report.html",
           "args.json", "classifier", ".tmp*")


def open_run(args, clip, backbone: nn.Module, tiles, reports) -> Path:
    """Make DIR/OUTPUT/RUN with args.json, or go on in it. Raises ValueError, and changes nothing,
    where it holds a run of other flags or inputs, or another process is at it."""
    run = Path(args.dir, args.output, args.run)
    config = {key: value for key, value in vars(args).items() if key not in PLACES}
    preprocess = re.sub(" at 0x[0-9a-f]+", "", repr(clip.preprocess))  # functions' addresses
    args.inputs = {"reports": sha256(list(reports)),
                   "backbone": sha256(backbone, repr(backbone.preprocess)),
                   "CLIP": sha256(clip.image_tower, clip.text_tower, preprocess)}
    for split in SPLITS:
        args.inputs[f"{split} tiles"] = sha256(tiles[split].labels, file_facts(tiles[split].paths))
    if any(inputs != args.inputs for inputs in from_all(args.inputs)):
        raise ValueError("the processes of the run see different tiles, reports or weights; give "
                         "all of them the same files")
    if RANK:
        return run
    args.lock = lock(run / ".lock", f"{run}: another process is at this run; wait for it, or give "
                     "another --run")
    for name in RESULTS if args.overwrite else (".tmp*",):  # the latter of a run that was killed
        for path in run.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "pillow")
    versions = {"python": sys.version.split()[0]} | {x: version(x) for x in packages}
    facts = {"config": config, "inputs": args.inputs, "versions": versions}
    if (run / "args.json").exists():
        first = read_json(run / "args.json", facts.keys())
        changes = [f"{key} {first['config'].get(key)!r} there, {value!r} now"
                   for key, value in config.items() if first["config"].get(key) != value]
        changes += [f"the {name} changed" for name, value in args.inputs.items()
                    if first["inputs"].get(name) != value]
        if changes:
            raise ValueError(f"{run}: holds a run of another configuration ({'; '.join(changes)})\n"
                             "give another --run, or --overwrite to begin it anew")
        facts |= {"versions": first["versions"], "versions_of_the_last_start": versions}
    write_text(run / "args.json", json.dumps(facts, indent=1))
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


def file_facts(paths: list[str]) -> list:
    """Path, size and time of each tile's file (FILE.h5#17: of FILE.h5)."""
    facts = []
    for path in paths:
        file = os.stat(re.sub(r"(?<=\.h5)#\d+$", "", path))
        facts.append((path, file.st_size, file.st_mtime_ns))
    return facts


def cached(inputs: list[str], args, compute) -> Tensor:
    """compute()'s tensor, kept in DIR/cache under the hashes of the inputs it depends on. The
    folder may be removed at any time; of many processes the first one's file counts."""
    title, hashes = " ".join(inputs), "-".join(args.inputs[name] for name in inputs)
    path, tensor = Path(args.dir, "cache", f"{slug(title)}-{hashes}.pt"), None
    try:
        tensor = torch.load(path, weights_only=True) if RANK == 0 else None
    except Exception:  # none there, or whatever is wrong with it: computing mends it
        pass
    tensor = from_all(tensor)[0]
    print(f"features of {title}: {'computed' if tensor is None else 'from the cache'}")
    if tensor is None:
        tensor = compute()
        if not tensor.isfinite().all():
            raise ValueError(f"features of {title}: NaN or infinity; the weights cannot be right")
        write_torch(path, tensor)
    return tensor


def write_file(path: Path, write) -> None:
    """write(a temporary path), then renamed: after a kill or a power cut the old file or the new
    one is there. The first process writes. OSError, and nothing left, where it fails."""
    if RANK:
        return
    try:
        with whole(path) as part:
            write(part)
            sync(part, *part.rglob("*"))
            if path.is_dir():  # a folder cannot be renamed over another
                shutil.rmtree(path)
        sync(path.parent)
    except Exception as error:  # safetensors' are of its own kind
        raise OSError(f"{path}: could not be written ({error})\nmake room there or give another "
                      "--dir; the same command goes on") from None


def sync(*paths: Path) -> None:
    """Have the system write files, and the names in folders, to the disk now."""
    for path in paths if os.name == "posix" else ():
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda part: part.write_text(text, "utf-8", "replace"))


def write_torch(path: Path, value) -> None:
    """torch.save by way of memory: on a full disk its own writer does not say so."""
    file = io.BytesIO()
    torch.save(value, file)
    write_file(path, lambda part: part.write_bytes(file.getbuffer()))


def write_csv(path: Path, rows) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path, keys) -> dict:
    """What a run has written there, if it has those keys; otherwise ValueError with the path."""
    try:
        facts = json.loads(path.read_text("utf-8"))
        missing = keys - facts.keys()
    except (ValueError, AttributeError) as error:
        missing = error
    if missing:
        raise ValueError(f"{path}: not a file of a run of this version ({missing}); remove it, or "
                         "begin the run anew by --overwrite")
    return facts


def resume_training(run: Path, model: ClipIT, optimizer) -> dict:
    """Where training stands: what last.pt says, where it is there, otherwise at its start."""
    saved = None
    try:
        if RANK == 0 and (run / "last.pt").exists():
            saved = torch.load(run / "last.pt", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise of all kinds
        raise ValueError(f"{run / 'last.pt'}: damaged ({str(error)[:100]})\nremove it, and the "
                         "same command trains anew") from None
    saved = from_all(saved)[0]
    if saved is None:
        return {"step": 0, "waited": 0, "stopped": False, "best": None, "log": []}
    model.load_state_dict(saved["model"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    write_log(run, saved["state"])
    print(f"going on from step {saved['state']['step']}")
    return saved["state"]


def update_state(state: dict, line: dict, weights: dict[str, Tensor], args) -> None:
    """Keep the weights of the best --monitor; --early stops after --patience looks without a better
    one by more than --delta. (The authors' looks at the training loss, with a delta of 5.)"""
    spreads = [look.get("text_spread", 1) for look in [*state["log"], line]]
    if args.lora_text and spreads[-1] < 0.1 <= min(spreads[:-1], default=1):  # for the first time
        print("the reports' features have collapsed to nearly one direction (text_spread < 0.1): "
              "little is left to distil; --lora-text 0 keeps them")
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
    write_log(run, state)
    if args.chkpnt:
        write_torch(run / f"step_{state['step']}.pt", weights)


def write_log(run: Path, state: dict) -> None:
    write_text(run / "log.jsonl", "".join(f"{json.dumps(line)}\n" for line in state["log"]))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters: LoRA and heads."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()
            if p.requires_grad}


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
    config = read_json(run / "args.json", {"config"})["config"]
    return wandb.init(project="clip-it", name=run.name, dir=run, config=config)


def progress(title: str, items, total: int):
    """The items under a bar or, 100 or more in a log, between two lines. Ends the run where a
    signal has asked for it."""
    log = total >= 100 and not sys.stderr.isatty()
    if log:
        print(f"{title}: {total} steps", flush=True)
    try:
        for item in tqdm(items, title, total, leave=False, disable=None):
            if SIGNALS:
                raise KeyboardInterrupt
            yield item
    finally:
        if log:
            print(f"{title}: ended", flush=True)


def write_pairs(run: Path, tiles, pairs, similarity, reports: dict[str, str]) -> None:
    """pairs.csv: tile, split, its report's number (from 0, of the distinct ones), their cosine, and
    the report's place in the source and first words."""
    places = list(reports.items())
    rows = [("tile", "split", "report", "similarity", "place", "text")]
    for split in SPLITS:
        nearest = zip(tiles[split].paths, pairs[split].tolist(), similarity[split].tolist())
        for tile, report, cosine in nearest:
            text, place = places[report]
            rows.append((tile, split, report, f"{cosine:.6f}", place, text[:60]))
    write_csv(run / "pairs.csv", rows)
    write_page(run, tiles["train"], pairs["train"], similarity["train"], reports)
    uses = torch.cat(list(pairs.values())).bincount()  # (M,)
    print(f"pairs: {int((uses > 0).sum())} of {len(reports)} reports used, the most used by "
          f"{uses.max() / uses.sum():.1%} of the tiles")


def write_predictions(run: Path, tiles: Tiles, p: Tensor) -> None:
    """path, target, pred and class_0 ... (probabilities), the authors' column names; the classes'
    own names beside them."""
    columns = [f"class_{i}" for i in range(p.shape[1])]
    rows = [["path", "target", "pred", "target_class", "pred_class", *columns]]
    predictions = p.argmax(dim=1).tolist()
    for path, label, pred, row in zip(tiles.paths, tiles.labels, predictions, p.tolist()):
        rows.append([path, label, pred, tiles.classes[label], tiles.classes[pred], *row])
    write_csv(run / "predictions.csv", rows)


def write_classifier(run: Path, model: ClipIT, tiles: Tiles, metrics: dict, args) -> None:
    """classifier/ with what config.json and the model card tell of the run, without its paths."""
    row, rows = DATASETS.get(args.ds, {}), metrics["rows"]
    facts = {"data": row.get("title", Path(args.ds).resolve().name),
             "licence": row.get("licence", "not known here"), "variant": args.variant,
             "test_tiles": metrics["test_tiles"], "reports": None, "clip_model": None,
             "mpp": args.mpp or row.get("mpp"), "side": row.get("side") or tile_side(tiles),
             "metrics": {key: rows[args.variant][key] for key in COLUMNS},
             "unimodal": {key: rows["vision head"][key] for key in COLUMNS}}
    if not args.no_text:
        facts["reports"] = Path(args.reports).name
        facts["clip_model"] = re.sub("(?<=local-dir:).*/", "", args.clip_model)
    classifier = model.to_classifier(metrics["classes"], facts)
    write_file(run / "classifier", classifier.save_pretrained)


COLUMNS = {"balanced_accuracy": "bal. acc.", "accuracy": "accuracy", "macro_f1": "macro F1"}
NOTES = {"vision head": " (frozen backbone, unimodal)", "text head": " (paired reports)"}


def write_metrics(run: Path, metrics: dict) -> None:
    """metrics.json, the last file of a run: where it is there, all others are."""
    write_text(run / "metrics.json", json.dumps(metrics, indent=1))
    print(f"\n{results(metrics)}\nthe run lies in {run}")


def finished_metrics(run: Path) -> dict | None:
    """What the run has found, printed once more, if it had ended before."""
    metrics = None
    if RANK == 0 and (run / "metrics.json").exists():
        metrics = read_json(run / "metrics.json", {"rows", "complementarity"})
        print(f"\n{results(metrics)}\nthe run in {run} had ended; --overwrite begins it anew")
    return from_all(metrics)[0]


def results(metrics: dict) -> str:
    """The table of a run as text."""
    titles = "".join(title.rjust(12) for title in COLUMNS.values())
    lines = [f"{metrics['test_tiles']} test tiles".ljust(41) + titles]
    for name, row in metrics["rows"].items():
        figures = "".join(f"{100 * row[key]:12.2f}" for key in COLUMNS)
        lines.append((name + NOTES.get(name, " (image only)")).ljust(41) + figures)
    gained = metrics["complementarity"]
    lines.append(f"complementarity: the text head is right on {gained['tiles']} tiles where the "
                 f"vision head is wrong, {gained['share']:.1%} of all, "
                 f"{gained['share_of_vision_errors']:.1%} of its errors")
    return "\n".join(lines)


def shown(line: dict) -> str:
    """A line of log.jsonl in short."""
    keys = ("loss", "ce", "kd", "val_loss", "val_bacc", "text_spread")
    figures = "  ".join(f"{key} {line[key]:.4f}" for key in keys if key in line)
    return f"step {line['step']}  {figures}"


STYLE = """
:root { color-scheme: light dark } pre, div { overflow-x: auto }
body { font: 1rem/1.5 system-ui; max-width: 72rem; margin: auto; overflow-wrap: anywhere }
td, th { padding: .2rem .6rem; text-align: right; overflow-wrap: normal }
.pair { display: flex; gap: 1rem; margin: .5rem } img { width: 7rem; height: 7rem; flex: none }
"""


def write_page(run: Path, tiles: Tiles, pairs, similarity, reports, metrics=None) -> None:
    """report.html, without scripts: results, confusion and the log of training, once there are any;
    training tiles beside their reports, of every class from the highest cosine to the lowest."""
    if RANK:
        return
    title, texts = escape(f"CLIP-IT: {run.parent.name}/{run.name}"), list(reports)
    parts = ["<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport content="
             f"'width=device-width'><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    if metrics:
        name, row = list(metrics["rows"].items())[-1]
        parts += [f"<pre>{escape(results(metrics))}</pre><h2>Confusion of {name}</h2>",
                  confusion_table(row["confusion"], metrics["classes"])]
        if metrics["best"]:
            log = [shown(json.loads(line)) for line in open(run / "log.jsonl")]
            parts += ["<h2>Training</h2><pre>", *log, "</pre>"]
    parts.append("<h2>Pairs</h2><p>Cosines of training tiles and reports; labels took no part.</p>")
    labels = torch.tensor(tiles.labels)
    for label, name in list(enumerate(tiles.classes))[:40]:
        members = (labels == label).nonzero()[:, 0]
        members = members[similarity[members].argsort(descending=True, stable=True)]
        parts.append(f"<h3>{escape(name)}</h3>")
        for i in members[torch.linspace(0, len(members) - 1, 4).long().unique()].tolist():
            image, file = tiles.with_transform(None)[i][0], io.BytesIO()
            image.thumbnail((112, 112))
            image.save(file, "JPEG", quality=80)
            source = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
            parts.append(f"<div class=pair><img alt='' src='{source}'><p><b>{similarity[i]:.3f}</b>"
                         f" report {pairs[i]}: {escape(texts[pairs[i]][:500])}<br>"
                         f"{escape(tiles.paths[i])}</p></div>")
    flags = escape((run / "args.json").read_text())
    write_text(run / "report.html", "\n".join([*parts, f"<h2>Flags</h2><pre>{flags}</pre>"]))


def confusion_table(counts: list[list[int]], classes: list[str]) -> str:
    """True class: row; predicted class: column; shade: share of the row."""
    lines = ["".join(f"<th>{escape(name)}" for name in ["true \\ predicted", *classes])]
    for name, row in zip(classes, counts):
        cells = [f"<td style='background:rgb(0 120 200/{count / max(sum(row), 1):.2f})'>{count}"
                 for count in row]
        lines.append(f"<th>{escape(name)}{''.join(cells)}")
    return f"<div><table><tr>{'<tr>'.join(lines)}</table></div>"


# ---- --table: finished runs, a line a variant ---------------------------------------------------

PAPER = {  # Table 1: balanced accuracy in %, unimodal -> CLIP-IT
    "UNI": dict(pcam="94.24 → 95.49", bach="78.89 → 81.79", crc="94.66 → 95.92"),
    "DINOL14": dict(pcam="88.88 → 92.32", bach="84.26 → 86.11", crc="94.40 → 95.91"),
    "VITB_16": dict(pcam="88.13 → 91.42", bach="80.78 → 82.94", crc="95.86 → 95.67"),
    "VITS_16": dict(pcam="88.43 → 90.93", bach="82.90 → 84.64", crc="93.77 → 95.34"),
    "VITB_8": dict(pcam="87.54 → 91.92", bach="86.90 → 84.91", crc="95.71 → 95.66"),
    "VITS_8": dict(pcam="87.90 → 90.24", bach="81.01 → 82.55", crc="94.90 → 95.55"),
}
ROWS = ("vision head", "text head", "CLIP linear probe", "CLIP zero-shot", "validation", "trained",
        "complementarity")


def table(folder: Path, against: str) -> dict:
    """A line for each data set, backbone and set of flags among the finished runs below `folder`:
    balanced accuracy in %, mean ± sd over n seeds, and what it is above the runs --against and
    those without a flag, paired by seed, with 95 % t intervals. As markdown, and in table.csv."""
    variants: dict[tuple, dict] = {}  # (ds, model, flags) -> seed -> row -> %
    for path in sorted(folder.rglob("metrics.json")):
        metrics = read_json(path, {"rows", "complementarity", "best"})
        config = read_json(path.parent / "args.json", {"config", "inputs"})["config"]
        figures = {row: 100 * x["balanced_accuracy"] for row, x in metrics["rows"].items()}
        figures["complementarity"] = 100 * metrics["complementarity"]["share"]
        if metrics["best"]:
            figures["trained"] = figures[list(metrics["rows"])[-1]]
            if config["monitor"].endswith("acc"):  # to choose flags by
                figures["validation"] = 100 * metrics["best"]["value"]
        seeds = variants.setdefault((config["ds"], config["model"], (*config["flags"],)), {})
        if config["sd"] in seeds:
            print(f"{path.parent}: seed {config['sd']} once more; its first run counts")
        seeds.setdefault(config["sd"], figures)
    if not variants:
        raise FileNotFoundError(f"--table {folder}: no metrics.json below it; give a --dir of runs")
    lines = []
    for (ds, model, flags), seeds in variants.items():
        others = {key[2]: runs for key, runs in variants.items() if key[:2] == (ds, model)}
        common = set(flags).intersection(*others)  # what all of them have tells nothing
        short = {key: " ".join(flag for flag in key if flag not in common) for key in others}
        line = {"data": Path(ds).name, "backbone": Path(model).name, "flags": short[flags] or "-",
                "n": len(seeds)}
        for row in ROWS:
            line[row] = mean_and_sd([figures[row] for figures in seeds.values() if row in figures])
        for reference, column in ((against, f"minus {against}"), ("", "minus no flag")):
            line[column] = ""
            for key in others:
                if key != flags and slug(short[key]) == reference:
                    line[column] = difference(seeds, others[key])
        papers = flags in (("--lora-text 1",), ("--authors",))  # the settings are
        line["paper"] = PAPER.get(model, {}).get(ds, "") if papers else ""
        lines.append(line)
    rows = [list(lines[0]), *(list(line.values()) for line in lines)]
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(map(str, row))} |")
    write_csv(folder / "table.csv", rows)
    return {"table": lines}


def mean_and_sd(values: list[float]) -> str:
    x = torch.tensor(values, dtype=torch.double)
    return f"{x.mean():.1f} ± {x.std():.1f}" if len(x) > 1 else f"{x.mean():.1f}" if len(x) else ""


def difference(runs: dict, reference: dict) -> str:
    """Mean of `trained` minus the reference's, paired by seed, with its 95 % t interval."""
    gains = [runs[seed]["trained"] - reference[seed]["trained"] for seed in runs.keys() &
             reference.keys() if "trained" in runs[seed] and "trained" in reference[seed]]
    if len(gains) < 2:
        return ""
    x = torch.tensor(gains, dtype=torch.double)
    grid = torch.linspace(0, 20, 200_001, dtype=torch.double)
    density = torch.distributions.StudentT(len(x) - 1.0).log_prob(grid).exp()
    t = grid[torch.searchsorted(torch.cumulative_trapezoid(density, grid), 0.475)]  # two-sided 5 %
    half = t * x.std() / math.sqrt(len(x))
    return f"{x.mean():+.1f} [{x.mean() - half:+.1f}, {x.mean() + half:+.1f}]"


# ---- Command line -------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; python train.py --help lists the flags")


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def within(low: float, high: float = 1e9):
    """An argparse type: numbers from low to high; integers where low is one."""
    def number(text):
        value = type(low)(text)
        if not low <= value <= high:  # NaN is not, either
            raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")
        return value
    return number


COUNT, WHOLE, POSITIVE, FROM_0 = within(1), within(0), within(1e-9), within(0.0)
SHARE, BELOW_1 = within(0.001, 0.999), within(0.0, 0.99)


def build_parser() -> Parser:
    parser = Parser("train.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)

    def flag(name, default, help, type=str, **kwargs):
        parser.add_argument(f"--{name}", default=default, help=help, type=type, **kwargs)

    def switch(name, help):
        parser.add_argument(f"--{name}", action="store_true", help=help)

    one = dict(type=int, choices=(0, 1), nargs="?", const=1)  # --early, --early 1
    flag("ds", "demo", f"{', '.join(DATASETS)}, or a folder with train/, test/ and perhaps val/")
    flag("reports", None, f".txt with a report a line, .csv, .jsonl, folder; {', '.join(REPORTS)}")
    switch("download", "fetch the data set and the reports to data/ if they are missing")
    flag("model", "UNI", f"backbone: {', '.join(BACKBONES)}, a timm id, hf-hub:..., local-dir:...")
    flag("weights", None, "local weights of the backbone, or `none` for random ones")
    flag("tile-size", None, "pixels that the backbone sees; unset, its own", within(8, 4096))
    flag("clip-model", "conch", f"pairing model: {', '.join(CLIPS)} or an open_clip id")
    flag("clip-weights", None, "local weights of the pairing model, or `none`")
    flag("mpp", None, "micrometres a pixel of the tiles, for whole slides", within(0.01, 100.0))
    flag("dir", "runs", "where runs are written: DIR/OUTPUT/RUN")
    flag("output", None, "unset, the name of the data set")
    flag("run", None, "unset, the flags that differ from their defaults")
    switch("overwrite", "remove what the run has written, and begin it anew")
    flag("sd", 0, "seed", WHOLE)
    flag("shots", None, "training tiles of each class, drawn by the seed", COUNT)
    flag("limit", None, "use this share of each class and split, for a quick try", SHARE)
    flag("batch", 64, "tiles a step", COUNT)
    flag("lr", 1e-3, "of Adam", POSITIVE)
    flag("weight-decay", 1e-4, "L2 in the gradient", FROM_0)
    flag("ep", 20, "epochs; 0: pairs and heads alone", WHOLE)
    flag("worker", min(os.cpu_count() or 1, 8), "processes that decode tiles", WHOLE)
    flag("clip", 0.5, "largest norm of the gradient; 0: no limit", FROM_0)
    flag("scheduler", 0, "1: cosine by step down to a tenth", **one)
    flag("lora-r", 16, "rank", COUNT)
    flag("lora-alpha", 8.0, "the update is scaled by alpha / rank", POSITIVE)
    flag("lora-dropout", 0.0, "before the down projection", BELOW_1)
    flag("lora-text", 0, "1: train the text tower too, as the paper does", **one)
    flag("lora-vision", 1, "0: the backbone stays as it is", **one)
    flag("lora-targets", [*TARGETS], "layers that LoRA adapts", nargs="+", choices=[*TARGETS])
    switch("no-lin", "the authors' name for --lora-targets conv2d embedding")
    flag("kd-layers", 1, "layers of h_d", int, choices=(1, 2))
    flag("kd-weight", 1.0, "lambda", FROM_0)
    switch("no-text", "ablation: same layers, LoRA and steps, no distillation")
    flag("drop-words", 0.0, "share of the words of each report dropped, anew each epoch", BELOW_1)
    switch("authors", "the authors' code as far as it can be had: --lora-text 1 --ep 1 --monitor "
           "last, double softmax, random fusion, fp32; PCAM's augmentation and statistics")
    flag("val-int", 1.0, "epochs between validations", POSITIVE)
    flag("monitor", "val_bacc", "what chooses the state that is tested; last: the last one",
         choices=("val_loss", "val_ce", "val_acc", "val_bacc", "last"))
    flag("mod", None, "unset, min for losses and max for accuracies", choices=("min", "max"))
    flag("early", 0, "1: stop when --monitor stands still", **one)
    flag("patience", 5, "validations that --early waits", COUNT)
    flag("delta", 0.0, "what counts as an improvement for --early", FROM_0)
    flag("chkpnt", 0, "1: keep the trained state of every validation", **one)
    flag("log", 1, "validations for each printed line", COUNT)
    flag("baseline", [], "lora: LoRA and a plain head in place of CLIP-IT; the others: rows of the "
         "CLIP image tower", nargs="+", choices=("lora", "zeroshot", "clip-probe"))
    flag("wandb", 0, "1: log to Weights & Biases too", **one)
    flag("table", None, "print the finished runs below this folder, write its table.csv, and end")
    flag("against", "no-text", "the runs that --table compares with, by their flags")
    switch("grad-checkpointing", "less memory for more time in training")
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """The authors' flag names, with - or _. A data set's own defaults are in its row."""
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
    """What follows from the flags: device, the run's name, its row in the table."""
    if args.reports is None:
        raise ValueError(f"--ds {args.ds} needs --reports; {', '.join(DATASETS)} have their own")
    if WORLD > 1 and args.download:
        raise ValueError("--download is for one process; fetch the data without torchrun first")
    if args.ds in DATASETS and Path(args.ds).is_dir():
        print(f"--ds {args.ds} is the data set of that name, not the folder; that is ./{args.ds}")
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
    args.no_text = args.no_text or "lora" in args.baseline
    args.variant = "CLIP-IT without text" if args.no_text else "CLIP-IT"
    if "lora" in args.baseline:
        args.variant = "LoRA with a plain head"
    cuda = torch.cuda.is_available()
    args.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    args.bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0) and not args.authors
    return args


def slug(flags: str) -> str:
    """A file name made of flags: lora-r-4_no-text."""
    return re.sub(r"[^\w.-]+", "-", flags.replace(" --", "_")).strip("-.")[:150]


SIGNALS: list[int] = []  # that have asked for an end


def ask_to_end(number: int, frame) -> None:
    """SIGINT and SIGTERM end the run at its next batch, a second one at once."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)
    if WORLD == 1:
        print("train.py: ends at the next batch; once more ends it at once", file=sys.stderr)


def leave_signals(worker: int) -> None:
    """In a process that decodes tiles: Ctrl-C is the run's, which ends its workers by SIGTERM. It
    must look like an end of their own, which torch does not take for a crash."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def cli() -> None:
    """main() for people: bad input is one or two lines on stderr and exit code 2."""
    if RANK:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_end)
    code, again = 2, "the same command goes on from the last validation"
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        code, message = 130, f"stopped; {again}"
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if RANK and not SIGNALS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # the first process says the same, and its end ends this one
    except RuntimeError as error:  # no memory, a worker or another process has ended, our mistake
        if sys.flags.dev_mode:
            raise
        ended = "this or another process has ended: " if WORLD > 1 else ""
        message = (f"{ended}{' '.join(str(error).split())[:300]}\n{again}; python -X dev train.py "
                   "... shows where it ended")
    if SIGNALS:  # the shell's rule; before it, workers that ended may have raised anything
        code, message = 128 + SIGNALS[0], f"stopped; {again}"
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    cli()

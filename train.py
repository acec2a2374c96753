"""CLIP-IT from end to end: pair, vision head, text head, fuse and distil, text-free test. Read main() as the paper.

    python train.py                                        # the demo: offline, about a minute on two CPU cores
    python train.py --ds my_tiles --reports reports.txt    # my_tiles/{train,test}/CLASS/*.png, one report a line
    python train.py --no-text                              # the ablation: same layers and steps, no distillation
    python train.py --table runs                           # all finished runs under a folder as Table 1
    torchrun --nproc_per_node 4 -- train.py --ds crc       # the same from four processes, each with a GPU of its own

A run writes DIR/OUTPUT/RUN/: args.json, log.jsonl, pairs.csv, heads.pt, last.pt (for --resume), metrics.json,
predictions.csv and classifier/, the text-free model for clipit.Classifier.from_pretrained; to look at in a browser,
pairs.html (tiles beside their reports) and report.html (results, confusion, loss curves, flags).
"""
import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from clipit import (BACKBONES, Classifier, ClipIT, clipit_loss, keep_freed_memory, load_backbone, text_classifier,
                    tile_transform)
from data import (DATASETS, REPORTS, Tiles, dataset_folder, download, download_reports, draw_shots, find_bad_tiles,
                  load_reports, load_tiles, stratified_split)
from lora import TARGETS, inject_lora
from pairing import (CLIPS, TextTower, cache_key, cached, confusion_grid, curves, embed_images, embed_texts, html_table,
                     load_clip, nearest_text, slug, write_gallery, write_page)

SPLITS = ("train", "val", "test")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's, of each process
# Flags that say where and how a run is made, not what it is: they may change when it is resumed
PLACES = ("dir", "output", "run", "data_dir", "download", "worker", "device", "resume", "log", "table", "csv", "wandb",
          "tensorboard", "compile", "grad_checkpointing")
# What the authors feed PCAM to every backbone with: OpenAI CLIP's statistics, bicubic; and in training these changes
AUTHORS_PCAM = dict(mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711],
                    interpolation="bicubic")
AUTHORS_PCAM_CHANGES = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomVerticalFlip(0.5),
                                   v2.ColorJitter(0.5, 0.5, 0.5, hue=0.05)])


def main(argv=None) -> dict:
    """One run; returns what metrics.json holds. Raises ValueError and OSError for bad input, FloatingPointError for a
    loss that is not finite; cli() turns them into a line and an exit code."""
    args = parse_args(argv)
    if args.table:
        return table(args.table, args.csv)
    device = args.device
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.allow_tf32 = False  # where fp32 is asked for, and pairing always is

    # ---- Models first (they may be refused), then tiles and reports -------------------------------------------------
    if not args.download:
        dataset_folder(args.ds, args.data_dir)
    torch.manual_seed(args.sd)  # of random weights, where they are asked for
    clip = load_clip(args.clip_model, args.clip_weights, args.clip_tokenizer, device)
    clip.tokenize([""])  # conch's tokenizer file is asked for here, not after an hour of tiles
    backbone = load_backbone(args.model, args.weights).to(device)
    if args.download:
        download(args.ds, args.data_dir)
        download_reports(args.reports, args.data_dir)
    reports = load_reports(args.reports, args.data_dir, args.clean_reports)
    tiles = {split: pick_tiles(split, args) for split in SPLITS}
    labels = {split: torch.tensor(tiles[split].labels) for split in SPLITS}
    classes = tiles["train"].classes
    if args.batch > len(tiles["train"]):
        raise ValueError(f"--batch {args.batch}: larger than the {len(tiles['train'])} training tiles; give a smaller "
                         "one")
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = open_run(args, tiles, reports)
    print(f"{args.ds}: {len(classes)} classes, tiles "
          + ", ".join(f"{len(tiles[split])} {split}" for split in SPLITS)
          + f"; {len(reports)} reports; on {device}" + f", {WORLD} processes" * (WORLD > 1))
    for name, what in ((args.model, args.weights), (args.clip_model, args.clip_weights)):
        if what == "none":
            print(f"{name}: random weights, as asked for; its features mean nothing")

    # ---- 1. Pair: psi(i) = argmax_j cos(v_i, t_j), by CLIP alone; no label is seen ----------------------------------
    cache = Path(args.dir, "cache", slug(f"{args.ds} {args.clip_model}"))
    text_emb, how = cached(cache / f"reports-{slug(Path(args.reports).stem)}.pt", cache_key(clip, texts=reports),
                           lambda: embed_texts(clip, reports), write=RANK == 0)                       # (M, text_dim)
    print(f"report features: {how}")
    tile_emb, pairs, similarity = {}, {}, {}
    for split in SPLITS:
        seen = tiles[split].seen_by(clip.preprocess)
        tile_emb[split], how = cached(cache / f"{split}{subset_name(args)}.pt", cache_key(clip, paths=seen.paths),
                                      lambda: gathered([embed_images(clip, own_share(seen), args.batch, args.worker)],
                                                       len(seen), args), write=RANK == 0)           # (N, text_dim)
        print(f"{split} tile features for pairing: {how}")
        pairs[split], similarity[split] = nearest_text(tile_emb[split], text_emb)                     # (N,), (N,)
    write_pairs(run / "pairs.csv", tiles, pairs, similarity)
    if RANK == 0:
        every = [sum((getattr(tiles[split], of) for split in SPLITS), []) for of in ("paths", "labels")]
        write_gallery(run / "pairs.html", args.ds, args.clip_model, Tiles(*every, classes),
                      torch.cat(list(pairs.values())), torch.cat(list(similarity.values())), reports)
    uses = torch.cat(list(pairs.values())).bincount(minlength=len(reports))
    print(f"pairs: {int((uses > 0).sum())} of {len(reports)} reports used, the most used by "
          f"{uses.max() / uses.sum():.1%} of the tiles, mean similarity "
          f"{torch.cat(list(similarity.values())).mean():.3f}")

    # ---- 2. Vision head h_v on the frozen backbone (the unimodal row); 3. text head on the paired reports -----------
    if args.augment:
        backbone.recipe |= AUTHORS_PCAM
    image_of = tile_transform(**{key: value for key, value in backbone.recipe.items()
                                 if key in ("size", "mean", "std", "interpolation")}).transforms
    # resized and cropped by the workers, as uint8; made floats and normalised on the device
    seen = {split: tiles[split].seen_by(v2.Compose(image_of[:3])) for split in SPLITS}
    normalise = v2.Compose(image_of[3:])

    def features():
        return {split: outputs(backbone, seen[split], normalise, args) for split in SPLITS}           # (N, vision_dim)

    heads_are_there = args.resume and found(run / "heads.pt")
    v = None if heads_are_there else features()
    if not heads_are_there:
        t = {split: text_emb[pairs[split]] for split in SPLITS}                                       # (N, text_dim)
        torch.manual_seed(args.sd)
        vision_head = train_head(nn.Linear(v["train"].shape[1], len(classes)), v, labels, args.sd, args.head_steps)
        text_head = train_head(text_classifier(clip.dim, len(classes)), t, labels, args.sd, args.head_steps)
        with torch.no_grad():
            heads = {"start": vision_head.state_dict(), "vision head": vision_head(v["test"]).softmax(dim=1),
                     "text head": text_head(t["test"]).softmax(dim=1)}
        save(run / "heads.pt", heads | clip_rows(clip, tile_emb, labels, classes, args))
    heads = torch.load(run / "heads.pt", weights_only=True)

    # ---- 4. Fuse and distil: LoRA on both towers, CE of the fused logits + lambda (1 - cos(t, t-hat)) ---------------
    # Seeded anew and the text side built last: with and without text, everything else starts from the same numbers.
    torch.manual_seed(args.sd)
    model = ClipIT(backbone.requires_grad_(False), None, len(classes), heads["start"]["weight"].shape[1], clip.dim,
                   args.kd_layers, fused="lora" not in args.baseline, random_fusion=args.random_fusion)
    model.vision_head.load_state_dict(heads["start"])
    fixed_backbone = not (args.lora_vision and adapt(model.backbone, "backbone", args)) and not args.augment
    tokens = None
    if not args.no_text and model.fused:
        model.text_tower, tokens = clip.text_tower, clip.tokenize(reports)                            # (M, L)
        fixed_text = not (args.lora_text and not args.detach_text and adapt(model.text_tower, "text tower", args))
        if fixed_text and not args.drop_words:  # it never changes: its features are looked up, the tower is dropped
            model.text_tower, tokens = nn.Embedding.from_pretrained(text_emb), torch.arange(len(reports))
    # CLIP ends here, but for a text tower that the model holds
    tokenize, clip = clip.tokenize, None
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    towers = [tower for tower in (model.backbone, model.text_tower) if tower is not None]
    for tower in towers:
        if args.grad_checkpointing and hasattr(tower, "set_grad_checkpointing"):
            tower.set_grad_checkpointing(True)
        if args.compile:
            tower.compile(dynamic=tower is not model.backbone)  # the number of distinct reports changes
    counts = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
              "total": sum(p.numel() for p in model.parameters())}
    held = json.loads((run / "args.json").read_text())
    write_text(run / "args.json", json.dumps(held | {"parameters": counts}, indent=1))
    print(f"training {counts['trained']:,} of {counts['total']:,} parameters for {args.ep} epochs")
    inputs, prepare = seen, normalise
    if args.augment:
        inputs = seen | {"train": Augmented(seen["train"], args.sd)}
    if fixed_backbone:  # its features never change either: they are the input
        v, prepare, model.backbone = v or features(), nn.Identity(), nn.Identity()
        inputs = {split: torch.utils.data.TensorDataset(v[split], labels[split]) for split in SPLITS}
    try:
        train_clipit(model, inputs, prepare, labels, pairs, tokens, reports, tokenize, args, run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped in training; {run / 'last.pt'} holds the state of the last validation, and "
                                "the same command with --resume goes on from it") from None
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"--compile: torch cannot compile the model here ({str(error).strip().splitlines()[0]}); run "
                         "without it") from None

    # ---- 5. Text-free test: the saved classifier alone, LoRA merged, no text tower, no report, no CLIP --------------
    model.backbone = backbone
    written(run / "classifier", model.to_classifier(classes).save_pretrained)  # and again below, with its figures
    classifier = Classifier.from_pretrained(run / "classifier").to(device)
    test = outputs(classifier, seen["test"], normalise, args).softmax(dim=1)                          # (N, C)
    write_predictions(run / "predictions.csv", tiles["test"], test)
    name = ("LoRA with a plain head" if not model.fused else "CLIP-IT without text" if args.no_text else "CLIP-IT")
    rows = {row: p for row, p in heads.items() if row != "start"} | {name: test}
    rows = {row: scores(p, labels["test"]) for row, p in rows.items()}
    facts = model_facts(name, rows, len(test), args)
    written(run / "classifier", model.to_classifier(classes, facts).save_pretrained)
    metrics = {"rows": rows,
               "complementarity": complementarity(heads["vision head"], heads["text head"], labels["test"], classes),
               "test_tiles": len(test), "classes": classes, "ds": args.ds, "model": args.model, "sd": args.sd,
               "best": {key: value for key, value in torch.load(run / "last.pt", weights_only=True)["best"].items()
                        if key != "model"}}
    write_text(run / "metrics.json", json.dumps(finite(metrics), indent=1))
    if RANK == 0:
        write_report(metrics, run)
    print_rows(metrics, run)
    return metrics


# ---- The loops ------------------------------------------------------------------------------------------------------

def train_head(head: nn.Module, features: dict[str, Tensor], labels: dict[str, Tensor], seed: int, steps: int = 12500,
               patience: int = 20) -> nn.Module:
    """A head on features that were computed once, as kaiko-eva 0.1.2 trains its linear probe: AdamW 3e-4, batch 256, at
    most 12,500 steps; the state of the lowest validation loss is kept, looked at every 1 % of the steps, and `patience`
    looks without a lower one end it. features: split -> (N, D); labels: split -> (N,)."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    n, lowest, waited = len(labels["train"]), math.inf, 0
    rows = (row for _ in iter(int, 1) for row in torch.randperm(n, generator=generator).split(256))
    for step, row in zip(tqdm(range(1, steps + 1), "train head", leave=False, disable=None), rows):
        loss = F.cross_entropy(head(features["train"][row]), labels["train"][row])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(steps // 100, 1) == 0:
            with torch.no_grad():
                val_loss = F.cross_entropy(head(features["val"]), labels["val"]).item()
            waited += 1
            if val_loss < lowest:
                lowest, waited, best = val_loss, 0, {k: p.clone() for k, p in head.state_dict().items()}
            if waited == patience:
                break
    head.load_state_dict(best)
    return head


def clip_rows(clip, tile_emb: dict[str, Tensor], labels, classes: list[str], args) -> dict[str, Tensor]:
    """--baseline's two reference rows, test probabilities (N, C) of the CLIP image tower: they tell what the retrieved
    text can know of a tile. tile_emb: split -> (N, text_dim)."""
    rows = {}
    if "clip-probe" in args.baseline:
        probe = train_head(nn.Linear(clip.dim, len(classes)), tile_emb, labels, args.sd, args.head_steps)
        rows["CLIP linear probe"] = probe(tile_emb["test"]).softmax(dim=1).detach()
    if "zeroshot" in args.baseline:  # CLIP's logits: cosines with a prompt a class, at the usual temperature of 1/100
        names = DATASETS.get(args.ds, {}).get("prompts") or [re.sub(r"[_-]+", " ", name) for name in classes]
        prompts = embed_texts(clip, [f"an H&E image of {name}." for name in names])                   # (C, text_dim)
        rows["CLIP zero-shot"] = (100 * tile_emb["test"] @ prompts.T).softmax(dim=1)
    return rows


def adapt(tower: nn.Module, name: str, args) -> bool:
    """LoRA on the tower's layers of the kinds in --lora-targets; False where it has none, and it stays as it is."""
    if not any(isinstance(layer, TARGETS[kind].adapts) for layer in tower.modules() for kind in args.lora_targets):
        print(f"--lora-targets {' '.join(args.lora_targets)}: the {name} has no such layer and stays as it is")
        return False
    inject_lora(tower, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
    return True


def train_clipit(model: ClipIT, tiles: dict, prepare, labels, pairs, tokens, reports, tokenize, args, run: Path):
    """Step 4. Leaves the model in its best state by --monitor, and last.pt, log.jsonl in the run's folder.

    tiles: split -> images (uint8), which `prepare` makes the backbone's input on the device; pairs: split -> report of
    each tile (N,); tokens: (M, L) of all reports, or None without text. Epoch e visits the tiles in an order that seed
    and e alone decide and the random numbers of a step come from its own seed, so that a resumed run goes on as if it
    had never stopped. Of many processes each computes its share of every batch, and gradients are summed.
    """
    device, n = args.device, len(tiles["train"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # weight decay as L2 in the gradient, as the authors have it (Adam, not AdamW)
    optimizer = torch.optim.Adam(trainable.values(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps_per_epoch = math.ceil(n / args.batch)
    total = args.ep * steps_per_epoch
    every = max(round(args.val_every * steps_per_epoch), 1)
    scheduler = None
    if args.scheduler:  # down to a tenth, the authors' 1e-4; by step, where theirs went by epoch and so stood still
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=args.lr / 10)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    shares: list[list[int]] = []  # the tiles of each batch that are this process's
    persistent = args.worker > 0 and not args.augment  # Augmented tells its workers the epoch when they start
    loader = batches(tiles["train"], args, batch_sampler=shares, persistent_workers=persistent)
    val_loader = batches(own_share(tiles["val"]), args, batch_size=args.batch, persistent_workers=args.worker > 0)
    sign = -1 if args.mod == "max" else 1
    state = {"step": 0, "waited": 0, "log_bytes": 0, "best": {"value": math.inf * sign, "step": 0}, "stopped": False}

    def trained_state():
        return {name: p.detach().cpu().clone() for name, p in trainable.items()}

    def keep_state(step):
        """last.pt: everything that the next step depends on."""
        state.update(step=step, model=trained_state(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     scheduler=scheduler and scheduler.state_dict(), log_bytes=os.path.getsize(run / "log.jsonl"))
        save(run / "last.pt", state)

    def stop_unless_finite(step, parts):
        """Before anything is made of a step: a loss that is not finite ends the run, last.pt stays as it was."""
        if not all(math.isfinite(x) for x in parts.values()):
            raise FloatingPointError(
                f"not finite at step {step}: " + "".join(f"{key} {x:.4g}, " for key, x in parts.items())
                + f"lr {optimizer.param_groups[0]['lr']:.3g}; {run / 'last.pt'} holds the last good state, of step "
                f"{state['step']}; try a lower --lr")

    if args.resume and found(run / "last.pt"):
        state = torch.load(run / "last.pt", weights_only=True)
        load_trainable(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if scheduler:
            scheduler.load_state_dict(state["scheduler"])
        os.truncate(run / "log.jsonl", state["log_bytes"])
        print(f"going on from step {state['step']} of {total}")
    else:
        write_text(run / "log.jsonl", "")
        keep_state(0)

    trackers = open_trackers(args, run)
    step, sums, since = state["step"], {}, time.perf_counter()
    bar = tqdm(total=total, initial=step, desc="train", leave=False, disable=None)
    while step < total and not state["stopped"]:
        epoch, offset = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(args.sd * 100_003 + epoch)
        tiles["train"].epoch = epoch  # for Augmented
        whole = torch.randperm(n, generator=generator).split(args.batch)[offset:]
        shares[:] = [batch[own_rows(len(batch))].tolist() for batch in whole]
        model.train()
        for (images, target), batch, share in zip(on_device(loader, prepare, args), whole, shares):
            torch.manual_seed((args.sd * 1_000_003 + step) * WORLD + RANK)  # of dropout
            with autocast(args):
                if tokens is None:
                    (logits, t_hat), t = model.fuse(model.backbone(images)), None
                else:
                    text, report = distinct_reports(share, epoch, pairs["train"], tokens, reports, tokenize, args)
                    if not isinstance(model.text_tower, TextTower):  # which reads their lengths before it moves them
                        text = text.to(device, non_blocking=True)
                    logits, t_hat, t = model.forward_train(images, text, report.to(device, non_blocking=True))
            loss, parts = loss_of(logits, target, t_hat, t, args)
            parts = {"loss": loss.detach(), **parts}
            if device.type == "cpu":  # elsewhere looking would wait for the device: then the sums below tell
                stop_unless_finite(step + 1, parts)
            weight = len(batch[RANK::WORLD]) / len(batch)  # 0 where a small batch leaves nothing to this process
            scaler.scale(weight * loss).backward()
            sum_gradients(trainable.values())
            scaler.unscale_(optimizer)
            if args.clip:
                nn.utils.clip_grad_norm_(trainable.values(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()  # now: gradients kept through the next forward pass would cost a tenth of the memory
            if scheduler:
                scheduler.step()
            step += 1
            bar.update()
            for key, value in parts.items():
                sums[key] = sums.get(key, 0) + weight * value
            if step % every and step < total:
                continue

            sums = {key: summed(value).item() / (step - state["step"]) for key, value in sums.items()}
            speed = (step - state["step"]) * args.batch / (time.perf_counter() - since)
            stop_unless_finite(step, sums)
            val = validate(model, val_loader, prepare, labels["val"], pairs["val"], tokens, args)
            stop_unless_finite(step, {key: x for key, x in val.items() if key in ("val_loss", "val_ce", "val_kd")})
            line = {"step": step, "epoch": step / steps_per_epoch, **sums, **val, "lr": optimizer.param_groups[0]["lr"],
                    "tiles_per_second": round(speed, 1)}
            sums, since = {}, time.perf_counter()
            if RANK == 0:
                with open(run / "log.jsonl", "a") as log:
                    log.write(json.dumps(finite(line)) + "\n")
            for track in trackers:
                track(line, step)
            state["waited"] += 1
            if sign * val[args.monitor] < sign * state["best"]["value"]:
                if sign * val[args.monitor] < sign * state["best"]["value"] - args.delta:
                    state["waited"] = 0
                state["best"] = {"value": val[args.monitor], "step": step, "model": trained_state()}
            state["stopped"] = bool(args.early) and state["waited"] >= args.patience
            keep_state(step)
            if args.chkpnt:
                save(run / f"step_{step}.pt", state["model"])
            if (step // every) % args.log == 0 or step == total or state["stopped"]:
                tqdm.write(f"step {step}/{total}  " + "  ".join(
                    f"{key} {line[key]:.4f}" for key in ("loss", "ce", "kd", "val_loss", "val_bacc") if key in line))
            if state["stopped"]:
                print(f"--early: {args.monitor} has not improved by more than {args.delta} in {args.patience} looks")
                break
            model.train()
    bar.close()
    load_trainable(model, state["best"].get("model", state["model"]))
    print(f"best {args.monitor} {state['best']['value']:.4f} at step {state['best']['step']} of {step}")
    model.eval()


def distinct_reports(share: list[int], epoch: int, pairs: Tensor, tokens, reports, tokenize, args):
    """Tokens (R, L) of the distinct reports of these training tiles, and the row of each tile's own (B,)."""
    if args.drop_words:
        texts = [drop_words(reports[pairs[i]], args.drop_words, f"{args.sd} {epoch} {i}") for i in share]
        distinct = list(dict.fromkeys(texts))
        return tokenize(distinct), torch.tensor([distinct.index(text) for text in texts])
    used, report = pairs[share].unique(return_inverse=True)
    return tokens[used], report


def loss_of(logits: Tensor, labels: Tensor, t_hat, t, args):
    """clipit_loss in fp32 with this run's lambda, of logits or, with --double-softmax, the authors' probabilities."""
    logits, t_hat, t = (x if x is None else x.float() for x in (logits, t_hat, t))
    return clipit_loss(logits.softmax(dim=1) if args.double_softmax else logits, labels, t_hat, t, args.kd_weight)


@torch.no_grad()
def validate(model: ClipIT, loader: DataLoader, prepare, labels: Tensor, pairs: Tensor, tokens, args) -> dict:
    """The loss and its parts over the whole validation split, and accuracies. The prediction uses the image alone; the
    reports are encoded, each distinct one once, only for the distillation part of the loss."""
    model.eval()
    with autocast(args):
        parts = [model.fuse(model.backbone(images)) for images, _ in on_device(loader, prepare, args)]
        logits, t_hat, t, spread = gathered([logits for logits, _ in parts], len(labels), args), None, None, {}
        if tokens is not None:
            t_hat = gathered([t_hat for _, t_hat in parts], len(labels), args)
            used, report = pairs.unique(return_inverse=True)
            own = tokens[used[own_rows(len(used))]].split(args.batch)
            texts = [model.text_tower(part.to(args.device)) for part in own]
            texts = gathered(texts, len(used), args)
            t, spread = texts[report], {"text_spread": text_spread(texts)}
    loss, parts = loss_of(logits, labels, t_hat, t, args)
    metrics = scores(logits.softmax(dim=1), labels)
    return {"val_loss": loss.item(), **{f"val_{k}": x.item() for k, x in parts.items()},
            "val_acc": metrics["accuracy"], "val_bacc": metrics["balanced_accuracy"], **spread}


def text_spread(features: Tensor) -> float:
    """1 - mean cosine of two different rows of (R, dim): 0 where all reports have collapsed to one direction."""
    count, total = len(features), F.normalize(features.double(), dim=1).sum(dim=0)
    return 1 - ((total @ total - count) / (count * (count - 1))).item() if count > 1 else math.nan


@torch.no_grad()
def outputs(model: nn.Module, tiles: Tiles, prepare, args) -> Tensor:
    """The model's output for every tile, (N, ...) fp32 on the CPU, in order."""
    loader = on_device(batches(own_share(tiles), args, batch_size=args.batch), prepare, args)
    with autocast(args):
        return gathered([model(images) for images, _ in tqdm(loader, "tiles", leave=False, disable=None)],
                        len(tiles), args)


def batches(tiles, args, **kwargs) -> DataLoader:
    """(images, labels), decoded by the workers. Its seed for workers comes from a generator of its own, so that the
    random numbers of training depend neither on the workers nor on how often tiles were read."""
    return DataLoader(tiles, num_workers=args.worker, generator=torch.Generator(),
                      pin_memory=args.device.type == "cuda", **kwargs)


def on_device(loader: DataLoader, prepare, args):
    """The loader's batches on the device, where prepare makes floats of the uint8 images."""
    for images, labels in loader:
        images = prepare(images.to(args.device, non_blocking=True))
        if args.device.type == "cuda" and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, labels.to(args.device, non_blocking=True)


def autocast(args):
    """--amp: matrix products in bf16 or fp16; parameters, their updates and the loss stay fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    return torch.autocast(args.device.type, dtype, enabled=dtype is not None)


# ---- Many processes: tile i belongs to process i % WORLD; where there is one, nothing here does anything -------------

def own_rows(n: int) -> list[int]:
    """The rows of n that are this process's; one that has none computes the first, which then counts nothing."""
    return list(range(RANK, n, WORLD)) or [0]


def own_share(tiles):
    return tiles if WORLD == 1 else torch.utils.data.Subset(tiles, own_rows(len(tiles)))


def summed(x: Tensor) -> Tensor:
    """x summed over the processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def gathered(parts: list[Tensor], n: int, args) -> Tensor:
    """All n rows in order, fp32 on the CPU, from the parts that each process has of its own share. Exact: every row
    is summed with zeros."""
    rows = torch.cat([part.float() for part in parts])
    if WORLD > 1:
        whole = torch.zeros(n, *rows.shape[1:], device=args.device)
        whole[RANK::WORLD] = rows[:len(range(RANK, n, WORLD))].to(args.device)
        rows = summed(whole)
    return rows.cpu()


def sum_gradients(parameters) -> None:
    if WORLD > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, whole.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def found(path: Path) -> bool:
    """Whether the file is there: asked by all processes before any of them goes on and may write it."""
    there = path.exists()
    wait_for_all()
    return there


def wait_for_all() -> None:
    if WORLD > 1:
        dist.barrier()


def drop_words(report: str, share: float, seed: str) -> str:
    """The report without `share` of its words, drawn at random by seed; one word stays at least."""
    words = report.split()
    keep = max(round(len(words) * (1 - share)), 1)
    return " ".join(words[i] for i in sorted(random.Random(seed).sample(range(len(words)), keep)))


def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy the trained parameters (LoRA and heads) into the model; the frozen ones are not in the state."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


# ---- Metrics: probabilities (N, C), labels (N,) -> float; nan where undefined ---------------------------------------

def balanced_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Mean recall over the classes that occur in the labels (Table 1's "accuracy")."""
    return per_class_recall(probabilities, labels).nanmean().item()


def per_class_recall(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(C,) share of each class's tiles that are predicted as it; nan for a class without tiles."""
    counts = confusion(probabilities, labels).double()
    return counts.diag() / counts.sum(dim=1)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of the tiles that are predicted right."""
    return (probabilities.argmax(dim=1) == labels).double().mean().item()


def macro_f1(probabilities: Tensor, labels: Tensor) -> float:
    """Mean F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in the labels or the predictions."""
    counts = confusion(probabilities, labels).double()
    return (2 * counts.diag() / (counts.sum(dim=0) + counts.sum(dim=1))).nanmean().item()


def macro_auroc(probabilities: Tensor, labels: Tensor) -> float:
    """Mean one-against-rest area under the ROC curve, ties counted half, over the classes that have tiles and are not
    all of them."""
    areas = []
    for label in range(probabilities.shape[1]):
        positive = labels == label
        p, q = int(positive.sum()), int((~positive).sum())
        if p and q:
            _, place, counts = probabilities[:, label].unique(return_inverse=True, return_counts=True)
            rank = (counts.cumsum(0) - (counts - 1) / 2).double()  # the mean rank of equal scores
            areas.append(((rank[place][positive].sum() - p * (p + 1) / 2) / (p * q)).item())
    return sum(areas) / len(areas) if areas else math.nan


def confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(C, C) counts: row = label, column = prediction."""
    classes = probabilities.shape[1]
    return (labels * classes + probabilities.argmax(dim=1)).bincount(minlength=classes ** 2).view(classes, classes)


def scores(probabilities: Tensor, labels: Tensor) -> dict:
    """One row of the table, with the recall of every class and the confusion counts."""
    return {"balanced_accuracy": balanced_accuracy(probabilities, labels), "accuracy": accuracy(probabilities, labels),
            "macro_f1": macro_f1(probabilities, labels), "macro_auroc": macro_auroc(probabilities, labels),
            "recall": per_class_recall(probabilities, labels).tolist(),
            "confusion": confusion(probabilities, labels).tolist()}


def complementarity(vision: Tensor, text: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """Fig. 3: the tiles that the text model gets right and the vision model wrong, as count and share, per class too.
    vision, text: probabilities (N, C)."""
    wrong = vision.argmax(dim=1) != labels
    gained = wrong & (text.argmax(dim=1) == labels)

    def count(of):
        return {"tiles": int(gained[of].sum()), "share": int(gained[of].sum()) / max(int(of.sum()), 1)}
    return {**count(torch.ones_like(wrong)), "share_of_vision_errors": count(wrong)["share"],
            "per_class": {name: count(labels == label) for label, name in enumerate(classes)}}


# ---- Tiles of a run, its folder and its files -----------------------------------------------------------------------

def pick_tiles(split: str, args) -> Tiles:
    """The tiles of a split that this run uses: --limit's share, --shots a class in training, none unreadable."""
    tiles = load_tiles(args.ds, split, args.data_dir, val_fraction=args.val_int)
    if args.limit:
        tiles = tiles.take(stratified_split(tiles.labels, args.limit, args.sd)[1])
    if args.shots and split == "train":
        tiles = tiles.take(draw_shots(tiles.labels, args.shots, args.sd))
    bad = find_bad_tiles(tiles, args.worker)
    if bad and not args.skip_bad:
        raise ValueError(f"{next(iter(bad.values()))}\n{len(bad)} such file(s) among the {split} tiles; mend or remove "
                         "them, or go on without them with --skip-bad")
    if bad:
        print(f"--skip-bad: {len(bad)} unreadable {split} tile(s) left out, the first: {next(iter(bad.values()))}")
        tiles = tiles.take([i for i in range(len(tiles)) if i not in bad])
        if set(tiles.labels) != set(range(len(tiles.classes))):
            raise ValueError(f"--skip-bad: a class of the {split} tiles has no readable tile left")
    return tiles


class Augmented(torch.utils.data.Dataset):
    """Training tiles with the authors' PCAM augmentation after resizing and cropping. What is drawn depends on seed,
    epoch and tile alone: not on the batch, the number of workers or where a run was resumed."""

    def __init__(self, tiles: Tiles, seed: int):
        resize_crop, rest = tiles.transform.transforms[:3], tiles.transform.transforms[3:]  # see tile_transform
        self.tiles = tiles.seen_by(v2.Compose([*resize_crop, AUTHORS_PCAM_CHANGES, *rest]))
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, index):
        with torch.random.fork_rng(devices=()):  # transforms draw from the global generator of the CPU
            torch.default_generator.manual_seed(random.Random(f"{self.seed} {self.epoch} {index}").getrandbits(63))
            return self.tiles[index]


def open_run(args, tiles, reports) -> Path:
    """Make DIR/OUTPUT/RUN with args.json. A folder that holds another configuration is left as it is (ValueError)."""
    run = Path(args.dir, args.output, args.run)
    lines = [f"{path} {label}" for split in SPLITS for path, label in zip(tiles[split].paths, tiles[split].labels)]
    config = {key: value for key, value in vars(args).items() if key not in PLACES}
    config |= {name: hashlib.sha256("\n".join(what).encode()).hexdigest()
               for name, what in (("tiles", lines), ("reports_text", reports))}
    try:
        run.mkdir(parents=True, exist_ok=True)
        if (run / "args.json").exists():
            held = json.loads((run / "args.json").read_text())["config"]
            other = [f"{key} {held.get(key)!r} there, {config.get(key)!r} now" for key in {**config, **held}
                     if held.get(key) != config.get(key)]
            if other:
                raise ValueError(f"{run}: holds a run of another configuration ({'; '.join(other[:3])}); give another "
                                 "--run, or remove that folder")
        elif args.resume:
            print(f"--resume: there is nothing in {run} yet; starting from the beginning")
        if not args.resume and RANK == 0:  # the same again: its old results go first, so that none can be mistaken
            shutil.rmtree(run / "classifier", ignore_errors=True)
            for name in ("metrics.json", "predictions.csv", "heads.pt", "last.pt", "log.jsonl", "pairs.csv",
                         "pairs.html", "report.html"):
                (run / name).unlink(missing_ok=True)
        places = {key: value for key, value in vars(args).items() if key in PLACES}
        held = {"config": config, "places": places} | versions()
        write_text(run / "args.json", json.dumps(held, indent=1, default=str))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--dir {args.dir}: the run's folder {run} cannot be written or read "
                         f"({type(error).__name__}: {error}); give another --dir") from None
    return run


def versions() -> dict:
    """Of Python and the packages whose numbers a result depends on, and the git commit of this file, if any."""
    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "open_clip_torch", "pillow")}
    git = shutil.which("git") and subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {"versions": {"python": sys.version.split()[0], **packages}, "commit": git and git.stdout.strip() or None}


def open_trackers(args, run: Path) -> list:
    """What --tensorboard and --wandb ask for, each as a function of a log line and its step."""
    trackers = []
    if RANK:
        return trackers
    try:
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(run / "tensorboard")
            trackers.append(lambda line, step: [writer.add_scalar(key, x, step) for key, x in line.items()])
        if args.wandb:
            import wandb
            project = wandb.init(project="clip-it", name=f"{args.output}/{args.run}", dir=run, config=vars(args))
            trackers.append(lambda line, step: project.log(line, step=step))
    except ImportError as error:
        raise ValueError(f"{'--wandb' if args.wandb else '--tensorboard'}: its package is not installed ({error}); "
                         f"pip install {'wandb' if args.wandb else 'tensorboard'}") from None
    return trackers


def written(path: Path, write) -> None:
    """write(a temporary name), then renamed: a killed run leaves the old file or the new one. Every process comes here;
    the first one writes, the others wait for it."""
    if RANK == 0:
        part = path.with_name(path.name + ".tmp")
        if part.is_dir():
            shutil.rmtree(part)
        write(part)
        if path.is_dir():  # a folder cannot be renamed over another
            shutil.rmtree(path)
        os.replace(part, path)
    wait_for_all()


def model_facts(name: str, rows: dict[str, dict], test_tiles: int, args) -> dict:
    """What config.json and the model card tell of the run: see Classifier. Folders and files without their paths."""
    row, text = DATASETS.get(args.ds, {}), name == "CLIP-IT"
    shown = {of: {key: x for key, x in rows[of].items() if isinstance(x, float)} for of in ("vision head", name)}
    return finite({
        "data": row.get("title", Path(args.ds).resolve().name), "licence": row.get("licence", "not known here"),
        "reports": Path(args.reports).name if text else None, "variant": name, "test_tiles": test_tiles,
        "clip_model": re.sub("(?<=local-dir:).*/", "", args.clip_model.rstrip("/")) if text else None,
        "metrics": shown[name], "unimodal": shown["vision head"]})


def write_text(path: Path, text: str) -> None:
    written(path, lambda part: part.write_text(text))


def save(path: Path, state) -> None:
    written(path, lambda part: torch.save(state, part))


def write_csv(path: Path, header: list[str], rows) -> None:
    def write(part):
        with open(part, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    written(path, write)


def write_pairs(path: Path, tiles, pairs, similarity) -> None:
    """tile, its split, the number of its report (from 0, in the order of the reports) and their cosine."""
    write_csv(path, ["tile", "split", "report", "similarity"], (
        (tile, split, int(report), f"{cosine:.6f}") for split in SPLITS
        for tile, report, cosine in zip(tiles[split].paths, pairs[split], similarity[split])))


def write_predictions(path: Path, tiles: Tiles, probabilities: Tensor) -> None:
    """path, target, pred and class_0 ... (probabilities), the authors' column names."""
    write_csv(path, ["path", "target", "pred", *(f"class_{i}" for i in range(probabilities.shape[1]))], (
        (tile, label, int(row.argmax()), *(f"{p:.6g}" for p in row.tolist()))
        for tile, label, row in zip(tiles.paths, tiles.labels, probabilities)))


def finite(value):
    """The same with None for nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


NOTES = {"vision head": " (frozen backbone, unimodal)", "text head": " (paired reports)", "CLIP zero-shot": "",
         "CLIP linear probe": ""}
COLUMNS = {"balanced_accuracy": "bal. acc.", "accuracy": "accuracy", "macro_f1": "macro F1",
           "macro_auroc": "macro AUROC"}


def print_rows(metrics: dict, run: Path) -> None:
    print(f"\n{metrics['test_tiles']} test tiles".ljust(42) + "".join(title.rjust(12) for title in COLUMNS.values()))
    for row, values in metrics["rows"].items():
        print((row + NOTES.get(row, " (image only)")).ljust(41)
              + "".join(f"{100 * values[key]:12.2f}" for key in COLUMNS))
    gained = metrics["complementarity"]
    print(f"complementarity: the text head is right where the vision head is wrong on {gained['tiles']} tiles, "
          f"{gained['share']:.1%} of all, {gained['share_of_vision_errors']:.1%} of the vision head's errors\n"
          "  by class: " + ", ".join(f"{name} {of['tiles']} ({of['share']:.0%})"
                                     for name, of in gained["per_class"].items()))
    print(f"the run lies in {run}")


def write_report(metrics: dict, run: Path) -> None:
    """report.html: the table, the confusion counts, the curves and the flags, beside pairs.html in the run's folder."""
    rows, gained, held = metrics["rows"], metrics["complementarity"], json.loads((run / "args.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    name, figure = list(rows)[-1], lambda x: f"{100 * x:.2f}" if math.isfinite(x) else "–"

    def curve(key, scale=1):
        return [(line["epoch"], scale * line[key]) for line in log if line.get(key) is not None]
    parts = {"loss": "ink", "ce": "blue", "kd": "orange"} if "kd" in log[-1] else {"loss": "ink"}  # no text: CE alone
    losses = {f"{split} {part}": (f"{colour} {dash}", curve(prefix + part)) for part, colour in parts.items()
              for split, dash, prefix in (("train", "dash", ""), ("val", "", "val_"))}
    flags = {key.replace("_", "-"): " ".join(value) if isinstance(value, list) else str(value)
             for key, value in held["config"].items()
             if key not in ("tiles", "reports_text") and str(value) not in ("None", "False", "[]")}
    write_page(
        run / "report.html", f"Results of {run.parent.name}/{run.name}",
        f"This page shows one run on {metrics['ds']}: what the text-free model ({name}) reaches on "
        f"{metrics['test_tiles']:,} test tiles beside the vision head and the text head, which classes it confuses, "
        "how it was trained and with which flags.", '<p><a href="pairs.html">The pairs of tiles and reports</a></p>',
        "<h2>Test</h2>", html_table(
            [["%", *COLUMNS.values()], *([row + NOTES.get(row, " (image only)"), *(figure(of[key]) for key in COLUMNS)]
                                         for row, of in rows.items())],
            f"The text head is right where the vision head is wrong on {gained['tiles']:,} tiles, "
            f"{gained['share']:.1%} of all: what there is to gain from text."),
        f'<h2>Confusion</h2><div class="charts"{" style=grid-template-columns:100%" * (len(metrics["classes"]) > 12)}>',
        *(confusion_grid(rows[row]["confusion"], metrics["classes"], f"<b>{row}</b>: test tiles by true class (row) "
                         "and predicted class (column); shade: share of the row, blue where right, orange where wrong.")
          for row in (name, "vision head")), '</div><h2>Training</h2><div class="charts">',
        curves(losses, "epoch", "loss", "Loss in training (dashed, mean since the last validation) and on the "
               "validation tiles (solid)" + ": loss = ce + lambda · kd." * ("kd" in parts), 0),
        curves({"val": ("blue", curve("val_bacc", 100))}, "epoch", "balanced accuracy, %", "Balanced accuracy on the "
               f"validation tiles. The state of step {metrics['best']['step']} of {log[-1]['step']} was kept."),
        f'</div><h2>Flags</h2><p class="soft">On {escape(held["places"]["device"])}; '
        + ", ".join(f"{package} {number}" for package, number in held["versions"].items()) + ". What is not listed is "
        "unset.</p><ul>", *(f"<li>--{key} {escape(value)}</li>" for key, value in flags.items()), "</ul>")


# ---- Table 1 of the paper, from finished runs -----------------------------------------------------------------------

# Balanced accuracy in %, unimodal -> CLIP-IT. Columns: pcam, bach, crc. Unimodal from the paper's Table 1; CLIP-IT with
# two decimals from the paper too, with one from the table of the authors' README, the same results rounded.
PAPER = {
    "UNI": ((94.24, 95.49), (78.89, 81.8), (94.66, 95.9)), "DINOL14": ((88.88, 92.3), (84.26, 86.1), (94.40, 95.9)),
    "VITB_16": ((88.13, 91.4), (80.78, 82.9), (95.86, 95.7)), "VITS_16": ((88.43, 90.9), (82.90, 84.6), (93.77, 95.3)),
    "VITB_8": ((87.54, 91.9), (86.90, 84.91), (95.71, 95.7)), "VITS_8": ((87.90, 90.2), (81.01, 82.6), (94.90, 95.55)),
}


def table(folder, csv_path=None) -> dict:
    """Print, for every data set, backbone and variant among the finished runs under `folder`, unimodal -> trained as
    mean +- sd of balanced accuracy in % over n runs, beside the paper's figure where there is one."""
    found: dict[tuple, list] = {}
    for path in sorted(Path(folder).rglob("metrics.json")):
        metrics, config = json.loads(path.read_text()), json.loads((path.parent / "args.json").read_text())["config"]
        # runs are repetitions of one another if they differ in the seed (and the tiles it drew) alone
        same = json.dumps({key: value for key, value in config.items() if key not in ("sd", "tiles")}, sort_keys=True)
        found.setdefault((config["ds"], config["model"], list(metrics["rows"])[-1], same), []).append(metrics)
    if not found:
        raise FileNotFoundError(f"--table {folder}: no metrics.json below it; give the --dir of finished runs")
    lines = []
    for (ds, model, row, same), runs in found.items():
        values = {name: torch.tensor([100 * run["rows"][name]["balanced_accuracy"] for run in runs]).double()
                  for name in ("vision head", row)}
        gain = values[row] - values["vision head"]
        stats = {key: (x.mean().item(), x.std().item() if len(runs) > 1 else math.nan)
                 for key, x in (("unimodal", values["vision head"]), ("trained", values[row]), ("gain", gain))}
        paper = PAPER.get(model, {}) and dict(zip(("pcam", "bach", "crc"), PAPER[model])).get(ds) or ("", "")
        lines.append({"ds": ds, "model": model, "row": row, "n": len(runs), **{
            f"{key}_{name}": x for key, pair in stats.items() for name, x in zip(("mean", "sd"), pair)},
            "paper_unimodal": paper[0], "paper_clipit": paper[1] if row == "CLIP-IT" else "", "flags": same})
        shown = [f"{mean:.2f} ± {sd:.2f}" for mean, sd in stats.values()]
        print(f"{ds}  {Path(model).name}  unimodal {shown[0]} -> {row} {shown[1]}  (gain {shown[2]}, n = {len(runs)})"
              + (f"   paper: {paper[0]} -> {paper[1]}" if paper[0] and row == "CLIP-IT" else ""))
    if csv_path:
        write_csv(Path(csv_path), list(lines[0]), (line.values() for line in lines))
    return {"table": lines}


# ---- Command line ---------------------------------------------------------------------------------------------------

def parse_args(argv=None) -> argparse.Namespace:
    """The authors' flag names, with - or _. Unset, a flag takes the data set's own default (a row of DATASETS), then
    the one shown."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    argv = [re.sub("_", "-", word.split("=")[0]) + word[len(word.split("=")[0]):] if word.startswith("--") else word
            for word in argv]
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, default=None, help="", kind=str, **kwargs):
        parser.add_argument(f"--{name}", default=default, help=help + ("" if default is None else f" [{default}]"),
                            **({"type": kind} if "action" not in kwargs else {}), **kwargs)

    flag("ds", "demo", f"{', '.join(DATASETS)}, or a folder with train/ and test/ (val/ optional) of class folders")
    flag("data-dir", "data", "where downloaded data sets lie")
    flag("download", action="store_true", default=False, help="fetch the data set and reports that are not there yet")
    flag("reports", help="a .txt with one report a line, a .csv or .jsonl with a column text, a folder of .txt, or "
         + ", ".join(REPORTS))
    flag("clean-reports", action="store_true", default=False, help="without runs of scanning noise (IIIII, ____)")
    flag("augment", None, "the authors' training on PCAM: flips, colour jitter, CLIP statistics, bicubic",
         choices=("authors-pcam",))
    flag("model", help=f"backbone: {', '.join(BACKBONES)}, a timm id, hf-hub:... or local-dir:...; unset, UNI")
    flag("weights", help="local weights of the backbone, or `none` for random ones")
    flag("clip-model", help=f"pairing model: {', '.join(CLIPS)} or an open_clip id; unset, conch")
    flag("clip-weights", help="local weights of the pairing model, or `none` for random ones")
    flag("clip-tokenizer", help="local tokenizer file of conch, which is downloaded once otherwise")
    flag("dir", "runs", "where runs are written: DIR/OUTPUT/RUN")
    flag("output", help="unset, the name of the data set")
    flag("run", help="unset, the flags that differ from their defaults")
    flag("resume", action="store_true", default=False, help="go on with the run in DIR/OUTPUT/RUN")
    flag("sd", 0, "seed", int)
    flag("shots", None, "labelled training tiles a class, drawn by the seed; unset, all (demo: 60)", int)
    flag("limit", None, "use this share of every split, for a quick try", float)
    flag("val-int", None, "share of the training tiles held out for validation, not the data set's own split", float)
    flag("skip-bad", action="store_true", default=False, help="leave unreadable tiles out instead of stopping")
    flag("batch", None, "tiles a step", int)
    flag("lr", 1e-3, "of Adam", float)
    flag("weight-decay", 1e-4, "L2 in the gradient, as the authors have it", float)
    flag("ep", None, "epochs", int)
    flag("head-steps", 12500, "at most so many steps for the vision head and the text head", int)
    flag("worker", None, "processes that decode tiles", int)
    flag("clip", 0.5, "largest norm of the gradient; 0: no limit", float)
    flag("scheduler", 0, "1: cosine by step down to a tenth", int, choices=(0, 1))
    flag("lora-r", 16, "rank", int)
    flag("lora-alpha", 8.0, "the update is scaled by alpha / rank", float)
    flag("lora-dropout", 0.0, "before the down projection", float)
    flag("lora-text", None, "0: the text tower stays as it is; unset, 1 (demo: 0)", int, choices=(0, 1))
    flag("lora-vision", 1, "0: the backbone stays as it is", int, choices=(0, 1))
    flag("lora-targets", list(TARGETS), "kinds of layers that LoRA adapts", nargs="+", choices=list(TARGETS))
    flag("no-lin", action="store_true", default=False, help="the authors' name for --lora-targets conv2d embedding")
    flag("kd-layers", 1, "layers of h_d", int, choices=(1, 2))
    flag("kd-weight", 1.0, "lambda", float)
    flag("no-text", action="store_true", default=False, help="ablation: same layers, LoRA and steps, no distillation")
    flag("detach-text", action="store_true", default=False, help="no gradient into the text tower")
    flag("drop-words", 0.0, "share of each report's words dropped, anew for each tile and epoch", float)
    flag("random-fusion", action="store_true", default=False, help="the authors' start: a random fusion layer")
    flag("double-softmax", action="store_true", default=False, help="the authors' loss: CE of softmax outputs")
    flag("val-every", None, "epochs between validations (crc, pcam: 0.1)", float)
    flag("monitor", "val_loss", "best state and --early", choices=("val_loss", "val_ce", "val_acc", "val_bacc"))
    flag("mod", None, "unset, min for losses and max for accuracies", choices=("min", "max"))
    flag("early", 0, "1: stop when --monitor stands still", int, choices=(0, 1))
    flag("patience", 5, "validations that --early waits", int)
    flag("delta", 0.0, "what counts as an improvement for --early", float)
    flag("chkpnt", 0, "1: keep the trained state of every validation", int, choices=(0, 1))
    flag("log", 1, "validations for each printed line", int)
    flag("baseline", [], "lora: LoRA and a plain head in place of CLIP-IT; zeroshot, clip-probe: rows of the CLIP "
         "image tower", nargs="+", choices=("lora", "zeroshot", "clip-probe"))
    flag("tensorboard", action="store_true", default=False, help="log to RUN/tensorboard too")
    flag("wandb", 0, "1: log to Weights & Biases too", int, choices=(0, 1))
    flag("table", help="print the finished runs under this folder as Table 1, and end")
    flag("csv", help="write the table to this file too")
    flag("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 ...; under torchrun each "
         "process has its own")
    flag("amp", None, "autocast of both towers; unset, bf16 on cuda and off elsewhere", choices=("off", "bf16", "fp16"))
    flag("compile", action="store_true", default=False, help="torch.compile both towers")
    flag("grad-checkpointing", action="store_true", default=False, help="less memory for more time in training")
    args = parser.parse_args(argv)
    if args.table:
        return args

    if args.ds not in DATASETS:
        dataset_folder(args.ds)  # refuses what is neither a name nor a folder before anything else is asked
    row = DATASETS.get(args.ds, {})
    defaults = {"batch": 64, "ep": 20, "worker": min(os.cpu_count() or 1, 8), "model": "UNI", "clip_model": "conch",
                "reports": None, "shots": None, "val_every": 1.0, "lora_text": 1} | row
    if args.no_lin:
        args.lora_targets = [kind for kind in args.lora_targets if kind != "linear"]
    args.lora_targets = [kind for kind in TARGETS if kind in args.lora_targets]  # whatever their order
    del args.no_lin
    defaults["amp"] = "bf16" if args.device.startswith("cuda") else "off"
    defaults["mod"] = "max" if args.monitor.endswith("acc") else "min"
    unset = parser.parse_args(["--ds", args.ds, "--device", args.device])
    for key, value in defaults.items():
        for space in (args, unset):
            if hasattr(space, key) and getattr(space, key) is None:
                setattr(space, key, value if isinstance(value, (int, float)) or value is None else str(value))
    if args.reports is None:
        raise ValueError(f"--ds {args.ds} needs --reports")
    for key, ok, expected in (
            ("lora_r", args.lora_r >= 1, "1 or more; --lora-vision 0 --lora-text 0 trains without LoRA"),
            ("lora_alpha", args.lora_alpha > 0, "more than 0"),
            ("lora_targets", args.lora_targets, "a kind of layer beside linear, which --no-lin takes away"),
            ("lora_dropout", 0 <= args.lora_dropout < 1, "0 to below 1"), ("batch", args.batch >= 1, "1 or more"),
            ("ep", args.ep >= 1, "1 or more"), ("worker", args.worker >= 0, "0 or more"),
            ("head_steps", args.head_steps >= 1, "1 or more"),
            ("val_int", args.val_int is None or 0 < args.val_int < 1, "a share between 0 and 1, such as 0.2"),
            ("limit", args.limit is None or 0 < args.limit < 1, "a share between 0 and 1, such as 0.1"),
            ("drop_words", 0 <= args.drop_words < 1, "a share from 0 to below 1, such as 0.3"),
            ("shots", args.shots is None or args.shots >= 1, "1 or more"),
            ("val_every", args.val_every > 0, "more than 0"),
            ("lr", args.lr > 0, "more than 0"), ("log", args.log >= 1, "1 or more"),
            ("download", WORLD == 1 or not args.download, "one process; fetch the data without torchrun first")):
        if not ok:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)}: expected {expected}")
    if WORLD > 1 and args.device == "cuda":
        args.device += f":{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: torch finds no such device here ({str(error).splitlines()[0]}); use "
                         "--device cpu, or cuda:0 where there is one") from None
    args.device = torch.device(args.device)
    args.output = args.output or slug(Path(args.ds).resolve().name)
    # the run's name tells the flags that differ from the data set's defaults
    differ = [key.replace("_", "-") + ("" if value is True else f"-{'-'.join(value)}" if isinstance(value, list)
                                       else f"-{Path(str(value)).name}")
              for key, value in vars(args).items()
              if key not in (*PLACES, "ds", "skip_bad") and value != getattr(unset, key)]
    args.run = args.run or slug("_".join(differ)) or "base"
    return args


def subset_name(args) -> str:
    """What sets this run's tiles apart in the cache of tile features."""
    return "".join(f"-{key}{value}" for key, value in (
        ("val", args.val_int), ("limit", args.limit), ("shots", args.shots),
        ("sd", args.sd if args.limit or args.shots else None))
        if value is not None)


def cli() -> None:
    """main() for people: bad input is one or two lines on stderr and exit code 2."""
    keep_freed_memory()
    if RANK:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    else:  # a scheduler or torchrun that ends the run is told of --resume like Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        sys.exit(fail(str(error), 2))
    except FloatingPointError as error:
        sys.exit(fail(str(error), 1))
    except KeyboardInterrupt as stop:
        sys.exit(fail(str(stop) or "stopped; the same command with --resume goes on with the run", 2))
    except RuntimeError as error:
        if WORLD == 1:
            raise
        lost = "onnection" in str(error)  # in gloo's words: another process has ended
        if lost and RANK:
            sys.exit(1)
        sys.exit(fail("another process of the run has ended; mend what it says and go on with --resume" if lost
                      else f"process {RANK} of {WORLD}: {error}", 1))


def fail(message: str, code: int) -> int:
    if RANK and not dist.is_initialized():
        time.sleep(10)  # they all have read the same: the first says it, and torchrun ends the others meanwhile
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    cli()

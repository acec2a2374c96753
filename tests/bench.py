"""What the parts of CLIP-IT cost, each beside its reference in the same run. Nothing here asserts a time.

    python tests/bench.py [--only train infer heads pair malloc slopes gpu] [--device cpu] [--repeat 3]

Entries take turns, so that a machine that wanders slows all of them alike: a time is the median of its repeats, a ratio
the median of its ratios to the first entry's time in the same turn. Memory is the peak over three steps above the built
model, each in a process of its own. Weights are random: ViT-S/16 at 224, a text tower of CONCH's size with reports that
fill its 127 tokens, LoRA r 16, alpha 8 on both, batch 16. The authors' rows are their steps with this repository's
parts: open_clip's own text forward, the report of every tile encoded, timm's own blocks, each LoRA branch added as a
tensor of its own.
"""
import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clipit import Classifier, ClipIT, clipit_loss, keep_freed_memory, load_backbone, tile_transform
from lora import LoRALinear, inject_lora
from pairing import build_conch, embed_images, load_clip, nearest_text
from train import train_head

VITS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
BATCH, CLASSES, TEXT_DIM, TILES, REPORTS = 16, 9, 512, 300_000, 20_000  # the last two: of nearest_text
HEAD_STEPS = 500  # at batch 256
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}  # bf16 FLOP/s, not sparse


# ---- What is measured: each builder gets the device and returns the function that is timed --------------------------

def plain_vit(name="ViT-S/16"):
    return timm.create_model(VITS[name], num_classes=0)


def images(device, count=BATCH):
    return torch.randn(count, 3, 224, 224, device=device)


def unit(count, device, dim=TEXT_DIM):
    return F.normalize(torch.randn(count, dim, device=device), dim=1)


def full_training(device):
    model, x = plain_vit().to(device).train(), images(device)

    def step():
        model.zero_grad()
        model(x).sum().backward()
    return step


def bare_forward(device):
    model, x = plain_vit().to(device).eval(), images(device)
    return torch.inference_mode()(lambda: model(x))


class PlainLoRALinear(LoRALinear):
    def add_branch(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def adapt(model, kind):
    if kind == "peft":
        from peft import LoraConfig, inject_adapter_in_model
        names = [name for name, layer in model.named_modules()
                 if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding))]
        return inject_adapter_in_model(LoraConfig(r=16, lora_alpha=8, target_modules=names), model)
    inject_lora(model, rank=16, alpha=8)
    for layer in model.modules():
        if kind == "authors" and isinstance(layer, LoRALinear):
            layer.__class__ = PlainLoRALinear
    return model


def clipit_model(device, text, distinct, kind="ours", batch=BATCH):
    """(ClipIT, tokens, report) of a batch with so many distinct reports; text=False: their features are fixed."""
    report = torch.arange(batch) % distinct
    backbone = adapt(plain_vit() if kind == "authors" else load_backbone(VITS["ViT-S/16"], "none"), kind)
    if not text:
        tower, tokens = nn.Embedding(REPORTS, TEXT_DIM).requires_grad_(False), torch.randint(REPORTS, (distinct,))
    else:
        tower, tokens = build_conch().text, torch.randint(1, 32_000, (distinct, 128))  # no pads
        if kind == "authors":
            tower.__class__ = TextTransformer
            tokens, report = tokens[report, :-1], torch.arange(BATCH)
        adapt(tower, kind)
    model = ClipIT(backbone, tower, CLASSES, backbone.num_features, TEXT_DIM)
    return model.to(device), tokens.to(device), report.to(device)


def training(device, text, distinct, kind="ours", batch=BATCH):
    model, tokens, report = clipit_model(device, text, distinct, kind, batch)
    fixed, labels = images(device, batch), torch.randint(CLASSES, (batch,), device=device)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=1e-4, fused=True)

    def step(x=fixed):
        logits, t_hat, t = model.forward_train(x, tokens, report)
        loss, _ = clipit_loss(logits, labels, t_hat, t)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return step


def classifier(device, batch=BATCH):
    model = Classifier(VITS["ViT-S/16"], dict(num_classes=0), 224, [0.5] * 3, [0.5] * 3,
                       [str(i) for i in range(CLASSES)], 384, TEXT_DIM).to(device)
    x = images(device, batch)
    return torch.inference_mode()(lambda: model(x))


def authors_test(device):
    model, tokens, report = clipit_model(device, True, BATCH, "authors")
    model, x = model.eval(), images(device)
    return torch.inference_mode()(lambda: model.forward_train(x, tokens, report))


def head_on_features(device):
    features = {split: torch.randn(count, 384) for split, count in (("train", 20_000), ("val", 2000))}
    labels = {split: torch.randint(CLASSES, (len(x),)) for split, x in features.items()}
    return lambda: train_head(nn.Linear(384, CLASSES), features, labels, 0, HEAD_STEPS, patience=HEAD_STEPS)


def head_on_backbone(device):
    """A step of BATCH tiles: HEAD_STEPS of 256 tiles take SCALE times as long."""
    forward, head = bare_forward(device), nn.Linear(384, CLASSES).to(device)
    labels, optimizer = torch.randint(CLASSES, (BATCH,), device=device), torch.optim.AdamW(head.parameters())

    def step():
        optimizer.zero_grad()
        F.cross_entropy(head(forward().clone()), labels).backward()
        optimizer.step()
    return step


def cosines(device, tiles, nearest):
    image_emb, text_emb = unit(tiles, device), unit(REPORTS, device)
    block = torch.empty(1024, REPORTS, device=device)

    def product():
        for part in image_emb.split(1024):
            torch.mm(part, text_emb.T, out=block[:len(part)])
    return (lambda: nearest_text(image_emb, text_emb)) if nearest else product


PEFT = {f"with peft's LoRA, {name}": partial(training, text=text, distinct=distinct, kind="peft")
        for name, text, distinct in (("6 distinct", True, 6), ("16 distinct", True, 16), ("fixed", False, 6))}
GROUPS = {
    "train": {"R: ViT-S/16, all weights trained": full_training, "F: its forward": bare_forward,
              "step, 6 distinct reports": partial(training, text=True, distinct=6),
              "step, 16 distinct reports": partial(training, text=True, distinct=16),
              "step, report features fixed": partial(training, text=False, distinct=6),
              "authors' step": partial(training, text=True, distinct=16, kind="authors")}
    | (PEFT if find_spec("peft") else {}),
    "infer": {"F: ViT-S/16, forward": bare_forward, "Classifier": classifier, "authors' test step": authors_test},
    "heads": {"features computed once": head_on_features, "backbone at every step": head_on_backbone},
    "pair": {"matrix product, 20,000 tiles": partial(cosines, tiles=20_000, nearest=False),
             "nearest_text, 20,000 tiles": partial(cosines, tiles=20_000, nearest=True)},
}
WHOLE = partial(cosines, tiles=TILES, nearest=True)
SCALE = {"backbone at every step": HEAD_STEPS * 256 / BATCH}


# ---- Children: each runs in a process of its own and prints JSON ----------------------------------------------------

def seconds(function, device, synchronize=torch.cuda.synchronize):
    start = time.perf_counter()
    function()
    if device != "cpu":
        synchronize()
    return time.perf_counter() - start


def child_times(group, device, repeat):
    entries = {name: build(device) for name, build in GROUPS[group].items()}
    turns = [{name: SCALE.get(name, 1) * seconds(function, device) for name, function in entries.items()}
             for _ in range(repeat + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in entries}  # the first one warms up


def resident(key):
    """VmRSS or VmHWM (its peak) of this process in bytes. Linux; getrusage's peak counts the parent's memory too."""
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024


def child_memory(group, device, entry):
    function = GROUPS.get(group, {}).get(entry, WHOLE)(device)
    cuda = device != "cpu"
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what building took and freed again would hide a part of the peak
    built = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    spent = [seconds(function, device) for _ in range(3 if entry else 1)]
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    with FlopCounterMode(display=False) as counter:
        if entry:
            function()
    return {"above": peak - built, "all": peak, "seconds": spent[-1], "flops": counter.get_total_flops()}


def child_malloc(device, repeat, keep):
    """Seconds of a training step of 64 tiles, report features fixed, and of the classifier's forward pass on them.
    keep: whether freed memory is kept; main() sees to it before anything is built."""
    return {name: median([seconds(function, device) for _ in range(repeat + 1)][1:])
            for name, function in (("training", training(device, False, 6, batch=64)),
                                   ("inference", classifier(device, batch=64)))}


class TileFiles:
    """`count` JPEG tiles of 224 x 224 pixels, 128 files read round and round, as a data set of (image, 0)."""

    def __init__(self, folder, count, transform):
        self.folder, self.count, self.transform = folder, count, transform
        generator = np.random.default_rng(0)
        for i in range(0 if Path(folder, "127.jpg").exists() else 128):
            coarse = Image.fromarray(generator.integers(90, 250, (28, 28, 3), dtype="uint8")).resize((224, 224))
            pixels = np.asarray(coarse) + generator.integers(-20, 20, (224, 224, 3))
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(f"{folder}/{i}.jpg", quality=90)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with Image.open(f"{self.folder}/{index % 128}.jpg") as image:
            return self.transform(image.convert("RGB")), 0


def child_embed(device, tiles=512, workers=2):
    """Seconds inside the CLIP tower and of the whole loop, for ViT-B/32, the cheapest of the pairing models."""
    clip, inside = load_clip("quilt", "none", device=device), []
    encode = clip.encode_image

    def timed(batch):
        result = []
        inside.append(seconds(lambda: result.append(encode(batch)), device))
        return result[0]
    clip.encode_image = timed
    with tempfile.TemporaryDirectory() as folder:
        data = TileFiles(folder, tiles, clip.preprocess)
        return {"all": seconds(lambda: embed_images(clip, data, 64, workers), device), "tower": sum(inside),
                "tiles": tiles}


def child_slopes(device, workers=2):
    """Seconds of pairing (ViT-B/32, 2,000 reports) and of a training epoch (6 reports a batch) at 1x ... 8x tiles."""
    clip, reports = load_clip("quilt", "none", device=device), unit(2000, device)
    step, transform = training(device, text=True, distinct=6), tile_transform(224, [0.5] * 3, [0.5] * 3)

    def pair(count):
        data = TileFiles(folder, count, clip.preprocess)
        nearest_text(embed_images(clip, data, 32, workers).to(device), reports)

    def epoch(count):
        for x, _ in torch.utils.data.DataLoader(TileFiles(folder, count, transform), BATCH, num_workers=workers):
            step(x.to(device))

    with tempfile.TemporaryDirectory() as folder:
        pair(32), epoch(BATCH)
        return {"pairing": {n: seconds(lambda: pair(n), device) for n in (32, 64, 128, 256)},
                "training": {n: seconds(lambda: epoch(n), device) for n in (16, 32, 64, 128)}}


def child_gpu(device, repeat):
    """Tiles and FLOPs per second in bf16: a training step with report features fixed, and the bare backbone."""
    cuda, found = device != "cpu", {}
    size, rounds, autocast = (256, 10, "cuda") if cuda else (2, 1, "cpu")
    for name in VITS:
        x = images(device, size).contiguous(memory_format=torch.channels_last)
        backbone = adapt(load_backbone(VITS[name], "none"), "ours")
        model = ClipIT(backbone, None, CLASSES, backbone.num_features, TEXT_DIM)
        model = model.to(device, memory_format=torch.channels_last).train()
        plain = plain_vit(name).to(device, memory_format=torch.channels_last).eval()
        t, labels = unit(size, device), torch.randint(CLASSES, (size,), device=device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-3, fused=True)

        def step():
            with torch.autocast(autocast, torch.bfloat16):
                logits, t_hat = model.fuse(model.backbone(x))
            optimizer.zero_grad()
            clipit_loss(logits.float(), labels, t_hat.float(), t)[0].backward()
            nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()

        @torch.inference_mode()
        def forward():
            with torch.autocast(autocast, torch.bfloat16):
                plain(x)

        for kind, function in (("training", step), ("inference", forward)):
            with FlopCounterMode(display=False) as counter:
                function()
            spent = [seconds(lambda: [function() for _ in range(rounds)], device) / rounds for _ in range(repeat + 1)]
            spent = median(spent[1:])
            found[f"{name} {kind}"] = {"tiles": size / spent, "flops": counter.get_total_flops() / spent}
    chip = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {"chip": chip, "peak": next((flops for key, flops in PEAK.items() if key in chip), None), "rows": found}


# ---- The table ------------------------------------------------------------------------------------------------------

def child(*arguments):
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench.py {arguments}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(*cells):
    print(f"{cells[0]:<36}" + "".join(f"{cell:>16}" for cell in cells[1:]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*GROUPS, "malloc", "slopes", "gpu"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *rest = args.child
        if name != "malloc" or rest[-1]:
            keep_freed_memory()
        return print(json.dumps(globals()[f"child_{name}"](*rest)))
    device = args.device
    packages = [f"{name} {version(name) if find_spec(name) else 'not installed'}" for name in ("torch", "timm", "peft")]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device}, "
          f"{', '.join(packages)}; medians of {args.repeat}")
    for group in args.only or [*GROUPS, "malloc", "slopes"] + ["gpu"] * (device != "cpu"):
        print()
        if group in GROUPS:
            times = child("times", group, device, args.repeat)
            reference = next(iter(times.values()))
            row(group, "seconds", "ratio", *(["ratio of FLOPs", "peak GB above"] if group == "train" else []))
            flops = None
            for name, spent in times.items():
                cells = [f"{median(spent):.3f}", f"{median(a / b for a, b in zip(spent, reference)):.4g}"]
                if group == "train":
                    found = child("memory", group, device, name)
                    flops = flops or found["flops"]
                    cells += [f"{found['flops'] / flops:.3f}", f"{found['above'] / 1e9:.2f}"]
                row(name, *cells)
        if group == "pair":
            whole, embed = child("memory", "", device, ""), child("embed", device)
            speed = 2e-9 * TILES * REPORTS * TEXT_DIM / whole["seconds"]
            row("nearest_text, 300,000 tiles", f"{whole['seconds']:.1f}", f"{speed:.0f} GFLOP/s",
                f"{whole['all'] / 1e9:.2f} GB in all")
            row("embed_images, ViT-B/32", f"{embed['all']:.2f}", f"{embed['tiles'] / embed['all']:.1f} tiles/s",
                f"{embed['tower'] / embed['all']:.1%} in tower")
        elif group == "malloc":
            kept, given = child("malloc", device, args.repeat, True), child("malloc", device, args.repeat, False)
            row("a batch of 64, freed memory", "kept", "given back", "ratio")
            for name in kept:
                row(name, f"{kept[name]:.2f}", f"{given[name]:.2f}", f"{given[name] / kept[name]:.2f}")
        elif group == "slopes":
            for kind, spent in child("slopes", device).items():
                (few, least), *_, (many, most) = ((int(count), s) for count, s in spent.items())
                row(f"{kind} of so many tiles", *spent, "hours a million")
                row("seconds", *(f"{s:.2f}" for s in spent.values()), f"{(most - least) / (many - few) / 3.6e-3:.1f}")
        elif group == "gpu":
            found = child("gpu", device, args.repeat)
            row(found["chip"], "tiles/s", "TFLOP/s", "of bf16 peak")
            for name, values in found["rows"].items():
                row(name, f"{values['tiles']:.0f}", f"{values['flops'] / 1e12:.2f}",
                    f"{values['flops'] / found['peak']:.1%}" if found["peak"] else "peak unknown")


if __name__ == "__main__":
    main()

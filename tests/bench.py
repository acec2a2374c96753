"""What the parts of CLIP-IT cost, each beside its reference. Prints figures and asserts nothing.

    python tests/bench.py --only train infer heads pair malloc slopes gpu --device cpu --repeat 3

Entries take turns, so that a machine that wanders slows all alike: a time is the median of its
turns, a ratio the median of the ratios to the first entry in the same turn. GB is the peak above
the built model, in a process of its own. Weights are random: ViT-S/16 at 224, CONCH's text tower
with reports that fill it, LoRA r 16 on both, 16 tiles. The authors' step: every tile's report
encoded, each LoRA branch added as a tensor of its own.
"""
import argparse
import ctypes
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import nn
from torch.utils import flop_counter
from torchvision.io import write_jpeg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clipit import ClipIT, clipit_loss, load_backbone
from data import Tiles
from lora import LoRALinear, inject_lora
from pairing import embed_images, load_clip, nearest_text
from train import forward, train_head

VIT, DIM = "vit_small_patch16_224", 512
# glibc keeps freed memory: no block apart from the heap, which does not shrink and grows by 64 MB
KEEP = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1", MALLOC_TOP_PAD_="67108864")


# Builders of what is measured: each gets the device and returns the function that is timed
def plain(device, train=False, vit=VIT, batch=16, classifier=False):
    """Forward, with `train` backward too, of timm's ViT, or of a Classifier around it."""
    model = timm.create_model(vit, num_classes=0)
    if classifier:
        backbone = load_backbone(vit, "none")
        model = ClipIT(backbone, None, 9, backbone.num_features, DIM)
        model = model.to_classifier(list("ABCDEFGHI"))
    model, x = model.to(device).train(train), torch.randn(batch, 3, 224, 224, device=device)

    def step():
        with torch.set_grad_enabled(train):
            result = model(x)
        if train:
            result.sum().backward()
            model.zero_grad()
    return step


def summed_branch(layer, x):
    return layer.base(x) + F.linear(F.linear(x, layer.lora_A), layer.lora_B) * layer.scale


def adapt(model, kind):
    if kind == "peft":
        from peft import LoraConfig, inject_adapter_in_model
        layers = nn.Linear, nn.Conv2d, nn.Embedding
        names = [name for name, layer in model.named_modules() if isinstance(layer, layers)]
        return inject_adapter_in_model(LoraConfig(r=16, lora_alpha=8, target_modules=names), model)
    inject_lora(model, rank=16, alpha=8)
    for layer in model.modules():
        if kind == "authors" and isinstance(layer, LoRALinear):
            layer.add_branch = partial(summed_branch, layer)


def training(device, distinct=0, kind="ours", vit=VIT, batch=16):
    """train.py's step. distinct: reports in the batch; 0: their features are looked up."""
    backbone, tower, tokens = load_backbone(vit, "none"), None, None
    adapt(backbone, kind)
    if distinct:
        tokens = torch.randint(1, 32_000, (distinct, 127), device=device)  # no pads
        tower = TextTransformer(127, 32007, 768, 12, 12, output_dim=DIM, embed_cls=True)
        adapt(tower, kind)
    model = ClipIT(backbone, tower, 9, backbone.num_features, DIM).to(device).train()
    images = torch.randn(batch, 3, 224, 224, device=device)
    text_emb, tile = torch.randn(batch, DIM, device=device), torch.arange(batch, device=device)
    labels, report = tile % 9, tile % (distinct or batch)
    args = argparse.Namespace(no_text=False, authors=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=1e-4, fused=True)

    def step(x=images):
        if kind == "authors":
            logits, t_hat, t = model.forward_train(x, tokens[report])
        else:
            logits, t_hat, t = forward(model, x, report, text_emb, tokens, args)
        clipit_loss(logits, labels, t_hat, t)[0].backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return step


def head_on_features(device):
    features = dict(zip(("train", "val", "test"), torch.randn(30_000, 384).split(10_000)))
    labels = {split: torch.arange(len(x)) % 9 for split, x in features.items()}
    return lambda: train_head("head", nn.Linear(384, 9), features, labels, 0, 500, patience=500)


def cosines(device, tiles, nearest=True):
    v, t = (torch.randn(count, DIM, device=device) for count in (tiles, 20_000))
    block = torch.empty(1024, 20_000, device=device)
    if nearest:
        return partial(nearest_text, v, t)
    return lambda: [torch.mm(part, t.T, out=block[:len(part)]) for part in v.split(1024)]


def reading(device, tiles, train=False):
    """embed_images (ViT-B/32), or a training epoch (6 reports a batch), of JPEG files."""
    path = f"{os.environ.get('TMPDIR', '/tmp')}/clipit-bench.jpg"
    pixels = F.interpolate(90 + 120 * torch.rand(1, 3, 28, 28), scale_factor=8)[0]
    write_jpeg((pixels + 40 * torch.rand(3, 224, 224)).byte(), path, quality=90)
    clip, backbone = load_clip("quilt", "none", device=device), load_backbone(VIT, "none")
    data = Tiles([path] * tiles, [0] * tiles, ["tissue"], (backbone if train else clip).preprocess)
    if not train:
        return partial(embed_images, clip, data, 64, workers=2)
    step = training(device, distinct=6)
    loader = torch.utils.data.DataLoader(data, batch_size=16, num_workers=2)
    return lambda: [step(images.to(device)) for images, _ in loader]


KEPT, GIVEN = "freed memory kept", "freed memory given back"
TABLES = {
    "train": {"R: all of ViT-S/16": partial(plain, train=True), "F: its forward": plain,
              "step, 6 distinct reports": partial(training, distinct=6),
              "step, 16 distinct reports": partial(training, distinct=16),
              "step, features fixed": training,
              "authors' step": partial(training, distinct=16, kind="authors"),
              **{f"with peft's LoRA, {n or 'fixed'}": partial(training, distinct=n, kind="peft")
                 for n in (6, 16, 0) if find_spec("peft")}},
    "infer": {"F: ViT-S/16, forward": plain, "Classifier": partial(plain, classifier=True)},
    "heads": {"500 steps on stored features": head_on_features, "through the backbone": plain},
    "malloc, training": dict.fromkeys((KEPT, GIVEN), partial(training, batch=64)),
    "malloc, Classifier": dict.fromkeys((KEPT, GIVEN), partial(plain, batch=64, classifier=True)),
    "slopes, embed_images": {f"{n} tiles": partial(reading, tiles=n) for n in (64, 128, 256, 512)},
    "slopes, training": {f"{n} tiles": partial(reading, tiles=n, train=True)
                         for n in (16, 32, 64, 128)},
    "gpu": {f"{vit}, {step.__name__}": partial(step, vit=vit, batch=128)
            for vit in (VIT, "vit_base_patch16_224", "vit_large_patch16_224")
            for step in (training, plain)}}
for n in (20_000, 300_000):
    TABLES[f"pair, {n:,} x 20,000"] = {"matrix product": partial(cosines, tiles=n, nearest=False),
                                       "nearest_text": partial(cosines, tiles=n)}
ALONE = "malloc", "pair, 300"  # timed in processes of their own too, and not in turns
SCALE = {"through the backbone": 500 * 256 / 16}

# PyTorch's counter passes over LoRA's product in place and over attention on a CPU
aten, formulas = torch.ops.aten, flop_counter.flop_registry
formulas[aten.addmm_] = formulas[aten.addmm]
attention = "_scaled_dot_product_flash_attention"
for name in (attention + "{}", attention + "{}_backward"):
    formulas[getattr(aten, name.format("_for_cpu"))] = formulas[getattr(aten, name.format(""))]


def now():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(table, device, repeat, names):
    """Entry -> FLOPs and seconds of the turns; bytes at the peak above the built entries."""
    functions, found = {name: TABLES[table][name](device) for name in names}, {}
    ctypes.CDLL(None).malloc_trim(0)  # what building freed would hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    built = peak_memory(device)
    for name, function in functions.items():  # the run that is counted warms up
        with flop_counter.FlopCounterMode(display=False) as counter:
            function()
        found[name] = counter.get_total_flops() * SCALE.get(name, 1), []
    for _ in range(repeat):
        for name, function in functions.items():
            start = now()
            function()
            found[name][1].append((now() - start) * SCALE.get(name, 1))
    return found, peak_memory(device) - built


def share(device):
    """The share of embed_images' time that is spent inside its tower."""
    embed, spent = reading(device, 512), []
    tower = embed.args[0].image_tower
    tower.register_forward_pre_hook(lambda *_: spent.append(-now()))
    tower.register_forward_hook(lambda *_: spent.append(now()))
    start = now()
    embed()
    return sum(spent) / (now() - start)


def apart(function, *arguments, keep=True):
    """What the function returns in a process of its own, whose malloc keeps freed memory."""
    for name in KEEP:
        os.environ.pop(name, None)
    os.environ |= KEEP if keep else {}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def show(table, device, repeat):
    names, memory, found = list(TABLES[table]), {}, {}
    if table.startswith(("train", *ALONE)):
        for name in names:
            turns = repeat if table.startswith(ALONE) else 0
            alone, memory[name] = apart(measure, table, device, turns, [name], keep=name != GIVEN)
            found |= alone
    if not table.startswith(ALONE):
        found, _ = apart(measure, table, device, repeat, names)
    first_flops, first = found[names[0]]
    print(f"\n{table:<34}     seconds       ratio  ratio of FLOPs     GFLOP/s      GB")
    for name, (flops, seconds) in found.items():
        spent, ratio = median(seconds), median(a / b for a, b in zip(seconds, first))
        print(f"{name:<34}{spent:12.3f}{ratio:12.4g}{flops / first_flops:16.4g}"
              f"{flops / spent / 1e9:12.1f}{memory.get(name, float('nan')) / 1e9:8.2f}", flush=True)


def main():
    groups = ["train", "infer", "heads", "pair", "malloc", "slopes", "gpu"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=groups, default=groups[:-1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.device}, torch "
          f"{torch.__version__}, timm {timm.__version__}; medians of {args.repeat}")
    for table in [name for group in args.only for name in TABLES if name.startswith(group)]:
        show(table, args.device, args.repeat)
    if "slopes" in args.only:
        print(f"embed_images: {apart(share, args.device):.1%} of it inside the tower")


if __name__ == "__main__":
    main()

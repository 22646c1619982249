"""Closed forms: what A1111, Forge and ComfyUI make of a file's tensors and the base weight, in a few lines each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from adapter_specs import SPECS
from torch import Tensor

Tensors = dict[str, Tensor]
Merged = tuple[Tensor, Tensor | None]  # the weight, and what is added to the bias


def core(t: Tensor, out: Tensor, inner: Tensor) -> Tensor:
    """Σ_ij t[i, j, y, x]·out[o, i]·inner[j, c]."""
    return (out @ t.permute(2, 3, 0, 1) @ inner).permute(2, 3, 0, 1)


def lora(w: Tensor, f: Tensors) -> Merged:
    down, up = f["lora_down.weight"], f["lora_up.weight"]
    scale = f["alpha"] / len(down)
    if "lora_mid.weight" in f:
        return w + scale * core(f["lora_mid.weight"], up.flatten(1), down.flatten(1)), None
    return w + scale * (up.flatten(1) @ down.flatten(1)).view(w.shape), None


def loha(w: Tensor, f: Tensors) -> Merged:
    if "hada_t1" in f:
        halves = [core(f[f"hada_t{n}"], f[f"hada_w{n}_a"].T, f[f"hada_w{n}_b"]) for n in (1, 2)]
    else:
        halves = [f[f"hada_w{n}_a"] @ f[f"hada_w{n}_b"] for n in (1, 2)]
    return w + f["alpha"] / len(f["hada_w1_b"]) * (halves[0] * halves[1]).view(w.shape), None


def lokr(w: Tensor, f: Tensors) -> Merged:
    one = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    low = [f[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in f]
    scale = f["alpha"] / len(low[0]) if low else 1.0
    if "lokr_w2" in f:
        two = f["lokr_w2"]
    elif "lokr_t2" in f:
        two = core(f["lokr_t2"], f["lokr_w2_a"].T, f["lokr_w2_b"])
    else:
        two = (f["lokr_w2_a"] @ f["lokr_w2_b"]).view(len(f["lokr_w2_a"]), -1, *w.shape[2:])
    blocks = [torch.cat([number * two for number in row], 1) for row in one]
    return w + scale * torch.cat(blocks, 0), None


def ia3(w: Tensor, f: Tensors) -> Merged:
    return w * (1 + (f["weight"] if f["on_input"] else f["weight"][:, None])), None


def glora(w: Tensor, f: Tensors) -> Merged:
    return w + w @ f["a2.weight"] @ f["a1.weight"] + f["b2.weight"] @ f["b1.weight"], None  # A1111 counts no alpha


def full(w: Tensor, f: Tensors) -> Merged:
    return w + f["diff"], f.get("diff_b")


def norm(w: Tensor, f: Tensors) -> Merged:
    return w + f["w_norm"], f["b_norm"]


def cayley(blocks: Tensor) -> Tensor:
    q, one = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1])
    return torch.linalg.solve(one - q, one + q, left=False)


def oft(w: Tensor, f: Tensors) -> Merged:
    assert f["alpha"] == 0
    return (torch.block_diag(*cayley(f["oft_blocks"])).T @ w.flatten(1)).view(w.shape), None


def boft(w: Tensor, f: Tensors) -> Merged:
    """Stage i swaps the two halves of groups of 2ⁱ·b: a permutation matrix, its blocks, and the permutation back."""
    turned, (_, _, size, _) = w.flatten(1), f["oft_blocks"].shape
    for stage, blocks in enumerate(cayley(f["oft_blocks"])):
        order = torch.arange(len(w)).view(-1, 2, 2**stage * size // 2).transpose(1, 2).flatten()
        there = torch.eye(len(w))[order]
        turned = there.T @ torch.block_diag(*blocks) @ there @ turned
    return turned.view(w.shape), None


READERS: dict[str, Callable[[Tensor, Tensors], Merged]] = {
    "lierla": lora, "c3lier": lora, "dylora": lora, "loha": loha, "lokr": lokr, "eh": lokr, "ia3": ia3,
    "glora": glora, "full": full, "norm": norm, "oft": oft, "boft": boft,
}  # fmt: skip


def merged(kind: str, w: Tensor, f: Tensors) -> Merged:
    """The weight W′ of a file; with DoRA by rows or columns, as the shape of its lengths says."""
    weight, shift = READ[kind](w, f)
    if "dora_scale" in f:
        lengths = f["dora_scale"]
        over = [axis for axis, size in enumerate(lengths.shape) if size == 1]
        weight = weight * lengths / weight.square().sum(over, keepdim=True).sqrt()
    return weight, shift


PLAIN = ("null", "universal", "experts")  # their files are plain LoRAs, whatever they are made of
READ = {**READERS, **dict.fromkeys(PLAIN, lora)}
OURS = {name: spec for name, spec in SPECS.items() if spec.type in READ}

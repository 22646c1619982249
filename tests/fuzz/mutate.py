"""Mutations that know what they change: JSON values, bytes, named tensors, the header of a safetensors file."""

from __future__ import annotations

import json
import struct
from random import Random

import torch
from torch import Tensor

HOME_OF_NOBODY = "~nosuchuser/x"
TEXTS = (
    "", " ", "None", "nan", "1e999", "-1", "0", "１２", "true", "x" * 300, "a" * 5000, HOME_OF_NOBODY,
    "../../etc/passwd", "/dev/null", "C:\\x", "\\\\host\\share", "a\x00b", "\ud800", "😀", "$x^2$", "<b>", "a\nb",
    "con", "%s{0}", "*",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 255, 10**4, 10**6, 2**31, -(2**31), 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-9, 1e-320,
    1e30, 1e308, -1e308,
)  # fmt: skip
TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 400 + "]" * 400, "01", "'x'", "{", "]", "nul")
"""What `json.dumps` never writes."""


def nested(rng: Random) -> object:
    value: object = rng.choice([1, "x", []])
    for _ in range(rng.choice([3, 50, 150, 600])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def odd(rng: Random) -> object:
    """A value nobody expects."""
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice([None, True, False, [], {}, [[]], {"a": {}}])
    if kind == 5:
        return [odd(rng) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {str(rng.choice(TEXTS)): odd(rng) for _ in range(rng.randrange(3))}
    return nested(rng) if rng.random() < 0.2 else rng.choice(NUMBERS)


def changed(rng: Random, value: object, rate: float = 0.1) -> object:
    """A JSON value with some of its parts replaced, dropped, doubled or under other names."""
    if rng.random() < rate / 2:
        return odd(rng)
    if isinstance(value, dict):
        made: dict[object, object] = {}
        for key, part in value.items():
            if rng.random() < rate / 2:
                continue
            name = rng.choice(TEXTS) if rng.random() < rate / 3 else key
            made[name] = odd(rng) if rng.random() < rate else changed(rng, part, rate)
        if rng.random() < rate:
            made[rng.choice(TEXTS)] = odd(rng)
        return made
    if isinstance(value, list):
        made_list = [changed(rng, part, rate) for part in value if rng.random() > rate / 2]
        return made_list * rng.choice([1, 1, 1, 2, 20]) if _small(made_list) else made_list
    if rng.random() < rate:
        return near(rng, value)
    return value


def _small(value: object, most: int = 200) -> bool:
    """Whether a value has fewer parts than that, at all depths: lists in lists that are repeated again and again would
    make texts of gigabytes.
    """
    left = [value]
    for _ in range(most):
        if not left:
            return True
        part = left.pop()
        if isinstance(part, (list, dict)):
            left.extend(part.values() if isinstance(part, dict) else part)
    return not left


def near(rng: Random, value: object) -> object:
    """Something like the value: another number, a text with a change in it, another type."""
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None, "true", 1])
    if isinstance(value, (int, float)):
        half = value / 2 if abs(value) < 2**60 else 0
        return rng.choice([value + 1, -value, value * 1000, str(value), [value], half, rng.choice(NUMBERS)])
    if isinstance(value, str):
        return rng.choice(
            [value.upper(), value[: len(value) // 2], value * 3, f"{value}/{value}", [value], f" {value}"]
        )
    return odd(rng)


def as_json(rng: Random, value: object, rate: float = 0.1) -> bytes:
    """The text of a changed JSON value, now and then with a change of its bytes too."""
    text = json.dumps(changed(rng, value, rate), ensure_ascii=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.1:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(TOKENS) + text[at:]
    data = text.encode("utf-8", "surrogatepass")
    return raw(rng, data) if kind > 0.85 else data


def raw(rng: Random, data: bytes) -> bytes:
    """Bytes with some of them flipped, cut out, doubled, set to extremes, or cut off."""
    body = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        size = len(body)
        at = rng.randrange(size) if size else 0
        kind = rng.randrange(8)
        if kind == 0 and size:
            body[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            body[at : at + rng.choice([1, 2, 4, 8])] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * rng.choice(
                [1, 2, 4, 8]
            )
        elif kind == 2:
            del body[at : at + rng.choice([1, 4, 64, 1024])]
        elif kind == 3:
            body[at:at] = rng.randbytes(rng.choice([1, 4, 32]))
        elif kind == 4:
            body[at:at] = body[at : at + rng.choice([4, 64, 512])]
        elif kind == 5 and rng.random() < 0.3:
            del body[at:]
        elif kind == 6:
            number = rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1, 10**9])
            body[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), number)
        elif size:
            body[at] = rng.randrange(256)
    return bytes(body)


DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.float8_e4m3fn,
)  # fmt: skip


def tensor(rng: Random, given: Tensor) -> Tensor:
    """A tensor of another shape or type, or with numbers that are none."""
    kind = rng.randrange(9)
    if kind == 0:
        return given.float().reshape(-1)[: rng.randrange(3)].clone()
    if kind == 1:
        return torch.zeros([rng.choice([0, 1, 2, 3, 8]) for _ in range(rng.randrange(6))])
    if kind == 2:
        return torch.tensor(rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30, 4.0]))
    if kind == 3:
        return given.to(rng.choice(DTYPES))
    if kind == 4:
        return given.float().T.contiguous() if given.ndim == 2 else given.float()[None].clone()
    if kind == 5:
        return torch.full_like(given.float(), rng.choice([float("nan"), float("inf"), 1e38, -1e38, 0.0, 65504.0]))
    if kind == 6:
        return given[1:].clone() if given.ndim and len(given) > 1 else given.clone()
    if kind == 7:
        return torch.cat([given, given]) if given.ndim else given.repeat(2)
    return given.clone() * rng.choice([0, 1e-20, 1e10, -1])


def tensors(rng: Random, given: dict[str, Tensor], rate: float = 0.1) -> dict[str, Tensor]:
    """Named tensors with some changed, dropped, renamed or under further names."""
    made = {}
    names = list(given)
    picked = set(rng.sample(names, min(len(names), rng.choice([1, 1, 2, 5])))) if names else set()
    for name, value in given.items():
        if name not in picked and rng.random() > rate / 4:
            made[name] = value
            continue
        kind = rng.random()
        if kind < 0.5:
            made[name] = tensor(rng, value)
        elif kind < 0.65:
            continue
        elif kind < 0.8:
            head, _dot, tail = name.rpartition(".")
            other = rng.choice(names).rpartition(".")
            made[rng.choice([f"{head}.{other[2]}", f"{other[0]}.{tail}", f"{name}.{tail}", tail, f"{name}_x"])] = value
        else:
            made[name] = value
            tail = rng.choice(["alpha", "weight", "bias", "dora_scale", "scale_weight", "x"])
            made[f"{name.rpartition('.')[0]}.{tail}"] = tensor(rng, value)
    return made


def safetensors(rng: Random, data: bytes) -> bytes:
    """The bytes of a safetensors file with a change in its header, its length or its body."""
    length = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.5:
        header = as_json(rng, json.loads(data[8 : 8 + length]), 0.02)
        size = rng.choice([len(header), len(header), len(header), 0, 2**40, len(header) * 2])
        return size.to_bytes(8, "little") + header + data[8 + length :]
    if kind < 0.75:
        return data[: rng.randrange(len(data) + 1)]
    return raw(rng, data)

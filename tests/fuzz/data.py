"""Readers of data: pictures of all formats, captions, loss logs, caches, the queue's files."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from data_pictures import noise
from PIL import Image, features
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors

from trainer.cli.worker import Bench
from trainer.data.buckets import place
from trainer.data.cache import TensorCache, fingerprint
from trainer.data.images import decode, decode_with_alpha, fit, read_size
from trainer.data.scan import scan
from trainer.data.settings import ImageSettings
from trainer.engine import costs
from trainer.engine.catalogue import catalogue
from trainer.engine.memory import remembered
from trainer.jobs.entry import STATES, new_entry
from trainer.jobs.queue import Queue
from trainer.jobs.store import open_store
from trainer.params.codec import load
from trainer.tools.picture_files import check_picture
from trainer.ui import plot, views

from . import mutate
from .settings import base, places

FORMATS = {
    ".png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), ".jpg": ("RGB", "L", "CMYK"), ".webp": ("RGB", "RGBA"),
    ".gif": ("P", "L"), ".bmp": ("RGB", "L", "P"), ".tiff": ("RGB", "RGBA", "L", "I;16", "F", "CMYK"),
    ".pcx": ("RGB", "L", "P"), ".ico": ("RGBA",), ".avif": ("RGB", "RGBA"),
}  # fmt: skip
BOMBS = (
    (1, 178_956_970),
    (178_956_970, 1),
    (13_377, 13_377),
    (60_000, 60_000),
    (2**31 - 1, 2**31 - 1),
    (32_768, 20_000),
)


def picture(rng: Random, suffix: str) -> bytes:
    """A small picture of a format."""
    mode, size = rng.choice(FORMATS[suffix]), (rng.choice([1, 5, 16, 40]), rng.choice([1, 7, 16, 33]))
    plain = mode in ("I;16", "F", "P")
    image = noise(size, rng.randrange(99), "L" if plain else "L" if mode == "1" else mode)
    image = (
        image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode) if plain or mode == "1" else image
    )
    options: dict[str, object] = {}
    if suffix == ".jpg" and rng.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(0, 10)
        options = {"exif": exif, "progressive": rng.random() < 0.5}
    if suffix in (".gif", ".webp") and rng.random() < 0.3:
        options = {"save_all": True, "append_images": [image.copy()]}
    if suffix == ".png" and rng.random() < 0.3:
        options = {"transparency": 3} if mode in ("L", "P") else {}
    target = io.BytesIO()
    image.save(target, {".jpg": "JPEG", ".tiff": "TIFF"}.get(suffix, suffix[1:].upper()), **options)
    return target.getvalue()


def bomb(rng: Random) -> tuple[bytes, str]:
    """A small file that says it is large, or really is."""
    width, height = rng.choice(BOMBS)
    kind = rng.randrange(6)
    if kind < 3:
        head = struct.pack(
            ">IIBBBBB",
            width & 0x7FFFFFFF,
            height & 0x7FFFFFFF,
            rng.choice([8, 16]),
            rng.choice([0, 2, 6]),
            0,
            0,
            kind % 2,
        )
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(rng.choice([10, 10**6])))), (b"IEND", b"")]
        if kind == 2:
            chunks.insert(1, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))))
        made = b"\x89PNG\r\n\x1a\n"
        for name, data in chunks:
            made += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        if kind == 1 and rng.random() < 0.5:
            return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(made), 22) + made, ".ico"
        return made, ".png"
    if kind == 3:
        return b"BM" + struct.pack("<IHHIIiiHHIIIIII", 60, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0), ".bmp"
    if kind == 4:
        return b"GIF89a" + struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0x80, 0, 0) + bytes(
            6
        ) + b",\0\0\0\0" + (struct.pack("<HHB", 65535, 65535, 0) + b"\x02\x02\x44\x01\0;"), ".gif"
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 2**20),
        (323, 2**20),
        (324, 8),
        (325, 10),
    ]
    body = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    return body + b"".join(struct.pack("<HHII", tag, 4, 1, value & 0xFFFFFFFF) for tag, value in tags) + bytes(
        4
    ), ".tiff"


class Pictures:
    """Picture files of every format that is read, and bombs."""

    name, cost = "pictures", 0.004

    def __init__(self, root: Path) -> None:
        self.folder = root / "pictures"
        self.folder.mkdir()
        self.suffixes = [suffix for suffix in FORMATS if suffix != ".avif" or features.check("avif")]

    def make(self, rng: Random) -> Callable[[], object]:
        if rng.random() < 0.03:
            data, suffix = bomb(rng)
        else:
            suffix = rng.choice(self.suffixes)
            data = picture(rng, suffix)
            if rng.random() < 0.95:
                data = mutate.raw(rng, data) if rng.random() < 0.8 else data[: rng.randrange(len(data))]
            if rng.random() < 0.05:
                suffix = rng.choice(self.suffixes)
        path = self.folder / f"a{suffix}"
        path.write_bytes(data)
        return lambda: self._read(path, data)

    def _read(self, path: Path, data: bytes) -> None:
        size = read_size(path)
        rgb, mask = decode(data)
        fit(rgb, mask, place(size, (64, 64)))
        check_picture(path.name, data)
        decode_with_alpha(data)


class Captions:
    """Caption files beside a picture, of any bytes and names."""

    name, cost = "captions", 0.002

    def __init__(self, root: Path) -> None:
        self.folder = root / "captions"

    def make(self, rng: Random) -> Callable[[], object]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        stem = rng.choice(["a", "ねこ", "a.b", "a_id_1", "-", "a" * 200, "a\nb"])
        noise((4, 4)).save(self.folder / f"{stem}.png")
        text = rng.choice(["a cat, b", "x" * 10**5, "\\(a\\)", "é\u0301", "", *mutate.TEXTS])
        data = text.encode(rng.choice(["utf-8", "utf-16", "utf-8-sig", "utf-16-be"]), "surrogatepass")
        if rng.random() < 0.7:
            data = mutate.raw(rng, data)
        (self.folder / f"{stem}{rng.choice(['.txt', '.caption', '.TXT'])}").write_bytes(data)
        return lambda: scan(ImageSettings(self.folder, filename_as_tag=rng.random() < 0.1)).summary()


class Logs:
    """CSV logs: read, drawn, with names of any kind."""

    name, cost = "csv_logs", 0.12

    def __init__(self, root: Path) -> None:
        import matplotlib.font_manager  # noqa: F401 (looks for fonts when it is loaded, with a program)

        self.path = root / "log.csv"

    def make(self, rng: Random) -> Callable[[], object]:
        rows = [f"{n},{rng.random()},1e-4,5e-5" for n in range(1, rng.choice([2, 5, 40]))]
        rows = [
            rng.choice(
                [
                    row,
                    row,
                    f"{row},{rng.choice(mutate.NUMBERS)}",
                    f"1e308,{rng.choice(mutate.NUMBERS)}",
                    f"{rng.choice(mutate.NUMBERS)},1e308,{rng.choice(mutate.TEXTS)}",
                ]
            )
            for row in rows
        ]
        head = ["network_rank,16", 'save_lora_name,"a', "Step,Loss,Learning Rate 1,Learning Rate 2"]
        head = [line for line in head if rng.random() > 0.05]
        data = "\n".join([*head, *rows, ""]).encode("utf-8", "replace")
        if rng.random() < 0.7:
            data = mutate.raw(rng, data)
        self.path.write_bytes(data)
        names = [f"{rng.choice(mutate.TEXTS)}{rng.choice(['', '$a', '_', '$x_{$'])}.csv" for _ in range(2)]
        settings = plot.PlotSettings(rng.choice([0, 0.5, 0.98]), rng.random() < 0.5, rng.random() < 0.5)
        drawn = rng.random() < 0.3
        return lambda: self._read(names, settings, drawn)

    def _read(self, names: list[str], settings: plot.PlotSettings, drawn: bool) -> None:
        logs = [plot.load_log(self.path, name) for name in names]
        if drawn:
            plot.draw(logs, settings)


class Caches:
    """What is kept for the next run: encoded pictures, predictions of memory, what a run took."""

    name, cost = "cache_files", 0.003

    def __init__(self, root: Path) -> None:
        self.folder = root / "cache"
        self.cache, self.key = TensorCache(self.folder, hold_bytes=0), fingerprint(a=1)
        self.cache.put(self.key, {"mean": torch.randn(4, 8, 8), "std": torch.rand(4, 8, 8)})
        self.entry = next(self.folder.glob("*.safetensors"))
        self.whole = self.entry.read_bytes()
        self.job = load({**base(Random(0)), "mode": "LoRA"}, catalogue(), complete=False).job

    def make(self, rng: Random) -> Callable[[], object]:
        kind = rng.randrange(3)
        if kind == 0:
            self.entry.write_bytes(mutate.safetensors(rng, self.whole))
            return self._tensors
        if kind == 1:
            remembered(self.folder, {"a": 1}, lambda: 12345)
            next(self.folder.glob("memory-*.txt")).write_bytes(
                rng.choice([mutate.raw(rng, b"12345"), b"9" * 5000, b"\xff", b"-1", b"", "１２".encode(), b"1e9"])
            )
            return self._number
        device, cost = torch.device("cpu"), {"before": 1.5, "per_step": 0.2, "memory_mb": 100}
        costs._file(self.job, device, self.folder).write_bytes(mutate.as_json(rng, cost, 0.3))
        return lambda: costs.plain(self.job, costs.known(self.job, device, self.folder))

    def _tensors(self) -> None:
        found = self.cache.get(self.key)
        good = parse_tensors(self.whole)
        if found is not None and any(not torch.equal(found[name], good[name]) for name in good):
            raise ValueError("a damaged entry of the cache was believed")

    def _number(self) -> None:
        if not 0 <= remembered(self.folder, {"a": 1}, lambda: 12345) < 2**63:
            raise ValueError("no number of bytes")


class QueueFiles:
    """Files in the queue's folder, up to what the page asks for."""

    name, cost = "queue_files", 0.01

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, 0

    def make(self, rng: Random) -> Callable[[], object]:
        self.number += 1
        folder = self.root / f"queue{self.number % 50}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        entry = new_entry(base(rng))
        entry = dataclasses.replace(
            entry, state=rng.choice(sorted(STATES)), folder=str(self.root), path=str(self.root / "x")
        )
        raw = entry.to_dict()
        for name in ("folder", "path", "error", "step", "order", "added"):
            if rng.random() < 0.15:
                raw[name] = rng.choice([*mutate.TEXTS, *mutate.NUMBERS, 10**399])
        name = entry.id if rng.random() < 0.9 else rng.choice(["x", "😀", "0" * 12 + "-" + "0" * 8])
        (folder / f"{name}.json").write_bytes(mutate.as_json(rng, raw, 0.01))
        return lambda: self._read(folder)

    def _read(self, folder: Path) -> None:
        host = _Host(self.root)
        queue = Queue(open_store(folder), Bench(host))
        try:
            for entry in (*queue.waiting(), *queue.ended(), *queue.resume_offer()):
                views.entry(entry, 0, queue.can_resume(entry), host.places(), catalogue())
            json.dumps(list(queue.problems))
        finally:
            queue.close(10)


class _Host:
    """What a queue that runs nothing asks of its host."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def places(self):
        return places(self.root)


def packed(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file."""
    return pack_tensors({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, metadata)

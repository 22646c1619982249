"""Readers of base models: single files, pickles, diffusers folders, vocabularies, schedulers, single parts."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import ClassVar

import tiny
import torch
from safetensors import safe_open

from trainer.engine.preflight import _window
from trainer.models.families.sd1 import SD1
from trainer.models.live import is_clip, is_vae
from trainer.models.load import load_model
from trainer.models.noise import noise_of_file, noise_of_scheduler, process_of
from trainer.models.single import read_single, read_tensors, read_vae
from trainer.models.texts import replace_texts
from trainer.models.tokenizer import Tokenizer, read_vocabulary, tokenizer_beside

from . import mutate
from .data import packed


class Checkpoints:
    """Pickled checkpoints in both layouts: mutated pickles, records, and calls of anything."""

    name, cost = "ckpts", 0.004

    def __init__(self, root: Path) -> None:
        self.path = root / "a.ckpt"
        weights = {f"w{n}": torch.randn(4, 8).to(kind) for n, kind in enumerate(mutate.DTYPES)}
        content = {"state_dict": OrderedDict(weights), "epoch": 3, "callbacks": {"a": [1, 2.5, None, {"b": "c"}]}}
        self.whole = []
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            self.whole.append(buffer.getvalue())

    def make(self, rng: Random) -> Callable[[], object]:
        zipped, plain = self.whole
        kind = rng.randrange(6)
        if kind == 0:
            data = mutate.raw(rng, zipped)
        elif kind == 1:
            data = mutate.raw(rng, plain)
        elif kind == 2:
            data = rng.choice(self.whole)
            data = data[: rng.randrange(len(data))]
        else:
            data = self._changed(rng, kind)
        self.path.write_bytes(data)
        return lambda: [tensor.float().sum() for tensor in read_tensors(self.path)[0].values()]

    def _changed(self, rng: Random, kind: int) -> bytes:
        """The zip layout with a record changed, packed, or its pickle in the place of another."""
        target = io.BytesIO()
        packed_too = kind == 5 and rng.random() < 0.5
        with zipfile.ZipFile(io.BytesIO(self.whole[0])) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                held = old.read(name)
                if name.endswith("data.pkl"):
                    held = self._pickle(rng, held, kind)
                elif rng.random() < 0.1:
                    held = mutate.raw(rng, held)
                new.writestr(name, held, zipfile.ZIP_DEFLATED if packed_too else zipfile.ZIP_STORED)
        data = bytearray(target.getvalue())
        if packed_too and rng.random() < 0.7:  # the directory tells less or more than there is
            at = data.rfind(b"PK\x01\x02")
            data[at + 24 : at + 28] = struct.pack("<I", rng.choice([0, 10, 2**31, 2**32 - 1]))
        return bytes(data)

    def _pickle(self, rng: Random, held: bytes, kind: int) -> bytes:
        if kind == 3:
            return mutate.raw(rng, held)
        call = rng.choice([
            b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", b"cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R",
            b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R", b"cpytorch_lightning.callbacks\nA\n)\x81}b",
            b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R", b"]" + b"(2" * 50, b"r\xff\xff\xff\x7f",
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", b"N0" * 20000, b"ccollections\nOrderedDict\n]\x85R",
            b"(" * 3000, b"\x85" * 200, b"I99999\n", pickle.dumps(set(range(9)), 4)[2:-1], b"cnumpy\nload\n)R",
        ])  # fmt: skip
        place = held.find(b"}", 2) + 1
        return held[:place] + call + b"0" + held[place:]


class Models:
    """Whole models in one file."""

    name, cost = "models", 0.15

    def __init__(self, root: Path) -> None:
        self.path, self.places = root / "model.safetensors", [tiny.vocabulary(root / "words")]
        self.whole = {kind: tiny.checkpoint(kind) for kind in tiny.KINDS}

    def make(self, rng: Random) -> Callable[[], object]:
        given = self.whole[rng.choice(tiny.KINDS)]
        metadata = {"modelspec.prediction_type": str(rng.choice(mutate.TEXTS))} if rng.random() < 0.1 else None
        metadata = {k: v.encode("utf-8", "replace").decode() for k, v in metadata.items()} if metadata else None
        data = packed(mutate.tensors(rng, given, 0.002), metadata)
        self.path.write_bytes(data if rng.random() < 0.8 else mutate.safetensors(rng, data))
        return self._read

    def _read(self) -> None:
        is_vae(self.path), is_clip(self.path)
        model = load_model(self.path, vocabularies=self.places)
        model.encode_prompts(["a red ring"])


class Parts:
    """A VAE or text encoders in files of their own, put into a model."""

    name, cost = "model_parts", 0.04

    def __init__(self, root: Path) -> None:
        self.path, self.base = root / "part.safetensors", tiny.single_file("sd1", root / "base.safetensors")
        whole = tiny.checkpoint("sd1")
        self.texts = {
            name.removeprefix("cond_stage_model."): t for name, t in whole.items() if name.startswith("cond_stage")
        }
        self.vae = {
            name.removeprefix("first_stage_model."): t for name, t in whole.items() if name.startswith("first_")
        }

    def make(self, rng: Random) -> Callable[[], object]:
        given = rng.choice([self.texts, self.vae])
        data = packed(mutate.tensors(rng, given, 0.01))
        self.path.write_bytes(data if rng.random() < 0.7 else mutate.safetensors(rng, data))
        if given is self.vae:
            return lambda: read_vae(self.path)
        return lambda: replace_texts(read_single(self.base), [self.path])


class Folders:
    """Diffusers folders whose configurations, vocabularies and weights are changed."""

    name, cost = "model_folders", 0.12

    def __init__(self, root: Path) -> None:
        self.root = root / "folders"
        for kind in tiny.KINDS:
            tiny.folder(kind, self.root / kind)
        self.copy = self.root / "copy"

    def make(self, rng: Random) -> Callable[[], object]:
        kind = rng.choice(tiny.KINDS)
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.root / kind, self.copy)
        texts = sorted(path for path in self.copy.rglob("*") if path.suffix in (".json", ".txt"))
        weights = sorted(self.copy.rglob("*.safetensors"))
        for _ in range(rng.choice([1, 1, 2])):
            path = rng.choice(texts) if rng.random() < 0.85 else rng.choice(weights)
            self._change(rng, path)
        return self._read

    def _change(self, rng: Random, path: Path) -> None:
        data = path.read_bytes()
        if rng.random() < 0.05:
            path.unlink(missing_ok=True)
        elif path.suffix == ".json" and data and rng.random() < 0.8:
            try:
                path.write_bytes(mutate.as_json(rng, json.loads(data), 0.05))
            except ValueError:  # changed before
                path.write_bytes(mutate.raw(rng, data))
        elif path.suffix == ".safetensors" and rng.random() < 0.5:
            with safe_open(path, framework="pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            path.write_bytes(packed(mutate.tensors(rng, held, 0.01)))
        else:
            path.write_bytes(rng.choice([mutate.raw(rng, data), data[: len(data) // 2], b"", b"\xff\xfe"]))

    def _read(self) -> None:
        _window(self.copy)
        tokenizer_beside(self.copy)
        model = load_model(self.copy)
        model.encode_prompts(["a red ring"])


class Vocabularies:
    """Files of tokenizers."""

    name, cost = "vocabularies", 0.006

    def __init__(self, root: Path) -> None:
        self.folder = root / "vocabulary"
        self.folder.mkdir()
        ids = tiny.token_ids()
        self.ids = {name: ids[name] for name in (*list(ids)[:40], *list(ids)[-2:])}
        self.merges = [["!", '"'], ["#", "$"]]

    def make(self, rng: Random) -> Callable[[], object]:
        for path in self.folder.glob("*"):
            path.unlink()
        (self.folder / "special_tokens_map.json").write_bytes(mutate.as_json(rng, {"pad_token": {"content": "!"}}, 0.1))
        if rng.random() < 0.5:
            (self.folder / "vocab.json").write_bytes(mutate.as_json(rng, self.ids, 0.01))
            lines = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in self.merges) * rng.choice([0, 1])
            (self.folder / "merges.txt").write_bytes(rng.choice([lines.encode(), mutate.raw(rng, lines.encode())]))
        else:
            model = {
                "model": {"vocab": self.ids, "merges": rng.choice([self.merges, [" ".join(p) for p in self.merges]])}
            }
            (self.folder / "tokenizer.json").write_bytes(mutate.as_json(rng, model, 0.01))
        return self._read

    def _read(self) -> None:
        found = read_vocabulary(self.folder)
        if found is not None:
            Tokenizer(found, "eos").chunks("a red ring " * 40, 77)


class Schedules:
    """What lies beside a model and says how it predicts."""

    name, cost = "schedules", 0.002
    CONFIG: ClassVar[dict[str, object]] = {
        "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False, "trained_betas": None,
    }  # fmt: skip

    def __init__(self, root: Path) -> None:
        self.path = root / "beside.safetensors"

    def make(self, rng: Random) -> Callable[[], object]:
        config = mutate.changed(rng, {**self.CONFIG, "trained_betas": rng.choice([None, [0.1, 0.2, 0.3]])}, 0.2)
        if isinstance(config, dict) and rng.random() < 0.6:
            return lambda: process_of(noise_of_scheduler(config), SD1, False)
        suffix = rng.choice([".yaml", ".yml", ".json"])
        text = b'parameterization: "v"\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n'
        data = mutate.as_json(rng, {"prediction_type": "v"}, 0.3) if suffix == ".json" else mutate.raw(rng, text)
        for left in self.path.parent.glob("beside.*"):
            left.unlink()
        self.path.with_suffix(suffix).write_bytes(data)
        return lambda: process_of(noise_of_file({"x"}, {}, self.path), SD1, False)

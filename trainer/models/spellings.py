"""Names other programs give the layers of a model in their LoRA files; see `Layer.also`.

Every one is the name of a layer alone: what follows it (`.lora_down.weight`, `.lora_A.weight`, `.hada_w1_a` …) is the
adapters' business.
"""

from __future__ import annotations

from .family import TextRow


def flat(path: str) -> str:
    """A module path as kohya writes it."""
    return path.replace(".", "_")


def unet_spellings(path: str, sgm: str) -> tuple[str, ...]:
    """All names of a UNet layer, from its diffusers path and its LDM/sgm one.

    kohya (both spellings), kohya's OFT, LyCORIS alone, OneTrainer (its dotted and its OMI format), ComfyUI, diffusers,
    PEFT, and sd-trainer's EH.
    """
    kohya = tuple(f"{prefix}_unet_{flat(name)}" for prefix in ("lora", "oft", "EH") for name in (path, sgm))
    alone = (f"lycoris_{flat(path)}", path)
    dotted = (f"unet.{path}", f"unet.{sgm}", f"lora_unet.{path}", f"diffusion_model.{sgm}", f"diffusion_model.{path}")
    return (*kohya, *alone, *dotted)


def text_spellings(row: TextRow, path: str, single: bool) -> tuple[str, ...]:
    """All names of a text encoder's layer, from its path without `text_model.`, which transformers 5 leaves out.

    `single`: the model has one text encoder, so that names without any prefix can only mean it.
    """
    full = f"text_model.{path}"
    found = [f"{row.kohya}_{flat(full)}", f"{row.kohya}.{full}", f"{row.clip}.{full}", f"{row.kohya}_{flat(path)}"]
    found += [f"{row.folder}.{full}", f"{row.folder}.{path}", f"text_encoders.{row.clip}.transformer.{full}"]
    if single:
        found += [f"lora_te1_{flat(full)}", f"lycoris_{flat(full)}", f"lycoris_{flat(path)}", full, path]
    return tuple(found)

"""Images with transparent parts: they are trained as white, which is said once, before the first step."""

from __future__ import annotations

from pathlib import Path

import engine_case
import pytest
from engine_case import Case
from PIL import Image

from trainer.events import Event, Note, Step

PAIRED = {"image_size(height, width)": 64, "train_iterations": 2, "train_batch_size": 1, "data_cache": "disk"}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Six pictures, of which the first two are cut out; the same as pairs."""
    made = engine_case.make(tmp_path)
    for number, path in enumerate(sorted(made.pictures.glob("*.png"))[:2]):
        picture = Image.open(path).convert("RGBA")
        picture.paste((0, 0, 0, 0), (0, 0, 20 + number, 64))
        picture.save(path)
    return made


def warnings(case: Case, dry: bool = False, **changes: object) -> list[str]:
    """The warnings about transparency, which come before the first step."""
    told: list[str] = []

    def listen(event: Event) -> None:
        assert not isinstance(event, Step) or told
        if isinstance(event, Note) and event.level == "warning" and "transparent" in event.text:
            told.append(event.text)

    case.run(listen, dry=dry, **{**PAIRED, **changes})
    return told


def test_a_folder_with_cut_out_images_is_warned_of_once_also_from_the_cache(case: Case) -> None:
    names = [path.name for path in sorted(case.pictures.glob("*.png"))[:2]]
    (first,) = warnings(case, image_mirroring=True, sub_image_num=0)
    assert f"Images with transparent parts: 2 ({', '.join(names)})." in first and "white" in first
    (cached,) = warnings(case, dry=True, save_lora_name="again", image_mirroring=True)
    assert cached == first
    twin = case.pictures / "twin.png"  # the same content is encoded once
    twin.write_bytes((case.pictures / names[0]).read_bytes())
    (three,) = warnings(case, dry=True, save_lora_name="again")
    assert "parts: 3 (" in three and "twin.png" in three


@pytest.mark.parametrize("mode", ["ADDifT", "Difference"])
def test_a_pair_is_warned_of_once_in_all_its_passes(case: Case, mode: str) -> None:
    one, other = sorted(case.pictures.glob("*.png"))[:2]
    pair = {"mode": mode, "original image": str(one), "target image": str(other), "lora_data_directory": ""}
    (told,) = warnings(case, **pair)
    assert f"parts: 2 ({one.name}, {other.name})" in told


def test_what_traintrains_mask_leaves_out_is_not_learned_as_white(case: Case) -> None:
    for path in sorted(case.pictures.glob("*.png")):
        picture = Image.open(path)
        picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path.with_name(f"{path.stem}_t.png"))
    pairs = {"mode": "Multi-ADDifT", "diff_target_name": "_t", "dry": True}
    (told,) = warnings(case, **pairs)
    assert "parts: 4 (" in told
    assert warnings(case, **pairs, train_traintrain_compatible=True, diff_use_diff_mask=True) == []
    (again,) = warnings(case, **pairs, train_traintrain_compatible=True)
    assert again == told


def test_opaque_images_and_prompts_are_not_warned_of(tmp_path: Path) -> None:
    plain = engine_case.make(tmp_path)
    assert warnings(plain, dry=True) == []
    erased = {"mode": "iLECO", "original prompt": "a ring", "lora_data_directory": "", "train_iterations": 1}
    assert warnings(plain, dry=True, **erased) == []

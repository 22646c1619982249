"""What the tensors of a LoRA file stand for, one layer at a time and without a model: ΔW of every form that is read.

A form is a set of tensor names (ours, see `foreign`; without the layer's key). Several network types write one: lora is
the form of lierla, c3lier, dylora, null, universal and experts. ΔW is float32 and counts alpha; a strength κ is κ·ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import AdapterError, brief
from ..maths.hadamard import hadamard_delta, plain_factors
from ..maths.kron import kron_delta
from ..maths.lowrank import LowRank, cored, low_rank_delta
from ..maths.magnitude import decomposed
from ..maths.rotation import butterfly, cayley_minus_identity, turn
from ..maths.subspace import product_norm
from .checked import SINGLE, check_forms, single

DOWN, UP, MID, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"
HADAMARD, CORES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")
PLAIN = frozenset({DOWN, UP, ALPHA})
"""What a plain LoRA consists of."""

RANK_AXES = {DOWN: 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0}
"""The tensors that tell the rank of a layer, and along which axis it lies."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FileDelta:
    """ΔW of one layer of a file: either its factors or itself.

    `rank` is the file's, 0 in forms that have none. `bias` is what is added to the layer's bias, (out,), or None.
    """

    form: str
    rank: int
    factors: LowRank | None = None
    whole: Tensor | None = None
    bias: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """ΔW, float32, shaped like the base weight as far as the tensors tell its shape, else (out, in·k·k)."""
        if self.factors is not None:
            return low_rank_delta(self.factors.down, self.factors.up, self.factors.scale)
        if self.whole is None:
            raise TypeError("a FileDelta has factors or the whole")
        return self.whole

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), of factors without their product."""
        if self.factors is None:
            return float(self.delta.norm())
        down, up, scale, _ = self.factors
        return float(product_norm(down.flatten(1), up)) * abs(scale)


def delta_of(tensors: Tensors, weight: Tensor | None = None, layer: str = "") -> FileDelta:
    """ΔW of one layer's tensors. `weight` is its base weight, (out, in[, k, k]).

    DoRA, IA³, GLoRA, EH and the rotations need it, the others take its shape alone. `layer` names it in errors. Raises
    AdapterError for tensors of no form (each unknown one is named), of sizes that do not fit, and where the weight is
    needed and is not given.
    """
    form = form_of(tensors, layer)
    check_forms({f"{layer or 'layer'}.{name}": tensor for name, tensor in tensors.items()})
    if weight is None and (form.needs_weight or MAGNITUDE in tensors):
        what = "a DoRA" if MAGNITUDE in tensors else f"form {form.name}"
        raise AdapterError(f"{_of(layer)}{what} is a change of the weight it was trained on. Give the base model too.")
    try:  # on tensors without numbers first: whatever goes wrong there is a matter of sizes
        bare = {name: tensor if name in SINGLE else tensor.to("meta") for name, tensor in tensors.items()}
        _read(form, bare, None if weight is None else weight.to("meta"))
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        to = "" if weight is None else f", or not a weight of the shape {list(weight.shape)}"
        raise AdapterError(
            f"{_of(layer)}its tensors do not fit each other{to}: {shapes}. The file was made for another kind of base"
            " model, or is damaged."
        ) from error
    return _read(form, tensors, weight)


def _read(form: Form, tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """ΔW of a form, in the shape of the weight where there is one, with its magnitudes."""
    found = form.read({name: tensor.float() for name, tensor in tensors.items()}, weight)
    if weight is None:
        return found
    if MAGNITUDE in tensors:
        base = weight.float()
        change = decomposed(base, _shaped(found.delta, base), tensors[MAGNITUDE].float()) - base
        return FileDelta(found.form, found.rank, whole=change)
    if found.factors is None:
        return replace(found, whole=_shaped(found.delta, weight))
    down, up, scale, error = found.factors
    if len(up) != len(weight):
        raise ValueError("another number of outputs")
    return replace(found, factors=LowRank(down.reshape(len(down), *weight.shape[1:]), up, scale, error))


def _shaped(change: Tensor, weight: Tensor) -> Tensor:
    """ΔW in the shape of its weight, kernels spelled out or not."""
    one, two = (tensor.flatten(1) if tensor.ndim > 1 else tensor for tensor in (change, weight))
    if one.shape != two.shape:
        raise ValueError("another size")
    return change.reshape(weight.shape)


# -- what a layer's tensors are ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """`layouts`: the sets of tensors that make a layer complete; `optional`: further ones."""

    name: str
    read: Callable[[Tensors, Tensor | None], FileDelta]
    layouts: tuple[frozenset[str], ...]
    optional: frozenset[str] = frozenset()
    needs_weight: bool = False

    @property
    def names(self) -> frozenset[str]:
        """All tensors of this form."""
        return self.optional.union(*self.layouts)


def recognised(tensors: Tensors) -> Form | None:
    """The form that a layer's tensors belong to, complete or not; None when nothing tells."""
    blocks = tensors.get("oft_blocks")
    if blocks is not None:
        return FORMS["boft" if blocks.ndim == 4 else "oft"]
    return next((FORMS[form] for mark, form in MARKS if mark in tensors), None)


def form_of(tensors: Tensors, layer: str = "") -> Form:
    """The form of a layer's tensors. Raises AdapterError for other tensors, and names them."""
    form, given = recognised(tensors), set(tensors)
    if form is not None and any(layout <= given <= layout | form.optional for layout in form.layouts):
        return form
    strange = sorted(given - (KNOWN if form is None else form.names))
    if strange:
        beside = "" if form is None else f" beside those of form {form.name}"
        raise AdapterError(
            f"{_of(layer)}{', '.join(map(brief, strange))}{beside} cannot be read: no LoRA that is known here has such"
            " tensors. Convert the file with the program that made it."
        )
    raise AdapterError(
        f"{_of(layer)}{', '.join(sorted(given)) or 'no tensor'}: this is no complete layer of a LoRA. Get the file"
        " again."
    )


def by_layer(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by layer and name. Raises AdapterError for the first whose name ends in none of ours."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        end = next((end for end in _ENDS if name.endswith(f".{end}")), None)
        if end is None:
            raise AdapterError(f"{brief(name)} is no tensor of a LoRA that is known here. Choose another file.")
        found.setdefault(name[: -len(end) - 1], {})[end] = tensor
    return found


def plain_layers(tensors: Tensors) -> dict[str, dict[str, Tensor]] | None:
    """The layers of a file of nothing but plain LoRA, by name; None for any other file."""
    try:
        layers = by_layer(tensors)
    except AdapterError:
        return None
    plain = all({DOWN, UP} <= set(own) <= PLAIN for own in layers.values())
    return layers if layers and plain else None


def rank_of(tensors: Tensors) -> int:
    """The rank a layer has in a file, 0 when it has none."""
    for name, axis in RANK_AXES.items():
        if name in tensors:
            return int(tensors[name].shape[axis])
    return min(tensors["a1.weight"].shape) if "a1.weight" in tensors else 0


def alpha_of(tensors: Tensors) -> float | None:
    """The alpha of a layer; None where its file has none, which means the rank."""
    return single(tensors[ALPHA]) if ALPHA in tensors else None


def scale_of(tensors: Tensors, rank: int = 0) -> float:
    """alpha / rank, 1 where a file has no alpha or no rank; two whole matrices of a LoKr are not scaled."""
    rank, alpha = rank or rank_of(tensors), alpha_of(tensors)
    whole = {"lokr_w1", "lokr_w2"} <= set(tensors)
    return 1.0 if alpha is None or whole or not rank else alpha / rank


def glora_in_older_layout(tensors: Tensors, fan_out: int, fan_in: int) -> dict[str, Tensor]:
    """GLoRA's tensors as W·a2·a1 + b2·b1, a1 (r, in), b2 (out, r). LyCORIS's newer layout is W·a1·a2 + b1·b2.

    The sizes tell them apart; a square layer of full rank counts as the older one.
    """
    a1, b1 = tensors["a1.weight"].flatten(1), tensors["b1.weight"].flatten(1)
    older = a1.shape[1] == fan_in == b1.shape[1]
    if older or (len(a1), len(b1)) != (fan_in, fan_out):
        return dict(tensors)
    swap = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    return {swap.get(name, name): tensor for name, tensor in tensors.items()}


def limited(blocks: Tensor, limit: float) -> Tensor:
    """OFT's blocks B with ‖B − Bᵀ‖ (of all of them) at most `limit`; 0 sets no limit."""
    if not limit > 0:
        return blocks
    size = (blocks - blocks.transpose(-1, -2)).norm() + 1e-8
    return blocks * torch.clamp(limit / size, max=1.0)


# -- the ΔW of each form -----------------------------------------------------------------------------------------------


def lora_factors(tensors: Tensors) -> LowRank:
    """s·U·D, with a Tucker core s·U·(core·D)."""
    down, up = tensors[DOWN], tensors[UP].flatten(1)
    if MID in tensors:
        down = cored(tensors[MID], down)
    if up.shape[1] != len(down):
        raise ValueError("two ranks")
    return LowRank(down, up, scale_of(tensors, len(down)))


def lora(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """See `lora_factors`."""
    found = lora_factors(tensors)
    return FileDelta("lora", len(found.down), found)


def loha(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """s·(w1a·w1b) ⊙ (w2a·w2b), each with a Tucker core or without."""
    factors = plain_factors([tensors[name] for name in HADAMARD + CORES if name in tensors])
    whole = hadamard_delta(*factors) * scale_of(tensors)
    if "hada_t1" in tensors:
        fan_in, kernel = tensors["hada_w1_b"].shape[1], tensors["hada_t1"].shape[2:]
        whole = whole.view(len(whole), fan_in, *kernel)
    return FileDelta("loha", rank_of(tensors), whole=whole)


def lokr(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """s·kron(w1, w2), each whole or a product; w2 also with a Tucker core."""
    w1, w2 = tensors.get("lokr_w1"), tensors.get("lokr_w2")
    if w1 is None:
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if w2 is None and "lokr_t2" in tensors:
        core, outer, inner = (tensors[name] for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        w2 = torch.einsum("ij...,ip,jq->pq...", core, outer, inner)
    elif w2 is None:
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    return FileDelta("lokr", rank_of(tensors), whole=kron_delta(w1, w2) * scale_of(tensors))


def ia3(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """W times one number for each output, or for each input."""
    base, numbers = _given(weight), tensors["weight"].flatten()
    on_input = bool(single(tensors["on_input"]))
    if len(numbers) != base.shape[1 if on_input else 0]:
        raise ValueError("another number of channels")
    shape = [1] * base.ndim
    shape[1 if on_input else 0] = -1
    return FileDelta("ia3", 0, whole=base * numbers.view(shape))


def glora(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """s·(W·a2·a1 + b2·b1), in either layout."""
    base = _given(weight).flatten(1)
    found = glora_in_older_layout(tensors, *base.shape)
    a1, a2, b1, b2 = (found[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return FileDelta("glora", rank_of(tensors), whole=(base @ a2 @ a1 + b2 @ b1) * scale_of(tensors))


def full(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """ΔW itself, and Δb."""
    return FileDelta("full", 0, whole=tensors["diff"], bias=tensors.get("diff_b"))


def norm(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """The changes of a normalisation's scales and shifts."""
    return FileDelta("norm", 0, whole=tensors["w_norm"], bias=tensors.get("b_norm"))


def eh(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """The same block for every group of channels: as many as make up the weight."""
    base, block = _given(weight), tensors["linear.weight"].flatten(1)
    groups = len(base) // len(block)
    return FileDelta("eh", 0, whole=kron_delta(torch.eye(groups, device=block.device), block))


def oft(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """Rᵀ·W − W for a block-diagonal rotation R; alpha times the number of outputs limits it."""
    base = _given(weight)
    turns = cayley_minus_identity(_limited_blocks(tensors, base))
    return FileDelta("oft", 0, whole=turn(base.flatten(1), turns.transpose(1, 2)))


def boft(tensors: Tensors, weight: Tensor | None) -> FileDelta:
    """R·W − W for a product R of block-diagonal rotations in the order of a butterfly."""
    base = _given(weight)
    rows = base.flatten(1)
    return FileDelta("boft", 0, whole=butterfly(rows, cayley_minus_identity(_limited_blocks(tensors, base))) - rows)


def _limited_blocks(tensors: Tensors, base: Tensor) -> Tensor:
    return limited(tensors["oft_blocks"], (alpha_of(tensors) or 0.0) * len(base))


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise TypeError("this form needs the base weight")
    return weight.float()


def _of(layer: str) -> str:
    return f"{layer}: " if layer else ""


_HADAMARD = frozenset(HADAMARD)
_ADAPTED = frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"})
_W1 = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_W2 = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "lokr_w2_a", "lokr_w2_b"})
_ALPHA, _DORA = frozenset({ALPHA}), frozenset({ALPHA, MAGNITUDE})

FORMS = {
    form.name: form
    for form in (
        Form("lora", lora, (frozenset({DOWN, UP}),), _DORA | {MID}),
        Form("loha", loha, (_HADAMARD, _HADAMARD.union(CORES)), _DORA),
        Form("lokr", lokr, tuple(frozenset(one | two) for one in _W1 for two in _W2), _DORA),
        Form("glora", glora, (_ADAPTED,), _ALPHA, needs_weight=True),
        Form("norm", norm, (frozenset({"w_norm"}),), frozenset({"b_norm"})),
        Form("ia3", ia3, (frozenset({"weight", "on_input"}),), needs_weight=True),
        Form("full", full, (frozenset({"diff"}),), frozenset({"diff_b"})),
        Form("eh", eh, (frozenset({"linear.weight"}),), needs_weight=True),
        Form("oft", oft, (frozenset({"oft_blocks"}),), _ALPHA, needs_weight=True),
        Form("boft", boft, (frozenset({"oft_blocks"}),), _ALPHA, needs_weight=True),
    )
}
MARKS = (
    (DOWN, "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr"), ("lokr_w1_a", "lokr"), ("a1.weight", "glora"),
    ("w_norm", "norm"), ("on_input", "ia3"), ("diff", "full"), ("linear.weight", "eh"),
)  # fmt: skip
"""The tensors that tell a form by their being there, in the order in which they count."""
KNOWN = frozenset(name for form in FORMS.values() for name in form.names)
"""Every tensor name of a LoRA file, without the layer's key."""
_ENDS = sorted(KNOWN, key=len, reverse=True)

"""What every adapter type shares: where it sits, how strong it is, how it is put on a layer and taken off again.

A type is one file with one class: which layers it covers, its tensors, ΔW, and, where it pays, a faster forward.
"""

from __future__ import annotations

import builtins
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.lowrank import LowRank, scaled, working_dtype
from ..params.network import NetworkOptions, parse_block_ranks, parse_blocks
from ..params.rules import Rule
from ..registry import Registry
from .draws import Draws, Timesteps

ADAPTERS: Registry[type[Adapter]] = Registry("network_type", "adapters")

T = TypeVar("T")
Groups = tuple[tuple[str, ...], ...]
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of a network. Conv rank and alpha of 0 mean the linear ones.

    `options`: the parameter sections of single types, by class; `spec[Section]` gives one, its defaults when absent.
    `shared`: what `Adapter.shared` made for the network that is being built. `restored`: every parameter and buffer
    will be overwritten from a state, so that only their shapes count. `device`: where to compute what takes long, the
    weights may rest elsewhere.
    """

    type: str = "lierla"
    rank: int = 16
    alpha: float = 8.0
    conv_rank: int = 0
    conv_alpha: float = 0.0
    options: Mapping[builtins.type[object], object] = field(default_factory=dict)
    shared: object = field(default=None, compare=False, repr=False)
    restored: bool = False
    device: torch.device | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.conv_rank < 0:
            raise AdapterError(
                f"network_rank = {self.rank}, network_conv_rank = {self.conv_rank}: the rank must be at least 1"
                " (the conv rank may be 0, which means the same as network_rank)."
            )
        if self.alpha <= 0 or self.conv_alpha < 0:
            raise AdapterError(
                f"network_alpha = {self.alpha}, network_conv_alpha = {self.conv_alpha}: alpha must be above 0"
                " (the conv alpha may be 0, which means the same as network_alpha)."
            )

    def __getitem__(self, section: builtins.type[T]) -> T:
        """The values of a section that a type declares."""
        found = cast("T | None", self.options.get(section))
        return section() if found is None else found

    def rank_of(self, kind: str, block: str = "") -> int:
        """The rank of a layer of this kind: the conv rank for kernels above 1×1, else its block's."""
        if is_wide(kind) and self.conv_rank:
            return self.conv_rank
        return self._block_ranks.get(block, self.rank)

    def alpha_of(self, kind: str, block: str = "") -> float:
        """The alpha of a layer of this kind, as typed."""
        if is_wide(kind) and self.conv_alpha:
            return self.conv_alpha
        return self._block_alphas.get(block, self.alpha)

    @cached_property
    def _block_ranks(self) -> dict[str, int]:
        return parse_block_ranks(self[NetworkOptions].network_block_ranks)

    @cached_property
    def _block_alphas(self) -> dict[str, float]:
        return parse_blocks(self[NetworkOptions].network_block_alphas)


def is_wide(kind: str) -> bool:
    """Whether a kind of layer is a convolution with a kernel above 1×1."""
    return kind.startswith("conv") and kind != "conv1x1"


class Strength:
    """How much of ΔW is added; one object shared by all adapters of a network.

    `value` is a number, or a tensor (B,) with one number per sample. Exactly 0.0 means the bare layer.
    """

    __slots__ = ("_value",)

    def __init__(self, value: float | Tensor = 1.0) -> None:
        self.value = value

    @property
    def value(self) -> float | Tensor:
        return self._value

    @value.setter
    def value(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.ndim != 1:
                raise ValueError(f"a strength per sample has the shape (B,), not {tuple(value.shape)}")
            self._value: float | Tensor = value
        else:
            self._value = float(value)


class Adapter(nn.Module, ABC):
    """An adapter on one layer. `forward` stands in for the layer's own while attached.

    A subclass sets `help`, `file_tensors` (names it writes, without the key), `covers`, `delta`, `tensors`, `read` and
    `rescaled`; it may override `adapted` with something faster than two passes (and `thinned`, where dropout has a
    better place). `sections` are the parameter classes it declares, `needs` the tags of the parameters its form shows,
    `rules` what must hold for them.

    What the common options act on: `ranked` says that ΔW counts alpha / rank. `factors` are groups of its parameters;
    ΔW is proportional to each group. `ups` and `downs` are the parameters that LoRA+ trains faster and LoRA-FA leaves
    alone. `droppable`: ΔW acts through `_operate`. `inits`: the values of `network_init` beside default.

    `per_sample`: whether the strength may be a tensor (B,), one number per sample; modes alternate where it may not.
    `portable`: every WebUI reads the type's own file. `exact`: file tensors that keep float32 whatever precision the
    file is saved in. `scalable`: whether a file can hold a multiple of ΔW, and so a strength other than 1.
    """

    help: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    sections: ClassVar[tuple[type, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()

    ranked: ClassVar[bool] = True
    factors: ClassVar[Groups] = ()
    ups: ClassVar[tuple[str, ...]] = ()
    downs: ClassVar[tuple[str, ...]] = ()
    droppable: ClassVar[bool] = True
    per_sample: ClassVar[bool] = True
    inits: ClassVar[frozenset[str]] = frozenset()

    file_tensors: ClassVar[tuple[str, ...]] = ()
    portable: ClassVar[bool] = False
    network_module: ClassVar[str] = "lycoris.kohya"
    exact: ClassVar[frozenset[str]] = frozenset({"alpha"})
    scalable: bool = True

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__()
        self.key, self.part, self.kind, self.block = layer.key, layer.part, layer.kind, layer.block
        self.role, self.also = layer.role, layer.also
        self.options = spec[NetworkOptions]
        self.rank, self.alpha = spec.rank_of(layer.kind, layer.block), float(spec.alpha_of(layer.kind, layer.block))
        if self.ranked and self.options.network_rslora:
            self.alpha *= math.sqrt(self.rank)  # alpha·√r / r = alpha / √r (2312.03732), and any reader scales right
        self.scale = self.alpha / self.rank
        self.strength, self.draws, self.timesteps = strength, Draws(), Timesteps()
        self._drops = self._dropouts()
        self._held = (layer.module,)  # in a tuple, so that the base layer is no part of this module's state
        self._previous: Forward | None = None
        self._installed: Forward | None = None
        self._look()

    # -- what a type defines -------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def covers(cls, layer: Layer, spec: AdapterSpec) -> bool:
        """Whether this type sits on this layer."""

    @classmethod
    def tags(cls) -> frozenset[str]:
        """The tags of the parameters that act on this type: its own, and those of the common options."""
        common = {
            "rank": cls.ranked,
            "alpha": cls.ranked,
            "max_norm": bool(cls.factors),
            "loraplus": bool(cls.ups),
            "freeze_down": bool(cls.downs),
            "dropout": cls.droppable,
            "init": bool(cls.inits),
        }
        return cls.needs | {tag for tag, has in common.items() if has}

    @classmethod
    def network_args(cls, spec: AdapterSpec) -> dict[str, str]:
        """What kohya's metadata calls network arguments: everything beside rank and alpha."""
        return {}

    @classmethod
    def shared(cls, layers: Sequence[Layer], spec: AdapterSpec, tell: Callable[[str], None]) -> object:
        """What the adapters of one network have in common, made once and found as `spec.shared` by each of them."""
        return None

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW at strength 1 in float32, shaped like the base weight; differentiable."""

    def as_lora(self) -> LowRank | None:
        """The factors of a ΔW that is of low rank by its making; None for the others."""
        return None

    def delta_bias(self) -> Tensor | None:
        """What is added to the layer's bias at strength 1, (out,) float32; None for types that leave it alone."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What goes into the file, by name without the key."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        """File tensors as new values of this adapter's parameters, with `factor` × the file's ΔW whatever its alpha.

        Raises AdapterError when they do not fit. Changes nothing.
        """

    @abstractmethod
    def rescaled(self, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """File tensors whose ΔW is `factor` times as large. Raises AdapterError when it is not `scalable`."""

    def start(self, down: Tensor, up: Tensor) -> None:
        """Begin at these factors, (r, in·k·k) and (out, r), and count ΔW from there; for types with `inits`."""
        raise NotImplementedError(f"{type(self).__name__} has values of network_init and no way to start at them")

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """The layer's output at a strength other than 0; here with the weight W + strength·ΔW."""
        base = self._base(x)
        x = x.to(base.dtype)
        return base + scaled(self._operate(x, self.delta().to(x.dtype)), strength)

    def thinned(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """`adapted` with neuron and rank dropout; here numbers of the input and rows of ΔW are left out."""
        base = self._base(x)
        x = x.to(base.dtype)
        delta, shift = self.delta(), self.delta_bias()
        rows = self.kept_ranks(delta.shape[0])
        if rows is not None:
            delta = delta * rows.to(delta).view(-1, *(1 for _ in delta.shape[1:]))
            shift = None if shift is None else shift * rows.to(shift)
        update = self._operate(self.dropped(x), delta.to(x.dtype))
        if shift is not None:
            update = update + shift.to(x.dtype).view(-1, *(1,) * (0 if self.kind == "linear" else 2))
        return base + scaled(update, strength)

    # -- written once --------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The base layer."""
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with strength·ΔW added."""
        strength = self.strength._value
        if strength.__class__ is float and strength == 0.0:
            return self._base(x)
        if self._drops and self.draws.on:
            return self._with_dropout(x, strength)
        return self.adapted(x, strength)

    def _dropouts(self) -> bool:
        options = self.options
        inner = options.network_dropout or options.network_rank_dropout
        return bool(options.network_module_dropout or (self.droppable and inner))

    def _with_dropout(self, x: Tensor, strength: float | Tensor) -> Tensor:
        options = self.options
        if self.draws.happens(options.network_module_dropout, "module", self.key):
            return self._base(x)
        if self.droppable and (options.network_dropout or options.network_rank_dropout):
            return self.thinned(x, strength)
        return self.adapted(x, strength)

    def kept_ranks(self, count: int) -> Tensor | None:
        """Rank dropout: 0 or 1/(1 − p) for each of `count` ranks, on the CPU and the same for all samples of a step.

        None outside training steps and without rank dropout.
        """
        chance = self.options.network_rank_dropout
        return self.draws.kept((count,), chance, "rank", self.key) if chance and self.draws.on else None

    def dropped(self, middle: Tensor) -> Tensor:
        """Neuron dropout (1207.0580, kept numbers × 1/(1 − p)) of a tensor (rows, …), drawn for each sample."""
        chance = self.options.network_dropout
        if not (chance and self.draws.on):
            return middle
        return middle * self.draws.kept_rows(middle, chance, self.part.startswith("te"), "neuron", self.key)

    def delta_norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius) at strength 1, 0-d on the device."""
        norm: Tensor = self.delta().norm()
        return norm

    @torch.no_grad()
    def shrink(self, ratio: Tensor) -> None:
        """Make ΔW `ratio` (0-d) times as large, the change shared evenly between the trained factors."""
        groups = [[self._parameters.get(name) for name in group] for group in self.factors]
        trained = [[p for p in group if p is not None and p.requires_grad] for group in groups]
        trained = [group for group in trained if group]
        for group in trained:
            for parameter in group:
                parameter.mul_(ratio.pow(1 / len(trained)).to(parameter.dtype))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over file tensors (see `read`)."""
        self.assign(self.read(tensors))

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters and buffers of these names."""
        own = {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}
        for name, value in values.items():
            own[name].copy_(value)

    def attach(self) -> None:
        """Put this adapter in front of whatever computes the layer now."""
        if self._installed is not None:
            raise AdapterError(f"{self.key}: this adapter is already attached.")
        self._look()
        self._previous = self.module.__dict__.get("forward")
        self._installed = self.forward
        self.module.forward = self._installed

    @property
    def attached(self) -> bool:
        """Whether this adapter is on its layer."""
        return self._installed is not None

    @property
    def on_top(self) -> bool:
        """Whether this adapter is attached and nothing was attached after it."""
        return self._installed is not None and self.module.__dict__.get("forward") is self._installed

    def eject(self) -> None:
        """Give the layer back exactly as it was before `attach`."""
        if not self.on_top:
            raise AdapterError(
                f"{self.key}: something was attached afterwards (or nothing before)."
                " Eject in the reverse order of attaching."
            )
        if self._previous is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._previous
        self._previous = self._installed = None

    def working_input(self, x: Tensor) -> Tensor:
        """x in the precision the layer computes in (a base layer stored otherwise says so by `_casts_to`)."""
        dtype = self._casts_to or working_dtype(x)
        return x if x.dtype == dtype else x.to(dtype)

    def _look(self) -> None:
        """Note how the layer computes now: by its stored weight alone (`_plain`), or in some way of its own."""
        module = self.module
        self._base: Forward = module.forward
        self._casts_to: torch.dtype | None = module.__dict__.get("_casts_to")
        own = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
        beneath = getattr(module.__dict__.get("forward"), "__self__", None)
        bare = "forward" not in module.__dict__ or (self._casts_to is not None and not isinstance(beneath, Adapter))
        padded = isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str))
        self._zero_padded = not padded
        self._plain = own and bare and not padded

    def _operate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operation on x with another weight and no bias."""
        if isinstance(self.module, nn.Conv2d):
            y: Tensor = self.module._conv_forward(x, weight, None)
            return y
        return functional.linear(x, weight)

"""DoRA: the length and the direction of each row or column of a weight are trained apart (2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..errors import AdapterError
from ..maths.lowrank import LowRank, scaled
from ..maths.magnitude import SMALLEST, norms_along, on_axis
from ..maths.weights import bias_of, weight_of, weight_shape
from ..params.field import param
from ..params.rules import without_effect
from .base import Adapter, AdapterSpec, Strength
from .file_delta import MAGNITUDE, delta_of

DORA_RULES = (without_effect("use_dora", "network_dora_axis"),)
AXES = ("input", "output")


@dataclass(frozen=True)
class DoraOptions:
    """What lierla, c3lier, loha and lokr have for DoRA."""

    use_dora: bool = param(
        False,
        "Train magnitude and direction of each weight apart (DoRA): often better at low ranks, slower. In universal and"
        " experts it scales the rows of ΔW instead, and the file stays a plain LoRA.",
        "option",
        needs="dora",
    )
    network_dora_axis: str = param(
        "input",
        "DoRA magnitudes per input, which A1111, Forge and ComfyUI read correctly, or per output, as in files of PEFT"
        " and newer LyCORIS.",
        "option",
        needs="dora_axis",
        choices=AXES,
    )


def axis_args(spec: AdapterSpec) -> dict[str, str]:
    """What the metadata of a file with lengths says of them, under LyCORIS's names."""
    return {"dora_wd": "True", "wd_on_output": str(spec[DoraOptions].network_dora_axis == "output")}


if TYPE_CHECKING:

    class Beneath(Adapter):
        """What `Decomposed` is put before: a type with a ΔW of its own."""

        def delta(self) -> Tensor: ...
        def tensors(self) -> dict[str, Tensor]: ...
        def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]: ...
        def rescaled(self, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]: ...
        def update(self, x: Tensor) -> Tensor: ...
        def sided(self, tensors: Mapping[str, Tensor], by: Tensor, on_input: bool) -> dict[str, Tensor]: ...

else:
    Beneath = Adapter


class Decomposed(Beneath):
    """Put before a type with a ΔW of its own (here V), this makes W′ = m ⊙ (W + V) / ‖W + V‖ of it, when asked.

    m and the norms have one number for each input (the sums run over outputs and kernel) or each output; the norm
    counts as a constant in the backward pass (section 4.3 of the paper). A strength κ means W + κ·(W′ − W). The
    parameter is m − ‖W‖, so that the start is the bare model in any precision.

    The type beneath defines beside what every type does: `update(x)`, V·x at strength 1 without bias;
    `sided(tensors, by, on_input)`, file tensors whose V has its inputs or
    outputs multiplied by these numbers; and, where there is a faster way than through V itself,
    `square_norms(on_input)`, ‖W + V‖² − ‖W‖² for each input or output.
    """

    def __init__(self, layer: Layer, spec: AdapterSpec, strength: Strength, generator: torch.Generator) -> None:
        super().__init__(layer, spec, strength, generator)
        options = spec[DoraOptions]
        self.decomposed, self.on_input = options.use_dora, options.network_dora_axis == "input"
        if self.decomposed:
            norms = self._lengths(weight_of(layer.module, torch.float32).detach())
            self.magnitude = nn.Parameter(torch.zeros(norms.shape))
            self._bits: Tensor  # bit patterns, because a network put into half precision must keep these numbers whole
            self.register_buffer("_bits", norms.cpu().view(torch.int32), persistent=False)

    def gain(self) -> Tensor:
        """m / ‖W + V‖ for each input or output, float32."""
        base, faster = self._bits.view(torch.float32), getattr(self, "square_norms", None)
        with torch.no_grad():
            if faster is None:
                norms = self._lengths(weight_of(self.module, torch.float32) + super().delta())
            else:
                norms = (base.square() + faster(self.on_input)).clamp_min(0).sqrt()
        return (base + self.magnitude.float()) / norms.clamp_min(SMALLEST)

    def adapted(self, x: Tensor, strength: float | Tensor) -> Tensor:
        if not self.decomposed:
            return super().adapted(x, strength)
        module, gain = self.module, self.gain()
        whole = self._plain and not isinstance(strength, Tensor) and strength == 1.0
        if whole and self.on_input:
            x = self.working_input(x)
            return super().adapted(x * self._on_channels(gain, x), 1.0)
        own = bias_of(module)
        bias = None if own is None else self._on_channels(own, x)
        if whole:
            y = super().adapted(x, 1.0)
            gain = self._on_channels(gain, y)
            return y * gain if bias is None else torch.addcmul(bias.to(y.dtype), y - bias.to(y.dtype), gain)
        return self._partly(x, strength, gain, bias)

    def _partly(self, x: Tensor, strength: float | Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """W·x + b + κ·(W′ − W)·x, with W′ − W = W·(gain − 1) + V·gain."""
        weight = weight_of(self.module)
        x = self.working_input(x)
        if self.on_input:
            gain = self._on_channels(gain, x)
            if self._plain:
                return self._base(x + scaled(x * (gain - 1), strength)) + scaled(self.update(x * gain), strength)
            base = self._base(x)
            x, gain = x.to(base.dtype), gain.to(base.dtype)
            change = self._operate(x * (gain - 1), weight.to(x.dtype)) + self.update(x * gain)
            return base + scaled(change, strength)
        base = self._base(x)
        x = x.to(base.dtype)
        gain = self._on_channels(gain, base)
        if self._plain:
            product = base if bias is None else base - bias.to(base.dtype)
        else:
            product = self._operate(x, weight.to(x.dtype))
        return base + scaled(product * (gain - 1) + self.update(x) * gain, strength)

    def thinned(self, x: Tensor, strength: float | Tensor) -> Tensor:
        return Adapter.thinned(self, x, strength) if self.decomposed else super().thinned(x, strength)

    def delta(self) -> Tensor:
        plain = super().delta()
        if not self.decomposed:
            return plain
        weight = weight_of(self.module, torch.float32)
        return (weight + plain) * self._on_axis(self.gain()) - weight

    def as_lora(self) -> LowRank | None:
        return None if self.decomposed else super().as_lora()

    def tensors(self) -> dict[str, Tensor]:
        plain = super().tensors()
        if not self.decomposed:
            return plain
        lengths = self._bits.view(torch.float32) + self.magnitude.detach().float()
        return {**plain, MAGNITUDE: self._on_axis(lengths)}

    def read(self, tensors: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        if not self.decomposed:
            if MAGNITUDE in tensors:
                raise AdapterError(
                    f"{self.key} in the file has {MAGNITUDE}, which belongs to DoRA. Switch use_dora on, or choose"
                    " another file."
                )
            return super().read(tensors, factor)
        lengths = tensors.get(MAGNITUDE)
        wanted = self._on_axis(self.magnitude).shape
        if lengths is None or lengths.shape != wanted:
            other = AXES[1] if self.on_input else AXES[0]
            given = "is missing" if lengths is None else f"is {tuple(lengths.shape)}"
            hint = "Switch use_dora off" if lengths is None else f"Set network_dora_axis to {other}"
            raise AdapterError(
                f"{self.key}.{MAGNITUDE} {given} in the file, and this network needs {tuple(wanted)}. {hint}, or choose"
                " another file."
            )
        changed = self.rescaled(tensors, factor)
        values = super().read({name: tensor for name, tensor in changed.items() if name != MAGNITUDE}, 1.0)
        base = self._bits.view(torch.float32).cpu()
        return {**values, "magnitude": changed[MAGNITUDE].float().cpu().flatten() - base}

    def rescaled(self, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """W + f·(W′ − W) is another decomposition: with g = m/‖W + V‖ and c = 1 − f + f·g it is c·(W + V·f·g/c)."""
        if MAGNITUDE not in tensors:
            return super().rescaled(tensors, factor)
        if factor == 1.0:
            return dict(tensors)
        weight = weight_of(self.module, torch.float32).detach().cpu()
        plain = delta_of({n: t for n, t in tensors.items() if n != MAGNITUDE}, weight, self.key).delta
        gain = tensors[MAGNITUDE].float().flatten() / self._lengths(weight + plain).clamp_min(SMALLEST)
        outer = 1 - factor + factor * gain
        if not bool((outer.abs() > 1e-4).all()):
            raise AdapterError(
                f"{self.key}: at strength {factor:g} this DoRA would make a row of weights vanish, which its file"
                " cannot hold. Choose another network_strength."
            )
        by = factor * gain / outer
        lengths = outer * self._lengths(weight + plain * self._on_axis(by))
        return {**self.sided(tensors, by, self.on_input), MAGNITUDE: self._on_axis(lengths)}

    def _lengths(self, weight: Tensor) -> Tensor:
        """‖·‖ of a weight for each input or output."""
        return norms_along(weight, 1 if self.on_input else 0)

    def _on_axis(self, values: Tensor) -> Tensor:
        """One number for each input (1, in[, 1, 1]) or output (out, 1[, 1, 1]), as files have it."""
        return on_axis(values, len(weight_shape(self.module)), 1 if self.on_input else 0)

    def _on_channels(self, values: Tensor, like: Tensor) -> Tensor:
        """One number for each channel, to be multiplied with inputs or outputs, in their precision."""
        return values.to(like.dtype).view(-1) if self.kind == "linear" else values.to(like.dtype).view(-1, 1, 1)

"""All adapters of one training: made, attached, measured, loaded and exported together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from ..contracts import Layer
from ..errors import AdapterError
from ..params.network import NetworkOptions, parse_blocks, shown_options
from .base import ADAPTERS, Adapter, AdapterSpec, Strength
from .choose import choose, spelled, split_name
from .draws import Draws, Timesteps
from .foreign import in_our_names
from .recognise import described


@dataclass(frozen=True)
class LoadReport:
    """What became of a file: layers filled, names no layer has, layers it has nothing for (they keep their start)."""

    matched: int
    unmatched: tuple[str, ...]
    untouched: tuple[str, ...]


class ParameterGroup(TypedDict):
    """Parameters with one learning rate: `ratio` times that of their part."""

    name: str
    part: str
    ratio: float
    params: list[nn.Parameter]


class Network(nn.Module):
    """Adapters by key, sharing one strength. Base layers are no part of its state."""

    def __init__(self, adapters: Iterable[Adapter], spec: AdapterSpec, strength: Strength) -> None:
        super().__init__()
        self.spec = spec
        self.strength = strength
        self.draws, self.timesteps = Draws(), Timesteps()
        self.adapters = nn.ModuleDict({adapter.key: adapter for adapter in adapters})
        for adapter in self:
            adapter.draws, adapter.timesteps = self.draws, self.timesteps

    def __iter__(self) -> Iterator[Adapter]:
        return iter(cast("Iterable[Adapter]", self.adapters.values()))

    def __getitem__(self, key: str) -> Adapter:
        """The adapter on a layer."""
        return cast("Adapter", self.adapters[key])

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def per_sample(self) -> bool:
        """Whether all adapters take one strength per sample."""
        return all(adapter.per_sample for adapter in self)

    # -- on and off ----------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put every adapter on its layer; none, if one cannot be."""
        done: list[Adapter] = []
        try:
            for adapter in self:
                adapter.attach()
                done.append(adapter)
        except BaseException:
            for adapter in reversed(done):
                adapter.eject()
            raise

    def eject(self) -> None:
        """Give every layer back exactly as it was. Raises AdapterError, with no change, while a later network is on."""
        buried = [adapter.key for adapter in self if adapter.attached and not adapter.on_top]
        if buried:
            raise AdapterError(
                f"{len(buried)} layers (first: {buried[0]}) carry something attached later."
                " Eject in the reverse order of attaching."
            )
        for adapter in self:
            if adapter.attached:
                adapter.eject()

    @contextmanager
    def attached(self) -> Iterator[Network]:
        """Attached inside the block, ejected after it whatever happens."""
        self.attach()
        try:
            yield self
        finally:
            self.eject()

    @contextmanager
    def at_strength(self, value: float | Tensor) -> Iterator[Network]:
        """Another strength inside the block (0.0: the bare model), the previous one after it whatever happens."""
        before = self.strength.value
        self.strength.value = value
        try:
            yield self
        finally:
            self.strength.value = before

    @contextmanager
    def at_timesteps(self, timesteps_B: Tensor | None) -> Iterator[Network]:
        """Inside the block the base model predicts at these timesteps (B,), 0 clean to 1000 noise."""
        before = self.timesteps.value
        self.timesteps.change(timesteps_B)
        try:
            yield self
        finally:
            self.timesteps.change(before)

    def repeated(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For a forward that is computed again in the backward pass: nothing now, then the strength and timesteps of
        now."""
        return nullcontext(), self._as_it_was(self.strength.value, self.timesteps.value)

    @contextmanager
    def _as_it_was(self, strength: float | Tensor, timesteps_B: Tensor | None) -> Iterator[None]:
        with self.at_strength(strength), self.at_timesteps(timesteps_B):
            yield

    # -- what an optimizer and a log want to know ----------------------------------------------------------------------

    def parts(self) -> dict[str, list[Adapter]]:
        """The adapters of each part (unet, te1, te2), in order."""
        found: dict[str, list[Adapter]] = {}
        for adapter in self:
            found.setdefault(adapter.part, []).append(adapter)
        return found

    def trainable(self) -> list[ParameterGroup]:
        """One parameter group per part and rate: {"name", "part", "ratio", "params"}.

        `ratio` is the factor of the part's learning rate: LoRA+ (2402.12354) for the up matrices, times the block's.
        """
        groups: dict[str, ParameterGroup] = {}
        seen: set[int] = set()  # types may share a parameter between layers
        for adapter in self:
            for name, parameter in adapter.named_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    label, ratio = self._rate(adapter, name)
                    group: ParameterGroup = {"name": label, "part": adapter.part, "ratio": ratio, "params": []}
                    groups.setdefault(label, group)["params"].append(parameter)
        return sorted(groups.values(), key=lambda group: list(self.parts()).index(group["part"]))

    def _rate(self, adapter: Adapter, name: str) -> tuple[str, float]:
        """Label and ratio of the parameter group that a parameter belongs to."""
        options, label, ratio = self.spec[NetworkOptions], adapter.part, 1.0
        factor = self._block_rates.get(adapter.block, 1.0)
        if factor != 1.0:
            label, ratio = f"{label} {adapter.block}", factor
        own = options.loraplus_te_lr_ratio if adapter.part.startswith("te") else None
        plus = options.loraplus_lr_ratio if own is None else own
        if plus != 1.0 and name in adapter.ups:
            label, ratio = f"{label} up", ratio * plus
        return label, ratio

    @cached_property
    def _block_rates(self) -> dict[str, float]:
        return parse_blocks(self.spec[NetworkOptions].network_block_lrs)

    @torch.no_grad()
    def mean_abs_weight(self) -> dict[str, Tensor]:
        """Mean |weight| of the trained tensors per part, as 0-d tensors on their device (read them when you log)."""
        means = {}
        for part, adapters in self.parts().items():
            params: list[Tensor] = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
            if params:
                means[part] = torch.stack(torch._foreach_norm(params, 1)).sum() / sum(p.numel() for p in params)
        return means

    # -- inside a training step ----------------------------------------------------------------------------------------

    @contextmanager
    def drawing(self, seed: int, index: int, samples: Sequence[int]) -> Iterator[None]:
        """Inside the block a training step is computed: dropout acts. See `Draws.begin`."""
        self.draws.begin(seed, index, samples)
        try:
            yield
        finally:
            self.draws.end()

    @torch.no_grad()
    def limit_norms(self) -> None:
        """Scale back every ΔW whose norm is above `network_max_norm`; to be called after each optimizer step."""
        limit = self.spec[NetworkOptions].network_max_norm
        if limit:
            for adapter in self:
                if adapter.factors:
                    adapter.shrink((limit / adapter.delta_norm()).clamp(max=1.0))

    def file_facts(self) -> dict[str, object]:
        """What the metadata says of the network: keyword arguments for `metadata.FileFacts`."""
        kind = ADAPTERS.get(self.spec.type)
        return {
            "network_type": ADAPTERS.canonical(self.spec.type),
            "network_module": kind.network_module,
            "network_rank": self.spec.rank,
            "network_alpha": self.spec.alpha,
            "network_args": {**kind.network_args(self.spec), **shown_options(self.spec[NetworkOptions])},
        }

    # -- files ---------------------------------------------------------------------------------------------------------

    def load(
        self, tensors: Mapping[str, Tensor], aliases: Mapping[str, Iterable[str]] | None = None, baked: float = 1.0
    ) -> LoadReport:
        """Take over the tensors of a LoRA file; all of them fit, or nothing is changed.

        `aliases`: further spellings by key (those the layers brought along are known). `baked`: the strength the file
        was exported with, divided out again. Raises AdapterError when no layer matches, or when tensors do not fit.
        """
        if baked == 0.0:
            raise AdapterError("The LoRA file was written at strength 0: nothing of its training is left.")
        found, unmatched = self._sort(tensors, aliases or {})
        if not found:
            example = next(iter(tensors), "nothing")
            raise AdapterError(
                f"None of the {len(tensors)} tensors of the LoRA file belongs to a layer that is trained here (the file"
                f" has, for example, {example}; here: {next(iter(self.adapters))}). It was made for another kind of"
                " base model, or network_blocks and network_targets exclude its layers."
            )
        try:
            values = {key: self[key].read(own, 1.0 / baked) for key, own in found.items()}
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise AdapterError(
                f"The LoRA file cannot be taken apart for network_type {self.spec.type}: its numbers are too large or"
                f" too small ({error}). Choose another file."
            ) from error
        except AdapterError as error:
            seen = described((self[key].kind, self[key].block, own) for key, own in found.items())
            raise AdapterError(f"{error} {seen}") from error
        large = next((key for key, own in values.items() if not all(map(_all_finite, own.values()))), None)
        if large is not None:
            raise AdapterError(
                f"The LoRA file's numbers for {large} are too large to continue from. Choose another file."
            )
        self._refuse_disagreement(values)
        for key, value in values.items():
            self[key].assign(value)
        return LoadReport(len(found), tuple(unmatched), tuple(key for key in self.adapters if key not in found))

    def _refuse_disagreement(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raise AdapterError where layers that share a tensor bring different ones."""
        seen: dict[int, tuple[str, Tensor]] = {}
        for key, own in values.items():
            shared = dict(self[key].named_parameters())
            for name, value in own.items():
                if "." not in name or name not in shared:
                    continue
                first, before = seen.setdefault(id(shared[name]), (key, value))
                if not torch.allclose(before, value, rtol=1e-3, atol=1e-6):
                    raise AdapterError(
                        f"{first} and {key} have different down matrices in the file, and network_type {self.spec.type}"
                        " has one for both. Choose network_type lierla to continue from a LoRA of another kind."
                    )

    def _sort(
        self, tensors: Mapping[str, Tensor], aliases: Mapping[str, Iterable[str]]
    ) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
        """A file's tensors by key of this network and name, and the names that belong to none."""
        table = spelled((adapter.key, (*adapter.also, *aliases.get(adapter.key, ()))) for adapter in self)
        found: dict[str, dict[str, Tensor]] = {}
        unmatched = []
        for name, tensor in in_our_names(tensors, {}).items():
            split = split_name(name, table)
            if split is None:
                unmatched.append(name)
                continue
            key, rest = split
            if rest in found.setdefault(key, {}):
                raise AdapterError(f"The LoRA file has {key}.{rest} twice, in two spellings (one is {name}).")
            found[key][rest] = tensor
        return found, unmatched

    @torch.no_grad()
    def export(self, dtype: torch.dtype | None = None, strength: float = 1.0) -> dict[str, Tensor]:
        """The tensors of a LoRA file on the CPU, ΔW multiplied by `strength` once.

        `dtype` None keeps the precision trained in.
        Few but exact numbers such as alpha keep their own: many values have no exact form in fp16 or bf16.
        """
        if strength == 0.0:
            raise AdapterError("network_strength = 0 would write a LoRA file that does nothing. Choose another.")
        exported = {}
        for key in sorted(self.adapters):
            adapter = self[key]
            own = {name: tensor.detach().cpu() for name, tensor in adapter.tensors().items()}
            wide = {name: tensor if name in adapter.exact else tensor.float() for name, tensor in own.items()}
            for name, tensor in adapter.rescaled(wide, strength).items():
                kept = tensor.dtype if name in adapter.exact else dtype or own[name].dtype
                exported[f"{key}.{name}"] = tensor.to(kept).clone().contiguous()
        return exported


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def build_network(
    layers: Iterable[Layer],
    spec: AdapterSpec,
    blocks: Collection[str],
    element: str | None,
    parts: Collection[str],
    generator: torch.Generator,
    tell: Callable[[str], None] = lambda line: None,
) -> Network:
    """Adapters for the chosen layers (see `choose`), drawn in their order from `generator` (CPU), not yet attached.

    `tell` hears what a type has to say of itself. Parameters are float32 on the CPU: move the network to a device and
    precision with `.to(...)` before attaching.
    """
    chosen = choose(layers, spec, blocks, element, parts)
    kind = ADAPTERS.get(spec.type)
    strength = Strength()
    spec = dataclasses.replace(spec, shared=kind.shared(chosen, spec, tell))
    network = Network([kind(layer, spec, strength, generator) for layer in chosen], spec, strength)
    if spec[NetworkOptions].network_freeze_down:
        for adapter in network:
            for name in kind.downs:
                adapter.get_parameter(name).requires_grad_(False)
    return network

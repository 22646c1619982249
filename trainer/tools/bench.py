"""How long one training step takes: ours, the same step written plainly with PEFT and with LyCORIS, and the bare UNet;
or ours with other types of adapter than plain LoRA.

All contenders share one UNet's weights, the same layers, rank, data and process, and take turns, so that whatever else
the machine does meets all of them. Times are medians; the ratios are medians of the ratios within one round.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters import null, universal
from ..adapters.base import ADAPTERS, AdapterSpec
from ..adapters.bases import Pair
from ..adapters.network import Network, build_network
from ..contracts import Layer
from ..engine.flat import FlatParameters
from ..errors import AtelierError
from ..maths.weights import weight_matrix
from ..models.layers import unet_layers
from ..optim.optimizers import make_optimizer
from ..params.names import BLOCKS
from ..params.table import parameters_of

SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "small": ({"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 64, "norm_num_groups": 8}, 8),
    "sd15": ({"cross_attention_dim": 768}, 1),
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
EVERY_TYPE = (
    "null", "universal", "experts", "experts+network_routing=input", "dylora", "ia3", "glora", "oft", "boft", "eh",
    "norm", "loha", "lokr+network_factor=8", "lierla+use_dora", "c3lier+use_dora", "loha+use_dora",
    "lokr+network_factor=8+use_dora", "c3lier+network_tucker", "loha+network_tucker", "lierla+blocks=OUT*",
    "full",
)  # fmt: skip
"""What `--types all` measures."""
RATE, MAX_NORM, ALPHA, WARM_UP = 1e-4, 1.0, 8.0, 2


@dataclass(frozen=True)
class Data:
    """The inputs and the target of a step."""

    x_BCHW: Tensor
    t_B: Tensor
    context_BLD: Tensor
    target_BCHW: Tensor


@dataclass(frozen=True)
class Contender:
    """`clear` is what precedes a step, `loss` its forward pass, `finish` what follows backward."""

    name: str
    loss: Callable[[], Tensor]
    clear: Callable[[], None]
    finish: Callable[[Tensor], None]


def run(
    size: str = "small",
    steps: int = 20,
    batch: int | None = None,
    latents: int = 8,
    clock: str = "wall",
    types: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure on a randomly filled UNet of SD1's layout. `size`: small (5.5 M parameters) or sd15 (860 M).

    With `types`, those against plain LoRA (`bench_types`) instead of plain LoRA against other libraries; "all" stands
    for EVERY_TYPE, at size sd15 without `full`, whose numbers with those of AdamW would take 17 GB.
    """
    from diffusers import UNet2DConditionModel

    config, usual_batch = SIZES[size]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config)
    batch = batch or usual_batch
    if types:
        every = [name for name in EVERY_TYPE if name != "full" or size != "sd15"]
        types = [one for name in types for one in (every if name == "all" else [name])]
        return {"size": size, **bench_types(unet, types, steps=steps, batch=batch, latents=latents, clock=clock)}
    return {"size": size, **bench(unet, steps=steps, batch=batch, latents=latents, clock=clock)}


def bench(
    model_unet: nn.Module,
    steps: int = 20,
    batch: int = 1,
    latents: int = 8,
    rank: int = 16,
    others: Sequence[str] = ("peft", "lycoris"),
    clock: str = "wall",
) -> dict[str, Any]:
    """Seconds per step of every contender and their ratios, as plain values for JSON.

    The UNet is left as it was, frozen. `others` that are not installed are left out. `latents`: their side in latent
    pixels. `clock`: wall, or cpu (CPU seconds of this process: less disturbed on a busy machine, meaningful with one
    thread).
    """
    model_unet.requires_grad_(False).train()
    layers = list(unet_layers(model_unet, "diffusers"))
    spec, seed = AdapterSpec("lierla", rank=rank, alpha=ALPHA), torch.Generator().manual_seed(0)
    network = build_network(layers, spec, BLOCKS, "Full", ("unet",), seed).to(next(model_unet.parameters()).device)
    paths = [layer.path for layer in layers if layer.key in network.adapters]
    data = _data(model_unet, batch, latents)
    makers = {"peft": _peft, "lycoris": _lycoris}
    contenders = [_bare(_shared(model_unet), data)]
    present = [name for name in others if importlib.util.find_spec(name) is not None]
    contenders += [makers[name](_shared(model_unet), data, paths, rank) for name in present]
    with network.attached():
        contenders.append(_ours(model_unet, data, network))
        rounds = _rounds(contenders, steps, clock)
    return {
        "parameters": sum(p.numel() for p in model_unet.parameters()),
        "trained": sum(p.numel() for p in network.parameters()),
        "modules": len(network),
        **_circumstances(data, rank, batch, latents, steps, clock),
        **_summary(rounds),
    }


def _circumstances(data: Data, rank: int, batch: int, latents: int, steps: int, clock: str) -> dict[str, object]:
    """What was measured, and on what."""
    return {
        "rank": rank,
        "batch": batch,
        "latents": latents,
        "steps": steps,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(data.x_BCHW.device),
    }


def bench_types(
    model_unet: nn.Module,
    types: Sequence[str],
    steps: int = 20,
    batch: int = 1,
    latents: int = 8,
    rank: int = 16,
    clock: str = "wall",
) -> dict[str, Any]:
    """Seconds per step of each type, and the ratios to plain LoRA on the attention layers (lierla) and on all (c3lier).

    A type is a name, with options after a plus: lokr, loha+use_dora, lokr+network_factor=8+use_dora; blocks=OUT* takes
    only the blocks of this pattern. As `bench`.
    """
    model_unet.requires_grad_(False).train()
    data, contenders, facts = _data(model_unet, batch, latents), [], {}
    with ExitStack() as attached:
        for name in dict.fromkeys(("lierla", "c3lier", *types)):
            unet, seed = _shared(model_unet), torch.Generator().manual_seed(0)
            layers = list(unet_layers(unet, "diffusers"))
            spec, blocks = _spec(name, rank)
            with _random_bases():
                network = build_network(layers, spec, blocks, "Full", ("unet",), seed)
            network.to(next(model_unet.parameters()).device)
            attached.enter_context(network.attached())
            contenders.append(dataclasses.replace(_ours(unet, data, network), name=name))
            facts[name] = {"modules": len(network), "trained": sum(p.numel() for p in network.parameters())}
        rounds = _rounds(contenders, steps, clock)
    whole = {name: [step for step, _ in taken] for name, taken in rounds.items()}
    for name, fact in facts.items():
        fact["seconds"] = statistics.median(whole[name])
        for base in ("lierla", "c3lier"):
            ratios = [a / b for a, b in zip(whole[name], whole[base], strict=True)]
            fact[f"to_{base}"] = statistics.median(ratios)
    return {
        "parameters": sum(p.numel() for p in model_unet.parameters()),
        **_circumstances(data, rank, batch, latents, steps, clock),
        "types": facts,
    }


def _spec(name: str, rank: int) -> tuple[AdapterSpec, tuple[str, ...]]:
    """Settings and blocks of a type written as lokr+network_factor=8+use_dora. Raises AtelierError for another name."""
    kind, *given = name.split("+")
    wanted = dict(option.partition("=")[::2] for option in given)
    options: dict[type, Any] = {}
    blocks = tuple(fnmatch.filter(BLOCKS, wanted.pop("blocks", "*")))
    for section in ADAPTERS.get(kind).sections:
        values = {}
        for p in parameters_of(section):
            if p.attribute in wanted:
                text = wanted.pop(p.attribute)
                values[p.attribute] = True if p.kind == "bool" else type(p.default)(text)
        options[section] = section(**values)
    if wanted:
        raise AtelierError(f"--types {name}: {kind} has no option {', '.join(wanted)}.")
    return AdapterSpec(kind, rank=rank, alpha=ALPHA, options=options), blocks


@contextmanager
def _random_bases() -> Iterator[None]:
    """Null and universal get random orthonormal directions inside the block: decomposing all weights of a large model
    takes minutes and has no part in a step.
    """

    def drawn(layers: Sequence[Layer], counts: Mapping[str, tuple[int, int]], *_: Any) -> dict[str, Pair]:
        generator, found = torch.Generator().manual_seed(0), {}
        for layer in layers:
            sizes = zip(reversed(weight_matrix(layer.module)), counts[layer.key], strict=True)
            down, up = (torch.linalg.qr(torch.randn(*size, generator=generator)).Q for size in sizes)
            found[layer.key] = down.T.contiguous(), up
        return found

    before = null.weight_bases, universal.weight_bases
    null.weight_bases = universal.weight_bases = drawn
    try:
        yield
    finally:
        null.weight_bases, universal.weight_bases = before


def _data(unet: Any, batch: int, latents: int) -> Data:
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(1)
    shape = (batch, unet.config.in_channels, latents, latents)
    x, target = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    context = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return Data(x.to(device), t.to(device), context.to(device), target.to(device))


def _shared(unet: nn.Module) -> nn.Module:
    """A copy of the module tree around the same tensors."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


def _loss(unet: nn.Module, data: Data) -> Tensor:
    return functional.mse_loss(unet(data.x_BCHW, data.t_B, data.context_BLD).sample, data.target_BCHW)


def _bare(unet: nn.Module, data: Data) -> Contender:
    """The frozen UNet forward and the gradient of its input: the least any training step can cost."""
    x = data.x_BCHW.clone().requires_grad_(True)
    inputs = Data(x, data.t_B, data.context_BLD, data.target_BCHW)

    def clear() -> None:
        x.grad = None

    return Contender("bare", lambda: _loss(unet, inputs), clear, lambda _: None)


def _ours(unet: nn.Module, data: Data, network: Network) -> Contender:
    """The step of `engine.loop`: flat gradients, guard against non-finite values, clipping, multi-tensor AdamW."""
    flat = FlatParameters(network)
    optimizer = make_optimizer("AdamW", [{**group, "lr": RATE} for group in network.trainable()], {}, network)

    def finish(loss: Tensor) -> None:
        finite = flat.guard(loss, MAX_NORM)
        flat.remember()
        optimizer.step()
        flat.undo_unless(finite)

    return Contender("ours", lambda: _loss(unet, data), flat.zero_gradients, finish)


def _plain(name: str, unet: nn.Module, data: Data, parameters: Iterable[nn.Parameter]) -> Contender:
    """A step as a training script writes it."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def finish(_: Tensor) -> None:
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()

    return Contender(name, lambda: _loss(unet, data), optimizer.zero_grad, finish)


def _peft(unet: Any, data: Data, paths: Sequence[str], rank: int) -> Contender:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(paths)))
    return _plain("peft", unet, data, [p for p in unet.parameters() if p.requires_grad])


def _lycoris(unet: nn.Module, data: Data, paths: Sequence[str], rank: int) -> Contender:
    from lycoris.wrapper import LycorisNetwork, create_lycoris

    with _preset(LycorisNetwork, {"target_module": [], "target_name": list(paths)}):
        network = create_lycoris(unet, 1.0, linear_dim=rank, linear_alpha=ALPHA, algo="lora")
        network.apply_to()
    network.requires_grad_(True).train()
    if len(network.loras) != len(paths):
        raise RuntimeError(f"LyCORIS took {len(network.loras)} layers, not {len(paths)}")
    return _plain("lycoris", unet, data, [p for p in network.parameters() if p.requires_grad])


@contextmanager
def _preset(cls: Any, preset: dict[str, Any]) -> Any:
    """LyCORIS keeps its targets on the class: set them, and put the former ones back. Its notices are kept quiet."""
    names = ("TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME")
    before = {name: getattr(cls, name) for name in names}
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        cls.apply_preset(preset)
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(cls, name, value)


def _rounds(contenders: Sequence[Contender], steps: int, clock: str) -> dict[str, list[tuple[float, float]]]:
    """(whole step, the part after backward) in seconds, by contender and round; the order rotates between rounds."""
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for number in range(steps + WARM_UP):
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            taken = _step(contender, CLOCKS[clock])
            if number >= WARM_UP:
                times[contender.name].append(taken)
    return times


def _step(contender: Contender, clock: Callable[[], float]) -> tuple[float, float]:
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    start = now()
    contender.clear()
    loss = contender.loss()
    loss.backward()
    middle = now()
    contender.finish(loss)
    end = now()
    return end - start, end - middle


def _summary(rounds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians, best times, and our ratios to the others."""
    whole = {name: [step for step, _ in taken] for name, taken in rounds.items()}
    result: dict[str, Any] = {
        "seconds": {name: statistics.median(steps) for name, steps in whole.items()},
        "best_seconds": {name: min(steps) for name, steps in whole.items()},
        "seconds_after_backward": {
            name: statistics.median(after for _, after in taken) for name, taken in rounds.items()
        },
    }
    ours = whole.pop("ours")
    result["ours_to"] = {
        name: statistics.median(a / b for a, b in zip(ours, steps, strict=True)) for name, steps in whole.items()
    }
    result["ours_to_best"] = {name: min(ours) / min(steps) for name, steps in whole.items()}
    return result

"""A network that is trained: its adapter, its optimisers and its moving average; saved so that it resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nasa_video.errors import InputError
from nasa_video.files.atomic import atomic_write
from nasa_video.train.distributed import DistributedContext, part_like, whole
from nasa_video.train.settings import Lora, Optimiser

Optimisers = Callable[[Mapping[str, nn.Parameter], Optimiser], list[torch.optim.Optimizer]]


def rate_at(settings: Optimiser, progress: float) -> float:
    """Learning rate's scale at a share of the run: a rise, a plateau, a straight fall."""
    if progress < settings.warmup:
        return progress / settings.warmup
    if progress < settings.flat or settings.flat == 1:
        return 1.0
    return 1 - (1 - settings.last) * (progress - settings.flat) / (1 - settings.flat)


def new_optimisers(trained: Mapping[str, nn.Parameter], settings: Optimiser) -> list[torch.optim.Optimizer]:
    """AdamW; for kind "matrix" also Muon, for the matrices inside a transformer's blocks."""
    inner = {name for name, p in trained.items() if "blocks." in name and p.dim() == 2}
    return split_optimisers(trained, settings, inner if settings.kind == "matrix" else set())


def split_optimisers(
    trained: Mapping[str, nn.Parameter],
    settings: Optimiser,
    inner: set[str],
    muon: Callable[..., torch.optim.Optimizer] = torch.optim.Muon,
) -> list[torch.optim.Optimizer]:
    """Muon for the inner weights, with updates of AdamW's root mean square (arXiv 2502.16982), AdamW for the rest."""
    decay = settings.weight_decay
    rest = [p for name, p in trained.items() if name not in inner]
    rate = (settings.other_rate or settings.rate) if inner else settings.rate
    made: list[torch.optim.Optimizer] = []
    if inner:
        weights = [trained[name] for name in trained if name in inner]
        made.append(muon(weights, lr=settings.rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    made.append(torch.optim.AdamW(rest, lr=rate, betas=settings.betas, weight_decay=decay, foreach=False))
    return made


class TrainState:
    """One trained network.

    Args:
        model: its weights that need no gradient are not touched, saved or averaged.
        average_decay: of an exponential moving average of what is trained (diffusers' EMAModel, in the weights'
            precision); None keeps none. It starts as the weights of the first update and warms up as
            (1 + n) / (10 + n), so that a short run does not average its own beginning.
        optimisers: which weights go to which optimiser.

    Raises:
        InputError: every weight is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Optimiser,
        context: DistributedContext,
        average_decay: float | None = None,
        optimisers: Optimisers = new_optimisers,
    ) -> None:
        self.model, self.settings, self.context = model, settings, context
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise InputError("nothing is left to train: every weight of the network is frozen")
        self.optimisers = optimisers(self.trained, settings)
        self.rates = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        weights = list(self.trained.values())
        fused = not isinstance(weights[0], DTensor)
        self.average = None if average_decay is None else EMAModel(weights, average_decay, foreach=fused)

    def step(self, progress: float) -> float:
        """Average the gradients over the processes, clip and update; returns their norm. Infinite ones are dropped."""
        self.context.average_gradients(self.model)
        weights = list(self.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(weights, self.settings.clip)
        size = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(size):
            for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate * rate_at(self.settings, progress)
                optimiser.step()
            if self.average is not None:
                self.average.step(weights)
        self.model.zero_grad(set_to_none=True)
        return size

    @property
    def averages(self) -> dict[str, Tensor]:
        """The moving averages by the weights' names; empty without one."""
        return {} if self.average is None else dict(zip(self.trained, self.average.shadow_params, strict=True))

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its average inside the scope; what was there comes back, bit for bit, also after an error."""
        before = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            _write(self.trained, self.averages)
            yield self.model
        finally:
            _write(self.trained, before)

    def copy_average_to(self, model: nn.Module) -> None:
        """Write the average into another module of the same parameters."""
        weights = dict(model.named_parameters())
        _write({name: weights[name] for name in self.trained}, self.averages)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, in whole tensors on the CPU; every process has to call this."""
        state = {
            "trained": dict(self.trained),
            "average": {} if self.average is None else self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        return dict(whole(state, keep=self.context.leads))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, whatever the number of processes was then.

        Raises:
            InputError: it is of another network or optimiser.
        """
        if state["trained"].keys() != self.trained.keys() or len(state["optimisers"]) != len(self.optimisers):
            raise InputError("the checkpoint is of another network or optimiser; choose another folder to start again")
        _write(self.trained, {name: part_like(value, self.trained[name]) for name, value in state["trained"].items()})
        if self.average is not None:
            own = self.average.shadow_params
            saved = [part_like(v, like) for v, like in zip(state["average"]["shadow_params"], own, strict=True)]
            self.average.load_state_dict({**state["average"], "shadow_params": saved})
        for optimiser, saved_state in zip(self.optimisers, state["optimisers"], strict=True):
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            entries = {
                index: {name: _like_parameter(value, parameters[index]) for name, value in entry.items()}
                for index, entry in saved_state["state"].items()
            }
            optimiser.load_state_dict({"state": entries, "param_groups": saved_state["param_groups"]})


def _like_parameter(value: Any, parameter: Tensor) -> Any:
    same = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    return part_like(value, parameter) if same else value


@torch.no_grad()
def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and containers; an interrupted write leaves the old file in place."""
    with atomic_write(path, parents=True) as part:
        torch.save(state, part)


def load_state(path: Path) -> dict[str, Any] | None:
    """The state saved at ``path``, read without executing anything; None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def add_lora(model: nn.Module, settings: Lora, seed: int) -> None:
    """Freeze a model and put a trainable adapter into the named projections; it starts as the identity.

    Raises:
        InputError: no projection has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.scaling, target_modules=list(settings.targets))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"a LoRA on {', '.join(settings.targets)} fits no layer of this model: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model without its adapter inside the scope.

    PEFT's own switch also changes what requires a gradient, which sharded parameters must not do in between
    (huggingface/peft 1442, 2977); this one sets a plain boolean that the layers look at.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def save_lora(path: Path, trained: dict[str, Tensor], settings: Lora) -> None:
    """Write an adapter under diffusers' names, scaled so that a loader's scale of 1 is the trained one.

    Args:
        trained: the adapter's parameters by their names in the model, on the CPU.
    """
    scale = settings.scaling / settings.rank
    tensors = {}
    for name, value in trained.items():
        key = "transformer." + name.removeprefix("transformer.").replace(".default.", ".")
        tensors[key] = (value * scale if ".lora_B." in key else value).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)

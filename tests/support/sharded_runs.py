"""What the ranks of a test do: every function takes the mesh that they share."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import came8bit
from came8bit import CAME

SHAPES = {
    "matrix": (37, 300),
    "three rows": (3, 400),  # one of four ranks has none
    "vector": (53,),
    "convolution": (12, 4, 3, 3),
    "experts": (5, 20, 24),
    "narrow": (600, 2),
}
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "min_8bit_size": 100}


def gradient(name: str, step: int) -> Tensor:
    """The gradient of a parameter, the same on every rank; some jump."""
    index = list(SHAPES).index(name)
    generator = torch.Generator().manual_seed(1000 * index + step)
    grad = torch.randn(SHAPES[name], generator=generator)
    grad = grad * torch.exp(torch.randn(SHAPES[name][:1], generator=generator)).view(
        -1, *[1] * (grad.dim() - 1)
    )
    return grad * (30.0 if step % 3 == 2 else 1.0)


def sharded(tensor: Tensor, mesh: Any) -> Tensor:
    """``tensor`` as FSDP2 has it: rows on the last dimension of the mesh."""
    if mesh is None:
        return tensor.clone()
    cut = [Shard(0) if i == mesh.ndim - 1 else Replicate() for i in range(mesh.ndim)]
    return distribute_tensor(tensor, mesh, cut)


def whole(tensor: Any) -> Any:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parameters(mesh: Any, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    start = {n: torch.randn(s, generator=generator).mul(0.05) for n, s in SHAPES.items()}
    return {n: nn.Parameter(sharded(x.to(dtype), mesh)) for n, x in start.items()}


def outcome(params: dict[str, nn.Parameter], optimizer: CAME) -> dict[str, dict[str, Tensor]]:
    """Every parameter and its state, whole."""
    return {
        name: {
            "param": whole(param.detach()),
            **{key: whole(x) for key, x in optimizer.state[param].items()},
        }
        for name, param in params.items()
    }


def steps(
    mesh: Any, dtype: torch.dtype = torch.float32, count: int = 5, spoiled: int = -1, **options: Any
) -> dict[str, dict[str, Tensor]]:
    """Take steps with given gradients; return every parameter and its state, whole.

    Args:
        spoiled: the step in which the last element of one gradient is NaN.
        options: of the optimizer.
    """
    params = parameters(mesh, dtype)
    optimizer = CAME(params.items(), **{**OPTIONS, **options})
    for t in range(count):
        for name, param in params.items():
            grad = gradient(name, t)
            if t == spoiled and name in ("matrix", "vector"):
                grad.view(-1)[-1] = torch.nan
            param.grad = sharded(grad.to(dtype), mesh)
        optimizer.step()
    return outcome(params, optimizer)


def warm_up(mesh: Any, in_hooks: bool) -> dict[str, dict[str, Tensor]]:
    """Take steps at learning rates from 0 up, the first with gradients in the first row only.

    Of one parameter they are zero everywhere.
    """
    params = parameters(mesh, torch.float32)
    optimizer = CAME(params.items(), **{**OPTIONS, "lr": 0.0})
    group = optimizer.param_groups[0]
    for t in range(3):
        group["lr"] = 1e-3 * t
        for name, param in params.items():
            grad = gradient(name, t)
            if t == 0:
                grad[0 if name == "experts" else 1 :] = 0.0
            param.grad = sharded(grad, mesh)
        if in_hooks:
            for i, param in enumerate(group["params"]):
                optimizer.step_parameter(param, group, i)
        else:
            optimizer.step()
    return outcome(params, optimizer)


def bytes_sent(mesh: Any, cautious: bool) -> list[int]:
    """Take a step and return the bytes of every collective."""
    sent: list[int] = []
    reduce = torch.distributed.all_reduce

    def counting(tensor: Tensor, **more: Any) -> Any:
        sent.append(tensor.numel() * tensor.itemsize)
        return reduce(tensor, **more)

    params = parameters(mesh, torch.float32)
    groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params.values())]
    optimizer = CAME(groups, **OPTIONS, cautious=cautious)
    for name, param in params.items():
        param.grad = sharded(gradient(name, 0), mesh)
    torch.distributed.all_reduce = counting
    try:
        optimizer.step()
    finally:
        torch.distributed.all_reduce = reduce
    return sent


def error_of(mesh: Any, case: str) -> tuple[str, bool]:
    """Return the error of a step, and whether everything is as it was."""
    rank = mesh.get_local_rank(mesh.ndim - 1)
    params = parameters(mesh, torch.float32)
    strict = {"nonfinite": "skip" if case.endswith("skipped") else "raise"}
    groups: list[dict[str, Any]] = [{"params": [param], **strict} for param in params.values()]
    optimizer = CAME(groups, **{**OPTIONS, "lr": 0.0 if case.endswith("lr 0") else 1e-3})
    if case == "state":  # known after the second pass, in which the vector is skipped
        optimizer.materialize()
        optimizer.state[params["matrix"]]["exp_avg_sq_row"].to_local().fill_(torch.nan)
        optimizer.param_groups[2]["nonfinite"] = "skip"
    for name, param in params.items():
        grad = gradient(name, 0)
        spoiled = {"nan": "matrix", "missing, skipped": "matrix", "state": "vector"}
        if name == spoiled.get(case):
            grad.view(-1)[0] = torch.nan
        param.grad = sharded(grad, mesh)
    before = {n: whole(p.detach()).clone() for n, p in params.items()}
    if case.startswith("missing") and rank == 1:
        params["vector"].grad = None
    message = ""
    for _ in range(2):  # state that some ranks have made does not confuse the second step
        try:
            optimizer.step()
        except (RuntimeError, FloatingPointError) as error:
            message = f"{type(error).__name__}: {error}"
    same = all(torch.equal(whole(p.detach()), before[n]) for n, p in params.items())
    counts = [int(state["step"]) + int(state["skipped"]) for state in optimizer.state.values()]
    return message, same and not any(counts)


def construct(mesh: Any, shape: tuple[int, ...], **options: Any) -> str:
    """Return the error of an optimizer for a sharded parameter of ``shape``."""
    try:
        CAME([nn.Parameter(sharded(torch.zeros(shape), mesh))], **options)
    except NotImplementedError as error:
        return str(error)
    return ""


# --- models ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a gated feed-forward, as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.gate = (nn.Linear(width, 88, bias=False) for _ in range(2))
        self.down = nn.Linear(88, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        )
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A small one; the head is tied to the embedding, whose rows no number of ranks divides."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(67, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 67, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def llama(mesh: Any, kind: str = "fp32") -> Llama:
    """A model, sharded if there is a mesh."""
    torch.manual_seed(3)
    model = Llama().to(torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "frozen half":
        model.blocks[0].requires_grad_(False)
    if mesh is not None:
        how: dict[str, Any] = {"mesh": mesh}
        if kind == "mixed precision":
            how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if kind == "CPU offload":
            how["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for block in model.blocks:
            fully_shard(block, **how)
        fully_shard(model, **how)
    return model


def learn(model: nn.Module, optimizer: CAME, mesh: Any, count: int, first: int = 0) -> None:
    """Train on this rank's part of 12 sequences a step."""
    ranks = 1 if mesh is None else mesh.size()
    rank = 0 if mesh is None else mesh.get_rank()
    for t in range(first, first + count):
        generator = torch.Generator().manual_seed(t)
        tokens = torch.randint(67, (12, 9), generator=generator).cumsum(-1) % 67
        mine = tokens.chunk(ranks)[rank]
        loss = F.cross_entropy(model(mine[:, :-1]).flatten(0, 1).float(), mine[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train(mesh: Any, kind: str, count: int, **options: Any) -> dict[str, Tensor]:
    """Train a model and return its parameters, whole."""
    model = llama(mesh, kind)
    optimizer = CAME(model.named_parameters(), **{**OPTIONS, "optim_bits": 32, **options})
    learn(model, optimizer, mesh, count)
    return {name: whole(param.detach()).float() for name, param in model.named_parameters()}


# --- saved state ----------------------------------------------------------------------------------


def whole_state(model: nn.Module, optimizer: CAME) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": whole(value)
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }


def save(mesh: Any, folder: str, **options: Any) -> dict[str, Tensor]:
    """Train, save with torch.distributed.checkpoint and in one file; return the state."""
    model = llama(mesh)
    optimizer = CAME(model.named_parameters(), **OPTIONS, **options)
    learn(model, optimizer, mesh, 3)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder, process_group=mesh.get_group())
    came8bit.save_checkpoint(optimizer, f"{folder}.safetensors")
    return whole_state(model, optimizer)


def load(mesh: Any, folder: str, way: str, **options: Any) -> dict[str, Tensor]:
    """Load what :func:`save` has saved, on any number of ranks, and return the state."""
    model = llama(mesh)
    optimizer = CAME(model.named_parameters(), **OPTIONS, **options)
    if way == "file":
        came8bit.load_checkpoint(optimizer, f"{folder}.safetensors")
        return whole_state(model, optimizer)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    assert not any(int(one["step"]) for one in optimizer.state.values())
    dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return whole_state(model, optimizer)


def load_in_other_bits(mesh: Any, folder: str, old: int, new: int) -> list[dict[str, Tensor]]:
    """Load what :func:`save` has saved with ``old`` bits: the file, and by way of an optimizer."""
    results = []
    for through in (False, True):
        model = llama(mesh)
        optimizer = CAME(model.named_parameters(), **OPTIONS, optim_bits=new)
        if through:
            saved = CAME(model.named_parameters(), **OPTIONS, optim_bits=old)
            came8bit.load_checkpoint(saved, f"{folder}.safetensors")
            optimizer.load_state_dict(saved.state_dict())
        else:
            came8bit.load_checkpoint(optimizer, f"{folder}.safetensors")
        results.append({name: x.clone() for name, x in whole_state(model, optimizer).items()})
        learn(model, optimizer, mesh, 1, first=3)
    return results


def error_of_loading(mesh: Any, folder: str, new: int) -> str:
    """Return the error of loading what :func:`save` saved with DCP into state of ``new`` bits."""
    try:
        load(mesh, folder, "sharded", optim_bits=new)
    except (ValueError, CheckpointException) as error:
        return str(error)
    return ""


def state_and_back(mesh: Any, gather: dict[str, bool], take: dict[str, bool]) -> bool:
    """Gather the state and take it back; both with options of ``StateDictOptions``."""
    model = llama(mesh)
    optimizer = CAME(model.named_parameters(), **OPTIONS, optim_bits=8)
    learn(model, optimizer, mesh, 2)
    expected = whole_state(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**gather))
    other_model = llama(mesh)
    other = CAME(other_model.named_parameters(), **OPTIONS, optim_bits=8)
    set_optimizer_state_dict(other_model, other, state, options=StateDictOptions(**take))
    got = whole_state(other_model, other)
    return got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)


def saved_early(mesh: Any) -> bool:
    """Whether asking for the state before the first step changes nothing of what follows."""
    trained = []
    for early in (False, True):
        model = llama(mesh)
        optimizer = CAME(model.named_parameters(), **OPTIONS, bias_correction=True)
        if early:
            get_optimizer_state_dict(model, optimizer)
        learn(model, optimizer, mesh, 2)
        trained.append([whole(p.detach()) for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


# --- whole parameters on several ranks ------------------------------------------------------------


def replicas(mesh: Any, count: int) -> list[Tensor]:
    """Train with DistributedDataParallel in bf16 and return the parameters of this rank."""
    model = llama(None, "bf16")
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    optimizer = CAME(wrapped.named_parameters(), **OPTIONS, optim_bits=8)
    learn(wrapped, optimizer, mesh, count)
    return [param.detach() for param in model.parameters()]


def zero_redundancy(mesh: Any, count: int, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Take steps with ZeroRedundancyOptimizer; return parameters and how many have state here.

    One group a parameter, whose ``stream`` is what its name would be to an optimizer of all.
    """
    params = parameters(None, dtype)
    groups = [
        {"params": [param], "stream": zlib.crc32(name.encode())} for name, param in params.items()
    ]
    optimizer = ZeroRedundancyOptimizer(
        groups, optimizer_class=CAME, process_group=mesh.get_group(), **OPTIONS
    )
    for t in range(count):
        for name, param in params.items():
            param.grad = gradient(name, t).to(dtype)
        optimizer.step()
    return [p.detach() for p in params.values()], len(optimizer.optim.state)

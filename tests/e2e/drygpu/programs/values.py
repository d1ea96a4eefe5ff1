"""Every check computes the same thing from the same data on the CPU and on the dry GPU, and prints what differs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch

from pytest_vram.drygpu.values import host_reads, known_values

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
IDS = torch.tensor([[5, 3, 3, 9, 1], [7, 7, 2, 2, 8]])

FEW = torch.tensor([1.0, 4.0, 9.0])
ELEMENTARY = (torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.sigmoid, torch.tanh, torch.sin, torch.erf)

Make = Callable[[torch.device], Any]
CHECKS: dict[str, Make] = {
    "all ones": lambda d: bool((torch.ones(2, 7, dtype=torch.long).to(d) == 1).all()),
    "padded": lambda d: bool(MASK.to(d).bool().all()),
    "packed positions": lambda d: bool((torch.diff(PACKED.to(d), dim=-1) != 1).any()),
    "packed sequence indices": lambda d: (torch.diff(PACKED.to(d), prepend=PACKED.to(d)[:, :1] - 1) != 1).cumsum(-1),
    "unpacked positions": lambda d: (torch.diff(torch.arange(9, device=d)[None]) != 1).cumsum(-1)[:, -1].eq(0).all(),
    "nonzero": lambda d: MASK.to(d).nonzero(),
    "nonzero of nothing": lambda d: torch.zeros(3, dtype=torch.long, device=d).nonzero(),
    "nonzero as tuple": lambda d: MASK.to(d).nonzero(as_tuple=True)[1],
    "masked_select": lambda d: IDS.to(d).masked_select(MASK.to(d).bool()),
    "boolean index": lambda d: IDS.to(d)[MASK.to(d) == 0],
    "boolean index of floats": lambda d: torch.zeros(5, 3, device=d)[(IDS[0] > 3).to(d)].shape[0],
    "boolean index assignment": lambda d: IDS.to(d).clone().index_put_((MASK.to(d) == 0,), torch.tensor(-100).to(d)),
    "label mask": lambda d: IDS.to(d).masked_fill(MASK.to(d) == 0, -100),
    "count targets": lambda d: (IDS.to(d).masked_fill(MASK.to(d) == 0, -100)[:, 1:] != -100).sum().item(),
    "lengths": lambda d: MASK.to(d).sum(-1).tolist(),
    "longest": lambda d: int(MASK.to(d).sum(-1).max()),
    "last token": lambda d: IDS.to(d)[torch.arange(2, device=d), MASK.to(d).sum(-1) - 1],
    "flash unpad": lambda d: torch.nn.functional.pad(MASK.to(d).sum(-1).cumsum(0, dtype=torch.int32), (1, 0)),
    "coalesce": lambda d: torch.sparse_coo_tensor(PACKED.to(d), torch.ones(8).to(d)).coalesce().indices(),
    "compressed rows": lambda d: torch.sparse_coo_tensor(IDS.to(d), torch.ones(5).to(d)).to_sparse_csr().crow_indices(),
    "repeat_interleave": lambda d: torch.arange(3, device=d).repeat_interleave(torch.tensor([2, 0, 3]).to(d)),
    "unique": lambda d: IDS.to(d).unique(),
    "unique with counts": lambda d: torch.unique(IDS.to(d), return_inverse=True, return_counts=True),
    "unique_consecutive": lambda d: torch.unique_consecutive(IDS.to(d)[0], return_counts=True),
    "unique_consecutive along a dimension": lambda d: torch.unique_consecutive(IDS.to(d), dim=1, return_counts=True),
    "unique along a dimension": lambda d: torch.unique(IDS.to(d), dim=1),
    "mode": lambda d: torch.mode(IDS.to(d)),
    "mode of many": lambda d: torch.mode((torch.arange(5000) % 7).to(d))[0],
    "bincount": lambda d: torch.bincount(IDS.to(d)[0], minlength=4),
    "histc of whole numbers": lambda d: torch.histc(
        IDS[0].to(d).to(torch.int32 if d == GPU else torch.float32), 4, 0, 3
    ).int(),
    "histc": lambda d: torch.histc(IDS.to(d)[0].float(), bins=4, min=0, max=3),
    "one_hot": lambda d: torch.nn.functional.one_hot(IDS.to(d), 12).sum((0, 1)),
    "one_hot of unknown width": lambda d: torch.nn.functional.one_hot(IDS.to(d)).shape[-1],
    "where": lambda d: torch.where(MASK.to(d) == 0, IDS.to(d), 0),
    "where of two numbers": lambda d: torch.where(MASK.to(d) == 0, 7, 0),
    "where without values": lambda d: torch.where(MASK.to(d) == 0),
    "sort": lambda d: torch.sort(IDS.to(d), dim=-1, stable=True),
    "argsort": lambda d: torch.argsort(IDS.to(d)[0], stable=True),
    "topk": lambda d: IDS.to(d)[:1].topk(1, sorted=True)[0],
    "argmax": lambda d: IDS.to(d)[0].argmax(),
    "max along a dimension": lambda d: IDS.to(d).max(0)[0],
    "cat": lambda d: torch.cat([IDS.to(d), MASK.to(d)], 1),
    "stack": lambda d: torch.stack([IDS.to(d), MASK.to(d)]),
    "stack along the last dimension": lambda d: torch.stack([IDS.to(d)[0], IDS.to(d)[1]], 1),
    "combinations": lambda d: torch.combinations(IDS.to(d)[0]),
    "gather": lambda d: IDS.to(d).gather(1, MASK.to(d)),
    "scatter": lambda d: torch.zeros(2, 9, dtype=torch.long, device=d).scatter_(1, MASK.to(d), 1),
    "index_select": lambda d: IDS.to(d).index_select(1, torch.tensor([0, 4]).to(d)),
    "searchsorted": lambda d: torch.searchsorted(torch.tensor([0, 3, 7]).to(d), torch.arange(8, device=d), right=True),
    "equal": lambda d: torch.equal(IDS.to(d), IDS.to(d).clone()),
    "isin": lambda d: torch.isin(IDS.to(d), torch.tensor([3, 9]).to(d)),
    "isin of many": lambda d: torch.isin(IDS.to(d), torch.arange(3, 90).to(d)),
    "cumulative": lambda d: MASK.to(d).long().cumsum(-1).masked_fill(MASK.to(d) == 0, 1) - 1,
    "tril": lambda d: torch.ones(4, 4, dtype=torch.bool, device=d).tril(),
    "full": lambda d: torch.full((3,), 7, device=d),
    "floats": lambda d: torch.tensor([0.5, 1.5]).to(d).sum().item(),
    "float of a count": lambda d: (MASK.to(d).sum().float() / 2).item(),
    "statistics": lambda d: [f(FEW.to(d)).item() for f in (torch.mean, torch.std, torch.var, torch.norm, torch.amax)],
    "quantile": lambda d: torch.quantile(FEW.to(d), 0.5),
    "elementary functions": lambda d: [round(f(FEW.to(d)).sum().item(), 4) for f in ELEMENTARY],
    "moved towards another in place": lambda d: FEW.to(d).clone().lerp_(FEW.to(d) * 2, 0.5),
    "many at once": lambda d: _many(d),
    "written to an argument": lambda d: torch.sqrt(FEW.to(d), out=torch.zeros(3, device=d)),
    "in place": lambda d: IDS.clone().to(d).add_(1).mul_(2).remainder_(7),
    "a list in place": lambda d: _added_to_a_list(d),
    "scale of a gradient scaler": lambda d: _grown_scale(d),
    "kthvalue": lambda d: IDS.to(d).kthvalue(2)[0],
    "nanmedian": lambda d: IDS.to(d).nanmedian(),
    "greatest divisor in place": lambda d: IDS.to(d).clone().gcd_(torch.tensor(6).to(d)),
    "written through a slice": lambda d: torch.zeros(2, 8, dtype=torch.long, device=d)[:, 2:7].copy_(IDS.to(d)).sum(),
    "read through a slice": lambda d: IDS.to(d)[:, ::2].tolist(),
    "transposed": lambda d: IDS.to(d).t().cpu(),
    "other type": lambda d: IDS.to(d).int().to(torch.uint8).cpu(),
    "numpy": lambda d: IDS.to(d).cpu().numpy().tolist(),
    "round trip": lambda d: IDS.to(d, non_blocking=True).to("cpu"),
    "pinned": lambda d: (IDS.pin_memory() if d == GPU else IDS).to(d, non_blocking=True).cpu(),
    "kept by a clone": lambda d: IDS.to(d).clone().contiguous().view(-1).cpu(),
    "number kinds": lambda d: [
        str((torch.ones(2, dtype=t, device=d) * n).dtype) for t in DTYPES for n in (1, 1.5, True)
    ],
    "zero-dim number kinds": lambda d: [
        str((torch.ones((), dtype=t, device=d) + n).dtype) for t in DTYPES for n in (1, 2.5)
    ],
    "division": lambda d: [str((torch.ones(2, dtype=t, device=d) / 2).dtype) for t in DTYPES],
    "number first": lambda d: [
        (3 - IDS.to(d)).sum().item(),
        (2 ** IDS.to(d)).sum().item(),
        (100 // IDS.to(d)).sum().item(),
    ],
    "iteration": lambda d: [int(x) for x in IDS.to(d)[0]],
    "as an index": lambda d: list(range(20))[IDS.to(d)[0, 3]],
    "split by sizes": lambda d: [len(part) for part in torch.arange(8, device=d).split(MASK.to(d).sum(-1).tolist())],
    "tensor_split": lambda d: [part.tolist() for part in IDS.to(d)[0].tensor_split(2)],
    "inference": lambda d: _inference(d),
}
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "erfinv_": lambda x: x.erfinv_(),
    "out": lambda x: torch.special.i0(torch.ones_like(x), out=x),
    "a list": lambda x: torch._foreach_lerp_([x], [torch.ones(3, 3, device=GPU) @ x], 0.5),
    "an optimizer": lambda x: torch.optim.AdamW([_with_gradient(x)], fused=True).step(),
}
"""Writes over known values whose results are not computed."""


def _with_gradient(x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_().grad = torch.randn_like(x)
    return x


def _inference(device: torch.device) -> Any:
    with torch.inference_mode():
        return IDS.clone().to(device).add_(1).sum().item()


def _added_to_a_list(device: torch.device) -> Any:
    counts = [torch.tensor([0.0, 2.0]).to(device), torch.tensor([3.0]).to(device)]
    torch._foreach_add_(counts, 1)
    return [count.tolist() for count in counts]


def _grown_scale(device: torch.device) -> Any:
    """The scale after a step without infinite gradients, when it grows after every step."""
    scale, tracker, found = (
        torch.full((1,), n, dtype=t).to(device) for n, t in ((8.0, None), (0, torch.int32), (0, None))
    )
    torch._amp_update_scale_(scale, tracker, found.float(), 2.0, 0.5, 1)
    return [scale.item(), tracker.item()]


def _many(device: torch.device) -> Any:
    tensors = [FEW.to(device) * 3, FEW.to(device) + 1]
    torch._foreach_mul_(tensors, 2.0)
    torch._foreach_add_(tensors, 1.0)
    return tensors


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.cpu().tolist()]
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def random_programs(count: int) -> list[str]:
    """Chains of operators on random whole numbers; what differs from the CPU."""
    rng = random.Random(0)
    steps: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda a, b: a + b,
        lambda a, b: a - 2 * b,
        lambda a, b: torch.minimum(a, b),
        lambda a, b: a.cumsum(-1),
        lambda a, b: torch.where(a > b, a, b),
        lambda a, b: torch.cat([a, b], -1)[..., :4],
        lambda a, b: a.masked_fill(b > 2, 0),
        lambda a, b: a.clamp(-3, 3),
        lambda a, b: a.flip(-1),
        lambda a, b: a.roll(1, -1),
        lambda a, b: a.abs() % 5,
        lambda a, b: a.gather(-1, b.abs() % 4),
        lambda a, b: (a == b).long() + a,
        lambda a, b: a.t().contiguous() if a.shape[0] == a.shape[1] else a,
        lambda a, b: a.scatter_add(-1, b.abs() % 4, b),
        lambda a, b: a.sort(-1)[0],
        lambda a, b: a.index_fill(0, torch.zeros(1, dtype=torch.long, device=a.device), 1),
        lambda a, b: a.clone().add_(b[:1]),
        lambda a, b: a.max(0, keepdim=True)[0].expand_as(a) - a,
        lambda a, b: a.bitwise_xor(b),
        lambda a, b: torch.diff(a, prepend=b[:, :1]),
        lambda a, b: a[(b >= b.min()).any(-1)],
    ]
    wrong = []
    for case in range(count):
        dtype = rng.choice([torch.int64, torch.int32])
        start = torch.tensor([[rng.randint(-4, 4) for _ in range(4)] for _ in range(4)], dtype=dtype)
        other = torch.tensor([[rng.randint(-4, 4) for _ in range(4)] for _ in range(4)], dtype=torch.int64)
        chain = [rng.randrange(len(steps)) for _ in range(rng.randint(1, 6))]
        results = []
        for device in (CPU, GPU):
            a, b = start.to(device), other.to(device)
            try:
                for index in chain:
                    a = steps[index](a, b)
                results.append(plain(a))
            except RuntimeError as error:
                results.append(type(error).__name__)
        if results[0] != results[1]:
            wrong.append(f"case {case}, steps {chain}: {results}")
    return wrong


def unknown() -> dict[str, Any]:
    """What is read of values that the device would have computed, and how it is labelled."""
    noise = torch.randn(6, 8, device=GPU) @ torch.randn(8, 8, device=GPU)
    host_reads.reset()
    answers: dict[str, Any] = {
        "loss": (noise @ noise.t()).sum().item(),
        "finite": bool(torch.isfinite(noise).all()),
        "nan": bool(torch.isnan(noise).any()),
        "router": noise.softmax(-1).topk(2)[1].flatten().bincount().tolist(),
        "mask": tuple((noise > 0).nonzero().shape),
        "greedy": noise.argmax(-1).tolist(),
        "sampled": noise[-1].softmax(-1).multinomial(1).item(),
        "drawn": list(
            torch.distributions.Normal(torch.randn(64, 64, device=GPU), noise.new_empty(64, 64)).sample().shape
        ),
        "columns": list(noise.unique(dim=1).shape),
        "counts": [
            noise.unique(return_inverse=True, return_counts=True, dim=dim)[-1].sum().item() for dim in (None, 1)
        ],
        "inverse": noise.unique_consecutive(return_inverse=True, dim=0)[1].tolist(),
        "joined": torch.cat([torch.tensor([3, 4]).to(GPU), noise[0].long()])[:2].tolist(),
        "exponentials": list(torch.linalg.matrix_exp(noise.new_empty(16, 8, 8)).shape),
        "error code": torch.linalg.cholesky_ex(noise[:, :6]).info.item(),
    }
    # What a kernel has written over is not the program's own any more, though it was.
    for name, write in WRITES.items():
        values = torch.tensor([0.25, 0.5, 0.75]).to(GPU)
        write(values)
        answers[f"after {name}"] = known_values.find(values) is None
    mask = noise > 0
    answers["counted"] = [mask.sum().item(), mask.sum(-1).tolist(), noise[mask].shape[0], noise[~mask].shape[0]]
    answers["drawn again"] = _drawn_again()
    # The very bytes of a known tensor, given to another one: its value must not be believed.
    known = torch.full((4,), 7, device=GPU)
    address = known.data_ptr()
    del known
    fresh = torch.empty(4, dtype=torch.int64, device=GPU)
    answers["same address"] = fresh.data_ptr() == address
    answers["stale"] = fresh.tolist()
    answers["reads"] = [
        [read.operation, read.answered, read.note, read.location.rsplit("/", 1)[-1].partition(":")[0]]
        for read in host_reads.collect()
    ]
    return answers


def _drawn_again() -> dict[str, Any]:
    """Random numbers that are read: their distribution, and those drawn from a generator that was put back."""
    kept = torch.rand(64, 100, device=GPU) < 0.75
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device=GPU).tolist()
    after = torch.rand(3, device=GPU).tolist()
    torch.cuda.set_rng_state(state)
    return {
        "mask": [int(kept.sum()), len(torch.zeros(64, 100, device=GPU)[kept])],
        "same": torch.rand(3, device=GPU).tolist() == first,
        "another": after != first,
        "classes": torch.nn.functional.one_hot(torch.randint(0, 10, (1000,), device=GPU)).shape[-1],
        "kept": sum(int(torch.bernoulli(torch.tensor(0.9, device=GPU)).item()) for _ in range(100)),
    }


def main() -> None:
    differ = {}
    for name, make in CHECKS.items():
        wanted, got = plain(make(CPU)), plain(make(GPU))
        differ[name] = None if wanted == got else [wanted, got]
    before = torch.cuda.memory_allocated()
    reads = [[read.answered, read.note] for read in host_reads.collect() if not read.answered or read.note]
    print(
        json.dumps(
            {"differ": differ, "reads": reads, "random": random_programs(400), "unknown": unknown(), "held": before}
        )
    )


main()

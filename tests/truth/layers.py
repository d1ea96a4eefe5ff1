"""Cases that are no language model: vision, recurrent layers, FFT, solvers, graphs, streams, the context."""

from __future__ import annotations

import torch
from marks import Marks, case, train
from torch import nn
from torch.nn import functional


def classify(marks: Marks, name: str, rows: int, *, benchmark: bool = False) -> None:
    """Train a vision model of timm on random images of 224 x 224."""
    import timm

    torch.backends.cudnn.benchmark = benchmark
    model = timm.create_model(name, pretrained=False).cuda().train()
    images = torch.randn(rows, 3, 224, 224, device="cuda")
    labels = (torch.arange(rows) % 1000).cuda()
    train(marks, model, lambda _: functional.cross_entropy(model(images), labels))


@case("timm", "nvidia-cudnn-cu13")
def resnet50_fp32(marks: Marks) -> None:
    classify(marks, "resnet50", 64)


@case("timm", "nvidia-cudnn-cu13")
def resnet50_benchmark(marks: Marks) -> None:
    classify(marks, "resnet50", 64, benchmark=True)


@case("timm", "nvidia-cudnn-cu13")
def vgg16_fp32(marks: Marks) -> None:
    classify(marks, "vgg16", 32)


@case("torchvision", "nvidia-cudnn-cu13")
def r3d18_fp32(marks: Marks) -> None:
    from torchvision.models.video import r3d_18

    model = r3d_18(weights=None).cuda().train()
    clips = torch.randn(8, 3, 16, 112, 112, device="cuda")
    labels = torch.zeros(8, dtype=torch.long, device="cuda")
    train(marks, model, lambda _: functional.cross_entropy(model(clips), labels))


@case("nvidia-cudnn-cu13")
def lstm_fp32(marks: Marks) -> None:
    model = nn.LSTM(512, 1024, 2, batch_first=True).cuda()
    rows = torch.randn(64, 256, 512, device="cuda")
    train(marks, model, lambda _: model(rows)[0].square().mean())


@case("triton")
def mlp_compile_reduce_overhead(marks: Marks) -> None:
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(2048, 2048), nn.GELU()))).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    rows = torch.randn(1024, 2048, device="cuda")
    train(marks, model, lambda _: compiled(rows).square().mean(), steps=5)


@case("triton")
def flex_attention(marks: Marks) -> None:
    from torch.nn.attention import flex_attention as flex

    shape = (4, 16, 2048, 64)
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    causal = flex.create_block_mask(lambda _b, _h, i, j: i >= j, None, None, 2048, 2048)
    compiled = torch.compile(flex.flex_attention)
    marks.mark("built")
    for step in range(3):
        compiled(query, key, value, block_mask=causal).sum().backward()
        marks.mark(f"step{step}")


@case()
def cuda_graph_step(marks: Marks) -> None:
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU()))).cuda()
    rows = torch.randn(512, 1024, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        model(rows).sum().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    marks.mark("warm")
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    marks.mark("captured")
    graph.replay()
    marks.mark("replayed")


@case()
def side_stream(marks: Marks) -> None:
    side = torch.cuda.Stream()
    model = nn.Linear(4096, 4096).cuda()
    hosts = [torch.randn(2048, 4096).pin_memory() for _ in range(6)]

    def loss_of(step: int) -> torch.Tensor:
        with torch.cuda.stream(side):
            rows = hosts[step % 6].to("cuda", non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)
        rows.record_stream(torch.cuda.current_stream())
        return model(rows).relu().square().mean()

    train(marks, model, loss_of, steps=12)


@case()
def fft_fno(marks: Marks) -> None:
    weight = nn.Parameter(torch.randn(64, 64, 32, 32, dtype=torch.cfloat, device="cuda"))
    model = nn.ParameterList([weight])
    images = torch.randn(16, 64, 256, 256, device="cuda")

    def loss_of(_step: int) -> torch.Tensor:
        spectrum = torch.fft.rfft2(images)
        out = torch.zeros_like(spectrum)
        out[:, :, :32, :32] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :32, :32], weight)
        return torch.fft.irfft2(out, s=(256, 256)).square().mean()

    train(marks, model, loss_of)


@case()
def linalg_mix(marks: Marks) -> None:
    matrix = torch.randn(2048, 2048, device="cuda")
    marks.mark("built")
    for number in range(2):
        definite = matrix @ matrix.T + 2048 * torch.eye(2048, device="cuda")
        torch.linalg.cholesky(definite)
        torch.linalg.solve(definite, matrix)
        torch.linalg.qr(matrix)
        torch.linalg.eigh(definite)
        torch.linalg.svd(matrix[:1024, :512])
        marks.mark(f"round{number}")


@case()
def ops_index_sort(marks: Marks) -> None:
    x = torch.randn(1 << 22, device="cuda", requires_grad=True)
    marks.mark("built")
    for number in range(2):
        v, _k = x.sort()
        u = torch.randint(0, 1000, (1 << 22,), device="cuda")
        y = torch.zeros(1000, device="cuda").index_add(0, u, x)
        z = x.topk(1000).values.sum() + x.cumsum(0).mean() + v.sum() + y.sum()
        # The last operator forward is the first one backward, when no other gradient exists yet.
        z = z + functional.embedding(u, x[:1000].view(-1, 1)).sum()
        z.backward()
        x.grad = None
        marks.mark(f"round{number}")


@case()
def matmul_ladder(marks: Marks) -> None:
    marks.mark("start")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in (256, 1000, 4096):
            a = torch.randn(n, n, device="cuda", dtype=dtype)
            b = torch.randn(n, n, device="cuda", dtype=dtype)
            a @ b
            torch.addmm(a[0], a, b)
            functional.linear(a, b, a[0])
            torch.bmm(a[None], b[None])
            marks.mark(f"{dtype}-{n}")


@case("nvidia-cudnn-cu13")
def sdpa_kinds(marks: Marks) -> None:
    marks.mark("start")
    for dtype in (torch.float32, torch.bfloat16):
        for head in (64, 96, 128, 256):
            for kind in ("plain", "causal", "mask", "gqa"):
                q = torch.randn(2, 16, 1024, head, device="cuda", dtype=dtype, requires_grad=True)
                heads = 4 if kind == "gqa" else 16
                k, v = (
                    torch.randn(2, heads, 1024, head, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
                )
                mask = None
                if kind == "mask":
                    mask = torch.ones(2, 1, 1024, 1024, device="cuda", dtype=torch.bool).tril()
                torch.cuda.reset_peak_memory_stats()
                functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=kind in ("causal", "gqa"), enable_gqa=kind == "gqa"
                ).sum().backward()
                marks.mark(f"{dtype}-{head}-{kind}")
                del q, k, v, mask


@case("nvidia-cudnn-cu13")
def context_alone(marks: Marks) -> None:
    torch.cuda.init()
    marks.outside_the_allocator("after init")
    marks.mark("init")
    (torch.ones(1, device="cuda") + 1).item()
    marks.outside_the_allocator("after the first elementwise kernel")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    marks.outside_the_allocator("after the first bf16 matrix product")
    q = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
    functional.scaled_dot_product_attention(q, q, q).sum().item()
    marks.outside_the_allocator("after the first attention")
    convolution = nn.Conv2d(3, 64, 3).cuda()
    convolution(torch.randn(8, 3, 64, 64, device="cuda")).sum().item()
    marks.outside_the_allocator("after the first convolution")

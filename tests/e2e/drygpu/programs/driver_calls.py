"""What programs ask of a driver beside memory to train in: prints one JSON with an answer for each question."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from pathlib import Path

import pynvml
import torch
import torch.nn.functional as functional

from finetune.disk.host_memory import peak_resident_bytes
from pytest_vram.drygpu import driver

MIB = 2**20
answers: dict[str, object] = {}

# Capacity, to the byte: what is free before, one byte less than a granule after.
free, total = torch.cuda.mem_get_info()
answers["context"] = total - free == driver.stats(0).context_bytes > 0
most = free // (2 * MIB) * 2 * MIB
full = torch.empty(most, dtype=torch.uint8, device="cuda")
answers["filled to the last granule"] = torch.cuda.mem_get_info()[0] == free - most < 2 * MIB
try:
    torch.empty(1, device="cuda")
except torch.OutOfMemoryError as error:
    answers["out of memory"] = str(error).split(".")[0]
answers["refused"] = driver.stats(0).refusals
del full
torch.cuda.empty_cache()
answers["given back"] = torch.cuda.mem_get_info()[0] == free

# NVML sees what the driver counts, device by device.
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
kept = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
used = driver.stats(0).used_bytes
answers["nvml used"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used == used
answers["nvml v2"] = pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).used == used
answers["nvml processes"] = [(p.pid, p.usedGpuMemory) for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)] == [
    (os.getpid(), used)
]
answers["nvml uuid"] = pynvml.nvmlDeviceGetUUID(handle).removeprefix("GPU-") == str(
    torch.cuda.get_device_properties(0).uuid
)
fabric = pynvml.c_nvmlGpuFabricInfo_v2_t()
pynvml.nvmlDeviceGetGpuFabricInfoV(handle, pynvml.byref(fabric))
answers["nvml fabric"] = (fabric.version == pynvml.nvmlGpuFabricInfo_v2, fabric.state)
answers["nvml count"] = pynvml.nvmlDeviceGetCount()
answers["torch through nvml"] = torch.cuda.device_memory_used(0) == used
del kept

# Pinned and managed memory: real, and counted apart.
pinned = torch.arange(500).pin_memory()
answers["pinned"] = pinned.is_pinned() and driver.stats(0).host_bytes >= 4000
answers["there and back"] = bool((pinned.cuda(non_blocking=True).cpu() == pinned).all())
cudart = ctypes.CDLL("libcudart.so." + torch.version.cuda.split(".")[0])
pointer = ctypes.c_void_p()
before = driver.stats(0)
assert cudart.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(3 * MIB), ctypes.c_uint(1)) == 0
after = driver.stats(0)
answers["managed"] = after.managed_bytes - before.managed_bytes == 3 * MIB and after.used_bytes == before.used_bytes
ctypes.memset(pointer, 7, 3 * MIB)
assert cudart.cudaFree(pointer) == 0
answers["managed given back"] = driver.stats(0).managed_bytes == before.managed_bytes


# A large tensor brought to the host reads as zeros, wherever it goes, and costs the host no memory until it is used.
def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


large = torch.empty(2**30, dtype=torch.uint8, device="cuda")
before_copy = resident()
on_host = large.cpu()
answers["a gigabyte to the host"] = resident() - before_copy < 64 * MIB
del on_host

# So does a pinned copy of what is not there; a value that is there stays, with the page that it lies in.
on_host = large[: 64 * MIB].cpu()
before_copy = resident()
pinned = on_host.pin_memory()
answers["pinned copy of zeros"] = resident() - before_copy < 8 * MIB and pinned.is_pinned()
on_host[::MIB] = torch.arange(64, dtype=torch.uint8)
on_host[-1] = 9
pinned = on_host.pin_memory()
answers["pinned copy of values"] = bool(torch.equal(pinned, on_host)) and resident() - before_copy < 16 * MIB
own = torch.zeros(8 * MIB, dtype=torch.uint8)
answers["memory that is not pinned"] = driver.release_zeros(own.data_ptr(), own.nbytes)
del on_host, pinned, own
with tempfile.NamedTemporaryFile() as file:
    file.write(b"\5" * 8 * MIB)
    file.flush()
    shared = torch.from_file(file.name, shared=True, size=8 * MIB, dtype=torch.uint8)
    stale = torch.full((8 * MIB + 5,), 7, dtype=torch.uint8)
    for target in (shared, stale[3:-2]):
        target.copy_(large[: 8 * MIB])
    answers["zeros to the host"] = [int(shared.sum()), int(stale.sum())]
del large

# Streams, events, peers.
side, start, end = (
    torch.cuda.Stream(priority=-1),
    torch.cuda.Event(enable_timing=True),
    torch.cuda.Event(enable_timing=True),
)
start.record()
with torch.cuda.stream(side):
    torch.empty(1000, device="cuda").record_stream(torch.cuda.default_stream())
end.record(side)
answers["streams"] = side.query() and end.query() and start.elapsed_time(end) >= 0
answers["peers"] = torch.cuda.can_device_access_peer(0, 1)
answers["between devices"] = torch.tensor([3, 1]).to("cuda:0").to("cuda:1").tolist()

# A CUDA graph: captured into a pool of its own, replayed.
graph, matrix = torch.cuda.CUDAGraph(), torch.randn(64, 64, device="cuda")
with torch.cuda.graph(graph):
    product = matrix @ matrix
graph.replay()
answers["graph"] = list(product.shape)
callable_ = torch.cuda.make_graphed_callables(torch.nn.Linear(64, 64).cuda(), (matrix.clone().requires_grad_(),))
callable_(matrix).sum().backward()

# Layers that go through cuDNN.
image = torch.randn(2, 3, 32, 32, device="cuda", requires_grad=True)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).cuda()
network(image).sum().backward()
answers["convolution"] = list(image.grad.shape)
q = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.float16)
answers["attention"] = list(functional.scaled_dot_product_attention(q, q, q).shape)

# What is not there says so, by name, and is an error.
array = ctypes.c_void_p()
status = cudart.cudaMalloc3DArray(ctypes.byref(array), None, None, 0)
answers["textures"] = status == 801 and "cudaMalloc3DArray" in driver.missing_functions()

answers["host MiB"] = peak_resident_bytes() // MIB
print(json.dumps(answers))

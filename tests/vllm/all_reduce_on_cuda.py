"""Sums over two GPUs: each kernel that vLLM's all-reduce may take has the bits of ops.all_reduce. Needs two of them.

    python tests/vllm/all_reduce_on_cuda.py

Prints for each kernel and dtype how many sizes differ in any bit, and microseconds a call by the number of elements. The pass
matmul_allreduce leaves vLLM's operator alone on two ranks, which rests on what differs nowhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.multiprocessing
import vllm.distributed.parallel_state as parallel_state
from vllm.config import VllmConfig, set_current_vllm_config

from bi_compile import ops

SIZES = [8, 16, 1000, 1024, 4096, 12345, 2**16, 2**18 + 8, 2**20, 2**22, 2**23 + 16, 2**25]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RANKS = 2


def draw(size: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    """Exponents far apart, sums that cancel, zeros of both signs, infinities."""
    made = torch.Generator("cuda").manual_seed(size + rank)
    x = torch.randn(size, device="cuda", generator=made) * torch.exp2(
        torch.randint(-20, 12, (size,), device="cuda", generator=made)
    )
    special = torch.tensor([0.0, -0.0, torch.inf, 1.0, 2.0**-24, -65504.0, 2.0**-130], device="cuda")
    chosen = special[torch.randint(len(special), (size,), device="cuda", generator=made)]
    return torch.where(torch.rand(size, device="cuda", generator=made) < 0.2, chosen, x).to(dtype)


@contextlib.contextmanager
def taking(kernel: str, communicator: Any) -> Iterator[None]:
    """Kernels: "custom" (vLLM's own), "symmetric memory", "NCCL"."""
    custom, symmetric = communicator.ca_comm, communicator.symm_mem_comm
    if kernel != "custom":
        communicator.ca_comm = None
    if kernel == "NCCL":
        communicator.symm_mem_comm = None
    try:
        yield
    finally:
        communicator.ca_comm, communicator.symm_mem_comm = custom, symmetric


def worker(rank: int) -> None:
    torch.cuda.set_device(rank)
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(RANKS, rank, "tcp://127.0.0.1:29581", rank)
        parallel_state.initialize_model_parallel(RANKS)
        group: Any = parallel_state.get_tp_group()
        for kernel in ("custom", "symmetric memory", "NCCL"):
            with taking(kernel, group.device_communicator):
                compare(kernel, group, rank)
        speed(group, rank)
    torch.distributed.barrier()


def served(communicator: Any, x: torch.Tensor) -> str:
    custom, symmetric = communicator.ca_comm, communicator.symm_mem_comm
    if custom is not None and not custom.disabled and custom.should_custom_ar(x):
        return "custom"
    return "symmetric memory" if symmetric is not None and symmetric.should_use_symm_mem(x) else "NCCL"


def compare(kernel: str, group: Any, rank: int) -> None:
    for dtype in DTYPES:
        wrong, by = [], set()
        for size in SIZES:
            x = draw(size, dtype, rank)
            got = torch.ops.vllm.all_reduce(x, group_name=group.unique_name)
            want = ops.all_reduce(x, "sum", group.device_group.group_name)
            by.add(served(group.device_communicator, x))
            if not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
                wrong.append(size)
        if rank == 0:
            print(
                f"{kernel}, {dtype}: {len(wrong)} of {len(SIZES)} sizes differ {wrong}; taken: {', '.join(sorted(by))}",
                flush=True,
            )


def speed(group: Any, rank: int) -> None:
    """Without `bench.cuda.replay_times`: a graph may be replayed only once vLLM, behind the capture, has shared its buffers."""
    for size in (1024, 16 * 1024, 256 * 1024, 2**22, 2**24):
        x = torch.ones(size, device="cuda", dtype=torch.bfloat16)
        ways = {
            "vLLM's": lambda x=x: torch.ops.vllm.all_reduce(x, group_name=group.unique_name),
            "ops.all_reduce": lambda x=x: ops.all_reduce(x, "sum", group.device_group.group_name),
        }
        times = {}
        for name, way in ways.items():
            graph = torch.cuda.CUDAGraph()
            way()
            with (
                parallel_state.graph_capture(torch.device("cuda", rank)) as context,
                torch.cuda.graph(graph, stream=context.stream),
            ):
                for _ in range(20):
                    way()
            graph.replay()
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            for _ in range(20):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name] = start.elapsed_time(end) / 400 * 1e3
        if rank == 0:
            print(size, ", ".join(f"{name} {t:.1f} us" for name, t in times.items()), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    torch.multiprocessing.spawn(worker, nprocs=RANKS)

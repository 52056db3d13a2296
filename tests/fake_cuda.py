"""A GPU that is not there: what PyTorch compiles for an H100, read and run without one.

Importing this makes PyTorch believe that there is one H100, so import it first, and in a process of
its own: it replaces private functions of PyTorch. Inside `with fake_cuda.mode`, tensors on cuda:0
are fake, and torch.compile compiles for them: dynamo, inductor, the sources of Triton's kernels.
The call of a compiled graph then raises `Compiled`.

With TRITON_INTERPRET=1 in the environment the graph is also run, on the CPU: Triton's interpreter
computes the kernels, and `real` holds the numbers of the fake tensors.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import tempfile
import types
from pathlib import Path

import torch
import torch.cuda
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(tempfile.mkdtemp())
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_000_000_000,
    multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=52_428_800, gcnArchName="", is_integrated=0, clock_rate=1_980_000,
    memory_clock_rate=2_619_000, memory_bus_width=5120, uuid="0", pci_bus_id=0)

# A build of PyTorch without CUDA has no guard for its devices. It takes one that does nothing.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static int set = [] {
  auto& guard = impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  if (!guard.load()) guard.store(new impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());
  return 0;
}();
"""


class Compiled(Exception):
    """A graph was called; `outputs` are its outputs if it was run."""

    outputs = None


# ------------------------------------------------------------------------------ a device


def pretend_device() -> None:
    """Make torch.cuda say that there is one device, and do nothing with it."""
    for name, value in dict(
            is_available=True, device_count=1, current_device=0, set_device=None,
            get_device_properties=H100, get_device_capability=(9, 0), get_device_name=H100.name,
            is_bf16_supported=True, _lazy_init=None, synchronize=None, is_initialized=True,
            mem_get_info=(80_000_000_000, 85_000_000_000), memory_allocated=0, _exchange_device=0,
            _maybe_exchange_device=0, get_rng_state=torch.zeros(16, dtype=torch.uint8),
            set_rng_state=None, manual_seed_all=None).items():
        setattr(torch.cuda, name, returning(value))
    for name, value in dict(
            _cuda_getDeviceCount=1, _cuda_getDevice=0, _cuda_exchangeDevice=0,
            _cuda_maybeExchangeDevice=0, _cuda_setDevice=None, _cuda_getCurrentRawStream=0,
            _cuda_isCurrentStreamCapturing=False,
            _cuda_cudaCachingAllocator_is_enabled=True).items():
        setattr(torch._C, name, returning(value))
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_stream = lambda *args: torch.Stream(device="cpu")
    fake_tensor.init_gpu_context = lambda *args: None
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    torch._C._ensureCUDADeviceGuardSet()
    if not torch.backends.cuda.is_built():
        load_guard()


def returning(value):
    return lambda *args, **kwargs: value


def load_guard() -> None:
    source, library = FOLDER / "guard.cpp", FOLDER / "guard.so"
    source.write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", source,
                    "-o", library, f"-L{torch_folder}/lib", "-lc10"], check=True)
    ctypes.CDLL(library)


pretend_device()  # before what keeps references to the functions that it replaces
import torch._dynamo  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402


class FakeDriver:
    """Triton's way to the device: what it asks when it writes and builds kernels."""

    utils = types.SimpleNamespace(get_device_properties=returning(dict(
        max_shared_mem=232448, multiprocessor_count=132, sm_clock_rate=1, mem_clock_rate=1,
        mem_bus_width=5120, warpSize=32, max_num_regs=65536)))
    get_current_target = staticmethod(returning(GPUTarget("cuda", 90, 32)))
    get_current_device = get_current_stream = staticmethod(returning(0))
    get_active_torch_device = staticmethod(returning(torch.device("cuda", 0)))
    get_device_interface = staticmethod(returning(torch.cuda))


driver.set_active(FakeDriver())

import torch._inductor.async_compile as async_compile  # noqa: E402
import torch._inductor.compile_fx as compile_fx  # noqa: E402
import torch._inductor.cudagraph_utils as cudagraph_utils  # noqa: E402
import torch._inductor.fx_passes.joint_graph as joint_graph  # noqa: E402
import torch._inductor.fx_passes.pad_mm as pad_mm  # noqa: E402
import torch._inductor.graph as graph_module  # noqa: E402
import torch._inductor.output_code as output_code  # noqa: E402
import torch._inductor.utils as inductor_utils  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402

mode = FakeTensorMode(allow_non_fake_inputs=True)
codes: list[str] = []  # what inductor wrote, a graph each
skips: list[str] = []  # why a graph is no CUDA graph
calls: list[dict] = []  # of each call: how many inputs, and which are static
# By storage, the numbers of fake tensors: flat tensors on the CPU. For interpreted runs.
real: dict[int, torch.Tensor] = {}

# ------------------------------------------------------------------------------ what is compiled


def keep_code(compile_to_module):
    def kept(graph):
        module = compile_to_module(graph)
        codes.append(Path(module.__file__).read_text())
        module.empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype)
        return module
    return kept


def call(graph, inputs):
    """Instead of replaying a CUDA graph."""
    static = set(graph.fx_kwargs["static_input_idxs"] or ())
    calls.append(dict(inputs=len(inputs), static=len(static),
                      skipped=graph.disabled_cudagraphs_reason))
    compiled = Compiled()
    if INTERPRETED:
        with unset_fake_temporarily():
            compiled.outputs = graph.current_callable([numbers(x) for x in inputs])
    raise compiled


def numbers(fake):
    """The numbers of a fake tensor: a view of its storage in `real`."""
    if not isinstance(fake, torch.Tensor):
        return fake
    storage = real[fake.untyped_storage()._cdata]
    return storage.as_strided(fake.shape, fake.stride(), fake.storage_offset())


def set_numbers(fake: torch.Tensor, values) -> None:
    """Give a contiguous fake tensor its numbers: copies of a tensor's or a list's, or one for all.
    """
    with unset_fake_temporarily():
        numbers = torch.as_tensor(values, dtype=fake.dtype).detach().expand(fake.shape)
        real[fake.untyped_storage()._cdata] = numbers.flatten().clone()


def skip(message: str) -> None:
    skips.append(message)


def patch_inductor() -> None:
    graph_module.GraphLowering._compile_to_module = keep_code(
        graph_module.GraphLowering._compile_to_module)
    output_code.CompiledFxGraph.__call__ = call
    for module in (cudagraph_utils, output_code):
        module.log_cudagraph_skip_and_bump_counter = skip
    async_compile.AsyncCompile.triton = lambda self, name, source, **_: Kernel(name, source)
    async_compile.AsyncCompile.wait = returning(None)
    inductor_config.force_disable_caches, inductor_config.compile_threads = True, 1
    inductor_config.use_static_cuda_launcher = False
    triton_helpers.set_driver_to_gpu = returning(None)
    if INTERPRETED:
        triton_helpers.libdevice = Libdevice
        compile_fx.cudagraphify = lambda function, *args, **kwargs: function
    # What would be measured on the device: rates, and whether padding a product pays.
    inductor_utils.get_device_tflops = returning(989.0)
    inductor_utils.get_gpu_dram_gbps = returning(3350.0)
    pad_mm._should_pad = returning(False)
    joint_graph.UniformValueConstantFolder._deduce_value = on_cpu(
        joint_graph.UniformValueConstantFolder._deduce_value)


def on_cpu(deduce):
    """Constants that the compiler folds are computed on the CPU."""
    def deduce_on_cpu(self, node):
        before = node.kwargs
        if before.get("device") is not None:
            node.kwargs = {**before, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = before
    return deduce_on_cpu


# ------------------------------------------------------------------------------ the interpreter


class Kernel:
    """A Triton kernel of inductor's, which its interpreter runs on the CPU."""

    def __init__(self, name: str, source: str):
        self.name, self.source, self.function = name, source, None

    def run(self, *args, stream=0):
        if self.function is None:
            self.function = interpreted(self.name, self.source)
        names = self.function.arg_names
        sizes = dict(zip(names, args))  # xnumel and r0_numel among them
        # Small blocks, so that loops and masks have several steps; a tl.dot takes no smaller ones.
        blocks = dict.fromkeys(names[len(args):], 16)
        if "tl.dot" not in self.source and sizes.get("xnumel", 16) < 16:
            blocks["XBLOCK"] = 1 << (sizes["xnumel"] - 1).bit_length()  # no rows for nothing
        grid = tuple(-(-sizes.get(f"{axis}numel", 1) // blocks.get(f"{axis.upper()}BLOCK", 1))
                     for axis in "xyz")
        self.function[grid](*args, **blocks)


def interpreted(name: str, source: str):
    """The kernel's function, without the decorator that would tune it."""
    header, body = source.split("@triton_heuristics", 1)
    body = "@triton.jit" + body.split("@triton.jit", 1)[1]
    path = FOLDER / f"{name[-80:]}_{len(list(FOLDER.iterdir()))}.py"
    path.write_text(header + "\n\n" + body)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.libdevice = Libdevice
    return getattr(module, name)


class Libdevice:
    """CUDA's functions of numbers, which the interpreter has not, as Triton's own."""

    exp = staticmethod(lambda x: triton.language.exp(x))
    sin = staticmethod(lambda x: triton.language.sin(x))
    cos = staticmethod(lambda x: triton.language.cos(x))
    rsqrt = staticmethod(lambda x: triton.language.rsqrt(x))
    signbit = staticmethod(lambda x: x < 0)


patch_inductor()

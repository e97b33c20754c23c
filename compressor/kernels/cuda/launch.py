"""Kernels onto torch's current stream: loaded once per device, launched through the CUDA driver.

`cuda-core` compiles; loading and launching go straight to the driver (`cuda.bindings`, on which cuda-core stands),
because a launch then takes clusters, programmatic dependent launch and more than 48 KB of shared memory with every
version of cuda-core, and no more host time than it must.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cuda.build import Kernel, compile_kernel

Argument = Tensor | int | float
Extent = int | tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """What plans depend on. `shared_per_block` is what one block may ask for, in bytes."""

    index: int
    arch: str
    sm_count: int
    shared_per_block: int
    l2_bytes: int

    @property
    def has_clusters(self) -> bool:
        """Blocks that read each other's shared memory: data-centre Hopper and Blackwell."""
        return self.arch.startswith(("sm_90", "sm_10"))


def device_of(tensor: Tensor) -> Device:
    """The device that a CUDA tensor lies on."""
    return _device(tensor.device.index)


@functools.cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(
        index=index,
        # wgmma and setmaxnreg are "arch-specific" instructions: sm_90a, not sm_90
        arch=f"sm_{found.major}{found.minor}" + ("a" if found.major == 9 else ""),
        sm_count=found.multi_processor_count,
        shared_per_block=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # missing in torch's stub
        l2_bytes=found.L2_cache_size,
    )


def launch(
    kernel: Kernel,
    device: Device,
    grid: Extent,
    block: Extent,
    args: Sequence[Argument],
    *,
    shared: int = 0,
    cluster: int = 1,
    programmatic: bool = False,
) -> None:
    """Run a kernel on torch's current stream of the device; `grid` counts blocks and is a multiple of `cluster` in x.

    Tensors are passed as pointers, ints as int32, floats as float32. `shared` is dynamic shared memory in bytes.
    `programmatic` lets the kernel start before the one ahead of it has ended: it must execute `griddepcontrol.wait`
    before it reads what that one writes, and before it writes anything. Safe during graph capture once the kernel is
    loaded (`prepare`).
    """
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device.index):
            return launch(kernel, device, grid, block, args, shared=shared, cluster=cluster, programmatic=programmatic)
    stream = torch.cuda.current_stream(device.index).cuda_stream
    return launch_on(stream, _load(kernel, device), grid, block, args, shared, cluster, programmatic)


def prepare(kernel: Kernel, device: Device) -> None:
    """Compile and load a kernel: before a graph is captured, where loading is not allowed."""
    _load(kernel, device)


def launch_on(
    stream: int,
    function: "Loaded",
    grid: Extent,
    block: Extent,
    args: Sequence[Argument],
    shared: int,
    cluster: int,
    programmatic: bool,
) -> None:
    """The launch itself, on a stream given by its handle."""
    driver = _driver()
    storage = (ctypes.c_uint64 * len(args))(*map(_bits, args))
    start = ctypes.addressof(storage)
    pointers = (ctypes.c_void_p * len(args))(*range(start, start + 8 * len(args), 8))
    config = function.config(stream, _three(grid), _three(block), shared, cluster, programmatic)
    (error,) = driver.cuLaunchKernelEx(config, function.handle, ctypes.addressof(pointers), 0)
    _check(error, f"launching {function.kernel.name} on grid {grid}, block {block}, {shared} bytes, cluster {cluster}")


def _bits(argument: Argument) -> int:
    """Eight bytes whose low part is the argument: the driver copies as many as the kernel's parameter has."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, int):
        assert -(1 << 31) <= argument < 1 << 31, f"{argument} does not fit int32"
        return argument & 0xFFFFFFFF
    return int(struct.unpack("<I", struct.pack("<f", argument))[0])


class Loaded:
    """A kernel on a device, with the launch configurations that it was used with."""

    def __init__(self, kernel: Kernel, cubin: bytes, device: Device) -> None:
        driver = _driver()
        self.kernel = kernel
        error, library = driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
        _check(error, f"loading {kernel.name} for {device.arch}")
        error, handle = driver.cuLibraryGetKernel(library, kernel.name.encode())
        _check(error, f"finding {kernel.name} in the cubin of {kernel.header}")
        self.handle = int(handle)  # a CUkernel is taken wherever a CUfunction is
        self._allow_shared(driver, handle, device)
        self._configs: dict[tuple, object] = {}

    def _allow_shared(self, driver, handle, device: Device) -> None:
        """Let launches ask for all the dynamic shared memory that the device has; without this the limit is 48 KB."""
        attribute = driver.CUfunction_attribute
        error, static = driver.cuKernelGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle, device.index)
        _check(error, f"asking for the shared memory of {self.kernel.name}")
        limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(limit, device.shared_per_block - static, handle, device.index)
        _check(error, f"raising the shared memory limit of {self.kernel.name}")

    def config(self, stream, grid, block, shared, cluster, programmatic):
        """A launch configuration; kept, because making one costs more than the launch."""
        key = (stream, grid, block, shared, cluster, programmatic)
        if key not in self._configs:
            self._configs[key] = _config(*key)
        return self._configs[key]


def _config(stream, grid, block, shared, cluster, programmatic):
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared
    config.hStream = stream
    attributes = []
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        extent = attribute.value.clusterDim
        extent.x, extent.y, extent.z = cluster, 1, 1
        attributes.append(attribute)
    if programmatic:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


@functools.cache
def _load(kernel: Kernel, device: Device) -> Loaded:
    return Loaded(kernel, compile_kernel(kernel, device.arch), device)


@functools.cache
def _driver():
    from cuda.bindings import driver

    return driver


def _three(extent: Extent) -> tuple[int, ...]:
    extent = (extent,) if isinstance(extent, int) else extent
    return (*extent, 1, 1)[:3]


def _check(error, doing: str) -> None:
    if error != 0:
        raise RuntimeError(f"{doing}: the CUDA driver says {error.name}")

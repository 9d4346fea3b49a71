"""A pretended GPU for a torch without CUDA: tensors that say cuda:0 and keep their data on the CPU.

What it models. It raises where a GPU would: a CPU tensor that meets a CUDA one, numpy() of a CUDA tensor, a product
that the card can't compute, and, during the capture of a graph, every operation that waits for the GPU. A captured
graph is recorded and replayed on the recorded tensors, so a step that reads a tensor which was replaced after the
capture goes wrong here, too. It counts captures, replays, synchronizations by line, pinned bytes, and the attention
kernels that a card would take.

What it can't see. Rounding, speed and memory of real kernels, races, several GPUs, limits that nobody told it. For
these there is benchmarks/gpu.py. It uses torch's private interfaces, which the pinned version of torch excuses, and
registers a device for the whole process, so it needs a process of its own:

    pytest -p pretended_gpu ...                             # with PYTHONPATH=tests: what needs a GPU runs, on this one
    python tests/pretended_gpu.py train_grpo.py FLAG ...     # a script on it, then the counts; --t4 first: an old card
"""

import contextlib
import functools
import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  this and the constructors first: their tables must not hold what is replaced below
import torch.utils._device
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

torch.utils._device._device_constructors()
_setup_privateuseone_for_python_backend("pretended")  # this torch has no autograd thread for a device named cuda

ROOT = Path(__file__).parent.parent
INNER, CPU, aten = torch.device("pretended:0"), torch.device("cpu"), torch.ops.aten
HALF = torch.bfloat16, torch.float16
COPIES = aten.copy_.default, aten._foreach_copy_.default
INDEXED = aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default
# operations whose result's size or value the CPU must know
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.bincount.default}
WAITING |= {aten._unique2.default, aten.equal.default, aten.unique_dim.default, aten.repeat_interleave.Tensor}
NO_CPU_SCALAR = aten.index_copy_.default, aten.gather.default, aten.mm.default  # most operations take one


def leaves(tree) -> list:
    """What the nested lists, tuples and dicts hold."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return [tree]
    return [leaf for part in tree for leaf in leaves(part)]


def mapped(function, tree):
    """The same tree of function(leaf). Torch's tree_map takes several times as long."""
    if isinstance(tree, dict):
        return {name: mapped(function, part) for name, part in tree.items()}
    if isinstance(tree, list | tuple) and type(tree) is not torch.Size:
        return type(tree)([mapped(function, part) for part in tree])
    return function(tree)


def on_gpu(device) -> bool:
    if isinstance(device, str) and device.split(":")[0] not in ("cuda", "pretended"):
        return False
    return isinstance(device, str | torch.device) and torch.device(device).type in ("cuda", "pretended")


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended GPU. `inner` has the data, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda:0"))
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, inner):
        inner = inner.detach()
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=INNER)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGpu.now.call(func, args, kwargs or {})

    def __tensor_flatten__(self):  # these two let Module.to swap tensors, which keeps tied weights tied
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return PretendedTensor(inner["inner"])

    def __getitem__(self, index):
        return super().__getitem__(as_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(as_index(index), value)

    def replace_data(self, new):  # what was captured keeps reading the old tensor
        self.inner = new.inner

    data = property(torch.Tensor.data.__get__, replace_data)

    def tolist(self):
        PretendedGpu.now.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def untyped_storage(self):  # safetensors looks for shared memory
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol):  # torch.save
        return self.inner.__reduce_ex__(protocol)


def as_index(index):
    """Lists become CPU tensors, which a GPU copies, too."""
    if isinstance(index, tuple):
        return tuple(map(as_index, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def move(tensor, *args, **kwargs):
    """Tensor.to, with the pretended device for cuda."""
    args, kwargs = mapped(lambda d: INNER if on_gpu(d) else d, (args, kwargs))
    return torch._C.TensorBase.to(tensor, *args, **kwargs)


class PretendedGpu(TorchDispatchMode):
    """The GPU, inside of a `with`. capability: the card's compute capability, (7, 5) for a T4, (9, 0) for an H100.
    devices: how many there are; the tensors of all are on cuda:0. kernels: False if this torch has none for the card.

    graphs: captured ones. waits: synchronizations by line. attention: kernels by line. pinned: bytes of host memory."""

    now = None  # the one that is entered

    def __init__(self, capability: tuple[int, int] = (8, 0), devices: int = 1, kernels: bool = True):
        super().__init__()
        self.capability, self.devices, self.kernels = capability, devices, kernels
        self.recording, self.graphs, self.pinned, self.sync_debug_mode = None, [], 0, "default"
        self.waits, self.attention, self.streams = Counter(), Counter(), [Stream()]

    def place(self) -> str:
        """The innermost line of the project, tests left out."""
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests"):
                return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
            frame = frame.f_back
        return "tests or backward"

    def wait(self, what) -> None:
        """Whatever makes the CPU wait for the GPU."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} at {self.place()}")
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {self.place()}")
        self.waits[f"{self.place()} {what}"] += 1

    # ---- Operations ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def call(self, func, args, kwargs):
        tensors = [t for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours, theirs = ([t for t in tensors if isinstance(t, PretendedTensor) == kind] for kind in (True, False))
        target, to_gpu = kwargs.get("device"), on_gpu(kwargs.get("device"))
        pins = kwargs.get("pin_memory")
        if pins:
            kwargs = kwargs | {"pin_memory": False}
        if not ours and not to_gpu:
            out = func(*args, **kwargs)
            self.pinned += 2 ** (out.nbytes - 1).bit_length() if pins else 0  # blocks are powers of two
            return out
        self.check_devices(func, args, theirs, target is not None and to_gpu != bool(ours))
        inner, options = unwrap(args), unwrap(kwargs) | ({"device": CPU} if target is not None else {})
        out = self.compute(func, inner, options)
        if self.recording is not None:
            self.recording.append((func, inner, options, leaves(out)))
        if func is aten._local_scalar_dense.default or (target is not None and not to_gpu):
            return out
        wrapped = mapped(lambda t: PretendedTensor(t) if isinstance(t, torch.Tensor) else t, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def check_devices(self, func, args, on_cpu: list, crosses: bool) -> None:
        """Raises if a GPU would; counts what waits."""
        if func is aten._to_copy.default:
            if crosses:
                self.wait("copy")
        elif func in COPIES and on_cpu:
            self.wait("copy")
        else:
            for t in on_cpu:
                if func in INDEXED and any(t is index for index in args[1]):
                    self.wait("copy of an index")
                elif t.dim() or func in NO_CPU_SCALAR:
                    where = f"cuda:0 and cpu! ({func} at {self.place()})"
                    raise RuntimeError(f"Expected all tensors to be on the same device, but found {where}")
        masked = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITING or masked:
            self.wait(func)

    def compute(self, func, args, options):
        """The operation on the CPU; by CUDA's rules where they differ."""
        if not self.kernels and func is aten.add.Tensor:
            raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")
        if func in (aten.bmm.dtype, aten.mm.dtype):
            a, b, dtype = args
            if a.dtype != b.dtype or a.dtype not in (*HALF, dtype) or dtype not in (a.dtype, torch.float32):
                raise RuntimeError(f"out_dtype {dtype} is not supported for {a.dtype} and {b.dtype}")
            if a.dtype == torch.bfloat16 and dtype == torch.float32 and self.capability < (8, 0):
                raise RuntimeError("bfloat16 -> float is only supported for compute capability 8.0 or higher")
            return a.to(dtype) @ b.to(dtype)
        if func is aten.histc.default:  # CUDA's takes integers
            return func(args[0].float(), *args[1:], **options).to(args[0].dtype)
        if func is aten._grouped_mm.default and not (self.capability[0] in (9, 10) and args[0].dtype == torch.bfloat16):
            self.wait("grouped_mm without a kernel: reads its offsets on the CPU")
        return func(*args, **options)

    # ---- Attention: which kernel a GPU takes, cuDNN's left out ----

    def flash(self, params, debug: bool = False) -> bool:
        q, new = params.query, self.capability >= (8, 0)
        return q.dtype in HALF and new and params.attn_mask is None and q.shape[-1] <= 256

    def efficient(self, params, debug: bool = False) -> bool:
        q, half = params.query, params.query.dtype == torch.bfloat16
        aligned = q.shape[-1] % (16 // q.itemsize) == 0
        same_heads = q.shape[1] == params.key.shape[1]
        return same_heads and aligned and (self.capability >= (8, 0) or not half)

    def attend(self, plain, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if isinstance(q, PretendedTensor):
            if q.shape[1] != k.shape[1] and not enable_gqa:
                raise RuntimeError("query and key have different numbers of heads: needs enable_gqa")
            if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
                raise RuntimeError("invalid dtype for bias - should match query's dtype")
            params = Params(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
            kernel = "flash" if self.flash(params) else "efficient" if self.efficient(params) else "MATH, keeps scores"
            self.attention[
                f"{self.place()} {kernel}, {q.dtype}, {'masked' if attn_mask is not None else 'causal'}"
            ] += 1
        return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    # ---- torch.cuda ----

    def __enter__(self):
        PretendedGpu.now, self.undo = self, contextlib.ExitStack()
        functional, cuda = torch.nn.functional, torch.cuda
        attend = functools.partial(self.attend, functional.scaled_dot_product_attention)
        make = torch.tensor

        def tensor(data, device=None, **options):
            return make(data, **options) if device is None else make(data, **options).to(device)

        self.replace(torch, tensor=tensor)
        self.replace(functional, scaled_dot_product_attention=attend)
        self.replace(torch.backends.cuda, SDPAParams=Params)
        self.replace(
            torch.backends.cuda, can_use_flash_attention=self.flash, can_use_efficient_attention=self.efficient
        )
        self.replace(torch.accelerator, synchronize=lambda *_: self.wait("synchronize"))
        nothing = lambda *_: None  # noqa: E731
        self.replace(cuda, _lazy_init=nothing, empty_cache=nothing, reset_peak_memory_stats=nothing)
        self.replace(cuda, is_available=lambda: True, is_bf16_supported=self.has_bfloat16)
        self.replace(cuda, device_count=lambda: self.devices, current_device=lambda: 0, set_device=self.set_device)
        self.replace(cuda, get_device_name=lambda *_: "pretended", get_device_capability=lambda *_: self.capability)
        self.replace(cuda, mem_get_info=lambda *_: (20 * 10**9, 24 * 10**9), max_memory_allocated=lambda *_: 0)
        self.replace(cuda, synchronize=lambda *_: self.wait("synchronize"))
        self.replace(cuda, set_sync_debug_mode=lambda mode: setattr(self, "sync_debug_mode", mode))
        self.replace(cuda, get_sync_debug_mode=lambda: self.sync_debug_mode)
        self.replace(cuda, CUDAGraph=Graph, graph=capture, Stream=Stream, stream=on_stream)
        self.replace(cuda, current_stream=lambda *_: self.streams[-1])
        torch.Tensor.to = move
        self.undo.callback(delattr, torch.Tensor, "to")
        return super().__enter__()

    def __exit__(self, *error):
        self.undo.close()
        return super().__exit__(*error)

    def replace(self, owner, **values) -> None:
        for name, value in values.items():
            self.undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

    def has_bfloat16(self, including_emulation: bool = True) -> bool:
        return including_emulation or self.capability >= (8, 0)

    def set_device(self, device) -> None:
        if torch.device(device).index >= self.devices:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")


class Params:
    """torch.backends.cuda.SDPAParams, which takes no tensor of a Python class."""

    def __init__(self, query, key, value, attn_mask, dropout, is_causal, enable_gqa):
        self.query, self.key, self.attn_mask = query, key, attn_mask


class Stream:
    def wait_stream(self, other):
        pass


@contextlib.contextmanager
def on_stream(stream):
    PretendedGpu.now.streams.append(stream)
    try:
        yield
    finally:
        PretendedGpu.now.streams.pop()


class Graph:
    def __init__(self):
        self.steps, self.replays = [], 0

    def pool(self):
        return 0, 1

    def replay(self):
        self.replays += 1
        for func, args, options, out in self.steps:
            again = PretendedGpu.now.compute(func, args, options)
            for old, new in zip(out, leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph, pool=None, stream=None, **options):
    gpu = PretendedGpu.now
    gpu.wait("capture")
    gpu.recording = graph.steps
    try:
        with on_stream(stream):
            yield
    except Exception:  # the end of a broken capture fails itself, and hides why
        raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
    finally:
        gpu.recording = None
    gpu.graphs.append(graph)


def unwrap(tree):
    return mapped(lambda t: t.inner if isinstance(t, PretendedTensor) else t, tree)


# ---- As a plugin of pytest, and as a command ----


def trace_gpu_code(frame, event, arg, lines: dict = {}):  # noqa: B006
    """A trace function: the executed lines, by file, of functions that mention cuda, and of the GraphDecoder."""
    code = frame.f_code
    if not code.co_filename.startswith(str(ROOT)) or not mentions_cuda(code):
        return None
    if event == "line":
        lines.setdefault(os.path.relpath(code.co_filename, ROOT), set()).add(frame.f_lineno)
    return trace_gpu_code


@functools.cache
def mentions_cuda(code) -> bool:
    return bool({"cuda", "is_cuda"} & {*code.co_names, *code.co_consts}) or "GraphDecoder." in code.co_qualname


def pytest_configure(config) -> None:
    config.pretended = PretendedGpu().__enter__()
    if os.environ.get("EXECUTED_LINES"):
        sys.settrace(trace_gpu_code)


def pytest_unconfigure(config) -> None:
    sys.settrace(None)
    config.pretended.__exit__(None, None, None)
    if file := os.environ.get("EXECUTED_LINES"):
        (lines,) = trace_gpu_code.__defaults__
        Path(file).write_text(json.dumps({name: sorted(numbers) for name, numbers in lines.items()}))


def main(argv: list[str]) -> None:
    old = argv[0] == "--t4"
    script, *flags = argv[old:]
    sys.path.insert(0, str(ROOT))
    module, parse = importlib.import_module(Path(script).stem), importlib.import_module("plumbing.flags").parse_args
    with PretendedGpu((7, 5) if old else (8, 0)) as gpu:
        module.main(parse(module.Args, flags))
    replays = sum(graph.replays for graph in gpu.graphs)
    print(f"\n{len(gpu.graphs)} graphs captured, {replays} replays, {gpu.waits.total()} synchronizations")
    for counts in (gpu.attention, gpu.waits):
        for line, count in counts.most_common(40):
            print(f"{count:6d}  {line}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Counts what an update sends, reads back from the device, and allocates."""

import json
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

#: Collectives of torch.distributed: position of their input, and its name.
COLLECTIVES: Dict[str, Tuple[int, str]] = dict(
    all_reduce=(0, 'tensor'),
    broadcast=(0, 'tensor'),
    reduce=(0, 'tensor'),
    gather=(0, 'tensor'),
    all_gather=(1, 'tensor'),
    all_gather_into_tensor=(1, 'input_tensor'),
    reduce_scatter=(1, 'input_list'),
    reduce_scatter_tensor=(1, 'input'),
    all_to_all=(1, 'input_tensor_list'),
    all_to_all_single=(1, 'input'),
)
#: The function of torch.autograd that enters the C++ engine.
ENGINE = '_engine_run_backward'
#: Methods that copy the content of a tensor to the host.
READS = (
    'cpu',
    'item',
    'tolist',
    'numpy',
    'nonzero',
    'equal',
    '__bool__',
    '__float__',
    '__int__',
    '__index__',
)


class CollectiveBytes:
    """Counts the bytes that Python code hands to collectives.

    A context manager that wraps the functions of ``torch.distributed``. It
    does not see the reducer of DistributedDataParallel, which calls them from
    C++ unless a communication hook replaces it. :class:`Profile` does.

    Attributes:
        calls (list): Name of the collective, elements and bytes of its input.
    """

    def __init__(self) -> None:
        self.calls: List[Tuple[str, int, int]] = []
        self._originals: Dict[str, Callable[..., Any]] = {}

    @property
    def bytes(self) -> int:
        """All bytes so far."""
        return sum(size for _, _, size in self.calls)

    @property
    def elements(self) -> int:
        """All elements so far."""
        return sum(elements for _, elements, _ in self.calls)

    def __enter__(self) -> 'CollectiveBytes':
        for name, (position, keyword) in COLLECTIVES.items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name, position, keyword))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(
        self, name: str, position: int, keyword: str
    ) -> Callable[..., Any]:
        original = self._originals[name]

        def counting(*args: Any, **kwargs: Any) -> Any:
            given = kwargs[keyword] if keyword in kwargs else args[position]
            tensors = tree_leaves(given)
            self.calls.append(
                (
                    name,
                    sum(t.numel() for t in tensors),
                    sum(t.nbytes for t in tensors),
                )
            )
            return original(*args, **kwargs)

        return counting


class HostReads(TorchFunctionMode):
    """Counts reads that on an accelerator are device-to-host transfers.

    On a CPU nothing is transferred, so it tracks where each tensor would be.
    A tensor made from others is on the device, unless all of them are on the
    host. One made from nothing is on the host, unless a device was named.
    ``cpu()`` copies one to the host. A read counts if its tensor is on the
    device. Tensors from before the context are on the device.

    Attributes:
        reads (list): Name of the method, for each transfer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: List[str] = []
        # keeps the tensors, so that no other gets the id of a freed one
        self._host: Dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` and track where its result would be."""
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        given = [t for t in tree_leaves((args, kwargs)) if _is_tensor(t)]
        device = [t for t in given if id(t) not in self._host]
        to_host = name == 'cpu' or (
            name == 'to' and 'cpu' in map(str, (*args[1:], *kwargs.values()))
        )
        if device and (to_host or name in READS):
            self.reads.append(name)
        if name == 'backward':
            with mock.patch.object(
                torch.autograd, ENGINE, self._watching_engine()
            ):
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if to_host and any(result is tensor for tensor in given):
            result = result.clone()  # on a CPU it is the same tensor
        if to_host or (not device and (given or kwargs.get('device') is None)):
            self._host.update(
                (id(t), t) for t in tree_leaves(result) if _is_tensor(t)
            )
        return result

    def _watching_engine(self) -> Callable[..., Any]:
        # hooks run inside of a function, where torch switches the mode off
        engine = getattr(torch.autograd, ENGINE)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return engine(*args, **kwargs)

        return run


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


class Profile:
    """What torch's profiler sees of an update, including DDP's reducer.

    Attributes:
        elements (int): Handed to collectives of gloo or NCCL.
        peak_bytes (int): Peak of allocated memory, above that at the start
            of the context.
        device_to_host (int): Memory copies from a CUDA device; 0 on a CPU.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU]
        if self._cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities, record_shapes=True, profile_memory=True
        )

    def __enter__(self) -> 'Profile':
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._profile.__exit__(*exception)
        events = self._profile.events()
        self.elements = sum(
            torch.Size(shape).numel()
            for event in events
            if event.name.startswith(('gloo:', 'nccl:'))
            for shape in event.input_shapes[:1]
        )
        self.device_to_host = sum(
            event.name.startswith('Memcpy DtoH') for event in events
        )
        self.peak_bytes = (
            torch.cuda.max_memory_allocated() - self._before
            if self._cuda
            else _peak_bytes(self._profile)
        )


def _peak_bytes(finished: profile) -> int:
    """From the trace's record of every allocation and release on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        finished.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())['traceEvents']
    records = [
        event['args'] for event in trace if event.get('name') == '[memory]'
    ]
    records.sort(key=lambda record: record['Ev Idx'])
    if not records:
        return 0
    before = records[0]['Total Allocated'] - records[0]['Bytes']
    return int(max(record['Total Allocated'] for record in records) - before)

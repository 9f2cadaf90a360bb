"""Activation checkpointing that leaves running statistics alone."""

from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Tuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(
    module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """``function(*inputs)``, computed again in the backward pass.

    Only ``inputs`` are kept for the backward pass. Random numbers are the
    same both times. The second time, norm layers of ``module`` normalize by
    the same batch, but update copies of their running statistics, which are
    dropped.

    SyncBN sends its statistics again. All ranks do so at the same place
    among the messages, as they go backward through equal graphs.

    Args:
        module: Contains all buffers that ``function`` uses.
        function: A computation of tensors, such as a method of ``module``.
        inputs: Its positional arguments.
    """
    output: Tensor = checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _CopiedBuffers(module)),
    )
    return output


class _CopiedBuffers:
    """A context in which ``module`` reads and writes copies of its buffers.

    It can be entered again, as a retained graph is recomputed at each
    backward pass. The buffers themselves are not written to: autograd would
    take that for a change of its saved tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: List[Tuple[nn.Module, Dict[str, Any]]] = []

    def __enter__(self) -> None:
        self._kept = [
            (part, dict(part._buffers)) for part in self._module.modules()
        ]
        for part, buffers in self._kept:
            for name, buffer in buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.clone()

    def __exit__(self, *_: Any) -> None:
        for part, buffers in self._kept:
            part._buffers.update(buffers)
        self._kept = []

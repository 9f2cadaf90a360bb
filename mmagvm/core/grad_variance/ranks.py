"""Reads each rank's local gradients, before they are averaged."""

from abc import abstractmethod
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Optional,
    Sequence,
    Tuple,
)

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from mmagvm.core.wrapped import called_by

from .base import GradVariance

#: torch's hooks that average gradients, by the setting ``comm_hook``.
COMM_HOOKS: Dict[Optional[str], Optional[Callable[..., Any]]] = {
    None: None,
    'fp16': default_hooks.fp16_compress_hook,
    'bf16': default_hooks.bf16_compress_hook,
}
#: Names of torch's communication hooks that send float16, whose smallest
#: number is 6e-8.
FLOAT16_HOOKS = ('fp16_compress_hook', 'fp16_compress_wrapper')


class RankVariance(GradVariance):
    """Measures over ranks: each rank's gradient is one sample.

    A hook of each parameter runs as soon as its gradient has been
    accumulated, just before DistributedDataParallel takes it to be averaged.
    The hooks exist only during the backward pass of measured updates, and
    DistributedDataParallel and its communication hook, if any, are left as
    they are. So every other update is plain training, instruction by
    instruction, and the hooks change no bit of the training.

    Args:
        optimizer: As in the base class.
        modules: As in the base class.
        model: The data-parallel model.
        comm_hook: Type in which gradients are sent, 'fp16' or 'bf16'; None
            for what the model does by itself.

    Raises:
        ValueError: The model has a communication hook already, or torch has
            none of that type for this backend (bf16 without NCCL).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[int],
        model: DistributedDataParallel,
        comm_hook: Optional[str] = None,
    ) -> None:
        super().__init__(optimizer, modules)
        # DistributedDataParallel leaves out what is frozen when it is built
        self.averages_unfrozen = False
        self.group = model.process_group
        self.world_size = self.samples = dist.get_world_size(self.group)
        self._handles: List[Any] = []
        hook = COMM_HOOKS[comm_hook]
        if hook is not None:
            try:
                model.register_comm_hook(self.group, hook)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f'comm_hook={comm_hook!r} in optim_wrapper cannot be set: '
                    'leave it out, or remove the communication hook that the '
                    f'model has already, if that is the reason ({error})'
                ) from error
        self._sends_float16 = sends_float16(model)
        #: By parameter: |lost part of gradient|^2 and |gradient|^2, (2,).
        self._losses: Dict[Tensor, Tensor] = {}

    def before_last_backward(self) -> None:
        self._remove_hooks()
        self._losses = {}
        for group in self.measured_groups():
            for param in group['params']:
                if param.requires_grad:
                    self._handles.append(self._hook(param, group))

    def drop(self) -> None:
        super().drop()
        self._remove_hooks()

    def _hook(self, param: Tensor, group: Dict[str, Any]) -> Any:
        def see(param: Tensor) -> None:
            if param.grad is not None:
                self.see(param, param.grad, group)

        # a gradient of earlier micro-batches, in case the last one has none
        see(param)
        return param.register_post_accumulate_grad_hook(see)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def to_cpu(self, sums: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        losses, self._losses = self._losses, {}
        if not losses:
            return super().to_cpu(sums)
        read_here(losses.values())

        def losses_of(group: Dict[str, Any]) -> List[Tensor]:
            none = sums.new_zeros(2)
            return [losses.get(p, none) for p in group['params']]

        numbers = torch.cat([sums, self.sum_by_module(losses_of)], 1)
        numbers, _ = super().to_cpu(numbers)
        return numbers[:, :-2], numbers[:, -2] / numbers[:, -1]

    @abstractmethod
    def see(self, param: Tensor, grad: Tensor, group: Dict[str, Any]) -> None:
        """Note a parameter's local gradient, and what float16 loses of it.

        Args:
            param: The parameter.
            grad: Its gradient on this rank, summed over micro-batches. It is
                averaged in place right afterwards.
            group: The parameter group that it belongs to.
        """
        if self._sends_float16:
            # in the same order of operations as the hook
            sent = grad.to(torch.float16, copy=True).div_(self.world_size)
            lost = sent.to(grad.dtype).mul_(self.world_size).sub_(grad)
            self._losses[param] = self.squares(
                group, [param, param], [lost, grad]
            )


def read_here(tensors: Iterable[Tensor]) -> None:
    """Let the allocator know that this stream reads the hooks' results.

    Autograd runs a hook on the stream of its parameter, which need not be
    the one that measures. ``backward`` returns with the latter waiting for
    the former, so the values are ready. But freed memory goes back to the
    stream that allocated it, which could overwrite it while it is read.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def sends_float16(model: DistributedDataParallel) -> bool:
    """Whether ranks exchange gradients in float16."""
    return any(
        getattr(part, '__qualname__', '').split('.')[0] in FLOAT16_HOOKS
        for hook, _ in getattr(model, '_comm_hooks', ())
        for part in called_by(hook)
    )

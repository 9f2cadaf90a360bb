"""LARS, LAMB, PMD-LAMB, SOAP and Muon, where pytorch_optimizer is installed.

Importing this registers the names even without the library. Then building one
of these optimizers raises an error, but no other training needs the library.
"""

from typing import TYPE_CHECKING, Any, Callable

import torch

# from this module, which has already registered torch's own optimizers
from mmengine.optim import OPTIMIZERS

from mmagvm.recipes.registry import register

try:
    import pytorch_optimizer
except ImportError:
    if TYPE_CHECKING:
        raise
    pytorch_optimizer = None


if pytorch_optimizer is None:

    def _refuse(name: str) -> Callable[..., Any]:
        def build(*args: Any, **kwargs: Any) -> Any:
            raise ImportError(
                f'optimizer type={name!r} needs the library '
                "pytorch_optimizer: pip install 'mmagvm[optimizers]'"
            )

        return build

    for _name in ('LARS', 'LAMB', 'PMDLAMB', 'SOAP', 'Muon'):
        if _name not in OPTIMIZERS.module_dict:  # torch's Muon may be
            register(OPTIMIZERS, _name)(_refuse(_name))

else:
    from mmagvm.recipes.matrix_optimizers import SOAP, Muon

    register(OPTIMIZERS)(SOAP)
    # torch 2.9 and later has a Muon that takes matrices only, so that it
    # trains no model of mmdet or mmseg
    register(OPTIMIZERS, instead_of='torch.optim')(Muon)

    @register(OPTIMIZERS)
    class LARS(pytorch_optimizer.LARS):
        """Layer-wise adaptive rate scaling (You et al., 2017).

        For each weight w with gradient g::

            ratio = trust_coefficient |w| / (|g| + weight_decay |w|)
            m <- momentum m + ratio (g + weight_decay w);  w <- w - lr m

        Scalars and vectors, so biases and norm layers, have ratio 1 and no
        weight decay, without a setting. There is no second moment, so AGVM
        measures raw gradients, as for SGD.

        Args:
            params: Parameters or their groups.
            lr: Learning rate.
            momentum: Defaults to 0.9.
            weight_decay: Defaults to 0.
            trust_coefficient: Defaults to 0.001.
            kwargs: Of ``pytorch_optimizer.LARS``.
        """

    @register(OPTIMIZERS)
    class LAMB(pytorch_optimizer.Lamb):
        """Adam with a trust ratio for each weight (You et al., ICLR 2020).

        For each weight w with Adam's moments m and v of its gradient::

            r = m / (sqrt(v) + eps) + weight_decay w
            w <- w - lr min(|w|, 10) / |r| r

        without bias correction, which the ratio nearly cancels, and with
        ratio 1 where w is zero. The state has ``exp_avg_sq``, so AGVM
        measures Alg. 2's modified gradients.

        All parameters are adapted. With the option ``adam=True`` biases and
        norm layers step as with Adam, for instance::

            paramwise_cfg=dict(custom_keys={
                'bias': dict(adam=True, decay_mult=0.0),
                'bn': dict(adam=True, decay_mult=0.0)})

        Args:
            params: Parameters or their groups.
            lr: Learning rate.
            betas: Decay of the moments. Defaults to (0.9, 0.999).
            eps: Defaults to 1e-6.
            weight_decay: Defaults to 0.
            weight_decouple: True, the library's default, shrinks weights as
                AdamW does, by ``lr * weight_decay`` outside of the ratio.
                Defaults to False, the paper's.
            kwargs: Of ``pytorch_optimizer.Lamb``.
        """

        def __init__(
            self, params: Any, weight_decouple: bool = False, **kwargs: Any
        ) -> None:
            # otherwise the library divides lr by 1 - beta1^t, which the trust
            # ratio does not cancel: ten times the lr in the first update
            kwargs.setdefault('adam_debias', True)
            super().__init__(params, weight_decouple=weight_decouple, **kwargs)

    @register(OPTIMIZERS)
    class PMDLAMB(LAMB):
        """:class:`LAMB` with periodical moments decay.

        After every ``period`` updates both moments are multiplied by
        ``moment_decay``, so that the optimizer forgets old gradients. The
        papers name this method without its period and its factor. The form
        of the decay and both defaults are this project's choice, not those
        behind the reported results.

        Args:
            params: Parameters or their groups.
            period: Updates between two decays. Defaults to 100.
            moment_decay: Factor from 0, which clears the moments, to 1,
                which makes this LAMB. Defaults to 0.5.
            kwargs: Of :class:`LAMB`.
        """

        def __init__(
            self,
            params: Any,
            period: int = 100,
            moment_decay: float = 0.5,
            **kwargs: Any,
        ) -> None:
            if not isinstance(period, int) or period < 1:
                raise ValueError(
                    f'period={period!r} of PMDLAMB is not a number of '
                    'updates: write 1 or more, such as 100'
                )
            if not 0 <= moment_decay <= 1:
                raise ValueError(
                    f'moment_decay={moment_decay!r} of PMDLAMB is not a '
                    'factor: write a number from 0 to 1, such as 0.5'
                )
            super().__init__(
                params, period=period, moment_decay=moment_decay, **kwargs
            )

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """Update, then decay the moments if a period ends."""
            loss = super().step(closure)
            for group in self.param_groups:
                if group['step'] % group['period'] == 0:
                    moments = [
                        self.state[param][moment]
                        for param in group['params']
                        if param in self.state
                        for moment in ('exp_avg', 'exp_avg_sq')
                    ]
                    if moments:
                        torch._foreach_mul_(moments, group['moment_decay'])
            return loss

"""Estimators of the gradient variance; the only user of torch.distributed."""

from .base import NOT_MEASURED, GradVariance, Measurement
from .build import (
    ESTIMATORS,
    build_grad_variance,
    refuse_sharded_model,
    refuse_sharded_state,
    refuse_sparse_gradients,
)
from .preconditioner import refuse_fixed_rates
from .probe import param_states
from .ranks import COMM_HOOKS

__all__ = [
    'COMM_HOOKS',
    'ESTIMATORS',
    'NOT_MEASURED',
    'GradVariance',
    'Measurement',
    'build_grad_variance',
    'param_states',
    'refuse_fixed_rates',
    'refuse_sharded_model',
    'refuse_sharded_state',
    'refuse_sparse_gradients',
]

"""Adam for JAX: exact at any precision, composable with optax, one fused pass per leaf."""

from adam_jax._accumulation import accumulated_value_and_grad as accumulated_value_and_grad
from adam_jax._adam import adam as adam
from adam_jax._adam import adamw as adamw
from adam_jax._adam import nadam as nadam
from adam_jax._adam import nadamw as nadamw
from adam_jax._adam import scale_by_adam as scale_by_adam
from adam_jax._adamax import adamax as adamax
from adam_jax._adamax import adamaxw as adamaxw
from adam_jax._adamax import scale_by_adamax as scale_by_adamax
from adam_jax._amsgrad import amsgrad as amsgrad
from adam_jax._amsgrad import scale_by_amsgrad as scale_by_amsgrad
from adam_jax._averaging import AverageParamsState as AverageParamsState
from adam_jax._averaging import average_params as average_params
from adam_jax._averaging import averaged_params as averaged_params
from adam_jax._clipping import clip_by_global_norm as clip_by_global_norm
from adam_jax._clipping import per_layer as per_layer
from adam_jax._convert import convert_remainder as convert_remainder
from adam_jax._convert import convert_state as convert_state
from adam_jax._landing import CheckLandingState as CheckLandingState
from adam_jax._landing import check_landing as check_landing
from adam_jax._master_weights import MasterWeightsState as MasterWeightsState
from adam_jax._master_weights import NoLowPrecisionWarning as NoLowPrecisionWarning
from adam_jax._master_weights import load_master_params as load_master_params
from adam_jax._master_weights import master_params as master_params
from adam_jax._master_weights import master_weights as master_weights
from adam_jax._memory import MemoryUsage as MemoryUsage
from adam_jax._memory import ParameterMemory as ParameterMemory
from adam_jax._memory import memory_usage as memory_usage
from adam_jax._offload import offload as offload
from adam_jax._release import value_and_update as value_and_update
from adam_jax._row_sparse import RowSparse as RowSparse
from adam_jax._row_sparse import RowSparseState as RowSparseState
from adam_jax._row_sparse import row_sparse as row_sparse
from adam_jax._sharding import state_shardings as state_shardings
from adam_jax._statistics import step_statistics as step_statistics
from adam_jax._storage import Int8Moment as Int8Moment
from adam_jax._torch import from_torch as from_torch
from adam_jax._torch import to_torch as to_torch

__version__ = "0.1.0"

"""Loss functions: one pure function per equation."""

from nernlit.losses.distillation import feature_map_loss, kd_loss
from nernlit.losses.reconstruction import explained_power, reconstruction_mse, reconstruction_rmse, root
from nernlit.losses.spectrum import high_frequency_share

__all__ = [
    "explained_power",
    "feature_map_loss",
    "high_frequency_share",
    "kd_loss",
    "reconstruction_mse",
    "reconstruction_rmse",
    "root",
]

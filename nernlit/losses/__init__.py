"""One pure function an equation."""

from nernlit.losses.distillation import feature_map_loss, kd_loss
from nernlit.losses.reconstruction import reconstruction_mse, reconstruction_rmse, variance_explained

__all__ = ["feature_map_loss", "kd_loss", "reconstruction_mse", "reconstruction_rmse", "variance_explained"]

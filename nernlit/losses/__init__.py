"""One pure function an equation."""

from nernlit.losses.reconstruction import reconstruction_mse, reconstruction_rmse, variance_explained

__all__ = ["reconstruction_mse", "reconstruction_rmse", "variance_explained"]

"""The axis vocabulary. Axes are whole words: token, batch, source, d_model, latent, pair, sequence, position.

`token`  tokens of a store            `batch`  tokens of one step          `source`  a model at a layer
`d_model` width of the residual stream `latent` one unit of a crosscoder    `pair`    one active (token, latent) pair
"""

from jaxtyping import Bool, Float, Float32, Float64, Int, Int8, Int64
from torch import Tensor

__all__ = ["Bool", "Float", "Float32", "Float64", "Int", "Int8", "Int64", "Tensor"]

"""Vector quantization: the nearest row of a learned codebook.

Letters: z (..., d), codebook C (K, d), sg stop-gradient; means are over all elements.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.codes import straight_through
from ._base import Quantizer, TokenOut, package


class VQ(Quantizer):
    """i = argmin_j |z - C_j|², of equal ones the lowest; loss mean((C_i - sg z)²) + beta mean((sg C_i - z)²).

    C starts uniform in ±1/K. `beta_on="codebook"` puts beta on the first term instead, as some released codes do (SEED's legacy
    flag). Neural Discrete Representation Learning, 2017, arXiv:1711.00937. vector-quantize-pytorch with a learnable codebook has
    one undivided term mean((C_i - z)²), so it cannot stand in here.
    """

    def __init__(self, dim: int, codebook_size: int, beta: float = 0.25, beta_on: str = "commitment") -> None:
        super().__init__()
        if beta_on not in ("commitment", "codebook"):
            raise ValueError(f'beta_on must be "commitment" or "codebook", got {beta_on!r}.')
        self.dim, self.codebook_size, self.beta, self.beta_on = dim, codebook_size, beta, beta_on
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))

    def rows(self) -> Tensor:
        """(K, d) the codebook as it is looked up."""
        return self.codebook.float()

    def point(self, z: Tensor) -> Tensor:
        """z as it is looked up."""
        return z

    def distances(self, z: Tensor, rows: Tensor) -> Tensor:
        """(..., K) squared distances, up to |z|², which all rows share."""
        return rows.square().sum(-1) - 2 * z @ rows.mT

    def quantize(self, z: Tensor) -> TokenOut:
        z, rows = self.point(z), self.rows()
        ids = self.distances(z.detach(), rows.detach()).argmin(-1)
        q = F.embedding(ids, rows)
        codebook, commitment = F.mse_loss(q, z.detach()), F.mse_loss(z, q.detach())
        if self.beta_on == "commitment":
            commitment = self.beta * commitment
        else:
            codebook = self.beta * codebook
        return TokenOut(ids, z, straight_through(z, q), {"codebook": codebook, "commitment": commitment})

    def decode(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows())


class CosineVQ(VQ):
    """`VQ` on the unit sphere: z and C are normalised at every lookup, losses and output are of the normalised vectors.

    d is small in practice, 8 to 32. Vector-quantized Image Modeling with Improved VQGAN, 2021, arXiv:2110.04627.
    vector-quantize-pytorch has cosine codebooks only with EMA updates, so it cannot stand in here.
    """

    def rows(self) -> Tensor:
        return F.normalize(self.codebook.float(), dim=-1)

    def point(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)

    def distances(self, z: Tensor, rows: Tensor) -> Tensor:
        return -z @ rows.mT


class EMAVQ(Quantizer):
    """`VQ` whose codebook follows running means of what it is given instead of a gradient; in training mode only.

    N_j <- g N_j + (1-g) n_j; M_j <- g M_j + (1-g) sum z; C_j = M_j / N̂_j with N̂_j = n (N_j + eps) / (n + K eps), n = sum N. The
    lookup uses the codebook from before the update; the loss is beta mean((sg C_i - z)²). A code with N_j < `dead_below` restarts
    at a random vector of the batch. The work is vector-quantize-pytorch's (extra ``tokenizers``). It differs from the usual
    description where there are fewer vectors than dead codes: as many restart as there are vectors, the others later, instead of
    copies with noise. Its random draws come from torch's global generator.
    """

    def __init__(
        self, dim: int, codebook_size: int, beta: float = 0.25, decay: float = 0.99, eps: float = 1e-5, dead_below: float = 1.0
    ) -> None:
        super().__init__()
        self.dim, self.codebook_size, self.beta = dim, codebook_size, beta
        self.vq = package().VectorQuantize(
            dim,
            codebook_size,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=dead_below,
            commitment_weight=0.0,
            rotation_trick=False,
        )

    def quantize(self, z: Tensor) -> TokenOut:
        # without gradient the package returns the code itself; loss and straight-through are the same as everywhere here
        q, ids, _ = self.vq(z.detach().reshape(1, -1, self.dim))
        q, ids = q.detach().view(z.shape), ids.view(z.shape[:-1])
        return TokenOut(ids, z, straight_through(z, q), {"commitment": self.beta * F.mse_loss(z, q)})

    def decode(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.vq.codebook)

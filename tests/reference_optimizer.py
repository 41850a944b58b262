"""EFCP as its paper has it (arXiv 2306.06098, Algorithm 1): dense, in fp64, slow. The oracle of the fast optimizers.

a = e + g,  c_j = C(a),  e <- a - c_j       for each tensor; e is what compression leaves out
G (m, d): the last m entries c_j;  K = G G^T;  u = G^T phi(K) e_j;  p <- (1 - lr wd) p - lr u
M-FAC: u = (damping I + G^T G / m)^-1 c_j = G^T (damping I + K / m)^-1 e_j
GGT:   u = (eps I + (G^T G)^1/2)^-1 c_j   = G^T (eps I + K^1/2)^-1 e_j
"""

from types import SimpleNamespace

import torch

from hf_efcp.core.random import counted_noise  # uniform in (-1, 1), a function of the step and of the tensor's number


class ReferenceOptimizer:
    def __init__(self, params, family, compression, **options):  # traits in the registry; every option of the method
        self.params, self.family, self.compression, self.o = params, family, compression, SimpleNamespace(**options)
        self.sizes = [p.numel() for p in params]
        self.G = torch.zeros(self.o.window_size, sum(self.sizes), dtype=torch.float64)
        self.columns = self.G.split(self.sizes, 1)  # each tensor's, views of G
        self.windows = [self.G] if self.o.scope == "model" else self.columns
        self.e, self.Q, self.v, self.t = [0] * len(params), [None] * len(params), 0, 0

    @torch.no_grad()
    def step(self):
        o, j = self.o, self.t % self.o.window_size  # j: the slot of the oldest entry
        for i, p in enumerate(self.params):
            a = self.e[i] + p.grad
            c = self.compress(i, a.flatten(1)).view_as(a) if a.ndim > 1 else a
            self.e[i], self.columns[i][j] = a - c, c.flatten()
        ages = (j - torch.arange(o.window_size)) % o.window_size
        w = (1 - o.window_momentum) * o.window_momentum ** ages.double()  # e_j where window_momentum is 0
        u = torch.cat([G.T @ self.phi(G @ G.T) @ w for G in self.windows])
        u *= o.update_rms * len(u) ** 0.5 / u.norm() if o.update_rms else 1
        self.v = o.momentum * self.v + (1 - o.momentum) * u
        for p, v in zip(self.params, self.v.split(self.sizes), strict=True):
            p.copy_((1 - o.lr * o.weight_decay) * p - o.lr * v.view_as(p))
        self.t += 1

    def compress(self, i, a):
        """C(a) of tensor i, a matrix; a itself where its compressed form would take as many bytes."""
        o, (rows, cols) = self.o, a.shape
        if self.compression == "sparse":  # of each block of each row the largest entries: 8 bytes each, and 2 for the index
            kept = [(b, b.abs().topk(max(1, round(o.density * b.shape[1]))).indices) for b in a.split(o.block_size, 1)]
            if 10 * sum(index.shape[1] for _, index in kept) < 8 * cols:
                return torch.cat([torch.zeros_like(b).scatter(1, index, b.gather(1, index)) for b, index in kept], 1)
        elif self.compression == "low rank" and (r := min(o.rank, rows, cols)) * (rows + cols) < rows * cols:
            Q = self.Q[i] if self.t else counted_noise(torch.tensor(0), torch.tensor([i]), r, cols)[0].T.double()
            P = torch.linalg.qr(a @ Q).Q  # one power iteration from the last step's Q
            self.Q[i] = a.T @ P
            return P @ self.Q[i].T
        return a

    def phi(self, K):
        if self.family == "mfac":
            return torch.linalg.inv(self.o.damping * torch.eye(len(K), dtype=K.dtype) + K / len(K))
        s, V = torch.linalg.eigh(K)
        return V @ torch.diag(1 / (self.o.eps + s.clamp_min(0).sqrt())) @ V.T

"""The full matrix in a diagonal's metric: dense, in fp64, slow, all of it in d dimensions. The oracle of the fast optimizers.

g^ = S^-1 g,  S = D^(1/4)                    for each tensor; D: running means of g^2. S^-1 is 0 where D is 0
a^ = e^ + g^,  c_j = C(a^),  e^ <- a^ - c_j
x  = sum w_i c_i;  A = G, or G less the mean of its rows (centered);  F = lambda I + A^T A / N
u^ = F^-1 x (M-FAC), ((A^T A)^1/2 + eps I)^-1 x (GGT);  u = scale * S^-1 u^;  p <- (1 - lr wd) p - lr u

The fast optimizers solve with K = G G^T, m x m, and keep row and column means only; here neither happens.
"""

import torch

from hf_efcp.core.random import counted_noise
from tests.reference_optimizer import ReferenceOptimizer


class Metric:
    """D of one tensor, from all its running means of g^2, (rows, cols): v is not yet divided by 1 - beta^k."""

    def __init__(self, kind, p, beta, eps):
        self.kind = "diagonal" if kind == "factored" and p.ndim < 2 else kind
        self.beta, self.eps, self.v, self.k = beta, eps, torch.zeros_like(matrix(p)), 0

    def root(self, g):
        """Take the gradient g (rows, cols) into D, and give S = D^(1/4), (rows, cols)."""
        before = self.mean()
        if self.k or g.any():  # k counts from the first gradient that is not zero
            self.v, self.k = self.beta * self.v + (1 - self.beta) * g**2, self.k + 1
        now, mu = self.mean(), before.mean()
        if self.kind == "none":
            D = torch.ones_like(g)
        elif self.kind == "tensor":  # of the step before; the first gradient makes its own
            D = (mu if mu else now.mean()) * torch.ones_like(g)
        elif self.kind == "diagonal":
            D = now + self.eps * mu
        else:
            D = (now.mean(1)[:, None] + self.eps * mu) * (before.mean(0) / mu + self.eps if mu else torch.ones_like(g))
        return D**0.25

    def mean(self):
        return self.v / (1 - self.beta**self.k) if self.k else self.v


class MetricReference(ReferenceOptimizer):
    """As ReferenceOptimizer, from which it has C(a). The entries are a list of vectors, the newest last."""

    def __init__(self, params, family, compression, **options):
        super().__init__(params, family, compression, **options)
        self.metrics = [Metric(self.o.metric, p, self.o.metric_beta, self.o.metric_eps) for p in params]
        self.entries, self.v = [], [torch.zeros_like(p) for p in params]
        self.S = [None] * len(params)

    @torch.no_grad()
    def step(self):
        o, live = self.o, [i for i, p in enumerate(self.params) if p.grad is not None]
        if not live or not all(self.params[i].grad.isfinite().all() for i in live):
            return
        l2, decay = (o.weight_decay, 0) if o.weight_decay_mode == "l2" else (0, o.weight_decay)
        entry = [torch.zeros(size, dtype=torch.float64) for size in self.sizes]
        for i in live:
            g = matrix(self.params[i].grad + l2 * self.params[i])
            self.S[i] = self.metrics[i].root(g)
            far, ghat = o.residual == "momentum", inverse(self.S[i]) * g
            a = ghat if far else self.e[i] + ghat
            c = self.compressed(i, a) if self.params[i].ndim > 1 else a
            self.e[i], entry[i] = (self.beta * self.e[i] if far else 0) + a - c, c.flatten()
        self.entries = [*self.entries, torch.cat(entry)][-o.window_size :]
        self.t += 1

        G = torch.stack(self.entries)
        windows = [G] if o.scope == "model" else G.split(self.sizes, 1)
        weighted = [rows.T @ self.weights(rows) for rows in windows]
        u = torch.cat([self.solve(rows, x) for rows, x in zip(windows, weighted, strict=True)])
        x, far, mean = torch.cat(weighted), torch.zeros_like(u), torch.zeros_like(u)
        if o.residual == "momentum":  # the mean of what compression left out counts as outside of the window's span
            means = [(e + torch.zeros(n)).flatten() for e, n in zip(self.flat_errors(), self.sizes, strict=True)]
            means = [mean * (i in live) for i, mean in enumerate(means)]  # a tensor that stays has no part in the size
            mean, parts = torch.cat(means), [torch.cat(means)] if o.scope == "model" else means
            far = torch.cat([part * self.outside(rows) for part, rows in zip(parts, windows, strict=True)])
        # Two rows each: the parts in the span and outside of it are taken for orthogonal.
        u = (u + far) * self.scale(torch.stack([u, far]), torch.stack([x, mean]), G, live)
        for i in live:
            p, u_i = self.params[i], u.split(self.sizes)[i].view_as(self.S[i])
            self.v[i] = o.momentum * self.v[i] + (1 - o.momentum) * (inverse(self.S[i]) * u_i).view_as(p)
            p.copy_((1 - o.lr * decay) * p - o.lr * self.v[i])

    @property
    def beta(self):
        return self.o.window_momentum or getattr(self.o, "beta1", 0)

    def flat_errors(self):
        """The running mean of what compression left out of each tensor, flat; 0 where nothing is."""
        normal = 1 - self.beta**self.t if self.o.metric != "none" or self.o.window_nesterov else 1
        return [(e.flatten() if isinstance(e, torch.Tensor) else e) * ((1 - self.beta) / normal) for e in self.e]

    def outside(self, rows):
        """What multiplies a vector outside of the span of the rows: phi(0)."""
        if self.family != "mfac":
            eps = self.eps(rows)
            return 1 / eps if eps else 0
        damping = self.o.damping * (rows.square().sum() / len(rows) if self.o.damping_mode == "relative" else 1)
        return 1 / damping if damping else 0

    def eps(self, rows):
        """GGT's eps, in units of the root mean square norm of the rows if it is relative."""
        return self.o.eps * ((rows.square().sum() / len(rows)).sqrt() if self.o.eps_mode == "relative" else 1)

    def compressed(self, i, a):
        """C(a); a low-rank tensor without a gradient so far begins when it gets one."""
        before = self.Q[i]
        if self.compression == "low rank" and self.t and before is None:
            r = min(self.o.rank, *a.shape)
            self.Q[i] = counted_noise(torch.tensor(self.t), torch.tensor([i]), r, a.shape[1])[0].T.double()
        c = self.compress(i, a)
        if self.Q[i] is not None and not c.any():
            self.Q[i] = before
        return c

    def weights(self, rows):
        """w (n,): what each entry weighs; one that is zero has no weight."""
        o, ages = self.o, torch.arange(len(rows) - 1, -1, -1)
        beta = self.beta
        alive, newest = rows.any(1), (ages == 0).double()
        w = torch.where(alive, (1 - beta) * beta ** ages.double(), 0)
        if (o.metric != "none" or o.window_nesterov) and w.any():
            w = w / w.sum()
        return torch.where(alive, beta * w + (1 - beta) * newest, 0) if o.window_nesterov else w

    def solve(self, rows, x):
        """F^-1 x (M-FAC) or ((A^T A)^1/2 + eps I)^-1 x (GGT), in d dimensions; `rows` is G (n, d)."""
        o, n = self.o, len(rows)
        A = rows - rows.mean(0) if o.centered else rows
        if not x.any():
            return x
        if self.family == "mfac":
            N = n if o.divisor == "filled" or o.centered else o.window_size
            damping = o.damping * (rows.square().sum() / n if o.damping_mode == "relative" else 1)
            return torch.linalg.solve(damping * torch.eye(len(x), dtype=x.dtype) + A.T @ A / N, x)
        _, s, V = torch.linalg.svd(o.beta2 ** torch.arange(n - 1, -1, -1)[:, None].double() * A, full_matrices=False)
        known = s > (1e-5 if o.centered else 1e-9) * s.max()  # centred, what is smaller counts as 0: eigenvalues of 1e-10
        s, V = s[known], V[known]
        outside = (x - V.T @ V @ x) / self.eps(rows) if o.centered else 0  # x lies in the span of G, not in that of A
        return V.T @ (V @ x / (self.eps(rows) + s)) + outside

    def scale(self, u, x, G, live):
        """The number that makes sum S^2 u^2 / sum S^2 = update_rms^2, the first sum over all tensors."""
        if self.o.update_rms is None or not u.any():
            return 1
        scale = self.o.update_rms * sum(self.S[i].square().sum() for i in live).sqrt() / u.norm()
        if self.o.rms_mode != "adam":
            return scale
        whole = self.o.residual == "momentum"  # nothing is left out of x, and S^2 is the mean square of the whole gradients
        square = sum(self.S[i].square().sum() for i in live) if whole else G.square().sum() / len(G)
        rho = x.norm() / square.sqrt()
        return scale * (rho.clamp_max(1) if whole else rho)


def matrix(t):
    """The 2-D view (rows, cols) of a tensor; (1, numel) for 0-D and 1-D ones."""
    return t.detach().reshape(len(t), -1) if t.ndim > 1 else t.detach().reshape(1, -1)


def inverse(S):
    """S^-1, 0 where S is 0."""
    return torch.where(S > 0, 1 / S, 0)


def reference_of(fast, params, family, compression):
    """The slow reference of a fast optimizer, before its first step, for other parameters of the same values."""
    group = fast.param_groups[0]
    options = {**vars(fast.options), "lr": group["lr"], "weight_decay": group["weight_decay"]}
    return MetricReference(params, family, compression, **options)

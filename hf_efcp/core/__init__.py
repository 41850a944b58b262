"""The mathematics in plain torch: error feedback, compressors, windows, Gram matrix, coefficients.

Layout, fixed once for all modules: tensors of one shape are handled as a stack of n; a stack's gradient is (n, rows, cols), the
2-D view of each tensor being (shape[0], product of the rest), and (1, numel) for 0-D and 1-D tensors.
Symbols: m window size, r rank, k kept entries per row, G the window (row i = c_i), K = G G^T, j the newest slot, e the error.
"""
